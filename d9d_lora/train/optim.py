"""AdamW with fp32 state, its schedule, a clip that works over mixed meshes, and the state by name for a checkpoint.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B, which starts at zero, learns at `lora_plus_ratio` times the rate of A.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from d9d_lora.placement import at_least_fp32, local_of
from d9d_lora.train.config import OptimConfig

_IS_B = re.compile(r"\.lora_B(_bias)?\.weight$")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `steps`: a function, so there is no scheduler state to lose."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * min(done, 1))) / 2}[config.schedule]
    return config.lr * (shape if config.schedule == "constant" else config.final + (1 - config.final) * max(shape, 0))


def adamw(params: Mapping[str, nn.Parameter], config: OptimConfig, names: Iterable[str] | None = None) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with its state allocated: a checkpoint is loaded into what exists.

    `names`: of all parameters the run trains, where this rank has some of them.
    """
    optimiser = torch.optim.AdamW(
        groups_of(params, config.lora_plus_ratio, names), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    for p in params.values():
        optimiser.state[p] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimiser


def groups_of(params: Mapping[str, nn.Parameter], ratio: float | None, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The parameters, apart by `ratio`: what the learning rate of a group is multiplied by."""
    if ratio is None:
        return [{"params": list(params.values()), "ratio": 1.0}]
    fast = [p for name, p in params.items() if _IS_B.search(name)]
    if not any(map(_IS_B.search, params if names is None else names)):
        raise ValueError(
            f"optim.lora_plus_ratio={ratio} is for the factor B of LoRA, and this method trains no `lora_B`; raise optim.lr instead"
        )
    rest = [p for name, p in params.items() if not _IS_B.search(name)]
    return [{"params": rest, "ratio": 1.0}, {"params": fast, "ratio": ratio}]


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate * group["ratio"]


def optimiser_state(params: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by `optim.<parameter>.<state>`; they alias the live state, so loading into them loads it."""
    return {f"optim.{n}.{k}": v for n, p in params.items() for k, v in optimiser.state[p].items()}


@torch.no_grad()
def clip_(
    params: Iterable[nn.Parameter],
    most: float | None,
    *,
    counted: Callable[[nn.Parameter], bool] = lambda p: True,
    total: Callable[[Tensor], Tensor] = lambda square: square,
) -> float:
    """Scales all gradients so that their joint norm is at most `most`; returns the norm before.

    `counted`, `total`: where ranks hold other parameters: whether the square of one counts here, and what adds the squares of all.

    Parameters may lie on different meshes (FSDP2 beside FSDP2 x TP), which `clip_grad_norm_` refuses: squares are summed
    locally for each way of being sharded, then reduced once for each.
    """
    params = list(params)
    grads = [p.grad for p in params if p.grad is not None]
    alike: dict[object, list[Tensor]] = {}  # asked as `not is_replicate`: FSDP2 x TP has _StridedShard, which is no Shard
    for g in (p.grad for p in params if p.grad is not None and counted(p)):
        how = (g.device_mesh, tuple(not p.is_replicate() for p in g.placements)) if isinstance(g, DTensor) else None
        alike.setdefault(how, []).append(g)
    sum_ = torch.zeros(())
    for same in alike.values():  # the order of parameters: the same on every rank
        norms = torch._foreach_norm([at_least_fp32(local_of(g)) for g in same])
        square = torch.stack(list(norms)).square().sum()
        first = same[0]
        if isinstance(first, DTensor):
            parts = [Replicate() if p.is_replicate() else Partial() for p in first.placements]
            square = DTensor.from_local(square, first.device_mesh, parts, run_check=False).full_tensor()
        sum_ = sum_.to(square) + square
    norm = total(sum_).sqrt()
    if most is not None and grads:
        torch._foreach_mul_([local_of(g) for g in grads], float((most / (norm + 1e-6)).clamp(max=1.0)))
    return float(norm)
