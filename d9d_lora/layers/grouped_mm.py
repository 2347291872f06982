"""y_n = x_n W_e + s drop(x_n) A_e B_e for the rows n of expert e: all products of a grouped linear layer, as one step of autograd.

Letters: E experts, N rows, I in, O out, R rank. Rows are sorted by expert: those of expert e are ends[e - 1] to ends[e].

    forward     z = drop(x) A               y = x W;       y += s z B
    backward    u = dy B^T                  dx = dy W^T;   dx += s drop(u A^T)
                dA_e = s drop(x)_e^T u_e    dB_e = s z_e^T dy_e

A factor that is one for all experts has no letter E: its products are plain, and its gradient is one sum over all rows.

All other products are torch's grouped one, a loop over the experts where it is missing or does not take the tensors: in fp64, and where a
row is no multiple of 16 bytes. Thin factors are padded to that, weights never.

[Note: tail rows]
Rows past the last end belong to no expert. The operator leaves whatever memory held there, in y, z, u and dx alike. Products over rows
(dA, dB) do not read them, and other products keep them to themselves; so y and dx are cleared, and nothing else need be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import pad

from d9d_lora.dropout import Mask, Origin

_OPERATOR: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = 16  # what the strides of the operator's matrices are multiples of


@dataclass(frozen=True)
class Groups:
    """Which rows are whose.

    Attributes:
        ends: [E], int32, where the rows are: the number of rows before the end of each expert's.
        tail: Whether there may be rows past the last end.
        origins: Of rows that came from several ranks, where each is from: dropout masks are those of its own rank.
    """

    ends: Tensor
    tail: bool = True
    origins: Sequence[Origin] = ()

    @classmethod
    def of(cls, x_groups: Any, x: Tensor, experts: int, site: str) -> "Groups":
        """Reads `x_groups`: the rows of each expert, [E] integers, or d9d's `ExpertTokenGroups`.

        Raises:
            ValueError: for another number of experts, numbers that are no integers, and more rows than x has, where that can be seen
                without waiting for a device.
        """
        offsets = getattr(x_groups, "offsets", None)
        if isinstance(offsets, Tensor):
            ends = offsets[1:]
        else:
            counts = x_groups if isinstance(x_groups, Tensor) else torch.tensor(x_groups)
            if counts.is_floating_point() or counts.ndim != 1:
                raise ValueError(f"{site}: x_groups is {counts.dtype} {list(counts.shape)}; expected the number of rows of each expert")
            ends = counts.cumsum(0)
        if len(ends) != experts:
            raise ValueError(f"{site}: x_groups tells of {len(ends)} experts, and this layer has {experts} here; give one number for each")
        tail = True
        if not torch.compiler.is_compiling() and ends.device.type == "cpu" and not isinstance(ends, FakeTensor):
            used = int(ends[-1]) if experts else 0
            if used > len(x):
                raise ValueError(f"{site}: x_groups counts {used} rows, and x has {len(x)}")
            tail = used < len(x)
        return cls(ends.to(x.device, torch.int32), tail)

    def experts_of(self, rows: int) -> Tensor:
        """The expert of each row, [N]; of a tail row the last one."""
        index = torch.searchsorted(self.ends, torch.arange(rows, device=self.ends.device, dtype=torch.int32), right=True)
        return index.clamp_(max=len(self.ends) - 1)

    def clear_tail_(self, y: Tensor) -> Tensor:
        """[Note: tail rows]"""
        if not self.tail:
            return y
        past = torch.arange(len(y), device=y.device) >= self.ends[-1]
        return y.masked_fill_(past[:, None], 0)


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
    mask: Mask | None = None,
) -> Tensor:
    """x[N, I], weight[E, I, O] -> [N, O]; with A[E, I, R] and B[E, R, O], the update as well. Tail rows are zero.

    A matrix without E is one for all experts.

    Args:
        A, B: In the dtype they are trained in; they are cast to that of x, and their gradients back.
        mask: Dropout on the input of A.
    """
    now, drop = (None, None) if mask is None else (mask.now, mask[1:])
    y: Tensor = _Grouped.apply(x, weight, A, B, groups, now, drop, scaling)
    return y


def thin_mm(x: Tensor, groups: Groups, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s x A B for each row's expert: the update alone."""
    A, B = padded(A.to(x.dtype), -1), padded(B.to(x.dtype), -2)
    return grouped_mm(grouped_mm(x, A, groups) * scaling, B, groups)


def padded(t: Tensor, dim: int) -> Tensor:
    """A thin factor with zeros in dimension -1 or -2 up to the multiple that the operator wants: ranks are small, and may be any number."""
    lack = -t.shape[dim] % (_BYTES // t.element_size())
    return pad(t, [0, 0] * (-1 - dim) + [0, lack]) if lack and t.dtype in _DTYPES else t


def _thin(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors to compute with."""
    return padded(A.to(dtype), -1), padded(B.to(dtype), -2)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, B, groups, now, drop, scaling):  # type: ignore[no-untyped-def]
        y = rows_by(x, weight, groups)
        z = None
        if A is not None:
            rows, a, b = x, *_thin(A, B, x.dtype)  # not saved: cast or padded, they would be the factors of all experts once more
            if drop is not None:
                now = now.clone()  # the clock runs on before the backward
                (rows,) = Mask(now, *drop).keep_from(groups.origins, x)
                scaling = scaling / (1 - drop[1])
            z = rows_by(rows, a, groups)
            y.add_(rows_by(z, b, groups), alpha=scaling)
        ctx.save_for_backward(x, weight, A, B, z, now)
        ctx.groups, ctx.drop, ctx.scaling = groups, drop, scaling
        return groups.clear_tail_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, A, B, z, now = ctx.saved_tensors
        for_x, for_weight, for_A, for_B, *_ = ctx.needs_input_grad
        groups, scaling = ctx.groups, ctx.scaling
        dy = dy.contiguous()  # an expanded gradient has strides of zero, which the operator refuses
        dx = rows_by(dy, weight.mT, groups) if for_x else None
        dW = _of(weight, x, dy, groups) if for_weight else None
        dA = dB = None
        if A is not None:
            a, b = _thin(A, B, x.dtype)
            u = rows_by(dy, b.mT, groups)
            h = None if dx is None else rows_by(u, a.mT, groups)
            if ctx.drop is not None:
                kept = Mask(now, *ctx.drop).keep_from(groups.origins, *([x] if h is None else [x, h]))
                x, h = kept[0], kept[-1]
            if for_B:
                dB = _of(b, z, dy, groups).mul_(scaling)[..., : B.shape[-2], :].to(B.dtype)
            if for_A:
                dA = _of(a, x, u, groups).mul_(scaling)[..., : A.shape[-1]].to(A.dtype)
            if dx is not None and h is not None:
                dx.add_(h, alpha=scaling)
        if dx is not None:
            groups.clear_tail_(dx)
        return dx, dW, dA, dB, None, None, None, None


# -- one product ----------------------------------------------------------------------------------------------------------------


def rows_by(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """x[N, K], weight[E, K, M] -> [N, M], each row by the matrix of its expert, or weight[K, M], all by one. [Note: tail rows]"""
    if weight.ndim == 2:
        return x @ weight
    if operator_takes(x, *weight.shape[1:]):
        return _product(x.contiguous(), weight, groups, len(x), weight.shape[2])
    y = x.new_zeros(len(x), weight.shape[2])
    for e, rows in enumerate(_spans(groups, len(x))):
        torch.mm(x[rows], weight[e], out=y[rows])
    return y


def over_rows(x: Tensor, y: Tensor, groups: Groups) -> Tensor:
    """x[N, K], y[N, M] -> [E, K, M]: the sum of outer products over each expert's rows."""
    if operator_takes(x, x.shape[1], y.shape[1]):
        return _product(x.contiguous().mT, y.contiguous(), groups, len(groups.ends), x.shape[1], y.shape[1])
    return torch.stack([x[rows].mT @ y[rows] for rows in _spans(groups, len(x))])


def _product(a: Tensor, b: Tensor, groups: Groups, *shape: int) -> Tensor:
    """torch's grouped product, of this shape. Of fake tensors (a rehearsal) it takes bfloat16 alone; all it makes is the result."""
    if isinstance(a, FakeTensor):
        return a.new_empty(shape)
    return _OPERATOR(a, b, offs=groups.ends)  # type: ignore[no-any-return]


def _of(weight: Tensor, x: Tensor, y: Tensor, groups: Groups) -> Tensor:
    """The gradient of a weight that brought x[N, K] to where y[N, M] is the gradient: [E, K, M], or [K, M] of one for all experts."""
    if weight.ndim == 3:
        return over_rows(x, y, groups)
    return over_rows(x, y, replace(groups, ends=groups.ends[-1:]))[0] if groups.tail else x.mT @ y


def operator_takes(x: Tensor, *sizes: int) -> bool:
    """Whether torch's grouped product takes matrices with rows of these sizes."""
    if _OPERATOR is None or x.dtype not in _DTYPES or not len(x):
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return all(size * x.element_size() % _BYTES == 0 for size in sizes)


def _spans(groups: Groups, rows: int) -> Sequence[slice]:
    """The rows of each expert; where they have no values (a rehearsal), as many for every one."""
    n = len(groups.ends)
    ends = [rows * (e + 1) // n for e in range(n)] if isinstance(groups.ends, FakeTensor) else groups.ends.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]
