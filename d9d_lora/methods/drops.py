"""What LoHa and LoKr share: s = alpha / r, and two dropouts of the update itself, drawn once a forward.

    rank_dropout     row o of dW is kept with probability 1 - p; the kept rows may be divided by the share of rows that was kept
    module_dropout   all of dW is kept with probability 1 - p, and never scaled

Both are a gate g[O] of 0, 1 or O / kept, with dW := diag(g) dW. It is drawn for all rows and sliced, so it is the same on every layout.
The first comes from LyCORIS (Yeh et al. 2023, arXiv:2309.14859), where the dropped rows are called ranks.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Self

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from d9d_lora.methods.delta import Delta, Geometry, Parts


class DropsParameters(BaseModel):
    """Hyperparameters that LoHa and LoKr share."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(8, ge=1, description="rank")
    alpha: float = Field(8, gt=0, allow_inf_nan=False, description="scale of the update: s = alpha / r")
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="probability that a row of dW is left out, in training")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="probability that all of dW is left out, in training")
    use_effective_conv2d: bool = Field(
        False, description="Tucker cores for convolutions whose kernel is larger than 1; on other layers nothing changes"
    )


@dataclass(frozen=True)
class Drops(Delta):
    """An update whose rows, or all of it, are dropped in training."""

    r: int
    alpha: float
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    tucker: bool = False
    geometry: Geometry | None = None
    dropout = 0.0

    @property
    def scaling(self) -> float:  # type: ignore[override]
        return self.alpha / self.r

    @property
    def noisy(self) -> bool:
        return self.rank_dropout > 0 or self.module_dropout > 0

    @property
    def rescales(self) -> bool:
        """Whether kept rows are divided by the share of rows that was kept."""
        return True

    def fit(self, geometry: Geometry) -> Self:
        return replace(self, geometry=geometry)

    @property
    def fitted(self) -> Geometry:
        if self.geometry is None:
            raise ValueError(f"{self}: its factors depend on the weight; call `fit(Geometry(out, into))` first")
        return self.geometry

    @property
    def taps(self) -> tuple[int, ...]:
        """The kernel of a Tucker core; a one-dimensional kernel k is (k, 1), as in PEFT's files. Empty: there is no core."""
        taps = self.fitted.taps
        if not self.tucker or all(k == 1 for k in taps):
            return ()
        return (*taps, 1) if len(taps) == 1 else taps

    def gate(self, f: Parts) -> Tensor | None:
        """g of the box's rows, [O], or [1] where all have the same; None: nothing is dropped."""
        if f.dropout is None or not self.noisy:
            return None
        like = next(iter(f.values()))
        g = None
        if self.rank_dropout > 0:
            g = f.dropout.draw("rows", self.fitted.out, self.rank_dropout, like.device).to(like.dtype)
            if self.rescales:
                g = g / g.mean().clamp(min=1 / self.fitted.out)  # all rows dropped: the update is zero, and not 0 / 0
            g = g[f.rows]
        if self.module_dropout > 0:
            whole = f.dropout.draw("module", 1, self.module_dropout, like.device).to(like.dtype)
            g = whole if g is None else g * whole
        return g

    def __str__(self) -> str:
        return f"{self.kind} r={self.r} alpha={self.alpha:g}"


def kaiming(w: Tensor, generator) -> Tensor:  # type: ignore[no-untyped-def]
    """Kaiming-uniform with a = sqrt(5): uniform in +-1/sqrt(the product of all dimensions but the first)."""
    bound = 1 / sqrt(max(1, w[0].numel()))
    return w.uniform_(-bound, bound, generator=generator)


def core(t: Tensor, b: Tensor) -> Tensor:
    """A Tucker core on the input channels: t[R,R',taps] and b[R',C] -> [R, C * taps], sum over R'."""
    return (t.flatten(2).transpose(1, 2) @ b).transpose(1, 2).flatten(1)
