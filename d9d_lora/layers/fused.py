"""y = x W^T + b + s drop(x) A^T B^T as one step of autograd, with W[O,I] frozen, A[R,I], B[O,R], x[N,I], all of them this rank's parts.

    forward     z = drop(x) A^T             y = x W^T + b;  y += s z B^T
    backward    u = dy B                    dx = dy W;      dx += s drop(u A)
                dA = s u^T drop(x)          dB = s dy^T z

Beyond the frozen layer these are six products of rank R. The adapter's share is added into the two large tensors that the frozen layer
makes anyway. Kept for the backward: x, which autograd holds once however many layers read it, and z[N, R]; to recompute z would be a
seventh product. With dropout, the clock's time is kept and no mask: it is drawn again.

Several layers that read the same x are one step too (`layers/readers.py`): their A are stacked, A[R1 + R2 + ..., I], so x is dropped
once and read once for all of them, and all their shares of dx are added into one tensor:

    z = drop(x) A^T      y1 = x W1^T + s z1 B1^T,  ...      dx = dy1 W1 + dy2 W2 + ... + s drop(u A)      dA = s u^T drop(x)

Autograd left to itself adds [N, O] and [N, I] out of place, scales thin products, and with dropout keeps another x for each layer.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from d9d_lora.dropout import Mask

Restore = Callable[..., Tensor]


def as_it_is(W: Tensor) -> Tensor:
    return W


class Reader(NamedTuple):
    """One layer that reads x.

    Attributes:
        weight: What W is made of: W[O, I] itself (a transposed view will do), or packed tensors. It gets no gradient.
        restore: Makes W of it, for each of its two products; what it made is not kept.
        A, B: In the dtype they are trained in; they are cast to that of x, and their gradients back.
    """

    weight: tuple[Tensor, ...]
    bias: Tensor | None
    A: Tensor
    B: Tensor
    restore: Restore = as_it_is


def fused(x: Tensor, readers: Sequence[Reader], scaling: float, mask: Mask | None = None) -> tuple[Tensor, ...]:
    """x [..., I] -> [..., O] of each reader.

    Args:
        mask: Dropout on the input of A.
    """
    now, drop = (None, None) if mask is None else (mask.now, mask[1:])
    made = [(len(r.weight), r.restore) for r in readers]
    flat = [t for r in readers for t in (r.bias, r.A, r.B, *r.weight)]
    ys: tuple[Tensor, ...] = _Fused.apply(x, now, drop, scaling, made, *flat)
    return ys


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, now, drop, scaling, made, *flat):  # type: ignore[no-untyped-def]
        readers = list(_readers(made, flat))
        rows = x.reshape(-1, x.shape[-1])
        if drop is not None:
            now = now.clone()  # the clock runs on before the backward
            rows = Mask(now, *drop).keep(rows)
            scaling = scaling / (1 - drop[1])
        z = rows @ _stacked(readers, x.dtype).T
        ys = []
        for r, z_r in zip(readers, z.split([r.A.shape[0] for r in readers], 1)):
            y = linear(x, r.restore(*r.weight), r.bias)
            y.view(-1, y.shape[-1]).addmm_(z_r, r.B.to(x.dtype).T, alpha=scaling)
            ys.append(y)
        ctx.save_for_backward(x, z, now, *flat)
        ctx.drop, ctx.scaling, ctx.made = drop, scaling, made
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):  # type: ignore[no-untyped-def]
        x, z, now, *flat = ctx.saved_tensors
        readers, s = list(_readers(ctx.made, flat)), ctx.scaling
        mask = None if ctx.drop is None else Mask(now, *ctx.drop)
        rows = x.reshape(-1, x.shape[-1])
        ends = list(accumulate(r.A.shape[0] for r in readers))
        grads: list[Tensor | None] = [None] * len(flat)
        u, dx, at = z.new_zeros(z.shape) if None in dys else torch.empty_like(z), None, 0
        for r, dy, end, (n, _) in zip(readers, dys, ends, ctx.made):
            if dy is not None:
                dy = dy.reshape(-1, dy.shape[-1])
                here = slice(end - r.A.shape[0], end)
                torch.mm(dy, r.B.to(dy.dtype), out=u[:, here])
                if ctx.needs_input_grad[_FIRST + at]:
                    grads[at] = dy.sum(0)
                if ctx.needs_input_grad[_FIRST + at + 2]:
                    grads[at + 2] = (dy.T @ z[:, here]).to(r.B.dtype).mul_(s)
                if ctx.needs_input_grad[0]:
                    W = r.restore(*r.weight)
                    dx = dy @ W if dx is None else dx.addmm_(dy, W)
            at += 3 + n
        if any(ctx.needs_input_grad[_FIRST + i] for i in _places_of_A(ctx.made)):
            dA = (u.T @ (rows if mask is None else mask.keep(rows))).to(readers[0].A.dtype).mul_(s)
            for i, part in zip(_places_of_A(ctx.made), dA.split([r.A.shape[0] for r in readers])):
                grads[i] = part if ctx.needs_input_grad[_FIRST + i] else None
        if dx is not None:
            A = _stacked(readers, dx.dtype)
            dx = dx.addmm_(u, A, alpha=s) if mask is None else dx.add_(mask.keep(u @ A), alpha=s)
            dx = dx.view_as(x)
        return dx, *(None,) * (_FIRST - 1), *grads


_FIRST = 5  # of `flat` among the arguments of forward


def _readers(made: Sequence[tuple[int, Restore]], flat: Sequence[Any]) -> Any:
    at = 0
    for n, restore in made:
        bias, A, B, *weight = flat[at : at + 3 + n]
        yield Reader(tuple(weight), bias, A, B, restore)
        at += 3 + n


def _places_of_A(made: Sequence[tuple[int, Restore]]) -> list[int]:
    return [1 + at for at in accumulate((3 + n for n, _ in made[:-1]), initial=0)]


def _stacked(readers: Sequence[Reader], dtype: torch.dtype) -> Tensor:
    """A of all readers, [R, I], to compute with."""
    A = readers[0].A if len(readers) == 1 else torch.cat([r.A for r in readers])
    return A.to(dtype)


__all__: list[Any] = ["Reader", "as_it_is", "fused"]
