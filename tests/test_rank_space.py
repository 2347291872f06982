"""Column-parallel layers in rank space under sequence parallelism: the numbers of one process, what is kept, what travels, and when."""

from unittest import mock

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.layers import AdaptedLinear
from d9d_lora.layers.chooser import ColumnPath, Group, gathered, rank_space
from d9d_lora.layers.rank_space import Tokens
from d9d_lora.measure import flops, saved_bytes, traffic
from d9d_lora.styles import HandShards, parallelize_adapted, take_column_path
from d9d_lora.sums import ReplicatedSum
from d9d_lora.train.config import ParallelConfig
from d9d_lora.walk import adapted_layers, clock_of
from tests import catalogue, test_hf_models, test_laws
from tests.small_run import config_of
from tests.test_laws import close, grads_of, wake

ROWS, WIDTH, HIDDEN, R = 2, 12, 8, 3
FORCED = ColumnPath("rank_space")


# -- the laws of the house, every column-parallel layer forced into rank space (it raises where it cannot) -----------------------------


def forced(rank, job, mutation, *args):
    fsdp = catalogue.Layout(4, shard=2, tp=2, sequence=True)
    patches = [mock.patch.object(AdaptedLinear, "column", FORCED), mock.patch.dict(catalogue.LAYOUTS, fsdp2_tp2_sp=fsdp)]
    if mutation == "no reduce-scatter":
        patches.append(mock.patch.object(Tokens, "reduce_scatter", lambda self, u: own_rows(self, self.laid_out(u))))
    if mutation == "masks of the first rows":
        patches.append(mock.patch("d9d_lora.dropout.Mask.keep_among", lambda self, among, *xs: self.keep(*xs)))
    with patches[0], patches[1], patches[-1] if mutation else mock.patch.object(AdaptedLinear, "column", FORCED):
        job(rank, *args)


def own_rows(tokens, whole):
    return whole.narrow(tokens.dim, *tokens.rows())


@pytest.mark.parametrize(
    "method,layer,layout,order,summed",
    [
        ("lora", "linear_bias", "tp2_sp", "plan_first", False),
        ("patterns", "conv1d", "tp2_sp", "inject_first", True),
        ("adalora", "linear", "tp2_sp", "plan_first", True),
        ("dora", "nf4", "tp2_sp", "plan_first", False),
        ("lora", "linear_bias", "fsdp2_tp2_sp", "plan_first", True),
        ("dora", "nf4", "fsdp2_tp2_sp", "inject_first", False),
    ],
)
def test_gradients_and_steps_equal_one_process(pool, method, layer, layout, order, summed):
    world = 4 if "fsdp" in layout else 2
    pool.run(world, forced, test_laws.law_of_gradients, None, method, layer, layout, order, summed, {}, None)


@pytest.mark.parametrize("layout", ["tp2_sp", "fsdp2_tp2_sp"])
def test_masks_are_those_of_one_process(pool, layout):
    pool.run(4 if "fsdp" in layout else 2, forced, test_laws.law_of_masks, None, layout, None)


@pytest.mark.parametrize("mutation", ["no reduce-scatter", "masks of the first rows"])
def test_mutations_break_the_laws(pool, mutation):
    with pytest.raises(AssertionError, match="is off by"):
        pool.run(2, forced, test_laws.law_of_masks, mutation, "tp2_sp", None)


@pytest.mark.parametrize("layout,recomputed", [("tp2_sp", False), ("fsdp2_tp2_sp", True)])
def test_a_hugging_face_model(pool, tmp_path, layout, recomputed):
    world, degrees = test_hf_models.LAYOUTS[layout]
    directory = test_hf_models.save_family("llama", tmp_path)
    pool.run(world, forced, test_hf_models.compare, None, directory, test_hf_models.PEFT, degrees, recomputed)


# -- three layers that read one input ------------------------------------------------------------------------------------------------


class Readers(nn.Module):
    """q, k and v are column-parallel, o is row-parallel."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(3))
        self.o = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return self.o(self.q(x) * self.k(x) + self.v(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.readers = Readers()
        self.recomputed = False

    def forward(self, x):
        return checkpoint(self.readers, x, use_reentrant=False) if self.recomputed else self.readers(x)


def build(mesh, order, path, dropout=0.0, targets=("q", "k", "v")):
    model = Model().double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    config = {"kind": "lora", "target_modules": list(targets), "params": {"r": R, "alpha": 6, "dropout": dropout}}
    method = peft_method_from_config(config)
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=False)
    plan = {f"readers.{name}": ColwiseParallel() for name in "qkv"} | {"readers.o": RowwiseParallel(output_layouts=Shard(1))}
    if mesh is not None and order == "plan_first":
        parallelize_module(model, mesh, {**plan, "readers": HandShards(gather)})
    if targets:
        inject_peft_and_freeze(method, model)
    if mesh is not None and order == "inject_first":
        parallelize_adapted(model, mesh, {**plan, "readers": gather})
    take_column_path(model, path)
    wake(model)
    return model.requires_grad_(False) if not targets else model


def of_readers(rank, world, order, tokens, dropout, recomputed):
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.randn(ROWS, tokens, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = torch.randn(ROWS, tokens, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reference, model = build(None, order, FORCED, dropout), build(mesh, order, FORCED, dropout)
    model.recomputed = recomputed
    x = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_()
    t = distribute_tensor(target, mesh, [Shard(1)]).to_local()
    whole.requires_grad_()
    for m in (model, reference):
        clock_of(m).set(1)
        if dropout and world == 4:
            m.readers.k.dropout.p = 0.0  # q and v drop, k does not: the share of dx is added mask by mask
    ((model(x) - t) ** 2).sum().backward()
    ((reference(whole) - target) ** 2).sum().backward()
    close(grads_of(model) | {"x": x.grad.full_tensor()}, grads_of(reference) | {"x": whole.grad})


@pytest.mark.parametrize(
    "world,order,tokens,dropout,recomputed",
    [
        (2, "plan_first", 6, 0.4, False),
        (2, "inject_first", 5, 0.4, True),
        (4, "plan_first", 5, 0.0, False),  # shards of 2, 2, 1 and 0 tokens
        (4, "inject_first", 5, 0.4, False),
    ],
)
def test_a_group_on_even_and_uneven_shards_equals_one_process(pool, world, order, tokens, dropout, recomputed):
    pool.run(world, of_readers, world, order, tokens, dropout, recomputed)


def counted(rank, world, order, tokens, path):
    """(collectives, bytes on the wire, bytes kept, FLOPs) of a forward and backward; the bytes kept are those beyond the bare model's."""
    model = build(init_device_mesh("cpu", (world,)), order, ColumnPath(path or "auto"), targets="qkv" if path else ())
    x = torch.randn(ROWS, tokens // world, WIDTH, dtype=torch.float64, requires_grad=True)
    kept = saved_bytes(lambda: model.readers(x * 1), model.parameters())
    if path:
        ReplicatedSum(adapted_layers(model))
    with traffic() as found:
        count = flops(lambda: model.readers(x).sum().backward())
    return dict(found.count), sum(found.values()), kept, count


@pytest.mark.parametrize("order", ["plan_first", "inject_first"])
def test_what_the_paths_cost_is_what_the_chooser_says(pool, order):
    world, tokens = 2, 6
    bare, on_tokens, in_ranks = (pool.run(world, counted, world, order, tokens, path)[0] for path in (None, "gathered", "rank_space"))
    g = Group(ROWS * tokens, WIDTH, 3 * R, world, 8)
    assert on_tokens[3] - in_ranks[3] == gathered(g).flops - rank_space(g).flops  # the bare model's are DTensor's, and counted twice
    for found, costs in ((on_tokens, gathered(g)), (in_ranks, rank_space(g))):
        assert found[2] - bare[2] == costs.kept
        assert sum(found[0].values()) - sum(bare[0].values()) == costs.collectives
    assert on_tokens[0] == bare[0]
    assert {k: n - bare[0].get(k, 0) for k, n in in_ranks[0].items() if n != bare[0].get(k, 0)} == {"all_gather": 1, "reduce_scatter": 1}
    assert in_ranks[1] - bare[1] == rank_space(g).wire


# -- the choice ------------------------------------------------------------------------------------------------------------------------


def test_the_rule_takes_the_cheapest_way_not_to_keep_x():
    llama = {"columns": 4096, "ranks": 48, "parallel": 8, "itemsize": 2}
    path = ColumnPath()
    assert path.takes_rank_space(Group(8192, **llama))
    assert not path.takes_rank_space(Group(8, **llama))
    tokens = next(n for n in range(1, 10_000) if path.takes_rank_space(Group(n, **llama)))
    per_token = (1 - 1 / 8) * (2 * (4096 - 2 * 48) / path.bandwidth + 6 * 4096 * 48 / path.rate)
    assert tokens == pytest.approx(path.latency / per_token, abs=8)  # the formula solved for N; shards are whole rows
    assert not ColumnPath("gathered").takes_rank_space(Group(8192, **llama))
    assert ColumnPath(recomputed=True).price(Group(8192, **llama)) == 0


def test_without_token_shards_rank_space_is_refused_and_auto_gathers(pool):
    pool.run(2, refused)


def refused(rank):
    mesh = init_device_mesh("cpu", (2,))
    model = build(mesh, "plan_first", FORCED)
    x = torch.randn(ROWS, 4, WIDTH, dtype=torch.float64)
    whole = DTensor.from_local(x, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"readers\.q: rank space was asked for, but its input was not gathered from token shards"):
        model.readers.forward(whole)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        model.readers(x)
    take_column_path(model, ColumnPath())
    assert torch.isfinite(model.readers.forward(whole)).all()
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("overrides,words", [({"tp": 2}, "sequence_parallel=true"), ({"tp": 2, "column": "ranks"}, "rank_space")])
def test_a_config_that_cannot_be_is_refused(overrides, words):
    with pytest.raises((ValidationError, ValueError), match=words):
        ParallelConfig(**{"column": "rank_space", **overrides}).resolved(2)


def test_a_compiled_run_in_rank_space_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compiled blocks compute on gathered tokens"):
        config_of(tmp_path, tmp_path, parallel__column="rank_space", train__compile=True)
