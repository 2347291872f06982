"""Merging file to file: as the adapted model in memory, in little memory, all or nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.state import merge_edit, merge_work
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.peft_format import AdapterError, save_adapter
from d9d_lora.state.safetensors_dir import CheckpointError
from tests.parity.test_peft_format import CASES, adapted, base, logits

ROOT = Path(__file__).parents[1]


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def saved(case, tmp_path, **options):
    """(adapted model, base directory, adapter directory)"""
    kind, model = adapted(case)
    base(kind).save_pretrained(tmp_path / "base", **options)
    (tmp_path / "base/tokenizer.json").write_text("{}")
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_merged_files_are_the_adapted_model(case, tmp_path):
    model, source, adapter = saved(case, tmp_path, max_shard_size="12KB")
    merge_files(adapter, source, tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - logits(model)).abs().max() < 2e-5
    assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in (tmp_path / "merged").iterdir())
    index = "model.safetensors.index.json"
    assert (source / index).read_bytes() == (tmp_path / "merged" / index).read_bytes()
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "merged" / file.name, "pt") as new:
            assert (old.metadata(), old.offset_keys()) == (new.metadata(), new.offset_keys())


def test_an_adapter_that_changes_nothing_gives_the_same_bytes(tmp_path):
    model = base("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="12KB")
    config = {"kind": "lora", "target_modules": ["q_proj"], "params": {"r": 4, "alpha": 6}}
    inject_peft_and_freeze(peft_method_from_config(config), model)
    save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    for file in (tmp_path / "base").iterdir():
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes()


def test_half_precision_is_rounded_once(tmp_path):
    _, model = adapted("llama")
    half = base("llama").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    exact = half.get_parameter(f"{name}.weight").double() + layer.delta.scaling * (
        layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    )
    merged = load_file(tmp_path / "merged/model.safetensors")[f"{name}.weight"]
    assert (merged != exact.to(torch.bfloat16)).float().mean() < 0.01
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_dtype_of_the_output(tmp_path):
    model, source, adapter = saved("llama", tmp_path, max_shard_size="12KB")
    merge_files(adapter, source, tmp_path / "merged", dtype=torch.bfloat16)
    result = load(tmp_path / "merged")
    assert result.dtype == torch.bfloat16
    assert (logits(result).float() - logits(model)).abs().max() < 0.1
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    held = sum(t.nbytes for f in (tmp_path / "merged").glob("*.safetensors") for t in load_file(f).values())
    assert index["metadata"]["total_size"] == held


def test_gpt2_as_the_hub_has_it(tmp_path):
    """No `transformer.` prefix, buffers of masks, and square transposed matrices."""
    model, source, adapter = saved("gpt2", tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.tril(torch.ones(16, 16)).bool()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    merge_files(adapter, source, tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - logits(model)).abs().max() < 2e-5
    change(adapter, fan_in_fan_out=False)
    with pytest.raises(AdapterError, match="fit only transposed"):
        merge_files(adapter, source, tmp_path / "again")


def test_square_conv1d_with_a_careless_config_is_refused(tmp_path):
    model = base("gpt2")
    model.save_pretrained(tmp_path / "base")
    method = peft_method_from_config({"kind": "lora", "target_modules": ["attn.c_proj"]})
    inject_peft_and_freeze(method, model)
    save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    change(tmp_path / "adapter", fan_in_fan_out=False)
    with pytest.raises(AdapterError, match="are square"):
        merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "again")


def change(path, **fields):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_one_side_of_tied_embeddings_is_refused(tmp_path, target):
    model = base("gpt2")
    model.save_pretrained(tmp_path / "base")
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "target_modules": [target]}), model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="one side only"):
        merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("equal", [True, False])
def test_both_sides_of_tied_embeddings(tmp_path, equal):
    model = base("gpt2")
    model.save_pretrained(tmp_path / "base")
    config = {"kind": "lora", "target_modules": ["c_fc"], "modules_to_save": ["wte", "lm_head"]}
    inject_peft_and_freeze(peft_method_from_config(config), model)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    save_adapter(model, tmp_path / "adapter")
    if equal:
        merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
        assert (logits(load(tmp_path / "merged")) - logits(model)).abs().max() < 2e-5
        return
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match="differently"):
        merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    _, source, adapter = saved("llama", tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers"

    def refused(changed, said, error=AdapterError):
        save_file({k: v.clone() for k, v in changed.items()}, file, {"format": "pt"})
        with pytest.raises(error, match=said):
            merge_files(adapter, source, tmp_path / "merged")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]

    a, b = f"{prefix}.0.self_attn.q_proj.lora_A.weight", f"{prefix}.0.self_attn.q_proj.lora_B.weight"
    refused({**tensors, a.replace(".0.", ".7."): tensors[a], b.replace(".0.", ".7."): tensors[b]}, "in no file")
    refused({**tensors, f"{prefix}.0.input_layernorm.weigh": torch.ones(16)}, "near 'model.layers")
    refused({**tensors, a: torch.zeros(4, 15)}, "do not fit")
    refused({**tensors, a: tensors[a] * float("inf")}, "not finite")
    refused({k: v for k, v in tensors.items() if k != b}, "lack their partner")


def test_an_overflow_is_refused(tmp_path):
    _, source, adapter = saved("llama", tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file({k: v * 1e4 for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(AdapterError, match="overflow"):
        merge_files(adapter, source, tmp_path / "merged", dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_output_must_not_exist(tmp_path):
    _, source, adapter = saved("llama", tmp_path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(AdapterError, match="exists already"):
        merge_files(adapter, source, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="no directory"):
        merge_files(adapter, tmp_path / "nowhere", tmp_path / "other")


def test_only_harmless_files_are_copied(tmp_path):
    _, source, adapter = saved("llama", tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text("not yours")
    os.symlink(secret, source / "readme.txt")
    (source / "pytorch_model.bin").write_text("pickle")
    (source / "adapter_config.json").write_text("{}")
    (source / ".cache").mkdir()
    (source / ".cache/x").write_text("x")
    (source / "templates").mkdir()
    (source / "templates/tool.jinja").write_text("{{ x }}")
    merge_files(adapter, source, tmp_path / "merged")
    found = {p.relative_to(tmp_path / "merged").as_posix() for p in (tmp_path / "merged").rglob("*") if p.is_file()}
    assert found == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "templates/tool.jinja",
        "tokenizer.json",
    }


@pytest.mark.parametrize("wrong", ["q_proj", "k_proj"])
def test_a_wrong_byte_is_found_when_it_is_read_back(tmp_path, monkeypatch, wrong):
    """q_proj is merged, k_proj only copied."""
    _, source, adapter = saved("llama", tmp_path)
    write = merge_work.write_safetensors

    def flip(path, promises, blocks_of, metadata):
        def values(name):
            for block in blocks_of(name):
                yield block * 1.001 if f"1.self_attn.{wrong}" in name else block

        write(path, promises, values, metadata)

    monkeypatch.setattr(merge_work, "write_safetensors", flip)
    with pytest.raises(AdapterError, match=wrong):
        merge_files(adapter, source, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merge_by_blocks_is_the_merge_at_once(tmp_path, monkeypatch):
    for case in ("llama", "gpt2", "embedding"):
        root = tmp_path / case.replace(" ", "_")
        root.mkdir()
        model, source, adapter = saved(case, root)
        monkeypatch.setattr(merge_edit, "BLOCK", 50)
        merge_files(adapter, source, root / "merged")
        assert (logits(load(root / "merged")) - logits(model)).abs().max() < 2e-5


MEASURE = """
import re, sys, threading, time, torch
from d9d_lora.state.merge_files import merge_files
def anonymous():  # bytes that are the process's own; pages of mapped files may go at any time
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.ones(512, 512) @ torch.ones(512, 512)
before, peak, stop = anonymous(), [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
merge_files(*sys.argv[1:4])
stop.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_memory_is_a_few_blocks(tmp_path):
    """Five tensors of 32 MiB: the merge's own memory stays below two of them."""
    one = 32 << 20
    source, adapter = tmp_path / "base", tmp_path / "adapter"
    source.mkdir()
    adapter.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    save_file({f"l{i}.weight": torch.ones(2048, one // 2048 // 4) for i in range(5)}, source / "model.safetensors")
    factors = {}
    for i in range(4):
        factors[f"base_model.model.l{i}.lora_A.weight"] = torch.ones(4, one // 2048 // 4)
        factors[f"base_model.model.l{i}.lora_B.weight"] = torch.ones(2048, 4)
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, adapter, source, tmp_path / "merged"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * one, f"{int(done.stdout) / one:.2f} of the largest tensor"
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert (merged["l3.weight"] == 9).all()
    assert (merged["l4.weight"] == 1).all()


def command(script, *arguments):
    return subprocess.run([sys.executable, ROOT / "launch" / script, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command(tmp_path):
    model, source, adapter = saved("llama", tmp_path)
    arguments = [f"adapter={adapter}", f"model.path={source}", f"output={tmp_path / 'merged'}"]
    done = command("merge.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "4 tensors merged" in done.stdout
    assert (logits(load(tmp_path / "merged")) - logits(model)).abs().max() < 2e-5
    again = command("merge.py", *arguments)
    assert (again.returncode, "exists already" in again.stderr, "Traceback" in again.stderr) == (1, True, False)
    assert "usage: python launch/merge.py" in command("merge.py", "--help").stdout
    wrong = command("merge.py", "modelpath=x")
    assert wrong.returncode == 2
    assert "did you mean model.path=" in wrong.stderr
