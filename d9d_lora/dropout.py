"""Dropout on an adapter's input whose mask does not depend on the layout.

Replicas over tensor parallelism must draw one mask whatever the ambient seeds, or lora_A drifts apart; data-parallel ranks must
draw different ones; a recomputed forward (activation checkpointing) must draw the same one again. So the mask is a function of
(layer name, clock), drawn whole on the input's width and sliced, and nothing of it is stored for the backward.

    clock = the number of training forwards of the injected model and the replica  (a plain loop)
          = the number of the microbatch in the whole run                          (our trainer: the same on every layout)
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d9d_lora.placement import Placing, key_of


class Clock:
    """What the masks of one model share. Kept in a tensor, so that a compiled graph does not take it for a constant."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.now = torch.zeros((), dtype=torch.int64)
        self._forwards = 0
        self._driven = False

    def set(self, *position: int) -> None:
        """Driven by a trainer: `position` numbers the microbatch in the whole run, whoever computes it."""
        self._driven = True
        self.now.fill_(key_of(self.seed, "position", *position))

    def tick(self, module: nn.Module, args: object) -> None:
        """A forward pre-hook of the injected model: blocks recomputed in the backward do not pass here, so they keep the time."""
        if module.training and not self._driven:
            self._forwards += 1
            self.now.fill_(key_of(self.seed, "forward", self._forwards))


class AdapterDropout(nn.Module):
    """`x * mask / (1 - p)`; the mask covers all `size` columns of the input, of which x may be a part."""

    def __init__(self, p: float, name: str = "", clock: Clock | None = None) -> None:
        super().__init__()
        self.p = p
        self.name = name
        self.clock = clock

    def forward(self, x: Tensor, placing: Placing | None = None, size: int | None = None) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        if self.clock is None:  # a layer that stands alone, outside any injected model
            return nn.functional.dropout(x, self.p)
        placing = placing or Placing()
        size = size or x.shape[-1]
        start, _ = placing.span(size, "I")
        key = key_of(self.name, "driven" if self.clock._driven else replica(placing))
        return _drop(x, self.clock.now, key, self.p, size, start)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def replica(placing: Placing) -> int:
    """A number that tensor-parallel ranks share and data-parallel ranks do not: the least rank of this tensor-parallel group."""
    if placing.mesh is not None:
        return min(dist.get_process_group_ranks(placing.mesh.get_group()))
    return dist.get_rank() if dist.is_initialized() else 0


@torch.library.custom_op("d9d_lora::drop", mutates_args=())
def _drop(x: Tensor, now: Tensor, key: int, p: float, size: int, start: int) -> Tensor:
    seed = (int(now) ^ key) & (2**63 - 1)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    rows = x.numel() // max(x.shape[-1], 1)
    keep = torch.empty((rows, size), dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
    keep = keep[:, start : start + x.shape[-1]].reshape(x.shape)
    return torch.where(keep, x * (1 / (1 - p)), 0)


@_drop.register_fake
def _(x: Tensor, now: Tensor, key: int, p: float, size: int, start: int) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, now, *rest = inputs
    ctx.save_for_backward(
        now.clone()
    )  # the clock runs on before the backward: keep the time, eight bytes, not the mask
    ctx.rest = rest


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (now,) = ctx.saved_tensors
    return _drop(grad, now, *ctx.rest), None, None, None, None, None


_drop.register_autograd(_backward, setup_context=_remember)
