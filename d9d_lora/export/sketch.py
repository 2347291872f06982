"""What is known of an adapter without its values: enough to say who could load it, before it is trained and after.

    from a model      the adapted layers, and what else is trained, as they stand before the first step
    from a directory  the config and the headers
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d9d_lora.export.experts import experts_of_base, spread
from d9d_lora.export.low_rank import BaseShapes, peft_type, skeleton
from d9d_lora.layers import AdaptedEmbedding, AdaptedLayer, AdaptedLinear
from d9d_lora.layers.tied import TiedHead
from d9d_lora.methods.delta import Delta
from d9d_lora.methods.dora import DoRADelta
from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.methods.lora import LoRADelta
from d9d_lora.methods.merged import MergedDelta
from d9d_lora.replicate import restacked
from d9d_lora.state.expert_base import outline_of
from d9d_lora.state.names import BASE, PEFT_PREFIX, clean
from d9d_lora.state.peft_config import WEIGHTS
from d9d_lora.state.peft_kinds.lora_meaning import layer_meanings, parameters_of
from d9d_lora.state.peft_read import read_adapter_config, reading_of
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.state.untrusted import read_json
from d9d_lora.walk import adapted_layers

BASE_COPY = "base_layer.weight"


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        kind: The method's.
        rank: Of dW as a product; None: it is none.
        scaling: Of the product.
        lookup: An embedding.
        matrix: Its weight is one matrix; not a convolution, nor a stack of experts.
        magnitude: DoRA's.
        shift: B has a bias.
    """

    kind: str
    rank: int | None
    scaling: float
    lookup: bool = False
    matrix: bool = True
    magnitude: bool = False
    shift: bool = False


@dataclass(frozen=True)
class Sketch:
    """An adapter.

    Attributes:
        layers: By name.
        whole: Modules that are trained whole, by name.
        biases: Biases that are trained, by name.
        copies: Layers whose base weight is in the file too.
        replicated: Layers of the base stand in the model several times.
        base: The base's config.json; empty if it is not at hand.
        sizes: The shape of every layer's weight in the base; empty if it is not at hand.
    """

    layers: Mapping[str, Layer]
    whole: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    replicated: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def on(self, base: Path | None) -> "Sketch":
        """This sketch, with what a base directory says."""
        if base is None:
            return self
        with open_checkpoint(base) as files:
            stacked = any(not layer.matrix for layer in self.layers.values())
            layers = spread(self.layers, experts_of_base(base, files)) if stacked else self.layers
            sizes = BaseShapes(files).all()
            single = {n: replace(la, matrix=True) for n, la in layers.items() if n not in self.layers and len(sizes.get(n, ())) == 2}
            return replace(self, layers={**layers, **single}, base=base_config(base), sizes=sizes)


def base_config(base: Path) -> dict[str, Any]:
    """A base directory's config.json. Raises `CheckpointError`."""
    return read_json(base / "config.json")


def sketch_of_model(model: nn.Module) -> Sketch:
    """The adapter that a model carries, on any layout; reads no values."""
    layers = {layer.name: _layer(layer) for layer in adapted_layers(model)}
    factors = {id(p) for layer in adapted_layers(model) for p in layer.factors().values()}
    factors |= {id(shared.weight) for layer in adapted_layers(model) for shared in layer.shared.values()}
    whole: set[str] = set()
    biases: set[str] = set()
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in factors:
            owner, _, leaf = clean(name).rpartition(".")
            (biases if leaf == "bias" else whole).add(owner.removesuffix(f".{BASE}"))
    return Sketch(layers, tuple(sorted(whole)), tuple(sorted(biases - whole)), (), restacked(model) is not None)


def _layer(layer: AdaptedLayer) -> Layer:
    delta: Delta = layer.delta
    if isinstance(delta, GroupedDelta):
        delta = delta.low
    matrix = isinstance(layer, (AdaptedLinear, AdaptedEmbedding)) and not isinstance(layer, TiedHead)
    low = delta.low if isinstance(delta, DoRADelta) else delta
    rank = None if delta.has_gain else product_rank(layer, low)
    return Layer(delta.kind, rank, delta.scaling, layer.lookup, matrix, delta.has_gain, delta.has_shift)


def product_rank(layer: AdaptedLayer, delta: Delta) -> int | None:
    """R of dW = s B[O,R] A[R,I]; None if dW is no product. Asks the delta with factors that have shapes only."""
    if isinstance(delta, MergedDelta) and isinstance(layer.delta, GroupedDelta):
        return sum(delta.enabled) * (product_rank(layer, delta.low) or 0)
    if isinstance(delta, LoRADelta):  # also of one whose start moved the base, which is written with twice the rank
        return delta.r * (2 if delta.moves_base else 1)
    out, into = layer.out_size, layer.in_size
    blank: dict[str, Tensor] = {n: torch.empty(s, device="meta") for n, s in delta.shapes(out, into).items()}
    blank |= {n: torch.empty(shared.weight.shape, device="meta") for n, shared in layer.shared.items()}
    try:
        _, A = delta.factors(delta.part(blank, slice(0, out), slice(0, into)))
    except NotImplementedError:
        return None
    return A.shape[0]


def sketch_of_directory(adapter: Path, base: Path | None = None) -> Sketch:
    """The adapter of a PEFT directory.

    Raises:
        AdapterError, CheckpointError: what cannot be read; an adapter of another type than LoRA is read with the base's sizes only.
    """
    if peft_type(adapter) == "LORA":
        sketch = _sketch_of_lora(adapter, base).on(base)
        return replace(sketch, copies=tuple(name for name in sketch.copies if base is None or not _is_base(adapter, base, name)))
    files = open_checkpoint(base) if base is not None else None
    try:
        return sketch_of_model(skeleton(adapter, BaseShapes(files) if files else None)).on(base)
    finally:
        if files is not None:
            files.close()


def _is_base(adapter: Path, base: Path, layer: str) -> bool:
    """Whether the base weight that a file holds beside the factors of a layer is the base's own."""
    key = f"{PEFT_PREFIX}{layer}.{BASE_COPY}"
    with open_checkpoint(adapter / WEIGHTS) as ours, open_checkpoint(base) as theirs:
        name = BaseShapes(theirs).name(layer)
        if name is None or ours.shape(key) != theirs.shape(name):
            return False
        return torch.equal(ours.read(key).to(theirs.dtype(name)), theirs.read(name))


def _sketch_of_lora(adapter: Path, base: Path | None) -> Sketch:
    config = read_adapter_config(adapter)
    stacked = bool(config.get("target_parameters"))
    if stacked and base is None:  # which key is which parameter stands in the model only
        return Sketch({name: Layer("lora", config["r"], 1.0, matrix=False) for name in config["target_parameters"]})
    with open_checkpoint(adapter / WEIGHTS) as files:
        reading = reading_of(adapter, config, files, outline_of(base_config(base)) if stacked and base is not None else None)
        names = parameters_of(reading) if stacked else {}
        parts, layers = reading.parts, layer_meanings(reading, names)
        matrix = {name: name not in names and len(files.shape(pair["A"])) == 2 for name, pair in parts.factors.items()}
    dora = bool(config.get("use_dora"))
    found = {
        names.get(name, name): Layer(
            "lora", None if dora else m.r, m.scaling, name in parts.lookups, matrix[name], dora, name in parts.shifts
        )
        for name, m in layers.items()
    }
    loose = {name.rpartition(".")[0] for name in parts.others if name.rpartition(".")[2] == "bias"} - set(parts.whole)
    biases = tuple(sorted({*parts.biases, *loose}))
    return Sketch(found, tuple(parts.whole), biases, tuple(sorted(parts.base_copies)), bool(config.get("layer_replication")))
