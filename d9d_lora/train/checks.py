"""The promise: an adapter that is proven live, and one and the same on every rank.

    coverage    after the first steps, every trained parameter has had a gradient that is not zero, on some rank
    checksum    ranks that should hold the same piece of a factor hold the same bits: at the start, every K steps, at every save
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d9d_lora.placement import box_of, key_of, local_of


class AdapterFault(RuntimeError):
    """The adapter is dead, partial, or different on ranks that should agree. Nothing has been saved."""


class Coverage:
    """Remembers which trained parameters have had a gradient."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params = params
        self._seen = torch.zeros(len(params))

    def observe(self) -> None:
        """Call after a backward, before gradients are cleared."""
        for i, p in enumerate(self._params.values()):
            if p.grad is not None and local_of(p.grad).numel():
                largest = local_of(p.grad).abs().max()
                if not bool(largest.isfinite()):
                    continue
                self._seen[i] = max(float(self._seen[i]), float(largest))

    def check(self, step: int, device: torch.device) -> None:
        """Raises `AdapterFault` on every rank if a parameter has had no gradient anywhere. Collective."""
        seen = self._seen.to(device)
        if dist.is_initialized():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        dead = [name for name, value in zip(self._params, seen.tolist()) if value == 0]
        if dead:
            raise AdapterFault(
                f"after {step} steps, {len(dead)} of {len(self._params)} trained parameters have had no gradient: {_some(dead)}. "
                "They are not on the way from the loss (a layer that is not called, a detached or no_grad forward, a branch that is "
                "switched off). Leave them out of the targets, or mend the model's forward."
            )


@torch.no_grad()
def checksums(params: Mapping[str, nn.Parameter]) -> Tensor:
    """int64 [parameters, 2]: which box of the whole a rank holds, and a checksum of its bits."""
    rows = []
    for p in params.values():
        local = local_of(p.detach()).contiguous()
        total = torch.zeros((), dtype=torch.int64, device=local.device)
        words = local.view(-1).view(torch.int16 if local.element_size() == 2 else torch.int32)
        for n, block in enumerate(words.split(1 << 22)):  # in blocks: int64 takes several times the memory of the parameter
            place = torch.arange(n, n + block.numel(), device=local.device) % 65521 + 1
            total += (block.to(torch.int64) * place).sum()
        held = key_of(*((s.start, s.stop) for s in box_of(p))) if local.numel() else 0
        rows.append(torch.stack([torch.tensor(held, device=local.device), total]))
    return torch.stack(rows)


def check_replicas(params: Mapping[str, nn.Parameter], when: str) -> None:
    """Raises `AdapterFault` on every rank if two ranks hold different bits of one piece. Collective: one small gather."""
    if not dist.is_initialized():
        return
    mine = checksums(params)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone).cpu()  # [rank, parameter, 2]
    drifted = []
    for i, name in enumerate(params):
        first: dict[int, tuple[int, int]] = {}
        for rank, (box, total) in enumerate(table[:, i].tolist()):
            other, expected = first.setdefault(box, (rank, total))
            if total != expected:
                drifted.append(f"{name} (rank {rank} against rank {other})")
                break
    if drifted:
        raise AdapterFault(
            f"{when}: {len(drifted)} replicated parameters differ between ranks that should hold the same bits: {_some(drifted)}. Some "
            "ranks were given another start, another gradient or another mask; saving would keep one rank's version."
        )


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
