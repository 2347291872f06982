"""DoRA beside the PEFT library, number for number: starts, forward, gradients of every factor, merged weights; and where PEFT is wrong."""

import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config
from d9d_lora.methods.dora import MAGNITUDE

peft = pytest.importorskip("peft")
R, ALPHA = 3, 5


class Host(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, x):
        return self.a(x)


BASES = {
    "linear": lambda: nn.Linear(7, 5),
    "linear without bias": lambda: nn.Linear(7, 5, bias=False),
    "conv1d": lambda: Conv1D(5, 7),
    "embedding": lambda: nn.Embedding(7, 5),
    "convolution of 1": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "convolution of 2": lambda: nn.Conv2d(4, 6, 3, stride=2),
    "convolution without bias": lambda: nn.Conv2d(4, 6, (1, 3), bias=False),
    "convolution of 3": lambda: nn.Conv3d(2, 3, 2),
}


def base(kind):
    torch.manual_seed(5)
    made = BASES[kind]()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape))  # Conv1D's bias starts at zero
    return Host(made)


def inputs(kind):
    torch.manual_seed(6)
    if kind == "embedding":
        return torch.randint(0, 7, (4, 3))
    shapes = {"convolution of 1": (2, 4, 9), "convolution of 3": (2, 2, 4, 4, 4)}
    return torch.randn(shapes.get(kind, (2, 4, 9, 9) if "convolution" in kind else (4, 7)))


def theirs(kind, rslora=False, dropout=0.0):
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=["a"], use_dora=True, use_rslora=rslora, lora_dropout=dropout, init_lora_weights=False,
        fan_in_fan_out=kind == "conv1d",
    )  # fmt: skip
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base(kind), config)


def ours(kind, rslora=False, dropout=0.0):
    model = base(kind)
    params = {"r": R, "alpha": ALPHA, "dropout": dropout, "scaling": "rslora" if rslora else "lora"}
    method = peft_method_from_config({"kind": "dora", "target_modules": ["a"], "params": params})
    inject_peft_and_freeze(method, model)
    return model, method


def factors_of(their_layer, kind):
    """PEFT's parameters by our names."""
    if kind == "embedding":
        pair = {"lora_A": their_layer.lora_embedding_A["default"], "lora_B": their_layer.lora_embedding_B["default"]}
    else:
        pair = {"lora_A": their_layer.lora_A["default"].weight, "lora_B": their_layer.lora_B["default"].weight}
    return {**pair, MAGNITUDE: their_layer.lora_magnitude_vector["default"].weight}


def alike(kind, their_model, our_layer, *, start=False):
    """Gives our layer PEFT's factors; with `start`, the magnitude follows from the others instead."""
    with torch.no_grad():
        for name, p in factors_of(their_model.base_model.model.a, kind).items():
            if not (start and name == MAGNITUDE):
                our_layer.factor(name).copy_(p.reshape(our_layer.factor(name).shape))
        if start:
            our_layer.start_from_weight()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_starts_forward_gradients_and_merged_weights(kind, rslora):
    their_model, (our_model, method) = theirs(kind, rslora), ours(kind, rslora)
    layer, x = our_model.a, inputs(kind)
    alike(kind, their_model, layer, start=True)
    factors = factors_of(their_model.base_model.model.a, kind)
    assert torch.allclose(layer.factor(MAGNITUDE), factors[MAGNITUDE].reshape(-1), atol=1e-5)
    assert torch.allclose(our_model(x), their_model(x), atol=1e-5)
    with torch.no_grad():
        factors[MAGNITUDE].mul_(torch.linspace(0.5, 2, factors[MAGNITUDE].numel()).view_as(factors[MAGNITUDE]))
    alike(kind, their_model, layer)
    found, wanted = our_model(x), their_model(x)
    assert torch.allclose(found, wanted, atol=1e-5)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for name, p in factors.items():
        grad = layer.factor(name).grad
        assert torch.allclose(grad, p.grad.reshape(grad.shape), atol=1e-5 * float(grad.abs().max())), name
    merge_peft(method, our_model)
    merged = their_model.merge_and_unload()
    assert torch.allclose(our_model.a.weight, merged.a.weight, atol=1e-5)


def test_dropout_of_peft_reaches_the_base_path_too():
    """Ours drops the input of A alone; PEFT's y = W x + (g - 1) W drop(x) + g s B A drop(x), which is other than DoRA where g is not 1."""
    their_model, (our_model, _) = theirs("linear", dropout=0.5), ours("linear", dropout=0.5)
    layer, x = our_model.a, inputs("linear")
    alike("linear", their_model, layer)
    with torch.no_grad():
        layer.factor(MAGNITUDE).mul_(2)
        factors_of(their_model.base_model.model.a, "linear")[MAGNITUDE].mul_(2)
    A, B, W, b = layer.lora_A.weight, layer.lora_B.weight, layer.base.weight, layer.base.bias
    s = ALPHA / R
    g = layer.factor(MAGNITUDE) / (W + s * B @ A).norm(dim=1)
    with torch.no_grad():
        their_layer = their_model.base_model.model.a
        their_layer.lora_dropout["default"].forward = lambda x: 0 * x  # everything is dropped
        assert torch.allclose(their_model(x), x @ W.T + b, atol=1e-5)
        layer.fuses = lambda x: False  # the fused step draws its mask itself
        layer.dropout.forward = lambda x: 0 * x
        assert torch.allclose(our_model(x), g * (x @ W.T) + b, atol=1e-5)
        our_model.eval(), their_model.eval()
        assert torch.allclose(our_model(x), their_model(x), atol=1e-5)


def test_a_row_of_zeros_is_nan_in_peft():
    host = base("linear")
    with torch.no_grad():
        host.a.weight[2] = 0
    x = inputs("linear")
    wanted = host(x)
    their_model = peft.get_peft_model(host, peft.LoraConfig(r=R, target_modules=["a"], use_dora=True))
    assert their_model(x)[:, 2].isnan().all()
    model = base("linear")
    with torch.no_grad():
        model.a.weight[2] = 0
    inject_peft_and_freeze(peft_method_from_config({"kind": "dora", "target_modules": ["a"]}), model)
    assert torch.allclose(model(x), wanted)
