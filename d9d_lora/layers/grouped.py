"""y_n = x_n W_e + drop(x_n) dW_e^T for the rows n of expert e: a linear layer for each expert, with W[E, I, O] and rows sorted by expert.

The weight is stored turned, as d9d keeps it and torch's grouped product takes it. Expert parallelism is a weight that is Shard(0): each
rank then gets the rows of its own experts, plain tensors in and out, and `x_groups` tells of those experts only. What brings rows to
their experts' ranks is the model's affair.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.dropout import AdapterDropout
from d9d_lora.layers.among import Work
from d9d_lora.layers.base import is_hooked, refuses_weight
from d9d_lora.layers.gained import gained_rows
from d9d_lora.layers.grouped_mm import Groups, grouped_mm, thin_mm
from d9d_lora.layers.stacked import Stacked
from d9d_lora.methods.delta import Geometry, Parts


class GroupedLinear(nn.Module):
    """A linear layer for each of `n_groups` experts, without biases: `weight` [experts, in, out]. Follows d9d's class of this name.

    Rows of x past the sum of `x_groups` belong to no expert: they come out as zeros and get no gradient.
    """

    def __init__(
        self,
        n_groups: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_groups, self.in_features, self.out_features = n_groups, in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_groups, in_features, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(in)."""
        bound = 1 / math.sqrt(self.in_features)
        self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor, x_groups: Any) -> Tensor:
        """x [rows, in], sorted by expert -> [rows, out].

        Args:
            x_groups: The number of rows of each expert, [experts] integers; or d9d's `ExpertTokenGroups`.
        """
        weight: Tensor = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return grouped_mm(x.to(weight.dtype), weight, Groups.of(x_groups, x, len(weight), type(self).__name__))

    def extra_repr(self) -> str:
        return f"n_groups={self.n_groups}, in_features={self.in_features}, out_features={self.out_features}"


class Sorted(NamedTuple):
    """Rows sorted by expert: what an update of experts is applied to."""

    x: Tensor
    groups: Groups


class AdaptedProduct(Stacked):
    """An adapted stack that rows sorted by expert are multiplied by."""

    def adapted(self, h: Sorted, base: Callable[[], Tensor]) -> Tensor:
        """W_e x and all updates at work, then the gain; `base` multiplies by W alone."""
        parts = self.in_parts()
        if self.fuses():
            y = self.fused(h, self.parts(None, parts=parts))
        elif self.has_gain_at_work():
            y = base() + self.update(h, self.parts(h.x.dtype, parts=parts))
        else:
            return self.plus_updates(base(), h, h.x.dtype, parts=parts)  # type: ignore[arg-type]
        return self.times_gain(y, h) if self.delta.has_gain else y

    def fuses(self) -> bool:
        """Whether base and update can be one step of autograd, as `AdaptedLinear.fuses`."""
        if not self.delta.thin or self.at_work() != [Work(self)]:
            return False
        if self.training and self.dropout.p and self.dropout.clock is None:
            return False
        return not self.base.weight.requires_grad  # type: ignore[union-attr]

    def fused(self, h: Sorted, f: Parts) -> Tensor:
        B, A = self.delta.factors_in(f, h.x.dtype)
        mask = f.dropout.mask(h.x) if f.dropout is not None and f.dropout.p else None
        return grouped_mm(h.x, self.weight_turned(), h.groups, A.mT, B.mT, self.delta.scaling, mask)

    def update(self, x: Any, f: Parts) -> Tensor:
        """drop(x) dW^T for rows sorted by expert."""
        rows: Sorted = x
        B, A = self.delta.factors(f)
        dropped = rows.x if f.dropout is None else self._dropped(rows, f.dropout)
        return thin_mm(dropped, rows.groups, A.mT, B.mT, self.delta.scaling)

    def _dropped(self, rows: Sorted, dropout: AdapterDropout) -> Tensor:
        if not rows.groups.origins or not dropout.p:
            return dropout(rows.x)  # type: ignore[no-any-return]
        (kept,) = dropout.mask(rows.x).keep_from(rows.groups.origins, torch.full_like(rows.x, 1 / (1 - dropout.p)))
        return rows.x * kept

    def times_gain(self, y: Tensor, h: Sorted) -> Tensor:
        return gained_rows(y, self.gain(self.parts(None, parts=False)), h.groups.experts_of(len(y)))

    def weight_turned(self) -> Tensor:
        """This rank's part of the base weight, [E, I, O]."""
        weight = self.placing.local(self.base.weight, self.weight_axes, parts=False)  # type: ignore[arg-type]
        return weight if self.weight_axes == "EIO" else weight.mT


class AdaptedGroupedLinear(AdaptedProduct):
    """An adapted `GroupedLinear`, ours or d9d's."""

    weight_axes = "EIO"
    takes_several = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        host = sys.modules.get("d9d.module.block.moe.grouped_linear")  # a model with such a layer has imported it
        return isinstance(module, GroupedLinear) or (host is not None and isinstance(module, host.GroupedLinear))

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        weight = module._parameters.get("weight")
        if isinstance(weight, DTensor) and not all(p.is_shard(0) for p in weight.placements):
            return f"its weight is {weight.placements}; expected whole experts on each rank, Shard(0), or a plain tensor"
        return refuses_weight(module)

    @classmethod
    def geometry(cls, base: nn.Module) -> Geometry:
        experts, into, out = base.weight.shape  # type: ignore[misc]
        return Geometry(experts * out, into, stack=experts)  # type: ignore[operator,arg-type]

    def forward(self, x: Tensor, x_groups: Any) -> Tensor:
        """As `GroupedLinear.forward`."""
        if (other := self.stand_in()) is not None:
            return other(x, x_groups)  # type: ignore[no-any-return]
        self.refuse_unstarted()
        if self.rows is not None:
            raise ValueError(f"{self.name}: adapter_rows names the adapter of each row of the batch, and experts get rows in another order")
        if isinstance(x, DTensor):
            raise ValueError(f"{self.name}: its input is a DTensor; expected the rows of this rank's own experts, a plain tensor")
        x = x.to(self.base_dtype)
        groups = Groups.of(x_groups, x, self.experts_here()[1], self.name)
        return self.adapted(Sorted(x, groups), lambda: self.base(x, x_groups))

    def fuses(self) -> bool:
        """d9d's layer is called, for its kernels; and any layer that does more than its class."""
        plain = type(self.base).forward is GroupedLinear.forward and not is_hooked(self.base)
        return plain and super().fuses()
