"""Several adapters on one model: each as if it were alone, on every layout; and mutations that must break that."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

from d9d_lora import (
    active_adapters,
    adapter_rows,
    adapter_status,
    add_adapter,
    add_weighted_adapter,
    delete_adapter,
    disable_adapters,
    inject_peft_and_freeze,
    merge_adapters,
    merge_peft,
    only_adapter,
    peft_method_from_config,
    set_adapter,
    unmerge_adapters,
)
from d9d_lora.combine import keep_at_random
from d9d_lora.layers import among
from d9d_lora.named.hosts import hosts
from d9d_lora.placement import fill_, full_of, local_of
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.styles import for_conv1d, parallelize_adapted
from d9d_lora.sums import ReplicatedSum
from d9d_lora.walk import adapted_layers, adapter_tensors
from tests.catalogue import LAYERS, LAYOUTS, METHODS, batch, build, dp_rank, mesh_of, peft_config, plan_of, shard_data_parallel
from tests.test_laws import backward, close, grads_of, trained

FIRST = {"kind": "lora", "target_modules": ["up", "embed"], "params": {"r": 3, "alpha": 6}}
SECOND = {"kind": "lora", "target_modules": ["up", "down", "embed"], "params": {"r": 2, "alpha": 3, "scaling": "rslora"}}
MOVED = {"kind": "lora", "target_modules": ["up", "down"], "params": {"r": 2, "alpha": 4, "init_lora_weights": "pissa"}}
GAIN = {"kind": "dora", "target_modules": ["up", "down"], "params": {"r": 2, "alpha": 4}}
ROWS = ["default", "b", "__base__", "b", "b", "default", "__base__", "default"]
SOME = ["tp2", "tp2_sp", "fsdp2", "fsdp2_tp2"]
IDS = batch(0)[0]


def named(layout_name="one", second=SECOND, first=FIRST, order="plan_first", layer="linear_bias"):
    """A model with the adapters "default" and "b" on a layout, the factors stirred; `second` None: without "b"; both: bare."""
    layout, model = LAYOUTS[layout_name], build(layer)
    mesh, plan = mesh_of(layout) if layout.world > 1 else None, plan_of(model, layout.sequence)
    if layout.tp > 1 and order == "plan_first":
        parallelize_module(model, mesh["tp"], {k: for_conv1d(s, model.get_submodule(k)) for k, s in plan.items()})
    methods = {name: peft_method_from_config(c) for name, c in (("default", first), ("b", second)) if c is not None}
    if first is not None:
        inject_peft_and_freeze(methods["default"], model)
    if second is not None:
        add_adapter(model, "b", methods["b"], train=True)
    if layout.tp > 1 and order == "inject_first":
        parallelize_adapted(model, mesh["tp"], plan)
    if not methods or "norm" in str(trained(model)):
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and "norm" not in name and bool(methods))  # SequenceParallel thaws norms
    if mesh is not None:
        shard_data_parallel(model, mesh, layout)
    for method in methods.values():
        method.initialise(model)
    for name in methods:
        stir(model, name)
    return model.train(False)


def stir(model, name):
    """Moves every factor of an adapter from its start, the same on every layout."""
    with torch.no_grad():
        for _, host in hosts(model):
            if name in host.adapters_by_name():
                for factor, p in host.adapters_by_name()[name].factors().items():
                    noise = torch.empty_like(p)
                    fill_(noise, lambda w, g: w.normal_(0, 0.2, generator=g), seed=5, name=f"{host.name}.{name}.{factor}")
                    p.add_(noise)


def outputs(model, layout_name="one"):
    with torch.no_grad():
        return model(rows_of(IDS, layout_name))


def rows_of(t, layout_name):
    """This rank's rows of the batch."""
    layout = LAYOUTS[layout_name]
    size = len(t) // layout.dp
    return t[dp_rank(layout) * size : (dp_rank(layout) + 1) * size]


def expected(second=SECOND, first=FIRST):
    """name -> what one process says with this adapter alone on the model."""
    alone = {"__base__": build("linear_bias"), "default": named(second=None, first=first)}
    only = named(first=None, second=second)
    set_adapter(only, "b")
    return {name: outputs(model) for name, model in {**alone, "b": only}.items()}


def apart(a, b):
    return float((a - b).abs().max())


# -- one process: every layer kind, every method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [name for name, row in LAYERS.items() if row.field == "target_modules"])
def test_every_layer_kind_takes_several(layer):
    targets = LAYERS[layer].targets
    model, bare = build(layer).eval(), build(layer)(IDS).detach()
    inject_peft_and_freeze(peft_method_from_config({**FIRST, "target_modules": targets}), model)
    keys = list(model.state_dict())
    assert torch.equal(outputs(model), bare)
    stir(model, "default")
    default = outputs(model)
    add_adapter(model, "b", {**SECOND, "target_modules": targets[-1:]})
    assert torch.equal(outputs(model), default)
    assert adapter_tensors(model) == set(model.state_dict()) - {k for k in model.state_dict() if ".base." in k} - set(bare_keys(layer))
    stir(model, "b")
    set_adapter(model, "b")
    b = outputs(model)
    assert apart(b, bare) > 0.01
    assert not torch.equal(b, default)
    with adapter_rows(model, ROWS):
        if layer == "grouped":
            with pytest.raises(ValueError, match="experts get rows in another order"):
                outputs(model)
        else:
            y = outputs(model)
            alone = {"default": default, "b": b, "__base__": bare}
            assert max(apart(y[i], alone[name][i]) for i, name in enumerate(ROWS)) < 1e-12
    with disable_adapters(model):
        assert torch.equal(outputs(model), bare)
    set_adapter(model, ["b", "default"])
    both, held = outputs(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(outputs(copy.deepcopy(model)), both)
    merge_adapters(model)
    assert sorted(model.state_dict()) == sorted(build(layer, quantise=False).state_dict())
    assert apart(outputs(model), both) < 1e-11
    unmerge_adapters(model)
    assert torch.equal(outputs(model), both)
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
    delete_adapter(model, "b")
    assert list(model.state_dict()) == keys
    assert torch.equal(outputs(model), default)
    delete_adapter(model, "default")
    assert list(model.state_dict()) == bare_keys(layer)
    assert torch.equal(outputs(model), bare)
    assert not list(adapted_layers(model))


def bare_keys(layer):
    return list(build(layer).state_dict())


@pytest.mark.parametrize("method", [m for m in METHODS if "linear_bias" not in METHODS[m].refuses])
def test_every_method_is_as_if_alone(method):
    """Beside a plain LoRA, each method of the catalogue starts, computes and learns as it does alone, dropout included."""
    config = {k: v for k, v in peft_config(method, "linear_bias").items() if k != "bias"}
    grads = []
    for first in (None, FIRST):
        model = named(first=first, second=config)
        set_adapter(model, "b")
        model.train()
        backward(model, LAYOUTS["one"])
        grads.append(grads_of(model))
    close(grads[1], grads[0], 1e-9)
    set_adapter(model.eval(), "default")
    y, alone = outputs(model), outputs(named(second=None))
    assert apart(y, alone) < 1e-10 if any(la.delta.moves_base for la in adapted_layers(model)) else torch.equal(y, alone)


def test_two_of_a_kind_with_shared_factors():
    vera = {"kind": "vera", "target_modules": ["up", "down"], "params": {"r": 5}}
    model = named(first=vera, second={**vera, "params": {"r": 3}, "seed": 1})
    alone = named(first=None, second={**vera, "params": {"r": 3}, "seed": 1})
    set_adapter(model, "b"), set_adapter(alone, "b")
    assert torch.equal(outputs(model), outputs(alone))
    delete_adapter(alone, "b")
    assert dict(alone.named_modules()).keys() == dict(build("linear_bias").named_modules()).keys()


def test_an_adapter_learns_as_alone_under_dropout():
    second = {**SECOND, "params": {"r": 2, "alpha": 3, "dropout": 0.4}}
    grads = []
    for first in (None, FIRST):
        model = named(first=first, second=second).train()
        set_adapter(model, "b")
        backward(model, LAYOUTS["one"])
        grads.append(grads_of(model))
    close(*grads)


def test_what_is_trained_follows_what_is_active():
    model = named()
    add_adapter(model, "frozen", SECOND)
    assert all("adapters" not in n for n in trained(model))
    set_adapter(model, ["b", "frozen"])
    assert all(".adapters.b." in n for n in trained(model))
    assert len(trained(model)) == 10
    set_adapter(model, ["default", "b"])
    status = adapter_status(model)
    assert {n: (s.active, s.trained) for n, s in status.items()} == {
        "default": (True, True),
        "b": (True, True),
        "frozen": (False, False),
    }
    assert active_adapters(model) == ["default", "b"]
    assert status["b"].layers == ("embed", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
    assert status["default"].parameters == sum(p.numel() for n, p in model.named_parameters() if "lora" in n and "adapters" not in n)


def test_a_model_built_on_meta_has_the_same_starts():
    with torch.device("meta"):
        late = build_empty()
    now, methods = build("linear_bias"), {}
    for model in (late, now):
        methods[model] = [peft_method_from_config(c) for c in (FIRST, SECOND)]
        inject_peft_and_freeze(methods[model][0], model)
        add_adapter(model, "b", methods[model][1])
    late.to_empty(device="cpu")
    for method in methods[late]:
        method.initialise(late)
    for name, p in late.named_parameters():
        if "lora" in name:
            assert torch.equal(p, now.get_parameter(name).to(p.dtype)), name


def build_empty():
    from tests.catalogue import Toy

    return Toy(LAYERS["linear_bias"].linear).to(torch.float64)


def saved(rank, layout_name, path):
    """Writes each adapter of a model on a layout."""
    model = named(layout_name)
    for name in ("default", "b"):
        with only_adapter(model, name):
            save_adapter(model, f"{path}/{name}")
    return list(model.state_dict())


def test_each_adapter_is_saved_and_loaded_by_itself(pool, tmp_path):
    model = named()
    with pytest.raises(ValueError, match="a directory holds one"):
        save_adapter(model, tmp_path / "all")
    assert pool.run(2, saved, "tp2", str(tmp_path))[0] == list(model.state_dict())
    for name, alone in expected().items():
        if name == "__base__":
            continue
        target = build("linear_bias").eval()
        inject_peft_and_freeze(method_of(tmp_path / name), target)
        load_adapter_weights(target, tmp_path / name)
        assert apart(outputs(target), alone) < 1e-5  # a directory holds fp32
        with torch.no_grad():
            for p in adapter_of(model, name):
                p.zero_()
        with only_adapter(model, name):
            load_adapter_weights(model, tmp_path / name)
        set_adapter(model, name)
        assert apart(outputs(model), alone) < 1e-5


def adapter_of(model, name):
    return [p for _, host in hosts(model) if (la := host.adapters_by_name().get(name)) for p in la.factors().values()]


def test_several_compile_to_one_graph():
    model = named()
    set_adapter(model, ["default", "b"])
    y = outputs(model)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(outputs(model), y)


# -- layouts ------------------------------------------------------------------------------------------------------------------------


def law_of_training(rank, layout_name, active, order, mutation):
    """Two steps of the active adapters equal one process; the others have no gradient and keep every bit."""
    layout = LAYOUTS[layout_name]
    model, reference = named(layout_name, order=order), named()
    models = ((model, layout), (reference, LAYOUTS["one"]))
    for m, _ in models:
        set_adapter(m, active)
    sleeping = [n for n in ("default", "b") if n not in active]
    if mutation:
        for _, host in hosts(model):
            for p in host.adapters_by_name().get("default", host).factors().values():
                p.requires_grad_(True)
            host.active = ("default", "b")
    still = {n: local_of(p.detach()).clone() for n, p in model.named_parameters() if name_of(n) in [*sleeping, "__base__"]}
    bucket = ReplicatedSum(adapted_layers(model))
    optimisers = [torch.optim.AdamW(trained(m).values(), lr=0.01) for m, _ in models]
    for step in range(2):
        losses = [backward(m, where, step) for m, where in models]
        bucket.reduce()
        for n, p in model.named_parameters():
            assert name_of(n) not in [*sleeping, "__base__"] or p.grad is None, f"{n} is not active, and has a gradient"
        assert abs(losses[0] - losses[1]) < 1e-9 * abs(losses[1]), losses
        close(grads_of(model), grads_of(reference))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    close({n: full_of(p.detach()) for n, p in trained(model).items()}, {n: p.detach() for n, p in trained(reference).items()}, 1e-7)
    assert all(torch.equal(local_of(model.get_parameter(n).detach()), was) for n, was in still.items())


def name_of(parameter):
    """The adapter that a parameter belongs to."""
    if "lora" not in parameter:
        return "__base__"
    return parameter.partition(".adapters.")[2].partition(".")[0] or "default"


@pytest.mark.parametrize("layout", SOME)
@pytest.mark.parametrize("active", [["b"], ["default", "b"]])
def test_training_equals_one_process(pool, layout, active):
    pool.run(LAYOUTS[layout].world, law_of_training, layout, active, "plan_first", None)


@pytest.mark.parametrize("layout", ["tp2", "fsdp2_tp2"])
def test_training_with_the_plan_after_the_adapters(pool, layout):
    pool.run(LAYOUTS[layout].world, law_of_training, layout, ["b"], "inject_first", None)


def test_mutation_a_sleeping_adapter_works(pool):
    with pytest.raises(AssertionError, match="is not active, and has a gradient"):
        pool.run(2, law_of_training, "tp2", ["b"], "plan_first", "awake")


def law_of_forwards(rank, layout_name, second, mutation):
    """Rows, the bare base, and merging, against one process with each adapter alone."""
    alone = {name: rows_of(y, layout_name) for name, y in expected(second).items()}
    model, bare = named(layout_name, second), named(layout_name, None, None)
    with disable_adapters(model):
        y = outputs(model, layout_name)
        assert apart(y, alone["__base__"]) < 1e-10 if second == MOVED else torch.equal(y, outputs(bare, layout_name))
    names = rows_of(ROWS, layout_name)
    if mutation == "a row later":
        real, among.Rows.of = among.Rows.of, lambda self, chosen, x: (real(self, chosen, x) + 1) % len(self.names)
    try:
        with adapter_rows(model, names):
            y = outputs(model, layout_name)
    finally:
        if mutation == "a row later":
            among.Rows.of = real
    for i, name in enumerate(names):
        assert apart(y[i], alone[name][i]) < 1e-10, f"row {i} is not that of {name}"
    before = {n: local_of(p.detach()).clone() for n, p in model.named_parameters()}
    for active in (["default"], ["b"], ["default", "b"]):
        set_adapter(model, active)
        y = outputs(model, layout_name)
        if len(active) == 1:
            assert apart(y, alone[active[0]]) < 1e-10
        merge_adapters(model)
        assert not list(adapted_layers(model))
        assert apart(outputs(model, layout_name), y) < 1e-9
        unmerge_adapters(model)
        assert torch.equal(outputs(model, layout_name), y)
        assert all(torch.equal(local_of(p.detach()), before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("second", [SECOND, MOVED], ids=["lora", "pissa"])
@pytest.mark.parametrize("layout", ["tp2", "fsdp2", "fsdp2_tp2"])
def test_rows_bare_base_and_merging(pool, layout, second):
    pool.run(LAYOUTS[layout].world, law_of_forwards, layout, second, None)


def test_mutation_a_row_later(pool):
    with pytest.raises(AssertionError, match="is not that of"):
        pool.run(2, law_of_forwards, "fsdp2", SECOND, "a row later")


def combine_on(rank, layout_name, kind, options):
    """Combined on a layout: the factors of one process."""
    found = []
    for where in ("one", layout_name):
        model = named(where)
        add_weighted_adapter(model, ["default", "b"], [0.7, -0.4], "mix", kind, **options)
        mixes = {host.name: host.adapters_by_name()["mix"] for _, host in hosts(model)}
        found.append({n: la.delta.dense(la.delta.part(la.whole_factors(), slice(None), slice(None))) for n, la in mixes.items()})
    close(found[1], found[0], 1e-8)


@pytest.mark.parametrize("kind,options", [("cat", {}), ("svd", {"svd_rank": 2}), ("dare_ties_svd", {"density": 0.5, "seed": 4})])
def test_combinations_do_not_depend_on_the_layout(pool, kind, options):
    pool.run(2, combine_on, "tp2", kind, options)


# -- moved bases, gains ---------------------------------------------------------------------------------------------------------


def test_each_adapter_meets_the_base_it_was_made_for():
    model, alone = named(second=MOVED), expected(MOVED)
    for name in ("default", "b"):
        set_adapter(model, name)
        assert apart(outputs(model), alone[name]) < 1e-10
    delete_adapter(model, "default")
    with disable_adapters(model):
        assert apart(outputs(model), alone["__base__"]) < 1e-10
    delete_adapter(model, "b")
    assert apart(outputs(model), alone["__base__"]) < 1e-10


def test_a_gain_works_alone():
    model, alone = named(second=GAIN), expected(GAIN)
    for name in ("default", "b"):
        set_adapter(model, name)
        assert apart(outputs(model), alone[name]) < 1e-12
    y = outputs(model)
    merge_adapters(model)
    assert apart(outputs(model), y) < 1e-10


# -- what is kept at random; what is refused --------------------------------------------------------------------------------------


def test_what_is_kept_at_random():
    kept = keep_at_random(torch.zeros(200, 300), 0.3, 5)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(kept.mean() - 0.3) < 0.01
    assert torch.equal(kept, keep_at_random(torch.zeros(200, 300), 0.3, 5))
    assert not torch.equal(kept, keep_at_random(torch.zeros(200, 300), 0.3, 6))


def mix(*args, **options):
    return lambda m: add_weighted_adapter(m, *args, **options)


REFUSALS = {
    "a name that is taken": (lambda m: add_adapter(m, "b", SECOND), "has an adapter 'b' already"),
    "a name with a dot": (lambda m: add_adapter(m, "c.d", SECOND), "cannot name an adapter"),
    "the default's name": (lambda m: add_adapter(m, "default", SECOND), "cannot name an adapter"),
    "biases": (lambda m: add_adapter(m, "c", {**SECOND, "bias": "all"}), "share one copy"),
    "whole modules": (lambda m: add_adapter(m, "c", {**SECOND, "modules_to_save": ["norm"]}), "share one copy"),
    "parameters": (lambda m: add_adapter(m, "c", {**SECOND, "target_parameters": ["w"]}), "only one of its model"),
    "replication": (lambda m: add_adapter(m, "c", {**SECOND, "layer_replication": [[0, 2]]}), "would build another model"),
    "full tuning": (lambda m: add_adapter(m, "c", {"kind": "full_tune", "module_name_pattern": ".*"}), "FullTune is none"),
    "an unknown target": (lambda m: add_adapter(m, "c", {**SECOND, "target_modules": ["uq"]}), "match"),
    "an unknown name": (lambda m: set_adapter(m, "c"), r"no adapter \['c'\]; it has \['default', 'b'\]"),
    "no name": (lambda m: set_adapter(m, []), "at least one adapter"),
    "a name twice": (lambda m: set_adapter(m, ["b", "b"]), "names an adapter twice"),
    "the only active one": (lambda m: delete_adapter(m, "default"), "only active adapter; set another one of"),
    "a merge by the method": (lambda m: merge_peft(peft_method_from_config(FIRST), m), "has several adapters"),
    "one weight": (mix(["b", "default"], [1.0], "c"), "one finite weight for each"),
    "an ignored density": (mix(["b"], [1.0], "c", "svd", density=0.5), "density=0.5 would be ignored"),
    "an ignored rank": (mix(["b"], [1.0], "c", "cat", svd_rank=2), "svd_rank=2 would be ignored"),
    "an ignored sign": (mix(["b"], [1.0], "c", "dare_linear", density=0.5, majority_sign_method="total"), "would be ignored"),
    "no density": (mix(["b"], [1.0], "c", "ties"), "needs a density"),
    "a density of none": (mix(["b"], [1.0], "c", "ties", density=1e-3), "keeps none of"),
    "ranks that differ": (mix(["b", "default"], [1.0, 1.0], "c", "linear"), "need one rank; got b: 2, default: 3"),
    "an unknown type": (mix(["b"], [1.0], "c", "sum"), "unknown combination_type 'sum'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_leaves_the_model_as_it_was(case):
    model = named()
    keys, flags, modules = list(model.state_dict()), sorted(trained(model)), list(dict(model.named_modules()))
    act, words = REFUSALS[case]
    with pytest.raises(ValueError, match=words):
        act(model)
    assert (list(model.state_dict()), sorted(trained(model)), list(dict(model.named_modules()))) == (keys, flags, modules)
    assert torch.equal(outputs(model), outputs(named()))


def test_rows_are_refused_where_they_mean_nothing():
    model = named()
    with adapter_rows(model, ["b"] * 3), pytest.raises(ValueError, match="names 3 rows, but a layer got an input of shape"):
        model(IDS)
    with pytest.raises(ValueError, match="for inference"), adapter_rows(model.train(), ROWS):
        pass
    with pytest.raises(ValueError, match="Make it the only active adapter"), adapter_rows(named(second=GAIN), ROWS):
        pass


@pytest.mark.parametrize(
    "first,second,words",
    [(MOVED, MOVED, "both start from the base weight"), (GAIN, MOVED, "both start"), (MOVED, GAIN, "both start")],
)
def test_two_that_start_from_the_weight_are_refused_if_one_moves_it(first, second, words):
    with pytest.raises(ValueError, match=words):
        named(first=first, second=second)


@pytest.mark.parametrize("second,words", [(GAIN, "scales the rows"), (MOVED, "took its start off")])
def test_no_sum_is_made_of_what_is_no_plain_product(second, words):
    model = named(second=second)
    with pytest.raises(ValueError, match=words):
        add_weighted_adapter(model, ["default", "b"], [1.0, 1.0], "mix", "cat")
    if second == GAIN:
        with pytest.raises(ValueError, match="Make it the only active adapter"):
            set_adapter(model, ["default", "b"])


def test_a_dense_update_is_no_product_of_low_rank():
    model = named(second={"kind": "loha", "target_modules": ["up"], "params": {"r": 4, "alpha": 4}})
    with pytest.raises(ValueError, match="no product B A"):
        add_weighted_adapter(model, ["default", "b"], [1.0, 1.0], "mix", "cat")


def test_a_base_that_is_trained_itself_is_no_base_to_share():
    model = build("linear_bias")
    inject_peft_and_freeze(peft_method_from_config({**FIRST, "bias": "lora_only"}), model)
    with pytest.raises(ValueError, match="trained itself, beside the adapters"):
        add_adapter(model, "b", SECOND)
    with pytest.raises(ValueError, match="trained itself, beside the adapters"), disable_adapters(model):
        pass


def after_sharding(rank):
    model = named("fsdp2")
    for act in (lambda: add_adapter(model, "c", SECOND), lambda: add_weighted_adapter(model, ["b"], [1.0], "c")):
        with pytest.raises(ValueError, match="call fully_shard"):
            act()
    with pytest.raises(ValueError, match="delete it before"):
        delete_adapter(model, "b")


def test_nothing_is_added_after_fully_shard(pool):
    pool.run(2, after_sharding)


def test_a_layer_outside_a_model_is_as_ever():
    from d9d_lora import LoRALinear, LoRAParameters

    layer = LoRALinear(nn.Linear(4, 4), LoRAParameters(r=2), seed=0)
    assert layer.others() == {}
    assert layer.stand_in() is None
