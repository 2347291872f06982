"""Factors that all layers share: one bank, one set of random bases, at the model's root, on every layout and through its whole life."""

import copy
import io
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config, unmerge_peft
from d9d_lora.layers.base import AdaptedLayer
from d9d_lora.layers.shared import SharedFactor
from d9d_lora.methods.vblora import INDICES, WEIGHTS, blocks_of, index_dtype, logits_of, read_small_form_, small_form
from d9d_lora.placement import full_of
from d9d_lora.state.native_format import load_trained, save_trained
from d9d_lora.sums import ReplicatedSum
from d9d_lora.train.model import recompute
from d9d_lora.walk import adapted_layers, adapter_tensors
from tests.catalogue import LAYOUTS, METHODS, Toy, batch, build, mesh_of, peft_config, plan_of, shard_data_parallel
from tests.small_run import losses, make_assets, run
from tests.test_laws import backward, close, grads_of, law_of_gradients, make, trained, wake

BANK = "vblora_vector_bank"
KINDS = ["vblora", "vera", "randlora"]


def shared_of(model):
    return next(adapted_layers(model)).shared


# -- layouts ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,layout,summed", [("vblora", "fsdp2_tp2", True), ("vblora", "tp2_sp", False), ("vera", "tp2", False)])
def test_inject_first_then_the_plan(pool, kind, layout, summed):
    pool.run(LAYOUTS[layout].world, law_of_gradients, kind, "linear", layout, "inject_first", summed, {}, None)


def gradients_of_mixed_layers(rank, summed, mutation):
    """Layers that are sharded over tensor parallelism and one that is whole on every rank use one bank."""
    layout, mesh = LAYOUTS["tp2"], mesh_of(LAYOUTS["tp2"])
    reference, _ = make("vblora", "linear", LAYOUTS["one"])
    model = build("linear")
    plan = plan_of(model, sequence=False) | {"blocks.1.up": ColwiseParallel(output_layouts=Replicate())}
    del plan["blocks.1.down"]
    parallelize_module(model, mesh["tp"], plan)
    inject_peft_and_freeze(peft_method_from_config(peft_config("vblora", "linear")), model)
    wake(reference), wake(model)
    assert model.blocks[1].down.placing.mesh is None
    bucket = ReplicatedSum(adapted_layers(model)) if summed else None
    if mutation:
        local = SharedFactor.local
        SharedFactor.local = lambda self, *, parts: local(self, parts=True)
    try:
        backward(model, layout), backward(reference, LAYOUTS["one"])
    finally:
        if mutation:
            SharedFactor.local = local
    if bucket:
        bucket.reduce()
    close(grads_of(model), grads_of(reference))


@pytest.mark.parametrize("summed", [False, True])
def test_sharded_and_whole_layers_share_one_bank(pool, summed):
    pool.run(2, gradients_of_mixed_layers, summed, None)


@pytest.mark.parametrize("summed", [False, True])
def test_mutation_a_whole_gradient_taken_for_a_part(pool, summed):
    with pytest.raises(AssertionError, match=f"{BANK}.weight is off by"):
        pool.run(2, gradients_of_mixed_layers, summed, "a part")


def bank_left_out_of_the_sum(rank, layout):
    real = AdaptedLayer.parameters_in_parts
    AdaptedLayer.parameters_in_parts = lambda self: (p for p in real(self) if p is not self.shared[BANK].weight)
    try:
        law_of_gradients(rank, "vblora", "linear", layout, "plan_first", True, {}, "none of law_of_gradients' own")
    finally:
        AdaptedLayer.parameters_in_parts = real


@pytest.mark.parametrize("layout", ["tp2", "fsdp2_tp2"])
def test_mutation_the_gradient_of_the_bank_is_not_summed(pool, layout):
    with pytest.raises(AssertionError, match=f"{BANK}.weight is off by"):
        pool.run(LAYOUTS[layout].world, bank_left_out_of_the_sum, layout)


def bases_of_each_rank(rank, kind, layout):
    real = SharedFactor.reset_parameters

    def drawn_here(self):
        real(self)
        if not self.trained:
            self.weight.normal_()  # torch's generator, seeded differently on each rank

    SharedFactor.reset_parameters = drawn_here
    try:
        law_of_gradients(rank, kind, "linear", layout, "plan_first", True, {}, None)
    finally:
        SharedFactor.reset_parameters = real


@pytest.mark.parametrize("kind,layout", [("vera", "tp2"), ("randlora", "fsdp2")])
def test_mutation_bases_drawn_by_each_rank(pool, kind, layout):
    with pytest.raises(AssertionError, match="AssertionError"):
        pool.run(LAYOUTS[layout].world, bases_of_each_rank, kind, layout)


def gradients_with_recomputation(rank, kind, layout_name):
    reference, _ = make(kind, "linear", LAYOUTS["one"])
    model, _ = make(kind, "linear", LAYOUTS[layout_name])
    wake(reference), wake(model)
    recompute(model)
    backward(model, LAYOUTS[layout_name]), backward(reference, LAYOUTS["one"])
    close(grads_of(model), grads_of(reference))


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp2x2", "fsdp2_tp2"])
def test_recomputed_blocks_still_find_the_bank_gathered(pool, layout):
    pool.run(LAYOUTS[layout].world, gradients_with_recomputation, "vblora", layout)


def starts_on_meta(rank, kind, layout_name):
    """Meta build, plan, injection, FSDP2, memory, starts: the values of an injection into a model with weights."""
    layout, mesh = LAYOUTS[layout_name], mesh_of(LAYOUTS[layout_name])
    reference, _ = make(kind, "linear", LAYOUTS["one"])
    with torch.device("meta"):
        model = Toy(lambda i, o: nn.Linear(i, o, bias=False)).to(torch.float64)
    parallelize_module(model, mesh["tp"], plan_of(model, layout.sequence))
    method = peft_method_from_config(peft_config(kind, "linear"))
    inject_peft_and_freeze(method, model)
    shard_data_parallel(model, mesh, layout)
    model.to_empty(device="cpu")
    for p in [*model.parameters(), *model.buffers()]:
        p.detach().fill_(math.nan)
    method.initialise(model)
    found, expected = trained(model), trained(reference)
    assert found.keys() == expected.keys()
    assert all(torch.equal(full_of(found[n].detach()), expected[n].detach()) for n in found)
    bases = {n: b for n, b in reference.named_buffers() if n.partition(".")[0] in shared_of(reference)}
    assert len(bases) == (0 if kind == "vblora" else 2)
    assert all(torch.equal(model.get_buffer(n), b) for n, b in bases.items())


@pytest.mark.parametrize("kind", KINDS)
def test_starts_after_a_meta_build(pool, kind):
    pool.run(4, starts_on_meta, kind, "fsdp2_tp2")


def blocks_alone_under_fsdp(rank):
    model = build("linear")
    method = peft_method_from_config(peft_config("vblora", "linear"))
    inject_peft_and_freeze(method, model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh_of(LAYOUTS["fsdp2"])["dp_shard"])
    with pytest.raises(ValueError, match=r"its gradient would not be reduced. Call fully_shard on the module that was injected too"):
        method.initialise(model)


def test_a_root_that_is_not_sharded_is_refused(pool):
    pool.run(2, blocks_alone_under_fsdp)


@pytest.mark.parametrize("kind", ["vblora", "vera"])
def test_the_trainer_shards_recomputes_and_resumes(pool, tmp_path, kind):
    params = {"vblora": {"r": 4, "num_vectors": 9, "vector_length": 4, "dropout": 0.1}, "vera": {"r": 16}}[kind]
    assets = make_assets(tmp_path / "assets")
    options = {"peft": {"kind": kind, "target_modules": "all-linear", "params": params}, "train__steps": 4, "optim__lr": 0.05}
    (one,) = pool.run(1, run, assets, tmp_path / "one", {**options, "checkpoint__every": 2})
    sharded = {**options, "parallel__tp": 2, "train__activation_checkpointing": True}
    four = pool.run(4, run, assets, tmp_path / "four", sharded)[0]
    path = str(tmp_path / "one" / "checkpoints" / "step_00000002")
    resumed = pool.run(2, run, assets, tmp_path / "again", {**options, "checkpoint__resume": path})[0]
    for found, expected in ((losses(four), losses(one)), (losses(resumed), losses(one)[2:])):
        assert len(found) == len(expected)
        assert max(abs(a - b) / b for a, b in zip(found, expected)) < 1e-9


# -- the life of a shared factor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_at_the_root_and_out_again(kind):
    plain = build("linear").state_dict().keys()
    model, method = make(kind, "linear", LAYOUTS["one"])
    shared = shared_of(model)
    assert set(shared) == set(next(adapted_layers(model)).delta.shared)
    assert all(getattr(model, name) is factor for name, factor in shared.items())
    assert all(layer.shared is shared for layer in adapted_layers(model))
    saved = {f"{BANK}.weight"} if kind == "vblora" else set()  # frozen bases are in no state dict
    assert {n for n in model.state_dict() if n.partition(".")[0] in shared} == saved
    factors = {f"{la.name}.{n}.weight" for la in adapted_layers(model) for n in la.delta.axes}
    assert adapter_tensors(model) == factors | saved == set(trained(model))
    merge_peft(method, model)
    assert model.state_dict().keys() == plain
    assert not any(hasattr(model, name) for name in shared)
    unmerge_peft(method, model)
    assert all(getattr(model, name) is factor for name, factor in shared.items())
    method.remove(model)
    assert model.state_dict().keys() == plain
    assert not any(hasattr(model, name) for name in shared)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_a_bank_of_its_own(kind):
    model, _ = make(kind, "linear", LAYOUTS["one"])
    wake(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    ids, _ = batch(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(ids), model(ids))
        for name, factor in shared_of(twin).items():
            assert factor is getattr(twin, name) is not getattr(model, name)
            with torch.no_grad():
                factor.weight.zero_()
        assert not torch.equal(twin(ids), model(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_two_methods_cannot_share_a_name(kind):
    model = build("linear")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    parts = [{**METHODS[kind].config, "target_modules": [name]} for name in ("up", "down")]
    with pytest.raises(ValueError, match="two methods of the kind"):
        inject_peft_and_freeze(peft_method_from_config({"kind": "stack", "methods": parts}), model)
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}


def test_a_resume_that_drew_other_bases_is_refused():
    model, method = make("vera", "linear", LAYOUTS["one"])
    saved = {name: t.clone() for name, t in method.state(model).items()}
    assert set(saved) == {"vera_A.digest", "vera_B.digest"}
    method.restore(model)
    for name, t in method.state(model).items():
        t.copy_(saved[name])
    method.restore(model)
    method.state(model)["vera_B.digest"].add_(1)
    with pytest.raises(ValueError, match="vera_B was drawn anew from its key, and its values are not those"):
        method.restore(model)


def test_bases_have_the_largest_sizes_of_all_layers():
    model, _ = make("vera", "linear", LAYOUTS["one"])
    assert (model.vera_A.weight.shape, model.vera_B.weight.shape) == ((5, 20), (20, 5))
    model, _ = make("randlora", "embedding", LAYOUTS["one"])
    assert (model.randlora_A.weight.shape, model.randlora_B.weight.shape) == ((5, 1, 12), (19, 3, 5))


@pytest.mark.parametrize("params,words", [
    ({"kind": "vblora", "params": {"topk": 3, "num_vectors": 2}}, "lower topk"),
    ({"kind": "vblora", "rank_pattern": {"up": 3}}, "rank_pattern cannot be used with kind 'vblora'"),
    ({"kind": "vera", "params": {"d_initial": 0}}, "neither would ever get a gradient"),
    ({"kind": "randlora", "target_parameters": ["experts.up"]}, "it adapts whole layers"),
    ({"kind": "vera", "alpha_pattern": {"up": 3}}, "alpha_pattern cannot be used with kind 'vera'"),
    ({"kind": "randlora", "params": {"sparse": True, "very_sparse": True}}, "give one of them"),
    ({"kind": "vblora", "params": {"dropout": 0.1, "vblora_dropout": 0.2}}, "vblora_dropout"),
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(params, words):
    with pytest.raises(ValueError, match=words):
        peft_method_from_config({"target_modules": ["up"], **params})


@pytest.mark.parametrize("kind,name", [("vblora", "dropout"), ("vera", "dropout"), ("randlora", "dropout"), ("randlora", "alpha")])
def test_names_of_peft_are_taken_too(kind, name):
    config = peft_method_from_config({"kind": kind, "target_modules": ["up"], "params": {f"{kind}_{name}": 0.25}}).config
    assert getattr(config.params, name) == 0.25


# -- VB-LoRA -------------------------------------------------------------------------------------------------------------------------


def test_lengths_that_fit_are_named():
    method = peft_method_from_config({"kind": "vblora", "target_modules": ["up"], "params": {"vector_length": 8}})
    with pytest.raises(ValueError, match=r"blocks.0.up: vector_length=8 .* in=12 and out=20. Lengths that do: 1, 2, 4;"):
        inject_peft_and_freeze(method, build("linear"))


@pytest.mark.parametrize("box", [slice(0, 12), slice(3, 9), slice(4, 8), slice(5, 7), slice(11, 12), slice(6, 6)])
def test_any_box_is_cut_out_of_blocks(box):
    blocks, within = blocks_of(box, 4)
    x = torch.arange(12).reshape(3, 4)
    assert torch.equal(x[blocks].flatten()[within], x.flatten()[box])


def test_an_embedding_whose_sizes_fit():
    model = nn.Sequential(nn.Embedding(20, 12, padding_idx=1)).double()
    method = peft_method_from_config(
        {"kind": "vblora", "target_modules": ["0"], "params": {"r": 2, "num_vectors": 5, "vector_length": 4}}
    )
    inject_peft_and_freeze(method, model)
    wake(model)
    ids = torch.arange(20)
    adapted = model(ids)
    merge_peft(method, model)
    assert (model(ids) - adapted).abs().max() < 1e-12


def test_vectors_are_chosen_before_rounding():
    """Two logits that are one number in bfloat16: what is merged must be what was trained."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    method = peft_method_from_config(
        {"kind": "vblora", "target_modules": ["0"], "params": {"r": 1, "num_vectors": 4, "vector_length": 8, "topk": 1}}
    )
    inject_peft_and_freeze(method, model)
    with torch.no_grad():
        model[0].base.weight.zero_()
        for p in model[0].factors().values():
            p.copy_(torch.tensor([1.0, 1.0005, 0.9995, 1.001]))
        model.vblora_vector_bank.weight.copy_(torch.arange(4.0).unsqueeze(1).expand(4, 8))
        adapted = model(torch.eye(8, dtype=torch.bfloat16))
        assert (adapted == 9).all()
        merge_peft(method, model)
        assert torch.equal(model(torch.eye(8, dtype=torch.bfloat16)), adapted)


def test_the_small_form_gives_the_same_update_and_cannot_be_trained():
    model, method = make("vblora", "linear", LAYOUTS["one"])
    wake(model)
    model.eval()
    ids, _ = batch(0)
    expected = model(ids)
    forms = {layer.name: small_form(layer) for layer in adapted_layers(model)}
    up = forms["blocks.0.up"]
    assert up["vblora_logits_A" + INDICES].dtype == torch.uint8
    assert (up["vblora_logits_A" + INDICES].shape, up["vblora_logits_A" + WEIGHTS].shape) == ((3, 3, 2), (3, 3, 1))
    for layer in adapted_layers(model):
        read_small_form_(layer, forms[layer.name])
    assert (model(ids) - expected).abs().max() < 1e-12
    model.train()
    with pytest.raises(RuntimeError, match="has no logits to train"):
        model(ids)
    model.eval()
    merge_peft(method, model)
    assert (model(ids) - expected).abs().max() < 1e-10
    unmerge_peft(method, model)
    with pytest.raises(ValueError, match=r"blocks.0.up.vblora_logits_A: expected logits of shape"):
        read_small_form_(model.blocks[0].up, forms["blocks.0.down"])


def small_file(rank, layout, path):
    """Saves on a layout, reads on one process and on the layout: the outputs of a model with its small file."""
    changes = {"params": {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 2, "save_only_topk_weights": True}}
    model, method = make("vblora", "linear", LAYOUTS[layout], **changes)
    wake(model)
    model.eval()
    ids, _ = batch(0)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    save_trained(method.compact(model, params), method.config, path)
    outputs = [model(ids)]
    for where in (layout, "one"):
        again, _ = make("vblora", "linear", LAYOUTS[where], **changes)
        load_trained(again, path)
        outputs.append(again.eval()(ids))
    return [full_of(y.detach()) for y in outputs]


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp2_tp2"])
def test_the_small_file_is_written_and_read_on_layouts(pool, layout, tmp_path):
    for y, *others in pool.run(LAYOUTS[layout].world, small_file, layout, tmp_path / "small"):
        assert all((other - y).abs().max() < 1e-6 for other in others)
    held = load_file(tmp_path / "small/weights.safetensors")
    assert not any(name.endswith("logits_A.weight") for name in held)
    assert any(name.endswith("logits_A_topk_indices") for name in held)


def test_a_last_weight_that_rounds_below_zero_is_none():
    weights = torch.tensor([[0.5, 0.5 + 2**-23]])
    assert 1 - weights.sum() < 0
    logits = logits_of(torch.tensor([[2, 0, 1]]), weights, 5)
    assert logits.isfinite().all()
    assert logits.topk(2).indices.tolist() in ([[2, 0]], [[0, 2]])


def test_the_smallest_dtype_for_indices():
    assert [index_dtype(n) for n in (255, 256, 2**15, 2**31)] == [torch.uint8, torch.int16, torch.int32, torch.int64]
