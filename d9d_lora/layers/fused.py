"""y = x W^T + b + s drop(x) A^T B^T as one step of autograd, with W[O,I] frozen, A[R,I], B[O,R], x[N,I], all of them this rank's parts.

    forward     z = s drop(x) A^T           y = x W^T + b;  y += z B^T
    backward    u = s dy B                  dx = dy W;      dx += drop(u A)
                dA = u^T drop(x)            dB = dy^T z

Beyond the frozen layer these are six products of rank R. The adapter's share is added into the two large tensors that the frozen layer
makes anyway. Kept for the backward: x, which autograd holds once however many layers read it, and z[N, R]; to recompute z would be a
seventh product. With dropout, the clock's time is kept and no mask: it is drawn again.

Several layers that read the same x are one step too (`layers/readers.py`): their A are stacked, A[R1 + R2 + ..., I], so x is dropped
once and read once for all of them, and all their shares of dx are added into one tensor:

    z = s drop(x) A^T      y1 = x W1^T + z1 B1^T,  ...      dx = dy1 W1 + dy2 W2 + ... + drop(u A)      dA = u^T drop(x)

Autograd left to itself adds [N, O] and [N, I] out of place, scales thin products, and with dropout keeps another x for each layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as _once_differentiable
from torch.nn.functional import linear

from d9d_lora.dropout import Mask

Restore = Callable[..., Tensor]
# To autograd not a view: a model may not write into a view that came out of a Function.
_reshape = torch.ops.aten._unsafe_view.default


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's, which also turns gradients off, where they are on: `create_graph` alone has them on in a backward."""
    guarded = _once_differentiable(backward)

    def run(ctx: Any, *dys: Any) -> Any:
        return guarded(ctx, *dys) if torch.is_grad_enabled() else backward(ctx, *dys)

    return run


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
    made, flat = made_of(readers)
    ys: tuple[Tensor, ...] = _Fused.apply(x, now, drop, scaling, made, *flat)
    return ys


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, now, drop, scaling, made, *flat):  # type: ignore[no-untyped-def]
        now = None if now is None else now.clone()  # the clock runs on before the backward
        ys, z = products(x, readers_of(made, flat), scaling, mask_at(now, drop))
        ctx.save_for_backward(x, z, now, *flat)
        ctx.drop, ctx.scaling, ctx.made = drop, scaling, made
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):  # type: ignore[no-untyped-def]
        x, z, now, *flat = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dx, grads = gradients(x, z, dys, readers_of(ctx.made, flat), ctx.scaling, mask_at(now, ctx.drop), wanted[0], wanted[_FIRST:])
        return dx, *(None,) * (_FIRST - 1), *grads


_FIRST = 5  # of `flat` among the arguments of forward
Made = Sequence[tuple[int, Restore]]  # of each reader: how many tensors its weight is made of, and how


def made_of(readers: Sequence[Reader]) -> tuple[Made, list[Tensor | None]]:
    """Readers taken apart, so that autograd sees their tensors: b, A, B and the weight of each."""
    return [(len(r.weight), r.restore) for r in readers], [t for r in readers for t in (r.bias, r.A, r.B, *r.weight)]


def readers_of(made: Made, flat: Sequence[Any]) -> list[Reader]:
    readers, at = [], 0
    for n, restore in made:
        bias, A, B, *weight = flat[at : at + 3 + n]
        readers.append(Reader(tuple(weight), bias, A, B, restore))
        at += 3 + n
    return readers


def mask_at(now: Tensor | None, drop: Any) -> Mask | None:
    return None if now is None else Mask(now, *drop)


def products(x: Tensor, readers: Sequence[Reader], scaling: float, mask: Mask | None) -> tuple[list[Tensor], Tensor]:
    """y of every reader, and s z[N, R] of all."""
    rows = x.reshape(-1, x.shape[-1])
    read = rows if mask is None else mask.keep(rows)[0]
    A = _stacked(readers, x.dtype)
    z = read.new_empty(rows.shape[0], A.shape[0]).addmm_(read, A.T, beta=0, alpha=_scale(scaling, mask))
    ys = []
    for r, z_r in zip(readers, _columns(z, readers)):
        y = linear(rows, r.restore(*r.weight), r.bias).addmm_(z_r, r.B.to(x.dtype).T)
        ys.append(y if x.ndim == 2 else _reshape(y, (*x.shape[:-1], y.shape[1])))
    return ys, z


def gradients(
    x: Tensor,
    z: Tensor,
    dys: Sequence[Tensor | None],
    readers: Sequence[Reader],
    scaling: float,
    mask: Mask | None,
    for_x: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and the gradients of what `made_of` lists; `wanted` says of which."""
    s, rows = _scale(scaling, mask), x.reshape(-1, x.shape[-1])
    grads: list[Tensor | None] = [None] * len(wanted)
    dx, at, places = None, 0, []
    u = torch.empty_like(z)
    for r, dy, z_r, u_r in zip(readers, dys, _columns(z, readers), _columns(u, readers)):
        if dy is None:
            u_r.zero_()
        else:
            dy = dy.reshape(-1, dy.shape[-1])
            u_r.addmm_(dy, r.B.to(dy.dtype), beta=0, alpha=s)
            if wanted[at]:
                grads[at] = dy.sum(0)
            if wanted[at + 2]:
                grads[at + 2] = torch.mm(dy.T, z_r).to(r.B.dtype)
            if for_x:
                W = r.restore(*r.weight)
                dx = torch.mm(dy, W) if dx is None else dx.addmm_(dy, W)
        places.append(at + 1)
        at += 3 + len(r.weight)
    A, share = _stacked(readers, x.dtype), []
    if mask is not None:
        rows, *share = mask.keep(rows, *(() if dx is None else (torch.mm(u, A),)))  # the mask is made once for both
    if dx is not None:
        dx = dx.add_(share[0]) if share else dx.addmm_(u, A)
        dx = dx.view_as(x)
    if any(wanted[i] for i in places):
        dA = torch.mm(u.T, rows).to(readers[0].A.dtype)
        for i, part in zip(places, [dA] if len(places) == 1 else dA.split_with_sizes([r.A.shape[0] for r in readers])):
            grads[i] = part if wanted[i] else None
    return dx, grads


def _scale(scaling: float, mask: Mask | None) -> float:
    return scaling if mask is None else scaling / (1 - mask.p)


def _stacked(readers: Sequence[Reader], dtype: torch.dtype) -> Tensor:
    """A of all readers, [R, I], to compute with."""
    if len(readers) == 1:
        return readers[0].A.to(dtype)
    ranks = [r.A.shape[0] for r in readers]
    A = readers[0].A.new_empty(sum(ranks), readers[0].A.shape[1], dtype=dtype)
    torch._foreach_copy_(A.split_with_sizes(ranks), [r.A for r in readers])
    return A


def _columns(z: Tensor, readers: Sequence[Reader]) -> Sequence[Tensor]:
    """z[N, R] of each reader."""
    return [z] if len(readers) == 1 else z.split_with_sizes([r.A.shape[0] for r in readers], 1)
