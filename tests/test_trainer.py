"""The trainer as a whole: every layout gives the losses of one process, resumes go on as if never stopped, faults are told."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from d9d_lora import sums
from d9d_lora.measure import traffic
from d9d_lora.placement import local_of
from d9d_lora.train import build, checks, replicated, trainer
from tests.small_run import config_of, losses, make_assets, run

SHARD, WHOLE = {"parallel__adapters": "shard"}, {"parallel__adapters": "replicate"}  # "auto" leaves such small ones whole
LAYOUTS = {
    "replicate2": (2, {"parallel__dp_replicate": 2}),
    "fsdp2": (2, SHARD),
    "fsdp2_whole": (2, WHOLE),
    "fsdp4": (4, {}),
    "hsdp2x2": (4, {"parallel__dp_replicate": 2, **SHARD}),
    "hsdp2x2_whole": (4, {"parallel__dp_replicate": 2, **WHOLE}),
    "tp2": (2, {"parallel__tp": 2}),
    "tp2_sp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "fsdp2_tp2": (4, {"parallel__tp": 2, **SHARD}),
    "fsdp2_tp2_sp_whole": (4, {"parallel__tp": 2, "parallel__sequence_parallel": True, **WHOLE}),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def one(pool, assets, tmp_path_factory):
    """The oracle: an uninterrupted run on one process, with a checkpoint at every third step."""
    output = tmp_path_factory.mktemp("one") / "run"
    (summary,) = pool.run(1, run, assets, output, {"checkpoint__every": 3})
    return output, summary


def close(found, expected, tolerance=1e-9):
    assert len(found) == len(expected)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected)) < tolerance, (found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_every_layout_are_those_of_one_process(pool, assets, one, tmp_path, layout):
    world, degrees = LAYOUTS[layout]
    summary = pool.run(world, run, assets, tmp_path, degrees)[0]
    close(losses(summary), losses(one[1]))
    close([summary["after"]["loss"]], [one[1]["after"]["loss"]])
    assert summary["after"]["exact_match"] == one[1]["after"]["exact_match"]
    norms = [[m["gradient_norm"] for m in s["metrics"] if "loss" in m] for s in (summary, one[1])]
    close(*norms)
    ours, theirs = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (tmp_path, one[0]))
    assert ours.keys() == theirs.keys()
    assert all((ours[k] - theirs[k]).abs().max() < 1e-8 for k in ours)


def test_the_loss_falls(one):
    assert one[1]["after"]["loss"] < one[1]["before"]["loss"]


@pytest.mark.parametrize("option", ["train__activation_checkpointing", "train__compile"])
@pytest.mark.parametrize("layout", ["fsdp2_whole", "tp2"])
def test_recomputation_and_compilation_change_no_loss(pool, assets, one, tmp_path, option, layout):
    world, degrees = LAYOUTS[layout]
    options = {option: True, "train__compile_backend": "aot_eager", "train__steps": 6}
    summary = pool.run(world, run, assets, tmp_path, {**degrees, **options})[0]
    close(losses(summary), losses(one[1]))


def test_packing_is_the_same_on_every_layout(pool, assets, tmp_path):
    """Also masks of rows that sequence parallelism pads, two in a batch, and of the head, which is given only what has a target."""
    rows = {"data__packing": True, "data__batch_size": 4, "data__micro_batch_size": 2, "data__seq_len": 31}
    packed = {**rows, "train__steps": 3, "peft__target_modules": ["q_proj", "down_proj", "lm_head"]}
    (expected,) = pool.run(1, run, assets, tmp_path / "one", packed)
    for layout in ("fsdp2", "tp2_sp"):
        world, degrees = LAYOUTS[layout]
        close(losses(pool.run(world, run, assets, tmp_path / layout, {**packed, **degrees})[0]), losses(expected))


# -- checkpoints --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters,second", [(SHARD, "one"), (WHOLE, "fsdp2_tp2"), (SHARD, "fsdp2_tp2_sp_whole")])
def test_saved_on_fsdp4_resumed_on_another_layout(pool, assets, one, tmp_path, adapters, second):
    first = pool.run(4, run, assets, tmp_path / "first", {"checkpoint__every": 3, **adapters})[0]
    close(losses(first), losses(one[1]))
    world, degrees = LAYOUTS.get(second, (1, {}))
    path = str(tmp_path / "first" / "checkpoints" / "step_00000003")
    resumed = pool.run(world, run, assets, tmp_path / "second", {**degrees, "checkpoint__resume": path})[0]
    close(losses(resumed), losses(one[1])[3:])


@pytest.mark.parametrize("layout", ["one", "fsdp2_tp2", "hsdp2x2_whole"])
def test_a_resume_on_the_same_layout_is_exact_to_the_bit(pool, assets, tmp_path, layout):
    world, degrees = LAYOUTS.get(layout, (1, {}))
    whole = pool.run(world, run, assets, tmp_path / "whole", {**degrees, "checkpoint__every": 2})[0]
    path = str(tmp_path / "whole" / "checkpoints" / "step_00000002")
    resumed = pool.run(world, run, assets, tmp_path / "again", {**degrees, "checkpoint__resume": path})[0]
    assert losses(resumed) == losses(whole)[2:]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = ((tmp_path / d / "adapter" / name).read_bytes() for d in ("whole", "again"))
        assert ours == theirs


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2_tp2"])
def test_saving_beside_the_training_changes_no_bit(pool, assets, tmp_path, layout):
    world, degrees = LAYOUTS[layout]
    found = []
    for beside in (True, False):
        output = tmp_path / str(beside)
        options = {"checkpoint__every": 1, "checkpoint__keep": 9, "checkpoint__asynchronous": beside}
        summary = pool.run(world, run, assets, output, {**degrees, **options})[0]
        found.append((losses(summary), contents(output / "checkpoints")))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert [name for name, content in found[0][1].items() if content != found[1][1][name]] == []
    assert len([name for name in found[0][1] if name.endswith("trainer.json")]) == 6


def contents(root):
    """Every file but the list of hashes: the library that writes a header gives its metadata in any order."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != "COMPLETE"):
        found[str(path.relative_to(root))] = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.offset_keys()}
                found[str(path.relative_to(root))] = file.metadata(), tensors
    return found


def resume_without_moments(rank, assets, output, overrides):
    """The fault of peers: weights come back, Adam's moments do not."""
    real = trainer.optimiser_state
    def copies(params, optimiser):
        return {k: v.clone() if k.startswith("optim.") else v for k, v in real(params, optimiser).items()}

    return run_with(trainer, "optimiser_state", copies, rank, assets, output, overrides)


def run_with(module, name, value, *args):
    real = getattr(module, name)
    setattr(module, name, value)
    try:
        return run(*args)
    finally:
        setattr(module, name, real)


def test_mutation_a_resume_that_loses_the_moments(pool, assets, one, tmp_path):
    path = str(one[0] / "checkpoints" / "step_00000003")
    (resumed,) = pool.run(1, resume_without_moments, assets, tmp_path, {"checkpoint__resume": path})
    with pytest.raises(AssertionError):
        close(losses(resumed), losses(one[1])[3:])


@pytest.mark.parametrize(
    "change,told",
    [
        ({"peft__params": {"r": 4, "alpha": 16, "dropout": 0.1}}, "belongs to another run"),
        ({"train__seed": 5}, "belongs to another run"),
        ({"data__batch_size": 4}, "batch_size: the checkpoint has 8, this run 4"),
    ],
)
def test_a_changed_config_is_refused_at_resume(pool, assets, one, tmp_path, change, told):
    path = str(one[0] / "checkpoints" / "step_00000003")
    with pytest.raises(AssertionError, match=told):
        pool.run(1, run, assets, tmp_path, {**change, "checkpoint__resume": path})


def test_best_and_latest_are_kept_and_hold_an_adapter(pool, assets, tmp_path):
    pool.run(2, run, assets, tmp_path, {"checkpoint__every": 1, "checkpoint__keep": 2, "train__eval_every": 3})
    root = tmp_path / "checkpoints"
    assert (root / "latest").read_text().strip() == "step_00000006"
    best = root / (root / "best").read_text().strip()
    assert (best / "adapter" / "adapter_model.safetensors").exists()
    assert len(list(root.glob("step_*"))) <= 3


# -- the promise --------------------------------------------------------------------------------------------------------------------


def with_a_drift(rank, assets, output, degrees):
    real = trainer.Trainer.train_step

    def step(self, coverage=None):
        values = real(self, coverage)
        if rank == 1 and self.step == 3:
            p = next(p for n, p in self.params.items() if n.endswith("q_proj.lora_A.weight"))
            with torch.no_grad():
                local_of(p).add_(1e-7)
        return values

    trainer.Trainer.train_step = step
    try:
        run(rank, assets, output, degrees)
    except checks.AdapterFault as fault:
        return str(fault)
    finally:
        trainer.Trainer.train_step = real
    return ""


@pytest.mark.parametrize("layout", ["tp2", "fsdp2_whole"])
def test_a_drift_of_one_rank_is_found_and_named(pool, assets, tmp_path, layout):
    for told in pool.run(2, with_a_drift, assets, tmp_path, LAYOUTS[layout][1]):
        assert "at step 4" in told
        assert "q_proj.lora_A.weight (rank 1 against rank 0)" in told
    assert not (tmp_path / "adapter").exists()


def with_a_dead_layer(rank, assets, output):
    real = trainer.models.open_model

    def cut(config, dtype):
        base = real(config, dtype)
        mlp = base.module.model.layers[1].mlp
        forward = mlp.forward
        mlp.forward = lambda x: forward(x).detach()
        return base

    trainer.models.open_model = cut
    try:
        run(rank, assets, output, {})
    except checks.AdapterFault as fault:
        return str(fault)
    finally:
        trainer.models.open_model = real
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_a_dead_adapter_is_found_and_named(pool, assets, tmp_path, world):
    for told in pool.run(world, with_a_dead_layer, assets, tmp_path):
        assert "have had no gradient" in told
        assert "model.layers.1.mlp" in told
        assert "model.layers.0.mlp" not in told
    assert not (tmp_path / "adapter").exists()


def test_the_run_directory(one):
    output, _ = one
    census = json.loads((output / "census.json").read_text())
    assert census["trained"] > 0
    assert (output / "adapter" / "adapter_config.json").exists()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 7))
    assert {"loss", "learning_rate", "tokens", "tokens_per_second", "gradient_norm"} <= steps[0].keys()


@pytest.mark.parametrize(
    "peft",
    [
        {"kind": "lora", "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "params": {"r": 2, "alpha": 4}},
        {
            "kind": "stack",
            "methods": [
                {"kind": "lora", "target_modules": ["q_proj", "embed_tokens"], "params": {"r": 2, "alpha": 4}},
                {"kind": "lora", "target_modules": ["down_proj"], "params": {"r": 4, "alpha": 4, "scaling": "rslora"}},
                {"kind": "full_tune", "module_name_pattern": ".*norm"},
            ],
        },
    ],
)
def test_whole_modules_and_stacks_on_layouts(pool, assets, tmp_path, peft):
    (expected,) = pool.run(1, run, assets, tmp_path / "one", {"peft": peft})
    for layout in ("fsdp2", "tp2", "fsdp2_tp2"):
        world, degrees = LAYOUTS[layout]
        # norms of this family are computed in fp32 whatever the model's dtype
        close(losses(pool.run(world, run, assets, tmp_path / layout, {**degrees, "peft": peft})[0]), losses(expected), 1e-6)


def test_half_precision_base_with_parameters_trained_whole(pool, assets, tmp_path):
    peft = {"kind": "stack", "methods": [
        {"kind": "lora", "target_modules": "all-linear", "params": {"r": 4, "alpha": 8}},
        {"kind": "full_tune", "module_name_pattern": ".*norm"},
    ]}
    overrides = {"peft": peft, "model__dtype": "bfloat16"}
    (expected,) = pool.run(1, run, assets, tmp_path / "one", overrides)
    found = pool.run(2, run, assets, tmp_path / "fsdp2", overrides)[0]
    close(losses(found), losses(expected), 2e-2)
    assert losses(found)[-1] < losses(found)[0]


def test_config_fields_are_checked(assets, tmp_path):
    from d9d_lora.train.config import ConfigError

    with pytest.raises(ConfigError, match=r"train\.stepz: no such field; did you mean 'steps'"):
        config_of(assets, tmp_path, train__stepz=3)
    with pytest.raises(ConfigError, match=r"unknown kind 'lorra'; did you mean 'lora'\?; known kinds: .*full_tune.*lora.*stack"):
        config_of(assets, tmp_path, peft={"kind": "lorra"})
    with pytest.raises(ConfigError, match=r"peft\.params\.dropout.*less than 1, got 1\.5"):
        config_of(assets, tmp_path, peft={"kind": "lora", "target_modules": "all-linear", "params": {"dropout": 1.5}})
    with pytest.raises(ConfigError, match=r"module_name_pattern: 'q_\(proj' is not a regular expression: missing \)"):
        config_of(assets, tmp_path, peft={"kind": "lora", "module_name_pattern": "q_(proj"})
    with pytest.raises(ConfigError, match=r"peft\.params\.r.*greater than or equal to 0, got -1"):
        config_of(assets, tmp_path, peft={"kind": "lora", "target_modules": "all-linear", "params": {"r": -1}})
    with pytest.raises(ValueError, match="does not make the 4 processes"):
        config_of(assets, tmp_path, parallel__tp=3).parallel.resolved(4)


def test_a_model_of_the_users_own(pool, assets, tmp_path):
    model = {
        "_target_": "tests.small_run.Bigram",
        "kwargs": {"vocabulary": 400, "width": 16},
        "tokenizer": str(assets / "model"),
        "dtype": "float64",
    }
    (expected,) = pool.run(1, run, assets, tmp_path / "one", {"model": model})
    found = pool.run(2, run, assets, tmp_path / "fsdp2", {"model": model})[0]
    close(losses(found), losses(expected))
    assert losses(found)[-1] < losses(found)[0]
    with pytest.raises(AssertionError, match="has no tensor-parallel plan"):
        pool.run(2, run, assets, tmp_path / "tp2", {"model": model, "parallel__tp": 2})


def test_rank_zero_everywhere_is_told(pool, assets, tmp_path):
    peft = {"kind": "lora", "target_modules": "all-linear", "params": {"r": 0}}
    with pytest.raises(AssertionError, match="nothing would be trained"):
        pool.run(1, run, assets, tmp_path, {"peft": peft})


def clip_by_the_local_norm(rank, assets, output, overrides):
    def clip(params, most):
        grads = [local_of(p.grad) for p in params]
        norm = float(torch.stack([g.norm() for g in grads]).norm())
        torch._foreach_mul_(grads, min(1.0, most / norm))
        return norm

    return run_with(trainer, "clip_", clip, rank, assets, output, overrides)


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp2_tp2"])
def test_mutation_the_norm_of_the_local_shard(pool, assets, one, tmp_path, layout):
    world, degrees = LAYOUTS[layout]
    summary = pool.run(world, clip_by_the_local_norm, assets, tmp_path, {**degrees, "train__steps": 2, "train__check_every": 100})[0]
    norms = [[m["gradient_norm"] for m in s["metrics"] if "loss" in m][:2] for s in (summary, one[1])]
    with pytest.raises(AssertionError):
        close(*norms)


# -- adapters that data parallelism leaves whole -------------------------------------------------------------------------------------------


def large_ones_stay_sharded(rank, assets, output, overrides):
    """A run in which a matrix trained whole is too large to be replicated; which parameters lie on which axes, and the run."""
    real, small, placed = build.Built.collect, replicated.SMALL, {}

    def collect(self):
        real(self)
        placed.update({n: getattr(getattr(p, "device_mesh", None), "mesh_dim_names", ()) for n, p in self.params.items()})

    build.Built.collect, replicated.SMALL = collect, 1 << 10
    try:
        return placed, run(rank, assets, output, overrides)
    finally:
        build.Built.collect, replicated.SMALL = real, small


def test_large_matrices_trained_whole_stay_sharded(pool, assets, tmp_path):
    peft = {
        "kind": "stack",
        "methods": [
            {"kind": "lora", "target_modules": ["q_proj", "embed_tokens"], "params": {"r": 2, "alpha": 4}},
            {"kind": "full_tune", "module_name_pattern": ".*(norm|down_proj)"},
        ],
    }
    (expected,) = pool.run(1, run, assets, tmp_path / "one", {"peft": peft})
    placed, found = pool.run(4, large_ones_stay_sharded, assets, tmp_path / "four", {**LAYOUTS["fsdp2_tp2_sp_whole"][1], "peft": peft})[0]
    close(losses(found), losses(expected), 1e-6)
    assert placed["model.layers.0.mlp.down_proj.weight"] == ("dp_shard", "tp")
    assert placed["model.layers.0.self_attn.q_proj.lora_A.weight"] == ("tp",)
    assert placed["model.layers.0.input_layernorm.weight"] == placed["model.norm.weight"] == ()


def faulty_sum(rank, assets, output, overrides, times):
    """Data parallelism's sum is left out, or taken twice."""
    real = sums._add

    def add(params, group, *, counted):
        return sum(real(params, group, counted=counted) for _ in range(times if counted else 1))

    sums._add = add
    try:
        return run(rank, assets, output, {**overrides, "train__steps": 1})
    except checks.AdapterFault as fault:
        return str(fault)
    finally:
        sums._add = real


@pytest.mark.parametrize("layout", ["fsdp2_whole", "fsdp2_tp2_sp_whole"])
def test_mutation_the_sum_over_data_left_out_or_taken_twice(pool, assets, one, tmp_path, layout):
    world, degrees = LAYOUTS[layout]
    for told in pool.run(world, faulty_sum, assets, tmp_path / "none", degrees, 0):
        assert "at the save of step 1" in told
        assert "lora_B.weight (rank 1 against rank 0)" in told or "lora_B.weight (rank 2 against rank 0)" in told
    twice = pool.run(world, faulty_sum, assets, tmp_path / "twice", degrees, 2)[0]
    norms = [[m["gradient_norm"] for m in s["metrics"] if "loss" in m][:1] for s in (twice, one[1])]
    with pytest.raises(AssertionError):
        close(*norms)


def a_layer_that_one_rank_leaves_out(rank):
    """Gradients that only some ranks have are everybody's; what nobody has stays None."""
    p = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3)]
    group = torch.distributed.group.WORLD
    p[0].grad = torch.full_like(p[0], rank + 1.0)
    if rank == 1:
        p[1].grad = torch.full_like(p[1], 5.0)
    with traffic() as moved:
        travelled = sums.ReplicatedSum([], over_data=p, data=group).reduce()
    return [None if q.grad is None else q.grad.tolist() for q in p], travelled, dict(moved.count)


def test_a_gradient_that_some_ranks_lack_is_summed(pool):
    for grads, travelled, count in pool.run(2, a_layer_that_one_rank_leaves_out):
        assert grads == [[3.0] * 3, [5.0] * 3, None]
        assert (travelled, count) == (9, {"all_reduce": 1})
