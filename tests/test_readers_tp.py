"""Layers that compute together under tensor parallelism: the numbers of one process, and no collective, byte or product more."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.layers import AdaptedLinear, fused, gated, readers
from d9d_lora.layers.chooser import ColumnPath
from d9d_lora.measure import flops, saved_bytes, traffic
from d9d_lora.placement import full_of
from d9d_lora.quant.load import quantise_
from d9d_lora.styles import HandShards, for_conv1d, parallelize_adapted, take_column_path
from d9d_lora.sums import ReplicatedSum
from d9d_lora.train.model import sum_gradients
from d9d_lora.walk import adapted_layers, clock_of
from launch.bench import fake_ranks, ledger_of
from tests.test_laws import close, grads_of, trained, wake

ROWS, TOKENS, WIDTH, INNER, R = 4, 4, 24, 48, 3


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) * self.k(x) + self.v(x))


class Feed(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(i, o, bias=bias) for i, o in [(WIDTH, INNER)] * 2 + [(INNER, WIDTH)])
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.attention, self.feed = Attention(bias), Feed(bias)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.feed(x)


class Model(nn.Module):
    def __init__(self, bias, recomputed):
        super().__init__()
        self.block, self.recomputed = Block(bias), recomputed

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.recomputed else self.block(x)


@dataclass(frozen=True)
class Case:
    """How a model is built.

    Attributes:
        one: The parents make one DTensor of x, as our trainer's plan has it; else each layer one of its own.
        summed: By the trainer's one sum, else by a plain loop's hooks.
        change: What is done to some layer, before the plan.
        alone: Every layer computes for itself.
    """

    tp: int = 1
    shard: int = 1
    one: bool = True
    sequence: bool = False
    column: str = "gathered"
    inject_first: bool = False
    summed: bool = True
    params: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    quantised: bool = False
    recomputed: bool = False
    change: str = ""
    alone: bool = False

    @property
    def world(self):
        return self.tp * self.shard


def plan_of(case):
    between = Shard(1) if case.sequence else Replicate()
    gather = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),), use_local_output=False)
    whole = case.change == "whole between"
    columns = {"attention": "qkv", "feed": ("gate", "up")}
    plan = {f"block.{p}": HandShards(gather) if not case.inject_first else gather for p in columns} if case.one else {}
    plan |= {f"block.{p}.{n}": ColwiseParallel() for p, names in columns.items() for n in names}
    if whole:
        plan |= {f"block.feed.{n}": ColwiseParallel(output_layouts=Replicate()) for n in ("gate", "up")}
    rest = {"block.attention.o": Shard(-1), "block.feed.down": Replicate() if whole else Shard(-1)}
    return plan | {n: RowwiseParallel(input_layouts=layout, output_layouts=between) for n, layout in rest.items()}


def build(case, mesh=None):
    model = Model(case.bias, case.recomputed).double()
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    if case.quantised:
        quantise_(model, "all-linear", block=12)
    params = {"r": R, "alpha": 6, **case.params}
    method = peft_method_from_config({"kind": "lora", "target_modules": "all-linear", "bias": "lora_only", "params": params})

    def split():
        plan = plan_of(case)
        if case.inject_first:
            parallelize_adapted(model, mesh["tp"], plan)
        else:
            parallelize_module(model, mesh["tp"], {k: for_conv1d(s, model.get_submodule(k)) for k, s in plan.items()})

    if case.change in CHANGES:
        CHANGES[case.change](model.block)
    if mesh is not None and not case.inject_first:
        split()
    inject_peft_and_freeze(method, model)
    if mesh is not None and case.inject_first:
        split()
    if case.change == "each gathered alone":
        for layer in adapted_layers(model):
            fully_shard(layer, mesh=mesh["dp_shard"])
    if case.shard > 1:
        fully_shard(model.block, mesh=mesh["dp_shard"])
        fully_shard(model, mesh=mesh["dp_shard"])
        sum_gradients(model)
    take_column_path(model, ColumnPath(case.column))
    method.initialise(model)
    wake(model)
    if case.alone:
        for layer in adapted_layers(model):
            layer.readers = None
        model.block.feed.__dict__.pop("forward", None)
    return model


def another_gradient(block):
    block.attention.k.register_forward_pre_hook(lambda m, args: (args[0].detach().requires_grad_(),))


def another_x(block):
    block.attention.k.register_forward_pre_hook(lambda m, args: (2 * args[0],))


def doubled(block):
    block.feed.up.register_forward_hook(lambda m, args, y: 2 * y)


CHANGES = {"another gradient": another_gradient, "another x": another_x, "doubled": doubled}


def mesh_of(case):
    return init_device_mesh("cpu", (case.shard, case.tp), mesh_dim_names=("dp_shard", "tp"))


def data(step=0):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(ROWS, TOKENS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]


def backward(model, case, step, dp=(0, 1), tp=(0, 1)):
    """(the loss of this rank's data, x.grad) of a sum of squares; masks are those of step and data."""
    x, target = (t.chunk(dp[1])[dp[0]] for t in data(step))
    if case.sequence:
        x, target = (t.chunk(tp[1], 1)[tp[0]] for t in (x, target))
    x = x.clone().requires_grad_(case.change != "another x")  # of an x without a gradient only its memory tells
    clock_of(model).set(step, dp[0])
    loss = (model(x * 1) - target).square().sum()
    loss.backward()
    return loss.detach(), x.grad if x.requires_grad else x


def law(rank, case, mutation=""):
    """Loss, gradients of x and of every factor, and weights after two steps are those of one process."""
    change = case.change if case.change in CHANGES else ""
    one = Case(params=case.params, bias=case.bias, quantised=case.quantised, change=change, alone=True)
    mesh = mesh_of(case)
    reference, model = build(one), build(case, mesh)
    total = ReplicatedSum(adapted_layers(model)) if case.summed else None
    tp, dp = (rank % case.tp, case.tp), (rank // case.tp, case.shard)
    optimisers = [torch.optim.AdamW(trained(m).values(), lr=0.01) for m in (model, reference)]
    with mutated(mutation):
        for step in range(2):
            loss, dx = backward(model, case, step, dp, tp)
            if total is not None:
                total.reduce()
            each = [backward(reference, one, step, (i, case.shard)) for i in range(case.shard)]
            expected = each[dp[0]]
            if case.sequence:
                dist.all_reduce(loss, group=mesh["tp"].get_group())
                expected = (expected[0], expected[1].chunk(case.tp, 1)[tp[0]])
            close({"loss": loss, "x": dx} | grads_of(model), {"loss": expected[0], "x": expected[1]} | grads_of(reference))
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
    close({n: full_of(p.detach()) for n, p in trained(model).items()}, {n: p.detach() for n, p in trained(reference).items()}, 1e-7)


def mutated(mutation):
    match mutation:
        case "the same memory is the same x":
            return mock.patch.object(readers, "_origin", return_value=0)
        case "another memory is the same x":
            return mock.patch.object(readers, "_outline", return_value=0)
        case "gradients are no parts":
            real = AdaptedLinear.reader
            return mock.patch.object(AdaptedLinear, "reader", lambda self, dtype, *, parts: real(self, dtype, parts=False))
        case "any hook will do":
            return mock.patch.object(gated, "ends_of", lambda layer, real=gated.ends_of: real(without_hooks_of_others(layer)))
    return nullcontext()


def without_hooks_of_others(layer):
    hooks = {k: h for k, h in layer._forward_hooks.items() if h.__module__ != __name__}
    return SimpleNamespace(**{**vars(layer), "_forward_hooks": hooks})


def steps_of(rank, case):
    """(layers computed in each step of autograd of the readers; gated blocks computed as one) of a forward."""
    model = build(case, mesh_of(case))
    calls: list[int] = []

    def counting(x, some, *more, real=fused.fused):
        calls.append(len(some))
        return real(x, some, *more)

    blocks = mock.patch.object(gated._Gated, "apply", side_effect=gated._Gated.apply)
    with mock.patch.object(readers, "fused", counting), blocks as applied:
        backward(model, case, 0, (rank // case.tp, case.shard), (rank % case.tp, case.tp))
    return calls, applied.call_count


LAWS = {
    "dropout, bias": Case(tp=2, params={"dropout": 0.3}, bias=True),
    "own DTensors, a plain loop": Case(tp=2, one=False, summed=False, params={"dropout": 0.3}),
    "four ranks, injected first": Case(tp=4, one=False, inject_first=True, bias=True),
    "packed, recomputed": Case(tp=2, quantised=True, recomputed=True, params={"dropout": 0.3}),
    "fsdp2, recomputed": Case(tp=2, shard=2, recomputed=True, params={"dropout": 0.3}),
    "fsdp2, packed": Case(tp=2, shard=2, quantised=True, one=False),
    "sequence parallel": Case(tp=2, sequence=True, bias=True, params={"dropout": 0.3}),
    "fsdp2, sequence parallel": Case(tp=2, shard=2, sequence=True, inject_first=True),
}
IN_PARTS = {
    "DoRA": (Case(tp=2, params={"use_dora": True, "dropout": 0.3}, bias=True), [3, 2], 0),
    "packed with a bias": (Case(tp=2, quantised=True, bias=True), [3, 2], 0),
    "a hook of another kind": (Case(tp=2, change="doubled"), [3, 2], 0),
    "whole between": (Case(tp=2, change="whole between"), [3, 2], 0),
    "rank space": (Case(tp=2, sequence=True, column="rank_space"), [], 0),
    "each gathered alone": (Case(tp=2, shard=2, change="each gathered alone"), [], 0),
    "another gradient": (Case(tp=2, one=False, change="another gradient"), [3, 3, 3], 1),  # each of q, k, v computes all in vain
    "another x": (Case(tp=2, one=False, change="another x"), [3, 3, 3], 1),
}


def tried(rank, case, mutation=""):
    law(rank, case, mutation)
    return steps_of(rank, case)


@pytest.mark.parametrize("name", LAWS)
def test_together_on_every_rank_equals_one_process(pool, name):
    case = LAWS[name]
    for calls, blocks in pool.run(case.world, tried, case):
        assert (calls, blocks) == ([3] * (1 + case.recomputed), 1 + case.recomputed)


@pytest.mark.parametrize("name", IN_PARTS)
def test_what_does_not_fit_is_computed_in_parts(pool, name):
    case, *expected = IN_PARTS[name]
    for found in pool.run(case.world, tried, case):
        assert list(found) == expected


@pytest.mark.parametrize(
    "mutation,case",
    [
        ("the same memory is the same x", Case(tp=2, one=False, change="another gradient")),
        ("another memory is the same x", Case(tp=2, one=False, change="another x")),
        ("gradients are no parts", Case(tp=2, summed=False)),
        ("any hook will do", Case(tp=2, change="doubled")),
    ],
)
def test_mutations_break_the_law(pool, mutation, case):
    with pytest.raises(AssertionError, match="is off by"):
        pool.run(case.world, law, case, mutation)


# -- what a step costs, on fake ranks --------------------------------------------------------------------------------------------------


LONG = 256  # tokens, beside which factors are small


def cost(case):
    """Of a step on one of them: collectives of each kind and their bytes, FLOPs, bytes kept by the forward, and the peak."""
    with fake_ranks(case.world):
        model = build(case, mesh_of(case))
        total = ReplicatedSum(adapted_layers(model))
        x = torch.ones(LONG, WIDTH, dtype=torch.float64, requires_grad=True)
        clock_of(model).set(1)

        def step():
            model(x * 1).sum().backward()
            total.reduce()

        kept = saved_bytes(lambda: model(x), [x, *model.parameters()])
        work = flops(step)
        with traffic() as found:
            step()
        return dict(found.count), dict(found), work, kept, ledger_of(step, None).peak


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_together_moves_nothing_more_and_keeps_less(dropout):
    params = {"dropout": dropout}
    alone, ours = (cost(Case(tp=2, params=params, alone=alone)) for alone in (True, False))
    assert ours[:3] == alone[:3]
    assert ours[0] == {"all_reduce": 2 + 2 + 1}  # y of o and down, x of attention and feed, and the factors once
    inner = LONG * INNER // 2 * 8
    assert alone[3] - ours[3] == 2 * inner + (4 * 8 if dropout else 0)  # and the time of the clock for three, not for seven
    assert alone[4] - ours[4] > inner // 2


def test_layers_with_dtensors_of_their_own_give_back_one_gradient_of_x():
    alone, ours = (cost(Case(tp=2, one=False, alone=alone)) for alone in (True, False))
    assert (alone[0], ours[0]) == ({"all_reduce": 2 + 3 + 2 + 1}, {"all_reduce": 2 + 1 + 1 + 1})
    assert alone[1]["all_reduce"] - ours[1]["all_reduce"] == 3 * LONG * WIDTH * 8
