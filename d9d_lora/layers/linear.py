"""y = x W^T + b + drop(x) dW^T, with W[O,I] (`nn.Linear`) or stored transposed, [I,O] (GPT-2's `Conv1D`)."""

import sys

from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn.functional import linear

from d9d_lora.layers.base import AdaptedLayer
from d9d_lora.methods.delta import Parts


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
        self.refuse_unstarted()
        if self.placing.mesh is None and not self.delta.has_gain:
            return self.base(x) + self.update(x, self.parts(x.dtype, parts=False))
        wanted: Placement | None = {"O": Replicate(), "I": Shard(x.ndim - 1), None: None}[self.placing.letter]
        h, parts = self.placing.enter(x, wanted, self.name)
        if self.placing.letter is None:
            self.saw_part_of_tokens = parts
        f = self.parts(h.dtype, parts=parts)
        bias = self.bias_here(parts=parts)
        gain = self.gain(f)
        if gain is None:
            y = linear(h, self.weight_here(), bias) + self.update(h, f)
        else:
            y = (linear(h, self.weight_here()) + self.update(h, f)) * gain
            y = y if bias is None else y + bias
        return self.placing.leave(y, x, self.out_size)

    def update(self, x: Tensor, f: Parts) -> Tensor:
        """drop(x) dW^T on this rank's part, in the dtype of x."""
        return self.delta.apply(self.dropout(x), f)

    def bias_here(self, *, parts: bool) -> Tensor | None:
        """This rank's part of the base's bias. A row-parallel one enters the Partial sum once, on the first rank."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if bias is None:
            return None
        bias = self.placing.local(bias, "O", parts=parts and self.sums_own_parts)
        return bias if self.placing.is_first() else bias * 0  # kept in the graph: every rank's bias has a gradient, and their sum is right


class AdaptedConv1D(AdaptedLinear):
    """An adapted `transformers.pytorch_utils.Conv1D`: a linear layer whose weight is stored [in, out]."""

    weight_axes = "IO"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        host = sys.modules.get("transformers.pytorch_utils")  # a model with such a layer has imported it
        return host is not None and isinstance(module, host.Conv1D)
