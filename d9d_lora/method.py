"""The contract of a PEFT method, and the one implementation that all adapter methods share.

    inject(module)  -> PeftInjectionResult     wrap layers, all or nothing; say what is trained and how keys are renamed
    merge(module)                              fold what was learned into the base, put the layers back
    unmerge(module)                            undo the last merge, to the bit
    from_config(config)

The first two and `from_config` are d9d's contract, so an object of ours works in d9d's injector and loader. What ours adds
is optional for a method: `initialise`, `after_step`, `extra_loss`, `adapter_config`, `remove`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from d9d_lora.dropout import Clock
from d9d_lora.layers import AdaptedLayer, AdaptedLinear, kind_of
from d9d_lora.methods.delta import Delta
from d9d_lora.placement import local_of
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperRename
from d9d_lora.state.names import renames
from d9d_lora.targets import ALL_LINEAR, Targets

TConfig = TypeVar("TConfig", bound=BaseModel)


class InjectionError(ValueError):
    """A model that a method cannot be injected into as asked. The model is as it was."""


@dataclass(slots=True)
class PeftInjectionResult:
    """What an injection changed.

    Attributes:
        parameters_to_train: The parameters that must be trainable; all others stay frozen.
        load_state_mappers: Renames from the keys of the model as it was to its keys now, for the keys that changed.
        passed_over: Modules that a pattern matched and that no layer kind adapts (containers, norms), by name.
    """

    parameters_to_train: list[nn.Parameter]
    load_state_mappers: list[ModelStateMapper]
    passed_over: list[str] = field(default_factory=list)


class PeftMethod(ABC, Generic[TConfig]):
    """A way of fine-tuning a model by training few parameters."""

    @abstractmethod
    def inject(self, module: nn.Module) -> PeftInjectionResult:
        """Changes the module in place, or raises and leaves it as it was."""

    @abstractmethod
    def merge(self, module: nn.Module) -> None:
        """Folds what was learned into the base weights and removes what `inject` added."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: TConfig) -> Self:
        """The method a config describes."""

    # What d9d's contract lacks. Each has a default, so a method with none of it is three functions.

    def extend(self, module: nn.Module) -> PeftInjectionResult:
        """`inject` into a module that another method of the same stack has already changed."""
        return self.inject(module)

    def unmerge(self, module: nn.Module) -> None:
        """Undoes the last `merge` of this object."""

    def remove(self, module: nn.Module) -> None:
        """Takes out what `inject` added, and changes no weight."""

    def initialise(self, module: nn.Module, batches: Iterable[Any] = ()) -> None:
        """Called once the real weights are there: starts that need them, or data."""

    def after_step(self, module: nn.Module, step: int) -> None:
        """Called after each optimiser step."""

    def extra_loss(self, module: nn.Module) -> Tensor | None:
        """A term for the loss, or None."""
        return None

    def adapter_config(self) -> dict[str, Any]:
        """This method's part of `adapter_config.json`, in PEFT's words; empty if PEFT has no such method."""
        return {}


# -- adapters -----------------------------------------------------------------------------------------------------------------


class AdapterConfig(Targets):
    """What the config of every adapter method has: the targets, and the seed of the starts."""

    kind: str
    seed: int = Field(0, description="seed of the starting values and dropout masks; they depend on it and on names, not on the layout")


TAdapter = TypeVar("TAdapter", bound=AdapterConfig)


@dataclass
class Site:
    """A layer that will be adapted: every name it is reached by (tied modules have several), and how."""

    names: list[str]
    base: nn.Module
    layer: type[AdaptedLayer]
    delta: Delta


class AdapterMethod(PeftMethod[TAdapter]):
    """A method that adds a delta to layers. Subclasses say which delta: `delta_for(name)`."""

    kind: ClassVar[str]

    def __init__(self, config: TAdapter) -> None:
        self.config = config
        self._merged: list[tuple[list[str], AdaptedLayer, Tensor | None]] = []

    @classmethod
    def from_config(cls, config: TAdapter) -> Self:
        return cls(config)

    @abstractmethod
    def delta_for(self, name: str) -> Delta | None:
        """The delta for a target of this name; None leaves the layer alone (loralib's r = 0)."""

    def wrap(self, site: Site, clock: Clock) -> AdaptedLayer:
        """The adapted layer of a site, not yet in the model."""
        return site.layer(site.base, site.delta, name=site.names[0], seed=self.config.seed, clock=clock)

    # -- in ------------------------------------------------------------------------------------------------------------------

    def inject(self, module: nn.Module) -> PeftInjectionResult:
        refuse_adapted(module)
        return self.extend(module)

    def extend(self, module: nn.Module) -> PeftInjectionResult:
        refuse_sharded(module)
        sites, passed_over = self.sites(module)
        saved = self._modules_to_save(module)
        clock = clock_of(module, self.config.seed)
        layers = [self.wrap(site, clock) for site in sites]  # everything that can fail has failed before the model is touched
        biases = self._biases(module, sites)

        train: list[nn.Parameter] = []
        mappers: list[ModelStateMapper] = []
        for site, layer in zip(sites, layers):
            layer.take_over()
            for name in site.names:
                module.set_submodule(name, layer)
                mappers += [ModelStateMapperRename(old, new) for old, new in renames(name, site.base)]
            train += layer.factors().values()
        train += [p for p in [*biases, *saved] if not any(p is q for q in train)]
        return PeftInjectionResult(train, mappers, passed_over)

    def sites(self, module: nn.Module) -> tuple[list[Site], list[str]]:
        """The layers to adapt, and what the pattern matched beside them. Announces; changes nothing."""
        config = self.config
        names = names_of_modules(module)
        head = output_head(module)
        candidates = [n for ns, m in names for n in ns if kind_of(m) and not isinstance(m, AdaptedLayer)]
        sites, passed_over, matched, left_alone = [], [], [], []
        for all_names, base in names:
            wanted = [name for name in all_names if config.wants(name)]
            if not wanted or base is module:
                continue
            if isinstance(base, AdaptedLayer):
                raise InjectionError(
                    f"{wanted[0]} already has an adapter ({base.delta}). Name each layer in one method of the stack only, "
                    "or merge or remove the first adapter before the second is injected."
                )
            kind = kind_of(base)
            if config.target_modules == ALL_LINEAR and (kind is None or not issubclass(kind, AdaptedLinear) or base is head):
                continue
            if kind is None:
                if isinstance(config.target_modules, list):
                    raise InjectionError(
                        f"{wanted[0]} is a {type(base).__name__}, which no layer kind adapts (expected a linear layer or an "
                        "embedding). Name the layers inside it, or train it whole with modules_to_save."
                    )
                passed_over += wanted
                continue
            reason = kind.refuses(base)
            if reason:
                raise InjectionError(f"{wanted[0]} ({type(base).__name__}) cannot be adapted: {reason}.")
            matched += wanted
            delta = self.delta_for(wanted[0])
            if delta is None:
                left_alone += wanted
            else:
                sites.append(Site(all_names, base, kind, delta))
        config.check_all_used(matched, candidates, [n for ns, _ in names for n in ns])
        return sites, passed_over + left_alone

    def _modules_to_save(self, module: nn.Module) -> list[nn.Parameter]:
        """Parameters of modules trained whole. Sharing a weight with a module that is not named would train that one too."""
        if not self.config.modules_to_save:
            return []
        chosen = [m for ns, m in names_of_modules(module) if any(self.config.saves(n) for n in ns)]
        params = {id(p): p for m in chosen for p in m.parameters()}
        for name, p in module.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0]
            if id(p) in params and not any(self.config.saves(prefix) for prefix in prefixes(owner)):
                raise InjectionError(
                    f"modules_to_save: {name} is the same tensor as one of {self.config.modules_to_save}, and would be trained "
                    "with it. Name both modules, or build the model with untied weights."
                )
        return list(params.values())

    def _biases(self, module: nn.Module, sites: list[Site]) -> list[nn.Parameter]:
        if self.config.bias == "all":
            return [p for name, p in module.named_parameters() if name == "bias" or name.endswith(".bias")]
        if self.config.bias == "lora_only":
            return [b for site in sites if isinstance(b := getattr(site.base, "bias", None), nn.Parameter)]
        return []

    # -- out -----------------------------------------------------------------------------------------------------------------

    def layers(self, module: nn.Module) -> list[tuple[list[str], AdaptedLayer]]:
        """The layers of `module` that this method, or another object of the same config, has adapted."""
        return [
            (names, m)
            for names, m in names_of_modules(module)
            if isinstance(m, AdaptedLayer) and m.delta.kind == self.kind and any(self.config.wants(n) for n in names)
        ]

    @torch.no_grad()
    def merge(self, module: nn.Module, *, undoable: bool = True) -> None:
        """Folds every delta into its base, in fp32 with one rounding, each rank its own box.

        Args:
            module: The model, on any layout. Collective where factors are sharded.
            undoable: Keep the adapted base weights as they were, so that `unmerge` is exact to the bit; costs one copy of them.

        Raises:
            ValueError: if there is nothing to merge, or a factor is not finite; nothing has been changed then.
        """
        layers = self.layers(module)
        if not layers:
            raise ValueError(f"nothing to merge: the model has no {self.kind} adapter of this config. Inject it, or load one, first.")
        refuse_tied(module, layers)
        reshard(module)
        whole = [layer.whole_factors() for _, layer in layers]
        for (names, _), factors in zip(layers, whole):
            for factor, value in factors.items():
                if not value.isfinite().all():
                    raise ValueError(f"{names[0]}.{factor} has values that are not finite; merging it would spoil the base weight.")
        self._merged = []
        for (names, layer), factors in zip(layers, whole):
            weight: Tensor = layer.base.weight  # type: ignore[assignment]
            original = local_of(weight).clone() if undoable else None
            base = layer.merge_with_base_(factors)
            for name in names:
                module.set_submodule(name, base)
            self._merged.append((names, layer, original))

    @torch.no_grad()
    def unmerge(self, module: nn.Module) -> None:
        """Undoes the last merge: the base weights are as they were to the bit, and the adapters are back."""
        if not self._merged:
            raise ValueError("nothing to unmerge: this method object has merged nothing. Unmerge with the object that merged.")
        if any(original is None for _, _, original in self._merged):
            raise ValueError("the merge was made with undoable=False, which keeps no copy of the weights; load the base again.")
        reshard(module)
        for names, layer, original in self._merged:
            local_of(layer.base.weight).copy_(original)  # type: ignore[arg-type]
            layer.take_over()
            for name in names:
                module.set_submodule(name, layer)
        self._merged = []

    def remove(self, module: nn.Module) -> None:
        for names, layer in self.layers(module):
            base = layer.give_back()
            for name in names:
                module.set_submodule(name, base)


# -- the walk -----------------------------------------------------------------------------------------------------------------


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
