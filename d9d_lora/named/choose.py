"""Which adapters of a model are at work: some of them, none, one for each row of a batch, or one as if it were the only one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from d9d_lora.layers.among import BASE, Rows
from d9d_lora.named.hosts import check_known, freeze, hosts, parameters_of, refuse_gains, refuse_other_training, shared_at_root, switchable
from d9d_lora.walk import reshard


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
    every = switchable(model)
    if any(not host.active for _, host in every):
        raise ValueError("adapters are disabled here; leave `disable_adapters` first, which makes those active again that were so")
    if len(names) > 1:
        refuse_gains(every, names, "is active beside others")
    reshard(model)  # a gathered parameter of FSDP2 would forget the flag
    for _, host in every:
        for name, layer in host.adapters_by_name().items():
            if name in host.active and name not in names:
                layer.thawed = frozenset(n for n, p in parameters_of(layer) if p.requires_grad)
                freeze(layer)
            elif name in names and name not in host.active:
                for n, p in parameters_of(layer):
                    p.requires_grad_(n in layer.thawed or p.requires_grad)
        host.active = tuple(names)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model alone: its own output to the bit, and to rounding where a start was taken off its weights."""
    every = switchable(model)
    refuse_other_training(model)
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
    every = switchable(model)
    check_known(model, [name for name in dict.fromkeys(names) if name != BASE])
    if model.training:
        raise ValueError("adapter_rows is for inference, as no gradient is defined for what each adapter learns; call model.eval() first")
    refuse_gains(every, list(names), "works on some rows only")
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
    shared = shared_at_root(model, every)
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
