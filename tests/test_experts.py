"""Experts of transformers models: adapters beside grouped products, against W + dW in the model's own code, in fp64."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from d9d_lora import inject_peft_and_freeze, merge_peft, unmerge_peft
from d9d_lora.layers import experts
from d9d_lora.layers.experts import AdaptedExperts
from d9d_lora.layers.parameter import AdaptedStack
from d9d_lora.measure import saved_bytes
from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.placement import full_of
from d9d_lora.registry import peft_method_from_config
from d9d_lora.state.mappers import ModelStateMapperStack
from d9d_lora.train import model as models
from d9d_lora.train.config import ModelConfig, ParallelConfig
from d9d_lora.train.report import census, console, show_census
from d9d_lora.train.trainer import Trainer
from d9d_lora.train.world import World, join
from d9d_lora.walk import adapted_layers
from tests.small_run import config_of, losses, make_assets, run
from tests.test_laws import wake

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
MIX = {"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12, "moe_intermediate_size": 12}
DEEPSEEK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 20}
DEEPSEEK |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 2, "topk_group": 1}
DEEPSEEK |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 6, "q_lora_rank": 6}
DEEPSEEK |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
FAMILIES = {
    "qwen3_moe": ("qwen3_moe", {**SHAPE, **MIX, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {**SHAPE, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "gpt_oss": ("gpt_oss", {**SHAPE, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12}),
}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(14).view(2, 7)


def model_of(family, dtype=torch.float64):
    kind, fields = FAMILIES[family]
    torch.manual_seed(3)
    config = CONFIG_MAPPING[kind](vocab_size=67, bos_token_id=0, eos_token_id=1, pad_token_id=None, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def adapt(model, **changes):
    params = {"r": 3, "alpha": 6, **changes.pop("params", {})}
    method = peft_method_from_config({"kind": "lora", "target_parameters": STACKS, "params": params, **changes})
    inject_peft_and_freeze(method, model)
    method.initialise(model)
    return method


def loss_and_gradients(model):
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def as_one_sum(family, monkeypatch, **changes):
    """The same model with W + dW built for the model's own loop over experts."""
    model = model_of(family)
    with monkeypatch.context() as m:
        m.setattr(experts.AdaptedExperts, "fits", classmethod(lambda cls, module: False))
        adapt(model, **changes)
    model.set_experts_implementation("eager")
    assert all(type(layer) is AdaptedStack for layer in adapted_layers(model))
    return model


CASES = {
    "lora": {},
    "dora": {"params": {"use_dora": True}},
    "gate and up apart": {"target_parameters": STACKS[:1], "params": {"enable_lora": [True, True]}},
    "pissa": {"params": {"init_lora_weights": "pissa"}},
    "only down": {"target_parameters": STACKS[1:]},
    "one outer factor": {"params": {"experts_shared_outer": True}},
}


CELLS = [(f, "lora") for f in FAMILIES] + [("qwen3_moe", c) for c in list(CASES)[1:]] + [("gpt_oss", "dora")]


@pytest.mark.parametrize("family,case", CELLS)
def test_loss_and_gradients_are_those_of_the_sum(family, case, monkeypatch):
    changes = CASES[case]
    if "target_parameters" in changes:
        monkeypatch.setattr("tests.test_experts.STACKS", changes["target_parameters"])
        changes = {k: v for k, v in changes.items() if k != "target_parameters"}
    dense = as_one_sum(family, monkeypatch, **changes)
    model = model_of(family)
    adapt(model, **changes)
    assert all(type(layer) is AdaptedExperts for layer in adapted_layers(model))
    wake(dense), wake(model)
    monkeypatch.setattr(GroupedDelta, "dense", None)  # no dW is built
    found = loss_and_gradients(model)
    monkeypatch.undo()
    expected = loss_and_gradients(dense)
    assert abs(found[0] - expected[0]) < 1e-10
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    for name, g in expected[1].items():
        assert float(g.abs().max()) > 1e-6, f"{name} is dead"
        assert float((found[1][name] - g).abs().max() / g.abs().max()) < 1e-9, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_merging_and_removal_leave_the_model(family):
    model = model_of(family)
    plain = copy.deepcopy(model)
    plain.set_experts_implementation("eager")
    expected = plain(input_ids=IDS, use_cache=False).logits
    before, config = set(model.state_dict()), model.model.layers[1].mlp.experts.config
    method = adapt(model)
    assert (model(input_ids=IDS, use_cache=False).logits - expected).abs().max() < 1e-10
    wake(model)
    adapted = model(input_ids=IDS, use_cache=False).logits
    assert (adapted - expected).abs().max() > 1e-3
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=IDS, use_cache=False).logits, adapted)
    merge_peft(method, model)
    assert model.model.layers[1].mlp.experts.config is config
    model.set_experts_implementation("eager")
    assert (model(input_ids=IDS, use_cache=False).logits - adapted).abs().max() < 1e-10
    unmerge_peft(method, model)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, adapted)
    method.remove(model)
    assert set(model.state_dict()) == before
    assert (model(input_ids=IDS, use_cache=False).logits - expected).abs().max() < 1e-10


def test_dropout_has_an_input_and_is_off_in_evaluation():
    model = model_of("qwen3_moe")
    adapt(model, params={"dropout": 0.5})
    wake(model)
    model.eval()
    calm = model(input_ids=IDS, use_cache=False).logits
    model.train()
    one, two = (model(input_ids=IDS, use_cache=False).logits for _ in range(2))
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in ((calm, one), (one, two)))


def test_routers_are_adapted_by_name_only():
    model = model_of("deepseek_v3")
    method = peft_method_from_config({"kind": "lora", "target_modules": "all-linear", "target_parameters": STACKS})
    inject_peft_and_freeze(method, model)
    names = {layer.name for layer in adapted_layers(model)}
    assert not any("gate" in name.split(".") for name in names)
    assert "model.layers.1.mlp.shared_experts.down_proj" in names
    assert "model.layers.1.mlp.experts.down_proj" in names
    named = model_of("qwen3_moe")
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "target_parameters": ["gate.weight"]}), named)
    assert {layer.name for layer in adapted_layers(named)} == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}


def test_mutation_a_router_adapted_by_accident(monkeypatch):
    """Without the rule, "all-linear" takes a router that is a linear layer."""
    monkeypatch.setattr("d9d_lora.sites.routers", lambda module: set())
    from tests.test_grouped import test_all_linear_takes_experts_and_leaves_routers_alone as law

    with pytest.raises(AssertionError):
        law()


def test_mutation_rows_in_another_order_than_their_experts(monkeypatch):
    real = torch.Tensor.sort
    dense = as_one_sum("qwen3_moe", monkeypatch)
    model = model_of("qwen3_moe")
    adapt(model)
    wake(dense), wake(model)
    monkeypatch.setattr(torch.Tensor, "sort", lambda t, **k: (real(t, **k)[0], real(t, **k)[1].flip(0)))
    found = loss_and_gradients(model)[0]
    monkeypatch.undo()
    assert abs(found - loss_and_gradients(dense)[0]) > 1e-6


def test_nothing_of_the_size_of_the_experts_is_kept_for_the_backward():
    model = model_of("qwen3_moe", torch.float32)
    adapt(model, params={"r": 4})
    block = model.model.layers[0].mlp.experts
    x = torch.randn(6, 16)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(6)])
    weights = torch.full((6, 2), 0.5)
    kept = saved_bytes(lambda: block(x, index, weights), [*model.parameters(), x, weights])
    stack = block.gate_up_proj.numel() * 4
    rows, H, I, r = 12, 16, 12, 4
    # x, z, the gate and up (once as they are, once as activated and gated: SiLU's input, its output, up, the product), z of down, indices
    assert kept < stack + 4 * rows * (H + 2 * r + 6 * I + 2 * H)
    assert kept < 2 * 4 * rows * (H + 2 * r + 5 * I + H)


def test_the_rank_of_an_expert_may_be_a_share_of_r():
    model = model_of("qwen3_moe")
    adapt(model, params={"r": 4, "expert_rank": "r/top_k"})
    assert {layer.lora_A.weight.shape[-1] for layer in adapted_layers(model)} == {2}
    assert {layer.delta.scaling for layer in adapted_layers(model)} == {3.0}
    with pytest.raises(ValueError, match="r=3 is no multiple of top_k=2"):
        adapt(model_of("mixtral"), params={"expert_rank": "r/top_k"})


def test_rows_in_turn_have_no_slices():
    with pytest.raises(ValueError, match="gate and up in turn"):
        adapt(model_of("gpt_oss"), params={"enable_lora": [True, True]})


def test_the_table_tells_of_experts():
    nothing = {"target_parameters": None, "target_modules": "all-linear"}
    for targets, words in (({}, "4 of these are adapted"), (nothing, "no expert is adapted")):
        model = model_of("qwen3_moe")
        adapt(model, **targets)
        found = census(model)
        assert found["experts"]["elements"] == sum(p.numel() for p in model.parameters() if p.ndim == 3 and not p.requires_grad)
        with console.capture() as table:
            show_census(found, [])
        assert words in table.get().replace("\n", " ")


def test_the_trainer_says_that_no_expert_was_hit(tmp_path):
    assets = make_assets(tmp_path, "qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=6)
    attention = {"kind": "lora", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "params": {"r": 2}}
    config = config_of(assets, tmp_path / "out", peft=attention)
    with console.capture() as told:
        trainer = Trainer(config, join(torch.device("cpu"), config.parallel, 60))
    weights = {n: p.numel() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    stacks = [n for name, n in weights.items() if "experts" in name]
    share = 100 * sum(stacks) / sum(p.numel() for p in trainer.model.parameters())
    text = told.get().replace("\n", " ")
    assert f"experts: {share:.1f} % of the parameters, in {len(stacks)} stacks; 0 of these are adapted" in text
    assert "WARNING: no expert is adapted. Name them, as peft.target_parameters" in text


@pytest.mark.parametrize("dtype,width", [(torch.float64, 12), (torch.float32, 10)])
def test_experts_without_adapters_that_the_grouped_product_refuses_are_multiplied_all_the_same(tmp_path, dtype, width):
    """Rows of 10 numbers in fp32 are no multiple of 16 bytes. Against the model's own loop; by transformers' default it cannot run."""
    directory = make_assets(tmp_path, "qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=width, head_dim=6) / "model"
    base = models.open_model(ModelConfig(path=str(directory)), dtype)
    method = peft_method_from_config({"kind": "lora", "target_modules": ["q_proj"], "params": {"r": 3, "alpha": 6}})
    mapper = inject_peft_and_freeze(method, base.module)
    models.materialise(base, torch.device("cpu"))
    models.load(base, mapper, ModelConfig(path=str(directory)))
    method.initialise(base.module)
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager")
    torch.testing.assert_close(base.module(IDS).logits, oracle(IDS).logits)
    with pytest.raises(RuntimeError, match=r"Double|multiple of 16 bytes"):
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)(IDS)


# -- files that hold each expert by itself, layouts ----------------------------------------------------------------------------------


def loaded(directory, world):
    """(model on a layout, its weights from files, the report)"""
    base = models.open_model(ModelConfig(path=str(directory)), torch.float64)
    method = peft_method_from_config({"kind": "lora", "target_parameters": STACKS, "params": {"r": 3, "alpha": 6}})
    mapper = inject_peft_and_freeze(method, base.module)
    if world.mesh is not None:
        models.apply_data_parallel(base.module, world.mesh, world.parallel)
    models.materialise(base, torch.device("cpu"))
    report = models.load(base, mapper, ModelConfig(path=str(directory)))
    method.initialise(base.module)
    wake(base.module)
    return base.module, report


def trained_on_shards(rank, directory):
    one, whole = loaded(directory, World(0, 1, torch.device("cpu"), ParallelConfig(dp_shard=1), None))
    two, part = loaded(directory, join(torch.device("cpu"), ParallelConfig(), 60))
    real = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).state_dict()
    for name, p in one.named_parameters():
        plain = name.replace(".base.", ".")
        if plain in real:
            assert torch.equal(p, real[plain]), name
    experts_bytes = sum(4 * t.numel() for n, t in real.items() if "experts." in n)
    ours = next(layer for layer in adapted_layers(two)).base.weight.to_local().shape[0]
    assert ours == (3 if rank == 0 else 2)
    rest = whole.bytes_read - experts_bytes
    assert part.bytes_read <= experts_bytes * ours / 5 + rest * 0.6, "a rank reads its own experts only"
    expected, found = loss_and_gradients(one), loss_and_gradients(two)  # the same batch on both ranks: twice the loss
    assert abs(found[0] - expected[0]) < 1e-10
    for name, g in expected[1].items():
        assert float((full_of(found[1][name]) - 2 * g).abs().max() / g.abs().max()) < 1e-9, name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_streamed_into_shards_and_train_there(pool, tmp_path, family):
    model_of(family, torch.float32).save_pretrained(tmp_path)
    pool.run(2, trained_on_shards, tmp_path)


def test_mutation_the_experts_of_a_file_in_the_order_of_their_names(pool, tmp_path, monkeypatch):
    """Eleven experts: as text, 10 comes before 2."""
    monkeypatch.setitem(FAMILIES, "qwen3_moe", ("qwen3_moe", {**FAMILIES["qwen3_moe"][1], "num_experts": 11}))
    model_of("qwen3_moe", torch.float32).save_pretrained(tmp_path)
    world = World(0, 1, torch.device("cpu"), ParallelConfig(dp_shard=1), None)
    real = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).state_dict()

    def right():
        model, _ = loaded(tmp_path, world)
        return all(torch.equal(p, real[n]) for n, p in model.named_parameters() if n.endswith("_proj") and n in real)

    assert right()
    monkeypatch.setattr("d9d_lora.state.expert_files._natural", lambda name: name)
    assert not right()


def test_experts_that_differ_are_refused():
    stack = ModelStateMapperStack([["a", "b"], ["c", "d"]], "x").route("x")

    class Files:
        def shape(self, name):
            return (2, 3) if name != "d" else (2, 4)

        def dtype(self, name):
            return torch.float32

    with pytest.raises(ValueError, match="experts alike"):
        stack.outline(Files())


def test_a_run_on_shards_is_that_of_one_process(pool, tmp_path):
    """The trainer: experts streamed from files, dropout before them, evaluation, and one PEFT directory at the end."""
    assets = make_assets(tmp_path, "qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=6)
    peft = {"kind": "lora", "target_modules": "all-linear", "target_parameters": STACKS, "params": {"r": 4, "alpha": 8, "dropout": 0.1}}
    runs = {world: pool.run(world, run, assets, tmp_path / str(world), {"peft": peft, "train__steps": 3})[0] for world in (1, 2)}
    for a, b in zip(losses(runs[1]), losses(runs[2]), strict=True):
        assert abs(a - b) < 1e-7 * abs(a)
    one, two = (load_file(tmp_path / str(world) / "adapter" / "adapter_model.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    assert all((one[k] - two[k]).abs().max() < 1e-6 for k in one)
    assert one["base_model.model.model.layers.0.mlp.experts.lora_A.weight"].shape == (5 * 4, 12)
    assert any(t.abs().max() > 0 for k, t in one.items() if "experts" in k and "lora_B" in k)
