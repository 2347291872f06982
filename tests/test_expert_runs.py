"""The trainer with experts shared out, against one process: losses, norms, checkpoints across layouts, one adapter file."""

import contextlib
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from d9d_lora import placement, sums
from d9d_lora.train import build
from d9d_lora.train.checks import AdapterFault
from d9d_lora.train.config import ParallelConfig
from d9d_lora.train.world import World
from tests.small_run import config_of, losses, make_assets, run

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
PEFT = {"kind": "lora", "target_modules": "all-linear", "target_parameters": STACKS, "params": {"r": 4, "alpha": 8, "dropout": 0.1}}
BASE = {"peft": PEFT, "train__steps": 5, "optim__schedule": "constant", "checkpoint__every": 1, "checkpoint__keep": 9}
EP = {**BASE, "parallel__ep": 2}
SHAPE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"), "qwen3_moe", **SHAPE)


@pytest.fixture(scope="module")
def one(pool, assets, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    return output, pool.run(1, run, assets, output, BASE)[0]


def close(found, expected):
    assert len(found) == len(expected) > 0
    assert all(abs(a - b) < 1e-7 * abs(b) for a, b in zip(found, expected))


def norms(summary):
    return [m["gradient_norm"] for m in summary["metrics"] if "gradient_norm" in m]


RUNS = {
    "ep2": (2, {}),
    "ep2, whole on 2 x 2": (4, {"parallel__adapters": "replicate"}),
    "ep2 x 2, sharded, recomputed": (4, {"parallel__adapters": "shard", "train__activation_checkpointing": True}),
    "ep2 x 2 x tp2, whole": (8, {"parallel__tp": 2, "parallel__adapters": "replicate", "train__steps": 2}),
    "2 replicas of ep2": (4, {"parallel__dp_replicate": 2, "parallel__adapters": "shard"}),
}


@pytest.mark.parametrize("layout", RUNS)
def test_a_run_is_that_of_one_process(pool, assets, one, tmp_path, layout):
    """Losses, clipped norms over mixed meshes, held-out loss, and the one PEFT directory."""
    world, options = RUNS[layout]
    found = pool.run(world, run, assets, tmp_path, {**EP, **options})[0]
    steps = options.get("train__steps", BASE["train__steps"])
    close(losses(found), losses(one[1])[:steps])
    close(norms(found), norms(one[1])[:steps])
    if steps < BASE["train__steps"]:
        return
    close([found["after"]["loss"]], [one[1]["after"]["loss"]])
    mine, theirs = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (tmp_path, one[0]))
    assert mine.keys() == theirs.keys()
    assert all((mine[k] - theirs[k]).abs().max() < 1e-6 for k in mine)


def summed_over_others(rank, assets, output):
    with mock.patch.object(World, "expert_group", lambda world, *_: world.dp_group()):
        return run(rank, assets, output, {**EP, "parallel__adapters": "replicate", "train__steps": 1})


def test_mutation_experts_summed_over_ranks_that_hold_others(pool, assets, one, tmp_path):
    found = pool.run(4, summed_over_others, assets, tmp_path)[0]
    assert abs(norms(found)[0] - norms(one[1])[0]) > 1e-4 * norms(one[1])[0]  # the law allows 1e-7


OUTER = {"peft": {**PEFT, "params": {**PEFT["params"], "experts_shared_outer": True}}, "train__steps": 4}


def as_of_own_experts(rank, assets, output, options):
    with contextlib.ExitStack() as stack:
        for module in (build, sums):
            stack.enter_context(mock.patch.object(module, "is_of_own_experts", lambda p: placement.ranks_of_experts(p) > 1))
        stack.enter_context(pytest.raises(AdapterFault, match="replicated parameters differ"))
        run(rank, assets, output, options)


def test_a_factor_that_is_one_for_all_experts_goes_from_layout_to_layout(pool, assets, tmp_path):
    """ep2 x FSDP2 2, sharded -> whole -> ep2 x tp2 -> 1, a step each; the mutation sums it over the ranks of the same experts."""
    expected = pool.run(1, run, assets, tmp_path / "one", {**BASE, **OUTER})[0]
    path, two = "auto", {**EP, "parallel__adapters": "replicate"}
    layouts = [(4, {**EP, "parallel__adapters": "shard"}), (4, two), (4, {**two, "parallel__tp": 2}), (1, BASE)]
    for step, (world, layout) in enumerate(layouts):
        options = {**layout, **OUTER, "train__steps": step + 1, "checkpoint__resume": str(path)}
        found = pool.run(world, run, assets, tmp_path / str(step), options)[0]
        close([*losses(found), *norms(found)], [losses(expected)[step], norms(expected)[step]])
        if step == 1:
            pool.run(world, as_of_own_experts, assets, tmp_path / "wrong", options)
        path = tmp_path / str(step) / "checkpoints" / f"step_{step + 1:08d}"
    mine, theirs = (load_file(tmp_path / d / "adapter" / "adapter_model.safetensors") for d in ("3", "one"))
    assert all((mine[k] - theirs[k]).abs().max() < 1e-6 for k in theirs)
    A = theirs["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"].unflatten(0, (4, -1))
    assert all(torch.equal(A[0], one) for one in A)


def test_checkpoints_go_from_any_of_these_layouts_to_any_other(pool, assets, one, tmp_path):
    """1 -> pp2 -> ep2 x FSDP2 2 -> pp2 x FSDP2 2 -> 1, a step each."""
    path, expected = one[0] / "checkpoints" / "step_00000001", losses(one[1])
    sharded, pp = {"parallel__adapters": "shard"}, {"parallel__pp": 2}
    layouts = [(2, {**BASE, **pp}), (4, {**EP, **sharded}), (4, {**BASE, **pp, **sharded}), (1, BASE)]
    for step, (world, layout) in enumerate(layouts, start=1):
        output = tmp_path / str(step)
        found = pool.run(world, run, assets, output, {**layout, "train__steps": step + 1, "checkpoint__resume": str(path)})[0]
        close(losses(found), expected[step : step + 1])
        close(norms(found), norms(one[1])[step : step + 1])
        path = output / "checkpoints" / f"step_{step + 1:08d}"


@pytest.mark.parametrize(
    "degrees,world,words",
    [
        ({"ep": 4, "cp": 2}, 8, "ep=4 with parallel.cp"),
        ({"ep": 2, "dp_replicate": 2, "tp": 2}, 8, "ep=2 with parallel.dp_replicate and tp"),
        ({"ep": 2, "dp_replicate": 2, "pp": 2}, 8, "ep=2 with parallel.dp_replicate and pp"),
        ({"ep": 4}, 6, "must divide dp_shard=6; degrees that do: "),
        ({"ep": 2}, 1, "must divide dp_shard=1"),
    ],
)
def test_degrees_that_do_not_fit_the_ranks_are_refused(degrees, world, words):
    with pytest.raises(ValueError, match=words):
        ParallelConfig(**degrees).resolved(world)


def refused(rank, assets, output):
    with pytest.raises(ValueError, match=r"parallel.ep=3 does not divide the 4 experts of this model; the nearest degrees that do: 2, 4"):
        run(rank, assets, output, {**EP, "parallel__ep": 3, "data__batch_size": 6})


def starts_from_data(rank, assets, output):
    with pytest.raises(ValueError, match=r"a start from data \(eva, corda\) with parallel.ep is not proven"):
        run(rank, assets, output, {**EP, "peft": {"kind": "lora", "target_modules": ["q_proj"], "params": {"init_lora_weights": "eva"}}})


def test_what_does_not_fit_the_model_or_is_not_proven_is_refused(pool, assets, tmp_path):
    pool.run(3, refused, assets, tmp_path)
    pool.run(2, starts_from_data, assets, tmp_path)
    with pytest.raises(ValueError, match=r"train.compile with parallel.ep"):
        config_of(assets, tmp_path, **EP, train__compile=True)
