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
        dg = (dz * y).flatten(0, -2).sum(0, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        return dy, dg
