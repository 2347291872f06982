"""The walk over a model: its modules by name, and the states a model may be in that a method must refuse."""

from collections.abc import Container, Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from d9d_lora.dropout import Clock
from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.among import DEFAULT
from d9d_lora.layers.experts import is_shared_out
from d9d_lora.layers.parameter import SUFFIX
from d9d_lora.layers.tied import TiedHead
from d9d_lora.method import InjectionError


def names_of_modules(module: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every module once, with all its names (a module tied into two places has two). Does not look inside adapted layers."""
    found: dict[int, tuple[list[str], nn.Module]] = {}

    def walk(prefix: str, m: nn.Module) -> None:
        found.setdefault(id(m), ([], m))[0].append(prefix)
        if not isinstance(m, AdaptedLayer):
            for name, child in m._modules.items():  # named_children() tells a module once, under the first of its names
                if child is not None:
                    walk(f"{prefix}.{name}" if prefix else name, child)

    walk("", module)
    return list(found.values())


def adapted_layers(module: nn.Module) -> Iterator[AdaptedLayer]:
    """Every adapted layer of a model, once, in the order of its modules."""
    return (m for m in module.modules() if isinstance(m, AdaptedLayer))


def adapter_tensors(module: nn.Module) -> set[str]:
    """The names of every tensor that adapters have added to a model: what no base checkpoint holds."""
    added: dict[int, None] = {}
    for layer in adapted_layers(module):
        for m in [child for name, child in layer.named_children() if name != "base"] + list(layer.shared.values()):
            added |= dict.fromkeys(id(t) for t in m.state_dict(keep_vars=True).values())
    return {name for name, t in module.state_dict(keep_vars=True).items() if id(t) in added}


def output_head(module: nn.Module) -> nn.Module | None:
    """The layer "all-linear" leaves out: what the model says its output embedding is, else a child named `lm_head`."""
    ask = getattr(module, "get_output_embeddings", None)
    return (ask() if callable(ask) else None) or getattr(module, "lm_head", None)


def prefixes(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def clock_of(module: nn.Module) -> Clock | None:
    """The dropout clock of an adapted model: one, whatever the number of methods."""
    return next((layer.dropout.clock for layer in adapted_layers(module) if layer.dropout.clock is not None), None)


def tensor_parallel_mesh(module: nn.Module) -> DeviceMesh | None:
    """The mesh of the model's tensor-parallel layers, which layers outside the plan do not know of themselves."""
    shared_out = {id(p) for m in module.modules() if is_shared_out(m) for p in m.parameters()}  # over ranks of different data
    placed = (p for p in module.parameters() if isinstance(p, DTensor) and p.device_mesh.ndim == 1)
    return next((p.device_mesh for p in placed if id(p) not in shared_out), None)


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


def refuse_several(module: nn.Module) -> None:
    for layer in adapted_layers(module):
        if layer.others() or layer.active != (DEFAULT,):
            raise ValueError(
                f"{layer.name} has several adapters ({', '.join(layer.adapters_by_name())}), and a method object knows one. Merge with "
                "`merge_adapters(model)`, which folds the active ones, or remove one with `delete_adapter(model, name)`."
            )


def refuse_trained_bases(module: nn.Module, train: Container[int]) -> None:
    """A base that is trained beside its own adapter is neither; `train` holds the ids of trained parameters."""
    for layer in adapted_layers(module):
        for name, p in [*layer.base.named_parameters(), ("weight", layer.base.weight)]:
            if name != "bias" and id(p) in train:
                raise InjectionError(
                    f"{layer.name} has an adapter ({layer.delta}), and its own {name} would be trained whole beside it. Narrow one of "
                    "the two targets."
                )


def refuse_tied(module: nn.Module, layers: list[tuple[list[str], AdaptedLayer]], change: str = "a merge") -> None:
    """A weight that another layer uses too cannot be changed for one: the other has no adapter, or another."""
    owners = {id(layer.base.weight): list(names) for names, layer in layers if not isinstance(layer, TiedHead)}
    for also, layer in layers:
        if isinstance(layer, TiedHead):  # has the same adapter as the other
            owners[id(layer.base.weight)] += also
    for name, p in module.named_parameters(remove_duplicate=False):
        names = owners.get(id(p))
        if names and not any(name.startswith(f"{n}.") or n == name + SUFFIX for n in names):
            raise ValueError(
                f"{names[0]} shares its weight with {name}: {change} would change both, though each has its own adapter or none. "
                + ("Untie the weights first, or export the adapter instead of merging it." if change == "a merge" else "Untie the weights.")
            )


def reshard(module: nn.Module) -> None:
    """After a forward FSDP2 may still hold gathered weights; what is written into those is lost at the next reshard."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()
