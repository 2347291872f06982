"""A GGUF file, versions 2 and 3, read without trusting it.

    file    =  "GGUF" | u32 version | u64 tensors | u64 entries | entries | tensors | padding | the tensors' bytes, each padded
    entry   =  string key | u32 type | value        string = u64 bytes | UTF-8        array = u32 type | u64 count | values
    tensor  =  string name | u32 dimensions | u64 sizes, the fastest first | u32 type | u64 offset

The `gguf` package writes our files and does not read them: it maps a file into memory and believes every count in it, so that an
array of 2^60 numbers in a file of a hundred bytes keeps it busy for ever. Here a count is compared with the bytes that are left
before anything is done with it, and the tensors' bytes must tile the rest of the file.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.untrusted import open_regular

AGAIN = "Download or convert it again."
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
# type -> (elements in a block, bytes of a block): those that an adapter may have
_BLOCKS = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q8_0: (32, 34)}
_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_NAME = 65535


@dataclass(frozen=True)
class Info:
    """One tensor of the file; `shape` is torch's, the slowest dimension first."""

    shape: tuple[int, ...]
    type: int
    offset: int  # from the start of the tensors' bytes


@dataclass(frozen=True)
class Array:
    """An array in the metadata: what it holds is skipped."""

    type: int
    count: int


class GGUFFile:
    """The metadata (`fields`) and the tensors of a GGUF file; metadata first, so that a wrong kind of file is told by it.

    Raises:
        AdapterError: for what is no GGUF file, is cut short, or contradicts itself: which part, and what was expected.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_regular(self.path, AdapterError) as stream:
            cursor = _Cursor(stream, self.path)
            tensors, entries = self._start(cursor)
            self.fields = self._entries(cursor, entries)
            self._infos = self._tensor_infos(cursor, tensors)
            align = self.fields.get("general.alignment", 32)
            if type(align) is not int or align < 1 or align & (align - 1):
                raise AdapterError(f"{self.path}: general.alignment is {align!r}; expected a power of two. {AGAIN}")
            self._align, self._size = align, cursor.size
            self._data = _padded(cursor.position, align)

    def _start(self, cursor: "_Cursor") -> tuple[int, int]:
        magic = cursor.take(4, "the first bytes") if cursor.size >= 4 else b""
        if magic != b"GGUF":
            raise AdapterError(f"{self.path} is no GGUF file: it begins with {magic!r}. {AGAIN}")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise AdapterError(
                f"{self.path}: GGUF version {version}; expected 2 or 3"
                + (". The file is big-endian: convert it again without --bigendian" if swapped else f". {AGAIN}")
            )
        return cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of entries")

    def _entries(self, cursor: "_Cursor", count: int) -> dict[str, Any]:
        cursor.room(count, 13, "entries")  # the least an entry takes: an empty key, a type, one byte
        fields: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.string("a key")
            if key in fields:
                raise AdapterError(f"{self.path}: the key {key!r} stands there twice. {AGAIN}")
            fields[key] = cursor.value(cursor.number("I", f"the type of {key!r}"), repr(key))
        return fields

    def _tensor_infos(self, cursor: "_Cursor", count: int) -> dict[str, Info]:
        cursor.room(count, 24, "tensors")
        infos: dict[str, Info] = {}
        for _ in range(count):
            name = cursor.string("a tensor's name")
            if name in infos:
                raise AdapterError(f"{self.path}: the tensor {name!r} stands there twice. {AGAIN}")
            dimensions = cursor.number("I", f"the dimensions of {name!r}")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise AdapterError(f"{self.path}: {name!r} has {dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}. {AGAIN}")
            sizes = [cursor.number("Q", f"the shape of {name!r}") for _ in range(dimensions)]
            infos[name] = Info(tuple(reversed(sizes)), cursor.number("I", f"the type of {name!r}"), cursor.number("Q", name))
        return infos

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, after the check that the tensors' bytes follow each other and end with the file."""
        begin = 0
        for name, info in sorted(self._infos.items(), key=lambda item: item[1].offset):
            if info.offset != begin:
                raise AdapterError(f"{self.path}: {name!r} begins at byte {info.offset} of the data; {begin} was expected. {AGAIN}")
            begin += self._bytes(name)
            if self._data + begin > self._size:
                raise AdapterError(
                    f"{self.path} is cut short: {name!r} ends at byte {self._data + begin}, the file has {self._size}. {AGAIN}"
                )
            begin = _padded(begin, self._align)
        if self._size > max(self._data + begin, self._data):
            raise AdapterError(f"{self.path}: {self._size - self._data - begin} bytes at its end belong to no tensor. {AGAIN}")
        return {name: info.shape for name, info in self._infos.items()}

    def _bytes(self, name: str) -> int:
        info = self._infos[name]
        if info.type not in _BLOCKS:
            raise AdapterError(f"{self.path}: {name!r} is of ggml type {info.type}; an adapter's are F32, F16, BF16 or Q8_0")
        elements, size = _BLOCKS[info.type]
        if info.shape[-1] % elements:
            raise AdapterError(f"{self.path}: {name!r} {info.shape} has rows that are no multiple of {elements}. {AGAIN}")
        return math.prod(info.shape) // elements * size

    def read(self, name: str) -> Tensor:
        """A tensor, as it is; Q8_0, which torch has not, as fp32."""
        info = self._infos[name]
        with open_regular(self.path, AdapterError) as stream:
            stream.seek(self._data + info.offset)
            data = bytearray(stream.read(self._bytes(name)))
        if len(data) != self._bytes(name):
            raise AdapterError(f"{self.path}: {name!r} could not be read to its end. {AGAIN}")
        if not data:
            return torch.empty(info.shape, dtype=_DTYPES.get(info.type, torch.float32))
        if info.type in _DTYPES:
            return torch.frombuffer(data, dtype=_DTYPES[info.type]).reshape(info.shape)
        blocks = torch.frombuffer(data, dtype=torch.uint8).reshape(-1, 34)
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        return (blocks[:, 2:].contiguous().view(torch.int8).float() * scale).reshape(info.shape)


class _Cursor:
    """Walks through a file's header; never past the end of the file."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.size, self.position = os.fstat(stream.fileno()).st_size, 0

    def room(self, count: int, each: int, what: str) -> None:
        if count * each > self.size - self.position:
            raise AdapterError(f"{self.path} is cut short or no GGUF file: {count} {what} do not fit in its {self.size} bytes. {AGAIN}")

    def take(self, count: int, what: str) -> bytes:
        self.room(count, 1, f"bytes of {what}")
        data = self.stream.read(count)
        self.position += count
        return data

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))[0]

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        if length > _MAX_NAME:
            raise AdapterError(f"{self.path}: {what} of {length} bytes; {_MAX_NAME} are allowed. {AGAIN}")
        return self._text(self.take(length, what), what)

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self._text(self.take(self.number("Q", what), what), what)
        if kind != _ARRAY:
            raise AdapterError(f"{self.path}: {what} is of the unknown type {kind}. {AGAIN}")
        held, count = self.number("I", what), self.number("Q", what)
        if held in _SCALARS:
            each = struct.calcsize(f"<{_SCALARS[held]}")
            self.room(count, each, f"elements of {what}")
            self.stream.seek(count * each, os.SEEK_CUR)
            self.position += count * each
        elif held == _STRING:
            self.room(count, 8, f"strings of {what}")
            for _ in range(count):
                self.take(self.number("Q", what), what)
        else:
            raise AdapterError(f"{self.path}: {what} is an array of type {held}; expected numbers or strings. {AGAIN}")
        return Array(held, count)

    def _text(self, data: bytes, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise AdapterError(f"{self.path}: {what} is no UTF-8: {data[:40]!r}. {AGAIN}") from error


def _padded(position: int, align: int) -> int:
    return -(-position // align) * align
