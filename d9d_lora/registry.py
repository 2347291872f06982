"""`kind` -> (config class, method class). Third parties add a kind by installing a package with an entry point, no fork needed:

    [project.entry-points."d9d_lora.methods"]
    my_kind = "my_package:MyMethod"          # a PeftMethod with `kind` and `config_class`
"""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pydantic import BaseModel

GROUP = "d9d_lora.methods"

# The catalogue: a new method is one file and one row. Named by module, so that a registry imports nothing it is not asked for.
BUILT_IN = {
    "lora": ("d9d_lora.methods.lora", "LoRAConfig", "LoRA"),
    "adalora": ("d9d_lora.methods.adalora", "AdaLoRAConfig", "AdaLoRA"),
    "dora": ("d9d_lora.methods.lora", "DoRAConfig", "LoRA"),
    "loha": ("d9d_lora.methods.loha", "LoHaConfig", "LoHa"),
    "lokr": ("d9d_lora.methods.lokr", "LoKrConfig", "LoKr"),
    "vblora": ("d9d_lora.methods.vblora", "VBLoRAConfig", "VBLoRA"),
    "vera": ("d9d_lora.methods.vera", "VeRAConfig", "VeRA"),
    "randlora": ("d9d_lora.methods.randlora", "RandLoRAConfig", "RandLoRA"),
    "full_tune": ("d9d_lora.methods.full_tune", "FullTuneConfig", "FullTune"),
    "stack": ("d9d_lora.methods.stack", "PeftStackConfig", "PeftStack"),
}


@cache
def _installed() -> dict[str, Any]:
    return {e.name: e for e in entry_points(group=GROUP)}


def kinds() -> list[str]:
    """Every known kind, built in and installed."""
    return sorted({*BUILT_IN, *_installed()})


def resolve(kind: str) -> tuple[type[BaseModel], type]:
    """(config class, method class) of a kind."""
    if kind in BUILT_IN:
        module, config, method = BUILT_IN[kind]
        return getattr(import_module(module), config), getattr(import_module(module), method)
    if kind in _installed():
        method_class = _installed()[kind].load()
        config_class = getattr(method_class, "config_class", None)
        if config_class is None:
            raise TypeError(f"entry point {kind!r}: {method_class.__name__} has no `config_class`; set it to its pydantic config")
        return config_class, method_class
    near = get_close_matches(str(kind), kinds(), n=1)
    raise ValueError(f"unknown kind {kind!r}" + (f"; did you mean {near[0]!r}?" if near else "") + f"; known kinds: {', '.join(kinds())}")


def config_from(config: BaseModel | Mapping[str, Any]) -> BaseModel:
    """A validated config from a mapping with its `kind`; a config object passes as it is."""
    if isinstance(config, BaseModel):
        return config
    if not isinstance(config, Mapping) or "kind" not in config:
        raise ValueError(f"a PEFT config needs a `kind`, one of {', '.join(kinds())}; got {config!r}")
    return resolve(config["kind"])[0].model_validate(dict(config))


def peft_method_from_config(config: BaseModel | Mapping[str, Any]):  # type: ignore[no-untyped-def]  # -> PeftMethod
    """The method of a config object, or of a plain mapping with its `kind`.

    Raises:
        ValueError: for an unknown kind (the message lists the kinds) or an invalid config.
    """
    config = config_from(config)
    return resolve(config.kind)[1].from_config(config)  # type: ignore[attr-defined]
