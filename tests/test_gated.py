"""A gated feed-forward as one step: the same numbers, fewer bytes than the frozen block keeps, and when it gives way."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from d9d_lora import merge_peft, unmerge_peft
from d9d_lora.layers import gated
from d9d_lora.layers.gated import GatedForward, Names, gated_names
from d9d_lora.measure import flops, saved_bytes
from d9d_lora.quant.load import quantise_
from d9d_lora.walk import adapted_layers
from tests.test_corners import adapt, lora

N, H, F, R = 10, 16, 24, 2


class Feed(nn.Module):
    def __init__(self, bias=False, act=nn.SiLU):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, F, bias=bias), nn.Linear(H, F, bias=bias), nn.Linear(F, H, bias=bias)
        self.act = act()

    def forward(self, x):
        """y"""
        return self.down(self.up(x) * self.act(self.gate(x)))


class Clamped(Feed):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x).clamp(max=1))


def both(params, quantised=False, **feed):
    """Two equal models; the second one has its own forward."""
    model = nn.Sequential(Feed(**feed)).double()
    if quantised:
        quantise_(model, "all-linear")
    model = adapt(model, lora("all-linear", params=params))
    for layer in adapted_layers(model):
        nn.init.normal_(layer.factor("lora_B"))
    alone = copy.deepcopy(model)
    del alone[0].__dict__["forward"]
    return model, alone


def step(model, through=lambda f, x: f(x)):
    model.zero_grad()
    x = torch.randn(2, N // 2, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    next(adapted_layers(model)).dropout.clock.set(5)
    y = through(model, x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def together(monkeypatch):
    """The number of times a block was one step."""
    calls = []
    monkeypatch.setattr(GatedForward, "together", lambda self, *args, do=GatedForward.together: calls.append(1) or do(self, *args))
    return calls


@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, partial(nn.GELU, approximate="tanh")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_together_is_as_alone(together, dropout, bias, act):
    model, alone = both({"r": R, "dropout": dropout}, bias=bias, act=act)
    for ours, theirs in zip(step(model), step(alone), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert together == [1]
    recomputed = step(model, through=lambda f, x: checkpoint(f, x, use_reentrant=False))
    for ours, theirs in zip(recomputed, step(alone), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_a_packed_base_is_one_step_too(together):
    model, alone = both({"r": R}, quantised=True)
    for ours, theirs in zip(step(model), step(alone), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert together == [1]


def test_it_keeps_x_and_two_inner_tensors_and_computes_no_product_twice():
    model, alone = both({"r": R})
    bare = nn.Sequential(Feed()).double().requires_grad_(False)
    x = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    inner, thin = N * F * 8, N * R * 8
    assert saved_bytes(lambda: model(x), [x, *model.parameters()]) == 2 * inner + 3 * thin
    assert saved_bytes(lambda: alone(x), [x, *alone.parameters()]) == 4 * inner + 3 * thin
    assert saved_bytes(lambda: bare(x), [x, *bare.parameters()]) == 3 * inner
    extra = flops(lambda: model(x).sum().backward()) - flops(lambda: bare(x).sum().backward())
    assert extra == 3 * 2 * N * R * (3 * H + 3 * F)


REASONS = [
    "a hook", "a hook of the backward", "a hook of the activation",
    "DoRA", "a bias added outside", "no backward", "another module", "a trained weight",
]  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_it_gives_way(together, reason):
    model, alone = both(
        {"r": R, "use_dora": reason == "DoRA"}, quantised=reason == "a bias added outside", bias=reason == "a bias added outside"
    )
    for (block,) in (model, alone):
        if reason == "a hook":
            block.up.register_forward_hook(lambda m, args, y: 2 * y)
        if reason == "a trained weight":
            block.down.base.weight.requires_grad_()
        if reason == "a hook of the backward":
            block.up.register_full_backward_hook(lambda m, dx, dy: (2 * dx[0],))
        if reason == "a hook of the activation":
            block.act.register_forward_pre_hook(lambda m, args: (2 * args[0],))
        if reason == "another module":
            block.act = nn.Softmax(-1)
    if reason == "no backward":
        with torch.no_grad():
            assert torch.allclose(model(torch.ones(3, H).double()), alone(torch.ones(3, H).double()))
    else:
        for ours, theirs in zip(step(model), step(alone), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-12)
    assert together == []


def test_a_module_without_adapters_has_its_own_forward_again():
    model = nn.Sequential(Feed())
    method = lora("all-linear", params={"r": R})
    adapt(model, method)
    assert "forward" in model[0].__dict__
    merge_peft(method, model)
    assert "forward" not in model[0].__dict__
    unmerge_peft(method, model)
    assert "forward" in model[0].__dict__


def test_mutation_the_two_inputs_of_the_product_are_exchanged(monkeypatch):
    model, alone = both({"r": R})
    exchanged = gated.gradients

    def wrong(x, z, dys, *rest):
        return exchanged(x, z, dys[::-1], *rest)

    monkeypatch.setattr(gated, "gradients", wrong)
    assert not torch.allclose(step(model)[1], step(alone)[1])


def test_what_the_source_tells():
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    for mlp in (LlamaMLP, GemmaMLP, Qwen3MLP):
        assert gated_names(mlp.forward) == Names("gate_proj", "up_proj", "down_proj", "act_fn")
    from transformers.activations import ACT2FN

    for name in ("silu", "gelu", "gelu_pytorch_tanh"):
        g = torch.randn(9, dtype=torch.float64, requires_grad=True)
        act, da = gated.activation_of(ACT2FN[name]), torch.randn(9, dtype=torch.float64)
        assert torch.allclose(act.value(g), ACT2FN[name](g))
        assert torch.allclose(act.gradient(da, g.detach()), torch.autograd.grad(ACT2FN[name](g), g, da)[0])
    assert gated_names(Feed.forward) == Names("gate", "up", "down", "act")
    assert gated_names(Clamped.forward) is gated_names(LlamaAttention.forward) is gated_names(len) is None


def test_a_graph_that_is_kept_gives_its_gradients_again():
    model, _ = both({"r": R, "dropout": 0.4})
    x = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    next(adapted_layers(model)).dropout.clock.set(5)
    loss = model(x).square().sum()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=keep) for keep in (True, False))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_a_start_that_was_not_made_is_refused():
    model = adapt(nn.Sequential(Feed()), lora("all-linear", params={"r": R, "init_lora_weights": "pissa"}))
    with pytest.raises(RuntimeError, match="has not been started"):
        model(torch.ones(2, H))
