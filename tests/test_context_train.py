"""Context parallelism in the trainer: losses, norms, evaluations and the adapter of every layout are those of one process."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from d9d_lora.train.batches import MicroBatch
from d9d_lora.train.trainer import Trainer
from d9d_lora.train.world import device_of, join
from tests.pool import RankFailed
from tests.small_run import config_of, losses, make_assets, run

SHARD, CP = {"parallel__adapters": "shard"}, {"parallel__cp": 2}
LAYOUTS = {
    "cp2": (2, {**CP, **SHARD}),
    "cp2_whole": (2, CP),
    "cp2_tp2": (4, {**CP, "parallel__tp": 2}),
    "cp2_tp2_sp": (4, {**CP, **SHARD, "parallel__tp": 2, "parallel__sequence_parallel": True, "parallel__column": "rank_space"}),
    "fsdp2_cp2": (4, {**CP, **SHARD, "parallel__dp_shard": 2}),
    "replicate2_cp2": (4, {**CP, **SHARD, "parallel__dp_replicate": 2, "parallel__cp_attention": "gather"}),
}
PACKED = {  # of which no 4 is a divisor
    "data__packing": True, "data__micro_batch_size": 2, "data__seq_len": 62, "data__batch_size": 4,
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def expected(pool, assets, tmp_path_factory):
    """One process with some settings, once."""
    runs = {}

    def of(name, settings):
        if name not in runs:
            output = tmp_path_factory.mktemp("expected") / "run"
            runs[name] = output, pool.run(1, run, assets, output, settings)[0]
        return runs[name]

    return of


def apart(path, summary, one):
    """The largest difference of losses, norms, evaluations and the adapter."""
    output, theirs = one
    told = ("loss", "gradient_norm", "tokens", "target_tokens")
    pairs = [([m[k] for m in s["metrics"] if "loss" in m for k in told] for s in (summary, theirs))]
    pairs += [([s[when]["loss"] for when in ("before", "after")] for s in (summary, theirs))]
    ours, their = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (path, output))
    assert ours.keys() == their.keys()
    factors = [float((ours[k] - their[k]).abs().max()) for k in ours]
    return max([abs(a / b - 1) for x, y in pairs for a, b in zip(x, y, strict=True)] + factors)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("cp2", "cp2_tp2")])  # of which the cases below are
def test_every_layout_is_as_one_process(pool, assets, expected, tmp_path, layout):
    world, degrees = LAYOUTS[layout]
    found = pool.run(world, run, assets, tmp_path, degrees)[0]
    assert apart(tmp_path, found, expected("one", {"checkpoint__every": 3})) < 1e-6


EVA = {"kind": "lora", "target_modules": ["q_proj", "down_proj"], "params": {"r": 3, "alpha": 8, "init_lora_weights": "eva"}}
ADALORA = {"kind": "adalora", "target_modules": "all-linear", "params": {"init_r": 4, "target_r": 2, "alpha": 8}}
CASES = {
    "packed": ("fsdp2_cp2", {**PACKED, "train__activation_checkpointing": True}),
    "packed gather": ("cp2", {**PACKED, "parallel__cp_attention": "gather"}),
    "eva": ("cp2", {"peft": EVA}),
    "adalora": ("cp2_tp2", {"peft": ADALORA}),
    "embeddings": ("fsdp2_cp2", {"peft": {"kind": "dora", "target_modules": ["embed_tokens", "v_proj"], "params": {"r": 2, "alpha": 4}}}),
    "head": ("cp2", {"peft": {"kind": "lora", "target_modules": ["lm_head"], "params": {"r": 2, "dropout": 0.2}}, "train__steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_run_may_ask_for(pool, assets, expected, tmp_path, case):
    layout, settings = CASES[case]
    world, degrees = LAYOUTS[layout]
    alone = {k: v for k, v in settings.items() if not k.startswith("parallel")}
    one = expected(str(alone), alone)
    found = pool.run(world, run, assets, tmp_path, {**degrees, **settings})[0]
    assert apart(tmp_path, found, one) < 1e-6


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}
EXPERTS = {"kind": "lora", "target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def test_experts_take_the_tokens_that_are_here(pool, tmp_path):
    """Routing is of each token alone; masks of adapters on experts would follow the router's order, and are refused."""
    assets = make_assets(tmp_path / "assets", "qwen3_moe", **MOE)
    settings = {"peft": {**EXPERTS, "params": {"r": 4, "alpha": 8}}, "train__steps": 4}
    one = tmp_path / "one", pool.run(1, run, assets, tmp_path / "one", settings)[0]
    world, degrees = LAYOUTS["cp2_tp2"]
    assert apart(tmp_path / "cp2", pool.run(world, run, assets, tmp_path / "cp2", {**degrees, **settings})[0], one) < 1e-6
    drops = {"peft": {**EXPERTS, "params": {"r": 4, "alpha": 8, "dropout": 0.1}}}
    with pytest.raises(RankFailed, match="dropout on adapted experts"):
        pool.run(2, run, assets, tmp_path / "drops", {**CP, **drops})


def test_a_checkpoint_resumes_on_other_layouts(pool, assets, expected, tmp_path):
    """Saved at step 3 where rows are shared; goes on on one process, and where more shares them; and back."""
    one = expected("one", {"checkpoint__every": 3})
    world, degrees = LAYOUTS["fsdp2_cp2"]
    pool.run(world, run, assets, tmp_path, {**degrees, "train__steps": 6, "checkpoint__every": 3})
    for layout, (world, degrees) in {"one": (1, {}), "cp2_tp2": LAYOUTS["cp2_tp2"]}.items():
        start = tmp_path / "checkpoints" / "step_00000003" if layout == "one" else one[0] / "checkpoints" / "step_00000003"
        summary = pool.run(world, run, assets, tmp_path / layout, {**degrees, "checkpoint__resume": str(start)})[0]
        assert max(abs(a / b - 1) for a, b in zip(losses(summary), losses(one[1])[3:], strict=True)) < 1e-6


def right_rows(rank, assets, output):
    """Two rows that count up, by what says the next number; the second row has another one near its end. With the sum and without."""
    config = config_of(assets, output, **CP)
    trainer = Trainer(config, join(device_of("cpu"), config.parallel, 60))
    ids = torch.stack([torch.arange(12), 20 + torch.arange(12)])
    labels = torch.where(ids == 30, 99, ids)
    batch = MicroBatch(ids, labels, torch.arange(12).repeat(2, 1), 0, 0)

    def counts_up(input_ids, logits_to_keep=slice(None), **_):
        return one_hot(input_ids + 1, 100)[:, logits_to_keep].double()

    trainer.model.eval()
    found = [int(n) for n in trainer.loss(batch, counts_up)[1:]]
    trainer.built.context.sum = lambda rows: rows
    return found, [int(n) for n in trainer.loss(batch, counts_up)[1:]]


def test_a_row_is_right_where_all_its_parts_are(pool, assets, tmp_path):
    found, mutated = zip(*pool.run(2, right_rows, assets, tmp_path), strict=True)
    assert found == ([1, 2], [1, 2])
    assert mutated == ([1, 2], [2, 2])  # the second rank has the middle chunks, where all is right


@pytest.mark.parametrize(
    "settings,told",
    [
        ({**CP, "parallel__pp": 2}, "cp cannot go with parallel.pp"),
        ({"parallel__cp_attention": "gather"}, "needs parallel.cp > 1"),
        ({**CP, "train__compile": True}, "train.compile with parallel.cp"),
        ({**CP, "model__attention": "eager"}, "with model.attention=sdpa"),
        ({**CP, "parallel__cp_attention": "ring", "data__packing": True}, "keeps no packed documents apart"),
    ],
)
def test_what_is_not_proven_is_refused(assets, tmp_path, settings, told):
    with pytest.raises(ValueError, match=told):
        config_of(assets, tmp_path, **settings).parallel.resolved(4)
