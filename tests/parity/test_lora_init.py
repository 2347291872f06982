"""Starts, the bias of B and the fields of LoraConfig, number for number against the PEFT library."""

import contextlib
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config
from d9d_lora.methods import peft_fields
from d9d_lora.methods.peft_fields import from_peft
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from tests.catalogue import LAYOUTS
from tests.parity.test_peft_format import base, logits, peft_load, stir
from tests.test_laws import make, wake

peft = pytest.importorskip("peft")
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))


class Small(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(5)
        self.layer = Conv1D(16, 24) if kind == "conv1d" else nn.Linear(24, 16, bias=kind == "bias")
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(self.layer.weight.shape))
            if getattr(self.layer, "bias", None) is not None:
                self.layer.bias.copy_(torch.randn(16))

    def forward(self, x):
        return self.layer(x)


def both(kind, **options):
    """(our model, our layer, PEFT's model, PEFT's layer) with the same options."""
    ours, fields = Small(kind), {"r": 4, "lora_alpha": 6, **options}
    method = peft_method_from_config({"kind": "lora", "target_modules": ["layer"], "params": fields})
    inject_peft_and_freeze(method, ours)
    method.initialise(ours)
    theirs = peft.get_peft_model(Small(kind), peft.LoraConfig(target_modules=["layer"], fan_in_fan_out=kind == "conv1d", **fields))
    return ours, ours.layer, theirs, theirs.base_model.model.layer


def theirs_product(layer):
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


# -- starts -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("start,kind", [("pissa", "plain"), ("pissa", "conv1d"), ("pissa", "bias"), ("olora", "plain"), ("olora", "bias")])
def test_starts_that_move_the_base(start, kind, options):
    ours, layer, theirs, their_layer = both(kind, init_lora_weights=start, **options)
    product = layer.delta.scaling * layer.lora_B.weight @ layer.lora_A.weight
    assert (product - theirs_product(their_layer)).abs().max() < 1e-5
    assert (layer.base.weight - their_layer.base_layer.weight).abs().max() < 1e-5
    sign = torch.sign((layer.lora_A.weight * their_layer.lora_A["default"].weight).sum(1))  # an SVD leaves it open
    assert (layer.lora_A.weight - sign[:, None] * their_layer.lora_A["default"].weight).abs().max() < 1e-5
    assert (layer.lora_B.weight - sign * their_layer.lora_B["default"].weight).abs().max() < 1e-5
    assert (ours(X) - theirs(X)).abs().max() < 1e-5
    assert (ours(X) - Small(kind)(X)).abs().max() < 1e-5


def test_rounds_end_where_pissa_does():
    ours, _, theirs, _ = both("plain", init_lora_weights="pissa_niter_30")
    exact, _, _, _ = both("plain", init_lora_weights="pissa")
    assert (ours.layer.base.weight - exact.layer.base.weight).abs().max() < 1e-4
    # theirs has no spare columns, so the last directions of a flat spectrum are still mixed after as many rounds
    residuals = [float(w.norm()) for w in (ours.layer.base.weight, theirs.base_model.model.layer.base_layer.weight)]
    assert residuals[0] <= residuals[1] < 1.1 * residuals[0]


def test_orthogonal_spans_what_theirs_does():
    """Both are random, so what they have in common is compared: ranks, sizes, a product of zero."""
    _, layer, _, their_layer = both("plain", init_lora_weights="orthogonal")
    for A, B in ((layer.lora_A.weight, layer.lora_B.weight), (their_layer.lora_A["default"].weight, their_layer.lora_B["default"].weight)):
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 2
        assert (B @ A).abs().max() < 1e-6
        for factor in (A, B):  # a sum of r / 2 squares of numbers of size 1/10
            assert 0.04 < factor.detach().square().mean().sqrt() < 0.1
    assert torch.equal(layer.base.weight, Small("plain").layer.weight)


def test_gaussian_has_their_deviation():
    options = {"r": 64, "lora_alpha": 6, "init_lora_weights": "gaussian"}
    _, layer, _, their_layer = both("plain", **options)
    assert abs(layer.lora_A.weight.std() / their_layer.lora_A["default"].weight.std() - 1) < 0.1
    assert not layer.lora_B.weight.any()


# -- the bias of B ----------------------------------------------------------------------------------------------------------------


def pair_with_bias(kind):
    """Both models with the same awake factors."""
    ours, layer, theirs, their_layer = both(kind, lora_bias=True, use_rslora=True)
    assert not layer.lora_B_bias.weight.any()
    stir(ours)
    with torch.no_grad():
        their_layer.lora_A["default"].weight.copy_(layer.lora_A.weight)
        their_layer.lora_B["default"].weight.copy_(layer.lora_B.weight)
        their_layer.lora_B["default"].bias.copy_(layer.lora_B_bias.weight)
    return ours, layer, theirs, their_layer


@pytest.mark.parametrize("kind", ["plain", "bias", "conv1d"])
def test_the_bias_of_b(kind):
    ours, layer, theirs, their_layer = pair_with_bias(kind)
    assert (ours(X) - theirs(X)).abs().max() < 1e-5
    for model in (ours, theirs):
        model(X).square().sum().backward()
    pairs = {
        layer.lora_A.weight: their_layer.lora_A["default"].weight,
        layer.lora_B.weight: their_layer.lora_B["default"].weight,
        layer.lora_B_bias.weight: their_layer.lora_B["default"].bias,
    }
    for p, q in pairs.items():
        assert (p.grad - q.grad).abs().max() < 1e-5 * q.grad.abs().max()


@pytest.mark.parametrize("kind", ["bias", "conv1d"])
def test_the_bias_of_b_merged(kind):
    ours, _, theirs, _ = pair_with_bias(kind)
    method = peft_method_from_config({"kind": "lora", "target_modules": ["layer"], "params": {"r": 4, "lora_bias": True}})
    merge_peft(method, ours)
    merged = theirs.merge_and_unload()
    assert (ours.layer.weight - merged.layer.weight).abs().max() < 1e-5
    assert (ours.layer.bias - merged.layer.bias).abs().max() < 1e-5


# -- files ------------------------------------------------------------------------------------------------------------------------

FILES = {
    "pissa": ("llama", {"target_modules": ["q_proj", "down_proj"], "params": {"r": 4, "alpha": 6, "init_lora_weights": "pissa"}}),
    "pissa rslora patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"v_proj": 2},
            "params": {"r": 4, "alpha": 6, "scaling": "rslora", "init_lora_weights": "pissa"},
        },
    ),
    "olora embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "params": {"r": 4, "alpha": 6, "init_lora_weights": "olora"}},
    ),
    "pissa gpt2": ("gpt2", {"target_modules": ["c_attn"], "params": {"r": 4, "alpha": 6, "init_lora_weights": "pissa"}}),
    "pissa dora": (
        "llama",
        {"target_modules": ["q_proj"], "params": {"r": 4, "alpha": 6, "init_lora_weights": "pissa", "use_dora": True}},
    ),
    "bias of B": ("qwen2", {"target_modules": ["q_proj"], "params": {"r": 4, "alpha": 6, "lora_bias": True}}),
    "bias of B beside the bias": (
        "qwen2",
        {"target_modules": ["q_proj"], "bias": "lora_only", "params": {"r": 4, "alpha": 6, "lora_bias": True}},
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_for_the_base_as_it_was(case, tmp_path):
    kind, config = FILES[case]
    model = base(kind)
    method = peft_method_from_config({"kind": "lora", **config})
    inject_peft_and_freeze(method, model)
    method.initialise(model)
    stir(model)
    adapted = logits(model)
    assert (adapted - logits(base(kind))).abs().max() > 1e-2
    save_adapter(model, tmp_path / "a", base="some/base")
    assert (logits(peft_load(kind, tmp_path / "a")) - adapted).abs().max() < 2e-5

    again = base(kind)
    inject_peft_and_freeze(method_of(tmp_path / "a", again), again)
    load_adapter_weights(again, tmp_path / "a")
    assert (logits(again) - adapted).abs().max() < 2e-5

    merge_peft(method, model)
    assert (logits(model) - adapted).abs().max() < 2e-5
    base(kind).save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "a", tmp_path / "base", tmp_path / "merged")
    merged, memory = load_file(tmp_path / "merged" / "model.safetensors"), model.state_dict()
    assert max(float((merged[n] - memory[n]).abs().max()) for n in merged if n in memory) < 1e-5


def test_mutation_a_file_without_the_start(tmp_path):
    """Were the trained factors written alone, the base as it was would not be what they were trained on."""
    kind, config = FILES["pissa"]
    model = base(kind)
    method = peft_method_from_config({"kind": "lora", **config})
    inject_peft_and_freeze(method, model)
    method.initialise(model)
    save_adapter(model, tmp_path / "a")
    assert (logits(peft_load(kind, tmp_path / "a")) - logits(model)).abs().max() < 2e-5
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, t in tensors.items():
        half = t.clone()
        half[4:] *= 0 if "lora_A" in name else 1
        tensors[name] = half
    save_file(tensors, file, {"format": "pt"})
    assert (logits(peft_load(kind, tmp_path / "a")) - logits(model)).abs().max() > 1e-2


def test_a_moved_base_takes_no_file(tmp_path):
    kind, config = FILES["pissa"]
    model = base(kind)
    method = peft_method_from_config({"kind": "lora", **config})
    inject_peft_and_freeze(method, model)
    with pytest.raises(AdapterError, match="has not been started"):
        save_adapter(model, tmp_path / "a")
    method.initialise(model)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(AdapterError, match="into the base as it was"):
        load_adapter_weights(model, tmp_path / "a")


def save_on(rank, layout, path):
    model, _ = make("pissa", "linear", LAYOUTS[layout])
    wake(model)
    save_adapter(model, path, task_type=None)


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp2_tp2"])
def test_every_layout_writes_the_same_start(pool, layout, tmp_path):
    pool.run(1, save_on, "one", tmp_path / "one")
    pool.run(LAYOUTS[layout].world, save_on, layout, tmp_path / layout)
    assert (tmp_path / "one" / "adapter_config.json").read_bytes() == (tmp_path / layout / "adapter_config.json").read_bytes()
    ours, one = (load_file(tmp_path / d / "adapter_model.safetensors") for d in (layout, "one"))
    assert ours.keys() == one.keys()
    assert all((ours[k] - one[k]).abs().max() < 1e-10 for k in ours)


# -- the fields of LoraConfig ------------------------------------------------------------------------------------------------------

PLAIN = {"target_modules": ["q_proj"]}
# A value of each field that is not its default; fields that make no sense alone bring their company.
VALUES = {
    "r": 4,
    "target_modules": ["k_proj"],
    "exclude_modules": ["v_proj"],
    "lora_alpha": 3,
    "lora_dropout": 0.25,
    "bias": "all",
    "use_rslora": True,
    "modules_to_save": ["norm"],
    "init_lora_weights": "pissa",
    "layers_to_transform": [1],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "use_dora": True,
    "lora_bias": True,
    "target_parameters": ["experts.w"],
    "layer_replication": [(0, 2), (1, 2)],
    "ensure_weight_tying": True,
}
COMPANY = {
    "layers_pattern": {"layers_to_transform": [1]},
    "ensure_weight_tying": {"target_modules": ["embed_tokens", "lm_head"]},
    "eva_config": {"init_lora_weights": "eva"},
    "corda_config": {"init_lora_weights": "corda"},
    "loftq_config": {"init_lora_weights": "loftq"},
}
INNER = {"eva_config": {"rho": 1.5}, "corda_config": {"corda_method": "kpm"}, "loftq_config": {"loftq_bits": 4, "loftq_iter": 3}}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(peft.LoraConfig) if f.name != "peft_type"])
def test_no_field_is_dropped_in_silence(field):
    plain = from_peft(PLAIN)
    if field in peft_fields._SAYS_NOTHING:
        assert from_peft({**PLAIN, field: "x"}) == plain
    elif field in peft_fields._REFUSED:
        with pytest.raises(ValueError, match=rf"{field} = .*: \w+"):
            from_peft({**PLAIN, field: {"nblocks": 2}})
    else:
        company = {**PLAIN, **COMPANY.get(field, {})}
        value = VALUES.get(field, INNER.get(field))
        with_it, without = from_peft({**company, field: value}).model_dump(), None
        with contextlib.suppress(ValueError):  # alone, its company may make no sense
            without = from_peft(company).model_dump()
        assert with_it != without
        assert str(next(iter(value.values())) if isinstance(value, dict) else value) in str(with_it) or field == "use_rslora"


def test_a_config_as_peft_has_it():
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=3, use_rslora=True, lora_dropout=0.1)
    for fields in (config.to_dict(), dataclasses.asdict(config), {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}):
        params = from_peft(fields).params
        assert (params.r, params.alpha, params.dropout, params.scaling) == (4, 3, 0.1, "rslora")
        assert from_peft(fields).target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "fields,told",
    [
        ({"target_modules": ["q"], "lora_alfa": 3}, "lora_alfa: no field of PEFT 0.21.2; did you mean 'lora_alpha'"),
        ({"r": 3}, "target_modules is not given"),
        ({"target_modules": ["q"], "r": 0}, "expected at least 1"),
        ({"target_modules": ["q"], "peft_type": "LOHA"}, "the reader of LORA"),
        ({"target_modules": ["q"], "init_lora_weights": "mica"}, "not made here"),
        ({"target_modules": ["q"], "qalora_group_size": 8}, "means nothing without"),
    ],
)
def test_fields_that_cannot_be_followed(fields, told):
    with pytest.raises(ValueError, match=told):
        from_peft(fields)
