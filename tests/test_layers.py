"""Layer kinds beyond the linear ones, and what they must not do: convolutions, fused projections, loralib's ways."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn.functional import conv1d, linear
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from d9d_lora import inject_peft_and_freeze, loralib, merge_peft, peft_method_from_config, unmerge_peft
from d9d_lora.layers import AdaptedConv
from d9d_lora.layers.parameter import AdaptedParameter
from d9d_lora.placement import full_of, local_of
from d9d_lora.styles import parallelize_adapted
from d9d_lora.sums import ReplicatedSum
from d9d_lora.train.model import sum_gradients
from d9d_lora.walk import adapted_layers
from tests.catalogue import LAYOUTS, VOCAB, WIDTH, Block, Experts, Matrix, batch, dp_rank, mesh_of
from tests.test_laws import close, grads_of, make, wake


def lora(targets, params=None, **fields):
    return peft_method_from_config({"kind": "lora", "target_modules": targets, "params": {"r": 2, "alpha": 3, **(params or {})}, **fields})


def adapt(model, method):
    inject_peft_and_freeze(method, model)
    method.initialise(model)
    wake(model)
    return model


# -- convolutions -----------------------------------------------------------------------------------------------------------------

CONVS = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "1d_same": (lambda: nn.Conv1d(6, 8, 4, padding="same", dilation=2, bias=False), (2, 6, 11)),
    "2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 7, 8)),
    "2d_circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 5, 5)),
    "2d_groups": (lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2), (2, 6, 7, 8)),
    "2d_depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding_mode="reflect", padding=1), (2, 6, 7, 8)),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 3, 2), groups=2, stride=2), (2, 4, 5, 6, 5)),
    "unbatched": (lambda: nn.Conv1d(6, 8, 3, groups=2), (6, 11)),
}


@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
@pytest.mark.parametrize("conv", CONVS)
def test_a_convolution_is_that_of_the_merged_kernel(conv, kind):
    """The output and every gradient are those of one convolution with W + dW, built in the open."""
    make_conv, shape = CONVS[conv]
    model = nn.Sequential(make_conv()).double()
    method = peft_method_from_config({"kind": kind, "target_modules": ["0"], "params": {"r": 2, "alpha": 3}})
    adapt(model, method)
    layer = model[0]
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    y.square().sum().backward()

    f = layer.parts(torch.float64, parts=False)
    update = layer.delta.dense(f)
    W = layer.base.weight.detach().flatten(1)
    gain = layer.delta.gain(W, W.square().sum(1), f, lambda t: t) if layer.delta.has_gain else torch.ones(len(W), dtype=W.dtype)
    reference = make_conv().double()
    kernel = ((W + update) * gain[:, None]).view_as(layer.base.weight)
    z = reference._conv_forward(x, kernel, layer.base.bias)
    assert (y - z).abs().max() < 1e-12
    expected = torch.autograd.grad(z.square().sum(), list(layer.factors().values()))
    for (name, p), grad in zip(layer.factors().items(), expected):
        assert torch.allclose(p.grad, grad, atol=1e-10), name

    merge_peft(method, model)
    assert (model(x) - y).abs().max() < 1e-10
    unmerge_peft(method, model)
    assert torch.equal(model(x), y)


def test_a_kernel_laid_out_with_channels_last_is_merged():
    model = nn.Sequential(nn.Conv2d(6, 8, 3)).to(memory_format=torch.channels_last)
    method = lora(["0"])
    adapt(model, method)
    x = torch.randn(2, 6, 7, 8)
    before = model(x)
    merge_peft(method, model)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_the_product_of_a_convolution_is_never_built():
    layer = adapt(nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)), lora(["0"]))[0]
    object.__setattr__(layer.delta, "dense", None)
    layer(torch.randn(2, 6, 7, 8))


def test_dropout_on_a_convolution_is_drawn_on_its_input():
    model = adapt(nn.Sequential(nn.Conv2d(6, 8, 3)), lora(["0"], {"dropout": 0.5}))
    x = torch.ones(2, 6, 7, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    "layer,words",
    [
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 8, 3)), "parametrization"),
        (nn.ConvTranspose1d(6, 8, 3), "no layer kind adapts"),
    ],
)
def test_other_convolutions_are_refused(layer, words):
    with pytest.raises(ValueError, match=words):
        inject_peft_and_freeze(lora(["0"]), nn.Sequential(layer))


@pytest.mark.parametrize("forget", ["dilation", "groups"])
def test_mutation_a_path_that_forgets_what_the_base_has(forget, monkeypatch):
    """PEFT 0.21.2 forgets both: A meets all groups, with dilation 1."""

    def conv(self, x, kernel):
        kernel = kernel.reshape(kernel.shape[0], -1, *self.taps)
        if forget == "dilation":
            return nn.functional.conv2d(x, kernel, groups=2, padding=1)
        return self.base._conv_forward(x, kernel.roll(1, 0), None)

    monkeypatch.setattr(AdaptedConv, "conv", conv)
    with pytest.raises(AssertionError):
        test_a_convolution_is_that_of_the_merged_kernel("2d_groups", "lora")


# -- fused projections ------------------------------------------------------------------------------------------------------------


def of_loralib(x, base, A, B, enabled, scaling):
    """loralib's formula: a grouped convolution of the stacked products, its rows put where slices are enabled."""
    after_A = linear(x, A)
    after_B = conv1d(after_A.transpose(-2, -1), B.unsqueeze(-1), groups=sum(enabled)).transpose(-2, -1)
    y = base(x)
    out = torch.zeros_like(y).view(*y.shape[:-1], len(enabled), -1)
    out[..., [i for i, on in enumerate(enabled) if on], :] = after_B.view(*y.shape[:-1], sum(enabled), -1)
    return y + out.view_as(y) * scaling


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, False, True], [True]])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_merged_linear_has_the_numbers_of_loralib(enabled, fan_in_fan_out):
    layer = loralib.MergedLinear(10, 12, r=3, lora_alpha=6, enable_lora=enabled, fan_in_fan_out=fan_in_fan_out)
    assert layer.lora_A.weight.shape == (3 * sum(enabled), 10)
    assert layer.lora_B.weight.shape == (12 // len(enabled) * sum(enabled), 3)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(2, 5, 10)
    y = layer(x)
    reference = of_loralib(x, layer.base, layer.lora_A.weight, layer.lora_B.weight, enabled, 2.0)
    assert torch.allclose(y, reference, atol=1e-5)
    factors = [layer.lora_A.weight, layer.lora_B.weight]
    ours, theirs = torch.autograd.grad(y.square().sum(), factors), torch.autograd.grad(reference.square().sum(), factors)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs))
    assert torch.allclose(layer.eval()(x), y, atol=1e-5)


def test_slices_of_grouped_queries_are_found():
    config = Phi3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)  # 24 output features: three equal slices would pass, and be wrong
    adapt(model, lora(["qkv_proj"], {"enable_lora": [True, False, True]}))
    layer = model.model.layers[0].self_attn.qkv_proj
    update = layer.delta.update(layer.whole_factors(), slice(0, 24), slice(0, 16))
    assert layer.delta.slices == (16, 4, 4)
    assert update[:16].abs().min() > 0
    assert update[20:].abs().min() > 0
    assert update[16:20].abs().max() == 0


def test_halves_of_gate_and_up_and_of_gpt2():
    config = GPT2Config(vocab_size=32, n_embd=12, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config)
    method = lora(["c_attn"], {"enable_lora": [True, False, True]})
    adapt(model, method)
    ids = torch.arange(6)[None]
    before = model.eval()(ids).logits
    merge_peft(method, model)
    assert torch.allclose(model(ids).logits, before, atol=1e-4)


@pytest.mark.parametrize(
    "params,words",
    [
        ({"enable_lora": [False, False]}, "enables no slice"),
        ({"slices": [4, 8]}, "would be ignored"),
        ({"enable_lora": [True, False], "slices": [12]}, "one positive size for each"),
        ({"enable_lora": [True, False], "slices": [4, 4]}, "8 output features, and the layer has 12"),
        ({"enable_lora": [True] * 5}, "not 5 equal slices"),
        ({"enable_lora": [True, False], "init_lora_weights": "pissa"}, "goes with init_lora_weights"),
    ],
)
def test_slices_that_do_not_fit_are_refused(params, words):
    with pytest.raises(ValueError, match=words):
        inject_peft_and_freeze(lora(["0"], params), nn.Sequential(nn.Linear(10, 12)))


def test_interleaved_heads_have_no_slices():
    from transformers import BloomConfig, BloomModel

    model = BloomModel(BloomConfig(vocab_size=32, hidden_size=12, n_layer=1, n_head=2))
    model.h[0].self_attention.config = model.config
    with pytest.raises(ValueError, match="head by head"):
        inject_peft_and_freeze(lora(["query_key_value"], {"enable_lora": [True, False, True]}), model)


# -- loralib's ways -----------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.embed = loralib.Embedding(9, 6, r=2, lora_alpha=4, **kwargs)
        self.conv = loralib.Conv1d(6, 6, 3, padding=1, r=2, **kwargs)
        self.qkv = loralib.MergedLinear(6, 12, r=2, enable_lora=[True, False], **kwargs)
        self.out = loralib.Linear(12, 3, r=2, lora_dropout=0.0, **kwargs)
        self.head = nn.Linear(3, 3)

    def forward(self, ids):
        return self.head(self.out(self.qkv(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))))


def small(**kwargs):
    model = Small(**kwargs)
    for layer in adapted_layers(model):
        for p in layer.factors().values():
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("copied", [False, True])
def test_evaluation_merges_and_training_undoes_it_to_the_bit(copied):
    model = small()
    ids = torch.arange(8)[None]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    y = model(ids)
    if copied:
        model = copy.deepcopy(model)
    model.eval()
    assert not torch.equal(model.out.base.weight, before["out.base.weight"])
    assert torch.allclose(model(ids), y, atol=1e-4)
    model.eval().train().train()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids), y)


def test_layers_that_do_not_merge_in_evaluation():
    model = small(merge_weights=False)
    before = model.out.base.weight.clone()
    assert torch.equal(model.eval().out.base.weight, before)


def test_r_0_is_the_plain_layer():
    assert type(loralib.Linear(3, 4)) is nn.Linear
    assert type(loralib.MergedLinear(3, 4, r=2)) is nn.Linear
    assert type(loralib.Conv2d(3, 4, 3)) is nn.Conv2d


@pytest.mark.parametrize("bias,biases", [("none", set()), ("lora_only", {"conv", "qkv", "out"}), ("all", {"conv", "qkv", "out", "head"})])
def test_what_is_trainable_and_what_is_saved(bias, biases):
    model = small()
    loralib.mark_only_lora_as_trainable(model, bias)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(loralib.lora_state_dict(model, bias))
    assert {name.split(".")[0] for name in names if name.endswith("bias")} == biases
    assert sum("lora_" in name for name in names) == 8
    other = small()
    other.load_state_dict(loralib.lora_state_dict(model, bias), strict=False)
    assert torch.equal(other.qkv.lora_B.weight, model.qkv.lora_B.weight)


def test_a_checkpoint_of_loralib_is_read():
    layer = loralib.Linear(6, 4, r=2)
    theirs = {"weight": torch.randn(4, 6), "bias": torch.randn(4), "lora_A": torch.randn(2, 6), "lora_B": torch.randn(4, 2)}
    layer.load_state_dict(dict(theirs))
    x = torch.randn(3, 6)
    y = linear(x, theirs["weight"], theirs["bias"]) + x @ theirs["lora_A"].T @ theirs["lora_B"].T * 0.5
    assert torch.allclose(layer(x), y, atol=1e-5)


def merging_in_evaluation(rank, layout):
    model, method = make("merged", "linear_bias", LAYOUTS[layout])
    wake(model)
    ids = torch.arange(8).view(2, 4)
    before = {n: local_of(p).clone() for n, p in model.named_parameters()}
    y = model(ids)
    loralib.merge_on_eval(model, method)
    with torch.no_grad():
        folded = model.eval()(ids)
    with pytest.raises(ValueError, match="in the base weights already"):
        merge_peft(method, model)
    model.train()
    assert all(torch.equal(local_of(p), before[n]) for n, p in model.named_parameters())
    assert (folded - y).abs().max() < 1e-10
    assert torch.equal(model(ids), y)


@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_merging_in_evaluation_on_shards(pool, layout):
    pool.run(2, merging_in_evaluation, layout)


# -- plain parameters ---------------------------------------------------------------------------------------------------------------


def on_parameters(targets, params=None, **fields):
    fields = {"kind": "lora", "target_parameters": targets, "params": {"r": 2, "alpha": 3, **(params or {})}, **fields}
    return peft_method_from_config(fields)


def test_a_parameter_keeps_its_name_and_its_place():
    model = nn.Sequential(Experts(4, 6))
    before = set(model.state_dict())
    method = on_parameters(["stack"])
    adapt(model, method)
    assert set(model.state_dict()) - before == {"0.stack_adapter.lora_A.weight", "0.stack_adapter.lora_B.weight"}
    W = model[0].stack
    y = model(torch.randn(2, 3, 4))
    assert model[0].stack is W, "outside the forward it is W"
    y.sum().backward()
    twin = copy.deepcopy(model)
    twin[0].stack_adapter.lora_B.weight.data.zero_()
    x = torch.randn(2, 3, 4)
    assert not torch.equal(twin(x), model(x))
    assert twin[0].stack_adapter.base.host is twin[0]
    method.remove(model)
    assert set(model.state_dict()) == before


def test_the_sum_is_taken_down_when_a_forward_raises():
    model = adapt(nn.Sequential(Experts(4, 6)), on_parameters(["stack"]))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 5))
    assert isinstance(model[0].stack, nn.Parameter)


def test_the_sum_is_built_once_a_forward(monkeypatch):
    model = adapt(nn.Sequential(Experts(4, 6), Matrix(6, 5)), on_parameters(["stack", "matrix"]))
    built = []
    real = AdaptedParameter.forward
    monkeypatch.setattr(AdaptedParameter, "forward", lambda self: built.append(self.name) or real(self))
    model(torch.randn(2, 3, 4))
    assert built == ["0.stack", "1.matrix"]


def test_a_recomputed_forward_reads_the_sum_as_well():
    from torch.utils.checkpoint import checkpoint

    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = adapt(nn.Sequential(Experts(4, 6)).double(), on_parameters(["stack"]))
        nn.init.constant_(model[0].stack, 0.3)
        x = torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        grads.append(model[0].stack_adapter.lora_A.weight.grad)
    assert torch.equal(*grads)


def test_mutation_experts_in_the_order_of_the_other_factor(monkeypatch):
    """B read expert-major, as A is: then the merge of a box of rows is still W + dW, and only the numbers of PEFT tell."""
    from tests.parity import test_layers as parity

    monkeypatch.setattr(parity, "from_fused_B", lambda B, experts: B.unflatten(1, (experts, -1)).permute(1, 2, 0))
    with pytest.raises(AssertionError):
        parity.test_target_parameters(False)


@pytest.mark.parametrize("grad", [False, True])
def test_attention_inside_an_encoder_layer_reads_the_sum_in_evaluation(grad):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = adapt(nn.Sequential(layer), on_parameters(["in_proj_weight", "out_proj.weight"]))
    x = torch.randn(2, 3, 8)
    with torch.set_grad_enabled(grad):
        assert torch.allclose(model.train()(x), model.eval()(x), atol=1e-5)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.count = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
        self.list = nn.ParameterList([torch.ones(2, 2)])
        self.fc = nn.Linear(2, 2)
        self.attention = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    "method,words",
    [
        (lambda: on_parameters(["scale"]), "expected a matrix"),
        (lambda: on_parameters(["count"]), "expected floating point"),
        (lambda: on_parameters(["list.0"]), "never called itself"),
        (lambda: on_parameters(["nothing"]), "match"),
        (lambda: on_parameters(["fc.weight"], {"dropout": 0.1}), "set the dropout to 0"),
        (lambda: on_parameters(["fc.weight"], target_modules=["fc"]), "choose one"),
        (lambda: lora(["attention"]), "in_proj_weight"),
        (lambda: lora(["out_proj"]), "target_parameters"),
    ],
)
def test_parameters_that_cannot_be_adapted(method, words):
    model = Bag()
    with pytest.raises(ValueError, match=words):
        inject_peft_and_freeze(method(), model)
    assert not list(adapted_layers(model))


def test_full_tune_of_a_parameter_beside_its_adapter_is_refused():
    model = nn.Sequential(Matrix(4, 4))
    methods = [on_parameters(["matrix"]).config.model_dump(), {"kind": "full_tune", "module_name_pattern": "0"}]
    with pytest.raises(ValueError, match="trained whole beside it"):
        inject_peft_and_freeze(peft_method_from_config({"kind": "stack", "methods": methods}), model)


# -- tied weights -------------------------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """Ids -> logits, with one weight for both ends."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block = Block(nn.Linear)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))


def language(layout="one", order="plan_first", targets=("embed",), **fields):
    torch.manual_seed(3)
    model = Language().double()
    method = lora(list(targets), ensure_weight_tying=True, **fields)
    where = LAYOUTS[layout]
    mesh = mesh_of(where) if where.world > 1 else None
    plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    if where.tp > 1 and order == "plan_first":
        parallelize_adapted(model, mesh["tp"], plan)
    inject_peft_and_freeze(method, model)
    if where.tp > 1 and order == "inject_first":
        parallelize_adapted(model, mesh["tp"], plan)
    if where.shard > 1:
        fully_shard(model.block, mesh=mesh["dp_shard"])
        fully_shard(model, mesh=mesh["dp_shard"])
        sum_gradients(model)
    method.initialise(model)
    wake(model)
    return model, method


def step_of(model, layout):
    ids = batch(0)[0]
    mine = slice(dp_rank(layout) * len(ids) // layout.dp, (dp_rank(layout) + 1) * len(ids) // layout.dp)
    (model(ids[mine]).square().sum() / ids.numel()).backward()


@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"]])
def test_tied_weights_have_one_adapter(targets):
    model, method = language(targets=targets)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"embed.lora_A.weight", "embed.lora_B.weight"}
    ids = batch(0)[0]
    A, B = (p.detach().clone().requires_grad_() for p in model.embed.factors().values())
    E = model.embed.base.weight.detach() + 1.5 * (B @ A).T
    expected = model.block(E[ids]) @ E.T
    y = model(ids)
    assert (y - expected).abs().max() < 1e-12
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(model.embed.lora_A.weight.grad, A.grad)
    assert torch.allclose(model.embed.lora_B.weight.grad, B.grad)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merge_peft(method, model)
    assert model.head.weight is model.embed.weight
    assert (model(ids) - y).abs().max() < 1e-10
    unmerge_peft(method, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids), y)
    twin = copy.deepcopy(model)
    assert twin.head.embedding is twin.embed
    loralib.merge_on_eval(model, method)
    assert (model.eval()(ids) - y).abs().max() < 1e-10
    assert torch.equal(model.train()(ids), y)


def law_of_tied_weights(rank, name, order):
    layout = LAYOUTS[name]
    reference, ref_method = language()
    model, method = language(name, order)
    bucket = ReplicatedSum(adapted_layers(model))
    step_of(model, layout)
    step_of(reference, LAYOUTS["one"])
    bucket.reduce()
    close(grads_of(model), grads_of(reference))
    merge_peft(method, model)
    merge_peft(ref_method, reference)
    close({n: full_of(p.detach()) for n, p in model.named_parameters()}, {n: p.detach() for n, p in reference.named_parameters()})


@pytest.mark.parametrize("name,order", [("fsdp2", "-"), ("tp2", "plan_first"), ("tp2", "inject_first"), ("fsdp2_tp2", "plan_first")])
def test_tied_weights_on_layouts(pool, name, order):
    pool.run(LAYOUTS[name].world, law_of_tied_weights, name, order)


@pytest.mark.parametrize(
    "method,words",
    [
        (lambda: lora(["up"], ensure_weight_tying=True), "no embedding or output head"),
        (lambda: lora(["embed"], ensure_weight_tying=True, rank_pattern={"embed": 3}), "the same rank"),
        (lambda: lora(["embed"], {"use_dora": True}, ensure_weight_tying=True), "two layers cannot share"),
    ],
)
def test_ties_that_cannot_be_kept(method, words):
    with pytest.raises(ValueError, match=words):
        inject_peft_and_freeze(method(), Language())


def test_without_the_option_two_adapters_cannot_be_merged_into_one_weight():
    model, method = Language(), lora(["embed", "head"])
    adapt(model, method)
    with pytest.raises(ValueError, match="shares its weight"):
        merge_peft(method, model)
