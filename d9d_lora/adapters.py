"""Every adapter method but its delta: wrapping layers all or none, merging, undoing. A method says `delta_for(name)`; which: `sites.py`."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d9d_lora.dropout import Clock
from d9d_lora.layers import AdaptedLayer, AdaptedLinear
from d9d_lora.layers.among import DEFAULT
from d9d_lora.layers.gated import find_gated
from d9d_lora.layers.parameter import AdaptedParameter
from d9d_lora.layers.readers import find_readers
from d9d_lora.layers.shared import SharedFactor
from d9d_lora.layers.tied import tie
from d9d_lora.method import InjectionError, PeftInjectionResult, PeftMethod
from d9d_lora.methods.delta import Delta, DoesNotFit
from d9d_lora.sites import Site, biases_of, saved_whole, sites_of
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperRename
from d9d_lora.state.names import renames
from d9d_lora.targets import Targets
from d9d_lora.walk import (
    adapted_layers,
    clock_of,
    names_of_modules,
    refuse_several,
    refuse_sharded,
    refuse_tied,
    reshard,
    tensor_parallel_mesh,
)


class AdapterConfig(Targets):
    """What the config of every adapter method has: the targets, and the seed of the starts."""

    kind: str
    seed: int = Field(0, description="seed of the starting values and dropout masks; they depend on it and on names, not on the layout")
    unused: ClassVar[Mapping[str, str]] = {}
    """Targeting fields that the method has no use for, and why: giving one is an error."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> Self:
        for field, why in self.unused.items():
            if getattr(self, field):
                raise ValueError(f"{field} cannot be used with kind {self.kind!r}: {why}. Leave it out")
        return self


TAdapter = TypeVar("TAdapter", bound=AdapterConfig)


@dataclass
class Merged:
    """A layer that was merged: its names, itself, and what makes its base what it was (None: not kept)."""

    names: list[str]
    layer: AdaptedLayer
    original: Any


class AdapterMethod(PeftMethod[TAdapter]):
    """A method that adds a delta to layers. Subclasses say which delta: `delta_for(name)`.

    Attributes:
        adapter: The name of the adapter that this object works on, where layers have several (`named/`).
    """

    kind: ClassVar[str]
    adapter: str = DEFAULT

    def __init__(self, config: TAdapter) -> None:
        self.config = config
        self._merged: WeakKeyDictionary[nn.Module, list[Merged]] = WeakKeyDictionary()

    @classmethod
    def from_config(cls, config: TAdapter) -> Self:
        return cls(config)

    def shared_factors(self, layers: list[AdaptedLayer]) -> dict[str, SharedFactor]:
        """The factors that all `layers` share (a vector bank), by the names of `Delta.shared`; the model's root will own them."""
        return {}

    @abstractmethod
    def delta_for(self, name: str) -> Delta | None:
        """The delta for a target of this name; None leaves the layer alone (loralib's r = 0)."""

    def wrap(self, site: Site, clock: Clock) -> AdaptedLayer:
        """The adapted layer of a site, not yet in the model."""
        return site.layer(site.base, site.delta, name=site.names[0], seed=self.config.seed, clock=clock)

    # -- in ------------------------------------------------------------------------------------------------------------------

    def inject(self, module: nn.Module) -> PeftInjectionResult:
        refuse_sharded(module)
        sites, passed_over = self.sites(module)
        saved = saved_whole(self.config, module)
        clock = clock_of(module) or Clock(self.config.seed, tensor_parallel_mesh(module))
        try:
            layers = [self.wrap(site, clock) for site in sites]  # everything that can fail has failed before the model is touched
            tie(layers)
            shared = self.shared_factors(layers)
        except DoesNotFit as error:
            raise InjectionError(str(error)) from error
        refuse_tied(module, [(s.names, la) for s, la in zip(sites, layers) if la.delta.moves_base], "a start that moves it")
        biases = biases_of(self.config, module, sites)
        if taken := [name for name in shared if hasattr(module, name)]:
            raise InjectionError(f"the model has {taken} already; two methods of the kind {self.kind!r} cannot share one model")

        train: list[nn.Parameter] = []
        mappers: list[ModelStateMapper] = []
        for site, layer in zip(sites, layers):
            layer.take_over()
            for name in site.names:
                module.set_submodule(name, layer)
                if isinstance(module.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
                    layer.register_forward_pre_hook(_called)
                mappers += [ModelStateMapperRename(old, new) for old, new in renames(name, site.base)]
            train += layer.factors().values()
        self._share(module, shared, layers)
        if any(layer.delta.noisy for layer in layers):
            clock.attach(module)
        train += [factor.weight for factor in shared.values() if isinstance(factor.weight, nn.Parameter)]
        known = {id(p) for p in train}
        train += [p for p in [*biases, *saved] if id(p) not in known]
        find_readers(module, AdaptedLinear)
        find_gated(module)
        return PeftInjectionResult(train, mappers, passed_over)

    def sites(self, module: nn.Module) -> tuple[list[Site], list[str]]:
        """The layers to adapt, and what the pattern matched beside them. Announces; changes nothing."""
        return sites_of(self.config, module, self.delta_for)

    def _share(self, module: nn.Module, shared: dict[str, SharedFactor], layers: Iterable[AdaptedLayer]) -> None:
        """Registers shared factors at the root, which owns and shards them; layers only refer to them."""
        for name, factor in shared.items():
            module.add_module(name, factor)
        for layer in layers:
            layer.shared = shared
            for factor in shared.values():
                factor.place(layer.placing.mesh)

    # -- out -----------------------------------------------------------------------------------------------------------------

    def layers(self, module: nn.Module) -> list[tuple[list[str], AdaptedLayer]]:
        """The layers of `module` that this method, or another object of the same config, has adapted."""
        hosts = [(names, m) for names, m in names_of_modules(module) if isinstance(m, AdaptedLayer)]
        named = [(names, layer) for names, m in hosts if (layer := m.adapters_by_name().get(self.adapter)) is not None]
        return [(names, m) for names, m in named if m.delta.kind == self.kind and self._wants(names, m)]

    def _wants(self, names: list[str], layer: AdaptedLayer) -> bool:
        if isinstance(layer, AdaptedParameter):
            return self.config.wants_parameter(layer.name)
        tied = [layer.__dict__["tied_to"]] if "tied_to" in layer.__dict__ else []
        return any(self.config.wants(name) for name in [*names, *tied])

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
        refuse_several(module)
        refuse_tied(module, layers)
        for _, layer in layers:
            layer.check_merge()
        reshard(module)
        whole = [layer.whole_factors() for _, layer in layers]
        for (names, _), factors in zip(layers, whole):
            for factor, value in factors.items():
                if not value.isfinite().all():
                    raise ValueError(f"{names[0]}.{factor} has values that are not finite; merging it would spoil the base weight.")
        merged = []
        for (names, layer), factors in zip(layers, whole):
            original = layer.keep() if undoable else None
            base = layer.merge_with_base_(factors)
            for name in names:
                module.set_submodule(name, base)
            merged.append(Merged(names, layer, original))
        self._unshare(module, layers)
        self._merged[module] = merged
        rest(module, merged[0].layer)

    @torch.no_grad()
    def unmerge(self, module: nn.Module) -> None:
        """Undoes the last merge into this model: the base weights are as they were to the bit, and the adapters are back."""
        if module not in self._merged:
            raise ValueError("nothing to unmerge: this method object has merged nothing into this model. Use the object that merged.")
        for m in self._merged[module]:
            if m.original is None:
                raise ValueError("the merge was made with undoable=False, which keeps no copy of the weights; load the base again.")
            if module.get_submodule(m.names[0]) is not m.layer.base:
                raise ValueError(f"{m.names[0]} has been changed since the merge; remove what was injected there before unmerging.")
        reshard(module)
        for m in self._merged.pop(module):
            m.layer.put_back(m.original)
            m.layer.take_over()
            for name in m.names:
                module.set_submodule(name, m.layer)
            self._share(module, m.layer.shared, [])
            if m.layer.dropout.clock is not None and m.layer.delta.noisy:
                m.layer.dropout.clock.attach(module)
        find_gated(module)

    def remove(self, module: nn.Module) -> None:
        refuse_several(module)
        layers = self.layers(module)
        reshard(module)
        for names, layer in layers:
            layer.move_back()
            base = layer.give_back()
            for name in names:
                module.set_submodule(name, base)
        self._unshare(module, layers)
        if layers:
            rest(module, layers[0][1])

    def _unshare(self, module: nn.Module, layers: list[tuple[list[str], AdaptedLayer]]) -> None:
        for name in layers[0][1].shared if layers else ():
            delattr(module, name)

    # -- starts and state --------------------------------------------------------------------------------------------------------

    def initialise(self, module: nn.Module, batches: Iterable[Any] = (), *, resume: bool = False) -> None:
        """Starts every factor, where a meta build left none. The values are those of an injection into a model with weights."""
        layers = self.layers(module)
        for factor in shared_by(layers):
            factor.refuse_unsharded(layer for _, layer in layers)
            factor.reset_parameters()
        for _, layer in layers:
            layer.reset_parameters()
            if layer.delta.moves_base:
                if resume:
                    layer.origin = layer.blank_origin()
                else:
                    layer.move_base()

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        where = "" if self.adapter == DEFAULT else f"adapters.{self.adapter}."
        layers = self.layers(module)
        origins = {f"{layer.name}.{where}{name}.origin": t for _, layer in layers for name, t in layer.origin.items()}
        return origins | {f"{where}{f.name}.digest": f.digest for f in shared_by(layers) if f.digest is not None}

    def restore(self, module: nn.Module) -> None:
        layers = self.layers(module)
        for factor in shared_by(layers):
            factor.refuse_other_values()
        for _, layer in layers:
            if layer.delta.moves_base:
                layer.move_base(layer.origin)


def shared_by(layers: list[tuple[list[str], AdaptedLayer]]) -> list[SharedFactor]:
    """The factors that the layers of one method share."""
    return list(layers[0][1].shared.values()) if layers else []


def _called(module: nn.Module, args: object) -> None:
    """Does nothing, but is there: without hooks, `nn.TransformerEncoderLayer` in evaluation reads weights past the adapters."""


def rest(module: nn.Module, last: AdaptedLayer) -> None:
    """Takes the dropout clock off a model that has no adapter left, and forwards off modules whose layers have none."""
    find_gated(module)
    if last.dropout.clock is not None and next(adapted_layers(module), None) is None:
        last.dropout.clock.detach()
