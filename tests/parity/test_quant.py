"""NF4 and LoftQ, number for number, beside bitsandbytes and PEFT. Runs where bitsandbytes is installed; its CPU build will do."""

import pytest
import torch
from torch import nn

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.init.loftq import factors_of_error, loftq
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.quant.load import quantise_
from d9d_lora.quant.nf4 import CODE, absmax_of, codes_of, dequantise, pack, quantise

bnb = pytest.importorskip("bitsandbytes")
loftq_utils = pytest.importorskip("peft.utils.loftq_utils")


def theirs(w, double=False):
    """(bytes [O, I/2], the restored matrix) of bitsandbytes."""
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double)
    return packed.reshape(w.shape[0], -1), bnb.functional.dequantize_4bit(packed, state), state


@pytest.mark.parametrize("scale", [1e-4, 0.02, 3.0])
def test_codes_are_those_of_bitsandbytes(scale):
    w = torch.randn(96, 320, generator=torch.Generator().manual_seed(0)) * scale
    packed, values, state = theirs(w)
    assert torch.equal(state.code, torch.tensor(CODE))
    m = absmax_of(w, 64)
    assert torch.equal(m.flatten(), state.absmax)
    codes = codes_of(w, m, 64)
    assert (pack(codes) != packed).sum() <= 2  # a value half-way between two codes, to the last digit, may take either
    restored = torch.tensor(CODE)[codes.int()] * m.repeat_interleave(64, 1)
    assert ((restored - w).abs() <= (values - w).abs() + 1e-6 * scale).all()
    assert (restored != values).sum() <= 2


def test_double_quantisation_loses_no_more():
    w = torch.randn(256, 1024) * 0.02
    ours = torch.linalg.norm(dequantise(quantise(w), 1024) - w)
    assert ours <= 1.001 * torch.linalg.norm(theirs(w, double=True)[1] - w)


class SingleNF4(NF4Linear):
    """A layer that keeps what bitsandbytes restores without double quantisation: PEFT's LoftQ is made with that."""

    def pack(self, W):
        self.values = theirs(W)[1]

    def unpacked_here(self, dtype=None):
        return self.values


@pytest.fixture
def on_cpu(monkeypatch):
    """PEFT makes LoftQ on an accelerator; here "cuda" is the CPU."""
    to = torch.Tensor.to

    def to_cpu(self, *args, **kwargs):
        args = tuple("cpu" if a == "cuda" else a for a in args)
        kwargs = {k: "cpu" if v == "cuda" else v for k, v in kwargs.items()}
        return to(self, *args, **kwargs)

    params_to = bnb.nn.Params4bit.to

    def params_to_cpu(self, *args, **kwargs):
        args = tuple("cpu" if a == "cuda" else a for a in args)
        return params_to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to_cpu)
    monkeypatch.setattr(bnb.nn.Params4bit, "to", params_to_cpu)
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_that_of_peft_where_the_scale_is_one(on_cpu, iterations):
    w = torch.randn(48, 128) * 0.02
    Q, A, B = loftq_utils.loftq_init(w, num_bits=4, reduced_rank=4, num_iter=iterations)
    layer = SingleNF4.of(nn.Linear(128, 48, bias=False))
    ours_B, ours_A = loftq(layer, w, 4, 1.0, iterations)
    assert torch.allclose(layer.values, Q, atol=1e-7)
    assert (ours_B @ ours_A - B @ A).abs().max() < 1e-5 * (B @ A).abs().max()
    assert (ours_B.square().sum(0) - B.square().sum(0)).abs().max() < 1e-5 * B.square().sum(0).max()  # B and A share the values alike


def test_peft_forgets_the_scale(on_cpu):
    """Its B A is the error's main part whatever s is; ours is s B A."""
    w = torch.randn(48, 128) * 0.02
    Q, A, B = loftq_utils.loftq_init(w, num_bits=4, reduced_rank=4, num_iter=1)
    s = 3.0
    layer = SingleNF4.of(nn.Linear(128, 48, bias=False))
    layer.values = Q
    ours_B, ours_A = factors_of_error(layer, w, 4, s)
    assert torch.allclose(s * ours_B @ ours_A, B @ A, atol=1e-7)
    error = torch.linalg.norm(w - Q)
    assert torch.linalg.norm(w - Q - s * ours_B @ ours_A) < error < torch.linalg.norm(w - Q - s * B @ A)


@pytest.mark.parametrize("use_dora", [False, True])
def test_forward_and_gradients_are_those_of_peft_beside_the_restored_weight(use_dora):
    """The same restored base and the same factors: PEFT on a plain layer that holds Q, ours on the packed one."""
    import peft

    model = nn.Sequential(nn.Linear(128, 48))
    twin = nn.Sequential(nn.Linear(128, 48))
    config = {"kind": "lora", "target_modules": ["0"], "params": {"r": 4, "alpha": 6, "use_dora": use_dora}}
    quantise_(model, ["0"])
    with torch.no_grad():
        twin[0].weight.copy_(model[0].unpacked_here())
        twin[0].bias.copy_(model[0].bias)
    inject_peft_and_freeze(peft_method_from_config(config), model)
    their_config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6, use_dora=use_dora, lora_dropout=0.0)
    other = peft.get_peft_model(twin, their_config).base_model.model[0]
    names = ["lora_A", "lora_B"] + (["lora_magnitude_vector"] if use_dora else [])
    with torch.no_grad():
        for name in names:
            mine, other_factor = getattr(model[0], name).weight, getattr(other, name)["default"].weight
            value = torch.randn(mine.shape) * 0.1 + (1.0 if "magnitude" in name else 0.0)
            mine.copy_(value), other_factor.copy_(value.view_as(other_factor))
    x = torch.randn(5, 128, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y, y2 = model(x), other(x2)
    assert (y - y2).abs().max() < 1e-5 * y2.abs().max()
    y.square().sum().backward(), y2.square().sum().backward()
    assert (x.grad - x2.grad).abs().max() < 1e-5 * x2.grad.abs().max()
    for name in names:
        g, g2 = getattr(model[0], name).weight.grad, getattr(other, name)["default"].weight.grad
        assert (g - g2.view_as(g)).abs().max() < 1e-5 * g2.abs().max()
