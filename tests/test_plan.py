"""A plan is what a run then costs: rehearsals on fake ranks against the trainer on real ones, byte for byte."""

import json
from collections import Counter
from statistics import median
from unittest import mock

import pytest
import torch
from transformers import AutoConfig

from d9d_lora.placement import local_of
from d9d_lora.plan.ledger import Ledger
from d9d_lora.plan.main import main
from d9d_lora.plan.rehearsal import Rehearsal, depth_of, fake_world, ledger_of, of_shape, rehearse
from d9d_lora.train import replicated
from tests.counted import even_routers, held_by, let_go, mixture, of_experts, trainer_of
from tests.small_run import config_of, make_assets

ROW = 24
STEPS = 6
EXACT = ("base", "adapters", "gradients", "optimiser", "unit", "read", "step")
RESIZE = torch.UntypedStorage.resize_
LAYOUTS = {
    "hsdp2x2_sharded": (4, {"parallel__dp_replicate": 2, "parallel__adapters": "shard", "model__dtype": "bfloat16"}),  # mixed groups
    "hsdp2x2": (4, {"parallel__dp_replicate": 2}),
    "tp2_sp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "tp2_rank_space": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True, "parallel__column": "rank_space"}),
    "fsdp2_cp2": (4, {"parallel__cp": 2, "parallel__adapters": "shard"}),
    "cp2_tp2_recomputed": (4, {"parallel__cp": 2, "parallel__tp": 2, "train__activation_checkpointing": True}),
    "fsdp2_tp2_recomputed": (4, {"parallel__tp": 2, "train__activation_checkpointing": True}),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


def really(rank, assets, output, overrides):
    """What the plan tells, counted in the steps of a real trainer."""
    trainer, read = trainer_of(assets, output, overrides, ROW)
    found = {"read": read}
    with ledger_of(trainer) as ledger:
        loss, reduce = trainer.loss, trainer.built.sum.reduce

        def forward(batch):
            let_go()
            ledger.phase, before = "forward", ledger.live - ledger.gathered
            result = loss(batch)
            let_go()
            kept.append(ledger.live - ledger.gathered - before)
            ledger.phase = "backward"
            return result

        def together():
            ledger.phase = "sum"
            reduce()
            found["gradients"] = sum(local_of(p.grad).nbytes for p in trainer.params.values())
            peaks.append(ledger.peak - start)
            found["unit"] = ledger.largest
            ledger.phase = "after"

        trainer.loss, trainer.built.sum.reduce = forward, together
        kept: list[int] = []
        peaks: list[int] = []
        for _ in range(STEPS):
            let_go(cycles=True)
            ledger.mark()
            start = ledger.live
            trainer.train_step()
    held = held_by(trainer)
    # The first step makes the optimiser's state. A thread of gloo that is late all the same adds to a peak, and to either end of a forward.
    found |= {**held, "kept": median(kept[1:]), "peak": min(peaks[1:]) + sum(held.values())}
    found["step"] = Counter({k: v for k, v in ledger.traffic.items() if k[0] != "after"})
    found["count"] = {k: v / trainer.batches.accumulation for k, v in ledger.count.items() if k[0] in ("forward", "backward")}
    found["once"] = sum(v for k, v in ledger.count.items() if k[0] == "sum")
    return found


def as_really(pool, assets, output, overrides, *, run=really):
    """The plan of a run on four ranks that is, to the byte, what the run then costs: all but what a forward keeps and the peak."""
    real = pool.run(4, run, assets, output, overrides)[0]
    config, shape = config_of(assets, output, **overrides), AutoConfig.from_pretrained(assets / "model")
    plan = rehearse(config, shape, 4, ROW, None)
    for name in EXACT:
        assert getattr(plan, name) == real[name], name
    assert plan.paper == plan.one
    return plan


def test_the_ledger_adds_up():
    with Ledger(None) as ledger:
        kept = torch.ones(100)
        ledger.mark()
        freed = kept + 1
        assert (ledger.live, ledger.peak, ledger.gathered) == (800, 800, 0)
        kept.view(10, 10)
        assert ledger.live == 800
        del freed
        assert (ledger.live, ledger.peak) == (400, 800)
        kept.untyped_storage().resize_(0)
        assert (ledger.live, ledger.gathered) == (0, 0)
        kept.untyped_storage().resize_(1000)
        assert (ledger.live, ledger.peak, ledger.gathered) == (1000, 1000, 1000)
    assert torch.UntypedStorage.resize_ is RESIZE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rehearsal_counts_what_a_real_run_does(pool, assets, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    real = pool.run(world, really, assets, tmp_path, overrides)[0]
    config = config_of(assets, tmp_path, **overrides)
    shape = AutoConfig.from_pretrained(assets / "model")
    plan = rehearse(config, shape, world, ROW, depth_of(config, shape))
    for name in EXACT:
        assert getattr(plan, name) == real[name], name
    one = ROW * shape.hidden_size * 8 if config.train.activation_checkpointing else 0  # one hidden state more is there
    for name in ("kept", "peak"):
        assert getattr(plan, name) == pytest.approx(real[name], abs=one + 64, rel=0), name
    if not config.parallel.sequence_parallel:
        assert plan.paper == plan.one
    if plan.replicated or config.parallel.adapters == "shard":  # blocks come for a forward and a backward, the root once a step
        blocks = shape.num_hidden_layers
        assert real["count"]["forward", "dp_shard", "all_gather"] == blocks + 1 / plan.accumulation
        assert real["count"]["backward", "dp_shard", "all_gather"] == blocks
        scatters = real["count"].get(("backward", "dp_shard", "reduce_scatter"), 0) * plan.accumulation
        assert (scatters, real["once"]) == ((0, 1 + (config.parallel.tp > 1)) if plan.replicated else (blocks, 0))


def test_a_rehearsal_of_experts_under_tensor_parallelism(pool, tmp_path):
    as_really(pool, mixture(tmp_path), tmp_path, {"parallel__tp": 2, **of_experts("float32")})


def evenly(rank, *args):
    with even_routers():
        return really(rank, *args)


SHARED_OUT = {
    "sharded, one outer factor": (
        "bfloat16",
        {"parallel__adapters": "shard", "train__activation_checkpointing": True},
        {"experts_shared_outer": True},
    ),
    "tp": ("float64", {"parallel__tp": 2}, {}),
}


@pytest.mark.parametrize("case", SHARED_OUT)
def test_a_rehearsal_of_experts_that_are_shared_out(pool, tmp_path, case):
    dtype, options, params = SHARED_OUT[case]
    plan = as_really(pool, mixture(tmp_path), tmp_path, {"parallel__ep": 2, **of_experts(dtype, **params), **options}, run=evenly)
    assert plan.one["forward", "ep", "all_to_all"] > 0


def test_a_few_blocks_tell_of_many(assets, tmp_path):
    shape = AutoConfig.from_pretrained(assets / "model", num_hidden_layers=5, layer_types=None)
    config = config_of(assets, tmp_path, parallel__tp=2)
    assert depth_of(config, shape) == 5
    with of_shape(config, shape, 4) as four, fake_world(4, config.parallel) as world:
        choice = Rehearsal(four, world).built.choice
    with mock.patch.object(replicated, "MOST", replicated.KEPT * (choice.whole - choice.cut)):  # enough for the four that are rehearsed
        few = rehearse(config, shape, 4, ROW, 5)
        assert few == rehearse(config, shape, 4, ROW, None)
        assert not few.replicated


def test_whole_adapters_never_move_more_and_sharded_ones_without_padding(assets, tmp_path):
    shape = AutoConfig.from_pretrained(assets / "model")
    peft = {"kind": "lora", "target_modules": ["q_proj", "down_proj"], "params": {"r": 3}}
    flags = 4 * 8  # a number for each of eight factors
    ranks, replicas = 16, 2
    options = {"peft": peft, "parallel__dp_replicate": replicas, "data__batch_size": ranks, "model__dtype": "float32"}
    both = [config_of(assets, tmp_path, parallel__adapters=a, **options) for a in ("shard", "replicate")]
    shard, whole = (rehearse(config, shape, ranks, ROW, None) for config in both)
    # three rows on eight shards: `lora_A` is cut along its columns, which eight divides, and lora_B [24, 3] along its rows
    assert shard.one["backward", "dp_shard", "reduce_scatter"] == shard.whole == 8 * shard.cut
    assert whole.one["sum", "dp", "all_reduce"] == whole.whole + flags
    ring = {"dp": ranks, "dp_replicate": replicas, "dp_shard": ranks // replicas}
    sent = [sum(v * (1 + (k[2] == "all_reduce")) * (ring[k[1]] - 1) / ring[k[1]] for k, v in p.one.items()) for p in (shard, whole)]
    less = whole.whole * 7 / 8 - 2 * flags * 15 / 16  # T (n - 1) / n, as design note 7 has it
    assert sent[0] - sent[1] == pytest.approx(less)
    assert (whole.adapters, whole.gradients, whole.optimiser) == (whole.whole, whole.whole, 2 * whole.whole)
    assert (shard.adapters, shard.gradients, shard.optimiser) == (shard.cut, shard.cut, 2 * shard.cut)


def test_blocks_that_differ_are_all_run(assets, tmp_path):
    shape = AutoConfig.from_pretrained(assets / "model", num_hidden_layers=5, layer_types=None)
    targets = {"kind": "lora", "target_modules": ["q_proj"], "layers_to_transform": [0, 4], "params": {"r": 4}}
    config = config_of(assets, tmp_path, peft=targets)
    assert depth_of(config, shape) is None
    some, all_ = (rehearse(c, shape, 2, ROW, None).adapter_elements for c in (config, config_of(assets, tmp_path)))
    assert 0 < some < all_


# -- the command ----------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_table_samples_and_refusals(assets, tmp_path, capsys):
    model, data = f"model.path={assets}/model", f"data.path={assets}/data.jsonl"
    output = ",".join(f"{tmp_path}/p.{suffix}" for suffix in ("md", "json", "png"))
    assert main([model, data, "parallel.tp=2", "ranks=4,6,3", "data.batch_size=8", f"output={output}"]) == 0
    out = capsys.readouterr().out
    assert "【 paris<|eos|>】" in out
    assert "rows of 8 tokens" in out
    assert "to the byte" in out
    assert "does not fit: 6 ranks: batch_size=8 must be divisible by" in out
    assert "does not fit: 3 ranks: parallel: dp_replicate 1 x dp_shard (the rest) x tp 2" in out
    (found,) = json.loads((tmp_path / "p.json").read_text())
    assert found["ranks"] == 4
    assert found["one"]["forward dp_shard all_gather"] > 0
    assert "| memory: peak, all of it | counted |" in (tmp_path / "p.md").read_text()
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["shape=llama3-8b", "parallel.tp=16", "ranks=16"], "parallel.tp=16 does not divide num_key_value_heads=8 of this model"),
        (["shape=llama3-9b"], "shape=llama3-9b: known are llama3-8b"),
        (["shape=llama3-8b", "ranks=8,x"], "expected whole numbers"),
        (["shape=llama3-8b", "output=plan.txt"], "ends in one of .md"),
        (["shape=llama3-8b", "peft.params.rank=8"], "rank"),
        (["ranks=8"], "these have no value: model.path"),
        (["shape=llama3-8b", "peft.params.init_lora_weights=eva"], "follow from the data"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_sentence(arguments, sentence, capsys):
    assert main(arguments) == 1
    assert sentence in capsys.readouterr().err
