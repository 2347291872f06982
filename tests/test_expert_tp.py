"""Tensor parallelism inside experts, by the model's own plan: against one process."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from d9d_lora import expert_styles, inject_peft_and_freeze, merge_peft
from d9d_lora.boxes import axes_in_blocks, index_of, shard
from d9d_lora.layers import grouped
from d9d_lora.layers.experts import AdaptedExperts
from d9d_lora.measure import traffic
from d9d_lora.placement import full_of, local_of
from d9d_lora.registry import peft_method_from_config
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.sums import ReplicatedSum
from d9d_lora.train import model as models
from d9d_lora.train.config import ModelConfig, ParallelConfig
from d9d_lora.train.tensor_parallel import apply_tensor_parallel
from d9d_lora.train.world import World, join
from d9d_lora.walk import adapted_layers, clock_of
from tests.pool import RankFailed
from tests.small_run import losses, make_assets, run
from tests.test_experts import FAMILIES, IDS, MIX, SHAPE, STACKS, model_of
from tests.test_laws import wake

ONE = World(0, 1, torch.device("cpu"), ParallelConfig(dp_shard=1), None)
PEFT = {"kind": "lora", "target_modules": "all-linear", "target_parameters": STACKS, "params": {"r": 3, "alpha": 6, "dropout": 0.1}}
ROUTERS = {**PEFT, "modules_to_save": ["mlp.gate"]}
TP2, FSDP2_TP2 = ParallelConfig(tp=2, dp_shard=1), ParallelConfig(tp=2, dp_shard=2)
SEQUENCE = ParallelConfig(tp=2, dp_shard=1, sequence_parallel=True)
ALMOST = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a gradient's largest value; transformers keeps norms and routers in fp32


def loaded(directory, world, dtype, peft=ROUTERS):
    base = models.open_model(ModelConfig(path=str(directory)), dtype)
    if world.parallel.tp > 1:
        apply_tensor_parallel(base, world.mesh["tp"], sequence=world.parallel.sequence_parallel)
    method = peft_method_from_config(peft)
    mapper = inject_peft_and_freeze(method, base.module)
    if world.dp_size > 1:
        models.apply_data_parallel(base.module, world.mesh, world.parallel)
    models.materialise(base, torch.device("cpu"))
    models.load(base, mapper, ModelConfig(path=str(directory)))
    method.initialise(base.module)
    wake(base.module)
    return method, base


def one_step(model):
    clock_of(model).set(7)
    ids = IDS[:, :6]  # two ranks share them
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def differences(directory, parallel, dtype):
    """How far a layout is from one process, in gradients: the largest over their largest values, by name. Ranks have one batch."""
    world = join(torch.device("cpu"), parallel, 60)
    (_, base), (method, parallel_base) = (loaded(directory, where, dtype) for where in (ONE, world))
    one, many = base.module, parallel_base.module
    expected, found = one_step(one), one_step(many)
    if parallel.sequence_parallel:
        trained = [m.get_parameter(leaf) for m, leaf in parallel_base.in_parts if m.get_parameter(leaf).requires_grad]
        assert len(trained) == 2, "the routers"
        for p in trained:
            dist.all_reduce(p.grad, group=world.mesh["tp"].get_group())
    assert expected[1].keys() == found[1].keys()
    assert all(float(g.abs().max()) > 1e-9 for g in expected[1].values())
    apart = {n: float((full_of(found[1][n]) / world.dp_size - g).abs().max() / g.abs().max()) for n, g in expected[1].items()}
    return {"loss": abs(found[0] - expected[0]), **apart}, one, many, method


def as_one(rank, directory, parallel, dtype):
    apart, one, many, method = differences(directory, parallel, dtype)
    assert max(apart.values()) < ALMOST[dtype], apart
    stack = next(layer for layer in adapted_layers(many) if type(layer) is AdaptedExperts)
    assert str(stack.placing) == "column / 2"
    for p in (stack.base.weight, stack.lora_B.weight):
        assert axes_in_blocks(p)
        assert torch.equal(full_of(p)[index_of(p)], local_of(p))
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(full_of(q), p), name
    files = {}
    for name, model in (("one", one), ("many", many)):  # the same bytes, each read by the other
        save_adapter(model, directory / name)
        files[name] = (directory / name / "adapter_model.safetensors").read_bytes()
    assert files["one"] == files["many"]
    for factor in (p for p in many.parameters() if p.requires_grad):
        local_of(factor.detach()).zero_()
    load_adapter_weights(many, directory / "one")
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(full_of(q), p), name
    merge_peft(method, many)
    merge_peft(method, one)
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        assert float((full_of(q) - p).abs().max()) < 1e-6, name


CELLS = [
    ("qwen3_moe", TP2, torch.float64),
    ("deepseek_v3", TP2, torch.float64),
    ("qwen2_moe", TP2, torch.float64),
    ("mixtral", SEQUENCE, torch.float64),
    ("mixtral", FSDP2_TP2, torch.float64),
    ("qwen3_moe", FSDP2_TP2, torch.float32),
]


@pytest.mark.parametrize("family,parallel,dtype", CELLS)
def test_a_layout_is_one_process(pool, tmp_path, monkeypatch, family, parallel, dtype):
    monkeypatch.setitem(FAMILIES, "qwen2_moe", ("qwen2_moe", {**SHAPE, **MIX, "shared_expert_intermediate_size": 8}))
    if dtype == torch.float32:  # rows of 16 bytes on each rank: torch's grouped product
        monkeypatch.setitem(FAMILIES, family, (family, {**FAMILIES[family][1], "moe_intermediate_size": 16}))
    model_of(family, torch.float32).save_pretrained(tmp_path)
    pool.run(parallel.tp * parallel.dp_shard, as_one, tmp_path, parallel, dtype)


def mutated(rank, directory):
    def completed_early(self, h, base):
        y = base()
        y = expert_styles._sum(y, self.placing.mesh.get_group()) if self.placing.letter == "I" else y
        return y + self.update(h, self.parts(h.x.dtype, parts=True))

    cut = dict(expert_styles._CUT)
    mutants = {
        "gate and up in halves": [(expert_styles._CUT, "packed_colwise", ("O", 1))],
        "completed before the adapter": [
            (grouped.AdaptedProduct, "adapted", completed_early),
            (expert_styles._Complete, "forward", staticmethod(lambda ctx, y, group: y.clone())),
        ],
        "no sum at the door": [(expert_styles._Door, "backward", staticmethod(lambda ctx, dx, dp: (dx, dp, None)))],
        "the sum of replicated factors left out": [(grouped.AdaptedProduct, "in_parts", lambda self: False)],
    }
    for name, changes in mutants.items():
        kept = []
        for owner, key, value in changes:
            if isinstance(owner, dict):
                owner[key] = value
            else:
                kept.append((owner, key, owner.__dict__.get(key)))
                setattr(owner, key, value)
        try:
            apart = differences(directory, TP2, torch.float64)[0]
        finally:
            expert_styles._CUT.update(cut)
            for owner, key, value in kept:
                delattr(owner, key) if value is None else setattr(owner, key, value)
        assert max(apart.values()) > 1e-3, name


def test_mutations(pool, tmp_path):
    model_of("qwen3_moe", torch.float32).save_pretrained(tmp_path)
    pool.run(2, mutated, tmp_path)


def counted(rank):
    world = join(torch.device("cpu"), TP2, 60)
    found = []
    for adapted in (False, True):
        base = models.Base(model_of("qwen3_moe", torch.float32), None)
        apply_tensor_parallel(base, world.mesh["tp"], sequence=False)
        if adapted:
            inject_peft_and_freeze(peft_method_from_config(PEFT), base.module)
            ReplicatedSum(adapted_layers(base.module))
        base.module.model.embed_tokens.weight.requires_grad_(True)
        with traffic() as forward:
            loss = base.module(input_ids=IDS, labels=IDS, use_cache=False).loss
        with traffic() as backward:
            loss.backward()
        found.append((dict(forward), dict(forward.count), dict(backward), dict(backward.count)))
    assert found[0] == found[1], "adapters add no collective"
    forward, n, backward, m = found[0]
    tokens, blocks, hidden, top_k = IDS.numel(), 2, 16, 2
    assert (n["all_reduce"], m["all_reduce"]) == (1 + 2 * blocks, 1 + 2 * blocks), "the embedding or the head, then attention and experts"
    assert forward["all_reduce"] == 4 * tokens * hidden * (1 + 2 * blocks)
    assert backward["all_reduce"] == 4 * tokens * (hidden * (1 + 2 * blocks) + top_k * blocks)


def test_collectives_are_the_bases(pool):
    pool.run(2, counted)


RUN = {"peft": {**PEFT, "params": {"r": 4, "alpha": 8, "dropout": 0.1}}, "train__steps": 3, "checkpoint__every": 2}
LAYOUTS = {
    "fsdp2_tp2": (4, {"parallel": {"tp": 2}}),
    "tp2_sp": (2, {"parallel": {"tp": 2, "sequence_parallel": True}, "checkpoint__every": 0}),
}


@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory):
    """(assets, a run in one process, its adapter)"""
    root = tmp_path_factory.mktemp("mixture")
    assets = make_assets(root, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=6)
    summary = pool.run(1, run, assets, root / "one", RUN)[0]
    return assets, losses(summary), load_file(root / "one" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_that_of_one_process(pool, tmp_path, whole, layout):
    """The trainer; the checkpoint of FSDP2 2 x tensor parallel 2 then goes on in one process."""
    assets, expected, adapter = whole
    world, changes = LAYOUTS[layout]
    for a, b in zip(losses(pool.run(world, run, assets, tmp_path / "many", {**RUN, **changes})[0]), expected, strict=True):
        assert abs(a - b) < 1e-6 * abs(b)
    written = [tmp_path / "many"]
    if layout == "fsdp2_tp2":
        resumed = {**RUN, "checkpoint__resume": str(tmp_path / "many" / "checkpoints" / "step_00000002")}
        pool.run(1, run, assets, tmp_path / "goes on", resumed)
        written.append(tmp_path / "goes on")
    for output in written:
        found = load_file(output / "adapter" / "adapter_model.safetensors")
        assert found.keys() == adapter.keys()
        assert all((found[k] - t).abs().max() < 1e-5 for k, t in adapter.items())


def test_masks_of_rows_that_are_padded_are_refused(pool, tmp_path, whole):
    told = "rows are padded to a multiple of 2 tokens.*give a data.seq_len that is a multiple of 2"
    with pytest.raises(RankFailed, match=told):
        pool.run(2, run, whole[0], tmp_path, {**RUN, **LAYOUTS["tp2_sp"][1], "data__seq_len": 31})


def test_what_is_not_proven_is_refused():
    model = model_of("qwen3_moe", torch.float32)
    with pytest.raises(ValueError, match=r"its experts are 12 wide, which 5 ranks cannot share; degrees that can: \[1, 2, 3, 4, 6, 12\]"):
        expert_styles.expert_styles(model, model._tp_plan, 5)
    found, settled = expert_styles.expert_styles(model, model._tp_plan, 2)
    assert len(found) == 2
    assert {name.rpartition(".")[2] for name in settled} == {"experts", "gate_up_proj", "down_proj"}
    oss = model_of("gpt_oss", torch.float32)
    plan = {"model.layers.*.mlp.experts": "moe_tp_experts", "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise"}
    with pytest.raises(ValueError, match=r"says .*down_proj.* of its stacks"):
        expert_styles.expert_styles(oss, plan, 2)
    with pytest.raises(ValueError, match="experts with biases"):
        expert_styles.expert_styles(oss, {**plan, "model.layers.*.mlp.experts.down_proj": "rowwise"}, 2)


def test_sequence_parallelism_beside_shared_out_experts_is_refused():
    with pytest.raises(ValueError, match=r"parallel.ep=2 with parallel.sequence_parallel: not proven yet"):
        ParallelConfig(tp=2, ep=2, dp_shard=2, sequence_parallel=True).resolved(4)


def dora_on_parts(rank):
    world = join(torch.device("cpu"), TP2, 60)
    base = models.Base(model_of("qwen3_moe", torch.float32), None)
    shared = models.Base(model_of("deepseek_v3", torch.float32), None)
    with pytest.raises(ValueError, match="beside its experts, and the parts of sums in a mixture of shards"):
        apply_tensor_parallel(shared, world.mesh["tp"], sequence=True)
    apply_tensor_parallel(base, world.mesh["tp"], sequence=False)
    for params in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match="tensor parallelism shares out the rows or columns of each expert"):
            inject_peft_and_freeze(peft_method_from_config({**PEFT, "params": {"r": 2, **params}}), base.module)
    assert not list(adapted_layers(base.module))
    with pytest.raises(ValueError, match="which 2 ranks cannot share evenly"):
        expert_styles.cut(nn.Parameter(torch.zeros(6, 2)), world.mesh["tp"], shard(0, 2))


def test_what_is_not_proven_is_refused_on_ranks(pool):
    pool.run(2, dora_on_parts)
