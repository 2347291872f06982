"""Which layers of a model the targets of a config take, and what else they train. Announces; changes nothing.

A target is a module that some layer kind adapts, or a parameter by its own name. "all-linear" is every linear layer but the output head
and routers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from d9d_lora.layers import AdaptedEmbedding, AdaptedGroupedLinear, AdaptedLayer, AdaptedLinear, kind_of
from d9d_lora.layers.experts import kind_of_parameter
from d9d_lora.layers.parameter import SUFFIX, Held, held
from d9d_lora.layers.tied import TiedHead, tied_pairs, turned
from d9d_lora.method import InjectionError
from d9d_lora.methods.delta import Delta, DoesNotFit
from d9d_lora.mixture import routers
from d9d_lora.targets import ALL_LINEAR, Targets
from d9d_lora.walk import names_of_modules, output_head, prefixes

LINEAR = (AdaptedLinear, AdaptedGroupedLinear)  # what "all-linear" takes
DeltaFor = Callable[[str], Delta | None]  # by the name of a target; None leaves the layer alone
Modules = list[tuple[list[str], nn.Module]]


@dataclass
class Site:
    """A layer that will be adapted: every name it is reached by (tied modules have several), and how."""

    names: list[str]
    base: nn.Module
    layer: type[AdaptedLayer]
    delta: Delta


def sites_of(config: Targets, module: nn.Module, delta_for: DeltaFor) -> tuple[list[Site], list[str]]:
    """The layers to adapt, and what the pattern matched beside them.

    Raises:
        InjectionError: for a target that is not there, cannot be adapted, or is adapted already.
    """
    modules = names_of_modules(module)
    search = _Search(config, delta_for)
    search.modules(module, modules)
    parameters = list(_parameters(config, module, modules))
    search.parameters(parameters)
    candidates = [n for names, m in modules for n in names if kind_of(m) and not isinstance(m, AdaptedLayer)]
    candidates += [n for names, _ in parameters for n in names]
    config.check_all_used(search.matched, candidates, [n for names, _ in modules for n in names])
    sites = _tied(config, search.sites, modules, delta_for) if config.ensure_weight_tying else search.sites
    return sites, search.passed_over + search.left_alone


class _Search:
    """What the targets match, as it is found.

    Attributes:
        matched: The names of all targets that can be adapted.
        left_alone: Those of them that the method has no delta for.
        passed_over: What a pattern matches and no layer kind adapts.
    """

    def __init__(self, config: Targets, delta_for: DeltaFor) -> None:
        self.config, self.delta_for = config, delta_for
        self.sites: list[Site] = []
        self.matched: list[str] = []
        self.left_alone: list[str] = []
        self.passed_over: list[str] = []

    def _take(self, wanted: list[str], names: list[str], base: nn.Module, kind: type[AdaptedLayer]) -> None:
        self.matched += wanted
        delta = self.delta_for(wanted[0])
        if delta is None:
            self.left_alone += wanted
        else:
            self.sites.append(Site(names, base, kind, delta))

    def modules(self, module: nn.Module, modules: Modules) -> None:
        all_linear, listed = self.config.target_modules == ALL_LINEAR, isinstance(self.config.target_modules, list)
        head, routing = output_head(module), routers(module) if all_linear else set()
        for names, base in modules:
            wanted = [name for name in names if self.config.wants(name)]
            if not wanted or base is module:
                continue
            if isinstance(base, AdaptedLayer):
                raise InjectionError(
                    f"{wanted[0]} already has an adapter ({base.delta}). Name each layer in one method of the stack only, "
                    "or merge or remove the first adapter before the second is injected."
                )
            kind = kind_of(base)
            if all_linear and (kind is None or not issubclass(kind, LINEAR) or base is head or not routing.isdisjoint(names)):
                continue
            if listed and isinstance(base, nn.MultiheadAttention):
                raise InjectionError(
                    f"{wanted[0]} is torch's MultiheadAttention, whose projections are parameters: instead of the module, name them in "
                    f"target_parameters: ['{wanted[0]}.in_proj_weight', '{wanted[0]}.out_proj.weight']."
                )
            if listed and kind is None:
                raise InjectionError(
                    f"{wanted[0]} is a {type(base).__name__}, which no layer kind adapts (expected a linear layer or an "
                    "embedding). Name the layers inside it, or train it whole with modules_to_save."
                )
            if kind is None:
                self.passed_over += wanted
                continue
            if reason := kind.refuses(base):
                raise InjectionError(f"{wanted[0]} ({type(base).__name__}) cannot be adapted: {reason}.")
            self._take(wanted, names, base, kind)

    def parameters(self, parameters: Sequence[tuple[list[str], Held]]) -> None:
        adapted = {id(site.base) for site in self.sites}
        for names, parameter in parameters:
            wanted = [name for name in names if self.config.wants_parameter(name)]
            if not wanted:
                continue
            if id(parameter.host) in adapted:
                raise InjectionError(f"{wanted[0]} is named in target_parameters, and its layer is adapted as a module too; choose one.")
            kind = kind_of_parameter(parameter)
            if reason := kind.refuses(parameter):
                raise InjectionError(f"the parameter {wanted[0]} cannot be adapted: {reason}.")
            self._take(wanted, [name + SUFFIX for name in names], parameter, kind)


def _parameters(config: Targets, module: nn.Module, modules: Modules) -> Iterator[tuple[list[str], Held]]:
    """Every parameter that `target_parameters` may name: its names, and itself as the base of an adapter."""
    for names, host in modules if config.target_parameters else ():
        if isinstance(host, AdaptedLayer):
            continue
        parent = module.get_submodule(names[0].rpartition(".")[0])
        for parameter, p in host._parameters.items():
            if p is not None:
                yield [f"{name}.{parameter}".removeprefix(".") for name in names], held(host, parameter, parent)


def _tied(config: Targets, sites: list[Site], modules: Modules, delta_for: DeltaFor) -> list[Site]:
    """The sites, with one adapter for an embedding and a head that share a weight, if the targets name either."""
    found = {id(site.base): site for site in sites}
    pairs = [pair for pair in tied_pairs(modules) if any(id(m) in found for _, m in pair)]
    if not pairs:
        raise InjectionError("ensure_weight_tying: the targets name no embedding or output head that shares its weight; leave it out")
    for (names, embedding), (head_names, head) in pairs:
        if reason := AdaptedEmbedding.refuses(embedding) or AdaptedLinear.refuses(head):
            raise InjectionError(f"{names[0]} and {head_names[0]} cannot share an adapter: {reason}.")
        delta = delta_for(names[0])
        if delta is None or delta != delta_for(head_names[0]):
            raise InjectionError(f"{names[0]} and {head_names[0]} share one adapter: give both the same rank, at least 1, and alpha.")
        try:
            site = Site(head_names, head, TiedHead, turned(delta))
        except DoesNotFit as error:
            raise InjectionError(str(error)) from error
        sites = [s for s in sites if s.base not in (embedding, head)]
        sites += [found.get(id(embedding)) or Site(names, embedding, AdaptedEmbedding, delta), site]
    return sites


# -- what else is trained -----------------------------------------------------------------------------------------------------------


def saved_whole(config: Targets, module: nn.Module) -> list[nn.Parameter]:
    """Parameters of `modules_to_save`. Sharing a weight with a module that is not named would train that one too."""
    if not config.modules_to_save:
        return []
    chosen = [m for names, m in names_of_modules(module) if any(config.saves(n) for n in names)]
    params = {id(p): p for m in chosen for p in m.parameters()}
    for name, p in module.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if id(p) in params and not any(config.saves(prefix) for prefix in prefixes(owner)):
            raise InjectionError(
                f"modules_to_save: {name} is the same tensor as one of {config.modules_to_save}, and would be trained "
                "with it. Name both modules, or build the model with untied weights."
            )
    return list(params.values())


def biases_of(config: Targets, module: nn.Module, sites: Sequence[Site]) -> list[nn.Parameter]:
    """The biases that `bias` trains: none, all of the model, or those of the adapted layers."""
    if config.bias == "all":
        return [p for name, p in module.named_parameters() if name == "bias" or name.endswith(".bias")]
    if config.bias == "lora_only":
        return [b for site in sites if isinstance(b := getattr(site.base, "bias", None), nn.Parameter)]
    return []
