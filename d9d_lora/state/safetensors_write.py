"""Writes a .safetensors file tensor by tensor, so that a file larger than memory needs memory for one block only.

    8 bytes n, little endian  |  n bytes of JSON {name: {dtype, shape, data_offsets}}  |  the tensors' bytes, in order

The safetensors library writes from tensors that are all in memory at once, which a merge of a large model must not
need. Reading is `safetensors_dir`; the tests read what is written here with the library too.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d9d_lora.state.safetensors_dir import DTYPES

_SPELLED = {dtype: word for word, dtype in DTYPES.items()}
_ALIGNMENT = 8  # the data begins at a multiple of it, as in files of the library


@dataclass(frozen=True)
class Promise:
    """A tensor that will be written: the header names it before its values are there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    promises: Sequence[Promise],
    blocks_of: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, synced to the disk.

    Args:
        path: The file; it must not exist.
        promises: What it holds, in the order of the data.
        blocks_of: The values of a tensor, as blocks of its first dimension in order (or the whole tensor as one block).
        metadata: The header's `__metadata__`.

    Raises:
        ValueError: if blocks are not what was promised; the file is then incomplete and must be thrown away.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for promise in promises:
        header[promise.name] = {
            "dtype": _SPELLED[promise.dtype],
            "shape": list(promise.shape),
            "data_offsets": [begin, begin + promise.bytes],
        }
        begin += promise.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for promise in promises:
            written = 0
            for block in blocks_of(promise.name):
                if block.dtype != promise.dtype or not _fits(tuple(block.shape), promise.shape):
                    raise ValueError(
                        f"{path}: {promise.name!r} was promised as {promise.dtype} {promise.shape}; "
                        f"a block is {block.dtype} {tuple(block.shape)}"
                    )
                data = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(data.numpy().data)
                written += data.numel()
            if written != promise.bytes:
                raise ValueError(f"{path}: {promise.name!r} has {promise.bytes} bytes, its blocks made {written}")
        file.flush()
        os.fsync(file.fileno())


def library_order(promises: Iterable[Promise]) -> list[Promise]:
    """The order in which the safetensors library writes: widest dtype first, so that all lie aligned, then by name."""
    return sorted(promises, key=lambda p: (-p.dtype.itemsize, str(p.dtype), p.name))


def _fits(block: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(block) == len(whole) and block[1:] == whole[1:]
