"""Starts that follow from the weight W[O,I] and move it: W <- W - s B A, so that the model is unchanged and W's main part is trained.

    pissa          W = U S V^T;  B = U_r sqrt(S_r / s),  A = sqrt(S_r / s) V_r^T      Meng et al. 2024, arXiv:2404.02948
    pissa_niter_N  the same with N rounds of randomised subspace iteration            Halko et al. 2011, arXiv:0909.4061
    olora          W = Q R;      B = Q_r,  A = R_r                                    Büyükakyüz 2024, arXiv:2406.01775

W is only multiplied by thin matrices (`Thin`), so it is never gathered, and each rank gets the same whole factors. PiSSA's triplets
come from block Krylov iteration (Musco and Musco 2015, arXiv:1504.05477), run until they have converged to what the dtype can tell.
Whatever they are, s B A is what is subtracted: an inexact triplet changes what is trained, and never the model.
"""

import re

import torch
from torch import Tensor

from d9d_lora.placement import key_of
from d9d_lora.thin import Thin

EXTRA = 8  # columns beyond the rank: they speed up the convergence of the last triplets
_ROUNDS = re.compile(r"pissa(_niter_(\d+))?")


def is_from_weight(start: bool | str) -> bool:
    return start == "olora" or (isinstance(start, str) and _ROUNDS.fullmatch(start) is not None)


def factors_of(start: str, weight: Thin, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(B[O,r], A[r,I]) of a start by its name."""
    if start == "olora":
        return olora(weight, r)
    rounds = _ROUNDS.fullmatch(start)
    assert rounds is not None
    return pissa(weight, r, scaling, None if rounds[2] is None else int(rounds[2]))


def olora(weight: Thin, r: int) -> tuple[Tensor, Tensor]:
    """The first r columns of Q are those of the first r columns of W; the first r rows of R follow as Q_r^T W."""
    Q = torch.linalg.qr(weight.columns(r)).Q
    return Q, weight.turned(Q).T


def pissa(weight: Thin, r: int, scaling: float, rounds: int | None = None) -> tuple[Tensor, Tensor]:
    """`rounds`: of subspace iteration; None: triplets that have converged."""
    if scaling <= 0:
        raise ValueError(f"PiSSA divides singular values by the scaling of the update, which is {scaling}; give a positive alpha")
    U, S, V = leading(weight, r) if rounds is None else roughly_leading(weight, r, rounds)
    root = (S / scaling).sqrt()
    return U * root, root[:, None] * V.T


def leading(weight: Thin, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U[O,r], S[r], V[I,r]) of the r largest singular values.

    The basis Q of the shorter side grows by blocks, each the last one times W W^T, orthogonal to all before. It is looked at whenever
    it has doubled, and ends as the whole space at the latest, where the triplets are exact.
    """
    side = _Side(weight)
    size = min(side.short, r + EXTRA)
    if side.short <= 4 * size:  # small: the whole space at once
        Y = side.there(torch.eye(side.short, dtype=weight.dtype, device=weight.device))
        U, S, V = torch.linalg.svd(Y.T, full_matrices=False)
        return side.signed(U[:, :r], S[:r], V[:r].T)
    Q = torch.linalg.qr(side.back(side.random(size))).Q
    Y = side.there(Q)
    looks_at = 2 * size
    while True:
        while Q.shape[1] < min(looks_at, side.short):
            block = _orthogonal(side.back(Y[:, -size:])[:, : side.short - Q.shape[1]], Q)
            Q, Y = torch.cat([Q, block], 1), torch.cat([Y, side.there(block)], 1)
        u, S, V = (t[..., :r] for t in _svd(Y))
        U = Q @ u
        off = torch.linalg.vector_norm(side.back(V) - U * S, dim=0)
        if Q.shape[1] == side.short or bool((off <= tolerance(weight.dtype) * S[0]).all()):
            return side.signed(U, S, V)
        looks_at = 2 * Q.shape[1]


def roughly_leading(weight: Thin, r: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same from one block that has been multiplied by W W^T `rounds` times: quick, and exact only where the values fall fast."""
    side = _Side(weight)
    Q = torch.linalg.qr(side.back(side.random(min(side.short, r + EXTRA)))).Q
    for _ in range(rounds):
        Q = torch.linalg.qr(side.back(torch.linalg.qr(side.there(Q)).Q)).Q
    u, S, V = _svd(side.there(Q))
    return side.signed((Q @ u)[:, :r], S[:r], V[:, :r])


def tolerance(dtype: torch.dtype) -> float:
    """How far W v may be from s u, relative to the largest singular value."""
    return float(torch.finfo(dtype).eps ** 0.75)


def _svd(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u[m,m], S[m], V[n,m]) of Y^T = u S V^T, for Y[n,m]."""
    V, S, u = torch.linalg.svd(Y, full_matrices=False)
    return u.T, S, V


def _orthogonal(block: Tensor, Q: Tensor) -> Tensor:
    """Orthonormal columns, orthogonal to Q; twice, since the first pass loses digits where little is left of the block."""
    for _ in range(2):
        block = torch.linalg.qr(block - Q @ (Q.T @ block)).Q
    return block


class _Side:
    """Products with W or its transpose, such that `there` leads from the shorter of its sides to the longer."""

    def __init__(self, weight: Thin) -> None:
        self.weight, self.wide = weight, weight.shape[0] <= weight.shape[1]
        self.short, self.long = min(weight.shape), max(weight.shape)
        self.there = weight.turned if self.wide else weight.times
        self.back = weight.times if self.wide else weight.turned

    def random(self, k: int) -> Tensor:
        """[longer side, k], the same on every rank and layout."""
        g = torch.Generator().manual_seed(key_of("pissa", *self.weight.shape))
        return torch.randn(self.long, k, generator=g, dtype=torch.float64).to(self.weight.dtype).to(self.weight.device)

    def signed(self, short: Tensor, S: Tensor, long: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(U, S, V) with the signs that a fixed direction gives them: an SVD leaves them open, and rounding must not choose."""
        sign = torch.where(self.random(1).T @ long < 0, -1, 1)
        short, long = short * sign, long * sign
        return (short, S, long) if self.wide else (long, S, short)
