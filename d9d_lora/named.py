"""Several adapters on one model, by name: y = x W^T + sum over the active ones of drop_k(x) dW_k^T.

    inject_peft_and_freeze(method, model)                     # this one is called "default"
    mapper = add_adapter(model, "b", config, train=True)      # other targets, ranks and methods; before fully_shard
    set_adapter(model, "b")                                   # "b" works alone, and is the one that is trained
    set_adapter(model, ["default", "b"])                      # their sum
    with disable_adapters(model): ...                         # the bare base
    with adapter_rows(model, ["default", "b", "__base__"]):   # an adapter for each row of the batch
        model(ids)

How a layer holds them is told in `layers/among.py`. An adapter starts as it would alone on the model: from its config's seed and
the layers' names. Adapters that are not active are frozen, so no optimiser, reduction or checkpoint of trained parameters meets them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from d9d_lora.adapters import AdapterMethod, Merged, rest
from d9d_lora.layers import AdaptedLayer, kind_of
from d9d_lora.layers.among import BASE, DEFAULT, Rows
from d9d_lora.layers.base import Fold
from d9d_lora.method import InjectionError, PeftMethod
from d9d_lora.methods.nothing import Nothing
from d9d_lora.placement import at_least_fp32, full_of
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.registry import peft_method_from_config
from d9d_lora.replicate import restacked
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperParallel, ModelStateMapperRename
from d9d_lora.state.names import renames
from d9d_lora.walk import clock_of, names_of_modules, refuse_sharded, refuse_tied, reshard

Host = tuple[list[str], AdaptedLayer]  # an adapted layer, with all its names in the model
_MERGED: WeakKeyDictionary[nn.Module, tuple[list[Merged], dict[str, nn.Module]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class AdapterStatus:
    """What is known of one adapter.

    Attributes:
        kinds: Of its method.
        active: Whether its updates are added.
        trained: Whether any factor is trained now.
        layers: The names of the layers it adapts.
        parameters: The numbers in its factors, on all ranks together, shared factors once.
    """

    kinds: tuple[str, ...]
    active: bool
    trained: bool
    layers: tuple[str, ...]
    parameters: int


# -- in and out ---------------------------------------------------------------------------------------------------------------


def add_adapter(
    model: nn.Module, name: str, config_or_method: Mapping[str, Any] | BaseModel | PeftMethod[Any], *, train: bool = False
) -> ModelStateMapper:
    """Adds an adapter under a name of its own. What is active stays so.

    Call it before `fully_shard`, and before or after the tensor-parallel plan. A method whose start needs the weights (PiSSA) or
    a model on meta needs `method.initialise(model)` later: give the method object then, and keep it.

    Args:
        train: Its factors are trained whenever it is active.

    Returns:
        The mapper from keys as they were to keys now, for layers that no adapter had before; load through it and that of the
        injection, in `ModelStateMapperParallel`.

    Raises:
        ValueError: if the name is taken, or the method cannot share this model. The model is then as it was.
    """
    given = config_or_method if isinstance(config_or_method, PeftMethod) else peft_method_from_config(config_or_method)
    method = _shareable(given, name)
    refuse_sharded(model)
    check_name(model, name)
    _refuse_restacked(model)
    if hosts(model):
        _switchable(model)
        _refuse_other_training(model)
    layers, shared, trained = _injected(model, name, method)
    if not hosts(model):
        model.requires_grad_(False)  # as an injection does
    mapper = attach(model, name, layers)
    for root, factor in shared.items():
        model.add_module(f"{root}_{name}", factor)
    for _, layer in layers:
        layer.thawed = frozenset(n for n, p in _parameters(layer) if train and id(p) in trained)
        _freeze(layer)
    method.adapter = name
    return mapper


def _shareable(method: PeftMethod[Any], name: str) -> AdapterMethod[Any]:
    if not isinstance(method, AdapterMethod):
        raise InjectionError(
            f"{name}: a named adapter is one method that adds an update to layers; {type(method).__name__} is none. Name its methods "
            "one by one; modules that are trained whole have one copy for all adapters, so train them with the first"
        )
    if method.adapter != DEFAULT:
        raise ValueError(f"this method object works on the adapter {method.adapter!r}; make another of the same config for {name!r}")
    if getattr(method.config, "layer_replication", None):
        raise InjectionError(f"{name}: layer_replication would build another model under the first adapter; give it to the first one alone")
    for field, empty in (("bias", "none"), ("modules_to_save", None)):
        if getattr(method.config, field, empty) not in (empty, []):
            raise InjectionError(
                f"{name}: {field}={getattr(method.config, field)!r} trains parameters of the base, of which all adapters share one copy. "
                "Leave it out"
            )
    if getattr(method.config, "target_parameters", None):
        raise InjectionError(
            f"{name}: target_parameters={method.config.target_parameters!r}: an adapter that takes the place of a parameter is the only "
            "one of its model. Inject it as the first, or target layers"
        )
    return method


def _injected(model: nn.Module, name: str, method: AdapterMethod[Any]) -> tuple[list[Host], dict[str, nn.Module], set[int]]:
    """The method's layers, its shared factors, and the ids of what it trains; the model is left, or made, as it was."""
    clock = clock_of(model)
    with _bare(model) as taken:
        result = method.inject(model)
        layers = hosts(model)
        shared = _shared(model, layers)
        mine = clock_of(model)
        owners = {id(host.base): host for _, host in taken}
        for root in shared:
            delattr(model, root)
        for names, layer in layers:
            base: nn.Module = layer.base if id(layer.base) in owners else layer.give_back()
            for n in names:
                model.set_submodule(n, base)
        if mine is not None:
            mine.detach()
        for _, layer in layers:
            layer.dropout.clock = clock or mine  # one clock, whatever the number of adapters
            _refuse_neighbours(name, layer, owners.get(id(layer.base)))
    if (clock or mine) is not None and any(layer.delta.noisy for _, layer in layers):
        (clock or mine).attach(model)  # type: ignore[union-attr]
    return layers, shared, {id(p) for p in result.parameters_to_train}


@contextmanager
def _bare(model: nn.Module) -> Iterator[list[Host]]:
    """The model without adapters, so that a method can be injected as into any model; then with them again."""
    taken = hosts(model)
    shared = _shared(model, taken)
    for names, host in taken:
        for name in names:
            model.set_submodule(name, host.base)
    for root in shared:
        delattr(model, root)
    try:
        yield taken
    finally:
        for root, factor in shared.items():
            model.add_module(root, factor)
        for names, host in taken:
            for name in names:
                model.set_submodule(name, host)


def attach(model: nn.Module, name: str, layers: Sequence[Host]) -> ModelStateMapper:
    """Hangs layers that are in no model yet into it as the adapter `name`; wraps the bases that had no adapter."""
    active = next((host.active for _, host in hosts(model)), (DEFAULT,))
    mappers: list[ModelStateMapper] = []
    for names, layer in layers:
        host = model.get_submodule(names[0])
        if not isinstance(host, AdaptedLayer):
            kind = kind_of(host)
            assert kind is not None
            host = kind(host, Nothing(), name=layer.name, seed=0, clock=layer.dropout.clock).take_over()
            host.active = active
            mappers += [ModelStateMapperRename(old, new) for n in names for old, new in renames(n, host.base)]
            for n in names:
                model.set_submodule(n, host)
        layer.refer_to_base()
        host.add_module("adapters", nn.ModuleDict({**host.others(), name: layer}))
    return ModelStateMapperParallel(mappers)


@torch.no_grad()
def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter out. A start that it had taken off the base weights is put back into them, rounded once.

    Raises:
        ValueError: if it is the only active one of several, or the model is under `fully_shard`; nothing has been changed then.
    """
    known = check_known(model, [name])
    _refuse_restacked(model)
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        raise InjectionError("the model is under fully_shard, which manages this adapter's factors: delete it before, or leave it inactive")
    active = active_adapters(model)
    left = [n for n in active if n != name]
    if not left and name in active and len(known) > 1:
        raise ValueError(f"{name} is the only active adapter; set another one of {[n for n in known if n != name]} before you delete it")
    every = hosts(model)
    gone = [(host, host.adapters_by_name()[name]) for _, host in every if name in host.adapters_by_name()]
    for root in _shared(model, [([], layer) for _, layer in gone]):
        delattr(model, root)
    for host, layer in gone:
        layer.move_back()
        _drop(host, name)
    for names, host in every:
        host.active = tuple(n for n in host.active if n != name)
        if not host.adapters_by_name():
            base = host.give_back()
            for n in names:
                model.set_submodule(n, base)
    rest(model, gone[0][1])


def _drop(host: AdaptedLayer, name: str) -> None:
    if name != DEFAULT:
        others: Any = host._modules["adapters"]
        del others[name]
        if not others:
            del host.adapters
        return
    for factor in host.delta.axes:
        delattr(host, factor)
    host.delta, host.origin, host.shared, host.started = Nothing(), {}, {}, True


# -- choosing -----------------------------------------------------------------------------------------------------------------


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters, in order; none inside `disable_adapters`."""
    known, active = adapter_names(model), next((host.active for _, host in hosts(model)), ())
    return [name for name in active if name in known]


def adapter_names(model: nn.Module) -> list[str]:
    """Every adapter of the model, "default" first."""
    names = dict.fromkeys(name for _, host in hosts(model) for name in host.adapters_by_name())
    return sorted(names, key=lambda name: name != DEFAULT)


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes these adapters the active ones, in this order. The others are frozen; these are trained if they were to be.

    Raises:
        ValueError: for an unknown name, or for several adapters of which one scales the rows of the weight (DoRA).
    """
    names = [names] if isinstance(names, str) else list(names)
    check_known(model, names)
    if not names:
        raise ValueError("name at least one adapter; `disable_adapters(model)` is the context in which none is active")
    if len(set(names)) < len(names):
        raise ValueError(f"{names} names an adapter twice, and its update would be added once; name each once")
    every = _switchable(model)
    if any(not host.active for _, host in every):
        raise ValueError("adapters are disabled here; leave `disable_adapters` first, which makes those active again that were so")
    if len(names) > 1:
        _refuse_gains(every, names, "is active beside others")
    reshard(model)  # a gathered parameter of FSDP2 would forget the flag
    for _, host in every:
        for name, layer in host.adapters_by_name().items():
            if name in host.active and name not in names:
                layer.thawed = frozenset(n for n, p in _parameters(layer) if p.requires_grad)
                _freeze(layer)
            elif name in names and name not in host.active:
                for n, p in _parameters(layer):
                    p.requires_grad_(n in layer.thawed or p.requires_grad)
        host.active = tuple(names)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model alone: its own output to the bit, and to rounding where a start was taken off its weights."""
    every = _switchable(model)
    _refuse_other_training(model)
    before = [host.active for _, host in every]
    for _, host in every:
        host.active = ()
    try:
        yield
    finally:
        for (_, host), active in zip(every, before):
            host.active = active


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Each row of the batch has its own adapter, or "__base__" for none. Inference only.

    Args:
        names: One for each row of this rank's batch, the first dimension of every adapted layer's input.
    """
    every = _switchable(model)
    check_known(model, [name for name in dict.fromkeys(names) if name != BASE])
    if model.training:
        raise ValueError("adapter_rows is for inference, as no gradient is defined for what each adapter learns; call model.eval() first")
    _refuse_gains(every, list(names), "works on some rows only")
    rows = Rows(names)
    for _, host in every:
        host.rows = rows
    try:
        yield
    finally:
        for _, host in every:
            host.rows = None


@contextmanager
def only_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """The model's modules and keys as if this adapter were the only one: for what saves or loads one (`save_adapter`), on any layout.

    Do not call the model inside.
    """
    check_known(model, [name])
    every = hosts(model)
    chosen = {id(host): layer for _, host in every if (layer := host.adapters_by_name().get(name)) is not None}
    shared = _shared(model, every)
    mine = next(iter(chosen.values())).shared
    hidden = {id(host): others for _, host in every if (others := host._modules.pop("adapters", None)) is not None}
    for names, host in every:
        layer = chosen.get(id(host))
        if layer is not None and layer is not host:
            layer._modules["base"] = layer.base
        for n in names:
            model.set_submodule(n, host.base if layer is None else layer)
    for root in shared:
        delattr(model, root)
    for root, factor in mine.items():
        model.add_module(root, factor)
    try:
        yield
    finally:
        for root in mine:
            delattr(model, root)
        for root, module in shared.items():
            model.add_module(root, module)
        for names, host in every:
            layer = chosen.get(id(host))
            if layer is not None and layer is not host:
                del layer._modules["base"]
            if id(host) in hidden:
                host._modules["adapters"] = hidden[id(host)]
            for n in names:
                model.set_submodule(n, host)


def adapter_status(model: nn.Module) -> dict[str, AdapterStatus]:
    """What each adapter is, by name."""
    active, found = active_adapters(model), {}
    for name in adapter_names(model):
        layers = [(names[0], host.adapters_by_name()[name]) for names, host in hosts(model) if name in host.adapters_by_name()]
        parameters = {id(p): p for _, layer in layers for _, p in _parameters(layer)}.values()
        found[name] = AdapterStatus(
            tuple(dict.fromkeys(layer.delta.kind for _, layer in layers)),
            name in active,
            any(p.requires_grad for p in parameters),
            tuple(n for n, _ in layers),
            sum(p.numel() for p in parameters),
        )
    return found


# -- merging ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_adapters(model: nn.Module, *, undoable: bool = True, dequantise: bool = False) -> None:
    """Folds the active adapters into the base weights, in their order, in fp32 with one rounding, and takes all adapters out.

    Args:
        undoable: Keep the base weights as they were, so that `unmerge_adapters` is exact to the bit; costs one copy of them.
        dequantise: Put plain layers in the place of quantised ones, which cannot hold the sum; without it those are refused.
    """
    every = _switchable(model)
    for _, host in every:
        if dequantise and isinstance(host.base, NF4Linear):
            host.base.merge_dequantises = True
    if not active_adapters(model):
        raise ValueError("nothing to merge: no adapter is active")
    refuse_tied(model, every)
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
    shared = _shared(model, every)
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


# -- the walk, and what is refused ----------------------------------------------------------------------------------------------


def hosts(model: nn.Module) -> list[Host]:
    """The adapted layers of a model; other adapters of a layer are inside it."""
    return [(names, m) for names, m in names_of_modules(model) if isinstance(m, AdaptedLayer)]


def _parameters(layer: AdaptedLayer) -> Iterator[tuple[str, nn.Parameter]]:
    yield from layer.factors().items()
    yield from ((name, f.weight) for name, f in layer.shared.items() if isinstance(f.weight, nn.Parameter))


def _freeze(layer: AdaptedLayer) -> None:
    for _, p in _parameters(layer):
        p.requires_grad_(False)


def _shared(model: nn.Module, layers: Sequence[Host]) -> dict[str, nn.Module]:
    """The factors at the model's root that all adapters of these layers share with other layers, by their names there."""
    ids = {id(factor) for _, host in layers for layer in (host, *host.others().values()) for factor in layer.shared.values()}
    return {name: m for name, m in model._modules.items() if m is not None and id(m) in ids}


def check_name(model: nn.Module, name: str) -> None:
    if not name.isidentifier() or name in (DEFAULT, BASE):
        raise ValueError(
            f"{name!r} cannot name an adapter: expected letters, digits and underscores, as it becomes a part of state-dict keys. "
            f"{DEFAULT!r} is the one of inject_peft_and_freeze, {BASE!r} stands for none"
        )
    if name in (known := adapter_names(model)):
        raise ValueError(f"the model has an adapter {name!r} already ({', '.join(known)}); give another name, or delete that one first")


def check_known(model: nn.Module, names: Sequence[str]) -> list[str]:
    known = adapter_names(model)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the model has no adapter {unknown}; it has {known}")
    return known


def _switchable(model: nn.Module) -> list[Host]:
    every = hosts(model)
    if not every:
        raise ValueError("the model has no adapters; inject one first")
    for names, host in every:
        if not host.takes_several:
            raise ValueError(f"{names[0]} is a {type(host).__name__}, which works with its own adapter only: adapters cannot be switched")
    return every


def _refuse_restacked(model: nn.Module) -> None:
    if restacked(model) is not None:
        raise InjectionError(
            "layer_replication has built this model's layers from those of another, for one adapter: no other can be added or taken out. "
            "Undo it with `method.remove(model)`"
        )


def _refuse_gains(every: Sequence[Host], names: Sequence[str], how: str) -> None:
    for layer, host in every:
        here = {name: a for name, a in host.adapters_by_name().items() if name in names}
        for name, adapter in here.items():
            if adapter.delta.has_gain:
                raise ValueError(
                    f"{name} ({adapter.delta}) scales the rows of {layer[0]}'s weight, base and update together, so there is no sum of "
                    f"updates when it {how}. Make it the only active adapter"
                )


def _refuse_neighbours(name: str, layer: AdaptedLayer, host: AdaptedLayer | None) -> None:
    if not layer.takes_several or (host is not None and not host.takes_several):
        raise InjectionError(f"{layer.name}: a {type(layer).__name__} works with one adapter only. Leave it out of the targets of {name!r}")
    for other, neighbour in host.adapters_by_name().items() if host is not None else ():
        a, b = layer.delta, neighbour.delta
        if (a.moves_base and (b.from_the_weight or b.moves_base)) or (b.moves_base and (a.from_the_weight or a.moves_base)):
            raise InjectionError(
                f"{layer.name}: {name!r} ({a}) and {other!r} ({b}) both start from the base weight, and one takes its start off it, so "
                "the other would not find the weight it is made for. Load each into a model of its own, or convert one to plain LoRA"
            )


def _refuse_other_training(model: nn.Module) -> None:
    """Adapters share the base, so it must be that of all of them."""
    ours = {id(p) for _, host in hosts(model) for layer in host.adapters_by_name().values() for _, p in _parameters(layer)}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in ours:
            raise ValueError(
                f"{name} is trained itself, beside the adapters, so the untouched base is gone and other adapters would meet a base they "
                "were not made for. Inject without bias and modules_to_save, or freeze it if it still has its old values"
            )
