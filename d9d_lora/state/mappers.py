"""State mappers: a renaming (or any other transform) of state dicts that announces itself before it acts.

    state_dependency_groups()   {inputs} -> {outputs}: what is read and what comes of it, known before a byte is read
    apply(group)                the tensors of one such group, transformed
    route(output)               optional: "this output is that input, its transpose, or a stack of inputs"; lets a reader read a shard only

The first two are d9d's contract, by shape and not by inheritance: one of these objects works inside d9d's mappers and
loader, and d9d's work inside these. Everything here is linear in the number of keys, and is walked in sorted order.
"""

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class StateGroup:
    """The unit of dependency: `outputs` can be made as soon as all `inputs` are there, and need nothing else."""

    inputs: frozenset[str]
    outputs: frozenset[str]


class Files(Protocol):
    """Tensors by name, of which a part can be read."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Route:
    """An output that is the tensor `name` unchanged, or its 2-D transpose."""

    name: str
    transposed: bool = False

    def back(self, sizes: tuple[T, ...]) -> tuple[T, ...]:
        """A shape, or a box of slices, of the output in the dimensions of the tensor `name`."""
        return sizes[::-1] if self.transposed else sizes

    def outline(self, files: Files) -> Tensor:
        """The output's shape and dtype, on meta."""
        return torch.empty(self.back(files.shape(self.name)), dtype=files.dtype(self.name), device="meta")

    def read(self, files: Files, box: tuple[slice, ...]) -> Tensor:
        """A box of the output; nothing else is read."""
        part = files.read(self.name, self.back(box))
        return part.t() if self.transposed else part


@dataclass(frozen=True)
class StackRoute:
    """An output [E, O, I] that is a stack of matrices: `names[e]` are those of expert e, rows after rows (gate, then up)."""

    names: tuple[tuple[str, ...], ...]

    def outline(self, files: Files) -> Tensor:
        shapes = {tuple(files.shape(name) for name in one) for one in self.names}
        dtypes = {files.dtype(name) for one in self.names for name in one}
        (parts, *others), (dtype, *mixed) = sorted(shapes), sorted(dtypes, key=str)
        if others or mixed or any(len(shape) != 2 or shape[1] != parts[0][1] for shape in parts):
            raise ValueError(f"expected experts alike, of matrices with as many columns; got {[parts, *others]}, {[dtype, *mixed]}")
        return torch.empty(len(self.names), sum(shape[0] for shape in parts), parts[0][1], dtype=dtype, device="meta")

    def read(self, files: Files, box: tuple[slice, ...]) -> Tensor:
        experts, rows, cols = box
        return torch.stack([self._one(files, self.names[e], rows, cols) for e in range(experts.start, experts.stop)])

    def _one(self, files: Files, names: tuple[str, ...], rows: slice, cols: slice) -> Tensor:
        found, start = [], 0
        for name in names:
            stop = start + files.shape(name)[0]
            low, high = max(rows.start, start), min(rows.stop, stop)
            if low < high:
                found.append(files.read(name, (slice(low - start, high - start), cols)))
            start = stop
        return found[0] if len(found) == 1 else torch.cat(found)


class ModelStateMapper(abc.ABC):
    """A transform of state dicts: announced by `state_dependency_groups`, done by `apply`."""

    @abc.abstractmethod
    def state_dependency_groups(self) -> frozenset[StateGroup]:
        """The independent groups this mapper handles; no two share an input or an output."""

    @abc.abstractmethod
    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one group, from exactly its inputs."""

    def route(self, output: str) -> Route | StackRoute | None:
        """Which input `output` is a plain view of; None where it takes more than that (then a reader reads all)."""
        return None


def sorted_groups(mapper: ModelStateMapper) -> list[StateGroup]:
    """The groups of any mapper in one order on every rank: a frozenset's order changes with the process's hash seed."""
    groups = [
        group if isinstance(group, StateGroup) else StateGroup(frozenset(group.inputs), frozenset(group.outputs))
        for group in mapper.state_dependency_groups()
        if group.inputs or group.outputs
    ]
    return sorted(groups, key=lambda group: (min(group.inputs, default=""), min(group.outputs, default="")))


def route_of(mapper: ModelStateMapper, output: str) -> Route | StackRoute | None:
    """`mapper.route(output)`, and None for a mapper of another library that has no such method."""
    route = getattr(mapper, "route", None)
    return route(output) if route is not None else None


class _OneToOne(ModelStateMapper):
    def __init__(self, name_from: str, name_to: str) -> None:
        self._from, self._to = name_from, name_to

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        return frozenset([StateGroup(frozenset([self._from]), frozenset([self._to]))])

    def route(self, output: str) -> Route | None:
        return Route(self._from) if output == self._to else None


class ModelStateMapperRename(_OneToOne):
    """{name_from} -> {name_to}, the tensor unchanged."""

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._to: group[self._from]}


class ModelStateMapperIdentity(ModelStateMapperRename):
    """{name} -> {name}: says that a tensor is known and wanted as it is."""

    def __init__(self, name: str) -> None:
        super().__init__(name, name)


class ModelStateMapperTranspose(_OneToOne):
    """{name_from} -> {name_to}, a matrix transposed: GPT-2 keeps (in, out) where a linear has (out, in)."""

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        matrix = group[self._from]
        if matrix.dim() != 2:
            raise ValueError(
                f"{self._from!r} -> {self._to!r}: a transpose expects a matrix, got shape {tuple(matrix.shape)}. "
                "Use ModelStateMapperRename for a tensor that is no matrix."
            )
        return {self._to: matrix.t().contiguous()}

    def route(self, output: str) -> Route | None:
        return Route(self._from, transposed=True) if output == self._to else None


class ModelStateMapperStack(ModelStateMapper):
    """{the matrices of every expert} -> {name_to}, the stack [E, O, I]; `names[e]` are those of expert e, rows after rows."""

    def __init__(self, names: Sequence[Sequence[str]], name_to: str) -> None:
        self._route = StackRoute(tuple(tuple(one) for one in names))
        self._to = name_to

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        return frozenset([StateGroup(frozenset(name for one in self._route.names for name in one), frozenset([self._to]))])

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._to: torch.stack([torch.cat([group[name] for name in one]) for one in self._route.names])}

    def route(self, output: str) -> Route | StackRoute | None:
        return self._route if output == self._to else None


class ModelStateMapperParallel(ModelStateMapper):
    """Mappers side by side, each group routed to the mapper that declared it.

    Raises:
        ValueError: two mappers consume one key, or produce one; the message names the keys.
    """

    def __init__(self, mappers: Sequence[ModelStateMapper]) -> None:
        self._groups: list[StateGroup] = []
        self._by_inputs: dict[frozenset[str], ModelStateMapper] = {}
        self._by_output: dict[str, ModelStateMapper] = {}
        inputs: set[str] = set()
        for mapper in mappers:
            for group in sorted_groups(mapper):
                _refuse_collisions("consumed", group.inputs & inputs, group)
                _refuse_collisions("produced", group.outputs & self._by_output.keys(), group)
                if group.inputs in self._by_inputs:  # disjoint from all others and yet known: both are empty
                    raise ValueError(f"Two groups without inputs cannot be told apart; join the mappers of {group}.")
                inputs |= group.inputs
                self._by_inputs[group.inputs] = mapper
                self._by_output.update(dict.fromkeys(group.outputs, mapper))
                self._groups.append(group)

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        return frozenset(self._groups)

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        return _look_up(self._by_inputs, group).apply(group)

    def route(self, output: str) -> Route | StackRoute | None:
        return route_of(self._by_output[output], output) if output in self._by_output else None


@dataclass
class _Stage:
    """One step of a sequence: its own groups, and the keys that pass it by."""

    mapper: ModelStateMapper
    groups: list[StateGroup]
    consumed: set[str] = field(default_factory=set)
    produced: set[str] = field(default_factory=set)
    passing: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.consumed = {key for group in self.groups for key in group.inputs}
        self.produced = {key for group in self.groups for key in group.outputs}

    def let_pass(self, keys: set[str]) -> None:
        _refuse_collisions("consumed", keys & self.consumed, "a later stage of the sequence needs it unchanged")
        _refuse_collisions("produced", keys & self.produced, "an earlier stage's result passes here under that name")
        self.passing |= keys


class ModelStateMapperSequential(ModelStateMapper):
    """Mappers one after another; only the first stage's inputs and the last stage's outputs show.

    A key that a stage does not mention passes it unchanged. Two groups that meet at any stage are one group.

    Raises:
        ValueError: a stage consumes or produces a key that must pass it unchanged.
    """

    def __init__(self, mappers: list[ModelStateMapper]) -> None:
        stages = [_Stage(mapper, sorted_groups(mapper)) for mapper in mappers]
        stages = [stage for stage in stages if stage.consumed or stage.produced]
        pairs = list(pairwise(stages))
        for before, stage in reversed(pairs):  # what a later stage needs comes by
            before.let_pass((stage.consumed | stage.passing) - before.produced)
        for stage, after in pairs:  # what an earlier stage made goes on
            after.let_pass((stage.produced | stage.passing) - after.consumed - after.passing)
        self._stages = stages
        self._plans = _connect(stages)

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        return frozenset(StateGroup(inputs, plan.outputs) for inputs, plan in self._plans.items())

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        state = group
        for stage, steps in zip(self._stages, _look_up(self._plans, group).steps):
            following = {key: tensor for key, tensor in state.items() if key in stage.passing}
            for step in steps:
                following |= stage.mapper.apply({key: state[key] for key in sorted(step.inputs)})
            state = following
        return {key: state[key] for key in sorted(state)}

    def route(self, output: str) -> Route | StackRoute | None:
        found = Route(output)
        for i, stage in reversed(list(enumerate(self._stages))):
            if found.name in stage.passing:
                continue
            step = route_of(stage.mapper, found.name)
            if isinstance(step, StackRoute):
                names = {name for one in step.names for name in one}
                as_they_are = not found.transposed and all(names <= before.passing for before in self._stages[:i])
                return step if as_they_are else None
            if step is None:
                return None
            found = Route(step.name, found.transposed != step.transposed)
        return found


@dataclass
class _Plan:
    outputs: frozenset[str]
    steps: list[list[StateGroup]]


def _connect(stages: list[_Stage]) -> dict[frozenset[str], _Plan]:
    """The net groups: a key's component goes down the stages with it, a group unites those of its inputs. Linear."""
    parent: list[int] = []

    def new() -> int:
        parent.append(len(parent))
        return parent[-1]

    def find(component: int) -> int:
        while parent[component] != component:
            parent[component] = component = parent[parent[component]]  # halve the path on the way up
        return component

    first = sorted(stages[0].consumed | stages[0].passing) if stages else []
    at_start = now = {key: new() for key in first}
    joined: list[list[int]] = []  # for each stage, the component of each of its groups
    for stage in stages:
        following = {key: now[key] for key in sorted(stage.passing)}
        joined.append([])
        for group in stage.groups:
            component, *others = [find(now[key]) for key in sorted(group.inputs)] or [new()]
            for other in others:
                parent[find(other)] = component
            following.update(dict.fromkeys(group.outputs, component))
            joined[-1].append(component)
        now = following

    inputs, outputs = _invert(at_start, find), _invert(now, find)
    steps: dict[int, list[list[StateGroup]]] = {component: [[] for _ in stages] for component in inputs | outputs}
    for level, (stage, components) in enumerate(zip(stages, joined)):
        for group, component in zip(stage.groups, components):
            steps[find(component)][level].append(group)

    plans: dict[frozenset[str], _Plan] = {}
    for component in sorted(steps):
        consumed, produced = frozenset(inputs.get(component, ())), frozenset(outputs.get(component, ()))
        if consumed in plans:
            raise ValueError(f"Two groups without inputs cannot be told apart; join the mappers of {sorted(produced)}.")
        plans[consumed] = _Plan(produced, steps[component])
    return plans


def _invert(components: dict[str, int], find: Callable[[int], int]) -> dict[int, list[str]]:
    keys: dict[int, list[str]] = {}
    for key, component in components.items():
        keys.setdefault(find(component), []).append(key)
    return keys


def _refuse_collisions(verb: str, keys: Iterable[str], where: object) -> None:
    if clash := sorted(keys):
        raise ValueError(
            f"Each key may be {verb} once, but {clash[:5]}{' ...' if len(clash) > 5 else ''} is {verb} again ({where})."
            " Drop one of the mappers, or rename before they meet."
        )


def _look_up(table: dict[frozenset[str], T], group: dict[str, Tensor]) -> T:
    try:
        return table[frozenset(group)]
    except KeyError:
        raise ValueError(
            f"No group has exactly the inputs {sorted(group)[:5]}{' ...' if len(group) > 5 else ''}: apply() expects "
            "the inputs of one group of state_dependency_groups()."
        ) from None
