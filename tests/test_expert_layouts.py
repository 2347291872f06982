"""The layouts of experts' factors: dW as each consumer computes it, from what is handed to it, in fp64."""

import pytest
import torch

from d9d_lora.state import expert_layouts as layouts

E, I, R, GATE, UP = 3, 5, 2, 4, 4
O = GATE + UP
A = torch.randn(E, I, R, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
B = torch.randn(E, R, O, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
dW = (A @ B).mT  # [E, O, I]


def test_fused_is_what_peft_multiplies():
    fA, fB = layouts.fused_A(A), layouts.fused_B(B)
    theirs = torch.einsum("ore,eri->eoi", fB.reshape(O, -1, E), fA.reshape(E, -1, I))  # as PEFT's ParamWrapper and vLLM read them
    assert torch.allclose(theirs, dW, atol=1e-14)
    assert torch.equal(layouts.from_fused_A(fA, E), A)
    assert torch.equal(layouts.from_fused_B(fB, E), B)


def test_peft_itself():
    layer = pytest.importorskip("peft.tuners.lora.layer")
    host = torch.nn.Module()
    host.stack = torch.nn.Parameter(torch.zeros(E, O, I, dtype=torch.float64))
    wrapper = layer.ParamWrapper(host, "default", "stack", r=R, lora_alpha=R, config=__import__("peft").LoraConfig(r=R, lora_alpha=R))
    with torch.no_grad():
        wrapper.lora_A["default"].weight = torch.nn.Parameter(layouts.fused_A(A))
        wrapper.lora_B["default"].weight = torch.nn.Parameter(layouts.fused_B(B))
    assert torch.allclose(wrapper.get_delta_weight("default"), dW, atol=1e-14)


def test_per_expert_is_a_pair_for_every_matrix():
    pairs = layouts.per_expert(A, B, [GATE, UP])
    for e in range(E):
        gate, up = (b @ a for a, b in pairs[e])
        assert torch.allclose(torch.cat([gate, up]), dW[e], atol=1e-14)
    with pytest.raises(ValueError, match="are 7 rows, and the matrices have 8"):
        layouts.per_expert(A, B, [4, 3])


def test_gguf_multiplies_a_row_by_the_matrices_of_its_expert():
    x = torch.randn(7, I, dtype=torch.float64)
    ids = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    a, b = layouts.stacked_A(A), layouts.stacked_B(B)
    mul_mat_id = lambda stack, rows: torch.einsum("noi,ni->no", stack[ids], rows)  # noqa: E731
    assert torch.allclose(mul_mat_id(b, mul_mat_id(a, x)), mul_mat_id(dW, x), atol=1e-13)


def test_mutation_expert_major_B():
    """B read expert after expert, as A is: another dW."""
    wrong = torch.einsum("oer,eri->eoi", layouts.fused_B(B).reshape(O, E, -1), layouts.fused_A(A).reshape(E, -1, I))
    assert not torch.allclose(wrong, dW)
