"""State dicts of the real loralib, read and made: the same forward in both, layer kind by layer kind."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from d9d_lora import inject_peft_and_freeze, loralib, peft_method_from_config
from d9d_lora.loralib import LoralibError, load_loralib, loralib_state_dict
from d9d_lora.placement import local_of
from tests.catalogue import LAYOUTS
from tests.test_laws import make, wake

theirs_ = pytest.importorskip("loralib")
IDS = torch.arange(8)[None]


class Zoo(nn.Module):
    """Every layer of loralib, from loralib or from here; its convolutions of one and three dimensions work with kernels of 1 only."""

    def __init__(self, lib):
        super().__init__()
        self.embed = lib.Embedding(9, 6, r=2, lora_alpha=4, padding_idx=3)
        self.point = lib.Conv1d(6, 6, 1, r=2, lora_alpha=3)
        self.conv = lib.Conv2d(6, 4, 3, r=2, lora_alpha=6, padding=1)
        self.grouped = lib.Conv2d(4, 8, 3, r=2, lora_alpha=2, padding=1, groups=2)
        self.deep = lib.Conv2d(8, 8, 2, r=1, groups=8, bias=False)
        self.qkv = lib.MergedLinear(8, 12, r=2, lora_alpha=6, enable_lora=[True, False, True])
        self.out = lib.Linear(12, 3, r=2, lora_alpha=4)
        self.turned = lib.Linear(3, 5, r=2, fan_in_fan_out=True)
        self.norm = nn.LayerNorm(5)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        x = self.point(x).unflatten(2, (4, 2))
        x = self.deep(self.grouped(self.conv(x))).mean((2, 3))
        return self.norm(self.turned(self.out(self.qkv(x))))


def pair():
    """(loralib's model, ours): the same base weights, other factors."""
    torch.manual_seed(0)
    theirs, ours = Zoo(theirs_), Zoo(loralib)
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        for name, p in model.named_parameters():
            if "lora_" in name or "bias" in name:
                nn.init.normal_(p, std=0.5)
    return theirs, ours


def far(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


def test_a_whole_checkpoint_is_read():
    theirs, ours = pair()
    ours.load_state_dict(theirs.state_dict())
    assert far(ours(IDS), theirs(IDS)) < 1e-6


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("file", [False, True])
def test_both_ways(bias, file, tmp_path, proof):
    theirs, ours = pair()
    if bias == "none":
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "bias" in k}, strict=False)
    state = theirs_.lora_state_dict(theirs, bias)
    before = ours(IDS)
    if file:
        save_file(state, tmp_path / "a.safetensors")
    load_loralib(ours, tmp_path / "a.safetensors" if file else state)
    if bias == "lora_only":  # loralib does not find the biases of its convolutions
        load_loralib(ours, state | {k: v for k, v in theirs.state_dict().items() if "conv.bias" in k})
        ours.norm.load_state_dict(theirs.norm.state_dict())
    assert far(before, theirs(IDS)) > 1e-2
    difference = far(ours(IDS), theirs(IDS))
    assert difference < 1e-6
    proof("loralib state dict", "lora", "read", by="loralib", compared="outputs", difference=difference)

    back = loralib_state_dict(ours, bias)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    loose = {f"{name}.conv.bias" for name in ("conv", "grouped", "point")}
    assert back.keys() - state.keys() == (loose if bias == "lora_only" else set())
    fresh, _ = pair()
    fresh.load_state_dict({k: torch.zeros_like(v) if k in back else v for k, v in theirs.state_dict().items()})
    assert not fresh.load_state_dict(back, strict=False).unexpected_keys
    if bias == "all":
        assert torch.equal(fresh(IDS), theirs(IDS))
    ours.eval(), theirs.eval()
    assert far(ours(IDS), theirs(IDS)) < 1e-5  # both have merged


def test_gradients_are_loralibs():
    theirs, ours = pair()
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        model(IDS).square().mul(torch.arange(5)).sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    for name, p in ours.named_parameters():
        if "lora_" in name:
            assert torch.allclose(p.grad, grads[name.removesuffix(".weight")], rtol=1e-4, atol=1e-5), name


# -- a model that was injected into -----------------------------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 3, padding=1)
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        return self.qkv(self.conv(x).mean((2, 3)))


class Theirs(Bare):
    def __init__(self, r=2, alpha=4):
        super().__init__()
        self.conv = theirs_.Conv2d(6, 4, 3, padding=1, r=r, lora_alpha=alpha)
        self.qkv = theirs_.Linear(4, 12, r=r, lora_alpha=alpha)


def injected(bare, **fields):
    config = {"kind": "lora", "target_modules": ["conv", "qkv"], "params": {"r": 2, "alpha": 4}, **fields}
    inject_peft_and_freeze(peft_method_from_config(config), bare)
    for name, p in bare.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return bare


def copied(bare, theirs):
    theirs.load_state_dict({("conv." + k if k.startswith("conv") else k): v for k, v in bare.state_dict().items()}, strict=False)


def test_an_injected_model_is_written_for_loralib_and_read_again(proof):
    torch.manual_seed(0)
    bare, theirs, x = Bare(), Theirs(), torch.randn(2, 6, 5, 4)
    copied(bare, theirs)
    ours = injected(bare)
    state = loralib_state_dict(ours)
    theirs.load_state_dict(state, strict=False)
    assert state.keys() == theirs_.lora_state_dict(theirs).keys()
    difference = far(theirs(x), ours(x))
    assert difference < 1e-6
    proof("loralib state dict", "lora", "written", by="loralib", compared="outputs", difference=difference)
    y = ours(x)
    again = injected(ours_base(theirs))
    load_loralib(again, theirs_.lora_state_dict(theirs))
    assert torch.equal(again.conv.lora_A.weight, ours.conv.lora_A.weight)
    assert far(again(x), y) < 1e-6


def ours_base(theirs):
    bare = Bare()
    bare.load_state_dict({k.replace("conv.conv", "conv"): v for k, v in theirs.state_dict().items() if "lora" not in k})
    return bare


def test_a_convolution_that_loralib_trained_is_read_into_a_plain_product():
    torch.manual_seed(0)
    theirs, x = Theirs(), torch.randn(2, 6, 5, 4)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    low = injected(ours_base(theirs))
    with pytest.raises(LoralibError, match="rank 18 on this convolution"):
        load_loralib(low, theirs_.lora_state_dict(theirs))
    ours = injected(ours_base(theirs), rank_pattern={"conv": 18}, alpha_pattern={"conv": 36})
    load_loralib(ours, theirs_.lora_state_dict(theirs))
    assert far(ours(x), theirs(x)) < 1e-6


# -- what is refused --------------------------------------------------------------------------------------------------------------


def test_wrong_keys_are_named_and_nothing_is_changed(tmp_path):
    theirs, ours = pair()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    good = theirs_.lora_state_dict(theirs, "lora_only")
    faults = {
        "missing: 'qkv.lora_B'": {k: v for k, v in good.items() if k != "qkv.lora_B"},
        "unknown: 'qkv.lora_C', near": good | {"qkv.lora_C": torch.zeros(2)},
        "'qkv.lora_B' is .*expected": good | {"qkv.lora_B": torch.zeros(12, 2)},
        "not finite": good | {"out.lora_A": torch.full((2, 12), float("nan"))},
        "missing: 'turned.bias'": {k: v for k, v in good.items() if k != "turned.bias"},
        "base weights are no part": theirs.state_dict(),
    }
    for said, state in faults.items():
        with pytest.raises(LoralibError, match=said):
            load_loralib(ours, state)
    torch.save(good, tmp_path / "a.pt")
    with pytest.raises(LoralibError, match="pickle runs code"):
        load_loralib(ours, tmp_path / "a.pt")
    ours.eval()
    with pytest.raises(LoralibError, match=r"call `model.train\(\)` first"):
        load_loralib(ours, good)
    assert all(torch.equal(v, before[k]) for k, v in ours.train().state_dict().items())


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"params": {"r": 2, "use_dora": True}}, "plain LoRA"),
        ({"kind": "loha", "params": {"r": 2}}, "plain LoRA"),
        ({"params": {"r": 2, "init_lora_weights": "pissa"}}, "untouched"),
        ({"target_modules": ["qkv"], "params": {"r": 2, "enable_lora": [True, True], "slices": [4, 8]}}, "are equal"),
    ],
)
def test_adapters_that_loralib_has_not_are_refused(fields, said):
    model = Bare()
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "target_modules": ["conv", "qkv"], **fields}), model)
    with pytest.raises(LoralibError, match=said):
        loralib_state_dict(model)
    with pytest.raises(LoralibError, match="no adapter"):
        loralib_state_dict(Bare())


# -- layouts ----------------------------------------------------------------------------------------------------------------------


def _on_shards(rank, layout, path):
    model, _ = make("merged", "linear_bias", LAYOUTS[layout])
    wake(model)
    state = loralib_state_dict(model, "lora_only")
    if path is None:
        return state
    wanted = {n: local_of(p).clone() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if "lora_" in name:
            local_of(p).data.zero_()
    load_loralib(model, path)
    return state, all(torch.equal(local_of(p), wanted[n]) for n, p in model.named_parameters())


def test_shards_make_and_take_the_same_dict(pool, tmp_path):
    one = _on_shards(0, "one", None)
    save_file(one, tmp_path / "a.safetensors")
    for layout in ("fsdp2_tp2", "fsdp2"):
        for state, equal in pool.run(LAYOUTS[layout].world, _on_shards, layout, tmp_path / "a.safetensors"):
            assert equal
            assert state.keys() == one.keys()
            assert all(torch.equal(state[k], one[k]) for k in one)
