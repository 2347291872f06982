"""PEFT's RANDLORA: `kind: randlora`.

    base_model.model.<layer>.randlora_lambda [r, n]                .randlora_gamma [n, min(in, out)],  n = ceil(min(in, out) / r)
    base_model.randlora_A [r, 1, m]                                base_model.randlora_B [M, ceil(m / r), r]: `projected.py`
    base_model.model.<layer>.randlora_A, .randlora_B               the same again, in PEFT's files: compared, not written
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.methods.randlora import RandLoRA, RandLoRAConfig, RandLoRADelta
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_kinds.dialect import Reading
from d9d_lora.state.peft_kinds.projected import KEY, SAVED, Projected

SPARSITY = {(False, False): "dense", (True, False): "sparse", (False, True): "very_sparse", (True, True): "very_sparse"}


class RandLoRADialect(Projected):
    peft_type = "RANDLORA"
    kind = "randlora"
    bias = "randlora_only"
    fields = {
        "r": 32,
        "randlora_alpha": 640,
        KEY: 0,
        SAVED: True,
        "sparse": False,
        "very_sparse": False,
        "randlora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_weights": True,
    }
    numbers = {**Projected.numbers, "randlora_alpha": ((int, float), 0)}
    factors = ("randlora_lambda", "randlora_gamma")
    bases = repeats = ("randlora_A", "randlora_B")
    shared = {f"base_model.{name}": name for name in bases}

    def describe(self, model: nn.Module, layers: Sequence[AdaptedLayer], facts: Any) -> dict[str, Any]:
        delta = layers[0].delta
        assert isinstance(delta, RandLoRADelta)
        return {
            **self.targets(model, layers),
            "r": delta.r,
            "randlora_alpha": int(delta.alpha) if float(delta.alpha).is_integer() else delta.alpha,
            KEY: delta.key,
            SAVED: delta.save_projection,
            "sparse": delta.sparsity == "sparse",
            "very_sparse": delta.sparsity == "very_sparse",
            "randlora_dropout": delta.dropout,
        }

    def check(self, config: dict[str, Any], layer: AdaptedLayer) -> None:
        super().check(config, layer)
        delta = layer.delta
        assert isinstance(delta, RandLoRADelta)
        scaling = config["randlora_alpha"] / config["r"]
        sparsity = SPARSITY[bool(config.get("sparse")), bool(config.get("very_sparse"))]  # PEFT's very_sparse hides sparse
        if (scaling, sparsity) != (delta.scaling, delta.sparsity):
            had = f"scaling {delta.scaling} and {delta.sparsity} ones"
            raise AdapterError(f"{layer.name}: the config says scaling {scaling} and {sparsity} bases; the layer has {had}")

    def method(self, reading: Reading) -> RandLoRA:
        self.check_bases(reading)
        config = {**self.fields, **reading.config}
        params = {name: config[name] for name in self.fields if name not in ("fan_in_fan_out", "init_weights")}
        if config["very_sparse"]:
            params["sparse"] = False
        return RandLoRA(RandLoRAConfig.model_validate({**reading.targeting(reading.layers), "params": params}))
