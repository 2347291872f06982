"""A run over a pipeline is the run of one process: losses, every gradient, weights and files, under every schedule."""

import contextlib
import os
import signal
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from d9d_lora import dropout, inject_peft_and_freeze, peft_method_from_config
from d9d_lora.methods import adalora
from d9d_lora.state import atomic
from d9d_lora.train import checks, pipeline, stages, trainer
from d9d_lora.train.config import ParallelConfig
from tests.small_run import config_of, losses, make_assets, run
from tests.traced import Ones, alike, close, norms, same, traced

PP = {"parallel__pp": 2}
SCHEDULES = {  # the others, and pipelines beside FSDP2, replicas and tensor parallelism: test_pipeline_experts.py
    "gpipe": {**PP, "parallel__schedule": "gpipe"},
    "interleaved_1f1b": {**PP, "parallel__schedule": "interleaved_1f1b", "parallel__stages_per_rank": 2},
    "zero_bubble": {**PP, "parallel__schedule": "zero_bubble"},
}
ATTENTION = ["q_proj", "v_proj"]
METHODS = {
    "vblora": {"kind": "vblora", "target_modules": ATTENTION, "params": {"r": 2, "num_vectors": 8, "vector_length": 4, "dropout": 0.1}},
    "adalora": {"kind": "adalora", "target_modules": ATTENTION, "params": {"init_r": 4, "target_r": 2, "alpha": 8}},
    "pissa": {"kind": "lora", "target_modules": ATTENTION, "params": {"r": 2, "alpha": 4, "init_lora_weights": "pissa"}},
    "several": {"kind": "stack", "methods": [
        {"kind": "randlora", "target_modules": ATTENTION, "params": {"r": 4, "alpha": 8}},
        {"kind": "lora", "target_modules": ["embed_tokens", "down_proj"], "params": {"r": 2, "alpha": 4}},
        {"kind": "full_tune", "module_name_pattern": ".*norm"},
    ]},
    "last only": {"kind": "lora", "target_modules": ATTENTION, "layers_to_transform": [4], "params": {"r": 2, "alpha": 4}},
}  # fmt: skip
SHORT = {"train__steps": 2}
BLIND = {**SHORT, "data__eval_fraction": 0.0}  # without evaluations


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Llamas with the embeddings tied to the head, which the first and the last stage hold."""
    return make_assets(tmp_path_factory.mktemp("assets"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def one(pool, assets, tmp_path_factory):
    """One process, once for each config: the directory and what it told."""
    return partial(Ones(pool, tmp_path_factory), assets)


def test_four_stages_are_as_one_process(pool, assets, one, tmp_path):
    alike(tmp_path, pool.run(4, traced, assets, tmp_path, {"parallel__pp": 4, **SHORT}), one(SHORT))


@pytest.mark.parametrize(
    "method,schedule",
    [
        ("vblora", "zero_bubble"),
        ("adalora", "interleaved_1f1b"),
        ("pissa", "interleaved_1f1b"),
        ("several", "gpipe"),
        ("last only", "zero_bubble"),
    ],
)
def test_what_is_of_all_stages(pool, assets, one, tmp_path, method, schedule):
    """Shared banks and bases, one budget, starts that move the base, a tied embedding with an adapter, stages without any."""
    peft = {"peft": METHODS[method], **BLIND}
    alike(tmp_path, pool.run(2, traced, assets, tmp_path, {**SCHEDULES[schedule], **peft}), one(peft))


# -- checkpoints, bytes, recomputation, packing, precision ---------------------------------------------------------------------------


def test_nothing_trained_is_written_in_the_bytes_of_one_process(pool, assets, one, tmp_path):
    output = one(SHORT)[0]
    still = {**PP, **SHORT, "checkpoint__resume": str(output / "checkpoints" / "step_00000002"), "export__profiles": ["vllm"]}
    pool.run(2, run, assets, tmp_path, still)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (output / "checkpoints" / "step_00000002" / "adapter" / name).read_bytes()
    assert list((tmp_path / "export" / "vllm").glob("*.safetensors"))


def reports(rank, assets, output, overrides):
    real, found = trainer.models.load, []
    trainer.models.load = lambda *args: found.append(real(*args)) or found[0]
    try:
        run(rank, assets, output, {**overrides, "train__steps": 1, "data__eval_fraction": 0.0})
    finally:
        trainer.models.load = real
    return found[0].bytes_read


def test_a_rank_reads_the_bytes_of_its_stage(pool, assets, tmp_path):
    (whole,) = pool.run(1, reports, assets, tmp_path / "one", {})
    head = 400 * 24 * 4  # tied to the embeddings: the first and the last stage read it
    layer = (whole - head - 24 * 4) // 5
    first, last = pool.run(2, reports, assets, tmp_path / "pp2", PP)
    assert (first, last) == (head + 3 * layer, head + 2 * layer + 24 * 4)


@pytest.mark.parametrize(
    "options,tolerance",
    [
        # blocks that are computed again draw the masks of their forward, whatever forwards came between
        ({"train__activation_checkpointing": True, "data__packing": True, "data__batch_size": 4}, 1e-9),
        ({"peft": METHODS["several"], "model__dtype": "bfloat16"}, 2e-2),
        ({"model__quantise": "nf4", "model__dtype": "float32"}, 1e-5),
    ],
    ids=["recomputed and packed", "bfloat16 with norms in fp32", "nf4"],
)
def test_options(pool, assets, one, tmp_path, options, tolerance):
    found, expected = pool.run(2, run, assets, tmp_path, {**options, **PP, **BLIND})[0], one({**options, **BLIND})[1]
    close(losses(found), losses(expected), tolerance)
    close(norms(found), norms(expected), 10 * tolerance)


# -- mutations ----------------------------------------------------------------------------------------------------------------------


def nothing(*args, **kwargs):
    return None


def here(self, square):
    return square


def a_stage_at_a_time(self, micro, targets, _real=pipeline.Pipeline.train):
    return _real(self, micro, targets / 2)


def no_time(self):
    return contextlib.nullcontext()


VBLORA, RECOMPUTED = {"peft": METHODS["vblora"], **BLIND}, {"train__activation_checkpointing": True, **BLIND}
MUTATIONS = {
    "the bank is not summed over stages": (pipeline.Pipeline, "sum_shared", nothing, VBLORA),
    "every stage has its own norm": (pipeline.Pipeline, "total", here, BLIND),
    "the bank counts in the norm on each stage": (pipeline.Pipeline, "counted", lambda self, p: True, VBLORA),
    "the loss is divided a stage": (pipeline.Pipeline, "train", a_stage_at_a_time, BLIND),
    "the clock is not set back": (dropout.Clock, "again", no_time, RECOMPUTED),
    "every stage has its own budget": (adalora.AdaLoRA, "across", nothing, {"peft": METHODS["adalora"], **BLIND}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_seen(pool, assets, one, tmp_path, mutation):
    expected, found = one(MUTATIONS[mutation][-1])[1], pool.run(2, run_mutated, assets, tmp_path, mutation)[0]
    if isinstance(found, str):
        assert "replicated parameters differ between ranks" in found  # of the bank, at the save
    else:
        apart = [abs(a / b - 1) for f in (losses, norms) for a, b in zip(f(found), f(expected), strict=True)]
        assert max(apart) > 1e-6


def run_mutated(rank, assets, output, mutation):
    owner, name, value, overrides = MUTATIONS[mutation]
    with mock.patch.object(owner, name, value):
        return told(rank, assets, output, {**PP, "train__check_every": 100, **overrides})


def told(rank, assets, output, overrides):
    """A run, or what it says when it stops."""
    try:
        return run(rank, assets, output, overrides)
    except (checks.AdapterFault, ValueError) as fault:
        return str(fault)


def with_a_dead_stage(rank, assets, output):
    """The last stage's layers get no gradient; the other stage's do."""
    real = trainer.Trainer._build

    def build(self):
        real(self)
        for p in self.params.values() if rank == 1 else ():
            p.register_post_accumulate_grad_hook(lambda q: setattr(q, "grad", None))

    with mock.patch.object(trainer.Trainer, "_build", build):
        return told(rank, assets, output, {**PP, **BLIND, "train__steps": 3})


def test_a_stage_without_gradients_is_found_by_all_ranks(pool, assets, tmp_path):
    for text in pool.run(2, with_a_dead_stage, assets, tmp_path):
        assert "28 of 70 trained parameters have had no gradient" in text
        assert "model.layers.3." in text
        assert "model.layers.0." not in text
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


def test_compiled_blocks_are_not_recomputed(assets, tmp_path):
    with pytest.raises(ValueError, match="what is recomputed sets the clock of its masks back"):
        config_of(assets, tmp_path, **PP, train__compile=True, train__activation_checkpointing=True)


def test_a_run_that_is_refused_says_what_fits(pool, assets, tmp_path):
    for text in pool.run(2, told, assets, tmp_path, {**PP, "data__batch_size": 1}):
        assert "a step has 1 microbatches on each rank" in text
        assert "data.batch_size=2" in text


# -- last, as it costs the pool its workers -----------------------------------------------------------------------------------------


def killed_in_a_save(rank, assets, output, overrides):
    """The first rank dies in the middle of its second save: tensors are written, and the directory is not yet in its place."""
    saves, real = [], atomic.digest

    def die(root):
        saves.append(root)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(root)

    atomic.digest = die
    run(rank, assets, output, overrides)


def test_killed_in_a_save_it_resumes_with_another_pp(pool, assets, one, tmp_path):
    """One process, then a pipeline that is killed, then shards: one run. The pipeline writes beside the training."""
    output, expected = one({"checkpoint__every": 3})
    path = output / "checkpoints" / "step_00000003"
    with pytest.raises(AssertionError, match="exit code -9"):
        pool.run(2, killed_in_a_save, assets, tmp_path, {**PP, "checkpoint__resume": str(path), "checkpoint__every": 1})
    checkpoints = tmp_path / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == "step_00000004"
    assert list(checkpoints.glob(".tmp_*")), "the kill was meant to leave a half-written directory"
    ours = pool.run(2, traced, assets, tmp_path, {"checkpoint__resume": "must", "checkpoint__every": 100})
    close(losses(ours[0])[-2:], losses(expected)[4:])
    same([r["gradients"] for r in ours], expected["gradients"])
