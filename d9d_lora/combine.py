"""One new adapter from several, dW_k = s_k B_k A_k with weights w_k; B[O,R], A[R,I].

    cat        dW = sum w_k dW_k, exactly: A = [w_k s_k A_k], B = [B_k]; the rank is the sum of the ranks
    svd        the same sum, cut to its `svd_rank` largest singular values
    linear     A = sum sign(w_k) sqrt|w_k s_k| A_k,  B = sum sqrt|w_k s_k| B_k; has cross terms B_i A_j, so a rough one
    others     prune each task tensor to `density`, then sum or elect; on A and B as `linear` does, or with `_svd` on dW itself

    magnitude_prune   keep the largest numbers, add
    dare_linear       keep numbers at random, divide by the density, add           (Yu et al. 2023, arXiv:2311.03099)
    ties              keep the largest; elect a sign for each place; average the weighted numbers that have it
    dare_ties         keep at random, divide; elect and average so                 (TIES: Yadav et al. 2023, arXiv:2306.01708)

The result is a LoRA with s = 1, frozen and not active. It is made of whole factors, the same on every rank; with `_svd` and pruning, dW of
one layer at a time is built whole. What is kept at random is drawn from (seed, names).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from d9d_lora.boxes import index_of
from d9d_lora.layers import AdaptedLayer, kind_of
from d9d_lora.methods.lora import LoRADelta
from d9d_lora.named.change import attach, check_name
from d9d_lora.named.hosts import check_known, hosts
from d9d_lora.placement import key_of, local_of
from d9d_lora.walk import clock_of, refuse_sharded

Combination = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    combination_type: Combination = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] | None = None,
    seed: int | None = None,
) -> None:
    """Adds the adapter `new_name`, a combination of others. Call it before `fully_shard`; any tensor-parallel layout will do.

    Args:
        weights: One for each name; may be negative.
        svd_rank: Of a type with `svd`: the rank of the result, at most that of the sum; default: the largest rank of the adapters.
        density: Of a type that prunes: the fraction of numbers that are kept.
        majority_sign_method: Of a type with `ties`: each place's sign is that of the sum of its numbers (`total`, the default), or of
            the sum of their signs (`frequency`).
        seed: Of a type with `dare`; default 0.

    Raises:
        ValueError: for unknown names, options that the type does not have, or adapters whose update is no plain product. The model is then
            as it was.
    """
    refuse_sharded(model)
    check_known(model, names)
    check_name(model, new_name)
    if not names or len(names) != len(weights) or not all(math.isfinite(w) for w in weights):
        raise ValueError(f"expected one finite weight for each adapter; got adapters {list(names)} and weights {list(weights)}")
    recipe = Recipe(combination_type, svd_rank, density, majority_sign_method, seed)
    made = []
    for layer_names, host in hosts(model):
        terms = [_term(host, name, w) for name, w in zip(names, weights) if name in host.adapters_by_name()]
        if terms:
            made.append((layer_names, _layer(model, host, *recipe.combine(terms, (new_name, host.name)))))
    attach(model, new_name, made)


@dataclass(frozen=True)
class Term:
    """w s B A of one adapter in one layer, from whole factors."""

    name: str
    w: float
    s: float
    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def _term(host: AdaptedLayer, name: str, w: float) -> Term:
    adapter = host.adapters_by_name()[name]
    adapter.refuse_unstarted()
    delta, what = adapter.delta, f"{host.name}: {name!r} ({adapter.delta})"
    if delta.has_gain:
        raise ValueError(f"{what} scales the rows of the base weight, and a sum of updates cannot; merge it instead, or leave it out")
    if delta.moves_base:
        raise ValueError(f"{what} took its start off the base weight, so its update alone is not what it learned; convert it to LoRA first")
    if delta.has_shift:
        raise ValueError(f"{what} has a bias of its own, which a combination of products has not; leave it out")
    try:
        B, A = delta.factors(delta.part(adapter.whole_factors(), slice(0, host.out_size), slice(0, host.in_size)))
    except NotImplementedError as error:
        raise ValueError(f"{what} is no product B A of low rank, so it cannot be combined; convert it to LoRA first") from error
    return Term(name, w, delta.scaling, B, A)


def _layer(model: nn.Module, host: AdaptedLayer, B: Tensor, A: Tensor) -> AdaptedLayer:
    """A frozen LoRA with these factors and s = 1, around the base of the host."""
    kind = kind_of(host.base)
    assert kind is not None
    layer = kind(host.base, LoRADelta(A.shape[0], A.shape[0]), name=host.name, seed=0, clock=clock_of(model))
    for p, value in ((layer.factor("lora_A"), A), (layer.factor("lora_B"), B)):
        p.requires_grad_(False)
        local_of(p).copy_(value[index_of(p)])
    return layer


# -- the arithmetic -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the adapters of one layer become one; the fields are those of `add_weighted_adapter`."""

    kind: str
    svd_rank: int | None = None
    density: float | None = None
    majority: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Combination):
            raise ValueError(f"unknown combination_type {self.kind!r}; expected one of {', '.join(get_args(Combination))}")
        for option, value, has in (
            ("svd_rank", self.svd_rank, self.kind.endswith("svd")),
            ("density", self.density, self.prunes),
            ("majority_sign_method", self.majority, self.elects),
            ("seed", self.seed, self.kind.startswith("dare")),
        ):
            if value is not None and not has:
                raise ValueError(f"{option}={value!r} would be ignored: {self.kind} has no such option. Leave it out")
        if self.prunes and not 0 < (self.density or 0) <= 1:
            raise ValueError(f"{self.kind} needs a density: the fraction of numbers to keep, above 0 and at most 1; got {self.density}")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank={self.svd_rank}: expected a rank of at least 1")
        if self.majority not in (None, "total", "frequency"):
            raise ValueError(f"majority_sign_method={self.majority!r}: expected 'total' or 'frequency'")

    @property
    def prunes(self) -> bool:
        return self.kind not in ("svd", "cat", "linear")

    @property
    def elects(self) -> bool:
        return "ties" in self.kind

    def combine(self, terms: Sequence[Term], key: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """(B, A) of the new adapter. `key`: of what is kept at random."""
        rank = self.svd_rank or max(t.rank for t in terms)
        if self.kind in ("cat", "svd"):
            B = torch.cat([t.B for t in terms], 1)
            A = torch.cat([t.w * t.s * t.A for t in terms], 0)
            return (B, A) if self.kind == "cat" else _cut_product(B, A, rank)
        if self.kind.endswith("_svd"):
            dW = self.mix([t.s * (t.B @ t.A) for t in terms], [t.w for t in terms], (*key, "dW"))
            return _cut(dW, rank)
        if len({t.rank for t in terms}) > 1:
            ranks = ", ".join(f"{t.name}: {t.rank}" for t in terms)
            raise ValueError(f"{key[1]}: {self.kind} adds factors number by number, so they need one rank; got {ranks}. Use cat or svd")
        root = [math.sqrt(abs(t.w * t.s)) for t in terms]
        signed = [math.copysign(r, t.w * t.s) for r, t in zip(root, terms)]  # on one side only, or two minuses would cancel
        return self.mix([t.B for t in terms], root, (*key, "B")), self.mix([t.A for t in terms], signed, (*key, "A"))

    def mix(self, tasks: Sequence[Tensor], weights: Sequence[float], key: tuple[str, ...]) -> Tensor:
        """One tensor of several with weights."""
        kept = torch.stack([self.prune(t, (*key, i)) if self.prunes else t for i, t in enumerate(tasks)])
        w = torch.tensor(weights, dtype=kept.dtype, device=kept.device)
        weighted = kept * w.view(-1, *[1] * (kept.ndim - 1))
        if not self.elects:
            return weighted.sum(0)
        votes = kept.sign() if self.majority == "frequency" else kept
        agrees = kept.sign() == torch.where(votes.sum(0) >= 0, 1, -1)  # a number that was pruned has the sign 0, and agrees with none
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def prune(self, t: Tensor, key: tuple[str | int, ...]) -> Tensor:
        """t with some numbers made zero."""
        density: float = self.density  # type: ignore[assignment]
        if self.kind.startswith("dare"):
            return t * keep_at_random(t, density, key_of(self.seed or 0, *key)) / density
        number = int(density * t.numel())
        if number == 0:
            raise ValueError(f"density={density} keeps none of the {t.numel()} numbers of {key}; give a larger one")
        kept = torch.zeros(t.numel(), dtype=t.dtype, device=t.device)
        kept[t.abs().flatten().topk(number).indices] = 1
        return t * kept.view_as(t)


def keep_at_random(t: Tensor, density: float, key: int) -> Tensor:
    """1 with probability `density`, else 0, for each number of t; drawn on the CPU, so the same on every rank and device."""
    return torch.empty(t.shape, dtype=t.dtype).bernoulli_(density, generator=torch.Generator().manual_seed(key)).to(t.device)


def _cut(dW: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best (B, A) of this rank."""
    U, S, V = torch.linalg.svd(dW, full_matrices=False)
    return U[:, :rank] * S[:rank], V[:rank]


def _cut_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same for B A, which is never built: the triangles of two thin QRs hold all of its singular values."""
    (Q, R), (P, L) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, V = _cut(R @ L.T, rank)
    return Q @ U, V @ P.T
