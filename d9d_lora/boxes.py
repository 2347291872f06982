"""Which part of a tensor this rank holds: a box of it, or, of two matrices in one, a box of each.

[Note: blocks]
Two matrices that are one weight, such as gate above up, are sharded each by itself: a rank has rows of both, and what it computes is
gate above up again. torch says so by `_StridedShard(dim, split_factor=blocks)`. A factor with that letter is sharded so too. What a rank
holds is then no box, but several runs: `index_of` gives them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

Runs = list[list[slice]]
"""A dimension: the stretches of global indices that this rank holds, in the order it holds them."""


def shard(dim: int, blocks: int = 1) -> Placement:
    """Sharded along a dimension. [Note: blocks]"""
    return Shard(dim) if blocks == 1 else _StridedShard(dim, split_factor=blocks)


def cut(whole: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """Each rank's part of a tensor that all of them have (or that is on meta); no communication."""
    if not isinstance(placement, _StridedShard):
        return distribute_tensor(whole, mesh, [placement], src_data_rank=None)
    dim, blocks, n = placement.dim, int(placement.split_factor), mesh.size()
    if whole.shape[dim] % (blocks * n):
        raise ValueError(f"dimension {dim} of {tuple(whole.shape)} is {blocks} blocks, which {n} ranks cannot share evenly")
    parts = whole.detach().unflatten(dim, (blocks, n, -1)).select(dim + 1, mesh.get_local_rank())
    part = parts.flatten(dim, dim + 1).contiguous()
    return DTensor.from_local(part, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())


def axes_in_blocks(p: Tensor) -> list[int]:
    """The axes of its mesh along which a tensor is sharded in blocks, so that a rank's part is no box. [Note: blocks]"""
    if not isinstance(p, DTensor):
        return []
    sizes = [1 if s.is_replicate() else p.device_mesh.size(i) for i, s in enumerate(p.placements)]

    def later(i: int) -> int:  # FSDP2 x tensor parallelism of one dimension is a box all the same
        dim = p.placements[i].dim  # type: ignore[attr-defined]
        return math.prod(n for n, s in zip(sizes[i + 1 :], p.placements[i + 1 :]) if getattr(s, "dim", None) == dim)

    return [i for i, s in enumerate(p.placements) if isinstance(s, _StridedShard) and s.split_factor not in (1, later(i))]


def index_of(p: Tensor) -> tuple[slice | Tensor, ...]:
    """What of the global tensor this rank holds: `whole[index_of(p)]`. Of one dimension it may be several runs."""
    if not axes_in_blocks(p):
        return box_of(p)
    runs = local_runs(p)
    if sum(len(run) > 1 for run in runs) > 1:
        raise NotImplementedError(f"{p.placements}: two dimensions are in blocks")  # type: ignore[attr-defined]
    return tuple(run[0] if len(run) == 1 else torch.cat([torch.arange(r.start, r.stop) for r in run]) for run in runs)


def without_blocks(p: Tensor) -> Tensor:
    """The outline, on meta, of a tensor that is whole along the axes along which `p` is in blocks."""
    blocked = axes_in_blocks(p)
    if not blocked:
        return p
    assert isinstance(p, DTensor)
    return outline_of(p, [Replicate() if i in blocked else s for i, s in enumerate(p.placements)])


def outline_of(p: DTensor, placements: Sequence[Placement], device: torch.device | str = "meta") -> DTensor:
    """An empty tensor of the shape of `p`, placed otherwise."""
    local, _ = compute_local_shape_and_global_offset(p.shape, p.device_mesh, placements)
    part = torch.empty(local, dtype=p.dtype, device=device)
    return DTensor.from_local(part, p.device_mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


def box_of(p: Tensor) -> tuple[slice, ...]:
    """The box of the global tensor that this rank holds, one slice a dimension; of one in blocks, ask `index_of`."""
    if not isinstance(p, DTensor):
        return tuple(slice(0, n) for n in p.shape)
    if axes_in_blocks(p):
        raise RuntimeError(f"{p.placements}: what a rank holds of a tensor in blocks is no box")
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    held = p.to_local().shape
    if tuple(shape) != tuple(held):
        raise RuntimeError(f"this rank holds {tuple(held)} of {tuple(p.shape)}, but {p.placements} says {tuple(shape)}")
    return tuple(slice(o, o + n) for o, n in zip(offset, shape))


def local_runs(tensor: Tensor, at: Sequence[int] | None = None) -> Runs:
    """The global indices of the local part, for each dimension, as contiguous runs in the order they are held.

    `at`: the coordinate in its mesh of the rank that is meant; this one's by default.

    [Note: strided shards] Under FSDP2 x TP the weight is cut by tp first and by dp second, while placements are read
    left to right, dp before tp. DTensor calls the dp placement `_StridedShard(split_factor=tp)`. With that factor it
    is a plain cut which comes after those to its right; with any other it deals `split_factor` blocks to each rank.
    """
    if not isinstance(tensor, DTensor):
        return [[slice(0, size)] for size in tensor.shape]
    coordinate = (tensor.device_mesh.get_coordinate() or ()) if at is None else at
    runs: Runs = []
    for dim, size in enumerate(tensor.shape):
        cuts = [
            (tensor.device_mesh.size(axis), rank, getattr(placement, "split_factor", 1))
            for axis, (rank, placement) in enumerate(zip(coordinate, tensor.placements))
            if getattr(placement, "dim", None) in (dim, dim - tensor.dim())
        ]
        runs.append(_to_runs(_cut(torch.arange(size), cuts)))
    return runs


def _cut(index: Tensor, cuts: Sequence[tuple[int, int, int]]) -> Tensor:
    """`index` cut by each (ranks, rank, split factor); see [Note: strided shards]."""
    if not cuts:
        return index
    (ranks, rank, blocks), rest = cuts[0], cuts[1:]
    if blocks > 1 and blocks == math.prod(ranks for ranks, _, _ in rest):
        return _chunk(_cut(index, rest), ranks, rank)
    mine = torch.cat([_chunk(_chunk(index, blocks, block), ranks, rank) for block in range(blocks)])
    return _cut(mine, rest)


def _chunk(index: Tensor, ranks: int, rank: int) -> Tensor:
    size = -(-len(index) // ranks)  # rounded up: the last ranks hold less, or nothing
    return index[rank * size : (rank + 1) * size]


def _to_runs(index: Tensor) -> list[slice]:
    if not len(index):
        return [slice(0, 0)]
    breaks = (index.diff() != 1).nonzero().flatten() + 1
    return [slice(int(part[0]), int(part[-1]) + 1) for part in index.tensor_split(breaks.tolist())]
