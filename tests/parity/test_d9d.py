"""An object of ours inside d9d's own injector, stack and loader. Runs where d9d is installed."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from d9d_lora import LoRA, LoRAConfig, LoRAParameters
from d9d_lora.walk import adapted_layers

peft = pytest.importorskip("d9d.peft")
P = LoRAParameters(r=2, alpha=4, dropout=0.1)


def two():
    return nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})


def test_its_injector_and_merge_take_ours():
    model = two()
    x = torch.randn(3, 4)
    before = model["up"](x)
    method = LoRA(LoRAConfig(module_name_pattern="up|down", params=P))
    peft.inject_peft_and_freeze(method, model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.lora_{f}.weight" for layer in ("up", "down") for f in "AB"}
    assert torch.equal(model.eval()["up"](x), before)
    peft.merge_peft(method, model)
    assert not list(adapted_layers(model))


def test_its_stack_takes_two_of_ours():
    from d9d.peft.all import PeftStack

    model = two()
    stack = PeftStack([LoRA(LoRAConfig(module_name_pattern=name, params=P)) for name in ("up", "down")])
    mapper = peft.inject_peft_and_freeze(stack, model)
    assert len(mapper.state_dependency_groups()) == 4
    assert [layer.name for layer in adapted_layers(model)] == ["up", "down"]


def test_its_loader_streams_through_our_mapper(tmp_path):
    from d9d.model_state.io import load_model_state

    source, model = two(), two()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    mapper = peft.inject_peft_and_freeze(LoRA(LoRAConfig(module_name_pattern="up|down", params=P)), model)
    load_model_state(tmp_path, mapper, "cpu", model, show_progress=False)
    assert torch.equal(model["up"].base.weight, source["up"].weight)
    assert torch.equal(model["down"].base.bias, source["down"].bias)
