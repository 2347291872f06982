"""Checkpoints of a training run: saved on one layout, resumed on any other, whole or absent whenever the run is killed.

```
<root>/step_00000200/{state/, adapter/, trainer.json, COMPLETE}   <root>/latest   <root>/best
```
`state/` holds tensors by name (trained weights, optimiser moments), each rank's shards in its own file (`checkpoint_tensors.py`);
`trainer.json` the JSON document of the trainer and the list of tensors; `COMPLETE` the SHA-256 and size of every file.
A directory gets its `step_` name by one rename after all of it is on the disk. `latest` and `best` hold such a name.

Every function here is collective: all ranks call it, and it succeeds on all of them or raises the same error on all.

[Note: saving beside the training]
`save(wait=False)` copies the tensors to CPU memory and returns; a thread then does what a save does, of the copies, and its
collectives go over a gloo group of its own. It never waits for the thread of a step, so no rank's training holds it up, nor
is held up by it. One save is under way at a time: the next one, and the end of a run, `wait()` for it, and are told then if
it failed. Until its last rename a save changes nothing that a reader looks at; so a process that is killed leaves the
checkpoint before, as from a save that is waited for.
"""

import json
import os
import re
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d9d_lora.state import atomic
from d9d_lora.state.atomic import Damaged, RanksFailed, agreeing_over, decided, gather, rank_and_world, together
from d9d_lora.state.checkpoint_tensors import (
    ONE_PROCESS,
    Index,
    as_boxes,
    check_headers,
    compared,
    copied,
    listed,
    read_tensors,
    some,
    union,
    write_tensors,
)
from d9d_lora.state.untrusted import MAX_JSON, open_regular, read_json

VERSION = 1
STATE, DOCUMENT, COMPLETE, LATEST, BEST = "state", "trainer.json", "COMPLETE", "latest", "best"
_STEP_NAME = re.compile(r"step_\d{8}")
_EXTRA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SEEN_WITHIN_S = 10.0  # network file systems show another node's file a little later


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used: none is there, it is damaged, or it holds something else than the job expects."""


class CheckpointFailed(CheckpointError):
    """A save failed, on some rank, and was undone on all. The earlier checkpoints stand; training may go on."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, every file compared with its hash. `document` is what `Checkpoints.save` was given."""

    path: Path
    step: int
    document: dict[str, Any]
    index: Index

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place: plain tensors or DTensors, of any layout and world size.

        Together the ranks must name exactly what the checkpoint holds, each with its global shape and dtype; else
        `CheckpointError` names every difference and nothing has been written to.
        """
        try:
            index = together("comparing the checkpoint with the job", lambda: compared(tensors, self.index))
            asked = union(index)
            if unknown := sorted(set(self.index) - set(asked)):
                raise CheckpointError(
                    f"{self.path} holds {len(unknown)} tensors that no rank of this job expects: {some(unknown)}. "
                    "The run it came from trained something else: resume with its configuration."
                )
            decided("reading the headers of the checkpoint", lambda: check_headers(self.path / STATE, self.index))
            together("reading the tensors of the checkpoint", lambda: read_tensors(self.path / STATE, tensors))
        except RanksFailed as error:
            raise CheckpointError(f"{self.path} was not loaded. {error}") from error


class Checkpoints:
    """The checkpoints of one run, below `root`, which every rank must see. All methods are collective.

    `keep` is how many to keep; what `latest` and `best` name is never deleted. One run at a time writes to a root.
    """

    def __init__(self, root: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1: the checkpoint just written is one")
        self.root, self.keep = Path(root).absolute(), keep
        self._under_way: _Background | None = None
        self._group: dist.ProcessGroup | None = None  # of saves beside the training

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        document: Mapping[str, Any],
        *,
        extras: Mapping[str, Callable[[Path], None]] | None = None,
        best: bool = False,
        wait: bool = True,
    ) -> Path:
        """Write `step_<step>` and make it `latest` (and `best`); the path of the directory is returned on every rank.

        `tensors` are DTensors or plain tensors (equal on every rank that names them: one copy is kept; a state that
        differs by rank needs the rank in its name). `document` is JSON; rank 0's is written. Each of `extras` is called
        on every rank with the path of a sub-directory of its name, and does its own rank-0 writing. A failure anywhere
        is `CheckpointFailed` on every rank: what was begun is removed, and what was there before is untouched.

        Without `wait` it returns when the state is copied, and the rest is done in a thread: call `wait()` before the process
        ends. `extras` are then called beside the training, so they may read no live tensor, and their collectives must be
        those of `atomic`. A save that is still under way is waited for first; its failure is raised in the place of this save.
        """
        self.wait()
        tensors = {name: as_boxes(tensors[name]) for name in sorted(tensors)}
        if wait:
            return self._save(step, tensors, document, extras, best)
        try:
            copies, document = together("copying the state", lambda: ({n: copied(t) for n, t in tensors.items()}, _frozen(document)))
        except RanksFailed as error:
            raise CheckpointFailed(f"the save of step {step} failed: {error}. Training may go on.") from error
        if self._group is None and rank_and_world()[1] > 1:
            self._group = dist.new_group(backend="gloo")
        warnings.filterwarnings("ignore", message=ONE_PROCESS)  # here: a thread that changes and restores filters spoils those of others
        self._under_way = _Background(lambda: self._save(step, copies, document, extras, best), self._group)
        return self.root / f"step_{step:08d}"

    def wait(self) -> None:
        """Until no save is under way. Raises the `CheckpointFailed` of one that failed, once, on every rank."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.finish()

    def _save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        document: Mapping[str, Any],
        extras: Mapping[str, Callable[[Path], None]] | None,
        best: bool,
    ) -> Path:
        final, extras = self.root / f"step_{step:08d}", dict(sorted((extras or {}).items()))
        fresh: Path | None = None
        try:
            index = together("listing the tensors", lambda: listed(tensors))
            whole = union(index, note=str([step, list(extras)]))
            fresh = decided("making the directory", lambda: self._begin(final, list(extras)))
            together("looking for the directory", lambda: _expect(fresh, [STATE, *extras]))
            write_tensors(fresh / STATE, tensors)
            for name, write in extras.items():
                together(f"writing {name}/", lambda name=name, write=write: write(fresh / name))  # type: ignore[misc]
            seen = {file: size for view in gather(_sizes(fresh)) for file, size in view.items()}
            content = {"version": VERSION, "step": step, "tensors": whole, "document": document}
            decided("finishing the directory", lambda: self._finish(fresh, final, content, seen, best))
        except RanksFailed as error:
            if fresh is not None and rank_and_world()[0] == 0:
                shutil.rmtree(fresh, ignore_errors=True)
            raise CheckpointFailed(
                f"the save of step {step} failed: {error}. "
                f"The earlier checkpoints in {self.root} are untouched, and training may go on."
            ) from error
        return final

    def find(self, choice: str = "auto") -> Found | None:
        """The checkpoint to resume from, chosen and verified by rank 0 for all.

        `never`: None. `auto`: what `latest` names, or, with a warning if that is damaged, the newest whole one; None if
        there is no checkpoint at all. `must`: the same, but none is an error. Anything else is the path of a step
        directory, taken as it is or refused, or of a root, searched as by `must`. Checkpoints that are all damaged are
        an error under every choice but `never`: a run does not start anew in silence.
        """
        if choice == "never":
            return None
        try:
            found = decided("looking for a checkpoint", lambda: _choose(self.root, choice))
            if found is not None:
                together("looking for the checkpoint", lambda: _expect(found.path, [STATE]))
        except RanksFailed as error:
            raise CheckpointError(f"cannot resume ({choice}): {error}") from error
        return found

    def _begin(self, final: Path, extras: list[str]) -> Path:
        if not _STEP_NAME.fullmatch(final.name):
            raise ValueError(f"{final.name} is no name of a step: expected a step from 0 to 99999999")
        if wrong := [name for name in extras if not _EXTRA_NAME.fullmatch(name) or name in (STATE, DOCUMENT, COMPLETE)]:
            raise ValueError(
                f"extras {wrong} cannot be sub-directories of a checkpoint: expected plain names of their own"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        atomic.clean(self.root)
        # a name never used before: a directory that a rank does see under it is rank 0's, on a disk they share
        fresh = self.root / f"{atomic.TEMPORARY}{final.name}_{secrets.token_hex(6)}"
        for name in (STATE, *extras):
            (fresh / name).mkdir(parents=True)
        return fresh

    def _finish(self, fresh: Path, final: Path, content: dict[str, Any], seen: dict[str, int], best: bool) -> None:
        _expect_sizes(fresh, seen)
        (fresh / DOCUMENT).write_text(json.dumps(content, indent=1), encoding="utf-8")
        files = atomic.digest(fresh)
        (fresh / COMPLETE).write_text(json.dumps({"version": VERSION, "files": files}, indent=1), encoding="utf-8")
        atomic.sync_tree(fresh)
        atomic.install(fresh, final)
        for pointer in (LATEST, BEST) if best else (LATEST,):
            atomic.write_text(self.root / pointer, final.name)
        try:
            self._retire(final.name)
        except (OSError, Damaged) as error:  # the new checkpoint stands: this is no reason to call it failed
            warnings.warn(f"old checkpoints in {self.root} could not be deleted: {error}", RuntimeWarning, stacklevel=2)

    def _retire(self, newest: str) -> None:
        # steps after this one belong to a run that was wound back: whoever did so may still want them
        steps = [name for name in _steps(self.root) if name <= newest]
        kept = {*steps[: self.keep], _pointer(self.root, LATEST), _pointer(self.root, BEST)}
        for name in steps:
            if name not in kept:
                atomic.discard(self.root / name)


class _Background:
    """A save under way: [Note: saving beside the training]. Its thread is no daemon, so that a process that ends finishes it."""

    def __init__(self, act: Callable[[], Any], group: dist.ProcessGroup | None) -> None:
        self._act: Callable[[], Any] | None = act
        self._group = group
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        assert self._act is not None
        try:
            with agreeing_over(self._group), torch.no_grad():
                self._act()
        except BaseException as error:
            self._error = error
        finally:
            self._act = None  # and with it the copies

    def finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def _frozen(document: Mapping[str, Any]) -> dict[str, Any]:
    frozen: dict[str, Any] = json.loads(json.dumps(document))
    return frozen


def _choose(root: Path, choice: str) -> Found | None:
    if choice not in ("auto", "must"):
        root = Path(choice).absolute()
        if (root / COMPLETE).exists() or _STEP_NAME.fullmatch(root.name):
            return _read(atomic.standing(root))
    names, complaints = _steps(root), []
    try:
        latest = _pointer(root, LATEST)
        names = [name for name in (latest,) if name] + [name for name in names if name != latest]
    except Damaged as error:
        complaints.append(str(error))
    for name in names:
        try:
            found = _read(atomic.standing(root / name))
        except (Damaged, OSError) as error:
            complaints.append(str(error))
            continue
        if complaints:
            warnings.warn(f"resuming from {found.path}, for: {'; '.join(complaints)}", RuntimeWarning, stacklevel=2)
        return found
    if complaints:
        raise CheckpointError(f"no checkpoint in {root} is whole: {'; '.join(complaints)}. To start anew, resume=never")
    if choice != "auto":
        raise CheckpointError(f"there is no checkpoint in {root}; expected a directory like step_00000200 in it")
    return None


def _read(path: Path) -> Found:
    """A step directory as `Found`, every file of it verified; `Damaged` says what is wrong with it."""
    files = _json(path / COMPLETE).get("files")
    if not isinstance(files, dict) or DOCUMENT not in files:
        raise Damaged(f"{path / COMPLETE} lists {type(files).__name__}; expected files, {DOCUMENT} among them")
    atomic.verify(path, files)
    for file in sorted((path / STATE).rglob("*.safetensors")):
        if file.relative_to(path).as_posix() not in files:
            raise Damaged(f"{file} is not listed in {COMPLETE}: it is of another save; move it away")
    content = _json(path / DOCUMENT)
    try:
        index = {str(name): (tuple(shape), str(dtype)) for name, (shape, dtype) in content["tensors"].items()}
        return Found(path=path, step=int(content["step"]), document=dict(content["document"]), index=index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{path / DOCUMENT}: expected step, tensors and document; {error!r}") from error


def _json(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise Damaged(f"{path} is missing")
    content = read_json(path, most=MAX_JSON, error=Damaged)
    if content.get("version") != VERSION:
        raise Damaged(f"{path} has version {content.get('version')!r:.80}; this d9d_lora reads version {VERSION}")
    return content


def _pointer(root: Path, name: str) -> str | None:
    try:
        if not os.path.lexists(root / name):
            return None
        with open_regular(root / name, Damaged) as stream:
            text = stream.read(200).decode("utf-8", errors="replace").strip()
    except OSError as error:
        raise Damaged(f"{root / name} cannot be read: {error}") from error
    if not _STEP_NAME.fullmatch(text):
        raise Damaged(f"{root / name} holds {text[:80]!r}; expected a name like step_00000200")
    return text


def _steps(root: Path) -> list[str]:
    """Names of the step directories below `root`, the newest first."""
    names = {path.name.removeprefix(atomic.REPLACED) for path in root.glob("*") if path.is_dir()}
    return sorted((name for name in names if _STEP_NAME.fullmatch(name)), reverse=True)


def _sizes(root: Path) -> dict[str, int]:
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}


def _expect(root: Path, folders: list[str]) -> None:
    _wait(root, lambda: [str(root / name) for name in folders if not (root / name).is_dir()])


def _expect_sizes(root: Path, sizes: Mapping[str, int]) -> None:
    _wait(root, lambda: [f"{name} ({sizes[name]} bytes)" for name, _ in sorted(sizes.items() - _sizes(root).items())])


def _wait(root: Path, lacking: Callable[[], list[str]]) -> None:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while missing := lacking():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"this rank does not see {some(missing)}, which other ranks do: "
                f"{root.parent} must be on a file system that all nodes share"
            )
        time.sleep(0.05)


