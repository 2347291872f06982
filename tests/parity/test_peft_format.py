"""The real PEFT library loads what we write, we load what it writes, and every layout writes the same bytes."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.placement import fill_
from d9d_lora.state import peft_save
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of, read_adapter_config
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.state.safetensors_dir import CheckpointError
from d9d_lora.walk import adapted_layers
from tests.catalogue import LAYOUTS, batch
from tests.test_laws import backward, make, wake

peft = pytest.importorskip("peft")
IDS = torch.arange(24).reshape(2, 12) % 37
SMALL = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def base(kind):
    torch.manual_seed(3)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases and norms start as constants, which would hide a swap
    return model.eval()


def stir(model, seed=9):
    """Gives everything that is trained values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "llama": ("llama", {"target_modules": ATTENTION}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "one layer": ("llama", {"target_modules": ["model.layers.1.self_attn.q_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 5},
            "alpha_pattern": {"v_proj": 1.5},
        },
    ),
    "rslora": ("llama", {"target_modules": ATTENTION, "params": {"r": 4, "alpha": 6, "scaling": "rslora"}}),
    "dora": ("llama", {"target_modules": [*ATTENTION, "embed_tokens"], "params": {"r": 4, "alpha": 6, "use_dora": True}}),
    "dora gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "params": {"r": 4, "alpha": 6, "use_dora": True}}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2 biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "bias all": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]}),
    "whole gpt2 norm": ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["ln_f"], "bias": "lora_only"}),
}


def adapted(case):
    kind, config = CASES[case]
    model = base(kind)
    params = {"params": {"r": 4, "alpha": 6}}
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", **params, **config}), model)
    stir(model)
    return kind, model


def peft_load(kind, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Mm]issing.*")
        return peft.PeftModel.from_pretrained(base(kind), str(path)).eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours_and_so_do_we(case, tmp_path):
    kind, model = adapted(case)
    save_adapter(model, tmp_path / "a", base="some/base")
    theirs = peft_load(kind, tmp_path / "a")
    assert (logits(model) - logits(base(kind))).abs().max() > 1e-2
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5
    peft.LoraConfig(**{k: v for k, v in read_adapter_config(tmp_path / "a").items() if k != "peft_type"})

    again = base(kind)
    inject_peft_and_freeze(method_of(tmp_path / "a", again), again)
    load_adapter_weights(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "b", base="some/base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


THEIRS = {
    "llama": ("llama", {"target_modules": ATTENTION}),
    "regex": ("llama", {"target_modules": r".*layers\.1.*_proj", "exclude_modules": ["o_proj"]}),
    "filter": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {r".*\.0\..*q_proj": 3, "lm_head": 2},
            "alpha_pattern": {"v_proj": 5, "layers.1.self_attn.v_proj": 7},
        },
    ),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", {"target_modules": [*ATTENTION, "embed_tokens"], "use_dora": True}),
    "dora bias": ("qwen2", {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True, "bias": "lora_only"}),
    "dora gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "bias all": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias all gpt2": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "bias lora_only": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}),
    "task": ("llama", {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.1}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_load_peft(case, tmp_path):
    kind, options = THEIRS[case]
    theirs = peft.get_peft_model(base(kind), peft.LoraConfig(r=4, lora_alpha=6, **options))
    stir(theirs)
    theirs.eval().save_pretrained(str(tmp_path))
    if case == "patterns":  # the file sorts the patterns, so PEFT itself reads another alpha than it trained with
        theirs = peft_load(kind, tmp_path)
    ours = base(kind)
    inject_peft_and_freeze(method_of(tmp_path, ours), ours)
    load_adapter_weights(ours, tmp_path)
    ours.eval()  # fresh layers are in training mode, and one case has dropout
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-5
    assert (logits(theirs) - logits(base(kind))).abs().max() > 1e-2
    blind = base(kind)  # without the model at hand
    inject_peft_and_freeze(method_of(tmp_path), blind)
    load_adapter_weights(blind, tmp_path)
    blind.eval()
    assert torch.equal(logits(blind), logits(ours))


def test_a_copied_base_weight_that_is_not_ours_is_refused(tmp_path):
    theirs = peft.get_peft_model(base("llama"), peft.LoraConfig(target_modules=["embed_tokens"]))
    theirs.save_pretrained(str(tmp_path))
    ours = base("llama")
    inject_peft_and_freeze(method_of(tmp_path), ours)
    load_adapter_weights(ours, tmp_path)
    with torch.no_grad():
        ours.model.embed_tokens.base.weight[3, 3] += 1
    with pytest.raises(AdapterError, match="is not the base weight"):
        load_adapter_weights(ours, tmp_path)


def test_mixed_rules_are_folded_into_alpha(tmp_path):
    model = base("llama")
    stack = peft_method_from_config(
        {
            "kind": "stack",
            "methods": [
                {"kind": "lora", "target_modules": ["q_proj"], "params": {"r": 4, "alpha": 6, "scaling": "rslora"}},
                {"kind": "lora", "target_modules": ["v_proj"], "params": {"r": 2, "alpha": 6}},
                {"kind": "full_tune", "module_name_pattern": r"model\.norm"},
            ],
        }
    )
    inject_peft_and_freeze(stack, model)
    stir(model)
    save_adapter(model, tmp_path / "a")
    assert (logits(peft_load("llama", tmp_path / "a")) - logits(model)).abs().max() < 1e-5
    config = read_adapter_config(tmp_path / "a")
    assert config["modules_to_save"] == ["model.norm"]
    assert not config["use_rslora"]


def test_names_that_end_like_others():
    """`a.q` is a dotted end of `b.a.q`: a plain key would mean both."""
    from d9d_lora.state.peft_config import pattern_of, targets_of
    from d9d_lora.targets import by_name, named

    values = {"a.q": 2, "b.a.q": 8, "c.q": 8}
    pattern = pattern_of(values, 8)
    assert {n: by_name(pattern, n, 8) for n in values} == values
    targets = targets_of(["a.q"], ["a.q", "b.a.q"])
    assert [n for n in values if named(n, targets)] == ["a.q"]


# -- what cannot be written -----------------------------------------------------------------------------------------------------


def test_nothing_but_whole_modules_is_refused(tmp_path):
    model = base("llama")
    method = peft_method_from_config({"kind": "full_tune", "module_name_pattern": r"lm_head"})
    inject_peft_and_freeze(method, model)
    with pytest.raises(AdapterError, match="merged model"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_values_that_are_not_finite_are_refused_and_the_old_adapter_stays(tmp_path):
    _, model = adapted("llama")
    save_adapter(model, tmp_path / "a")
    before = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_A.weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj\.lora_A.*not finite"):
        save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_directories_that_are_not_ours_are_left_alone(tmp_path):
    _, model = adapted("llama")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_text("precious")
    with pytest.raises(AdapterError, match=r"holds \['model.safetensors'\]"):
        save_adapter(model, tmp_path / "model")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="not a directory"):
        save_adapter(model, tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    inode = empty.stat().st_ino
    save_adapter(model, empty)
    assert empty.stat().st_ino == inode
    assert sorted(p.name for p in empty.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    save_adapter(model, empty)  # an adapter is replaced


@pytest.mark.parametrize("fill", [False, True])
def test_a_disk_that_lies_is_caught_and_nothing_is_left(tmp_path, monkeypatch, fill):
    _, model = adapted("llama")
    write = peft_save.write_safetensors

    def flip(path, *args):
        write(path, *args)
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(peft_save, "write_safetensors", flip)
    if fill:
        (tmp_path / "a").mkdir()
    with pytest.raises(AdapterError, match="reads back otherwise"):
        save_adapter(model, tmp_path / "a")
    assert not list((tmp_path / "a").iterdir() if fill else tmp_path.iterdir())


def test_a_weight_trained_beside_its_adapter_is_refused(tmp_path):
    _, model = adapted("llama")
    model.model.layers[0].self_attn.q_proj.base.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="beside its own adapter"):
        save_adapter(model, tmp_path / "a")


def test_a_bare_parameter_beside_adapters_is_refused(tmp_path):
    _, model = adapted("llama")
    model.model.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(AdapterError, match="cannot copy this one"):
        save_adapter(model, tmp_path / "a")


# -- what cannot be read ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    _, model = adapted("llama")
    save_adapter(model, tmp_path / "a")
    return tmp_path / "a"


def change(path, **fields):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"use_dora": True}, r"lora_magnitude_vector None, expected \(\d+,\)"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only \['ADALORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "moved the base"),
        ({"trainable_token_indices": [1]}, "trained rows"),
        ({"target_parameters": ["experts"]}, "bare parameters"),
        ({"a_new_field": 3}, "a_new_field"),
        ({"r": 0}, "at least 1"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"bias": "some"}, "expected 'none'"),
    ],
)
def test_fields_that_would_change_the_result_are_refused(saved, fields, said):
    change(saved, **fields)
    with pytest.raises(AdapterError, match=said):
        method_of(saved)


def test_fields_that_change_nothing_are_let_through(saved):
    change(saved, a_new_field=None, init_lora_weights="gaussian", revision="main", other={}, megatron_core="x")
    method_of(saved)


def test_broken_directories_say_what_is_wrong(saved, tmp_path):
    with pytest.raises(AdapterError, match="not there"):
        method_of(tmp_path / "nowhere")
    change(saved, r=7)
    with pytest.raises(AdapterError, match=r"expected \[7, in\]"):
        method_of(saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is not JSON"):
        method_of(saved)
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(AdapterError, match="Pickle"):
        method_of(saved)


def test_every_wrong_key_is_in_one_error(saved):
    model = base("llama")
    inject_peft_and_freeze(method_of(saved, model), model)
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers.0.self_attn"
    tensors[f"{prefix}.q_proj.lora_A.weight"] = torch.zeros(4, 5)
    tensors["base_model.model.model.stranger.weight"] = torch.zeros(4)
    del tensors[f"{prefix}.v_proj.lora_B.weight"], tensors[f"{prefix}.v_proj.lora_A.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_adapter_weights(model, saved)
    for word in ("stranger", "misshapen", "q_proj.lora_A", "missing", "v_proj.lora_B"):
        assert word in str(caught.value)


def test_an_adapter_of_another_model_is_refused(saved):
    model = base("gpt2")
    with pytest.raises(AdapterError, match="does not have"):
        method_of(saved, model)


# -- layouts ------------------------------------------------------------------------------------------------------------------------

CELLS = [
    (layer, layout) for layer in ("linear_bias", "conv1d", "embedding") for layout in ("fsdp2", "tp2", "fsdp2_tp2", "hsdp2x2", "tp2_sp")
]


def trained_on(layout, layer):
    model, _ = make("patterns" if layer != "embedding" else "lora", layer, LAYOUTS[layout])
    wake(model)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora" not in name:
            fill_(p, lambda w, g: w.normal_(generator=g), seed=6, name=name)
    return model


def _save_sharded(rank, layout, layer, path):
    save_adapter(trained_on(layout, layer), path)


def _load_sharded(rank, layout, layer, path):
    model = trained_on(layout, layer)
    wanted = {n: (p.to_local() if isinstance(p, DTensor) else p).clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            fill_(p, None, seed=0, name="")
    load_adapter_weights(model, path)
    return all(torch.equal(wanted[n], p.to_local() if isinstance(p, DTensor) else p) for n, p in model.named_parameters())


@pytest.mark.parametrize("layer,layout", CELLS)
def test_every_layout_writes_the_same_bytes_and_reads_its_part(pool, tmp_path, layer, layout):
    save_adapter(trained_on("one", layer), tmp_path / "one")
    pool.run(LAYOUTS[layout].world, _save_sharded, layout, layer, tmp_path / "many")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes()
    assert all(pool.run(LAYOUTS[layout].world, _load_sharded, layout, layer, tmp_path / "one"))


def _with_copy(rank, layout, path):
    model = trained_on(layout, "embedding")
    load_adapter_weights(model, path / "same")
    try:
        load_adapter_weights(model, path / "other")
    except AdapterError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp2_tp2"])
def test_a_copied_base_weight_is_compared_on_every_layout(pool, tmp_path, layout):
    model = trained_on("one", "embedding")
    for name, shift in (("same", 0), ("other", 1)):
        save_adapter(model, tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        copy = {"base_model.model.embed.base_layer.weight": model.embed.base.weight.detach() + shift}
        save_file(load_file(file) | copy, file, {"format": "pt"})
    assert all("is not the base weight" in text for text in pool.run(LAYOUTS[layout].world, _with_copy, layout, tmp_path))


def _save_after_steps(rank, layout, path):
    model = trained_on(layout, "linear_bias")
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimiser.zero_grad()
        backward(model, LAYOUTS[layout], step)
        optimiser.step()
        with torch.no_grad():
            model(batch(step)[0])  # FSDP2 now holds gathered weights
    save_adapter(model, path)


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2_tp2"])
def test_what_was_trained_is_what_is_saved(pool, tmp_path, layout):
    pool.run(1, _save_after_steps, "one", tmp_path / "one")
    pool.run(LAYOUTS[layout].world, _save_after_steps, layout, tmp_path / "many")
    one, many = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert max(float((one[k] - many[k]).abs().max()) for k in one) < 1e-10


def _save_mutated(rank, path, fault):
    if fault == "slice":
        peft_save._gathered = lambda p: p.to_local() if isinstance(p, DTensor) else p
    elif fault == "disk" and rank == 0:
        peft_save.write_safetensors = _no_disk
    try:
        save_adapter(trained_on("fsdp2", "linear"), path)
    except AdapterError as error:
        return str(error)
    finally:
        import importlib

        importlib.reload(peft_save)
    return ""


def _no_disk(*args):
    raise OSError("no space left on device")


@pytest.mark.parametrize("fault,said", [("slice", "a shard"), ("disk", "no space")])
def test_a_fault_on_one_rank_is_an_error_on_all_and_leaves_nothing(pool, tmp_path, fault, said):
    for text in pool.run(2, _save_mutated, tmp_path / "a", fault):
        assert said in text
    assert not list(tmp_path.iterdir())


def test_the_adapted_layers_are_the_ones_saved(saved):
    model = base("llama")
    inject_peft_and_freeze(method_of(saved), model)
    assert sorted(la.name for la in adapted_layers(model)) == [f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ATTENTION]
