"""Traffic of experts that are shared out over `ep`, by formulas, for an even routing: as many rows to every expert.

    gathers, scatter    of a rank's own experts over `efsdp`, as `paper.py` has it for all else
    sum                 of whole factors over the ranks of the same experts; with `tp` over both; of sharded ones that are one for all
                        experts over `ep` (whole ones are summed as all others: `paper.py`)
    rows                forward, a layer: n (E / n + 3) integers, then b s K H numbers out and as many home; backward both ways back (the
                        way out only where the layer's input has a gradient); recomputed blocks send all of the forward again
"""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from d9d_lora.placement import is_of_own_experts, local_of, ranks_of_experts
from d9d_lora.plan.ledger import SCALARS, Key
from d9d_lora.share_experts import shared_out
from d9d_lora.train.replicated import is_over_data

if TYPE_CHECKING:
    from d9d_lora.plan.rehearsal import Rehearsal

INTEGER = 8


def experts_on_paper(rehearsal: "Rehearsal", row: int) -> Counter[Key]:
    """Bytes by (phase, axis, kind), as the ledger counts them."""
    found: Counter[Key] = Counter()
    parallel, model = rehearsal.world.parallel, rehearsal.model
    if parallel.ep == 1:
        return found
    shards = parallel.dp_shard // parallel.ep
    for p in model.parameters():
        if ranks_of_experts(p) > 1 and is_over_data(p):
            whole = _gathered(p, shards)
            if shards > 1:
                found["forward", "efsdp", "all_gather"] += whole
                found["backward", "efsdp", "all_gather"] += whole
                found["backward", "efsdp", "reduce_scatter"] += whole if p.requires_grad else 0
            if parallel.dp_replicate > 1:
                found["backward", "dp_replicate", "all_reduce"] += whole // shards if p.requires_grad else 0
    parts = {id(p) for p, _ in rehearsal.built.sum._in_parts()}
    same = [axis for axis, n in (("dp_replicate", parallel.dp_replicate), ("efsdp", shards)) if n > 1]
    for p in rehearsal.params.values():
        if is_of_own_experts(p) and not is_over_data(p):
            axes = same + ["tp"] * (id(p) in parts)
            if axes:
                axis = axes[0] if len(axes) == 1 else "experts x tp" if "tp" in axes else "experts"
                found["sum", axis, "all_reduce"] += local_of(p).nbytes + p.element_size() * bool(same)
        if is_over_data(p) and ranks_of_experts(p) > 1 and not is_of_own_experts(p):
            found["sum", "ep", "all_reduce"] += local_of(p).nbytes
    found.update(_rows(rehearsal, row))
    return found


def _gathered(p: Tensor, shards: int) -> int:
    """Bytes of a rank's own experts, gathered."""
    assert isinstance(p, DTensor)
    shape, names = list(p.shape), p.device_mesh.mesh_dim_names or ()
    for axis, placement in sorted(zip(names, p.placements), key=lambda pair: pair[0] == "efsdp"):
        if not placement.is_replicate():
            dim: int = placement.dim  # type: ignore[attr-defined]
            n = p.device_mesh[axis].size()
            shape[dim] = -(-shape[dim] // n) * (shards if axis == "efsdp" else 1)
    return math.prod(shape) * p.element_size()


def _rows(rehearsal: "Rehearsal", row: int) -> Counter[Key]:
    data, parallel = rehearsal.config.data, rehearsal.world.parallel
    config: Any = rehearsal.model.config
    config = config.get_text_config()
    rows = data.micro_batch_size * row * config.num_experts_per_tok * config.hidden_size * rehearsal.built.dtype.itemsize
    order = {id(m): i for i, m in enumerate(rehearsal.model.modules())}
    trained = [order[id(m)] for m in rehearsal.model.modules() for p in m.parameters(recurse=False) if p.requires_grad]
    found: Counter[Key] = Counter()
    for host in shared_out(rehearsal.model):
        message = (host.num_experts + 3 * parallel.ep) * INTEGER  # type: ignore[operator]
        forward = (message if message > SCALARS else 0) + 2 * rows
        found["forward", "ep", "all_to_all"] += forward
        found["backward", "ep", "all_to_all"] += rows * (2 if min(trained) < order[id(host)] else 1)
        if rehearsal.config.train.activation_checkpointing:
            found["backward", "ep", "all_to_all"] += forward
    return found


__all__ = ["experts_on_paper"]
