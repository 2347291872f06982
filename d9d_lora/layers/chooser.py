"""Which way the thin products of column-parallel layers go, when sequence parallelism has sharded the tokens over t ranks.

Of a group of layers that read one input, with N tokens, I columns, R ranks of all of them together, and e bytes a number, on each rank:

                          gathered                rank space
    A-products            6 N I R FLOPs           6 N I R / t           z = x A^T, dA = u^T x, dx += u A
    kept                  N I e  and  N R e       N I e / t  and  N R e   x; z
    collectives beside    none                    2, of N R e bytes     z is gathered, u = dy B is reduce-scattered
    the base's own

The rule. A collective takes latency + (1 - 1/t) bytes / bandwidth, a FLOP of a thin product 1 / rate. Rank space is taken if it loses
less time than the other way not to keep N tokens of x, which is to gather x once more in the backward:

    2 latency + 2 (1 - 1/t) N R e / bandwidth  -  (1 - 1/t) 6 N I R / rate   <=   latency + (1 - 1/t) N I e / bandwidth

Where the block is recomputed, x is not kept in any case, and the right side is 0. Every rank must choose alike, so nothing here is timed.
"""

from dataclasses import dataclass
from typing import Literal

Choice = Literal["auto", "gathered", "rank_space"]


@dataclass(frozen=True)
class Group:
    """Column-parallel layers that read one input.

    Attributes:
        tokens, columns, ranks: N, I, R.
        parallel: t.
        itemsize: e.
    """

    tokens: int
    columns: int
    ranks: int
    parallel: int
    itemsize: int


@dataclass(frozen=True)
class Costs:
    """Of one microbatch, forward and backward, on one rank.

    Attributes:
        kept: Bytes between forward and backward.
        flops: Of the A-products.
        collectives: Beside those of the base.
        wire: Their bytes, as the whole of each buffer; a ring sends (1 - 1/t) of them.
    """

    kept: int
    flops: int
    collectives: int
    wire: int


def gathered(g: Group) -> Costs:
    return Costs(g.tokens * (g.columns + g.ranks) * g.itemsize, 6 * g.tokens * g.columns * g.ranks, 0, 0)


def rank_space(g: Group) -> Costs:
    """Of the rank that holds the most tokens."""
    own, z = -(-g.tokens // g.parallel), g.tokens * g.ranks * g.itemsize
    return Costs(own * g.columns * g.itemsize + z, 6 * own * g.columns * g.ranks, 2, 2 * z)


@dataclass(frozen=True)
class ColumnPath:
    """What is chosen, and what a choice is made from.

    Attributes:
        choice: `rank_space` is an error where it cannot be taken; `auto` then stays on the gathered path.
        latency: Seconds that a small collective takes over the tensor-parallel ranks.
        bandwidth: Bytes a second that each of them sends.
        rate: FLOPs a second of thin products.
        recomputed: The layers are in blocks that are computed again in the backward.
    """

    choice: Choice = "auto"
    latency: float = 20e-6
    bandwidth: float = 100e9
    rate: float = 100e12
    recomputed: bool = False

    def lost(self, g: Group) -> float:
        """Seconds by which a step in rank space is longer than one on gathered tokens; negative: shorter."""
        ours, theirs = rank_space(g), gathered(g)
        wire = (1 - 1 / g.parallel) * ours.wire / self.bandwidth
        return ours.collectives * self.latency + wire - (theirs.flops - ours.flops) / self.rate

    def price(self, g: Group) -> float:
        """Seconds that the cheapest other way not to keep the gathered tokens takes."""
        if self.recomputed:
            return 0.0
        return self.latency + (1 - 1 / g.parallel) * g.tokens * g.columns * g.itemsize / self.bandwidth

    def takes_rank_space(self, g: Group) -> bool:
        return self.choice == "rank_space" or (self.choice == "auto" and self.lost(g) <= self.price(g))
