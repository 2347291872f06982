"""A PEFT directory, or one file with its config inside, read into one of our methods.

    DIRECTORY/adapter_config.json + adapter_model.safetensors
    FILE.safetensors, with the text of adapter_config.json under `adapter_config` in the header's metadata

The config is checked field by field, and the keys are sorted by what they are; both by the dialect of its `peft_type` (`peft_kinds/`).

[Note: which layers an adapter has]
A reader asks the tensors, not `target_modules`: the file holds factors of exactly the adapted layers, whereas the list
means different layers in different models ("all-linear", layer filters, exclusions). PEFT ends at the same layers, since it
wrote them.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from d9d_lora.method import PeftMethod
from d9d_lora.state.peft_config import CONFIG, WEIGHTS, AdapterError
from d9d_lora.state.peft_kinds import DIALECTS, Parts, Reading, dialect_named
from d9d_lora.state.peft_kinds.lora_meaning import LayerMeaning, layer_meanings
from d9d_lora.state.peft_limits import absurdities, refuse_slow, strange_names
from d9d_lora.state.safetensors_dir import PICKLES, CheckpointFiles, open_checkpoint, read_header
from d9d_lora.state.untrusted import inside, parse_json, read_json, shown

__all__ = ["LayerMeaning", "Parts", "meanings", "method_of", "open_weights", "parts_of", "read_adapter_config", "reading_of"]

IN_HEADER = "adapter_config"  # in the metadata of a single file


def parts_of(keys: Iterable[str], peft_type: str = "LORA") -> Parts:
    """Sorts the keys of an adapter file.

    Raises:
        AdapterError: for keys that no adapter of this type has, and for a factor without its partner.
    """
    return dialect_named(peft_type, "parts_of").sort(keys)


def read_adapter_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT directory, or of a single file, checked. Fields that leave the output as it is are let through.

    Raises:
        AdapterError: if it is missing, broken, of a type that is not known, or has a field under which the same tensors would mean
            another model; the message names the field.
    """
    root = Path(path)
    if root.is_file() and root.suffix == ".safetensors":
        where = f"{root}, {IN_HEADER} in its header"
        said = read_header(root)[1].get(IN_HEADER)
        if said is None:
            raise AdapterError(f"{root} has no {IN_HEADER} in its header: put {CONFIG} beside it and give the directory")
        config = parse_json(said.encode(), where, AdapterError)
    else:
        where = str(root / CONFIG)
        _expect_directory(root)
        inside(root, root / WEIGHTS)
        inside(root, root / CONFIG)
        config = read_json(root / CONFIG, error=AdapterError)
    dialect = dialect_named(config.get("peft_type"), where)
    if faults := absurdities(config) or dialect.faults(config):
        raise AdapterError(f"{where} cannot be followed:\n  " + "\n  ".join(fault[:400] for fault in faults[:20]))
    return config


def _expect_directory(root: Path) -> None:
    if not root.is_dir():
        kind = "a file" if root.exists() else "not there"
        raise AdapterError(f"{root} is {kind}; expected a directory with {CONFIG}, or a .safetensors file")
    if not (root / CONFIG).is_file():
        raise AdapterError(f"{root} holds no {CONFIG}: expected a PEFT directory, found {_listing(root)}")
    if not (root / WEIGHTS).is_file():
        pickled = any(p.suffix in PICKLES for p in root.iterdir())
        mend = "Pickle runs code, so it is never read here: save it again as safetensors." if pickled else "Save it again."
        raise AdapterError(f"{root} holds no {WEIGHTS}, found {_listing(root)}. {mend}")


def _listing(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())[:8]


def open_weights(path: str | os.PathLike[str]) -> CheckpointFiles:
    """The tensors of an adapter: those of a directory, or of a single file."""
    return open_checkpoint(Path(path) / WEIGHTS if Path(path).is_dir() else path)


def meanings(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Parts, dict[str, LayerMeaning]]:
    """(config, keys, what each layer's rank and scaling are) of a LoRA directory whose factors are matrices of layers.

    For conversions from file to file, which have no model.

    Raises:
        AdapterError: for other types, adapters of bare parameters and of convolutions, and ranks that the tensors have not.
    """
    config = read_adapter_config(path)
    if config["peft_type"] != "LORA":
        raise AdapterError(f"{path} is {config['peft_type']}; this reads LORA only. Load it into its model, and merge or export that")
    with open_weights(path) as files:
        reading = reading_of(path, config, files)
        parts = reading.parts
        what = f"{config['target_parameters'][:3]} are bare parameters" if config.get("target_parameters") else None
        kernels = [layer for layer, pair in parts.factors.items() if len(files.shape(pair["A"])) > 2]
        if kernels and not what:
            what = f"{kernels[:3]} are convolutions"
        if what:
            raise AdapterError(f"{path}: {what}, which only their model can read. Load the adapter into it, and merge or export that")
        return config, parts, layer_meanings(reading)


def method_of(path: str | os.PathLike[str], model: nn.Module | None = None) -> PeftMethod[Any]:
    """The method of a PEFT directory; inject it, then `load_adapter_weights`.

    Args:
        path: The directory, or the single file.
        model: The base model, if it is at hand: layers that it lacks are then an error here, and names are shortened.

    Raises:
        AdapterError: for what cannot be read, or does not fit the model.
    """
    config = read_adapter_config(path)
    dialect = DIALECTS[config["peft_type"]]
    with open_weights(path) as files:
        reading = reading_of(path, config, files, model)
        try:
            return dialect.method(reading)
        except AdapterError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise AdapterError(f"{path}: {error}") from error


def reading_of(path: str | os.PathLike[str], config: dict[str, Any], files: CheckpointFiles, model: nn.Module | None = None) -> Reading:
    """A file's keys sorted, after what no honest file has is refused: names that are expressions, factors that are no floats.

    Raises:
        AdapterError: which keys, and what was expected.
    """
    if strange := strange_names(files.names()):
        raise AdapterError(f"{path}: {shown(strange)} cannot be the names of parameters: expected words with dots between them")
    parts = DIALECTS[config["peft_type"]].sort(files.names())
    if config["peft_type"] != "VBLORA":  # which has numbers of vectors among its factors
        kinds = {key: files.dtype(key) for factors in parts.factors.values() for key in factors.values()}
        if odd := [f"{key!r} is {dtype}" for key, dtype in kinds.items() if not dtype.is_floating_point]:
            raise AdapterError(f"{path}: {odd[:5]}; expected a floating-point dtype. Save it again")
    if slow := refuse_slow(config, parts.factors):
        raise AdapterError(f"{path}: {slow}")
    return Reading(Path(path), config, parts, files, model)
