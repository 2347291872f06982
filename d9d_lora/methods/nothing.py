"""dW = 0: the delta of a layer that only adapters with names of their own adapt. It has no factors."""

from dataclasses import dataclass

from torch import Tensor

from d9d_lora.methods.delta import Delta, Draw, Parts


@dataclass(frozen=True)
class Nothing(Delta):
    """No update."""

    scaling: float = 0.0
    dropout: float = 0.0
    kind = "nothing"
    axes = {}

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        return None

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("this layer has no adapter of its own")

    def __str__(self) -> str:
        return self.kind
