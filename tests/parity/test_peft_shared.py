"""VB-LoRA, VeRA and RandLoRA as PEFT directories: methods whose layers share a tensor. The real PEFT reads ours, and we read PEFT's."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.placement import local_of
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.state.safetensors_dir import CheckpointError
from tests.catalogue import LAYOUTS
from tests.parity.test_peft_format import base, logits, stir
from tests.test_laws import make, wake

peft = pytest.importorskip("peft")
FILE = "adapter_model.safetensors"
ATTENTION, EVERY = ["q_proj", "v_proj"], ["q_proj", "v_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj"]
BANK = {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 2}
CLASSES = {"vblora": "VBLoRAConfig", "vera": "VeraConfig", "randlora": "RandLoraConfig"}

# name -> base, kind, params, and what stands beside them in the config
CASES = {
    "vblora": ("llama", "vblora", BANK, {"target_modules": EVERY}),
    "vblora, top 3, dropout": (
        "gpt2", "vblora", {**BANK, "topk": 3, "vector_length": 8, "vblora_dropout": 0.2}, {"target_modules": GPT2, "bias": "lora_only"},
    ),
    "vblora, chosen vectors only": ("llama", "vblora", {**BANK, "save_only_topk_weights": True}, {"target_modules": ATTENTION}),
    "vblora, of 300": ("llama", "vblora", {**BANK, "num_vectors": 300, "save_only_topk_weights": True}, {"target_modules": ATTENTION}),
    "vera": ("llama", "vera", {"r": 6}, {"target_modules": EVERY}),
    "vera, another key, dropout": (
        "gpt2", "vera", {"r": 5, "projection_prng_key": 11, "d_initial": 0.3, "vera_dropout": 0.2}, {"target_modules": GPT2, "bias": "all"},
    ),
    "vera, key only": (
        "llama", "vera", {"r": 6, "projection_prng_key": 3, "save_projection": False}, {"target_modules": ATTENTION},
    ),
    "vera, whole modules": ("qwen2", "vera", {"r": 6}, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"], "bias": "lora_only"}),
    "randlora": ("llama", "randlora", {"r": 5, "randlora_alpha": 7}, {"target_modules": EVERY}),
    "randlora, sparse, dropout": (
        "gpt2", "randlora", {"r": 4, "randlora_alpha": 9, "sparse": True, "randlora_dropout": 0.1}, {"target_modules": GPT2},
    ),
    "randlora, very sparse": (
        "llama", "randlora", {"r": 5, "randlora_alpha": 7, "very_sparse": True, "projection_prng_key": 4}, {"target_modules": EVERY},
    ),
    "randlora, key only": (
        "qwen2", "randlora", {"r": 20, "randlora_alpha": 7, "save_projection": False}, {"target_modules": ATTENTION, "bias": "all"},
    ),
}  # fmt: skip


def ours_of(case):
    """(kind of base, our adapted model with values of its own)."""
    kind, method, params, beside = CASES[case]
    model = base(kind)
    inject_peft_and_freeze(peft_method_from_config({"kind": method, "params": params, **beside}), model)
    stir(model)
    return kind, model.eval()


def theirs_of(case):
    kind, method, params, beside = CASES[case]
    beside = {**beside, "bias": beside.get("bias", "none").replace("lora_only", f"{method}_only")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, CLASSES[method])(**params, **beside, fan_in_fan_out=kind == "gpt2")
        model = peft.get_peft_model(base(kind), config)
    stir(model)
    return kind, model.eval()


def read(kind, path):
    """PEFT's own reading of a directory; it must miss nothing but RandLoRA's copies of the bases, one pair a layer."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base(kind), str(path)).eval()
    missing = [key for w in said if "missing adapter keys" in str(w.message) for key in re.findall(r"'([^']+)'", str(w.message))]
    assert all(re.fullmatch(r"base_model\.model\..+\.randlora_[AB]\.default", key) for key in missing), missing
    return model


def load(kind, path):
    model = base(kind)
    inject_peft_and_freeze(method_of(path, model), model)
    load_adapter_weights(model, path)
    return model.eval()


def same_files(a, b):
    for file in ("adapter_config.json", FILE):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours_and_so_do_we(case, tmp_path, proof):
    kind, model = ours_of(case)
    save_adapter(model, tmp_path / "a", base="some/base")
    theirs = read(kind, tmp_path / "a")
    assert (logits(model) - logits(base(kind))).abs().max() > 1e-2
    difference = (logits(theirs) - logits(model)).abs().max()
    assert difference < 1e-5
    proof("PEFT directory", case, "written", by="peft", compared="logits", difference=difference)
    again = load(kind, tmp_path / "a")
    assert (logits(again) - logits(model)).abs().max() < 1e-6
    if "chosen" not in case and "of 300" not in case:  # there the weights are rounded once more
        assert torch.equal(logits(again), logits(model))
        save_adapter(again, tmp_path / "b", base="some/base")
        same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("case", CASES)
def test_we_read_peft_and_write_what_it_writes(case, tmp_path, proof):
    kind, theirs = theirs_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path / "a"))
    ours = load(kind, tmp_path / "a")
    difference = (logits(theirs) - logits(ours)).abs().max()
    assert (logits(theirs) - logits(base(kind))).abs().max() > 1e-2
    assert difference < 1e-5
    proof("PEFT directory", case, "read", by="peft", compared="logits", difference=difference)

    save_adapter(ours, tmp_path / "b")
    a, b = load_file(tmp_path / "a" / FILE), load_file(tmp_path / "b" / FILE)
    copies = {key for key in a.keys() - b.keys() if re.fullmatch(r"base_model\.model\..+\.randlora_[AB]", key)}
    assert a.keys() - copies == b.keys()
    assert all(a[k].dtype == b[k].dtype and (torch.equal(a[k], b[k]) or "_topk_weights" in k) for k in b)
    one, two = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab")
    assert sorted(one.pop("target_modules")) == two.pop("target_modules")
    differ = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
    assert differ <= {"auto_mapping", "base_model_name_or_path", "task_type"}, differ


# -- bases that the key does not draw here ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["vera", "randlora"])
def test_bases_of_another_machine_are_read_as_they_are(case, tmp_path):
    """They are what the trained numbers mean; the file has them so that no one has to draw them."""
    kind, theirs = theirs_of(case)
    tuner = theirs.base_model
    for name in ("A", "B"):
        bases = getattr(tuner, f"{case}_{name}")["default"]
        bases.copy_(torch.randn(bases.shape, generator=torch.Generator().manual_seed(5)))
    theirs.save_pretrained(str(tmp_path / "a"))
    ours = load(kind, tmp_path / "a")
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-5
    save_adapter(ours, tmp_path / "b")
    assert (logits(theirs) - logits(load(kind, tmp_path / "b"))).abs().max() < 1e-5
    # a run that begins with this adapter begins with it again when it is resumed
    method, state = method_of(tmp_path / "a"), {}
    for model in (ours, load(kind, tmp_path / "a")):
        now = method.state(model)
        assert state.keys() <= now.keys()
        assert all(torch.equal(state[k], now[k]) for k in state)
        state = {k: t.clone() for k, t in now.items()}
        method.restore(model)
    change(tmp_path / "a", save_projection=False)
    with pytest.raises(AdapterError, match="save_projection"):
        load(kind, tmp_path / "a")


def test_bases_that_no_key_draws_must_be_saved(tmp_path):
    _, model = ours_of("vera, key only")
    model.vera_A.weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"vera_A.*save_projection"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# -- what cannot be read ----------------------------------------------------------------------------------------------------------


def change(path, **fields):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))


def spoil(path, **changes):
    """Rewrites tensors by the end of their keys; None takes one out, and one that is not there is new."""
    tensors = load_file(path / FILE)
    for end, value in changes.items():
        key = next((k for k in tensors if k.endswith(end)), f"base_model.model.{end}")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors.get(key, torch.zeros(1)))
    save_file(tensors, path / FILE, {"format": "pt"})


SPOILT = {
    "no bank": ("vblora", {"vblora_vector_bank": None}, {}, "vblora_vector_bank"),
    "another bank": ("vblora", {"vblora_vector_bank": lambda t: t[:-1].clone()}, {}, "vblora_vector_bank"),
    "no logits": ("vblora", {"0.self_attn.q_proj.vblora_logits_B": None}, {}, r"q_proj\.vblora_logits_A.*lack their partner"),
    "other logits": ("vblora", {"0.self_attn.q_proj.vblora_logits_B": lambda t: t[:-1].clone()}, {}, r"q_proj\.vblora_logits_B"),
    "half a choice": ("vblora, chosen vectors only", {"q_proj.vblora_logits_A_topk_weights": None}, {}, "vblora_logits_A_topk_weights"),
    "another choice": ("vblora, chosen vectors only", {"logits_A_topk_indices": lambda t: t + 7}, {}, "vblora_logits_A"),
    "a stranger": ("vera", {"stranger": lambda t: t}, {}, "stranger"),
    "no lambda": ("vera", {"1.self_attn.v_proj.vera_lambda_d": None}, {}, r"v_proj\.vera_lambda_d"),
    "another lambda": ("vera", {"1.self_attn.v_proj.vera_lambda_d": lambda t: t[:-1].clone()}, {}, r"v_proj\.vera_lambda_d"),
    "no bases": ("vera", {"vera_A": None}, {}, "vera_A"),
    "other bases": ("vera", {"vera_A": lambda t: t[:, :-1].clone()}, {}, "vera_A"),
    "bases not finite": ("randlora", {"randlora_B": lambda t: t / 0}, {}, "randlora_B"),
    "two bases": ("randlora", {"model.layers.0.self_attn.q_proj.randlora_A": lambda t: t}, {}, r"q_proj\.randlora_A"),
    "another rank": ("randlora", {}, {"r": 4}, "randlora"),
    "another scale": ("randlora", {}, {"randlora_alpha": 0}, "randlora_alpha"),
    "a new field": ("vera", {}, {"scale_all": 3}, "scale_all"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_faults_are_named_and_nothing_is_changed(fault, tmp_path):
    case, tensors, fields, said = SPOILT[fault]
    kind, model = ours_of(case)
    save_adapter(model, tmp_path / "a")
    spoil(tmp_path / "a", **tensors)
    change(tmp_path / "a", **fields)
    before = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    with pytest.raises((AdapterError, CheckpointError), match=said):
        load(kind, tmp_path / "a")
    with pytest.raises((AdapterError, CheckpointError)):
        load_adapter_weights(model, tmp_path / "a")
    assert all(torch.equal(t, before[name]) for name, t in [*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("kind", CLASSES)
def test_layers_that_peft_does_not_adapt_are_refused(kind, tmp_path):
    params = {"vector_length": 1, "num_vectors": 5} if kind == "vblora" else {}
    model = base("llama")
    inject_peft_and_freeze(peft_method_from_config({"kind": kind, "target_modules": ["embed_tokens"], "params": params}), model)
    with pytest.raises(AdapterError, match="embed_tokens"):
        save_adapter(model, tmp_path / "a")


# -- layouts ----------------------------------------------------------------------------------------------------------------------


def trained_on(layout, method, small):
    model, its = make(method, "linear_bias", LAYOUTS[layout])
    if small:
        its.config.params.save_only_topk_weights = True
    wake(model)
    return model


def _on_shards(rank, layout, method, small, path):
    model = trained_on(layout, method, small)
    save_adapter(model, path / layout)
    if layout == "one":
        return True
    wanted = {n: local_of(p).clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            local_of(p).data.zero_()
    load_adapter_weights(model, path / "one")
    return small or all(torch.equal(local_of(p), wanted[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method,small", [("vblora", False), ("vblora", True), ("vera", False), ("randlora", False)])
def test_every_layout_writes_the_same_bytes_and_reads_its_part(pool, tmp_path, method, small):
    _on_shards(0, "one", method, small, tmp_path)
    for layout in ("fsdp2", "tp2"):
        assert all(pool.run(2, _on_shards, layout, method, small, tmp_path))
        same_files(tmp_path / "one", tmp_path / layout)
