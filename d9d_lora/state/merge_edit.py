"""What a merge does to one tensor, in blocks of its first dimension: the same arithmetic for files and for a live model.

    Add       W = g (W + dW)     any delta; the sum is in fp32 (fp64 for fp64), and rounded once
    Shift     b = b + db         what a delta adds to the output (`lora_bias`)
    Replace   W = a new value    what was trained whole

[Note: the same bits]
dW of a block is computed from whole factors, and the blocks follow from the tensor's shape alone. So the result does not depend on how a
live model is sharded, and is to the bit what a merge of its files gives.

[Note: rows computed again]
Some lines of every sum are computed once more, in fp64 and each by itself. A delta that mistakes its box, or a product that is wrong on
this machine, differs by the size of dW; rounding differs by far less than a thousandth of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from d9d_lora.methods.delta import Delta
from d9d_lora.methods.dora import MAGNITUDE, gain_of
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.safetensors_write import Promise

# Elements of a tensor in hand at a time: 2 MiB in fp32. A merge has a few such blocks, and the C allocator keeps up to ten.
BLOCK = 1 << 19
SAMPLED = 16  # [Note: rows computed again]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Form = Literal["OI", "IO", "EOI", "EIO"]
"""How a matrix is stored: [O, I...], its transpose, or a stack of E of either, which is the matrix [E O, I]."""
Factors = Callable[[], Mapping[str, Tensor]]


class Source(Protocol):
    """Tensors by name, of which a part can be read: files, or a live model."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Held:
    """A tensor of a source."""

    source: Source
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape(self.name)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype(self.name)

    @property
    def work(self) -> torch.dtype:
        """The dtype in which a sum with it is taken."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values), in order: whole rows of about `BLOCK` elements."""
        shape = self.shape
        if not shape or 0 in shape:
            yield slice(0, 0), self.source.read(self.name)
            return
        step = max(1, BLOCK // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            yield rows, self.source.read(self.name, (rows, *(slice(0, size) for size in shape[1:])))


@dataclass(frozen=True)
class Replace:
    """The tensor becomes another one."""

    value: Held

    def origin(self, base: Held) -> Held:
        return self.value

    def check_finite(self, name: str) -> None:
        for _, block in self.value.blocks():
            _refuse_infinite(self.value.name, block, name)

    def values(self, base: Held) -> Iterator[tuple[Tensor, Tensor]]:
        for _, block in self.value.blocks():
            yield block, block


@dataclass(frozen=True)
class Shift:
    """A bias gets the shift of a delta added; `onto` is the adapter's own bias of the layer, if that was trained too."""

    shift: Callable[[], Tensor]
    onto: Held | None = None

    def origin(self, base: Held) -> Held:
        return self.onto or base

    def check_finite(self, name: str) -> None:
        _refuse_infinite("the shift", self.shift(), name)

    def values(self, base: Held) -> Iterator[tuple[Tensor, Tensor]]:
        bias = self.origin(base)
        old = bias.source.read(bias.name)
        shift = self.shift()
        _refuse_infinite("the shift", shift, bias.name)
        yield old, old.to(bias.work) + shift.to(bias.work)


@dataclass(frozen=True)
class Add:
    """The weight gets the update of a delta added; then, with a magnitude, every row of [O, I] gets that norm.

    Attributes:
        delta: Fitted to the weight.
        factors: Gives every factor whole.
        form: How the weight is stored.
        onto: What the update is added to, if not the base's own tensor.
        at: The row of the delta's matrix that is the tensor's first, of a tensor that is some rows of it.
    """

    delta: Delta
    factors: Factors
    form: Form = "OI"
    onto: Held | None = None
    at: int = 0

    def origin(self, base: Held) -> Held:
        return self.onto or base

    def check_finite(self, name: str) -> None:
        for factor, value in self.factors().items():
            if not value.is_floating_point():
                raise AdapterError(f"{factor!r} is {value.dtype}, expected a floating-point dtype; save the adapter of {name!r} again")
            _refuse_infinite(factor, value, name)

    def values(self, base: Held) -> Iterator[tuple[Tensor, Tensor]]:
        """(block as it is stored, block of the result in at least fp32)."""
        held = self.origin(base)
        # contiguous copies, wherever they come from: a matrix product may take another way on a view [Note: the same bits]
        given = self.factors()
        for factor, value in given.items():
            _refuse_infinite(factor, value, held.name)
        factors = {name: t.to(held.work, copy=True, memory_format=torch.contiguous_format) for name, t in given.items()}
        for name, t in factors.items():
            _refuse_infinite(f"{name} in {held.work}", t, held.name)  # what fp64 holds may be too large here
        exact = {name: t.double() for name, t in given.items()}
        gains = self._gains(held, factors)
        for rows, block in held.blocks():
            if not block.numel():
                yield block, block
                continue
            matrix, box = self._matrix(block), self._box(rows, held.shape)
            sum_ = self.delta.update(factors, *box).add_(matrix)
            gain = None if gains is None else gains(box[0], sum_)
            if gain is not None:
                sum_.mul_(gain[:, None])
            self._check(held, rows, exact, matrix, sum_, gain)
            yield block, self._stored(sum_, block.shape)

    # -- a magnitude ---------------------------------------------------------------------------------------------------------

    def _gains(self, held: Held, factors: Mapping[str, Tensor]) -> Callable[[slice, Tensor], Tensor] | None:
        """(rows, the sum of a block) -> what these rows are multiplied by."""
        if not self.delta.has_gain:
            return None
        if MAGNITUDE not in factors:
            raise AdapterError(f"{self.delta} scales the rows of {held.name!r} by a rule that is not known here: use merge_peft")
        magnitude = factors[MAGNITUDE].flatten()  # of a stack [E, O]
        if self.form != "IO":  # a block has whole rows of [O, I]
            return lambda rows, sum_: gain_of(magnitude[rows], sum_.norm(dim=1))
        squares = torch.zeros_like(magnitude, dtype=torch.float64)  # one more pass over the weight, for the norms
        for rows, block in held.blocks():
            if block.numel():
                box = self._box(rows, held.shape)
                squares += self.delta.update(factors, *box).add_(self._matrix(block)).square().sum(1)
        whole = gain_of(magnitude, squares.sqrt().to(held.work))
        return lambda rows, sum_: whole

    # -- the weight as a matrix ------------------------------------------------------------------------------------------------

    def _matrix(self, block: Tensor) -> Tensor:
        """A block as rows and columns of [O, I]."""
        if self.form == "OI":
            return block.flatten(1)
        if self.form == "IO":
            return block.T
        return (block if self.form == "EOI" else block.transpose(1, 2)).flatten(0, 1)

    def _box(self, rows: slice, shape: tuple[int, ...]) -> tuple[slice, slice]:
        if self.form == "OI":
            return slice(rows.start + self.at, rows.stop + self.at), slice(0, math.prod(shape[1:]))
        if self.form == "IO":
            return slice(0, shape[1]), rows
        out, into = shape[1:] if self.form == "EOI" else shape[:0:-1]
        return slice(rows.start * out, rows.stop * out), slice(0, into)

    def _stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        if self.form == "IO":
            return matrix.T.contiguous()
        if self.form == "EIO":
            return matrix.view(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()
        return matrix.view(shape)

    def _check(self, held: Held, rows: slice, exact: Mapping[str, Tensor], old: Tensor, new: Tensor, gain: Tensor | None) -> None:
        """[Note: rows computed again]. Of a stack it is the first row of a matrix that is tried."""
        n = rows.stop - rows.start
        box = self._box(rows, held.shape)
        for line in (i - rows.start for i in _spread(held.shape[0]) if rows.start <= i < rows.stop):
            if self.form == "IO":
                here, at, g = (box[0], slice(box[1].start + line, box[1].start + line + 1)), (slice(None), line), gain
            else:
                row = line * (old.shape[0] // n)
                here, at = (slice(box[0].start + row, box[0].start + row + 1), box[1]), (row, slice(None))
                g = None if gain is None else gain[row]
            dW = self.delta.update(exact, *here).flatten()
            expected = old[at].double() + dW
            if g is not None:
                expected, dW = expected * g, dW * g
            if not expected.isfinite().all():
                continue  # the base's own doing; an overflow of the result is told by its writer
            wrong = float((new[at] - expected).abs().max())
            if not wrong <= 1e-3 * float(dW.abs().max()) + 1e-5 * float(expected.abs().max()):
                raise AdapterError(
                    f"{held.name!r}: line {rows.start + line} is not W + dW ({self.delta}) but off by {wrong:.2e}. The sum was computed "
                    "wrongly: check this machine, and merge again"
                )


Edit = Add | Replace | Shift


class Output:
    """The tensors of a merged model: their outlines, and their values in blocks, each rounded once.

    Args:
        base: The model as it is.
        edits: What changes, by name.
        dtype: Of all floating-point tensors; None keeps each tensor's own.
    """

    def __init__(self, base: Source, edits: Mapping[str, Edit], dtype: torch.dtype | None = None) -> None:
        self.base, self.edits, self.dtype = base, edits, dtype

    def promise(self, name: str) -> Promise:
        own = self.base.dtype(name)
        held = Held(self.base, name)
        shape = self.edits[name].origin(held).shape if name in self.edits else held.shape
        return Promise(name, self.dtype if self.dtype is not None and own in FLOATS else own, shape)

    def check_finite(self) -> None:
        for name, edit in self.edits.items():
            edit.check_finite(name)

    def values(self, name: str) -> Iterator[Tensor]:
        """Blocks of the first dimension, in order."""
        held, dtype, edit = Held(self.base, name), self.promise(name).dtype, self.edits.get(name)
        pairs = ((block, block) for _, block in held.blocks()) if edit is None else edit.values(held)
        for old, new in pairs:
            rounded = new.to(dtype)
            if rounded.dtype != old.dtype or edit is not None:
                broken = rounded.is_floating_point() and not rounded.isfinite().all()
                if broken and old.isfinite().all():
                    raise AdapterError(f"{name!r} does not fit into {dtype}: values overflow. Give dtype=bfloat16 or float32.")
            yield rounded


def _spread(n: int) -> list[int]:
    """Some of n lines, the first and the last among them."""
    return sorted({round(i * (n - 1) / (SAMPLED - 1)) for i in range(SAMPLED)}) if n else []


def _refuse_infinite(what: str, value: Tensor, name: str) -> None:
    if value.is_floating_point() and not value.isfinite().all():
        raise AdapterError(f"{what!r} has values that are not finite; merging it would spoil {name!r}")
