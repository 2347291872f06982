"""Where a model has a mixture of experts: the stacks of its experts' weights, and the routers that choose among them.

A stack is a `GroupedLinear`, or a parameter [E, out, in] of a module that says it has E experts (transformers). A router is a linear
layer named so, `gate` or `router`, with one output for each expert of a stack that is near it. "all-linear" never takes it: what changes
the choice of experts should be asked for by name.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.grouped import AdaptedGroupedLinear
from d9d_lora.walk import names_of_modules

NEAR = 2  # names of a router and of a stack that follow the name of the block that holds both: `router.gate`, `experts.up_proj`


@dataclass(frozen=True)
class Stack:
    """The weights of all experts for one product.

    Attributes:
        name: Of the layer, or of the parameter.
        adapted: Whether it has an adapter.
    """

    name: str
    experts: int
    elements: int
    adapted: bool


def stacks(module: nn.Module) -> list[Stack]:
    """Every stack of experts' weights in a model, in the order of its modules."""
    found = []
    for (name, *_), m in names_of_modules(module):
        layer = m if isinstance(m, AdaptedLayer) else None
        base = m if layer is None else layer.base
        if AdaptedGroupedLinear.fits(base):
            weight: Any = base.weight
            found.append(Stack(name, weight.shape[0], weight.numel(), layer is not None))
            continue
        experts = getattr(base, "num_experts", None)
        for parameter, p in base._parameters.items() if layer is None and isinstance(experts, int) else ():
            if p is not None and p.ndim == 3 and p.shape[0] == experts:
                adapted = f"{parameter}_adapter" in m._modules
                found.append(Stack(f"{name}.{parameter}".removeprefix("."), p.shape[0], p.numel(), adapted))
    return found


def routers(module: nn.Module) -> set[str]:
    """The names of linear layers that are routers."""
    near: dict[str, set[int]] = {}  # name of a block -> the numbers of experts of its stacks
    for stack in stacks(module):
        for block in _near(stack.name):
            near.setdefault(block, set()).add(stack.experts)
    linear = [(n, m) for names, m in names_of_modules(module) if isinstance(m, nn.Linear) for n in names]
    return {name for name, m in linear if any(_is_router(name, block) and m.out_features in near.get(block, ()) for block in _near(name))}


def top_k_of(module: nn.Module, name: str) -> int | None:
    """How many experts a token meets, as a module near the stack tells, or its config; None if none does."""
    for block in _near(name):
        around = module.get_submodule(block)
        for m in (around, *around.modules()):
            config = getattr(m, "config", None)
            told = (getattr(m, "top_k", None), getattr(m, "_top_k", None), getattr(config, "num_experts_per_tok", None))
            if (found := next((k for k in told if isinstance(k, int)), None)) is not None:
                return found
    return None


def _near(name: str) -> list[str]:
    """The names of the modules that hold this one, from the nearest."""
    parts = name.split(".")
    return [".".join(parts[:-i]) for i in range(1, NEAR + 1) if i <= len(parts)]


def _is_router(name: str, block: str) -> bool:
    return not {"gate", "router"}.isdisjoint(name[len(block) :].split("."))
