"""What torch's column and row styles do at the two ends of a layer, read from the hooks that they leave on it.

`ColwiseParallel` and `RowwiseParallel` put one hook on the input, which makes a DTensor of it, and one on the output, which brings that to
the state that was asked for. A step that computes several layers at once runs the first hook of the first of them and the last hook of
the last, and must know that those between would have moved nothing. Torch keeps what a style was told in these hooks and nowhere else,
so it is read there. Of a layer with any other hook, or with hooks that look otherwise in another torch, nothing is known: it is called as
it is.
"""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from d9d_lora.layers.rank_space import Watch

_STYLES: dict[str, Any] = {"O": ColwiseParallel, "I": RowwiseParallel}
_AT_EASE: dict[str, tuple[tuple[Placement, ...], ...]] = {"O": ((Replicate(),),) * 2, "I": ((Shard(-1),),) * 2}


class Ends(NamedTuple):
    """What the hooks of a style do at the two ends of a layer.

    Attributes:
        input_hook: (layouts as x comes, as the layer wants it)(layer, (x,), mesh) -> x.
        output_hook: (layouts as y goes, whether as a plain tensor)(layer, y, mesh) -> y.
    """

    layer: Any
    mesh: DeviceMesh
    input_hook: Any
    output_hook: Any

    def takes_as_it_comes(self) -> bool:
        """Whether nothing moves at its input: it comes whole to a column-parallel layer, and in columns to a row-parallel one."""
        return tuple(self.input_hook.args) == _AT_EASE[self.layer.placing.letter]

    def gives_as_it_is(self) -> bool:
        """Whether nothing moves at the output of a column-parallel layer."""
        return bool(self.output_hook.args[0] == (Shard(-1),))

    @property
    def gives_local(self) -> bool:
        return bool(self.output_hook.args[1])

    def take(self, x: Tensor) -> Tensor:
        """Its input, as its forward gets it."""
        return self.input_hook(self.layer, (x,), self.mesh)  # type: ignore[no-any-return]

    def give(self, y: Tensor) -> Tensor:
        """Its output, as its caller gets it."""
        return self.output_hook(self.layer, y, self.mesh)  # type: ignore[no-any-return]


def ends_of(layer: Any) -> Ends | None:
    """The two ends of a column-parallel or row-parallel layer that has the hooks of its style and no others."""
    before = [h for h in layer._forward_pre_hooks.values() if not isinstance(getattr(h, "__self__", None), Watch)]
    after = list(layer._forward_hooks.values())
    if (len(before), len(after)) != (1, 1) or layer._forward_hooks_with_kwargs or layer._forward_hooks_always_called:
        return None
    (take, mesh), (give, other) = _within(before[0], "input_fn"), _within(after[0], "output_fn")
    style = _STYLES[layer.placing.letter]
    known = getattr(take, "func", None) is style._prepare_input_fn and getattr(give, "func", None) is style._prepare_output_fn
    return Ends(layer, mesh, take, give) if known and mesh == other == layer.placing.mesh else None


def _within(hook: Any, name: str) -> tuple[Any, Any]:
    """The function of that name and the mesh that a hook of `distribute_module` has closed over."""
    cells = getattr(hook, "__closure__", None) or ()
    names = hook.__code__.co_freevars if cells and getattr(hook, "__module__", "") == "torch.distributed.tensor._api" else ()
    held = {n: cell.cell_contents for n, cell in zip(names, cells)}
    function = held.get(name)
    return (function if isinstance(function, partial) else None), held.get("device_mesh")
