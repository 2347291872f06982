"""A PEFT directory read into a model on any layout: each rank the bytes of its own boxes."""

import os
import re
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.placement import local_of
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperParallel, ModelStateMapperRename, StateGroup
from d9d_lora.state.peft_config import COMMON, CONFIG, TARGETING, AdapterError
from d9d_lora.state.peft_kinds import DIALECTS, Entry
from d9d_lora.state.peft_read import open_weights, read_adapter_config
from d9d_lora.state.peft_trained import trained_of
from d9d_lora.state.reader import LoadReport, assemble, load_checkpoint, local_runs, named_state
from d9d_lora.state.safetensors_dir import CheckpointFiles
from d9d_lora.walk import reshard


@torch.no_grad()
def load_adapter_weights(
    model: nn.Module, path: str | os.PathLike[str], *, elsewhere: Collection[str] = (), compare: bool = False
) -> LoadReport:
    """Fills the adapter of a model from a PEFT directory; each rank reads the bytes of its own box only, as far as the layout of a
    tensor in the file is that of the model.

    The model is injected already (by the method that `method_of` makes, say), its base weights are loaded, and it may
    be on any layout. No collective.

    Args:
        elsewhere: Names of the model whose tensors other ranks hold (pipeline stages), on meta here.
        compare: Change nothing, and raise CheckpointError if what is trained here is not to the bit what the file says.

    Raises:
        AdapterError, CheckpointError: unknown, missing and misshapen keys in one message before anything is read; a
            value that is not finite; a copy of a base weight in the file that is not the model's base weight.
    """
    config = read_adapter_config(path)
    config = {**COMMON, **TARGETING, **DIALECTS[config["peft_type"]].fields, **config}  # what is not given has PEFT's default
    reshard(model)
    trained = trained_of(model)
    if trained.dialect.peft_type != config["peft_type"]:
        raise AdapterError(
            f"{path} is {config['peft_type']}, and the model has a {trained.dialect.peft_type} adapter. Inject `method_of(path)` instead"
        )
    if moved := [layer for layer in trained.adapted if layer.delta.moves_base]:
        raise AdapterError(
            f"the start of {moved[0].name} ({moved[0].delta}) moves the base weight, and {path} is for untouched ones. Inject "
            "`method_of(path)` into the base as it was, and load into that"
        )
    for layer in trained.adapted:
        trained.dialect.check(config, layer)  # names and shapes would not tell another scale
    entries = trained.entries(model, config)
    state = dict(named_state(model))
    mine = {entry.name for entry in entries if entry.name is not None}
    ours = {id(state[name]) for name in mine}
    others = {name for name, tensor in state.items() if name not in mine and id(tensor) not in ours}
    mapper = ModelStateMapperParallel([_mapper(entry) for entry in entries if entry.name is not None])
    with open_weights(path) as files:
        present = set(files.names())
        known = {entry.key for entry in entries if entry.name is None and entry.take is None}
        if lacking := sorted(known - present):
            raise AdapterError(f"{path} lacks {lacking[:5]}, which {CONFIG} says it holds. Save it again")
        copies = trained.dialect.sort(files.names()).base_copies
        for layer in trained.adapted:
            if layer.name in copies:
                if not layer.base.weight.is_meta:  # type: ignore[union-attr]  # of another stage
                    _same_base(files, copies[layer.name], layer)
                known.add(copies[layer.name])
        known |= trained.dialect.repeated(files, trained.adapted)
        for entry in entries:
            if entry.expected is not None:
                _same_value(files, entry, entry.expected)
        harmless = [f"^{re.escape(key)}$" for key in sorted(known)]
        sinks = {e.key: (torch.empty(e.shape, device="meta"), e.take) for e in entries if e.take is not None}
        report = load_checkpoint(
            model,
            files,
            mapper,
            skip=others,
            ignore_unexpected=harmless,
            sinks=sinks,
            elsewhere=elsewhere,
            all_or_none=True,
            compare=compare,
        )
    if compare:
        return report
    trained.dialect.filled(trained.adapted, config)
    for layer in trained.adapted:
        layer.started |= not layer.delta.moves_base  # every factor has its value, those that start from the weight too
    return report


class _Made(ModelStateMapper):
    """One tensor of the model from one or more of the file."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        assert self.entry.name is not None
        return frozenset([StateGroup(frozenset([self.entry.key, *self.entry.beside]), frozenset([self.entry.name]))])

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.entry.name is not None
        assert self.entry.from_file is not None
        if tuple(found := group[self.entry.key].shape) != self.entry.shape:
            raise AdapterError(f"expected {self.entry.shape}, the file gives {tuple(found)}")
        return {self.entry.name: self.entry.from_file(*(group[key] for key in (self.entry.key, *self.entry.beside)))}


def _mapper(entry: Entry) -> ModelStateMapper:
    assert entry.name is not None
    return ModelStateMapperRename(entry.key, entry.name) if entry.from_file is None else _Made(entry)


def _same_value(files: CheckpointFiles, entry: Entry, expected: Callable[[CheckpointFiles], Tensor]) -> None:
    """A tensor that is read into nothing must be what the model has there already."""
    if files.shape(entry.key) != entry.shape:
        raise AdapterError(f"{entry.key!r} is {files.shape(entry.key)}, expected {entry.shape}")
    found, wanted = files.read(entry.key), expected(files).cpu()
    if not torch.equal(found.to(wanted.dtype), wanted):
        apart = float((found.double() - wanted.double()).abs().max())
        raise AdapterError(
            f"{entry.key!r} is not what this model has in its place (they differ by up to {apart:.1e}): it is of another adapter, or "
            "was made otherwise"
        )


def _same_base(files: CheckpointFiles, key: str, layer: AdaptedLayer) -> None:
    """PEFT saves the weight of an adapted embedding (and head) beside the factors, and puts it into any model it meets.

    A copy of what the model holds anyway is harmless. One that differs belongs to another base, or was trained itself:
    to load it in silence would change a weight that is frozen here and that no later save would hold.
    """
    weight: Tensor = layer.base.weight  # type: ignore[assignment]
    mend = "Load the base the adapter was trained on (with the same vocabulary), then the adapter."
    if files.shape(key) != tuple(weight.shape):
        raise AdapterError(f"{key!r} is {files.shape(key)}, the base weight of {layer.name} {tuple(weight.shape)}. {mend}")
    part = assemble(lambda box: files.read(key, box), local_runs(weight))
    if not torch.equal(part.to(weight.dtype), local_of(weight).cpu()):
        raise AdapterError(f"{key!r} is not the base weight that {layer.name} has here. {mend}")
