"""What the directories of VeRA and RandLoRA share: two frozen bases for all layers, drawn from `projection_prng_key`.

    base_model.<A>, base_model.<B>      the bases, whole, if `save_projection`; else whoever reads draws them

[Note: bases of another machine]
The bases of a file are taken as they are, to the bit, whatever the key draws here: they are what the trained numbers mean, and PEFT
does the same. Without them in the file the key has to give them, so bases that it does not give are never left out of one.

PEFT's RandLoRA also writes both bases again under the name of every layer: gigabytes for a large model, all alike. They are read if
they are equal, and not written. PEFT then warns that they are missing, and has the right ones all the same: its layers share them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from d9d_lora.layers import AdaptedConv1D, AdaptedLayer, AdaptedLinear
from d9d_lora.placement import at_least_fp32
from d9d_lora.state.names import PEFT_PREFIX
from d9d_lora.state.peft_config import AdapterError, layer_names, targets_of
from d9d_lora.state.peft_kinds.dialect import Dialect, Entry, Parts, Reading
from d9d_lora.state.safetensors_dir import CheckpointFiles

KEY, SAVED = "projection_prng_key", "save_projection"


class OnLinear(Dialect):
    """A method that PEFT has on linear layers and GPT-2's Conv1D."""

    layers = (AdaptedLinear, AdaptedConv1D)

    def targets(self, model: nn.Module, layers: Sequence[AdaptedLayer]) -> dict[str, Any]:
        """The fields of the config that say which layers there are, and of what kind."""
        return {
            "fan_in_fan_out": any(isinstance(layer, AdaptedConv1D) for layer in layers),
            "target_modules": targets_of([layer.name for layer in layers], layer_names(model)),
        }


class Projected(OnLinear):
    """A method whose layers share two frozen bases.

    Attributes:
        bases: Their names, in the model as in the file.
        repeats: Those that a file of PEFT holds once more for every layer.
    """

    bases: ClassVar[tuple[str, str]]
    repeats: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[Mapping[str, tuple[type | tuple[type, ...], float]]] = {"r": (int, 1), KEY: (int, 0)}

    def check(self, config: dict[str, Any], layer: AdaptedLayer) -> None:
        delta: Any = layer.delta
        for name, mine in {"r": delta.r, KEY: delta.key}.items():
            if config[name] != mine:
                raise AdapterError(f"{layer.name}: the config says {name} = {config[name]}; the layer has {mine}")

    def entries(self, path: str, layer: AdaptedLayer, config: dict[str, Any]) -> list[Entry]:
        self.check(config, layer)
        return self.same(path, layer)

    def shared_entries(self, model: nn.Module, layers: Sequence[AdaptedLayer], config: dict[str, Any]) -> list[Entry]:
        factors = layers[0].shared
        if config.get(SAVED, True):
            every = {f"base_model.{name}": f for name, f in factors.items()}
            return [Entry(key, None, (f.weight,), tuple(f.weight.shape), at_least_fp32, take=f.take) for key, f in every.items()]
        if foreign := [name for name, factor in factors.items() if not factor.is_drawn()]:
            raise AdapterError(
                f"{foreign} are not what {KEY} = {config[KEY]} draws here: they came from a file. They must be in the file: {SAVED}: true"
            )
        return []

    def take(self, parts: Parts, name: str, key: str) -> bool:
        layer, _, factor = name.rpartition(".")
        return (bool(layer) and factor in self.repeats) or super().take(parts, name, key)

    def repeated(self, files: CheckpointFiles, layers: Sequence[AdaptedLayer]) -> set[str]:
        found = {f"{PEFT_PREFIX}{layer.name}.{name}": f"base_model.{name}" for layer in layers for name in self.repeats}
        found = {key: of for key, of in found.items() if key in files.names()}
        wholes = {of: files.read(of) for of in set(found.values()) if of in files.names()}
        for key, of in found.items():
            if of not in wholes or not torch.equal(files.read(key), wholes[of]):
                raise AdapterError(f"{key!r} is not {of!r}, which all layers share; this file is broken")
        return set(found)

    def check_bases(self, reading: Reading) -> None:
        """That the bases are in the file if the config says so, and only then. Raises AdapterError."""
        saved = bool(reading.config.get(SAVED, True))
        there = sorted(reading.parts.shared)
        if there != (sorted(self.bases) if saved else []):
            raise AdapterError(
                f"{reading.path}: {SAVED} is {saved}, so the file should hold {self.bases if saved else 'no bases'}, and it holds "
                f"{there or 'none'}. Set {SAVED} as the file is, if that is how it was trained"
            )
