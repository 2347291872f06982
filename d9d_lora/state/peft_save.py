"""Hugging Face PEFT's adapter directory, written from a model on any layout.

    adapter_config.json          what PEFT's config class takes: every field, sorted, the same bytes for the same adapter
    adapter_model.safetensors    the tensors, as `peft_trained.py` lists them
    README.md                    the model card

Names and meanings are those of PEFT 0.21.2. `peft_kinds/` says what the tensors are, `peft_load.py` reads them; this file gathers and
writes. Tensors are gathered one at a time in the order of their names; rank 0 alone keeps and writes them. A directory is read back before
it gets its name.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.layers import AdaptedLayer
from d9d_lora.placement import full_of
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
from d9d_lora.state.peft_card import card_of
from d9d_lora.state.peft_config import CARD, CONFIG, WEIGHTS, AdapterError, dump
from d9d_lora.state.peft_kinds import Entry
from d9d_lora.state.peft_read import open_weights, read_adapter_config
from d9d_lora.state.peft_trained import describe, trained_of
from d9d_lora.state.safetensors_write import Promise, library_order, write_safetensors
from d9d_lora.walk import reshard

_OURS = {CONFIG, WEIGHTS, CARD}  # a directory with anything else in it is not ours to replace


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
    trained = together("listing what is trained", lambda: trained_of(model))
    _agree([*trained.layers, trained.bias, *trained.whole, *(entry.key for entry in trained.beside)])
    facts = trained.dialect.facts(trained.adapted)
    config, entries = together("describing the adapter", lambda: describe(model, trained, facts, base, task_type))
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
    """What a reader will find, compared with what the model held: every tensor to the bit, and the config, which `describe` has compared
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
