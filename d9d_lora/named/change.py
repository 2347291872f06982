"""An adapter put into a model beside others, and taken out again.

It starts as it would alone on the model, from its config's seed and the layers' names: the other adapters are taken out of the model
while its method is injected as into any model, and hung in again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from d9d_lora.adapters import AdapterMethod, rest
from d9d_lora.layers import AdaptedLayer, kind_of
from d9d_lora.layers.among import BASE, DEFAULT
from d9d_lora.method import InjectionError, PeftMethod
from d9d_lora.methods.nothing import Nothing
from d9d_lora.named.hosts import (
    Host,
    active_adapters,
    adapter_names,
    check_known,
    freeze,
    hosts,
    parameters_of,
    refuse_other_training,
    refuse_restacked,
    shared_at_root,
    switchable,
)
from d9d_lora.registry import peft_method_from_config
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperParallel, ModelStateMapperRename
from d9d_lora.state.names import renames
from d9d_lora.walk import clock_of, refuse_sharded


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
    refuse_restacked(model)
    if hosts(model):
        switchable(model)
        refuse_other_training(model)
    layers, shared, trained = _injected(model, name, method)
    if not hosts(model):
        model.requires_grad_(False)  # as an injection does
    mapper = attach(model, name, layers)
    for root, factor in shared.items():
        model.add_module(f"{root}_{name}", factor)
    for _, layer in layers:
        layer.thawed = frozenset(n for n, p in parameters_of(layer) if train and id(p) in trained)
        freeze(layer)
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
        shared = shared_at_root(model, layers)
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
    shared = shared_at_root(model, taken)
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
    refuse_restacked(model)
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        raise InjectionError("the model is under fully_shard, which manages this adapter's factors: delete it before, or leave it inactive")
    active = active_adapters(model)
    left = [n for n in active if n != name]
    if not left and name in active and len(known) > 1:
        raise ValueError(f"{name} is the only active adapter; set another one of {[n for n in known if n != name]} before you delete it")
    every = hosts(model)
    gone = [(host, host.adapters_by_name()[name]) for _, host in every if name in host.adapters_by_name()]
    for root in shared_at_root(model, [([], layer) for _, layer in gone]):
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


def check_name(model: nn.Module, name: str) -> None:
    if not name.isidentifier() or name in (DEFAULT, BASE):
        raise ValueError(
            f"{name!r} cannot name an adapter: expected letters, digits and underscores, as it becomes a part of state-dict keys. "
            f"{DEFAULT!r} is the one of inject_peft_and_freeze, {BASE!r} stands for none"
        )
    if name in (known := adapter_names(model)):
        raise ValueError(f"the model has an adapter {name!r} already ({', '.join(known)}); give another name, or delete that one first")


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
