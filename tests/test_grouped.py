"""Grouped linear layers: products per expert and their tails, the adapter beside them, experts shared out over ranks."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from d9d_lora import GroupedLinear, LoRAGroupedLinear, LoRAParameters, add_adapter, inject_peft_and_freeze, merge_peft, set_adapter
from d9d_lora.dropout import AdapterDropout, Clock
from d9d_lora.layers import grouped
from d9d_lora.layers import grouped_mm as gm
from d9d_lora.layers.grouped_mm import Groups, grouped_mm
from d9d_lora.measure import saved_bytes
from d9d_lora.placement import full_of
from d9d_lora.registry import peft_method_from_config
from d9d_lora.walk import adapted_layers
from tests.test_laws import wake

E, I, O, S = 4, 8, 12, 1.7
COUNTS = [3, 0, 5, 1]
TAIL = 2
N = sum(COUNTS) + TAIL


def tensors(dtype, r):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (N, I), "W": (E, I, O), "A": (E, I, r), "B": (E, r, O)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for name, shape in shapes.items()}


def formula(x, W, A, B, keep=None, p=0.0, counts=COUNTS):
    """The dense sum of every expert's rows; nothing for the tail."""
    h = x if keep is None else torch.where(keep, x, 0) / (1 - p)
    pieces, start = [], 0
    for e, n in enumerate(counts):
        rows = slice(start, start + n)
        pieces.append(x[rows] @ W[e] + S * h[rows] @ (A[e] @ B[e]))
        start += n
    return torch.cat([*pieces, x.new_zeros(len(x) - start, W.shape[2])])


def close(found, expected, tolerance):
    for f, e in zip(found, expected, strict=True):
        f, e = f.detach().double(), e.detach().double()
        worst = float((f - e).abs().max() / e.abs().max().clamp(min=1))
        assert worst < tolerance, worst


@pytest.fixture
def poisoned(monkeypatch):
    """torch's operator leaves what memory held in rows that are nobody's: here always NaN."""
    real = gm._OPERATOR

    def operator(a, b, *, offs):
        y = real(a, b, offs=offs)
        if y.ndim == 2:
            y[int(offs[-1]) :] = float("nan")
        return y

    monkeypatch.setattr(gm, "_OPERATOR", operator)


def values_and_gradients(dtype, r, *, dropout=False, counts=COUNTS, outer=""):
    t = tensors(dtype, r)
    t |= {name: t[name].detach()[0].clone().requires_grad_() for name in outer}
    mask = None
    if dropout:
        drop = AdapterDropout(0.4, "layer", Clock(3))
        drop.clock.set(1)
        mask = drop.mask(t["x"])
    groups = Groups.of(torch.tensor(counts), t["x"], E, "here")
    y = grouped_mm(t["x"], t["W"], groups, t["A"], t["B"], S, mask)
    dy = torch.randn(N, O, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [y, *torch.autograd.grad(y, list(t.values()), dy.to(dtype))]
    exact = {name: value.detach().double().requires_grad_() for name, value in t.items()}
    keep = None if mask is None else mask.keep(torch.ones_like(t["x"]))[0] != 0
    every = {name: value if value.ndim == 3 or name == "x" else value.expand(E, *value.shape) for name, value in exact.items()}
    expected = formula(**every, keep=keep, p=0.4 if dropout else 0.0)
    return found, [expected, *torch.autograd.grad(expected, list(exact.values()), dy.to(dtype).double())]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("r", [3, 8])
@pytest.mark.parametrize("dropout", [False, True])
def test_values_and_gradients_are_those_of_the_dense_formula(poisoned, dtype, tolerance, r, dropout):
    close(*values_and_gradients(dtype, r, dropout=dropout), tolerance)


@pytest.mark.parametrize("outer", ["A", "B"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_a_factor_may_be_one_for_all_experts(poisoned, monkeypatch, outer, dtype, tolerance):
    found, expected = values_and_gradients(dtype, 3, dropout=True, outer=outer)
    close(found, expected, tolerance)
    monkeypatch.setattr(gm, "_of", lambda w, x, y, g: gm.over_rows(x, y, g) if w.ndim == 3 else x.mT @ y)  # tail rows and all
    if dtype == torch.float32:
        with pytest.raises(AssertionError):
            close(values_and_gradients(dtype, 3, dropout=True, outer=outer)[0], expected, tolerance)


def test_without_the_operator_a_loop_does_it(monkeypatch):
    monkeypatch.setattr(gm, "_OPERATOR", None)
    close(*values_and_gradients(torch.float32, 3), 1e-5)


def test_mutation_tail_rows_trusted(poisoned, monkeypatch):
    monkeypatch.setattr(Groups, "clear_tail_", lambda self, y: y)
    found, expected = values_and_gradients(torch.float32, 4)
    assert all(t[-TAIL:].isnan().all() for t in found[:2])
    with pytest.raises(AssertionError):
        close(found[:2], expected[:2], 1e-5)


def test_mutation_another_order_of_experts():
    t = tensors(torch.float64, 3)
    groups = Groups.of(torch.tensor(COUNTS[::-1]), t["x"], E, "here")
    with pytest.raises(AssertionError):
        close([grouped_mm(*(t[n] for n in "xW"), groups, t["A"], t["B"], S)], [formula(**t)], 0.1)


def test_six_thin_products_are_computed_and_x_and_z_are_kept(monkeypatch):
    done = []
    for name in ("rows_by", "over_rows"):
        real = getattr(gm, name)
        monkeypatch.setattr(gm, name, lambda x, w, g, real=real, name=name: done.append((name, *w.shape)) or real(x, w, g))
    t = tensors(torch.float32, 4)
    t["W"].requires_grad_(False)
    groups = Groups.of(torch.tensor(COUNTS), t["x"], E, "here")
    h = t["x"] * 1  # an activation
    kept = saved_bytes(lambda: grouped_mm(h, t["W"], groups, t["A"], t["B"], S), t.values())
    assert kept == 4 * (h.numel() + N * 4)
    done.clear()
    grouped_mm(h, t["W"], groups, t["A"], t["B"], S).sum().backward()
    assert len(done) == 2 + 6
    assert sum(call[-1] in (I, O) and call[-2] in (I, O) for call in done) == 2


def kept_by_an_adapted_layer(dora):
    model = nn.Sequential(GroupedLinear(E, I, O, dtype=torch.bfloat16))
    inject_peft_and_freeze(lora(use_dora=dora), model)
    x = torch.randn(N, I, dtype=torch.bfloat16, requires_grad=True)
    return saved_bytes(lambda: model[0](x, COUNTS), [x, *model.parameters()])


@pytest.mark.parametrize("dora", [False, True])
def test_in_bf16_no_factor_of_all_experts_is_kept_once_more_and_no_gain_of_every_row(monkeypatch, dora):
    z, y, g = 2 * N * 8, 2 * N * O, E * O  # r = 3 is padded to 8
    expected = z + dora * (y + (4 + 4 + 1) * g + 8 * N)  # of each row of W: g, its norm, whether there is one; of each row of y: its expert
    assert kept_by_an_adapted_layer(dora) == expected
    real = grouped_mm

    def cast(x, W, groups, A, B, s, mask):
        return real(x, W, groups, gm.padded(A.to(x.dtype), -1), gm.padded(B.to(x.dtype), -2), s, mask)

    monkeypatch.setattr(grouped, "grouped_mm", cast)
    assert kept_by_an_adapted_layer(dora) == expected + 2 * E * 8 * (I + O)
    monkeypatch.setattr(grouped, "gained_rows", lambda y, g, of: (y * g[of]).to(y.dtype))
    assert kept_by_an_adapted_layer(dora) == expected + 2 * E * 8 * (I + O) + dora * 4 * (N * O - g)


def test_no_rows_at_all_still_give_gradients():
    t = tensors(torch.float32, 4)
    x = torch.empty(0, I, requires_grad=True)
    y = grouped_mm(x, t["W"].detach(), Groups.of(torch.zeros(E, dtype=torch.long), x, E, "here"), t["A"], t["B"], S)
    y.sum().backward()
    assert y.shape == (0, O)
    assert x.grad.shape == (0, I)
    assert not any(t[name].grad.any() for name in "AB")


@pytest.mark.parametrize(
    "x_groups,words",
    [([1, 2, 3], "tells of 3 experts, and this layer has 4"), ([1.0] * 4, "number of rows"), ([9] * 4, "counts 36 rows, and x has 11")],
)
def test_groups_that_cannot_be_are_refused(x_groups, words):
    with pytest.raises(ValueError, match=words):
        GroupedLinear(E, I, O)(torch.randn(N, I), x_groups)


def lora(name="0", **params):
    return peft_method_from_config({"kind": "lora", "target_modules": [name], "params": {"r": 3, "alpha": 5, **params}})


def test_an_adapted_layer_alone_is_its_formula_and_merges():
    layer = LoRAGroupedLinear(GroupedLinear(E, I, O, dtype=torch.float64), LoRAParameters(r=3, alpha=5))
    x = torch.randn(N, I, dtype=torch.float64)
    base = layer.base(x, COUNTS)
    assert torch.equal(layer(x, torch.tensor(COUNTS)), base)
    wake(nn.Sequential(layer))
    y = layer(x, COUNTS)
    with torch.no_grad():
        W = layer.base.weight + layer.delta.scaling * layer.lora_A.weight @ layer.lora_B.weight
    merged = layer.merge_with_base_()
    assert (merged.weight - W).abs().max() < 1e-14
    close([merged(x, COUNTS)], [y], 1e-12)


@pytest.mark.parametrize("name,shapes", [("up_proj", {(I, 3), (E, 3, O)}), ("down_proj", {(E, I, 3), (3, O)})])
def test_the_name_of_a_grouped_layer_tells_its_outer_factor(name, shapes):
    model = nn.ModuleDict({name: GroupedLinear(E, I, O, dtype=torch.float64)})
    method = lora(name, experts_shared_outer=True)
    inject_peft_and_freeze(method, model)
    wake(model)
    x = torch.randn(N, I, dtype=torch.float64)
    layer = model[name]
    assert {tuple(p.shape) for p in layer.factors().values()} == shapes
    y = layer(x, COUNTS)
    A, B = (layer.factor(n).detach() for n in ("lora_A", "lora_B"))
    W = layer.base.weight + layer.delta.scaling * (A.expand(E, I, 3) @ B.expand(E, 3, O))
    merge_peft(method, model)
    close([model[name].weight], [W], 1e-14)
    close([model[name](x, COUNTS)], [y], 1e-12)


def test_an_outer_factor_that_nothing_tells_is_refused():
    for target, words in (("0", "the name of this stack does not tell"), ("1", "no stack of experts")):
        model = nn.Sequential(GroupedLinear(E, I, O), nn.Linear(O, O))
        method = peft_method_from_config({"kind": "lora", "target_modules": [target], "params": {"experts_shared_outer": True}})
        with pytest.raises(ValueError, match=words):
            inject_peft_and_freeze(method, model)
    with pytest.raises(ValueError, match="the name of this stack does not tell"):
        LoRAGroupedLinear(GroupedLinear(E, I, O), LoRAParameters(experts_shared_outer=True))
    for other in ({"use_dora": True}, {"enable_lora": [True, False]}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "orthogonal"}):
        with pytest.raises(ValueError, match="experts_shared_outer is of plain LoRA"):
            LoRAParameters(experts_shared_outer=True, **other)


OUTER = {"experts_shared_outer": True}


@pytest.mark.parametrize("name,params", [("0", {}), ("up_proj", OUTER), ("down_proj", OUTER)])
def test_several_adapters_on_grouped_layers(name, params):
    model = nn.ModuleDict({name: GroupedLinear(E, I, O, dtype=torch.float64)})
    inject_peft_and_freeze(lora(name, init_lora_weights=False, **params), model)
    add_adapter(model, "other", lora(name, r=2, init_lora_weights=False, **params))
    x = torch.randn(N, I, dtype=torch.float64)
    layer, base = model[name], model[name].base(x, COUNTS)
    out = {}
    for names in (["default"], ["other"], ["default", "other"]):
        set_adapter(model, names)
        out[tuple(names)] = layer(x, COUNTS) - base
    close([out["default", "other"]], [out["default",] + out["other",]], 1e-12)
    assert all(float(t.abs().max()) > 0.01 for t in out.values())


def test_all_linear_takes_experts_and_leaves_routers_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(I, E, bias=False)
            self.shared = nn.Linear(I, I)
            self.experts = nn.ModuleDict({"up": GroupedLinear(E, I, O), "down": GroupedLinear(E, O, I)})

    def adapted(targets):
        model = nn.Sequential(Block(), nn.Linear(I, E))
        inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "target_modules": targets}), model)
        return {layer.name for layer in adapted_layers(model)}

    assert adapted("all-linear") == {"0.shared", "0.experts.up", "0.experts.down", "1"}
    assert adapted(["gate", "up"]) == {"0.gate", "0.experts.up"}


# -- experts shared out over ranks: the seam of expert parallelism ------------------------------------------------------------------


def on_their_experts(rank, kind):
    """Each of two ranks holds half of the experts, and is given the rows of these; one process has them all."""
    torch.manual_seed(0)
    whole = nn.Sequential(GroupedLinear(E, I, O, dtype=torch.float64))
    part = nn.Sequential(GroupedLinear(E, I, O, dtype=torch.float64))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    part[0].weight = nn.Parameter(distribute_tensor(whole[0].weight.detach(), mesh, [Shard(0)]))
    config = {"kind": kind, "target_modules": ["0"], "params": {"r": 3, "alpha": 5, "dropout": 0.0}}
    methods = [peft_method_from_config(config) for _ in range(2)]
    for method, model in zip(methods, (whole, part)):
        inject_peft_and_freeze(method, model)
        method.initialise(model)
        wake(model)
    x = torch.randn(N - TAIL, I, dtype=torch.float64)
    first = sum(COUNTS[:2])
    mine, counts = (x[:first], COUNTS[:2]) if rank == 0 else (x[first:], COUNTS[2:])
    y, z = whole[0](x, COUNTS), part[0](mine, counts)
    y.square().sum().backward()
    z.square().sum().backward()
    close([z], [y[:first] if rank == 0 else y[first:]], 1e-12)
    for (name, p), q in zip(whole[0].factors().items(), part[0].factors().values()):
        assert q.placements == (Shard(0),), name
        close([full_of(q.grad)], [p.grad], 1e-12)
    assert not list(part[0].parameters_in_parts())
    for method, model in zip(methods, (whole, part)):
        merge_peft(method, model)
    close([full_of(part[0].weight)], [whole[0].weight], 1e-12)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_experts_on_their_ranks(pool, kind):
    pool.run(2, on_their_experts, kind)
