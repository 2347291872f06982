"""Mappers: routing, collisions, hidden intermediates, routes, and linear cost."""

import random

import pytest
import torch
from torch import Tensor

from d9d_lora.state.mappers import (
    ModelStateMapper,
    ModelStateMapperIdentity,
    ModelStateMapperParallel,
    ModelStateMapperRename,
    ModelStateMapperSequential,
    ModelStateMapperTranspose,
    Route,
    StateGroup,
    sorted_groups,
)

Rename, Parallel, Sequential = ModelStateMapperRename, ModelStateMapperParallel, ModelStateMapperSequential


class Sum(ModelStateMapper):
    """{inputs} -> {output}: no view of one input, so it has no route."""

    def __init__(self, inputs: str, *outputs: str) -> None:
        self.group = StateGroup(frozenset(inputs), frozenset(outputs))

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        return frozenset([self.group])

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        assert group.keys() == self.group.inputs
        total = torch.stack([group[key] for key in sorted(group)]).sum(0)
        return {name: total * (i + 1) for i, name in enumerate(sorted(self.group.outputs))}


class Foreign:
    """Another library's mapper: the contract by shape only."""

    class Group:
        inputs, outputs = {"x"}, {"y"}

    def state_dependency_groups(self):
        return [self.Group()]

    def apply(self, group):
        return {"y": group["x"] + 1}


def groups(mapper) -> list[tuple[list[str], list[str]]]:
    return [(sorted(group.inputs), sorted(group.outputs)) for group in sorted_groups(mapper)]


def test_leaves():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(Rename("a", "b").apply({"a": matrix})["b"], matrix)
    assert groups(ModelStateMapperIdentity("a")) == [(["a"], ["a"])]
    transpose = ModelStateMapperTranspose("a", "b")
    assert torch.equal(transpose.apply({"a": matrix})["b"], matrix.T)
    assert transpose.route("b") == Route("a", transposed=True)
    assert transpose.route("b").back((slice(0, 1), slice(1, 3))) == (slice(1, 3), slice(0, 1))
    with pytest.raises(ValueError, match=r"'a' -> 'b'.*matrix.*\(2, 3, 4\)"):
        transpose.apply({"a": torch.zeros(2, 3, 4)})


def test_parallel_routes_each_group_to_its_mapper():
    mapper = Parallel([Rename("a", "b"), Sum("cd", "e"), Foreign()])
    assert groups(mapper) == [(["a"], ["b"]), (["c", "d"], ["e"]), (["x"], ["y"])]
    one = torch.ones(2)
    assert torch.equal(mapper.apply({"d": one, "c": one})["e"], one * 2)
    assert torch.equal(mapper.apply({"x": one})["y"], one * 2)
    assert (mapper.route("b"), mapper.route("e"), mapper.route("y"), mapper.route("?")) == (
        Route("a"),
        None,
        None,
        None,
    )
    with pytest.raises(ValueError, match=r"'a', 'c'"):
        mapper.apply({"a": one, "c": one})
    assert Parallel([]).state_dependency_groups() == frozenset()


@pytest.mark.parametrize(
    "second, says",
    [(Rename("a", "c"), r"consumed.*'a'"), (Rename("c", "b"), r"produced.*'b'"), (Sum("ax", "y"), "'a'")],
)
def test_parallel_names_collisions(second, says):
    with pytest.raises(ValueError, match=says):
        Parallel([Rename("a", "b"), second])


def test_sequential_hides_intermediates_and_lets_pass():
    mapper = Sequential([Rename("a", "b"), Parallel([]), Parallel([Rename("b", "c"), Rename("other", "else")])])
    assert groups(mapper) == [(["a"], ["c"]), (["other"], ["else"])]
    assert mapper.route("c") == Route("a")
    assert mapper.route("else") == Route("other")
    late = Sequential([Rename("a", "b"), Rename("x", "y"), Rename("b", "c")])  # b passes the middle, x the first
    assert groups(late) == [(["a"], ["c"]), (["x"], ["y"])]
    one = torch.ones(1)
    assert late.apply({"a": one}) == {"c": one}
    assert late.apply({"x": one}) == {"y": one}
    assert Sequential([]).state_dependency_groups() == frozenset()


def test_sequential_merges_groups_that_meet():
    mapper = Sequential([Parallel([Sum("ab", "p", "q"), Sum("c", "r")]), Parallel([Sum("qr", "s"), Rename("d", "e")])])
    assert groups(mapper) == [(["a", "b", "c"], ["p", "s"]), (["d"], ["e"])]
    made = mapper.apply({"a": torch.tensor(1.0), "b": torch.tensor(2.0), "c": torch.tensor(4.0)})
    assert made == {"p": torch.tensor(3.0), "s": torch.tensor(10.0)}
    assert mapper.route("s") is None
    assert mapper.route("p") is None


def test_transposes_compose():
    twice = Sequential([ModelStateMapperTranspose("a", "b"), ModelStateMapperTranspose("b", "c")])
    assert twice.route("c") == Route("a")
    assert Sequential([Rename("a", "b"), ModelStateMapperTranspose("b", "c")]).route("c") == Route("a", True)


def test_swap_of_two_names():
    swap = Parallel([Rename("a", "b"), Rename("b", "a")])
    mapper = Sequential([swap, swap])
    assert groups(mapper) == [(["a"], ["a"]), (["b"], ["b"])]
    assert mapper.apply({"a": torch.tensor(5.0)}) == {"a": torch.tensor(5.0)}


@pytest.mark.parametrize("stages", [[Rename("a", "b"), Sum("ab", "c")], [Rename("a", "b"), Rename("c", "b")]])
def test_sequential_refuses_what_cannot_pass(stages):
    with pytest.raises(ValueError, match=r"'a'|'b'"):
        Sequential(stages)


def test_every_split_of_random_graphs_equals_stage_by_stage():
    """Apply by groups = apply each stage to the whole state, for random renames, sums and pass-bys."""
    rng = random.Random(0)
    for _ in range(60):
        alive = [f"k{i}" for i in range(8)]
        state = whole = {key: torch.tensor(float(i)) for i, key in enumerate(alive)}
        stages: list[ModelStateMapper] = []
        for depth in range(4):
            rng.shuffle(alive)
            pick, rest = alive[:5], alive[5:]
            made = [f"d{depth}.{i}" for i in range(4)]
            join = Sum("", made[0], made[1])
            join.group = StateGroup(frozenset(pick[:2]), frozenset(made[:2]))
            parts = [join, Rename(pick[2], made[2]), Rename(pick[3], made[3])]
            stages.append(Parallel(parts))
            following = {key: whole[key] for key in [pick[4], *rest]}
            for part in parts:
                (group,) = part.state_dependency_groups()
                following |= part.apply({key: whole[key] for key in group.inputs})
            whole, alive = following, sorted(following)
        mapper, got = Sequential(stages), {}
        for group in sorted_groups(mapper):
            got |= mapper.apply({key: state[key] for key in group.inputs})
            assert group.outputs <= got.keys()
        assert got == {key: whole[key] for key in got}
        assert got.keys() >= {key for key in whole if key.startswith("d")}


def test_inside_d9d_and_around_it():
    compose = pytest.importorskip("d9d.model_state.mapper.compose", reason="d9d is not installed", exc_type=ImportError)
    leaf = pytest.importorskip("d9d.model_state.mapper.leaf", exc_type=ImportError)
    one = torch.ones(2, 3)
    theirs_outside = compose.ModelStateMapperSequential(
        [Parallel([Rename("a", "b")]), compose.ModelStateMapperParallel([ModelStateMapperTranspose("b", "c")])]
    )
    assert theirs_outside.apply({"a": one})["c"].shape == (3, 2)
    ours_outside = Sequential([leaf.ModelStateMapperStackTensors(["a", "b"], "s", 0), Rename("s", "t")])
    assert groups(ours_outside) == [(["a", "b"], ["t"])]
    assert ours_outside.apply({"a": one, "b": one})["t"].shape == (2, 2, 3)
