"""y = x W^T + b + drop(x) dW^T, with W[O,I] (`nn.Linear`) or stored transposed, [I,O] (GPT-2's `Conv1D`)."""

import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn.functional import linear

from d9d_lora.dropout import Mask
from d9d_lora.layers.among import Work
from d9d_lora.layers.base import AdaptedLayer, is_hooked, refuses_weight
from d9d_lora.layers.chooser import ColumnPath
from d9d_lora.layers.fused import Reader, Restore, as_it_is, fused
from d9d_lora.layers.gained import gained
from d9d_lora.layers.rank_space import Watch, columns, reading
from d9d_lora.layers.readers import Readers
from d9d_lora.methods.delta import Parts


class AdaptedLinear(AdaptedLayer):
    """An adapted `nn.Linear`, with or without a bias."""

    weight_axes = "OI"
    takes_shift = True
    takes_several = True
    readers: Readers | None = None
    """The layers that read the same x, if there are others."""
    column = ColumnPath()
    """Of a column-parallel layer under sequence parallelism: which way its thin products go."""
    _watch: Watch | None = None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight and never calls it, so an adapter is dead; name its weight in target_parameters"
        return refuses_weight(module)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]. Under tensor parallelism x and y are DTensors in the states of the base."""
        fuse = self.fuses(x)
        if fuse and self.started and self.placing.mesh is None and self.adds_bias_inside():
            return self.fused(x, x, parts=False)  # most calls: few lines of Python up to here
        if (other := self.stand_in()) is not None:
            return other(x)  # type: ignore[no-any-return]
        self.refuse_unstarted()
        if self.placing.mesh is None and not fuse and not self.has_gain_at_work():
            return self.plus_updates(self.base(x), x, None)
        wanted: Placement | None = {"O": Replicate(), "I": Shard(x.ndim - 1), None: None}[self.placing.letter]
        h, parts = self.placing.enter(x, wanted, self.name)
        if self.placing.letter is None:
            self.saw_part_of_tokens = parts
        gain = self.has_gain_at_work()
        r = reading(self, x, fuses=fuse)
        if r is not None:
            y = columns(h, self.bias_inside(parts=parts), r, *self.weight_to_restore(h.dtype))
        elif fuse:
            y = self.fused(x, h, parts=parts)
        elif gain:
            y = self.product(h) + self.update(h, self.parts(None, parts=parts))
        else:
            y = self.plus_updates(self.product(h, self.bias_inside(parts=parts)), h, None, parts=parts)
        if gain:
            y = gained(y, self.gain(self.parts(None, parts=parts)))
        if not self.adds_bias_inside() and (bias := self.bias_here(parts=parts)) is not None:
            y = y + bias.to(y.dtype)
        return self.placing.leave(y, x, self.out_size)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b on this rank's part."""
        return linear(x, self.weight_here(), bias)

    def fuses(self, x: Tensor) -> bool:
        """Whether base and update can be one step of autograd: one thin update beside a frozen base that is called as its class is."""
        delta, base = self.delta, self.base
        if not delta.thin or delta.has_shift or base.weight.requires_grad or is_hooked(base):  # type: ignore[union-attr]
            return False
        if type(base).forward is not self.plain_forward():
            return False
        if not self.works_alone() and self.at_work() != [Work(self)]:
            return False
        if self.training and self.dropout.p and self.dropout.clock is None:
            return False
        return not torch.is_autocast_enabled(x.device.type)

    @classmethod
    def plain_forward(cls) -> Callable[..., Any]:
        """The forward that `product` stands in for."""
        return nn.Linear.forward

    def fused(self, x: Tensor, h: Tensor, *, parts: bool) -> Tensor:
        """x W^T + b + drop(x) dW^T on this rank's part, h, of x: together with the other readers of x, if there are any."""
        y = None if self.readers is None or torch.compiler.is_compiling() else self.readers.product(self, x, h)
        return fused(h, [self.reader(h.dtype, parts=parts)], self.delta.scaling, self.mask_of(h))[0] if y is None else y

    def reader(self, dtype: torch.dtype, *, parts: bool) -> Reader:
        """This layer as `fused` takes it."""
        B, A = self.pair(dtype, parts=parts)
        weight, restore = self.weight_to_restore(dtype)
        return Reader(weight, self.bias_inside(parts=parts), A, B, restore)

    def as_reader(self, dtype: torch.dtype) -> Reader:
        """The same, where `fuses_here`."""
        return self.reader(dtype, parts=self.placing.letter is not None)

    def fuses_here(self, x: Tensor) -> bool:
        """Whether its product may be taken outside its own forward: with its weight at hand, in columns, rows or whole. Under
        FSDP2 of each layer on its own it is not, for only the layer that is called is gathered."""
        at_hand = getattr(self.base.weight, "device_mesh", None) == self.placing.mesh
        return at_hand and (self.placing.letter is not None or self.placing.mesh is None) and self.fuses(x)

    def adds_bias_inside(self) -> bool:
        """Whether the bias is added by the product: before anything that scales the output it must not be."""
        return not self.has_gain_at_work()

    def mask_of(self, x: Tensor) -> Mask | None:
        return self.dropout.mask(x) if self.training and self.dropout.p else None

    def weight_here(self) -> Tensor:
        if self.placing.mesh is None and self.weight_axes == "OI":
            return self.base.weight  # type: ignore[return-value]
        return super().weight_here()

    def weight_to_restore(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Restore]:
        """What the weight here is made of, and how it is made whole."""
        return (self.weight_here(),), as_it_is

    def take_over(self) -> Self:
        self._unwatch()
        super().take_over()
        if self.placing.letter == "O":
            self._watch = Watch(self, alone=True).end()
        return self

    def give_back(self) -> nn.Module:
        self._unwatch()
        return super().give_back()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def update(self, x: Tensor, f: Parts) -> Tensor:
        """drop(x) dW^T on this rank's part, in the dtype of x; the parts come as they are trained."""
        y = self.delta.apply(x if f.dropout is None else f.dropout(x), f)
        if not self.delta.has_shift:
            return y
        shift = self.delta.shift(f).to(y.dtype)
        return y + (shift if self.placing.is_first() else shift * 0)  # once in a Partial sum, as `bias_here`

    def bias_inside(self, *, parts: bool) -> Tensor | None:
        """The bias that is added by the product; None: it comes after, or there is none."""
        return self.bias_here(parts=parts) if self.adds_bias_inside() else None

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

    @classmethod
    def plain_forward(cls) -> Callable[..., Any]:
        return sys.modules["transformers.pytorch_utils"].Conv1D.forward  # type: ignore[no-any-return]
