"""An update for each matrix of a stack, the experts of a mixture: dW_e = s B_e A_e, for e = 1 ... E.

Any delta that is a product of thin factors has one: its factors with the letter E in front, and as the experts' weights are kept
turned, [in, out], so are they: `lora_A` [E, I, R], `lora_B` [E, R, O], a magnitude [E, O]. As a matrix the stack is [E O, I], expert after
expert. Each expert starts as a layer of its own: from its number, and from its own weight.

A factor that is one for all experts, `outer`, has no letter E: dW_e = s B_e A, or s B A_e. Ranks that hold other experts then hold it
whole, and each has a part of its gradient: by the one rule of `placement.py`, with E in the place of a tensor-parallel letter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.func import vmap

from d9d_lora.methods.delta import Around, Draw, Geometry, Parts
from d9d_lora.placement import key_of
from d9d_lora.thin import Thin, ThinStack


@dataclass(frozen=True)
class GroupedDelta(Around):
    """The delta `low`, a product, for each of `n` matrices [out, into].

    Attributes:
        outer: The name of the factor that is one for all of them, of a `low` that is plain LoRA; "": each has its own.
    """

    n: int
    out: int = 0  # of one matrix; `fit` knows it
    into: int = 0
    outer: str = ""

    @property
    def has_gain(self) -> bool:  # type: ignore[override]
        return self.low.has_gain

    @property
    def full_precision(self) -> frozenset[str]:  # type: ignore[override]
        return self.low.full_precision

    @property
    def from_the_weight(self) -> bool:  # type: ignore[override]
        return self.low.from_the_weight

    @property
    def moves_base(self) -> bool:  # type: ignore[override]
        return self.low.moves_base

    @property
    def thin(self) -> bool:  # type: ignore[override]
        return self.low.thin

    @property
    def axes(self) -> Mapping[str, str]:
        return {name: letters[::-1] if name == self.outer else f"E{letters[::-1]}" for name, letters in self.low.axes.items()}

    def fit(self, geometry: Geometry) -> Self:
        one = replace(geometry, out=geometry.out // self.n, stack=0)
        return replace(self, low=self.low.fit(one), out=one.out, into=one.into)

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {**self.low.sizes(out // self.n, into), "E": self.n}

    # -- starts --------------------------------------------------------------------------------------------------------------

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        draw = self.low.start(factor, lookup=lookup)
        if draw is None:
            return None

        def every(w: Tensor, g: torch.Generator) -> None:
            seed = g.initial_seed()
            for e, one in enumerate([w] if factor == self.outer else w):
                matrix = torch.empty(one.shape[::-1])
                draw(matrix, torch.Generator().manual_seed(key_of(seed, e)))
                one.copy_(_turned(matrix))

        return every

    def start_from(self, weight: Thin, f: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(weight, ThinStack)
        found = [self.low.start_from(weight.one(e), self._one(f, e)) for e in range(self.n)]
        return {name: torch.stack([_turned(values[name]) for values in found]) for name in found[0]}

    # -- the update ----------------------------------------------------------------------------------------------------------

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        """(B[E, O, R], A[E, R, I]) of the experts in hand; one of them without E if it is `outer`."""
        if self.outer:  # vmap would copy it for every expert
            return self.low.factors(self._parts({name: t.mT for name, t in f.items()}, f))
        return vmap(lambda own: self.low.factors(self._parts(own, f)))(_low(f))  # type: ignore[no-any-return]

    def dense(self, f: Parts) -> Tensor:
        if f.rows.start == f.rows.stop:
            return next(iter(f.values())).new_empty(0, f.cols.stop - f.cols.start)
        B, A = self.factors(f)
        start = f.rows.start - f.rows.start // self.out * self.out  # the factors are those of whole matrices
        stop = start + f.rows.stop - f.rows.start
        B, A = (t[0] if t.ndim == 3 and len(t) == 1 else t for t in (B, A))
        if B.ndim == A.ndim == 2:  # a few rows of one matrix: a merge asks for them, and no others are computed
            return (B[start:stop] * self.scaling) @ A
        return ((B * self.scaling) @ A).flatten(0, 1)[start:stop]

    def part(self, whole: Mapping[str, Tensor], rows: slice, cols: slice) -> Parts:
        """The factors of the matrices that the rows of [E O, I] touch, restricted to the columns."""
        box = {"E": slice(rows.start // self.out, -(-rows.stop // self.out)), "I": cols}
        return Parts({n: t[tuple(box.get(a, slice(None)) for a in self.axes[n])] for n, t in whole.items()}, rows, cols)

    def gain(self, weight: Tensor, squares: Tensor, f: Parts, total: Callable[[Tensor], Tensor]) -> Tensor:
        """g[E, O], for weight[E, O, I] with whole rows."""
        one = vmap(lambda W, n, own: self.low.gain(W, n, self._parts(own, f), lambda t: t))
        return one(weight, squares, _low(f))  # type: ignore[no-any-return]

    def gain_whole(self, weight: Thin, f: Mapping[str, Tensor]) -> Tensor:
        """g[E O]"""
        assert isinstance(weight, ThinStack)
        return torch.cat([self.low.gain_whole(weight.one(e), self._one(f, e)) for e in range(self.n)])

    def _parts(self, own: Mapping[str, Tensor], f: Parts) -> Parts:
        return Parts(own, slice(0, self.out), f.cols)

    def _one(self, f: Mapping[str, Tensor], e: int) -> dict[str, Tensor]:
        return {name: _turned(t if name == self.outer else t[e]) for name, t in f.items()}

    def __str__(self) -> str:
        return f"{self.low} x {self.n}" + (f", one {self.outer}" if self.outer else "")


def _turned(t: Tensor) -> Tensor:
    return t.mT if t.ndim == 2 else t


def _low(f: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.mT if t.ndim == 3 else t for name, t in f.items()}
