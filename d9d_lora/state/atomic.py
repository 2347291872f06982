"""Files that are whole or absent, and ranks that succeed or fail together: the two halves of a checkpoint.

Files. A thing is written under a temporary name, synced, and renamed: a rename is the only step that other readers can
see, and a POSIX file system does it at once. Every file's SHA-256 and size go into one list, so that a flipped bit, a
cut file and a file from another save are told apart from the real thing before a byte of them is used.

Ranks. An error on one rank while the others walk on is a hang. So nothing is acted on before it is agreed: `together`
runs a step on every rank, `decided` runs it on rank 0 alone, and both end in one collective after which either every
rank has the result or every rank raises the same `RanksFailed`. Without a process group there is one rank, this one.
What agrees in a thread beside a training step does so `agreeing_over` a group of its own: on the step's group its
collectives would be taken for the step's.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")
TEMPORARY, TRASH, REPLACED = ".tmp_", ".trash_", ".old_"
_BLOCK = 1 << 20
_GROUP: ContextVar[dist.ProcessGroup | None] = ContextVar("the group of the ranks that agree", default=None)


class Damaged(ValueError):
    """A file is not what the list written beside it says; the message tells which one and what was expected."""


class RanksFailed(RuntimeError):
    """A step failed on some rank. Raised on every rank, with the same text and the same `troubles` (rank -> what)."""

    def __init__(self, what: str, troubles: Mapping[int, str]) -> None:
        self.troubles = dict(sorted(troubles.items()))
        super().__init__(f"{what} failed on " + "; ".join(f"rank {r}: {text}" for r, text in self.troubles.items()))


def rank_and_world() -> tuple[int, int]:
    """This process's global rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def agreeing_over(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within it, in this thread, everything here goes over a group of all ranks; None: the default group."""
    token = _GROUP.set(group)
    try:
        yield
    finally:
        _GROUP.reset(token)


def agreeing_group() -> dist.ProcessGroup | None:
    return _GROUP.get()


def gather(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks, on every rank (by pickle, between our own processes)."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value, group=_GROUP.get())
    return values


def together(what: str, act: Callable[[], T]) -> T:
    """Run `act` on every rank; return its local result if it succeeded on all of them, else raise `RanksFailed` on all.

    `act` may itself be collective only where its own failures are agreed inside (as DCP's are), else peers would wait.
    """
    rank, _ = rank_and_world()
    troubles: dict[int, str] = {}
    result: Any = None
    try:
        result = act()
    except CheckpointException as error:  # a BaseException: `except Exception` lets it through
        troubles = {r: _describe(cause) for r, (cause, _) in error.failures.items()}
    except Exception as error:
        troubles = {rank: _describe(error)}
    merged: dict[int, str] = {}
    for part in gather(troubles):
        merged |= part
    if merged:
        raise RanksFailed(what, merged)
    return result


def decided(what: str, act: Callable[[], T]) -> T:
    """Run `act` on rank 0 alone and return its result on every rank, or raise `RanksFailed` on every rank."""
    rank, world = rank_and_world()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = act()
        except Exception as error:
            outcome[1] = _describe(error)
    if world > 1:
        dist.broadcast_object_list(outcome, src=0, group=_GROUP.get())
    if outcome[1] is not None:
        raise RanksFailed(what, {0: outcome[1]})
    return outcome[0]


def to_first(value: Tensor | None, like: Tensor, owner: int) -> Tensor | None:
    """A whole tensor of the rank `owner`, on rank 0 and on the CPU; None on all others. Every rank calls it."""
    rank, _ = rank_and_world()
    if rank not in (0, owner):
        return None
    there = torch.empty(like.shape, dtype=like.dtype) if value is None else value.detach().cpu()
    if owner == 0:
        return there
    if rank == 0:
        dist.recv(there, src=owner)
        return there
    dist.send(there.contiguous(), dst=0)
    return None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error} (on host {socket.gethostname()})"


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems do not sync a directory; a file's failure is a real one
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Flush every file below `root`, then every directory, `root` last."""
    for folder, _, files in os.walk(root, topdown=False):
        for file in sorted(files):
            sync(Path(folder, file))
        sync(Path(folder))


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: at any moment it holds the old text or the new one, never a part of it."""
    fresh = path.with_name(f"{TEMPORARY}{path.name}")
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync(path.parent)


def install(fresh: Path, final: Path) -> None:
    """Rename the whole directory `fresh` to `final`, in the place of what is there.

    A directory that is not empty cannot be renamed over. So the old one first steps aside as `.old_<name>`, which a
    reader takes when `<name>` is missing (`standing`): killed between the two renames, the old one is still found.
    """
    aside = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        discard(aside)
        os.rename(final, aside)
    try:
        os.rename(fresh, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    sync(final.parent)
    with contextlib.suppress(OSError):  # the new one stands: what is left of the old is `clean`'s
        discard(aside)


def standing(path: Path) -> Path:
    """`path`, or the directory that stepped aside for it if a kill came before the new one took its place."""
    aside = path.with_name(f"{REPLACED}{path.name}")
    return aside if not path.exists() and aside.exists() else path


def discard(path: Path) -> None:
    """Delete a directory so that no moment shows a half of it under its own name."""
    if path.exists():
        trash = path.with_name(f"{TRASH}{path.name}_{secrets.token_hex(4)}")
        os.rename(path, trash)
        shutil.rmtree(trash)


def clean(root: Path) -> None:
    """Clear what killed saves left in `root`: unfinished and half-deleted things go, a replaced directory returns."""
    for path in sorted(root.glob(f"{REPLACED}*")):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if final.exists():
            discard(path)
        else:
            os.rename(path, final)
    for path in sorted([*root.glob(f"{TEMPORARY}*"), *root.glob(f"{TRASH}*")]):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # what cannot go now (open on another node) goes at a later save
        else:
            path.unlink()


def digest(root: Path) -> dict[str, dict[str, str | int]]:
    """`{name: {"sha256", "bytes"}}` of every file below `root`; names are relative, with `/`."""
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:  # hashing and reading both let go of the GIL
        sums = list(threads.map(lambda name: _sha256(root / name), names))
    return {name: {"sha256": sums[i], "bytes": (root / name).stat().st_size} for i, name in enumerate(names)}


def verify(root: Path, files: Mapping[str, Any]) -> None:
    """Compare the files below `root` with the list `digest` made. The first that differs is a `Damaged`."""
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        # the list is read from a disk: a name in it must not lead the reader to a file elsewhere
        if not parts or name.startswith("/") or "\\" in name or ".." in parts:
            raise Damaged(f"the list of files names {name!r}; expected a path inside {root}: it was not written by us")
        if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise Damaged(f"the entry of {name!r} is {entry!r}; expected its sha256 and bytes")
        path = root / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise Damaged(f"{path} has {size} bytes; {entry['bytes']} were written")
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        for name, found in zip(files, threads.map(lambda name: _sha256(root / name), files)):
            if found != files[name]["sha256"]:
                raise Damaged(f"{root / name} has SHA-256 {found[:16]}...; {files[name]['sha256'][:16]}... was written")


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()
