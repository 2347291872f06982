"""The promise: an adapter that is proven live, and one and the same on every rank.

    coverage    after the first steps, every trained parameter has had a gradient that is not zero, on some rank
    checksum    ranks that should hold the same piece of a factor hold the same bits: at the start, every K steps, at every save
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d9d_lora.boxes import local_runs
from d9d_lora.placement import key_of, local_of
from d9d_lora.state.atomic import gather


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
        keys = torch.tensor([key_of(name) for name in self._params], dtype=torch.int64)
        rows = torch.stack([keys, self._seen.view(torch.int32).long()], 1)  # the bits of floats above zero are ordered as they are
        largest: dict[int, int] = {}
        for key, bits in _everyone(rows.to(device)).flatten(0, 1).tolist():
            largest[key] = max(bits, largest.get(key, 0))
        if not all(bits for key, bits in largest.items() if key != _NONE):
            dead = sorted({name for names in gather([n for n in self._params if not largest[key_of(n)]]) for name in names})
            raise AdapterFault(
                f"after {step} steps, {len(dead)} of {len(largest.keys() - {_NONE})} trained parameters have had no gradient: "
                f"{_some(dead)}. "
                "They are not on the way from the loss (a layer that is not called, a detached or no_grad forward, a branch that is "
                "switched off). Leave them out of the targets, or mend the model's forward."
            )


@torch.no_grad()
def checksums(params: Mapping[str, nn.Parameter]) -> Tensor:
    """int64 [parameters, 3]: of which parameter, which box of the whole a rank holds, and a checksum of its bits."""
    rows = []
    for name, p in params.items():
        local = local_of(p.detach()).contiguous()
        total = torch.zeros((), dtype=torch.int64, device=local.device)
        words = local.view(-1).view(torch.int16 if local.element_size() == 2 else torch.int32)
        for n, block in enumerate(words.split(1 << 22)):  # in blocks: int64 takes several times the memory of the parameter
            place = torch.arange(n, n + block.numel(), device=local.device) % 65521 + 1
            total += (block.to(torch.int64) * place).sum()
        held = key_of(*((s.start, s.stop) for run in local_runs(p) for s in run)) if local.numel() else 0
        rows.append(torch.stack([torch.tensor(key_of(name), device=local.device), torch.tensor(held, device=local.device), total]))
    return torch.stack(rows) if rows else torch.empty(0, 3, dtype=torch.int64)


def check_replicas(params: Mapping[str, nn.Parameter], when: str, device: torch.device) -> None:
    """Raises `AdapterFault` on every rank if two ranks hold different bits of one piece. Collective: one small gather.

    Ranks may hold other parameters (pipeline stages); names say what is the same.
    """
    if not dist.is_initialized():
        return
    first: dict[tuple[int, int], tuple[int, int]] = {}
    apart: dict[int, str] = {}
    for rank, rows in enumerate(_everyone(checksums(params).to(device)).tolist()):
        for key, box, total in rows:
            other, expected = first.setdefault((key, box), (rank, total))
            if total != expected:
                apart.setdefault(key, f"rank {rank} against rank {other}")
    if apart:
        drifted = sorted({f"{n} ({apart[key_of(n)]})" for names in gather([n for n in params if key_of(n) in apart]) for n in names})
        raise AdapterFault(
            f"{when}: {len(drifted)} replicated parameters differ between ranks that should hold the same bits: {_some(drifted)}. Some "
            "ranks were given another start, another gradient or another mask; saving would keep one rank's version."
        )


_NONE = -1  # where a rank has fewer parameters than another; no key is negative


def _everyone(rows: Tensor) -> Tensor:
    """int64 [ranks, the most parameters of any, columns]: every rank's table, filled up with `_NONE`. Collective."""
    if not dist.is_initialized():
        return rows.unsqueeze(0)
    most = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    mine = rows.new_full((int(most), rows.shape[1]), _NONE)
    mine[: len(rows)] = rows
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu()


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
