"""Starts that read neither weights nor data: A[R,I] and B[O,R] from (seed, name) alone, drawn whole, so the same on every layout.

    true         one factor zero, the other uniform in +-1/sqrt(fan in); where the input is an index, normal
    gaussian     the same with N(0, 1/R^2)
    false        neither is zero, so the model is another one at the start: PEFT's option for tests
    orthogonal   A = Q_odd^T N / 10 and B = N' Q_even / 10, of the odd and even rows of a random orthogonal Q[R,R]: both factors learn
                 from the first step, and B A = 0 since the rows of Q are orthogonal (to rounding: B A is not zero to the bit)

Which factor should be zero: Hayou et al. 2024, arXiv:2406.08447.
"""

import math

import torch
from torch import Tensor

from d9d_lora.methods.delta import Draw
from d9d_lora.placement import key_of

BLIND = ("gaussian", "orthogonal")


def draw_of(start: bool | str, zero: str | None, factor: str, r: int, *, lookup: bool) -> Draw | None:
    """How `lora_A`, `lora_B` or `lora_B_bias` begins; None for zero.

    Unless `zero` says otherwise B is zero, but A where the input is an index: rows of an A of size 1/sqrt(I) would hardly learn.
    """
    if start == "orthogonal":
        return lambda w, g: orthogonal_(w, g, factor)
    if start is False and lookup:
        return normal_
    if start is False:
        return lambda w, g: uniform_(w, g, w.shape[1] if factor == "lora_A" else r)
    if factor != ("lora_A" if (zero or ("A" if lookup else "B")) == "B" else "lora_B"):
        return None
    if lookup:
        return normal_
    if start == "gaussian":
        return lambda w, g: w.normal_(0, 1 / r, generator=g)
    return lambda w, g: uniform_(w, g, w.shape[1])


def uniform_(w: Tensor, g: torch.Generator, fan_in: int) -> None:
    """Kaiming's start with a = sqrt(5)."""
    w.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=g)


def normal_(w: Tensor, g: torch.Generator) -> None:
    w.normal_(generator=g)


def orthogonal_(w: Tensor, g: torch.Generator, factor: str) -> None:
    """Both factors of a layer draw from one stream, so that they share Q; what follows Q is a stream of each."""
    r = w.shape[0] if factor == "lora_A" else w.shape[1]
    Q = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64)).Q
    own = torch.Generator().manual_seed(key_of(g.initial_seed(), factor))
    if factor == "lora_A":
        w.copy_(Q[0::2].T @ torch.randn(r // 2, w.shape[1], generator=own, dtype=torch.float64) / 10)
    else:
        w.copy_(torch.randn(w.shape[0], r // 2, generator=own, dtype=torch.float64) @ Q[1::2] / 10)
