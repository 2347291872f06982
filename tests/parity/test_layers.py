"""Layer kinds against the PEFT library, number for number: convolutions and plain parameters."""

import copy

import pytest
import torch
from torch import nn

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config
from d9d_lora.layers.parameter import AdaptedParameter
from d9d_lora.state.expert_layouts import from_fused_A, from_fused_B

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


# -- plain parameters: target_parameters ------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two stacks, read in one forward; GPT-OSS stores its matrices the other way round, and says so."""

    def __init__(self, turned):
        super().__init__()
        self.is_transposed = turned
        self.up = nn.Parameter(torch.randn(3, 5, 8) if turned else torch.randn(3, 8, 5))
        self.down = nn.Parameter(torch.randn(3, 8, 5) if turned else torch.randn(3, 5, 8))
        self.flat = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        way = "bi,eio->ebo" if self.is_transposed else "bi,eoi->ebo"
        back = "ebi,eio->bo" if self.is_transposed else "ebi,eoi->bo"
        return torch.einsum(back, torch.relu(torch.einsum(way, x, self.up)), self.down) @ self.flat.T


def wrappers(module):
    """PEFT nests one wrapper a parameter: the last parameter of the module is the outermost."""
    found = {}
    while hasattr(module, "base_layer"):
        found[module.parameter_name] = module
        module = module.base_layer
    return found


def same_factors_and_gradients(ours, theirs, run, count):
    """Puts PEFT's factors into ours, and compares the output and the gradient of each."""
    layers = [m for m in ours.modules() if isinstance(m, AdaptedParameter)]
    assert len(layers) == count
    pairs = []
    for layer in layers:
        host, _, parameter = layer.name.rpartition(".")
        wrapper = wrappers(theirs.get_submodule(host))[parameter]
        for name in ("lora_A", "lora_B"):
            p = getattr(wrapper, name)["default"].weight
            mine = layer.factor(name)
            read = {"lora_A": from_fused_A, "lora_B": from_fused_B}[name] if mine.ndim == 3 else lambda t, _: t
            with torch.no_grad():
                mine.copy_(read(p, len(mine)))
            pairs.append((layer.factor(name), p, f"{layer.name}.{name}", read))
    y, z = run(ours), run(theirs)
    same(y, z, "output")
    y.square().mean().backward()
    z.square().mean().backward()
    for p, q, name, read in pairs:
        same(p.grad, read(q.grad, len(p)), name)
        assert q.grad.abs().max() > 0, name


@pytest.mark.parametrize("turned", [False, True])
def test_target_parameters(turned):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(5, 5), Experts(turned))
    ours = copy.deepcopy(theirs)
    targets = ["1.up", "down", "flat"]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(theirs, config)
    method = peft_method_from_config({"kind": "lora", "target_parameters": targets, "params": {"r": 2, "alpha": 6}})
    inject_peft_and_freeze(method, ours)
    x = torch.randn(4, 5)
    same_factors_and_gradients(ours, theirs, lambda m: m(x), 3)
    merge_peft(method, ours)
    merged = wrapped.merge_and_unload()[1]
    for name in targets:
        same(getattr(ours[1], name[-4:].lstrip("1.")), getattr(merged, name[-4:].lstrip("1.")), name)


def test_target_parameters_of_qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    theirs = Qwen3MoeForCausalLM(config)
    ours = copy.deepcopy(theirs)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets, init_lora_weights=False)
    )
    method = peft_method_from_config({"kind": "lora", "target_parameters": targets, "params": {"r": 3, "alpha": 6}})
    inject_peft_and_freeze(method, ours)
    ids = torch.arange(12).view(2, 6)
    same_factors_and_gradients(ours, theirs, lambda m: m(ids).logits, 4)
    with torch.no_grad():
        before = ours(ids).logits
        merge_peft(method, ours)
        same(ours(ids).logits, before, "merged")


def attention():
    """(ours, PEFT's, [(our layer, PEFT's)]): in both, the same factors; PEFT adapts the module, here its two weights are named."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.MultiheadAttention(8, 2))
    ours = copy.deepcopy(theirs)
    peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    targets = ["in_proj_weight", "out_proj.weight"]
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "target_parameters": targets, "params": {"r": 2, "alpha": 6}}), ours)
    pairs = [(ours[0].in_proj_weight_adapter, theirs[0]), (ours[0].out_proj.weight_adapter, theirs[0].base_layer.out_proj)]
    for layer, wrapper in pairs:
        for name in ("lora_A", "lora_B"):
            layer.factor(name).data.copy_(getattr(wrapper, name)["default"].weight)
    return ours, theirs, pairs


def test_torch_attention_by_its_parameters():
    """Compared with B of the output projection at zero, for the reason of the next test."""
    ours, theirs, pairs = attention()
    pairs[1][0].factor("lora_B").data.zero_()
    pairs[1][1].lora_B["default"].weight.data.zero_()
    x = torch.randn(3, 5, 8)
    y, z = ours[0](x, x, x)[0], theirs[0](x, x, x)[0]
    same(y, z, "output")
    y.square().sum().backward()
    z.square().sum().backward()
    for layer, wrapper in pairs:
        for name in ("lora_A", "lora_B"):
            assert torch.allclose(layer.factor(name).grad, getattr(wrapper, name)["default"].weight.grad, rtol=1e-4, atol=1e-4), name


def test_peft_adds_the_update_of_an_output_projection_twice():
    ours, theirs, pairs = attention()
    x = torch.randn(3, 5, 8)
    z = theirs[0](x, x, x)[0]
    assert not torch.allclose(ours[0](x, x, x)[0], z, atol=0.1)
    pairs[1][0].factor("lora_B").data.mul_(2)
    same(ours[0](x, x, x)[0], z)
