"""Adapters for other programs: folded, projected, refused before training; a reader that knows r and lora_alpha only reads them right."""

import json
import typing
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.export.fold import fold_scale
from d9d_lora.export.low_rank import Product, projected, projected_dense, read_products
from d9d_lora.export.profiles import PROFILES, ExportError, Job, export, vllm_rank
from d9d_lora.export.sketch import sketch_of_directory, sketch_of_model
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.train.config import ExportConfig
from tests import small_run
from tests.parity.test_peft_format import base, logits, stir
from tests.test_launch import ROOT

PREFIX = "base_model.model."


def product(r, s, dtype=torch.float32, out=6, into=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Product(torch.randn(r, into, generator=g).to(dtype), torch.randn(out, r, generator=g).to(dtype), s)


def dense(p):
    return p.scaling * (p.B.double() @ p.A.double())


# -- folding -------------------------------------------------------------------------------------------------------------------


def test_one_scaling_with_a_whole_alpha_changes_no_tensor():
    products = {"a": product(4, 1.5), "b": product(4, 1.5, seed=1)}
    folded = fold_scale(products)
    assert (folded.r, folded.alpha, folded.rounded, folded.padded) == (4, 6, (), ())
    assert all(folded.products[n].B is p.B and folded.products[n].A is p.A for n, p in products.items())
    rslora = fold_scale({"a": product(4, 6 / 4**0.5)})
    assert (rslora.alpha, rslora.rounded) == (12, ())


def test_ranks_are_padded_and_scales_folded():
    products = {"a": product(2, 0.5), "b": product(4, 2.0, seed=1), "c": product(3, 0.3, seed=2)}
    folded = fold_scale(products)
    assert (folded.r, folded.alpha, folded.rounded, folded.padded) == (4, 4, ("c",), ("a", "c"))
    for name, p in folded.products.items():
        assert p.A.shape[0] == p.B.shape[1] == 4
        assert p.scaling == 1.0
        if name == "c":
            assert (dense(p) - dense(products[name])).abs().max() < 1e-6
        else:
            assert torch.equal(dense(p), dense(products[name]))  # powers of two, and zeros: exact
    assert fold_scale({"a": product(2, 1.0), "b": product(4, 1.0)}).products["a"].B[:, :2].equal(product(2, 1.0).B)


def test_folding_rounds_once():
    one = product(4, 0.3, torch.bfloat16)
    two = fold_scale({"a": one, "b": product(4, 1.0, torch.bfloat16)}).products["a"]
    assert torch.equal(two.B, (one.B.float() * 0.3).bfloat16())
    with pytest.raises(AdapterError, match="does not fit"):
        fold_scale({"a": replace(product(4, 3e5, torch.float16)), "b": product(4, 1.0, torch.float16)})


# -- projection ----------------------------------------------------------------------------------------------------------------


def test_the_nearest_product_and_its_error():
    p = product(5, 1.7, out=40, into=30)
    U, S, Vh = torch.linalg.svd(dense(p))
    near = projected(p, 3)
    assert (dense(near) - U[:, :3] * S[:3] @ Vh[:3]).norm() < 1e-5 * S.norm()
    assert near.error == pytest.approx((S[3:].norm() / S.norm()).item(), rel=1e-6)
    assert near.error == pytest.approx(((dense(near) - dense(p)).norm() / dense(p).norm()).item(), rel=1e-4)
    again = projected_dense(dense(p).float(), 3, p)
    assert (dense(again) - dense(near)).norm() < 1e-5 * S.norm()
    assert projected(p, 5) is p


# -- a reader that knows only r and lora_alpha ---------------------------------------------------------------------------------


def read_plainly(path, layer):
    """dW of a layer, as a server that looks at two numbers of the config computes it."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    A, B = (tensors[f"{PREFIX}{layer}.lora_{x}.weight"] for x in "AB")
    assert A.shape[0] == B.shape[1] == config["r"]
    return config["lora_alpha"] / config["r"] * (B.double() @ A.double())


def saved(path, family="llama", **config):
    model = base(family)
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "params": {"r": 4, "alpha": 6}, **config}), model)
    stir(model)
    save_adapter(model, path)
    return model


UNEVEN = {
    "target_modules": ["q_proj", "v_proj", "gate_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 3, "gate_proj": 5},
    "alpha_pattern": {"v_proj": 1.5},
    "params": {"r": 4, "alpha": 6, "scaling": "rslora"},
}


@pytest.mark.parametrize("profile", ["vllm", "sglang"])
def test_rslora_and_patterns_are_folded(profile, tmp_path):
    model = saved(tmp_path / "adapter", **UNEVEN)
    told = export(profile, Job(tmp_path / "adapter", tmp_path / "out"))
    assert "8 layers" not in told
    assert "r=5" in told
    for layer in (la for la in read_products(tmp_path / "adapter")):
        adapted = model.get_submodule(layer)
        weight = adapted.delta.dense(adapted.parts(torch.float64, parts=False))
        assert (read_plainly(tmp_path / "out", layer) - weight).abs().max() < 1e-6
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert not any(config[field] for field in ("use_rslora", "rank_pattern", "alpha_pattern"))
    again = base("llama")
    inject_peft_and_freeze(method_of(tmp_path / "out", again), again)
    load_adapter_weights(again, tmp_path / "out")
    assert (logits(again) - logits(model)).abs().max() < 1e-5
    with pytest.raises(AssertionError):  # and not folded, it would be read wrongly
        read_plainly(tmp_path / "adapter", "model.layers.1.self_attn.q_proj")


def test_a_plain_adapter_is_the_same_to_the_bit(tmp_path):
    saved(tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    for profile in ("peft", "vllm", "sglang"):
        export(profile, Job(tmp_path / "adapter", tmp_path / profile))
        ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", profile))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (tmp_path / "peft/adapter_config.json").read_bytes() == (tmp_path / "adapter/adapter_config.json").read_bytes()


def test_sglang_gets_the_parts_that_it_stacks(tmp_path):
    """q alone, and up alone: v and gate are written as zeros, of the base's sizes."""
    model = saved(tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    base("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(ExportError, match=r"gate_proj.*v_proj.*give model\.path"):
        export("sglang", Job(tmp_path / "adapter", tmp_path / "out"))
    assert "4 of them zero" in export("sglang", Job(tmp_path / "adapter", tmp_path / "out", tmp_path / "base"))
    stacked = [read_plainly(tmp_path / "out", f"model.layers.0.self_attn.{n}_proj") for n in "qv"]
    assert [tuple(t.shape) for t in stacked] == [(16, 16), (8, 16)]
    assert stacked[0].abs().max() > 0.01
    assert not stacked[1].any()
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"] == ["gate_proj", "q_proj", "up_proj", "v_proj"]
    again = base("llama")
    inject_peft_and_freeze(method_of(tmp_path / "out", again), again)
    load_adapter_weights(again, tmp_path / "out")
    assert (logits(again) - logits(model)).abs().max() < 1e-5


# -- other methods -------------------------------------------------------------------------------------------------------------


OTHERS = {
    "adalora": ({"kind": "adalora", "params": {"init_r": 4, "target_r": 2, "total_step": 10}}, None),
    "vera": ({"kind": "vera", "params": {"r": 6}}, None),
    "vblora": ({"kind": "vblora", "params": {"r": 3, "num_vectors": 12, "vector_length": 4}}, None),
    "randlora": ({"kind": "randlora", "params": {"r": 6}}, None),
    "loha": ({"kind": "loha", "params": {"r": 3}}, 16),
    "lokr": ({"kind": "lokr", "params": {"r": 3}}, 16),
    "dora": ({"kind": "lora", "params": {"r": 4, "alpha": 6, "use_dora": True}}, 16),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_a_product_is_exported_exactly(kind, tmp_path):
    """With full rank a projection is exact too; without a rank, what is no product is refused."""
    config, rank = OTHERS[kind]
    model = saved(tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **config)
    base("llama").save_pretrained(tmp_path / "base")
    job = Job(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    if rank:
        with pytest.raises(ExportError, match=r"Give rank=N for the nearest product"):
            export("vllm", job)
    export("vllm", replace(job, rank=rank))
    assert (logits(model) - logits(base("llama"))).abs().max() > 1e-2
    again = base("llama")
    inject_peft_and_freeze(method_of(tmp_path / "out", again), again)
    load_adapter_weights(again, tmp_path / "out")
    assert (logits(again) - logits(model)).abs().max() < 2e-5
    assert sketch_of_model(model).layers == sketch_of_directory(tmp_path / "adapter", tmp_path / "base").layers
    if kind == "loha":
        told = export("vllm", replace(job, rank=4, output=tmp_path / "small"))
        assert "relative error of dW up to" in told
        assert json.loads((tmp_path / "small/adapter_config.json").read_text())["r"] == 4


def test_a_rank_that_is_too_high_is_cut(tmp_path):
    saved(tmp_path / "adapter", **UNEVEN)
    told = export("vllm", Job(tmp_path / "adapter", tmp_path / "out", rank=2))
    errors = []
    for layer, p in read_products(tmp_path / "adapter").items():
        U, S, Vh = torch.linalg.svd(dense(p))
        assert (read_plainly(tmp_path / "out", layer) - U[:, :2] * S[:2] @ Vh[:2]).norm() < 1e-5 * S.norm()
        errors.append((S[2:].norm() / S.norm()).item())
    assert f"up to {max(errors):.2e}" in told


def test_merged_is_the_merge(tmp_path):
    saved(tmp_path / "adapter", target_modules=["q_proj"])
    base("llama").save_pretrained(tmp_path / "base")
    export("merged", Job(tmp_path / "adapter", tmp_path / "one", tmp_path / "base"))
    with pytest.raises(ExportError, match="leave rank out"):
        export("merged", Job(tmp_path / "adapter", tmp_path / "two", tmp_path / "base", rank=2))
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


# -- what consumers refuse, or leave out in silence ----------------------------------------------------------------------------


REFUSED = [
    ("vllm", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head: trained whole"),
    ("vllm", "qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}, "trained biases"),
    ("vllm", "llama", {"target_modules": ["q_proj"], "params": {"r": 4, "alpha": 6, "use_dora": True}}, "DoRA; vLLM has no magnitudes"),
    ("vllm", "llama", {"target_modules": ["q_proj"], "params": {"r": 600, "alpha": 6}}, "rank above 512"),
    ("vllm", "qwen2", {"target_modules": ["q_proj"], "params": {"r": 4, "alpha": 6, "lora_bias": True}}, "the bias of B"),
    ("vllm", "gpt2", {"target_modules": ["wte"]}, "vLLM adapts one that is called embed_tokens"),
    ("vllm", "llama", {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, "stand there once"),
    ("sglang", "llama", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["model.norm"]}, "model.norm: trained whole"),
    ("sglang", "gpt2", {"target_modules": ["c_attn"]}, "leaves all else out"),
    ("sglang", "llama", {"target_modules": ["v_proj"]}, "not adapted, and SGLang stacks"),
    ("llamacpp", "llama", {"target_modules": ["q_proj"], "params": {"r": 4, "alpha": 6, "use_dora": True}}, "DoRA; llama.cpp has no"),
    ("mlx", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head: trained whole"),
]


@pytest.mark.parametrize("profile,family,config,said", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_faults_are_told_of_a_model_and_of_its_directory_alike(profile, family, config, said, tmp_path):
    model = saved(tmp_path / "adapter", family, **config)
    faults = PROFILES[profile].faults(sketch_of_model(model), None)
    assert any(said in fault for fault in faults), faults
    assert PROFILES[profile].faults(sketch_of_directory(tmp_path / "adapter"), None) == faults


def test_nothing_is_left_behind_and_nothing_is_replaced(tmp_path):
    saved(tmp_path / "adapter", target_modules=["q_proj"])
    job = Job(tmp_path / "adapter", tmp_path / "out")
    for profile, job_, said in (
        ("vllm", replace(job, rank=0), "at least 1"),
        ("mlx", job, "needs the base"),
        ("other", job, "expected one of"),
        ("peft", replace(job, adapter=tmp_path / "adapter/adapter_model.safetensors"), "expected a directory"),
    ):
        with pytest.raises(ExportError, match=said):
            export(profile, job_)
    (tmp_path / "out").mkdir()
    for profile in ("peft", "vllm"):
        with pytest.raises(AdapterError, match="exists already"):
            export(profile, job)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        export("vllm", replace(job, output=tmp_path / "new"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_base_weight_beside_the_factors(tmp_path):
    """PEFT keeps the embedding's own weight in the file: harmless if it is the base's, and lost if it is not."""
    saved(tmp_path / "adapter", target_modules=["embed_tokens", "q_proj", "v_proj"])
    base("llama").save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter/adapter_model.safetensors"
    copy = base("llama").model.embed_tokens.weight.detach().clone()
    save_file({**load_file(file), f"{PREFIX}model.embed_tokens.base_layer.weight": copy}, file, {"format": "pt"})
    export("vllm", Job(tmp_path / "adapter", tmp_path / "out", tmp_path / "base"))
    assert not any("base_layer" in key for key in load_file(tmp_path / "out/adapter_model.safetensors"))
    copy[0, 0] += 1
    save_file({**load_file(file), f"{PREFIX}model.embed_tokens.base_layer.weight": copy}, file, {"format": "pt"})
    with pytest.raises(ExportError, match="a base weight beside its factors"):
        export("vllm", Job(tmp_path / "adapter", tmp_path / "out2", tmp_path / "base"))


def test_small_rules():
    assert [vllm_rank(r) for r in (1, 2, 8, 33, 512)] == [1, 8, 8, 64, 512]
    of_config = typing.get_args(typing.get_args(ExportConfig.model_fields["profiles"].annotation)[0])
    assert set(of_config) == PROFILES.keys() - {"merged"}


# -- in a run, and from the command line ------------------------------------------------------------------------------------------


def test_a_run_leaves_its_exports(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("d9d_lora.train.report.Tracker.say", lambda self, line: told.append(line))
    assets = small_run.make_assets(tmp_path / "assets")
    options = {"model__dtype": "float32", "train__steps": 2, "peft": {"kind": "lora", "target_modules": "all-linear", "params": {"r": 4}}}
    config = small_run.config_of(assets, tmp_path / "run", **options, export={"profiles": ["vllm", "sglang", "mlx"]})
    world = small_run.join(small_run.device_of("cpu"), config.parallel, 60)
    small_run.Trainer(config, world).run()
    assert sorted(p.name for p in (tmp_path / "run/export").iterdir()) == ["mlx", "sglang", "vllm"]
    assert len([line for line in told if line.startswith("export: ")]) == 3
    small_run.Trainer(config, world).run()  # again: they are replaced


def test_a_run_that_nobody_could_load_does_not_begin(tmp_path):
    assets = small_run.make_assets(tmp_path / "assets")
    peft = {"kind": "lora", "target_modules": "all-linear", "params": {"r": 4, "use_dora": True}}
    config = small_run.config_of(assets, tmp_path / "run", peft=peft, export={"profiles": ["peft", "vllm", "mlx"]})
    with pytest.raises(ExportError, match=r"vllm: .*DoRA"):
        small_run.Trainer(config, small_run.join(small_run.device_of("cpu"), config.parallel, 60))


def test_the_command(tmp_path, monkeypatch, capsys):
    import runpy
    import sys

    saved(tmp_path / "adapter", target_modules=["q_proj"])
    command = runpy.run_path(str(ROOT / "launch/export.py"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch/export.py", *arguments])
        return command["run"]("launch/export.py", "", command["KEYS"], command["main"])

    given = ("profile=vllm", f"adapter={tmp_path / 'adapter'}", f"output={tmp_path / 'out'}")
    assert call(*given) == 0
    assert "max-lora-rank 8" in capsys.readouterr().out
    assert call(*given) == 1
    assert "exists already" in capsys.readouterr().err
    assert call("profile=tgi", *given[1:]) == 2
    assert "expected one of peft, vllm" in capsys.readouterr().err
