"""Writes the merged model of a live job, on any layout, and leaves the job as it is: no weight, no optimiser state changes.

    rank 0                            merges block by block, as a merge of files does (`merge_edit`), reading from the live model:
      "tensor", name  -- all ranks -->   each sends its own box of that tensor, once; rank 0 puts them together
      "factors", name -- all ranks -->   the factors of that layer, gathered
      "end"           -- all ranks -->   what went wrong, if anything did

[Note: memory]
Rank 0 holds one tensor of the model in its own dtype, one box of it on the way, and a few blocks: less than two of the largest tensors.
Other ranks hold one box more than before. Factors are gathered one layer at a time.

[Note: the same bits]
The sum is taken from whole factors in blocks that do not depend on the layout. So the files are, byte for byte, those of `merge_files` on
the saved adapter, where both hold the base in the same dtype and the start left it alone.
"""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.tied import TiedHead
from d9d_lora.placement import local_of
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.replicate import restacked
from d9d_lora.state.atomic import RanksFailed, decided, gather, rank_and_world, together
from d9d_lora.state.mappers import ModelStateMapper, Route, route_of, sorted_groups
from d9d_lora.state.merge_edit import FLOATS, Add, Edit, Form, Output, Shift
from d9d_lora.state.merge_files import MergeReport, check_dtype, copy_beside, report_of, tell_config, tell_index
from d9d_lora.state.merge_work import Shard, build, refuse_existing, shards_of
from d9d_lora.state.names import clean, original
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.reader import Runs, local_runs, named_state, shape_of
from d9d_lora.state.safetensors_dir import INDEX, CheckpointFiles, open_checkpoint
from d9d_lora.state.safetensors_write import library_order
from d9d_lora.walk import adapter_tensors, names_of_modules, refuse_tied, reshard

_TURNED: dict[Form, Form] = {"OI": "IO", "IO": "OI"}


@torch.no_grad()
def save_merged(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    mapper: ModelStateMapper | None = None,
    dtype: torch.dtype | None = None,
    dequantise: bool = False,
    max_shard_size: int = 5_000_000_000,
) -> MergeReport:
    """Writes the merged model of a running job as a Hugging Face directory. Collective: every rank calls it, between two steps.

    Args:
        model: The adapted model, on any layout; it stays adapted.
        path: A directory that does not exist; it appears when everything in it has been read back, or not at all.
        base: The directory the base was loaded from, seen by rank 0. The output has its shards, names and order, its config and tokenizer.
            Without it, names are those of the model before the injection, and the config is the model's own.
        mapper: From names in the base's files to names in the model, as for `load_checkpoint`, where other things than the injection
            rename tensors.
        dtype: Of all floating-point tensors of the output; None keeps each tensor's own in the model.
        dequantise: Unpack quantised layers; without it they are refused.
        max_shard_size: Bytes of a file, without `base`.

    Raises:
        AdapterError: on every rank alike; nothing is written then.
    """
    started, final = time.perf_counter(), Path(path).absolute()
    try:
        reshard(model)
        live = together("looking at the model", lambda: _Live.of(model, mapper, dequantise=dequantise))
        _agree(live)
        check_dtype(dtype)
        if rank_and_world()[0]:
            live.serve()
            return decided("telling of the merge", lambda: None)  # type: ignore[return-value]
        try:
            report = _write(model, live, final, None if base is None else Path(base), dtype, max_shard_size, started)
        except BaseException as error:
            _told(("end", f"{type(error).__name__}: {error}"))  # or the others would wait for ever
            raise
        _told(("end", ""))
        return decided("telling of the merge", lambda: report)
    except (RanksFailed, ValueError, OSError) as error:
        raise AdapterError(f"the merged model was not written to {final}: {error}") from error


def _write(
    model: nn.Module, live: "_Live", final: Path, base: Path | None, dtype: torch.dtype | None, most: int, started: float
) -> MergeReport:
    """Rank 0's part."""
    refuse_existing(final)
    output = Output(live, live.edits, dtype)
    with contextlib.ExitStack() as stack:
        files = None if base is None else stack.enter_context(open_checkpoint(base))
        if files is None:
            shards, index = shards_of(library_order(output.promise(name) for name in live.once()), most)
            beside: Callable[[Path], None] = _own_files(model, index, dtype or live.common_dtype())
        else:
            assert base is not None
            shards = live.as_files(output, files)
            beside = _base_files(base, files, shards, live, dtype)
        written = {p.name for shard in shards for p in shard.promises}
        output.edits = {name: edit for name, edit in output.edits.items() if name in written}  # a tied weight may have one name there
        built = build(final, shards, output.values, beside, before_rename=live.check_ranks)
        return report_of(output, started, len(written), built.kept)


def _base_files(
    base: Path, files: CheckpointFiles, shards: list[Shard], live: "_Live", dtype: torch.dtype | None
) -> Callable[[Path], None]:
    """Writes what the base's directory has beside its weights, made true."""
    before = {name: files.dtype(name) for name in files.names()}
    after = {p.name: p.dtype for shard in shards for p in shard.promises}
    changed = any(before[name] != after[name] for name in after if before[name] in FLOATS)
    size = sum(math.prod(files.shape(name)) * files.dtype(name).itemsize for name in files.names())

    def beside(root: Path) -> None:
        copy_beside(base, root)
        if (root / "config.json").exists():
            tell_config(root, {}, dtype or (live.common_dtype() if changed else None), live.vocabulary(files))
        tell_index(root, shards, size)

    return beside


def _own_files(model: nn.Module, index: str | None, dtype: torch.dtype) -> Callable[[Path], None]:
    """Writes the config of a Hugging Face model; another model has none."""

    def beside(root: Path) -> None:
        for part in (getattr(model, "config", None), getattr(model, "generation_config", None)):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(root)  # type: ignore[union-attr]
        if (root / "config.json").exists():
            tell_config(root, {"quantization_config": None, "architectures": [type(model).__name__.removeprefix("FSDP")]}, dtype, None)
        if index is not None:
            (root / INDEX).write_text(index, encoding="utf-8")

    return beside


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the model.

    Attributes:
        outline: Says its shape, dtype and placement.
        here: Gives this rank's part of it.
        transposed: The file has its transpose.
    """

    outline: Tensor
    here: Callable[[], Tensor]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.outline.shape[::-1] if self.transposed else self.outline.shape)


@dataclass
class _Live:
    """The tensors of a model by the names that they have in files; reading one is collective. A `Source` on rank 0.

    Attributes:
        trouble: Of this rank, while it serves.
        most: The bytes of a tensor and a box of it that were in hand here, at most. [Note: memory]
    """

    tensors: dict[str, _Tensor]
    layers: dict[str, AdaptedLayer] = field(default_factory=dict)  # by the name of the weight in files
    edits: dict[str, Edit] = field(default_factory=dict)
    trouble: str = ""
    most: int = 0
    _last: tuple[str, Tensor] | None = None

    @classmethod
    def of(cls, model: nn.Module, mapper: ModelStateMapper | None, *, dequantise: bool) -> "_Live":
        """Lists a model. Local to this rank.

        Raises:
            AdapterError, ValueError: for what cannot be merged.
        """
        layers = _layers(model, dequantise=dequantise)
        packed = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, NF4Linear)}
        if packed and not dequantise:
            raise AdapterError(
                f"{next(iter(packed))} and {len(packed) - 1} more layers are quantised (our NF4), and four bits cannot hold the sum. Save "
                "the adapter and merge it into the original checkpoint (merge_files), or give dequantise=True"
            )
        adapted = {layer.name for _, layer in layers} | {clean(f"{n}.")[:-1] for names, _ in layers for n in names}
        routes = _routes(mapper)
        names_added = adapter_tensors(model)
        ours = {id(t) for name, t in model.state_dict(keep_vars=True).items() if name in names_added}
        ours |= {id(t) for m in packed.values() for t in m.packed()}
        found: dict[str, _Tensor] = {}
        by_weight: dict[int, str] = {}
        for name, m in packed.items():
            found_name, turned = _in_file(f"{name}.weight", adapted, routes)
            found[found_name] = _Tensor(m.outline(), m.unpacked_here, turned)
            by_weight.setdefault(id(m.weight), found_name)
        for name, t in named_state(model):
            if id(t) in ours:
                continue
            found_name, turned = _in_file(name, adapted, routes)
            if isinstance(t, DTensor) and any(p.is_partial() for p in t.placements):
                raise AdapterError(f"{name} is {t.placements}: a sum that is pending cannot be written")
            found[found_name] = _Tensor(t, lambda t=t: local_of(t), turned)  # type: ignore[misc]
            by_weight.setdefault(id(t), found_name)
        live = cls(found)
        for _, layer in layers:
            if not isinstance(layer, TiedHead):
                live._add(layer, by_weight)
        for name, tensor in found.items():  # a tied weight has several names, and one edit
            first = by_weight.get(id(tensor.outline))
            if first in live.edits and name not in live.edits:
                live.edits[name] = live.edits[first]
        return live

    def _add(self, layer: AdaptedLayer, by_weight: Mapping[int, str]) -> None:
        weight: Tensor = layer.base.weight  # type: ignore[assignment]
        name = by_weight[id(weight)]
        self.layers[name] = layer
        form: Form = layer.weight_axes  # type: ignore[assignment]
        if self.tensors[name].transposed:
            form = _TURNED[form]
        self.edits[name] = Add(layer.delta, lambda: self._factors(name), form)
        if layer.delta.has_shift:
            bias = by_weight[id(layer.base.bias)]
            self.edits[bias] = Shift(lambda: self._shift(name))

    # -- what a merge reads: on rank 0 ---------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].outline.dtype

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._ask("tensor", name)
        whole = self._last[1].T if self.tensors[name].transposed else self._last[1]
        return whole if box is None else whole[box]

    def _factors(self, name: str) -> dict[str, Tensor]:
        return {factor: value.cpu() for factor, value in self._ask("factors", name).items()}

    def _shift(self, name: str) -> Tensor:
        layer, given = self.layers[name], self._factors(name)
        return layer.delta.shift(layer.delta.part(given, slice(0, layer.out_size), slice(0, layer.in_size)))

    def once(self) -> list[str]:
        """A name for every tensor: the first, where it has several."""
        seen: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            seen.setdefault(id(tensor.outline), name)
        return sorted(seen.values())

    def common_dtype(self) -> torch.dtype:
        """That of most numbers."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.once():
            if (dtype := self.dtype(name)) in FLOATS:
                sizes[dtype] = sizes.get(dtype, 0) + math.prod(self.shape(name))
        return max(sizes, key=lambda dtype: sizes[dtype])

    def as_files(self, output: Output, files: CheckpointFiles) -> list[Shard]:
        """The shards of the base's directory, with the model's tensors. What the model does not have (old masks) is taken from the base."""
        names = self._aliases(files)
        written = {id(self.tensors[names[name]].outline) for name in names}
        lost = sorted(name for name in self.once() if id(self.tensors[name].outline) not in written)
        if lost:
            raise AdapterError(f"{lost[:5]} of the model are in no file of the base: give the one that was loaded, or its mapper")
        misshapen = [
            f"{name} is {files.shape(name)} in the base and {self.shape(ours)} in the model"
            for name, ours in names.items()
            if files.shape(name)[1:] != self.shape(ours)[1:] or (files.shape(name) != self.shape(ours) and len(self.shape(ours)) != 2)
        ]
        if misshapen:
            raise AdapterError(f"{len(misshapen)} tensors do not fit the base: {'; '.join(misshapen[:5])}")
        output.edits = {name: output.edits[ours] for name, ours in names.items() if ours in output.edits}
        output.base = _Beside(self, names, files)
        shards = []
        for file in files.files():
            with safe_open(str(file), framework="pt") as handle:
                keys, metadata = handle.offset_keys(), handle.metadata()
            shards.append(Shard(file.relative_to(_root(files)).as_posix(), tuple(output.promise(key) for key in keys), metadata))
        return shards

    def _aliases(self, files: CheckpointFiles) -> dict[str, str]:
        """Names in the files -> ours; they may lack the model's prefix, or have one more."""
        firsts = {name.partition(".")[0] for name in self.tensors}
        found = {}
        for name in files.names():
            tries = [name, *(f"{first}.{name}" for first in sorted(firsts)), name.partition(".")[2]]
            if (ours := next((t for t in tries if t in self.tensors), None)) is not None:
                found[name] = ours
        return found

    def vocabulary(self, files: CheckpointFiles) -> int | None:
        """The model's rows, where the base has others."""
        return next((self.shape(ours)[0] for name, ours in self._aliases(files).items() if self.shape(ours) != files.shape(name)), None)

    # -- the conversation ----------------------------------------------------------------------------------------------------

    def _ask(self, what: str, name: str) -> Any:
        _told((what, name))
        return self._answer(what, name)

    def _answer(self, what: str, name: str) -> Any:
        if what == "factors":
            return self.layers[name].whole_factors()
        return self._together(self.tensors[name])

    def serve(self) -> None:
        """Every rank but the first: does what it is asked until the end. Raises AdapterError with what went wrong on rank 0."""
        while True:
            what, name = _told(None)
            if what == "end":
                break
            if what == "ranks":
                gather(self.trouble)
            else:
                self._answer(what, name)
        if name:
            raise AdapterError(f"rank 0: {name}")

    def check_ranks(self) -> None:
        """Before anything is shown: whether every rank could give what it was asked for."""
        _told(("ranks", ""))
        if troubles := {rank: text for rank, text in enumerate(gather(self.trouble)) if text}:
            raise RanksFailed("reading the model", troubles)

    def _together(self, tensor: _Tensor) -> Tensor | None:
        """The whole tensor on rank 0, in CPU memory; None elsewhere. Each box travels once, from the first rank that holds it."""
        rank = rank_and_world()[0]
        outline = tensor.outline
        if not isinstance(outline, DTensor):
            return tensor.here().detach().cpu() if rank == 0 else None
        device = outline.device_mesh.device_type
        if rank:
            shape = shape_of(local_runs(outline))
            if _holds(outline) and 0 not in shape:
                dist.send(self._wire(tensor, shape, device), dst=0)
            return None
        whole = torch.empty(tuple(outline.shape), dtype=outline.dtype)
        for owner, runs in _holders(outline):
            shape = shape_of(runs)
            if owner == 0:
                part = tensor.here().detach().cpu()
            else:
                wire = torch.empty(_bytes(shape, outline.dtype), dtype=torch.uint8, device=device)
                dist.recv(wire, src=owner)
                part = wire.cpu().view(outline.dtype).view(shape)
            self.most = max(self.most, whole.nbytes + part.nbytes)
            _place(whole, part.view(shape), runs)
        return whole

    def _wire(self, tensor: _Tensor, shape: tuple[int, ...], device: str) -> Tensor:
        """This rank's box as bytes. One that it cannot make is told at the end: rank 0 waits for bytes now."""
        try:
            part = tensor.here().detach()
            if tuple(part.shape) != shape:
                raise RuntimeError(f"holds {tuple(part.shape)}, where its placement says {shape}")
            return part.contiguous().view(-1).view(torch.uint8).to(device)
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"
            return torch.zeros(_bytes(shape, tensor.outline.dtype), dtype=torch.uint8, device=device)


class _Beside:
    """The live tensors under the names of the base's files, and the base's own where the model has none. A `Source`."""

    def __init__(self, live: _Live, names: Mapping[str, str], files: CheckpointFiles) -> None:
        self.live, self.names, self.files = live, names, files

    def shape(self, name: str) -> tuple[int, ...]:
        return self.live.shape(self.names[name]) if name in self.names else self.files.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.live.dtype(self.names[name]) if name in self.names else self.files.dtype(name)

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        return self.live.read(self.names[name], box) if name in self.names else self.files.read(name, box)


# -- what is merged, and under which name ---------------------------------------------------------------------------------------------


def _layers(model: nn.Module, *, dequantise: bool) -> list[tuple[list[str], AdaptedLayer]]:
    """The adapted layers with their names, after everything that a merge refuses."""
    if restacked(model) is not None:
        raise AdapterError("layer_replication: copies of a layer share a weight and have an adapter each; no merged weight holds them all")
    layers = [(names, m) for names, m in names_of_modules(model) if isinstance(m, AdaptedLayer)]
    refuse_tied(model, layers)
    for _, layer in layers:
        if layer.others():
            raise AdapterError(
                f"{layer.name} has the adapters {', '.join(layer.adapters_by_name())}, and a merged model holds one: call this inside "
                "`with only_adapter(model, name)`"
            )
        layer.refuse_unstarted()
        if not isinstance(layer.base, NF4Linear):
            layer.check_merge()
    return layers


def _routes(mapper: ModelStateMapper | None) -> dict[str, tuple[str, bool]]:
    """Name in the model -> (name in the file, whether it is the transpose)."""
    found: dict[str, tuple[str, bool]] = {}
    for group in sorted_groups(mapper) if mapper is not None else ():
        for output in sorted(group.outputs):
            route = route_of(mapper, output)  # type: ignore[arg-type]
            if not isinstance(route, Route):
                raise AdapterError(f"{output!r} is made of {sorted(group.inputs)[:3]} by its mapper, which cannot be turned round")
            found[clean(output)] = route.name, route.transposed
    return found


def _in_file(name: str, adapted: set[str], routes: Mapping[str, tuple[str, bool]]) -> tuple[str, bool]:
    """Of a tensor of the model."""
    if clean(name) in routes:
        return routes[clean(name)]
    was = original(name, adapted)
    return routes.get(was, (was, False))


def _agree(live: _Live) -> None:
    """Ranks that list other tensors would wait for each other for ever."""
    listed = [(n, t.shape, str(t.outline.dtype), isinstance(t.outline, DTensor)) for n, t in sorted(live.tensors.items())]
    marks = gather(sha256(repr((listed, sorted(live.edits), sorted(live.layers))).encode()).hexdigest())
    if len(set(marks)) > 1:
        raise AdapterError(
            f"ranks hold different models (by rank: {[mark[:8] for mark in marks]}). Every rank must hold the whole model by name, each "
            "its shards of it"
        )


def _root(files: CheckpointFiles) -> Path:
    return Path(os.path.commonpath([file.parent for file in files.files()]))


# -- boxes on their way ---------------------------------------------------------------------------------------------------------------


def _told(words: tuple[str, str] | None) -> tuple[str, str]:
    """Rank 0's words, on every rank."""
    box = [words]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _holders(tensor: DTensor) -> list[tuple[int, Runs]]:
    """(rank, its runs of indices) of the ranks that hold a part first: of several with the same, one. Empty parts are left out."""
    mesh = tensor.device_mesh
    sizes = [1 if p.is_replicate() else mesh.size(i) for i, p in enumerate(tensor.placements)]
    found = []
    for at in itertools.product(*map(range, sizes)):
        runs = local_runs(tensor, at)
        if math.prod(shape_of(runs)):
            found.append((int(mesh.mesh[at]), runs))
    return found


def _holds(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold its part, on the mesh of rank 0: a tensor outside the tensor-parallel plan has a
    mesh for each tensor-parallel rank, and as many copies."""
    at = tensor.device_mesh.get_coordinate()
    first = at is not None and not any(p.is_replicate() and at[i] for i, p in enumerate(tensor.placements))
    return first and bool((tensor.device_mesh.mesh == 0).any())


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    n: int = math.prod(shape)
    return n * dtype.itemsize


def _place(whole: Tensor, part: Tensor, runs: Runs) -> None:
    """Puts a local part where its runs say."""
    for dim, stretches in enumerate(runs):
        if len(stretches) > 1:
            sizes = [run.stop - run.start for run in stretches]
            for run, piece in zip(stretches, part.split(sizes, dim)):
                _place(whole, piece, [*runs[:dim], [run], *runs[dim + 1 :]])
            return
    whole[tuple(run for (run,) in runs)] = part


__all__ = ["save_merged"]
