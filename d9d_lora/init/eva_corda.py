"""Starts that follow from what layers see.

    EVA     A = the first r principal directions of the layer's input, B = 0        Paischer et al. 2024, arXiv:2410.07170
    CorDA   W C = U S V^T with C = E[x x^T];  B = U sqrt(S/s), A = sqrt(S/s) V^T C^-1 for r chosen triplets, and W <- W - s B A
            (the r largest: "ipm", instruction previewed; the r smallest: "kpm", knowledge preserved)
                                                                                    Yang et al. 2024, arXiv:2406.05223

Each is a summary of inputs (`data.py`) and what is made of it. Where tensor parallelism shards a layer's input, each rank keeps its own
columns, and only Gram matrices of a few dozen rows travel.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d9d_lora.init.data import Inputs, Step, survey
from d9d_lora.thin import Thin

Total = Callable[[Tensor], Tensor]
ROUNDS = 4  # of the subspace iteration, as many as PEFT's
SPARE = 8  # rows a summary keeps beyond those that are asked for: what is cut off in one step may matter in the next


class Principal:
    """The k largest principal directions of rows that come in batches: centred incremental PCA.

    Joining two sets is exact up to what was cut off: their directions scaled by singular values are stacked, with one more row for
    the distance of their means (Ross et al. 2008).

    Attributes:
        rows: [k, I] directions times singular values, of the centred inputs so far.
        square: The sum of squares of the centred inputs, over all columns.
    """

    def __init__(self, k: int, total: Total) -> None:
        self.k, self._total = k, total
        self.rows, self.mean, self.count, self.square = torch.zeros(0), torch.zeros(0), 0.0, 0.0

    def of(self, x: Tensor) -> list[Tensor]:
        x = x.double()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        x = x - mean
        keep = self._kept(x)
        rows = x.new_zeros((self.k + SPARE, x.shape[1]))
        rows[: len(keep)] = keep
        return [rows, mean, x.new_tensor([len(x), float(self._total(x.square().sum()))])]

    def add(self, part: list[Tensor]) -> None:
        rows, mean, (count, square) = part[0], part[1], part[2].tolist()
        if count == 0:
            return
        if self.count == 0:
            self.rows, self.mean, self.count, self.square = rows, mean, count, square
            return
        away, weight = mean - self.mean, self.count * count / (self.count + count)
        self.rows = self._kept(torch.cat([self.rows, rows, math.sqrt(weight) * away[None]]))
        self.square += square + weight * float(self._total(away.square().sum()))
        self.mean = self.mean + away * (count / (self.count + count))
        self.count += count

    def directions(self) -> tuple[Tensor, Tensor]:
        """(directions [k, I], singular values [k]), largest first; fewer than k if the inputs span fewer."""
        rows = self._kept(self.rows)[: self.k]
        sizes = self._total(rows.square().sum(1)).sqrt()
        there = sizes > 1e-7 * sizes.max()
        return rows[there] / sizes[there, None], sizes[there]

    def ratios(self) -> Tensor:
        """The share of the inputs' variance along each direction."""
        return self.directions()[1].square() / max(self.square, 1e-300)

    def _kept(self, rows: Tensor) -> Tensor:
        """The same rows turned so that the first are the largest; the smallest are dropped.

        Of many rows a few combinations are taken first, that hold the largest directions but for what is much smaller (randomised
        subspace iteration, Halko et al. 2011): to diagonalise a matrix as large as a microbatch's tokens would take minutes a layer.
        """
        wide = 2 * (self.k + SPARE)
        if len(rows) > 2 * wide:
            generator = torch.Generator().manual_seed(len(rows))  # the same on every rank
            held = torch.randn(len(rows), wide, generator=generator, dtype=rows.dtype).to(rows.device)
            for _ in range(ROUNDS):
                held, _ = torch.linalg.qr(self._total(rows @ (rows.T @ held)))
            rows = held.T @ rows
        gram = self._total(rows @ rows.T)
        _, turn = torch.linalg.eigh(gram)
        return turn.flip(1)[:, : self.k + SPARE].T @ rows


class Covariance:
    """C = E[x x^T], [I, I], whole on every rank: inputs are gathered over the ranks that share them."""

    def __init__(self, whole: Callable[[Tensor], Tensor]) -> None:
        self._whole = whole
        self.sum, self.count = torch.zeros(0), 0.0

    def of(self, x: Tensor) -> list[Tensor]:
        x = self._whole(x).float()
        return [x.T @ x, x.new_tensor([len(x)])]

    def add(self, part: list[Tensor]) -> None:
        self.sum = part[0] if self.count == 0 else self.sum + part[0]
        self.count += float(part[1])

    @property
    def mean(self) -> Tensor:
        return self.sum / max(self.count, 1)


@dataclass(frozen=True)
class Eva:
    """A layer's start: A[r, I] and what the redistribution made of its rank and alpha."""

    A: Tensor
    r: int
    alpha: float


@torch.no_grad()
def eva(
    module: nn.Module,
    targets: Mapping[str, nn.Module],
    ranks: Mapping[str, tuple[int, float]],
    steps: Iterable[Step],
    *,
    group: dist.ProcessGroup | None = None,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
) -> dict[str, Eva]:
    """EVA's start of every target. Collective.

    Args:
        ranks: (rank, alpha) of every target, before the redistribution.
        rho: A layer's rank may grow to rho times its own; 1 leaves ranks as they are.
        tau: The survey ends when every direction that is used has turned by less than this cosine in one step.
        whiten: Divide each direction by the root of its singular value.
        adjust_scaling_factors: Let alpha follow the rank, so that the scaling stays.
    """
    most = {name: round(r * rho) for name, (r, _) in ranks.items()}
    last: dict[int, Tensor] = {}
    totals: dict[int, Inputs] = {}

    def make(name: str, x: Inputs) -> Principal:
        p = Principal(max(most.values()), x.total)
        totals[id(p)] = x
        return p

    def settled(found: dict[str, Principal]) -> bool:
        done, chosen = True, counts(found)
        for p in {id(p): p for p in found.values()}.values():
            now, _ = p.directions()
            before = last.get(id(p))
            last[id(p)] = now
            if before is None or before.shape != now.shape:
                done = False
                continue
            turned = totals[id(p)].total((now * before).sum(1)).abs()
            used = max(chosen[name] for name, q in found.items() if q is p)
            done &= bool((turned[:used] >= tau).all())
        return done

    def counts(found: dict[str, Principal]) -> dict[str, int]:
        ratios = {id(p): p.ratios().tolist() for p in {id(p): p for p in found.values()}.values()}
        return redistributed({name: ratios[id(p)][: most[name]] for name, p in found.items()}, sum(r for r, _ in ranks.values()))

    found = survey(module, targets, steps, make, group=group, enough=settled)
    chosen = counts(found)
    starts = {}
    for name, (r, alpha) in ranks.items():
        p = found[name]
        directions, sizes = p.directions()
        A = totals[id(p)].whole(directions[: chosen[name]])
        largest = A.gather(1, A.abs().argmax(1, keepdim=True)) if len(A) else A  # signs are free: the largest entry is positive
        A = A * largest.sign()
        if whiten:
            A = A / sizes[: chosen[name], None].sqrt()
        starts[name] = Eva(A, chosen[name], alpha * chosen[name] / r if adjust_scaling_factors else alpha)
    return starts


def redistributed(shares: Mapping[str, list[float]], budget: int) -> dict[str, int]:
    """Gives `budget` ranks to the directions that explain most of their layer's input; a layer may end with none."""
    ranked = sorted(((-share, i, name) for name, many in shares.items() for i, share in enumerate(many)), key=lambda x: x[:2])
    chosen = dict.fromkeys(shares, 0)
    for _, _, name in ranked[:budget]:
        chosen[name] += 1
    return chosen


@torch.no_grad()
def corda(weight: Thin, C: Tensor, r: int, scaling: float, method: str) -> tuple[Tensor, Tensor]:
    """(B[O,r], A[r,I]) of one layer. W is not gathered: W^T W, as large as C, is summed over the ranks that share it.

    C is damped until it can be inverted, as PEFT does.
    """
    out, into = weight.shape
    C = C.double()
    damp, eye = 0.01, torch.eye(into, dtype=torch.float64, device=C.device)
    if not bool(C.isfinite().all()) or float(C.diagonal().mean()) <= 0:
        raise ValueError("the covariance of a layer's input is not finite, or zero: look at the data of the survey")
    while True:
        damped = C + damp * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, eye)) < 0.05:
            break
        damp *= 2
    gram = weight.turned(weight.times(damped))  # W^T (W C)
    square, V = torch.linalg.eigh(damped @ gram)
    triplets = min(out, into)
    if r > triplets:
        raise ValueError(f"rank {r} is more than the {triplets} singular values of a [{out}, {into}] weight")
    square, V = square.flip(0)[:triplets].clamp_min(0), V.flip(1)[:, :triplets]
    part = slice(0, r) if method == "ipm" else slice(triplets - r, triplets)
    S, V = square[part].sqrt(), V[:, part]
    U = weight.times(damped @ V) / S.clamp_min(1e-300)
    root = (S / scaling).sqrt()
    return U * root, root[:, None] * (V.T @ inverse)
