"""`adapter_config.json`: what all its kinds have in common, and how a few names and numbers say what every layer has.

What a layer does stands in the layer (rank, alpha, rule), so that a save cannot disagree with the training: the commonest
rank and alpha become the defaults, and every other layer gets an entry of `rank_pattern` or `alpha_pattern`. The fields of each
`peft_type` are in `peft_kinds/`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.parameter import AdaptedParameter
from d9d_lora.state.names import clean
from d9d_lora.targets import by_name, named
from d9d_lora.walk import names_of_modules

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PEFT_VERSION = "0.21.2"  # the version whose names and meanings these are
COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_type": None,
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": None,
}
TARGETING: dict[str, Any] = dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "target_modules"))
N = TypeVar("N", int, float)


class AdapterError(ValueError):
    """An adapter that cannot be written or read as asked: what was expected, what came, and the mend."""


def dump(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def pattern_of(values: dict[str, N], default: N) -> dict[str, N]:
    """The entries of `rank_pattern` or `alpha_pattern` for the layers that differ from the default.

    A key is a regular expression for a dotted end of a name, and the first that matches wins. Plain full names mostly mean
    just themselves; where one would also match another layer, all are anchored and escaped.
    """
    plain = {name: value for name, value in sorted(values.items()) if value != default}
    if all(by_name(plain, name, default) == value for name, value in values.items()):
        return plain
    return {f"^{re.escape(name)}": value for name, value in plain.items()}


def targets_of(adapted: list[str], every: list[str]) -> list[str] | str:
    """The shortest sorted names that select just these layers among all modules; a regular expression as a last resort."""
    for names in (sorted({name.rpartition(".")[2] for name in adapted}), sorted(adapted)):
        of_names = frozenset(names)
        if {name for name in every if named(name, of_names)} == set(adapted):
            return names
    return "|".join(re.escape(name) for name in sorted(adapted))


def layer_names(model: nn.Module) -> list[str]:
    """Every module by its first name, as PEFT walks them; adapted layers by theirs, and nothing inside them."""
    modules = [(ns, m) for ns, m in names_of_modules(model) if not isinstance(m, AdaptedParameter)]
    return [m.name if isinstance(m, AdaptedLayer) else clean(f"{ns[0]}.")[:-1] for ns, m in modules]


def pattern_faults(name: str, pattern: Any) -> list[str]:
    """What is wrong with a `rank_pattern` or `alpha_pattern` of a file."""
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


def commonest(values: Iterable[N]) -> N:
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]))[0]


def plain(number: float) -> int | float:
    """An integer where it is one, as PEFT writes alphas."""
    return int(number) if float(number).is_integer() else number
