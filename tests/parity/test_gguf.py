"""llama.cpp itself loads our GGUF adapters beside a tiny base, and its log-probabilities are ours; and what we read, it reads alike."""

import json
import math
import struct

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.export import gguf as ours
from d9d_lora.export.gguf import gguf_to_peft, read_gguf, refusals, write_gguf
from d9d_lora.export.gguf_file import GGUFFile
from d9d_lora.export.gguf_names import ARCHITECTURES, base_of
from d9d_lora.state import expert_layouts
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.targets import by_name
from tests.parity.test_peft_format import stir

gguf = pytest.importorskip("gguf")
VOCABULARY = 48
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT = [5, 17, 30, 8, 41, 12, 33, 9]


def base(kind):
    torch.manual_seed(3)
    if kind == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    else:
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 8}
        config = transformers.AutoConfig.for_model(kind, **SMALL, **(moe if kind == "qwen3_moe" else {}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases and norms start as constants, which would hide a swap
    return model


def write_base(model, path):
    """The base as llama.cpp's converter would write it, in fp32: its own naming, and rows of q and k in its order."""
    config, kind = model.config, model.config.model_type
    name = ARCHITECTURES[kind].gguf
    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(1e-5)
    if kind == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if kind != "gpt2":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"\u2581t{i}" for i in range(3, VOCABULARY))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[1] * (VOCABULARY - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tensors = dict(model.state_dict())
    for key in [key for key in tensors if key.endswith("experts.gate_up_proj")]:
        gate, up = tensors.pop(key).chunk(2, 1)
        tensors |= {key.replace("gate_up", "gate") + ".weight": gate, key.replace("gate_up", "up") + ".weight": up}
        tensors[key.replace("gate_up", "down") + ".weight"] = tensors.pop(key.replace("gate_up", "down"))
    for key, value in tensors.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        if kind == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """llama.cpp with one base and some adapters, of which a request names one."""

    def __init__(self, model, adapters):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # fp16 would cost three digits
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = -1
        self.server, self.count = xllamacpp.Server(params), len(adapters)

    def log_probabilities(self, adapter, ids=PROMPT):
        """Of the token after `ids`, under one adapter (None: the base)."""
        scales = [{"id": i, "scale": float(i == adapter)} for i in range(self.count)]
        request = {"prompt": ids, "n_predict": 1, "logprobs": VOCABULARY, "n_probs": VOCABULARY, "temperature": 0.0}
        reply = self.server.handle_completions({**request, "cache_prompt": False, "lora": scales})
        assert "choices" in reply, reply
        found = torch.empty(VOCABULARY)
        for item in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[item["id"]] = item["logprob"]
        return found


def log_probabilities(model, ids=PROMPT):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def adapted(kind, config):
    model = base(kind)
    params = {"params": {"r": 4, "alpha": 6}}
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", **params, **config}), model)
    stir(model)
    return model


CASES = {
    "plain": {"target_modules": "all-linear"},
    "rslora, rank and alpha patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"k_proj": 2},
        "params": {"r": 5, "alpha": 6, "scaling": "rslora"},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
}
EXPERTS = {
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "experts, ranks and alphas by pattern": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 3},
        "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 11},
    },
}


def save(model, path):
    save_adapter(model, path)
    return path


@pytest.mark.parametrize("kind,cases", [("llama", [*CASES]), ("qwen2", ["plain"]), ("gpt2", ["plain"])])
def test_llama_cpp_has_our_log_probabilities(kind, cases, tmp_path, proof, monkeypatch):
    write_base(base(kind), tmp_path / "base.gguf")
    models = [adapted(kind, CASES[case]) for case in cases]
    files = [tmp_path / f"{i}.gguf" for i in range(len(cases))]
    for i, (model, file) in enumerate(zip(models, files)):
        write_gguf(save(model, tmp_path / f"{i}"), file, base_config=model.config.to_dict())
    monkeypatch.setattr(ours, "reorder", lambda rows, heads: rows)  # the mutation: rows of q and k as they are
    write_gguf(tmp_path / "0", tmp_path / "mutated.gguf", base_config=models[0].config.to_dict())

    llama = Llama(tmp_path / "base.gguf", [*files, tmp_path / "mutated.gguf"])
    plain, allowed = log_probabilities(base(kind)), 2e-3 if kind == "gpt2" else 1e-4  # llama.cpp's GELU is a table in fp16
    assert (llama.log_probabilities(None) - plain).abs().max() < allowed  # else the test's own base is wrong
    for i, (case, model) in enumerate(zip(cases, models)):
        wanted = log_probabilities(model)
        difference = (llama.log_probabilities(i) - wanted).abs().max()
        assert difference < allowed
        assert (wanted - plain).abs().max() > 0.1  # the adapter does something
        proof("GGUF", f"lora, {case}, {kind}", "written", by="xllamacpp", compared="log-probabilities", difference=difference)
    moved = (llama.log_probabilities(len(cases)) - log_probabilities(models[0])).abs().max()
    assert moved > 0.01 if kind == "llama" else moved < allowed


def test_llama_cpp_has_our_experts(tmp_path, proof, monkeypatch):
    write_base(base("qwen3_moe"), tmp_path / "base.gguf")
    models = [adapted("qwen3_moe", case) for case in EXPERTS.values()]
    for i, model in enumerate(models):
        write_gguf(save(model, tmp_path / f"{i}"), tmp_path / f"{i}.gguf", base_config=model.config.to_dict())
    with pytest.raises(AdapterError, match="written as GGUF and not read back"):
        read_gguf(tmp_path / "0.gguf", models[0].config.to_dict())
    as_A_is = lambda B, n: B.unflatten(1, (n, -1)).permute(1, 2, 0)  # noqa: E731
    monkeypatch.setattr(expert_layouts, "from_fused_B", as_A_is)  # the mutation: expert after expert
    write_gguf(tmp_path / "0", tmp_path / "mutated.gguf", base_config=models[0].config.to_dict())
    llama = Llama(tmp_path / "base.gguf", [*(tmp_path / f"{i}.gguf" for i in range(2)), tmp_path / "mutated.gguf"])
    plain = log_probabilities(base("qwen3_moe"))
    assert (llama.log_probabilities(None) - plain).abs().max() < 1e-4
    for i, (case, model) in enumerate(zip(EXPERTS, models)):
        wanted = log_probabilities(model)
        difference = (llama.log_probabilities(i) - wanted).abs().max()
        assert difference < 1e-4
        assert (wanted - plain).abs().max() > 0.1
        proof("GGUF", f"lora, {case}, qwen3_moe", "written", by="xllamacpp", compared="log-probabilities", difference=difference)
    assert (llama.log_probabilities(2) - log_probabilities(models[0])).abs().max() > 0.01


def write_foreign(path, tensors, alpha=6.0, **fields):
    """An adapter's GGUF by another hand: none of our code."""
    writer = gguf.GGUFWriter(path, fields.pop("arch", "llama"))
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **fields}.items():
        if value is not None:
            writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, value in tensors.items():
        if isinstance(value, tuple):  # (values, ggml type)
            writer.add_tensor(name, gguf.quants.quantize(value[0], value[1]), raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(seed, *shape):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.3).astype(np.float32)


def foreign():
    """Factors of q, k, the embedding and the head, each of another rank."""
    return {
        "blk.0.attn_q.weight.lora_a": numbers(1, 3, 32),
        "blk.0.attn_q.weight.lora_b": numbers(2, 32, 3),
        "blk.1.attn_k.weight.lora_a": numbers(3, 4, 32),
        "blk.1.attn_k.weight.lora_b": numbers(4, 16, 4),
        "token_embd.weight.lora_a": numbers(5, VOCABULARY, 2),
        "token_embd.weight.lora_b": numbers(6, 32, 2),
        "output.weight.lora_a": numbers(7, 5, 32),
        "output.weight.lora_b": numbers(8, VOCABULARY, 5),
    }


@pytest.mark.parametrize("alpha", [6.0, 0.0, None])
def test_we_read_a_file_as_llama_cpp_does(alpha, tmp_path, proof):
    model = base("llama")
    write_base(model, tmp_path / "base.gguf")
    file = write_foreign(tmp_path / "a.gguf", foreign(), alpha)
    gguf_to_peft(file, model.config.to_dict(), tmp_path / "a")
    inject_peft_and_freeze(method_of(tmp_path / "a", model), model)
    load_adapter_weights(model, tmp_path / "a")
    wanted = Llama(tmp_path / "base.gguf", [file]).log_probabilities(0)
    difference = (log_probabilities(model.eval()) - wanted).abs().max()
    assert difference < 1e-4
    assert (log_probabilities(base("llama")) - wanted).abs().max() > 0.1
    proof("GGUF", f"lora, alpha {alpha}, llama", "read", by="xllamacpp", compared="log-probabilities", difference=difference)


def test_every_type_of_llama_cpps_converter_is_read(tmp_path):
    """Not compared by log-probabilities: llama.cpp rounds the activations, too, to the type of what they are multiplied by."""
    types = dict(zip(foreign(), [gguf.GGMLQuantizationType[t] for t in ("Q8_0", "F16", "BF16", "F32")]))
    values = {name: (value, types[name]) if name in types else value for name, value in foreign().items()}
    file = GGUFFile(write_foreign(tmp_path / "a.gguf", values))
    assert file.shapes() == {name: value.shape for name, value in foreign().items()}
    for name, kind in types.items():
        wanted = gguf.quants.dequantize(gguf.quants.quantize(foreign()[name], kind), kind)
        assert np.array_equal(file.read(name).float().numpy(), wanted)
        assert (kind.name == "F32") == np.array_equal(wanted, foreign()[name])
    read_gguf(file.path, base_config("llama"))


# -- both ways, without a program -------------------------------------------------------------------------------------------------


def directory(path, kind, *, dtype=torch.float32, tied=False, **fields):
    """A PEFT directory that adapts every weight of a kind of model; values of its own everywhere."""
    config = base_config(kind, tied)
    tensors, generator = {}, torch.Generator().manual_seed(5)
    ranks = {}
    for i, weight in enumerate(base_of(config).weights.values()):
        r = ranks[weight.layer] = 2 + i % 2 if "rank_pattern" in fields else 2
        into, out = (weight.rows, weight.columns) if weight.lookup else (weight.columns, weight.rows)
        keys = ("lora_embedding_A", "lora_embedding_B") if weight.lookup else ("lora_A.weight", "lora_B.weight")
        for key, shape in zip(keys, ((r, into), (out, r))):
            tensors[f"base_model.model.{weight.layer}.{key}"] = torch.randn(shape, generator=generator).to(dtype)
    if "rank_pattern" in fields:
        fields["rank_pattern"] = {name: r for name, r in ranks.items() if r != 2}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    peft_config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": sorted(ranks), **fields}
    (path / "adapter_config.json").write_text(json.dumps(peft_config))
    return config, tensors


def meaning(config, layer):
    """(rank, scaling), as PEFT reads them."""
    r = by_name(config.get("rank_pattern") or {}, layer, config["r"])
    return r, by_name(config.get("alpha_pattern") or {}, layer, config["lora_alpha"]) / (r**0.5 if config.get("use_rslora") else r)


def base_config(kind, tied=False):
    sizes = dict(SMALL, tie_word_embeddings=tied, model_type=kind)
    sizes |= {"num_experts": 4, "moe_intermediate_size": 24} if kind == "qwen3_moe" else {}
    return sizes | {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else sizes


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_there_and_back_is_the_same_to_the_bit(kind, tmp_path):
    config, tensors = directory(tmp_path / "a", kind, rank_pattern={})
    write_gguf(tmp_path / "a", tmp_path / "a.gguf", base_config=config)
    gguf_to_peft(tmp_path / "a.gguf", config, tmp_path / "b")
    again = load_file(tmp_path / "b/adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], value) for key, value in tensors.items())
    read = json.loads((tmp_path / "b/adapter_config.json").read_text())
    wrote = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert all(meaning(read, layer) == meaning(wrote, layer) for layer in base_of(config).weights)
    theirs = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.shapes() == {name: value.shape for name, value in theirs.items()}
    assert all(np.array_equal(file.read(name).numpy(), value) for name, value in theirs.items())


def test_gemma_has_no_head_of_its_own_whatever_its_config_says():
    for tied in (True, False):
        base = base_of(base_config("gemma2", tied))
        assert base.tied
        assert not {"model.embed_tokens", "lm_head"} & base.weights.keys()


@pytest.mark.parametrize(
    "fields,exact",
    [
        ({"lora_alpha": 7, "use_rslora": True}, True),  # one rank: the square root goes into the file's alpha
        ({"alpha_pattern": {"q_proj": 1.5, "v_proj": 12}}, True),  # powers of two of the commonest
        ({"alpha_pattern": {"q_proj": 5}}, False),
        ({"lora_alpha": 7, "use_rslora": True, "rank_pattern": {}}, False),
    ],
)
def test_the_scale_is_the_layers_own(tmp_path, fields, exact):
    config, tensors = directory(tmp_path / "a", "llama", **fields)
    write_gguf(tmp_path / "a", tmp_path / "a.gguf", base_config=config)
    read, again = read_gguf(tmp_path / "a.gguf", config)
    wrote = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for layer in base_of(config).weights:
        (key,) = (k for k in tensors if k.startswith(f"base_model.model.{layer}.") and "_B" in k)
        (_, s), (_, t) = meaning(wrote, layer), meaning(read, layer)
        before, after = tensors[key].double(), again[key].double()
        assert ((after * t - before * s) / (before * s)).abs().max() < 2**-23  # half a step of B, half a step of alpha
        factor = float((after / before).flatten()[0])
        if exact:
            assert torch.equal(after, before * factor)
            assert math.frexp(factor)[0] == 0.5
    assert all(torch.equal(again[key], value) for key, value in tensors.items() if "_A" in key)


def test_an_alpha_of_nothing_is_not_taken_for_one(tmp_path):
    """llama.cpp reads alpha 0 as: no scale. A layer whose alpha is 0 in fp32 must stay silent."""
    config, tensors = directory(tmp_path / "a", "llama", lora_alpha=1e-60, alpha_pattern={"q_proj": 3})
    write_gguf(tmp_path / "a", tmp_path / "a.gguf", base_config=config)
    read, again = read_gguf(tmp_path / "a.gguf", config)
    q, v = (f"base_model.model.model.layers.0.self_attn.{name}.lora_B.weight" for name in ("q_proj", "v_proj"))
    assert read["lora_alpha"] == 3
    assert torch.equal(again[q], tensors[q])
    assert not again[v].any()


@pytest.mark.parametrize("name,dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_one_rounding(name, dtype, tmp_path):
    config, tensors = directory(tmp_path / "a", "llama")
    write_gguf(tmp_path / "a", tmp_path / "a.gguf", base_config=config, dtype=name)
    _, again = read_gguf(tmp_path / "a.gguf", config)
    assert all(torch.equal(again[key], value.to(dtype)) for key, value in tensors.items())
    config, tensors = directory(tmp_path / "b", "llama", alpha_pattern={"q_proj": 3e6})
    with pytest.raises(AdapterError, match=r"q_proj.*not finite in torch.float16"):
        write_gguf(tmp_path / "b", tmp_path / "b.gguf", base_config=config, dtype="f16")
    assert not (tmp_path / "b.gguf").exists()


# -- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields,tied,said",
    [
        ({"use_dora": True}, False, "magnitude"),
        ({"lora_bias": True}, False, "a bias of B"),
        ({"bias": "all"}, False, "holds no biases"),
        ({"modules_to_save": ["norm"]}, False, "trained whole"),
        ({"trainable_token_indices": [1]}, False, "trained rows"),
        ({"layer_replication": [[0, 2], [1, 2]]}, False, "several times"),
        ({"peft_type": "LOHA"}, False, "LoRA only"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True, "one tensor in GGUF"),
        ({"target_modules": ["lm_head"]}, True, "one tensor in GGUF"),
        ({"target_modules": ["q_prj"]}, False, "q_prj: llama.cpp's llama has no such weight"),
    ],
)
def test_reasons_are_told_before_training(fields, tied, said):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields}
    (reason,) = refusals(config, None, base_config("llama", tied))
    assert said in reason


def test_what_llama_cpp_takes_has_no_reasons():
    for targets in (["q_proj", "down_proj"], ["model.layers.1.mlp.up_proj", "lm_head", "embed_tokens"], "all-linear", r".*q_proj"):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
        assert refusals({**config, "target_modules": targets}, None, base_config("llama")) == []
    assert "known for" in refusals(config, None, {"model_type": "bloom"})[0]


def test_whole_modules_and_other_bases_are_refused_and_nothing_is_written(tmp_path):
    config, tensors = directory(tmp_path / "a", "llama", modules_to_save=["norm"])
    weights = tmp_path / "a/adapter_model.safetensors"
    save_file(tensors | {"base_model.model.model.norm.weight": torch.ones(32)}, weights)
    with pytest.raises(AdapterError, match=r"trained whole[\s\S]*model\.norm\.weight"):
        write_gguf(tmp_path / "a", tmp_path / "a.gguf", base_config=config)
    config, _ = directory(tmp_path / "b", "llama")
    with pytest.raises(AdapterError, match=r"mlp\.down_proj.*\[r, 41\]"):
        write_gguf(tmp_path / "b", tmp_path / "b.gguf", base_config=config | {"intermediate_size": 41})
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp.* no such weight"):
        write_gguf(tmp_path / "b", tmp_path / "b.gguf", base_config=config | {"num_hidden_layers": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_only_an_adapter_is_replaced(tmp_path):
    config, _ = directory(tmp_path / "a", "llama")
    model = write_foreign(tmp_path / "model.gguf", foreign(), **{"general.type": "model"})
    before = model.read_bytes()
    with pytest.raises(AdapterError, match="no GGUF adapter"):
        write_gguf(tmp_path / "a", model, base_config=config)
    assert model.read_bytes() == before
    old = write_foreign(tmp_path / "old.gguf", foreign())
    write_gguf(tmp_path / "a", old, base_config=config)
    write_gguf(tmp_path / "a", tmp_path / "new.gguf", base_config=config)
    assert old.read_bytes() == (tmp_path / "new.gguf").read_bytes()  # the same bytes for the same adapter


def test_a_disk_that_lies_is_caught(tmp_path, monkeypatch):
    config, _ = directory(tmp_path / "a", "llama")
    write = ours._write

    def flip(path, *args):
        write(path, *args)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(ours, "_write", flip)
    with pytest.raises(AdapterError, match="reads back otherwise"):
        write_gguf(tmp_path / "a", tmp_path / "a.gguf", base_config=config)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"


@pytest.mark.parametrize(
    "tensors,fields,said",
    [
        ({"blk.9.attn_q.weight.lora_a": numbers(1, 2, 32)}, {}, r"blk\.9\.attn_q.* no factors"),
        ({"blk.0.attn_norm.weight": numbers(1, 32)}, {}, r"attn_norm.* no factors"),
        ({B: None}, {}, "the other is missing"),
        ({B: numbers(1, 32, 2)}, {}, r"q_proj.*A \(3, 32\) and B \(32, 2\)"),
        ({B: numbers(1, 31, 3)}, {}, r"expects \[r, 32\] and \[32, r\]"),
        ({A: numbers(1, 3, 33)}, {}, r"expects \[r, 32\]"),
        ({A: np.zeros((1, 3, 32), np.float32)}, {}, r"A \(1, 3, 32\)"),
        ({A: np.full((3, 32), np.nan, np.float32)}, {}, "not finite"),
        ({A: np.zeros((3, 32), np.int32)}, {}, r"ggml type 26"),
        ({}, {"arch": "qwen2"}, r"'qwen2'.*model_type 'llama'"),
        ({}, {"general.type": "model"}, "Is it a model"),
        ({}, {"adapter.type": "ia3"}, "only 'lora'"),
        ({}, {"adapter.alora.invocation_tokens": "1"}, "may change"),
        ({}, {"alpha": float("inf")}, "expected a number"),
    ],
)
def test_strange_files_are_named(tensors, fields, said, tmp_path):
    held = {name: value for name, value in (foreign() | tensors).items() if value is not None}
    file = write_foreign(tmp_path / "a.gguf", held, **fields)
    with pytest.raises(AdapterError, match=said):
        read_gguf(file, base_config("llama"))


def test_the_embedding_of_a_tied_base_is_refused(tmp_path):
    file = write_foreign(tmp_path / "a.gguf", foreign())
    with pytest.raises(AdapterError, match="are one tensor"):
        read_gguf(file, base_config("llama", tied=True))


def test_a_file_that_is_cut_anywhere_is_an_error(tmp_path):
    whole = write_foreign(tmp_path / "a.gguf", {A: numbers(1, 2, 32), B: numbers(2, 32, 2)}).read_bytes()
    read_gguf(tmp_path / "a.gguf", base_config("llama"))
    file, config = tmp_path / "cut.gguf", base_config("llama")
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(AdapterError):
            read_gguf(file, config)
    file.write_bytes(whole + b"\0" * 64)
    with pytest.raises(AdapterError, match="belong to no tensor"):
        read_gguf(file, config)


def test_counts_are_not_believed(tmp_path):
    """An array of 2^60 numbers, and as many tensors, entries, dimensions and bytes of a name."""
    huge, file = struct.pack("<Q", 2**60), tmp_path / "a.gguf"
    start = b"GGUF" + struct.pack("<I", 3)
    key = struct.pack("<Q", 1) + b"k"
    for body in (
        huge + huge,
        struct.pack("<QQ", 0, 1) + huge,
        struct.pack("<QQ", 0, 1) + key + struct.pack("<II", 9, 4) + huge,
        struct.pack("<QQ", 0, 1) + key + struct.pack("<II", 9, 8) + huge,
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 2**31, 1, 0, 0),
    ):
        file.write_bytes(start + body)
        with pytest.raises(AdapterError):
            GGUFFile(file).shapes()
    file.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(16))
    with pytest.raises(AdapterError, match="big-endian"):
        GGUFFile(file)
