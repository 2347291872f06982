"""The layer kinds, asked in order. A new kind is one file and one row here."""

from torch import nn

from d9d_lora.layers.base import AdaptedLayer, Factor
from d9d_lora.layers.conv import AdaptedConv
from d9d_lora.layers.embedding import AdaptedEmbedding
from d9d_lora.layers.grouped import AdaptedGroupedLinear, GroupedLinear
from d9d_lora.layers.linear import AdaptedConv1D, AdaptedLinear
from d9d_lora.layers.nf4 import AdaptedNF4Linear

LAYERS: list[type[AdaptedLayer]] = [AdaptedConv1D, AdaptedLinear, AdaptedNF4Linear, AdaptedEmbedding, AdaptedConv, AdaptedGroupedLinear]


def kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """The layer kind that adapts a module, or None."""
    return next((kind for kind in LAYERS if kind.fits(module)), None)


__all__ = [
    "LAYERS",
    "AdaptedConv",
    "AdaptedConv1D",
    "AdaptedEmbedding",
    "AdaptedGroupedLinear",
    "AdaptedLayer",
    "AdaptedLinear",
    "AdaptedNF4Linear",
    "Factor",
    "GroupedLinear",
    "kind_of",
]
