"""The kinds of PEFT directory, one file a `peft_type`, one row in `DIALECTS`.

A dialect (`dialect.py`) says, without any state:

    to write    refuses(layer)                 why PEFT has no such adapter, or None
                disagreement(layers)           why one config cannot hold them all, or None
                facts(layers)                  what it must know of the values of factors (collective), if anything
                describe(model, layers, facts) its config fields, with `target_modules`
                check(config, layer)           that PEFT's reading of the config gives this layer what it has
    both ways   entries(path, layer, config)   an `Entry` a tensor: key in the file, name in the model, and the change of layout, if any
                shared_entries(...)            the same for what all layers share
    to read     faults(config)                 fields that cannot be followed
                take(parts, name, key)         which keys are factors, and of which layer
                method(reading)                our method, from the config and the keys
                repeated(files, layers)        keys that may be there and say nothing new
                filled(layers, config)         what is left to do once all is read

What they all have in common stands once elsewhere: biases and modules trained whole (`peft_trained.py`), tensors gathered and written
(`peft_save.py`), read, copies of base weights compared (`peft_load.py`), files opened and keys sorted (`peft_read.py`). A new kind is a
subclass and a row here. An adapter belongs to the first dialect that has no refusal; a file, to that of its `peft_type`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from d9d_lora.layers import AdaptedLayer
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_kinds.adalora import AdaLoRADialect
from d9d_lora.state.peft_kinds.dialect import Dialect, Entry, Parts, Reading
from d9d_lora.state.peft_kinds.loha import LoHaDialect
from d9d_lora.state.peft_kinds.lokr import LoKrDialect
from d9d_lora.state.peft_kinds.lora import LoRADialect
from d9d_lora.state.peft_kinds.randlora import RandLoRADialect
from d9d_lora.state.peft_kinds.vblora import VBLoRADialect
from d9d_lora.state.peft_kinds.vera import VeRADialect

__all__ = ["DIALECTS", "Dialect", "Entry", "Parts", "Reading", "dialect_named", "dialect_of", "holds"]

DIALECTS: dict[str, Dialect] = {
    dialect.peft_type: dialect
    for dialect in (
        LoRADialect(),
        AdaLoRADialect(),
        LoHaDialect(),
        LoKrDialect(),
        VBLoRADialect(),
        VeRADialect(),
        RandLoRADialect(),
    )
}


def dialect_of(layers: Sequence[AdaptedLayer]) -> Dialect:
    """The dialect that holds the adapters of all these layers. Raises AdapterError that says which layer it cannot hold, and why."""
    kinds = {dialect.kind: dialect for dialect in DIALECTS.values()}
    dialect = kinds.get(layers[0].delta.kind)
    mend = "Save it in our own format (`save_trained`), or export the merged model"
    if dialect is None:
        raise AdapterError(f"{layers[0].name} has a {layers[0].delta.kind!r} adapter, and PEFT's formats hold {sorted(kinds)}. {mend}")
    for layer in layers:
        if reason := dialect.refuses(layer):
            raise AdapterError(f"{layer.name}: {reason}. {mend}")
    if reason := dialect.disagreement(layers):
        raise AdapterError(f"{reason}. Train them alike. {mend}")
    return dialect


def dialect_named(peft_type: Any, where: str) -> Dialect:
    """The dialect of a `peft_type`. Raises AdapterError."""
    if not isinstance(peft_type, str) or peft_type not in DIALECTS:
        raise AdapterError(f"{where}: peft_type is {peft_type!r}; only {sorted(DIALECTS)} are known here")
    return DIALECTS[peft_type]


def holds(layers: Iterable[AdaptedLayer]) -> bool:
    """Whether one PEFT directory can hold the adapters of all these layers."""
    layers = list(layers)
    try:
        return bool(layers) and dialect_of(layers) is not None
    except AdapterError:
        return False
