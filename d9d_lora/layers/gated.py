"""A gated feed-forward as one step of autograd: h = act(x Wg^T) * (x Wu^T), y = h Wd^T, with an adapter on each of the three.

    kept by autograd for its parts      x, g, act(g), u, h      three [N, F], and h for the factor A of the last layer
    kept here                           x, g, u                 act(g) and h are computed again from g and u

It is less than the same block keeps without any adapter, whose autograd needs g, act(g) and u. No product is computed twice.

The block is found by the source of its module, `self.down(self.act(self.gate(x)) * self.up(x))` whatever the names, and the source is
not changed: the module gets a `forward` that computes the same, and gives way to its own wherever a part does more than
its class says (hooks, several adapters, a gain, autocast, torch.compile).

Under tensor parallelism each rank has F / t of the inner columns, and the step is the same on these: gate and up in columns, down in
rows, and y is a part of a sum. Before and after it run the hooks that torch's styles have put on gate and on down, so x and y travel as
they do for the frozen block. Where the styles would move anything in between (`layers/styled.py`), or gate and up are in rank space, the
block is computed in parts.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import Replicate

from d9d_lora.layers.base import is_hooked
from d9d_lora.layers.fused import gradients, made_of, mask_at, products, readers_of
from d9d_lora.layers.linear import AdaptedLinear
from d9d_lora.layers.rank_space import reading
from d9d_lora.layers.styled import Ends, ends_of


class Names(NamedTuple):
    """The children of a gated feed-forward."""

    gate: str
    up: str
    down: str
    act: str


class GatedForward:
    """The forward of a module `parent` with these children."""

    def __init__(self, parent: nn.Module, names: Names) -> None:
        self.parent = parent
        self.names = names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and (ends := self.holds(args[0])) is not None:
            return self.together(args[0], ends)
        return type(self.parent).forward(self.parent, *args, **kwargs)

    def holds(self, x: Tensor) -> Sequence[Ends] | None:
        """If every part does what its class says and nothing else, and there will be a backward: the hooks of tensor parallelism
        before and after the step, of which there may be none. None: it must be computed in parts."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        gate, up, down, act = self.parts()
        layers = (gate, up, down)
        if not all(isinstance(m, AdaptedLinear) for m in layers) or activation_of(act) is None:
            return None
        if any(m._backward_hooks or m._backward_pre_hooks for m in (*layers, act)) or is_hooked(act):
            return None
        if gate.readers is None or not gate.readers.together([gate, up], x) or not down.fuses_here(x):
            return None
        if not all(m.adds_bias_inside() or (m.base.bias is None and not m.has_gain_at_work()) for m in layers):
            return None
        if gate.placing.mesh is None and down.placing.mesh is None:
            return None if any(map(is_hooked, layers)) else ()
        return self._between_styles(x, *layers)

    def _between_styles(self, x: Tensor, gate: AdaptedLinear, up: AdaptedLinear, down: AdaptedLinear) -> Sequence[Ends] | None:
        """The ends of the step under tensor parallelism, if nothing would move between them."""
        if (gate.placing.letter, down.placing.letter) != ("O", "I") or gate.placing.mesh != down.placing.mesh:
            return None
        first, second, last = ends = [ends_of(m) for m in (gate, up, down)]
        if first is None or second is None or last is None or not all(e is not None and e.takes_as_it_comes() for e in ends):
            return None
        if not (first.gives_as_it_is() and second.gives_as_it_is() and first.gives_local == second.gives_local):
            return None
        return (first, last) if reading(gate, x, fuses=True) is None else None

    def parts(self) -> list[Any]:
        return [self.parent._modules.get(name) for name in self.names]

    def together(self, x: Tensor, ends: Sequence[Ends] = ()) -> Tensor:
        gate, up, down, act = self.parts()
        for layer in (gate, up, down):
            layer.refuse_unstarted()
        if ends:
            x, _ = gate.placing.enter(ends[0].take(x), Replicate(), gate.name)
        made, flat = zip(*(made_of([m.as_reader(x.dtype) for m in layers]) for layers in ((gate, up), (down,))))
        masks = [m.mask_of(x) for m in (gate, down)]
        now = next((m.now for m in masks if m is not None), None)
        drops = [None if m is None else m[1:] for m in masks]
        y: Tensor = _Gated.apply(x, now, drops, [gate.delta.scaling, down.delta.scaling], activation_of(act), made, *flat[0], *flat[1])
        return ends[-1].give(down.placing.leave(y, x, down.out_size)) if ends else y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, now, drops, scalings, act, made, *flat):  # type: ignore[no-untyped-def]
        now = None if now is None else now.clone()
        first = _length(made[0])
        (g, u), z = products(x, readers_of(made[0], flat[:first]), scalings[0], _mask(now, drops[0]))
        (y,), z_down = products(act.value(g).mul_(u), readers_of(made[1], flat[first:]), scalings[1], _mask(now, drops[1]))
        ctx.save_for_backward(x, g, u, z, z_down, now, *flat)
        ctx.drops, ctx.scalings, ctx.act, ctx.made = drops, scalings, act, made
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, g, u, z, z_down, now, *flat = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # each goes after its last use, unless the graph is kept
        first, wanted = _length(ctx.made[0]), ctx.needs_input_grad
        a, mask = ctx.act.value(g), _mask(now, ctx.drops[1])
        h, a = (a * u, a) if mask is None else (a.mul_(u), None)  # a mask takes room of its own: a is made anew after it
        down = readers_of(ctx.made[1], flat[first:])
        dh, grads_down = gradients(h, z_down, [dy], down, ctx.scalings[1], mask, True, wanted[_FIRST + first :])
        assert dh is not None
        del h
        du = (ctx.act.value(g) if a is None else a).mul_(dh)
        dg = ctx.act.gradient(dh.mul_(u), g)
        del g, u, a, dh
        mask = _mask(now, ctx.drops[0])
        both = readers_of(ctx.made[0], flat[:first])
        dx, grads = gradients(x, z, [dg, du], both, ctx.scalings[0], mask, wanted[0], wanted[_FIRST : _FIRST + first])
        return dx, *(None,) * (_FIRST - 1), *grads, *grads_down


_FIRST = 6  # of `flat` among the arguments of forward


def _length(made: Any) -> int:
    return sum(3 + n for n, _ in made)


def _mask(now: Tensor | None, drop: Any) -> Any:
    return None if drop is None else mask_at(now, drop)


class Activation(NamedTuple):
    """An elementwise function of g, and its gradient as a function of (da, g)."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


SILU = Activation(torch.nn.functional.silu, torch.ops.aten.silu_backward)
GELU, GELU_TANH = (
    Activation(partial(torch.nn.functional.gelu, approximate=how), partial(torch.ops.aten.gelu_backward, approximate=how))
    for how in ("none", "tanh")
)
_OF_TRANSFORMERS = {"SiLUActivation": SILU, "GELUActivation": GELU, "GELUTanh": GELU_TANH, "PytorchGELUTanh": GELU_TANH}


def activation_of(module: nn.Module | None) -> Activation | None:
    """What a module computes, if it is one of those a gated feed-forward has."""
    if type(module) is nn.SiLU and not module.inplace:
        return SILU
    if type(module) is nn.GELU:
        return GELU_TANH if module.approximate == "tanh" else GELU
    return _OF_TRANSFORMERS.get(type(module).__name__) if type(module).__module__ == "transformers.activations" else None


def find_gated(model: nn.Module) -> None:
    """Gives gated feed-forwards whose three layers are adapted a forward that keeps less, and takes it from those that have lost one."""
    for parent in model.modules():
        gated = parent.__dict__.get("forward")
        if isinstance(gated, GatedForward) and not all(isinstance(m, AdaptedLinear) for m in gated.parts()[:3]):
            del parent.__dict__["forward"]
        names = gated_names(type(parent).forward) if "forward" not in parent.__dict__ else None
        if names and all(isinstance(parent._modules.get(n), AdaptedLinear) for n in (names.gate, names.up, names.down)):
            parent.forward = GatedForward(parent, names)  # type: ignore[method-assign]


@functools.cache
def gated_names(forward: Callable[..., Any]) -> Names | None:
    """The children of a module whose forward is `return self.down(self.act(self.gate(x)) * self.up(x))`, or the same in two statements."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    match tree.body:
        case [ast.FunctionDef(args=ast.arguments(args=[ast.arg("self"), ast.arg(x)]), body=body)]:
            pass
        case _:
            return None
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # a docstring
    match body:
        case [ast.Return(value=value)]:
            pass
        case [ast.Assign(targets=[ast.Name(id=name)], value=value), ast.Return(value=ast.Name(id=returned))] if name == returned:
            pass
        case _:
            return None
    match value:
        case ast.Call(func=ast.Attribute(ast.Name("self"), down), args=[ast.BinOp(left, ast.Mult(), right)], keywords=[]):
            for gated, plain in ((left, right), (right, left)):
                match gated, plain:
                    case (
                        ast.Call(
                            func=ast.Attribute(ast.Name("self"), act),
                            args=[ast.Call(func=ast.Attribute(ast.Name("self"), gate), args=[ast.Name(id=first)], keywords=[])],
                            keywords=[],
                        ),
                        ast.Call(func=ast.Attribute(ast.Name("self"), up), args=[ast.Name(id=second)], keywords=[]),
                    ) if first == second == x:
                        return Names(gate, up, down, act)
    return None
