"""LoKr: dW = s kron(w1, w2), s = alpha / r, with O = P U and I = Q V: dW[p U + u, q V + v] = s w1[p,q] w2[u,v].

w1[P,Q] is lokr_w1, or lokr_w1_a [P,R] lokr_w1_b [R,Q] with `decompose_both`, where R < max(P, Q) / 2. w2[U,V] is lokr_w2 where
R >= max(U, V) / 2, else lokr_w2_a [U,R] lokr_w2_b [R,V]. Of a convolution V = C taps, and only C counts in that rule; its lokr_w2 is
[U,C,taps], and with `use_effective_conv2d` and a kernel larger than 1 there are lokr_w2_a [R,U], lokr_w2_b [R,C] and a Tucker core
lokr_t2 [R,R,taps].

Yeh et al. 2023 (LyCORIS), arXiv:2309.14859. At the start lokr_w1 (or lokr_w1_a) is zero and the others are Kaiming-uniform; with
`init_weights: lycoris` it is lokr_w2 (or lokr_w2_b) that is zero. On an embedding the factors that hold columns are normal.

[Note: a box of a Kronecker product]
The product is never built in a forward: x [..., I] is read as [..., Q, V], w2 acts on V and w1 on Q. No factor has the letters O or I:
each is whole on every rank, and a rank takes the blocks that its box of dW touches. Where the box lies inside one block, it takes that part
of w2. Else the input is padded with zeros to whole blocks, and what is too much of the output is cut off. So any boundary is right.

[Note: the order of a Kronecker product]
What acts on Q commutes with what acts on V, and each may be one product or two thin ones. A matrix [b, a] on an axis of size a takes a b
multiplications for every number of the other axis; `cheapest` finds the order with the fewest, for many inputs. For 4096 x 4096 at rank 8
it is w2_b, w1, w2_a: 64 64 8 three times, 0.6 % of W's. What lies between is larger than LoRA's z and cheap to make, so it is made again
in the backward; the last product is not. kron(w1, w2) itself is built for convolutions and plain parameters, and in a merge, some rows
at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import isqrt
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad
from torch.utils.checkpoint import checkpoint

from d9d_lora.adapters import AdapterConfig, AdapterMethod
from d9d_lora.method import InjectionError
from d9d_lora.methods.delta import Cost, Draw, Parts
from d9d_lora.methods.drops import Drops, DropsParameters, core, kaiming
from d9d_lora.methods.loha import refuse_idle_tucker
from d9d_lora.sites import Site


class LoKrParameters(DropsParameters):
    """Hyperparameters of a LoKr layer."""

    decompose_both: bool = Field(False, description="w1 is a product of rank r too, where r < max(P, Q) / 2")
    decompose_factor: int = Field(
        -1, description="P and Q are this number where it divides O and I, else the largest divisor below it; -1: nearest to the root"
    )
    rank_dropout_scale: bool = Field(False, description="divide the rows that rank_dropout keeps by the share of rows that was kept")
    init_weights: bool | Literal["lycoris"] = Field(
        True, description="start from dW = 0 by w1, or by w2 (`lycoris`); false draws every factor, so the model is changed at the start"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ValueError(f"decompose_factor is a factor of the weight's sizes, at least 1, or -1; got {self.decompose_factor}")
        if self.rank_dropout_scale and not self.rank_dropout:
            raise ValueError("rank_dropout_scale goes with rank_dropout, and would be ignored without it")
        return self


class LoKrConfig(AdapterConfig):
    """`kind: lokr`."""

    kind: Literal["lokr"] = "lokr"
    params: LoKrParameters = Field(default_factory=LoKrParameters)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LoKrDelta(Drops):
    """dW = scaling * kron(w1, w2)."""

    both: bool = False
    factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True
    kind = "lokr"

    @property
    def rescales(self) -> bool:
        return self.rank_dropout_scale

    # -- the factors -------------------------------------------------------------------------------------------------------

    @property
    def split(self) -> tuple[int, int, int, int]:
        """P, U, Q, C with O = P U and I = Q C taps."""
        g = self.fitted
        return *factorise(g.out, self.factor), *factorise(g.into // torch.Size(g.taps).numel(), self.factor)

    @property
    def product1(self) -> bool:
        """w1 is a product."""
        P, _, Q, _ = self.split
        return self.both and 2 * self.r < max(P, Q)

    @property
    def product2(self) -> bool:
        """w2 is a product."""
        _, U, _, C = self.split
        return 2 * self.r < max(U, C)

    @property
    def axes(self) -> Mapping[str, str]:
        w1 = {"lokr_w1_a": "PR", "lokr_w1_b": "RQ"} if self.product1 else {"lokr_w1": "PQ"}
        if not self.product2:
            return w1 | {"lokr_w2": "UC" + "XYZ"[: len(self.fitted.taps)]}
        if not self.taps:
            return w1 | {"lokr_w2_a": "UR", "lokr_w2_b": "RV"}
        return w1 | {"lokr_t2": "RR" + "XYZ"[: len(self.taps)], "lokr_w2_a": "RU", "lokr_w2_b": "RC"}

    def sizes(self, out: int, into: int) -> dict[str, int]:
        P, U, Q, C = self.split
        return {"P": P, "U": U, "Q": Q, "C": C, "V": into // Q, "R": self.r, **dict(zip("XYZ", self.taps or self.fitted.taps))}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[self.init_weights]
        if factor in zero:
            return None
        if lookup and factor in ("lokr_w1", "lokr_w1_b", "lokr_w2", "lokr_w2_b"):
            return lambda w, g: w.normal_(generator=g)
        return kaiming

    # -- the update --------------------------------------------------------------------------------------------------------

    def pieces(self, f: Parts, cols: slice) -> "Pieces":
        """The factors cut to the blocks that the box touches. [Note: a box of a Kronecker product]"""
        _, U, Q, _ = self.split
        rows, columns = cover(f.rows, U), cover(cols, self.fitted.into // Q)
        w1: tuple[Tensor, ...] = (f["lokr_w1_a"], f["lokr_w1_b"]) if self.product1 else (f["lokr_w1"],)
        w2: tuple[Tensor, ...] = (f["lokr_w2_a"], f["lokr_w2_b"]) if self.product2 else (f["lokr_w2"].flatten(1),)
        if self.product2 and self.taps:
            w2 = w2[0].T, core(f["lokr_t2"], w2[1])
        return Pieces(cut(w1, rows.blocks, columns.blocks, self.scaling), cut(w2, rows.inside, columns.inside), rows, columns)

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a Kronecker product is no product of low rank; ask for `dense`, `apply` or `look_up`")

    def dense(self, f: Parts) -> Tensor:
        w1, w2, rows, cols = self.pieces(f, f.cols)
        dW = torch.kron(whole(w1), whole(w2))
        dW = dW[rows.before : dW.shape[0] - rows.after, cols.before : dW.shape[1] - cols.after]
        gate = self.gate(f)
        return dW if gate is None else dW * gate[:, None]

    def apply(self, x: Tensor, f: Parts) -> Tensor:
        def run(x: Tensor, *factors: Tensor) -> Tensor:
            return self._run(x, Parts(dict(zip(f, (t.to(x.dtype) for t in factors))), f.rows, f.cols))  # inside: a cast one would be kept

        y: Tensor = checkpoint(run, x, *f.values(), use_reentrant=False, preserve_rng_state=False)
        return self._cut(y, cover(f.rows, self.split[1]), f)  # outside: a recomputation may come when the clock has moved on

    def _run(self, x: Tensor, f: Parts) -> Tensor:
        """x kron(w1, w2)^T over the blocks that the box touches. [Note: the order of a Kronecker product]"""
        w1, w2, _, cols = self.pieces(f, f.cols)
        if cols.before or cols.after:
            x = pad(x, (cols.before, cols.after))
        best = cheapest.__wrapped__ if torch.compiler.is_compiling() else cheapest  # which warns of a cache that it looks through
        _, order, thin1, thin2 = best(sizes_of(w1), sizes_of(w2))
        on = {"q": list(w1 if thin1 else (whole(w1),)), "v": list(w2 if thin2 else (whole(w2),))}
        y = x.unflatten(-1, (w1[-1].shape[1], w2[-1].shape[1]))
        for axis in order:
            w = on[axis].pop()
            y = w @ y if axis == "q" else linear(y, w)
        return y.flatten(-2)

    def cost(self, n: int, out: int, into: int) -> Cost:
        """Every product of the forward twice more in the backward, and all but the last once again; nothing is kept."""
        shapes = self.shapes(out, into)
        w1 = tuple(shapes["lokr_w1_b"][::-1]) + shapes["lokr_w1_a"][:1] if self.product1 else shapes["lokr_w1"][::-1]
        w2 = tuple(shapes["lokr_w2_b"][::-1]) + shapes["lokr_w2_a"][:1] if self.product2 else shapes["lokr_w2"][::-1]
        steps, *_, thin1, thin2 = cheapest(w1, w2)
        joined = sum(a * r * b for (a, *r_, b), thin in ((w1, thin1), (w2, thin2)) if not thin for r in r_)
        return Cost(2 * (n * (4 * sum(steps) - steps[-1]) + 4 * joined), 0)

    def look_up(self, ids: Tensor, f: Parts, *, padding: int | None = None) -> Tensor:
        """Row p of one column of w1 times row u of one of w2. An id that is `padding` passes no gradient to any factor."""
        w1, w2, rows, _ = self.pieces(f, slice(0, self.fitted.into))
        column, V = ids + f.cols.start, w2[-1].shape[1]
        y = columns_of(w1, column // V)[..., :, None] * columns_of(w2, column % V)[..., None, :]
        y = self._cut(y.flatten(-2), rows, f)
        return y if padding is None else torch.where((ids == padding)[..., None], y.detach(), y)

    def _cut(self, y: Tensor, rows: "Cover", f: Parts) -> Tensor:
        y = y[..., rows.before : y.shape[-1] - rows.after]
        gate = self.gate(f)
        return y if gate is None else y * gate.to(y.dtype)


class Cover(NamedTuple):
    """The blocks that an interval touches, which part of a block is needed, and what the blocks have too much on both sides."""

    blocks: slice
    inside: slice
    before: int
    after: int


class Pieces(NamedTuple):
    """w1 (scaled) and w2, each a matrix or the two thin ones it is a product of, and how they cover the box."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    rows: Cover
    cols: Cover


class Order(NamedTuple):
    """[Note: the order of a Kronecker product]

    Attributes:
        steps: The multiplications of each product, for one input.
        axes: The axis of each: "q" or "v".
        thin1, thin2: Whether w1 and w2 are used as the thin matrices they are made of; else multiplied out before.
    """

    steps: tuple[int, ...]
    axes: str
    thin1: bool
    thin2: bool


@lru_cache
def cheapest(w1: tuple[int, ...], w2: tuple[int, ...]) -> Order:
    """Sizes that an axis takes, from the input's to the output's: (Q, P) or (Q, R, P), and (V, U) or (V, R, U)."""
    whole1, whole2 = (w1[0], w1[-1]), (w2[0], w2[-1])
    both = product(dict.fromkeys((w1, whole1)), dict.fromkeys((w2, whole2)))
    ways = [Order(*way, q == w1, v == w2) for q, v in both for way in interleaved(q, v)]
    return min(ways, key=lambda way: sum(way.steps))


def interleaved(q: tuple[int, ...], v: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
    """(multiplications of each step, axes) of every order in which the sizes can be walked."""
    if len(q) == len(v) == 1:
        return [((), "")]
    found = []
    if len(v) > 1:
        found += [((q[0] * v[0] * v[1], *steps), "v" + axes) for steps, axes in interleaved(q, v[1:])]
    if len(q) > 1:
        found += [((v[0] * q[0] * q[1], *steps), "q" + axes) for steps, axes in interleaved(q[1:], v)]
    return found


def sizes_of(w: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Of W, or of A B: the sizes that an axis takes, from the input's to the output's."""
    return (w[-1].shape[1], *(t.shape[0] for t in reversed(w)))


def cut(w: tuple[Tensor, ...], rows: slice, cols: slice, scaling: float = 1.0) -> tuple[Tensor, ...]:
    """Rows and columns of a matrix, or of the two it is a product of."""
    return (w[0][rows, cols] * scaling,) if len(w) == 1 else (w[0][rows] * scaling, w[1][:, cols])


def whole(w: tuple[Tensor, ...]) -> Tensor:
    return w[0] if len(w) == 1 else w[0] @ w[1]


def columns_of(w: tuple[Tensor, ...], ids: Tensor) -> Tensor:
    """[..., rows of w]."""
    h = embedding(ids, w[-1].T)
    return h if len(w) == 1 else linear(h, w[0])


def cover(box: slice, block: int) -> Cover:
    """[Note: a box of a Kronecker product]"""
    first, last = box.start // block, -(-box.stop // block)
    before, after = box.start - first * block, last * block - box.stop
    if last - first <= 1:
        return Cover(slice(first, last), slice(before, before + box.stop - box.start), 0, 0)
    return Cover(slice(first, last), slice(0, block), before, after)


def factorise(size: int, factor: int = -1) -> tuple[int, int]:
    """size = m n. m is `factor` where that divides; else m <= n and m is the largest divisor not above `factor` (-1: any)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = isqrt(size) if factor == -1 else min(factor, isqrt(size))
    m = next(m for m in range(limit, 0, -1) if size % m == 0)
    return m, size // m


class LoKr(AdapterMethod[LoKrConfig]):
    """Kronecker products."""

    kind = "lokr"

    def delta_for(self, name: str) -> LoKrDelta:
        p = self.config.params
        return LoKrDelta(
            self.config.rank(name, p.r),
            self.config.alpha(name, p.alpha),
            p.rank_dropout,
            p.module_dropout,
            p.use_effective_conv2d,
            both=p.decompose_both,
            factor=p.decompose_factor,
            rank_dropout_scale=p.rank_dropout_scale,
            init_weights=p.init_weights,
        )

    def sites(self, module: nn.Module) -> tuple[list[Site], list[str]]:
        sites, passed_over = super().sites(module)
        refuse_idle_tucker(sites)
        if self.config.params.decompose_both and sites:
            ranks = [site.delta.fit(site.layer.geometry(site.base)) for site in sites]
            if not any(delta.product1 for delta in ranks if isinstance(delta, LoKrDelta)):
                raise InjectionError(
                    "decompose_both would be ignored: w1 [P,Q] of every target is so small that r is not below max(P, Q) / 2. "
                    "Leave it out, or lower r, or raise decompose_factor"
                )
        return sites, passed_over
