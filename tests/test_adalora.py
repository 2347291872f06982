"""AdaLoRA's budget, masks and extra loss: on every layout those of one process, across resumes, and faults that must show."""

import re

import pytest
import torch
from safetensors.torch import load_file

from d9d_lora import inject_peft_and_freeze, peft_method_from_config, sums
from d9d_lora.measure import traffic
from d9d_lora.methods import adalora
from d9d_lora.methods.adalora import AdaLoRA, AdaLoRAConfig, AdaLoRAParameters
from d9d_lora.placement import full_of
from d9d_lora.sums import ReplicatedSum
from d9d_lora.walk import adapted_layers
from tests.catalogue import LAYOUTS, build, peft_config
from tests.small_run import losses, make_assets, run
from tests.test_laws import backward, close, make, trained, wake

PARAMS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 8, "lora_alpha": 6, "orth_reg_weight": 0.3}
STEPS = 9
UNEVEN = {**PARAMS, "init_r": 3, "target_r": 1, "deltaT": 1}


def train(model, method, layout, bucket=None, mutation=None, steps=STEPS):
    """Steps of a plain loop; the kept triplets of every layer after each."""
    optimiser = torch.optim.AdamW(trained(model).values(), lr=0.05)
    kept = []
    for step in range(steps):
        backward(model, layout, step)
        if bucket:
            bucket.reduce()
        method.add_extra_loss(model)
        if mutation == "sum the extra loss over tp":
            bucket.reduce()
        optimiser.step()
        method.after_step(model, step + 1)
        optimiser.zero_grad()
        kept.append({la.name: method.memory(la).kept.tolist() for la in adapted_layers(model)})
    return kept


def state_of(model, method):
    """Factors, and what the method remembers, whole."""
    own = {n: full_of(p.detach()) for n, p in trained(model).items()}
    return own | {n: full_of(t).to(torch.float64) for n, t in method.state(model).items()}


def law_of_the_budget(rank, layer, layout_name, params, mutation):
    layout = LAYOUTS[layout_name]
    reference, ref_method = make("adalora", layer, LAYOUTS["one"], params=params)
    model, method = make("adalora", layer, layout, params=params)
    bucket = ReplicatedSum(adapted_layers(model))
    if mutation == "a budget per shard":
        method.scores = lambda layers: with_(adalora, "sum_over_boxes", lambda parts: [v for _, v in parts], AdaLoRA.scores, method, layers)
    counts = (lambda p: True) if mutation == "a box of two ranks counts twice" else sums._counts
    ours = with_(sums, "_counts", counts, train, model, method, layout, bucket, mutation)
    theirs = train(reference, ref_method, LAYOUTS["one"])
    found, expected = state_of(model, method), state_of(reference, ref_method)
    pattern = method.rank_pattern(model)
    # From here on nothing travels: a fault may show on one rank only.
    assert ours == theirs, f"other triplets are kept: {ours[-1]} and {theirs[-1]}"
    close(found, expected, 1e-6)
    assert pattern == theirs[-1]
    assert {n.removesuffix(".lora_E.weight"): (t[:, 0] != 0).tolist() for n, t in found.items() if n.endswith("lora_E.weight")} == pattern
    ranks = [sum(kept) for kept in theirs[-1].values()]
    assert sum(ranks) == params["target_r"] * len(ranks)
    return ranks


def broken_by(rank, *args):
    """What the law of the budget says on this rank, or None if it holds."""
    try:
        law_of_the_budget(rank, *args)
    except AssertionError as error:
        return str(error)


def with_(owner, name, value, work, *args):
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return work(*args)
    finally:
        setattr(owner, name, real)


@pytest.mark.parametrize("params", [PARAMS, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("layout", ["replicate2", "fsdp2", "fsdp4", "tp2", "tp4", "tp2_sp", "fsdp2_tp2", "hsdp2x2"])
def test_masks_factors_and_memory_are_those_of_one_process(pool, layout, params):
    (ranks, *_) = pool.run(LAYOUTS[layout].world, law_of_the_budget, "linear_bias", layout, params, None)
    assert len(set(ranks)) > 1, "every layer got the same rank, so a budget for each layer would pass too"


@pytest.mark.parametrize("layer", ["conv1d", "embedding", "conv2d", "nf4"])
@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2_tp2"])
def test_on_other_layers(pool, layer, layout):
    pool.run(LAYOUTS[layout].world, law_of_the_budget, layer, layout, PARAMS, None)


@pytest.mark.parametrize(
    "mutation,layout,told",
    [
        ("a budget per shard", "fsdp2", "other triplets are kept"),
        ("a budget per shard", "tp2", "other triplets are kept"),
        ("a box of two ranks counts twice", "tp2", "other triplets are kept|is off by"),
        ("sum the extra loss over tp", "tp2", "other triplets are kept|is off by"),
        ("sum the extra loss over tp", "fsdp2_tp2", "other triplets are kept|is off by"),
    ],
)
def test_mutations_break_the_law_of_the_budget(pool, mutation, layout, told):
    said = pool.run(LAYOUTS[layout].world, broken_by, "linear_bias", layout, PARAMS, mutation)
    assert any(text and re.search(told, text) for text in said), said


# -- the extra loss -------------------------------------------------------------------------------------------------------------------


def term_by_autograd(model, weight):
    factors = [p for la in adapted_layers(model) for n, p in la.factors().items() if n != "lora_E"]
    norms = []
    for p in factors:
        gram = p @ p.T if p.shape[0] == PARAMS["init_r"] else p.T @ p
        norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    return weight * torch.stack(norms).mean()


def law_of_the_extra_loss(rank, layout_name):
    reference, _ = make("adalora", "linear_bias", LAYOUTS["one"], params=PARAMS)
    model, method = make("adalora", "linear_bias", LAYOUTS[layout_name], params=PARAMS)
    wake(reference), wake(model)
    expected = term_by_autograd(reference, PARAMS["orth_reg_weight"])
    expected.backward()
    found = method.add_extra_loss(model)
    torch.testing.assert_close(full_of(found), expected.detach())
    close(grads_of_some(model), grads_of_some(reference))


def grads_of_some(model):
    return {n: full_of(p.grad) for n, p in trained(model).items() if "lora_A" in n or "lora_B" in n}


@pytest.mark.parametrize("layout", ["one", "fsdp2", "tp2", "tp4", "fsdp2_tp2", "hsdp2x2"])
def test_the_extra_loss_is_autograds(pool, layout):
    pool.run(LAYOUTS[layout].world, law_of_the_extra_loss, layout)


def test_at_the_least_value_the_gradient_is_zero():
    model, method = make("adalora", "linear", LAYOUTS["one"], params=PARAMS)
    with torch.no_grad():
        for la in adapted_layers(model):
            for name in ("lora_A", "lora_B"):
                torch.nn.init.orthogonal_(la.factor(name))
                la.factor(name).zero_()[: PARAMS["init_r"], : PARAMS["init_r"]].fill_diagonal_(1)
    assert method.add_extra_loss(model) == 0
    assert all(g.abs().max() == 0 for g in grads_of_some(model).values())


def step_traffic(rank, layout_name):
    """What travels for the method itself in a step without an allocation, and in one with."""
    layout = LAYOUTS[layout_name]
    model, method = make("adalora", "linear", layout, params={**PARAMS, "tinit": 0, "deltaT": 2})
    found = []
    for step in (1, 2):
        backward(model, layout, step)
        with traffic() as extra:
            method.add_extra_loss(model)
        with traffic() as after:
            method.after_step(model, step)
        found.append([(dict(t.count), dict(t)) for t in (extra, after)])
    return found


@pytest.mark.parametrize("layout,sums,gathers", [("fsdp2", 1, 1), ("fsdp4", 1, 1), ("tp2", 1, 0), ("fsdp2_tp2", 2, 1)])
def test_scores_and_grams_travel_in_one_sum_a_mesh_dimension_and_idle_steps_send_no_score(pool, layout, sums, gathers):
    layers, r, number = 4, PARAMS["init_r"], 8  # bytes in fp64
    gram = {"all_reduce": sums * 2 * layers * r * r * number}
    thin = r * 2 * (12 + 20 // LAYOUTS[layout].tp) * number  # A of two up and two down, all rows
    for idle, allocates in pool.run(LAYOUTS[layout].world, step_traffic, layout):
        for extra, _ in (idle, allocates):
            assert extra[0] == {"all_reduce": sums} | ({"all_gather": gathers} if gathers else {})
            assert extra[1] == gram | ({"all_gather": thin} if gathers else {})
        assert idle[1] == ({}, {})
        assert allocates[1] == ({"all_reduce": sums}, {"all_reduce": sums * layers * 3 * r * number})


# -- the schedule, and what is refused ------------------------------------------------------------------------------------------------


def test_the_schedule():
    p = AdaLoRAParameters(init_r=12, target_r=8, tinit=2, tfinal=3, deltaT=2, total_step=13)
    assert [p.budget(step, 2) for step in range(1, 14)] == [
        None, None, None, int(8 * 0.75**3 + 16), None, int(8 * 0.5**3 + 16), None, int(8 * 0.25**3 + 16), None, 16, None, None, None
    ]  # fmt: skip


def test_equal_ranks_mask_nothing():
    model, method = make("adalora", "linear", LAYOUTS["one"], params={**PARAMS, "target_r": 4})
    kept = train(model, method, LAYOUTS["one"])
    assert all(all(flags) for flags in kept[-1].values())


@pytest.mark.parametrize(
    "config,told",
    [
        ({"params": {"r": 8, "total_step": 9}}, "give init_r"),
        ({"params": {"target_r": 9, "init_r": 4, "total_step": 9}}, "ranks only fall"),
        ({"params": {"tinit": 5, "tfinal": 4, "total_step": 9}}, "leave none of total_step=9"),
        ({"rank_pattern": {"up": 3}, "params": {"total_step": 9}}, "finds the rank of each layer itself"),
        ({"alpha_pattern": {"up": 3}, "params": {"total_step": 9}}, "one alpha"),
        ({"params": {"use_dora": True, "total_step": 9}}, "use_dora"),
        ({"params": {}}, "give its number of optimiser steps"),
    ],
)
def test_refusals(config, told):
    with pytest.raises(ValueError, match=told):
        peft_method_from_config({"kind": "adalora", "target_modules": ["up"], **config})


def test_one_adalora_at_a_time():
    def config(name):
        return {**peft_config("adalora", "linear"), "target_modules": [name]}

    model = build("linear")
    with pytest.raises(ValueError, match="all layers share one budget"):
        inject_peft_and_freeze(peft_method_from_config({"kind": "stack", "methods": [config("up"), config("down")]}), model)
    assert not list(adapted_layers(model))


def test_after_zero_grad_is_too_late():
    model, method = make("adalora", "linear", LAYOUTS["one"], params=PARAMS)
    with pytest.raises(ValueError, match="call after_step before zero_grad"):
        method.after_step(model, 1)


def test_a_frozen_adapter_is_left_alone():
    model, method = make("adalora", "linear", LAYOUTS["one"], params=PARAMS)
    model.requires_grad_(False)
    method.after_step(model, 2)
    assert method.add_extra_loss(model) is None
    assert all(p.grad is None for p in model.parameters())
    assert all(method.memory(la).kept.all() for la in adapted_layers(model))


def test_both_spellings_of_alpha():
    assert AdaLoRAParameters(alpha=3, dropout=0.1) == AdaLoRAParameters(lora_alpha=3, lora_dropout=0.1)
    with pytest.raises(ValueError, match="Extra inputs"):
        AdaLoRAParameters(alpha=3, lora_alpha=4)


def test_the_run_tells_its_length():
    config = AdaLoRAConfig(target_modules=["up"])
    assert config.of_length(40).params.total_step == 40
    assert AdaLoRAConfig(target_modules=["up"], params={"total_step": 9}).of_length(40).params.total_step == 9
    with pytest.raises(ValueError, match="leave none of total_step=5"):
        AdaLoRAConfig(target_modules=["up"], params={"tinit": 5}).of_length(5)


# -- pruning --------------------------------------------------------------------------------------------------------------------------


def pruned_on(rank, layout_name):
    """(dW of whole factors, dW of pruned ones, ranks)."""
    layout = LAYOUTS[layout_name]
    model, method = make("adalora", "linear", layout, params=PARAMS)
    train(model, method, layout, steps=7, bucket=ReplicatedSum(adapted_layers(model)))
    found = {}
    for name, f in method.pruned(model).items():
        layer = model.get_submodule(name)
        whole = layer.delta.dense(layer.delta.part(layer.whole_factors(), slice(None), slice(None)))
        cut = layer.delta.scaling * f["lora_B"] @ torch.diag(f["lora_E"][:, 0]) @ f["lora_A"]
        torch.testing.assert_close(cut, whole)
        found[name] = [f[n].shape for n in ("lora_A", "lora_E", "lora_B")]
    return found


def test_pruned_factors_make_the_same_update(pool):
    (one,) = pool.run(1, pruned_on, "one")
    assert pool.run(4, pruned_on, "fsdp2_tp2") == [one] * 4
    ranks = [a[0] for a, _, _ in one.values()]
    assert sum(ranks) == PARAMS["target_r"] * len(ranks)
    assert [(a[0], e[0], b[1]) for a, e, b in one.values()] == [(r, r, r) for r in ranks]


def test_a_triplet_that_grew_back_is_kept_by_an_export():
    model, method = make("adalora", "linear", LAYOUTS["one"], params=PARAMS)
    train(model, method, LAYOUTS["one"], steps=5)  # allocated after steps 2 and 4; AdamW's moments have moved E in step 5
    layers = list(adapted_layers(model))
    assert any(not method.memory(la).kept.all() for la in layers)
    assert all((la.factor("lora_E") != 0).all() for la in layers)
    assert all(all(flags) for flags in method.rank_pattern(model).values())


# -- the trainer ----------------------------------------------------------------------------------------------------------------------

RUN = {"kind": "adalora", "target_modules": "all-linear"}
RUN["params"] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "lora_alpha": 16, "lora_dropout": 0.1, "total_step": 6}
PEFT = {"peft": RUN, "optim__lr": 0.05}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def one(pool, assets, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    (summary,) = pool.run(1, run, assets, output, {**PEFT, "checkpoint__every": 3})
    return output, summary


def weights_of(output):
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    return {name: t for name, t in tensors.items() if t.numel()}  # a layer may keep no triplet


def same_run(summary, output, one, first=0):
    expected = losses(one[1])[first:]
    assert losses(summary) == pytest.approx(expected, rel=1e-9)
    close(weights_of(output), weights_of(one[0]), 1e-6)


@pytest.mark.parametrize("layout,world,degrees", [("fsdp2", 2, {}), ("fsdp2_tp2", 4, {"parallel__tp": 2})])
def test_a_run_equals_one_process(pool, assets, one, tmp_path, layout, world, degrees):
    summary = pool.run(world, run, assets, tmp_path, {**PEFT, **degrees})[0]
    same_run(summary, tmp_path, one)
    assert [m["extra_loss"] for m in summary["metrics"] if "loss" in m] == pytest.approx(
        [m["extra_loss"] for m in one[1]["metrics"] if "loss" in m]
    )


@pytest.mark.parametrize("world,degrees", [(1, {}), (2, {}), (2, {"parallel__tp": 2}), (4, {"parallel__dp_replicate": 2})])
def test_resumed_on_another_layout(pool, assets, one, tmp_path, world, degrees):
    path = str(one[0] / "checkpoints" / "step_00000003")
    summary = pool.run(world, run, assets, tmp_path, {**PEFT, **degrees, "checkpoint__resume": path})[0]
    same_run(summary, tmp_path, one, first=3)


def resume_without_memory(rank, assets, output, overrides):
    def forget(self, module):
        self._memory.clear()

    return with_(AdaLoRA, "restore", forget, run, rank, assets, output, overrides)


def test_mutation_a_resume_that_loses_the_memory(pool, assets, one, tmp_path):
    path = str(one[0] / "checkpoints" / "step_00000003")
    (summary,) = pool.run(1, resume_without_memory, assets, tmp_path, {**PEFT, "checkpoint__resume": path})
    with pytest.raises(AssertionError):
        same_run(summary, tmp_path, one, first=3)


def test_another_length_is_another_run_where_the_run_set_the_schedule(pool, assets, tmp_path):
    params = {k: v for k, v in RUN["params"].items() if k != "total_step"}
    options = {"peft": {**RUN, "params": params}, "train__steps": 3, "checkpoint__every": 3}
    pool.run(1, run, assets, tmp_path, options)
    with pytest.raises(AssertionError, match="'total_step': 3"):
        pool.run(1, run, assets, tmp_path, {**options, "train__steps": 4, "checkpoint__resume": "auto"})
