"""What of a model a PEFT directory holds: the factors of its adapted layers, and of the rest what is trained, as PEFT divides it.

    base_model.model.<layer>.<factor>               as `peft_kinds/` spells them, a file a `peft_type`
    base_model.model.<layer>.base_layer.bias        a trained bias of an adapted layer
    base_model.model.<name>                         everything else that is trained: biases, modules trained whole

`trained_of` lists it; `describe` makes the config for it and the tensors, checked against each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.state.names import BASE, PEFT_PREFIX, clean
from d9d_lora.state.peft_config import COMMON, TARGETING, AdapterError
from d9d_lora.state.peft_kinds import Dialect, Entry, dialect_of
from d9d_lora.targets import named
from d9d_lora.walk import names_of_modules


@dataclass(frozen=True)
class Trained:
    """What an adapter directory holds of a model."""

    dialect: Dialect
    layers: dict[str, AdaptedLayer]  # path in the model -> layer, in the order of their names
    beside: list[Entry]  # biases, and modules trained whole
    bias: str
    whole: list[str]  # modules trained whole

    @property
    def adapted(self) -> list[AdaptedLayer]:
        return list(self.layers.values())

    def entries(self, model: nn.Module, config: dict[str, Any]) -> list[Entry]:
        """Every tensor of a file with this config, in the order of their keys."""
        found = [entry for path, layer in self.layers.items() for entry in self.dialect.entries(path, layer, config)]
        found += [*self.dialect.shared_entries(model, self.adapted, config), *self.beside]
        return sorted(found, key=lambda entry: entry.key)


def trained_of(model: nn.Module) -> Trained:
    """Factors always; of the rest what requires a gradient, as PEFT divides it: biases, and modules trained whole."""
    modules = [(clean(f"{names[0]}.")[:-1], names[0], m) for names, m in names_of_modules(model)]
    adapted = sorted(((path, m) for _, path, m in modules if isinstance(m, AdaptedLayer)), key=lambda item: item[1].name)
    layers = dict(adapted)
    if not layers:
        raise AdapterError(
            "the model has no adapter, so there is nothing that PEFT's formats could hold. "
            "Modules trained whole alone are exported as a merged model."
        )
    if several := next((layer for layer in layers.values() if layer.others()), None):
        raise AdapterError(
            f"{several.name} has the adapters {', '.join(several.adapters_by_name())}, and a directory holds one: write each inside "
            "`with only_adapter(model, name)`"
        )
    dialect = dialect_of(list(layers.values()))
    biases: dict[str, tuple[str, nn.Parameter]] = {}  # key in the file -> (name in the model, bias)
    whole: dict[str, tuple[str, nn.Module]] = {}
    for clear, path, m in modules:
        if isinstance(m, AdaptedLayer):
            for name, p in m.base.named_parameters():
                if name == "bias":
                    biases[f"{PEFT_PREFIX}{m.name}.base_layer.bias"] = (f"{path}.{BASE}.bias", p)
                elif p.requires_grad:
                    raise AdapterError(
                        f"{m.name}.{name} is trained beside its own adapter ({m.delta}); PEFT's format has no place for "
                        "it. Freeze it, or train the module whole without an adapter."
                    )
            continue
        own = dict(m.named_parameters(recurse=False))
        if any(p.requires_grad for name, p in own.items() if name != "bias") and not _is_shared(m, layers.values()):
            whole[clear] = (path, m)
        elif "bias" in own:
            biases[f"{PEFT_PREFIX}{clear}.bias"] = (f"{path}.bias", own["bias"])
    mode = _bias_mode(biases)
    if mode != "none" and dialect.bias is None:
        raise AdapterError(f"biases are trained ({mode}), and PEFT's {dialect.peft_type} has no field for them. Leave `bias` out")
    tensors: dict[str, tuple[str, Tensor]] = {}
    for key, (path, p) in biases.items():
        if mode == "all" or (mode == "lora_only" and key.endswith(".base_layer.bias")):
            tensors[key] = (path, p)
        elif p.requires_grad:
            owner, clear = path.rpartition(".")[0], key.removeprefix(PEFT_PREFIX).rpartition(".")[0]
            whole[clear] = (owner, model.get_submodule(owner))
    for clear, (path, m) in whole.items():
        tensors |= _all_of(clear, path, m)
    beside = [Entry(key, name, (t,), tuple(t.shape)) for key, (name, t) in sorted(tensors.items())]
    return Trained(dialect, layers, beside, mode, sorted(whole))


def holds_all(model: nn.Module) -> bool:
    """Whether a PEFT directory can hold what is trained of this model: its adapters, and all beside them."""
    try:
        trained_of(model)
    except AdapterError:
        return False
    return True


def _is_shared(m: nn.Module, layers: Iterable[AdaptedLayer]) -> bool:
    """Whether a module holds what layers share, and not something of the model's own."""
    return any(m is factor for layer in layers for factor in layer.shared.values())


def describe(
    model: nn.Module, trained: Trained, facts: Any, base: str | None, task_type: str | None
) -> tuple[dict[str, Any], list[Entry]]:
    """(adapter_config.json, the tensors), checked against each other. JSON types only."""
    dialect = trained.dialect
    config = {**COMMON, **TARGETING, **dialect.fields, **dialect.describe(model, trained.adapted, facts)}
    config |= {"peft_type": dialect.peft_type, "base_model_name_or_path": base, "task_type": task_type}
    config["modules_to_save"] = trained.whole or None
    if dialect.bias:
        config["bias"] = dialect.bias if trained.bias == "lora_only" else trained.bias
    _check(dialect, config, trained.adapted)
    return config, trained.entries(model, config)


def _check(dialect: Dialect, config: dict[str, Any], layers: Sequence[AdaptedLayer]) -> None:
    """That PEFT's reading of a config gives every layer what it has, and trains none of them whole."""
    targets = config["target_modules"] or []
    targets = targets if isinstance(targets, str) else frozenset(targets)
    parameters = frozenset(config.get("target_parameters") or ())
    for layer in layers:
        dialect.check(config, layer)
        wanted = named(layer.name, targets) or layer.name in parameters
        if not wanted and not hasattr(layer, "embedding"):  # a tied head is found by its embedding
            raise AdapterError(f"{layer.name} is adapted, and target_modules does not select it")
        # PEFT compares these by the end of the text, without a dot
        if eaten := [m for m in config["modules_to_save"] or [] if layer.name.endswith(m)]:
            raise AdapterError(f"modules_to_save {eaten} ends the name of the adapted layer {layer.name}: PEFT copies it whole")


def _bias_mode(biases: dict[str, tuple[str, nn.Parameter]]) -> str:
    """PEFT knows three sets of trained biases: none, the adapted layers', and every one in the model."""
    adapted = {key for key in biases if key.endswith(".base_layer.bias")}
    live = {key for key, (_, p) in biases.items() if p.requires_grad}
    if live == biases.keys() and live - adapted:
        return "all"
    return "lora_only" if live & adapted else "none"


def _all_of(clear: str, path: str, m: nn.Module) -> dict[str, tuple[str, Tensor]]:
    if not clear or any(isinstance(child, AdaptedLayer) for child in m.modules()):
        raise AdapterError(
            f"a parameter of {clear or 'the model itself'!r} is trained, and that module also holds adapted layers: PEFT "
            "saves whole modules only, and cannot copy this one. Freeze the parameter, or export the merged model."
        )
    state: list[tuple[str, Tensor]] = [*m.named_parameters(recurse=False)]
    state += [(n, b) for n, b in m.named_buffers(recurse=False) if n not in m._non_persistent_buffers_set]
    return {f"{PEFT_PREFIX}{clear}.{name}": (f"{path}.{name}", tensor) for name, tensor in state}
