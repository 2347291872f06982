"""One rank and one alpha for a whole adapter, dW = (alpha / R) B' A' in every layer: what consumers without patterns read right.

    A' = [A; 0],  B' = [c B | 0]         padded from R_layer to the largest R; c = s R / alpha

Padding is exact. So is c where it is a power of two. alpha is chosen so that c is 1 for as many layers as it can be: where every
layer has one scaling and s R is a whole number, no tensor is changed at all. Else alpha = R, c = s, and B' is rounded once, from fp32
(fp64 for fp64) to the dtype of the file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from d9d_lora.export.low_rank import Product
from d9d_lora.placement import at_least_fp32
from d9d_lora.state.peft_config import AdapterError


@dataclass(frozen=True)
class Folded:
    """An adapter with one rank and one alpha.

    Attributes:
        products: By layer; each of rank `r`, with scaling `alpha / r`.
        rounded: The layers whose B was rounded; none where folding was exact.
        padded: The layers that got a larger rank.
    """

    products: Mapping[str, Product]
    r: int
    alpha: float
    rounded: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{len(self.products)} layers, r={self.r}, alpha={self.alpha:g}"
        if self.padded:
            text += f", {len(self.padded)} padded from a smaller rank (exact)"
        return text + (f", the scale of {len(self.rounded)} folded into B with one rounding" if self.rounded else "")


def fold_scale(products: Mapping[str, Product], *, rank: int | None = None) -> Folded:
    """The same updates with one rank and one alpha.

    Args:
        rank: The rank that all get; None: the largest there is.

    Raises:
        AdapterError: a rank below a layer's, or a B that the scale takes out of its dtype's range.
    """
    largest = max(p.r for p in products.values())
    r = largest if rank is None else rank
    if r < largest:
        raise AdapterError(f"rank {r} is below that of a layer, {largest}: padding makes ranks larger only; project the adapter, rank={r}")
    scalings = {p.scaling for p in products.values()}
    alpha: float = r
    if len(scalings) == 1:
        whole = next(iter(scalings)) * r
        near = round(whole)
        if near > 0 and math.isclose(whole, near, rel_tol=1e-12):
            alpha = near
    found, rounded, padded = {}, [], []
    for name, product in sorted(products.items()):
        factor = product.scaling * r / alpha
        factor = 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor
        B = _times(name, product.B, factor)
        if factor != 1.0 and not _is_power_of_two(factor):
            rounded.append(name)
        if product.r < r:
            padded.append(name)
        found[name] = replace(product, A=_pad(product.A, 0, r), B=_pad(B, 1, r), scaling=alpha / r)
    return Folded(found, r, alpha, tuple(rounded), tuple(padded))


def _times(name: str, B: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return B
    scaled = (at_least_fp32(B) * factor).to(B.dtype)
    if not scaled.isfinite().all():
        raise AdapterError(f"{name}: B times its scale {factor:g} does not fit into {B.dtype}; save the adapter in float32")
    return scaled


def _is_power_of_two(number: float) -> bool:
    return math.frexp(abs(number))[0] == 0.5


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind, along one dimension."""
    if tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    padded = tensor.new_zeros(shape)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return padded
