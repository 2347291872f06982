"""A PEFT directory, read into our `LoRA` method: its config checked field by field, its keys sorted by what they are.

[Note: which layers an adapter has]
A reader asks the tensors, not `target_modules`: the file holds factors of exactly the adapted layers, whereas the list
means different layers in different models ("all-linear", layer filters, exclusions). PEFT ends at the same layers, since it
wrote them.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from d9d_lora.methods.dora import MAGNITUDE
from d9d_lora.methods.lora import LoRA, LoRAConfig
from d9d_lora.state.names import PEFT_PREFIX, clean
from d9d_lora.state.peft_config import CONFIG, WEIGHTS, AdapterError, meaning, pattern_of, targets_of
from d9d_lora.state.safetensors_dir import PICKLES, open_checkpoint
from d9d_lora.targets import by_name, hint
from d9d_lora.walk import names_of_modules

# Fields with which the same tensors give another output. Each is refused unless it has one of these values.
_REFUSED: dict[str, tuple[Any, str]] = {
    "use_qalora": ((None, False), "QA-LoRA pools its input"),
    "use_bdlora": ((None, False), "block-diagonal factors are not known here"),
    "alora_invocation_tokens": ((None, []), "aLoRA is on for a part of the tokens only"),
    "arrow_config": ((None,), "Arrow mixes several adapters"),
    "kasa_config": ((None,), "KaSA truncates the base weights"),
    "velora_config": ((None,), "VeLoRA is not known here"),
    "monteclora_config": ((None,), "MonteCLoRA samples its factors"),
    "ensure_weight_tying": ((None, False), "one adapter for two tied layers is not known here"),
    "target_parameters": ((None, []), "adapters of bare parameters (fused experts) are not known here"),
    "trainable_token_indices": ((None, [], {}), "trained rows of an embedding are not known here"),
}
# Starts after which the base weights are not the published ones: PEFT changes them again at every load.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_HARMLESS = {
    "layer_replication",
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_bias", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@dataclass
class Parts:
    """The keys of an adapter file, by what they are."""

    factors: dict[str, dict[str, str]] = field(default_factory=dict)  # layer -> {"A" or "B": key}
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


def parts_of(keys: Iterable[str]) -> Parts:
    """Sorts the keys of an adapter file.

    Raises:
        AdapterError: for keys that no LoRA adapter has, and for a factor without its partner.
    """
    parts, strange = Parts(), []
    for key in sorted(keys):
        name = key.removeprefix(PEFT_PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name):
            if name == key or bool(match[2]) == bool(match[4]):  # linear layers have `.weight`, embeddings have not
                strange.append(key)
            parts.factors.setdefault(match[1], {})[match[3]] = key
            parts.lookups |= {match[1]} if match[2] else set()
        elif name != key and name.endswith(".lora_B.bias"):
            parts.shifts[name.removesuffix(".lora_B.bias")] = key
        elif name != key and name.endswith(f".{MAGNITUDE}"):
            parts.magnitudes[name.removesuffix(f".{MAGNITUDE}")] = key
        elif name == key or re.search(r"(^|\.)(lora_|token_adapter\.|modules_to_save\.)", name):
            strange.append(key)
        elif name.endswith(".base_layer.weight"):
            parts.base_copies[name.removesuffix(".base_layer.weight")] = key
        elif name.endswith(".base_layer.bias"):
            parts.biases[name.removesuffix(".base_layer.bias")] = key
        else:
            parts.others[name] = key
    halves = [pair for pair in parts.factors.values() if len(pair) == 1]
    strange += [key for pair in halves for key in pair.values()]
    beside = [*parts.base_copies.items(), *parts.biases.items(), *parts.magnitudes.items(), *parts.shifts.items()]
    strange += [key for la, key in beside if la not in parts.factors]
    if strange:
        raise AdapterError(
            f"{sorted(strange)[:5]} are no keys of a LoRA adapter, or lack their partner: expected {PEFT_PREFIX}<layer>."
            "lora_A.weight with .lora_B.weight, lora_embedding_A with _B, and names of the base model after the prefix"
        )
    return parts


def read_adapter_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT directory, checked. Fields that leave the output as it is are let through.

    Raises:
        AdapterError: if it is missing, broken, of another method, or has a field under which the same tensors would mean
            another model; the message names the field.
    """
    root = Path(path)
    if not root.is_dir():
        raise AdapterError(f"{root} is {'a file' if root.exists() else 'not there'}; expected a directory with {CONFIG}")
    if not (root / CONFIG).is_file():
        raise AdapterError(f"{root} holds no {CONFIG}: expected a PEFT directory, found {_listing(root)}")
    if not (root / WEIGHTS).is_file():
        pickled = any(p.suffix in PICKLES for p in root.iterdir())
        mend = "Pickle runs code, so it is never read here: save it again as safetensors." if pickled else "Save it again."
        raise AdapterError(f"{root} holds no {WEIGHTS}, found {_listing(root)}. {mend}")
    try:
        config = json.loads((root / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{root / CONFIG} is not JSON: {error}. Download or save it again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{root / CONFIG}: expected a JSON object, got a {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{root / CONFIG}: peft_type is {config.get('peft_type')!r}; only 'LORA' is known here")
    _check_fields(config, str(root / CONFIG))
    return config


def _check_fields(config: dict[str, Any], where: str) -> None:
    faults = [f"{name} = {config[name]!r}: {why}" for name, (same, why) in _REFUSED.items() if name in config and config[name] not in same]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_MOVES_BASE):
        faults.append(
            f"init_lora_weights = {start!r}: it has moved the base weights; convert the adapter to a plain one "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for name in sorted(config.keys() - _HARMLESS - _REFUSED.keys()):
        if config[name] not in (None, False, [], {}):
            faults.append(f"{name} = {config[name]!r}: no field that is known here, so it may change the result")
    for name, kinds in {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float)}.items():
        value = config.get(name, 0 if name == "lora_dropout" else None)
        number = isinstance(value, kinds) and not isinstance(value, bool)  # type: ignore[arg-type]
        if not number or (name == "r" and config["r"] < 1):
            faults.append(f"{name} = {value!r}: expected a number" + (" of at least 1" if name == "r" else ""))
    for name in ("rank_pattern", "alpha_pattern"):
        faults += _pattern_faults(name, config.get(name) or {})
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        faults.append(f"bias = {config['bias']!r}: expected 'none', 'all' or 'lora_only'")
    if faults:
        raise AdapterError(f"{where} cannot be followed:\n  " + "\n  ".join(faults))


def _pattern_faults(name: str, pattern: Any) -> list[str]:
    if not isinstance(pattern, dict):
        return [f"{name} = {pattern!r}: expected an object"]
    faults = []
    for key, value in pattern.items():
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            faults.append(f"{name}: {key!r} is no regular expression: {error}")
        number = isinstance(value, int if name == "rank_pattern" else (int, float)) and not isinstance(value, bool)
        if not number or (name == "rank_pattern" and value < 1):
            faults.append(f"{name}: {key!r} has the value {value!r}")
    return faults


def _listing(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())[:8]


@dataclass(frozen=True)
class LayerMeaning:
    """What a PEFT directory says of one adapted layer."""

    r: int
    alpha: float
    scaling: float


def meanings(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Parts, dict[str, LayerMeaning]]:
    """(config, keys, what each layer's rank and scaling are) of a PEFT directory, ranks compared with the tensors."""
    config = read_adapter_config(path)
    with open_checkpoint(Path(path) / WEIGHTS) as files:
        parts = parts_of(files.names())
        found, faults = {}, []
        for layer, pair in parts.factors.items():
            r, scaling = meaning(config, layer)
            shapes = files.shape(pair["A"]), files.shape(pair["B"])
            if any(len(shape) != 2 for shape in shapes) or (shapes[0][0], shapes[1][1]) != (r, r):
                faults.append(f"{layer}: A {shapes[0]} and B {shapes[1]}, expected [{r}, in] and [out, {r}]")
            magnitude = files.shape(parts.magnitudes[layer]) if layer in parts.magnitudes else None
            expected = shapes[1][:1] if config.get("use_dora") else None
            if magnitude != expected:
                faults.append(f"{layer}: {MAGNITUDE} {magnitude}, expected {expected}, as use_dora is {config.get('use_dora')}")
            alpha = by_name(config.get("alpha_pattern") or {}, layer, config["lora_alpha"])
            found[layer] = LayerMeaning(r, alpha, scaling)
    if faults:
        raise AdapterError(f"{path}: the tensors are not of the ranks the config gives them:\n  " + "\n  ".join(faults[:12]))
    if not found:
        raise AdapterError(f"{path}: the file holds no adapter at all, only {sorted(parts.others)[:5]}")
    return config, parts, found


def method_of(path: str | os.PathLike[str], model: nn.Module | None = None) -> LoRA:
    """The `LoRA` method of a PEFT directory; inject it, then `load_adapter_weights`.

    Args:
        path: The directory.
        model: The base model, if it is at hand: layers that it lacks are then an error here, and names are shortened.

    Raises:
        AdapterError: for what cannot be read, or does not fit the model.
    """
    config, parts, layers = meanings(path)
    targets: list[str] | str = sorted(layers)
    if model is not None:
        names = [clean(f"{n}.")[:-1] for ns, _ in names_of_modules(model) for n in ns]
        if config.get("layer_replication"):  # the layers there will be, not those there are
            names = sorted(layers)
        if lacking := sorted(set(layers) - set(names)):
            raise AdapterError(f"{path} adapts {lacking[:5]}, which this model does not have{hint(lacking[:5], names)}")
        targets = targets_of(list(layers), names)
    bias = config.get("bias", "none")
    # biases by themselves are what `bias` means; without it they belong to modules that are trained whole
    loose = [] if bias == "all" else [name.rpartition(".")[0] for name in parts.others]
    whole = sorted({*parts.whole, *loose})
    r, alpha = config["r"], float(config["lora_alpha"])
    ranks, alphas = {n: m.r for n, m in layers.items()}, {n: float(m.alpha) for n, m in layers.items()}
    return LoRA(
        LoRAConfig.model_validate(
            {
                "target_modules": targets,
                "rank_pattern": pattern_of(ranks, r),
                "alpha_pattern": pattern_of(alphas, alpha),
                "modules_to_save": whole or None,
                "bias": bias,
                "layer_replication": config.get("layer_replication") or None,
                "params": {
                    "r": r,
                    "alpha": alpha,
                    "dropout": config.get("lora_dropout") or 0.0,
                    "scaling": "rslora" if config.get("use_rslora") else "lora",
                    "use_dora": bool(config.get("use_dora")),
                    "lora_bias": bool(config.get("lora_bias")),
                },
            }
        )
    )
