"""g y for every row of an output y[..., O], with g[O] near one and at least in fp32 (DoRA's magnitude over its norm).

In half precision g itself would have steps of 1/128 about one, and to widen y would make two more copies of it. So g = 1 + d with d
rounded: y + d y is then off by a rounding of d y, which while |d| is at most one is no more than the rounding of y itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gained(y: Tensor, g: Tensor) -> Tensor:
    """y[..., O] times g[O], in the dtype of y; kept for the backward is y."""
    if y.dtype == g.dtype:
        return y * g
    result: Tensor = _Gained.apply(y, g)
    return result


class _Gained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        d = (g - 1).to(y.dtype)
        ctx.save_for_backward(y, d)
        ctx.dtype = g.dtype
        return torch.addcmul(y, y, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, d = ctx.saved_tensors
        dy = torch.addcmul(dz, dz, d) if ctx.needs_input_grad[0] else None
        dg = (dz * y).sum(tuple(range(y.ndim - 1)), dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        return dy, dg


def gained_rows(y: Tensor, g: Tensor, of: Tensor) -> Tensor:
    """Row n of y[N, O] times g[E, O] of its expert, of[n], in the dtype of y. Kept for the backward is y, and no gain of every row."""
    result: Tensor = _GainedRows.apply(y, g, of)
    return result


class _GainedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor, of: Tensor) -> Tensor:
        ctx.save_for_backward(y, g, of)
        return _times(y, g, of)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, g, of = ctx.saved_tensors
        dy = _times(dz, g, of) if ctx.needs_input_grad[0] else None
        dg = torch.zeros_like(g).index_put_((of,), (dz * y).to(g.dtype), accumulate=True) if ctx.needs_input_grad[1] else None
        return dy, dg, None


def _times(y: Tensor, g: Tensor, of: Tensor) -> Tensor:
    return y * g[of] if y.dtype == g.dtype else torch.addcmul(y, y, (g - 1).to(y.dtype)[of])
