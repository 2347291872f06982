"""What an adapter's files hold, without the model: which weights have a delta, which delta, and where its factors are.

    PEFT directory, or one .safetensors file of PEFT's      any `peft_type` that is known (`peft_kinds/`)
    directory with method.json                              our own format (`native_format.py`)

A delta is fitted to a weight of which only the shape is known, so an adapted layer is built around an empty weight (`shape_only.py`). It
says the factors' names and shapes, and the format says under which keys they are. A shape can be a weight's or its transpose's; `ways`
gives what agrees with the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from d9d_lora.adapters import AdapterMethod
from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.parameter import SUFFIX
from d9d_lora.layers.shared import SharedFactor
from d9d_lora.method import PeftMethod
from d9d_lora.methods.delta import Delta, DoesNotFit
from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.methods.merged import found as with_slices
from d9d_lora.methods.stack import PeftStack
from d9d_lora.methods.vblora import INDICES, VBLoRADelta, logits_of
from d9d_lora.methods.vblora import WEIGHTS as TOP
from d9d_lora.placement import at_least_fp32
from d9d_lora.state import expert_layouts
from d9d_lora.state.expert_base import outline_of
from d9d_lora.state.merge_edit import Form, Held
from d9d_lora.state.names import BASE
from d9d_lora.state.native_format import METHOD, method_of_trained
from d9d_lora.state.native_format import WEIGHTS as NATIVE
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_kinds import DIALECTS, Dialect
from d9d_lora.state.peft_kinds.lora_meaning import parameters_of
from d9d_lora.state.peft_read import open_weights, read_adapter_config, reading_of
from d9d_lora.state.safetensors_dir import CheckpointFiles, open_checkpoint
from d9d_lora.state.shape_only import layers_of
from d9d_lora.state.untrusted import inside


@dataclass(frozen=True)
class Key:
    """Where a factor is: a tensor of the file, and what makes the factor of it (and of others `beside` it)."""

    key: str
    shape: tuple[int, ...]
    make: Callable[..., Tensor] | None = None
    beside: tuple[tuple[str, tuple[int, ...] | None], ...] = ()


Keys = Callable[[AdaptedLayer], dict[str, Key]]


@dataclass
class Site:
    """A weight that has a delta.

    Attributes:
        name: Of the layer, or of the parameter.
        held: The keys of the file that are its factors.
        lookup: The layer is an embedding; None: the file does not say.
        turned: Of a stack of matrices, whether it is stored [E, in, out]; None: nothing here says.
        base_copy: The base weight, where the file has it.
    """

    name: str
    adapter: "Adapter"
    method: AdapterMethod[Any]
    keys: Keys
    held: frozenset[str]
    lookup: bool | None = False
    parameter: bool = False
    turned: bool | None = None
    base_copy: Held | None = None
    layer: AdaptedLayer | None = None  # once its form is settled: `settle`

    @property
    def tensor(self) -> str:
        return self.name if self.parameter else f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    def ways(self, shape: tuple[int, ...]) -> dict[Form, AdaptedLayer]:
        """The forms in which a weight of this shape would have factors as the file has them, each with its adapted layer, on meta."""
        found: dict[Form, AdaptedLayer] = {}
        for form, kind, base in layers_of(shape, lookup=self.lookup, parameter=self.parameter, transposed=self.turned):
            try:
                layer = kind(base, self.adapter.delta_of(self, base, kind), name=self.name, seed=0)
            except DoesNotFit:
                continue
            keys = self.keys(layer)
            wanted = {k.key: k.shape for k in keys.values()} | {b: s for k in keys.values() for b, s in k.beside}
            shapes = {key: self.adapter.files.shape(key) for key in self.held}
            if wanted.keys() == shapes.keys() and all(s is None or s == shapes[key] for key, s in wanted.items()):
                found[form] = layer
        return found

    def factors(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        """Every factor of the layer, whole; shared ones too."""
        found = {}
        for name, key in self.keys(layer).items():
            value = self.adapter.files.read(key.key)
            found[name] = value if key.make is None else key.make(value, *(self.adapter.files.read(b) for b, _ in key.beside))
        shared = self.adapter.shared_of(self.method) if layer.delta.shared else {}
        return found | {name: shared[name] for name in layer.delta.shared}

    def shift(self, layer: AdaptedLayer) -> Tensor:
        """What is added to the layer's bias; its delta has a shift."""
        given = {name: at_least_fp32(value) for name, value in self.factors(layer).items()}
        return layer.delta.shift(layer.delta.part(given, slice(0, layer.out_size), slice(0, layer.in_size)))


@dataclass
class Adapter:
    """The files of an adapter, open.

    Attributes:
        others: What was trained whole, by its name in the base model.
        fan_in_fan_out: What the config says of how weights are stored; None: nothing.
        ties_alike: The output head has the input embedding's adapter.
    """

    path: Path
    files: CheckpointFiles
    model_config: Mapping[str, Any]
    sites: list[Site] = field(default_factory=list)
    others: dict[str, Held] = field(default_factory=dict)
    shared_keys: dict[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool | None = None
    ties_alike: bool = False
    _shared: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def close(self) -> None:
        self.files.close()

    def delta_of(self, site: Site, base: nn.Module, kind: type[AdaptedLayer]) -> Delta:
        delta = site.method.delta_for(site.name)
        if delta is None:
            raise AdapterError(f"{self.path} has factors of {site.name}, which its config leaves alone")
        if delta.moves_base:
            raise AdapterError(
                f"{site.name}: the start of {delta} moved the base weight, and these files do not hold what it took away. Save it as a "
                "PEFT directory, or write the merged model from the run (save_merged)"
            )
        config = self.model_config.get("text_config", self.model_config)
        return with_slices(delta, SimpleNamespace(config=SimpleNamespace(**config)), kind.geometry(base).out)  # type: ignore[arg-type]

    def shared_of(self, method: AdapterMethod[Any]) -> dict[str, Tensor]:
        """What all layers of a method share: from the file, or drawn anew."""
        if id(method) not in self._shared:
            layers = [site.layer for site in self.sites if site.method is method and site.layer is not None]
            self._shared[id(method)] = {n: self._shared_value(n, factor) for n, factor in method.shared_factors(layers).items()}
        return self._shared[id(method)]

    def _shared_value(self, name: str, factor: SharedFactor) -> Tensor:
        key = self.shared_keys.get(name)
        if key is None and factor.trained:
            raise AdapterError(f"{self.path} does not hold {name}, which all its layers share")
        if key is not None:
            value = self.files.read(key)
            if value.shape != factor.weight.shape:
                raise AdapterError(f"{self.path}: {key!r} is {tuple(value.shape)}, its layers make it {tuple(factor.weight.shape)}")
            return value
        factor.to_empty(device="cpu")
        factor.reset_parameters()
        return factor.weight.detach()


def open_adapter(path: Path, there: list[str], model_config: Mapping[str, Any], model: nn.Module | None = None) -> Adapter:
    """Opens an adapter's files.

    Args:
        there: The names of the base's tensors.
        model: Its model on meta, if it is at hand; it is made where an adapter of bare parameters needs it.

    Raises:
        AdapterError, CheckpointError: what cannot be followed, and why.
    """
    if (path / METHOD).is_file():
        adapter = _open_native(path, there, model_config)
    else:
        adapter = _open_peft(path, model_config, model)
    for site in adapter.sites if model is not None else ():
        if site.parameter:
            site.turned = _turned(model, site.name)
    return adapter


def _turned(model: nn.Module | None, name: str) -> bool | None:
    """How the module itself says that a stack is stored."""
    try:
        owner = model.get_submodule(name.rpartition(".")[0]) if model is not None else None
    except AttributeError:
        return None
    return None if owner is None else bool(getattr(owner, "is_transposed", False))


# -- PEFT's formats ------------------------------------------------------------------------------------------------------------------


def _open_peft(path: Path, model_config: Mapping[str, Any], model: nn.Module | None) -> Adapter:
    config = read_adapter_config(path)
    dialect = DIALECTS[config["peft_type"]]
    if replication := config.get("layer_replication"):
        raise AdapterError(
            f"layer_replication = {replication}: copies of a layer share one weight and have an adapter each, so no merged "
            "weight can hold them all. Serve the adapter unmerged"
        )
    if config.get("target_parameters"):  # [Note: a parameter's key]
        model = model or outline_of(model_config)
    files = open_weights(path)
    try:
        reading = reading_of(path, config, files, model if config.get("target_parameters") else None)
        parts = reading.parts
        try:
            method = dialect.method(reading)
            bare = parameters_of(reading) if config.get("target_parameters") else {}
        except AdapterError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise AdapterError(f"{path}: {error}") from error
        said = config.get("fan_in_fan_out", False) if "fan_in_fan_out" in dialect.fields else None
        adapter = Adapter(path, files, model_config, shared_keys=parts.shared, fan_in_fan_out=None if said is None else bool(said))
        adapter.ties_alike = bool(config.get("ensure_weight_tying"))
        adapter.others = {name: Held(files, key) for name, key in parts.others.items()}
        adapter.others |= {f"{layer}.bias": Held(files, key) for layer, key in parts.biases.items()}
        assert isinstance(method, AdapterMethod)
        heads = {name for name in parts.factors if adapter.ties_alike and not method.config.wants(name)}  # as the embedding
        for name, factors in parts.factors.items():
            if name in heads:
                continue
            if name in bare:
                keys, fused = partial(_fused_keys, factors), frozenset(factors.values())
                adapter.sites.append(Site(bare[name], adapter, method, keys, fused, parameter=True, turned=_turned(model, bare[name])))
                continue
            held = {*factors.values(), *(found[name] for found in (parts.magnitudes, parts.shifts) if name in found)}
            copy = parts.base_copies.get(name)
            adapter.sites.append(
                Site(
                    name,
                    adapter,
                    method,
                    partial(_peft_keys, dialect, config),
                    frozenset(held),
                    lookup=name in parts.lookups,
                    base_copy=None if copy is None else Held(files, copy),
                )
            )
    except BaseException:
        files.close()
        raise
    return adapter


def _fused_keys(factors: Mapping[str, str], layer: AdaptedLayer) -> dict[str, Key]:
    """Of a parameter: a matrix, or a stack of n, whose factors are fused (`expert_layouts.py`)."""
    n = layer.delta.n if isinstance(layer.delta, GroupedDelta) else 1
    out, into, r = layer.out_size // n, layer.in_size, layer.delta.sizes(layer.out_size, layer.in_size)["R"]
    stack = isinstance(layer.delta, GroupedDelta)
    return {
        "lora_A": Key(factors["A"], (n * r, into), partial(expert_layouts.from_fused_A, experts=n) if stack else None),
        "lora_B": Key(factors["B"], (out, r * n), partial(expert_layouts.from_fused_B, experts=n) if stack else None),
    }


def _peft_keys(dialect: Dialect, config: dict[str, Any], layer: AdaptedLayer) -> dict[str, Key]:
    entries = dialect.entries(layer.name, layer, config)
    shapes = {entry.key: entry.shape for entry in entries}
    found = {}
    for entry in entries:
        if entry.name is not None:
            factor = entry.name.removesuffix(".weight").rpartition(".")[2]
            found[factor] = Key(entry.key, entry.shape, entry.from_file, tuple((b, shapes.get(b)) for b in entry.beside))
    return found


# -- our own format --------------------------------------------------------------------------------------------------------------------


def _open_native(path: Path, there: list[str], model_config: Mapping[str, Any]) -> Adapter:
    method = method_of_trained(path)
    methods = [m for m in _flat(method) if isinstance(m, AdapterMethod)]
    files = open_checkpoint(inside(path, path / NATIVE))
    try:
        adapter = Adapter(path, files, model_config)
        adapter.ties_alike = any(m.config.ensure_weight_tying for m in methods)
        known = _Known(there)
        layers: dict[str, set[str]] = {}
        strange = []
        for key in files.names():
            name = key.removesuffix(".weight")
            owner, _, factor = name.rpartition(".")
            stem = next((factor.removesuffix(part) for part in (INDICES, TOP) if factor.endswith(part)), None)
            if known(key):
                adapter.others[key] = Held(files, key)
            elif owner.endswith(f".{BASE}") or name.endswith(f".{BASE}.bias"):
                adapter.others[key.replace(f".{BASE}.", ".")] = Held(files, key)
            elif owner and (known(f"{owner}.weight") or known(owner.removesuffix(SUFFIX))) and (key.endswith(".weight") or stem):
                layers.setdefault(owner, set()).add(key)
            elif not owner and key.endswith(".weight"):
                adapter.shared_keys[name] = key
            else:
                strange.append(key)
        if strange:
            raise AdapterError(
                f"{len(strange)} of the adapter's tensors are in no file of the base model, and are no factors of its layers; nothing was "
                f"written: {strange[:5]}. Give the base that the adapter was trained on"
            )
        for owner, held in sorted(layers.items()):
            name = owner.removesuffix(SUFFIX)
            bare = owner != name
            its = next((m for m in methods if (m.config.wants_parameter(name) if bare else m.config.wants(name))), None)
            if its is None:
                raise AdapterError(f"{path}: no method of {METHOD} adapts {name}, and the file has factors of it: {sorted(held)[:3]}")
            adapter.sites.append(Site(name, adapter, its, partial(_native_keys, owner, held), frozenset(held), lookup=None, parameter=bare))
    except BaseException:
        files.close()
        raise
    return adapter


def _flat(method: PeftMethod[Any]) -> list[PeftMethod[Any]]:
    return [inner for m in method.methods for inner in _flat(m)] if isinstance(method, PeftStack) else [method]


class _Known:
    """Whether a name is the base's, which may lack the model's prefix or have one more."""

    def __init__(self, there: list[str]) -> None:
        self.there = set(there)
        self.firsts = {name.partition(".")[0] for name in there}

    def __call__(self, name: str) -> bool:
        return name in self.there or name.partition(".")[2] in self.there or any(f"{first}.{name}" in self.there for first in self.firsts)


def _native_keys(owner: str, held: set[str], layer: AdaptedLayer) -> dict[str, Key]:
    found = {}
    for factor, shape in layer.delta.shapes(layer.out_size, layer.in_size).items():
        small = f"{owner}.{factor}{INDICES}"
        if small in held and isinstance(layer.delta, VBLoRADelta):
            make = partial(logits_of, num_vectors=layer.delta.num_vectors)
            k = layer.delta.topk
            found[factor] = Key(small, (*shape[:-1], k), make, ((f"{owner}.{factor}{TOP}", (*shape[:-1], k - 1)),))
        else:
            found[factor] = Key(f"{owner}.{factor}.weight", shape)
    return found
