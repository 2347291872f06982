"""Processes and their mesh: one process without torchrun, or what torchrun says, on any device type."""

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from d9d_lora.train.config import ParallelConfig

MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # the outermost first; `ep` is no axis: it divides dp_shard
GRADIENT_AXES = ("dp_replicate", "dp_shard", "cp")  # along which ranks have other tokens, and gradients are summed


@dataclass(frozen=True)
class World:
    """Where this process stands. `mesh` is None on one process, which then needs no process group at all."""

    rank: int
    size: int
    device: torch.device
    parallel: ParallelConfig
    mesh: DeviceMesh | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Parts of a batch: the ranks of pp, cp and tp are given the same rows."""
        return self.parallel.dp_replicate * self.parallel.dp_shard

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.parallel.cp * self.parallel.tp) % self.dp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.parallel.cp * self.parallel.tp * self.dp_size)

    @cached_property
    def experts(self) -> DeviceMesh | None:
        """The mesh with dp_shard taken apart: `ep` neighbours have other experts, `efsdp` ranks the same. Collective at first."""
        if self.mesh is None or self.parallel.ep == 1:
            return None
        return self.mesh._unflatten("dp_shard", (self.parallel.dp_shard // self.parallel.ep, self.parallel.ep), ("efsdp", "ep"))

    @cached_property
    def same_experts(self) -> DeviceMesh | None:
        """The ranks that hold the same experts: (dp_replicate, efsdp), or efsdp alone."""
        if self.experts is None:
            return None
        return self.experts["dp_replicate", "efsdp"] if self.parallel.dp_replicate > 1 else self.experts["efsdp"]

    def expert_group(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that hold the same experts, and differ along these axes too; None if this one is alone. Collective at first."""
        if self.experts is None:
            return None
        names = tuple(n for n in ("dp_replicate", "efsdp", *axes) if self.experts[n].size() > 1)
        if len(names) < 2:
            return self.experts[names[0]].get_group() if names else None
        return self.experts[names]._flatten("_".join(names)).get_group()

    def expert_axes(self) -> dict[str, dist.ProcessGroup]:
        """The groups of ranks that experts add to those of the mesh, by names for people."""
        if self.experts is None:
            return {}
        found = {n: self.experts[n].get_group() for n in ("ep", "efsdp") if self.experts[n].size() > 1}
        for name, axes in (("experts", ()), ("experts x tp", ("tp",))):
            several = [n for n in ("dp_replicate", "efsdp", *axes) if self.experts[n].size() > 1]
            if len(several) > 1 and (group := self.expert_group(*axes)) is not None:
                found[name] = group
        return found

    def dp_group(self) -> dist.ProcessGroup | None:
        """The ranks that see other tokens and share this rank's place in pipeline and tensor parallelism; None if there are none."""
        return self.group_over(*GRADIENT_AXES)

    def group_over(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along these axes of the mesh, and no other; None if it is alone. Collective at first."""
        if self.mesh is None:
            return None
        names = tuple(n for n in MESH_AXES if n in axes and self.mesh[n].size() > 1)
        if len(names) < 2:
            return self.mesh[names[0]].get_group() if names else None
        mesh = self.mesh[names]
        return dist.group.WORLD if mesh.size() == self.size else mesh._flatten("_".join(names)).get_group()

    def sum_over_dp(self, values: torch.Tensor, *, alike: Collection[str] = ("pp", "cp", "tp")) -> torch.Tensor:
        """Adds a small tensor over the ranks of the mesh, in place, with one collective over all of them.

        `alike`: the axes along which all ranks hold the same values, which are to count once: rows are the same along pp, cp and tp. A
        loss is the same along tp only: one stage of a pipeline has it, and each cp rank that of its own tokens.
        """
        if self.mesh is not None:
            dist.all_reduce(values)
            values /= math.prod(getattr(self.parallel, axis) for axis in alike)
        return values


def device_of(name: str) -> torch.device:
    """`auto` is the accelerator if there is one, else the CPU; a rank takes the device of its local number."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = accelerator.type if accelerator else "cpu"
    device = torch.device(name)
    if device.type == "cpu" or device.index is not None:
        return device
    available = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= available:
        raise RuntimeError(f"train.device={name}: this node has {available} such devices, and local rank {local} needs one of its own")
    return torch.device(device.type, local)


def join(device: torch.device, parallel: ParallelConfig, timeout_s: int) -> World:
    """Joins the process group that torchrun announced, if any, and makes the mesh of `MESH_AXES`."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    parallel = parallel.resolved(size)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    if size == 1:
        return World(0, 1, device, parallel, None)
    if not dist.is_initialized():
        # Objects (errors, documents) and CPU tensors travel over gloo beside the accelerator's own backend.
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    mesh = init_device_mesh(device.type, parallel.shape(MESH_AXES), mesh_dim_names=MESH_AXES)
    return World(dist.get_rank(), size, device, parallel, mesh)


def leave() -> None:
    """Leaves together: without the barrier a rank that is done early may abort its peers' last collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
