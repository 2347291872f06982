"""An output head whose weight is that of an embedding, and so is its update: with E + dE for both, y = x E^T + drop(x) dE^T.

The factors belong to the adapter of the embedding, dE = s (B A)^T with A[R, V] and B[D, R]; the head, W[V, D], reads them turned
round, dW = s A^T B^T. A merge folds them once, by the embedding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from d9d_lora.layers.base import AdaptedLayer, Fold
from d9d_lora.layers.linear import AdaptedLinear
from d9d_lora.methods.delta import Around, Delta, DoesNotFit, Draw, Parts


@dataclass(frozen=True)
class Turned(Around):
    """The transpose of a delta whose factors are another layer's."""

    axes = {}

    @property
    def makes(self) -> str:  # type: ignore[override]
        return self.low.makes.translate(str.maketrans("AB", "BA"))

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        return None

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        B, A = self.low.factors(f)
        return A.T, B.T

    def dense(self, f: Parts) -> Tensor:
        return self.low.dense(f).T

    def apply(self, x: Tensor, f: Parts) -> Tensor:
        try:
            return super().apply(x, f)
        except NotImplementedError:
            return linear(x, self.dense(f).to(x.dtype))

    def __str__(self) -> str:
        return f"{self.low}, the embedding's"


class TiedHead(AdaptedLinear):
    """A linear layer that shares its weight, and its adapter, with an embedding.

    Attributes:
        embedding: The adapted embedding; set by `tie`.
    """

    takes_several = False
    embedding: AdaptedLayer

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return False  # only as one of a pair

    def tie(self, embedding: AdaptedLayer) -> None:
        object.__setattr__(self, "embedding", embedding)  # not as a child: its factors would have two names
        self.delta = Turned(embedding.delta)
        self.tied_to, embedding.tied_to = embedding.name, self.name  # type: ignore[assignment]

    def parts(self, dtype: torch.dtype | None, *, parts: bool) -> Parts:
        self.embedding.saw_part_of_tokens |= self.saw_part_of_tokens
        f = self.embedding.parts(dtype, parts=parts)
        return Parts(f, f.rows, f.cols, self.dropout if self.training else None)

    def fold_(self, change: Fold) -> None:
        """Nothing: the embedding has folded it."""

    def _merged_into(self) -> list[Tensor]:
        return []


def turned(delta: Delta) -> Turned:
    """The head's delta. Raises `DoesNotFit`."""
    if delta.has_gain or delta.moves_base or delta.has_shift or delta.shared:
        raise DoesNotFit(f"ensure_weight_tying: {delta} is more than an update of the weight, which two layers cannot share; leave one out")
    return Turned(delta)


def tie(layers: Sequence[AdaptedLayer]) -> None:
    """Gives each head its embedding, the layer with the same weight."""
    for head in layers:
        if isinstance(head, TiedHead):
            head.tie(next(la for la in layers if la is not head and la.base.weight is head.base.weight))


def tied_pairs(modules: Iterable[tuple[list[str], nn.Module]]) -> list[tuple[tuple[list[str], nn.Module], tuple[list[str], nn.Module]]]:
    """The embeddings and linear layers that share a weight, each with its names."""
    modules = list(modules)
    embeddings = {id(m.weight): (names, m) for names, m in modules if isinstance(m, nn.Embedding)}
    heads = [(names, m) for names, m in modules if isinstance(m, nn.Linear) and id(m.weight) in embeddings]
    return [(embeddings[id(m.weight)], (names, m)) for names, m in heads]
