"""Hugging Face PEFT's adapter directory, written from a model on any layout and read into one.

    adapter_config.json          what PEFT's config class takes: every field, sorted, the same bytes for the same adapter
    adapter_model.safetensors    base_model.model.<layer>.<factor>               as `peft_kinds/` spells them, a file a `peft_type`
                                 base_model.model.<layer>.base_layer.bias        a trained bias of an adapted layer
                                 base_model.model.<name>                         everything else that is trained
    README.md                    the model card

Names and meanings are those of PEFT 0.21.2. `peft_kinds/` says what the tensors are, `peft_read.py` reads a config; this file moves
the tensors.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.layers import AdaptedLayer
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
    to_first,
    together,
)
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperParallel, ModelStateMapperRename, StateGroup
from d9d_lora.state.names import BASE, PEFT_PREFIX, clean
from d9d_lora.state.peft_card import card_of
from d9d_lora.state.peft_config import CARD, COMMON, CONFIG, TARGETING, WEIGHTS, AdapterError, dump
from d9d_lora.state.peft_kinds import DIALECTS, Dialect, Entry, dialect_of
from d9d_lora.state.peft_read import method_of, open_weights, read_adapter_config
from d9d_lora.state.reader import LoadReport, assemble, load_checkpoint, local_runs, named_state
from d9d_lora.state.safetensors_dir import CheckpointFiles
from d9d_lora.state.safetensors_write import Promise, library_order, write_safetensors
from d9d_lora.targets import named
from d9d_lora.walk import names_of_modules, reshard

__all__ = [
    "AdapterError",
    "Collected",
    "adapter_writer",
    "collect",
    "holds_all",
    "load_adapter_weights",
    "method_of",
    "read_adapter_config",
    "save_adapter",
]

_OURS = {CONFIG, WEIGHTS, CARD}  # a directory with anything else in it is not ours to replace


@dataclass(frozen=True)
class _Trained:
    """What an adapter directory holds of a model."""

    dialect: Dialect
    layers: dict[str, AdaptedLayer]  # path in the model -> layer, in the order of their names
    beside: list[Entry]  # biases, and modules trained whole
    bias: str
    whole: list[str]  # modules trained whole

    @property
    def adapted(self) -> list[AdaptedLayer]:
        return list(self.layers.values())

    def entries(self, model: nn.Module, config: dict[str, Any]) -> list[Entry]:
        """Every tensor of a file with this config, in the order of their keys."""
        found = [entry for path, layer in self.layers.items() for entry in self.dialect.entries(path, layer, config)]
        found += [*self.dialect.shared_entries(model, self.adapted, config), *self.beside]
        return sorted(found, key=lambda entry: entry.key)


@dataclass
class Collected:
    """An adapter, gathered: what a file of it holds.

    Attributes:
        config: The content of adapter_config.json.
        tensors: On rank 0 the whole sources of every tensor; elsewhere none.
    """

    config: dict[str, Any]
    layers: Sequence[AdaptedLayer]
    entries: list[Entry]
    sources: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: dict[str, Tensor] | None = None

    def keep(self) -> None:
        """Copies the tensors, so that they stay what they are while the model goes on."""
        self.kept = {key: value.clone() for key, value in self.tensors().items()}
        self.sources = {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file by key, checked. On rank 0."""
        if self.kept is not None:
            return self.kept
        held = {}
        for entry in self.entries:
            whole = self.sources[entry.key]
            for value, source in zip(whole, entry.sources, strict=True):
                if value.shape != source.shape:
                    raise AdapterError(f"{entry.key!r} was gathered as {tuple(value.shape)}; the model says {tuple(source.shape)}: a shard")
            value = (entry.to_file(*whole) if entry.to_file else whole[0]).contiguous()
            if tuple(value.shape) != entry.shape:
                raise AdapterError(f"{entry.key!r} was made as {tuple(value.shape)}; expected {entry.shape}")
            if value.is_floating_point() and not value.isfinite().all():
                raise AdapterError(f"{entry.key!r} has values that are not finite: go back to an earlier checkpoint")
            held[entry.key] = value
        return held


# -- save -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, base: str | None = None, task_type: str | None = "CAUSAL_LM") -> None:
    """Writes the adapter of a model as a PEFT directory, reads it back, and only then gives it its name.

    Collective: every rank calls it. Tensors are gathered one at a time in the order of their names; rank 0 alone keeps
    and writes them. The files are the same, byte for byte, on every layout.

    Args:
        model: The model the method was injected into, on any layout, with or without a process group.
        path: The directory. An empty one is filled in place; an earlier adapter is replaced; anything else is refused.
        base: Name or path of the base model, for `base_model_name_or_path`.
        task_type: PEFT's task type.

    Raises:
        AdapterError: on every rank alike; what was at `path` before is untouched.
    """
    final = Path(path).absolute()
    write_collected(model, final, lambda collected: write_directory(final, collected), look=_refuse_other, base=base, task_type=task_type)


@torch.no_grad()
def adapter_writer(
    model: nn.Module, *, base: str | None = None, task_type: str | None = "CAUSAL_LM"
) -> Callable[[str | os.PathLike[str]], None]:
    """`save_adapter` in two halves: this one copies the adapter to rank 0, the function that it returns writes the copy to a path.

    Both are collective and raise AdapterError on every rank alike. In between, and beside the second, the model may change.
    """
    try:
        collected = collect(model, base=base, task_type=task_type)
        decided("copying the adapter", collected.keep)
    except RanksFailed as error:
        raise AdapterError(f"the adapter cannot be written: {error}") from error

    def write(path: str | os.PathLike[str]) -> None:
        final = Path(path).absolute()

        def act() -> None:
            _refuse_other(final)
            write_directory(final, collected)

        try:
            decided("writing the adapter", act)
        except RanksFailed as error:
            raise AdapterError(f"the adapter was not written to {final}: {error}") from error

    return write


def write_collected(
    model: nn.Module,
    final: Path,
    write: Callable[[Collected], None],
    *,
    look: Callable[[Path], None],
    base: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Collects the adapter on all ranks and lets rank 0 write it to `final`, if `look` does not raise there first."""
    try:
        collected = collect(model, base=base, task_type=task_type, before=lambda: decided("looking at the path", lambda: look(final)))
        decided("writing the adapter", lambda: write(collected))
    except RanksFailed as error:
        raise AdapterError(f"the adapter was not written to {final}: {error}") from error


def collect(
    model: nn.Module, *, base: str | None = None, task_type: str | None = "CAUSAL_LM", before: Callable[[], None] = lambda: None
) -> Collected:
    """Lists, describes and gathers the adapter of a model. Collective; `before` is called on all ranks before the first gather of values.

    Raises:
        RanksFailed, AdapterError: on every rank alike.
    """
    reshard(model)  # first: what FSDP2 still holds gathered after a forward is freed memory soon, and no step has reached it
    trained = together("listing what is trained", lambda: _trained(model))
    _agree([*trained.layers, trained.bias, *trained.whole, *(entry.key for entry in trained.beside)])
    facts = trained.dialect.facts(trained.adapted)
    config, entries = together("describing the adapter", lambda: _describe(model, trained, facts, base, task_type))
    _agree([dump(config), *((e.key, e.shape, [tuple(s.shape) for s in e.sources]) for e in entries)])
    owners = _owners(entries)
    before()
    collected = Collected(config, trained.adapted, entries)
    for entry, owner in zip(entries, owners, strict=True):
        here = not any(source.is_meta for source in entry.sources)
        whole = [_gathered(source).detach() if here else None for source in entry.sources]
        brought = [to_first(value, source, owner) for value, source in zip(whole, entry.sources)]
        if rank_and_world()[0] == 0:
            collected.sources[entry.key] = [value for value in brought if value is not None]
    return collected


def _owners(entries: list[Entry]) -> list[int]:
    """For each entry the first rank that holds it: others may have it on meta, as another pipeline stage's."""
    kinds = ["".join("-" if s.is_meta else "D" if isinstance(s, DTensor) else "t" for s in e.sources) for e in entries]
    owners: list[int] = []
    for entry, views in zip(entries, zip(*gather(kinds), strict=True), strict=True):
        held = {view: rank for rank, view in reversed(list(enumerate(views))) if "-" not in view}
        if len(held) != 1:
            how = "placed otherwise on different ranks" if held else "on no rank: every rank has it on meta"
            raise AdapterError(f"{entry.key!r} is {how}, and cannot be gathered")
        owners += held.values()
    return owners


def _trained(model: nn.Module) -> _Trained:
    """Factors always; of the rest what requires a gradient, as PEFT divides it: biases, and modules trained whole."""
    modules = [(clean(f"{names[0]}.")[:-1], names[0], m) for names, m in names_of_modules(model)]
    adapted = sorted(((path, m) for _, path, m in modules if isinstance(m, AdaptedLayer)), key=lambda item: item[1].name)
    layers = dict(adapted)
    if not layers:
        raise AdapterError(
            "the model has no adapter, so there is nothing that PEFT's formats could hold. "
            "Modules trained whole alone are exported as a merged model."
        )
    if several := next((layer for layer in layers.values() if layer.others()), None):
        raise AdapterError(
            f"{several.name} has the adapters {', '.join(several.adapters_by_name())}, and a directory holds one: write each inside "
            "`with only_adapter(model, name)`"
        )
    dialect = dialect_of(list(layers.values()))
    biases: dict[str, tuple[str, nn.Parameter]] = {}  # key in the file -> (name in the model, bias)
    whole: dict[str, tuple[str, nn.Module]] = {}
    for clear, path, m in modules:
        if isinstance(m, AdaptedLayer):
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
        if any(p.requires_grad for name, p in own.items() if name != "bias") and not _is_shared(m, layers.values()):
            whole[clear] = (path, m)
        elif "bias" in own:
            biases[f"{PEFT_PREFIX}{clear}.bias"] = (f"{path}.bias", own["bias"])
    mode = _bias_mode(biases)
    if mode != "none" and dialect.bias is None:
        raise AdapterError(f"biases are trained ({mode}), and PEFT's {dialect.peft_type} has no field for them. Leave `bias` out")
    tensors: dict[str, tuple[str, Tensor]] = {}
    for key, (path, p) in biases.items():
        if mode == "all" or (mode == "lora_only" and key.endswith(".base_layer.bias")):
            tensors[key] = (path, p)
        elif p.requires_grad:
            owner, clear = path.rpartition(".")[0], key.removeprefix(PEFT_PREFIX).rpartition(".")[0]
            whole[clear] = (owner, model.get_submodule(owner))
    for clear, (path, m) in whole.items():
        tensors |= _all_of(clear, path, m)
    beside = [Entry(key, name, (t,), tuple(t.shape)) for key, (name, t) in sorted(tensors.items())]
    return _Trained(dialect, layers, beside, mode, sorted(whole))


def holds_all(model: nn.Module) -> bool:
    """Whether a PEFT directory can hold what is trained of this model: its adapters, and all beside them."""
    try:
        _trained(model)
    except AdapterError:
        return False
    return True


def _is_shared(m: nn.Module, layers: Iterable[AdaptedLayer]) -> bool:
    """Whether a module holds what layers share, and not something of the model's own."""
    return any(m is factor for layer in layers for factor in layer.shared.values())


def _describe(
    model: nn.Module, trained: _Trained, facts: Any, base: str | None, task_type: str | None
) -> tuple[dict[str, Any], list[Entry]]:
    """(adapter_config.json, the tensors), checked against each other. JSON types only."""
    dialect = trained.dialect
    config = {**COMMON, **TARGETING, **dialect.fields, **dialect.describe(model, trained.adapted, facts)}
    config |= {"peft_type": dialect.peft_type, "base_model_name_or_path": base, "task_type": task_type}
    config["modules_to_save"] = trained.whole or None
    if dialect.bias:
        config["bias"] = dialect.bias if trained.bias == "lora_only" else trained.bias
    _check(dialect, config, trained.adapted)
    return config, trained.entries(model, config)


def _check(dialect: Dialect, config: dict[str, Any], layers: Sequence[AdaptedLayer]) -> None:
    """That PEFT's reading of a config gives every layer what it has, and trains none of them whole."""
    targets = config["target_modules"] or []
    targets = targets if isinstance(targets, str) else frozenset(targets)
    parameters = frozenset(config.get("target_parameters") or ())
    for layer in layers:
        dialect.check(config, layer)
        wanted = named(layer.name, targets) or layer.name in parameters
        if not wanted and not hasattr(layer, "embedding"):  # a tied head is found by its embedding
            raise AdapterError(f"{layer.name} is adapted, and target_modules does not select it")
        # PEFT compares these by the end of the text, without a dot
        if eaten := [m for m in config["modules_to_save"] or [] if layer.name.endswith(m)]:
            raise AdapterError(f"modules_to_save {eaten} ends the name of the adapted layer {layer.name}: PEFT copies it whole")


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


def _agree(listed: list[Any]) -> None:
    """Ranks that list other tensors would wait for each other for ever in the first gather."""
    marks = gather(sha256(repr(listed).encode()).hexdigest())
    if len(set(marks)) > 1:
        raise AdapterError(
            f"ranks hold different adapters (by rank: {[mark[:8] for mark in marks]}). Every rank must hold the whole model "
            "by name, each its shards of it, and on meta what another pipeline stage holds."
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


def write_directory(final: Path, collected: Collected) -> None:
    """Writes a gathered adapter as a directory. On rank 0, which has it."""
    held, config = collected.tensors(), collected.config
    final.parent.mkdir(parents=True, exist_ok=True)
    # an empty directory may be somebody's half-made checkpoint, of which this one is a part: it keeps its name
    fill = final.is_dir() and not any(final.iterdir())
    fresh = (final if fill else final.parent) / f"{TEMPORARY}{final.name}_{secrets.token_hex(6)}"
    fresh.mkdir()
    names = (WEIGHTS, CARD, CONFIG)  # the config last: without it nobody takes the directory for an adapter
    try:
        write_tensors(fresh / WEIGHTS, held, {"format": "pt"})
        (fresh / CONFIG).write_text(dump(config), encoding="utf-8")
        (fresh / CARD).write_text(card_of(config, collected.layers), encoding="utf-8")
        read_back(fresh, held, collected)
        sync_tree(fresh)
        if fill:
            for name in names:
                os.replace(fresh / name, final / name)
            sync(final)
        else:
            install(fresh, final)
    except BaseException:
        if fill:
            for name in names:
                (final / name).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_tensors(path: Path, held: dict[str, Tensor], metadata: dict[str, str]) -> None:
    promises = library_order(Promise(key, t.dtype, tuple(t.shape)) for key, t in held.items())
    write_safetensors(path, promises, lambda key: [held[key]], metadata)


def read_back(fresh: Path, held: dict[str, Tensor], collected: Collected) -> None:
    """What a reader will find, compared with what the model held: every tensor to the bit, and the config, which `_describe` has compared
    with the layers."""
    with open_weights(fresh) as files:
        if files.names() != sorted(held):
            raise AdapterError(f"{fresh} holds other tensors than were written: {set(files.names()) ^ set(held)}")
        for key, value in held.items():
            found = files.read(key)
            same = found.dtype == value.dtype and found.shape == value.shape
            if not same or not torch.equal(_bits(found), _bits(value)):
                raise AdapterError(f"{key!r} reads back otherwise than it was written: check the disk, and save again")
    again = read_adapter_config(fresh)
    if again != collected.config:
        raise AdapterError(f"{CONFIG} reads back otherwise than it was written")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# -- load -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_adapter_weights(
    model: nn.Module, path: str | os.PathLike[str], *, elsewhere: Collection[str] = (), compare: bool = False
) -> LoadReport:
    """Fills the adapter of a model from a PEFT directory; each rank reads the bytes of its own box only, as far as the layout of a
    tensor in the file is that of the model.

    The model is injected already (by the method that `method_of` makes, say), its base weights are loaded, and it may
    be on any layout. No collective.

    Args:
        elsewhere: Names of the model whose tensors other ranks hold (pipeline stages), on meta here.
        compare: Change nothing, and raise CheckpointError if what is trained here is not to the bit what the file says.

    Raises:
        AdapterError, CheckpointError: unknown, missing and misshapen keys in one message before anything is read; a
            value that is not finite; a copy of a base weight in the file that is not the model's base weight.
    """
    config = read_adapter_config(path)
    config = {**COMMON, **TARGETING, **DIALECTS[config["peft_type"]].fields, **config}  # what is not given has PEFT's default
    reshard(model)
    trained = _trained(model)
    if trained.dialect.peft_type != config["peft_type"]:
        raise AdapterError(
            f"{path} is {config['peft_type']}, and the model has a {trained.dialect.peft_type} adapter. Inject `method_of(path)` instead"
        )
    if moved := [layer for layer in trained.adapted if layer.delta.moves_base]:
        raise AdapterError(
            f"the start of {moved[0].name} ({moved[0].delta}) moves the base weight, and {path} is for untouched ones. Inject "
            "`method_of(path)` into the base as it was, and load into that"
        )
    for layer in trained.adapted:
        trained.dialect.check(config, layer)  # names and shapes would not tell another scale
    entries = trained.entries(model, config)
    state = dict(named_state(model))
    mine = {entry.name for entry in entries if entry.name is not None}
    ours = {id(state[name]) for name in mine}
    others = {name for name, tensor in state.items() if name not in mine and id(tensor) not in ours}
    mapper = ModelStateMapperParallel([_mapper(entry) for entry in entries if entry.name is not None])
    with open_weights(path) as files:
        present = set(files.names())
        known = {entry.key for entry in entries if entry.name is None and entry.take is None}
        if lacking := sorted(known - present):
            raise AdapterError(f"{path} lacks {lacking[:5]}, which {CONFIG} says it holds. Save it again")
        copies = trained.dialect.sort(files.names()).base_copies
        for layer in trained.adapted:
            if layer.name in copies:
                if not layer.base.weight.is_meta:  # type: ignore[union-attr]  # of another stage
                    _same_base(files, copies[layer.name], layer)
                known.add(copies[layer.name])
        known |= trained.dialect.repeated(files, trained.adapted)
        for entry in entries:
            if entry.expected is not None:
                _same_value(files, entry, entry.expected)
        harmless = [f"^{re.escape(key)}$" for key in sorted(known)]
        sinks = {e.key: (torch.empty(e.shape, device="meta"), e.take) for e in entries if e.take is not None}
        report = load_checkpoint(
            model,
            files,
            mapper,
            skip=others,
            ignore_unexpected=harmless,
            sinks=sinks,
            elsewhere=elsewhere,
            all_or_none=True,
            compare=compare,
        )
    if compare:
        return report
    trained.dialect.filled(trained.adapted, config)
    for layer in trained.adapted:
        layer.started |= not layer.delta.moves_base  # every factor has its value, those that start from the weight too
    return report


class _Made(ModelStateMapper):
    """One tensor of the model from one or more of the file."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        assert self.entry.name is not None
        return frozenset([StateGroup(frozenset([self.entry.key, *self.entry.beside]), frozenset([self.entry.name]))])

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.entry.name is not None
        assert self.entry.from_file is not None
        if tuple(found := group[self.entry.key].shape) != self.entry.shape:
            raise AdapterError(f"expected {self.entry.shape}, the file gives {tuple(found)}")
        return {self.entry.name: self.entry.from_file(*(group[key] for key in (self.entry.key, *self.entry.beside)))}


def _mapper(entry: Entry) -> ModelStateMapper:
    assert entry.name is not None
    return ModelStateMapperRename(entry.key, entry.name) if entry.from_file is None else _Made(entry)


def _same_value(files: CheckpointFiles, entry: Entry, expected: Callable[[CheckpointFiles], Tensor]) -> None:
    """A tensor that is read into nothing must be what the model has there already."""
    if files.shape(entry.key) != entry.shape:
        raise AdapterError(f"{entry.key!r} is {files.shape(entry.key)}, expected {entry.shape}")
    found, wanted = files.read(entry.key), expected(files).cpu()
    if not torch.equal(found.to(wanted.dtype), wanted):
        apart = float((found.double() - wanted.double()).abs().max())
        raise AdapterError(
            f"{entry.key!r} is not what this model has in its place (they differ by up to {apart:.1e}): it is of another adapter, or "
            "was made otherwise"
        )


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


