"""An adapter file that a run starts from (`model.adapter`): what it is, whether it is what `peft` asks for, and its numbers.

    announce   the layers and deltas that the file's method would inject, and those that `peft` would: equal, or an error that names
               each difference; nothing has been changed then
    fill       each rank reads its part of the file
    prove      each rank reads it once more before the first step, and compares it with what it is about to train

A checkpoint of the run itself goes first: the file is then where the run began, and not where it is.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from d9d_lora.adapters import AdapterMethod
from d9d_lora.files import GGUF
from d9d_lora.method import PeftMethod
from d9d_lora.methods.adalora import AdaLoRA
from d9d_lora.methods.delta import Delta
from d9d_lora.methods.full_tune import FullTune
from d9d_lora.methods.stack import PeftStack
from d9d_lora.methods.vblora import VBLoRADelta
from d9d_lora.sites import biases_of, saved_whole
from d9d_lora.state.atomic import RanksFailed, decided, together
from d9d_lora.state.native_format import METHOD, load_trained, method_of_trained
from d9d_lora.state.native_format import WEIGHTS as TRAINED
from d9d_lora.state.peft_config import CONFIG, WEIGHTS, AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.reader import LoadReport, named_state
from d9d_lora.state.safetensors_dir import CheckpointError
from d9d_lora.train import model as models
from d9d_lora.train.checks import AdapterFault
from d9d_lora.train.config import ModelConfig, RunConfig
from d9d_lora.walk import adapted_layers

OWN = "peft=from_adapter takes what the adapter says of itself"
# How factors begin without a file, and how they are disturbed in training: a run's own affair. `outer`: PEFT's file has a copy for
# each expert, and the reader takes them for one factor only if they are equal.
FREE = {
    *("init", "zero", "loftq_iter", "init_weights", "logits_std", "bank_bound", "d_initial", "given"),
    *("dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "save_projection", "small", "outer"),
}
SHOWN = 5


class Start:
    """The adapter of `model.adapter`.

    Attributes:
        path: As it was given: a PEFT directory, a .safetensors file with its config inside, a directory of ours, or a .gguf adapter.
        digest: SHA-256 of its content, from rank 0: a resumed run must have begun with the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Raises AdapterError: there is nothing that could be read, or only with what is not given."""
        assert config.adapter is not None
        self.path, self._base = Path(config.adapter), config
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._readable = self._as_peft() if self.path.suffix == GGUF else self.path
        self._ours = (self.path / METHOD).is_file()
        try:
            self.digest: str = decided("fingerprinting the adapter", self._hash)
        except RanksFailed as error:
            raise AdapterError(f"model.adapter={self.path} cannot be read: {error}") from error

    def _as_peft(self) -> Path:
        from d9d_lora.export.gguf import gguf_to_peft

        if self._base.path is None:
            raise AdapterError(f"model.adapter={self.path}: a GGUF adapter goes by the config.json of its base; give model.path")
        self._folder = tempfile.TemporaryDirectory()  # each rank makes its own
        directory = Path(self._folder.name) / "adapter"
        gguf_to_peft(self.path, models.local_directory(self._base.path), directory)
        return directory

    def _hash(self) -> str:
        names = (METHOD, TRAINED) if self._ours else (CONFIG, WEIGHTS)
        digest = hashlib.sha256()
        for file in [self.path / name for name in names] if self.path.is_dir() else [self.path]:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:32]

    def method(self, model: nn.Module | None) -> PeftMethod[Any]:
        """The method that the file describes. `model`: the bare base, if it is at hand."""
        return method_of_trained(self.path) if self._ours else method_of(self._readable, model)

    # -- announce ------------------------------------------------------------------------------------------------------------

    def check(self, method: PeftMethod[Any], model: nn.Module, *, own: bool) -> None:
        """That the run's method fits the file. `model`: bare, on meta or not. `own`: the method is the file's.

        Raises:
            AdapterError: for what cannot go on from a file; and each difference, as expected by `peft`, as it came, and the mend.
        """
        where = f"model.adapter={self.path}"
        if method.surveys:
            raise AdapterError(f"{where}: peft asks for a start from data (eva, corda), and the adapter is one already. {OWN}")
        if any(isinstance(part, AdaLoRA) for part in parts_of(method)):
            raise AdapterError(
                f"{where} with kind adalora: its schedule has given out the ranks in the run that made the file, and a second one is not "
                "proven. Merge the adapter into the base and train another on that, or resume a checkpoint of its run"
            )
        if own:
            return
        theirs = self.method(model)
        if replicated := [p for m in (method, theirs) for p in parts_of(m) if getattr(p.config, "layer_replication", None)]:
            raise AdapterError(f"{where}: layer_replication {replicated[0].config.layer_replication} is not compared with peft. {OWN}")
        asked, came = announced(method, model), announced(theirs, model)
        if moving := sorted(name for name, delta in asked.items() if isinstance(delta, Delta) and delta.moves_base):
            raise AdapterError(
                f"{where}: the start that peft asks for ({asked[moving[0]]}) moves the base weight, and a file is for weights as they "
                f"were. {OWN}: the same model, as plain LoRA"
            )
        if lines := differences(asked, came):
            raise AdapterError(f"{where} is not what peft asks for:\n  " + "\n  ".join(lines) + f"\nGive peft the adapter's values; {OWN}")

    # -- fill and prove --------------------------------------------------------------------------------------------------------

    def fill(self, model: nn.Module, whole: AbstractContextManager[Any] | None = None) -> LoadReport:
        """Reads this rank's part of the file into the adapter, on any layout. No collective.

        Args:
            whole: Where the model is cut into stages, what makes it whole again, with the tensors of other ranks on meta.
        """
        try:
            with whole or nullcontext():
                report = self._load(model)
        except (AdapterError, CheckpointError) as error:
            raise AdapterError(f"model.adapter={self.path} was not loaded: {error}") from error
        for layer in adapted_layers(model):
            if isinstance(layer.delta, VBLoRADelta) and layer.delta.chosen:
                raise AdapterError(f"model.adapter={self.path} has the chosen vectors only (save_only_topk_weights): it cannot be trained")
            layer.started |= not layer.delta.moves_base
        return report

    def prove(self, model: nn.Module, whole: AbstractContextManager[Any] | None = None) -> None:
        """Raises AdapterFault on every rank if what some rank is about to train is not what the file says, to the bit. Collective."""

        def look() -> None:
            with whole or nullcontext():
                self._load(model, compare=True)

        try:
            together("comparing the adapter with its file", look)
        except RanksFailed as error:
            raise AdapterFault(f"before the first step the adapter is not that of model.adapter={self.path}: {error}") from error

    def _load(self, model: nn.Module, *, compare: bool = False) -> LoadReport:
        state = list(named_state(model))
        elsewhere = {name for name, t in state if t.is_meta and (t.requires_grad or not isinstance(t, nn.Parameter))}
        if self._ours:
            return load_trained(model, self.path, elsewhere=elsewhere, compare=compare)
        return load_adapter_weights(model, self._readable, elsewhere=elsewhere, compare=compare)


def with_method(config: RunConfig, start: Start | None, outline: nn.Module | None) -> RunConfig:
    """The config with a method: where it has none, the adapter's."""
    if config.peft is not None:
        return config
    assert start is not None  # the config has been checked
    own: BaseModel = start.method(outline).config  # type: ignore[attr-defined]
    return config.model_copy(update={"peft": own})


def outline_of(config: ModelConfig, dtype: torch.dtype) -> nn.Module | None:
    """The bare model on meta, to name layers by; None of a callable, which may be costly to call."""
    if config.target is not None:
        return None
    return models.open_model(config.model_copy(update={"quantise": None}), dtype).module


# -- what a method would do ---------------------------------------------------------------------------------------------------------


def parts_of(method: PeftMethod[Any]) -> list[Any]:
    return [m for part in method.methods for m in parts_of(part)] if isinstance(method, PeftStack) else [method]


def announced(method: PeftMethod[Any], model: nn.Module) -> dict[str, Any]:
    """What the method would train of a bare model: layer -> its delta; a parameter trained whole -> "whole"."""
    found: dict[str, Any] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for part in parts_of(method):
        if isinstance(part, AdapterMethod):
            sites, _ = part.sites(model)
            found |= {site.names[0]: site.delta for site in sites}
            beside = [*biases_of(part.config, model, sites), *saved_whole(part.config, model)]
        elif isinstance(part, FullTune):
            beside = part.matched(model)
        else:
            continue  # of a package of somebody else's: the reader compares names and shapes
        found |= {names[id(p)]: "whole" for p in beside}
    return found


def differences(asked: Mapping[str, Any], came: Mapping[str, Any]) -> list[str]:
    """Every way in which two announcements differ, with the number of layers and the first of them."""
    lines = [
        f"{_some(sorted(one.keys() - other.keys()))} only in {where}"
        for where, one, other in (("peft", asked, came), ("the adapter", came, asked))
        if one.keys() - other.keys()
    ]
    kinds: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name in asked.keys() & came.keys():
        mine, theirs = meaning(asked[name]), meaning(came[name])
        unlike = [k for k in sorted({**mine, **theirs}) if not _alike(mine.get(k), theirs.get(k))]
        if unlike:
            told = ", ".join(f"{k} {mine.get(k)}, came {theirs.get(k)}" for k in unlike)
            kind = f"peft asks for {asked[name]}, the adapter is {came[name]} (expected {told})"
            kinds[kind] += 1
            first[kind] = min(name, first.get(kind, name))
    return lines + [f"{first[kind]}{f' and {n - 1} more' if n > 1 else ''}: {kind}" for kind, n in sorted(kinds.items())]


def meaning(delta: Any) -> dict[str, Any]:
    """What a delta's factors stand for, as far as a file settles it: kind, scaling, and every field that is not `FREE`."""
    if not isinstance(delta, Delta):
        return {"method": delta}
    found: dict[str, Any] = {"method": type(delta).__name__.removesuffix("Delta"), "scaling": delta.scaling}
    assert is_dataclass(delta)
    for field in fields(delta):
        value = getattr(delta, field.name)
        if isinstance(value, Delta):
            inner = meaning(value)
            found |= {**inner, "method": f"{found['method']} of {inner['method']}"}
        elif field.compare and field.name not in FREE and field.name not in ("alpha", "rule"):  # they make the scaling
            found[field.name] = value
    return found


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-12 * abs(one)
    return bool(one == other)


def _some(names: list[str]) -> str:
    return json.dumps(names[:SHOWN])[1:-1].replace('"', "") + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
