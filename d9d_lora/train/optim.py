"""AdamW with fp32 state, its schedule, a clip that works over mixed meshes, and the state by name for a checkpoint."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from d9d_lora.placement import local_of
from d9d_lora.train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `steps`: a function, so there is no scheduler state to lose."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * min(done, 1))) / 2}[config.schedule]
    return config.lr * (shape if config.schedule == "constant" else config.final + (1 - config.final) * max(shape, 0))


def adamw(params: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with its state allocated: a checkpoint is loaded into what exists."""
    optimiser = torch.optim.AdamW(
        list(params.values()), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    for p in params.values():
        optimiser.state[p] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimiser


def optimiser_state(params: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by `optim.<parameter>.<state>`; they alias the live state, so loading into them loads it."""
    return {f"optim.{n}.{k}": v for n, p in params.items() for k, v in optimiser.state[p].items()}


@torch.no_grad()
def clip_(params: Iterable[nn.Parameter], most: float | None) -> float:
    """Scales all gradients so that their joint norm is at most `most`; returns the norm before.

    Parameters may lie on different meshes (FSDP2 beside FSDP2 x TP), which `clip_grad_norm_` refuses: squares are summed
    locally for each way of being sharded, then reduced once for each.
    """
    grads = [p.grad for p in params if p.grad is not None]
    squares: dict[object, list[Tensor]] = {}
    like: dict[object, DTensor | None] = {}
    for grad in grads:
        sharded = (grad.device_mesh, tuple(p.is_shard() for p in grad.placements)) if isinstance(grad, DTensor) else None
        squares.setdefault(sharded, []).append(local_of(grad))
        like[sharded] = grad if isinstance(grad, DTensor) else None
    total = torch.zeros((), dtype=torch.float32)
    for sharded, local in squares.items():  # the order of parameters: the same on every rank
        norms = torch._foreach_norm([g.float() if g.dtype != torch.float64 else g for g in local])
        square = torch.stack([n.double() for n in norms]).square().sum() if local[0].device.type != "mps" else torch.stack(norms).square().sum()
        grad = like[sharded]
        if grad is not None:
            parts = [Partial() if p.is_shard() else Replicate() for p in grad.placements]
            square = DTensor.from_local(square, grad.device_mesh, parts, run_check=False).full_tensor()
        total = total.to(square) + square
    norm = total.sqrt()
    if most is not None:
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local_of(g) for g in grads], scale.to(torch.float32 if not grads else local_of(grads[0]).dtype))
    return float(norm)
