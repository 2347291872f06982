"""WHAT is learned: an update dW[O,I] of a matrix, as a value. It has no tensors and knows no layer.

The layer it is applied to holds the factors, hands in the local part of each, and applies what comes back. So a method is one
file, a layer kind is one file, and every pair of them works.

Most updates are a product, dW = s B A, and say so by `factors`. One that is not says `dense`, and `apply` where that is cheaper than
building dW. What multiplies the rows of W + dW (DoRA's magnitude) is `gain`.

[Note: parts]
A factor is sharded with the base weight along the letters they share, and is whole along all others. `Parts` holds, for a box
[rows, cols] of dW, each factor restricted to that box along its letters O and I. A factor without these letters is whole there,
and the delta takes what it needs of it by `rows` and `cols`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

if TYPE_CHECKING:
    from d9d_lora.dropout import AdapterDropout
    from d9d_lora.thin import Thin

Draw = Callable[[Tensor, torch.Generator], Any]


class DoesNotFit(ValueError):
    """A delta that a weight of this geometry cannot take: a sentence that says why, and the mend."""


@dataclass(frozen=True)
class Geometry:
    """A base weight, seen as a matrix [O, I].

    Attributes:
        out: O.
        into: I; of a convolution, the input channels of one group times the taps.
        taps: The kernel size of a convolution.
        groups: Of a convolution.
        lookup: The input is an index into I: an embedding.
        quantised: The weight is held in few bits, and cannot be moved.
        stack: The number of matrices that are stacked along O (fused experts); 0: it is one matrix.
    """

    out: int
    into: int
    taps: tuple[int, ...] = ()
    groups: int = 1
    lookup: bool = False
    quantised: bool = False
    stack: int = 0


class Cost(NamedTuple):
    """What n inputs cost, forward and backward, beyond the frozen layer they pass; `tests/test_costs.py` counts the same.

    Attributes:
        flops: Of the matrix products.
        kept: Numbers that autograd keeps for the backward beside the layer's input and the parameters, in the dtype of that input.
        besides: Bytes that are as many in every dtype: indices, and what a step needs in fp32.
    """

    flops: int
    kept: int
    besides: int = 0


class Parts(dict[str, Tensor]):
    """[Note: parts] The factors by name, for the box [rows, cols] of dW.

    Attributes:
        rows, cols: The box, in numbers of the whole matrix.
        dropout: The layer's dropout, in training; a delta that drops parts of itself draws from it. None elsewhere.
    """

    def __init__(self, factors: Mapping[str, Tensor], rows: slice, cols: slice, dropout: "AdapterDropout | None" = None) -> None:
        super().__init__(factors)
        self.rows, self.cols, self.dropout = rows, cols, dropout


class Delta(ABC):
    """An update dW = scaling * f(factors). Subclasses are frozen dataclasses."""

    kind: str
    scaling: float
    dropout: float
    shared: ClassVar[Mapping[str, str]] = {}
    """Factors that all layers of the method share (a vector bank, random bases), with the letters of their dimensions."""
    has_gain: bool = False
    has_shift: bool = False
    full_precision: frozenset[str] = frozenset()
    """Factors that are handed in as they are trained, and not in the dtype the layer computes in."""
    from_the_weight: bool = False
    """Whether some factor starts from the base weight: see `start_from`."""
    moves_base: bool = False
    """Whether the start is subtracted from the base weight, so that the model is unchanged (PiSSA and its kin)."""

    thin: bool = False
    """Whether the update is x -> s x A^T B^T with `factors` of few rows, and nothing else: it may then be fused with the base's product."""
    makes: str = ""
    """Which of `factors`, "A", "B" or "AB", are made anew of the parts, and not the parts themselves or views of them."""
    bare: tuple[str, str] | None = None
    """The names of B and A, where `factors` gives two parameters as they are; every forward asks."""
    loftq_iter: int = 0
    """How often LoftQ alternates, if `lora_A` and `lora_B` start from the error of a quantised base (`init/loftq.py`)."""

    @property
    def noisy(self) -> bool:
        """Whether a training forward draws at random, and so needs the clock."""
        return self.dropout > 0

    @property
    @abstractmethod
    def axes(self) -> Mapping[str, str]:
        """The factors by name, with the letters of their dimensions: `{"lora_A": "RI", "lora_B": "OR"}`."""

    def fit(self, geometry: Geometry) -> Self:
        """This delta for a weight of this geometry. Raises `DoesNotFit`."""
        return self

    def stacked(self, n: int) -> "Delta":
        """A delta that is this one for each of n stacked matrices. Raises `DoesNotFit`."""
        raise DoesNotFit(f"{self} has no meaning on a stack of {n} matrices; only plain LoRA has, so give kind: lora or leave it out")

    @abstractmethod
    def sizes(self, out: int, into: int) -> dict[str, int]:
        """The size of every letter of `axes`, for a weight [out, into]."""

    @abstractmethod
    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        """How a factor begins: fills the whole tensor from a generator, or None for zero. `lookup`: the input is an index."""

    def stream(self, factor: str) -> str:
        """The name whose random numbers a factor draws: its own, unless factors of a layer must draw the same."""
        return factor

    def start_from(self, weight: "Thin", f: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole starting values of factors that follow from the base weight; `f` are the whole factors as `start` left them."""
        return {}

    def cost(self, n: int, out: int, into: int) -> Cost:
        """Of n inputs of a linear layer [out, into]. Here that of LoRA: six products of rank R, and drop(x) A^T kept."""
        r = self.sizes(out, into)["R"]
        return Cost(3 * 2 * n * r * (out + into), n * r)

    # -- the update ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        """(B[O,R], A[R,I]) of the box, with dW = scaling * B A. A delta that is no product raises NotImplementedError and has
        `dense`, `apply` and `look_up` of its own."""

    def factors_in(self, f: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`factors` for a step that casts what it is given. What is made anew it would keep for its backward, so that is cast before;
        a part is there anyway, and its cast would be a second one."""
        B, A = self.factors(f)
        return B.to(dtype) if "B" in self.makes else B, A.to(dtype) if "A" in self.makes else A

    def dense(self, f: Parts) -> Tensor:
        """dW of the box [O,I]."""
        B, A = self.factors(f)
        return self.scaling * (B @ A)

    def apply(self, x: Tensor, f: Parts) -> Tensor:
        """x dW^T for the columns of the box: x [..., I] -> [..., O]. The scale is put on the thin product. The parts come as they are
        trained, and the result is in the dtype of x."""
        B, A = self.factors(f)
        return linear(linear(x, A.to(x.dtype)) * self.scaling, B.to(x.dtype))

    def look_up(self, ids: Tensor, f: Parts, *, padding: int | None = None) -> Tensor:
        """The columns of dW that ids name, counted from the box's first: ids [...] -> [..., O]."""
        B, A = self.factors(f)
        return linear(embedding(ids, A.T, padding) * self.scaling, B)

    def update(self, whole: Mapping[str, Tensor], rows: slice, cols: slice) -> Tensor:
        """The box [rows, cols] of dW from whole factors, in their dtype; noise is off."""
        return self.dense(self.part(whole, rows, cols))

    def part(self, whole: Mapping[str, Tensor], rows: slice, cols: slice) -> Parts:
        """[Note: parts] of whole factors."""
        box = {"O": rows, "I": cols}
        letters = {**self.axes, **self.shared}
        return Parts({n: t[tuple(box.get(a, slice(None)) for a in letters[n])] for n, t in whole.items()}, rows, cols)

    def gain(self, weight: Tensor, squares: Tensor, f: Parts, total: Callable[[Tensor], Tensor]) -> Tensor:
        """g[O] that multiplies (W + dW) x, if `has_gain`. `weight` is the box of W, and `squares` the square norms of its rows, [O];
        `total` adds a tensor over the ranks that hold the other columns of these rows."""
        raise NotImplementedError

    def shift(self, f: Parts) -> Tensor:
        """What is added to the output beside dW x, [O] of the box, if `has_shift`."""
        raise NotImplementedError

    def gain_whole(self, weight: "Thin", f: Mapping[str, Tensor]) -> Tensor:
        """The same for all rows, from whole factors: what a merge multiplies by."""
        raise NotImplementedError

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """The global shape of every factor for a weight [out, into]."""
        size = self.sizes(out, into)
        return {name: tuple(size[letter] for letter in letters) for name, letters in self.axes.items()}


@dataclass(frozen=True)
class Around(Delta):
    """A delta made of another one, `low`: it is of the same kind, scale and noise, and its factors start alike unless it says otherwise."""

    low: Delta

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.low.kind

    @property
    def scaling(self) -> float:  # type: ignore[override]
        return self.low.scaling

    @property
    def dropout(self) -> float:  # type: ignore[override]
        return self.low.dropout

    @property
    def noisy(self) -> bool:
        return self.low.noisy

    @property
    def makes(self) -> str:  # type: ignore[override]
        return self.low.makes

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        return self.low.start(factor, lookup=lookup)

    def stream(self, factor: str) -> str:
        return self.low.stream(factor)
