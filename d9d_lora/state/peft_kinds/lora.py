"""LORA: plain LoRA and DoRA on linear layers, Conv1D, embeddings, convolutions and bare parameters.

    <layer>.lora_A.weight [r, in], .lora_B.weight [out, r]           linear layers, Conv1D
    <layer>.lora_A.weight [r, C, taps...], .lora_B.weight [out, r, 1...]     convolutions
    <layer>.lora_embedding_A [r, V], .lora_embedding_B [d, r]        embeddings
    <layer>.lora_B.bias [out]                                        with `lora_bias`
    <layer>.lora_magnitude_vector [out], of a convolution [1, out, 1...]     DoRA
    <module>(.base_layer)*.lora_A.weight [E r, in], .lora_B.weight [out, r E]   a parameter of the module, a stack of E matrices

[Note: a parameter's key]
PEFT wraps a module once for each of its parameters that are targets, in the order in which the module registered them: the first is
innermost. A key says how deep its wrapper lies, by `.base_layer`, and not which parameter it is for. So the model must be known.

[Note: wider on disk]
Some of our adapters are plain LoRA of a higher rank. A start B0 A0 that moved the base weight (PiSSA and its kin) is written beside the
factors, [B|-B0] [A|A0] of rank 2r, for the base as it was. `enable_lora` is written with its blocks of B on a diagonal of zeros, rank
r for every enabled slice. alpha grows with the rank, so that the scaling stays.

[Note: tied heads]
With `ensure_weight_tying` PEFT keeps the factors of a tied head as the transposed ones of the embedding, lora_A = embedding_B^T and
lora_B = embedding_A^T, and writes both. Ours are one pair, so the head's keys are read only to be compared.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d9d_lora.layers import AdaptedConv1D, AdaptedEmbedding, AdaptedLayer, AdaptedLinear
from d9d_lora.layers.conv import AdaptedConv
from d9d_lora.layers.parameter import SUFFIX, AdaptedParameter
from d9d_lora.layers.tied import TiedHead, Turned
from d9d_lora.methods.delta import Delta
from d9d_lora.methods.delta import Parts as Box
from d9d_lora.methods.dora import MAGNITUDE, DoRADelta
from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.methods.lora import LoRA, LoRAConfig, LoRADelta
from d9d_lora.methods.merged import MergedDelta
from d9d_lora.replicate import restacked
from d9d_lora.state import expert_layouts as experts
from d9d_lora.state.names import PEFT_PREFIX
from d9d_lora.state.peft_config import AdapterError, N, commonest, layer_names, pattern_faults, pattern_of, plain, targets_of
from d9d_lora.state.peft_kinds.dialect import Dialect, Entry, Parts, Reading
from d9d_lora.targets import by_name, named
from d9d_lora.walk import names_of_modules

# Starts after which the base weights are not the published ones: PEFT changes them again at every load.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_KEY = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")


@dataclass(frozen=True)
class LayerMeaning:
    """What a PEFT directory says of one adapted layer."""

    r: int
    alpha: float
    scaling: float


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
            return _tied(layer)
        where = PEFT_PREFIX + (_wrapper(layer) if isinstance(layer, AdaptedParameter) else layer.name)
        shapes = layer.delta.shapes(layer.out_size, layer.in_size)
        found = []
        for name, p in layer.factors().items():
            if tuple(p.shape) != shapes[name]:
                raise AdapterError(f"{layer.name}.{name} is {tuple(p.shape)}; {layer.delta} makes it {shapes[name]}")
            entry = Entry(f"{where}.{_suffix(layer, name)}", f"{path}.{name}.weight", (p,), shapes[name])
            found.append(_on_disk(layer, name, entry))
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
                    "rank_pattern": _for_heads(heads, reading, pattern_of({named_as[n]: found[n].r for n in named_as}, r)),
                    "alpha_pattern": _for_heads(heads, reading, pattern_of({named_as[n]: float(found[n].alpha) for n in named_as}, alpha)),
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


# -- deltas -------------------------------------------------------------------------------------------------------------------------


def low_of(delta: Delta) -> LoRADelta | None:
    """The plain LoRA inside a delta; None: there is none that a file could hold."""
    while isinstance(delta, DoRADelta | GroupedDelta | MergedDelta | Turned):
        delta = delta.low
    return delta if isinstance(delta, LoRADelta) else None


def bias_of(layer: AdaptedLayer) -> bool:
    low = low_of(layer.delta)
    return low is not None and low.bias


def on_disk(layer: AdaptedLayer) -> LoRADelta:
    """The product as the file holds it. [Note: wider on disk]"""
    low = low_of(layer.delta)
    if low is None:
        raise AdapterError(f"PEFT has no adapter such as {layer.delta}; export the merged model")
    widths = 1
    if low.moves_base:
        if not layer.origin:
            raise AdapterError(f"{layer.name} ({layer.delta}) has not been started: call `method.initialise(model)` with weights loaded")
        widths = 2
    if merged := merged_of(layer.delta):
        widths = sum(merged.enabled)
    if widths == 1:
        return low
    return replace(low, r=widths * low.r, alpha=low.alpha * (widths**0.5 if low.rule == "rslora" else widths))


def merged_of(delta: Delta) -> MergedDelta | None:
    while isinstance(delta, DoRADelta | GroupedDelta):
        delta = delta.low
    return delta if isinstance(delta, MergedDelta) else None


def has_dora(layer: AdaptedLayer) -> bool:
    return isinstance(layer.delta.low if isinstance(layer.delta, GroupedDelta) else layer.delta, DoRADelta)


def refuses_convolution(layer: AdaptedLayer, *, groups: bool, dilation: bool) -> str | None:
    """Why PEFT's forward of an adapted convolution is not ours, where it has no groups or dilation; no padding mode it has ever."""
    conv = layer.base
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if conv.groups > 1 and not groups:
        return f"it has {conv.groups} groups, where PEFT's adapter is another function than a sum to the weight"
    if any(d != 1 for d in conv.dilation) and not dilation:
        return f"its dilation is {conv.dilation}, and PEFT's adapter of it has none"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}, and PEFT's adapter pads with zeros"
    return None


# -- tensors ------------------------------------------------------------------------------------------------------------------------


def _suffix(layer: AdaptedLayer, factor: str) -> str:
    if factor == "lora_B_bias":
        return "lora_B.bias"
    if factor == MAGNITUDE:
        return MAGNITUDE
    return f"lora_embedding_{factor[-1]}" if layer.lookup else f"{factor}.weight"


def _on_disk(layer: AdaptedLayer, factor: str, entry: Entry) -> Entry:
    """The entry with the shape that the file has: first as a matrix, then as a kernel."""
    (p,) = entry.sources
    here = entry.shape
    shape: tuple[int, ...]
    if isinstance(layer.delta, GroupedDelta):
        return _of_experts(layer, layer.delta, factor, entry)
    if factor in layer.origin and factor in ("lora_A", "lora_B"):
        rows = factor == "lora_A"
        shape = (2 * p.shape[0], p.shape[1]) if rows else (p.shape[0], 2 * p.shape[1])
        entry = replace(entry, sources=(p, layer.origin[factor]), shape=shape, to_file=partial(_beside, rows=rows))
    if factor == "lora_B" and (merged := merged_of(layer.delta)):
        shape = (layer.out_size, p.shape[1] * sum(merged.enabled))
        entry = replace(entry, shape=shape, to_file=partial(_diagonal, merged, layer.out_size))
    if isinstance(layer, AdaptedConv):
        ones = (1,) * len(layer.taps)
        kernel = {"lora_A": (entry.shape[0], -1, *layer.taps), "lora_B": (*entry.shape, *ones), MAGNITUDE: (1, *entry.shape, *ones)}[factor]
        shape = tuple(torch.empty(entry.shape, device="meta").view(kernel).shape)
        made = entry.to_file
        entry = replace(
            entry,
            shape=shape,
            to_file=lambda *whole: (made(*whole) if made else whole[0]).reshape(shape),
            from_file=lambda t: t.reshape(here),
        )
    return entry


def _of_experts(layer: AdaptedLayer, delta: GroupedDelta, factor: str, entry: Entry) -> Entry:
    """The factors of a stack, fused: `state/expert_layouts.py`. [Note: wider on disk]"""
    is_A, n, merged, outer = factor == "lora_A", delta.n, merged_of(delta), factor == delta.outer
    sources = (*entry.sources, layer.origin[factor]) if factor in layer.origin else entry.sources

    def to_file(value: Tensor, start: Tensor | None = None) -> Tensor:
        value = value if start is None else experts.beside(value, start, is_A=is_A)
        if merged and not is_A:
            value = torch.stack([_diagonal(merged, delta.out, B.mT).mT for B in value])
        value = value.expand(n, *value.shape) if outer else value
        return (experts.fused_A if is_A else experts.fused_B)(value).contiguous()

    def from_file(held: Tensor) -> Tensor:
        value = (experts.from_fused_A if is_A else experts.from_fused_B)(held, n)
        return _one_of(value, f"{layer.name}.{factor}") if outer else value

    shape = tuple(to_file(*(torch.empty(t.shape, device="meta") for t in sources)).shape)
    return replace(entry, sources=sources, shape=shape, to_file=to_file, from_file=from_file)


def _one_of(stack: Tensor, name: str) -> Tensor:
    """The matrix that all of a stack are."""
    if not torch.equal(stack, stack[:1].expand_as(stack)):
        raise AdapterError(
            f"{name} is one factor for all experts here (experts_shared_outer), and the file has other values for each expert; inject "
            "`method_of(path)` instead, or leave experts_shared_outer out"
        )
    return stack[0]


def _beside(value: Tensor, start: Tensor, *, rows: bool) -> Tensor:
    """[A|A0] along the rank, or [B|-B0]: B A - B0 A0 = [B|-B0] [A|A0]."""
    start = start.to(value)
    return torch.cat([value, start] if rows else [value, -start], 0 if rows else 1)


def _diagonal(merged: MergedDelta, out: int, B: Tensor) -> Tensor:
    """The blocks of the enabled slices, each with columns of its own."""
    A = B.new_empty(B.shape[1] * sum(merged.enabled), 0)
    return merged.factors(Box({"lora_A": A, "lora_B": B}, slice(0, out), slice(0, 0)))[0]


def _wrapper(layer: AdaptedParameter) -> str:
    """The module of a parameter, at the depth of its wrapper. [Note: a parameter's key]"""
    owner, _, parameter = layer.name.rpartition(".")
    host: nn.Module = layer.base.host  # type: ignore[assignment]
    adapted = [name for name in host._parameters if f"{name}{SUFFIX}" in host._modules]
    return owner + ".base_layer" * (len(adapted) - 1 - adapted.index(parameter))


def _tied(head: TiedHead) -> list[Entry]:
    """[Note: tied heads]"""
    embedding, entries = head.embedding, []
    for factor, other in (("A", "B"), ("B", "A")):
        p = embedding.factor(f"lora_{other}")
        source = f"{PEFT_PREFIX}{embedding.name}.lora_embedding_{other}"
        key = f"{PEFT_PREFIX}{head.name}.lora_{factor}.weight"
        entries.append(
            Entry(key, None, (p,), (p.shape[1], p.shape[0]), torch.Tensor.t, expected=lambda files, source=source: files.read(source).t())  # type: ignore[misc]
        )
    return entries


# -- meanings -----------------------------------------------------------------------------------------------------------------------


def meaning(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """(rank, scaling) of a layer, as PEFT reads them."""
    r = by_name(config.get("rank_pattern") or {}, name, config["r"])
    alpha = by_name(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return r, alpha / (r**0.5 if config.get("use_rslora") else r)


def layer_meanings(reading: Reading, names: Mapping[str, str] | None = None) -> dict[str, LayerMeaning]:
    """What each layer's rank and scaling are, ranks compared with the tensors.

    Args:
        names: The parameters that layers of the file stand for, which patterns go by.

    Raises:
        AdapterError: for tensors of another rank, and a magnitude that is not there or should not be.
    """
    config, parts, files = reading.config, reading.parts, reading.files
    found, faults = {}, []
    for layer, pair in parts.factors.items():
        parameter = (names or {}).get(layer)
        r, scaling = meaning(config, parameter or layer)
        A, B = files.shape(pair["A"]), files.shape(pair["B"])
        if parameter is None:
            ok = len(A) == len(B) >= 2 and (A[0], B[1]) == (r, r) and all(n == 1 for n in B[2:])
            wide = "".join(", taps" for _ in A[2:])
        else:  # a stack of matrices
            ok = len(A) == len(B) == 2 and A[0] == B[1] and A[0] % r == 0
            wide = ""
        if not ok:
            faults.append(f"{layer}: A {A} and B {B}, expected [{r}, in{wide}] and [out, {r}{wide.replace('taps', '1')}]")
        magnitude = files.shape(parts.magnitudes[layer]) if layer in parts.magnitudes else None
        expected = None
        if config.get("use_dora"):
            expected = B[:1] if len(B) == 2 else (1, B[0], *B[2:])
        if magnitude != expected:
            faults.append(f"{layer}: {MAGNITUDE} {magnitude}, expected {expected}, as use_dora is {config.get('use_dora')}")
        shift = files.shape(parts.shifts[layer]) if layer in parts.shifts else None
        expected = B[:1] if config.get("lora_bias") and layer not in parts.lookups else None
        if shift != expected:
            faults.append(f"{layer}: lora_B.bias {shift}, expected {expected}, as lora_bias is {config.get('lora_bias')}")
        alpha = by_name(config.get("alpha_pattern") or {}, parameter or layer, config["lora_alpha"])
        found[layer] = LayerMeaning(r, alpha, scaling)
    if faults:
        raise AdapterError(f"{reading.path}: the tensors are not of the ranks the config gives them:\n  " + "\n  ".join(faults[:12]))
    if not found:
        raise AdapterError(f"{reading.path}: the file holds no adapter at all, only {sorted(parts.others)[:5]}")
    return found


def parameters_of(reading: Reading) -> dict[str, str]:
    """Layers of the file that stand for a parameter -> its name in the model. [Note: a parameter's key]"""
    wanted = reading.config["target_parameters"]
    if reading.model is None:
        raise AdapterError(
            f"{reading.path} adapts bare parameters ({wanted[:3]}), and its keys say only how deep each is wrapped: give the model, "
            "as in method_of(path, model)"
        )
    found = {}
    for names, module in names_of_modules(reading.model):
        adapted = [name for name in dict(module.named_parameters(recurse=False)) if named(f"{names[0]}.{name}", wanted)]
        for depth, name in enumerate(reversed(adapted)):
            found[names[0] + ".base_layer" * depth] = f"{names[0]}.{name}"
    if idle := [w for w in wanted if not any(named(name, [w]) for name in found.values())]:
        raise AdapterError(f"{reading.path}: target_parameters {idle} are no parameters of this model; give the one it was trained on")
    if lacking := sorted(found.keys() - reading.parts.factors.keys()):
        raise AdapterError(f"{reading.path}: target_parameters {wanted} should have factors at {lacking[:5]}, and the file has none there")
    return found


def _for_heads(heads: list[str], reading: Reading, pattern: dict[str, N]) -> dict[str, N]:
    """A pattern in which what is said of an embedding is said of its heads too."""
    names = "|".join(f"^{re.escape(head)}" for head in heads)
    lookups = reading.parts.lookups if heads else set()
    return {f"{key}|{names}" if any(by_name({key: 1}, e, 0) for e in lookups) else key: value for key, value in pattern.items()}


def tied_heads(reading: Reading) -> list[str]:
    """The layers whose factors are those of an embedding, transposed. [Note: tied heads]"""
    parts, files = reading.parts, reading.files
    heads = []
    for layer in sorted(parts.factors.keys() - parts.lookups):
        A, B = parts.factors[layer]["A"], parts.factors[layer]["B"]
        for embedding in sorted(parts.lookups):
            turned = parts.factors[embedding]["B"], parts.factors[embedding]["A"]
            pairs = list(zip((A, B), turned))
            alike = all(files.shape(a) == files.shape(b)[::-1] for a, b in pairs)
            if alike and all(torch.equal(files.read(a), files.read(b).t()) for a, b in pairs):
                heads.append(layer)
    if not heads:
        raise AdapterError(
            f"{reading.path}: ensure_weight_tying, but no layer of the file has the transposed factors of an embedding "
            f"({sorted(parts.lookups) or 'there is none'}): the pair was trained apart, or is not in the file"
        )
    return heads
