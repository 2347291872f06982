"""The thin products of a column-parallel layer on this rank's own tokens: x_k [N/t, I] is kept, and what travels has R columns.

    forward     z_k = drop(x_k) A^T            z [N, R] is gathered            y = x W^T + b + s z B^T
    backward    u = s dy B [N, R], a part      u_k is its reduce-scatter       dA = u_k^T drop(x_k)      dx_k += drop(u_k A)

x [N, I] is gathered by the base's own hooks, serves its product, and is kept by nobody. Layers that read one x (`layers/readers.py` finds
them) share one gather and one reduce-scatter: the first of them makes the z of all. dA is this rank's part of a sum, as on the
gathered path. When: `chooser.py`.

[Note: where the shard comes from]
Some hook gathers the tokens, of the layer (`ColwiseParallel(input_layouts=Shard(1))`) or of its parent (`PrepareModuleInput`). `Watch` puts
one hook before it and one after it, and writes the shard that went in on the tensor that came out. It lives as long as that tensor,
and reaches the layers that are given that very tensor; others, and those with hooks unknown to us, stay on the gathered path.

[Note: rows of a mask]
A mask is a function of (layer, clock, row, column), and a row is one of all N. Each rank takes those of its tokens.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import linear

from d9d_lora.dropout import Among, Mask
from d9d_lora.layers.chooser import Group

_SHARD = "_d9d_lora_token_shard"
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Reading(NamedTuple):
    """What a layer needs beside its gathered input.

    Attributes:
        B: The factor B[O, R], in the dtype it is trained in.
        z: [..., N, R], to be read after `ready()`.
        scaling: Of z B^T.
    """

    B: Tensor
    z: Tensor
    scaling: float
    ready: Callable[[], Any]


@dataclass(frozen=True)
class Tokens:
    """How the tokens of x [..., I] are sharded: in order of ranks and in full chunks, so that the last ranks may have fewer, or none.

    Attributes:
        shape: Of the whole x.
        dim: The dimension of tokens.
    """

    mesh: DeviceMesh
    shape: torch.Size
    dim: int

    @property
    def size(self) -> int:
        return self.shape[self.dim]

    @property
    def chunk(self) -> int:
        return -(-self.size // self.mesh.size())

    def rows(self) -> tuple[int, int]:
        """(start, length) of this rank's."""
        start = min(self.size, self.chunk * self.mesh.get_local_rank())
        return start, min(self.chunk, self.size - start)

    def gather(self, part: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """All rows, to be read after a call; they come first and padded: see `laid_out`."""
        part = _padded(part.movedim(self.dim, 0), self.chunk)
        whole = part.new_empty(self.mesh.size() * self.chunk, *part.shape[1:])
        work = _all_gather(whole, part, group=self.mesh.get_group(), async_op=True)
        return whole.data, work.wait  # `.data`: gloo's late write is no change of what autograd was given

    def laid_out(self, whole: Tensor) -> Tensor:
        """What `gather` gives, with its rows along `dim`."""
        return whole[: self.size].movedim(0, self.dim)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """This rank's rows of the sum over the ranks, of what `gather` gives."""
        part = whole.new_empty(self.chunk, *whole.shape[1:])
        _reduce_scatter(part, whole.contiguous(), group=self.mesh.get_group())
        return part[: self.rows()[1]].movedim(0, self.dim)

    def dropped(self, now: Tensor, drop: tuple[Any, ...] | None, *xs: Tensor) -> Sequence[Tensor]:
        """This rank's rows, where the layer's mask keeps them; not scaled. [Note: rows of a mask]"""
        return xs if drop is None else Mask(now, *drop).keep_among(Among(self.shape[:-1], self.dim, *self.rows()), *xs)


class TokenShard:
    """What is written on a gathered tensor.

    Attributes:
        x: This rank's rows.
        alone: One layer reads the gathered tensor: it was gathered by that layer's hooks.
        readings: What has been made for the layers that read it.
    """

    def __init__(self, x: Tensor, tokens: Tokens, alone: bool) -> None:
        self.x, self.tokens, self.alone = x, tokens, alone
        self.readings: dict[int, Reading] = {}

    def read(self, layers: Sequence[Any]) -> None:
        """Makes the readings of these layers, with one gather."""
        factors = [layer.delta.factors_in(layer.parts(None, parts=True), self.x.dtype) for layer in layers]
        masks = [layer.mask_of(self.x) for layer in layers]
        now = next((mask.now for mask in masks if mask is not None), None)
        drops = [None if mask is None else mask[1:] for mask in masks]
        ready: list[Callable[[], Any]] = []
        z = _Thin.apply(self.tokens, drops, ready, self.x, now, *(A for _, A in factors))
        zs = self.tokens.laid_out(z).split([len(A) for _, A in factors], -1)
        for layer, (B, _), mask, one in zip(layers, factors, masks, zs, strict=True):
            self.readings[id(layer)] = Reading(B, one, layer.delta.scaling / (1 if mask is None else 1 - mask.p), ready[0])


def _padded(t: Tensor, rows: int) -> Tensor:
    t = t.contiguous()
    return t if len(t) == rows else torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])])


def reading(layer: Any, x: Tensor, *, fuses: bool) -> Reading | None:
    """What the layer needs to compute in rank space; None: it stays on the gathered path.

    Raises:
        ValueError: rank space was asked for, and cannot be.
    """
    path = layer.column
    if path.choice == "gathered" or layer.placing.letter != "O" or layer.placing.mesh.size() == 1 or not torch.is_grad_enabled():
        return None  # without gradients nothing is kept, and there is no backward
    shard: TokenShard | None = None if torch.compiler.is_compiling() else getattr(x, _SHARD, None)
    if shard is None or not fuses:
        if path.choice == "rank_space":
            raise ValueError(f"{layer.name}: rank space was asked for, but {_why_not(fuses)}. Choose `auto`, which gathers there")
        return None
    if id(layer) not in shard.readings:
        family = [] if shard.alone or layer.readers is None else layer.readers.layers()
        group = [m for m in family if m is layer or (id(m) not in shard.readings and _joins(m, layer, x))] or [layer]
        ranks = sum(_rank_of(m) for m in group)
        tokens = shard.tokens
        N, I = tokens.shape[:-1].numel(), tokens.shape[-1]
        if not path.takes_rank_space(Group(N, I, ranks, tokens.mesh.size(), shard.x.element_size())):
            return None
        shard.read(group)
    return shard.readings[id(layer)]


def _why_not(fuses: bool) -> str:
    if torch.compiler.is_compiling():
        return "a compiled layer does not see the hooks that gather its input"
    if not fuses:
        return (
            "base and adapter are not one step here (an update that is no thin product, several adapters, autocast, a base that is trained "
            "or has hooks or a forward of its own)"
        )
    return (
        "its input was not gathered from token shards by a hook that is known here. Expected: ColwiseParallel(input_layouts=Shard(...)) on "
        "the layer, or on its parent PrepareModuleInput(use_local_output=False), given to parallelize_adapted or within HandShards of "
        "d9d_lora.styles"
    )


def _joins(other: Any, layer: Any, x: Tensor) -> bool:
    """Whether another reader's z can be made now: its factors are here, and it computes as the layer does."""
    if getattr(other, "readers", None) is not layer.readers or other.placing != layer.placing or other.column != layer.column:
        return False
    here = all(getattr(p, "device_mesh", None) == layer.placing.mesh for p in other.factors().values())  # or FSDP2 holds them sharded
    return here and other.fuses(x)  # type: ignore[no-any-return]


def _rank_of(layer: Any) -> int:
    return int(layer.delta.sizes(layer.out_size, layer.in_size).get("R", 1))


class _Thin(torch.autograd.Function):
    """x_k, and A of each reader -> z, as `Tokens.gather` gives it: [padded N, ..., R of all readers]."""

    @staticmethod
    def forward(ctx, tokens, drops, ready, x, now, *A):  # type: ignore[no-untyped-def]
        now = None if now is None else now.clone()  # the clock runs on before the backward
        zs = [linear(tokens.dropped(now, drop, x)[0], torch.cat(some).to(x.dtype)) for drop, some in _alike(drops, A)]
        z, wait = tokens.gather(torch.cat(zs, -1))
        ready.append(wait)
        ctx.save_for_backward(x, now, *A)
        ctx.tokens, ctx.drops = tokens, drops
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, u):  # type: ignore[no-untyped-def]
        x, now, *A = ctx.saved_tensors
        u = ctx.tokens.reduce_scatter(u).reshape(-1, u.shape[-1])
        dx, dA, at = None, [], 0
        for drop, some in _alike(ctx.drops, A):
            each = [len(a) for a in some]
            part = u[:, at : (at := at + sum(each))]
            back = [(part @ torch.cat(some).to(x.dtype)).view_as(x)] if ctx.needs_input_grad[3] else []
            rows, *more = ctx.tokens.dropped(now, drop, x, *back)
            dA += (part.T @ rows.reshape(-1, x.shape[-1])).to(some[0].dtype).split(each)
            if more:
                dx = more[0] if dx is None else dx.add_(more[0])
        return None, None, None, dx, None, *dA


def _alike(drops: Sequence[Any], A: Sequence[Tensor]) -> list[tuple[Any, list[Tensor]]]:
    """Neighbours that drop the same of x, and so take one product: (mask, their A)."""
    return [(drop, [a for _, a in run]) for drop, run in itertools.groupby(zip(drops, A), key=lambda pair: pair[0])]


def columns(x: Tensor, bias: Tensor | None, r: Reading, weight: tuple[Tensor, ...], restore: Callable[..., Tensor]) -> Tensor:
    """x [..., N, I] -> x W^T + b + s z B^T; x is not kept. `weight` and `restore` are those of `fused.Reader`."""
    y: Tensor = _Columns.apply(x, r.z, bias, r.B, r.scaling, restore, r.ready, *weight)
    return y


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, bias, B, scaling, restore, ready, *weight):  # type: ignore[no-untyped-def]
        y = linear(x, restore(*weight), bias)
        ready()
        y.view(-1, y.shape[-1]).addmm_(z.reshape(-1, z.shape[-1]), B.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(z, B, *weight)
        ctx.shape, ctx.scaling, ctx.restore = x.shape, scaling, restore
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        z, B, *weight = ctx.saved_tensors
        for_x, for_z, for_bias, for_B, *_ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        db = dy.sum(0) if for_bias else None
        dB = (dy.T @ z.reshape(-1, z.shape[-1])).to(B.dtype).mul_(ctx.scaling) if for_B else None
        dz = (dy @ B.to(dy.dtype)).mul_(ctx.scaling).view_as(z) if for_z else None
        dx = (dy @ ctx.restore(*weight)).view(ctx.shape) if for_x else None
        return dx, dz, db, dB, *(None,) * (3 + len(weight))


# -- [Note: where the shard comes from] --------------------------------------------------------------------------------------------


class Watch:
    """A hook before all that gather a module's inputs, and, once `end` says that they are there, one after them."""

    def __init__(self, module: nn.Module, *, alone: bool = False) -> None:
        """`alone`: the module is the layer that reads what is gathered."""
        self.module, self.alone = module, alone
        self.seen: dict[int | str, Any] = {}
        self.handles = [module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)]

    def end(self) -> "Watch":
        self.handles.append(self.module.register_forward_pre_hook(self._after, with_kwargs=True))
        return self

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self.seen = {**dict(enumerate(args)), **kwargs}

    def _after(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        seen, self.seen = self.seen, {}
        for key, whole in {**dict(enumerate(args)), **kwargs}.items():
            part = seen.get(key)
            dim = _gathered_dim(part, whole)
            if dim is not None and part is not None:
                x = part.to_local() if isinstance(part, DTensor) else part
                setattr(whole, _SHARD, TokenShard(x, Tokens(whole.device_mesh, whole.shape, dim), self.alone))


def _gathered_dim(part: Any, whole: Any) -> int | None:
    """The dimension along which `whole` was gathered from the shards `part`; None: it was not."""
    if part is whole or not isinstance(part, Tensor) or not isinstance(whole, DTensor):
        return None
    if whole.device_mesh.ndim != 1 or not whole.placements[0].is_replicate() or part.ndim != whole.ndim or part.dtype != whole.dtype:
        return None
    if isinstance(part, DTensor):
        (placement, *more) = part.placements
        sharded = not more and type(placement) is Shard and part.device_mesh == whole.device_mesh and part.shape == whole.shape
        dim = placement.dim % part.ndim if isinstance(placement, Shard) else -1
        return dim if sharded and dim < part.ndim - 1 else None
    unlike = [d for d in range(part.ndim) if part.shape[d] != whole.shape[d]]
    if len(unlike) != 1 or unlike[0] == part.ndim - 1 or part.shape[unlike[0]] * whole.device_mesh.size() != whole.shape[unlike[0]]:
        return None
    return unlike[0]
