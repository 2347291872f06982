"""Traffic of one microbatch, the last of a step, by formulas; an opinion of its own beside the rehearsal.

    unit        a block, or all that is in none (embedding, last norm, head): what FSDP2 gathers together
    padded(p)   ceil(d / dp) dp d' d'' ... : FSDP2 cuts dimension d, mostly the first, and every rank gets as much of it

    gathers     forward: padded bytes of every unit; backward: those of the blocks (the root stays gathered)
    scatter     padded bytes of what is trained and sharded; HSDP then sums the shards over the replicas
    sum         once a step: the local shards of factors that tensor parallelism replicates; what data parallelism leaves whole, and
                a number for each such parameter
    cp          of a block, for n tokens here: ulysses b n (2 H + 2 G) D, gather b cp n 2 G D; forward, backward, and again if recomputed
    tp          forward: bsh a row-parallel layer, and the embedding; backward: bsh a parent of column-parallel layers whose input
                has a gradient (not the first attention), and the head; b s V for the logits   [Llama's plan, without sequence parallel]
                experts: bsh each way, and backward b s k for the weights of a token's k experts
"""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.context.model import heads_of
from d9d_lora.layers.experts import placed
from d9d_lora.placement import is_of_own_experts, local_of, ranks_of_experts
from d9d_lora.plan.ledger import Key
from d9d_lora.plan.paper_experts import experts_on_paper
from d9d_lora.train import model as models
from d9d_lora.train.replicated import is_over_data

if TYPE_CHECKING:
    from d9d_lora.plan.rehearsal import Rehearsal


def on_paper(rehearsal: "Rehearsal", row: int) -> Counter[Key]:
    """Bytes by (phase, axis, kind), as the ledger counts them."""
    world, model = rehearsal.world, rehearsal.model
    parallel = world.parallel
    over = parallel.shards * parallel.dp_replicate
    found: Counter[Key] = Counter()
    blocks = tuple(f"{name}." for name, _ in models.blocks_of(model))
    for name, p in model.named_parameters():
        if ranks_of_experts(p) > 1:
            continue  # of these `paper_experts.py` tells
        if over > 1 and is_over_data(p):
            whole = padded(p, parallel.shards, parallel.tp)
            if parallel.shards > 1:
                found["forward", "dp_shard", "all_gather"] += whole
                found["backward", "dp_shard", "all_gather"] += whole if name.startswith(blocks) else 0
                found["backward", "dp_shard", "reduce_scatter"] += whole if p.requires_grad else 0
            if parallel.dp_replicate > 1:
                found["backward", "dp_replicate", "all_reduce"] += whole // parallel.shards if p.requires_grad else 0
    parts = {id(p) for p, _ in rehearsal.built.sum._in_parts()}
    shards = "dp_shard" if parallel.dp_shard > 1 or parallel.cp == world.size else "cp"  # the name of a group of ranks is one
    data = "dp" if min(parallel.dp_replicate, parallel.shards) > 1 else shards if parallel.shards > 1 else "dp_replicate"
    for p in (p for p in rehearsal.params.values() if not is_of_own_experts(p)):
        over_data = over > 1 and not is_over_data(p)
        axes = [data] * over_data + ["tp"] * (id(p) in parts)
        if axes:
            found["sum", axes[0] if len(axes) == 1 else "world", "all_reduce"] += local_of(p).nbytes + p.element_size() * over_data
    context = rehearsal.built.context
    here = row if context is None else -(-row // context.row_multiple) * context.row_multiple // parallel.cp
    if parallel.tp > 1 and not parallel.sequence_parallel:
        found.update(_tensor_parallel(rehearsal, here))
    found.update(experts_on_paper(rehearsal, here))
    if context is not None:
        found.update(_context_parallel(rehearsal, here, context.kind))
    return Counter({k: v for k, v in found.items() if v})


def padded(p: Tensor, dp: int, tp: int) -> int:
    """Bytes of a gathered parameter, within its tensor-parallel shard."""
    assert isinstance(p, DTensor)
    shape, where = list(p.shape), dict(zip(p.device_mesh.mesh_dim_names or (), p.placements))
    for axis, n in (("tp", tp), ("dp_shard", dp), ("dp_shard_cp", dp)):
        if axis in where and not where[axis].is_replicate():
            dim: int = where[axis].dim  # type: ignore[attr-defined]
            shape[dim] = -(-shape[dim] // n) * (1 if axis == "tp" else n)
    return math.prod(shape) * p.element_size()


def _tensor_parallel(rehearsal: "Rehearsal", row: int) -> dict[Key, int]:
    data = rehearsal.config.data
    config: Any = rehearsal.model.config
    config = config.get_text_config()
    size = rehearsal.built.dtype.itemsize
    bsh = data.micro_batch_size * row * config.hidden_size * size
    blocks = config.num_hidden_layers
    regions, first, routed = 2 * blocks, 1, 0
    if hosts := [m for m in rehearsal.model.modules() if placed(m)]:
        linear = [n for n, m in rehearsal.model.named_modules() if isinstance(m, nn.Linear) and _by_columns(m.weight)]
        regions, first = len(linear) + len(hosts), int(any("attn" in n for n in linear))
        routed = len(hosts) * data.micro_batch_size * row * config.num_experts_per_tok * size
    again = blocks if rehearsal.config.train.activation_checkpointing else 0  # early stop: the last layer of a block is not run again
    return {
        ("forward", "tp", "all_reduce"): (regions + 1) * bsh,
        ("backward", "tp", "all_reduce"): (regions - first + 1 + again) * bsh + routed,
        ("forward", "tp", "all_gather"): data.micro_batch_size * row * config.vocab_size * size,
    }


def _by_columns(weight: Tensor) -> bool:
    """Whether tensor parallelism shards the columns of a linear layer: its output is then completed by a sum."""
    if not isinstance(weight, DTensor):
        return False
    return any(axis == "tp" and getattr(p, "dim", None) == 1 for axis, p in zip(weight.device_mesh.mesh_dim_names or (), weight.placements))


def _context_parallel(rehearsal: "Rehearsal", n: int, kind: str) -> dict[Key, int]:
    parallel, recomputed = rehearsal.world.parallel, rehearsal.config.train.activation_checkpointing
    config: Any = rehearsal.model.config
    config = config.get_text_config()
    heads, kv_heads = heads_of(config, parallel.tp)
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = config.num_hidden_layers * rehearsal.config.data.micro_batch_size * n * width * rehearsal.built.dtype.itemsize
    if kind == "ulysses":
        bytes_ = each * 2 * (heads + kv_heads)
        return {("forward", "cp", "all_to_all"): bytes_, ("backward", "cp", "all_to_all"): bytes_ * (1 + recomputed)}
    bytes_ = each * parallel.cp * 2 * kv_heads
    again = {("backward", "cp", "all_gather"): bytes_} if recomputed else {}
    return {("forward", "cp", "all_gather"): bytes_, ("backward", "cp", "reduce_scatter"): bytes_, **again}
