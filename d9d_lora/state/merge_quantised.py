"""A base that is held in few bits: which kind it is, and its weights unpacked, if they are asked for.

    ours             X.weight uint8 [O, I/2], X.absmax uint8, X.span int32 (`quant/nf4.py`)
    bitsandbytes     X.weight uint8 [n, 1], X.weight.absmax, .quant_map, .quant_state.bitsandbytes__nf4 (or __fp4), .nested_*

A sum with an update is no number of four bits, so a merge is refused without `dequantise`: it gives a plain model, four times as large.
The rounding of the base stays in it. If there is an original, merge into that.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d9d_lora.quant.nf4 import Packed, dequantise
from d9d_lora.state.merge_edit import Source
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.safetensors_dir import CheckpointFiles

_STATE = re.compile(r"^(.+)\.quant_state\.bitsandbytes__(nf4|fp4)$")
_BNB = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# Tensors that only packed checkpoints have -> who writes them.
_OTHERS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".SCB": "bitsandbytes LLM.int8",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_blocks": "MXFP4",
    "_blocks": "MXFP4",
}


@dataclass
class Plain:
    """A base without quantisation, or as it is when unpacked.

    Attributes:
        names: Of its tensors.
        dropped: Names in the files that are parts of unpacked weights.
        config: Fields of config.json that change.
    """

    source: Source
    names: list[str]
    dropped: frozenset[str] = frozenset()
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plain_source(files: CheckpointFiles, config: Mapping[str, Any], *, dequantise: bool) -> Plain:
    """The base of a merge.

    Raises:
        AdapterError: for a quantised base, if unpacking it is not asked for, or its kind is not known here.
    """
    kind, packed = _packed(files, config)
    if kind is None:
        return Plain(files, files.names())
    original = "merge into the original checkpoint, if there is one"
    if not packed:
        raise AdapterError(f"the base is quantised ({kind}), which cannot take a sum and is not unpacked here; {original}")
    if not dequantise:
        raise AdapterError(
            f"the base is quantised ({kind}: {min(packed)} and {len(packed) - 1} more), and the sum of a weight and an update is no number "
            f"of four bits. Better {original}; with dequantise=true the weights are unpacked, the output is a plain model, and the "
            "rounding of the base stays in it"
        )
    dropped = frozenset(part for weight in packed.values() for part in weight.parts)
    names = [name for name in files.names() if name not in dropped]
    notes = [f"{len(packed)} weights of the quantised base ({kind}) were unpacked"]
    return Plain(_Unpacked(files, packed), names, dropped, {"quantization_config": None}, notes)


@dataclass(frozen=True)
class _Weight:
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]
    make: Callable[[], Tensor]


class _Unpacked:
    """The tensors of the files, packed weights unpacked: one at a time is held."""

    def __init__(self, files: CheckpointFiles, packed: Mapping[str, _Weight]) -> None:
        self.files, self.packed = files, packed
        self._last: tuple[str, Tensor] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.packed[name].shape if name in self.packed else self.files.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.packed[name].dtype if name in self.packed else self.files.dtype(name)

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        if name not in self.packed:
            return self.files.read(name, box)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.packed[name].make()
        return self._last[1] if box is None else self._last[1][box]


def _packed(files: CheckpointFiles, config: Mapping[str, Any]) -> tuple[str | None, dict[str, _Weight]]:
    """(who packed it, the packed weights that can be unpacked); None: it is not packed."""
    names = set(files.names())
    said = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    method = str(said.get("quant_method", "")) if isinstance(said, dict) else str(said)
    if states := [match for name in names if (match := _STATE.match(name))]:
        return f"bitsandbytes {states[0][2]}", {match[1]: _bitsandbytes(files, match[1], match[0]) for match in states}
    ours = {n for n in names if n.endswith(".weight") and {f"{n[:-7]}.absmax", f"{n[:-7]}.span"} <= names}
    if ours:
        return "our NF4", {name: _ours(files, name, config) for name in ours}
    for name in sorted(names):
        if found := next((who for end, who in _OTHERS.items() if name.endswith(end)), None):
            return f"{method or found}: {name}", {}
    eight = next((n for n in sorted(names) if n.endswith(".weight") and files.dtype(n) in (torch.float8_e4m3fn, torch.float8_e5m2)), None)
    if eight is not None:
        return f"{method or 'FP8'}: {eight} is {files.dtype(eight)}", {}
    return None, {}


def _ours(files: CheckpointFiles, name: str, config: Mapping[str, Any]) -> _Weight:
    stem = name.removesuffix(".weight")
    parts = (f"{stem}.absmax", f"{stem}.span")
    out, half = files.shape(name)
    blocks = files.shape(parts[0])[1]
    into = 2 * half  # an odd width would need one more number than the files have
    if not blocks or into % blocks or (block := into // blocks) % 2:
        raise AdapterError(f"{name} is packed as {files.shape(name)} with {blocks} scales a row, and these files do not say its block size")
    dtype = _dtype(config)

    def make() -> Tensor:
        return dequantise(Packed(files.read(name), *(files.read(part) for part in parts)), into, block, dtype)

    return _Weight((out, into), dtype, parts, make)


def _bitsandbytes(files: CheckpointFiles, name: str, state_key: str) -> _Weight:
    """W = code[c] * m over blocks of the flattened weight; m itself may be code2[c2] * m2 + offset."""
    state = json.loads(bytes(files.read(state_key).tolist()).decode("utf-8"))
    shape, dtype, block = tuple(state["shape"]), getattr(torch, str(state["dtype"]).removeprefix("torch.")), int(state["blocksize"])
    there = set(files.names())
    parts = (state_key, *(key for part in _BNB if (key := f"{name}.{part}") in there))

    def make() -> Tensor:
        m = files.read(f"{name}.absmax")
        if m.dtype == torch.uint8:
            code2, m2 = files.read(f"{name}.nested_quant_map").float(), files.read(f"{name}.nested_absmax").float()
            m = code2[m.long()] * m2.repeat_interleave(int(state["nested_blocksize"]))[: m.numel()] + float(state["nested_offset"])
        code, packed = files.read(f"{name}.quant_map").float(), files.read(name).flatten()
        n = math.prod(shape)
        result = torch.empty(n, dtype=dtype)
        step = block * 4096
        for start in range(0, n, step):  # a few blocks at a time: bounds the fp32 copies
            stop = min(n, start + step)
            two = packed[start // 2 : -(-stop // 2)]
            values = code[torch.stack([two >> 4, two & 15], 1).flatten().long()[: stop - start]]
            scales = m[start // block : -(-stop // block)].repeat_interleave(block)[: stop - start]
            result[start:stop] = (values * scales).to(dtype)
        return result.view(shape)

    return _Weight(shape, dtype, parts, make)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch."))
