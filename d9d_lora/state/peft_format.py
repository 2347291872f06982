"""Hugging Face PEFT's adapter directory, written from a model on any layout and read into one.

    adapter_config.json          what peft.LoraConfig(**json) takes: sorted, the same bytes for the same adapter
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight [r, in], .lora_B.weight [out, r]
                                 base_model.model.<layer>.lora_embedding_A [r, V], .lora_embedding_B [d, r]
                                 base_model.model.<layer>.lora_B.bias [out]      with `lora_bias`
                                 base_model.model.<layer>.lora_magnitude_vector [out]          DoRA
                                 base_model.model.<layer>.base_layer.bias        a trained bias of an adapted layer
                                 base_model.model.<name>                         everything else that is trained

An adapter whose start moved the base weight (PiSSA, OLoRA) is written with that start beside it, [A|A0] and [B|-B0] of twice the rank:
a plain adapter for the base as it was.

Names and meanings are those of PEFT 0.21.2. `peft_config.py` makes the json, `peft_read.py` reads it; this file moves the tensors.
"""

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.layers import AdaptedLayer
from d9d_lora.methods.dora import MAGNITUDE
from d9d_lora.placement import full_of, local_of
from d9d_lora.state.atomic import (
    TEMPORARY,
    RanksFailed,
    decided,
    gather,
    install,
    rank_and_world,
    sync,
    sync_tree,
    together,
)
from d9d_lora.state.mappers import ModelStateMapperParallel, ModelStateMapperRename
from d9d_lora.state.names import BASE, PEFT_PREFIX, clean
from d9d_lora.state.peft_config import (
    CONFIG,
    WEIGHTS,
    WRITTEN,
    AdapterError,
    check_config,
    config_of,
    dump,
)
from d9d_lora.state.peft_read import method_of, parts_of, read_adapter_config
from d9d_lora.state.reader import LoadReport, assemble, load_checkpoint, local_runs, named_state
from d9d_lora.state.safetensors_dir import CheckpointFiles, open_checkpoint
from d9d_lora.state.safetensors_write import Promise, library_order, write_safetensors
from d9d_lora.walk import names_of_modules, reshard

__all__ = ["AdapterError", "load_adapter_weights", "method_of", "read_adapter_config", "save_adapter"]

_OURS = {CONFIG, WEIGHTS, "README.md"}  # a directory with anything else in it is not ours to replace
_FACTORS = {
    (False, "lora_A"): "lora_A.weight",
    (False, "lora_B"): "lora_B.weight",
    (False, "lora_B_bias"): "lora_B.bias",
    (True, "lora_A"): "lora_embedding_A",
    (True, "lora_B"): "lora_embedding_B",
    (False, MAGNITUDE): MAGNITUDE,
    (True, MAGNITUDE): MAGNITUDE,
}


@dataclass(frozen=True)
class _Trained:
    """What an adapter directory holds of a model."""

    layers: list[AdaptedLayer]
    tensors: dict[str, tuple[str, Tensor]]  # key in the file -> (name in the model, tensor)
    bias: str
    whole: list[str]  # modules trained whole
    starts: dict[str, tuple[Tensor, int, int]]  # key -> (what the start took off the base weight, along which dimension it follows, sign)


# -- save -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, base: str | None = None, task_type: str | None = "CAUSAL_LM") -> None:
    """Writes the adapter of a model as a PEFT directory, reads it back, and only then gives it its name.

    Collective: every rank calls it. Tensors are gathered one at a time in the order of their names; rank 0 alone keeps
    and writes them. The file is the same, byte for byte, on every layout.

    Args:
        model: The model the method was injected into, on any layout, with or without a process group.
        path: The directory. An empty one is filled in place; an earlier adapter is replaced; anything else is refused.
        base: Name or path of the base model, for `base_model_name_or_path`.
        task_type: PEFT's task type.

    Raises:
        AdapterError: on every rank alike; what was at `path` before is untouched.
    """
    final = Path(path).absolute()
    try:
        reshard(model)  # first: what FSDP2 still holds gathered after a forward is freed memory soon, and no step has reached it
        trained = together("listing what is trained", lambda: _trained(model))
        config = together("describing the adapter", lambda: _describe(model, trained, base, task_type))
        _agree(trained, dump(config))
        decided("looking at the directory", lambda: _refuse_other(final))
        held: dict[str, Tensor] = {}
        for key in sorted(trained.tensors):
            value = _gathered(trained.tensors[key][1])
            if key in trained.starts:
                start, dim, sign = trained.starts[key]
                value = torch.cat([value, sign * _gathered(start).to(value)], dim)
            if rank_and_world()[0] == 0:
                held[key] = value.detach().cpu()
        expected = {key: _shape(trained, key) for key in trained.tensors}
        decided("writing the adapter", lambda: _write(final, held, expected, config, trained.layers))
    except RanksFailed as error:
        raise AdapterError(f"the adapter was not written to {final}: {error}") from error


def _trained(model: nn.Module) -> _Trained:
    """Factors always; of the rest what requires a gradient, as PEFT divides it: biases, and modules trained whole."""
    modules = [(clean(f"{names[0]}.")[:-1], names[0], m) for names, m in names_of_modules(model)]
    layers = sorted((m for _, _, m in modules if isinstance(m, AdaptedLayer)), key=lambda m: m.name)
    if not layers:
        raise AdapterError(
            "the model has no adapter, so there is nothing that PEFT's LoRA format could hold. "
            "Modules trained whole alone are exported as a merged model."
        )
    if several := next((layer for layer in layers if layer.others()), None):
        raise AdapterError(
            f"{several.name} has the adapters {', '.join(several.adapters_by_name())}, and a directory holds one: write each inside "
            "`with only_adapter(model, name)`"
        )
    tensors: dict[str, tuple[str, Tensor]] = {}
    starts = {key: start for layer in layers for key, start in _starts(layer).items()}
    biases: dict[str, tuple[str, nn.Parameter]] = {}  # key in the file -> (name in the model, bias)
    whole: dict[str, tuple[str, nn.Module]] = {}
    for clear, path, m in modules:
        if isinstance(m, AdaptedLayer):
            tensors |= _factors(path, m)
            for name, p in m.base.named_parameters():
                if name == "bias":
                    biases[f"{PEFT_PREFIX}{m.name}.base_layer.bias"] = (f"{path}.{BASE}.bias", p)
                elif p.requires_grad:
                    raise AdapterError(
                        f"{m.name}.{name} is trained beside its own adapter ({m.delta}); PEFT's format has no place for "
                        "it. Freeze it, or train the module whole without an adapter."
                    )
            continue
        own = dict(m.named_parameters(recurse=False))
        if any(p.requires_grad for name, p in own.items() if name != "bias"):
            whole[clear] = (path, m)
        elif "bias" in own:
            biases[f"{PEFT_PREFIX}{clear}.bias"] = (f"{path}.bias", own["bias"])
    mode = _bias_mode(biases)
    for key, (path, p) in biases.items():
        if mode == "all" or (mode == "lora_only" and key.endswith(".base_layer.bias")):
            tensors[key] = (path, p)
        elif p.requires_grad:
            owner, clear = path.rpartition(".")[0], key.removeprefix(PEFT_PREFIX).rpartition(".")[0]
            whole[clear] = (owner, model.get_submodule(owner))
    for clear, (path, m) in whole.items():
        tensors |= _all_of(clear, path, m)
    return _Trained(layers, tensors, mode, sorted(whole), starts)


def _describe(model: nn.Module, trained: _Trained, base: str | None, task_type: str | None) -> dict[str, object]:
    config = config_of(model, trained.layers, bias=trained.bias, whole=trained.whole)
    config |= {"base_model_name_or_path": base, "task_type": task_type}
    check_config(config, trained.layers)
    return config


def _factors(path: str, layer: AdaptedLayer) -> dict[str, tuple[str, Tensor]]:
    if layer.delta.kind != "lora":
        raise AdapterError(f"{layer.name} has a {layer.delta.kind!r} adapter; PEFT's LoRA format holds 'lora' only")
    if not isinstance(layer, WRITTEN):
        kind = type(layer.base).__name__
        raise AdapterError(f"{layer.name} is a {kind}, whose adapter is not written in PEFT's format yet; `save_trained` writes ours")
    found: dict[str, tuple[str, Tensor]] = {}
    shapes = layer.delta.shapes(layer.out_size, layer.in_size)
    for name, p in layer.factors().items():
        if tuple(p.shape) != shapes[name]:
            raise AdapterError(f"{layer.name}.{name} is {tuple(p.shape)}; {layer.delta} makes it {shapes[name]}")
        found[_key(layer, name)] = (f"{path}.{name}.weight", p)
    return found


def _key(layer: AdaptedLayer, factor: str) -> str:
    return f"{PEFT_PREFIX}{layer.name}.{_FACTORS[layer.lookup, factor]}"


def _starts(layer: AdaptedLayer) -> dict[str, tuple[Tensor, int, int]]:
    """B A - B0 A0 = [B|-B0] [A|A0]: with its start beside it, an adapter that moved the base fits the base as it was."""
    joined = {"lora_A": (0, 1), "lora_B": (1, -1)}
    return {_key(layer, name): (t, *joined[name]) for name, t in layer.origin.items() if name in joined}


def _shape(trained: _Trained, key: str) -> tuple[int, ...]:
    shape = list(trained.tensors[key][1].shape)
    if key in trained.starts:
        shape[trained.starts[key][1]] *= 2
    return tuple(shape)


def _bias_mode(biases: dict[str, tuple[str, nn.Parameter]]) -> str:
    """PEFT knows three sets of trained biases: none, the adapted layers', and every one in the model."""
    adapted = {key for key in biases if key.endswith(".base_layer.bias")}
    live = {key for key, (_, p) in biases.items() if p.requires_grad}
    if live == biases.keys() and live - adapted:
        return "all"
    return "lora_only" if live & adapted else "none"


def _all_of(clear: str, path: str, m: nn.Module) -> dict[str, tuple[str, Tensor]]:
    if not clear or any(isinstance(child, AdaptedLayer) for child in m.modules()):
        raise AdapterError(
            f"a parameter of {clear or 'the model itself'!r} is trained, and that module also holds adapted layers: PEFT "
            "saves whole modules only, and cannot copy this one. Freeze the parameter, or export the merged model."
        )
    state: list[tuple[str, Tensor]] = [*m.named_parameters(recurse=False)]
    state += [(n, b) for n, b in m.named_buffers(recurse=False) if n not in m._non_persistent_buffers_set]
    return {f"{PEFT_PREFIX}{clear}.{name}": (f"{path}.{name}", tensor) for name, tensor in state}


def _agree(trained: _Trained, config: str) -> None:
    """Ranks that list other tensors would wait for each other for ever in the first gather."""
    listed = [(key, tuple(t.shape), isinstance(t, DTensor)) for key, (_, t) in sorted(trained.tensors.items())]
    marks = gather(sha256(repr((listed, config)).encode()).hexdigest())
    if len(set(marks)) > 1:
        raise AdapterError(
            f"ranks hold different adapters (by rank: {[mark[:8] for mark in marks]}). Every rank must hold the whole model "
            "by name, each its shards of it; a pipeline stage saves its own part."
        )


def _gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; collective on a DTensor. Offloaded shards travel on the device of their mesh."""
    if not isinstance(tensor, DTensor):
        return tensor
    device = tensor.device_mesh.device_type
    return full_of(tensor if tensor.device.type == device else tensor.to(device))


def _refuse_other(final: Path) -> None:
    if final.is_dir():
        if strange := sorted(p.name for p in final.iterdir() if p.name not in _OURS):
            raise AdapterError(
                f"{final} holds {strange[:5]}, which is no part of an adapter. Give a new directory, an empty one, or "
                "that of an earlier adapter, which is replaced."
            )
    elif os.path.lexists(final):
        raise AdapterError(f"{final} is not a directory. Give a path that does not exist, or a directory.")


def _write(
    final: Path,
    held: dict[str, Tensor],
    expected: dict[str, tuple[int, ...]],
    config: dict[str, object],
    layers: list[AdaptedLayer],
) -> None:
    for key, value in held.items():
        if tuple(value.shape) != expected[key]:
            raise AdapterError(f"{key!r} was gathered as {tuple(value.shape)}; the model says {expected[key]}: a shard")
        if value.is_floating_point() and not value.isfinite().all():
            raise AdapterError(f"{key!r} has values that are not finite: go back to an earlier checkpoint")
    final.parent.mkdir(parents=True, exist_ok=True)
    # an empty directory may be somebody's half-made checkpoint, of which this one is a part: it keeps its name
    fill = final.is_dir() and not any(final.iterdir())
    fresh = (final if fill else final.parent) / f"{TEMPORARY}{final.name}_{secrets.token_hex(6)}"
    fresh.mkdir()
    try:
        promises = library_order(Promise(key, t.dtype, tuple(t.shape)) for key, t in held.items())
        write_safetensors(fresh / WEIGHTS, promises, lambda key: [held[key]], {"format": "pt"})
        (fresh / CONFIG).write_text(dump(config), encoding="utf-8")
        _read_back(fresh, held, config, layers)
        sync_tree(fresh)
        if fill:
            for name in (WEIGHTS, CONFIG):  # the config last: without it nobody takes the directory for an adapter
                os.replace(fresh / name, final / name)
            sync(final)
        else:
            install(fresh, final)
    except BaseException:
        if fill:
            for name in (WEIGHTS, CONFIG):
                (final / name).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _read_back(fresh: Path, held: dict[str, Tensor], config: dict[str, object], layers: list[AdaptedLayer]) -> None:
    """What a reader will find, compared with what the model holds: every tensor to the bit, the config by meaning."""
    with open_checkpoint(fresh / WEIGHTS) as files:
        if files.names() != sorted(held):
            raise AdapterError(f"{WEIGHTS} holds other tensors than were written: {set(files.names()) ^ set(held)}")
        for key, value in held.items():
            found = files.read(key)
            same = found.dtype == value.dtype and found.shape == value.shape
            if not same or not torch.equal(_bits(found), _bits(value)):
                raise AdapterError(f"{key!r} reads back otherwise than it was written: check the disk, and save again")
    again = read_adapter_config(fresh)
    if again != config:
        raise AdapterError(f"{CONFIG} reads back otherwise than it was written")
    check_config(again, layers)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# -- load -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_adapter_weights(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Fills the adapter of a model from a PEFT directory; each rank reads the bytes of its own box only.

    The model is injected already (by the method that `method_of` makes, say), its base weights are loaded, and it may
    be on any layout. No collective.

    Raises:
        AdapterError, CheckpointError: unknown, missing and misshapen keys in one message before anything is read; a
            value that is not finite; a copy of a base weight in the file that is not the model's base weight.
    """
    read_adapter_config(path)
    reshard(model)
    trained = _trained(model)
    if moved := [layer for layer in trained.layers if layer.delta.moves_base]:
        raise AdapterError(
            f"the start of {moved[0].name} ({moved[0].delta}) moves the base weight, and {path} is for untouched ones. Inject "
            "`method_of(path)` into the base as it was, and load into that"
        )
    state = dict(named_state(model))
    mine = {name for name, _ in trained.tensors.values()}
    ours = {id(state[name]) for name in mine}
    others = {name for name, tensor in state.items() if name not in mine and id(tensor) not in ours}
    mapper = ModelStateMapperParallel([ModelStateMapperRename(key, name) for key, (name, _) in sorted(trained.tensors.items())])
    with open_checkpoint(Path(path) / WEIGHTS) as files:
        copies = parts_of(files.names()).base_copies
        for layer in trained.layers:
            if layer.name in copies:
                _same_base(files, copies[layer.name], layer)
        known = [f"^{re.escape(copies[layer.name])}$" for layer in trained.layers if layer.name in copies]
        report = load_checkpoint(model, files, mapper, skip=others, ignore_unexpected=known)
    for layer in trained.layers:
        layer.started |= not layer.delta.moves_base  # every factor has its value, those that start from the weight too
    return report


def _same_base(files: CheckpointFiles, key: str, layer: AdaptedLayer) -> None:
    """PEFT saves the weight of an adapted embedding (and head) beside the factors, and puts it into any model it meets.

    A copy of what the model holds anyway is harmless. One that differs belongs to another base, or was trained itself:
    to load it in silence would change a weight that is frozen here and that no later save would hold.
    """
    weight: Tensor = layer.base.weight  # type: ignore[assignment]
    mend = "Load the base the adapter was trained on (with the same vocabulary), then the adapter."
    if files.shape(key) != tuple(weight.shape):
        raise AdapterError(f"{key!r} is {files.shape(key)}, the base weight of {layer.name} {tuple(weight.shape)}. {mend}")
    part = assemble(lambda box: files.read(key, box), local_runs(weight))
    if not torch.equal(part.to(weight.dtype), local_of(weight).cpu()):
        raise AdapterError(f"{key!r} is not the base weight that {layer.name} has here. {mend}")
