"""What a step of each method costs beside the frozen layer, counted, and held to the formula in the method's own file (`Delta.cost`)."""

import pytest
import torch
from torch import nn

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.measure import flops, saved_bytes
from d9d_lora.methods import lokr
from d9d_lora.methods.delta import Parts
from d9d_lora.walk import adapted_layers

N = 32
TALL, WIDE, SQUARE = (40, 24), (24, 40), (64, 64)
ROWS = {
    "lora": ({"r": 4, "alpha": 8}, WIDE),
    "dora": ({"r": 4, "alpha": 8}, WIDE),
    "adalora": ({"init_r": 4, "target_r": 2, "total_step": 9}, WIDE),
    "loha": ({"r": 2, "alpha": 8}, WIDE),  # r^2 = 4 is below O I / (O + I) = 15
    "loha dense": ({"r": 6, "alpha": 8}, WIDE),
    "lokr": ({"r": 2, "alpha": 8}, SQUARE),  # both are 8 x 8, w2 of rank 2
    "lokr whole": ({"r": 20, "alpha": 8}, SQUARE),
    "lokr both": ({"r": 2, "alpha": 8, "decompose_both": True}, SQUARE),
    "lokr joined": ({"r": 3, "alpha": 8, "decompose_factor": 16}, SQUARE),  # w2 is 4 x 4: cheaper multiplied out
    "vblora": ({"r": 3, "num_vectors": 16, "vector_length": 8, "topk": 2}, WIDE),
    "vera": ({"r": 5}, WIDE),
    "randlora": ({"r": 5, "alpha": 6}, TALL),
    "randlora wide": ({"r": 5, "alpha": 6}, WIDE),
}


def adapted(row, dtype=torch.float32):
    params, (out, into) = ROWS[row]
    model = nn.Sequential(nn.Linear(into, out, bias=False)).to(dtype)
    method = peft_method_from_config({"kind": row.split()[0], "target_modules": ["0"], "params": params})
    inject_peft_and_freeze(method, model)
    (layer,) = adapted_layers(model)
    return model, layer


def count(model):
    """(FLOPs beyond the frozen layer, bytes kept beside x and the parameters) of N inputs."""
    x = torch.randn(2, N // 2, model[0].in_size, dtype=model[0].base.weight.dtype, requires_grad=True)
    kept = saved_bytes(lambda: model(x), [x, *model.parameters(), *model.buffers()])
    return flops(lambda: model(x).sum().backward()) - 4 * N * model[0].base.weight.numel(), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS)
def test_a_step_costs_what_the_formula_of_its_method_says(row, dtype):
    """In bf16, too: its factors are in fp32, and no cast one is kept."""
    model, layer = adapted(row, dtype)
    assert {p.dtype for p in layer.factors().values()} == {torch.float32}
    flops, kept, besides = layer.delta.cost(N, layer.out_size, layer.in_size)
    assert count(model) == (flops, kept * dtype.itemsize + besides)


@pytest.mark.parametrize("row,method", [("adalora", "factors_in"), ("loha dense", "apply"), ("randlora", "apply"), ("lokr", "apply")])
def test_mutation_the_other_cast(monkeypatch, row, method):
    """What is made anew cast by the step itself; parts cast before the step that keeps them."""
    model, layer = adapted(row, torch.bfloat16)
    real = getattr(type(layer.delta), method)
    wrong = {
        "factors_in": lambda self, f, dtype: self.factors(f),
        "apply": lambda self, x, f: real(self, x, Parts({n: t.to(x.dtype) for n, t in f.items()}, f.rows, f.cols)),
    }
    monkeypatch.setattr(type(layer.delta), method, wrong[method])
    _, kept, besides = layer.delta.cost(N, layer.out_size, layer.in_size)
    assert count(model)[1] > kept * 2 + besides


def test_mutation_another_order_of_a_kronecker_product(monkeypatch):
    model, layer = adapted("lokr both")
    expected = layer.delta.cost(N, 64, 64)
    best = lokr.cheapest
    monkeypatch.setattr(lokr, "cheapest", lambda w1, w2: best((w1[0], w1[-1]), w2)._replace(thin1=False))
    assert count(model)[0] > expected.flops


def test_mutation_autograd_left_to_itself_keeps_what_lies_between(monkeypatch):
    model, layer = adapted("lokr")
    monkeypatch.setattr(lokr, "checkpoint", lambda run, *args, **options: run(*args))
    assert count(model)[1] > layer.delta.cost(N, 64, 64).kept == 0


@pytest.mark.parametrize("sizes", [((64, 64), (64, 8, 64)), ((8, 2, 8), (8, 2, 8)), ((1, 1), (40, 3, 24)), ((4, 3, 9), (7, 3, 2))])
def test_no_order_of_a_kronecker_product_is_cheaper(sizes):
    """Against every order, walked one product at a time."""

    def walks(q, v):
        if len(q) == len(v) == 1:
            yield 0
        if len(q) > 1:
            yield from (q[0] * q[1] * v[0] + rest for rest in walks(q[1:], v))
        if len(v) > 1:
            yield from (v[0] * v[1] * q[0] + rest for rest in walks(q, v[1:]))

    w1, w2 = sizes
    every = [c for q in (w1, (w1[0], w1[-1])) for v in (w2, (w2[0], w2[-1])) for c in walks(q, v)]
    assert sum(lokr.cheapest(w1, w2).steps) == min(every)
