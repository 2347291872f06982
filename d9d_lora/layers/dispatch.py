"""Rows to the ranks of their experts and back, over ranks that each hold E / n experts: expert e is on rank e // (E / n).

    message     the rows of each of its experts, once: [n, E / n] integers and three more    all-to-all
    out         rows, sorted by expert, so by rank as well -> sorted again by (expert, rank they came from)    all-to-all
    home        the rows that the experts made of them, in the order they left in    all-to-all

Backward of each all-to-all of rows is the one back. A row is never dropped: counts may be uneven, and zero. Adapters lie with their
experts and travel in none of it.

[Note: rows of other ranks]
Whether an element is dropped is a function of the time and of the row's number among the sorted rows of its own microbatch. Ranks of
different data are at different times, so the message also carries each sender's time, how many rows it has and the number of the first
it sends; the receiver then makes the mask that the sender would have made (`dropout.Origin`).
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd

from d9d_lora.dropout import Among, Origin
from d9d_lora.layers.grouped_mm import Groups


@dataclass(frozen=True)
class Journey:
    """The way of the rows of one forward of one experts module.

    Attributes:
        sent, got: The number of rows to and from each rank of `group`.
        order: [rows here] where each row of (expert, rank it came from) is among those that arrived.
        groups: Whose the rows here are, in that order.
        divide: What the gradients of everything between `out` and `home` are divided by.
    """

    group: dist.ProcessGroup
    sent: list[int]
    got: list[int]
    order: Tensor
    groups: Groups
    divide: float

    @classmethod
    def plan(cls, counts: Tensor, group: dist.ProcessGroup, now: Tensor | None = None, *, divide: float = 1) -> Self:
        """Collective. From the rows that this rank has for each expert, [E].

        Args:
            now: The time of this rank's dropout masks. [Note: rows of other ranks]
        """
        n = group.size()
        counts = counts.view(n, -1)
        to = counts.sum(1)
        time = counts.new_zeros(()) if now is None else now.to(counts.device)
        beside = torch.stack([to.cumsum(0) - to, to.sum().expand(n), time.expand(n)], 1)
        answer = all_to_all_single(torch.cat([counts, beside], 1), None, None, group)
        sent, told = to.tolist(), answer.tolist()  # on an accelerator this waits: how much travels must be known here
        of_experts = answer[:, :-3]
        got = [sum(line[:-3]) for line in told]
        whose = torch.arange(counts.shape[1], device=counts.device).repeat(n).repeat_interleave(of_experts.flatten(), output_size=sum(got))
        order = whose.argsort(stable=True)
        groups = Groups(of_experts.sum(0).cumsum(0).int(), tail=False)
        if now is None:
            return cls(group, sent, got, order, groups, divide)
        here = _inverse(order).split(got)
        origins = tuple(
            Origin(torch.tensor(time, device="cpu"), Among((total,), 0, first, rows), at)
            for (*_, first, total, time), rows, at in zip(told, got, here)
            if rows
        )
        return cls(group, sent, got, order, Groups(groups.ends, tail=False, origins=origins), divide)

    @classmethod
    def even(cls, rows: int, experts: int, group: dist.ProcessGroup, device: torch.device, *, divide: float = 1) -> Self:
        """Where rows have no values (a rehearsal): as many to every expert, as a router is trained to do."""
        n = group.size()
        all_to_all_single(torch.zeros(n, experts // n + 3, dtype=torch.int64, device=device), None, None, group)
        to = [rows * (i + 1) // n - rows * i // n for i in range(n)]
        got = [to[group.rank()]] * n
        mine = experts // n
        ends = torch.tensor([sum(got) * (e + 1) // mine for e in range(mine)], dtype=torch.int32, device=device)
        return cls(group, to, got, torch.arange(sum(got), device=device), Groups(ends, tail=False), divide)

    def out(self, rows: Tensor) -> Tensor:
        """[sent, H] sorted by expert -> [got, H] sorted by expert."""
        rows = _with_gradient_times(rows, self.divide)
        return all_to_all_single_autograd(rows, self.got, self.sent, self.group).index_select(0, self.order)

    def home(self, rows: Tensor) -> Tensor:
        """[got, H] -> [sent, H], the order of `out` undone."""
        rows = all_to_all_single_autograd(rows.index_select(0, _inverse(self.order)), self.sent, self.got, self.group)
        return _with_gradient_times(rows, 1 / self.divide)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * ctx.factor, None


def _with_gradient_times(x: Tensor, factor: float) -> Tensor:
    y: Tensor = x if factor == 1 else _Times.apply(x, factor)
    return y
