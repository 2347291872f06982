"""Expert parallelism: the experts of a transformers model shared out over ranks, in two verbs beside torch's own.

    share_experts(model, mesh["ep"])                  expert e on rank e // (E / ep); tokens go to them and come back (`layers/dispatch.py`)
    inject_peft_and_freeze(method, model)             adapters lie with their experts: a factor has the letter E, as the weight has;
                                                      one without it is whole on each rank, its gradient a sum over them
    fully_shard_experts(model, mesh["efsdp"])         FSDP2 of each rank's experts over the ranks that hold the same ones
    fully_shard(block, mesh=mesh["dp"]); ...          FSDP2 of all else

`dp` are all ranks that see different data, `ep` neighbours of them: `dp = efsdp x ep`. The weights are DTensors, on `ep` or on (`efsdp`,
`ep`), so loading, checkpoints and merges know their shapes.

[Note: what an expert's gradient is divided by]
Every rank of `ep` sends its tokens, so the gradient of an expert is a sum over the losses of `ep` ranks. Where losses are means of their
ranks, as in most loops, FSDP2 averages all other gradients over `dp`, and those of experts over `efsdp` only: `ep` is missing. It is put
where rows arrive, and taken off what goes home: all that is between, and nothing else, has its gradient divided.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from d9d_lora.layers.experts import is_shared_out, place, products
from d9d_lora.walk import refuse_sharded


def experts_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of experts that can be shared out, by name: those that transformers' registry multiplies."""
    return ((name, m) for name, m in module.named_modules() if products(m))


def shared_out(module: nn.Module) -> list[nn.Module]:
    """The modules whose experts are shared out."""
    return [m for _, m in experts_of(module) if is_shared_out(m)]


@torch.no_grad()
def share_experts(module: nn.Module, mesh: DeviceMesh, *, average: bool = True) -> list[str]:
    """Leaves each rank of `mesh` its experts of every layer, and sends tokens to them. Before or after the injection, after a
    tensor-parallel plan, before `fully_shard`.

    Works on meta. Every rank must hold the same weights; nothing is communicated.

    Args:
        mesh: One-dimensional; its ranks see different data. With tensor parallelism, from the root mesh that the plan's is of.
        average: Losses are means of their ranks, and FSDP2 averages; False: they are parts of one sum or mean, and FSDP2 was told to add.
            [Note: what an expert's gradient is divided by]

    Returns:
        The names of the modules of experts.

    Raises:
        ValueError: if there are none, their number is no multiple of the ranks, or they are sharded already.
    """
    refuse_sharded(module)
    found = list(experts_of(module))
    check_experts(module, mesh.size())
    for name, host in found:
        if any(isinstance(p, DTensor) and (p.device_mesh.ndim > 1 or p.placements[0].is_shard(0)) for p in host._parameters.values()):
            raise ValueError(f"{name}: its experts are shared out already")
    for _, host in found:
        _share(host, mesh, divide=mesh.size() if average else 1)
    return [name for name, _ in found]


def check_experts(module: nn.Module, ranks: int) -> None:
    """Raises ValueError if the experts of a model cannot be shared out over so many ranks, and names the numbers that can."""
    found = list(experts_of(module))
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no experts that can be shared out over {ranks} ranks: expected modules of transformers' experts "
            "registry (gate_up_proj, down_proj); leave expert parallelism out (parallel.ep=1)"
        )
    numbers: set[int] = {m.num_experts for _, m in found}  # type: ignore[misc]
    if any(n % ranks for n in numbers):
        fit = [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
        below, above = [d for d in fit if d < ranks][-1:], [d for d in fit if d > ranks][:1]
        raise ValueError(
            f"parallel.ep={ranks} does not divide the {' and '.join(map(str, sorted(numbers)))} experts of this model; the nearest degrees "
            f"that do: {', '.join(map(str, below + above))}"
        )


def _share(host: Any, mesh: DeviceMesh, *, divide: int) -> None:
    n = host.num_experts // mesh.size()
    first = n * mesh.get_local_rank()
    stacks = [name for product in products(host) for name in (product, f"{product}_bias")]
    for name in stacks:
        if (p := host._parameters.get(name)) is not None:
            on, whole = mesh, p.detach()
            placements: list[Placement] = [Shard(0)]
            if isinstance(p, DTensor):  # a tensor-parallel plan has shared out the inside of every expert
                on, whole = DeviceMesh._concatenate([mesh, p.device_mesh]), p.to_local()
                placements += p.placements
            part: Tensor = DTensor.from_local(
                whole[first : first + n].clone(), on, placements, run_check=False, shape=p.shape, stride=p.stride()
            )
            host.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
    host.divides_gradients_by = divide
    place(host)


def fully_shard_experts(
    module: nn.Module, mesh: DeviceMesh, *, ignored_params: Collection[nn.Parameter] = frozenset(), **options: Any
) -> set[nn.Parameter]:
    """FSDP2 (or HSDP) of experts that are shared out, after the injection and before `fully_shard` of the blocks.

    Args:
        mesh: The ranks that hold the same experts, from the root mesh that `ep`'s is of; of two dimensions: (replicas, shards).
        ignored_params, options: As of `fully_shard`.

    Returns:
        The parameters that it does not manage, all of them where the mesh has one rank. Give them to every `fully_shard` that follows, as
        `ignored_params`: it would cut other experts on each rank as if they were the same.
    """
    hosts = shared_out(module)
    if not hosts:
        raise ValueError("no experts are shared out: call `share_experts` first")
    for host in hosts:
        for name, p in host.named_parameters():
            if p.requires_grad and not isinstance(p, DTensor):
                raise ValueError(f"{type(host).__name__}.{name} is trained, and whole on every rank of experts: its gradient is a part")
    ignored = set(ignored_params)
    if mesh.size() == 1:
        return ignored | {p for host in hosts for p in host.parameters()}
    shards = mesh.size(mesh.ndim - 1)
    for host in hosts:
        fully_shard(host, mesh=mesh, ignored_params=ignored, shard_placement_fn=lambda p: Shard(axis_to_cut(p, shards)), **options)
    return ignored


def axis_to_cut(p: Tensor, shards: int) -> int:
    """A dimension inside the experts that is whole and that the shards divide, if there is one; else that of the experts."""
    taken = {getattr(s, "dim", None) for s in p.placements} if isinstance(p, DTensor) else set()
    inside = next((d for d in range(1, p.ndim) if d not in taken and p.shape[d] % shards == 0), None)
    if inside is None and len(taken - {None}) > 1:  # torch cannot gather what is strided along two dimensions
        raise ValueError(
            f"a parameter {list(p.shape)} of experts, sharded over ep and tp, has no other dimension that the {shards} ranks of the "
            "same experts divide; give a rank that is a multiple of them, or parallel.adapters=replicate"
        )
    return inside or 0
