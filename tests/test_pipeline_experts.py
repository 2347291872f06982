"""A pipeline of a mixture is the run of one process: losses, every gradient, weights and files; shared out or not, in fp64 and fp32."""

import pytest

from d9d_lora.plan.rehearsal import ledger_of
from tests.counted import trainer_of
from tests.small_run import make_assets
from tests.traced import Ones, alike, traced

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
LAYERS = ["q_proj", "o_proj", "down_proj"]
PEFT = {"kind": "lora", "target_modules": LAYERS, "target_parameters": STACKS, "params": {"r": 2, "alpha": 8, "dropout": 0.1}}
SHORT = {"peft": PEFT, "train__steps": 2, "data__eval_fraction": 0.0}
SHAPE = {"num_experts_per_tok": 2, "head_dim": 8}
FAMILIES = {  # Qwen's first block is dense, and its embeddings are tied to its head, which the first and the last stage hold
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0], "num_hidden_layers": 3, **SHAPE},
    "mixtral": {"num_local_experts": 4, "tie_word_embeddings": False, **SHAPE},
}
SCHEDULES = {
    "1f1b": {"parallel__pp": 2},
    "gpipe": {"parallel__pp": 2, "parallel__schedule": "gpipe"},
    "zero_bubble": {"parallel__pp": 2, "parallel__schedule": "zero_bubble"},
    "interleaved": {"parallel__pp": 2, "parallel__schedule": "interleaved_1f1b", "parallel__stages_per_rank": 2},
    "zbv": {"parallel__pp": 2, "parallel__schedule": "zbv", "parallel__stages_per_rank": 2},
}
DEEP = ("interleaved", "zbv")  # of four layers
SHARD, WHOLE, RECOMPUTED = {"parallel__adapters": "shard"}, {"parallel__adapters": "replicate"}, {"train__activation_checkpointing": True}
REPLICAS, TP, EP = {"parallel__dp_replicate": 2}, {"parallel__tp": 2}, {"parallel__ep": 2}
OF_ONE_PROCESS = {"model__dtype": "float32", "data__eval_fraction": 0.1}  # what one process is told too
FP32, EVALUATED = ({k: v} for k, v in OF_ONE_PROCESS.items())
CASES = [
    # ranks; those that schedule and degrees leave are FSDP2's
    ("qwen3_moe", 2, "interleaved", EVALUATED),
    ("qwen3_moe", 4, "zbv", SHARD),
    ("qwen3_moe", 4, "1f1b", REPLICAS),
    ("qwen3_moe", 8, "gpipe", {**TP, **SHARD}),
    ("qwen3_moe", 4, "interleaved", {**EP, **FP32}),
    ("qwen3_moe", 8, "zero_bubble", {**EP, **TP}),
    ("mixtral", 2, "zero_bubble", {}),
    ("mixtral", 4, "gpipe", WHOLE),
    ("mixtral", 4, "interleaved", {**REPLICAS, **SHARD}),
    ("mixtral", 8, "1f1b", {**TP, **RECOMPUTED}),
    ("mixtral", 2, "gpipe", FP32),
    ("mixtral", 4, "zbv", {**EP, **SHARD, **RECOMPUTED}),
    ("mixtral", 4, "gpipe", {**EP, **EVALUATED}),
]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """By family and whether it is deep."""
    deep = {"num_hidden_layers": 4}
    cells = [(family, fields | (deep if d else {}), d) for family, fields in FAMILIES.items() for d in (False, True)]
    return {(family, d): make_assets(tmp_path_factory.mktemp(family), family, **fields) for family, fields, d in cells}


@pytest.fixture(scope="module")
def one(pool, tmp_path_factory):
    return Ones(pool, tmp_path_factory)


def named(value):
    return " ".join(f"{k.rpartition('__')[2]}={v}" for k, v in value.items()) or "alone" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("family,world,schedule,options", CASES, ids=named)
def test_a_pipeline_of_a_mixture_is_as_one_process(pool, assets, one, tmp_path, family, world, schedule, options):
    model, fp32 = assets[family, schedule in DEEP], options.keys() & FP32.keys()
    ranks = pool.run(world, traced, model, tmp_path, {**SHORT, **SCHEDULES[schedule], **options})
    expected = one(model, {**SHORT, **{k: v for k, v in options.items() if k in OF_ONE_PROCESS}})
    tolerances = {"tolerance": 1e-5, "tensors": 1e-3} if fp32 else {"tensors": 1e-6}  # of routers transformers computes a part in fp32
    alike(tmp_path, ranks, expected, **tolerances)
    assert all(r["grouped"] == bool(fp32) for r in ranks), "torch's product in fp32, the loop in fp64"


# -- collectives ----------------------------------------------------------------------------------------------------------------------

ENDS = {"kind": "full_tune", "module_name_pattern": "model.embed_tokens|model.norm"}  # so that gradients go through all of a frozen base


def collectives(rank, assets, output, layout, adapters):
    """A step's, by (whether of the sum that follows, axis, kind): (numbers, bytes)."""
    peft = {"kind": "stack", "methods": [*[PEFT] * adapters, ENDS]}
    trainer, _ = trainer_of(assets, output, {**SHORT, **layout, "peft": peft}, row=24)
    trainer.train_step()
    with ledger_of(trainer) as ledger:
        reduce, clip = trainer.built.sum.reduce, trainer._clip

        def summed():
            ledger.phase = "sum"
            reduce()

        def clipped():
            ledger.phase = "after"
            return clip()

        ledger.phase, trainer.built.sum.reduce, trainer._clip = "step", summed, clipped
        trainer.train_step()
    return [{k: n for k, n in found.items() if k[0] != "after"} for found in (ledger.count, ledger.traffic)]


@pytest.mark.parametrize("axis,options,kind", [("ep", EP, "all_to_all"), ("tp", TP, "all_reduce")])
def test_adapters_add_one_sum_a_step_and_nothing_else(pool, assets, tmp_path, axis, options, kind):
    layout = {**SCHEDULES["1f1b"], **options}
    frozen, adapted = (pool.run(4, collectives, assets["mixtral", False], tmp_path, layout, n) for n in (0, 1))
    for bare, ours in zip(frozen, adapted, strict=True):
        for less, more in zip(bare, ours, strict=True):
            assert {k: n for k, n in less.items() if k[0] == "step"} == {k: n for k, n in more.items() if k[0] == "step"}
        assert ours[0]["step", axis, kind] > 0
        assert ours[0]["step", "pp", "send"] == (4 if axis == "ep" else 8), "hidden states or gradients of each microbatch"
        assert sum(n for k, n in ours[0].items() if k[0] == "sum") == 1
