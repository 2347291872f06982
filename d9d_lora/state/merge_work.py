"""A model directory that grows shard by shard, survives a kill, and appears whole or not at all.

    .tmp_<name>/journal.json      what it is made of, and the digests of every tensor of the shards that are finished
    .tmp_<name>/model/            the finished shards; the one at work is model/<file>.part
    <name>/                       the directory, renamed when everything in it has been read back

A shard is written, synced, renamed, read back tensor by tensor and compared with what was handed to the writer; only then it gets its line
in the journal. The same work begun again keeps the shards that still read as the journal says, and goes on with the next. Inputs that have
changed in between are another work: it starts anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d9d_lora.state.atomic import TEMPORARY, sync, sync_tree, write_text
from d9d_lora.state.merge_edit import Held
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.safetensors_dir import SINGLE, CheckpointError, CheckpointFiles, open_checkpoint
from d9d_lora.state.safetensors_write import Promise, write_safetensors

try:
    import fcntl
except ImportError:  # no such locks there: two merges into one place are then the user's to avoid
    fcntl = None  # type: ignore[assignment]

JOURNAL, MODEL, PART = "journal.json", "model", ".part"
Values = Callable[[str], Iterable[Tensor]]


@dataclass(frozen=True)
class Shard:
    """One file of a model directory."""

    file: str
    promises: tuple[Promise, ...]
    metadata: Mapping[str, str] | None


@dataclass(frozen=True)
class Built:
    """How a directory came about: `kept` of its shards were there from an earlier call; `anew` says why older work was thrown away."""

    kept: int
    anew: str


def refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise AdapterError(f"{output} exists already. Give a new directory, or remove it first.")


def build(
    output: Path,
    shards: Sequence[Shard],
    values: Values,
    beside: Callable[[Path], None],
    inputs: Any = None,
    *,
    before_rename: Callable[[], None] = lambda: None,
) -> Built:
    """Writes a directory as the module says.

    Args:
        output: It must not exist.
        values: The values of a tensor, in blocks of its first dimension.
        beside: Writes everything but the shards into the directory it is given.
        before_rename: The last word: if it raises, nothing appears.
        inputs: JSON that says what the values follow from; None: the work cannot be continued, and leaves nothing behind.

    Raises:
        AdapterError: the output exists, another process is at it, or what was written reads back otherwise.
    """
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f"{TEMPORARY}{output.name}")
    work.mkdir(exist_ok=True)
    with _alone(work):
        keep = False
        try:
            finished, anew = _resume(work, inputs)
            journal: dict[str, Any] = {"inputs": inputs, "shards": {}}
            kept = 0
            for shard in shards:
                target = work / MODEL / shard.file
                digests = finished.get(shard.file)
                if digests is not None and target.is_file() and _same(target, shard, digests):
                    kept += 1
                else:
                    digests = _write(target, shard, values)
                journal["shards"][shard.file] = digests
                write_text(work / JOURNAL, json.dumps(journal))
            _finish(work / MODEL, shards, beside)
            before_rename()
            refuse_existing(output)
            os.rename(work / MODEL, output)
            sync(output.parent)
            return Built(kept, anew)
        except (OSError, KeyboardInterrupt, SystemExit):  # a full disk, an impatient user: what is finished is worth keeping
            keep = inputs is not None
            raise
        finally:
            if not keep:
                shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it, however that ends."""
    handle = os.open(work, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AdapterError(f"{work} is being written by another process. Wait for it, or give another output.") from error
            except OSError:
                pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _resume(work: Path, inputs: Any) -> tuple[dict[str, dict[str, str]], str]:
    """(digests of finished shards by file, why older work was thrown away)."""
    anew, finished = "", {}
    if (work / JOURNAL).is_file() and inputs is not None:
        try:
            journal = json.loads((work / JOURNAL).read_text(encoding="utf-8"))
            then, finished = journal["inputs"], journal["shards"]
        except (ValueError, KeyError, TypeError):
            then, finished, anew = inputs, {}, "the journal of an earlier call is broken"
        if then != json.loads(json.dumps(inputs)):
            changed = [key for key in inputs if key not in then or then[key] != json.loads(json.dumps(inputs[key]))]
            finished, anew = {}, f"what an earlier call began was made of other inputs ({', '.join(changed)})"
    if not finished:
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (work / MODEL).mkdir(exist_ok=True)
    return finished, anew


def _write(target: Path, shard: Shard, values: Values) -> dict[str, str]:
    """Writes one shard, reads it back, gives it its name; the digests of its tensors."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}{PART}")
    part.unlink(missing_ok=True)
    digests: dict[str, str] = {}

    def digesting(name: str) -> Iterator[Tensor]:
        total = hashlib.sha256()
        for block in values(name):
            block = block.detach().cpu().contiguous()
            total.update(_bytes(block))
            yield block
        digests[name] = total.hexdigest()

    write_safetensors(part, shard.promises, digesting, shard.metadata)
    os.rename(part, target)
    sync(target.parent)
    with open_checkpoint(target) as files:
        if wrong := _differing(files, shard, digests):
            raise AdapterError(f"{wrong!r} reads back otherwise than it was written to {target}: check the disk, and merge again")
    return digests


def _same(target: Path, shard: Shard, digests: Mapping[str, str]) -> bool:
    try:
        with open_checkpoint(target) as files:
            return not _differing(files, shard, digests)
    except CheckpointError:
        return False


def _differing(files: CheckpointFiles, shard: Shard, digests: Mapping[str, str]) -> str | None:
    """The first tensor of a file that is not as promised."""
    promised = {p.name: p for p in shard.promises}
    if odd := sorted(promised.keys() ^ set(files.names())):
        return odd[0]
    for name, promise in promised.items():
        if (files.dtype(name), files.shape(name)) != (promise.dtype, promise.shape):
            return name
        total = hashlib.sha256()
        for _, block in Held(files, name).blocks():
            total.update(_bytes(block.contiguous()))
        if total.hexdigest() != digests.get(name):
            return name
    return None


def _bytes(block: Tensor) -> memoryview:
    return block.reshape(-1).view(torch.uint8).numpy().data


def _finish(root: Path, shards: Sequence[Shard], beside: Callable[[Path], None]) -> None:
    """Everything beside the shards, and a last look at the whole."""
    known = {shard.file for shard in shards}
    for path in [p for p in root.rglob("*") if p.is_file() and p.relative_to(root).as_posix() not in known]:
        path.unlink()  # of an earlier call that was killed here
    beside(root)
    with open_checkpoint(root) as files:
        promised = sorted(p.name for shard in shards for p in shard.promises)
        if files.names() != promised:
            raise AdapterError(f"{root} holds other tensors than it should: {sorted(set(files.names()) ^ set(promised))[:5]}")
    sync_tree(root)


def shards_of(promises: Iterable[Promise], most: int) -> tuple[list[Shard], str | None]:
    """Files of at most so many bytes (or of one tensor), named as Hugging Face names them, and the text of their index, if several."""
    groups: list[list[Promise]] = [[]]
    for promise in promises:
        if groups[-1] and sum(p.bytes for p in groups[-1]) + promise.bytes > most:
            groups.append([])
        groups[-1].append(promise)
    n, stem = len(groups), SINGLE.removesuffix(".safetensors")
    names = [SINGLE] if n == 1 else [f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    shards = [Shard(name, tuple(group), {"format": "pt"}) for name, group in zip(names, groups)]
    if n == 1:
        return shards, None
    total = sum(p.bytes for group in groups for p in group)
    weight_map = {p.name: shard.file for shard in shards for p in shard.promises}
    return shards, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


__all__ = ["Built", "Shard", "build", "refuse_existing", "shards_of"]
