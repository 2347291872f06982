"""A live model, on any layout, as the tensors of files: rank 0 reads one by its name, and every rank sends its own box of it, once.

    rank 0                            reads
      "tensor", name  -- all ranks -->   each sends its own box of that tensor; rank 0 puts them together
      "factors", name -- all ranks -->   the factors of that layer, gathered
      "ranks"         -- all ranks -->   what has gone wrong on each
      "end"           -- all ranks -->   what went wrong on rank 0, if anything did

[Note: memory]
Rank 0 holds one tensor of the model in its own dtype, one box of it on the way, and a few blocks: less than two of the largest tensors.
Other ranks hold one box more than before. Factors are gathered one layer at a time.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.tied import TiedHead
from d9d_lora.placement import local_of
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.replicate import restacked
from d9d_lora.state.atomic import RanksFailed, gather, rank_and_world
from d9d_lora.state.mappers import ModelStateMapper, Route, route_of, sorted_groups
from d9d_lora.state.merge_edit import FLOATS, Add, Edit, Form, Shift
from d9d_lora.state.names import clean, original
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.reader import Runs, local_runs, named_state, shape_of
from d9d_lora.walk import adapter_tensors, names_of_modules, refuse_tied

_TURNED: dict[Form, Form] = {"OI": "IO", "IO": "OI"}


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
class Live:
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
    def of(cls, model: nn.Module, mapper: ModelStateMapper | None, *, dequantise: bool) -> Self:
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

    def end(self, trouble: str = "") -> None:
        """Rank 0 asks no more; the others stop, and raise what went wrong here."""
        _told(("end", trouble))

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


def agree(live: Live) -> None:
    """Ranks that list other tensors would wait for each other for ever."""
    listed = [(n, t.shape, str(t.outline.dtype), isinstance(t.outline, DTensor)) for n, t in sorted(live.tensors.items())]
    marks = gather(sha256(repr((listed, sorted(live.edits), sorted(live.layers))).encode()).hexdigest())
    if len(set(marks)) > 1:
        raise AdapterError(
            f"ranks hold different models (by rank: {[mark[:8] for mark in marks]}). Every rank must hold the whole model by name, each "
            "its shards of it"
        )


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
