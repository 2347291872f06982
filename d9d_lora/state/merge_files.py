"""Merges a PEFT adapter into a base checkpoint, file to file, in memory for a few row blocks, whatever the model's size.

    base shard  --row blocks-->  W + s B A in fp32, rounded once  -->  the same shard: names, order, metadata
    config, tokenizer, generation settings  -->  copied            then all of it is read back, and only then renamed

No model is built, so it works for every architecture whose adapter names its tensors. Reading goes through the
safetensors library; writing tensor by tensor is `safetensors_write`.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from d9d_lora.methods.dora import gain_of
from d9d_lora.state.atomic import TEMPORARY, sync, sync_tree
from d9d_lora.state.merge_plan import FLOATS, Add, Edit, Replace, Shift, plan_merge
from d9d_lora.state.peft_config import CONFIG, WEIGHTS, AdapterError
from d9d_lora.state.peft_read import read_adapter_config
from d9d_lora.state.safetensors_dir import INDEX, PICKLES, CheckpointError, CheckpointFiles, _inside, open_checkpoint
from d9d_lora.state.safetensors_write import Promise, write_safetensors

# Elements of a tensor in hand at a time: 2 MiB in fp32. A merge has four such blocks, and the C allocator keeps up to ten.
BLOCK = 1 << 19
SAMPLED = 16  # rows of a merged tensor that are computed again, in fp64
_WEIGHTS = {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", *PICKLES}


@dataclass(frozen=True)
class MergeReport:
    """`merged` tensors took a sum, `replaced` ones a new value, `copied` ones are as they were."""

    merged: int
    replaced: int
    copied: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.merged} tensors merged, {self.replaced} replaced, {self.copied} copied, in {self.seconds:.1f} s"


@torch.no_grad()
def merge_files(
    adapter: str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Writes the merged model as a Hugging Face directory with the layout of the base's.

    Args:
        adapter: A PEFT directory, ours or PEFT's.
        model: The base's directory, with safetensors.
        output: A directory that does not exist; it appears when everything in it has been read back, or not at all.
        dtype: Of all floating-point tensors of the output; None keeps each tensor's own.

    Raises:
        AdapterError, CheckpointError: what does not fit; nothing is written then.
    """
    started = time.perf_counter()
    adapter, model, output = Path(adapter), Path(model), Path(output).absolute()
    if os.path.lexists(output):
        raise AdapterError(f"{output} exists already. Give a new directory, or remove it first.")
    if dtype is not None and dtype not in FLOATS:
        raise AdapterError(f"dtype {dtype} cannot hold merged weights; expected one of {[str(d) for d in FLOATS]}")
    if not model.is_dir():
        raise CheckpointError(f"{model} is no directory. Expected that of the base model, with config.json and weights.")
    read_adapter_config(adapter)
    config = _json(model / "config.json")
    with open_checkpoint(model) as files, open_checkpoint(adapter / WEIGHTS) as factors:
        merge = _Merge(files, factors, plan_merge(adapter, files, factors, config), dtype)
        merge.check_finite()
        beside = _files_beside(model)
        output.parent.mkdir(parents=True, exist_ok=True)
        fresh = output.with_name(f"{TEMPORARY}{output.name}_{secrets.token_hex(6)}")
        fresh.mkdir()
        try:
            for name in beside:
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(model / name, fresh / name)
            for file in files.files():
                target = fresh / file.relative_to(model)
                target.parent.mkdir(parents=True, exist_ok=True)
                merge.write(file, target)
            _tell_dtype(model, fresh, dtype, merge.size())
            with open_checkpoint(fresh) as result:
                merge.verify(result)
            sync_tree(fresh)
            if os.path.lexists(output):
                raise AdapterError(f"{output} has appeared while merging; it is left as it is")
            os.rename(fresh, output)
            sync(output.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return merge.report(time.perf_counter() - started)


class _Merge:
    """The values of every tensor of the output, block by block."""

    def __init__(self, files: CheckpointFiles, factors: CheckpointFiles, edits: dict[str, Edit], dtype: torch.dtype | None) -> None:
        self.files, self.factors, self.edits, self.dtype = files, factors, edits, dtype

    def dtype_of(self, name: str) -> torch.dtype:
        own = self.files.dtype(name)
        return self.dtype if self.dtype is not None and own in FLOATS else own

    def size(self) -> int:
        return sum(self._promise(name).bytes for name in self.files.names())

    def _promise(self, name: str) -> Promise:
        return Promise(name, self.dtype_of(name), self.files.shape(name))

    def check_finite(self) -> None:
        for name, edit in self.edits.items():
            for key in edit.keys if isinstance(edit, Add) else (edit.key,):
                for _, block in blocks(self.factors, key):
                    if block.is_floating_point() and not block.isfinite().all():
                        raise AdapterError(f"{key!r} has values that are not finite; merging it would spoil {name!r}")

    def write(self, source: Path, target: Path) -> None:
        with safe_open(str(source), framework="pt") as file:
            names, metadata = file.offset_keys(), file.metadata()
        write_safetensors(target, [self._promise(name) for name in names], self._values, metadata)

    def _values(self, name: str) -> Iterator[Tensor]:
        edit, dtype = self.edits.get(name), self.dtype_of(name)
        if isinstance(edit, Replace):
            for _, block in blocks(self.factors, edit.key):
                yield self._finite(name, block.to(dtype), block)
            return
        if isinstance(edit, Shift):
            new = self._shifted(name, edit)
            yield self._finite(name, new.to(dtype), new)
            return
        update = self._update(name, edit, torch.float64 if self.files.dtype(name) == torch.float64 else torch.float32)
        for rows, block in blocks(self.files, name):
            new = block if update is None else update(rows, block)
            yield self._finite(name, new.to(dtype), block)

    def _update(self, name: str, edit: Add | None, work: torch.dtype) -> Callable[[slice, Tensor], Tensor] | None:
        """(rows, base block) -> merged block, in `work`."""
        if edit is None:
            return None
        A, B = self.factors.read(edit.A).to(work), self.factors.read(edit.B).to(work)

        def update(rows: slice, block: Tensor) -> Tensor:
            new = A[:, rows].T @ B.T if edit.turned else B[rows] @ A
            return new.mul_(edit.scaling).add_(block)

        if edit.magnitude is None:
            return update
        magnitude = self.factors.read(edit.magnitude).to(work)
        if edit.turned:  # a block has all rows of [out, in] and some columns: one more pass over the weight for the norms
            squares = torch.zeros_like(magnitude, dtype=torch.float64)
            for rows, block in blocks(self.files, name):
                squares += update(rows, block).square().sum(0)
            gain = gain_of(magnitude, squares.sqrt().to(work))
            return lambda rows, block: update(rows, block).mul_(gain)

        def with_magnitude(rows: slice, block: Tensor) -> Tensor:
            new = update(rows, block)
            return new.mul_(gain_of(magnitude[rows], new.norm(dim=1))[:, None])

        return with_magnitude

    def _shifted(self, name: str, edit: Shift) -> Tensor:
        bias = self.files.read(name) if edit.onto is None else self.factors.read(edit.onto)
        work = torch.float64 if bias.dtype == torch.float64 else torch.float32
        return bias.to(work) + edit.scaling * self.factors.read(edit.key).to(work)

    def _finite(self, name: str, new: Tensor, old: Tensor) -> Tensor:
        if new.dtype != old.dtype or name in self.edits:
            broken = new.is_floating_point() and not new.isfinite().all()
            if broken and old.isfinite().all():
                raise AdapterError(f"{name!r} does not fit into {new.dtype}: values overflow. Give dtype=bfloat16 or float32.")
        return new

    def verify(self, result: CheckpointFiles) -> None:
        """Reads the output back: untouched tensors to the bit, replaced ones too, merged ones on rows computed anew."""
        if result.names() != self.files.names():
            raise AdapterError(f"the output holds other tensors: {set(result.names()) ^ set(self.files.names())}")
        for name in result.names():
            if (result.shape(name), result.dtype(name)) != (self.files.shape(name), self.dtype_of(name)):
                raise AdapterError(f"{name!r} was written as {result.dtype(name)} {result.shape(name)}")
            edit = self.edits.get(name)
            if isinstance(edit, Add):
                self._verify_sum(name, edit, result)
                continue
            if isinstance(edit, Shift):
                if not torch.equal(_bits(self._shifted(name, edit).to(self.dtype_of(name))), _bits(result.read(name))):
                    raise AdapterError(f"{name!r} is not b + s b' when it is read back: check the disk, and merge again")
                continue
            origin, key = (self.factors, edit.key) if isinstance(edit, Replace) else (self.files, name)
            for (_, old), (_, new) in zip(blocks(origin, key), blocks(result, name), strict=True):
                if not torch.equal(_bits(old.to(self.dtype_of(name))), _bits(new)):
                    raise AdapterError(f"{name!r} reads back otherwise than it was: check the disk, and merge again")

    def _verify_sum(self, name: str, edit: Add, result: CheckpointFiles) -> None:
        """In fp64, from the factors as they are on disk: half a unit in the last place, and the noise of an fp32 sum."""
        rows, cols = self.files.shape(name)
        A, B = self.factors.read(edit.A), self.factors.read(edit.B)
        wide = torch.float64
        gain = self._gain(name, edit)
        unit = torch.finfo(self.dtype_of(name)).eps
        least = torch.finfo(self.dtype_of(name)).smallest_normal * unit
        for row in sorted({round(i * (rows - 1) / (SAMPLED - 1)) for i in range(SAMPLED)}) if rows else []:
            box = (slice(row, row + 1), slice(0, cols))
            old, new = (files.read(name, box)[0].to(wide) for files in (self.files, result))
            left, right = (A[:, row], B.T) if edit.turned else (B[row], A)
            left, right = left.to(wide), right.to(wide)
            sum_ = old + edit.scaling * (left @ right)
            g = gain(row, sum_)
            size = (old.abs() + abs(edit.scaling) * (left.abs() @ right.abs())) * g.abs()
            wrong = (new - sum_ * g).abs() > unit * new.abs() + 2e-6 * size + least
            if wrong.any():
                raise AdapterError(f"row {row} of {name!r} is not W + s B A when it is read back: check the disk, merge again")

    def _gain(self, name: str, edit: Add) -> Callable[[int, Tensor], Tensor]:
        """(row of the file, its sum) -> what the sum is multiplied by; in fp64."""
        if edit.magnitude is None:
            return lambda row, sum_: torch.ones(())
        A, B, magnitude = (self.factors.read(key).double() for key in edit.keys)
        if not edit.turned:
            return lambda row, sum_: gain_of(magnitude[row], sum_.norm())
        squares = torch.zeros_like(magnitude)
        for rows, block in blocks(self.files, name):
            squares += (block.double() + edit.scaling * (A[:, rows].T @ B.T)).square().sum(0)
        return lambda row, sum_: gain_of(magnitude, squares.sqrt())

    def report(self, seconds: float) -> MergeReport:
        added = sum(not isinstance(edit, Replace) for edit in self.edits.values())
        return MergeReport(added, len(self.edits) - added, len(self.files.names()) - len(self.edits), seconds)


def blocks(files: CheckpointFiles, name: str) -> Iterator[tuple[slice, Tensor]]:
    """A tensor in blocks of whole rows of about `BLOCK` elements, in order; (rows, values)."""
    shape = files.shape(name)
    if not shape or 0 in shape:
        yield slice(0, 0), files.read(name)
        return
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, BLOCK // width)
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        yield rows, files.read(name, (rows, *(slice(0, size) for size in shape[1:])))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _files_beside(model: Path) -> list[Path]:
    """Everything but weights and what belongs to an adapter; hidden folders and links that lead out stay behind."""
    found = []
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or path.suffix in _WEIGHTS or name.name == CONFIG:
            continue
        if path.name.endswith(".index.json") and str(name) != INDEX:
            continue
        try:
            _inside(model, path)
        except CheckpointError:
            continue
        found.append(name)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Expected the config of a Hugging Face model.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def _tell_dtype(model: Path, fresh: Path, dtype: torch.dtype | None, size: int) -> None:
    """With another dtype, the config must name it (loaders go by it) and the index the new size."""
    if dtype is None:
        return
    config = _json(model / "config.json")
    word = str(dtype).removeprefix("torch.")
    config["dtype"] = word
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):  # text_config and its kin
        part.update({key: word for key in ("dtype", "torch_dtype") if part.get(key)})
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (fresh / INDEX).exists():
        index = _json(model / INDEX)
        if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
            index["metadata"]["total_size"] = size
        (fresh / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
