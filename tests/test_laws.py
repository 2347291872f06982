"""The laws of the house, each against one process, over METHODS x LAYERS x LAYOUTS; and mutations that must break them."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config, unmerge_peft
from d9d_lora.method import adapted_layers
from d9d_lora.placement import ReplicatedSum, fill_, full_of
from d9d_lora.styles import for_conv1d, parallelize_adapted
from tests.catalogue import (
    LAYERS,
    LAYOUTS,
    METHODS,
    Layout,
    batch,
    build,
    dp_rank,
    mesh_of,
    peft_config,
    plan_of,
    shard_data_parallel,
)

CELLS = [(m, la) for m in METHODS for la in LAYERS]
PARALLEL = [name for name in LAYOUTS if name != "one"]


def wake(model, scale=0.3):
    """Gives every factor values, the same on every layout: a zero B would hide A's faults."""
    for layer in adapted_layers(model):
        for name, p in layer.factors().items():
            fill_(p, lambda w, g: w.normal_(0, scale, generator=g), seed=5, name=f"{layer.name}.{name}")


def make(method_name, layer, layout: Layout, *, order="plan_first", **changes):
    """(model, method) on a layout; without a process group, the plain model."""
    model = build(layer)
    method = peft_method_from_config(peft_config(method_name, layer, **changes))
    if layout.world == 1:
        inject_peft_and_freeze(method, model)
    else:
        mesh = mesh_of(layout)
        plan = plan_of(model, layout.sequence)
        if layout.tp > 1 and order == "plan_first":
            if layer == "conv1d":
                plan = {k: for_conv1d(s, model.get_submodule(k)) for k, s in plan.items()}
            parallelize_module(model, mesh["tp"], plan)
        inject_peft_and_freeze(method, model)
        if layout.tp > 1 and order == "inject_first":
            parallelize_adapted(model, mesh["tp"], plan)
        for name, p in model.named_parameters():
            if "norm" in name:
                p.requires_grad_(False)  # SequenceParallel thaws them
        shard_data_parallel(model, mesh, layout)
    return model, method


def backward(model, layout: Layout, step=0, accumulate=2):
    """Sum of squares over this rank's rows of the global batch, in `accumulate` microbatches; returns the global loss."""
    ids, target = batch(step)
    mine = slice(dp_rank(layout) * len(ids) // layout.dp, (dp_rank(layout) + 1) * len(ids) // layout.dp)
    total = 0.0
    for i, t in zip(ids[mine].chunk(accumulate), target[mine].chunk(accumulate)):
        y = model(i)
        if layout.sequence:
            rank, size = dist.get_rank() % layout.tp, t.shape[1] // layout.tp
            t = t[:, rank * size : (rank + 1) * size]
        loss = (y - t).square().sum() / ids.numel()
        loss.backward()
        total += loss.detach()
    total = torch.as_tensor(total)
    if layout.dp > 1 or layout.sequence:
        dist.all_reduce(total)
        if layout.tp > 1 and not layout.sequence:
            total /= layout.tp
    return total.item()


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def grads_of(model):
    return {n: full_of(p.grad) for n, p in trained(model).items()}


def close(a, b, tolerance=1e-10):
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    worst = max((float((a[k] - b[k]).abs().max() / (b[k].abs().max() + 1e-12)), k) for k in a)
    assert worst[0] < tolerance, f"{worst[1]} is off by {worst[0]:.2e} of its largest value"


# -- law 1, 2, 3, 6 in one process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method,layer", CELLS)
def test_the_start_changes_nothing_and_every_factor_is_live(method, layer):
    ids, _ = batch(0)
    plain = build(layer)(ids)
    model, m = make(method, layer, LAYOUTS["one"])
    assert torch.equal(model(ids), plain)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for after in (1, 2):
        optimiser.zero_grad()
        backward(model, LAYOUTS["one"])
        for la in adapted_layers(model):
            live = {n for n, p in la.factors().items() if p.grad is not None and p.grad.abs().max() > 0}
            first = {"lora_A"} if layer == "embedding" else {"lora_B"}
            assert live == (first if after == 1 else set(la.factors())), f"{la.name} after {after}: {live}"
        optimiser.step()


@pytest.mark.parametrize("method,layer", CELLS)
def test_merged_is_adapted_and_unmerged_is_the_original_to_the_bit(method, layer):
    ids, _ = batch(0)
    model, m = make(method, layer, LAYOUTS["one"])
    wake(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = model(ids)
    merge_peft(m, model)
    assert not list(adapted_layers(model))
    assert set(model.state_dict()) == set(build(layer).state_dict())
    assert (model(ids) - adapted).abs().max() < 1e-10
    unmerge_peft(m, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once(dtype):
    model = build("linear", dtype)
    method = peft_method_from_config(peft_config("lora", "linear"))
    inject_peft_and_freeze(method, model)
    wake(model)
    layer = model.blocks[0].up
    exact = layer.base.weight.double() + layer.delta.scaling * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    merge_peft(method, model)
    wrong = (model.blocks[0].up.weight.double() - exact).abs() > (exact.to(dtype).double() - exact).abs() + 1e-6
    assert not wrong.any()


# -- laws 3, 4, 5, 6 on every layout ----------------------------------------------------------------------------------------------


def law_of_gradients(rank, method, layer, layout_name, order, summed, changes, mutation):
    layout = LAYOUTS[layout_name]
    reference, _ = make(method, layer, LAYOUTS["one"], **changes)
    wake(reference)
    model, _ = make(method, layer, layout, order=order, **changes)
    if mutation == "start each shard on its own":
        for la in adapted_layers(model):
            for p in la.factors().values():
                local = p.to_local() if isinstance(p, DTensor) else p
                nn.init.normal_(local.data)
    else:
        wake(model)
    assert set(trained(model)) == set(trained(reference))
    bucket = ReplicatedSum(adapted_layers(model)) if summed or mutation else None
    if mutation == "sum twice":
        for la in adapted_layers(model):
            la.sums_own_parts = True
    if mutation == "scale twice":
        for la in adapted_layers(model):
            object.__setattr__(la.delta, "alpha", la.delta.alpha * la.delta.scaling)
    optimisers = [torch.optim.AdamW(trained(x).values(), lr=0.01) for x in (model, reference)]
    for step in range(1 if mutation else 5):
        losses = backward(model, layout, step), backward(reference, LAYOUTS["one"], step)
        if bucket and mutation != "drop the sum":
            bucket.reduce()
        if step == 0:
            assert abs(losses[0] - losses[1]) < 1e-10 * abs(losses[1]), losses
            close(grads_of(model), grads_of(reference))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    close({n: full_of(p.detach()) for n, p in trained(model).items()}, {n: p.detach() for n, p in trained(reference).items()}, 1e-7)


@pytest.mark.parametrize("layout", PARALLEL)
@pytest.mark.parametrize("method,layer", CELLS)
def test_gradients_and_five_steps_equal_one_process(pool, method, layer, layout):
    summed = METHODS[method] is not METHODS["rslora"]  # rslora rows take the plain loop, the others the trainer's one sum
    pool.run(LAYOUTS[layout].world, law_of_gradients, method, layer, layout, "plan_first", summed, {}, None)


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp", "fsdp2_tp2"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("summed", [False, True])
def test_inject_first_then_the_plan(pool, layer, layout, summed):
    pool.run(LAYOUTS[layout].world, law_of_gradients, "patterns", layer, layout, "inject_first", summed, {}, None)


@pytest.mark.parametrize("mutation", ["drop the sum", "sum twice", "scale twice", "start each shard on its own"])
@pytest.mark.parametrize("layout", ["tp2", "fsdp2_tp2"])
def test_mutations_break_the_law_of_gradients(pool, mutation, layout):
    with pytest.raises(AssertionError, match="is off by|AssertionError"):
        pool.run(LAYOUTS[layout].world, law_of_gradients, "lora", "linear", layout, "plan_first", True, {}, mutation)
