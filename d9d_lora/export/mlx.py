"""mlx-lm's adapter directory, both ways.

    adapter_config.json     fine_tune_type lora or dora, num_layers, lora_parameters {rank, scale, dropout, keys}
    adapters.safetensors    <layer>.lora_a [in, r], <layer>.lora_b [r, out], of DoRA also <layer>.m [out]

The factors are PEFT's, transposed; scale is PEFT's alpha / r. There is one rank and one scale for all layers, so others are padded and
folded (`fold.py`). `keys` are names inside a block where the last `num_layers` blocks are adapted alike, else full names.

Names are those of mlx-lm's own model classes. For the families of `SAME_NAMES` they are Hugging Face's; elsewhere (fused or split
weights, experts) they may not be, and the export is refused. Formulas and names: mlx-lm 0.32.2, tuner/lora.py, dora.py and utils.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d9d_lora.export.fold import Folded, fold_scale
from d9d_lora.export.low_rank import Product
from d9d_lora.export.plain import plain_config, write_directory, write_plain
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.state.untrusted import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
# model_type of config.json: linear layers and embedding of the same names in transformers and in mlx-lm
SAME_NAMES = frozenset({
    "gemma3_text", "glm", "hunyuan_v1_dense", "llama", "mistral", "nemotron", "olmo2", "phi", "phi3", "qwen2", "qwen3", "seed_oss",
    "smollm3", "starcoder2",
})  # fmt: skip
_EMBEDDINGS = ("embed_tokens",)  # of those families


def write_mlx(
    output: Path, products: Mapping[str, Product], base_config: Mapping[str, Any], *, dropout: float = 0.0, replace: bool = False
) -> Folded:
    """Writes the directory that `mlx_lm.load(model, adapter_path=...)` reads.

    Args:
        products: The adapter's layers (`low_rank.read_products`); with a magnitude all, or none.
        base_config: The base's config.json.
        dropout: Of a training that goes on in mlx-lm.

    Raises:
        AdapterError: what mlx-lm cannot hold; nothing is written.
    """
    if faults := mlx_faults({name: p.magnitude is not None for name, p in products.items()}, _lookups(products), base_config):
        raise AdapterError("mlx-lm cannot take this adapter:\n  " + "\n  ".join(faults))
    folded = fold_scale(products)
    keys, blocks = keys_of(list(products), base_config.get("num_hidden_layers"))
    dora = any(p.magnitude is not None for p in products.values())
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {"dropout": dropout, "keys": keys, "rank": folded.r, "scale": folded.alpha / folded.r},
        "num_layers": blocks,
    }
    tensors: dict[str, Tensor] = {}
    for name, p in folded.products.items():
        tensors |= {f"{name}.lora_a": p.A.T.contiguous(), f"{name}.lora_b": p.B.T.contiguous()}
        if p.magnitude is not None:
            tensors[f"{name}.m"] = p.magnitude
    write_directory(output, {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}, WEIGHTS, tensors, replace=replace)
    return folded


def _lookups(products: Mapping[str, Product]) -> set[str]:
    return {name for name, p in products.items() if p.lookup}


def mlx_faults(layers: Mapping[str, bool], lookups: set[str], base_config: Mapping[str, Any]) -> list[str]:
    """What mlx-lm could not hold, as sentences. `layers`: whether each has a magnitude."""
    faults = []
    family = base_config.get("model_type")
    if family not in SAME_NAMES:
        faults.append(
            f"the names that mlx-lm gives the layers of a {family or 'model without model_type'} are not known here, only those of "
            f"{', '.join(sorted(SAME_NAMES))}; fuse instead: profile=merged, and mlx_lm.convert of the result"
        )
    if len(set(layers.values())) > 1:
        faults.append("some layers have a magnitude (DoRA) and some have none; fine_tune_type is one for all")
    tied = base_config.get("tie_word_embeddings", False)
    for name in sorted(layers):
        if name in lookups and layers[name]:
            faults.append(f"{name}: mlx-lm has a DoRA magnitude for every token of an embedding, PEFT one for every feature")
        elif name in lookups and tied:
            faults.append(f"{name}: the base ties it to the output head, where mlx-lm applies the adapter too and PEFT does not")
        elif tied and name.rpartition(".")[2] == "lm_head":
            faults.append(f"{name}: the base ties it to the input embedding, and mlx-lm then has no such layer")
    return faults


def keys_of(names: list[str], blocks: int | None) -> tuple[list[str], int]:
    """(keys, num_layers): names inside a block if the last blocks are adapted alike, else full names."""
    inside: dict[int, set[str]] = {}
    outside = []
    for name in names:
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            inside.setdefault(int(match[1]), set()).add(match[2])
        else:
            outside.append(name)
    alike = len({frozenset(found) for found in inside.values()}) == 1
    if blocks and alike and sorted(inside) == list(range(blocks - len(inside), blocks)):
        return sorted({*outside, *next(iter(inside.values()))}), len(inside)
    return sorted(names), max(len(inside), 1)


# -- and back ------------------------------------------------------------------------------------------------------------------------------


def mlx_to_peft(path: Path, output: Path, *, base: str | None = None, replace: bool = False) -> Folded:
    """Writes an mlx-lm adapter as a PEFT directory; factors to the bit, alpha = scale * rank.

    Args:
        path: A directory with adapter_config.json and adapters.safetensors, of fine_tune_type lora or dora.
        base: `base_model_name_or_path` of the result.

    Raises:
        AdapterError, CheckpointError: a field or a tensor that is missing, unknown or misshapen; nothing is written.
    """
    dora, rank, scale, dropout = _read_config(path / CONFIG)
    products = _read_products(path / WEIGHTS, dora, rank, scale)
    folded = Folded(products, rank, _plain(scale * rank))
    config = plain_config(folded, sorted(products), {"base_model_name_or_path": base, "lora_dropout": dropout})
    write_plain(output, folded, config, replace=replace)
    return folded


def _read_config(path: Path) -> tuple[bool, int, float, float]:
    """(whether it is DoRA, rank, scale, dropout)."""
    config = read_json(path, error=AdapterError)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{path}: fine_tune_type is {kind!r}; only lora and dora are adapters (a full fine-tune is a model)")
    said = config.get("lora_parameters")
    given: dict[str, Any] = said if isinstance(said, dict) else {}
    rank, scale, dropout = (given.get(name, default) for name, default in (("rank", 0), ("scale", 0), ("dropout", 0.0)))
    if not _is_number(rank) or rank != int(rank) or not 1 <= rank <= 1 << 20:
        raise AdapterError(f"{path}: lora_parameters.rank is {rank!r}; expected a whole number of at least 1")
    if not _is_number(scale) or scale <= 0:
        raise AdapterError(f"{path}: lora_parameters.scale is {scale!r}; expected a positive number")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise AdapterError(f"{path}: lora_parameters.dropout is {dropout!r}; expected a number from 0 to below 1")
    return kind == "dora", int(rank), float(scale), float(dropout)


def _read_products(path: Path, dora: bool, rank: int, scale: float) -> dict[str, Product]:
    found: dict[str, Product] = {}
    expected = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    with open_checkpoint(path) as files:
        layers: dict[str, dict[str, str]] = {}
        for key in files.names():
            layer, _, leaf = key.rpartition(".")
            layers.setdefault(layer, {})[leaf] = key
        for layer, keys in sorted(layers.items()):
            if not layer or keys.keys() != expected:
                raise AdapterError(f"{path}: {layer or 'the root'} has the tensors {sorted(keys)}; expected {sorted(expected)}")
            a, b = files.shape(keys["lora_a"]), files.shape(keys["lora_b"])
            m = files.shape(keys["m"]) if dora else b[1:]
            if len(a) != 2 or len(b) != 2 or a[1] != rank or b[0] != rank or m != b[1:]:
                of = f" and m {m}" if dora else ""
                raise AdapterError(f"{path}: {layer} has lora_a {a}, lora_b {b}{of}; expected [in, {rank}], [{rank}, out] and m [out]")
            lookup = layer.rpartition(".")[2] in _EMBEDDINGS
            if lookup and dora:
                raise AdapterError(f"{path}: {layer} has a DoRA magnitude for every token, which PEFT has for every feature instead")
            A, B = (files.read(keys[name]).T.contiguous() for name in ("lora_a", "lora_b"))
            found[layer] = Product(A, B, scale, lookup, files.read(keys["m"]) if dora else None)
    if not found:
        raise AdapterError(f"{path} holds no adapter at all")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number
