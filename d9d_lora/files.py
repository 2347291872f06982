"""Two verbs for an adapter and its file. The path tells the format.

    save_adapter(model, "adapter")               a Hugging Face PEFT directory; ours (`method.json`) where PEFT has no such adapter
    save_adapter(model, "adapter.safetensors")   the same tensors in one file, with the text of adapter_config.json in its header
    save_adapter(model, "adapter.gguf")          llama.cpp's

    method = load_adapter(model, path)           injects what the file says, and fills it; of a model that has it already, fills it

Both are for a model on any layout. What a file cannot hold, and what a model cannot take, is an error before anything is changed.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from d9d_lora.adapters import AdapterMethod
from d9d_lora.inject import inject_peft_and_freeze
from d9d_lora.layers import AdaptedLayer
from d9d_lora.method import PeftMethod
from d9d_lora.methods.delta import DoesNotFit
from d9d_lora.methods.stack import PeftStack
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.state import peft_save
from d9d_lora.state.atomic import TEMPORARY, RanksFailed, decided, install, sync
from d9d_lora.state.names import clean
from d9d_lora.state.native_format import METHOD, load_trained, method_of_trained, save_trained
from d9d_lora.state.native_format import WEIGHTS as TRAINED
from d9d_lora.state.peft_config import AdapterError, dump
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import IN_HEADER, method_of
from d9d_lora.state.peft_save import Collected, read_back, write_collected, write_tensors
from d9d_lora.state.peft_trained import holds_all
from d9d_lora.walk import adapted_layers

SINGLE, GGUF = ".safetensors", ".gguf"
BaseConfig = Mapping[str, Any] | str | os.PathLike[str]


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    method: PeftMethod[Any] | None = None,
) -> None:
    """Writes the adapter of a model, reads it back, and only then gives it its name. Collective: every rank calls it.

    Args:
        model: The model the method was injected into, on any layout, with or without a process group.
        path: A directory, or a file that ends in .safetensors or .gguf. An earlier adapter there is replaced, anything else is refused.
        base: Name or path of the base model, which is told to whoever loads the adapter.
        task_type: PEFT's.
        method: The method that was injected. Needed only for a directory of an adapter that PEFT has not.

    Raises:
        AdapterError: on every rank alike; what was at `path` before is untouched.
    """
    final = Path(path).absolute()
    if final.suffix == SINGLE:
        write_collected(model, final, lambda c: _write_single(final, c), look=_refuse_directory, base=base, task_type=task_type)
    elif final.suffix == GGUF:
        config = _base_config(model)
        write_collected(model, final, lambda c: _write_gguf(final, c, config), look=_refuse_directory, base=base, task_type=task_type)
    elif method is None or holds_all(model):
        peft_save.save_adapter(model, final, base=base, task_type=task_type)
    else:
        _save_ours(model, final, method)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> PeftMethod[Any]:
    """Injects the adapter of a file into a model, and fills it; each rank reads its part. A model that has it already is filled in place.

    The model may be plain or tensor-parallel, with its weights; under `fully_shard` it must have the adapter already.

    Args:
        model: The base model, or one with the adapter that the file describes.
        path: What `save_adapter` or PEFT wrote, or a GGUF adapter for this model.

    Returns:
        The method, to merge or remove it, or to go on training: its parameters are trainable, all others are frozen.

    Raises:
        AdapterError, CheckpointError, InjectionError: for what cannot be read, does not fit the model, or is for another one. A model that
            had no adapter has none then.
    """
    path = Path(path)
    if path.suffix == GGUF:
        from d9d_lora.export.gguf import gguf_to_peft

        with tempfile.TemporaryDirectory() as folder:  # each rank makes its own
            gguf_to_peft(path, _base_config(model), Path(folder) / "adapter")
            return load_adapter(model, Path(folder) / "adapter")
    ours = (path / METHOD).is_file()
    method = method_of_trained(path) if ours else method_of(path, model)
    if any(True for _ in adapted_layers(model)):
        if ours:
            _expect_same(model, method, path)
        _fill(model, path, ours)
        return method
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        raise AdapterError(
            f"{path} was not loaded: the model is under fully_shard and has no adapter, and one that is injected now would be sharded by "
            "nobody. Call load_adapter before fully_shard; or inject the file's own method first, then shard, then call it"
        )
    flags = [(p, p.requires_grad) for p in model.parameters()]
    inject_peft_and_freeze(method, model)
    try:
        _fill(model, path, ours)
    except BaseException:
        method.remove(model)
        for p, flag in flags:
            p.requires_grad_(flag)
        raise
    return method


def total_parameter_count(model: nn.Module) -> int:
    """The elements of all parameters, whole on every layout; tied ones count once, and packed ones as what they stand for."""
    packed = sum(m.hidden() for m in model.modules() if isinstance(m, NF4Linear))
    return sum(p.numel() for p in model.parameters()) + packed


def trainable_parameter_count(model: nn.Module) -> int:
    """The elements of the parameters that are trained, whole on every layout; tied ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# -- one file -------------------------------------------------------------------------------------------------------------------------


def _refuse_directory(final: Path) -> None:
    if final.is_dir() or (final.exists() and not final.is_file()):
        raise AdapterError(f"{final} is no file, and a name that ends in {final.suffix} means one. Give another path")


def _write_single(final: Path, collected: Collected) -> None:
    held = collected.tensors()
    fresh = final.with_name(f"{TEMPORARY}{secrets.token_hex(6)}_{final.name}")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_tensors(fresh, held, {"format": "pt", IN_HEADER: dump(collected.config)})
        read_back(fresh, held, collected)
        os.replace(fresh, final)
        sync(final.parent)
    finally:
        fresh.unlink(missing_ok=True)


def _write_gguf(final: Path, collected: Collected, config: BaseConfig) -> None:
    from d9d_lora.export.gguf import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        peft_save.write_directory(directory, collected)
        final.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(directory, final, base_config=config)


def _base_config(model: nn.Module) -> BaseConfig:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise AdapterError(
            f"a GGUF adapter goes by the names of its base's GGUF, which follow from config.json, and this {type(model).__name__} has no "
            "`config` as Hugging Face models have. Save a directory, and convert it with d9d_lora.export.gguf.write_gguf"
        )
    fields: dict[str, Any] = config.to_dict()
    return fields


# -- our own directory ----------------------------------------------------------------------------------------------------------------


def _save_ours(model: nn.Module, final: Path, method: PeftMethod[Any]) -> None:
    params: dict[str, Tensor] = {clean(name): p for name, p in model.named_parameters() if p.requires_grad}
    fresh = final.with_name(f"{TEMPORARY}{secrets.token_hex(6)}_{final.name}")
    try:
        decided("looking at the directory", lambda: _refuse_strangers(final))
        try:
            save_trained(method.compact(model, params), method.config, fresh)  # type: ignore[attr-defined]
            decided("giving the directory its name", lambda: install(fresh, final))
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # rank 0's alone: others have made none
    except RanksFailed as error:
        raise AdapterError(f"the adapter was not written to {final}: {error}") from error


def _refuse_strangers(final: Path) -> None:
    if os.path.lexists(final) and not final.is_dir():
        raise AdapterError(f"{final} is not a directory. Give a path that does not exist, or a directory.")
    if final.is_dir() and (strange := sorted(p.name for p in final.iterdir() if p.name not in {METHOD, TRAINED})):
        raise AdapterError(f"{final} holds {strange[:5]}, which is no part of our format. Give a new directory, or an empty one.")


def _fill(model: nn.Module, path: Path, ours: bool) -> None:
    if ours:
        load_trained(model, path)
        for layer in adapted_layers(model):
            layer.started |= not layer.delta.moves_base
    else:
        load_adapter_weights(model, path)


@torch.no_grad()
def _expect_same(model: nn.Module, method: PeftMethod[Any], path: Path) -> None:
    """That every layer of the model has the delta which the file's method gives it: names and shapes would not tell another scale."""
    for part in method.methods if isinstance(method, PeftStack) else [method]:
        if not isinstance(part, AdapterMethod):
            continue
        layers = part.layers(model)
        if not layers:
            raise AdapterError(f"{path} is of a {part.kind!r} adapter, which the model has not. Load it into the bare model")
        for names, layer in layers:
            if (wanted := _fitted(part, names[0], layer)) != layer.delta:
                has = f"and the model has {layer.delta}. Load it into the bare model"
                raise AdapterError(f"{path} describes {wanted} for {names[0]}, {has}")


def _fitted(method: AdapterMethod[Any], name: str, layer: AdaptedLayer) -> Any:
    delta = method.delta_for(name)
    try:
        return None if delta is None else delta.fit(layer.geometry(layer.base))
    except DoesNotFit as error:
        return error
