"""Layer kinds against the PEFT library, number for number: convolutions and plain parameters."""

import pytest
import torch
from torch import nn

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config

peft = pytest.importorskip("peft")


def same(a, b, what=""):
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), (what, float((a - b).abs().max()))


CONVS = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 6, 7, 8)),
    "2d_point": (lambda: nn.Conv2d(6, 8, 1, bias=False), (2, 6, 4, 3)),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 3, 2), stride=2), (2, 4, 5, 6, 5)),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("conv", CONVS)
def test_convolutions(conv, dora):
    """Where PEFT is well defined: one group, dilation 1."""
    make, shape = CONVS[conv]
    torch.manual_seed(0)
    theirs, ours = nn.Sequential(make()), nn.Sequential(make())
    ours.load_state_dict(theirs.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False, use_dora=dora)
    wrapped = peft.get_peft_model(theirs, config)
    params = {"r": 3, "alpha": 6, "use_dora": dora}
    method = peft_method_from_config({"kind": "lora", "target_modules": ["0"], "params": params})
    inject_peft_and_freeze(method, ours)
    layer, reference = ours[0], theirs[0]
    pairs = {"lora_A": reference.lora_A["default"].weight, "lora_B": reference.lora_B["default"].weight}
    if dora:
        pairs["lora_magnitude_vector"] = reference.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for name, p in pairs.items():
            layer.factor(name).copy_(p.reshape(layer.factor(name).shape))
    x = torch.randn(shape)
    y, z = ours(x), wrapped(x)
    same(y, z, "output")
    y.square().sum().backward()
    z.square().sum().backward()
    for name, p in pairs.items():
        grad = p.grad.reshape(layer.factor(name).shape)
        assert torch.allclose(layer.factor(name).grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max())), name
    merge_peft(method, ours)
    same(ours[0].weight, wrapped.merge_and_unload()[0].weight, "merged")


def test_what_peft_gets_wrong_about_convolutions():
    """Its path has dilation 1, so the shape of the output is another one; and with groups nothing can be merged."""
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    with pytest.raises(RuntimeError, match="size"):
        peft.get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2)), config)(torch.randn(1, 4, 9))
    grouped = peft.get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), config)
    grouped(torch.randn(1, 4, 9))
    with pytest.raises(NotImplementedError):
        grouped.merge_and_unload()
