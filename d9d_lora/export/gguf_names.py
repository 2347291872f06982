"""Which weight of a Hugging Face model is which tensor of llama.cpp, of what shape, and with its rows in what order.

    model.layers.3.self_attn.q_proj   [rows, columns]   blk.3.attn_q.weight
    rows of q and k, where the architecture rotates neighbours:  (head, half, j)  ->  (head, j, half)

Hugging Face turns row j of a head together with row j + d/2, llama.cpp's "normal" rotation rows 2j and 2j + 1. Its converter therefore
reorders the rows of q and k of some architectures, and an adapter must follow: one that does not loads without a word, and answers
right often enough to pass. The names of tensors are those of gguf's own map; which architectures are reordered stands in llama.cpp's
`conversion/` (`undo_permute`, and the classes that inherit it).

A row of `ARCHITECTURES` was tried with llama.cpp itself: a tiny random model of that type, every weight adapted
(`tests/parity/test_gguf.py` keeps some of them).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.untrusted import read_json

BaseConfig = Mapping[str, Any] | str | os.PathLike[str]
_HEAD = "lm_head"
_ATTENTION = {"q_proj": ("q", "hidden"), "k_proj": ("kv", "hidden"), "v_proj": ("kv", "hidden"), "o_proj": ("hidden", "q")}
_MLP = {"gate_proj": ("ffn", "hidden"), "up_proj": ("ffn", "hidden"), "down_proj": ("hidden", "ffn")}
_SPLIT = {f"self_attn.{k}": v for k, v in _ATTENTION.items()}
_LLAMA = _SPLIT | {f"mlp.{k}": v for k, v in _MLP.items()}
_PHI3 = {
    "self_attn.qkv_proj": ("qkv", "hidden"),
    "self_attn.o_proj": ("hidden", "q"),
    "mlp.gate_up_proj": ("gate_up", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
}
_STARCODER2 = _SPLIT | {"mlp.c_fc": ("ffn", "hidden"), "mlp.c_proj": ("hidden", "ffn")}
# A stack of experts -> the stacks that llama.cpp has of it, rows after rows.
_MOE = {
    "mlp.experts.gate_up_proj": (("mlp.experts.gate_proj", "expert", "hidden"), ("mlp.experts.up_proj", "expert", "hidden")),
    "mlp.experts.down_proj": (("mlp.experts.down_proj", "hidden", "expert"),),
}
_GPT2 = {
    "attn.c_attn": ("qkv", "hidden"),
    "attn.c_proj": ("hidden", "q"),
    "mlp.c_fc": ("ffn", "hidden"),
    "mlp.c_proj": ("hidden", "ffn"),
}


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of Hugging Face."""

    gguf: str  # general.architecture
    layers: Mapping[str, tuple[str, str]]  # name inside a block -> (rows, columns), by the names of `_sizes`
    reordered: bool = False  # the rows of q and k
    tied: bool = False  # what the config class means where `tie_word_embeddings` is not written
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    conv1d: bool = False  # weights stand transposed in the model; the factors of an adapter do not
    stacks: Mapping[str, tuple[tuple[str, str, str], ...]] = field(default_factory=dict)  # of experts, in every block


ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA, reordered=True),
    "mistral": Architecture("llama", _LLAMA, reordered=True),
    "granite": Architecture("granite", _LLAMA, reordered=True),
    "smollm3": Architecture("smollm3", _LLAMA, reordered=True, tied=True),
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen3": Architecture("qwen3", _LLAMA),
    "qwen3_moe": Architecture("qwen3moe", _SPLIT, stacks=_MOE),
    "olmo2": Architecture("olmo2", _LLAMA),
    "gemma": Architecture("gemma", _LLAMA, tied=True),
    "gemma2": Architecture("gemma2", _LLAMA, tied=True),
    "gemma3_text": Architecture("gemma3", _LLAMA, tied=True),
    "phi3": Architecture("phi3", _PHI3),
    "starcoder2": Architecture("starcoder2", _STARCODER2, tied=True),
    "gpt2": Architecture("gpt2", _GPT2, tied=True, blocks="transformer.h", embedding="transformer.wte", conv1d=True),
}


@dataclass(frozen=True)
class Weight:
    """A weight that an adapter may have, on both sides."""

    layer: str  # Hugging Face's module
    tensor: str  # llama.cpp's tensor, with `.weight`
    rows: int
    columns: int
    heads: int = 0  # whose rows are reordered; 0: none are
    lookup: bool = False  # an embedding
    experts: int = 0  # a stack of so many matrices


@dataclass(frozen=True)
class Base:
    """The base model, as far as an adapter's file depends on it."""

    kind: str
    architecture: Architecture
    weights: dict[str, Weight]  # by Hugging Face's name
    tied: bool
    stacks: dict[str, tuple[Weight, ...]] = field(default_factory=dict)  # of experts: by the parameter of transformers' model

    @property
    def ends(self) -> tuple[str, str]:
        """The embedding and the output head."""
        return self.architecture.embedding, _HEAD

    def by_tensor(self) -> dict[str, Weight]:
        return {weight.tensor: weight for weight in self.weights.values()}

    def why_not(self, layer: str) -> str:
        """Why this layer is not among `weights`."""
        if self.tied and layer in self.ends:
            return (
                f"{layer}: embedding and output head of this base are one tensor in GGUF, so llama.cpp cannot adapt one of them; "
                "leave both out, or export the merged model"
            )
        names = sorted({weight.layer.rpartition(".")[2] for weight in self.weights.values()})
        return f"{layer}: llama.cpp's {self.architecture.gguf} has no such weight here; it has {', '.join(names)}"


def base_of(config: Mapping[str, Any] | str | os.PathLike[str]) -> Base:
    """Reads a base model's `config.json`.

    Args:
        config: Its contents, its path, or the path of the model's directory.

    Raises:
        AdapterError: for a model type that is not in `ARCHITECTURES`, or a config without the sizes.
    """
    config = config if isinstance(config, Mapping) else config_of(config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise AdapterError(
            f"the base is of model_type {kind!r}; which of its weights is which tensor of llama.cpp is known for "
            f"{', '.join(sorted(ARCHITECTURES))}. Export the merged model, and convert that with llama.cpp's own converter."
        )
    architecture = ARCHITECTURES[kind]
    tied = config.get("tie_word_embeddings")
    tied = architecture.tied if tied is None else bool(tied)
    sizes = _sizes(config)
    found = _weights(architecture, sizes)
    tied = tied or _HEAD not in found  # Gemma's GGUF has no head of its own, whatever the config says
    for layer in (architecture.embedding, _HEAD) if tied else ():
        found.pop(layer, None)
    return Base(kind, architecture, found, tied, _stacks(architecture, sizes, config) if architecture.stacks else {})


def _stacks(architecture: Architecture, sizes: dict[str, int], config: Mapping[str, Any]) -> dict[str, tuple[Weight, ...]]:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return {}  # a GGUF of it has dense blocks among the others: not tried
    experts, width = config.get("num_experts", config.get("num_local_experts")), config.get("moe_intermediate_size")
    if type(experts) is not int or type(width) is not int:
        raise AdapterError(f"the base's config has num_experts {experts!r} and moe_intermediate_size {width!r}: expected two numbers")
    sizes, names = {**sizes, "expert": width}, _names(architecture, sizes)
    found = {}
    for block in range(sizes["blocks"]):
        for stack, parts in architecture.stacks.items():
            weights = []
            for name, rows, columns in parts:
                layer = f"{architecture.blocks}.{block}.{name}"
                tensor = names.get_name(f"{layer}.weight", (".weight",))
                if tensor is None:
                    raise AdapterError(f"the installed gguf {version()} knows no tensor for {layer}.weight: update it")
                weights.append(Weight(layer, tensor, sizes[rows], sizes[columns], experts=experts))
            found[f"{architecture.blocks}.{block}.{stack}"] = tuple(weights)
    return found


def _names(architecture: Architecture, sizes: dict[str, int]) -> Any:
    """gguf's map of tensor names."""
    gguf = package()
    number = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.gguf), None)
    if number is None:
        raise AdapterError(f"the installed gguf {version()} does not know the architecture {architecture.gguf}: update it")
    return gguf.get_tensor_name_map(number, sizes["blocks"])


def _weights(architecture: Architecture, sizes: dict[str, int]) -> dict[str, Weight]:
    names = _names(architecture, sizes)
    found: dict[str, Weight] = {}

    def add(layer: str, rows: str, columns: str, **more: Any) -> None:
        tensor = names.get_name(f"{layer}.weight", (".weight",))
        if tensor is not None:
            found[layer] = Weight(layer, tensor, sizes[rows], sizes[columns], **more)
        elif layer != _HEAD:
            raise AdapterError(f"the installed gguf {version()} knows no tensor for {layer}.weight of {architecture.gguf}: update it")

    for block in range(sizes["blocks"]):
        for name, (rows, columns) in architecture.layers.items():
            heads = {"q_proj": sizes["heads"], "k_proj": sizes["kv_heads"]}.get(name.rpartition(".")[2], 0)
            add(f"{architecture.blocks}.{block}.{name}", rows, columns, heads=heads if architecture.reordered else 0)
    add(architecture.embedding, "vocabulary", "hidden", lookup=True)
    add(_HEAD, "vocabulary", "hidden")
    return found


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    def size(*keys: str, default: int | None = None) -> int:
        value = next((config[key] for key in keys if config.get(key) is not None), default)
        if type(value) is not int or value < 1:
            raise AdapterError(f"the base's config has no {' or '.join(keys)} (found {value!r}): expected a config.json of Hugging Face")
        return value

    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    kv_heads = size("num_key_value_heads", default=heads)
    head = size("head_dim", default=hidden // heads)
    ffn = size("intermediate_size", "n_inner", default=4 * hidden)
    q, kv = heads * head, kv_heads * head
    return {
        "blocks": size("num_hidden_layers", "n_layer"),
        "vocabulary": size("vocab_size"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn": ffn,
        "gate_up": 2 * ffn,
        "q": q,
        "kv": kv,
        "qkv": q + 2 * kv,
    }


def reorder(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads * d, ...] from Hugging Face's order to llama.cpp's; `heads` of 0 leaves them."""
    return rows[_order(rows.shape[0], heads)] if heads else rows


def restore(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `reorder`."""
    return rows[_order(rows.shape[0], heads).argsort()] if heads else rows


def _order(count: int, heads: int) -> Tensor:
    return torch.arange(count).reshape(heads, 2, count // heads // 2).transpose(1, 2).reshape(-1)


def package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise AdapterError("GGUF files are written with the package gguf, which is not installed: `pip install gguf`") from error
    return gguf


def version() -> str:
    from importlib.metadata import version

    return version("gguf")


def config_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a config.json, by its path or its directory's."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise AdapterError(f"{file} is not there; expected the config.json of the base model, or its directory")
    return read_json(file, error=AdapterError)
