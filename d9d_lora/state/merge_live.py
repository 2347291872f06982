"""Writes the merged model of a live job, on any layout, and leaves the job as it is: no weight, no optimiser state changes.

Rank 0 merges block by block, as a merge of files does (`merge_edit.py`), and reads from the live model, where all ranks answer
(`live_model.py`).

[Note: the same bits]
The sum is taken from whole factors in blocks that do not depend on the layout. So the files are, byte for byte, those of `merge_files` on
the saved adapter, where both hold the base in the same dtype and the start left it alone.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from d9d_lora.state.atomic import RanksFailed, decided, rank_and_world, together
from d9d_lora.state.live_model import Live, agree
from d9d_lora.state.mappers import ModelStateMapper
from d9d_lora.state.merge_edit import FLOATS, Output
from d9d_lora.state.merge_files import MergeReport, check_dtype, copy_beside, report_of, tell_config, tell_index
from d9d_lora.state.merge_work import Shard, build, refuse_existing, shards_of
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.safetensors_dir import INDEX, CheckpointFiles, open_checkpoint
from d9d_lora.state.safetensors_write import library_order
from d9d_lora.walk import reshard


@torch.no_grad()
def save_merged(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    mapper: ModelStateMapper | None = None,
    dtype: torch.dtype | None = None,
    dequantise: bool = False,
    max_shard_size: int = 5_000_000_000,
) -> MergeReport:
    """Writes the merged model of a running job as a Hugging Face directory. Collective: every rank calls it, between two steps.

    Args:
        model: The adapted model, on any layout; it stays adapted.
        path: A directory that does not exist; it appears when everything in it has been read back, or not at all.
        base: The directory the base was loaded from, seen by rank 0. The output has its shards, names and order, its config and tokenizer.
            Without it, names are those of the model before the injection, and the config is the model's own.
        mapper: From names in the base's files to names in the model, as for `load_checkpoint`, where other things than the injection
            rename tensors.
        dtype: Of all floating-point tensors of the output; None keeps each tensor's own in the model.
        dequantise: Unpack quantised layers; without it they are refused.
        max_shard_size: Bytes of a file, without `base`.

    Raises:
        AdapterError: on every rank alike; nothing is written then.
    """
    started, final = time.perf_counter(), Path(path).absolute()
    try:
        reshard(model)
        live = together("looking at the model", lambda: Live.of(model, mapper, dequantise=dequantise))
        agree(live)
        check_dtype(dtype)
        if rank_and_world()[0]:
            live.serve()
            return decided("telling of the merge", lambda: None)  # type: ignore[return-value]
        try:
            report = _write(model, live, final, None if base is None else Path(base), dtype, max_shard_size, started)
        except BaseException as error:
            live.end(f"{type(error).__name__}: {error}")  # or the others would wait for ever
            raise
        live.end()
        return decided("telling of the merge", lambda: report)
    except (RanksFailed, ValueError, OSError) as error:
        raise AdapterError(f"the merged model was not written to {final}: {error}") from error


def _write(
    model: nn.Module, live: Live, final: Path, base: Path | None, dtype: torch.dtype | None, most: int, started: float
) -> MergeReport:
    """Rank 0's part."""
    refuse_existing(final)
    output = Output(live, live.edits, dtype)
    with contextlib.ExitStack() as stack:
        files = None if base is None else stack.enter_context(open_checkpoint(base))
        if files is None:
            shards, index = shards_of(library_order(output.promise(name) for name in live.once()), most)
            beside: Callable[[Path], None] = _own_files(model, index, dtype or live.common_dtype())
        else:
            assert base is not None
            shards = _as_files(live, output, files)
            beside = _base_files(base, files, shards, live, dtype)
        written = {p.name for shard in shards for p in shard.promises}
        output.edits = {name: edit for name, edit in output.edits.items() if name in written}  # a tied weight may have one name there
        built = build(final, shards, output.values, beside, before_rename=live.check_ranks)
        return report_of(output, started, len(written), built.kept)


def _base_files(
    base: Path, files: CheckpointFiles, shards: list[Shard], live: Live, dtype: torch.dtype | None
) -> Callable[[Path], None]:
    """Writes what the base's directory has beside its weights, made true."""
    before = {name: files.dtype(name) for name in files.names()}
    after = {p.name: p.dtype for shard in shards for p in shard.promises}
    changed = any(before[name] != after[name] for name in after if before[name] in FLOATS)
    size = sum(math.prod(files.shape(name)) * files.dtype(name).itemsize for name in files.names())

    def beside(root: Path) -> None:
        copy_beside(base, root)
        if (root / "config.json").exists():
            tell_config(root, {}, dtype or (live.common_dtype() if changed else None), _vocabulary(live, files))
        tell_index(root, shards, size)

    return beside


def _own_files(model: nn.Module, index: str | None, dtype: torch.dtype) -> Callable[[Path], None]:
    """Writes the config of a Hugging Face model; another model has none."""

    def beside(root: Path) -> None:
        for part in (getattr(model, "config", None), getattr(model, "generation_config", None)):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(root)  # type: ignore[union-attr]
        if (root / "config.json").exists():
            tell_config(root, {"quantization_config": None, "architectures": [type(model).__name__.removeprefix("FSDP")]}, dtype, None)
        if index is not None:
            (root / INDEX).write_text(index, encoding="utf-8")

    return beside


def _as_files(live: Live, output: Output, files: CheckpointFiles) -> list[Shard]:
    """The shards of the base's directory, with the model's tensors. What the model does not have (old masks) is taken from the base."""
    names = _aliases(live, files)
    written = {id(live.tensors[names[name]].outline) for name in names}
    lost = sorted(name for name in live.once() if id(live.tensors[name].outline) not in written)
    if lost:
        raise AdapterError(f"{lost[:5]} of the model are in no file of the base: give the one that was loaded, or its mapper")
    misshapen = [
        f"{name} is {files.shape(name)} in the base and {live.shape(ours)} in the model"
        for name, ours in names.items()
        if files.shape(name)[1:] != live.shape(ours)[1:] or (files.shape(name) != live.shape(ours) and len(live.shape(ours)) != 2)
    ]
    if misshapen:
        raise AdapterError(f"{len(misshapen)} tensors do not fit the base: {'; '.join(misshapen[:5])}")
    output.edits = {name: output.edits[ours] for name, ours in names.items() if ours in output.edits}
    output.base = _Beside(live, names, files)
    shards = []
    for file in files.files():
        with safe_open(str(file), framework="pt") as handle:
            keys, metadata = handle.offset_keys(), handle.metadata()
        shards.append(Shard(file.relative_to(_root(files)).as_posix(), tuple(output.promise(key) for key in keys), metadata))
    return shards


def _aliases(live: Live, files: CheckpointFiles) -> dict[str, str]:
    """Names in the files -> ours; they may lack the model's prefix, or have one more."""
    firsts = {name.partition(".")[0] for name in live.tensors}
    found = {}
    for name in files.names():
        tries = [name, *(f"{first}.{name}" for first in sorted(firsts)), name.partition(".")[2]]
        if (ours := next((t for t in tries if t in live.tensors), None)) is not None:
            found[name] = ours
    return found


def _vocabulary(live: Live, files: CheckpointFiles) -> int | None:
    """The model's rows, where the base has others."""
    return next((live.shape(ours)[0] for name, ours in _aliases(live, files).items() if live.shape(ours) != files.shape(name)), None)


class _Beside:
    """The live tensors under the names of the base's files, and the base's own where the model has none. A `Source`."""

    def __init__(self, live: Live, names: Mapping[str, str], files: CheckpointFiles) -> None:
        self.live, self.names, self.files = live, names, files

    def shape(self, name: str) -> tuple[int, ...]:
        return self.live.shape(self.names[name]) if name in self.names else self.files.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.live.dtype(self.names[name]) if name in self.names else self.files.dtype(name)

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        return self.live.read(self.names[name], box) if name in self.names else self.files.read(name, box)


def _root(files: CheckpointFiles) -> Path:
    return Path(os.path.commonpath([file.parent for file in files.files()]))
