"""What all layers have in common whose weight is a stack of matrices, one for each expert: W[E, O, I], or turned, W[E, I, O].

As a matrix it is [E O, I], expert after expert. The factors have the letter E too (`methods/grouped.py`), so where experts are shared out
over ranks (expert parallelism, Shard(0)) each rank has the factors of its own, and no gradient is only a part of a sum; but that of a
factor which is one for all experts is. Where all ranks have some rows or columns of every expert (tensor parallelism), the rule is that
of linear layers (`placement.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from d9d_lora.boxes import local_runs
from d9d_lora.layers.base import AdaptedLayer, Fold
from d9d_lora.methods.delta import Delta, DoesNotFit, Parts
from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.placement import local_of
from d9d_lora.thin import ThinStack


class Stacked(AdaptedLayer):
    """An adapted stack of matrices."""

    delta: GroupedDelta

    def __init__(self, base: nn.Module, delta: Delta, *, name: str = "", **options: Any) -> None:
        try:
            delta = delta.stacked(self.geometry(base).stack)
        except DoesNotFit as error:
            raise DoesNotFit(f"{name or type(base).__name__}: {error}") from error
        super().__init__(base, delta, name=name, **options)

    def _settle(self) -> None:
        low = self.delta.low
        if self.placing.letter in ("O", "I") and (not low.thin or low.has_gain or low.from_the_weight or low.moves_base):
            raise DoesNotFit(
                f"{self.name}: tensor parallelism shares out the rows or columns of each expert here, and {low} on such parts is not "
                "proven; take plain LoRA for the experts, or a layout without tensor parallelism (FSDP2)"
            )
        super()._settle()

    def in_parts(self) -> bool:
        """Whether what this rank computes of the gradient of a factor without the sharded letter is a part of a sum."""
        return self.placing.letter in ("O", "I") or (self.placing.letter == "E" and bool(self.delta.outer))

    # -- the weight ----------------------------------------------------------------------------------------------------------

    def rows_first(self, weight: Tensor) -> Tensor:
        return weight if self.weight_axes == "EOI" else weight.transpose(1, 2)

    def joined(self, weight: Tensor) -> Tensor:
        return weight.flatten(0, 1)

    def experts_here(self) -> tuple[int, int]:
        """(the first expert of this rank, how many it has)"""
        return self.placing.span(self.delta.n, "E")

    def box_here(self) -> tuple[slice, slice]:
        start, n = self.experts_here()
        into, cols = self.placing.span(self.in_size, "I")
        return slice(start * self.delta.out, (start + n) * self.delta.out), slice(into, into + cols)

    def thin(self) -> ThinStack:
        return ThinStack(self.base.weight, self.weight_axes)  # type: ignore[arg-type]

    def gain(self, f: Parts) -> Tensor:
        """[E, O]"""
        weight = self.rows_first(self.placing.local(self.base.weight, self.weight_axes, parts=False))  # type: ignore[arg-type]
        return self.delta.gain(weight, self.row_squares(weight), f, self.placing.total)

    # -- merge ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold_(self, change: Fold) -> None:
        """One matrix at a time: this rank may hold some experts, some of their rows or some of their columns."""
        self.forget()
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        experts, rows, (cols,) = (local_runs(weight)[self.weight_axes.index(letter)] for letter in "EOI")
        every = (e for run in experts for e in range(run.start, run.stop))
        for e, target in zip(every, self.rows_first(local_of(weight)), strict=True):
            first = e * self.delta.out
            for run, part in zip(rows, target.split([run.stop - run.start for run in rows])):
                part.copy_(change(part, slice(first + run.start, first + run.stop), cols))
