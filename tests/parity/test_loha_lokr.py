"""LoHa and LoKr against the PEFT library, number for number: forward, gradients of every factor, merged weight, starts, dropped rows."""

import pytest
import torch
from torch import nn

from d9d_lora.dropout import AdapterDropout
from d9d_lora.layers import AdaptedLinear
from d9d_lora.methods.delta import Geometry
from d9d_lora.methods.loha import LoHaParameters
from d9d_lora.methods.lokr import LoKrParameters, factorise
from d9d_lora.registry import peft_method_from_config

peft = pytest.importorskip("peft")
CONFIGS = {"loha": (peft.LoHaConfig, LoHaParameters), "lokr": (peft.LoKrConfig, LoKrParameters)}

OPTIONS = [
    ("loha", {"r": 2, "alpha": 5}),
    ("loha", {"r": 7, "alpha": 5}),
    ("lokr", {"r": 2, "alpha": 5}),
    ("lokr", {"r": 9, "alpha": 5}),
    ("lokr", {"r": 1, "alpha": 5, "decompose_both": True}),
    ("lokr", {"r": 2, "alpha": 5, "decompose_factor": 2}),
    ("lokr", {"r": 3, "alpha": 5, "decompose_factor": 10}),
    ("lokr", {"r": 2, "alpha": 5, "decompose_factor": 10, "decompose_both": True}),
]
CONVS = [
    *((kind, nn.Conv2d, k, effective) for kind in CONFIGS for k in ((3, 2), (1, 1)) for effective in (False, True)),
    *((kind, nn.Conv1d, k, effective) for kind in CONFIGS for k in (3, 1) for effective in (False, True)),
]
IDS = [f"{kind}-{'-'.join(f'{k}{v}' for k, v in options.items())}" for kind, options in OPTIONS]


def theirs(kind, base, **options):
    """PEFT's layer around the base, every factor random."""
    model = nn.ModuleDict({"layer": base})
    wrapped = peft.inject_adapter_in_model(CONFIGS[kind][0](target_modules=["layer"], init_weights=False, **options), model)
    return wrapped["layer"]


def factors_of(layer):
    return {name: getattr(layer, name)["default"] for name in type(layer).adapter_layer_names if "default" in getattr(layer, name)}


def delta_of(kind, geometry, **options):
    config = {"kind": kind, "target_modules": ["layer"], "params": CONFIGS[kind][1](**options)}
    return peft_method_from_config(config).delta_for("layer").fit(geometry)


@pytest.mark.parametrize("kind,options", OPTIONS, ids=IDS)
def test_linear(kind, options):
    torch.manual_seed(0)
    base = nn.Linear(12, 20)
    their = theirs(kind, base, **options)
    delta = delta_of(kind, Geometry(20, 12), **options)
    ours = AdaptedLinear(base, delta, name="layer", seed=0)
    factors = factors_of(their)
    assert {n: p.shape for n, p in ours.factors().items()} == {n: p.shape for n, p in factors.items()}
    with torch.no_grad():
        for name, p in ours.factors().items():
            p.copy_(factors[name])
    for n in (1, 60):  # LoHa computes few inputs and many in two ways
        x = torch.randn(n, 12)
        weight = torch.randn(n, 20)
        y, z = ours(x), their(x)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        for layer in (ours, their):
            layer.zero_grad()
        (y * weight).sum().backward(), (z * weight).sum().backward()
        for name, p in ours.factors().items():
            torch.testing.assert_close(p.grad, factors[name].grad, rtol=1e-5, atol=1e-5 * float(p.grad.abs().max()))
    merged = base.weight.detach() + their.get_delta_weight("default").detach()
    torch.testing.assert_close(ours.merge_with_base_().weight, merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind,conv,kernel,effective", CONVS)
@pytest.mark.parametrize("groups", [1, 2])
def test_weight_of_a_convolution(kind, conv, kernel, effective, groups):
    torch.manual_seed(0)
    base = conv(64, 30, kernel, groups=groups)
    for r in (2, 9):
        if kind == "lokr" and conv is nn.Conv1d and r == 9:
            continue  # see the test below
        options = {"r": r, "alpha": 3, "use_effective_conv2d": effective}
        their = theirs(kind, base, **options)
        geometry = Geometry(30, base.weight[0].numel(), taps=base.kernel_size, groups=groups)
        delta = delta_of(kind, geometry, **options)
        factors = factors_of(their)
        assert delta.shapes(geometry.out, geometry.into) == {n: tuple(factors[n].shape) for n in delta.axes}
        assert set(delta.axes) == set(factors)
        own = {n: p.detach().clone().requires_grad_() for n, p in factors.items()}
        wanted = their.get_delta_weight("default")
        dW = delta.update(own, slice(0, 30), slice(0, geometry.into)).reshape(base.weight.shape)
        torch.testing.assert_close(dW, wanted, rtol=1e-5, atol=1e-6)
        weight = torch.randn_like(dW)
        found = torch.autograd.grad((dW * weight).sum(), list(own.values()))
        true = torch.autograd.grad((wanted * weight).sum(), [factors[n] for n in own])
        for name, a, b in zip(own, found, true):
            if "hada_t1" in own and name.endswith("_a"):
                assert not torch.allclose(a, b, rtol=0.1)  # theirs is wrong: see the test below
            else:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def test_gradients_of_tucker_cores_are_those_of_the_formula():
    """PEFT 0.21.2 takes the other core's product for the gradients of hada_w1_a and hada_w2_a; central differences say who is right."""
    torch.manual_seed(0)
    delta = delta_of("loha", Geometry(6, 12, taps=(3,)), r=2, use_effective_conv2d=True)
    f = {n: torch.randn(s, dtype=torch.float64, requires_grad=True) for n, s in delta.shapes(6, 12).items()}
    assert torch.autograd.gradcheck(lambda *own: delta.update(dict(zip(f, own)), slice(0, 6), slice(0, 12)), tuple(f.values()))
    their = theirs("loha", nn.Conv1d(4, 6, 3), r=2, use_effective_conv2d=True).double()
    p = their.hada_w1_a["default"]
    with torch.no_grad():
        before = their.get_delta_weight("default").sum()
        p[1, 2] += 1e-6
        slope = (their.get_delta_weight("default").sum() - before) / 1e-6
    their.get_delta_weight("default").sum().backward()
    assert abs(p.grad[1, 2] - slope) > 0.01 * abs(slope)


def test_peft_scrambles_a_whole_w2_of_a_conv1d():
    """There the Kronecker product of [P,Q] and [U,C,taps] aligns Q with the taps. Ours is the one that the 2-D layer has."""
    torch.manual_seed(0)
    their = theirs("lokr", nn.Conv1d(16, 12, 3), r=9, alpha=9)
    f = {n: p.detach() for n, p in factors_of(their).items()}
    delta = delta_of("lokr", Geometry(12, 48, taps=(3,)), r=9, alpha=9)
    ours = delta.update(f, slice(0, 12), slice(0, 48)).reshape(12, 16, 3)
    as_2d = theirs("lokr", nn.Conv2d(16, 12, (3, 1)), r=9, alpha=9)
    with torch.no_grad():
        for name, p in factors_of(as_2d).items():
            p.copy_(f[name].reshape(p.shape))
    torch.testing.assert_close(ours, as_2d.get_delta_weight("default")[..., 0])
    assert not torch.allclose(ours, their.get_delta_weight("default"), atol=1e-3)


@pytest.mark.parametrize("kind,options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("init", [True, "lycoris", False])
def test_starts(kind, options, init):
    """The same factors are zero, and the others are as large."""
    if init == "lycoris" and kind == "loha":
        return
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(120, 200)})
    config = CONFIGS[kind][0](target_modules=["layer"], init_weights=init, **options)
    their = factors_of(peft.inject_adapter_in_model(config, model)["layer"])
    ours = AdaptedLinear(nn.Linear(120, 200), delta_of(kind, Geometry(200, 120), init_weights=init, **options), name="layer", seed=0)
    for name, p in ours.factors().items():
        assert bool(p.any()) == bool(their[name].any())
        if p.any() and p.numel() > 30:
            assert float(p.detach().std()) == pytest.approx(float(their[name].detach().std()), rel=0.3)


@pytest.mark.parametrize("kind,options", [
    ("loha", {}), ("lokr", {}), ("lokr", {"rank_dropout_scale": True}), ("lokr", {"rank_dropout_scale": True, "r": 9}),
])  # fmt: skip
def test_dropped_rows(kind, options, monkeypatch):
    """With the same rows dropped in both."""
    torch.manual_seed(0)
    options = {"r": 2, "alpha": 5, "rank_dropout": 0.4, **options}
    base = nn.Linear(12, 20)
    their = theirs(kind, base, **options).train()
    ours = AdaptedLinear(base, delta_of(kind, Geometry(20, 12), **options), name="layer", seed=0).train()
    with torch.no_grad():
        for name, p in ours.factors().items():
            p.copy_(factors_of(their)[name])
    draws = torch.rand(20)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: draws if size == (20,) else torch.ones(size))
    monkeypatch.setattr(AdapterDropout, "draw", lambda self, what, size, p, device: draws > p)
    x = torch.randn(4, 12)
    torch.testing.assert_close(ours(x), their(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dropped_module(kind, monkeypatch):
    base = nn.Linear(12, 20)
    options = {"r": 2, "alpha": 5, "module_dropout": 0.5}
    their = theirs(kind, base, **options).train()
    ours = AdaptedLinear(base, delta_of(kind, Geometry(20, 12), **options), name="layer", seed=0).train()
    with torch.no_grad():
        for name, p in ours.factors().items():
            p.copy_(factors_of(their)[name])
    x = torch.randn(4, 12)
    for drawn in (0.2, 0.8):
        monkeypatch.setattr(torch, "rand", lambda *size, drawn=drawn, **_: torch.full((1,), drawn))
        assert bool((their(x) - base(x)).any()) == (drawn > 0.5)
        torch.testing.assert_close(ours(x), their(x), rtol=1e-5, atol=1e-5)


def test_every_factorisation():
    from peft.tuners.lokr.layer import factorization

    for n in range(1, 300):
        for factor in (-1, 1, 2, 3, 4, 8, 10, 16, 100, 1000):
            assert factorise(n, factor) == factorization(n, factor), (n, factor)


@pytest.mark.parametrize("kind", CONFIGS)
def test_options_have_the_names_and_defaults_of_peft(kind):
    config, params = CONFIGS[kind][0](), CONFIGS[kind][1]()
    for name, value in params.model_dump().items():
        assert getattr(config, name) == value, name
