"""Which trained parameters data parallelism leaves whole on each rank, for one sum a step, and which FSDP2 shards with their block.

    T    bytes of the candidates on a rank if they are whole: factors of adapters, shared ones, small parameters trained whole
    S    if FSDP2 cuts them over n ranks: padded(T) / n
    m    microbatches a step

                   a rank sends and receives, a step            collectives of their own, a step    memory
    shard          2 m n S gathered, n S scattered              a scatter for each block            4 S
    replicate      2 T (an all-reduce is a scatter and gather)  1                                   4 T

4 are the weight, its gradient and AdamW's two averages. n S >= T and 2 m + 1 > 2: replicating never moves more, in fewer collectives.
It costs memory alone, 4 (T - S), so that decides: `auto` replicates up to MOST.
See docs/design/0007-adapters-whole-or-sharded.md.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from d9d_lora.boxes import axes_in_blocks
from d9d_lora.placement import ranks_of_experts
from d9d_lora.train.config import ParallelConfig
from d9d_lora.walk import adapted_layers

MOST = 1 << 30  # bytes of memory on a rank that `auto` pays
SMALL = 1 << 20  # bytes of a parameter trained whole that is treated as a factor is: a bias or a norm, and no matrix
KEPT = 4  # a weight, its gradient, two averages


@dataclass(frozen=True)
class Choice:
    """What becomes of the candidates.

    Attributes:
        params: Those that FSDP2 must ignore; empty if they are sharded. Identities last until the memory is made.
        replicate: Whether they are left whole.
        whole, cut: T and S of the candidates, in bytes on this rank.
        why: For the table.
    """

    params: frozenset[nn.Parameter]
    replicate: bool
    whole: int
    cut: int
    why: str


def choose(module: nn.Module, parallel: ParallelConfig) -> Choice:
    """For a model with adapters, before `fully_shard`; `parallel` is resolved. The same on every rank."""
    n = parallel.shards
    if n * parallel.dp_replicate == 1:
        return Choice(frozenset(), False, 0, 0, "no data parallelism")
    candidates = list(candidates_of(module))
    whole = sum(bytes_of(p) for p in candidates)
    cut = sum(padded(p, s) // s for p in candidates for s in [n // ranks_of_experts(p)])
    replicate, why = decide(parallel.adapters, whole, cut)
    return Choice(frozenset(candidates) if replicate else frozenset(), replicate, whole, cut, why)


def decide(asked: str, whole: int, cut: int) -> tuple[bool, str]:
    """The rule, from T and S."""
    more = KEPT * (whole - cut)
    if asked != "auto":
        return asked == "replicate", "asked for"
    return more <= MOST, f"auto: {'at most' if more <= MOST else 'above'} {MOST >> 20:,} MiB more on a rank"


def candidates_of(module: nn.Module) -> Iterable[nn.Parameter]:
    """Trained factors, and whatever else is trained and small; each once, in the model's order."""
    layers = list(adapted_layers(module))
    factors = {id(p) for la in layers for p in [*la.factors().values(), *(f.weight for f in la.shared.values())]}
    return (p for p in module.parameters() if p.requires_grad and (id(p) in factors or bytes_of(p) <= SMALL))


def axis_to_cut(p: nn.Parameter, n: int) -> int:
    """The dimension along which n shards have the least padding: FSDP2 pads the first one, and takes another if n divides it.

    A trained factor `lora_A[r, I]` has r rows: along the first dimension, more than r ranks would move mostly padding.
    """
    shape = largest_part(p)
    blocked = {p.placements[i].dim for i in axes_in_blocks(p)}  # type: ignore[attr-defined]
    possible = [d for d in range(len(shape)) if d == 0 or (shape[d] % n == 0 and p.shape[d] % shape[d] == 0 and d not in blocked)]
    return min(possible, key=lambda d: -(-shape[d] // n) * n / max(shape[d], 1), default=0)


def padded(p: nn.Parameter, n: int) -> int:
    """Bytes of n shards of a trained parameter together."""
    shape, d = largest_part(p) or [1], axis_to_cut(p, n)
    shape[d] = -(-shape[d] // n) * n
    return math.prod(shape) * p.element_size()


def bytes_of(p: nn.Parameter) -> int:
    """Bytes of the largest part that a tensor-parallel rank has."""
    return math.prod(largest_part(p)) * p.element_size()


def largest_part(p: Tensor) -> list[int]:
    """The shape of the largest part that a tensor-parallel rank has. Parts may be uneven, and all ranks must choose alike."""
    shape = list(p.shape)
    if isinstance(p, DTensor):
        for i, placement in enumerate(p.placements):
            if isinstance(placement, Shard | _StridedShard):
                shape[placement.dim] = -(-shape[placement.dim] // p.device_mesh.size(i))
    return shape


def is_over_data(p: nn.Parameter) -> bool:
    """Whether data parallelism manages a parameter, so that its gradient is summed by FSDP2."""
    return isinstance(p, DTensor) and any(name.startswith(("dp", "efsdp")) for name in p.device_mesh.mesh_dim_names or ())
