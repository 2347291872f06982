"""Adapters of experts merged file to file, into bases that hold each expert by itself, and into stacks; PEFT reads and writes the same."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d9d_lora import inject_peft_and_freeze, merge_peft
from d9d_lora.export.profiles import PROFILES, ExportError, Job, export
from d9d_lora.export.sketch import sketch_of_model
from d9d_lora.registry import peft_method_from_config
from d9d_lora.state import expert_base
from d9d_lora.state.merge_edit import Add
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.native_format import save_trained
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.walk import adapted_layers
from tests.test_experts import FAMILIES, IDS, STACKS, model_of
from tests.test_laws import wake

LORA = {"kind": "lora", "target_modules": ["q_proj", "o_proj"], "target_parameters": STACKS, "params": {"r": 3, "alpha": 6}}
UNEVEN = {**LORA, "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 1}}


def saved(tmp_path, family, peft=LORA, *, stacks=False):
    """base/ and adapter/ of an adapted model, and the model"""
    model = model_of(family, torch.float32).eval()
    model.save_pretrained(tmp_path / "base", save_original_format=not stacks)
    method = peft_method_from_config(peft)
    inject_peft_and_freeze(method, model)
    method.initialise(model)
    wake(model)
    if peft["params"].get("use_dora") or peft["params"].get("experts_shared_outer"):
        save_trained({n: p for n, p in model.named_parameters() if p.requires_grad}, method.config, tmp_path / "adapter")
    else:
        save_adapter(model, tmp_path / "adapter")
    return method, model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


DORA = {**LORA, "target_modules": None, "params": {"r": 3, "alpha": 6, "use_dora": True, "dropout": 0.1}}
OUTER = {**LORA, "params": {"r": 4, "experts_shared_outer": True}}
CASES = {
    "one by one": ("qwen3_moe", UNEVEN, False),
    "one by one, renamed": ("mixtral", LORA, False),
    "stacks": ("qwen3_moe", LORA, True),
    "turned stacks": ("gpt_oss", LORA, True),
    "gate and up apart": ("mixtral", {**LORA, "target_parameters": STACKS[:1], "params": {"r": 2, "enable_lora": [True, True]}}, False),
    "only down, and the router": ("qwen3_moe", {**LORA, "target_parameters": ["experts.down_proj", "gate.weight"]}, False),
    "dora, in our own format": ("deepseek_v3", DORA, False),
    "one outer factor, in our own format": ("mixtral", OUTER, False),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_files_are_the_adapted_model(tmp_path, case):
    family, peft, stacks = CASES[case]
    if "enable_lora" in peft["params"]:
        peft = {**peft, "target_modules": None}
    method, model = saved(tmp_path, family, peft, stacks=stacks)
    before, adapted = load_file(tmp_path / "base" / "model.safetensors"), logits(model)
    assert any(".experts.0." in name for name in before) is not stacks
    report = merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert len(changed) == report.merged
    assert any("experts" in name for name in changed)
    merged = load(tmp_path / "merged")
    assert (adapted - logits(load(tmp_path / "base"))).abs().max() > 1e-2
    assert (logits(merged) - adapted).abs().max() < 1e-4
    merge_peft(method, model)
    ours = model.state_dict()
    assert all((t - ours[name]).abs().max() < 1e-6 for name, t in merged.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_peft_reads_what_we_write_and_we_merge_what_it_writes(tmp_path, family):
    peft = pytest.importorskip("peft")
    _, model = saved(tmp_path, family, UNEVEN)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Mm]issing.*")
        theirs = peft.PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": STACKS, "init_lora_weights": False}
    theirs = peft.get_peft_model(load(tmp_path / "base"), peft.LoraConfig(**fields, task_type="CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs)
    merge_files(tmp_path / "theirs", tmp_path / "base", tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 1e-4
    bare = load(tmp_path / "base")  # a start of training: the directory's own method, filled
    inject_peft_and_freeze(method_of(tmp_path / "theirs", bare), bare)
    load_adapter_weights(bare, tmp_path / "theirs")
    assert (logits(bare) - expected).abs().max() < 1e-4


def test_a_peft_directory_holds_one_outer_factor_for_each_expert(tmp_path):
    _, model = saved(tmp_path, "qwen3_moe", OUTER)
    save_adapter(model, tmp_path / "fused")
    expected = logits(model)
    merge_files(tmp_path / "fused", tmp_path / "base", tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 1e-4
    for peft in (OUTER, LORA):
        other = load(tmp_path / "base")
        inject_peft_and_freeze(peft_method_from_config({**peft, "params": {**peft["params"], "r": 4, "alpha": 8}}), other)
        load_adapter_weights(other, tmp_path / "fused")
        assert (logits(other) - expected).abs().max() < 1e-5
    for layer in adapted_layers(other):  # each expert its own: no longer one
        layer.factor("lora_A").data.normal_()
    save_adapter(other, tmp_path / "apart")
    with pytest.raises(AdapterError, match="the file has other values for each expert"):
        load_adapter_weights(model, tmp_path / "apart")


def test_the_factors_of_few_stacks_are_in_hand(tmp_path, monkeypatch):
    """Whatever the number of experts and layers: each stack's factors are read a few times, and at most KEPT are kept."""
    saved(tmp_path, "qwen3_moe")
    kept = []
    real = expert_base._Shelf.one

    def one(self, *args):
        found = real(self, *args)
        kept.append(len(self._kept))
        return found

    monkeypatch.setattr(expert_base._Shelf, "one", one)
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert max(kept) == expert_base.KEPT
    assert len(kept) >= 2 * 2 * 3 * 5  # checked, then merged: two layers, three tensors of each of five experts


@pytest.mark.parametrize("mutant", ["up takes the rows of gate", "experts in the order of their names"])
def test_mutations(tmp_path, monkeypatch, mutant):
    monkeypatch.setitem(FAMILIES, "qwen3_moe", ("qwen3_moe", {**FAMILIES["qwen3_moe"][1], "num_experts": 11}))
    _, model = saved(tmp_path, "qwen3_moe")
    if mutant.startswith("up"):
        monkeypatch.setattr(Add, "_box", lambda self, rows, shape: (rows, slice(0, shape[1])))
    else:
        monkeypatch.setattr("d9d_lora.state.expert_files._natural", lambda name: name)
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - logits(model)).abs().max() > 1e-3


# -- exports: one product for each tensor of an expert --------------------------------------------------------------------------------


def updates(path):
    """dW of every tensor of a plain LoRA directory, as vLLM and SGLang compute it: alpha / r and B A."""
    config, tensors = json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")
    assert not config.get("target_parameters")
    assert not config["rank_pattern"]
    assert not config["use_rslora"]
    scale = config["lora_alpha"] / config["r"]
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert len(tensors) == 2 * len(names)
    dW = {n: scale * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}
    return {f"{n.removeprefix('base_model.model.')}.weight": value for n, value in dW.items()}


@pytest.mark.parametrize("profile,family", [("vllm", "qwen3_moe"), ("vllm", "mixtral"), ("sglang", "qwen3_moe")])
def test_consumers_of_single_experts(tmp_path, profile, family):
    """Every tensor of the base's files gets the update that the merged file has."""
    peft = {**UNEVEN, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    _, model = saved(tmp_path, family, peft)
    assert not PROFILES[profile].faults(sketch_of_model(model).on(tmp_path / "base"), None)
    told = export(profile, Job(tmp_path / "adapter", tmp_path / "out", tmp_path / "base"))
    assert "--max-lora-rank" in told
    before = load_file(tmp_path / "base" / "model.safetensors")
    found = updates(tmp_path / "out")
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed == found.keys()
    assert sum("experts" in name for name in found) == 2 * 5 * 3
    for name, dW in found.items():
        assert (after[name] - before[name] - dW).abs().max() < 1e-5 * max(1.0, float(dW.abs().max())), name
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert set(targets) == {name.split(".")[-2] for name in found}


def test_experts_of_a_layer_are_whole_for_vllm(tmp_path):
    """It packs gate, up and down of every expert of a layer, and stops where one is missing: what is not adapted is zero."""
    saved(tmp_path, "qwen3_moe", {**LORA, "target_parameters": ["layers.1.mlp.experts.down_proj"]})
    export("vllm", Job(tmp_path / "adapter", tmp_path / "out", tmp_path / "base"))
    found = {name: dW for name, dW in updates(tmp_path / "out").items() if "experts" in name}
    assert {name.split(".")[2] for name in found} == {"1"}
    assert len(found) == 5 * 3
    assert all(("down" in name) == bool(dW.any()) for name, dW in found.items())
    assert all(dW.shape == load_file(tmp_path / "base" / "model.safetensors")[name].shape for name, dW in found.items())


def test_a_projection_of_experts(tmp_path):
    saved(tmp_path, "qwen3_moe")
    told = export("vllm", Job(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", rank=2))
    assert "r=2" in told
    assert "relative error" in told
    for profile, why in (("peft", "PEFT reads experts as stacks"), ("llamacpp", "written to GGUF as stacks")):
        with pytest.raises(ExportError, match=why):
            export(profile, Job(tmp_path / "adapter", tmp_path / profile, tmp_path / "base", rank=2))


def test_what_a_consumer_could_not_load_is_refused(tmp_path):
    _, model = saved(tmp_path, "mixtral")
    with pytest.raises(ExportError, match=r"block_sparse_moe.experts.0.w1.*SGLang looks for"):
        export("sglang", Job(tmp_path / "adapter", tmp_path / "out", tmp_path / "base"))
    with pytest.raises(ExportError, match=r"stacks of experts that no base at hand holds one by one: give model.path"):
        export("vllm", Job(tmp_path / "adapter", tmp_path / "out"))
    assert PROFILES["vllm"].faults(sketch_of_model(model), None)
    saved(tmp_path / "stacks", "qwen3_moe", stacks=True)
    with pytest.raises(ExportError, match="stacks of experts that no base"):
        export("vllm", Job(tmp_path / "stacks" / "adapter", tmp_path / "out", tmp_path / "stacks" / "base"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_told_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, "qwen3_moe")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"qwen3_moe"', '"none_such"'))
    with pytest.raises(AdapterError, match="transformers' model of model_type 'none_such', which cannot be made here"):
        merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
