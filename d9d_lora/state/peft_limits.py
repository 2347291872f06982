"""What no honest `adapter_config.json` says: ranks that would take the memory, expressions that would take years, names that act.

These limits hold for every method of PEFT's. Whether a field has a meaning here is the method's own question.
"""

import re
from collections.abc import Iterable
from typing import Any

from d9d_lora.patterns import MAX_PATTERNS, NotLinear, check_key, refuse_costly
from d9d_lora.state.untrusted import shown

MAX_RANK = 1 << 16
MAX_LOKR = 1 << 24  # LoKr's users give a rank beyond every layer to mean "do not decompose"
MAX_LAYERS = 2000  # of a model that `layer_replication` stacks anew
_RANKS = ("r", "init_r", "target_r")
_ALPHAS = ("lora_alpha", "alpha")
_MODULE = re.compile(r"[\w\-]+(\.[\w\-]+)*")


def strange_names(names: Iterable[str]) -> list[str]:
    """Those that no module or parameter has. A name is put into regular expressions and near misses, so it must be a plain one."""
    return sorted(name for name in names if not _MODULE.fullmatch(name))


def huge_numbers(config: dict[str, Any]) -> list[str]:
    """Numbers that neither a float nor a tensor's size can be, each with its field."""
    return [f"{path} = {shown(value)}: no number is that large" for path, value in _numbers(config, "") if abs(value) > 2**64]


def absurdities(config: dict[str, Any]) -> list[str]:
    """The fields that are out of all bounds, each with what was expected."""
    faults = huge_numbers(config)
    most = MAX_LOKR if config.get("peft_type") == "LOKR" else MAX_RANK
    values = [(name, config[name]) for name in (*_RANKS, *_ALPHAS) if name in config]
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict):
            faults.append(f"{field} = {shown(pattern)}: expected an object")
            continue
        if len(pattern) > MAX_PATTERNS:
            faults.append(f"{field} has {len(pattern)} entries, which take too long to match; at most {MAX_PATTERNS} are read")
            continue
        for key, value in pattern.items():
            values.append((f"{field}[{shown(key)}]", value))
            try:
                check_key(key)
            except NotLinear as error:
                faults.append(f"{field}: {shown(key)} is no regular expression that is followed out of a file: {error}")
    for name, value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _RANKS or name.startswith("rank_pattern"):
            if isinstance(value, float | str | bool) or (number and not 1 <= value <= most):
                faults.append(f"{name} = {shown(value)}: expected an integer of at least 1 and at most {most}")
        elif not number or not 0 < value < 1e300:
            faults.append(f"{name} = {shown(value)}: expected a number above 0")
    return faults + _replication(config.get("layer_replication"))


def _numbers(value: Any, path: str) -> Iterable[tuple[str, int | float]]:
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(part, f"{path}.{shown(key)}" if path else str(key)[:80])
    elif isinstance(value, int | float):
        yield path, value


def _replication(ranges: Any) -> list[str]:
    pairs = isinstance(ranges, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair) for pair in ranges
    )
    if ranges is None or (pairs and sum(max(end - start, 0) for start, end in ranges) <= MAX_LAYERS):
        return []
    return [f"layer_replication = {shown(ranges)}: expected pairs [start, end) of at most {MAX_LAYERS} layers in all"]


def refuse_slow(config: dict[str, Any], layers: Iterable[str]) -> str | None:
    """Why finding every layer's rank and alpha would take too long; None if it does not."""
    layers = list(layers)
    for field in ("rank_pattern", "alpha_pattern"):
        try:
            refuse_costly(config.get(field) or {}, layers)
        except NotLinear as error:
            return f"{field}: {error}"
    return None
