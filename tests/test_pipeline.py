"""Pipelines: every schedule and layout gives the losses, norms and adapter of one process; what cannot be cut is refused."""

import contextlib

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from d9d_lora import dropout, inject_peft_and_freeze, peft_method_from_config
from d9d_lora.methods import adalora
from d9d_lora.train import checks, pipeline, stages, trainer
from d9d_lora.train.config import ParallelConfig
from tests.small_run import losses, make_assets, run

PP = {"parallel__pp": 2}
LAYOUTS = {
    "gpipe": (4, {"parallel__pp": 4, "parallel__schedule": "gpipe"}),
    "1f1b": (2, PP),
    "interleaved_1f1b": (2, {**PP, "parallel__schedule": "interleaved_1f1b", "parallel__stages_per_rank": 2}),
    "zero_bubble": (2, {**PP, "parallel__schedule": "zero_bubble"}),
    "zbv": (2, {**PP, "parallel__schedule": "zbv", "parallel__stages_per_rank": 2}),
    "pp2_fsdp2": (4, {**PP, "parallel__dp_shard": 2, "parallel__adapters": "shard"}),
    "zbv_fsdp2": (4, {**PP, "parallel__schedule": "zbv", "parallel__stages_per_rank": 2, "parallel__adapters": "shard"}),
    "pp2_tp2": (4, {**PP, "parallel__tp": 2}),
    "pp2_fsdp2_tp2": (8, {**PP, "parallel__dp_shard": 2, "parallel__tp": 2}),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def one(pool, assets, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    (summary,) = pool.run(1, run, assets, output, {"checkpoint__every": 3})
    return output, summary


def close(found, expected, tolerance=1e-9):
    assert len(found) == len(expected)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected)) < tolerance, (found, expected)


def norms(summary):
    return [m["gradient_norm"] for m in summary["metrics"] if "loss" in m]


def alike(path, summary, one):
    output, expected = one
    close(losses(summary), losses(expected))
    close(norms(summary), norms(expected))
    close([summary["after"]["loss"]], [expected["after"]["loss"]])
    assert summary["after"]["exact_match"] == expected["after"]["exact_match"]
    ours, theirs = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (path, output))
    assert ours.keys() == theirs.keys()
    assert all((ours[k] - theirs[k]).abs().max() < 1e-8 for k in ours)
    assert (path / "adapter" / "adapter_config.json").read_bytes() == (output / "adapter" / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_and_layout_is_as_one_process(pool, assets, one, tmp_path, layout):
    world, degrees = LAYOUTS[layout]
    alike(tmp_path, pool.run(world, run, assets, tmp_path, degrees)[0], one)


# -- methods that weigh all layers together, stages that have none ------------------------------------------------------------------

ATTENTION = ["q_proj", "v_proj"]
METHODS = {
    "vblora": {"kind": "vblora", "target_modules": ATTENTION, "params": {"r": 2, "num_vectors": 8, "vector_length": 4, "dropout": 0.1}},
    "adalora": {"kind": "adalora", "target_modules": ATTENTION, "params": {"init_r": 4, "target_r": 2, "alpha": 8}},
    "randlora": {"kind": "randlora", "target_modules": ATTENTION, "params": {"r": 4, "alpha": 8}},
    "pissa": {"kind": "lora", "target_modules": ATTENTION, "params": {"r": 2, "alpha": 4, "init_lora_weights": "pissa"}},
    "whole": {"kind": "stack", "methods": [
        {"kind": "lora", "target_modules": [*ATTENTION, "embed_tokens"], "params": {"r": 2, "alpha": 4}},
        {"kind": "full_tune", "module_name_pattern": ".*norm"},
    ]},
    "last only": {"kind": "lora", "target_modules": ATTENTION, "layers_to_transform": [4], "params": {"r": 2, "alpha": 4}},
    "first only": {"kind": "lora", "target_modules": ATTENTION, "layers_to_transform": [0], "params": {"r": 2, "alpha": 4}},
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(pool, assets, tmp_path_factory):
    """One process with a method, once."""
    runs = {}

    def of(method):
        if method not in runs:
            output = tmp_path_factory.mktemp("expected")
            runs[method] = output, pool.run(1, run, assets, output, {"peft": METHODS[method], "train__steps": 4})[0]
        return runs[method]

    return of


@pytest.mark.parametrize(
    "method,layout",
    [
        ("vblora", "1f1b"),
        ("vblora", "zero_bubble"),
        ("vblora", "pp2_fsdp2"),
        ("adalora", "interleaved_1f1b"),
        ("randlora", "1f1b"),
        ("pissa", "zbv"),
        ("whole", "1f1b"),
        ("last only", "zero_bubble"),
        ("last only", "zbv_fsdp2"),
        ("first only", "gpipe"),
    ],
)
def test_what_is_of_all_stages(pool, assets, expected, tmp_path, method, layout):
    world, degrees = LAYOUTS[layout]
    peft = {"peft": METHODS[method], "train__steps": 4}
    output, summary = expected(method)
    found = pool.run(world, run, assets, tmp_path, {**degrees, **peft})[0]
    close(losses(found), losses(summary))
    close(norms(found), norms(summary))
    name = next(p.name for p in (output / "adapter").glob("*.safetensors"))
    ours, theirs = (load_file(p / "adapter" / name) for p in (tmp_path, output))
    assert ours.keys() == theirs.keys()
    assert all((ours[k] - theirs[k]).abs().max() < 1e-7 for k in ours)


# -- checkpoints, bytes, recomputation, packing --------------------------------------------------------------------------------------


def test_a_resume_with_another_pp_goes_on_as_one_process_and_writes_its_bytes(pool, assets, one, tmp_path):
    path = one[0] / "checkpoints" / "step_00000003"
    found = pool.run(2, run, assets, tmp_path / "pp2", {**PP, "checkpoint__resume": str(path), "checkpoint__every": 1})[0]
    close(losses(found), losses(one[1])[3:])
    again = str(tmp_path / "pp2" / "checkpoints" / "step_00000004")
    back = pool.run(2, run, assets, tmp_path / "fsdp2", {"checkpoint__resume": again})[0]
    close(losses(back), losses(one[1])[4:])
    # nothing is trained, and both write what the checkpoint holds
    pool.run(2, run, assets, tmp_path / "still", {**PP, "train__steps": 3, "checkpoint__resume": str(path)})
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "still" / "adapter" / name).read_bytes() == (path / "adapter" / name).read_bytes()


def reports(rank, assets, output, overrides):
    real, found = trainer.models.load, []
    trainer.models.load = lambda *args: found.append(real(*args)) or found[0]
    try:
        run(rank, assets, output, {**overrides, "train__steps": 2})
    finally:
        trainer.models.load = real
    return found[0].bytes_read


def test_a_rank_reads_the_bytes_of_its_stage(pool, assets, tmp_path):
    (whole,) = pool.run(1, reports, assets, tmp_path / "one", {})
    head = 400 * 24 * 4  # tied to the embeddings: the first and the last stage read it
    layer = (whole - head - 24 * 4) // 5
    first, last = pool.run(2, reports, assets, tmp_path / "pp2", PP)
    assert (first, last) == (head + 3 * layer, head + 2 * layer + 24 * 4)


def test_recomputation_and_packing(pool, assets, tmp_path):
    """Blocks that are computed again draw the masks of their forward, whatever forwards came between."""
    options = {"train__activation_checkpointing": True, "data__packing": True, "data__batch_size": 4, "train__steps": 3}
    (expected,) = pool.run(1, run, assets, tmp_path / "one", options)
    found = pool.run(2, run, assets, tmp_path / "pp2", {**options, **PP})[0]
    close(losses(found), losses(expected))
    close(norms(found), norms(expected))


def test_half_precision_with_parameters_trained_whole(pool, assets, tmp_path):
    options = {"peft": METHODS["whole"], "model__dtype": "bfloat16", "train__steps": 3}
    (expected,) = pool.run(1, run, assets, tmp_path / "one", options)
    found = pool.run(2, run, assets, tmp_path / "pp2", {**options, **PP})[0]
    close(losses(found), losses(expected), 2e-2)


# -- mutations ----------------------------------------------------------------------------------------------------------------------


def nothing(*args, **kwargs):
    return None


def here(self, square):
    return square


def a_stage_at_a_time(self, micro, targets, _real=pipeline.Pipeline.train):
    return _real(self, micro, targets / 2)


def no_time(self):
    return contextlib.nullcontext()


MUTATIONS = {
    "the bank is not summed over stages": (pipeline.Pipeline, "sum_shared", nothing, {"peft": METHODS["vblora"]}),
    "every stage has its own norm": (pipeline.Pipeline, "total", here, {}),
    "the bank counts in the norm on each stage": (pipeline.Pipeline, "counted", lambda self, p: True, {"peft": METHODS["vblora"]}),
    "the loss is divided a stage": (pipeline.Pipeline, "train", a_stage_at_a_time, {}),
    "the clock is not set back": (dropout.Clock, "again", no_time, {"train__activation_checkpointing": True}),
    "every stage has its own budget": (adalora.AdaLoRA, "across", nothing, {"peft": METHODS["adalora"]}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_seen(pool, assets, one, expected, tmp_path, mutation):
    overrides = MUTATIONS[mutation][-1]
    method = next((m for m, peft in METHODS.items() if peft is overrides.get("peft")), None)
    of_one = one[1] if method is None else expected(method)[1]
    steps = {"train__steps": len(losses(of_one))}
    told, found = "", None
    try:
        found = pool.run(2, run_mutated, assets, tmp_path, mutation, steps)[0]
    except AssertionError as fault:
        told = str(fault)
    if found is None:
        assert "replicated parameters differ between ranks" in told  # of the bank, at the save
    else:
        apart = [abs(a / b - 1) for f in (losses, norms) for a, b in zip(f(found), f(of_one), strict=True)]
        assert max(apart) > 1e-6


def run_mutated(rank, assets, output, mutation, steps):
    owner, name, value, overrides = MUTATIONS[mutation]
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return run(rank, assets, output, {**PP, "train__check_every": 100, **steps, **overrides})
    finally:
        setattr(owner, name, real)


def with_a_dead_stage(rank, assets, output):
    """The last stage's layers get no gradient; the other stage's do."""
    real = trainer.Trainer._build

    def build(self):
        real(self)
        for p in self.params.values() if rank == 1 else ():
            p.register_post_accumulate_grad_hook(lambda q: setattr(q, "grad", None))

    trainer.Trainer._build = build
    try:
        run(rank, assets, output, {**PP, "train__steps": 3})
    except checks.AdapterFault as fault:
        return str(fault)
    finally:
        trainer.Trainer._build = real
    return ""


def test_a_stage_without_gradients_is_found_by_all_ranks(pool, assets, tmp_path):
    for told in pool.run(2, with_a_dead_stage, assets, tmp_path):
        assert "28 of 70 trained parameters have had no gradient" in told
        assert "model.layers.3." in told
        assert "model.layers.0." not in told
    assert not (tmp_path / "adapter").exists()


# -- what is refused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "degrees,told",
    [
        ({"pp": 3}, "does not make the 8 processes"),
        ({"schedule": "gpipe"}, "parallel.schedule needs parallel.pp > 1"),
        ({"pp": 2, "schedule": "zbv"}, "needs exactly 2 stages on each rank; got parallel.stages_per_rank=1"),
        ({"pp": 2, "stages_per_rank": 2}, "schedule=1f1b needs exactly 1 stages"),
        ({"pp": 2, "tp": 4, "sequence_parallel": True}, "sequence_parallel cannot go with parallel.pp"),
    ],
)
def test_degrees_that_do_not_go_together(degrees, told):
    with pytest.raises(ValueError, match=told):
        ParallelConfig(**degrees).resolved(8)


@pytest.mark.parametrize(
    "schedule,pp,several", [("gpipe", 4, 1), ("1f1b", 3, 1), ("interleaved_1f1b", 4, 2), ("zero_bubble", 4, 1), ("zbv", 2, 2)]
)
def test_numbers_of_microbatches_are_those_that_torch_takes(schedule, pp, several):
    parallel = ParallelConfig(pp=pp, schedule=schedule, stages_per_rank=several)
    for n in range(pp, 14):
        try:
            fake_schedule(parallel, n)
        except ValueError:
            with pytest.raises(ValueError, match="numbers that do"):
                pipeline.check_microbatches(parallel, n, 2)
        else:
            pipeline.check_microbatches(parallel, n, 2)
    with pytest.raises(ValueError, match=rf"has {pp - 1} microbatches.*data.batch_size={2 * pp}"):
        pipeline.check_microbatches(parallel, pp - 1, 2)


def fake_schedule(parallel, n):
    class Held:  # what the constructors of torch's schedules ask of a stage
        group_size, group_rank, num_stages, submod = parallel.pp, 0, parallel.stages, nn.Identity()

    held = [Held() for _ in range(parallel.stages_per_rank)]
    several = parallel.schedule not in ("gpipe", "1f1b")
    pipeline.SCHEDULES[parallel.schedule](held if several else held[0], n, loss_fn=nothing)


def outline(kind, **fields):
    config = CONFIG_MAPPING[kind](hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=50, **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def test_models_that_cannot_be_cut():
    llama = {"num_key_value_heads": 2, "intermediate_size": 40}
    stages.check_pieces(outline("llama", **llama))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no pipeline plan"):
        stages.check_pieces(outline("gpt2"))
    stages.check_pieces(outline("granite", **llama))
    with pytest.raises(ValueError, match="forward does more than its pipeline plan says"):
        stages.check_pieces(outline("granite", **llama, embedding_multiplier=12.0))  # scales whatever it is given
    with pytest.raises(ValueError, match=r"5 stages are more than the model's 4 layers.*at most 4 fit"):
        stages.Split(outline("llama", **llama), 5, [0])
    tied = outline("llama", **llama, tie_word_embeddings=True)
    tied.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.weight \(stage 1\) and model.embed_tokens.weight \(stage 0\) are one tensor"):
        stages.Split(tied, 2, [0])
    pair = outline("llama", **llama, tie_word_embeddings=True)
    config = {"kind": "lora", "target_modules": ["embed_tokens"], "ensure_weight_tying": True, "params": {"r": 2}}
    inject_peft_and_freeze(peft_method_from_config(config), pair)
    with pytest.raises(ValueError, match=r"share one adapter \(ensure_weight_tying\)"):
        stages.Split(pair, 2, [0])


def test_a_run_that_is_refused_says_what_fits(pool, assets, tmp_path):
    with pytest.raises(AssertionError, match=r"a step has 1 microbatches on each rank.*data.batch_size=2"):
        pool.run(2, run, assets, tmp_path, {**PP, "data__batch_size": 1})
