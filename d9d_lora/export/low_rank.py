"""An adapter as plain products, dW[O,I] = s B A a layer, A[R,I], B[O,R]: the one thing that every consumer understands.

    LoRA                            is one
    AdaLoRA, VeRA, VB-LoRA          are one, of the same rank: B (A E), (d_B B) (d A), B and A from a bank
    RandLoRA                        is one, of full rank
    LoHa, LoKr, DoRA                are none: the best approximation of a rank that is asked for, by SVD, with its error

With a rank, whatever is larger becomes U_N sqrt(S_N), sqrt(S_N) V_N of dW = U S V. Nothing of that rank is nearer in the Frobenius norm
(Eckart and Young), and the relative error is |dW - B A|_F / |dW|_F. A product is decomposed by its thin factors; a dense dW is built
for one layer at a time.

[Note: a model of nothing]
What an adapter of another kind means is known to our own layers, so they are asked: a model with only the adapted layers, whose base
weights are zeros without memory, is injected and loaded like any other. Only their sizes are real; they come from the base's headers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from d9d_lora.inject import inject_peft_and_freeze
from d9d_lora.layers import AdaptedLayer
from d9d_lora.methods.delta import Parts
from d9d_lora.methods.dora import gain_of
from d9d_lora.placement import at_least_fp32, full_of
from d9d_lora.state.peft_config import WEIGHTS, AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import meanings, method_of, read_adapter_config
from d9d_lora.state.safetensors_dir import CheckpointFiles, open_checkpoint
from d9d_lora.walk import adapted_layers


@dataclass(frozen=True)
class Product:
    """dW = scaling * B A of one layer, and what stands beside it.

    Attributes:
        A, B: [R, I] and [O, R], as they are in the file. Of an embedding I is the vocabulary.
        lookup: The input is an index: an embedding.
        magnitude: DoRA's [O]; the product is then not the whole update.
        error: |dW - B A|_F / |dW|_F of a projection; 0 where nothing was projected.
    """

    A: Tensor
    B: Tensor
    scaling: float
    lookup: bool = False
    magnitude: Tensor | None = None
    error: float = 0.0

    @property
    def r(self) -> int:
        return self.A.shape[0]


class NoProduct(AdapterError):
    """An update that is no product of low rank, where no rank was given for its projection."""


def projected(product: Product, rank: int) -> Product:
    """The nearest product of a rank; the same product if its rank is no larger. Computed in fp64, kept in the factors' dtype."""
    if product.r <= rank:
        return product
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(product.B.double()), torch.linalg.qr(product.A.double().T)
    U, S, Vh = torch.linalg.svd(product.scaling * (Rb @ Ra.T))
    return _cut(Qb @ U, S, Vh @ Qa.T, rank, product)


def projected_dense(update: Tensor, rank: int, like: Product) -> Product:
    """The nearest product of a rank to a dense dW[O,I]; `like` gives the dtype of the factors and what kind of layer it is."""
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return _cut(U, S, Vh, rank, like)


def _cut(U: Tensor, S: Tensor, Vh: Tensor, rank: int, like: Product) -> Product:
    rank = min(rank, len(S))
    root = S[:rank].clamp_min(0).sqrt()
    whole, lost = S.norm().item(), S[rank:].norm().item()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    return replace(
        like,
        A=A.to(like.A.dtype).contiguous(),
        B=B.to(like.B.dtype).contiguous(),
        scaling=1.0,
        magnitude=None,
        error=lost / whole if whole else 0.0,
    )


def error_of(products: Mapping[str, Product]) -> float:
    """The largest relative error of any layer."""
    return max((p.error for p in products.values()), default=0.0)


# -- sizes of a base ---------------------------------------------------------------------------------------------------------------


class BaseShapes:
    """The weights of a base directory by the names of their layers; headers only, until a weight is asked for."""

    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files
        self._names = {name.removesuffix(".weight"): name for name in files.names() if name.endswith(".weight")}

    def name(self, layer: str) -> str | None:
        """The name of a layer's weight in the files, which may lack the model's prefix or have one more."""
        if layer in self._names:
            return self._names[layer]
        short = layer.partition(".")[2]
        if short in self._names:
            return self._names[short]
        longer = [name for name in self._names if name.partition(".")[2] == layer]
        return self._names[longer[0]] if len(longer) == 1 else None

    def all(self) -> dict[str, tuple[int, ...]]:
        return {layer: self.files.shape(name) for layer, name in self._names.items()}

    def shape(self, layer: str) -> tuple[int, ...] | None:
        name = self.name(layer)
        return None if name is None else self.files.shape(name)


# -- reading ---------------------------------------------------------------------------------------------------------------------------


def products_of(model: nn.Module, *, rank: int | None) -> dict[str, Product]:
    """Every adapted layer of a model (whole on this process, and without gains) as a product.

    Args:
        rank: Of the projection of what is no product, and the largest rank of all; None: nothing is projected.

    Raises:
        NoProduct: an update that is no product, and no rank; the message names the layers.
    """
    found: dict[str, Product] = {}
    none: list[str] = []
    for layer in sorted(adapted_layers(model), key=lambda layer: layer.name):
        parts = whole_parts(layer)
        try:
            B, A = layer.delta.factors(parts)
        except NotImplementedError:
            if rank is None:
                none.append(f"{layer.name} ({layer.delta})")
                continue
            empty = next(iter(parts.values())).new_empty((0, 0))
            found[layer.name] = projected_dense(layer.delta.dense(parts), rank, Product(empty, empty, 1.0, layer.lookup))
            continue
        product = Product(A.detach().contiguous(), B.detach().contiguous(), layer.delta.scaling, layer.lookup)
        found[layer.name] = product if rank is None else projected(product, rank)
    if none:
        raise NoProduct(
            f"{none[:4]} of {len(none)} are no products of low rank, and this consumer reads nothing else. Give rank=N for the nearest "
            "product of that rank (its error is told), or merge the adapter (profile=merged)"
        )
    return found


def whole_parts(layer: AdaptedLayer) -> Parts:
    """The factors of a layer, as the whole box of dW, in at least fp32."""
    whole = {name: at_least_fp32(full_of(p.detach())) for name, p in layer.factors().items()}
    whole |= {name: at_least_fp32(full_of(shared.weight.detach())) for name, shared in layer.shared.items()}
    return layer.delta.part(whole, slice(0, layer.out_size), slice(0, layer.in_size))


def with_gain(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA adds to W[O,I]: g (W + dW) - W, with g = m / |W + dW| of every row."""
    total = weight + update
    return gain_of(magnitude, total.norm(dim=1))[:, None] * total - weight


def read_products(adapter: Path, base: Path | None = None, *, rank: int | None = None) -> dict[str, Product]:
    """Every adapted layer of a PEFT directory as a product; a DoRA keeps its magnitude unless it is projected.

    Args:
        base: The base's directory: its headers where the adapter is not LoRA, its weights where a DoRA is projected.
        rank: As in `products_of`.

    Raises:
        AdapterError, CheckpointError: what cannot be read, or needs the base.
        NoProduct: see `products_of`.
    """
    files = open_checkpoint(base) if base is not None else None
    try:
        shapes = BaseShapes(files) if files is not None else None
        if peft_type(adapter) == "LORA":
            return _read_lora(adapter, shapes, rank)
        return products_of(skeleton(adapter, shapes), rank=rank)
    finally:
        if files is not None:
            files.close()


def _read_lora(adapter: Path, base: BaseShapes | None, rank: int | None) -> dict[str, Product]:
    config, parts, layers = meanings(adapter)
    found = {}
    with open_checkpoint(adapter / WEIGHTS) as files:
        for layer, meaning in sorted(layers.items()):
            A, B = (files.read(parts.factors[layer][half]) for half in "AB")
            magnitude = files.read(parts.magnitudes[layer]) if layer in parts.magnitudes else None
            product = Product(A, B, meaning.scaling, layer in parts.lookups, magnitude)
            if rank is not None and magnitude is not None:
                name = base.name(layer) if base else None
                if base is None or name is None:
                    raise AdapterError(f"{layer}: a DoRA is projected with the base's weight in hand; give the base, model.path=...")
                weight = base.files.read(name).float()
                weight = weight.T if product.lookup or config.get("fan_in_fan_out") else weight
                update = meaning.scaling * (B.float() @ A.float())
                product = projected_dense(with_gain(weight, update, magnitude.float()), rank, product)
            found[layer] = product if rank is None else projected(product, rank)
    return found


def peft_type(adapter: Path) -> str:
    return str(read_adapter_config(adapter).get("peft_type"))


# -- [Note: a model of nothing] ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def skeleton(adapter: Path, base: BaseShapes | None) -> nn.Module:
    """A model with just the layers that an adapter of another kind than LoRA adapts, loaded."""
    if base is None:
        raise AdapterError(f"{adapter}: an adapter of type {peft_type(adapter)} is read with the base's sizes; give model.path=...")
    turned = bool(read_adapter_config(adapter).get("fan_in_fan_out"))
    with open_checkpoint(adapter / WEIGHTS) as files:
        layers = adapted_names(files.names())
    model = nn.Module()
    for layer in layers:
        shape = base.shape(layer)
        if shape is None or len(shape) != 2:
            raise AdapterError(f"{layer}: the base has {shape or 'no weight'} there; expected the shape of a matrix: is it this base?")
        _put(model, layer, _linear(*(shape[::-1] if turned else shape)))
    inject_peft_and_freeze(method_of(adapter, model), model)
    load_adapter_weights(model, adapter)
    return model.eval()


def adapted_names(keys: Iterable[str]) -> list[str]:
    """The layers that a file of any PEFT type has factors of."""
    found = set()
    for key in keys:
        if match := re.fullmatch(r"base_model\.model\.(.+?)\.(lora_|vera_|vblora_|randlora_|hada_|lokr_)\w+(\.weight)?", key):
            found.add(match[1])
    return sorted(found)


def _linear(out: int, into: int) -> nn.Linear:
    """A linear layer whose weight is one zero in memory."""
    with torch.device("meta"):
        layer = nn.Linear(into, out, bias=False)
    layer.weight = nn.Parameter(torch.zeros(1).expand(out, into), requires_grad=False)
    return layer


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    *path, leaf = name.split(".")
    for step in path:
        if step not in model._modules:
            model.add_module(step, nn.Module())
        model = model._modules[step]  # type: ignore[assignment]
    model.add_module(leaf, layer)
