"""LOHA: <layer>.hada_w1_a [out, r], hada_w1_b [r, in], hada_w2_a, hada_w2_b, scaled by alpha / r.

With a Tucker core (`use_effective_conv2d`, kernels larger than 1): hada_t1, hada_t2 [r, r, taps], hada_w*_a [r, out], hada_w*_b [r, C].
Names and shapes are ours. PEFT has it on nn.Linear, Conv1d and Conv2d.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from d9d_lora.layers import AdaptedConv1D, AdaptedLayer, AdaptedLinear
from d9d_lora.layers.conv import AdaptedConv
from d9d_lora.methods.drops import Drops
from d9d_lora.methods.loha import LoHa, LoHaConfig
from d9d_lora.state.peft_config import AdapterError, commonest, layer_names, pattern_faults, pattern_of, plain, targets_of
from d9d_lora.state.peft_kinds.dialect import Dialect, Entry, Reading
from d9d_lora.state.peft_kinds.lora_tensors import refuses_convolution
from d9d_lora.targets import by_name


class LyCORISDialect(Dialect):
    """What LOHA and LOKR share.

    Attributes:
        common: The attributes of a delta that one config field says for all layers -> the field.
    """

    layers = (AdaptedLinear, AdaptedConv)
    numbers = {"r": (int, 1), "alpha": ((int, float), float("-inf"))}
    fields = {
        "alpha": 8,
        "alpha_pattern": {},
        "init_weights": True,
        "module_dropout": 0.0,
        "r": 8,
        "rank_dropout": 0.0,
        "rank_pattern": {},
        "use_effective_conv2d": False,
    }
    common = {
        "rank_dropout": "rank_dropout",
        "module_dropout": "module_dropout",
        "tucker": "use_effective_conv2d",
        "init_weights": "init_weights",
    }

    # -- writing -------------------------------------------------------------------------------------------------------------

    def refuses(self, layer: AdaptedLayer) -> str | None:
        if (reason := super().refuses(layer)) is not None:
            return reason
        if isinstance(layer, AdaptedConv1D) or isinstance(layer.base, nn.Conv3d):
            return f"PEFT has no {self.peft_type} on a {type(layer.base).__name__}"
        return refuses_convolution(layer, groups=True, dilation=True)

    def disagreement(self, layers: Sequence[AdaptedLayer]) -> str | None:
        for attribute, name in self.common.items():
            found = {getattr(layer.delta, attribute): layer.name for layer in layers}
            if len(found) > 1:
                (one, first), (other, second) = list(found.items())[:2]
                return f"{first} has {name} = {one} and {second} has {other}; PEFT has one for all layers"
        return None

    def describe(self, model: nn.Module, layers: Sequence[AdaptedLayer], facts: Any) -> dict[str, Any]:
        deltas: dict[str, Drops] = {layer.name: layer.delta for layer in layers}  # type: ignore[misc]
        ranks = {name: delta.r for name, delta in deltas.items()}
        alphas = {name: delta.alpha for name, delta in deltas.items()}
        r, alpha = commonest(ranks.values()), commonest(alphas.values())
        return {
            **{name: getattr(layers[0].delta, attribute) for attribute, name in self.common.items()},
            "alpha": plain(alpha),
            "alpha_pattern": {name: plain(a) for name, a in pattern_of(alphas, alpha).items()},
            "r": r,
            "rank_pattern": pattern_of(ranks, r),
            "target_modules": targets_of(list(deltas), layer_names(model)),
        }

    def check(self, config: dict[str, Any], layer: AdaptedLayer) -> None:
        r = by_name(config["rank_pattern"] or {}, layer.name, config["r"])
        alpha = by_name(config["alpha_pattern"] or {}, layer.name, config["alpha"])
        if (r, alpha) != (layer.delta.r, layer.delta.alpha):  # type: ignore[attr-defined]
            raise AdapterError(f"{layer.name}: the config says r={r} and alpha={alpha}; the layer has {layer.delta}")

    def entries(self, path: str, layer: AdaptedLayer, config: dict[str, Any]) -> list[Entry]:
        return self.same(path, layer)

    # -- reading -------------------------------------------------------------------------------------------------------------

    def faults(self, config: dict[str, Any]) -> list[str]:
        faults = super().faults(config)
        for name in ("rank_pattern", "alpha_pattern"):
            faults += pattern_faults(name, config.get(name) or {})
        return faults

    def fields_of(self, reading: Reading) -> dict[str, Any]:
        """Our config: the targets, the patterns, and every field of PEFT's as one of `params`."""
        layers = reading.layers
        if not layers:
            raise AdapterError(f"{reading.path}: the file holds no adapter at all, only {sorted(reading.parts.others)[:5]}")
        params = {name: reading.config[name] for name in self.fields if name in reading.config and not name.endswith("_pattern")}
        return {**reading.targeting(layers), **reading.patterns("r", "alpha", layers), "params": params}


class LoHaDialect(LyCORISDialect):
    peft_type = "LOHA"
    kind = "loha"
    factors = ("hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    def method(self, reading: Reading) -> LoHa:
        return LoHa(LoHaConfig.model_validate(self.fields_of(reading)))
