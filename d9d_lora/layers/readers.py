"""Layers that read the same x: q, k and v of attention, gate and up of a gated feed-forward.

They are found in the source of the module that holds them: calls `self.q(x)`, `self.k(x)` with the same name x, which is not assigned
between them. Nothing of the model is changed. When the first of them is called, the outputs of all are computed in one step of
autograd (`layers/fused.py`), and each of the others hands out its own when it is called with the very same x. If it is called with another
one, the source told wrong: that layer then computes for itself, and is right.

They share one dropout mask, so that x is dropped once, on every layout: where they do not compute together too.

[Note: one x, several DTensors]
Under tensor parallelism column-parallel layers compute together on this rank's copy of x, each with its part of W and B. A plan that gives
each of them its own `ColwiseParallel()` makes a DTensor of x for each. They are one x if they are one memory, and if their gradients go to
one place: both were made by `DTensor.from_local` of the same output of the same node. The gradient of all then goes through the first of
them, and is one all-reduce; the frozen layers pay one each. A parent that makes one DTensor for all pays one in any case.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.layers.fused import fused

if TYPE_CHECKING:
    from d9d_lora.layers.linear import AdaptedLinear


class Readers:
    """Some adapted linear children of one module, called with one x.

    Attributes:
        names: As children of `parent`, in the order of their calls.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.parent = parent
        self.names = names
        self._made: dict[int, Made] = {}

    def layers(self) -> list[Any]:
        return [self.parent._modules.get(name) for name in self.names]

    def product(self, layer: "AdaptedLinear", x: Tensor, here: Tensor) -> Tensor | None:
        """x W^T + b and the update of one of the layers, on this rank; None if they do not compute together.

        Args:
            here: This rank's part of x; x itself without tensor parallelism.
        """
        if not torch.is_grad_enabled() or x.is_inference():
            return None  # there is no backward to share
        made = self._made.pop(id(layer), None)
        if made is not None and made.writes == _writes(layer, here) and _is_one(made.x, made.here, x, here):
            return made.y
        self._made = {}
        layers = self.layers()
        if not self.together(layers, x, asked=layer):
            return None
        ys = fused(here, [m.as_reader(here.dtype) for m in layers], layer.delta.scaling, layer.mask_of(here))
        self._made = {id(m): Made(x, here, y, _writes(m, here)) for m, y in zip(layers, ys)}
        return self._made.pop(id(layer)).y

    def together(self, layers: list[Any], x: Tensor, asked: "AdaptedLinear | None" = None) -> bool:
        """Whether these layers can compute together on x; of the one that was `asked` it is known that it is fused."""
        first = layers[0]
        for other in layers:
            if getattr(other, "readers", None) is not self or (other is not asked and not other.fuses_here(x)):
                return False
            if other is not first and not _alike(other, first):
                return False
        return first.placing.letter in (None, "O")

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model begins between two forwards."""
        return {**self.__dict__, "_made": {}}


class Made(NamedTuple):
    """An output that waits for its layer to be called with x, of which this rank's part is `here`."""

    x: Tensor
    here: Tensor
    y: Tensor
    writes: list[int]


def _alike(a: "AdaptedLinear", b: "AdaptedLinear") -> bool:
    """Whether they have the same columns of x, one scale and one mask."""
    mask = a.dropout.p == b.dropout.p and (not a.dropout.p or a.dropout.key == b.dropout.key)
    return mask and a.training == b.training and a.delta.scaling == b.delta.scaling and a.placing == b.placing


def _writes(layer: "AdaptedLinear", x: Tensor) -> list[int]:
    """Changes with every write into x, a factor or the clock: an output that nobody fetched must not be handed out in a later step."""
    clock = layer.dropout.clock
    writes = [x._version, -1 if clock is None else clock.now._version]
    for p in (*layer.factors().values(), *(shared.weight for shared in layer.shared.values())):
        writes += id(p), p._version
    return writes


def _is_one(x: Tensor, x_here: Tensor, y: Tensor, y_here: Tensor) -> bool:
    """Whether two inputs are one. [Note: one x, several DTensors]"""
    if x is y:
        return True
    if not isinstance(x, DTensor) or not isinstance(y, DTensor) or _outline(x_here) != _outline(y_here):
        return False
    if (x.device_mesh, x.placements, x.requires_grad) != (y.device_mesh, y.placements, y.requires_grad):
        return False
    return not x.requires_grad or (_origin(x) is not None and _origin(x) == _origin(y))


def _outline(t: Tensor) -> Any:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


def _origin(x: Tensor) -> Any:
    """Where the gradient of a DTensor goes that was made of a local tensor."""
    node: Any = x.grad_fn
    return (node.next_functions, node.grad_placements) if type(node).__name__ == "_FromTorchTensorBackward" else None


def find_readers(model: nn.Module, kind: type) -> None:
    """Makes `Readers` of the children of one `kind` that the source of their parent calls with one x, and gives them one mask."""
    for parent in model.modules():
        children = {name: child for name, child in parent._modules.items() if isinstance(child, kind)}
        for names in calls_with_one_argument(type(parent).forward) if len(children) > 1 else ():
            together: list[Any] = [children[n] for n in names if n in children]
            if len(together) > 1 and len({id(m) for m in together}) == len(together):
                readers = Readers(parent, tuple(n for n in names if n in children))
                for m in together:
                    m.readers = readers
                    if m.dropout.p == together[0].dropout.p:
                        m.dropout.key = together[0].dropout.key


@functools.cache
def calls_with_one_argument(forward: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    """The children a module's forward calls with one argument, by argument: (("q_proj", "k_proj", "v_proj"), ("o_proj",)). A child
    that is called in two places is in none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # no source, or a forward that is no function
        return ()
    calls = _Calls()
    calls.visit(tree)
    every = [name for names in calls.found.values() for name in names]
    return tuple(tuple(n for n in names if every.count(n) == 1) for names in calls.found.values())


class _Calls(ast.NodeVisitor):
    """Walks a function in the order it runs, and collects calls `self.child(name)` by the value that the name has there."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], list[str]] = {}
        self._values: dict[str, int] = {}

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=child), args=[ast.Name(id=name)], keywords=[]):
                self.found.setdefault((name, self._values.get(name, 0)), []).append(child)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._values[node.id] = self._values.get(node.id, 0) + 1

    def _assignment(self, node: Any) -> None:
        if node.value is not None:
            self.visit(node.value)
        for target in getattr(node, "targets", None) or [node.target]:
            self.visit(target)

    visit_Assign = visit_AnnAssign = visit_AugAssign = visit_NamedExpr = _assignment

    def _branching(self, node: Any) -> None:
        """What a branch or a loop assigns may have either value in it and after it."""
        stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        self.generic_visit(node)
        for name in stored:
            self._values[name] = self._values.get(name, 0) + 1

    visit_If = visit_For = visit_While = visit_Try = visit_With = visit_Match = _branching

    def _another_scope(self, node: Any) -> None:
        """Runs at some other time."""

    visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ClassDef = _another_scope

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not self._values and not self.found and isinstance(node, ast.FunctionDef) and node.name == "forward":
            for statement in node.body:
                self.visit(statement)
