"""LORA: plain LoRA and DoRA on linear layers, Conv1D, embeddings, convolutions and bare parameters.

    <layer>.lora_A.weight [r, in], .lora_B.weight [out, r]           linear layers, Conv1D
    <layer>.lora_A.weight [r, C, taps...], .lora_B.weight [out, r, 1...]     convolutions
    <layer>.lora_embedding_A [r, V], .lora_embedding_B [d, r]        embeddings
    <layer>.lora_B.bias [out]                                        with `lora_bias`
    <layer>.lora_magnitude_vector [out], of a convolution [1, out, 1...]     DoRA
    <module>(.base_layer)*.lora_A.weight [E r, in], .lora_B.weight [out, r E]   a parameter of the module, a stack of E matrices

Factors: `lora_tensors.py`. What a file's config says of a layer: `lora_meaning.py`.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from d9d_lora.layers import AdaptedConv1D, AdaptedEmbedding, AdaptedLayer, AdaptedLinear
from d9d_lora.layers.conv import AdaptedConv
from d9d_lora.layers.parameter import AdaptedParameter
from d9d_lora.layers.tied import TiedHead
from d9d_lora.methods.dora import MAGNITUDE
from d9d_lora.methods.lora import LoRA, LoRAConfig
from d9d_lora.replicate import restacked
from d9d_lora.state.names import PEFT_PREFIX
from d9d_lora.state.peft_config import AdapterError, commonest, layer_names, pattern_faults, pattern_of, plain, targets_of
from d9d_lora.state.peft_kinds.dialect import Dialect, Entry, Parts, Reading
from d9d_lora.state.peft_kinds.lora_meaning import for_heads, layer_meanings, meaning, parameters_of, tied_heads
from d9d_lora.state.peft_kinds.lora_tensors import (
    bias_of,
    file_entry,
    has_dora,
    low_of,
    on_disk,
    refuses_convolution,
    suffix,
    tied_entries,
    wrapper,
)
from d9d_lora.targets import named

# Starts after which the base weights are not the published ones: PEFT changes them again at every load.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_KEY = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")


class LoRADialect(Dialect):
    peft_type = "LORA"
    kind = "lora"
    layers = (AdaptedLinear, AdaptedEmbedding, AdaptedConv, AdaptedParameter)
    ties = True
    bias = "lora_only"
    numbers = {"r": (int, 1), "lora_alpha": ((int, float), float("-inf"))}
    fields = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
    refused = {
        "use_qalora": ((None, False), "QA-LoRA pools its input"),
        "use_bdlora": ((None, False), "block-diagonal factors are not known here"),
        "alora_invocation_tokens": ((None, []), "aLoRA is on for a part of the tokens only"),
        "arrow_config": ((None,), "Arrow mixes several adapters"),
        "kasa_config": ((None,), "KaSA truncates the base weights"),
        "velora_config": ((None,), "VeLoRA is not known here"),
        "monteclora_config": ((None,), "MonteCLoRA samples its factors"),
        "trainable_token_indices": (
            (None, [], {}),
            "trained rows of an embedding are not known here; merge them with PEFT first (merge_and_unload), or train without them",
        ),
    }

    # -- writing -------------------------------------------------------------------------------------------------------------

    def refuses(self, layer: AdaptedLayer) -> str | None:
        if (reason := super().refuses(layer)) is not None:
            return reason
        low = low_of(layer.delta)
        if low is None:
            return f"PEFT has no adapter such as {layer.delta}"
        if isinstance(layer, AdaptedParameter):
            if has_dora(layer) or low.bias:
                return f"PEFT adapts a bare parameter by plain LoRA only, and this is {layer.delta}"
            if layer.base.reader is not layer.base.host:
                return "it is read by another module than the one that has it, which PEFT's wrapper would not reach"
        return refuses_convolution(layer, groups=False, dilation=False)

    def disagreement(self, layers: Sequence[AdaptedLayer]) -> str | None:
        heads = [layer for layer in layers if isinstance(layer, TiedHead)]
        dora = {has_dora(layer): layer.name for layer in layers}
        if len(dora) == 2:
            return f"{dora[True]} has a magnitude (DoRA) and {dora[False]} has none; PEFT has one `use_dora` for all layers"
        shift = {bias_of(layer): layer.name for layer in layers if layer not in heads}
        if len(shift) == 2:
            return f"{shift[True]} has lora_bias and {shift[False]} has not; PEFT has one for all layers"
        bare = next((layer for layer in layers if isinstance(layer, AdaptedParameter)), None)
        turned = next((layer for layer in layers if isinstance(layer, AdaptedConv1D)), None)
        if bare and turned:
            return f"{bare.name} is a bare parameter and {turned.name} a Conv1D, and PEFT's fan_in_fan_out excludes target_parameters"
        return None

    def describe(self, model: nn.Module, layers: Sequence[AdaptedLayer], facts: Any) -> dict[str, Any]:
        deltas = {layer.name: on_disk(layer) for layer in layers}
        rslora = all(delta.rule == "rslora" for delta in deltas.values())
        ranks = {name: delta.r for name, delta in deltas.items()}
        # PEFT has one rule for all layers: where ours differ, alpha says it, such that alpha / r is the layer's own scaling
        mixed = not rslora and any(delta.rule == "rslora" for delta in deltas.values())
        alphas = {name: delta.scaling * delta.r if mixed else delta.alpha for name, delta in deltas.items()}
        r, alpha = commonest(ranks.values()), commonest(alphas.values())
        bare = [layer.name for layer in layers if isinstance(layer, AdaptedParameter)]
        heads = [layer.name for layer in layers if isinstance(layer, TiedHead)]
        modules = [name for name in deltas if name not in bare and name not in heads]
        return {
            "alpha_pattern": {name: plain(a) for name, a in pattern_of(alphas, alpha).items()},
            "ensure_weight_tying": bool(heads),
            "fan_in_fan_out": any(isinstance(layer, AdaptedConv1D) for layer in layers),
            "layer_replication": stack.ranges if (stack := restacked(model)) else None,
            "lora_alpha": plain(alpha),
            "lora_bias": any(bias_of(layer) for layer in layers),
            # PEFT builds no wrapper of a parameter with a dropout, which changes nothing of a trained adapter
            "lora_dropout": 0.0 if bare else commonest(delta.dropout for delta in deltas.values()),
            "r": r,
            "rank_pattern": pattern_of(ranks, r),
            "target_modules": targets_of(modules, layer_names(model)) if modules else None,
            "target_parameters": sorted(bare) or None,
            "use_dora": any(has_dora(layer) for layer in layers),
            "use_rslora": rslora,
        }

    def check(self, config: dict[str, Any], layer: AdaptedLayer) -> None:
        delta = on_disk(layer)
        r, scaling = meaning(config, layer.name)
        if r != delta.r or abs(scaling - delta.scaling) > 1e-12 * abs(delta.scaling):
            raise AdapterError(f"{layer.name}: the config says r={r} and scaling {scaling}; the layer has {delta}")
        for name, has in (("use_dora", has_dora(layer)), ("lora_bias", delta.bias)):
            if bool(config.get(name)) != has and not isinstance(layer, TiedHead):
                raise AdapterError(f"{layer.name}: the config says {name}={config.get(name)}; the layer has {layer.delta}")
        if isinstance(layer, AdaptedParameter) and not named(layer.name, config["target_parameters"] or []):
            raise AdapterError(f"{layer.name} is adapted, and target_parameters does not name it")

    def entries(self, path: str, layer: AdaptedLayer, config: dict[str, Any]) -> list[Entry]:
        if isinstance(layer, TiedHead):
            return tied_entries(layer)
        where = PEFT_PREFIX + (wrapper(layer) if isinstance(layer, AdaptedParameter) else layer.name)
        shapes = layer.delta.shapes(layer.out_size, layer.in_size)
        found = []
        for name, p in layer.factors().items():
            if tuple(p.shape) != shapes[name]:
                raise AdapterError(f"{layer.name}.{name} is {tuple(p.shape)}; {layer.delta} makes it {shapes[name]}")
            entry = Entry(f"{where}.{suffix(layer, name)}", f"{path}.{name}.weight", (p,), shapes[name])
            found.append(file_entry(layer, name, entry))
        return found

    # -- reading -------------------------------------------------------------------------------------------------------------

    def faults(self, config: dict[str, Any]) -> list[str]:
        faults = super().faults({name: value for name, value in config.items() if name != "runtime_config"})
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start.startswith(_MOVES_BASE):
            faults.append(
                f"init_lora_weights = {start!r}: it has moved the base weights; convert the adapter to a plain one "
                "(save_pretrained(..., path_initial_model_for_weight_conversion=...))"
            )
        dropout = config.get("lora_dropout", 0)
        if not isinstance(dropout, int | float | None) or isinstance(dropout, bool):
            faults.append(f"lora_dropout = {dropout!r}: expected a number")
        for name in ("rank_pattern", "alpha_pattern"):
            faults += pattern_faults(name, config.get(name) or {})
        names = config.get("target_parameters") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            faults.append(f"target_parameters = {names!r}: expected a list of names")
        return faults

    def take(self, parts: Parts, name: str, key: str) -> bool:
        if match := _KEY.fullmatch(name):
            if bool(match[2]) == bool(match[4]):  # linear layers have `.weight`, embeddings have not
                return False
            parts.factors.setdefault(match[1], {})[match[3]] = key
            parts.lookups |= {match[1]} if match[2] else set()
        elif name.endswith(".lora_B.bias"):
            parts.shifts[name.removesuffix(".lora_B.bias")] = key
        elif name.endswith(f".{MAGNITUDE}"):
            parts.magnitudes[name.removesuffix(f".{MAGNITUDE}")] = key
        else:
            return False
        return True

    def lacking(self, parts: Parts) -> list[str]:
        alone = [key for pair in parts.factors.values() if len(pair) == 1 for key in pair.values()]
        beside = [*parts.magnitudes.items(), *parts.shifts.items()]
        return alone + [key for layer, key in beside if layer not in parts.factors]

    def spelling(self) -> str:
        return f"{PEFT_PREFIX}<layer>.lora_A.weight with .lora_B.weight, lora_embedding_A with _B"

    def method(self, reading: Reading) -> LoRA:
        config = reading.config
        names = parameters_of(reading) if config.get("target_parameters") else {}
        found = layer_meanings(reading, names)
        heads = tied_heads(reading) if config.get("ensure_weight_tying") else []
        modules = [layer for layer in reading.layers if layer not in names and layer not in heads]
        named_as = {layer: names.get(layer, layer) for layer in found if layer not in heads}
        r, alpha = config["r"], float(config["lora_alpha"])
        return LoRA(
            LoRAConfig.model_validate(
                {
                    **reading.targeting(modules),
                    "target_parameters": sorted(names.values()) or None,
                    "rank_pattern": for_heads(heads, reading, pattern_of({named_as[n]: found[n].r for n in named_as}, r)),
                    "alpha_pattern": for_heads(heads, reading, pattern_of({named_as[n]: float(found[n].alpha) for n in named_as}, alpha)),
                    "layer_replication": config.get("layer_replication") or None,
                    "ensure_weight_tying": bool(heads),
                    "params": {
                        "r": r,
                        "alpha": alpha,
                        "dropout": config.get("lora_dropout") or 0.0,
                        "scaling": "rslora" if config.get("use_rslora") else "lora",
                        "use_dora": bool(config.get("use_dora")),
                        "lora_bias": bool(config.get("lora_bias")),
                    },
                }
            )
        )
