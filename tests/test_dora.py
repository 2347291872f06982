"""DoRA: the formula and its gradient, a start that follows the loaded weight, one sum a row-parallel layer, no dense update."""

import copy

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import embedding, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.pytorch_utils import Conv1D

from d9d_lora import LoRALinear, LoRAParameters, inject_peft_and_freeze, merge_peft, peft_method_from_config, unmerge_peft
from d9d_lora.methods import dora
from d9d_lora.methods.dora import MAGNITUDE, DoRADelta
from d9d_lora.methods.lora import LoRADelta
from d9d_lora.placement import Placing
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.walk import adapted_layers
from tests.catalogue import HIDDEN, LAYERS, LAYOUTS, WIDTH, batch, build, mesh_of, plan_of
from tests.small_run import losses, make_assets, run
from tests.test_laws import Elements, law_of_gradients, make, wake

DORA = {"kind": "dora", "params": {"r": 3, "alpha": 6}}


def adapt(model, **config):
    method = peft_method_from_config({**DORA, **config})
    inject_peft_and_freeze(method, model)
    return method


# -- the formula --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_the_formula_and_a_norm_without_gradient(kind):
    torch.manual_seed(0)
    base = {"linear": nn.Linear(7, 5), "conv1d": Conv1D(5, 7), "embedding": nn.Embedding(7, 5)}[kind].double()
    model = nn.ModuleDict({"a": base})
    adapt(model, target_modules=["a"])
    wake(model)
    layer = model["a"]
    A, B, m = (layer.factor(n).detach().clone().requires_grad_() for n in ("lora_A", "lora_B", MAGNITUDE))
    W = layer.base.weight.detach() if kind == "linear" else layer.base.weight.detach().T
    whole = W + 2 * B @ A
    whole = whole * (m / whole.detach().norm(dim=1))[:, None]
    x = torch.randint(0, 7, (4, 3)) if kind == "embedding" else torch.randn(4, 7, dtype=torch.float64)
    expected = embedding(x, whole.T) if kind == "embedding" else linear(x, whole, layer.base.bias)
    found = layer(x)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(found, expected)
    for name, wanted in (("lora_A", A), ("lora_B", B), (MAGNITUDE, m)):
        assert torch.allclose(layer.factor(name).grad, wanted.grad), name


def test_half_precision_is_unchanged_at_the_start_and_follows_a_small_step_of_the_magnitude(monkeypatch):
    torch.manual_seed(0)
    base = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    layer = LoRALinear(base, LoRAParameters(r=4, alpha=8, use_dora=True))

    def faults():
        return int((layer(x) != base(x)).sum())

    assert layer.lora_magnitude_vector.weight.dtype == torch.float32
    assert faults() == 0
    layer.lora_magnitude_vector.weight.data *= 1.003  # half precision takes this for one
    assert faults() > 0
    layer.lora_magnitude_vector.weight.data /= 1.003
    gain_of = dora.gain_of
    monkeypatch.setattr(dora, "gain_of", lambda magnitude, norms: gain_of(magnitude.bfloat16().float(), norms))  # the mutation
    assert faults() > 0


class Sizes(TorchDispatchMode):
    """The shapes of everything that is computed, views aside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.shapes |= {tuple(t.shape) for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)}
        return result


def test_the_update_is_never_built():
    layer = LoRALinear(nn.Linear(30, 40), LoRAParameters(r=2, alpha=4, use_dora=True))
    for parameter in layer.base.parameters():
        parameter.requires_grad_(False)
    with Sizes() as sizes:
        layer(torch.randn(5, 30)).sum().backward()
    assert (40, 2) in sizes.shapes  # W A^T: the walk saw the norm
    assert not sizes.shapes & {(40, 30), (30, 40)}


def test_a_row_of_zeros_stays_zero_and_learns():
    base = nn.Linear(6, 4)
    with torch.no_grad():
        base.weight[2] = 0
    layer = LoRALinear(base, LoRAParameters(r=2, alpha=4, use_dora=True))
    x = torch.randn(3, 6)
    assert torch.allclose(layer(x), base(x))
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.factors().values())
    assert layer.lora_B.weight.grad[2].abs().max() > 0
    merged = layer.merge_with_base_()
    assert torch.equal(merged.weight[2], torch.zeros(6))


def test_scaled_rows_of_an_embedding():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    torch.manual_seed(0)
    model = nn.ModuleDict({"e": Scaled(9, 4)})
    ids = torch.arange(9)
    before = model["e"](ids)
    method = adapt(model, target_modules=["e"])
    assert torch.allclose(model["e"](ids), before)
    wake(model)
    adapted = model["e"](ids)
    merge_peft(method, model)
    assert torch.allclose(model["e"](ids), adapted, atol=1e-6)


def test_a_start_that_moves_the_base():
    """W is now W - s B A, so that the magnitude is the norm of the weight as it was."""
    model = build("linear_bias")
    ids, _ = batch(0)
    before = model(ids)
    norms = model.blocks[0].up.weight.norm(dim=1)
    method = adapt(model, target_modules=["up", "down"], params={"r": 3, "alpha": 6, "init_lora_weights": "pissa"})
    with pytest.raises(RuntimeError, match="has not been started"):
        model(ids)
    method.initialise(model)
    assert torch.allclose(model.blocks[0].up.lora_magnitude_vector.weight, norms)
    assert torch.allclose(model(ids), before)
    wake(model)
    adapted = model(ids)
    merge_peft(method, model)
    assert torch.allclose(model(ids), adapted)
    unmerge_peft(method, model)
    assert torch.equal(model(ids), adapted)


def test_it_compiles_to_one_graph():
    model = build("linear_bias", torch.float32)
    adapt(model, target_modules=["up", "down"])
    wake(model)
    ids, _ = batch(0)
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(ids), model(ids))


# -- the config ---------------------------------------------------------------------------------------------------------------------


def test_kind_dora_is_lora_with_use_dora():
    targets = {"target_modules": ["up"]}
    one, two = (
        peft_method_from_config({**targets, **c})
        for c in (DORA, {"kind": "lora", "params": {**DORA["params"], "use_dora": True}})
    )
    assert one.delta_for("up") == two.delta_for("up") == DoRADelta(LoRADelta(3, 6))
    again = peft_method_from_config(one.config.model_dump())
    assert again.config == one.config
    with pytest.raises(ValidationError, match="give kind: lora"):
        peft_method_from_config({**targets, "kind": "dora", "params": {"use_dora": False}})
    with pytest.raises(ValidationError, match="the magnitude would scale the bias"):
        peft_method_from_config({**targets, "kind": "dora", "params": {"lora_bias": True}})


# -- the start ----------------------------------------------------------------------------------------------------------------------


def loaded_on_meta(path=None):
    """A model built and injected on meta, then given its weights; the factors are rubbish."""
    source = build("linear_bias")
    with torch.device("meta"):
        model = copy.deepcopy(source).to("meta")
    method = adapt(model, target_modules=["up", "down"]) if path is None else method_of(path)
    if path is not None:
        inject_peft_and_freeze(method, model)
    model.to_empty(device="cpu")
    for layer in adapted_layers(model):
        for p in layer.factors().values():
            nn.init.constant_(p, 7)
    weights = {n.replace(".weight", ".base.weight").replace(".bias", ".base.bias") if "up" in n or "down" in n else n: t
               for n, t in source.state_dict().items()}  # fmt: skip
    model.load_state_dict(weights, strict=False)
    return source, model, method


def test_a_meta_build_refuses_until_it_is_started():
    source, model, method = loaded_on_meta()
    ids, _ = batch(0)
    with pytest.raises(RuntimeError, match=r"has not been started.*initialise"):
        model(ids)
    method.initialise(model)
    assert torch.allclose(model(ids), source(ids))
    for layer in adapted_layers(model):
        nn.init.ones_(layer.lora_magnitude_vector.weight)  # the mutation
    assert not torch.allclose(model(ids), source(ids))


def test_an_adapter_that_was_loaded_is_started(tmp_path):
    trained, _ = make("dora", "linear_bias", LAYOUTS["one"])
    wake(trained)
    save_adapter(trained, tmp_path / "a")
    _, model, _ = loaded_on_meta(tmp_path / "a")
    load_adapter_weights(model, tmp_path / "a")
    ids, _ = batch(0)
    assert torch.equal(model(ids), trained(ids))


def test_weights_that_come_after_the_injection_are_followed_by_initialise():
    model, source = build("linear"), build("linear")
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(2)
    method = adapt(model, target_modules=["up"])
    state = model.state_dict()
    for name, t in source.state_dict().items():
        state[name if name in state else name.replace("up.", "up.base.")].copy_(t)
    method.initialise(model)
    ids, _ = batch(0)
    assert torch.allclose(model(ids), source(ids))


# -- layouts ------------------------------------------------------------------------------------------------------------------------


def law_with_a_local_norm(rank, layer, layout):
    Placing.total, total = (lambda self, t: t), Placing.total
    try:
        law_of_gradients(rank, "dora", layer, layout, "plan_first", False, {}, None)
    finally:
        Placing.total = total


@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_mutation_the_norm_of_the_local_columns(pool, layer):
    with pytest.raises(AssertionError, match=r"is off by|AssertionError"):
        pool.run(2, law_with_a_local_norm, layer, "tp2")


def moved(rank, dora):
    """(collectives, their elements) of a microbatch on tp2."""
    model = build("linear_bias")
    mesh = mesh_of(LAYOUTS["tp2"])["tp"]
    parallelize_module(model, mesh, plan_of(model, False))
    for p in model.parameters():
        p.requires_grad_(False)
    if dora:
        adapt(model, target_modules=LAYERS["linear_bias"].targets)
        for layer in adapted_layers(model):
            layer.sums_own_parts = False
    x = model.embed(batch(0)[0]).detach().requires_grad_()
    with Elements() as elements:
        y = x
        for block in model.blocks:
            y = block(y)
        y.square().sum().backward()
    return elements.moved


def test_one_sum_of_out_numbers_for_each_row_parallel_layer(pool):
    base, ours = (pool.run(2, moved, dora)[0] for dora in (False, True))
    extra = {name: n - base.get(name, 0) for name, n in ours.items() if n != base.get(name, 0)}
    assert extra == {"allreduce_": 2 * WIDTH}, (base, ours)
    assert WIDTH != HIDDEN  # `down` gives WIDTH, and `up` needs no sum


# -- saving -------------------------------------------------------------------------------------------------------------------------


def test_a_magnitude_on_some_layers_only_has_no_peft_directory(tmp_path):
    model = build("linear")
    methods = [{**DORA, "target_modules": ["up"]}, {**DORA, "kind": "lora", "target_modules": ["down"]}]
    inject_peft_and_freeze(peft_method_from_config({"kind": "stack", "methods": methods}), model)
    with pytest.raises(AdapterError, match=r"down has none.*one `use_dora`"):
        save_adapter(model, tmp_path / "a")


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


PEFT = {"kind": "dora", "target_modules": "all-linear", "params": {"r": 4, "alpha": 8, "dropout": 0.1}}


def test_the_trainer_trains_it_alike_and_saves_it_for_peft(pool, assets, tmp_path):
    options = {"peft": PEFT, "train__steps": 3}
    one = pool.run(1, run, assets, tmp_path / "one", options)[0]
    two = pool.run(2, run, assets, tmp_path / "two", {**options, "parallel__tp": 2})[0]
    assert all(abs(a - b) < 1e-9 * b for a, b in zip(losses(one), losses(two), strict=True))
    a, b = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert any(name.endswith(f"q_proj.{MAGNITUDE}") for name in a)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-8) for k in a)


def test_the_trainer_saves_a_mixture_in_its_own_format(pool, assets, tmp_path):
    methods = [{**PEFT, "target_modules": ["q_proj"]}, {**PEFT, "kind": "lora", "target_modules": ["v_proj"]}]
    pool.run(1, run, assets, tmp_path, {"peft": {"kind": "stack", "methods": methods}, "train__steps": 1})
    assert (tmp_path / "adapter/method.json").exists()


@pytest.mark.parametrize("change", ["in place", "load", "merge", "dtype", "start", "nothing"])
def test_the_norm_follows_a_base_that_was_changed(change):
    """|W|^2 is kept between forwards: whatever changes W must let it go."""
    model = nn.Sequential(nn.Linear(6, 5))
    method = peft_method_from_config({"kind": "dora", "target_modules": ["0"], "params": {"r": 2}})
    inject_peft_and_freeze(method, model)
    layer, x = model[0], torch.randn(3, 6)
    model(x)
    kept = layer._squares[1]
    with torch.no_grad():
        if change == "in place":
            layer.base.weight.mul_(2)
        elif change == "load":
            layer.base.load_state_dict({name: 2 * t for name, t in layer.base.state_dict().items()})
        elif change == "merge":
            layer.lora_B.weight.normal_()
            merge_peft(method, model)
            unmerge_peft(method, model)
            layer.base.weight.mul_(2)
        elif change == "dtype":
            model.double()
            layer.base.weight.mul_(2)
        elif change == "start":
            local = layer.base.weight.detach().numpy()
            local *= 2  # unseen by torch
            method.initialise(model)
        else:
            local = layer.base.weight.detach().numpy()
            local *= 2
            assert not torch.allclose(layer.row_squares(layer.weight_here()), layer.base.weight.square().sum(1))  # the mutation
            model.eval()
    if change != "merge":
        assert not torch.allclose(kept.double(), layer.base.weight.square().sum(1).double())
    assert torch.allclose(layer.row_squares(layer.weight_here()), layer.base.weight.square().sum(1))
