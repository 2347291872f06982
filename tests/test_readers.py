"""Layers that read the same x: how they are found, and that computing them together changes nothing but the cost."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from d9d_lora import peft_method_from_config
from d9d_lora.layers import readers
from d9d_lora.layers.readers import calls_with_one_argument
from d9d_lora.measure import saved_bytes
from d9d_lora.walk import adapted_layers
from tests.test_corners import adapt, lora


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)

    def forward(self, x):
        shape = x.shape
        q = self.q(x).view(shape)
        k, v = self.k(x).sin(), self.v(x)
        x = torch.cat([k * v, v], -1) + q
        return self.o(x)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(4, 4) for _ in range(6))

    def forward(self, x, flag=True):
        y = self.a(x)
        if flag:
            x = self.b(x)
        y = self.c(x) + self.d(x)
        y = y + sum(self.e(x) for x in [y])
        return self.f(x) + self.f(y)


def test_what_the_source_tells():
    assert calls_with_one_argument(Attention.forward) == (("q", "k", "v"), ("o",))
    assert calls_with_one_argument(Odd.forward) == (("a", "b"), ("c", "d"), ())  # e is called elsewhere, f twice
    assert calls_with_one_argument(nn.Linear.forward) == ()
    assert calls_with_one_argument(len) == ()


def test_hugging_face_models():
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    assert ("q_proj", "k_proj", "v_proj") in calls_with_one_argument(LlamaAttention.forward)
    assert ("q_proj", "k_proj", "v_proj") in calls_with_one_argument(Qwen3Attention.forward)
    assert ("gate_proj", "up_proj") in calls_with_one_argument(LlamaMLP.forward)
    assert all(len(names) < 2 for names in calls_with_one_argument(GPT2Attention.forward))


def both(params):
    """Two equal models; the second one computes each layer for itself, with the masks of the first."""
    model = adapt(nn.Sequential(Attention()).double(), lora(["q", "k", "v", "o"], params=params))
    for layer in adapted_layers(model):
        nn.init.normal_(layer.factor("lora_B"))
    alone = copy.deepcopy(model)
    for layer in adapted_layers(alone):
        layer.readers = None
    return model, alone


def step(model, x, through=lambda f, *a: f(*a)):
    model.zero_grad()
    x = x.clone().requires_grad_()
    next(adapted_layers(model)).dropout.clock.set(5)
    y = through(model, x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("params", [{"r": 2}, {"r": 2, "dropout": 0.5}, {"r": 2, "use_dora": True}], ids=str)
def test_together_is_as_alone(params, monkeypatch):
    model, alone = both(params)
    calls = []
    monkeypatch.setattr(readers, "fused", lambda *args, fused=readers.fused: calls.append(len(args[1])) or fused(*args))
    x = torch.randn(5, 16, dtype=torch.float64)
    for _ in range(2):
        for ours, theirs in zip(step(model, x), step(alone, x), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-10)
    assert calls == [3, 3]
    kept = [saved_bytes(lambda m=m: m(x.requires_grad_()), m.parameters()) for m in (model, alone)]
    assert kept[0] <= kept[1]


def doubled(module, args):
    return (2 * args[0],)


@pytest.mark.parametrize("reason", ["another x", "removed", "another scale", "no mask", "trained base", "evaluation of one"])
def test_a_layer_whose_x_or_work_is_another_computes_for_itself(reason):
    model, alone = both({"r": 2, "dropout": 0.5})
    for (block,) in (model, alone):
        if reason == "another x":  # which the source does not tell
            block.k.register_forward_pre_hook(doubled)
        elif reason == "removed":
            block.k = block.k.base
        elif reason == "another scale":
            block.k.delta = replace(block.k.delta, alpha=99.0)
        elif reason == "no mask":  # as of another method of a stack
            block.k.dropout.p = 0.0
        elif reason == "trained base":
            block.k.base.weight.requires_grad_()
        else:
            block.v.eval()
    x = torch.randn(5, 16, dtype=torch.float64)
    for ours, theirs in zip(step(model, x), step(alone, x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_mutation_an_output_for_another_x_is_handed_out(monkeypatch):
    model, alone = both({"r": 2})
    for (block,) in (model, alone):
        block.k.register_forward_pre_hook(doubled)
    product = readers.Readers.product
    made = lambda self, x, h: next(((m.x, m.here) for m in self._made.values()), (x, h))  # noqa: E731
    monkeypatch.setattr(readers.Readers, "product", lambda self, layer, x, h: product(self, layer, *made(self, x, h)))
    x = torch.randn(5, 16, dtype=torch.float64)
    assert not torch.allclose(model(x), alone(x))


@pytest.mark.parametrize("write", ["factor", "clock", "x", "another factor"])
def test_an_output_that_nobody_fetched_is_not_handed_out_after_a_write(write):
    model, alone = both({"r": 2, "dropout": 0.5})
    ys = []
    for m in (model, alone):
        x = torch.ones(3, 16, dtype=torch.float64)
        m(x)  # the clock ticks
        m[0].q(x)
        with torch.no_grad():
            if write == "factor":
                m[0].k.lora_B.weight.add_(1)
            elif write == "another factor":
                m[0].k.lora_B.weight = nn.Parameter(m[0].k.lora_B.weight + 1)
            elif write == "clock":
                m[0].k.dropout.clock.set(7)
            else:
                x.add_(1)
        ys.append(m[0].k(x))
    assert torch.allclose(*ys, atol=1e-10)


def test_nor_after_a_write_into_a_factor_that_layers_share():
    params = {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 2}
    method = peft_method_from_config({"kind": "vblora", "target_modules": ["q", "k"], "params": params})
    model = adapt(nn.Sequential(Attention()), method)
    block, x = model[0], torch.ones(3, 16)
    block.q(x)
    with torch.no_grad():
        next(iter(block.k.shared.values())).weight.add_(1)
    handed_out = block.k(x)
    assert torch.equal(handed_out, block.k(x))
    assert block.k.readers is block.q.readers is not None


def test_outputs_may_be_written_into():
    model, alone = both({"r": 2})
    x = torch.ones(2, 3, 16, dtype=torch.float64)
    grads = []
    for m in (model, alone):
        block = m[0]
        (block.q(x).square_().sum() + (block.k(x).mul_(2) * block.v(x)).sum()).backward()
        grads.append(block.k.lora_B.weight.grad)
    assert torch.allclose(*grads)


def test_a_recomputed_block_is_the_same():
    model, alone = both({"r": 2, "dropout": 0.5})
    x = torch.randn(5, 16, dtype=torch.float64)
    through = lambda f, *a: checkpoint(f, *a, use_reentrant=False)  # noqa: E731
    for ours, theirs in zip(step(model, x, through=through), step(alone, x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_one_output_without_a_gradient():
    model, alone = both({"r": 2})
    grads = []
    for m in (model, alone):
        x = torch.ones(3, 16, dtype=torch.float64, requires_grad=True)
        m[0].q(x)
        m[0].v(x).sum().backward()
        grads.append(x.grad)
        assert m[0].v.lora_B.weight.grad.abs().sum() > 0
    assert torch.allclose(*grads)


def test_masks_are_one_where_layers_do_not_compute_together():
    model, _ = both({"r": 2, "dropout": 0.5})
    keys = {name: model[0].get_submodule(name).dropout.key for name in "qkvo"}
    assert keys["q"] == keys["k"] == keys["v"] != keys["o"]


@pytest.mark.parametrize("later", ["another factor", "another time"])
def test_an_output_that_nobody_fetched_is_not_handed_out_in_a_later_step(later):
    model, alone = both({"r": 2, "dropout": 0.5})
    x = torch.randn(5, 16, dtype=torch.float64)
    for (block,) in (model, alone):
        block.k.dropout.clock.set(1)
        block.q(x)
        if later == "another time":
            block.k.dropout.clock.set(2)
        else:
            with torch.no_grad():
                block.k.lora_B.weight.mul_(2)
    assert torch.allclose(model[0].k(x), alone[0].k(x))


def test_inference_mode():
    model, alone = both({"r": 2})
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(model(x * 1), alone(x * 1))


def test_what_a_layer_drops_of_its_own_update_is_not_what_its_siblings_drop():
    model, _ = both({"r": 2})
    model[0].q.dropout.clock.set(5)
    drawn = [model[0].get_submodule(name).dropout.draw("rows", 64, 0.5, torch.device("cpu")) for name in "qkv"]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
