"""PEFT's VBLORA: `kind: vblora`.

    base_model.vblora_vector_bank [N, V]
    base_model.model.<layer>.vblora_logits_A [r, in / V, N]      .vblora_logits_B [out / V, r, N]

With `save_only_topk_weights` each of the two logits [..., N] is instead

    <logits>_topk_indices [..., K]    of the smallest integer type       <logits>_topk_weights [..., K - 1]    they and the last add up to 1

which is for inference and merging: a layer that was read from it refuses to be trained.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.methods.vblora import BANK, INDICES, WEIGHTS, VBLoRA, VBLoRAConfig, VBLoRADelta, chosen_of, logits_of
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_kinds.dialect import Entry, Parts, Reading
from d9d_lora.state.peft_kinds.projected import OnLinear

SMALL = "save_only_topk_weights"
LOGITS = ("vblora_logits_A", "vblora_logits_B")


class VBLoRADialect(OnLinear):
    peft_type = "VBLORA"
    kind = "vblora"
    bias = "vblora_only"
    fields = {
        "r": 4,
        "num_vectors": 256,
        "vector_length": 256,
        "topk": 2,
        SMALL: False,
        "vblora_dropout": 0.0,
        "init_vector_bank_bound": 0.02,
        "init_logits_std": 0.1,
        "fan_in_fan_out": False,
    }
    numbers = {"r": (int, 1), "num_vectors": (int, 2), "vector_length": (int, 1), "topk": (int, 1)}
    factors = (*LOGITS, *(name + part for name in LOGITS for part in (INDICES, WEIGHTS)))
    shared = {f"base_model.{BANK}": BANK}

    def describe(self, model: nn.Module, layers: Sequence[AdaptedLayer], facts: Any) -> dict[str, Any]:
        delta = layers[0].delta
        assert isinstance(delta, VBLoRADelta)
        return {
            **self.targets(model, layers),
            **self._sizes(delta),
            SMALL: delta.small or any(layer.delta.chosen for layer in layers if isinstance(layer.delta, VBLoRADelta)),
            "vblora_dropout": delta.dropout,
            "init_vector_bank_bound": delta.bank_bound,
            "init_logits_std": delta.logits_std,
        }

    def _sizes(self, delta: VBLoRADelta) -> dict[str, int]:
        return {"r": delta.r, "num_vectors": delta.num_vectors, "vector_length": delta.vector_length, "topk": delta.topk}

    def check(self, config: dict[str, Any], layer: AdaptedLayer) -> None:
        assert isinstance(layer.delta, VBLoRADelta)
        for name, mine in self._sizes(layer.delta).items():
            if config[name] != mine:
                raise AdapterError(f"{layer.name}: the config says {name} = {config[name]}; the layer has {mine}")

    def entries(self, path: str, layer: AdaptedLayer, config: dict[str, Any]) -> list[Entry]:
        self.check(config, layer)
        whole = self.same(path, layer)
        return [part for entry in whole for part in _small(entry, layer)] if config.get(SMALL) else whole

    def shared_entries(self, model: nn.Module, layers: Sequence[AdaptedLayer], config: dict[str, Any]) -> list[Entry]:
        bank = layers[0].shared[BANK].weight
        name = next(name for name, p in model.named_parameters() if p is bank)  # the root of the injection may be inside `model`
        return [Entry(f"base_model.{BANK}", name, (bank,), tuple(bank.shape))]

    def lacking(self, parts: Parts) -> list[str]:
        whole, small = set(LOGITS), {name + part for name in LOGITS for part in (INDICES, WEIGHTS)}
        return [key for found in parts.factors.values() if found.keys() not in (whole, small) for key in found.values()]

    def filled(self, layers: Sequence[AdaptedLayer], config: dict[str, Any]) -> None:
        for layer in layers:
            assert isinstance(layer.delta, VBLoRADelta)
            layer.delta = replace(layer.delta, chosen=bool(config.get(SMALL)))

    def method(self, reading: Reading) -> VBLoRA:
        config = {**self.fields, **reading.config}
        params = {name: config[name] for name in self.fields if name != "fan_in_fan_out"}
        return VBLoRA(VBLoRAConfig.model_validate({**reading.targeting(reading.layers), "params": params}))


def _small(entry: Entry, layer: AdaptedLayer) -> list[Entry]:
    """The two entries of logits in their small form; both are made from the logits, and the first is read into them."""
    delta = layer.delta
    assert isinstance(delta, VBLoRADelta)
    k, n, head = delta.topk, delta.num_vectors, entry.shape[:-1]

    def made(logits: Tensor, *, part: int) -> Tensor:
        return chosen_of(logits, k, n)[part]

    def read(indices: Tensor, weights: Tensor) -> Tensor:
        if not indices.is_meta and (indices.min() < 0 or indices.max() >= n):
            raise AdapterError(f"{entry.key}{INDICES} names vectors {int(indices.min())} to {int(indices.max())}; the bank has {n}")
        return logits_of(indices, weights, n)

    weights = Entry(entry.key + WEIGHTS, None, entry.sources, (*head, k - 1), partial(made, part=1))
    indices = Entry(entry.key + INDICES, entry.name, entry.sources, (*head, k), partial(made, part=0), read, (weights.key,))
    return [indices, weights]

