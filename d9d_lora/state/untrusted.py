"""A file that anybody may have written: opened only if it is an ordinary one, read only so far, parsed only if it says each thing once.

    stat -> regular?  size -> bounded?  bytes -> UTF-8?  text -> JSON, no key twice, finite numbers, not deep?

A pipe would be waited for, a device read for ever, a link followed to another's secrets; of two equal keys two programs take different
ones. Each is an error here, so that readers need to know of one kind of file only.
"""

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from reprlib import Repr
from typing import Any, BinaryIO

MAX_JSON = 32_000_000  # bytes of an index or of a header: above 250,000 tensors
MAX_CONFIG = 4_000_000  # bytes of any other JSON file
MAX_DEPTH = 32
MAX_NAME = 500  # characters of a tensor's name; an error quotes several
AGAIN = "Download or save it again."

_short = Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 80, 80, 40
shown = _short.repr  # of a value from a file: short and shallow, whatever it is


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, hostile, or not the model's: which file, which key, and the mend."""


def open_regular(path: Path, error: type[ValueError] = CheckpointError) -> BinaryIO:
    """Opens an ordinary file, or a link to one; never waits for one."""
    try:
        _expect_regular(os.stat(path).st_mode, path, error)
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            _expect_regular(os.fstat(handle).st_mode, path, error)  # it may have been changed for another since
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except FileNotFoundError as cause:
        raise error(f"{path} is not there. {AGAIN}") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause}. {AGAIN}") from cause


def _expect_regular(mode: int, path: Path, error: type[ValueError]) -> None:
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise error(f"{path} is no regular file but {kind}. {AGAIN}")


def read_json(path: Path, *, most: int = MAX_CONFIG, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: The file.
        most: Its greatest size in bytes.
        error: The class to raise.

    Raises:
        error: anything but a regular file of UTF-8 with one JSON object in it, in which no object has a key twice.
    """
    with open_regular(path, error) as stream:
        try:
            text = stream.read(most + 1)
        except OSError as cause:
            raise error(f"{path} cannot be read: {cause}. {AGAIN}") from cause
    if len(text) > most:
        raise error(f"{path} is larger than {most} bytes, which no such file is. {AGAIN}")
    return parse_json(text, str(path), error)


def parse_json(text: bytes, where: str, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in `text`; `where` is for the message."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{where}: the key {shown(twice)} stands there twice. {AGAIN}")
        return table

    if len(text) > MAX_CONFIG and 16 * (text.count(b"[") + text.count(b"{")) > len(text):  # of a header: 3 in 50 bytes at most
        raise error(f"{where} is not JSON as it is written for tensors: hardly anything but brackets. {AGAIN}")
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=_number, parse_float=_number)
        if b"\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except error:
        raise
    except (ValueError, RecursionError) as cause:
        raise error(f"{where} is not JSON ({shown(str(cause))}): it begins with {text[:40]!r}. {AGAIN}") from cause
    if not isinstance(parsed, dict):
        raise error(f"{where}: expected a JSON object, got a {type(parsed).__name__}. {AGAIN}")
    if _depth(parsed) > MAX_DEPTH:
        raise error(f"{where}: objects and lists in each other deeper than {MAX_DEPTH}. {AGAIN}")
    return parsed


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def _depth(parsed: Any) -> int:
    """How deep it goes, counted no further than the limit."""
    level, depth = [parsed], 0
    while level and depth <= MAX_DEPTH:
        inside = (part.values() if isinstance(part, dict) else part for part in level)
        level, depth = [value for part in inside for value in part if isinstance(value, dict | list)], depth + 1
    return depth


def is_name(text: object) -> bool:
    """Whether something can be the name of a tensor or a file: printable text of ordinary length (a terminal obeys some that is not)."""
    return isinstance(text, str) and 0 < len(text) <= MAX_NAME and text.isprintable()


def inside(root: Path, file: Path, where: str = "") -> Path:
    """`file`, if following its links stays in `root`; the hub's cache links snapshots/<revision>/x to ../../blobs/y.

    Raises:
        CheckpointError: a link that leads out or nowhere, and anything but a regular file.
    """
    where = where or str(file)
    try:
        home, target = root.resolve(), file.resolve()
        there, regular = target.exists(), target.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a name that no file can have
        raise CheckpointError(f"{where!r} leads nowhere: {error}. {AGAIN}") from error
    if not target.is_relative_to(home) and target.parent != _hub_blobs(home):
        raise CheckpointError(
            f"{where}, a link that leads out of the checkpoint to {target}. "
            "Copy the file into the directory if you trust it."
        )
    if not regular:
        raise CheckpointError(f"{where}, which is {'no regular file' if there else 'not there'}. {AGAIN}")
    return file


def _hub_blobs(home: Path) -> Path | None:
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots":
            blobs = folder.parent.parent / "blobs"
            return blobs if blobs.resolve() == blobs else None  # a `blobs` that is itself a link leads anywhere
    return None
