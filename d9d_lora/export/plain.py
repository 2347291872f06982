"""A plain LoRA as a PEFT directory: one r, one lora_alpha, no patterns, no rsLoRA; the fields that every reader of this format knows.

    adapter_config.json          sorted; the same bytes for the same adapter
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight [R, in], .lora_B.weight [out, R]; lora_embedding_A [R, V], _B [d, R]

It is written under a temporary name, read back to the bit, and renamed.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d9d_lora.export.fold import Folded
from d9d_lora.methods.dora import MAGNITUDE
from d9d_lora.state.atomic import TEMPORARY, install, sync, sync_tree
from d9d_lora.state.names import PEFT_PREFIX
from d9d_lora.state.peft_config import CONFIG, PEFT_VERSION, WEIGHTS, AdapterError, dump
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.state.safetensors_write import Promise, library_order, write_safetensors


def plain_config(folded: Folded, targets: list[str] | str, source: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a plain LoRA; base model, task and dropout are those of `source`, the config it comes from."""
    kept = {name: source.get(name) for name in ("base_model_name_or_path", "revision", "task_type", "auto_mapping")}
    return {
        **kept,
        "alpha_pattern": {},
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": bool(source.get("fan_in_fan_out")),
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": folded.alpha,
        "lora_bias": False,
        "lora_dropout": source.get("lora_dropout") or 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": folded.r,
        "rank_pattern": {},
        "target_modules": targets,
        "use_dora": any(product.magnitude is not None for product in folded.products.values()),
        "use_rslora": False,
    }


def write_plain(output: Path, folded: Folded, config: Mapping[str, Any], *, replace: bool = False) -> None:
    """Writes the directory; `replace`: in the place of an earlier one.

    Raises:
        AdapterError: something is at `output` that may not be replaced, a value that is not finite, or a disk that lies.
    """
    tensors: dict[str, Tensor] = {}
    for layer, product in folded.products.items():
        stem = f"{PEFT_PREFIX}{layer}.lora_" + ("embedding_{}" if product.lookup else "{}.weight")
        tensors |= {stem.format("A"): product.A, stem.format("B"): product.B}
        if product.magnitude is not None:
            tensors[f"{PEFT_PREFIX}{layer}.{MAGNITUDE}"] = product.magnitude
    write_directory(output, {CONFIG: dump(dict(config))}, WEIGHTS, tensors, replace=replace)


def write_directory(
    output: Path, texts: Mapping[str, str], weights: str, tensors: Mapping[str, Tensor], *, replace: bool = False
) -> None:
    """Writes small texts and one safetensors file into a directory that appears whole, or not at all."""
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise AdapterError(f"{key!r} has values that are not finite: go back to an earlier checkpoint")

    def fill(fresh: Path) -> None:
        promises = library_order(Promise(key, t.dtype, tuple(t.shape)) for key, t in tensors.items())
        write_safetensors(fresh / weights, promises, lambda key: [tensors[key]], {"format": "pt"})
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        with open_checkpoint(fresh / weights) as files:
            same = files.names() == sorted(tensors) and all(
                files.dtype(key) == value.dtype and torch.equal(files.read(key), value) for key, value in tensors.items()
            )
        if not same or any((fresh / name).read_text(encoding="utf-8") != text for name, text in texts.items()):
            raise AdapterError(f"{output} reads back otherwise than it was written: check the disk, and export again")

    appear(output, fill, replace=replace)


def appear(output: Path, fill: Callable[[Path], None], *, replace: bool = False) -> None:
    """Makes a directory by `fill`, under a temporary name until all of it is on the disk.

    Raises:
        AdapterError: `output` exists, and may not be replaced.
    """
    output = output.absolute()
    refuse_existing(output, replace=replace)
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(f"{TEMPORARY}{output.name}_{secrets.token_hex(6)}")
    fresh.mkdir()
    try:
        fill(fresh)
        sync_tree(fresh)
        refuse_existing(output, replace=replace)
        if replace:
            install(fresh, output)
        else:
            os.rename(fresh, output)
            sync(output.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def refuse_existing(output: Path, *, replace: bool) -> None:
    if os.path.lexists(output) and not (replace and output.is_dir() and not output.is_symlink()):
        raise AdapterError(f"{output} exists already. Give a new path, or remove it first.")
