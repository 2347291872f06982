"""The layers of a model that hold adapters, what is known of each adapter, and what is refused of several of them on one model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.among import DEFAULT
from d9d_lora.method import InjectionError
from d9d_lora.replicate import restacked
from d9d_lora.walk import names_of_modules

Host = tuple[list[str], AdaptedLayer]  # an adapted layer, with all its names in the model


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


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters, in order; none inside `disable_adapters`."""
    known, active = adapter_names(model), next((host.active for _, host in hosts(model)), ())
    return [name for name in active if name in known]


def adapter_names(model: nn.Module) -> list[str]:
    """Every adapter of the model, "default" first."""
    names = dict.fromkeys(name for _, host in hosts(model) for name in host.adapters_by_name())
    return sorted(names, key=lambda name: name != DEFAULT)


def adapter_status(model: nn.Module) -> dict[str, AdapterStatus]:
    """What each adapter is, by name."""
    active, found = active_adapters(model), {}
    for name in adapter_names(model):
        layers = [(names[0], host.adapters_by_name()[name]) for names, host in hosts(model) if name in host.adapters_by_name()]
        parameters = {id(p): p for _, layer in layers for _, p in parameters_of(layer)}.values()
        found[name] = AdapterStatus(
            tuple(dict.fromkeys(layer.delta.kind for _, layer in layers)),
            name in active,
            any(p.requires_grad for p in parameters),
            tuple(n for n, _ in layers),
            sum(p.numel() for p in parameters),
        )
    return found


def hosts(model: nn.Module) -> list[Host]:
    """The adapted layers of a model; other adapters of a layer are inside it."""
    return [(names, m) for names, m in names_of_modules(model) if isinstance(m, AdaptedLayer)]


def parameters_of(layer: AdaptedLayer) -> Iterator[tuple[str, nn.Parameter]]:
    yield from layer.factors().items()
    yield from ((name, f.weight) for name, f in layer.shared.items() if isinstance(f.weight, nn.Parameter))


def freeze(layer: AdaptedLayer) -> None:
    for _, p in parameters_of(layer):
        p.requires_grad_(False)


def shared_at_root(model: nn.Module, layers: Sequence[Host]) -> dict[str, nn.Module]:
    """The factors at the model's root that all adapters of these layers share with other layers, by their names there."""
    ids = {id(factor) for _, host in layers for layer in (host, *host.others().values()) for factor in layer.shared.values()}
    return {name: m for name, m in model._modules.items() if m is not None and id(m) in ids}


def check_known(model: nn.Module, names: Sequence[str]) -> list[str]:
    known = adapter_names(model)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the model has no adapter {unknown}; it has {known}")
    return known


def switchable(model: nn.Module) -> list[Host]:
    every = hosts(model)
    if not every:
        raise ValueError("the model has no adapters; inject one first")
    for names, host in every:
        if not host.takes_several:
            raise ValueError(f"{names[0]} is a {type(host).__name__}, which works with its own adapter only: adapters cannot be switched")
    return every


def refuse_restacked(model: nn.Module) -> None:
    if restacked(model) is not None:
        raise InjectionError(
            "layer_replication has built this model's layers from those of another, for one adapter: no other can be added or taken out. "
            "Undo it with `method.remove(model)`"
        )


def refuse_gains(every: Sequence[Host], names: Sequence[str], how: str) -> None:
    for layer, host in every:
        here = {name: a for name, a in host.adapters_by_name().items() if name in names}
        for name, adapter in here.items():
            if adapter.delta.has_gain:
                raise ValueError(
                    f"{name} ({adapter.delta}) scales the rows of {layer[0]}'s weight, base and update together, so there is no sum of "
                    f"updates when it {how}. Make it the only active adapter"
                )


def refuse_other_training(model: nn.Module) -> None:
    """Adapters share the base, so it must be that of all of them."""
    ours = {id(p) for _, host in hosts(model) for layer in host.adapters_by_name().values() for _, p in parameters_of(layer)}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in ours:
            raise ValueError(
                f"{name} is trained itself, beside the adapters, so the untouched base is gone and other adapters would meet a base they "
                "were not made for. Inject without bias and modules_to_save, or freeze it if it still has its old values"
            )
