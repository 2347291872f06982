"""Corners that were found wrong once, each by somebody who tried: orders, odd modules, undoing, compiling, layouts of one layer."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from d9d_lora import LoRALinear, LoRAParameters, inject_peft_and_freeze, merge_peft, peft_method_from_config, unmerge_peft
from d9d_lora.state.reader import load_checkpoint
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.sums import ReplicatedSum
from d9d_lora.targets import Targets
from d9d_lora.train.trainer import Trainer
from d9d_lora.train.world import device_of, join
from d9d_lora.walk import adapted_layers, clock_of
from tests.catalogue import LAYOUTS, build, peft_config, plan_of
from tests.small_run import config_of, make_assets
from tests.test_laws import backward, make, trained, wake


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.c(torch.relu(self.a(x)))


def lora(targets, **fields):
    return peft_method_from_config({"kind": "lora", "target_modules": targets, "params": {"r": 2, "alpha": 4}, **fields})


def stack(*methods):
    return peft_method_from_config({"kind": "stack", "methods": list(methods)})


def adapt(model, method):
    inject_peft_and_freeze(method, model)
    for layer in adapted_layers(model):
        for p in layer.factors().values():
            nn.init.normal_(p)
    return model


DROP = {"params": {"r": 2, "alpha": 4, "dropout": 0.5}}


# -- parallel -------------------------------------------------------------------------------------------------------------------


def drift_of_unplanned_layers(rank):
    """Largest difference between tensor-parallel ranks of a factor outside the plan, after three steps of a plain loop."""
    model = build("linear")
    plan = {k: v for k, v in plan_of(model, False).items() if "blocks.0" in k}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    inject_peft_and_freeze(peft_method_from_config(peft_config("lora", "linear", **DROP)), model)
    wake(model)
    optimiser = torch.optim.AdamW(trained(model).values(), lr=0.01)
    for step in range(3):
        backward(model, LAYOUTS["tp2"], step)
        optimiser.step()
        optimiser.zero_grad()
    p = model.blocks[1].up.lora_A.weight.detach()
    both = [torch.empty_like(p) for _ in range(2)]
    dist.all_gather(both, p)
    return float((both[0] - both[1]).abs().max())


def test_a_layer_outside_the_plan_draws_one_mask_on_all_tensor_parallel_ranks(pool):
    assert pool.run(2, drift_of_unplanned_layers) == [0.0, 0.0]


def grads_of_a_replicated_linear(rank, bucket):
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    model = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    model[0].weight = nn.Parameter(distribute_tensor(reference[0].weight.detach(), mesh, [Replicate()]))
    for m in (model, reference):
        inject_peft_and_freeze(lora(["0"]), m)
        wake(m)
    total = ReplicatedSum(adapted_layers(model)) if bucket else None
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(DTensor.from_local(x[2 * rank : 2 * rank + 2], mesh, [Shard(0)])).to_local().square().sum().backward()
    if total:
        total.reduce()
    reference(x).square().sum().backward()
    ours, theirs = model[0].lora_B.weight.grad.to_local(), reference[0].lora_B.weight.grad
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize(
    "bucket",
    [False, True],
)
def test_a_replicated_linear_on_sharded_tokens_has_whole_gradients(pool, bucket):
    assert max(pool.run(2, grads_of_a_replicated_linear, bucket)) < 1e-10


def dtypes_of_whole_parameters(rank, assets, output):
    methods = [
        {"kind": "lora", "target_modules": ["q_proj"], "params": {"r": 2, "alpha": 4}},
        {"kind": "full_tune", "module_name_pattern": ".*o_proj"},
    ]
    peft = {"kind": "stack", "methods": methods}
    config = config_of(assets, output, parallel__tp=2, model__dtype="bfloat16", peft=peft)
    trainer = Trainer(config, join(device_of("cpu"), config.parallel, 60))
    return sorted({str(p.dtype) for p in trainer.params.values()})


def test_tensor_parallel_parameters_trained_whole_are_fp32(pool, tmp_path):
    assert pool.run(2, dtypes_of_whole_parameters, make_assets(tmp_path / "assets"), tmp_path / "run")[0] == ["torch.float32"]


# -- all or nothing ---------------------------------------------------------------------------------------------------------------


def half_a_model_is_2d(rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "tp"))
    model = build("linear")
    model.blocks[1].down.weight = nn.Parameter(distribute_tensor(model.blocks[1].down.weight.detach(), mesh, [Replicate(), Shard(1)]))
    with pytest.raises(ValueError, match="2-D mesh"):
        inject_peft_and_freeze(peft_method_from_config(peft_config("lora", "linear")), model)
    return len(model._forward_pre_hooks)


def test_a_failed_injection_leaves_no_hook(pool):
    assert pool.run(2, half_a_model_is_2d) == [0, 0]


@pytest.mark.parametrize("out", ["merge", "remove"])
def test_no_hook_is_left_when_the_adapters_are_gone(out):
    model = Two()
    for _ in range(2):
        method = lora(["a"])
        inject_peft_and_freeze(method, model)
        getattr(method, out)(model)
    assert not model._forward_pre_hooks


def test_a_stack_that_cannot_be_merged_is_left_whole():
    method = stack({"kind": "lora", "target_modules": ["c"]}, {"kind": "lora", "target_modules": ["a"]})
    model = adapt(Two(), method)
    nn.init.constant_(model.c.lora_B.weight, float("nan"))
    before = model.a.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        merge_peft(method, model)
    assert torch.equal(model.a.weight, before)
    assert len(list(adapted_layers(model))) == 2


def test_one_method_object_serves_two_models():
    method = lora(["a"])
    models = [adapt(Two(), method) for _ in range(2)]  # stages of a pipeline
    x = torch.randn(2, 6)
    before = [m(x) for m in models]
    for m in models:
        merge_peft(method, m)
    for m in models:
        unmerge_peft(method, m)
    assert all(torch.equal(m(x), y) for m, y in zip(models, before))


def test_unmerge_does_not_throw_another_adapter_away():
    method = lora(["a"])
    model = adapt(Two(), method)
    merge_peft(method, model)
    adapt(model, lora(["a"]))
    newer = model.a
    with pytest.raises(ValueError, match="changed since the merge"):
        unmerge_peft(method, model)
    assert model.a is newer


# -- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        lambda: stack({"kind": "full_tune", "module_name_pattern": "m.a"}, {"kind": "lora", "target_modules": ["a"]}),
        lambda: stack({"kind": "lora", "target_modules": ["c"], "modules_to_save": ["a"]}, {"kind": "lora", "target_modules": ["a"]}),
        lambda: lora(["a"], modules_to_save=["m"]),
    ],
)
def test_a_base_is_not_trained_beside_its_own_adapter(method):
    model = nn.Sequential()
    model.add_module("m", Two())
    with pytest.raises(ValueError, match=r"would be trained whole beside it|match no layer that can be adapted"):
        inject_peft_and_freeze(method(), model)


def test_the_projection_inside_torch_attention_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="out_proj"):
        inject_peft_and_freeze(lora(["out_proj"]), model)


def test_torch_encoder_layers_use_their_adapters_in_evaluation():
    model = adapt(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)), lora(["linear1", "linear2"]))
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.allclose(model.train()(x), model.eval()(x), atol=1e-5)


def test_a_parametrized_linear_is_merged_or_refused():
    model = Two()
    nn.utils.parametrizations.weight_norm(model.a)
    method = lora(["a"])
    try:
        adapt(model, method)
        x = torch.randn(2, 6)
        before = model(x)
        merge_peft(method, model)
    except ValueError:
        return
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize("alpha", [0, float("nan"), float("inf")])
def test_an_alpha_that_cannot_train_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        peft_method_from_config({"kind": "lora", "target_modules": ["a"], "params": {"r": 2, "alpha": alpha}})


# -- names ------------------------------------------------------------------------------------------------------------------------


def test_a_module_tied_within_one_parent_is_adapted_in_both_places():
    layer = nn.Linear(3, 3)
    model = adapt(nn.Sequential(layer, nn.ReLU(), layer), lora(["0"]))
    assert model[0] is model[2]


@pytest.mark.parametrize("name,pattern", [("model.encoder_layers.1.q", "layers"), ("enc.path.1.q", "h")])
def test_layers_pattern_is_a_whole_segment(name, pattern):
    assert re.match(rf".*\.{pattern}\.(\d+)\.", name) is None  # PEFT 0.21.2
    assert not Targets(target_modules=["q"], layers_to_transform=[1], layers_pattern=pattern).wants(name)


# -- starts and masks ---------------------------------------------------------------------------------------------------------------


def test_the_flow_in_the_docstring_starts_the_factors(tmp_path):
    source = Two()
    save_file(source.state_dict(), str(tmp_path / "model.safetensors"))
    with torch.device("meta"):
        model = Two()
    method = lora(["a"])
    mapper = inject_peft_and_freeze(method, model)
    model.to_empty(device="cpu")
    nn.init.constant_(model.a.lora_B.weight, 7)  # as good as any memory that was used before
    with open_checkpoint(Path(tmp_path)) as files:
        load_checkpoint(model, files, mapper, skip={"a.lora_A.weight", "a.lora_B.weight"})
    method.initialise(model)
    x = torch.randn(2, 6)
    assert torch.allclose(model(x), source(x))


def test_layers_that_stand_alone_start_differently():
    one, two = (LoRALinear(nn.Linear(6, 8), LoRAParameters(r=2, alpha=4)) for _ in range(2))
    assert not torch.equal(one.lora_A.weight, two.lora_A.weight)


def test_a_clock_that_never_ticks_is_told():
    model = adapt(nn.Sequential(Two()), lora(["a"], **DROP))
    x = torch.randn(2, 6)
    with pytest.raises(RuntimeError, match="the module that was injected has not been called"):
        model[0](x)
    clock_of(model).set(1)
    first = model[0](x)
    clock_of(model).set(2)
    wake(model)
    assert first.shape == model[0](x).shape


# -- compilation --------------------------------------------------------------------------------------------------------------------


def test_dropout_does_not_break_a_compiled_block():
    model = adapt(nn.Sequential(Two()), lora(["a", "c"], **DROP))
    clock_of(model).set(1)
    assert torch._dynamo.explain(model[0])(torch.randn(2, 6)).graph_break_count == 0


def test_a_model_without_dropout_compiles_to_one_graph():
    model = adapt(Two(), lora(["a", "c"]))
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 6))


def test_dropout_of_a_transposed_input_keeps_its_promise():
    x = torch.randn(6, 4).t().requires_grad_()
    torch.library.opcheck(torch.ops.d9d_lora.keep.default, (x, torch.tensor(5), 3, 0.5, 6, 0))


# -- found right, and not tested before -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tp2"])
def test_a_plain_loop_over_a_deep_copy_is_right(pool, layout):
    pool.run(2, copied_loop, layout)


def copied_loop(rank, layout):
    """The hooks of a tensor-parallel model are lost in a copy: gradients stay Partial, and clip and AdamW are right all the same."""
    import copy

    model = copy.deepcopy(adapt_on(layout))
    reference, _ = make("lora", "linear_bias", LAYOUTS["one"])
    wake(reference)
    optimisers = [torch.optim.AdamW(trained(m).values(), lr=0.01) for m in (model, reference)]
    for step in range(3):
        norms = []
        for m, where in ((model, layout), (reference, "one")):
            backward(m, LAYOUTS[where], step)
            norm = torch.nn.utils.clip_grad_norm_(trained(m).values(), 0.05)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        assert torch.allclose(*norms)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    for name, p in trained(model).items():
        assert torch.allclose(p.full_tensor(), trained(reference)[name], atol=1e-12), name


def adapt_on(layout):
    model, _ = make("lora", "linear_bias", LAYOUTS[layout])
    wake(model)
    return model
