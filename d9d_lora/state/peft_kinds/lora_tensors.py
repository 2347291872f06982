"""How a LoRA layer's factors lie in PEFT's file: the product as the file holds it, and a tensor each.

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

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.conv import AdaptedConv
from d9d_lora.layers.parameter import SUFFIX, AdaptedParameter
from d9d_lora.layers.tied import TiedHead, Turned
from d9d_lora.methods.delta import Delta
from d9d_lora.methods.delta import Parts as Box
from d9d_lora.methods.dora import MAGNITUDE, DoRADelta
from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.methods.lora import LoRADelta
from d9d_lora.methods.merged import MergedDelta
from d9d_lora.state import expert_layouts as experts
from d9d_lora.state.names import PEFT_PREFIX
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_kinds.dialect import Entry


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


def suffix(layer: AdaptedLayer, factor: str) -> str:
    if factor == "lora_B_bias":
        return "lora_B.bias"
    if factor == MAGNITUDE:
        return MAGNITUDE
    return f"lora_embedding_{factor[-1]}" if layer.lookup else f"{factor}.weight"


def file_entry(layer: AdaptedLayer, factor: str, entry: Entry) -> Entry:
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


def wrapper(layer: AdaptedParameter) -> str:
    """The module of a parameter, at the depth of its wrapper. [Note: a parameter's key]"""
    owner, _, parameter = layer.name.rpartition(".")
    host: nn.Module = layer.base.host  # type: ignore[assignment]
    adapted = [name for name in host._parameters if f"{name}{SUFFIX}" in host._modules]
    return owner + ".base_layer" * (len(adapted) - 1 - adapted.index(parameter))


def tied_entries(head: TiedHead) -> list[Entry]:
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
