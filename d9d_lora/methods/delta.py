"""WHAT is learned: an update dW[O,I] of a matrix, as a value. It has no tensors and knows no layer.

The layer it is applied to holds the factors, hands in the local part of each, and applies what comes back. So a method is one
file, a layer kind is one file, and every pair of them works.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Draw = Callable[[Tensor, torch.Generator], Any]


class Delta(ABC):
    """An update dW = scaling * f(factors). Subclasses are frozen dataclasses."""

    kind: str
    scaling: float
    dropout: float

    @property
    @abstractmethod
    def axes(self) -> dict[str, str]:
        """The factors by name, with the letters of their dimensions: `{"lora_A": "RI", "lora_B": "OR"}`."""

    @abstractmethod
    def sizes(self, out: int, into: int) -> dict[str, int]:
        """The size of every letter for a weight [out, into]."""

    @abstractmethod
    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        """How a factor begins: fills the whole tensor from a generator, or None for zero. `lookup`: the input is an index."""

    @abstractmethod
    def factors(self, f: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B[O,R], A[R,I]) with dW = scaling * B A, for any consistent parts of the factors `f`."""

    def update(self, f: Mapping[str, Tensor], rows: slice, cols: slice) -> Tensor:
        """The box [rows, cols] of dW from whole factors, in their dtype."""
        B, A = self.factors(f)
        return self.scaling * (B[rows] @ A[:, cols])

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """The global shape of every factor for a weight [out, into]."""
        size = self.sizes(out, into)
        return {name: tuple(size[letter] for letter in letters) for name, letters in self.axes.items()}
