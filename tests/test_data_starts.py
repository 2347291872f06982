"""Starts from data: what they are by their papers, and that they are the same on every layout."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

from d9d_lora.init.data import Step, survey
from d9d_lora.init.eva_corda import Covariance, Principal, corda, eva, redistributed
from d9d_lora.placement import full_of
from d9d_lora.thin import Thin
from tests.catalogue import LAYOUTS, batch, build, dp_rank, mesh_of, plan_of, shard_data_parallel


def tokens(n, width, seed=0, rank=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g, dtype=torch.float64) * torch.linspace(3, 0.1, width, dtype=torch.float64) + 0.7
    return x if rank is None else x[:, :rank] @ torch.randn(rank, width, generator=g, dtype=torch.float64)


def alone(t):
    return t


def pca(k, parts):
    p = Principal(k, alone)
    for x in parts:
        p.add(p.of(x))
    return p


def test_principal_directions_are_those_of_all_the_data():
    x = tokens(60, 16, rank=7)  # what is kept spans all of it, so nothing is cut off on the way
    p = pca(5, x.split([11, 30, 2, 17]))
    _, S, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    directions, sizes = p.directions()
    assert (directions @ V[:5].T).abs().sub(torch.eye(5)).abs().max() < 1e-6
    assert (sizes - S[:5]).abs().max() < 1e-6 * S[0]
    assert (p.ratios() - S[:5].square() / S.square().sum()).abs().max() < 1e-9
    assert (p.ratios().diff() <= 0).all()


def test_what_is_cut_off_matters_little():
    x = tokens(400, 40)
    p = pca(4, x.split(50))
    _, _, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert (p.directions()[0] @ V[:2].T).norm(dim=0).min() > 0.99


def test_many_rows_give_the_directions_of_all_of_them():
    x = tokens(900, 60) * 0.93 ** torch.arange(60)  # far more rows than are kept, of a spectrum that falls: the subspace iteration
    p = pca(4, x.split(450))
    _, S, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    directions, sizes = p.directions()
    assert (directions * V[:4]).sum(1).abs().min() > 0.999
    assert (sizes / S[:4] - 1).abs().max() < 1e-3


def test_ranks_follow_the_explained_variance():
    shares = {"a": [0.5, 0.2, 0.05], "b": [0.9, 0.01], "c": [0.02]}
    assert redistributed(shares, 3) == {"a": 2, "b": 1, "c": 0}
    assert sum(redistributed(shares, 5).values()) == 5


def bare(layout):
    model = build("linear_bias")
    for p in model.parameters():
        p.requires_grad_(False)
    if layout.world == 1:
        return model, None
    mesh = mesh_of(layout)
    if layout.tp > 1:
        parallelize_module(model, mesh["tp"], plan_of(model, layout.sequence))
    shard_data_parallel(model, mesh, layout)
    if layout.dp == 1:
        return model, None
    dp = mesh["dp_replicate", "dp_shard"]._flatten("dp") if layout.replicate > 1 else mesh["dp_shard"]
    return model, dp.get_group()


def steps_of(model, me, dp, count=4):
    """Two microbatches a step over all ranks, whoever computes them."""
    for step in range(count):
        ids, target = batch(step)
        for micro in range(me, 4, dp):
            rows = slice(2 * micro, 2 * micro + 2)
            mask = target[rows, :, 0] > -0.8
            yield Step(lambda rows=rows, ids=ids: model(ids[rows]), mask)


def targets_of(model):
    return {n: m for n, m in model.named_modules() if n.endswith(("up", "down"))}


def law_of_eva(rank, layout_name, mutation):
    layout = LAYOUTS[layout_name]
    found = []
    for where in (LAYOUTS["one"], layout):
        model, group = bare(where)
        me, dp = (dp_rank(layout), layout.dp) if where is layout else (0, 1)
        if mutation == "each rank its own data" and where is layout:
            group = None
        targets = targets_of(model)
        ranks = dict.fromkeys(targets, (3, 6.0))
        found.append(eva(model, targets, ranks, steps_of(model, me, dp), group=group, tau=2))
    one, here = found
    assert {n: (e.r, e.alpha) for n, e in here.items()} == {n: (e.r, e.alpha) for n, e in one.items()}
    assert sum(e.r for e in one.values()) == 12
    for name, e in one.items():
        assert (here[name].A - e.A).abs().max() < 1e-5, name
        assert (e.A @ e.A.T - torch.eye(e.r)).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "tp4", "fsdp2_tp2", "hsdp2x2"])
def test_eva_is_the_same_on_every_layout(pool, layout):
    pool.run(LAYOUTS[layout].world, law_of_eva, layout, None)


def test_mutation_eva_of_each_ranks_own_data(pool):
    with pytest.raises(AssertionError, match="assert"):
        pool.run(2, law_of_eva, "fsdp2", "each rank its own data")


def law_of_corda(rank, layout_name, method):
    layout = LAYOUTS[layout_name]
    found = []
    for where in (LAYOUTS["one"], layout):
        model, group = bare(where)
        me, dp = (dp_rank(layout), layout.dp) if where is layout else (0, 1)
        targets = targets_of(model)
        seen = survey(model, targets, steps_of(model, me, dp), lambda _, x: Covariance(x.whole), group=group)
        found.append({n: corda(Thin(m.weight, "OI"), seen[n].mean, 3, 2.0, method) for n, m in targets.items()})
        weights = {n: full_of(m.weight) for n, m in targets.items()}
    for name, (B, A) in found[0].items():
        expected = 2.0 * B @ A
        assert (2.0 * found[1][name][0] @ found[1][name][1] - expected).abs().max() < 1e-4 * expected.abs().max(), name
        assert expected.norm() < 2 * weights[name].norm()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp2_tp2"])
def test_corda_is_the_same_on_every_layout(pool, layout, method):
    pool.run(LAYOUTS[layout].world, law_of_corda, layout, method)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", [(8, 13), (13, 8)])
def test_corda_is_the_svd_of_the_weight_times_the_covariance(shape, method):
    W, x = torch.randn(shape, dtype=torch.float64), tokens(50, shape[1])
    C = x.T @ x / 50
    B, A = corda(Thin(W, "OI"), C, 3, 2.0, method)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)
    U, S, Vt = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(0, 3) if method == "ipm" else slice(-3, None)
    expected = U[:, part] * S[part] @ Vt[part] @ torch.linalg.inv(C)
    assert (2.0 * B.double() @ A.double() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_layer_that_is_not_called_is_named():
    model = build("linear")
    model.idle = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"idle.*not called"):
        eva(model, {"idle": model.idle}, {"idle": (2, 2.0)}, steps_of(model, 0, 1))


def test_no_process_group_is_needed():
    assert not dist.is_initialized()
    model, _ = bare(LAYOUTS["one"])
    targets = targets_of(model)
    found = eva(model, targets, dict.fromkeys(targets, (2, 4.0)), steps_of(model, 0, 1), rho=1)
    assert all(e.r <= 2 for e in found.values())
    assert all(e.alpha == 4.0 * e.r / 2 for e in found.values())


# -- in the trainer ------------------------------------------------------------------------------------------------------------

EVA = {
    "kind": "lora",
    "target_modules": "all-linear",
    "params": {"r": 3, "alpha": 6, "init_lora_weights": "eva", "eva_config": {"tau": 1.0}},
}
CORDA = {"kind": "lora", "target_modules": ["q_proj", "down_proj"], "params": {"r": 3, "alpha": 6, "init_lora_weights": "corda"}}
DORA = {"kind": "dora", "target_modules": ["q_proj", "up_proj"], "params": {"r": 3, "alpha": 6, "init_lora_weights": "eva"}}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    from tests.small_run import make_assets

    return make_assets(tmp_path_factory.mktemp("assets"))


# Eight rows a step where the loss must be seen to fall in six steps: of four they differ too much for DoRA.
@pytest.mark.parametrize("peft,rows", [(EVA, 4), (CORDA, 4), (DORA, 8)], ids=["eva", "corda", "dora from eva"])
def test_a_run_that_starts_from_data_is_the_same_on_layouts_and_resumes(pool, assets, tmp_path, peft, rows):
    from tests.small_run import losses, run

    overrides = {"peft": peft, "data__batch_size": rows}
    (one,) = pool.run(1, run, assets, tmp_path / "one", overrides)
    assert losses(one)[-1] < losses(one)[0]
    part = {**overrides, "train__steps": 6, "checkpoint__every": 3, "checkpoint__keep": 9}
    whole = pool.run(2, run, assets, tmp_path / "whole", part)[0]
    tp2 = pool.run(2, run, assets, tmp_path / "tp2", {**overrides, "parallel__tp": 2})[0]
    for found in (whole, tp2):
        assert max(abs(a - b) for a, b in zip(losses(found), losses(one), strict=True)) < 1e-6
    third = next(p for p in (tmp_path / "whole/checkpoints").iterdir() if p.name.endswith("3"))
    again = {**part, "checkpoint__resume": str(third)}
    resumed = pool.run(2, run, assets, tmp_path / "again", again)[0]
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    crossed = pool.run(2, run, assets, tmp_path / "crossed", {**again, "parallel__tp": 2})[0]
    assert max(abs(a - b) for a, b in zip(losses(crossed)[-3:], losses(whole)[-3:])) < 1e-6


def test_without_a_survey_the_injection_says_what_is_missing():
    from d9d_lora import inject_peft_and_freeze, peft_method_from_config

    with pytest.raises(ValueError, match=r"call `method.survey\(model, steps\)`"):
        inject_peft_and_freeze(peft_method_from_config({**EVA, "target_modules": ["up", "down"]}), build("linear"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_survey_leaves_every_module_in_the_mode_it_was_in(fails):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    model[1].eval()  # frozen statistics, as users keep them
    targets = {"0": model[0], **({"idle": nn.Linear(4, 4)} if fails else {})}
    steps = [Step(lambda: model(torch.randn(3, 4)))]
    with pytest.raises(ValueError, match=r"idle.*were not called") if fails else contextlib.nullcontext():
        survey(model, targets, steps, lambda _, x: Covariance(x.whole))
    assert [m.training for m in model.modules()] == [True, True, False, True]
