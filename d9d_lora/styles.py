"""Tensor parallelism of a model that has adapters, of GPT-2's Conv1D and of quantised layers: torch's own styles, told about them.

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
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from d9d_lora.layers import AdaptedLayer, AdaptedLinear
from d9d_lora.layers.chooser import ColumnPath
from d9d_lora.layers.rank_space import Watch
from d9d_lora.quant.linear import PACKED_AXES, NF4Linear
from d9d_lora.walk import clock_of


class _OnBase(ParallelStyle):
    """A style for a layer that may be adapted: it goes to the base, and the factors follow."""

    def __init__(self, style: ParallelStyle) -> None:
        super().__init__()
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.style.src_data_rank = self.src_data_rank
        if isinstance(self.style, PrepareModuleInput):
            return HandShards(self.style)._apply(module, device_mesh)
        if not isinstance(module, AdaptedLayer):
            return for_conv1d(self.style, module)._apply(module, device_mesh)
        for_conv1d(self.style, module.base)._apply(module.base, device_mesh)
        return module.follow_base()


class HandShards(ParallelStyle):
    """A style that gathers the tokens of a module's inputs, and hands the shards to the adapted layers that are given them.

    `parallelize_adapted` puts it around each `PrepareModuleInput` of a plan; with torch's `parallelize_module`, write
    `HandShards(PrepareModuleInput(..., use_local_output=False))`. The gathered tensor must reach the layers as it is.
    """

    def __init__(self, style: ParallelStyle) -> None:
        super().__init__()
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.style.src_data_rank = self.src_data_rank
        watch = Watch(module)
        module = self.style._apply(module, device_mesh)
        watch.end()
        return module


def take_column_path(model: nn.Module, path: ColumnPath) -> None:
    """Says which way the thin products of column-parallel layers go under sequence parallelism; before, it is `ColumnPath()`, auto.

    Every rank must say the same.
    """
    for m in model.modules():
        if isinstance(m, AdaptedLinear):
            m.column = path


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


# -- linear layers that are no nn.Linear: GPT-2's Conv1D, y = x W + b with W[in, out], and packed weights ------------------------


def for_conv1d(style: ParallelStyle, module: nn.Module) -> ParallelStyle:
    """torch's column and row styles refuse all but `nn.Linear`: the same styles, by the letters of the module's tensors."""
    if not isinstance(style, ColwiseParallel | RowwiseParallel):
        return style
    host = sys.modules.get("transformers.pytorch_utils")
    if host is not None and isinstance(module, host.Conv1D):
        return _LinearStyle(style, {"weight": "IO", "bias": "O"})
    if isinstance(module, NF4Linear):
        return _LinearStyle(style, {**PACKED_AXES._asdict(), "bias": "O"})
    return style


class _LinearStyle(ParallelStyle):
    """Column or row parallelism of a layer whose tensors have dimensions of these letters."""

    def __init__(self, style: ColwiseParallel | RowwiseParallel, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.style, self.axes = style, axes
        self.src_data_rank = style.src_data_rank

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        column = isinstance(self.style, ColwiseParallel)
        letter, wanted = ("O", Replicate()) if column else ("I", Shard(-1))
        if isinstance(module, NF4Linear) and not column:
            module.check_columns(device_mesh.size())
        placements: dict[str, Placement] = {
            name: Shard(axes.index(letter)) if letter in axes else Replicate() for name, axes in self.axes.items()
        }
        return distribute_module(
            module,
            device_mesh,
            lambda name, m, mesh: self._place(m, mesh, placements),
            partial(self.style._prepare_input_fn, self.style.input_layouts, (wanted,)),  # type: ignore[arg-type]
            partial(self.style._prepare_output_fn, self.style.output_layouts, self.style.use_local_output),  # type: ignore[arg-type]
        )

    def _place(self, module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
        for name, placement in placements.items():
            p: nn.Parameter | None = getattr(module, name)
            if p is None:
                continue
            part = distribute_tensor(p, mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
