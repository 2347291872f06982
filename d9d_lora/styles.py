"""Tensor parallelism of a model that has adapters, and of GPT-2's Conv1D: torch's own parallel styles, told about both.

Either order works:

    parallelize_module(model, mesh, plan);  inject_peft_and_freeze(method, model)        # torch's verb, then ours
    inject_peft_and_freeze(method, model);  parallelize_adapted(model, mesh, plan)       # the same plan, the same names
"""

import sys
from collections.abc import Mapping
from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from d9d_lora.layers import AdaptedLayer
from d9d_lora.walk import clock_of


class _OnBase(ParallelStyle):
    """A style for a layer that may be adapted: it goes to the base, and the factors follow."""

    def __init__(self, style: ParallelStyle) -> None:
        super().__init__()
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.style.src_data_rank = self.src_data_rank
        if not isinstance(module, AdaptedLayer):
            return for_conv1d(self.style, module)._apply(module, device_mesh)
        for_conv1d(self.style, module.base)._apply(module.base, device_mesh)
        return module.follow_base()


def parallelize_adapted(
    model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle], *, src_data_rank: int | None = 0
) -> nn.Module:
    """`parallelize_module` for a model with or without adapters; `plan` names layers as they were before the injection.

    Two things that torch undoes are kept: weights that were tied are tied again, and what was frozen stays frozen.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    ties = tied_names(model)
    parallelize_module(model, mesh, {name: _OnBase(style) for name, style in plan.items()}, src_data_rank=src_data_rank)
    retie(model, ties)
    clock = clock_of(model)
    if clock is not None:
        clock.mesh = mesh
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            p.requires_grad_(False)
    return model


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def retie(model: nn.Module, ties: list[list[str]]) -> None:
    """Makes each group of names one tensor again; refuses when the plan placed them differently."""
    for first, *others in ties:
        p = model.get_parameter(first)
        for name in others:
            q = model.get_parameter(name)
            if getattr(p, "placements", None) != getattr(q, "placements", None):
                raise ValueError(
                    f"{first} and {name} are one tensor, but the tensor-parallel plan places them as "
                    f"{getattr(p, 'placements', 'plain')} and {getattr(q, 'placements', 'plain')}; place both alike, or untie them"
                )
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, p)


# -- GPT-2's Conv1D: y = x W + b with W[in, out] --------------------------------------------------------------------------------


def for_conv1d(style: ParallelStyle, module: nn.Module) -> ParallelStyle:
    """torch's column and row styles refuse a Conv1D: the same styles with the weight's dimensions swapped."""
    host = sys.modules.get("transformers.pytorch_utils")
    if host is None or not isinstance(module, host.Conv1D) or not isinstance(style, ColwiseParallel | RowwiseParallel):
        return style
    return _Conv1DStyle(style)


class _Conv1DStyle(ParallelStyle):
    def __init__(self, style: ColwiseParallel | RowwiseParallel) -> None:
        super().__init__()
        self.style = style
        self.src_data_rank = style.src_data_rank

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        column = isinstance(self.style, ColwiseParallel)
        weight, bias, wanted = (Shard(1), Shard(0), Replicate()) if column else (Shard(0), Replicate(), Shard(-1))
        return distribute_module(
            module,
            device_mesh,
            lambda name, m, mesh: self._place(m, mesh, {"weight": weight, "bias": bias}),
            partial(self.style._prepare_input_fn, self.style.input_layouts, (wanted,)),  # type: ignore[arg-type]
            partial(self.style._prepare_output_fn, self.style.output_layouts, self.style.use_local_output),  # type: ignore[arg-type]
        )

    def _place(self, module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
        for name, placement in placements.items():
            p = module.get_parameter(name)
            part = distribute_tensor(p, mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
