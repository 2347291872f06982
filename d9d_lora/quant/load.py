"""Quantised layers in a model, and their weights: `quantise_` puts the layers in, `sinks` fills them one at a time.

While a checkpoint streams, a rank holds its packed shard of the model and, for one layer at a time, its part of the weight in floats.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from d9d_lora.layers import AdaptedLinear
from d9d_lora.layers.base import move_hooks
from d9d_lora.layers.nf4 import AdaptedNF4Linear
from d9d_lora.placement import local_of
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.quant.nf4 import BLOCK, Packed
from d9d_lora.targets import ALL_LINEAR, NoMatch, hint, named, not_named
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
    wanted_names = frozenset(modules) if isinstance(modules, list) else modules
    found: list[tuple[list[str], nn.Linear]] = []
    for names, m in all_names:
        linear = isinstance(m, nn.Linear) and AdaptedLinear.refuses(m) is None
        if modules == ALL_LINEAR:
            wanted = linear and m is not head
        else:
            wanted = any(named(name, wanted_names) for name in names)
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
    idle = not_named(modules, [n for names, _ in found for n in names]) if isinstance(modules, list) else []
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


def quantised(model: nn.Module) -> list[tuple[str, NF4Linear, list[AdaptedNF4Linear]]]:
    """(name, layer, its adapters) of every packed weight of a model, adapted or not; replicated layers share one, under the first name."""
    found: dict[int, tuple[str, NF4Linear, list[AdaptedNF4Linear]]] = {}
    for name, m in model.named_modules():
        if isinstance(m, NF4Linear):
            found.setdefault(id(m.weight), (name, m, []))
    for m in model.modules():
        if isinstance(m, AdaptedNF4Linear) and isinstance(m.base, NF4Linear):
            found[id(m.base.weight)][2].append(m)
    return list(found.values())


def sinks(model: nn.Module) -> Sinks:
    """What `load_checkpoint` fills in place of the packed tensors: name of a weight -> (its outline, what takes this rank's part)."""
    return {f"{name}.weight": (layer.outline(), partial(_take, layer, adapters)) for name, layer, adapters in quantised(model)}


def packed_tensors(model: nn.Module) -> set[str]:
    """The names of tensors that no checkpoint holds as they are: `load_checkpoint` skips them, and fills the `sinks`."""
    return {f"{name}.{leaf}" for name, m in model.named_modules() if isinstance(m, NF4Linear) for leaf in Packed._fields}


def _take(layer: NF4Linear, adapters: list[AdaptedNF4Linear], values: Tensor) -> None:
    W = layer.placed(values.to(local_of(layer.weight).device))
    asking = [adapter for adapter in adapters if adapter.delta.loftq_iter]
    if not asking:
        layer.pack(W)
    for adapter in asking:
        adapter.start_from_unquantised(W, alone=len(adapters) == 1)


__all__ = ["Sinks", "packed_tensors", "quantise_", "quantised", "sinks"]
