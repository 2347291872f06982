"""What was trained, by the names it has in the model: for methods that no other library has a format for.

    method.json           the method's config, with its `kind`
    weights.safetensors   every trained tensor, whole, under its name

An adapter that PEFT knows is written as PEFT's directory instead (`peft_format.py`).
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import Tensor, nn

from d9d_lora.method import PeftMethod
from d9d_lora.placement import full_of
from d9d_lora.registry import peft_method_from_config
from d9d_lora.state.atomic import decided, rank_and_world, sync_tree
from d9d_lora.state.names import clean
from d9d_lora.state.reader import load_checkpoint, named_state
from d9d_lora.state.safetensors_dir import open_checkpoint

METHOD, WEIGHTS = "method.json", "weights.safetensors"


@torch.no_grad()
def save_trained(params: Mapping[str, Tensor], config: BaseModel, path: Path) -> None:
    """Writes trained tensors and the method's config, and reads them back. Collective: gathers one tensor after another.

    Raises:
        RanksFailed: on every rank, if rank 0 could not write, or what it wrote reads back otherwise.
    """
    held = {}
    for name in sorted(params):
        whole = full_of(params[name].detach())
        if rank_and_world()[0] == 0:
            held[name] = whole.cpu().contiguous()
    decided("writing what was trained", lambda: _write(held, config, path))


def _write(held: dict[str, Tensor], config: BaseModel, path: Path) -> None:
    if wrong := [name for name, value in held.items() if not value.isfinite().all()]:
        raise ValueError(f"{wrong[:4]} have values that are not finite: go back to an earlier checkpoint")
    path.mkdir(parents=True, exist_ok=True)
    (path / METHOD).write_text(json.dumps(json.loads(config.model_dump_json()), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(held, path / WEIGHTS, {"format": "pt"})
    sync_tree(path)
    with open_checkpoint(path / WEIGHTS) as files:
        if files.names() != sorted(held) or not all(torch.equal(files.read(name), value) for name, value in held.items()):
            raise ValueError(f"{path / WEIGHTS} reads back otherwise than it was written: check the disk, and save again")


def method_of_trained(path: Path) -> PeftMethod:
    """The method whose result a directory holds, to inject before `load_trained`."""
    return peft_method_from_config(json.loads((path / METHOD).read_text(encoding="utf-8")))


def load_trained(model: nn.Module, path: Path) -> None:
    """Fills the trained parameters of an injected model, on any layout, each rank its own box; names must be the same."""
    trained = {clean(name) for name, p in model.named_parameters() if p.requires_grad}
    with open_checkpoint(path / WEIGHTS) as files:
        held = {name: partial(files.read, name) for name in files.names()}
        keys, names = method_of_trained(path).expand(model, held)
        left_alone = {name for name, _ in named_state(model)} - (trained - names)
        load_checkpoint(model, files, skip=left_alone, ignore_unexpected=[f"^{re.escape(key)}$" for key in sorted(keys)])
