"""y = x W^T + b with a frozen W[O,I] that is held in four bits (`nf4`), and made whole only while it is multiplied by.

The three packed tensors are frozen parameters of integers, so FSDP2 shards and gathers them as any other: what travels is a quarter of the
bytes. Each has rows as its first dimension; columns are split in whole blocks only. The backward needs W again (the gradient of x is
g W), and restores it again: what is kept in between is the packed form.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn.functional import linear

from d9d_lora.placement import Placing, local_of, place_like
from d9d_lora.quant.nf4 import BLOCK, Packed, dequantise, packed_shapes, quantise


class _Axes(NamedTuple):
    weight: str
    absmax: str
    span: str


PACKED_AXES = _Axes("OI", "OI", "OS")  # the letters of each tensor's dimensions; S: offset and step


class NF4Linear(nn.Module):
    """A linear layer whose weight is frozen and packed.

    Attributes:
        weight, absmax, span: The packed weight; see `nf4`.
        bias: As of `nn.Linear`.
        dtype: What the weight is restored to where it is asked for by itself.
        block: Columns that share one scale.
        merge_dequantises: Whether a merge may put a plain linear layer in its place; see `layers/nf4.py`.
    """

    weight: nn.Parameter
    absmax: nn.Parameter
    span: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, block: int = BLOCK) -> None:
        """An empty layer on meta, without a bias; `of` makes one from a linear layer."""
        super().__init__()
        if block % 2 or block < 2:
            raise ValueError(f"block={block}: two codes share a byte, so a block has an even number of columns, such as {BLOCK}")
        self.in_features, self.out_features, self.dtype, self.block = in_features, out_features, dtype, block
        self.merge_dequantises = False
        self._hold(packed_shapes(out_features, in_features, block))
        self.register_parameter("bias", None)

    @classmethod
    def of(cls, base: nn.Linear, block: int = BLOCK) -> Self:
        """From a linear layer, plain or tensor-parallel, with weights or on meta. Collective where its columns are split."""
        W = base.weight
        new = cls(base.in_features, base.out_features, dtype=W.dtype, block=block)
        if isinstance(W, DTensor):
            for mesh_size, placement in zip(W.device_mesh.shape, W.placements):
                if placement.is_shard(1):
                    new.check_columns(mesh_size)
        new._hold(Packed(*(place_like(W, "OI", t.shape, axes, t.dtype) for t, axes in zip(new.packed(), PACKED_AXES))))
        new.bias = base.bias
        new.train(base.training)
        if not W.is_meta:
            new.pack(W.detach())
        return new

    def _hold(self, packed: Packed) -> None:
        for name, t in packed._asdict().items():
            self.register_parameter(name, nn.Parameter(t, requires_grad=False))

    # -- the packed weight -------------------------------------------------------------------------------------------------

    def packed(self) -> Packed:
        return Packed(self.weight, self.absmax, self.span)

    def packed_here(self) -> Packed:
        """What this rank holds of it."""
        return Packed(*map(local_of, self.packed()))

    def outline(self) -> Tensor:
        """The weight as it would be unpacked: [O, I] in `dtype`, with its placement, on meta."""
        shape = torch.Size((self.out_features, self.in_features))
        return place_like(self.weight, "OI", shape, "OI", self.dtype, device="meta")

    def hidden(self) -> int:
        """How many more weights there are than numbers in the packed tensors."""
        return self.out_features * self.in_features - sum(t.numel() for t in self.packed())

    def columns_here(self) -> int:
        return min(self.in_features, 2 * local_of(self.weight).shape[1])  # only whole rows may have an odd end

    def placed(self, values: Tensor) -> Tensor:
        """This rank's part of a weight as the whole: with the placement of `outline`."""
        like = self.outline()
        if not isinstance(like, DTensor):
            return values
        return DTensor.from_local(values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())

    @torch.no_grad()
    def pack(self, W: Tensor) -> None:
        """Quantises a weight into this layer: `W` is placed as `outline` is. Collective where its columns are split."""
        groups = _column_groups(W)

        def agree(low: Tensor, high: Tensor) -> None:
            for group in groups:
                dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
                dist.all_reduce(high, dist.ReduceOp.MAX, group=group)

        for held, new in zip(self.packed_here(), quantise(local_of(W), self.block, agree if groups else None)):
            held.copy_(new)

    def unpacked_here(self, dtype: torch.dtype | None = None) -> Tensor:
        """This rank's part of W, restored."""
        return dequantise(self.packed_here(), self.columns_here(), self.block, dtype or self.dtype)

    def check_columns(self, ranks: int) -> None:
        """Refuses to split the columns over ranks unless each gets whole blocks."""
        if self.in_features % (ranks * self.block):
            blocks = self.in_features // self.block
            fits = [t for t in range(1, blocks + 1) if blocks % t == 0] if self.in_features % self.block == 0 else [1]
            raise ValueError(
                f"a quantised weight of {self.in_features} columns cannot be split by columns over {ranks} ranks: each must hold whole "
                f"blocks of {self.block} columns. Degrees that fit: {fits}; or leave this layer unquantised"
            )

    # -- as a layer --------------------------------------------------------------------------------------------------------

    def product(self, x: Tensor) -> Tensor:
        """x W^T of this rank's parts."""
        return _Product.apply(x, self.columns_here(), self.block, *self.packed_here())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]; under tensor parallelism DTensors, in the states that `nn.Linear` has."""
        placing = Placing.of(self.weight, "OI", type(self).__name__)
        wanted: Placement | None = {"O": Replicate(), "I": Shard(x.ndim - 1), None: None}[placing.letter]
        h, _ = placing.enter(x, wanted, type(self).__name__)
        y = self.product(h)
        if self.bias is not None and placing.is_first():
            y = y + placing.local(self.bias, "O", parts=True).to(y.dtype)
        return placing.leave(y, x, self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # `.to(dtype)` says what to compute in; the packed integers stay as they are.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=local_of(self.weight).device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4 block={self.block}"


class _Product(torch.autograd.Function):
    """x W^T; the backward, g W, restores W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int, block: int, weight: Tensor, absmax: Tensor, span: Tensor) -> Tensor:
        ctx.save_for_backward(weight, absmax, span)
        ctx.columns, ctx.block, ctx.dtype = columns, block, x.dtype
        return linear(x, dequantise(Packed(weight, absmax, span), columns, block, x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        W = dequantise(Packed(*ctx.saved_tensors), ctx.columns, ctx.block, g.dtype)
        return (g @ W).to(ctx.dtype), None, None, None, None, None


def restored(columns: int, block: int, dtype: torch.dtype, *packed: Tensor) -> Tensor:
    """W of its three packed tensors, as `layers/fused.py` asks for it."""
    return dequantise(Packed(*packed), columns, block, dtype)


def _column_groups(W: Tensor) -> list[dist.ProcessGroup]:
    """The groups of ranks that hold other columns of the same rows."""
    if not isinstance(W, DTensor):
        return []
    return [W.device_mesh.get_group(i) for i, p in enumerate(W.placements) if getattr(p, "dim", None) == 1]  # strided too


@contextmanager
def dequantising(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """A merge inside may put plain layers in the place of the quantised ones, if wanted; the next merge has to be told again."""
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)] if wanted else []
    before = [m.merge_dequantises for m in packed]
    for m in packed:
        m.merge_dequantises = True
    try:
        yield
    finally:
        for m, was in zip(packed, before):
            m.merge_dequantises = was
