"""y = x W^T + b + s drop(x) A^T B^T, with W[O,I] (`nn.Linear`) or stored transposed, [I,O] (GPT-2's `Conv1D`)."""

import sys

from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn.functional import linear

from d9d_lora.layers.base import AdaptedLayer


class AdaptedLinear(AdaptedLayer):
    """An adapted `nn.Linear`, with or without a bias."""

    weight_axes = "OI"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            return "its weight is computed from other tensors (a parametrization), so nothing can be merged into it; remove that first"
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight and never calls it, so an adapter would be dead; exclude it"
        if not module.weight.is_floating_point():  # type: ignore[union-attr,operator]
            return f"its weight is {module.weight.dtype}; expected floating point (a quantised base needs a layer kind of its own)"
        return None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]. Under tensor parallelism x and y are DTensors in the states of the base."""
        if self.placing.mesh is None:
            return self.base(x) + self.low_rank(x, parts=False)
        wanted: Placement | None = {"O": Replicate(), "I": Shard(x.ndim - 1), None: None}[self.placing.letter]
        h, parts = self.placing.enter(x, wanted, self.name)
        if self.placing.letter is None:
            self.saw_part_of_tokens = parts
        y = self.local_base(h, parts=parts) + self.low_rank(h, parts=parts)
        return self.placing.leave(y, x, self.out_size)

    def low_rank(self, x: Tensor, *, parts: bool) -> Tensor:
        """s drop(x) A^T B^T on this rank's part, in the dtype of x; the scale is put on the thin product."""
        B, A = self.local_factors(x.dtype, parts=parts)
        z = linear(self.dropout(x), A)
        return linear(z * self.delta.scaling, B)

    def local_base(self, x: Tensor, *, parts: bool) -> Tensor:
        """The base on this rank's part. A row-parallel bias enters the Partial sum once, on the first rank."""
        weight = self.placing.local(self.base.weight, self.weight_axes, parts=False)  # type: ignore[arg-type]
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if bias is not None:
            bias = self.placing.local(bias, "O", parts=parts and self.sums_own_parts)
            if not self.placing.is_first():
                bias = bias * 0  # kept in the graph: every rank's bias has a gradient, and their sum is right
        return linear(x, self.matrix(weight), bias)


class AdaptedConv1D(AdaptedLinear):
    """An adapted `transformers.pytorch_utils.Conv1D`: a linear layer whose weight is stored [in, out]."""

    weight_axes = "IO"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        host = sys.modules.get("transformers.pytorch_utils")  # a model with such a layer has imported it
        return host is not None and isinstance(module, host.Conv1D)
