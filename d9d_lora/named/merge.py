"""The active adapters folded into the base weights together, W + sum of dW_k with one rounding, and taken out of them again."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from d9d_lora.adapters import Merged, rest
from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.base import Fold
from d9d_lora.named.hosts import active_adapters, shared_at_root, switchable
from d9d_lora.placement import at_least_fp32, full_of
from d9d_lora.quant.linear import dequantising
from d9d_lora.walk import clock_of, refuse_tied, reshard

_MERGED: WeakKeyDictionary[nn.Module, tuple[list[Merged], dict[str, nn.Module]]] = WeakKeyDictionary()


@torch.no_grad()
def merge_adapters(model: nn.Module, *, undoable: bool = True, dequantise: bool = False) -> None:
    """Folds the active adapters into the base weights, in their order, in fp32 with one rounding, and takes all adapters out.

    Args:
        undoable: Keep the base weights as they were, so that `unmerge_adapters` is exact to the bit; costs one copy of them.
        dequantise: Put plain layers in the place of quantised ones, which cannot hold the sum; without it those are refused.
    """
    every = switchable(model)
    if not active_adapters(model):
        raise ValueError("nothing to merge: no adapter is active")
    refuse_tied(model, every)
    with dequantising(model, dequantise):
        for _, host in every:
            host.refuse_unstarted()
            host.check_merge()
    reshard(model)
    changes = [_changes(host) for _, host in every]
    merged = []
    for (names, host), change in zip(every, changes):
        kept = host.keep() if undoable else None
        base = host.merge_with_base_(change=_chain(change)) if change else host.give_back()
        for name in names:
            model.set_submodule(name, base)
        merged.append(Merged(names, host, kept))
    shared = shared_at_root(model, every)
    for root in shared:
        delattr(model, root)
    _MERGED[model] = merged, shared
    rest(model, every[0][1])


@torch.no_grad()
def unmerge_adapters(model: nn.Module) -> None:
    """Undoes the last `merge_adapters`: the base weights are as they were to the bit, and all adapters are back."""
    if model not in _MERGED:
        raise ValueError("nothing to unmerge: `merge_adapters` has merged nothing into this model")
    merged, shared = _MERGED[model]
    for m in merged:
        if m.original is None:
            raise ValueError("the merge was made with undoable=False, which keeps no copy of the weights; load the base again")
        if model.get_submodule(m.names[0]) is not m.layer.base:
            raise ValueError(f"{m.names[0]} has been changed since the merge; remove what was injected there before unmerging")
    del _MERGED[model]
    reshard(model)
    for m in merged:
        m.layer.put_back(m.original)
        m.layer.take_over()
        for name in m.names:
            model.set_submodule(name, m.layer)
    for root, factor in shared.items():
        model.add_module(root, factor)
    clock = clock_of(model)
    if clock is not None and any(a.delta.noisy for m in merged for a in m.layer.adapters_by_name().values()):
        clock.attach(model)


def _changes(host: AdaptedLayer) -> list[Fold]:
    """What the forward adds, as changes of the base weight. Collective."""
    changes = []
    for adapter, start, _ in host.at_work():
        if start:
            changes.append(_origin_fold(adapter))
            continue
        whole = adapter.whole_factors()
        for factor, value in whole.items():
            if not value.isfinite().all():
                raise ValueError(f"{host.name}.{factor} has values that are not finite; merging it would spoil the base weight")
        changes.append(adapter.merging(whole))
    return changes


def _chain(changes: Sequence[Fold]) -> Fold:
    def change(W: Tensor, rows: slice, cols: slice) -> Tensor:
        for one in changes:
            W = one(W, rows, cols)
        return W

    return change


def _origin_fold(layer: AdaptedLayer) -> Fold:
    """W -> W + dW0: the start that was taken off the base weight is put back."""
    return layer.update_of({name: at_least_fp32(full_of(t)) for name, t in layer.origin.items()})
