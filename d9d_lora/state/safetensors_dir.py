"""A checkpoint on disk: one .safetensors file, or a Hugging Face directory of them. Nothing here is ever unpickled.

    file  =  8 bytes n, little endian  |  n bytes of JSON {name: {dtype, shape, data_offsets}}  |  the tensors' bytes

A directory holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names. The headers are
the truth about names; the index only says which files belong. All of it is checked at opening, from the headers alone,
so that a broken or hostile download is refused before a weight is touched. The checks are the format's own rules.

[Note: read, not mapped]
The safetensors library maps files. Then a rank that wants some columns of every row is given every page, with what the kernel reads around
each; all of it counts as the rank's memory; and a file that is cut short under the reader ends the process. Here the bytes that were asked
for are asked of the system, into memory of the caller's: `bytes_read` is what it gave.
"""

import itertools
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from d9d_lora.state.untrusted import AGAIN, MAX_JSON, CheckpointError, inside, is_name, open_regular, parse_json, read_json, shown

__all__ = ["CheckpointError", "CheckpointFiles", "open_checkpoint", "read_header"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_PICKLE = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # how a pickle begins, and the zip that torch puts around one
MAX_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CONVERT = (
    "Pickle runs code from the file, so it is never read here: convert to safetensors "
    "(model.save_pretrained(..., safe_serialization=True)) on a machine that may run it."
)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is: its first byte in the file, and the file as it was when its header was checked (`_stamp`)."""

    file: Path
    stamp: tuple[int, ...]
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointFiles:
    """The tensors of a checkpoint by name; each read asks for just the bytes it needs. [Note: read, not mapped]

    `bytes_read` counts the bytes of tensors that the system gave, headers apart. Close it, or use it in a `with`.
    """

    def __init__(self, promised: Mapping[Path, Collection[str]]) -> None:
        self._entries: dict[str, _Entry] = {}
        self._metadata: dict[Path, dict[str, str]] = {}
        self._open: dict[Path, BinaryIO] = {}
        self._files = sorted(promised)
        self.bytes_read = 0
        for file in self._files:
            entries, self._metadata[file] = read_header(file)
            if lacking := sorted(set(promised[file]) - entries.keys()):
                raise CheckpointError(f"The index puts {lacking[:5]} in {file}, which does not hold them. {AGAIN}")
            for name, entry in entries.items():
                if name in self._entries:
                    raise CheckpointError(
                        f"{name!r} is in two files of one checkpoint: {self._entries[name].file} and {file}. "
                        "Remove the stale file, or name the one you mean."
                    )
                self._entries[name] = entry

    def names(self) -> list[str]:
        return sorted(self._entries)

    def files(self) -> list[Path]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def metadata(self) -> dict[str, str]:
        """What the files say of themselves beside their tensors; of several, the last to say a thing."""
        return {key: value for file in self._files for key, value in self._metadata[file].items()}

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor `name` on the CPU, or the part of it in `box`: one `slice(start, stop)` a dimension, in bounds.

        Raises:
            CheckpointError: no such name, a box that does not fit, or a file that changed under our feet.
        """
        entry = self._entry(name)
        box = tuple(slice(0, size) for size in entry.shape) if box is None else box
        fits = len(box) == len(entry.shape) and all(
            part.step in (None, 1) and 0 <= part.start <= part.stop <= size for part, size in zip(box, entry.shape)
        )
        if not fits:
            raise CheckpointError(
                f"{entry.file}: {name!r} has shape {entry.shape}, which the box {box} does not fit. "
                "Expected one slice(start, stop) a dimension, within its size."
            )
        shape = tuple(part.stop - part.start for part in box)
        if 0 in shape:
            return torch.empty(shape, dtype=entry.dtype)
        tensor = torch.empty(shape, dtype=entry.dtype)
        into = tensor.view(-1).view(torch.uint8).numpy().data
        stream, at = self._stream(entry), 0
        try:
            for begin, size in _stretches(entry, box):
                self._read_into(stream, into[at : at + size], begin)
                at += size
        except OSError as error:
            raise CheckpointError(f"{entry.file}: cannot read {name!r}: {error}. {AGAIN}") from error
        return tensor

    def _read_into(self, stream: BinaryIO, into: memoryview, begin: int) -> None:
        done = 0
        while done < len(into):  # the system gives at most 2 GiB at once, and less where it likes
            given = os.preadv(stream.fileno(), [into[done:]], begin + done)
            if not given:
                raise OSError(f"it ends at byte {begin + done}, and was longer when it was opened")
            done += given
            self.bytes_read += given

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"No tensor {name!r} in {[str(file) for file in self._files]}; names() lists them.")
        return self._entries[name]

    def _stream(self, entry: _Entry) -> BinaryIO:
        if entry.file not in self._open:
            stream = open_regular(entry.file)
            if _stamp(stream) != entry.stamp:
                stream.close()
                raise CheckpointError(f"{entry.file} was one file when its header was checked, and is another now. {AGAIN}")
            self._open[entry.file] = stream
        return self._open[entry.file]

    def close(self) -> None:
        for stream in self._open.values():
            stream.close()
        self._open = {}

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointFiles:
    """Opens a Hugging Face directory, its index file, or one .safetensors file, and checks every header.

    Raises:
        CheckpointError: what is wrong, in which file and key, and the mend.
    """
    path = Path(path)
    try:
        directory, there = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{str(path)[:200]!r} cannot be looked at: {error}.") from error
    if directory:
        return CheckpointFiles(_files_of_directory(path))
    if not there:
        raise CheckpointError(f"{path} does not exist. Expected a directory with {SINGLE} or {INDEX}, or a file.")
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle file. {CONVERT}")
    if path.name.endswith(".safetensors.index.json"):
        return CheckpointFiles(_files_of_index(path.parent, path))
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected a .safetensors file, an index of them, or a directory of both.")
    return CheckpointFiles({path: ()})


def _files_of_directory(root: Path) -> dict[Path, list[str]]:
    single, index = root / SINGLE, root / INDEX
    if os.path.lexists(single) and os.path.lexists(index):
        raise CheckpointError(
            f"{root} holds both {SINGLE} and {INDEX}, so which of them is the model is a guess. "
            "Remove the stale one, or give the path of the one you mean."
        )
    if os.path.lexists(index):
        return _files_of_index(root, index)
    if os.path.lexists(single):
        return {inside(root, single): []}
    try:
        found = sorted(entry.name for entry in root.iterdir())
    except OSError as error:
        raise CheckpointError(f"{root} cannot be listed: {error}.") from error
    if not found:
        raise CheckpointError(f"{root} is empty: no {SINGLE} and no {INDEX}. Download or save the model first.")
    if pickles := [name for name in found if Path(name).suffix in PICKLES]:
        raise CheckpointError(f"{root} has no safetensors, only pickle files ({pickles[0]}). {CONVERT}")
    named = [name for name in found if name.endswith(".safetensors")]
    mend = f"Give the path of the file itself, say {named[0]}." if named else "Give the directory of a saved model."
    raise CheckpointError(f"{root} holds no checkpoint: expected {SINGLE} or {INDEX}, found {found[:8]}. {mend}")


def _files_of_index(root: Path, index: Path) -> dict[Path, list[str]]:
    """Each file that the index names, with the keys that it should hold."""
    weight_map = read_json(inside(root, index), most=MAX_JSON).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: expected {{"weight_map": {{name: file, ...}}}} with entries. {AGAIN}')
    promised: dict[Path, list[str]] = {}
    for name, file in sorted(weight_map.items()):
        if not is_name(name):
            raise CheckpointError(f"{index}: {shown(name)} cannot be the name of a tensor. {AGAIN}")
        if not is_name(file) or not file.endswith(".safetensors"):
            mend = CONVERT if isinstance(file, str) and Path(file).suffix in PICKLES else AGAIN
            raise CheckpointError(f"{index}: {name!r} is said to be in {shown(file)}, which is no .safetensors file. {mend}")
        # a backslash is a separator elsewhere: what is one file here would be another there
        if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file:
            raise CheckpointError(
                f"{index}: {name!r} is said to be in {file!r}, outside {root}. "
                "A checkpoint may name only files beside its index; do not trust where this one came from."
            )
        promised.setdefault(root / file, []).append(name)
    return {inside(root, file, f"{index} puts {names[:3]} in {file}"): names for file, names in promised.items()}


def read_header(file: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """(tensors by name, metadata) of one file, every entry checked; no byte of a tensor is read.

    Raises:
        CheckpointError: what is wrong, in which file and key.
    """
    with open_regular(file) as stream:
        try:
            stamp = _stamp(stream)
            size = stamp[0]
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise CheckpointError(f"{file} is a Git LFS pointer and not the file: run `git lfs pull` there.")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file} is cut short or no safetensors file: its header would be {length} bytes long, "
                    f"the whole file has {size}. {CONVERT if _PICKLE.match(first) else AGAIN}"
                )
            if length > MAX_JSON:
                raise CheckpointError(f"{file}: a header of {length} bytes, {MAX_JSON} are allowed. {AGAIN}")
            text = stream.read(length)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from error
    header = parse_json(text, f"{file}, header")
    if text[:1] != b"{":  # the format's rule, by which a header is told from any other file
        raise CheckpointError(f"{file}, header: expected JSON that begins with a brace, got {text[:40]!r}. {AGAIN}")
    metadata = _metadata(file, header.pop("__metadata__", {}))
    _check_layout(file, header, size - 8 - length)
    data = 8 + length
    entries = {}
    for name, said in header.items():
        entries[name] = _Entry(file, stamp, data + said["data_offsets"][0], DTYPES[said["dtype"]], tuple(said["shape"]))
    return entries, metadata


def _stamp(stream: BinaryIO) -> tuple[int, ...]:
    """What tells a file from another of its name: size, inode, time of its last change."""
    told = os.fstat(stream.fileno())
    return told.st_size, told.st_dev, told.st_ino, told.st_mtime_ns


def _stretches(entry: _Entry, box: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each contiguous piece of a box, in the order of its elements: whole inner dimensions are one piece."""
    size, outer = entry.dtype.itemsize, len(box)
    while outer and (box[outer - 1].start, box[outer - 1].stop) == (0, entry.shape[outer - 1]):
        outer -= 1
        size *= entry.shape[outer]
    if not outer:
        yield entry.begin, size
        return
    inner = box[outer - 1]
    strides = [size * math.prod(entry.shape[dim + 1 : outer]) for dim in range(outer)]
    begin = entry.begin + inner.start * size
    for at in itertools.product(*(range(part.start, part.stop) for part in box[: outer - 1])):
        yield begin + sum(index * stride for index, stride in zip(at, strides)), (inner.stop - inner.start) * size


def _metadata(file: Path, said: Any) -> dict[str, str]:
    if said is None:  # as MLX writes "none"
        return {}
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise CheckpointError(f"{file}: __metadata__ is {shown(said)}; expected an object of texts. {AGAIN}")
    return said


def _check_layout(file: Path, header: dict[str, Any], size: int) -> None:
    """The tensors' bytes tile the rest of the file: each as long as shape x dtype, none shared, none left over."""
    spans: list[tuple[int, int, str]] = []
    for name, said in header.items():
        if not is_name(name):
            raise CheckpointError(f"{file}: {shown(name)} cannot be the name of a tensor. {AGAIN}")
        where = f"{file}: {name!r}"
        if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {shown(said)}. {AGAIN}")
        dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{where}: dtype {shown(dtype)} is unknown; convert it to one of {sorted(DTYPES)}.")
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
            raise CheckpointError(f"{where}: bad shape {shown(shape)} or data_offsets {shown(offsets)}. {AGAIN}")
        begin, end = offsets
        if not begin <= end <= size:
            raise CheckpointError(f"{where}: bytes {begin} to {end} are not in the file's {size}: cut short. {AGAIN}")
        if math.prod(max(size, 1) for size in shape) >= 2**62:  # [2**40, 0, 2**40] is empty, and no library can say so
            raise CheckpointError(f"{where}: bad shape {shown(shape)}, which has no strides. {AGAIN}")
        if (needed := math.prod(shape) * DTYPES[dtype].itemsize) != end - begin:
            raise CheckpointError(f"{where}: {dtype} {shape} takes {needed} bytes, offsets give {end - begin}. {AGAIN}")
        spans.append((begin, end, name))
    reached, before = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin != reached:
            fault = "overlap" if begin < reached else "leave a hole"
            raise CheckpointError(f"{file}: {before!r} and {name!r} {fault} at byte {min(begin, reached)}. {AGAIN}")
        reached, before = end, name
    if reached != size:
        raise CheckpointError(f"{file}: {size - reached} bytes after {before!r} belong to no tensor. {AGAIN}")


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**62 for size in value)
