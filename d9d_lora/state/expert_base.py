"""Experts of a base directory, without its weights: what the model of its config has, and which files make up a stack.

    outline_of(config)      transformers' model on meta: parameters in their order, stacks stored transposed or not
    experts_of(config, names)   the stacks that the model makes of tensors that hold one expert each
    WithStacks              the files' tensors, and these stacks beside them, by the names of the model
    one_by_one              an edit of a stack as edits of the tensors it is made of

[Note: factors in hand]
Experts of a layer lie beside each other in a file, so the factors of the last few stacks are kept whole, `KEPT` of them: the bound on
memory of a merge is theirs, then.
"""

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.state.expert_files import expert_mapper
from d9d_lora.state.mappers import Route, StackRoute, route_of, sorted_groups
from d9d_lora.state.merge_edit import Add, Edit, Factors, Source
from d9d_lora.state.peft_config import AdapterError

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
KEPT = 4  # [Note: factors in hand]


def outline_of(config: Mapping[str, Any]) -> nn.Module:
    """transformers' causal language model of a config.json, on meta.

    Raises:
        AdapterError: transformers is not installed, or has no such model.
    """
    kind = config.get("model_type")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config", "auto_map")}
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(kind), **fields))
        return model
    except (ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"which parameter of the model a factor of its experts belongs to is told by transformers' model of model_type {kind!r}, which "
            f"cannot be made here ({error}); install transformers, or load the adapter into the model and merge there (merge_peft)"
        ) from error


@dataclass(frozen=True)
class Experts:
    """What the model of a base makes of its files.

    Attributes:
        model: On meta.
        stacks: By the model's name of the stack.
        renamed: The model's name of a tensor -> that in the files, where they differ.
    """

    model: nn.Module
    stacks: Mapping[str, StackRoute]
    renamed: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        return sorted([*self.stacks, *self.renamed])


def experts_of(config: Mapping[str, Any], names: Collection[str]) -> Experts | None:
    """The stacks of a base whose files hold one expert each; None of a base without such files, or of a model that is not known."""
    if not any(_ONE_EXPERT.search(name) for name in names):
        return None
    try:
        model = outline_of(config)
    except AdapterError:
        return None  # an adapter of other layers needs none of it; one of experts will ask for the model, and be told
    mapper = expert_mapper(model, names)
    if mapper is None:
        return None
    stacks: dict[str, StackRoute] = {}
    renamed: dict[str, str] = {}
    for group in sorted_groups(mapper):
        for output in group.outputs:
            route = route_of(mapper, output)
            if isinstance(route, StackRoute):
                stacks[output] = route
            elif isinstance(route, Route):
                renamed[output] = route.name
    return Experts(model, stacks, renamed)


@dataclass(frozen=True)
class WithStacks:
    """A source of tensors, and the stacks that a model makes of them."""

    source: Source
    experts: Experts

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._route(name).outline(self.source).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._route(name).outline(self.source).dtype

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        if name in self.experts.stacks:
            return self.experts.stacks[name].read(self.source, box or tuple(slice(0, n) for n in self.shape(name)))
        return self.source.read(self.experts.renamed.get(name, name), box)

    def _route(self, name: str) -> Route | StackRoute:
        return self.experts.stacks.get(name) or Route(self.experts.renamed.get(name, name))


def one_by_one(edits: Mapping[str, Edit], experts: Experts, source: Source) -> dict[str, Edit]:
    """Edits by the names of the files.

    Raises:
        AdapterError: a stack that was trained whole.
    """
    found: dict[str, Edit] = {}
    shelf = _Shelf()
    for name, edit in edits.items():
        if name not in experts.stacks:
            found[experts.renamed.get(name, name)] = edit
            continue
        if not isinstance(edit, Add) or not isinstance(edit.delta, GroupedDelta) or edit.onto is not None:
            raise AdapterError(
                f"{name} was trained whole, and the base's files hold each expert by itself; save the base once in stacks "
                "(transformers' save_original_format=False), and merge into that"
            )
        for e, parts in enumerate(experts.stacks[name].names):
            at = 0
            for part in parts:
                factors = partial(shelf.one, name, edit.factors, edit.delta, e)
                found[part] = Add(replace(edit.delta, n=1), factors, "OI", at=at)
                at += source.shape(part)[0]
    return found


class _Shelf:
    """[Note: factors in hand]"""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def one(self, name: str, factors: Factors, delta: GroupedDelta, e: int) -> dict[str, Tensor]:
        """The factors of expert e, a stack of one."""
        if name not in self._kept:
            self._kept[name] = factors()
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        axes = delta.axes
        return {n: t.narrow(axes[n].index("E"), e, 1) if "E" in axes.get(n, "") else t for n, t in self._kept[name].items()}


__all__ = ["Experts", "WithStacks", "experts_of", "one_by_one", "outline_of"]

