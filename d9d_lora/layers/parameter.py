"""W + dW in the place of W, for a plain parameter that the forward of some module reads: W[O, I], or a stack W[E, O, I].

A module that reads a parameter gives an adapter no input of its own, so the sum is built in every forward, once: it is what the
module finds under the parameter's name while its forward runs. What reads the parameter at other times finds W.

[Note: names of an adapted parameter]
The parameter keeps its name, and its place in the module, which FSDP2 knows it by. The adapter is a child beside it: that of
`experts.down_proj` is `experts.down_proj_adapter`, so its factors are `experts.down_proj_adapter.lora_A.weight` and so on.
"""

from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from d9d_lora.layers.base import AdaptedLayer
from d9d_lora.layers.stacked import Stacked
from d9d_lora.methods.delta import Delta, DoesNotFit, Geometry, Parts

SUFFIX = "_adapter"


class Held(nn.Module):
    """A parameter of another module, as the base of an adapter. It owns nothing.

    Attributes:
        host: The module that has the parameter.
        reader: The module whose forward reads it: the host, mostly.
    """

    def __init__(self, host: nn.Module, parameter: str, reader: nn.Module) -> None:
        super().__init__()
        self.parameter = parameter
        object.__setattr__(self, "host", host)  # not as children: the host holds this module
        object.__setattr__(self, "reader", reader)
        self.training = host.training

    @property
    def weight(self) -> Tensor:
        """The parameter itself, whatever shadows it."""
        weight = self.host._parameters[self.parameter]  # type: ignore[union-attr,index]
        assert isinstance(weight, Tensor)
        return weight

    def extra_repr(self) -> str:
        return self.parameter


class AdaptedParameter(AdaptedLayer):
    """An adapted parameter of a module: a matrix."""

    weight_axes = "OI"
    sees_input: ClassVar[bool] = False
    base: Held

    def __init__(self, base: Held, delta: Delta, *, name: str = "", **kwargs: Any) -> None:
        name = name.removesuffix(SUFFIX)
        if delta.dropout > 0 and not self.sees_input:
            raise DoesNotFit(f"{name} is a parameter, so its adapter has no input that dropout could act on; set the dropout to 0")
        super().__init__(base, delta, name=name, **kwargs)
        self._hooks: list[RemovableHandle] = []

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(module, Held) and module.weight.ndim == 2

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        assert isinstance(module, Held)
        weight = module.weight
        if weight.ndim not in (2, 3):
            return f"it has shape {tuple(weight.shape)}; expected a matrix [out, in] or a stack of them"
        if not weight.is_floating_point():
            return f"it is {weight.dtype}; expected floating point"
        if isinstance(weight, DTensor):
            return "it is sharded by a plan, and its adapter is not; leave it out of the plan"
        if getattr(type(module.reader), "forward", None) is nn.Module.forward:
            return f"it lies in a {type(module.reader).__name__}, which is never called itself, so an adapter would be dead"
        return None

    # -- the shadow --------------------------------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        """W + dW, in the shape and dtype of W."""
        self.refuse_unstarted()
        weight = self.base.weight
        if isinstance(weight, DTensor):
            raise RuntimeError(f"{self.name} has become {weight.placements}, and its adapter has not; leave it out of the plan")
        view = self.rows_first(weight)
        total = self.joined(view)
        for adapter, start, _ in self.at_work():
            f = adapter.start_parts(weight.dtype) if start else adapter.parts(weight.dtype, parts=False)
            total = total + adapter.delta.dense(f)
        if self.has_gain_at_work():
            gain = self.gain(self.parts(weight.dtype, parts=False)).flatten()
            total = (total * gain[:, None]).to(weight.dtype)  # type: ignore[index]
        return self.rows_first(total.view(view.shape))

    def update(self, x: Tensor, f: Parts) -> Tensor:
        return linear(x, self.delta.dense(f))

    def _show(self, module: nn.Module, args: object) -> None:
        # An entry of __dict__ is found before the parameter, which stays where FSDP2 and a state dict look for it.
        self.base.host.__dict__[self.base.parameter] = self()  # type: ignore[union-attr]

    def _hide(self, module: nn.Module, args: object, output: object) -> None:
        self.base.host.__dict__.pop(self.base.parameter, None)  # type: ignore[union-attr]

    def take_over(self) -> Self:
        self.give_back()
        reader: nn.Module = self.base.reader  # type: ignore[assignment]
        self._hooks = [reader.register_forward_pre_hook(self._show), reader.register_forward_hook(self._hide, always_call=True)]
        return self

    def give_back(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return self.base


class AdaptedStack(Stacked, AdaptedParameter):
    """An adapted parameter that is a stack of matrices."""

    def __init__(self, base: Held, delta: Delta, *, name: str = "", **kwargs: Any) -> None:
        self.weight_axes = _axes(base)
        super().__init__(base, delta, name=name.removesuffix(SUFFIX), **kwargs)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(module, Held) and module.weight.ndim == 3

    @classmethod
    def geometry(cls, base: nn.Module) -> Geometry:
        assert isinstance(base, Held)
        experts, out, into = (base.weight.shape[_axes(base).index(letter)] for letter in "EOI")
        return Geometry(experts * out, into, stack=experts)


def _axes(base: Held) -> str:
    """How a stack is stored. [in, out] if the module says so itself (GPT-OSS)."""
    return "EIO" if getattr(base.host, "is_transposed", False) else "EOI"


def held(host: nn.Module, parameter: str, parent: nn.Module | None) -> Held:
    """The base of an adapter for a parameter of `host`, a child of `parent`."""
    # torch's attention reads the weight of its output projection and never calls it.
    reads = isinstance(parent, nn.MultiheadAttention) and isinstance(host, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return Held(host, parameter, parent if reads and parent is not None else host)
