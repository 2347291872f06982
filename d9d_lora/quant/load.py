"""Quantised layers in a model, and their weights: `quantise_` puts the layers in, `sinks` fills them one at a time.

While a checkpoint streams, a rank holds its packed shard of the model and, for one layer at a time, its part of the weight in floats.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from d9d_lora.layers import AdaptedLayer, AdaptedLinear
from d9d_lora.layers.base import move_hooks
from d9d_lora.placement import local_of
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.quant.nf4 import BLOCK
from d9d_lora.targets import ALL_LINEAR, NoMatch, hint, named
from d9d_lora.walk import names_of_modules, output_head, refuse_adapted, refuse_sharded

Sinks = dict[str, tuple[Tensor, Callable[[Tensor], None]]]


@torch.no_grad()
def quantise_(model: nn.Module, modules: list[str] | str = ALL_LINEAR, *, block: int = BLOCK) -> list[str]:
    """Replaces linear layers by quantised ones, in place; their weights, if they are there, are quantised now.

    Works on plain, meta and tensor-parallel models, before the injection and before `fully_shard`.

    Args:
        modules: Names (whole, or their ends after a dot), one regular expression for the whole name, or "all-linear": every `nn.Linear` but
            the output head.

    Returns:
        The names of the layers.

    Raises:
        ValueError: if a name matches nothing, a named layer cannot be quantised, shares its weight, or has its columns split within a
            block. The model is then as it was.
    """
    refuse_adapted(model)
    refuse_sharded(model)
    all_names, head = names_of_modules(model), output_head(model)
    found: list[tuple[list[str], nn.Linear]] = []
    for names, m in all_names:
        linear = isinstance(m, nn.Linear) and AdaptedLinear.refuses(m) is None
        if modules == ALL_LINEAR:
            wanted = linear and m is not head
        else:
            wanted = any(named(name, modules) for name in names)
            if wanted and not linear and isinstance(modules, str):
                continue  # a pattern may match containers too
            if wanted and not linear:
                raise ValueError(
                    f"{names[0]} is a {type(m).__name__}; expected an nn.Linear: only those are quantised. Name the layers inside it"
                )
        if wanted:
            assert isinstance(m, nn.Linear)
            found.append((names, m))
    candidates = [n for ns, m in all_names for n in ns if isinstance(m, nn.Linear)]
    idle = [w for w in modules if not any(named(n, [w]) for ns, _ in found for n in ns)] if isinstance(modules, list) else []
    if idle or not found:
        raise NoMatch(f"{idle or modules!r} matches no linear layer that can be quantised{hint(idle or modules, candidates)}")
    _refuse_shared(model, found)
    new = [NF4Linear.of(m, block) for _, m in found]
    for (names, old), layer in zip(found, new):
        move_hooks(old, layer)
        for name in names:
            model.set_submodule(name, layer)
    return [names[0] for names, _ in found]


def _refuse_shared(model: nn.Module, found: list[tuple[list[str], nn.Linear]]) -> None:
    owners = {id(m.weight): names for names, m in found}
    for name, p in model.named_parameters(remove_duplicate=False):
        names = owners.get(id(p))
        if names and name not in [f"{n}.weight" for n in names]:
            raise ValueError(
                f"{names[0]} shares its weight with {name}, and a quantised weight cannot be shared. Leave it out, or untie the weights"
            )


def quantised(model: nn.Module) -> list[tuple[str, NF4Linear, AdaptedLayer | None]]:
    """(name, layer, its adapter) of every quantised layer of a model, adapted or not."""
    owners = {id(m.base): m for m in model.modules() if isinstance(m, AdaptedLayer)}
    return [(name, m, owners.get(id(m))) for name, m in model.named_modules() if isinstance(m, NF4Linear)]


def sinks(model: nn.Module) -> Sinks:
    """What `load_checkpoint` fills in place of the packed tensors: name of a weight -> (its outline, what takes this rank's part)."""
    return {f"{name}.weight": (layer.outline(), partial(_take, layer, adapter)) for name, layer, adapter in quantised(model)}


def packed_tensors(model: nn.Module) -> set[str]:
    """The names of tensors that no checkpoint holds: they are made from the weights."""
    return {f"{name}.{leaf}" for name, _, _ in quantised(model) for leaf in ("absmax", "span")}


def _take(layer: NF4Linear, adapter: AdaptedLayer | None, values: Tensor) -> None:
    values = values.to(local_of(layer.weight).device)
    start = getattr(adapter, "start_from_unquantised", None)
    if start is None or not start(layer.placed(values)):
        layer.pack(layer.placed(values))


__all__ = ["Sinks", "packed_tensors", "quantise_", "quantised", "sinks"]
