"""What was trained, by the names it has in the model: for methods that no other library has a format for.

    method.json           the method's config, with its `kind`
    weights.safetensors   every trained tensor, whole, under its name

An adapter that PEFT knows is written as PEFT's directory instead (`peft_save.py`).
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import Tensor, nn

from d9d_lora.method import PeftMethod
from d9d_lora.patterns import NotLinear, check_key, is_like, refuse_costly
from d9d_lora.placement import full_of
from d9d_lora.registry import peft_method_from_config
from d9d_lora.state.atomic import decided, gather, sync_tree, to_first
from d9d_lora.state.names import clean
from d9d_lora.state.peft_limits import huge_numbers
from d9d_lora.state.reader import LoadReport, load_checkpoint, named_state
from d9d_lora.state.safetensors_dir import CheckpointError, open_checkpoint
from d9d_lora.state.untrusted import AGAIN, inside, is_name, read_json, shown

METHOD, WEIGHTS = "method.json", "weights.safetensors"


@torch.no_grad()
def save_trained(params: Mapping[str, Tensor], config: BaseModel, path: Path) -> None:
    """Writes trained tensors and the method's config, and reads them back. Collective: gathers one tensor after another.

    Raises:
        RanksFailed: on every rank, if rank 0 could not write, or what it wrote reads back otherwise.
    """
    trained_writer(params, config)(path)


@torch.no_grad()
def trained_writer(params: Mapping[str, Tensor], config: BaseModel) -> Callable[[Path], None]:
    """`save_trained` in two halves: this one copies the tensors to rank 0, the function that it returns writes the copies to a path.

    Both are collective. In between, and beside the second, the model may change. A tensor that only some ranks have, as stages of a
    pipeline do, comes from the first of them.
    """
    owners: dict[str, tuple[int, Tensor]] = {}
    for rank, there in enumerate(gather({name: (tuple(t.shape), t.dtype) for name, t in params.items()})):
        owners |= {n: (rank, torch.empty(s, dtype=d, device="meta")) for n, (s, d) in there.items() if n not in owners}
    held: dict[str, Tensor] = {}
    for name, (owner, outline) in sorted(owners.items()):
        whole = to_first(full_of(params[name].detach()) if name in params else None, outline, owner)
        if whole is not None:
            held[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return lambda path: decided("writing what was trained", lambda: _write(held, config, path))


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
    """The method whose result a directory holds, to inject before `load_trained`.

    Raises:
        CheckpointError: a file that is missing or broken, an unknown method, or a config that the method refuses; which field, and why.
    """
    config = read_json(inside(path, path / METHOD))
    try:
        _refuse_slow(config)
        if faults := huge_numbers(config):
            raise CheckpointError("; ".join(faults[:5]))
        return peft_method_from_config(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path / METHOD} cannot be followed: {str(error)[:2000]}. {AGAIN}") from error


def _refuse_slow(config: Any) -> None:
    """Expressions of a file, which will be tried on names of the model, must not be able to keep it busy."""
    for part in config if isinstance(config, list) else ():
        _refuse_slow(part)
    for field, value in config.items() if isinstance(config, dict) else ():
        try:
            if field in ("target_modules", "exclude_modules", "module_name_pattern") and isinstance(value, str):
                is_like(value)
            elif field in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
                refuse_costly(value, [" " * 100] * 1000)  # as many layers as a large model has
                for key in value:
                    check_key(key)
            elif field in ("modules_to_save", "layers_pattern"):
                plain = [value] if isinstance(value, str) else value or []
                if not isinstance(plain, list) or not all(is_name(name) and re.fullmatch(r"[\w.-]+", name) for name in plain):
                    raise CheckpointError(f"{field} = {shown(value)}: expected plain names")
            else:
                _refuse_slow(value)
        except NotLinear as error:
            raise CheckpointError(f"{field} = {shown(value)}: {error}") from error


def load_trained(model: nn.Module, path: Path, *, elsewhere: Collection[str] = (), compare: bool = False) -> LoadReport:
    """Fills the trained parameters of an injected model, on any layout, each rank its own box; names must be the same.

    Args:
        elsewhere, compare: As of `load_adapter_weights`.

    Raises:
        CheckpointError: unknown, missing or misshapen names, and values that are not finite; nothing has been changed then.
    """
    trained = {clean(name) for name, p in model.named_parameters() if p.requires_grad}
    with open_checkpoint(inside(path, path / WEIGHTS)) as files:
        held = {name: partial(files.read, name) for name in files.names()}
        keys, names = method_of_trained(path).expand(model, held)
        left_alone = {name for name, _ in named_state(model)} - (trained - names)
        ignored = [f"^{re.escape(key)}$" for key in sorted(keys)]
        return load_checkpoint(
            model, files, skip=left_alone, ignore_unexpected=ignored, elsewhere=elsewhere, all_or_none=True, compare=compare
        )
