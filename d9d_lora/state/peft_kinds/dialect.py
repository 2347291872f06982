"""One of PEFT's methods as its directory spells it: which of our layers it holds, its config fields, and which key is which factor.

    adapter_config.json            COMMON, the targets, and the dialect's own `fields`
    base_model.model.<layer>.<factor>     one `Entry` a tensor, used both ways: what is written from it, and what it is read into

A dialect has no state. Everything it must know of an adapter stands in the adapted layers (to write) or in the directory (to read).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.tied import TiedHead
from d9d_lora.method import PeftMethod
from d9d_lora.state.names import PEFT_PREFIX, clean
from d9d_lora.state.peft_config import COMMON, TARGETING, AdapterError, pattern_of, targets_of
from d9d_lora.state.safetensors_dir import CheckpointFiles
from d9d_lora.targets import by_name, hint
from d9d_lora.walk import names_of_modules

_ADAPTERS = re.compile(r"(^|\.)(lora_|hada_|lokr_|vera_lambda|randlora_|vblora_|token_adapter\.|modules_to_save\.)")
_WORDS: dict[Any, str] = {int: "an integer", (int, float): "a number", bool: "true or false"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        key: Its name there.
        name: The name of the model's tensor that it is read into. None: it is read into nothing.
        sources: The model's tensors it is made of; whoever saves gathers them whole.
        shape: Its shape in the file.
        to_file: Makes it from the whole `sources`; None: it is the first of them.
        from_file: Makes the whole tensor `name` from it (and from `beside`); None: it is that.
        beside: Further keys that `from_file` needs, each with an entry of its own.
        expected: Of a tensor that is read into nothing: what it must be in a file that is not for another model.
        take: Of a tensor that is read into nothing: what is given the whole of it instead (frozen bases).
    """

    key: str
    name: str | None
    sources: tuple[Tensor, ...]
    shape: tuple[int, ...]
    to_file: Callable[..., Tensor] | None = None
    from_file: Callable[..., Tensor] | None = None
    beside: tuple[str, ...] = ()
    expected: Callable[[CheckpointFiles], Tensor] | None = None
    take: Callable[[Tensor], None] | None = None


@dataclass
class Parts:
    """The keys of an adapter file, by what they are."""

    factors: dict[str, dict[str, str]] = field(default_factory=dict)  # layer -> {factor: key}; LoRA's are "A" and "B"
    shared: dict[str, str] = field(default_factory=dict)  # name of what all layers share -> key
    lookups: set[str] = field(default_factory=set)  # layers of `factors` that are embeddings
    shifts: dict[str, str] = field(default_factory=dict)  # layer -> key of the bias of its B (`lora_bias`)
    magnitudes: dict[str, str] = field(default_factory=dict)  # layer -> key of its DoRA magnitude
    base_copies: dict[str, str] = field(default_factory=dict)  # layer -> key of a copy of its base weight
    biases: dict[str, str] = field(default_factory=dict)  # adapted layer -> key of its bias
    others: dict[str, str] = field(default_factory=dict)  # name in the base model -> key

    @property
    def whole(self) -> list[str]:
        """The modules that are trained whole, as far as more than a bias of theirs is in the file."""
        return sorted({name.rpartition(".")[0] for name in self.others if name.rpartition(".")[2] != "bias"})


@dataclass
class Reading:
    """A directory that is being read.

    Attributes:
        model: The base model, if it is at hand.
    """

    path: Path
    config: dict[str, Any]
    parts: Parts
    files: CheckpointFiles
    model: nn.Module | None = None

    @property
    def layers(self) -> list[str]:
        return sorted(self.parts.factors)

    def targeting(self, layers: Sequence[str]) -> dict[str, Any]:
        """The fields of `Targets` with which a method adapts just these layers, and trains what else the file holds.

        Raises:
            AdapterError: if the model is at hand and lacks one of them.
        """
        targets: list[str] | str | None = sorted(layers) or None
        if self.model is not None:
            names = [clean(f"{n}.")[:-1] for ns, _ in names_of_modules(self.model) for n in ns]
            if self.config.get("layer_replication"):  # the layers there will be, not those there are
                names = sorted(layers)
            if lacking := sorted(set(layers) - set(names)):
                raise AdapterError(f"{self.path} adapts {lacking[:5]}, which this model does not have{hint(lacking[:5], names)}")
            targets = targets_of(list(layers), names) if layers else None
        bias = self.config.get("bias", "none")
        # biases by themselves are what `bias` means; without it they belong to modules that are trained whole
        loose = [] if bias == "all" else [name.rpartition(".")[0] for name in self.parts.others]
        return {
            "target_modules": targets,
            "modules_to_save": sorted({*self.parts.whole, *loose}) or None,
            "bias": bias if bias in ("none", "all") else "lora_only",
        }

    def by_layer(self, pattern: str, default: str, layers: Iterable[str]) -> dict[str, Any]:
        """The value of a field for every layer, where `pattern` may give a layer another than the field `default`."""
        return {layer: by_name(self.config.get(pattern) or {}, layer, self.config[default]) for layer in layers}

    def patterns(self, default_r: str, default_alpha: str, layers: Iterable[str]) -> dict[str, Any]:
        """`rank_pattern` and `alpha_pattern` with entries for these layers only, each meaning no other layer."""
        layers = list(layers)
        ranks = self.by_layer("rank_pattern", default_r, layers)
        alphas = {n: float(a) for n, a in self.by_layer("alpha_pattern", default_alpha, layers).items()}
        return {
            "rank_pattern": pattern_of(ranks, self.config[default_r]),
            "alpha_pattern": pattern_of(alphas, float(self.config[default_alpha])),
        }


class Dialect(ABC):
    """A `peft_type`. Subclasses are stateless; `peft_kinds.DIALECTS` holds one object of each.

    Attributes:
        peft_type: As in `adapter_config.json`.
        kind: The `kind` of the deltas that it holds.
        layers: The kinds of adapted layers that it holds.
        fields: Every field of PEFT's config class beside `COMMON` and `TARGETING`, with its default there.
        refused: Fields with which the same tensors give another output: the values that do not, and why.
        numbers: Fields that must be given: the type, and the least value.
        factors: The factors as the file calls them: `base_model.model.<layer>.<factor>`.
        shared: Keys outside any layer -> the name of what layers share.
        ties: It holds an output head that shares the adapter of an embedding.
        bias: PEFT's word for "the adapted layers' biases"; None: its config has no field `bias`.
    """

    peft_type: ClassVar[str]
    kind: ClassVar[str]
    layers: ClassVar[tuple[type[AdaptedLayer], ...]]
    fields: ClassVar[Mapping[str, Any]]
    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    numbers: ClassVar[Mapping[str, tuple[type | tuple[type, ...], float]]] = {}
    factors: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[Mapping[str, str]] = {}
    ties: ClassVar[bool] = False
    bias: ClassVar[str | None] = None

    # -- writing -------------------------------------------------------------------------------------------------------------

    def refuses(self, layer: AdaptedLayer) -> str | None:
        """Why PEFT has no such adapter, as a sentence; None if it has."""
        if layer.delta.kind != self.kind:
            return f"it has a {layer.delta.kind!r} adapter, and {self.peft_type} holds {self.kind!r} only"
        if not isinstance(layer, self.layers) or (isinstance(layer, TiedHead) and not self.ties):
            return f"PEFT has no {self.peft_type} on a {type(layer.base).__name__}"
        return None

    def disagreement(self, layers: Sequence[AdaptedLayer]) -> str | None:
        """Why one config cannot hold all these layers, each of which it could; None if it can."""
        return None

    def facts(self, layers: Sequence[AdaptedLayer]) -> Any:
        """What `describe` must know of the values of factors. Collective: every rank asks, before anything is written."""
        return None

    @abstractmethod
    def describe(self, model: nn.Module, layers: Sequence[AdaptedLayer], facts: Any) -> dict[str, Any]:
        """The values of `fields` that are not PEFT's defaults, such that PEFT builds these layers. Local to a rank."""

    @abstractmethod
    def check(self, config: dict[str, Any], layer: AdaptedLayer) -> None:
        """That PEFT's reading of the config gives this layer what it has. Raises AdapterError."""

    @abstractmethod
    def entries(self, path: str, layer: AdaptedLayer, config: dict[str, Any]) -> list[Entry]:
        """The tensors of a layer, which is `path` in the model, in a file with this config. Local to a rank."""

    def shared_entries(self, model: nn.Module, layers: Sequence[AdaptedLayer], config: dict[str, Any]) -> list[Entry]:
        """The tensors that all layers share."""
        return []

    def same(self, path: str, layer: AdaptedLayer) -> list[Entry]:
        """Entries for factors that are in the file as they are in the layer, under their own names."""
        shapes = layer.delta.shapes(layer.out_size, layer.in_size)
        return [
            Entry(f"{PEFT_PREFIX}{layer.name}.{name}", f"{path}.{name}.weight", (p,), shapes[name]) for name, p in layer.factors().items()
        ]

    # -- reading -------------------------------------------------------------------------------------------------------------

    def faults(self, config: dict[str, Any]) -> list[str]:
        """The fields of a config that cannot be followed, each with the reason."""
        faults = [f"{n} = {config[n]!r}: {why}" for n, (fine, why) in self.refused.items() if n in config and config[n] not in fine]
        for name in sorted(config.keys() - COMMON.keys() - TARGETING.keys() - self.fields.keys() - ({"bias"} if self.bias else set())):
            if config[name] not in (None, False, [], {}):
                faults.append(f"{name} = {config[name]!r}: no field that is known here, so it may change the result")
        for name, (kinds, least) in self.numbers.items():
            value: Any = config.get(name)
            if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value:  # type: ignore[operator]
                faults.append(f"{name} = {value!r}: expected {_WORDS.get(kinds, 'a number')} of at least {least:g}")
        for name, default in self.fields.items():
            value = config.get(name)
            start = name.startswith("init_") and isinstance(value, str)  # of a name: "false" is true to Python
            if isinstance(default, bool) and not (isinstance(value, bool | None) or start) and name not in self.refused:
                faults.append(f"{name} = {value!r}: expected true or false")
        if self.bias and config.get("bias", "none") not in ("none", "all", self.bias):
            faults.append(f"bias = {config['bias']!r}: expected 'none', 'all' or {self.bias!r}")
        return faults

    def take(self, parts: Parts, name: str, key: str) -> bool:
        """Puts a key into `parts` if it is a factor's; `name` is the key without the prefix."""
        layer, _, factor = name.rpartition(".")
        if not layer or factor not in self.factors:
            return False
        parts.factors.setdefault(layer, {})[factor] = key
        return True

    def lacking(self, parts: Parts) -> list[str]:
        """Keys that mean nothing without another that is not there."""
        return []

    def sort(self, keys: Iterable[str]) -> Parts:
        """Sorts the keys of a file.

        Raises:
            AdapterError: for keys that no adapter of this type has, and those that lack their partner.
        """
        parts, strange = Parts(), []
        for key in sorted(keys):
            name = key.removeprefix(PEFT_PREFIX)
            if key in self.shared:
                parts.shared[self.shared[key]] = key
            elif name != key and self.take(parts, name, key):
                pass
            elif name == key or "." not in name or _ADAPTERS.search(name):
                strange.append(key)
            elif name.endswith(".base_layer.weight"):
                parts.base_copies[name.removesuffix(".base_layer.weight")] = key
            elif name.endswith(".base_layer.bias"):
                parts.biases[name.removesuffix(".base_layer.bias")] = key
            else:
                parts.others[name] = key
        strange += self.lacking(parts)
        beside = [*parts.base_copies.items(), *parts.biases.items()]
        strange += [key for layer, key in beside if layer not in parts.factors]
        if strange:
            raise AdapterError(
                f"{sorted(strange)[:5]} are no keys of a {self.peft_type} adapter, or lack their partner: expected {self.spelling()}, "
                "and names of the base model after the prefix"
            )
        return parts

    def spelling(self) -> str:
        """The keys of a layer, for messages."""
        return f"{PEFT_PREFIX}<layer>." + ", .".join(self.factors)

    def repeated(self, files: CheckpointFiles, layers: Sequence[AdaptedLayer]) -> set[str]:
        """Keys of a file that repeat others, and may be left out. Raises AdapterError for one that says something else."""
        return set()

    def filled(self, layers: Sequence[AdaptedLayer], config: dict[str, Any]) -> None:  # noqa: B027
        """Called once a directory with this config has been read into the layers."""

    @abstractmethod
    def method(self, reading: Reading) -> PeftMethod[Any]:
        """Our method with which the layers of the directory are adapted as PEFT does. Raises AdapterError for what does not fit."""
