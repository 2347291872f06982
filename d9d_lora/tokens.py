"""Which tokens of a row a context-parallel rank has: a chunk from the head of the row and its mirror image from the tail.

    a row of N tokens, P ranks, 2 P chunks of c = N / 2P;  rank p has chunks p and 2P - 1 - p

A token looks back at all before it, so the tail costs more than the head. Of keys up to the end of its own chunk, rank p's queries
meet (p + 1) c + (2P - p) c: (2P + 1) c^2 scores on every rank. Of contiguous shares the last rank would have 4 P c^2, and the others
would wait for it. torch's ring attention cuts rows the same way.
"""

import torch
from torch import Tensor

IGNORE = -100  # the label of what is not trained, as everywhere in Hugging Face


def lengthened(ids: Tensor, positions: Tensor, targets: Tensor, more: int, *, packed: bool, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [b, N] of ids, positions and targets with `more` tokens of padding on the right, which no real token sees and nobody trains.
    In a packed row they are a document of their own."""
    rows = len(ids)
    after = torch.arange(more, device=ids.device).expand(rows, -1)
    return (
        torch.cat([ids, ids.new_full((rows, more), pad_id)], 1),
        torch.cat([positions, after if packed else positions[:, -1:] + 1 + after], 1),
        torch.cat([targets, targets.new_full((rows, more), IGNORE)], 1),
    )


def chunks_of(part: int, parts: int) -> tuple[int, int]:
    """The two chunks of a rank, of 2 `parts`."""
    return part, 2 * parts - 1 - part


def share_of(t: Tensor, part: int, parts: int, dim: int = 1) -> Tensor:
    """This rank's tokens of all, along `dim`, whose size is a multiple of 2 `parts`."""
    chunks = t.chunk(2 * parts, dim)
    return torch.cat([chunks[i] for i in chunks_of(part, parts)], dim)


def in_order(shares: Tensor, dim: int) -> Tensor:
    """[P, ...] the shares of all ranks -> [...] all tokens in their order; `dim` is that of the tokens of one share."""
    halves = [s.chunk(2, dim) for s in shares.unbind(0)]
    return torch.cat([head for head, _ in halves] + [tail for _, tail in reversed(halves)], dim)


def dealt(t: Tensor, parts: int, dim: int) -> Tensor:
    """[...] all tokens along `dim` -> [P, ...] the shares of all ranks: the inverse of `in_order`."""
    return torch.stack([share_of(t, part, parts, dim) for part in range(parts)])
