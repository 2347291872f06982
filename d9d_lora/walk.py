"""The walk over a model: its modules by name, and the states a model may be in that a method must refuse."""

from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule

from d9d_lora.dropout import Clock
from d9d_lora.layers import AdaptedLayer
from d9d_lora.method import InjectionError


def names_of_modules(module: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every module once, with all its names (a module tied into two places has two). Does not look inside adapted layers."""
    found: dict[int, tuple[list[str], nn.Module]] = {}

    def walk(prefix: str, m: nn.Module) -> None:
        found.setdefault(id(m), ([], m))[0].append(prefix)
        if not isinstance(m, AdaptedLayer):
            for name, child in m.named_children():
                walk(f"{prefix}.{name}" if prefix else name, child)

    walk("", module)
    return list(found.values())


def adapted_layers(module: nn.Module) -> Iterator[AdaptedLayer]:
    """Every adapted layer of a model, once, in the order of its modules."""
    return (m for m in module.modules() if isinstance(m, AdaptedLayer))


def output_head(module: nn.Module) -> nn.Module | None:
    """The layer "all-linear" leaves out: what the model says its output embedding is, else a child named `lm_head`."""
    ask = getattr(module, "get_output_embeddings", None)
    return (ask() if callable(ask) else None) or getattr(module, "lm_head", None)


def prefixes(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def clock_of(module: nn.Module, seed: int) -> Clock:
    """The dropout clock of a model: one, whatever the number of methods; it ticks with the model's training forwards."""
    for layer in adapted_layers(module):
        if layer.dropout.clock is not None:
            return layer.dropout.clock
    clock = Clock(seed)
    module.register_forward_pre_hook(clock.tick)
    return clock


def refuse_sharded(module: nn.Module) -> None:
    if any(isinstance(m, FSDPModule) for m in module.modules()):
        raise InjectionError(
            "the model is already under fully_shard, which would not manage the adapter's parameters: every rank would train "
            "another adapter, in silence. Inject first, then call fully_shard on the blocks and the root."
        )


def refuse_adapted(module: nn.Module) -> None:
    layer = next(adapted_layers(module), None)
    if layer is not None:
        raise InjectionError(
            f"the model already has adapters (the first is {layer.name!r}). Merge or remove them first; to combine methods, "
            "inject one PeftStack."
        )


def refuse_tied(module: nn.Module, layers: list[tuple[list[str], AdaptedLayer]]) -> None:
    """A weight that another layer uses too cannot be merged into: that layer would change, and it has no adapter."""
    owners = {id(layer.base.weight): names for names, layer in layers}
    for name, p in module.named_parameters(remove_duplicate=False):
        names = owners.get(id(p))
        if names and not any(name.startswith(f"{n}.") for n in names):
            raise ValueError(
                f"{names[0]} shares its weight with {name}: a merge would change both, though only one has the adapter. "
                "Untie the weights first, or export the adapter instead of merging it."
            )


def reshard(module: nn.Module) -> None:
    """After a forward FSDP2 may still hold gathered weights; what is written into those is lost at the next reshard."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()
