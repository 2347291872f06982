"""A deeper model out of the layers it has: `layer_replication`. Copies share base weights, and each has adapters of its own.

    [[0, 4], [2, 5]]    layers 0 1 2 3 4  become  0 1 2 3 2 3 4, named 0 ... 6

A checkpoint of the base loads into it: what it holds of layer 4 goes to layer 6, and copies have it by sharing. A merge would change all
copies at once and is refused. Under FSDP2, layers that share weights are sharded as one group; tensor parallelism is refused.
"""

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

from torch import nn

from d9d_lora.method import InjectionError
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperRename
from d9d_lora.walk import tensor_parallel_mesh

Ranges = Sequence[tuple[int, int]]


class Restacked:
    """What was done to the list of layers `name`; `restore` undoes it. The new list refers to it."""

    def __init__(self, model: nn.Module, name: str, ranges: Ranges) -> None:
        self.name, self.ranges = name, [list(r) for r in ranges]
        old = model.get_submodule(name)
        assert isinstance(old, nn.ModuleList)
        self.order = [i for start, end in ranges for i in range(start, end)]
        self.first = {layer: self.order.index(layer) for layer in self.order}
        self._old, self._fields = old, _config_fields(model, self.order)
        layers = nn.ModuleList(old[i] if self.first[i] == new else _sharing(old[i]) for new, i in enumerate(self.order))
        layers.restacked = self  # type: ignore[assignment]
        _number(layers)
        model.set_submodule(name, layers)
        for config, field, _, value in self._fields:
            setattr(config, field, value)

    def restore(self, model: nn.Module) -> None:
        _number(self._old)
        model.set_submodule(self.name, self._old)
        for config, field, value, _ in self._fields:
            setattr(config, field, value)

    def mappers(self, keys: Iterable[str], injected: Sequence[ModelStateMapper]) -> list[ModelStateMapper]:
        """From the base's names to the names now; `keys` are the names after the stacking and before the injection."""
        renames = {was: now for m in injected for g in m.state_dependency_groups() for was, now in zip(g.inputs, g.outputs, strict=True)}
        found: list[ModelStateMapper] = []
        for key in keys:
            match = re.match(rf"{re.escape(self.name)}\.(\d+)\.", key)
            origin = key
            if match:
                layer = self.order[int(match[1])]
                if self.first[layer] != int(match[1]):
                    continue  # a copy
                origin = f"{self.name}.{layer}.{key[match.end() :]}"
            if origin != renames.get(key, key):
                found.append(ModelStateMapperRename(origin, renames.get(key, key)))
        return found


def restack(model: nn.Module, ranges: Ranges) -> Restacked:
    """Stacks the layers of a model anew, in place.

    Raises:
        InjectionError: ranges that the model does not have or that leave layers out, and tensor-parallel models.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise InjectionError("layer_replication: the model has no list of layers (torch.nn.ModuleList) to stack anew")
    if tensor_parallel_mesh(model) is not None:
        raise InjectionError("layer_replication: tensor-parallel layers cannot be copied with their hooks; use FSDP2 (parallel.tp=1)")
    name, layers = max(lists, key=lambda item: len(item[1]))
    if wrong := [list(r) for r in ranges if not 0 <= r[0] < r[1] <= len(layers)]:
        raise InjectionError(f"layer_replication: {wrong} are no ranges [start, end) of the {len(layers)} layers of {name!r}")
    if out := sorted(set(range(len(layers))) - {i for start, end in ranges for i in range(start, end)}):
        raise InjectionError(f"layer_replication leaves layers {out} of {name!r} out, and a checkpoint of the base holds them; name all")
    return Restacked(model, name, ranges)


def restacked(model: nn.Module) -> Restacked | None:
    return next((m.__dict__["restacked"] for m in model.modules() if "restacked" in m.__dict__), None)


def groups_that_share(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Blocks that share parameters, together; in the order of their first."""
    groups: dict[int, list[nn.Module]] = {}
    for block in blocks:
        groups.setdefault(id(next(block.parameters(), block)), []).append(block)
    return list(groups.values())


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy of a layer with the same parameters and buffers."""
    return deepcopy(layer, {id(t): t for t in [*layer.parameters(), *layer.buffers()]})


def _number(layers: nn.ModuleList) -> None:
    """Hugging Face's layers know their number: the key of their cache."""
    for i, layer in enumerate(layers):
        for m in layer.modules():
            if hasattr(m, "layer_idx"):
                m.layer_idx = i  # type: ignore[assignment]


def _config_fields(model: nn.Module, order: list[int]) -> list[tuple[Any, str, Any, Any]]:
    """(config, field, value before, value now) of what a config says layer by layer."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    fields: list[tuple[Any, str, Any, Any]] = []
    if hasattr(text, "num_hidden_layers"):
        fields.append((text, "num_hidden_layers", text.num_hidden_layers, len(order)))
    if getattr(text, "layer_types", None):
        fields.append((text, "layer_types", text.layer_types, [text.layer_types[i] for i in order]))
    return fields
