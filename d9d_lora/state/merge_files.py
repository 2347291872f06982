"""Merges an adapter into a base checkpoint, file to file, in memory for a few row blocks, whatever the model's size.

    base shard  --row blocks-->  W + dW in fp32, rounded once  -->  the same shard: names, order, metadata
    config, tokenizer, generation settings  -->  copied              every shard is read back; the directory appears when all are there

No model is built, so it works for every architecture whose adapter names its tensors. What a tensor becomes is `merge_plan`, its arithmetic
`merge_edit`, the directory that survives a kill `merge_work`.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from d9d_lora.state.merge_edit import FLOATS, Add, Output, Shift
from d9d_lora.state.merge_plan import Plan, plan_merge
from d9d_lora.state.merge_work import Shard, build, refuse_existing
from d9d_lora.state.peft_config import CONFIG, AdapterError
from d9d_lora.state.safetensors_dir import INDEX, PICKLES, CheckpointError, CheckpointFiles, open_checkpoint
from d9d_lora.state.untrusted import MAX_JSON, inside, open_regular, read_json

_WEIGHTS = {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", *PICKLES}
# What a tokenizer consists of: taken from the adapter's directory where the adapter brings a vocabulary of its own.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class MergeReport:
    """`merged` tensors took a sum, `replaced` ones a new value, `copied` ones are as they were.

    Attributes:
        kept: Shards that an earlier call, which was killed, had finished.
        notes: What a user should know: why older work was thrown away, a vocabulary that has grown.
    """

    merged: int
    replaced: int
    copied: int
    seconds: float
    kept: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = f"{self.merged} tensors merged, {self.replaced} replaced, {self.copied} copied, in {self.seconds:.1f} s"
        return words + (f"; {self.kept} finished shards of an earlier call were kept" if self.kept else "")


@torch.no_grad()
def merge_files(
    adapter: str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    dequantise: bool = False,
) -> MergeReport:
    """Writes the merged model as a Hugging Face directory with the layout of the base's.

    A call that was killed leaves its finished shards in `.tmp_<output>`; the same call goes on from there.

    Args:
        adapter: A PEFT directory, ours or PEFT's, one of `save_trained`, or a .safetensors or .gguf file of `save_adapter`.
        model: The base's directory, with safetensors.
        output: A directory that does not exist; it appears when everything in it has been read back, or not at all.
        dtype: Of all floating-point tensors of the output; None keeps each tensor's own.
        dequantise: Merge into a quantised base all the same: its weights are unpacked, and the output is a plain model.

    Raises:
        AdapterError, CheckpointError: what does not fit; nothing is written then.
    """
    started = time.perf_counter()
    adapter, model, output = Path(adapter), Path(model), Path(output).absolute()
    refuse_existing(output)
    check_dtype(dtype)
    if not model.is_dir():
        raise CheckpointError(f"{model} is no directory. Expected that of the base model, with config.json and weights.")
    config = read_json(inside(model, model / "config.json"))
    with (
        _as_peft(adapter, config) as readable,
        open_checkpoint(model) as files,
        plan_merge(readable, files, config, dequantise=dequantise) as plan,
    ):
        result = Output(plan.base, plan.edits, dtype)
        result.check_finite()
        shards = [shard for file in files.files() if (shard := _shard(model, file, plan, result)).promises]

        def beside(root: Path) -> None:
            copy_beside(model, root)
            if plan.vocabulary is not None:
                _copy_tokenizer(adapter, root)
            tell_config(root, plan.config, dtype, plan.vocabulary)
            tell_index(root, shards, sum(math.prod(files.shape(n)) * files.dtype(n).itemsize for n in files.names()))

        inputs = {"adapter": _digest(adapter), "base": _fingerprint(model, files), "dtype": str(dtype), "dequantise": dequantise}
        built = build(output, shards, result.values, beside, inputs)
        notes = [f"started anew: {built.anew}"] if built.anew else []
        return report_of(result, started, sum(len(shard.promises) for shard in shards), built.kept, [*notes, *plan.notes])


@contextlib.contextmanager
def _as_peft(adapter: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The adapter in a form that is read here; llama.cpp's is converted."""
    if adapter.suffix != ".gguf":
        yield adapter
        return
    from d9d_lora.export.gguf import gguf_to_peft

    with tempfile.TemporaryDirectory() as folder:
        gguf_to_peft(adapter, config, Path(folder) / "adapter")
        yield Path(folder) / "adapter"


def check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise AdapterError(f"dtype {dtype} cannot hold merged weights; expected one of {[str(d) for d in FLOATS]}")


def report_of(result: Output, started: float, tensors: int, kept: int = 0, notes: list[str] | None = None) -> MergeReport:
    added = sum(isinstance(edit, Add | Shift) for edit in result.edits.values())
    replaced = len(result.edits) - added
    return MergeReport(added, replaced, tensors - added - replaced, time.perf_counter() - started, kept, tuple(notes or ()))


def _shard(model: Path, file: Path, plan: Plan, result: Output) -> Shard:
    with safe_open(str(file), framework="pt") as handle:
        names, metadata = handle.offset_keys(), handle.metadata()
    promises = tuple(result.promise(name) for name in names if name not in plan.dropped)
    return Shard(file.relative_to(model).as_posix(), promises, metadata)


# -- what a continued merge must share with the one that was killed ------------------------------------------------------------------


def _digest(adapter: Path) -> dict[str, str]:
    """SHA-256 of the adapter's own files; what else lies in its directory does not matter."""
    found = {}
    for path in [adapter] if adapter.is_file() else sorted([*adapter.glob("*.json"), *adapter.glob("*.safetensors")]):
        with open_regular(path) as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return found


def _fingerprint(model: Path, files: CheckpointFiles) -> dict[str, list[int]]:
    """Size and time of every file of the base: reading all of a large one twice would take as long as the merge."""
    found = [*files.files(), *(path for path in (model / INDEX, model / "config.json") if path.exists())]
    return {path.relative_to(model).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


# -- the files beside the weights ------------------------------------------------------------------------------------------------------


def copy_beside(model: Path, root: Path) -> None:
    """Everything but weights and what belongs to an adapter; hidden folders and links that lead out stay behind."""
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or path.suffix in _WEIGHTS or name.name == CONFIG:
            continue
        if path.name.endswith(".index.json") and str(name) != INDEX:
            continue
        try:
            inside(model, path)
        except CheckpointError:
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / name)


def _copy_tokenizer(adapter: Path, root: Path) -> None:
    for name in _TOKENIZER:
        if (adapter / name).is_file():
            shutil.copyfile(inside(adapter, adapter / name), root / name)


def tell_config(root: Path, changes: Mapping[str, Any], dtype: torch.dtype | None, vocabulary: int | None) -> None:
    """Makes config.json say what the weights beside it are. What is right already is left as it is, to the byte.

    Args:
        changes: Fields by name; None: the field goes.
        vocabulary: Its new size; None: as it was.
    """
    config = read_json(root / "config.json")
    new = {key: value for key, value in {**config, **changes}.items() if key not in changes or value is not None}
    parts = [new, *(part for part in new.values() if isinstance(part, dict))]  # text_config and its kin
    if dtype is not None:
        new["dtype"] = word = str(dtype).removeprefix("torch.")
        for part in parts:
            part.update({key: word for key in ("dtype", "torch_dtype") if part.get(key)})
    if vocabulary is not None:
        for part in parts:
            part.update({"vocab_size": vocabulary} if "vocab_size" in part else {})
    if dtype is not None or vocabulary is not None or changes:
        (root / "config.json").write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")


def tell_index(root: Path, shards: Sequence[Shard], size_before: int) -> None:
    """Makes the index say which tensors there are, and how large they are together. What is right already is left as it is."""
    if not (root / INDEX).exists():
        return
    index = read_json(root / INDEX, most=MAX_JSON)
    size = sum(p.bytes for shard in shards for p in shard.promises)
    weight_map = {p.name: shard.file for shard in shards for p in shard.promises}
    if size == size_before and index["weight_map"] == weight_map:
        return
    told = index.get("metadata")
    if isinstance(told, dict) and "total_size" in told:
        told["total_size"] = size
    index["weight_map"] = {name: weight_map[name] for name in sorted(weight_map)}
    (root / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


__all__ = ["FLOATS", "MergeReport", "merge_files"]
