"""The tensors of a checkpoint: each rank's shards in a safetensors file of its own, read again by ranks of any number and layout.

[Note: DCP with safetensors]
torch's distributed checkpoint (DCP) divides the writing, drops replicas and reshards at the read. Its own format keeps
a pickled `.metadata`, and a pickle is a program; so its Hugging Face storage is used, where the offsets of a shard
stand in the safetensors header. Three things it leaves open are closed here and in `checkpoint.py`: (1) it refuses non-contiguous shards,
so they are made contiguous; (2) it reads every safetensors file in the folder, so one that COMPLETE does not list is
refused; (3) it ignores what a job does not ask for and leaves a hole as it was, so names, shapes, dtypes and coverage
are compared first, against the list in trainer.json.

[Note: parts that are no box]
DCP knows boxes. Where a rank holds several runs of a dimension (`boxes.py`: gate above up under tensor parallelism), the tensor is made
whole along that axis of the mesh before it is written, and read as a whole: factors and their moments, no weights.
"""

import hashlib
import threading
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate

from d9d_lora.boxes import axes_in_blocks, index_of, outline_of, without_blocks
from d9d_lora.placement import local_of
from d9d_lora.state.atomic import Damaged, RanksFailed, agreeing_group, gather, together
from d9d_lora.state.safetensors_dir import read_header

ONE_PROCESS = "torch.distributed is disabled"  # DCP's warning; one process without a group is an ordinary case here
Index = dict[str, tuple[tuple[int, ...], str]]  # name -> (global shape, dtype)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    ready = together("gathering the shards", lambda: {name: _contiguous(tensors[name]) for name in sorted(tensors)})

    def write() -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(ready, storage_writer=writer, process_group=agreeing_group())

    if threading.current_thread() is threading.main_thread():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ONE_PROCESS)
            together(f"writing {folder.name}/", write)
    else:
        together(f"writing {folder.name}/", write)


def copied(tensor: Tensor) -> Tensor:
    """A copy of this rank's part in CPU memory, with its placement."""
    local = local_of(tensor.detach())
    copy = torch.empty(local.shape, dtype=local.dtype)
    copy.copy_(local)
    # not by from_local, which would take it to the device of the mesh
    return DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy


def as_boxes(tensor: Tensor) -> Tensor:
    """[Note: parts that are no box]. Collective for these."""
    blocked = axes_in_blocks(tensor)
    if not blocked:
        return tensor
    assert isinstance(tensor, DTensor)
    held: Any = tensor.detach()
    return held.redistribute(placements=[Replicate() if i in blocked else p for i, p in enumerate(tensor.placements)])


def _contiguous(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.contiguous()
    local = tensor.to_local()
    if local.is_contiguous():
        return tensor
    return DTensor.from_local(
        local.contiguous(), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )


# -- the list -----------------------------------------------------------------------------------------------------------------


def listed(tensors: Mapping[str, Tensor]) -> Index:
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"{name} is {tensor.placements}: a part of a sum is no value; redistribute it first")
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in sorted(tensors.items())}


def union(index: Index, note: str = "") -> Index:
    """The index over all ranks. Mostly they agree, which a hash settles; pipeline stages name different ones.

    `note` must be the same on every rank.
    """
    same = gather((hashlib.sha256(repr(sorted(index.items())).encode()).hexdigest(), note))
    if len({note for _, note in same}) > 1:
        raise RanksFailed("agreeing on step and extras", {rank: note for rank, (_, note) in enumerate(same)})
    if len(set(same)) == 1:
        return index
    whole: Index = {}
    for rank, part in enumerate(gather(index)):
        for name, entry in part.items():
            if whole.setdefault(name, entry) != entry:
                text = f"{name} is {spell(entry)} here and {spell(whole[name])} on a rank before"
                raise RanksFailed("listing the tensors", {rank: text})
    return dict(sorted(whole.items()))


def spell(entry: tuple[tuple[int, ...], str]) -> str:
    return f"{entry[1]}{list(entry[0])}"


def some(items: list[str], most: int = 10) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


# -- read ---------------------------------------------------------------------------------------------------------------------


def compared(tensors: Mapping[str, Tensor], index: Index) -> Index:
    """What this rank asks for, compared with what a checkpoint holds. Local to this rank.

    Raises:
        ValueError: naming every tensor that does not fit.
    """
    asked = listed(tensors)
    wrong = [f"{name} is missing in the checkpoint" for name in asked if name not in index]
    for name in sorted(asked.keys() & index.keys()):
        if asked[name] != index[name]:
            wrong.append(f"{name} is {spell(index[name])} in the checkpoint, {spell(asked[name])} in the job")
        elif tensors[name].is_meta:
            wrong.append(f"{name} is on the meta device: allocate it before the load")
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit: {some(wrong)}")
    return asked


def check_headers(folder: Path, index: Index) -> None:
    """The shards of each tensor must cover it: DCP would leave a hole as it was and say nothing."""
    for file in sorted(folder.rglob("*.safetensors")):
        read_header(file)  # DCP believes what a header says
    headers = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    if wrong := sorted(headers.keys() ^ index.keys()):
        raise Damaged(f"the files of {folder.name}/ and the list of tensors beside it differ in {len(wrong)} tensors: {some(wrong)}")
    for name, (shape, dtype) in index.items():
        header = headers[name]
        assert isinstance(header, TensorStorageMetadata)
        found = (tuple(header.size), str(header.properties.dtype).removeprefix("torch."))
        there = sum(chunk.sizes.numel() for chunk in header.chunks)
        if found != (shape, dtype) or there != header.size.numel() or _collide(header):
            raise Damaged(
                f"{name}: the shards in {folder.name}/ make {there} elements of {spell(found)}; listed are {spell((shape, dtype))}"
            )


def _collide(header: TensorStorageMetadata) -> bool:
    """Whether two shards share an element, or one lies outside: together with the sum of their elements, whether they cover the tensor."""
    boxes = sorted([(at, at + length) for at, length in zip(chunk.offsets, chunk.sizes)] for chunk in header.chunks)
    if any(begin < 0 or end > size for box in boxes for (begin, end), size in zip(box, header.size)):
        return True
    for number, box in enumerate(boxes):
        for other in islice(boxes, number + 1, None):
            if not box or other[0][0] >= box[0][1]:
                break  # sorted: those behind begin later still
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other)):
                return True
    return False


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place. Collective."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        boxes = {name: _box_for(tensor) for name, tensor in sorted(tensors.items())}
        dcp.load(boxes, storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, box in boxes.items():
        if box is not tensors[name]:
            local_of(tensors[name]).copy_(_own_part(local_of(box), tensors[name]))


def _box_for(tensor: Tensor) -> Tensor:
    """What a checkpoint is read into: the tensor, or a box that it is a part of. [Note: parts that are no box]"""
    if not axes_in_blocks(tensor):
        return tensor
    outline = without_blocks(tensor)
    assert isinstance(outline, DTensor)
    return outline_of(outline, outline.placements, device=local_of(tensor).device)


def _own_part(box: Tensor, tensor: Tensor) -> Tensor:
    dims = {tensor.placements[i].dim for i in axes_in_blocks(tensor)}  # type: ignore[attr-defined]
    return box[tuple(rows if dim in dims else slice(None) for dim, rows in enumerate(index_of(tensor)))]
