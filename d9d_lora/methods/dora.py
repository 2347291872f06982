"""DoRA: y = g (x W^T + s drop(x) A^T B^T) + b, with g = m / |W + s B A| for every row: W[O,I], A[R,I], B[O,R], m[O].

A magnitude m and a low-rank update of the direction, learned apart. m starts as |W + s B A|, so g = 1 and the model is unchanged.
The norm has no gradient (section 4.3 of the paper). It is taken by its terms, so B A is never built:

    |W + s B A|^2  =  |W|^2  +  2 s B.(W A^T)  +  s^2 B.(B A A^T)        each term a sum over columns

|W|^2 does not change and is kept, so a forward reads W once more, for W A^T. Where columns are sharded, the parts of the sum are
added once: `out` numbers a layer and forward.

Liu et al. 2024, arXiv:2402.09353.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from d9d_lora.methods.delta import Around, Cost, Delta, Draw, Geometry, Parts
from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.thin import Thin

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class DoRADelta(Around):
    """The delta `low`, a product s B A, with a magnitude for every row of W + s B A."""

    has_gain = True
    from_the_weight = True
    full_precision = frozenset({MAGNITUDE})  # g is near one, where half precision has steps of 1/128

    @property
    def moves_base(self) -> bool:  # type: ignore[override]
        return self.low.moves_base

    @property
    def thin(self) -> bool:  # type: ignore[override]
        return self.low.thin

    @property
    def bare(self) -> tuple[str, str] | None:  # type: ignore[override]
        return self.low.bare

    @property
    def loftq_iter(self) -> int:  # type: ignore[override]
        return self.low.loftq_iter

    @property
    def axes(self) -> Mapping[str, str]:
        return {**self.low.axes, MAGNITUDE: "O"}

    def fit(self, geometry: Geometry) -> Self:
        return replace(self, low=self.low.fit(geometry))

    def stacked(self, n: int) -> Delta:
        return GroupedDelta(self, n)

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return self.low.sizes(out, into)

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        return None if factor == MAGNITUDE else super().start(factor, lookup=lookup)

    def start_from(self, weight: Thin, f: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self.low.start_from(weight, f)
        # A start that moves the base leaves W + s B A as W is now.
        norms = weight.row_squares().sqrt() if self.moves_base else self._norms_whole(weight, {**f, **values})
        return {**values, MAGNITUDE: norms}

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        return self.low.factors(f)

    def dense(self, f: Parts) -> Tensor:
        return self.low.dense(f)

    def apply(self, x: Tensor, f: Parts) -> Tensor:
        return self.low.apply(x, f)

    def look_up(self, ids: Tensor, f: Parts, *, padding: int | None = None) -> Tensor:
        return self.low.look_up(ids, f, padding=padding)

    def cost(self, n: int, out: int, into: int) -> Cost:
        """That of `low`, and the terms of the norm, which have no backward. Kept besides: the output before g, and of every row g, the
        norm in fp32, and a byte that says whether there is one."""
        low, r = self.low.cost(n, out, into), self.sizes(out, into)["R"]
        return Cost(low.flops + 2 * r * (out * into + r * (out + into)), low.kept + n * out + out, low.besides + 5 * out)

    def gain(self, weight: Tensor, squares: Tensor, f: Parts, total: Callable[[Tensor], Tensor]) -> Tensor:
        """At least fp32, whatever the layer computes in."""
        with torch.no_grad():
            B, A = self.low.factors(f)
            dtype = squares.dtype
            across = (weight @ A.T.to(weight.dtype)).to(dtype)
            norms = total(squared_norms(squares, across, B.to(dtype), A.to(dtype), self.scaling)).clamp(min=0).sqrt_()
        return gain_of(f[MAGNITUDE], norms)

    def gain_whole(self, weight: Thin, f: Mapping[str, Tensor]) -> Tensor:
        return gain_of(f[MAGNITUDE], self._norms_whole(weight, f))

    def _norms_whole(self, weight: Thin, f: Mapping[str, Tensor]) -> Tensor:
        B, A = self.low.factors(self.part(f, slice(0, weight.shape[0]), slice(0, weight.shape[1])))
        return squared_norms(weight.row_squares(), weight.times(A.T), B, A, self.scaling).clamp(min=0).sqrt()

    def __str__(self) -> str:
        return f"{self.low} dora"


def squared_norms(squares: Tensor, across: Tensor, B: Tensor, A: Tensor, s: float) -> Tensor:
    """|W + s B A|^2 of every row from |W|^2 and W A^T; of some columns, their part of the sum."""
    return squares + s * (B * (2 * across + s * (B @ (A @ A.T)))).sum(1)


def gain_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / norm. A row of zeros (padding of a vocabulary) has no direction: it stays zero, and is not 0 / 0."""
    nothing = norms == 0
    return (magnitude / norms.masked_fill(nothing, 1)).masked_fill(nothing, 1)
