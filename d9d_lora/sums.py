"""What ranks add up once a step: gradients that placement leaves in parts, and numbers of which each rank knows its box.

Who adds which gradient, and why never twice: [Note: who sums the replicated factor's gradient] in `placement.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from d9d_lora.placement import is_of_own_experts, local_of


@torch.no_grad()
def sum_over_boxes(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For each (placed tensor, what this rank's box of it comes to), the sum over all its boxes, equal on every rank.

    A box that several ranks hold counts once. All travel together: one flat all-reduce along each dimension of their mesh.
    """
    totals = [value for _, value in parts]
    buckets: dict[tuple[DeviceMesh, torch.dtype], list[int]] = {}
    for i, (p, value) in enumerate(parts):
        if isinstance(p, DTensor):
            buckets.setdefault((p.device_mesh, value.dtype), []).append(i)
    for (mesh, _), members in buckets.items():
        flat = torch.cat([(totals[i] if _counts(parts[i][0]) else torch.zeros_like(totals[i])).reshape(-1) for i in members])
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                dist.all_reduce(flat, group=mesh.get_group(dim))
        for i, total in zip(members, flat.split([totals[i].numel() for i in members])):
            totals[i] = total.view_as(totals[i])
    return totals


@torch.no_grad()
def gather_flat(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The numbers of all ranks of a group, one after another, however many each has; None: those here. Two small collectives."""
    if group is None:
        return t.reshape(-1)
    ranks = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=t.device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([t.numel()], device=t.device), group=group)
    mine = t.new_zeros(max(int(n) for n in sizes))
    mine[: t.numel()] = t.reshape(-1)
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(everyone, mine, group=group)
    return torch.cat([part[: int(n)] for part, n in zip(everyone, sizes)])


def _counts(p: Any) -> bool:
    """Whether this rank is the first of those that hold the same box."""
    return not any(s.is_replicate() and p.device_mesh.get_local_rank(i) for i, s in enumerate(p.placements))


class ReplicatedSum:
    """Adds what each rank has computed of a replicated parameter's gradient: one flat all-reduce for each set of ranks, once a step.

    The parts of factors that tensor parallelism replicates are added over its ranks; the gradients of parameters that data
    parallelism replicates (FSDP2 was told to ignore them) over the ranks that see other data; where both hold, over all of them. The
    gradients of experts that are shared out hold the data of all ranks of `ep`, and are added over those that hold the same experts. A
    factor that is one for all experts is added as any other: over all ranks that see other data.

    Build it after `fully_shard`, call `reduce()` after the last backward of a step and before the clip.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        in_parts: Sequence[tuple[nn.Module, str, DeviceMesh]] = (),
        *,
        over_data: Sequence[nn.Parameter] = (),
        data: dist.ProcessGroup | None = None,
        both: dist.ProcessGroup | None = None,
        experts: dist.ProcessGroup | None = None,
        experts_both: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            in_parts: (owner, name, mesh) of other trained parameters whose gradients are parts (norms of sharded tokens).
            over_data: Trained parameters that each data-parallel rank holds whole, and nobody else reduces.
            data: The ranks that see other data and share this rank's place in the tensor-parallel mesh.
            both: Those, with their whole tensor-parallel meshes. Needed only with tensor parallelism.
            experts, experts_both: Those of `data`, and of `both`, that hold the same experts, where experts are shared out.
        """
        self._layers = [layer for layer in layers if layer.placing.mesh is not None and layer.placing.mesh.size() > 1]
        self._others = list(in_parts)
        self._over_data = {id(p): p for p in over_data}
        self._data, self._both, self._experts, self._experts_both = data, both, experts, experts_both
        if self._over_data and data is None:
            raise ValueError(f"{len(self._over_data)} parameters are to be summed over data parallelism: `data`, its ranks, was not given")
        for layer in self._layers:
            layer.sums_own_parts = False  # [Note: who sums the replicated factor's gradient]
            for factor in layer.shared.values():
                factor.sums_own_parts = False

    def _in_parts(self) -> Iterator[tuple[nn.Parameter, DeviceMesh]]:
        """Of the ranks of tensor parallelism."""
        seen: set[int] = set()  # a shared factor is met in many layers, and travels once
        for layer in self._layers:  # looked up anew each time: fully_shard replaces parameters
            for p in layer.parameters_in_parts():
                if id(p) not in seen and layer.placing.letter != "E":
                    seen.add(id(p))
                    yield p, layer.placing.mesh
        for owner, name, mesh in self._others:
            yield owner.get_parameter(name), mesh

    def _over_experts(self) -> Iterator[tuple[nn.Parameter, DeviceMesh]]:
        """Factors that are one for all experts, and the ranks that hold other experts."""
        for layer in self._layers:
            if (mesh := layer.placing.over_experts) is not None:
                yield from ((layer.factor(name), mesh) for name, axes in layer.delta.axes.items() if "E" not in axes)

    def parameters(self) -> Iterator[tuple[nn.Parameter, dist.ProcessGroup]]:
        """What is summed, and over which ranks, one after the other; in one order on all of them."""
        parts = {id(p) for p, _ in self._in_parts()}
        for p, mesh in [*self._in_parts(), *self._over_experts()]:
            if id(p) not in self._over_data:
                yield p, mesh.get_group()
        for p in self._over_data.values():
            groups = (self._experts, self._experts_both) if is_of_own_experts(p) else (self._data, self._both)
            group = groups[id(p) in parts]
            if group is None:
                raise ValueError("the ranks to sum a replicated parameter over were not given: `both`, `experts` or `experts_both`")
            yield p, group

    @torch.no_grad()
    def reduce(self) -> int:
        """Returns the number of elements of gradients that travelled."""
        buckets: dict[tuple[dist.ProcessGroup, torch.dtype, bool], list[nn.Parameter]] = {}
        for p, group in self.parameters():
            over_data = id(p) in self._over_data
            if over_data or p.grad is not None:
                buckets.setdefault((group, p.dtype, over_data), []).append(p)
        return sum(_add(ps, group, counted=over_data) for (group, _, over_data), ps in buckets.items())


def _add(params: list[nn.Parameter], group: dist.ProcessGroup, *, counted: bool) -> int:
    """Sums gradients over a group, in place.

    Of other data, a layer may be left out here and not elsewhere (a branch, an expert without tokens). The buffers of all ranks must
    be as long all the same, and a gradient that some rank has is everybody's: so, if `counted`, a number for each parameter goes
    along, which counts the ranks that have one.
    """
    grads = [local_of(torch.zeros_like(p) if p.grad is None else p.grad) for p in params]
    here = [torch.tensor([float(p.grad is not None) for p in params]).to(grads[0])] if counted else []
    flat = torch.cat([*(g.reshape(-1) for g in grads), *here])
    dist.all_reduce(flat, group=group)
    sizes = [g.numel() for g in grads]
    for i, (p, whole) in enumerate(zip(params, flat.split([*sizes, len(params)] if counted else sizes))):
        if p.grad is not None:
            local_of(p.grad).copy_(whole.view_as(grads[i]))
        elif flat[sum(sizes) + i] > 0:  # asks the device only where a gradient is missing
            p.grad = torch.zeros_like(p)
            local_of(p.grad).copy_(whole.view_as(grads[i]))
    return sum(sizes)
