"""VB-LoRA, VeRA and RandLoRA beside the real PEFT library: the same bases from the same key, then forward, gradients, merged weights."""

import copy
import warnings

import pytest
import torch
from torch import nn

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config
from d9d_lora.methods.vblora import read_small_form_, small_form
from d9d_lora.walk import adapted_layers
from tests.catalogue import LAYERS, batch, build

peft = pytest.importorskip("peft")
TARGETS = ["up", "down"]
NAMES = [f"blocks.{i}.{name}" for i in range(2) for name in TARGETS]

# our params, and PEFT's where they have other names
CASES = {
    "vblora": ({"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 2}, {}),
    "vblora top 3": ({"r": 2, "num_vectors": 9, "vector_length": 2, "topk": 3}, {}),
    "vblora top 1": ({"r": 2, "num_vectors": 5, "vector_length": 4, "topk": 1}, {}),
    "vera": ({"r": 6}, {}),
    "vera, another key": ({"r": 6, "projection_prng_key": 11, "d_initial": 0.3}, {}),
    "randlora": ({"r": 5, "alpha": 7}, {"r": 5, "randlora_alpha": 7}),
    "randlora, another key": ({"r": 4, "alpha": 9, "projection_prng_key": 11}, {"r": 4, "randlora_alpha": 9, "projection_prng_key": 11}),
    "randlora sparse": ({"r": 5, "alpha": 7, "sparse": True}, {"r": 5, "randlora_alpha": 7, "sparse": True}),
    "randlora very sparse": ({"r": 5, "alpha": 7, "very_sparse": True}, {"r": 5, "randlora_alpha": 7, "very_sparse": True}),
    "randlora of rank above the sizes": ({"r": 40, "alpha": 7}, {"r": 40, "randlora_alpha": 7}),
}
CLASSES = {"vblora": "VBLoRAConfig", "vera": "VeraConfig", "randlora": "RandLoraConfig"}
OWN = {
    "vblora": ("vblora_logits_A", "vblora_logits_B"),
    "vera": ("vera_lambda_b", "vera_lambda_d"),
    "randlora": ("randlora_lambda", "randlora_gamma"),
}


class Uneven(nn.Module):
    """Four layers of different shapes, square, tall and wide: every one takes another piece of the bases. Linear, so nothing saturates."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in ((12, 20), (20, 8), (8, 8), (8, 12))])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) / 2
        return x


def both(case, layer="linear_bias"):
    """(ours, our method, PEFT's, the pairs of layers), with our factors in both and nothing zero."""
    kind = case.partition(" ")[0].strip(",")
    params, fields = CASES[case]
    if layer == "uneven":
        torch.manual_seed(1)
        model, targets = Uneven(), ["0", "1", "2", "3"]
    else:
        model, targets = build(layer, torch.float32), LAYERS[layer].targets
    ours = copy.deepcopy(model)
    method = peft_method_from_config({"kind": kind, "target_modules": targets, "params": params})
    inject_peft_and_freeze(method, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, CLASSES[kind])(target_modules=targets, fan_in_fan_out=layer == "conv1d", **(fields or params))
        theirs = peft.get_peft_model(model, config)
    pairs = [(la, theirs.get_submodule(f"base_model.model.{la.name}")) for la in adapted_layers(ours)]
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for mine, its in pairs:
            for name in OWN[kind]:
                p = mine.factor(name)
                assert p.shape == getattr(its, name)["default"].shape
                if kind != "vblora":  # their starts follow from nothing random
                    assert torch.equal(p, getattr(its, name)["default"])
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
                getattr(its, name)["default"].copy_(p)
        if kind == "vblora":
            ours.vblora_vector_bank.weight.normal_(generator=generator)
            pairs[0][1].vblora_vector_bank["default"].copy_(ours.vblora_vector_bank.weight)
    return ours, method, theirs, pairs


def inputs(layer):
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(3)) if layer == "uneven" else batch(0)[0]


def close(a, b):
    assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), (a - b).abs().max()


@pytest.mark.parametrize("layer", ["linear_bias", "conv1d", "uneven"])
@pytest.mark.parametrize("case", CASES)
def test_forward_gradients_and_merged_weights(case, layer):
    ours, method, theirs, pairs = both(case, layer)
    x = inputs(layer)
    y, its_y = ours(x), theirs(x)
    close(y, its_y)
    y.square().sum().backward()
    its_y.square().sum().backward()
    for mine, its in pairs:
        for name in mine.delta.axes:
            close(mine.factor(name).grad, getattr(its, name)["default"].grad)
    if hasattr(ours, "vblora_vector_bank"):
        close(ours.vblora_vector_bank.weight.grad, pairs[0][1].vblora_vector_bank["default"].grad)
    merge_peft(method, ours)
    merged = theirs.merge_and_unload()
    for mine, _ in pairs:
        close(ours.get_submodule(mine.name).weight, merged.get_submodule(mine.name).weight)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("vblora")])
@pytest.mark.parametrize("layer", ["linear_bias", "uneven"])
def test_the_same_key_gives_the_same_bases_to_the_bit(case, layer):
    _, _, _, pairs = both(case, layer)
    for name, factor in pairs[0][0].shared.items():
        assert torch.equal(factor.weight.float(), getattr(pairs[0][1], name)["default"].float())


def test_the_small_form_is_what_peft_writes_and_reads():
    ours, _, theirs, pairs = both("vblora top 3")
    theirs.peft_config["default"].save_only_topk_weights = True
    file = peft.get_peft_model_state_dict(theirs)
    prefix = "base_model.model."
    written = {f"{prefix}{mine.name}.{k}": v for mine, _ in pairs for k, v in small_form(mine).items()}
    assert file.keys() - written.keys() == {"base_model.vblora_vector_bank"}
    assert all(v.dtype == file[k].dtype and torch.equal(v, file[k]) for k, v in written.items())
    ours.eval(), theirs.eval()
    expected = ours(inputs("linear_bias"))
    peft.set_peft_model_state_dict(theirs, {**written, "base_model.vblora_vector_bank": ours.vblora_vector_bank.weight.detach()})
    for mine, _ in pairs:
        read_small_form_(mine, {k.removeprefix(f"{prefix}{mine.name}."): v for k, v in file.items() if mine.name in k})
    close(theirs(inputs("linear_bias")), expected)
    close(ours(inputs("linear_bias")), expected)
    theirs.train(), ours.train()
    with pytest.raises(RuntimeError, match="infinity values"):
        theirs(inputs("linear_bias"))
    with pytest.raises(RuntimeError, match="no logits to train"):
        ours(inputs("linear_bias"))
