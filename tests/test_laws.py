"""The laws of the house, each against one process, over METHODS x LAYERS x LAYOUTS; and mutations that must break them."""

import copy

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config, unmerge_peft
from d9d_lora.placement import fill_, full_of
from d9d_lora.styles import for_conv1d, parallelize_adapted
from d9d_lora.sums import ReplicatedSum
from d9d_lora.walk import adapted_layers
from tests.catalogue import (
    LAYERS,
    LAYOUTS,
    METHODS,
    Layout,
    batch,
    build,
    dp_rank,
    layouts_of,
    mesh_of,
    peft_config,
    plan_of,
    shard_data_parallel,
)

CELLS = [(m, la) for m in METHODS for la in LAYERS if la not in METHODS[m].refuses]
REFUSED = [(m, la) for m in METHODS for la in METHODS[m].refuses]
PARALLEL = [name for name in LAYOUTS if name != "one"]


def wake(model, scale=0.3):
    """Gives every factor values, the same on every layout: a zero B would hide A's faults."""
    for layer in adapted_layers(model):
        for name, p in layer.factors().items():
            fill_(p, lambda w, g: w.normal_(0, scale, generator=g), seed=5, name=f"{layer.name}.{name}")
        for name, factor in layer.shared.items():
            if isinstance(factor.weight, nn.Parameter):
                fill_(factor.weight, lambda w, g: w.normal_(0, scale, generator=g), seed=5, name=name)


def make(method_name, layer, layout: Layout, *, order="plan_first", **changes):
    """(model, method) on a layout; without a process group, the plain model."""
    model = build(layer)
    method = peft_method_from_config(peft_config(method_name, layer, **changes))
    if layout.world == 1:
        inject_peft_and_freeze(method, model)
    else:
        mesh = mesh_of(layout)
        plan = plan_of(model, layout.sequence, planned=LAYERS[layer].planned)
        if layout.tp > 1 and order == "plan_first":
            plan = {k: for_conv1d(s, model.get_submodule(k)) for k, s in plan.items()}
            parallelize_module(model, mesh["tp"], plan)
        inject_peft_and_freeze(method, model)
        if layout.tp > 1 and order == "inject_first":
            parallelize_adapted(model, mesh["tp"], plan)
        for name, p in model.named_parameters():
            if "norm" in name:
                p.requires_grad_(False)  # SequenceParallel thaws them
        shard_data_parallel(model, mesh, layout)
    method.initialise(model)
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
    model, _ = make(method, layer, LAYOUTS["one"])
    row = METHODS[method]
    assert (model(ids) - plain).abs().max() <= (row.moves or (0 if row.exact else 1e-12))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for after in (1, 2):
        optimiser.zero_grad()
        backward(model, LAYOUTS["one"])
        for la in adapted_layers(model):
            live = {n for n, p in la.factors().items() if p.grad is not None and p.grad.abs().max() > 0}
            first = row.first_lookup or row.first if layer == "embedding" else row.first
            assert live == (first if after == 1 else set(la.factors())), f"{la.name} after {after}: {live}"
        optimiser.step()


@pytest.mark.parametrize("method,layer", REFUSED)
def test_a_refusal_is_a_sentence_and_leaves_the_model_as_it_was(method, layer, record_property):
    model = build(layer)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=METHODS[method].refuses[layer]) as refusal:
        inject_peft_and_freeze(peft_method_from_config(peft_config(method, layer)), model)
    told = refusal.value.errors() if isinstance(refusal.value, ValidationError) else [{"msg": str(refusal.value)}]
    record_property("refusal", "; ".join(fault["msg"].removeprefix("Value error, ") for fault in told))
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("method,layer", CELLS)
def test_merged_is_adapted_and_unmerged_is_the_original_to_the_bit(method, layer):
    ids, _ = batch(0)
    model, m = make(method, layer, LAYOUTS["one"])
    wake(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = model(ids)
    if layer in METHODS[method].unmerged:
        with pytest.raises(ValueError, match=METHODS[method].unmerged[layer]):
            merge_peft(m, model)
        assert torch.equal(model(ids), adapted)
        return
    merge_peft(m, model)
    assert not list(adapted_layers(model))
    assert set(model.state_dict()) == set(build(layer, quantise=False).state_dict())
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
    for step in range(1 if mutation else METHODS[method].steps):
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


def laws_of_a_cell(rank, method, layer, layout, summed):
    law_of_starts(rank, method, layer, layout)
    law_of_gradients(rank, method, layer, layout, "plan_first", summed, {}, None)
    law_of_merging(rank, method, layer, layout, None)


@pytest.mark.parametrize("method,layer,layout", [(m, la, layout) for m, la in CELLS for layout in layouts_of(m, la)])
def test_starts_gradients_steps_and_merge_equal_one_process(pool, method, layer, layout):
    summed = list(METHODS).index(method) % 2 == 0  # every other row takes the plain loop, the others the trainer's one sum
    pool.run(LAYOUTS[layout].world, laws_of_a_cell, method, layer, layout, summed)


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp", "fsdp2_tp2"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("summed", [False, True])
def test_inject_first_then_the_plan(pool, layer, layout, summed):
    pool.run(LAYOUTS[layout].world, law_of_gradients, "patterns", layer, layout, "inject_first", summed, {}, None)


@pytest.mark.parametrize("mutation", ["drop the sum", "sum twice", "scale twice", "start each shard on its own"])
@pytest.mark.parametrize("layout", ["tp2", "fsdp2_tp2"])
def test_mutations_break_the_law_of_gradients(pool, mutation, layout):
    with pytest.raises(AssertionError, match=r"is off by|AssertionError"):
        pool.run(LAYOUTS[layout].world, law_of_gradients, "lora", "linear", layout, "plan_first", True, {}, mutation)


# -- law 5: traffic ---------------------------------------------------------------------------------------------------------------


def count_collectives(rank, layer, layout_name, adapters):
    """(collectives of one microbatch, elements the once-a-step sum moves, elements it should)."""
    layout = LAYOUTS[layout_name]
    if adapters:
        model, _ = make("lora", layer, layout)
        bucket = ReplicatedSum(adapted_layers(model))
    else:
        model = build(layer)
        for p in model.parameters():
            p.requires_grad_(False)
        plan = {k: for_conv1d(s, model.get_submodule(k)) for k, s in plan_of(model, layout.sequence).items()}
        parallelize_module(model, mesh_of(layout)["tp"], plan)
        for p in model.parameters():
            p.requires_grad_(False)
    ids, _ = batch(0)
    with CommDebugMode() as comms:
        x = model.embed(ids).detach().requires_grad_() if layer != "embedding" else model.embed(ids)
        for block in model.blocks:
            x = block(x)
        if x.requires_grad:
            x.square().sum().backward()
    counts = {str(k): v for k, v in comms.get_comm_counts().items()}
    if not adapters:
        return counts, 0, 0
    travelled = bucket.reduce()
    return counts, travelled, sum(p.grad.to_local().numel() for la in adapted_layers(model) for p in la.parameters_in_parts())


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp", "tp4"])
@pytest.mark.parametrize("layer", ["linear", "linear_bias", "conv1d"])
def test_adapters_add_no_collective_to_a_microbatch(pool, layer, layout):
    world = LAYOUTS[layout].world
    bare = pool.run(world, count_collectives, layer, layout, False)
    ours = pool.run(world, count_collectives, layer, layout, True)
    for (base, _, _), (adapted, travelled, trainable) in zip(bare, ours):
        assert base
        assert adapted == base
        assert travelled == trainable > 0


def plain_loop_collectives(rank, mutation):
    """The label `Partial` costs collectives in the backward: the count above can fail."""
    model, _ = make("lora", "linear", LAYOUTS["tp2"])
    ids, _ = batch(0)
    with CommDebugMode() as comms:
        model(ids).square().sum().backward()
    return comms.get_total_counts()


def test_the_count_sees_a_sum_per_parameter(pool):
    (plain, _) = pool.run(2, plain_loop_collectives, None)
    (base, _, _), _ = pool.run(2, count_collectives, "linear", "tp2", True)
    assert plain > sum(base.values())


class Elements(TorchDispatchMode):
    """Counts the elements that enter each c10d operator."""

    def __init__(self):
        super().__init__()
        self.moved = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            first = tree_flatten(args[1] if "reduce_scatter" in str(func) else args[0])[0][0]
            name = func.name().removeprefix("c10d::")
            self.moved[name] = self.moved.get(name, 0) + first.numel()
        return func(*args, **(kwargs or {}))


def reduced_elements(rank, layout_name):
    layout = LAYOUTS[layout_name]
    model, _ = make("lora", "linear_bias", layout)
    with Elements() as elements:
        backward(model, layout, accumulate=1)
    padded = sum(-(-p.shape[0] // layout.shard) * layout.shard * p[0].numel() for p in trained(build_reference()).values())
    return elements.moved, padded


def build_reference():
    return make("lora", "linear_bias", LAYOUTS["one"])[0]


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp2x2"])
def test_fsdp_reduces_the_gradients_of_trained_elements_only(pool, layout):
    for moved, trainable in pool.run(LAYOUTS[layout].world, reduced_elements, layout):
        scattered = sum(n for name, n in moved.items() if "reduce_scatter" in name)
        assert scattered == trainable, moved


# -- law 6 on every layout, starts, masks -----------------------------------------------------------------------------------------


def law_of_merging(rank, method_name, layer, layout_name, mutation):
    if layer in METHODS[method_name].unmerged:
        return
    layout = LAYOUTS[layout_name]
    reference, ref_method = make(method_name, layer, LAYOUTS["one"])
    model, method = make(method_name, layer, layout)
    wake(reference), wake(model)
    ids, _ = batch(0)
    model.eval()
    with torch.no_grad():
        adapted = model(ids)  # FSDP2 now holds gathered weights: a merge into those would be lost
    before = {n: full_of(p.detach()).clone() for n, p in model.named_parameters()}
    if mutation == "write rank 0's slice everywhere":
        import d9d_lora.thin as thin

        real, thin.box_of = thin.box_of, lambda p: tuple(slice(0, s.stop - s.start) for s in real(p))
        try:
            merge_peft(method, model)
        finally:
            thin.box_of = real
    else:
        merge_peft(method, model)
    merge_peft(ref_method, reference)
    close({n: full_of(p.detach()) for n, p in model.named_parameters()}, {n: p.detach() for n, p in reference.named_parameters()})
    with torch.no_grad():
        assert (model(ids) - adapted).abs().max() < 1e-9
    unmerge_peft(method, model)
    after = {n: full_of(p.detach()) for n, p in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    with torch.no_grad():
        assert (model(ids) - adapted).abs().max() < 1e-12


@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_mutation_breaks_the_law_of_merging(pool, layout):
    with pytest.raises(AssertionError, match="is off by"):
        pool.run(LAYOUTS[layout].world, law_of_merging, "lora", "linear", layout, "write rank 0's slice everywhere")


def law_of_starts(rank, method, layer, layout_name):
    reference, _ = make(method, layer, LAYOUTS["one"])
    model, _ = make(method, layer, LAYOUTS[layout_name])
    expected = {n: p.detach() for n, p in trained(reference).items()}
    found = {n: full_of(p.detach()) for n, p in trained(model).items()}
    if any(la.delta.from_the_weight for la in adapted_layers(reference)):
        close(found, expected)  # sums over shards are taken in another order
    else:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in found)


def law_of_masks(rank, layout_name, mutation):
    """With dropout, gradients equal one process: the masks follow the microbatch, whoever computes it."""
    layout = LAYOUTS[layout_name]
    accumulate = 2
    changes = {"params": {"r": 3, "alpha": 6, "dropout": 0.4}}
    reference, _ = make("lora", "linear", LAYOUTS["one"], **changes)
    model, _ = make("lora", "linear", layout, **changes)
    wake(reference), wake(model)
    bucket = ReplicatedSum(adapted_layers(model))
    ids, target = batch(0)

    def drive(m, layout, me):
        clock = next(adapted_layers(m)).dropout.clock
        for a in range(accumulate):
            micro = a * layout.dp + me
            clock.set(0, micro + (1000 * rank if mutation == "another mask on each rank" and m is model else 0))
            rows = slice(micro * 8 // (layout.dp * accumulate), (micro + 1) * 8 // (layout.dp * accumulate))
            t = target[rows]
            y = m(ids[rows])
            if layout.sequence:
                r, size = dist.get_rank() % layout.tp, t.shape[1] // layout.tp
                t = t[:, r * size : (r + 1) * size]
            (y - t).square().sum().backward()

    drive(model, layout, dp_rank(layout))
    bucket.reduce()
    accumulate = accumulate * layout.dp  # one process takes the same microbatches one after another
    drive(reference, LAYOUTS["one"], 0)
    close(grads_of(model), grads_of(reference))


@pytest.mark.parametrize("layout", PARALLEL)
def test_dropout_masks_do_not_depend_on_the_layout(pool, layout):
    pool.run(LAYOUTS[layout].world, law_of_masks, layout, None)


def test_mutation_another_mask_on_each_tp_rank(pool):
    with pytest.raises(AssertionError, match="is off by"):
        pool.run(2, law_of_masks, "tp2", "another mask on each rank")


def masks_of_a_plain_loop(rank, layout_name):
    """What each layer's dropout does to ones, in two forwards of a loop that knows nothing of clocks."""
    model, _ = make("lora", "linear", LAYOUTS[layout_name], params={"r": 3, "alpha": 6, "dropout": 0.5})
    up = model.blocks[0].up
    seen = []
    for _ in range(2):
        model(batch(0)[0][:2])
        seen.append(up.dropout(torch.ones(4, 12)))
    return seen


def test_masks_of_a_plain_loop(pool):
    a, b = pool.run(2, masks_of_a_plain_loop, "tp2")  # ambient seeds differ from rank to rank
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], a[1])
    a, b = pool.run(2, masks_of_a_plain_loop, "fsdp2")
    assert not torch.equal(a[0], b[0])


def test_a_recomputed_forward_draws_the_same_mask():
    from torch.utils.checkpoint import checkpoint

    grads = []
    for recompute in (False, True):
        model, _ = make("lora", "linear", LAYOUTS["one"], params={"r": 3, "alpha": 6, "dropout": 0.5})
        wake(model)
        if recompute:
            for block in model.blocks:
                run = block.forward
                block.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)
        backward(model, LAYOUTS["one"])
        grads.append(grads_of(model))
    close(*grads)


# -- the order of things -----------------------------------------------------------------------------------------------------------


def inject_after_sharding(rank):
    model = build("linear")
    before = dict(model.named_modules()).keys()
    shard_data_parallel(model, mesh_of(LAYOUTS["fsdp2"]), LAYOUTS["fsdp2"])
    with pytest.raises(ValueError, match="Inject first, then call fully_shard"):
        inject_peft_and_freeze(peft_method_from_config(peft_config("lora", "linear")), model)
    assert dict(model.named_modules()).keys() == before
    assert all(p.requires_grad for p in model.parameters())


def test_injection_after_fully_shard_is_refused(pool):
    pool.run(2, inject_after_sharding)


def test_a_copy_is_independent():
    model, _ = make("lora", "linear", LAYOUTS["one"])
    wake(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch(0)[0]), model(batch(0)[0]))
