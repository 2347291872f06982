"""Merging file to file: as the adapted model in memory, in little memory, all or nothing."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d9d_lora import files, inject_peft_and_freeze, peft_method_from_config
from d9d_lora.quant import nf4
from d9d_lora.state import merge_edit, merge_probe, merge_work
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.state.safetensors_dir import CheckpointError
from tests.parity.test_peft_format import CASES, SMALL, adapted, base, logits, stir
from tests.tiny_tokenizer import tiny_tokenizer

peft = pytest.importorskip("peft")

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


def kill_after(monkeypatch, shards, error=KeyboardInterrupt):
    """A merge that dies while it writes the next shard, with that shard half written."""
    real, written = merge_work.write_safetensors, []

    def write(path, promises, blocks_of, metadata):
        if len(written) == shards:
            path.write_bytes(b"half")
            raise error
        written.append(path.name)
        real(path, promises, blocks_of, metadata)

    monkeypatch.setattr(merge_work, "write_safetensors", write)
    return written


def tree(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_killed_merge_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    _, source, adapter = saved("llama", tmp_path, max_shard_size="8KB")
    merge_files(adapter, source, tmp_path / "whole")
    files = sorted(p.name for p in source.glob("*.safetensors"))
    assert len(files) == 3
    kill_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        merge_files(adapter, source, tmp_path / "merged")
    monkeypatch.undo()
    assert not (tmp_path / "merged").exists()
    half = tmp_path / ".tmp_merged/model"
    (half / files[1]).write_bytes((half / files[0]).read_bytes())  # a finished shard that has rotted is made anew
    written = kill_after(monkeypatch, len(files))
    report = merge_files(adapter, source, tmp_path / "merged")
    assert (report.kept, written) == (1, [f"{name}.part" for name in files[1:]])
    assert "1 finished shards" in str(report)
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged", "whole"]


@pytest.mark.parametrize("what", ["adapter", "base", "dtype"])
def test_other_inputs_start_anew(tmp_path, monkeypatch, what):
    _, source, adapter = saved("llama", tmp_path, max_shard_size="8KB")
    kill_after(monkeypatch, 2, OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        merge_files(adapter, source, tmp_path / "merged")
    monkeypatch.undo()
    if what == "adapter":
        file = adapter / "adapter_model.safetensors"
        save_file({k: v * 2 for k, v in load_file(file).items()}, file, {"format": "pt"})
    if what == "base":
        os.utime(source / "config.json", (1, 1))
    options = {"dtype": torch.bfloat16} if what == "dtype" else {}
    report = merge_files(adapter, source, tmp_path / "merged", **options)
    assert report.kept == 0
    assert f"made of other inputs ({what})" in report.notes[0]
    merge_files(adapter, source, tmp_path / "whole", **options)
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")


def test_a_process_that_is_killed_leaves_its_shards_and_no_lock(tmp_path):
    """Killed after the second line of the journal, as no `finally` can notice."""
    _, source, adapter = saved("llama", tmp_path, max_shard_size="8KB")
    real, left = merge_work.write_text, [2]

    def write_text(path, text):
        real(path, text)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        merge_work.write_text = write_text
        merge_files(adapter, source, tmp_path / "merged")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    report = merge_files(adapter, source, tmp_path / "merged")
    assert (report.kept, report.notes) == (2, ())
    assert logits(load(tmp_path / "merged")).isfinite().all()


def test_two_merges_into_one_place(tmp_path, monkeypatch):
    _, source, adapter = saved("llama", tmp_path)
    real = merge_work.write_safetensors

    def meanwhile(*arguments):
        with pytest.raises(AdapterError, match="another process"):
            merge_files(adapter, source, tmp_path / "merged")
        real(*arguments)

    monkeypatch.setattr(merge_work, "write_safetensors", meanwhile)
    merge_files(adapter, source, tmp_path / "merged")


def test_a_vocabulary_that_has_grown(tmp_path):
    """PEFT saves both embeddings with the adapter once they were resized; the merged model has their rows, and the adapter's tokenizer."""
    _, source, _ = saved("llama", tmp_path, max_shard_size="8KB")
    model, rows = load(source), 41
    model.resize_token_embeddings(rows, mean_resizing=False)
    config = {"kind": "lora", "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "params": {"r": 4, "alpha": 6}}
    inject_peft_and_freeze(peft_method_from_config(config), model)
    stir(model)
    save_adapter(model, tmp_path / "grown")
    (tmp_path / "grown/tokenizer.json").write_text('{"new": 1}')
    report = merge_files(tmp_path / "grown", source, tmp_path / "merged")
    assert "41 rows" in report.notes[0]
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == rows
    assert (tmp_path / "merged/tokenizer.json").read_text() == '{"new": 1}'
    assert (logits(load(tmp_path / "merged")) - logits(model)).abs().max() < 2e-5
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    merged = [t for f in (tmp_path / "merged").glob("*.safetensors") for t in load_file(f).values()]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged)
    file = tmp_path / "grown/adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lm_head" not in k}, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"not of all its tensors.*'lm_head.weight': 37.*'model.embed_tokens.weight': 41"):
        merge_files(tmp_path / "grown", source, tmp_path / "again")


def test_an_adapted_embedding_that_has_grown(tmp_path):
    """PEFT keeps the resized base weight beside the factors of an adapted embedding: the update is added to that."""
    _, source, _ = saved("llama", tmp_path)
    model = load(source)
    model.resize_token_embeddings(41, mean_resizing=False)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]))
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    merge_files(tmp_path / "theirs", source, tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - logits(theirs.eval())).abs().max() < 2e-5
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="trained on another base"):
        merge_files(tmp_path / "theirs", source, tmp_path / "again")


def quantised(source, kind):
    """The base's linear weights packed; the weights as they unpack."""
    tensors, plain = load_file(source / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w = tensors.pop(name)
        if kind == "ours":
            packed = nf4.quantise(w, block=8)
            plain[name] = nf4.dequantise(packed, w.shape[1], 8, torch.float32)
            stem = name.removesuffix(".weight")
            tensors |= {name: packed.weight, f"{stem}.absmax": packed.absmax, f"{stem}.span": packed.span}
            continue
        code, blocks = torch.tensor(nf4.CODE), w.reshape(-1, 64)
        m = blocks.abs().amax(1)
        c = (blocks / m[:, None])[..., None].sub(code).abs().argmin(-1).flatten()
        offset = m.mean()
        m2, code2 = (m - offset).abs().max(), torch.linspace(-1, 1, 256)
        a = ((m - offset) / m2)[:, None].sub(code2).abs().argmin(1)
        plain[name] = (code[c].reshape(-1, 64) * (code2[a] * m2 + offset)[:, None]).reshape(w.shape)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(w.shape)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors |= {
            name: (c[::2] * 16 + c[1::2]).to(torch.uint8)[:, None],
            f"{name}.absmax": a.to(torch.uint8),
            f"{name}.quant_map": code,
            f"{name}.nested_absmax": m2[None],
            f"{name}.nested_quant_map": code2,
            f"{name}.quant_state.bitsandbytes__nf4": told,
        }
    save_file({k: v.contiguous() for k, v in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    change_config(source, quantization_config={"quant_method": "bitsandbytes" if kind != "ours" else "nf4"})
    return plain


def change_config(source, **fields):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(("kind", "said"), [("ours", "our NF4"), ("bitsandbytes", "bitsandbytes nf4")])
def test_a_quantised_base_is_refused_unless_asked(tmp_path, kind, said):
    model, source, adapter = saved("llama", tmp_path)
    plain = quantised(source, kind)
    with pytest.raises(AdapterError, match=f"quantised .{said}.*dequantise=true"):
        merge_files(adapter, source, tmp_path / "merged")
    report = merge_files(adapter, source, tmp_path / "merged", dequantise=True)
    assert f"weights of the quantised base ({said}) were unpacked" in report.notes[0]
    with torch.no_grad():
        for name, value in plain.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            getattr(layer, "base", layer).weight.copy_(value)
    result = load(tmp_path / "merged")
    assert (logits(result) - logits(model)).abs().max() < 2e-5
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


@pytest.mark.parametrize(
    ("tensor", "said"), [("q_proj.qweight", "gptq"), ("q_proj.SCB", "LLM.int8"), ("q_proj.weight_scale_inv", "FP8")]
)
def test_a_kind_of_packing_that_is_not_unpacked_is_named(tmp_path, tensor, said):
    _, source, adapter = saved("llama", tmp_path)
    file = source / "model.safetensors"
    save_file({**load_file(file), f"model.layers.0.self_attn.{tensor}": torch.ones(2, dtype=torch.int32)}, file, {"format": "pt"})
    change_config(source, **({"quantization_config": {"quant_method": "gptq"}} if said == "gptq" else {}))
    with pytest.raises(AdapterError, match=f"quantised .*{said}.*original"):
        merge_files(adapter, source, tmp_path / "merged", dequantise=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_an_adapter_in_one_file(tmp_path, suffix):
    model, source, adapter = saved("llama", tmp_path)
    files.save_adapter(model, tmp_path / f"one{suffix}")
    merge_files(adapter, source, tmp_path / "merged")
    merge_files(tmp_path / f"one{suffix}", source, tmp_path / "again")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-6


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


def test_the_command_compares_logits(tmp_path, capsys):
    """The gap is that of rounded weights: with dtype=float32 it is that of a sum, in bfloat16 larger; a merge that is wrong is seen."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    config = {**SMALL, "vocab_size": len(tokenizer)}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    inject_peft_and_freeze(peft_method_from_config({"kind": "loha", "target_modules": ["q_proj", "up_proj"], "params": {"r": 2}}), model)
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    text = "what is the name of a city"
    given = {"adapter": "adapter", "model.path": "base", "output": "merged"}
    main = runpy.run_path(str(ROOT / "launch/merge.py"))["main"]
    main({**{k: str(tmp_path / v) for k, v in given.items()}, "dtype": "bfloat16", "dequantise": "false", "probe": text})
    told = json.loads((tmp_path / "merged/merge_report.json").read_text())["logits"]
    assert "logits of the merged model (bfloat16) differ" in capsys.readouterr().out
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "exact")
    texts = merge_probe.texts_of(text)
    exact = merge_probe.probe(tmp_path / "adapter", tmp_path / "base", tmp_path / "exact", texts)
    assert exact.largest < 1e-5 < told["largest"] < 0.1 * told["adapter"]
    assert exact.mean <= exact.largest
    wrong = merge_probe.probe(tmp_path / "adapter", tmp_path / "base", copy_of(tmp_path / "base", tmp_path / "wrong"), texts)
    assert wrong.largest == pytest.approx(wrong.adapter)


def copy_of(source, target):
    shutil.copytree(source, target)
    return target
