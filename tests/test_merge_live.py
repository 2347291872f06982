"""The merged model of a live job: the bytes of a merge of files, on every layout, and the job goes on as if nothing had been."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config
from d9d_lora.placement import full_of, local_of
from d9d_lora.state import live_model, merge_live
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.merge_live import save_merged
from d9d_lora.state.native_format import save_trained
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_kinds import holds
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.walk import adapted_layers
from tests.catalogue import EVERY_CELL, LAYERS, LAYOUTS, METHODS, build
from tests.parity.test_peft_format import logits, stir
from tests.parity.test_peft_kinds import model_of
from tests.test_laws import backward, make, wake

MODEL = "model.safetensors"
# PEFT's files do not say which parameter a factor is for; [Note: a parameter's key] there.
BARE = ("parameter", "experts")


def base_dir(layer, root):
    """The model of the catalogue as a checkpoint."""
    root.mkdir(exist_ok=True)
    save_file({n: p.detach().clone() for n, p in build(layer, quantise=False).named_parameters()}, root / MODEL, {"format": "pt"})
    (root / "config.json").write_text('{"model_type": "toy"}')
    return root


def awake(method, layer, layout="one"):
    model, m = make(method, layer, LAYOUTS[layout])
    wake(model)
    return model, m


ONLY = {"lora", "patterns", "dora", "adalora", "lokr", "vblora", "loha_tucker", "merged"}  # on the other layers, unless every cell is tried


def cells(layer):
    row = [m for m in METHODS if layer not in METHODS[m].refuses and layer not in METHODS[m].unmerged]
    row = [m for m in row if m not in ("rslora", "gaussian", "dora_rslora", "orthogonal", "pissa_rounds", "olora")]
    return row if EVERY_CELL or layer == "linear_bias" else [m for m in row if m in ONLY]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_method_in_files_is_the_merge_in_memory(tmp_path, layer):
    """From a live model, from our own directory and from PEFT's, the same bytes; in memory the same to rounding."""
    source = base_dir(layer, tmp_path / "base")
    for method in cells(layer):
        root = tmp_path / method
        model, m = awake(method, layer)
        save_merged(model, root / "live", base=source, dequantise=True)
        live = load_file(root / "live" / MODEL)
        moved = any(la.delta.moves_base for la in adapted_layers(model))
        if layer != "nf4":
            formats = []
            if holds(adapted_layers(model)) and layer not in BARE:
                save_adapter(model, root / "peft")
                formats.append("peft")
            if not moved:
                save_trained(m.compact(model, {n: p for n, p in model.named_parameters() if p.requires_grad}), m.config, root / "native")
                formats.append("native")
            for name in formats:
                merge_files(root / name, source, root / f"{name}_merged")
                found = load_file(root / f"{name}_merged" / MODEL)
                same = all(torch.equal(found[n], live[n]) for n in live)
                turned = method.startswith("randlora") and name == "native"  # dW^T of its transpose: rounded otherwise
                assert same or moved or turned, (method, name)
                assert max(float((found[n] - live[n]).abs().max()) for n in live) < 1e-14
        merge_peft(m, model)
        assert max(float((p.detach() - live[n]).abs().max()) for n, p in model.named_parameters()) < 1e-14, method


def job(rank, root, layout, cells_):
    """Saves on a layout; what the model holds is as it was, to the bit."""
    kept = {}
    for method, layer in cells_:
        model, _ = awake(method, layer, layout)
        before = {n: local_of(p).detach().clone() for n, p in model.named_parameters()}
        model(torch.zeros(2, 4, dtype=torch.long))  # FSDP2 holds gathered weights now
        save_merged(model, Path(root, f"{method}_{layer}"), base=Path(root, f"base_{layer}"), dequantise=True)
        after = {n: local_of(p) for n, p in model.named_parameters()}
        kept[method, layer] = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return kept


SHARDED = [
    ("lora_bias", "linear_bias"),
    ("lokr", "linear_bias"),
    ("vblora", "linear_bias"),
    ("dora", "embedding"),
    ("loha", "conv2d"),
    ("lora", "experts"),
    ("lora", "nf4"),
]


@pytest.mark.parametrize("layout", ["tp2", "hsdp2x2", "fsdp2_tp2"])
def test_every_layout_writes_the_same_bytes(pool, tmp_path, layout):
    for layer in {layer for _, layer in SHARDED}:
        base_dir(layer, tmp_path / f"base_{layer}")
    for kept in pool.run(LAYOUTS[layout].world, job, str(tmp_path), layout, SHARDED):
        assert all(kept.values()), kept
    for method, layer in SHARDED:
        model, _ = awake(method, layer)
        save_merged(model, tmp_path / "one" / f"{method}_{layer}", base=tmp_path / f"base_{layer}", dequantise=True)
        name = f"{method}_{layer}/{MODEL}"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / name).read_bytes(), (method, layer)


def interrupted(rank, root, layout, save):
    """Four steps with AdamW, with a merged model written after the second, or not; the parameters and the moments at the end."""
    model, _ = awake("dora", "linear_bias", layout)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        backward(model, LAYOUTS[layout], step)
        if step == 2 and save:
            save_merged(model, Path(root, "merged"))  # gradients are there, and stay
        optimiser.step()
        optimiser.zero_grad()
    moments = [local_of(t).clone() for state in optimiser.state.values() for t in state.values()]
    return [local_of(p).detach().clone() for p in model.parameters()] + moments


@pytest.mark.parametrize("layout", ["hsdp2x2", "fsdp2_tp2"])
def test_training_goes_on_as_if_nothing_had_been(pool, tmp_path, layout):
    world = LAYOUTS[layout].world
    alone, beside = (pool.run(world, interrupted, str(tmp_path), layout, save) for save in (False, True))
    assert (tmp_path / "merged" / MODEL).is_file()
    assert all(torch.equal(a, b) for one, other in zip(alone, beside) for a, b in zip(one, other, strict=True))


def broken(rank, root, what):
    """Saves with a part of it exchanged; the error, if there is one."""
    model, _ = awake("lora", "linear", "fsdp2")
    patch = pytest.MonkeyPatch()
    if what == "a box in another place":
        patch.setattr(live_model, "_place", lambda whole, part, runs: whole[: part.shape[0]].copy_(part))
    if what == "the disk is full" and rank == 0:
        patch.setattr(merge_live, "build", lambda *a, **k: (_ for _ in ()).throw(OSError(what)))
    if what == "out of memory" and rank == 1:
        patch.setattr(live_model, "local_of", lambda t: (_ for _ in ()).throw(RuntimeError(what)))
    try:
        save_merged(model, Path(root, "out"), base=Path(root, "base"))
        return None
    except AdapterError as error:
        return str(error)
    finally:
        patch.undo()


def test_mutation_a_box_in_another_place(pool, tmp_path):
    base_dir("linear", tmp_path / "base")
    pool.run(2, broken, str(tmp_path), "a box in another place")
    model, _ = awake("lora", "linear")
    save_merged(model, tmp_path / "one", base=tmp_path / "base")
    assert (tmp_path / "one" / MODEL).read_bytes() != (tmp_path / "out" / MODEL).read_bytes()


@pytest.mark.parametrize("what", ["the disk is full", "out of memory"])
def test_a_failure_of_one_rank_is_an_error_on_every_rank(pool, tmp_path, what):
    """On rank 0, which writes; on rank 1, which only sends."""
    base_dir("linear", tmp_path / "base")
    assert all(what in error for error in pool.run(2, broken, str(tmp_path), what))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


HUGGING_FACE = {
    "gpt2": ({"target_modules": ["c_attn"]}, 2),
    "llama": ({"target_modules": ["q_proj", "embed_tokens"]}, 3),
    "tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, 3),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_hugging_face_model_loads_with_and_without_its_base(tmp_path, kind):
    """Named and cut as the base; without it, as Hugging Face would. A tied head is written once, with or without an adapter."""
    config, merged = HUGGING_FACE[kind]
    model = model_of(kind)
    model.save_pretrained(tmp_path / "base", max_shard_size="12KB")
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", **config, "params": {"r": 4, "alpha": 6}}), model)
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "files")
    report = save_merged(model, tmp_path / "live", base=tmp_path / "base")
    assert (report.merged, report.replaced) == (merged, 0)
    for file in (tmp_path / "files").iterdir():
        assert file.read_bytes() == (tmp_path / "live" / file.name).read_bytes(), file.name
    save_merged(model, tmp_path / "own", max_shard_size=12_000)
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    for path in ("live", "own"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / path).eval()
        assert (logits(again) - logits(model)).abs().max() < 2e-5
    assert json.loads((tmp_path / "own/config.json").read_text())["architectures"] == [type(model).__name__]


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tmp_path):
    model, _ = awake("lora", "nf4")
    with pytest.raises(AdapterError, match=r"quantised \(our NF4\)"):
        save_merged(model, tmp_path / "out")
    model, _ = awake("lora_bias", "linear_bias")
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterError, match="exists already"):
        save_merged(model, tmp_path / "out")
    (tmp_path / "out").rmdir()
    with pytest.raises(AdapterError, match="in no file of the base"):
        save_merged(model, tmp_path / "out", base=base_dir("conv2d", tmp_path / "base"))
    with torch.no_grad():
        next(adapted_layers(model)).factor("lora_A").fill_(float("nan"))
    with pytest.raises(AdapterError, match="not finite"):
        save_merged(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def measured(rank, root):
    model, _ = awake("lora", "linear_bias", "fsdp2")
    seen = []
    real = live_model.Live._together

    def watch(self, tensor):
        whole = real(self, tensor)
        seen.append(self.most)
        return whole

    live_model.Live._together = watch
    try:
        save_merged(model, Path(root, "out"))
    finally:
        live_model.Live._together = real
    return max(seen), max(full_of(p.detach()).nbytes for p in model.parameters())


def test_memory_is_less_than_two_of_the_largest_tensor(pool, tmp_path):
    """Of tensors on their way; rank 1 holds none."""
    (most, largest), (elsewhere, _) = pool.run(2, measured, str(tmp_path))
    assert largest < most <= 1.5 * largest
    assert elsewhere == 0
