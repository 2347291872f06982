"""Which tensors of a base checkpoint an adapter changes, and how; all of it known from headers, before a weight is read.

    <layer>.weight  +=  s B A        LoRA, W[out, in]; or its transpose, for GPT-2's Conv1D [in, out] and embeddings [V, d]
    <layer>.weight   =  m (W + s B A) / |W + s B A|       DoRA: every row of [out, in] gets the norm m
    <layer>.bias    +=  s b          the bias of B
    <name>           =  value        modules trained whole, and biases

What does not fit is an error here, with nothing written.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d9d_lora.state.peft_config import WEIGHTS, AdapterError
from d9d_lora.state.peft_read import Parts, meanings
from d9d_lora.state.safetensors_dir import CheckpointFiles

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Families whose linear layers are Conv1D: there a square matrix is transposed, whatever a careless config says.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
SHOWN = 8


@dataclass(frozen=True)
class Add:
    """weight += scaling * B A, or its transpose; then, with a magnitude, each row of [out, in] gets that norm."""

    A: str
    B: str
    scaling: float
    turned: bool
    magnitude: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.A, self.B) if self.magnitude is None else (self.A, self.B, self.magnitude)


@dataclass(frozen=True)
class Replace:
    """tensor = the adapter's tensor."""

    key: str


@dataclass(frozen=True)
class Shift:
    """bias += scaling * the bias of B (`lora_bias`); `onto` is the adapter's own bias of the layer, if it was trained."""

    key: str
    scaling: float
    onto: str | None = None


Edit = Add | Replace | Shift


def plan_merge(adapter: Path, files: CheckpointFiles, adapter_files: CheckpointFiles, base_config: dict[str, Any]) -> dict[str, Edit]:
    """The edit of every base tensor that the adapter changes, by the tensor's name in the base's files.

    Raises:
        AdapterError: a key without a base tensor, a shape or dtype that does not fit, or tied embeddings of which the
            adapter changes one side.
    """
    config, parts, layers = meanings(adapter)
    if config.get("layer_replication"):
        raise AdapterError(
            f"layer_replication = {config['layer_replication']}: copies of a layer share one weight and have an adapter each, so no merged "
            "weight can hold them all. Serve the adapter unmerged"
        )
    fan = bool(config.get("fan_in_fan_out"))
    wanted: dict[str, Edit] = {}
    for layer, pair in parts.factors.items():
        magnitude = parts.magnitudes.get(layer)
        wanted[f"{layer}.weight"] = Add(pair["A"], pair["B"], layers[layer].scaling, layer in parts.lookups, magnitude)
    for layer, key in parts.biases.items():
        wanted[f"{layer}.bias"] = Replace(key)
    for layer, key in parts.shifts.items():
        wanted[f"{layer}.bias"] = Shift(key, layers[layer].scaling, parts.biases.get(layer))
    for name, key in parts.others.items():
        wanted[name] = Replace(key)
    if twice := sorted(parts.factors.keys() & {name.rpartition(".")[0] for name in parts.others}):
        raise AdapterError(f"{adapter / WEIGHTS}: {twice[:SHOWN]} have factors and a whole copy as well; which one counts?")
    wanted = _untangle_ties(wanted, files, adapter_files, base_config, parts)
    names = _found(list(wanted), files.names())
    edits = {names[name]: edit for name, edit in wanted.items()}
    edits = _orient(edits, files, adapter_files, fan=fan, family=str(base_config.get("model_type")))
    _same_bases(parts, names, files, adapter_files)
    return edits


def _found(wanted: list[str], there: list[str]) -> dict[str, str]:
    """Names in the adapter -> names in the files, which may lack the model's prefix (`transformer.`) or have one more."""
    present = set(there)
    best: list[str] = []
    for rename in _renames(wanted, there):
        names = {name: name if name in present else rename(name) for name in wanted}
        missing = sorted(name for name, new in names.items() if new not in present)
        if not missing and len(set(names.values())) == len(names):
            return names
        if not best or len(missing) < len(best):
            best = missing
    lines = [f"  {name!r}" + "".join(f", near {n!r}" for n in _near(name, there)) for name in best[:SHOWN]]
    raise AdapterError(
        f"{len(best)} of the adapter's {len(wanted)} targets are in no file of the base model; nothing was written.\n"
        + "\n".join(lines)
        + "\nGive the base that the adapter was trained on (adapter_config.json: base_model_name_or_path)."
    )


def _renames(wanted: Iterable[str], there: Iterable[str]) -> list[Callable[[str], str]]:
    drops = sorted({name.partition(".")[0] for name in wanted})
    adds = sorted({name.partition(".")[0] for name in there})
    ways: list[Callable[[str], str]] = [lambda name: name]
    ways += [lambda name, first=first: name.removeprefix(f"{first}.") for first in drops]  # type: ignore[misc]
    return ways + [lambda name, first=first: f"{first}.{name}" for first in adds]  # type: ignore[misc]


def _near(name: str, there: list[str]) -> list[str]:
    return difflib.get_close_matches(name, there[:2000], n=1)


def _orient(edits: dict[str, Edit], files: CheckpointFiles, adapter_files: CheckpointFiles, *, fan: bool, family: str) -> dict[str, Edit]:
    """Checks every shape, and settles which weights are stored [in, out].

    Shapes tell, but for square matrices: these follow `fan_in_fan_out`, after it was compared with all that shapes tell.
    """
    faults: list[str] = []
    square: list[str] = []
    straight_only: list[str] = []
    turned_only: list[str] = []
    for name, edit in edits.items():
        shape, dtype = files.shape(name), files.dtype(name)
        if dtype not in FLOATS:
            faults.append(f"{name} is stored as {dtype}: a quantised weight cannot take a sum; merge into the original")
            continue
        if not isinstance(edit, Add):
            if adapter_files.shape(edit.key) != shape:
                faults.append(f"{name} is {shape}, the adapter's {edit.key} is {adapter_files.shape(edit.key)}")
            continue
        out, into = adapter_files.shape(edit.B)[0], adapter_files.shape(edit.A)[1]
        straight, turned = shape == (out, into), shape == (into, out)
        if not (turned if edit.turned else straight or turned):
            kind = "an embedding" if edit.turned else "a linear layer"
            faults.append(f"{name} is {shape}; the factors are of {kind} with {into} inputs and {out} outputs")
        elif not edit.turned:
            (square if straight and turned else straight_only if straight else turned_only).append(name)
    if faults:
        raise AdapterError(f"{len(faults)} tensors do not fit; nothing was written:\n  " + "\n  ".join(faults[:SHOWN]))
    if turned_only and not fan:
        raise AdapterError(
            f"{turned_only[:3]} fit only transposed, but adapter_config.json says fan_in_fan_out: false. Set it to true if the "
            "base is a Conv1D model (GPT-2); else this is another base."
        )
    if square and ((fan and straight_only) or (not fan and family in _CONV1D)):
        told = f"fan_in_fan_out: {str(fan).lower()}, {straight_only[:2] or f'model_type: {family}'}"
        raise AdapterError(
            f"{square[:3]} are square, so only fan_in_fan_out can tell how they are stored, and it is contradicted ({told}). "
            "Merge in memory (inject, load_adapter_weights, merge_peft), where the layer itself tells."
        )
    turn = {*turned_only, *(square if fan else ())}
    return {name: replace(edit, turned=True) if isinstance(edit, Add) and name in turn else edit for name, edit in edits.items()}


def _untangle_ties(
    wanted: dict[str, Edit], files: CheckpointFiles, adapter_files: CheckpointFiles, config: dict[str, Any], parts: Parts
) -> dict[str, Edit]:
    """Input embedding and output head that are one weight can only change together.

    A head that is not in the files is dropped from the plan if both sides are replaced by equal values.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    has_head = any(_HEAD.search(name) for name in files.names())
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tied is None:
        tied = not has_head
    if not tied:
        return wanted
    heads = [name for name in wanted if _HEAD.search(name)]
    vocabulary = text.get("vocab_size")
    inputs = []
    for name, edit in wanted.items():
        lookup = isinstance(edit, Add) and edit.turned
        rows = adapter_files.shape(edit.key)[0:1] if isinstance(edit, Replace) else ()
        deep = isinstance(edit, Replace) and len(adapter_files.shape(edit.key)) == 2
        if name not in heads and (lookup or (deep and rows == (vocabulary,))):
            inputs.append(name)
    if not heads and not inputs:
        return wanted
    mend = "Untie the base first (save it with tie_word_embeddings=false and both weights), or serve the adapter unmerged."
    if not heads or not inputs:
        raise AdapterError(
            f"the base ties its input embedding and its output head, and the adapter changes one side only, {(heads or inputs)[0]}: "
            f"the merged weight would change the other side too. Nothing was written. {mend}"
        )
    one, other = wanted[inputs[0]], wanted[heads[0]]
    same = isinstance(one, Replace) and isinstance(other, Replace)
    if not (same and torch.equal(adapter_files.read(one.key), adapter_files.read(other.key))):  # type: ignore[union-attr]
        raise AdapterError(
            f"the base ties {inputs[0]} and {heads[0]}, and the adapter changes them differently: one tensor cannot be both. "
            f"Nothing was written. {mend}"
        )
    return wanted if has_head else {name: edit for name, edit in wanted.items() if name not in heads}


def _same_bases(parts: Parts, names: dict[str, str], files: CheckpointFiles, adapter_files: CheckpointFiles) -> None:
    """PEFT keeps the base weight of an adapted embedding beside the factors; it must be the base's own."""
    for layer, key in parts.base_copies.items():
        name = names[f"{layer}.weight"]
        copy = adapter_files.read(key) if adapter_files.shape(key) == files.shape(name) else None
        if copy is None or not torch.equal(copy.to(files.dtype(name)), files.read(name)):
            raise AdapterError(f"{key!r} is not the base's {name!r}: the adapter was trained on another base; merge into that one")


__all__ = ["FLOATS", "Add", "Edit", "Replace", "Shift", "plan_merge"]
