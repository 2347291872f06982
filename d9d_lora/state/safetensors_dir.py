"""A checkpoint on disk: one .safetensors file, or a Hugging Face directory of them. Nothing here is ever unpickled.

    file  =  8 bytes n, little endian  |  n bytes of JSON {name: {dtype, shape, data_offsets}}  |  the tensors' bytes

A directory holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names. The headers are
the truth about names; the index only says which files belong. All of it is checked at opening, from the headers alone,
so that a broken or hostile download is refused before a weight is touched. The checks are the format's own rules.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses more, too
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
AGAIN = "Download or save it again."


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, hostile, or not the model's: which file, which key, and the mend."""


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointFiles:
    """The tensors of a checkpoint by name; each read touches only the bytes asked for.

    `bytes_read` counts the bytes of tensors handed out, headers apart. Close it, or use it in a `with`.
    """

    def __init__(self, promised: Mapping[Path, Collection[str]]) -> None:
        self._entries: dict[str, _Entry] = {}
        self._open: dict[Path, Any] = {}
        self._files = sorted(promised)
        self.bytes_read = 0
        for file in self._files:
            entries = _read_header(file)
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

    def file_of(self, name: str) -> Path:
        return self._entry(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

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
        try:
            file = self._handle(entry.file)
            tensor: Tensor = file.get_tensor(name) if shape == entry.shape else file.get_slice(name)[box]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.file}: cannot read {name!r}: {error}. {AGAIN}") from error
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"No tensor {name!r} in {[str(file) for file in self._files]}; names() lists them.")
        return self._entries[name]

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt").__enter__()
        return self._open[file]

    def close(self) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
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
    if path.is_dir():
        return CheckpointFiles(_files_of_directory(path))
    if not path.exists():
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
        return {_inside(root, single): []}
    found = sorted(entry.name for entry in root.iterdir())
    if not found:
        raise CheckpointError(f"{root} is empty: no {SINGLE} and no {INDEX}. Download or save the model first.")
    if pickles := [name for name in found if Path(name).suffix in PICKLES]:
        raise CheckpointError(f"{root} has no safetensors, only pickle files ({pickles[0]}). {CONVERT}")
    named = [name for name in found if name.endswith(".safetensors")]
    mend = f"Give the path of the file itself, say {named[0]}." if named else "Give the directory of a saved model."
    raise CheckpointError(f"{root} holds no checkpoint: expected {SINGLE} or {INDEX}, found {found[:8]}. {mend}")


def _files_of_index(root: Path, index: Path) -> dict[Path, list[str]]:
    """Each file that the index names, with the keys that it should hold."""
    weight_map = _parse_json(_inside(root, index).read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: expected {{"weight_map": {{name: file, ...}}}} with entries. {AGAIN}')
    promised: dict[Path, list[str]] = {}
    for name, file in sorted(weight_map.items()):
        if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file:
            mend = CONVERT if isinstance(file, str) and Path(file).suffix in PICKLES else AGAIN
            raise CheckpointError(f"{index}: {name!r} is said to be in {file!r}, which is no .safetensors file. {mend}")
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(
                f"{index}: {name!r} is said to be in {file!r}, outside {root}. "
                "A checkpoint may name only files beside its index; do not trust where this one came from."
            )
        promised.setdefault(root / file, []).append(name)
    return {_inside(root, file, f"{index} puts {names[:3]} in {file}"): names for file, names in promised.items()}


def _inside(root: Path, file: Path, where: str = "") -> Path:
    """`file`, if following its links stays in `root`; the hub's cache links snapshots/<revision>/x to ../../blobs/y."""
    where = where or str(file)
    try:
        home, target = root.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a name that no file can have
        raise CheckpointError(f"{where!r} leads nowhere: {error}. {AGAIN}") from error
    if not target.is_relative_to(home) and target.parent != _hub_blobs(home):
        raise CheckpointError(
            f"{where}, a link that leads out of the checkpoint to {target}. "
            "Copy the file into the directory if you trust it."
        )
    if not target.is_file():
        raise CheckpointError(f"{where}, which is {'no regular file' if target.exists() else 'not there'}. {AGAIN}")
    return file


def _hub_blobs(home: Path) -> Path | None:
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots":
            blobs = folder.parent.parent / "blobs"
            return blobs if blobs.resolve() == blobs else None  # a `blobs` that is itself a link leads anywhere
    return None


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where}: the key {twice!r} stands there twice. {AGAIN}")
        return table

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: expected JSON, got {text[:40]!r} ({error}). {AGAIN}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got a {type(parsed).__name__}. {AGAIN}")
    return parsed


def _read_header(file: Path) -> dict[str, _Entry]:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise CheckpointError(f"{file} is a Git LFS pointer and not the file: run `git lfs pull` there.")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file} is cut short or no safetensors file: its header would be {length} bytes long, "
                    f"the whole file has {size}. {AGAIN}"
                )
            if length > MAX_HEADER:
                raise CheckpointError(f"{file}: a header of {length} bytes, {MAX_HEADER} are allowed. {AGAIN}")
            header = _parse_json(stream.read(length), f"{file}, header")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    header.pop("__metadata__", None)
    _check_layout(file, header, size - 8 - length)
    return {name: _Entry(file, DTYPES[said["dtype"]], tuple(said["shape"])) for name, said in header.items()}


def _check_layout(file: Path, header: dict[str, Any], size: int) -> None:
    """The tensors' bytes tile the rest of the file: each as long as shape x dtype, none shared, none left over."""
    spans: list[tuple[int, int, str]] = []
    for name, said in header.items():
        where = f"{file}: {name!r}"
        if not isinstance(said, dict) or not {"dtype", "shape", "data_offsets"} <= said.keys():
            raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {said!r:.80}. {AGAIN}")
        dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{where}: dtype {dtype!r:.40} is unknown; convert it to one of {sorted(DTYPES)}.")
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{where}: bad shape {shape!r:.80} or data_offsets {offsets!r:.80}. {AGAIN}")
        begin, end = offsets
        if not begin <= end <= size:
            raise CheckpointError(f"{where}: bytes {begin} to {end} are not in the file's {size}: cut short. {AGAIN}")
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
