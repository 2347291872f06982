"""NF4 with double quantisation: W[O,I] ~ code[c[O,I]] * m[O,I/64], with m ~ offset[O] + step[O] * a[O,I/64].

    weight  uint8 [O, I/2]    two codes a byte, the first in the high half
    absmax  uint8 [O, I/64]   a: the largest |w| of each block of 64 columns, as one of 256 steps
    span    int32 [O, 2]      the bits of the fp32 numbers offset and step

That is 4 + 8/64 + 64/I bits a weight: 4.14 for I = 4096. `span` is kept as integers, so that neither `.to(dtype)` nor a
mixed-precision policy rounds it. Blocks run along rows, and the second quantisation takes the absmax of one row together. So any rows
can be quantised alone, with the same bits; of a part of the columns (whole blocks), only the smallest and largest m must be agreed upon.

A code is the nearest value under the scale it will be read with (m as restored, not as measured). Sums and products are in fp32.

Dettmers et al. 2023, arXiv:2305.14314: the code book is of its appendix E; there 256 absmax are quantised together, to 8-bit floats.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_AT_ONCE = 1 << 20  # weights that are taken at a time: bounds the fp32 copies beside the result


class Packed(NamedTuple):
    """The three tensors of a quantised matrix."""

    weight: Tensor
    absmax: Tensor
    span: Tensor


Agree = Callable[[Tensor, Tensor], None]


def packed_shapes(out: int, into: int, block: int) -> Packed:
    """The shapes, as empty meta tensors."""
    return Packed(
        torch.empty(out, -(-into // 2), dtype=torch.uint8, device="meta"),
        torch.empty(out, -(-into // block), dtype=torch.uint8, device="meta"),
        torch.empty(out, 2, dtype=torch.int32, device="meta"),
    )


@torch.no_grad()
def quantise(w: Tensor, block: int = BLOCK, agree: Agree | None = None) -> Packed:
    """A float matrix, or some rows of one, or whole blocks of columns of one.

    Args:
        agree: Makes the smallest and the largest m[O] those of whole rows, in place, where `w` is a part of the columns.
    """
    if not w.numel():
        return Packed(*(torch.empty_like(t, device=w.device) for t in packed_shapes(w.shape[0], w.shape[1], block)))
    m = torch.cat([absmax_of(rows, block) for rows in _row_blocks(w)])
    low, high = m.aminmax(dim=1)
    if agree is not None:
        agree(low, high)
    step = (high - low) / 255
    a = ((m - low[:, None]) / step[:, None].clamp_min(1e-38)).round_().clamp_(0, 255).to(torch.uint8)
    span = torch.stack([low, step], 1).view(torch.int32)
    m = restored(a, span)
    codes, at_once = torch.empty(w.shape[0], -(-w.shape[1] // 2), dtype=torch.uint8, device=w.device), _rows_at_once(w.shape[1])
    for target, rows, scale in zip(codes.split(at_once), _row_blocks(w), m.split(at_once)):
        target.copy_(pack(codes_of(rows, scale, block)))
    return Packed(codes, a, span)


def absmax_of(w: Tensor, block: int) -> Tensor:
    """m[O, I/block], fp32, as measured."""
    return _in_blocks(w, block).abs().amax(2)


def restored(absmax: Tensor, span: Tensor) -> Tensor:
    """m[O, I/block], fp32, as it is read."""
    offset, step = span.view(torch.float32).unbind(1)
    return offset[:, None] + step[:, None] * absmax.float()


def codes_of(w: Tensor, m: Tensor, block: int) -> Tensor:
    """The nearest codes [O, I], 0 to 15, under the scales m."""
    code = torch.tensor(CODE, device=w.device)
    between = (code[1:] + code[:-1]) / 2
    relative = _in_blocks(w, block) / m.clamp_min(1e-38)[:, :, None]
    return torch.bucketize(relative, between, out_int32=True).flatten(1)[:, : w.shape[1]].to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Codes [O, I] -> bytes [O, I/2]; with an odd I, the last half byte is zero."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] << 4 | codes[:, 1::2]


@torch.library.custom_op("d9d_lora::dequantise_nf4", mutates_args=())
def _dequantise(weight: Tensor, absmax: Tensor, span: Tensor, columns: int, block: int, dtype: torch.dtype) -> Tensor:
    # An operator of its own: torch.compile need not look inside, and the table may be kept from call to call.
    pairs = _pairs(weight.device)
    result = torch.empty(weight.shape[0], columns, dtype=dtype, device=weight.device)
    rows = _rows_at_once(columns)
    for target, bytes_, a, ends in zip(*(t.split(rows) for t in (result, weight, absmax, span))):
        values = pairs.index_select(0, bytes_.flatten().int()).view(torch.float32).view(bytes_.shape[0], -1)[:, :columns]
        m = restored(a, ends)
        if columns % block:
            values = values.mul_(m.repeat_interleave(block, 1)[:, :columns])
        else:
            values.unflatten(1, (-1, block)).mul_(m[:, :, None])
        target.copy_(values)
    return result


@_dequantise.register_fake
def _(weight: Tensor, absmax: Tensor, span: Tensor, columns: int, block: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(weight.shape[0], columns, dtype=dtype, device=weight.device)


def dequantise(packed: Packed, columns: int, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [O, columns], computed in fp32 and rounded once to `dtype`."""
    return _dequantise(*packed, columns, block, dtype)


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256]: the bits of the two fp32 values of each byte, as one integer: half as many look-ups."""
    code = torch.tensor(CODE)
    byte = torch.arange(256)
    return torch.stack([code[byte >> 4], code[byte & 15]], 1).view(torch.int64).flatten().to(device)


def _in_blocks(w: Tensor, block: int) -> Tensor:
    """[O, I/block, block] in fp32, the last block filled up with zeros."""
    w = w.float()
    if short := -w.shape[1] % block:
        w = torch.nn.functional.pad(w, (0, short))
    return w.unflatten(1, (-1, block))


def _rows_at_once(columns: int) -> int:
    return max(1, _AT_ONCE // max(1, columns))


def _row_blocks(w: Tensor) -> tuple[Tensor, ...]:
    return w.split(_rows_at_once(w.shape[1]))
