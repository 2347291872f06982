"""Base and adapter as one step of autograd: the numbers of the formula, what is kept and what is computed, and when it stands back."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from d9d_lora import dropout as dropout_file
from d9d_lora.dropout import AdapterDropout, Clock, Mask
from d9d_lora.layers import AdaptedLinear, fused
from d9d_lora.measure import flops, saved_bytes
from d9d_lora.walk import adapted_layers
from tests.test_corners import adapt, lora

N, I, O, R, S = 6, 10, 8, 3, 1.7


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, N // 2, I), "W": (O, I), "bias": (O,), "A": (R, I), "B": (O, R)}
    t = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return {name: value.requires_grad_(name != "W") for name, value in t.items()}


def mask_of(x, p=0.4):
    dropout = AdapterDropout(p, "layer", Clock(3))
    dropout.clock.set(1)
    return dropout.mask(x)


def formula(x, W, bias, A, B, keep=None, p=0.0):
    h = x if keep is None else torch.where(keep, x, 0) / (1 - p)
    return linear(x, W, bias) + S * (h @ A.T) @ B.T


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("frozen", [(), ("x",), ("bias",), ("A",), ("B",), ("x", "A")])
def test_values_and_gradients_are_those_of_the_formula(dropout, frozen):
    t = tensors()
    for name in frozen:
        t[name].requires_grad_(False)
    mask = mask_of(t["x"]) if dropout else None
    keep = mask.keep(torch.ones_like(t["x"]))[0].bool() if dropout else None
    dy = torch.randn(2, N // 2, O, dtype=torch.float64)
    wanted = [value for value in t.values() if value.requires_grad]
    (y,) = fused.fused(t["x"], [fused.Reader((t["W"],), t["bias"], t["A"], t["B"])], S, mask)
    expected = formula(**t, keep=keep, p=0.4 if dropout else 0)
    assert torch.allclose(y, expected, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy)):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_backward_draws_the_mask_of_its_forward_again():
    t = tensors()
    clock = Clock(3)
    dropout = AdapterDropout(0.5, "layer", clock)
    clock.set(1)
    (y,) = fused.fused(t["x"], [fused.Reader((t["W"],), None, t["A"], t["B"])], S, dropout.mask(t["x"]))
    keep = dropout.mask(t["x"]).keep(torch.ones_like(t["x"]))[0].bool()
    clock.set(2)  # the clock has moved on
    (dA,) = torch.autograd.grad(y.sum(), t["A"])
    (expected,) = torch.autograd.grad(formula(**{**t, "bias": None}, keep=keep, p=0.5).sum(), t["A"])
    assert torch.allclose(dA, expected)


def test_a_gradient_of_a_gradient_is_refused():
    model = adapt(Readers(), lora(["q", "k", "v"], params={"r": 2, "alpha": 4}))
    x = torch.randn(5, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_x_is_kept_once_for_all_its_readers_and_nothing_else_but_z(dropout):
    model = adapt(Readers(), lora(["q", "k", "v"], params={"r": 2, "alpha": 4, "dropout": dropout}))
    x = torch.randn(5, 16, requires_grad=True)
    model(x)  # the clock ticks
    kept = saved_bytes(lambda: model(x), [x, *model.parameters()])
    time = 8 if dropout else 0
    assert kept == 3 * 5 * 2 * 4 + time
    assert saved_bytes(lambda: model(x * 1), model.parameters()) == 5 * 16 * 4 + kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_beyond_the_frozen_layer_there_are_six_thin_products(dropout):
    model = adapt(Readers(), lora(["q", "k", "v"], params={"r": 2, "alpha": 4, "dropout": dropout}))
    bare = Readers().requires_grad_(False)
    x = torch.randn(5, 16, requires_grad=True)
    extra = flops(lambda: model(x).sum().backward()) - flops(lambda: bare(x).sum().backward())
    assert extra == 3 * 6 * (2 * 5 * 16 * 2)


def test_mutation_a_copy_of_x_for_each_reader_is_counted(monkeypatch):
    model = adapt(Readers(), lora(["q", "k", "v"], params={"r": 2, "alpha": 4}))

    def copying(self, x, h, *, parts):
        return linear(h, self.weight_here()) + self.update(h * 1, self.parts(h.dtype, parts=parts))

    monkeypatch.setattr(AdaptedLinear, "fused", copying)
    x = torch.randn(5, 16, requires_grad=True)
    assert saved_bytes(lambda: model(x), [x, *model.parameters()]) > 3 * 5 * 16 * 4


class Readers(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("reason", ["its own forward", "a hook", "autocast", "a trained weight"])
def test_a_base_that_does_more_than_its_class_is_called_as_it_is(reason):
    model = nn.Sequential(Doubled(4, 4) if reason == "its own forward" else nn.Linear(4, 4))
    adapt(model, lora(["0"]))
    (layer,) = adapted_layers(model)
    with torch.no_grad():
        layer.factor("lora_B").normal_()
    if reason == "a hook":
        layer.base.register_forward_hook(lambda m, args, y: 2 * y)
    if reason == "a trained weight":
        layer.base.weight.requires_grad_()
    x = torch.randn(3, 4)
    with torch.autocast("cpu", enabled=reason == "autocast"):
        assert not layer.fuses(x)
        y = model(x)
    expected = layer.base(x) + layer.update(x, layer.parts(x.dtype, parts=False))
    tolerance = 0.1 if reason == "autocast" else 1e-6
    assert torch.allclose(y.float(), expected, rtol=tolerance, atol=tolerance)
    if reason == "a trained weight":
        y.sum().backward()
        assert layer.base.weight.grad is not None


def test_a_compiled_step_is_the_same_step():
    model = adapt(Readers(), lora(["q", "k", "v"], params={"r": 2, "alpha": 4, "dropout": 0.3}))
    for layer in adapted_layers(model):
        nn.init.normal_(layer.factor("lora_B"))
    x = torch.randn(5, 16)
    grads = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        next(adapted_layers(model)).dropout.clock.set(7)
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


@pytest.mark.parametrize("draw", ["_played", "_drawn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mask_is_even_and_its_windows_are_windows_of_the_whole(monkeypatch, dtype, draw):
    monkeypatch.setattr(dropout_file, "_played", getattr(dropout_file, draw))  # `_drawn` is that of accelerators
    x, p, now = torch.ones(900, 1030, dtype=dtype), 0.3, torch.tensor(11)
    kept, twice = Mask(now, 5, p, 1030, 0).keep(x, 2 * x)
    assert torch.equal(twice, 2 * kept)
    assert x.all()
    assert torch.equal(kept[:, 207:519], Mask(now, 5, p, 1030, 207).keep(x[:, 207:519])[0])
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    off = (kept.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    assert abs(off.mean()) * off.numel() ** 0.5 < 4
    for sums in (off.sum(0) / 900**0.5, off.sum(1) / 1030**0.5):  # of columns, of rows
        assert sums.var() == pytest.approx(1, abs=0.2)
        assert sums.abs().max() < 5
    other = Mask(now + 1, 5, p, 1030, 0).keep(x)[0].double() - (1 - p)
    for shifted in (off[1:] * off[:-1], off[:, 1:] * off[:, :-1], off[:, 4:] * off[:, :-4], off * other / (p * (1 - p)) ** 0.5):
        assert abs(shifted.sum()) / shifted.numel() ** 0.5 < 4
