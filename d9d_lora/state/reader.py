"""Fills a model from a checkpoint: everything is planned before a byte is read, then each rank reads its own part only.

    file names --mapper--> model names      unknown, missing, misshapen: one error that names them all, nothing read
    target's placements --> boxes           which global rows and columns are this rank's
    route: output = input or its transpose  --> read just those boxes;  any other group: read whole, apply, slice

Works on plain tensors and on DTensors of any mesh and placement, with no collective: ranks need not agree on anything
but the model, and one that finds a broken value raises alone.

[Note: what a load holds]
Beside the model: a few blocks of `BLOCK` bytes, whatever the size of a tensor. Three things take more, one tensor at a time: a sink (packed
weights) is given this rank's whole part; a group without a route is read whole, inputs and outputs; `all_or_none` keeps everything.
"""

import difflib
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from d9d_lora.boxes import Runs as Runs
from d9d_lora.boxes import local_runs as local_runs
from d9d_lora.state.mappers import (
    ModelStateMapper,
    ModelStateMapperIdentity,
    ModelStateMapperParallel,
    ModelStateMapperRename,
    Route,
    StackRoute,
    StateGroup,
    route_of,
    sorted_groups,
)
from d9d_lora.state.safetensors_dir import CheckpointError, CheckpointFiles, open_checkpoint

Sink = tuple[Tensor, Callable[[Tensor], None]]  # a tensor's outline on meta, with its placement; what takes this rank's part of it
Part = tuple[str, slice, Tensor]  # of a tensor's local part: its name, some rows (of a scalar: none), their values
BLOCK = 16 << 20  # bytes of a tensor that are in hand at a time, where it is filled row by row
SHOWN, SEARCHED = 12, 2000  # keys of a kind that an error spells out; names that it searches for a near miss


@dataclass(frozen=True)
class LoadReport:
    """`tensors` filled, `bytes_read` from disk by this rank, `seconds` it took."""

    tensors: int
    bytes_read: int
    seconds: float


@torch.no_grad()
def load_checkpoint(
    model: nn.Module,
    source: CheckpointFiles | str | os.PathLike[str],
    mapper: ModelStateMapper | None = None,
    *,
    skip: Collection[str] = (),
    ignore_unexpected: Sequence[str] = (),
    sinks: Mapping[str, Sink] = MappingProxyType({}),
    elsewhere: Collection[str] = (),
    twins: Mapping[str, Tensor] = MappingProxyType({}),
    all_or_none: bool = False,
    compare: bool = False,
) -> LoadReport:
    """Fills every parameter and persistent buffer of `model`, in place, each rank reading only what it holds.

    Args:
        model: Allocated (not on meta), sharded or not; FSDP2 modules are resharded first, lest the values be lost.
        source: What `open_checkpoint` takes, or what it gives (then it stays open).
        mapper: From names in the file to names in the model; what it does not mention keeps its name.
        skip: Names that the checkpoint does not hold: an adapter's own factors. They are left alone.
        ignore_unexpected: Regexes (searched) of names in the file which the model may lack.
        sinks: Tensors that the model holds in another form than the file does (packed weights).
        elsewhere: Names of the model whose tensors other ranks hold (pipeline stages): known, and not read here.
        twins: Names that other ranks have for a tensor which is here under another name, tied: read from either.
        all_or_none: Check every value before the first is put in its place, so that a broken file changes nothing; this rank's part of
            the file is in memory at once.
        compare: Fill nothing, and raise for tensors whose part here is not what the file says, to the bit; `sinks` are not looked at.

    Raises:
        CheckpointError: unknown, missing or misshapen keys and integers where floats belong, all in one message and
            before anything is read; a value that is not finite in the target's dtype, at the tensor that has it.

    Names that share one tensor (tied weights) need only one of them in the file; several must agree.
    """
    started = time.perf_counter()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    files = source if isinstance(source, CheckpointFiles) else open_checkpoint(source)
    before = files.bytes_read
    try:
        left_alone = {*skip, *elsewhere}
        targets = {name: tensor for name, tensor in named_state(model) if name not in left_alone}
        targets |= {name: outline for name, (outline, _) in sinks.items() if name not in elsewhere} | dict(twins)
        plan = _Plan(targets, files, mapper or ModelStateMapperParallel([]), ignore_unexpected, sinks.keys(), set(elsewhere))
        plan.check()
        filled: dict[int, str] = {}
        in_blocks = frozenset[str]() if all_or_none else targets.keys() - sinks.keys()
        read: Iterable[Part] = (part for step in plan.steps for part in step.read(files, in_blocks))
        if compare:
            read = _unlike(read, targets, sinks.keys())
        elif all_or_none:
            read = list(_checked(read, targets))
        for name, rows, values in read:
            if name in sinks:
                _refuse_infinite(name, values, values.dtype)
                sinks[name][1](values)
            else:
                _fill(name, targets[name], rows, values, filled)
        return LoadReport(len(plan.sources), files.bytes_read - before, time.perf_counter() - started)
    finally:
        if files is not source:
            files.close()


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer under every name that it has: what a checkpoint holds, ties spelled out."""
    yield from model.named_parameters(remove_duplicate=False)
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def hf_prefix_mapper(
    model_names: Collection[str], file_names: Collection[str], base_model_prefix: str
) -> ModelStateMapper | None:
    """Mends `h.0...` in a file for `transformer.h.0...` in a model, or the reverse; None where nothing needs it.

    Args:
        model_names: The names the file should have; before injection, so without any `.base`.
        file_names: The names it has.
        base_model_prefix: As on a Hugging Face model class: "transformer", "model".
    """
    prefix, wanted, present = f"{base_model_prefix}.", set(model_names), set(file_names)
    renames = []
    for name in sorted(present - wanted):
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        if other in wanted and other not in present:
            renames.append(ModelStateMapperRename(name, other))
    return ModelStateMapperParallel(renames) if base_model_prefix and renames else None


@dataclass
class _Step:
    """One group: what is read, and for each wanted output its runs, and its route where there is one."""

    group: StateGroup
    mapper: ModelStateMapper
    runs: dict[str, Runs]
    routes: dict[str, Route | StackRoute]

    def read(self, files: CheckpointFiles, in_blocks: Collection[str]) -> Iterator[Part]:
        """The local values of each wanted output; of those `in_blocks`, some rows at a time."""
        for name, route in sorted(self.routes.items()):

            runs = self.runs[name]
            row = route.outline(files).element_size() * math.prod(shape_of(runs)[1:])
            for rows, some in _row_blocks(runs, max(1, BLOCK // max(1, row)) if name in in_blocks else None):
                yield name, rows, assemble(partial(route.read, files), some)
        if rest := sorted(self.runs.keys() - self.routes.keys()):
            made = self.mapper.apply({name: files.read(name) for name in sorted(self.group.inputs)})
            for name in rest:
                yield name, slice(None), assemble(made[name].__getitem__, self.runs[name])


class _Plan:
    """Which target comes from which group; every fault that can be known without reading goes to `faults`."""

    def __init__(
        self,
        targets: dict[str, Tensor],
        files: CheckpointFiles,
        mapper: ModelStateMapper,
        ignored: Sequence[str],
        outlines: Collection[str] = (),
        elsewhere: Collection[str] = (),
    ) -> None:
        self.targets, self.files, self.outlines, self.elsewhere = targets, files, outlines, elsewhere
        self.ignored = [re.compile(pattern) for pattern in ignored]
        self.steps: list[_Step] = []
        self.sources: dict[str, list[str]] = {}
        self.recipes: dict[str, list[str]] = {}  # made by a group whose inputs are not all there
        self.faults: dict[str, dict[str, str]] = {}
        present, mentioned = set(files.names()), set[str]()
        for group in sorted_groups(mapper):
            mentioned |= group.inputs
            lacking = sorted(group.inputs - present)
            if not lacking:
                self._add(group, mapper)
            else:
                self.recipes.update(dict.fromkeys(group.outputs, lacking))
                for name in sorted(group.inputs & present):
                    self._unknown(name, [name], f"of use only together with {lacking[:3]}")
        for name in sorted(present - mentioned):
            identity = ModelStateMapperIdentity(name)
            self._add(StateGroup(frozenset([name]), frozenset([name])), identity)

    def _fault(self, kind: str, name: str, text: str) -> None:
        self.faults.setdefault(kind, {})[name] = text

    def _unknown(self, name: str, aliases: list[str], text: str) -> None:
        if not any(pattern.search(alias) for pattern in self.ignored for alias in aliases):
            self._fault("unknown", name, text)

    def _add(self, group: StateGroup, mapper: ModelStateMapper) -> None:
        inputs = sorted(group.inputs)
        outputs = sorted(group.outputs)
        wanted = [name for name in outputs if name in self.targets]
        for name in [name for name in outputs if name not in self.targets and name not in self.elsewhere]:
            self._unknown(name, [name, *inputs], f"from {inputs[:3]}" if inputs != [name] else "")
        for name in wanted:
            if name in self.sources:
                self._fault("made twice", name, f"from {self.sources[name][:3]} and from {inputs[:3]}")
            self.sources[name] = inputs
        wanted = [name for name in wanted if _is_here(self.targets[name])]
        routes = {name: route for name in wanted if (route := route_of(mapper, name))}
        outlines = {name: found for name, route in routes.items() if (found := self._routed(name, route)) is not None}
        if len(routes) < len(wanted):
            outlines |= self._applied(group, mapper)
        runs = {name: self._check(name, outlines.get(name)) for name in wanted}
        if wanted:
            self.steps.append(_Step(group, mapper, runs, routes))

    def _routed(self, name: str, route: Route | StackRoute) -> Tensor | None:
        try:
            return route.outline(self.files)
        except ValueError as error:
            self._fault("misshapen", name, str(error))
            return None

    def _applied(self, group: StateGroup, mapper: ModelStateMapper) -> dict[str, Tensor]:
        """The mapper run on shapes alone: what it would make, without the bytes."""
        try:
            made = mapper.apply({name: Route(name).outline(self.files) for name in sorted(group.inputs)})
        except NotImplementedError:  # an operator that has no rule for shapes alone: the copy will tell
            return {}
        except Exception as error:
            shapes = {name: self.files.shape(name) for name in sorted(group.inputs)[:3]}
            self._fault("misshapen", sorted(group.outputs)[0], f"its mapper refuses {shapes}: {error}")
            return {}
        for name in sorted(group.outputs - made.keys()):
            self._fault("announced but not made", name, f"its mapper makes {sorted(made)[:3]}")
        return made

    def _check(self, name: str, found: Tensor | None) -> Runs:
        target = self.targets[name]
        if target.is_meta and name not in self.outlines:
            self._fault("unallocated", name, "is on meta: call to_empty(device=...) on the model first")
            return []
        if found is not None and found.shape != target.shape:
            self._fault("misshapen", name, f"expected {tuple(target.shape)}, the file gives {tuple(found.shape)}")
        if found is not None and found.dtype != target.dtype and not _both_float(found, target):
            self._fault("of another dtype", name, f"expected {target.dtype}, the file gives {found.dtype}")
        if isinstance(target, DTensor) and any(placement.is_partial() for placement in target.placements):
            self._fault("misplaced", name, f"is {target.placements}: a sum that is pending cannot be loaded")
        local, runs = tuple(_local(target).shape), local_runs(target)
        shape = shape_of(runs)
        if 0 in shape and 0 in local:  # FSDP2 may hold a (4, 0) as (0, 0): nothing is nothing
            return [[slice(0, size)] for size in local]
        if shape != local:
            self._fault("misplaced", name, f"placements give {shape}, the local part is {local}")
        return runs

    def check(self) -> None:
        """Raises all faults in one error."""
        filled = {id(self.targets[name]) for name in self.sources}
        for name, target in self.targets.items():
            if id(target) not in filled:
                self._fault("missing", name, f"made from {lack[:3]}" if (lack := self.recipes.get(name)) else "")
        if not self.faults:
            return
        others = {"unknown": "missing", "missing": "unknown"}
        names = {kind: sorted(self.faults.get(other, ()))[:SEARCHED] for kind, other in others.items()}
        lines = []
        for kind, keys in sorted(self.faults.items()):
            lines.append(f"{len(keys)} {kind}:")
            for key, text in sorted(keys.items())[:SHOWN]:
                near = difflib.get_close_matches(key, names.get(kind, []), n=1)
                lines.append(f"  {key!r}" + (f" {text}" if text else "") + (f", near {near[0]!r}" if near else ""))
            if len(keys) > SHOWN:
                lines.append(f"  and {len(keys) - SHOWN} more")
        where = ", ".join(str(file) for file in self.files.files()[:3])
        raise CheckpointError(
            f"The checkpoint {where} is not this model's; nothing was read.\n" + "\n".join(lines) + "\n"
            "(unknown: in the file, not to be filled in the model; missing: the reverse). Give the mapper that renames "
            "them, name what the file need not hold in `skip`, and harmless leftovers in `ignore_unexpected`."
        )


def assemble(piece: Callable[[tuple[slice, ...]], Tensor], runs: Runs) -> Tensor:
    """The local part from its pieces; mostly there is one."""
    for dim, stretches in enumerate(runs):
        if len(stretches) > 1:
            return torch.cat([assemble(piece, [*runs[:dim], [run], *runs[dim + 1 :]]) for run in stretches], dim)
    return piece(tuple(run for (run,) in runs))


def shape_of(runs: Runs) -> tuple[int, ...]:
    """The shape of a local part."""
    return tuple(sum(run.stop - run.start for run in stretches) for stretches in runs)


def _row_blocks(runs: Runs, most: int | None) -> Iterator[tuple[slice, Runs]]:
    """(rows of the local part, their runs), in order: at most so many rows, and all of them for None."""
    if most is None or not runs or 0 in shape_of(runs):
        yield slice(None), runs
        return
    at = 0
    for run in runs[0]:
        for start in range(run.start, run.stop, most):
            some = slice(start, min(start + most, run.stop))
            n = some.stop - some.start
            yield slice(at, at + n), [[some], *runs[1:]]
            at += n


def _is_here(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is not None


def _both_float(one: Tensor, other: Tensor) -> bool:
    return one.is_floating_point() and other.is_floating_point()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _checked(read: Iterable[Part], targets: Mapping[str, Tensor]) -> Iterator[Part]:
    """Raises what `_fill` would, before it has filled anything."""
    seen: dict[int, tuple[str, Tensor]] = {}
    for name, rows, values in read:
        target = targets[name]
        cast = values.to(_local(target).dtype)
        _refuse_infinite(name, cast, values.dtype)
        twin, other = seen.setdefault(id(target), (name, cast))
        if not torch.equal(other, cast):
            raise _two_values(name, twin)
        yield name, rows, values


def _unlike(read: Iterable[Part], targets: Mapping[str, Tensor], sinks: Collection[str]) -> Iterator[Part]:
    """Gives nothing; raises for what is there and is not what was read."""
    found: list[str] = []
    for name, rows, values in read:
        if name not in sinks:
            local, cast = _at_its_place(name, targets[name], rows, values)
            if not torch.equal(local, cast.to(local.device)):
                found.append(name)
    if found:
        names = sorted(set(found))
        raise CheckpointError(f"{len(names)} tensors are not what the file says, {names[:SHOWN]}")
    return iter(())


def _two_values(name: str, twin: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r} and {twin!r} are one tensor in the model and two different ones in the file. "
        "Untie the model (tie_word_embeddings=False), or remove the wrong one from the file."
    )


def _fill(name: str, target: Tensor, rows: slice, values: Tensor, filled: dict[int, str]) -> None:
    """Copies some rows to their place, or compares them where another name of the same tensor has filled it."""
    local, cast = _at_its_place(name, target, rows, values)
    _refuse_infinite(name, cast, values.dtype)
    twin = filled.setdefault(id(target), name)
    if twin == name:
        local.copy_(cast)
    elif not torch.equal(local, cast.to(local.device)):
        raise _two_values(name, twin)


def _at_its_place(name: str, target: Tensor, rows: slice, values: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of the local part, and the values that belong there, in its dtype."""
    local = _local(target)
    local = local[rows] if local.dim() else local
    if values.shape != local.shape:
        raise CheckpointError(f"{name!r}: expected a local part of shape {tuple(local.shape)}, made {values.shape}.")
    return local, values.to(local.dtype)


def _refuse_infinite(name: str, cast: Tensor, in_file: torch.dtype) -> None:
    if not cast.numel() or not cast.is_floating_point():
        return
    low, high = (cast.float() if cast.element_size() == 1 else cast).aminmax()  # NaN comes through; no temporary
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(
            f"{name!r} is not finite: {low.item()} to {high.item()} as {cast.dtype}, {in_file} in the file. "
            "The checkpoint is broken, or the dtype too narrow: load it as bfloat16 or float32."
        )
