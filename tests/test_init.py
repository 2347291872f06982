"""Starts without data: what their papers say of them, what moves the base and when, and the files they end in."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from d9d_lora import LoRAParameters, inject_peft_and_freeze, merge_peft, peft_method_from_config
from d9d_lora.adapters import AdapterMethod
from d9d_lora.init.weights import leading, olora, pissa, roughly_leading
from d9d_lora.methods.lora import LoRALinear
from d9d_lora.thin import Thin
from d9d_lora.train import optim
from d9d_lora.train.config import OptimConfig
from d9d_lora.walk import adapted_layers
from tests.small_run import losses, make_assets, run
from tests.test_laws import LAYOUTS, batch, build, make
from tests.test_trainer import run_with

START = {"r": 4, "alpha": 6}


def weight(out=40, into=30, decay=0.9, dtype=torch.float64):
    """A matrix with known singular values."""
    generator = torch.Generator().manual_seed(1)
    n = min(out, into)
    U, V = (torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q for m in (out, into))
    return (U * decay ** torch.arange(n, dtype=torch.float64) @ V.T).to(dtype)


def best(W, r):
    U, S, V = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return torch.from_numpy(U[:, :r] * S[:r] @ V[:r])


# -- the papers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (300, 260), (260, 300)])  # the last two are too large for the exact way
def test_pissa_is_the_best_part_of_its_rank(shape):
    W = weight(*shape)
    B, A = pissa(Thin(W, "OI"), 4, 1.5)
    assert (1.5 * B @ A - best(W, 4)).abs().max() < 1e-10
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1))  # the root of each singular value on either side


def test_a_flat_spectrum_needs_the_whole_space_and_gets_it():
    W = torch.randn(200, 180, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    U, S, V = leading(Thin(W, "OI"), 3)
    assert ((U * S) @ V.T - best(W, 3)).abs().max() < 1e-9


def test_rounds_of_subspace_iteration_come_nearer():
    W = weight(300, 260, 0.97)
    off = []
    for rounds in (0, 2, 16):
        U, S, V = roughly_leading(Thin(W, "OI"), 4, rounds)
        off.append(float(((U * S) @ V.T - best(W, 4)).norm()))
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-3


def test_a_weight_of_less_than_the_rank():
    W = torch.ones(60, 50) @ torch.diag(torch.arange(50.0))
    B, A = pissa(Thin(W, "OI"), 3, 1.0)
    assert (B @ A - W).abs().max() < 1e-3 * W.abs().max()
    assert all(t.isfinite().all() for t in pissa(Thin(torch.zeros(60, 50), "OI"), 3, 1.0))


def test_olora_is_the_qr_decomposition():
    W = weight()
    B, A = olora(Thin(W, "OI"), 4)
    Q, R = np.linalg.qr(W.numpy())
    assert (B.T @ B - torch.eye(4, dtype=W.dtype)).abs().max() < 1e-12
    assert (B - torch.from_numpy(Q[:, :4])).abs().max() < 1e-12
    assert (A - torch.from_numpy(R[:4])).abs().max() < 1e-12


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_3", "olora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_residual_and_adapter_are_the_weight(start, dtype):
    """With a half-precision base the one error is the rounding of the residual: at most half a unit of its largest values."""
    model = nn.Sequential(nn.Linear(30, 40, bias=False)).to(dtype)
    W = model[0].weight.detach().clone()
    method = peft_method_from_config({"kind": "lora", "target_modules": ["0"], "params": {**START, "init_lora_weights": start}})
    inject_peft_and_freeze(method, model)
    assert torch.equal(model[0].base.weight, W)  # an injection moves nothing
    method.initialise(model)
    layer = model[0]
    residual = layer.base.weight.double()
    again = residual + layer.delta.scaling * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    rounding = torch.finfo(dtype).eps * residual.abs() / 2
    assert ((again - W.double()).abs() <= rounding + 1e-6 * (dtype != torch.float64) + 1e-14).all()
    assert (residual - W.double()).abs().max() > 0.01


def test_orthogonal_factors_are_both_live_and_cancel():
    layer = LoRALinear(nn.Linear(30, 40), LoRAParameters(r=6, alpha=6, init_lora_weights="orthogonal"), seed=3)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    assert (B @ A).abs().max() < 1e-7
    assert min(A.std(), B.std()) > 0.03
    again = LoRALinear(nn.Linear(30, 40), LoRAParameters(r=6, alpha=6, init_lora_weights="orthogonal"), seed=3)
    assert torch.equal(again.lora_A.weight, A)


@pytest.mark.parametrize(
    "start,zero,deviations",  # of A [8, 400] and B [300, 8]; a uniform value in +-b deviates by b / sqrt(3)
    [
        (True, None, (1 / (3 * 400) ** 0.5, 0)),
        (True, "A", (0, 1 / (3 * 8) ** 0.5)),
        ("gaussian", None, (1 / 8, 0)),
        ("gaussian", "A", (0, 1 / 8)),
        (False, None, (1 / (3 * 400) ** 0.5, 1 / (3 * 8) ** 0.5)),
    ],
)
def test_how_large_blind_starts_are(start, zero, deviations):
    params = LoRAParameters(r=8, init_lora_weights=start, init_zero=zero)
    layer = LoRALinear(nn.Linear(400, 300), params, seed=1)
    for factor, deviation in zip((layer.lora_A, layer.lora_B), deviations):
        assert abs(float(factor.weight.std()) - deviation) <= 0.05 * deviation


# -- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params,told",
    [
        ({"init_lora_weights": "pisa"}, "is no start; expected"),
        ({"init_lora_weights": "lora_ga"}, "gradient of the full weight"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r must be even, got 3"),
        ({"init_lora_weights": "olora", "init_zero": "A"}, "says itself how both factors start"),
        ({"init_lora_weights": "gaussian", "lora_bias": True}, "lora_bias goes with init_lora_weights true or false"),
        ({"lora_bias": True, "use_dora": True}, "exclude each other"),
        ({"alpha": 4, "lora_alpha": 5}, "two spellings of one field"),
        ({"scaling": "lora", "use_rslora": True}, "two spellings of one field"),
    ],
)
def test_parameters_that_make_no_sense(params, told):
    with pytest.raises(ValueError, match=told):
        LoRAParameters(**params)


def test_the_spellings_of_peft():
    ours = LoRAParameters(r=4, alpha=5, dropout=0.1, scaling="rslora")
    assert LoRAParameters(r=4, lora_alpha=5, lora_dropout=0.1, use_rslora=True) == ours
    assert LoRAParameters(alpha=5, lora_alpha=5).alpha == 5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_more_directions_than_the_weight_has(start):
    method = peft_method_from_config({"kind": "lora", "target_modules": ["0"], "params": {"r": 9, "init_lora_weights": start}})
    with pytest.raises(ValueError, match=r"0: the start .* takes r=9 directions of a weight \[8, 20\]"):
        inject_peft_and_freeze(method, nn.Sequential(nn.Linear(20, 8)))


def test_the_base_is_moved_once():
    model, method = make("pissa", "linear", LAYOUTS["one"])
    with pytest.raises(ValueError, match="was moved by its start already"):
        method.initialise(model)
    fresh = build("linear")
    inject_peft_and_freeze(method, fresh)
    with pytest.raises(RuntimeError, match="has not been started"):
        fresh(batch(0)[0])


def test_a_weight_that_another_layer_uses_is_not_moved():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    method = peft_method_from_config({"kind": "lora", "target_modules": ["0"], "params": {**START, "init_lora_weights": "pissa"}})
    with pytest.raises(ValueError, match="shares its weight with 1"):
        inject_peft_and_freeze(method, model)
    assert type(model[0]) is nn.Linear


# -- merged, removed --------------------------------------------------------------------------------------------------------------


def test_merged_and_removed_are_the_base_again():
    plain = build("linear")
    for leave in (lambda m, model: merge_peft(m, model), lambda m, model: m.remove(model)):
        model, method = make("pissa", "linear", LAYOUTS["one"])
        leave(method, model)
        assert not list(adapted_layers(model))
        assert all((p - q).abs().max() < 1e-12 for p, q in zip(model.parameters(), plain.parameters()))


# -- resumed ----------------------------------------------------------------------------------------------------------------------

PISSA = {"peft": {"kind": "lora", "target_modules": "all-linear", "params": {"r": 4, "alpha": 8, "init_lora_weights": "pissa"}}}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def uninterrupted(pool, assets, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, pool.run(2, run, assets, output, {**PISSA, "checkpoint__every": 2, "train__steps": 4})[0]


def test_a_resume_moves_the_base_as_the_first_run_did(pool, assets, uninterrupted, tmp_path):
    output, whole = uninterrupted
    path = str(output / "checkpoints" / "step_00000002")
    options = {**PISSA, "train__steps": 4, "checkpoint__resume": path}
    resumed = pool.run(2, run, assets, tmp_path / "fsdp2", options)[0]
    assert losses(resumed) == losses(whole)[2:]
    (one,) = pool.run(1, run, assets, tmp_path / "one", options)
    assert max(abs(a - b) for a, b in zip(losses(one), losses(whole)[2:], strict=True)) < 1e-9


def resume_without_the_move(rank, assets, output, options):
    def restore(self, module):
        for _, layer in self.layers(module):
            layer.started = True

    return run_with(AdapterMethod, "restore", restore, rank, assets, output, options)


def test_mutation_the_base_is_not_moved_again(pool, assets, uninterrupted, tmp_path):
    path = str(uninterrupted[0] / "checkpoints" / "step_00000002")
    options = {**PISSA, "train__steps": 4, "checkpoint__resume": path}
    resumed = pool.run(2, resume_without_the_move, assets, tmp_path, options)[0]
    assert max(abs(a - b) for a, b in zip(losses(resumed), losses(uninterrupted[1])[2:], strict=True)) > 1e-3


# -- LoRA+ ------------------------------------------------------------------------------------------------------------------------


def test_lora_plus_moves_b_by_the_ratio():
    """AdamW's first step has the size of the learning rate for every element that has a gradient."""
    model, _ = make("orthogonal", "linear", LAYOUTS["one"])  # both factors have a gradient at once
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = copy.deepcopy(params)
    config = OptimConfig(lr=1e-3, lora_plus_ratio=16, warmup=4)
    optimiser = optim.adamw(params, config)
    model(batch(0)[0]).square().sum().backward()
    optim.set_learning_rate(optimiser, optim.learning_rate(config, 0, 10))  # a quarter of the peak, for both
    optimiser.step()
    for name, p in params.items():
        rate = 2.5e-4 * (16 if "lora_B" in name else 1)
        assert abs(float((p - before[name]).abs().median()) - rate) < 0.01 * rate, name


def test_lora_plus_needs_a_b():
    with pytest.raises(ValueError, match="trains no `lora_B`"):
        optim.groups_of({"norm.weight": nn.Parameter(torch.ones(3))}, 4.0)
