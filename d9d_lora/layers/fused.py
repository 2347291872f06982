"""y = x W^T + b + s drop(x) A^T B^T as one step of autograd, with W[O,I] frozen, A[R,I], B[O,R], x[N,I], all of them this rank's parts.

    forward     z = drop(x) A^T             y = x W^T + b;  y += s z B^T
    backward    u = dy B                    dx = dy W;      dx += s drop(u A)
                dA = s u^T drop(x)          dB = s dy^T z

Beyond the frozen layer these are six products of rank R. The adapter's share is added into the two large tensors that the frozen layer
makes anyway. Kept for the backward: x, which autograd holds once however many layers read it, and z[N, R]; to recompute z would be a
seventh product. With dropout, the clock's time is kept and no mask: it is drawn again.

Autograd left to itself adds [N, O] and [N, I] out of place, scales thin products, and with dropout keeps another x for each layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from d9d_lora.dropout import Mask

Restore = Callable[..., Tensor]


def as_it_is(W: Tensor) -> Tensor:
    return W


def fused(
    x: Tensor,
    weight: tuple[Tensor, ...],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Mask | None = None,
    restore: Restore = as_it_is,
) -> Tensor:
    """x [..., I] -> [..., O].

    Args:
        weight: What W is made of: W[O, I] itself (a transposed view will do), or packed tensors. It gets no gradient.
        restore: Makes W of it, for each of its two products; what it made is not kept.
        mask: Dropout on the input of A.
    """
    now, drop = (None, None) if mask is None else (mask.now, mask[1:])
    y: Tensor = _Fused.apply(x, bias, A, B, now, drop, scaling, restore, *weight)
    return y


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, A, B, now, drop, scaling, restore, *weight):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        if drop is not None:
            now = now.clone()  # the clock runs on before the backward
            rows = Mask(now, *drop).keep(rows)
            scaling = scaling / (1 - drop[1])
        z = rows @ A.T
        y = linear(x, restore(*weight), bias)
        y.view(-1, y.shape[-1]).addmm_(z, B.T, alpha=scaling)
        ctx.save_for_backward(x, z, A, B, now, *weight)
        ctx.drop, ctx.scaling, ctx.restore = drop, scaling, restore
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, z, A, B, now, *weight = ctx.saved_tensors
        for_x, for_bias, for_A, for_B, *_ = ctx.needs_input_grad
        dx = db = dA = dB = None
        dy = dy.reshape(-1, dy.shape[-1])
        if for_bias:
            db = dy.sum(0)
        if for_B:
            dB = (dy.T @ z).mul_(ctx.scaling)
        rows = x.reshape(-1, x.shape[-1])
        mask = None if ctx.drop is None else Mask(now, *ctx.drop)
        u = dy @ B
        if for_A:
            dA = (u.T @ (rows if mask is None else mask.keep(rows))).mul_(ctx.scaling)
        if for_x:
            dx = dy @ ctx.restore(*weight)
            if mask is None:
                dx.addmm_(u, A, alpha=ctx.scaling)
            else:
                dx.add_(mask.keep(u @ A), alpha=ctx.scaling)
            dx = dx.view_as(x)
        return dx, db, dA, dB, *(None,) * (4 + len(weight))


__all__: list[Any] = ["as_it_is", "fused"]
