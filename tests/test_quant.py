"""A base in four bits: what the packing is, that its shards are those of the whole, that training beside it is the same everywhere."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config, unmerge_peft
from d9d_lora.init.loftq import replace_lora_weights_loftq
from d9d_lora.placement import full_of
from d9d_lora.quant import linear as quant_linear
from d9d_lora.quant.linear import NF4Linear, dequantising
from d9d_lora.quant.load import packed_tensors, quantise_, sinks
from d9d_lora.quant.nf4 import CODE, dequantise, packed_shapes, quantise, restored
from d9d_lora.state.reader import load_checkpoint
from d9d_lora.state.safetensors_dir import CheckpointError
from d9d_lora.styles import parallelize_adapted
from d9d_lora.train.model import bytes_held
from d9d_lora.walk import adapted_layers, adapter_tensors
from tests.catalogue import LAYOUTS, Toy, batch, build, mesh_of, peft_config, plan_of, shard_data_parallel
from tests.small_run import config_of, losses, make_assets, run
from tests.test_laws import backward, close, law_of_gradients, make, wake

# -- the packing ----------------------------------------------------------------------------------------------------------------------


def matrix(out=24, into=320, seed=0, scale=0.02):
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed)) * scale


def awkward():
    """Rows of zeros, blocks of zeros, a constant row, an outlier, tiny beside large."""
    w = matrix()
    w[0], w[1, 64:128], w[2], w[3, 5] = 0, 0, 0.5, 40.0
    w[4, :64] *= 1e-7
    w[5] *= 1e-30
    return w


@pytest.mark.parametrize("into", [320, 300, 64, 7, 1])
def test_a_value_is_restored_to_the_nearest_that_can_be_told(into):
    w = awkward()[:, :into].contiguous()
    packed = quantise(w)
    assert [tuple(t.shape) for t in packed] == [tuple(t.shape) for t in packed_shapes(24, into, 64)]
    m = restored(packed.absmax, packed.span).repeat_interleave(64, 1)[:, :into]
    assert (m >= 0).all()
    everything = m[:, :, None] * torch.tensor(CODE)
    best = (everything - w[:, :, None]).abs().amin(2)
    found = (dequantise(packed, into) - w).abs()
    assert (found <= best + 1e-7 * m).all()
    assert (found[0] == 0).all()


def test_the_scale_is_near_the_largest_of_its_block():
    w = matrix()
    packed = quantise(w)
    m = w.unflatten(1, (-1, 64)).abs().amax(2)
    spread = m.amax(1) - m.amin(1)
    assert ((restored(packed.absmax, packed.span) - m).abs() <= spread[:, None] / 255 * 0.51).all()
    error = torch.linalg.norm(dequantise(packed, 320) - w) / torch.linalg.norm(w)
    assert 0.08 < error < 0.1  # of a normal distribution with blocks of 64; bitsandbytes has 0.092


def test_bits_of_a_weight():
    shapes = packed_shapes(4096, 4096, 64)
    assert sum(t.numel() * t.element_size() for t in shapes) * 8 / 4096**2 == 4 + 8 / 64 + 64 / 4096


def test_rows_and_whole_blocks_of_columns_can_be_quantised_apart():
    w = awkward()
    whole = quantise(w)
    for rows in w.split(5), w.split(1):
        parts = [quantise(r) for r in rows]
        assert all(torch.equal(torch.cat(p), t) for p, t in zip(zip(*parts), whole))
    m = w.unflatten(1, (-1, 64)).abs().amax(2)

    def agree(low, high):
        low.copy_(m.amin(1)), high.copy_(m.amax(1))

    left, right = quantise(w[:, :128], agree=agree), quantise(w[:, 128:], agree=agree)
    assert torch.equal(torch.cat([left.weight, right.weight], 1), whole.weight)
    assert torch.equal(torch.cat([left.absmax, right.absmax], 1), whole.absmax)
    assert torch.equal(left.span, whole.span)
    assert not torch.equal(quantise(w[:, :128]).span, whole.span)  # without an agreement the scales are another


def test_many_rows_at_a_time_or_few_are_the_same(monkeypatch):
    from d9d_lora.quant import nf4

    w = awkward()
    whole, values = quantise(w), dequantise(quantise(w), 320)
    monkeypatch.setattr(nf4, "_AT_ONCE", 1000)
    assert all(torch.equal(a, b) for a, b in zip(quantise(w), whole))
    assert torch.equal(dequantise(whole, 320), values)


def test_a_half_precision_result_is_rounded_once():
    packed = quantise(matrix())
    assert torch.equal(dequantise(packed, 320, dtype=torch.bfloat16), dequantise(packed, 320).bfloat16())


# -- the layer ------------------------------------------------------------------------------------------------------------------------


def layer_of(out=24, into=320, dtype=torch.float32, bias=True):
    plain = nn.Linear(into, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(matrix(out, into))
    return plain, NF4Linear.of(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_layer_is_a_linear_layer_with_the_restored_weight(dtype):
    plain, layer = layer_of(dtype=dtype)
    Q = layer.unpacked_here()
    assert Q.dtype == dtype
    x = torch.randn(2, 3, 320, dtype=dtype, requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x, Q, plain.bias)
    assert (y - expected).abs().max() <= 1e-5 if dtype != torch.bfloat16 else 0.02
    y.square().sum().backward()
    assert torch.allclose(x.grad, 2 * y.detach() @ Q, rtol=1e-5 if dtype != torch.bfloat16 else 0.05, atol=1e-5)
    assert layer.bias.grad is not None
    assert all(p.grad is None for p in layer.packed())


def kept_for_backward(fn):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fn()
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in kept}.values())


def test_the_restored_weight_is_not_kept_for_the_backward():
    _, layer = layer_of(256, 256)
    x = torch.randn(1, 256, requires_grad=True)
    packed = sum(t.numel() * t.element_size() for t in layer.packed())
    assert kept_for_backward(lambda: layer(x)) == packed
    assert kept_for_backward(lambda: nn.functional.linear(x, layer.unpacked_here())) >= 256 * 256 * 4  # the count can fail


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_nor_beside_an_adapter(kind):
    model = nn.Sequential(layer_of(256, 256)[1], layer_of(256, 256)[1])
    inject_peft_and_freeze(peft_method_from_config({"kind": kind, "target_modules": ["0", "1"], "params": {"r": 2}}), model)
    x = torch.randn(1, 256)
    assert kept_for_backward(lambda: model(x)) < 256 * 256 * 2


def test_other_dtypes_leave_the_bits_as_they_are():
    _, layer = layer_of()
    before = [t.clone() for t in layer.packed()]
    layer.to(torch.bfloat16)
    assert layer.dtype == layer.bias.dtype == layer.unpacked_here().dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(layer.packed(), before))


def test_autocast():
    _, layer = layer_of()
    x = torch.randn(3, 320, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32


# -- into a model ---------------------------------------------------------------------------------------------------------------------


def tied():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "model,modules,words",
    [
        (lambda: build("linear"), ["upp"], "near misses: up"),
        (lambda: build("linear"), ["embed"], "embed is a Embedding; expected an nn.Linear"),
        (lambda: build("linear"), "nothing.*", "matches no linear layer"),
        (lambda: build("conv1d"), "all-linear", "matches no linear layer"),
        (tied, "all-linear", "1 shares its weight with 0.weight"),
        (lambda: make("lora", "linear", LAYOUTS["one"])[0], "all-linear", "already has adapters"),
    ],
)
def test_refusals_leave_the_model_as_it_was(model, modules, words):
    model = model()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        quantise_(model, modules)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_the_head_stays_and_names_are_told():
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "lm_head": nn.Linear(64, 5)})
    assert quantise_(model) == ["body"]
    assert isinstance(model["lm_head"], nn.Linear)


def test_a_start_that_moves_the_base_is_refused():
    config = {"kind": "lora", "target_modules": ["up"], "params": {"r": 3, "init_lora_weights": "pissa"}}
    with pytest.raises(ValueError, match=r"blocks.0.up: lora .* moves the base weight.*Use the start loftq"):
        inject_peft_and_freeze(peft_method_from_config(config), build("nf4"))


def split_a_block(rank):
    mesh = mesh_of(LAYOUTS["tp2"])["tp"]
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64), nn.Linear(192, 8))
    parallelize_module(model, mesh, {"0": RowwiseParallel(), "1": ColwiseParallel(), "2": RowwiseParallel()})
    quantise_(model, ["1"])
    with pytest.raises(ValueError, match=r"64 columns cannot be split by columns over 2 ranks.*Degrees that fit: \[1\]"):
        quantise_(model, ["0"])
    with pytest.raises(ValueError, match=r"192 columns.*Degrees that fit: \[1, 3\]"):
        quantise_(model, ["2"])
    later = nn.Sequential(nn.Linear(64, 8))
    quantise_(later, ["0"])
    with pytest.raises(ValueError, match="64 columns cannot be split"):
        parallelize_adapted(later, mesh, {"0": RowwiseParallel()})


def test_columns_are_split_in_whole_blocks_only(pool):
    pool.run(2, split_a_block)


# -- shards of the packing are the packing of the whole ----------------------------------------------------------------------------


def plain_toy(directory=None):
    """The toy with linear layers, on meta; its weights are in `directory`."""
    model = build("nf4", quantise=False)
    if directory is None:
        return model
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file({n: p.detach() for n, p in model.state_dict().items()}, directory / "model.safetensors")
    if dist.is_initialized():
        dist.barrier()
    with torch.device("meta"):
        return Toy(lambda i, o: nn.Linear(i, o), 24).double()


def packed_of(model):
    return {n: full_of(p.detach()) for n, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int32)}


def streamed(layout_name, directory, config=None, order="quantise_first"):
    """A toy that was quantised while its weights streamed in, on a layout, in the order of the trainer."""
    layout = LAYOUTS[layout_name]
    model = plain_toy(directory)
    if order == "quantise_first":
        quantise_(model, ["up", "down"], block=6)
    mesh = mesh_of(layout) if layout.world > 1 else None
    if layout.tp > 1:
        parallelize_adapted(model, mesh["tp"], plan_of(model, layout.sequence), src_data_rank=None)
    if order == "quantise_last":
        quantise_(model, ["up", "down"], block=6)
    method = peft_method_from_config(config or peft_config("lora", "nf4"))
    mapper = inject_peft_and_freeze(method, model)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.requires_grad_(False)
    if mesh is not None:
        shard_data_parallel(model, mesh, layout)
    model.to_empty(device="cpu")
    load_checkpoint(
        model, directory / "model.safetensors", mapper, skip=adapter_tensors(model) | packed_tensors(model), sinks=sinks(model)
    )
    method.initialise(model)
    return model, method


def law_of_streaming(rank, layout_name, directory, order, mutation):
    groups = quant_linear._column_groups
    if mutation:
        quant_linear._column_groups = lambda W: []
    try:
        model, _ = streamed(layout_name, directory, order=order)
    finally:
        quant_linear._column_groups = groups
    expected = packed_of(make("lora", "nf4", LAYOUTS["one"])[0])
    found = packed_of(model)
    assert found.keys() == expected.keys()
    assert len(found) == 12
    assert all(torch.equal(found[n], expected[n]) for n in found), "the bits are another"
    reference, _ = make("lora", "nf4", LAYOUTS["one"])
    layout = LAYOUTS[layout_name]
    assert abs(backward(model, layout) - backward(reference, LAYOUTS["one"])) < 1e-9


@pytest.mark.parametrize("layout", ["one", "fsdp2", "fsdp4", "hsdp2x2", "tp2", "tp4", "fsdp2_tp2"])
def test_a_stream_that_is_quantised_on_shards_has_the_bits_of_the_whole(pool, tmp_path, layout):
    pool.run(LAYOUTS[layout].world, law_of_streaming, layout, tmp_path, "quantise_first", False)


def test_the_plan_may_come_first(pool, tmp_path):
    pool.run(2, law_of_streaming, "tp2", tmp_path, "quantise_last", False)


def test_mutation_column_shards_that_do_not_agree(pool, tmp_path):
    with pytest.raises(AssertionError, match="the bits are another"):
        pool.run(2, law_of_streaming, "tp2", tmp_path, "quantise_first", True)


def quantised_in_place(rank, layout_name):
    """Weights that are there, sharded by tensor parallelism, are quantised where they are."""
    model = plain_toy()
    parallelize_module(model, mesh_of(LAYOUTS[layout_name])["tp"], plan_of(model, False))
    quantise_(model, ["up", "down"], block=6)
    found, expected = packed_of(model), packed_of(build("nf4"))
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    ids, _ = batch(0)
    assert (model(ids) - build("nf4")(ids)).abs().max() < 1e-10  # hooks have moved with the layers; no adapter is needed


@pytest.mark.parametrize("layout", ["tp2", "tp4"])
def test_sharded_weights_are_quantised_where_they_are(pool, layout):
    pool.run(LAYOUTS[layout].world, quantised_in_place, layout)


@pytest.mark.parametrize("targets", [["up"], ["down"]])
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "tp2_sp", "fsdp2_tp2"])
def test_quantised_layers_without_an_adapter_stand_in_the_plan(pool, layout, targets):
    pool.run(LAYOUTS[layout].world, law_of_gradients, "lora", "nf4", layout, "plan_first", True, {"target_modules": targets}, None)


# -- merge ----------------------------------------------------------------------------------------------------------------------------


def test_a_merge_must_be_asked_for_and_is_undone_to_the_bit():
    model, method = make("lora", "nf4", LAYOUTS["one"])
    for m in model.modules():
        if isinstance(m, NF4Linear):
            m.merge_dequantises = False
    wake(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks.0.up has a quantised base.*dequantise=True"):
        merge_peft(method, model)
    assert before.keys() == model.state_dict().keys()
    up = model.blocks[0].up
    expected = up.base.unpacked_here() + up.delta.scaling * up.lora_B.weight @ up.lora_A.weight
    merge_peft(method, model, dequantise=True)
    assert type(model.blocks[0].up) is nn.Linear
    assert (model.blocks[0].up.weight - expected).abs().max() < 1e-12
    unmerge_peft(method, model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    with pytest.raises(ValueError, match="has a quantised base"):  # the permission was for the merge before
        merge_peft(method, model)
    with dequantising(model):
        method.merge(model, undoable=False)
    with pytest.raises(ValueError, match="undoable=False"):
        unmerge_peft(method, model)


# -- LoftQ ----------------------------------------------------------------------------------------------------------------------------


def loftq_config(iterations=1, kind="lora", **params):
    start = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": iterations}}
    return {"kind": kind, "target_modules": ["up", "down"], "params": {"r": 3, "alpha": 6, **start, **params}}


def errors(model):
    """|W - (Q + s B A)| of every adapted layer, and |W - Q|."""
    truth = build("nf4", quantise=False)
    found = {}
    for la in adapted_layers(model):
        W, Q = truth.get_submodule(la.name).weight.detach(), la.base.unpacked_here()
        dW = la.delta.scaling * la.lora_B.weight.detach() @ la.lora_A.weight.detach()
        found[la.name] = torch.linalg.norm(W - Q - dW).item(), torch.linalg.norm(W - Q).item()
    return found


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loftq_leaves_less_error_than_quantising_alone(tmp_path, kind):
    once = errors(streamed("one", tmp_path, loftq_config(1, kind))[0])
    plain = errors(streamed("one", tmp_path)[0])
    for name, (left, quantised) in once.items():
        assert quantised == plain[name][1]  # one round quantises the weight itself
        assert left < 0.8 * quantised
        assert plain[name][0] == quantised
    often = errors(streamed("one", tmp_path, loftq_config(5, kind))[0])
    assert sum(e for e, _ in often.values()) < sum(e for e, _ in once.values())


def test_loftq_is_the_best_of_its_rank_whatever_the_scale(tmp_path):
    truth = build("nf4", quantise=False)
    for scaling in ({"alpha": 6}, {"alpha": 1}, {"alpha": 6, "scaling": "rslora"}):
        model, _ = streamed("one", tmp_path, loftq_config(**scaling))
        for la in adapted_layers(model):
            E = truth.get_submodule(la.name).weight.detach() - la.base.unpacked_here()
            best = torch.linalg.svdvals(E)[3:].square().sum().sqrt()
            assert abs(errors(model)[la.name][0] - best) < 1e-5


def test_a_large_error_is_nearly_the_best_of_its_rank():
    plain = nn.Linear(384, 320, bias=False)
    layer = NF4Linear.of(plain)
    from d9d_lora.init.loftq import factors_of_error

    B, A = factors_of_error(layer, plain.weight.detach(), 8, 2.0)
    E = plain.weight.detach() - layer.unpacked_here()
    best, found = torch.linalg.svdvals(E)[8:].square().sum().sqrt(), torch.linalg.norm(E - 2.0 * B @ A)
    assert best <= found < 1.002 * best


def law_of_loftq(rank, layout_name, directory, iterations, kind):
    model, _ = streamed(layout_name, directory, loftq_config(iterations, kind))
    reference, _ = streamed("one", directory, loftq_config(iterations, kind))
    found, expected = ({n: full_of(p.detach()) for n, p in m.named_parameters()} for m in (model, reference))
    floats = [n for n in expected if expected[n].is_floating_point()]
    close({n: found[n] for n in floats}, {n: expected[n] for n in floats}, 1e-3)  # fp32, and near triplets of a flat spectrum
    for la in adapted_layers(reference):
        (Ba, Aa), (Bb, Ab) = ([t[f"{la.name}.{n}.weight"] for n in ("lora_B", "lora_A")] for t in (found, expected))
        assert (Ba @ Aa - Bb @ Ab).abs().max() < 1e-5 * (Bb @ Ab).abs().max()
    assert all(torch.equal(found[n], expected[n]) for n in expected if n not in floats)
    assert abs(backward(model, LAYOUTS[layout_name]) - backward(reference, LAYOUTS["one"])) < 1e-4


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp2_tp2"])
@pytest.mark.parametrize("iterations,kind", [(1, "dora"), (3, "lora")])
def test_loftq_is_the_same_on_every_layout(pool, tmp_path, layout, iterations, kind):
    pool.run(LAYOUTS[layout].world, law_of_loftq, layout, tmp_path, iterations, kind)


def test_loftq_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="this layer is not quantised"):
        inject_peft_and_freeze(peft_method_from_config(loftq_config()), build("linear"))
    with pytest.raises(RuntimeError, match=r"LoftQ starts from the weight as it was before.*replace_lora_weights_loftq"):
        inject_peft_and_freeze(peft_method_from_config(loftq_config()), build("nf4"))
    with pytest.raises(ValueError, match="a quantised base has 4 bits here"):
        peft_method_from_config(loftq_config() | {"params": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}})
    with pytest.raises(ValueError, match="loftq_config goes with init_lora_weights: loftq"):
        peft_method_from_config(loftq_config() | {"params": {"loftq_config": {}}})
    with pytest.raises(ValueError, match="give this layer a lower rank"):
        inject_peft_and_freeze(peft_method_from_config(loftq_config(r=13)), build("nf4"))


def replaced(rank, layout_name, directory):
    model, _ = streamed(layout_name, directory, loftq_config() | {"params": {"r": 3, "alpha": 6}, "kind": "dora"})
    expected, _ = streamed("one", directory, loftq_config(kind="dora"))
    refused = "blocks.1.up"
    seen = []

    def callback(m, name):
        with torch.no_grad():
            m(batch(0)[0])
        seen.append(name)
        return name != refused or rank == 1

    names = replace_lora_weights_loftq(model, directory / "model.safetensors", callback)
    assert seen == [la.name for la in adapted_layers(expected)]
    assert names == [n for n in seen if n != refused or (rank == 1 and not dist.is_initialized())]
    for m in (model, expected):
        m(batch(0)[0])
    found, wanted = ({n: full_of(p.detach()) for n, p in m.named_parameters() if p.requires_grad} for m in (model, expected))
    assert found[f"{refused}.lora_B.weight"].abs().max() == 0
    close(*({n: t for n, t in ts.items() if refused not in n} for ts in (found, wanted)), 1e-3)


@pytest.mark.parametrize("layout", ["one", "fsdp2", "tp2", "fsdp2_tp2"])
def test_a_model_that_is_quantised_already_gets_loftq_from_its_checkpoint(pool, tmp_path, layout):
    pool.run(LAYOUTS[layout].world, replaced, layout, tmp_path)


def test_the_service_reads_nothing_of_another_model(tmp_path):
    model, _ = streamed("one", tmp_path)
    save_file({"blocks.0.up.weight": torch.zeros(24, 10)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks.0.up.weight has the shape \(24, 10\).*expected the original weight, \(24, 12\)"):
        replace_lora_weights_loftq(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no quantised layer"):
        replace_lora_weights_loftq(make("lora", "linear", LAYOUTS["one"])[0], tmp_path / "model.safetensors")


# -- the trainer ----------------------------------------------------------------------------------------------------------------------

QUANTISED = {"model__quantise": "nf4", "train__steps": 3}
RUNS = {
    "fsdp2": (2, {}),
    "tp2": (2, {"parallel__tp": 2}),
    "tp2_sp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "fsdp2_tp2": (4, {"parallel__tp": 2}),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"), hidden_size=128, intermediate_size=128)


def a_run(rank, assets, output, overrides):
    """`small_run.run`, and what this rank holds of the base."""
    from d9d_lora.train import trainer

    held = []

    class Weighed(trainer.Trainer):
        def _build(self):
            super()._build()
            held.append(bytes_held(self.model))

    import tests.small_run as small

    real, small.Trainer = small.Trainer, Weighed
    try:
        return {**run(rank, assets, output, overrides), "held": held[0]}
    finally:
        small.Trainer = real


@pytest.fixture(scope="module")
def one(pool, assets, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    return output, pool.run(1, a_run, assets, output, QUANTISED)[0]


@pytest.mark.parametrize("layout", RUNS)
def test_a_run_beside_a_quantised_base_is_that_of_one_process(pool, assets, one, tmp_path, layout):
    world, degrees = RUNS[layout]
    summaries = pool.run(world, a_run, assets, tmp_path, {**QUANTISED, **degrees})
    for a, b in zip(losses(summaries[0]), losses(one[1])):
        assert abs(a - b) < 1e-9 * abs(b)
    assert summaries[0]["after"]["loss"] == pytest.approx(one[1]["after"]["loss"], rel=1e-9)


def test_what_a_rank_holds(pool, assets, one, tmp_path):
    """Linear layers take 4.6 bits a weight at 128 columns, in place of 64; embeddings and norms are as they were."""
    plain = pool.run(1, a_run, assets, tmp_path / "plain", {"train__steps": 1})[0]["held"]
    linear = 2 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 128)
    assert plain - one[1]["held"] == linear * 8 - linear * (4 + 8 / 64 + 64 / 128) / 8
    sharded = {**QUANTISED, "train__steps": 1, "parallel__adapters": "shard"}
    halves = [s["held"] for s in pool.run(2, a_run, assets, tmp_path / "fsdp2", sharded)]
    assert sum(halves) == one[1]["held"]


def test_recomputation_changes_no_loss(pool, assets, one, tmp_path):
    options = {**QUANTISED, "train__activation_checkpointing": True}
    for a, b in zip(losses(pool.run(2, run, assets, tmp_path, options)[0]), losses(one[1])):
        assert abs(a - b) < 1e-9 * abs(b)


def test_dora_and_loftq_train_on_shards(pool, assets, tmp_path):
    params = {"r": 4, "alpha": 8, "use_dora": True, "init_lora_weights": "loftq"}
    options = {**QUANTISED, "peft__params": params, "train__steps": 2}
    expected = losses(pool.run(1, run, assets, tmp_path / "one", options)[0])
    found = losses(pool.run(4, run, assets, tmp_path / "four", {**options, "parallel__tp": 2})[0])
    assert found == pytest.approx(expected, rel=1e-4)  # the starts are sums in fp32


def test_layers_that_share_a_packed_weight(pool, assets, tmp_path):
    """`layer_replication`: one packed weight, filled once; LoftQ starts the adapters of all its copies."""
    params = {"r": 4, "alpha": 8, "init_lora_weights": "loftq"}
    options = {**QUANTISED, "peft__params": params, "peft__layer_replication": [[0, 2], [1, 2]], "train__steps": 2}
    expected = losses(pool.run(1, run, assets, tmp_path / "one", options)[0])
    assert losses(pool.run(2, run, assets, tmp_path / "two", options)[0]) == pytest.approx(expected, rel=1e-4)


def test_the_table_counts_weights_and_not_bytes(pool, assets, one):
    census = json.loads((one[0] / "census.json").read_text(encoding="utf-8"))
    assert {row["weight"] for row in census["rows"]} == {"128 x 128 nf4", "64 x 128 nf4"}
    model = make_llama(assets)
    assert census["total"] - census["trained"] == sum(p.numel() for p in model.parameters())


def make_llama(assets):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets / "model")


def test_a_run_is_resumed_beside_the_same_base_only(pool, assets, tmp_path):
    pool.run(1, run, assets, tmp_path, {**QUANTISED, "train__steps": 1})
    with pytest.raises(AssertionError, match=r"quantise: the checkpoint has \['nf4', 'all-linear'\], this run None"):
        pool.run(1, run, assets, tmp_path, {"train__steps": 2, "checkpoint__resume": "must"})


def test_the_adapter_is_an_ordinary_one(one):
    config = json.loads((one[0] / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"


def test_layers_without_quantising_are_refused(assets, tmp_path):
    with pytest.raises(ValueError, match=r"quantise_modules goes with model\.quantise"):
        config_of(assets, tmp_path, model__quantise_modules=["q_proj"])
