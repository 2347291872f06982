"""PEFT's VERA: `kind: vera`.

    base_model.model.<layer>.vera_lambda_b [out]      .vera_lambda_d [r]
    base_model.vera_A [r, largest in]                 base_model.vera_B [largest out, r]: `projected.py`
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.methods.vera import VeRA, VeRAConfig, VeRADelta
from d9d_lora.state.peft_kinds.dialect import Reading
from d9d_lora.state.peft_kinds.projected import KEY, SAVED, Projected


class VeRADialect(Projected):
    peft_type = "VERA"
    kind = "vera"
    bias = "vera_only"
    fields = {"r": 256, KEY: 0, SAVED: True, "vera_dropout": 0.0, "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True}
    factors = ("vera_lambda_b", "vera_lambda_d")
    bases = ("vera_A", "vera_B")
    shared = {f"base_model.{name}": name for name in bases}

    def describe(self, model: nn.Module, layers: Sequence[AdaptedLayer], facts: Any) -> dict[str, Any]:
        delta = layers[0].delta
        assert isinstance(delta, VeRADelta)
        return {
            **self.targets(model, layers),
            "r": delta.r,
            KEY: delta.key,
            SAVED: delta.save_projection,
            "vera_dropout": delta.dropout,
            "d_initial": delta.d_initial,
        }

    def method(self, reading: Reading) -> VeRA:
        self.check_bases(reading)
        config = {**self.fields, **reading.config}
        params = {name: config[name] for name in self.fields if name not in ("fan_in_fan_out", "init_weights")}
        return VeRA(VeRAConfig.model_validate({**reading.targeting(reading.layers), "params": params}))
