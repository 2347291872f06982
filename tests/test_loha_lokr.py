"""LoHa and LoKr: every box of dW, both ways to compute it, dropped rows and modules on every layout, refusals."""

import itertools

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config
from d9d_lora.dropout import AdapterDropout, Clock
from d9d_lora.methods import lokr
from d9d_lora.methods.delta import Geometry
from d9d_lora.methods.loha import LoHaDelta, product_is_cheaper
from d9d_lora.methods.lokr import LoKrDelta, factorise
from d9d_lora.sums import ReplicatedSum
from d9d_lora.walk import adapted_layers, clock_of
from tests.catalogue import LAYOUTS, batch, build, dp_rank
from tests.test_laws import PARALLEL, close, grads_of, law_of_gradients, make, wake

DROPS = {"rank_dropout": 0.3, "module_dropout": 0.3}
OUT, INTO = 20, 18
DELTAS = {
    "loha": LoHaDelta(2, 4),
    "loha wide": LoHaDelta(9, 4),
    "lokr": LoKrDelta(2, 3),
    "lokr both": LoKrDelta(1, 3, both=True),
    "lokr full": LoKrDelta(4, 3),
    "lokr long": LoKrDelta(3, 3, factor=10),
    "lokr thin blocks": LoKrDelta(3, 3, factor=9),
    "lokr one block": LoKrDelta(4, 3, factor=1),
}


def whole(delta, geometry, seed=0):
    """The delta for a geometry, and whole factors."""
    delta = delta.fit(geometry)
    g = torch.Generator().manual_seed(seed)
    shapes = delta.shapes(geometry.out, geometry.into)
    return delta, {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}


def by_definition(delta, f):
    """dW, from the formula in the paper."""
    if isinstance(delta, LoHaDelta):
        return delta.scaling * (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    w2 = f["lokr_w2"] if "lokr_w2" in f else f["lokr_w2_a"] @ f["lokr_w2_b"]
    return delta.scaling * torch.einsum("pq,uv->puqv", w1, w2).reshape(w1.shape[0] * w2.shape[0], -1)


BOXES = [(slice(a, b), slice(c, d)) for a, b in ((0, 20), (0, 7), (7, 20), (3, 4), (9, 9)) for c, d in ((0, 18), (5, 16), (1, 2), (18, 18))]


@pytest.mark.parametrize("name", DELTAS)
def test_every_box_is_that_part_of_the_whole(name):
    delta, f = whole(DELTAS[name], Geometry(OUT, INTO))
    dW = by_definition(delta, f)
    for rows, cols in BOXES:
        parts, wanted = delta.part(f, rows, cols), dW[rows, cols]
        assert delta.dense(parts).shape == wanted.shape
        assert torch.allclose(delta.dense(parts), wanted, atol=1e-10)
        for n in (1, 500):  # few inputs and many: LoHa computes these in two ways
            x = torch.randn(n, 2, wanted.shape[1], dtype=torch.float64)
            assert torch.allclose(delta.apply(x, parts), x @ wanted.T, atol=1e-10)
        ids = torch.arange(wanted.shape[1])
        assert torch.allclose(delta.look_up(ids, parts), wanted.T, atol=1e-10)


@pytest.mark.parametrize("name", ["lokr", "lokr full", "lokr long"])
def test_mutation_blocks_counted_from_the_start_of_the_box(name, monkeypatch):
    real = lokr.cover
    monkeypatch.setattr(lokr, "cover", lambda box, block: real(slice(0, box.stop - box.start), block))
    delta, f = whole(DELTAS[name], Geometry(OUT, INTO))
    rows, cols = slice(7, 20), slice(5, 16)
    with pytest.raises(AssertionError, match="is off by"):
        close({"dense": delta.dense(delta.part(f, rows, cols))}, {"dense": by_definition(delta, f)[rows, cols]})


@pytest.mark.parametrize("name", DELTAS)
def test_gradients_of_the_ways_to_compute_agree(name):
    delta, f = whole(DELTAS[name], Geometry(OUT, INTO))
    for p in f.values():
        p.requires_grad_()
    names = list(f)
    parts = delta.part(f, slice(3, 17), slice(1, 16))
    for n in (1, 300):
        x = torch.randn(n, 15, dtype=torch.float64)
        weight = torch.randn(n, 14, dtype=torch.float64)
        ours = torch.autograd.grad((delta.apply(x, parts) * weight).sum(), list(f.values()))
        true = torch.autograd.grad(((x @ by_definition(delta, f)[3:17, 1:16].T) * weight).sum(), list(f.values()))
        close(dict(zip(names, ours)), dict(zip(names, true)))


# -- LoHa: product or dense -----------------------------------------------------------------------------------------------------------


def test_the_cheaper_way_is_taken():
    assert product_is_cheaper(10**6, 4096, 4096, 45)
    assert not product_is_cheaper(10**6, 4096, 4096, 46)  # 4096 / 2 = 2048 lies between 45^2 and 46^2
    assert product_is_cheaper(1, 4096, 4096, 46)  # one input never pays for building dW


def flops(f, *args):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        f(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("r", [2, 6, 10, 16])
@pytest.mark.parametrize("n", [1, 50, 5000])
def test_no_other_way_has_fewer_multiplications(n, r):
    def product(x, parts):
        B, A = delta.product(parts)
        return nn.functional.linear(nn.functional.linear(x, A), B)

    delta, f = whole(LoHaDelta(r, 4), Geometry(200, 150))
    x, parts = torch.randn(n, 150, dtype=torch.float64), delta.part(f, slice(0, 200), slice(0, 150))
    ways = flops(product, x, parts), flops(lambda x, p: nn.functional.linear(x, delta.dense(p)), x, parts)
    assert flops(delta.apply, x, parts) == min(ways)


@pytest.mark.parametrize("delta", [LoKrDelta(2, 4), LoKrDelta(500, 4), LoKrDelta(3, 4, factor=4), LoKrDelta(20, 4, factor=48)])
def test_a_kronecker_product_costs_less_than_what_it_stands_for(delta):
    delta, f = whole(delta, Geometry(192, 144))
    x, parts = torch.randn(100, 144, dtype=torch.float64), delta.part(f, slice(0, 192), slice(0, 144))
    assert flops(delta.apply, x, parts) < 0.5 * flops(nn.functional.linear, x, delta.dense(parts))


def test_the_dense_way_keeps_nothing_of_the_size_of_the_weight():
    delta, f = whole(LoHaDelta(12, 4), Geometry(200, 150))
    for p in f.values():
        p.requires_grad_()
    x = torch.randn(64, 150, dtype=torch.float64)
    assert not product_is_cheaper(64, 200, 150, 12)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        delta.apply(x, delta.part(f, slice(0, 200), slice(0, 150)))
    assert max(kept, default=0) < 200 * 150
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        nn.functional.linear(x, delta.dense(delta.part(f, slice(0, 200), slice(0, 150))))
    assert max(kept) == 200 * 150  # the count sees it where it is kept


# -- Tucker cores -------------------------------------------------------------------------------------------------------------------------


def by_core(t, a, b):
    return torch.einsum("ijt,io,jc->oct", t.flatten(2), a, b).flatten(1)


@pytest.mark.parametrize("taps", [(3,), (3, 2), (2, 3, 2)])
def test_tucker_cores(taps):
    n = torch.Size(taps).numel()
    geometry = Geometry(12, 10 * n, taps=taps)
    delta, f = whole(LoHaDelta(2, 4, tucker=True), geometry)
    dW = delta.scaling * by_core(f["hada_t1"], f["hada_w1_a"], f["hada_w1_b"]) * by_core(f["hada_t2"], f["hada_w2_a"], f["hada_w2_b"])
    small, g = whole(LoKrDelta(1, 4, tucker=True), geometry)
    assert set(g) == {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    kron = small.scaling * torch.kron(g["lokr_w1"], by_core(g["lokr_t2"], g["lokr_w2_a"], g["lokr_w2_b"]))
    x = torch.randn(5, 10 * n, dtype=torch.float64)
    for (d, h, wanted), (rows, cols) in itertools.product(
        [(delta, f, dW), (small, g, kron)], [(slice(0, 12), slice(0, 10 * n)), (slice(5, 9), slice(n + 1, 4 * n - 1))]
    ):
        parts = d.part(h, rows, cols)
        close({"dW": d.dense(parts)}, {"dW": wanted[rows, cols]})
        assert torch.allclose(d.apply(x[:, cols], parts), x[:, cols] @ wanted[rows, cols].T, atol=1e-10)


@pytest.mark.parametrize("taps", [(1,), (1, 1)])
def test_a_kernel_of_one_has_no_core(taps):
    for delta in (LoHaDelta(1, 4, tucker=True), LoKrDelta(1, 4, tucker=True)):
        plain = type(delta)(1, 4).fit(Geometry(12, 10, taps=taps))
        assert delta.fit(Geometry(12, 10, taps=taps)).shapes(12, 10) == plain.shapes(12, 10)


# -- dropped rows, dropped modules --------------------------------------------------------------------------------------------------------


def parts_in_training(delta, f, time, name="layer"):
    clock = Clock()
    clock.set(time)
    parts = delta.part(f, slice(0, OUT), slice(0, INTO))
    parts.dropout = AdapterDropout(0, name, clock)
    return parts


@pytest.mark.parametrize(
    "delta", [LoHaDelta(2, 4, 0.4), LoHaDelta(9, 4, 0.4), LoKrDelta(2, 4, 0.4), LoKrDelta(2, 4, 0.4, rank_dropout_scale=True)]
)
def test_rows_are_dropped_alike_by_every_way_to_compute(delta):
    delta, f = whole(delta, Geometry(OUT, INTO))
    dW, shares = by_definition(delta, f), []
    for time in range(20):
        parts = parts_in_training(delta, f, time)
        dropped = delta.dense(parts)
        kept = dropped.abs().amax(1) > 0
        scale = 1 / kept.double().mean() if delta.rescales else 1
        assert torch.allclose(dropped, dW * kept[:, None] * scale)
        for n in (1, 300):
            x = torch.randn(n, INTO, dtype=torch.float64)
            assert torch.allclose(delta.apply(x, parts), x @ dropped.T, atol=1e-10)
        assert torch.allclose(delta.look_up(torch.arange(INTO), parts), dropped.T, atol=1e-10)
        shares.append(kept.double().mean())
    assert abs(torch.stack(shares).mean() - 0.6) < 0.1
    assert len({float(s) for s in shares}) > 2
    assert torch.equal(delta.dense(parts), delta.dense(parts_in_training(delta, f, 19)))
    assert not torch.equal(delta.dense(parts), delta.dense(parts_in_training(delta, f, 19, "other layer")))


def test_all_rows_dropped_is_no_update_and_not_nan():
    delta, f = whole(LoHaDelta(2, 4, 0.999999), Geometry(OUT, INTO))
    assert torch.equal(delta.dense(parts_in_training(delta, f, 0)), torch.zeros(OUT, INTO, dtype=torch.float64))


def test_a_dropped_module_is_the_base_alone_and_evaluation_drops_nothing():
    params = {"r": 2, "alpha": 4, "module_dropout": 0.5}
    model, method = make("lokr", "linear", LAYOUTS["one"], params=params)
    wake(model)
    up, x = model.blocks[0].up, torch.randn(3, 12, dtype=torch.float64)
    clock_of(model).set(0)
    whole_update = (up.eval()(x) - up.base(x)).detach()
    up.train()
    seen = set()
    for time in range(20):
        clock_of(model).set(time)
        update = (up(x) - up.base(x)).detach()
        assert torch.allclose(update, whole_update) or not update.any()
        seen.add(bool(update.any()))
    assert seen == {True, False}
    adapted = model.eval()(batch(0)[0])
    merge_peft(method, model)
    assert (model(batch(0)[0]) - adapted).abs().max() < 1e-10


def test_a_plain_loop_ticks_the_clock_of_a_method_that_drops_rows_only():
    model, _ = make("loha", "linear", LAYOUTS["one"], params={"r": 2, "alpha": 4, "rank_dropout": 0.5})
    wake(model)
    ids = batch(0)[0]
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_a_recomputed_forward_drops_the_same_rows():
    grads = []
    for recompute in (False, True):
        model, _ = make("loha_dense", "linear", LAYOUTS["one"], params={"r": 4, "alpha": 4, **DROPS})
        wake(model)
        if recompute:
            for block in model.blocks:
                run = block.forward
                block.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)
        y = model(batch(0)[0])
        if not recompute:
            model(batch(1)[0])  # the clock runs on before the backward
        y.square().sum().backward()
        grads.append(grads_of(model))
    close(*grads)


def law_of_dropped_rows(rank, method, layer, layout_name, mutation):
    """With dropped rows and modules, gradients equal one process."""
    layout = LAYOUTS[layout_name]
    params = {**DROPS, "r": 2, "alpha": 4} | ({"rank_dropout_scale": True} if method == "lokr" else {})
    reference, _ = make(method, layer, LAYOUTS["one"], params=params)
    model, _ = make(method, layer, layout, params=params)
    wake(reference), wake(model)
    bucket = ReplicatedSum(adapted_layers(model))
    ids, target = batch(0)

    def drive(m, layout, accumulate, me):
        for a in range(accumulate):
            micro = a * layout.dp + me
            clock_of(m).set(0, micro + (1000 * rank if mutation and m is model else 0))
            rows = slice(micro * 8 // (layout.dp * accumulate), (micro + 1) * 8 // (layout.dp * accumulate))
            y, t = m(ids[rows]), target[rows]
            if layout.sequence:
                r, size = dist.get_rank() % layout.tp, t.shape[1] // layout.tp
                t = t[:, r * size : (r + 1) * size]
            (y - t).square().sum().backward()

    drive(model, layout, 2, dp_rank(layout))
    bucket.reduce()
    drive(reference, LAYOUTS["one"], 2 * layout.dp, 0)
    assert any(g.abs().max() > 0 for g in grads_of(reference).values())
    close(grads_of(model), grads_of(reference))


CASES = [
    *(("lokr", "linear", layout) for layout in PARALLEL),
    ("lokr", "embedding", "tp2_sp"),
    ("loha", "linear", "tp2"),
    ("loha", "linear", "fsdp2_tp2"),
]


@pytest.mark.parametrize("method,layer,layout", CASES)
def test_dropped_rows_do_not_depend_on_the_layout(pool, method, layer, layout):
    pool.run(LAYOUTS[layout].world, law_of_dropped_rows, method, layer, layout, False)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_mutation_other_rows_dropped_on_each_rank(pool, method):
    with pytest.raises(AssertionError, match="is off by"):
        pool.run(2, law_of_dropped_rows, method, "linear", "tp2", True)


# -- mutations on a rank ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_mutation_gradients_of_whole_factors_are_not_summed(pool, method):
    with pytest.raises(AssertionError, match=r"is off by|AssertionError"):
        pool.run(2, law_of_gradients, method, "linear", "tp2", "plan_first", True, {}, "drop the sum")


def blocks_of_rank_0_everywhere(rank):
    real = lokr.cover
    lokr.cover = lambda box, block: real(slice(0, box.stop - box.start), block)
    try:
        law_of_gradients(rank, "lokr", "linear", "tp2", "plan_first", True, {}, "its reference too, which is whole and so right")
    finally:
        lokr.cover = real


def test_mutation_blocks_of_rank_0_everywhere(pool):
    with pytest.raises(AssertionError, match=r"is off by|AssertionError"):
        pool.run(2, blocks_of_rank_0_everywhere)


# -- starts and refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["linear", "embedding"])
@pytest.mark.parametrize("method,init,zero", [
    ("loha", True, {"hada_w2_b"}), ("loha", False, set()),
    ("lokr", True, {"lokr_w1"}), ("lokr", "lycoris", {"lokr_w2_b"}), ("lokr", False, set()),
])  # fmt: skip
def test_starts(method, init, zero, layer):
    model, _ = make(method, layer, LAYOUTS["one"], params={"r": 2, "alpha": 4, "init_weights": init})
    for adapted in adapted_layers(model):
        assert {n for n, p in adapted.factors().items() if not p.any()} == zero
        for n, p in adapted.factors().items():
            if layer == "linear":
                assert p.abs().max() <= 1 / p.shape[1] ** 0.5
            elif n in ("hada_w1_b", "lokr_w2_b") and n not in zero:
                assert p.std() > 0.5  # no sum over I is taken, so no 1/sqrt(I)
    same = torch.equal(model(batch(0)[0]), build(layer)(batch(0)[0]))
    assert same == bool(init)


def test_factorise():
    assert [factorise(n) for n in (1, 7, 12, 16, 128)] == [(1, 1), (1, 7), (3, 4), (4, 4), (8, 16)]
    assert [factorise(n, f) for n, f in ((128, 4), (128, 64), (12, 5), (12, 100))] == [(4, 32), (64, 2), (3, 4), (3, 4)]


@pytest.mark.parametrize("params,words", [
    ({"kind": "lokr", "params": {"rank_dropout_scale": True}}, "rank_dropout_scale goes with rank_dropout"),
    ({"kind": "lokr", "params": {"decompose_factor": 0}}, "at least 1, or -1; got 0"),
    ({"kind": "loha", "params": {"r": 0}}, "greater than or equal to 1"),
    ({"kind": "loha", "params": {"scaling": "rslora"}}, "Extra inputs"),
])  # fmt: skip
def test_a_config_that_means_nothing_is_refused(params, words):
    with pytest.raises(ValidationError, match=words):
        peft_method_from_config({**params, "target_modules": ["up"]})


@pytest.mark.parametrize("params,words", [
    ({"kind": "lokr", "params": {"r": 2, "decompose_both": True}}, "decompose_both would be ignored"),
    ({"kind": "lokr", "params": {"use_effective_conv2d": True}}, "none of the targets is a convolution"),
    ({"kind": "loha", "params": {"use_effective_conv2d": True}}, "none of the targets is a convolution"),
])  # fmt: skip
def test_an_option_that_no_target_can_follow_is_refused(params, words):
    model = build("linear")
    with pytest.raises(ValueError, match=words):
        inject_peft_and_freeze(peft_method_from_config({**params, "target_modules": ["up", "down"]}), model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_unfitted_delta_says_what_to_call():
    with pytest.raises(ValueError, match="call `fit"):
        LoKrDelta(2, 4).shapes(4, 4)


def test_a_padding_id_passes_no_gradient():
    delta, f = whole(LoKrDelta(2, 4), Geometry(OUT, INTO))
    for p in f.values():
        p.requires_grad_()
    parts = delta.part(f, slice(0, OUT), slice(0, INTO))
    ids = torch.tensor([3, 3])
    assert delta.look_up(ids, parts, padding=3).any()
    assert not any(g.any() for g in torch.autograd.grad(delta.look_up(ids, parts, padding=3).sum(), list(f.values())))
