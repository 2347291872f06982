"""Layers of whose weight only the shape is known: on meta, around an empty weight, one for each form that it may be stored in."""

from typing import Any

import torch
from torch import nn

from d9d_lora.layers import AdaptedConv1D, AdaptedEmbedding, AdaptedGroupedLinear, AdaptedLayer, AdaptedLinear, GroupedLinear
from d9d_lora.layers.conv import AdaptedConv
from d9d_lora.layers.parameter import AdaptedParameter, AdaptedStack
from d9d_lora.layers.parameter import Held as Parameter
from d9d_lora.state.merge_edit import Form

_CONVS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class _Stack(AdaptedStack):
    """A stack whose adapter was trained in a layer that has an input, so that its config may have a dropout."""

    sees_input = True


def layers_of(
    shape: tuple[int, ...], *, lookup: bool | None, parameter: bool, transposed: bool | None
) -> list[tuple[Form, type[AdaptedLayer], nn.Module]]:
    """The layers, on meta, whose weight may be stored with this shape."""
    with torch.device("meta"):
        if parameter:
            stacks: list[Form] = ["EOI", "EIO"] if transposed is None else ["EIO"] if transposed else ["EOI"]
            forms: list[Form] = ["OI"] if len(shape) == 2 else stacks if len(shape) == 3 else []
            kind = _Stack if len(shape) == 3 else AdaptedParameter
            return [(form, kind, _parameter(shape, turned=form == "EIO")) for form in forms]
        if lookup:
            return [("IO", AdaptedEmbedding, nn.Embedding(*shape))] if len(shape) == 2 else []
        if len(shape) == 2:
            straight = nn.Linear(shape[1], shape[0], bias=False)
            turned = nn.Module()
            turned.weight = nn.Parameter(torch.empty(shape))
            turned.bias = None  # type: ignore[assignment]
            return [("OI", AdaptedLinear, straight), ("IO", AdaptedConv1D, turned)]
        found: list[tuple[Form, type[AdaptedLayer], nn.Module]] = []
        if len(shape) in _CONVS and 0 not in shape:
            found.append(("OI", AdaptedConv, _CONVS[len(shape)](shape[1], shape[0], shape[2:], bias=False)))
        if len(shape) == 3:
            found.append(("EIO", AdaptedGroupedLinear, GroupedLinear(*shape)))
        return found


def _parameter(shape: tuple[int, ...], *, turned: bool) -> Parameter:
    host = nn.Module()
    host.register_parameter("weight", nn.Parameter(torch.empty(shape)))
    host.is_transposed = turned  # type: ignore[assignment]
    return Parameter(host, "weight", host)
