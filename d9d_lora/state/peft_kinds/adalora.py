"""ADALORA: <layer>.lora_A [r, in], lora_E [r, 1], lora_B [out, r] of the r triplets that act, scaled by lora_alpha / (init_r + 1e-5).

`rank_pattern` holds, under `<layer>.lora_E`, a mask of the init_r triplets: the file has those that are true, in their order. They are
those with E != 0, so nothing is lost of dW. Where no layer has lost a triplet there is no pattern, and the tensors are whole; before
the first allocation, say. A layer may keep none.

Reading puts the triplets back to their places among init_r, with zeros at the others: scaling and mask are then what they were.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d9d_lora.layers import AdaptedConv1D, AdaptedLayer, AdaptedLinear
from d9d_lora.layers.conv import AdaptedConv
from d9d_lora.methods.adalora import AdaLoRA, AdaLoRAConfig, AdaLoRADelta, AdaLoRAParameters
from d9d_lora.placement import full_of
from d9d_lora.state.atomic import gather
from d9d_lora.state.names import PEFT_PREFIX
from d9d_lora.state.peft_config import AdapterError, layer_names, plain, targets_of
from d9d_lora.state.peft_kinds.dialect import Dialect, Entry, Reading
from d9d_lora.state.peft_kinds.lora import LoRADialect
from d9d_lora.state.peft_kinds.lora_tensors import refuses_convolution

_SCHEDULE = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")


class AdaLoRADialect(Dialect):
    peft_type = "ADALORA"
    kind = "adalora"
    layers = (AdaptedLinear, AdaptedConv)
    bias = "lora_only"
    factors = ("lora_A", "lora_B", "lora_E")
    numbers = {"init_r": (int, 1), "lora_alpha": ((int, float), 0), "total_step": (int, 1)}
    fields = {  # its config is LoRA's and more, though most of LoRA's means nothing to it
        **LoRADialect.fields,
        "beta1": 0.85,
        "beta2": 0.85,
        "deltaT": 1,
        "init_r": 12,
        "orth_reg_weight": 0.5,
        "rank_pattern": None,
        "target_r": 8,
        "tfinal": 0,
        "tinit": 0,
        "total_step": None,
    }
    refused = {
        **LoRADialect.refused,
        "lora_bias": ((None, False), "AdaLoRA has no bias of B"),
        "use_dora": ((None, False), "AdaLoRA has no magnitude"),
        "layer_replication": ((None, []), "replicated layers are not known here with AdaLoRA"),
        "target_parameters": ((None, []), "AdaLoRA adapts layers only"),
        "ensure_weight_tying": ((None, False), "AdaLoRA has no embeddings to tie"),
    }

    # -- writing -------------------------------------------------------------------------------------------------------------

    def refuses(self, layer: AdaptedLayer) -> str | None:
        if (reason := super().refuses(layer)) is not None:
            return reason
        if isinstance(layer, AdaptedConv) and not isinstance(layer.base, nn.Conv2d):
            return f"PEFT has AdaLoRA on Conv2d, and this is a {type(layer.base).__name__}"
        return refuses_convolution(layer, groups=False, dilation=True)

    def disagreement(self, layers: Sequence[AdaptedLayer]) -> str | None:
        found = {(layer.delta.r, layer.delta.alpha): layer.name for layer in layers}  # type: ignore[attr-defined]
        if len(found) > 1:
            (r, one), (other, two) = list(found.items())[:2]
            return f"{one} has init_r, lora_alpha = {r} and {two} has {other}; PEFT has one of each for all layers"
        return None

    def facts(self, layers: Sequence[AdaptedLayer]) -> dict[str, list[bool]]:
        here = [layer for layer in layers if not layer.factor("lora_E").is_meta]
        found = {layer.name: (full_of(layer.factor("lora_E").detach())[:, 0] != 0).tolist() for layer in here}
        masks = {name: mask for part in gather(found) for name, mask in part.items()}  # of all pipeline stages
        return masks if any(map(any, masks.values())) and not all(map(all, masks.values())) else {}

    def describe(self, model: nn.Module, layers: Sequence[AdaptedLayer], facts: dict[str, list[bool]]) -> dict[str, Any]:
        delta = layers[0].delta
        assert isinstance(delta, AdaLoRADelta)
        given = delta.params or AdaLoRAParameters(init_r=delta.r, target_r=1, total_step=1)  # type: ignore[call-arg]
        return {
            **{name: getattr(given, name) for name in _SCHEDULE},
            "fan_in_fan_out": any(isinstance(layer, AdaptedConv1D) for layer in layers),
            "lora_alpha": plain(delta.alpha),
            "lora_dropout": delta.dropout,
            "rank_pattern": {f"{name}.lora_E": mask for name, mask in facts.items()} or None,
            "target_modules": targets_of([layer.name for layer in layers], layer_names(model)),
        }

    def check(self, config: dict[str, Any], layer: AdaptedLayer) -> None:
        if config["lora_alpha"] / (config["init_r"] + 1e-5) != layer.delta.scaling:
            raise AdapterError(f"{layer.name}: the config says {config['lora_alpha']} / {config['init_r']}; the layer has {layer.delta}")

    def entries(self, path: str, layer: AdaptedLayer, config: dict[str, Any]) -> list[Entry]:
        entries = self.same(path, layer)
        mask = (config.get("rank_pattern") or {}).get(f"{layer.name}.lora_E")
        return entries if mask is None else [_pruned(entry, torch.tensor(mask, dtype=torch.bool)) for entry in entries]

    # -- reading -------------------------------------------------------------------------------------------------------------

    def faults(self, config: dict[str, Any]) -> list[str]:
        faults = super().faults({name: value for name, value in config.items() if name != "runtime_config"})
        if config.get("alpha_pattern"):
            faults.append(f"alpha_pattern = {config['alpha_pattern']!r}: PEFT's AdaLoRA has one alpha for all layers")
        pattern = config.get("rank_pattern") or {}
        if not isinstance(pattern, dict):
            return [*faults, f"rank_pattern = {pattern!r}: expected an object of masks"]
        for name, mask in pattern.items():
            if not isinstance(mask, list) or len(mask) != config.get("init_r") or not all(isinstance(m, bool) for m in mask):
                faults.append(f"rank_pattern: {name!r} has {str(mask)[:80]}; expected {config.get('init_r')} of true and false")
        return faults

    def method(self, reading: Reading) -> AdaLoRA:
        config, layers = reading.config, reading.layers
        _check_shapes(reading)
        given = {name: config[name] for name in _SCHEDULE if config.get(name) is not None}
        given |= {"lora_alpha": float(config["lora_alpha"]), "lora_dropout": config.get("lora_dropout") or 0.0}
        return AdaLoRA(AdaLoRAConfig.model_validate({**reading.targeting(layers), "params": given}))


def _pruned(entry: Entry, mask: Tensor) -> Entry:
    """Only the triplets of the mask are in the file: rows of A and E, columns of B."""
    dim = 1 if entry.key.endswith(".lora_B") else 0
    (p,) = entry.sources
    shape = [int(mask.sum()) if d == dim else n for d, n in enumerate(p.shape)]
    places = mask.nonzero()[:, 0]
    return Entry(
        entry.key,
        entry.name,
        entry.sources,
        tuple(shape),
        to_file=lambda whole: whole.index_select(dim, places.to(whole.device)),
        from_file=partial(_put_back, places, tuple(p.shape), dim),
    )


def _put_back(places: Tensor, shape: tuple[int, ...], dim: int, few: Tensor) -> Tensor:
    return few.new_zeros(shape).index_copy_(dim, places.to(few.device), few)


def _check_shapes(reading: Reading) -> None:
    config, files = reading.config, reading.files
    pattern = config.get("rank_pattern") or {}
    faults = [f"{name}: no layer of the file" for name in pattern if name.removesuffix(".lora_E") not in reading.parts.factors]
    for layer, keys in reading.parts.factors.items():
        mask = pattern.get(f"{layer}.lora_E")
        r = config["init_r"] if mask is None else sum(mask)
        if lacking := sorted(set(AdaLoRADialect.factors) - keys.keys()):
            faults.append(f"{layer}: {PEFT_PREFIX}{layer}.{lacking[0]} is not there")
            continue
        A, B, E = (files.shape(keys[name]) for name in AdaLoRADialect.factors)
        if len(A) != 2 or len(B) != 2 or (A[0], B[1], E) != (r, r, (r, 1)):
            faults.append(f"{layer}: A {A}, B {B}, E {E}, expected [{r}, in], [out, {r}] and [{r}, 1]")
    if faults:
        raise AdapterError(f"{reading.path}: the tensors are not of the ranks the config gives them:\n  " + "\n  ".join(faults[:12]))
