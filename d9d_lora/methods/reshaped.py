"""loralib's update of a convolution: W[O, C/g, k, k] of g groups gets dW = s reshape(B A), with B[O k / g, R k] and A[R k, C k].

The product has as many numbers as the kernel, and is read in memory's order as one. With one group row o of dW is B_0 A | ... |
B_(k-1) A, where B_q holds the rows o k + q of B: of rank R k^2 as a matrix [O, C k^2], where `layers/conv.py` gives a plain product
of rank R. `methods/lora.py` is what an injection gives; this is for layers made by `loralib.Conv2d`, and for its files.

Code of Hu et al. 2021, arXiv:2106.09685 (`loralib`, ConvLoRA).
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Self

import torch
from torch import Tensor

from d9d_lora.methods.delta import Around, DoesNotFit, Geometry, Parts
from d9d_lora.methods.lora import LoRADelta


@dataclass(frozen=True)
class ReshapedDelta(Around):
    """dW = scaling * reshape(B A), for a convolution; `low` says rank, alpha, dropout and start."""

    low: LoRADelta
    kernel: int = 1
    groups: int = 1
    axes = {"lora_A": "ST", "lora_B": "QS"}  # none of them is an axis of W: torch shards no convolution along its channels

    def fit(self, geometry: Geometry) -> Self:
        if (kernel := square(geometry)) is None:
            raise DoesNotFit(f"loralib's update is for square kernels in two dimensions, and this one is {list(geometry.taps)}")
        return replace(self, low=self.low.fit(geometry), kernel=kernel, groups=geometry.groups)

    def sizes(self, out: int, into: int) -> dict[str, int]:
        k, g = self.kernel, self.groups
        return {"O": out, "I": into, "S": self.low.r * k, "T": into * g // k, "Q": out // g * k}

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def dense(self, f: Parts) -> Tensor:
        B, A = f["lora_B"], f["lora_A"]
        into = A.shape[1] * self.kernel // self.groups
        return (self.scaling * (B @ A)).reshape(-1, into)[f.rows, f.cols]

    def __str__(self) -> str:
        return f"{self.low} reshaped"


def square(geometry: Geometry) -> int | None:
    """k of a convolution whose kernel loralib's product fits: k x k, or 1 in any number of dimensions. Else None."""
    taps = geometry.taps
    return taps[0] if taps and set(taps) == {taps[0]} and prod(taps) == taps[0] ** 2 else None


def to_plain(B: Tensor, A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B[O, R'], A[R', I]) of the same dW as a plain product, for one group: R' = R where B was made by `from_plain`, else R k^2."""
    diagonal = B[::k, ::k]
    if torch.equal(B, torch.kron(diagonal, torch.eye(k, dtype=B.dtype, device=B.device))):
        return diagonal.contiguous(), A.reshape(A.shape[0] // k, -1)
    return B.reshape(B.shape[0] // k, -1), torch.block_diag(*[A] * k)


def from_plain(B: Tensor, A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """loralib's (B[O k, R k], A[R k, C k]) of a plain product B[O, R] A[R, I], for one group: R as it was."""
    return torch.kron(B, torch.eye(k, dtype=B.dtype, device=B.device)), A.reshape(A.shape[0] * k, -1)
