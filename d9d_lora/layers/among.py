"""Which of the adapters of one layer work in a forward: y = x W^T + sum over the active ones of x dW_k^T.

A layer is made with one adapter, its own, called "default". Others are children `adapters.<name>` of it: layers of the same kind
around the same base, which they refer to and do not own. `named/` has the verbs that add, choose and delete them.

Where a start was taken off the base weight (`AdaptedLayer.origin`), the base is W - dW0 as long as that adapter is in the model.
A forward without this adapter adds x dW0^T, so that the others, and the bare base, meet the W they were made for.
"""

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from d9d_lora.layers.base import AdaptedLayer

DEFAULT = "default"  # the adapter that a layer is made with
BASE = "__base__"  # of a row: no adapter; PEFT's name for it


class Rows:
    """The adapter of each row of a batch."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._index: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}

    def of(self, names: Container[str], x: Tensor) -> Tensor:
        """The numbers of the rows of x that these adapters serve."""
        if x.shape[0] != len(self.names):
            raise ValueError(
                f"adapter_rows names {len(self.names)} rows, but a layer got an input of shape {tuple(x.shape)}: expected the rows of the "
                "batch as its first dimension, all of them on each tensor-parallel rank. Give one name for each row of this rank's batch"
            )
        chosen = tuple(name for name in dict.fromkeys(self.names) if name in names)
        key = (chosen, x.device)
        if key not in self._index:
            self._index[key] = torch.tensor([i for i, name in enumerate(self.names) if name in chosen], dtype=torch.long, device=x.device)
        return self._index[key]


class Work(NamedTuple):
    """One term of the sum.

    Attributes:
        adapter: Whose.
        start: The start that was taken off the base weight, and not the update.
        rows: The adapters whose rows it is added to; None: to all rows.
    """

    adapter: "AdaptedLayer"
    start: bool = False
    rows: Container[str] | None = None


def works(adapters: dict[str, "AdaptedLayer"], active: Sequence[str], rows: Rows | None) -> list[Work]:
    """The terms of a layer that has these adapters, in the order of activation."""
    moved = {name: a for name, a in adapters.items() if a.origin}
    if rows is None:
        work = [Work(adapters[name]) for name in active if name in adapters]
        return work + [Work(a, start=True) for name, a in moved.items() if name not in active]
    served = dict.fromkeys(rows.names)
    work = [Work(adapters[name], rows={name}) for name in served if name in adapters]
    for name, a in moved.items():
        if others := served.keys() - {name}:
            work.append(Work(a, start=True, rows=others))
    return work
