"""d9d's GroupedLinear under an adapter of ours, beside d9d's own LoRAGroupedLinear. Runs where d9d is installed."""

import pytest
import torch
from torch import nn

from d9d_lora import LoRAGroupedLinear, LoRAParameters, inject_peft_and_freeze
from d9d_lora.registry import peft_method_from_config

moe = pytest.importorskip("d9d.module.block.moe")
lora = pytest.importorskip("d9d.peft.lora")
theirs = pytest.importorskip("d9d.peft.lora.layer")
ExpertTokenGroups = pytest.importorskip("d9d.module.block.moe.grouped_mm").ExpertTokenGroups

COUNTS = torch.tensor([3, 0, 5, 1])


def test_names_values_gradients_and_merge_are_those_of_d9d():
    torch.manual_seed(0)
    its = theirs.LoRAGroupedLinear(moe.GroupedLinear(4, 8, 12), lora.LoRAParameters(r=3, alpha=5, dropout=0.0))
    nn.init.normal_(its.lora_B.weight)
    ours = LoRAGroupedLinear(moe.GroupedLinear(4, 8, 12), LoRAParameters(r=3, alpha=5))
    ours.load_state_dict(its.state_dict())
    x, groups = torch.randn(9, 8), ExpertTokenGroups(COUNTS)
    y, z = its(x, groups), ours(x, groups)
    assert (y - z).abs().max() < 1e-5
    y.square().sum().backward()
    z.square().sum().backward()
    for factor in ("lora_A", "lora_B"):
        a, b = (getattr(layer, factor).weight.grad for layer in (its, ours))
        assert (a - b).abs().max() < 1e-4 * a.abs().max()
    assert (its.merge_with_base_().weight - ours.merge_with_base_().weight).abs().max() < 1e-6


def test_its_experts_are_adapted_by_all_linear_and_its_router_is_not():
    block = pytest.importorskip("d9d.module.block.moe.grouped_experts")
    router = pytest.importorskip("d9d.module.block.moe.router")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = router.TopKRouter(8, 4, 2, renormalize_probabilities=True)
            self.grouped_experts = block.GroupedSwiGLU(8, 12, 4)

    model = nn.Sequential(Block())
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "target_modules": "all-linear"}), model)
    assert {n.rpartition(".lora")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        f"0.grouped_experts.{name}_proj" for name in ("gate", "up", "down")
    }
