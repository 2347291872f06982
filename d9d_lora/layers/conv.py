"""y = conv(x, W) + b + conv(drop(x), dW), for `nn.Conv1d`, `2d` and `3d`: W[O, channels/groups, taps...] is a matrix [O, I] of all but O.

A product dW = s B A is two convolutions and never built: A[R, I] as a kernel [R, channels/groups, taps...] with the stride, padding,
padding mode and dilation of the base, then B[O, R] on every point. With groups, each group of inputs meets the same A, and each
group of outputs has its rows of B: that is dW of the matrix, and it merges. Other updates are built, and are the kernel of one
convolution.

torch shards no convolution along channels: under tensor parallelism it is whole on every rank. FSDP2 shards dimension 0.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.layers.base import AdaptedLayer, refuses_weight
from d9d_lora.layers.gained import gained
from d9d_lora.methods.delta import DoesNotFit, Geometry, Parts

_POINTWISE: dict[int, Any] = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class AdaptedConv(AdaptedLayer):
    """An adapted convolution of one, two or three dimensions."""

    weight_axes = "OI"
    takes_several = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        if isinstance(weight := module._parameters.get("weight"), DTensor) and not weight.placements[0].is_replicate():
            return f"its weight is {weight.placements[0]}, and torch computes no convolution on parts of channels; leave it out of the plan"
        return refuses_weight(module)

    @classmethod
    def geometry(cls, base: nn.Module) -> Geometry:
        assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        O, _, *taps = base.weight.shape
        return Geometry(O, prod(base.weight.shape[1:]), taps=tuple(taps), groups=base.groups)

    def joined(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _settle(self) -> None:
        super()._settle()
        self.dropout.window = None  # x [N, channels, points...] is whole, and its last dimension is not I
        if self.placing.letter is not None:
            raise DoesNotFit(f"{self.name}: its weight is sharded, and torch computes no convolution on parts of channels")

    def forward(self, x: Tensor) -> Tensor:
        """x [N, channels, points...] or [channels, points...]."""
        if (other := self.stand_in()) is not None:
            return other(x)  # type: ignore[no-any-return]
        self.refuse_unstarted()
        if self.placing.mesh is None and not self.has_gain_at_work():
            return self.plus_updates(self.base(x), x, x.dtype)
        h, parts = self.placing.enter(x, None, self.name)
        self.saw_part_of_tokens = parts
        y = self.conv(h, self.weight_here())
        if self.has_gain_at_work():
            f = self.parts(h.dtype, parts=parts)
            y = y + self.update(h, f)
            at = -1 - len(self.taps)
            y = gained(y.movedim(at, -1), self.gain(f)).movedim(-1, at)
        else:
            y = self.plus_updates(y, h, h.dtype, parts=parts)
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if bias is not None:
            y = y + self.by_channel(self.placing.local(bias, "O", parts=parts and self.sums_own_parts))
        return self.placing.leave(y, x, self.out_size)

    def update(self, x: Tensor, f: Parts) -> Tensor:
        """conv(drop(x), dW)."""
        x = x if f.dropout is None else f.dropout(x)
        try:
            B, A = self.delta.factors(f)
        except NotImplementedError:
            return self.conv(x, self.delta.dense(f))
        groups: int = self.base.groups  # type: ignore[assignment]
        h = self.conv(x, A.repeat(groups, 1)) * self.delta.scaling
        pointwise = _POINTWISE[len(self.taps)]
        return pointwise(h, B.view(*B.shape, *[1] * len(self.taps)), groups=groups)

    @property
    def taps(self) -> torch.Size:
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight.shape[2:]

    def conv(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The base's convolution with another kernel, given as a matrix [any, I]."""
        kernel = kernel.reshape(kernel.shape[0], -1, *self.taps)
        return self.base._conv_forward(x, kernel, None)  # type: ignore[operator]

    def by_channel(self, t: Tensor) -> Tensor:
        """t[O], to be put on [N, O, points...]."""
        return t.view(-1, *[1] * len(self.taps))
