"""A third party's method, in a package of its own: dW = s B diag(d) A. It imports d9d_lora, and d9d_lora knows nothing of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from d9d_lora.adapters import AdapterConfig, AdapterMethod
from d9d_lora.methods.delta import Delta


class DiagonalConfig(AdapterConfig):
    kind: Literal["diagonal"] = "diagonal"
    r: int = 4
    scale: float = 2.0


@dataclass(frozen=True)
class DiagonalDelta(Delta):
    r: int
    scaling: float
    dropout: float = 0.0
    kind = "diagonal"
    axes = {"diag_A": "RI", "diag_d": "R", "diag_B": "OR"}

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {"O": out, "I": into, "R": self.r}

    def start(self, factor: str, *, lookup: bool):
        return None if factor == "diag_d" else lambda w, g: w.normal_(0, 0.2, generator=g)

    def factors(self, f: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return f["diag_B"] * f["diag_d"], f["diag_A"]


class Diagonal(AdapterMethod[DiagonalConfig]):
    kind = "diagonal"
    config_class = DiagonalConfig

    def delta_for(self, name: str) -> DiagonalDelta:
        return DiagonalDelta(self.config.r, self.config.scale)
