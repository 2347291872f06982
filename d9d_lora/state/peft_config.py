"""`adapter_config.json`: made from the adapted layers themselves, and checked against them.

What a layer does stands in the layer (rank, alpha, rule), so that a save cannot disagree with the training: the commonest
rank and alpha become the defaults, and every other layer gets an entry of `rank_pattern` or `alpha_pattern`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from d9d_lora.layers import AdaptedConv1D, AdaptedEmbedding, AdaptedLayer, AdaptedLinear
from d9d_lora.methods.delta import Delta
from d9d_lora.methods.dora import DoRADelta
from d9d_lora.methods.lora import LoRADelta
from d9d_lora.replicate import restacked
from d9d_lora.state.names import clean
from d9d_lora.targets import by_name, named
from d9d_lora.walk import names_of_modules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # the version whose names and meanings these are
N = TypeVar("N", int, float)


class AdapterError(ValueError):
    """An adapter that cannot be written or read as asked: what was expected, what came, and the mend."""


def config_of(model: nn.Module, layers: Sequence[AdaptedLayer], *, bias: str, whole: list[str]) -> dict[str, Any]:
    """The config that makes PEFT build these layers with these scalings; JSON types only."""
    deltas = {layer.name: on_disk(layer) for layer in layers}
    rslora = all(delta.rule == "rslora" for delta in deltas.values())
    ranks = {name: delta.r for name, delta in deltas.items()}
    # PEFT has one rule for all layers: where ours differ, alpha says it, such that alpha / r is the layer's own scaling
    mixed = not rslora and any(delta.rule == "rslora" for delta in deltas.values())
    alphas = {name: delta.scaling * delta.r if mixed else delta.alpha for name, delta in deltas.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "alpha_pattern": {name: _plain(a) for name, a in pattern_of(alphas, alpha).items()},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": bias,
        "exclude_modules": None,
        "fan_in_fan_out": any(isinstance(layer, AdaptedConv1D) for layer in layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": stack.ranges if (stack := restacked(model)) else None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_bias": _lora_bias(deltas),
        "lora_alpha": _plain(alpha),
        "lora_dropout": _commonest(delta.dropout for delta in deltas.values()),
        "modules_to_save": sorted(whole) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": r,
        "rank_pattern": pattern_of(ranks, r),
        "revision": None,
        "target_modules": targets_of(list(deltas), _names(model)),
        "task_type": None,
        "use_dora": _dora(layers),
        "use_rslora": rslora,
    }


def low_rank(delta: Delta) -> LoRADelta:
    """The product B A of a delta, without a magnitude."""
    low = delta.low if isinstance(delta, DoRADelta) else delta
    if not isinstance(low, LoRADelta):
        raise AdapterError(f"PEFT has no adapter such as {delta}; export the merged model")
    return low


def on_disk(layer: AdaptedLayer) -> LoRADelta:
    """The product as a file for the untouched base holds it: of a start B0 A0 that moved the base, [B|-B0] [A|A0] at the same scaling."""
    low = low_rank(layer.delta)
    if not low.moves_base:
        return low
    if not layer.origin:
        raise AdapterError(f"{layer.name} ({layer.delta}) has not been started: call `method.initialise(model)` with the weights loaded")
    return replace(low, r=2 * low.r, alpha=low.alpha * (2**0.5 if low.rule == "rslora" else 2))


WRITTEN = (AdaptedLinear, AdaptedEmbedding)  # layer kinds whose factors are matrices in PEFT's files too


def holds(layers: Iterable[AdaptedLayer]) -> bool:
    """Whether one PEFT directory can hold the adapters of all these layers."""
    found = set()
    for layer in layers:
        low = layer.delta.low if isinstance(layer.delta, DoRADelta) else layer.delta
        if not isinstance(low, LoRADelta) or not isinstance(layer, WRITTEN):
            return False
        found.add((low is layer.delta, low.bias))  # one `use_dora` and one `lora_bias` for all layers
    return len(found) == 1


def _dora(layers: Sequence[AdaptedLayer]) -> bool:
    have = {isinstance(layer.delta, DoRADelta): layer.name for layer in layers}
    if len(have) == 2:
        raise AdapterError(
            f"{have[True]} has a magnitude (DoRA) and {have[False]} has none; PEFT has one `use_dora` for all layers. Train both alike, "
            "or export the merged model."
        )
    return True in have


def _lora_bias(deltas: dict[str, LoRADelta]) -> bool:
    have = {delta.bias: name for name, delta in deltas.items()}
    if len(have) == 2:
        raise AdapterError(f"{have[True]} has lora_bias and {have[False]} has not; PEFT has one for all layers. Train both alike")
    return True in have


def dump(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def pattern_of(values: dict[str, N], default: N) -> dict[str, N]:
    """The entries of `rank_pattern` or `alpha_pattern` for the layers that differ from the default.

    A key is a regular expression for a dotted end of a name, and the first that matches wins. Plain full names mostly mean
    just themselves; where one would also match another layer, all are anchored and escaped.
    """
    plain = {name: value for name, value in sorted(values.items()) if value != default}
    if all(by_name(plain, name, default) == value for name, value in values.items()):
        return plain
    return {f"^{re.escape(name)}": value for name, value in plain.items()}


def targets_of(adapted: list[str], every: list[str]) -> list[str] | str:
    """The shortest sorted names that select just these layers among all modules; a regular expression as a last resort."""
    for names in (sorted({name.rpartition(".")[2] for name in adapted}), sorted(adapted)):
        if {name for name in every if named(name, names)} == set(adapted):
            return names
    return "|".join(re.escape(name) for name in sorted(adapted))


def check_config(config: dict[str, Any], layers: Sequence[AdaptedLayer]) -> None:
    """That PEFT's reading of a config gives every layer its own rank and scaling, and trains none of them whole."""
    for layer in layers:
        delta = on_disk(layer)
        r, scaling = meaning(config, layer.name)
        if r != delta.r or abs(scaling - delta.scaling) > 1e-12 * abs(delta.scaling):
            raise AdapterError(f"{layer.name}: the config says r={r} and scaling {scaling}; the layer has {delta}")
        if bool(config.get("use_dora")) != isinstance(layer.delta, DoRADelta):
            raise AdapterError(f"{layer.name}: the config says use_dora={config.get('use_dora')}; the layer has {layer.delta}")
        if bool(config.get("lora_bias")) != delta.bias:
            raise AdapterError(f"{layer.name}: the config says lora_bias={config.get('lora_bias')}; the layer has {layer.delta}")
        if not named(layer.name, config["target_modules"]):
            raise AdapterError(f"{layer.name} is adapted, and target_modules does not select it")
        # PEFT compares these by the end of the text, without a dot
        if eaten := [m for m in config["modules_to_save"] or [] if layer.name.endswith(m)]:
            raise AdapterError(f"modules_to_save {eaten} ends the name of the adapted layer {layer.name}: PEFT copies it whole")


def meaning(config: dict[str, Any], name: str) -> tuple[int, float]:
    """(rank, scaling) of a layer, as PEFT reads them."""
    r = by_name(config.get("rank_pattern") or {}, name, config["r"])
    alpha = by_name(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return r, alpha / (r**0.5 if config.get("use_rslora") else r)


def _names(model: nn.Module) -> list[str]:
    """Every module by its first name, as PEFT walks them; adapted layers by theirs, and nothing inside them."""
    return [m.name if isinstance(m, AdaptedLayer) else clean(f"{ns[0]}.")[:-1] for ns, m in names_of_modules(model)]


def _commonest(values: Iterable[N]) -> N:
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]))[0]


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number
