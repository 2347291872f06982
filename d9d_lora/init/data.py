"""What layers see, summed up while the bare model runs over a few batches. What a start makes of it: `eva_corda.py`.

The same numbers on every layout: each microbatch is summed up by the ranks that computed it, and summaries are joined in the order
of microbatches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.placement import box_of


@dataclass(frozen=True)
class Step:
    """One microbatch of a survey, on this rank.

    Attributes:
        run: Runs the model over it.
        mask: bool [batch, length], the tokens of samples; None: all.
        targets: bool [batch, length], of those, the ones with a label.
        last: The last of a global batch: only there may a survey end, or its end would depend on the number of ranks.
    """

    run: Callable[[], object]
    mask: Tensor | None = None
    targets: Tensor | None = None
    last: bool = True


class Summary(Protocol):
    """What is kept of the inputs of one layer. Columns are those of this rank."""

    def of(self, x: Tensor) -> list[Tensor]:
        """Sums up one microbatch x[n, I], as tensors whose shapes do not depend on n."""

    def add(self, part: list[Tensor]) -> None:
        """Joins the summary of the next microbatch."""


S = TypeVar("S", bound=Summary)


@torch.no_grad()
def survey(
    module: nn.Module,
    targets: Mapping[str, nn.Module],
    steps: Iterable[Step],
    make: "Callable[[str, Inputs], S]",
    *,
    group: dist.ProcessGroup | None = None,
    enough: Callable[[dict[str, S]], bool] = lambda _: False,
) -> dict[str, S]:
    """Runs the bare model over microbatches and sums up the input of every target; layers with one input share one summary.

    Args:
        module: The model, with weights, on any layout, before any injection.
        targets: The layers by name.
        steps: This rank's microbatches; every rank has as many.
        make: The empty summary of a layer, from its name and what its first input is.
        group: The ranks that see different data, in the order of microbatches; None: this rank sees all.
        enough: Asked after each global batch whether the summaries will not change any more.

    Raises:
        ValueError: for a layer that was never called.
    """
    watch = _Watch()
    found: dict[str, S] = {}
    with _evaluating(module), watch.on(targets):
        for step in steps:
            watch.mask = step.mask
            watch.seen.clear()
            step.run()
            if lost := sorted(targets.keys() - watch.seen.keys()):
                raise ValueError(f"{lost[:4]} were not called by the model's forward: there is no input to start them from; exclude them")
            for name, first in watch.firsts().items():
                x = watch.seen[name]
                if name == first:
                    found[name] = found[name] if name in found else make(name, x)
                    for part in _gathered(found[name].of(x.rows), group):
                        found[name].add(part)
                else:
                    found[name] = found[first]
            if step.last and enough(found):
                break
    if not found:
        raise ValueError("a start from data needs batches, and none came")
    return found


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Every module is evaluated inside, and is what it was after, even if the survey fails."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@dataclass(frozen=True)
class Inputs:
    """What a layer saw in one microbatch: the rows that count, this rank's columns of them.

    Attributes:
        rows: [n, columns here].
        into: The columns of all ranks together.
        start: The first column of this rank.
        group: The ranks that hold the other columns; None: this rank holds all.
    """

    rows: Tensor
    into: int
    start: int = 0
    group: dist.ProcessGroup | None = None

    def total(self, t: Tensor) -> Tensor:
        """Adds over the ranks that hold the other columns."""
        if self.group is not None:
            t = t.contiguous()
            dist.all_reduce(t, group=self.group)
        return t

    def whole(self, columns: Tensor) -> Tensor:
        """[n, columns here] -> [n, into]."""
        if self.group is None:
            return columns
        full = columns.new_zeros((len(columns), self.into))
        full[:, self.start : self.start + columns.shape[1]] = columns
        return self.total(full)


class _Watch:
    """Hooks that note what each target sees in a forward."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.seen: dict[str, Inputs] = {}
        self._tensors: dict[str, Tensor] = {}

    @contextmanager
    def on(self, targets: Mapping[str, nn.Module]) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._note(name)) for name, m in targets.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def firsts(self) -> dict[str, str]:
        """Every layer, with the first of those that saw the very same tensor."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(x), name) for name, x in self._tensors.items()}

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            self._tensors[name] = x  # kept until the next forward, so that no other tensor takes its identity
            into, start, group = x.shape[-1], 0, None
            if isinstance(x, DTensor):
                (placement,) = x.placements
                if placement.is_shard(x.ndim - 1):
                    start, group = box_of(x)[-1].start, x.device_mesh.get_group()
                elif not placement.is_replicate():
                    raise ValueError(f"{name}: its input is {placement}; a start from data takes whole tokens")
                x = x.to_local()
            if self.mask is not None:
                if self.mask.shape != x.shape[:-1]:
                    raise ValueError(f"{name}: its input is {tuple(x.shape)}, the tokens are {tuple(self.mask.shape)}; exclude the layer")
                x = x[self.mask]
            self.seen[name] = Inputs(x.reshape(-1, x.shape[-1]), into, start, group)

        return note


def _gathered(part: list[Tensor], group: dist.ProcessGroup | None) -> Iterator[list[Tensor]]:
    """The summaries of every rank's microbatch, in the order of ranks."""
    if group is None:
        yield part
        return
    flat = torch.cat([t.double().reshape(-1) for t in part])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, flat, group=group)
    for one in everyone:
        yield [piece.view_as(t).to(t.dtype) for piece, t in zip(one.split([t.numel() for t in part]), part)]
