"""RandLoRA: dW = s sum_i B_i diag(lambda_i) A diag(gamma_i), an update of full rank from random bases that all layers share.

    m = min(O, I), M = max(O, I), n = ceil(m / R) bases
    A[R,1,m] and B[M,n,R]: random, frozen, with the largest sizes of all adapted layers; a layer takes the first of each
    lambda[R,n], gamma[n,m]: trained                                      s = alpha / R

The formula is for I <= O. For I > O the sum is transposed, so that gamma always has the smaller size. At the start lambda = 0, so
dW = 0, and gamma = 1 / m.

[Note: the order of the bases]
The sum over i and the R columns of B_i is one product of inner size n R. PEFT's files hold B with i before R and count the rows of
the other side with R before i. The same order is kept here, so that adapters can be exchanged. As the columns of B are all drawn
alike, this only names the random columns differently than the formula.

[Note: what RandLoRA costs]
n R is not less than m, so the two products are no thin ones: forward and backward take five of the size of W's (of LoRA's six, that for
the gradient of the frozen base is left out). Their matrices, A scaled and B in the dtype of the input, are as large as W too. They are
not kept for the backward but made again, which costs no product: so this is a step of its own, and not the fused one of LoRA.

Albert et al. 2025, arXiv:2502.00987.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from d9d_lora.adapters import AdapterConfig, AdapterMethod
from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.shared import SharedFactor
from d9d_lora.methods.delta import Cost, Delta, Draw, Geometry, Parts

Sparsity = Literal["dense", "sparse", "very_sparse"]


class RandLoRAParameters(BaseModel):
    """Hyperparameters of RandLoRA."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(32, ge=1, description="rank of a base; a smaller one means more bases, and more trained numbers")
    alpha: float = Field(
        640,
        gt=0,
        allow_inf_nan=False,
        validation_alias=AliasChoices("alpha", "randlora_alpha"),
        description="scale of the update: s = alpha / r; 20 r is usual",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, validation_alias=AliasChoices("dropout", "randlora_dropout"), description="dropout on the adapter's input"
    )
    projection_prng_key: int = Field(0, ge=0, description="the key from which the frozen bases are drawn")
    save_projection: bool = Field(
        True, description="whether a PEFT directory holds the bases; checkpoints never do, as the key gives them again"
    )
    sparse: bool = Field(False, description="bases of -1, 0 and 1 only: zero with probability 2/3")
    very_sparse: bool = Field(False, description="zero with probability 1 - 1/sqrt(m)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sparse and self.very_sparse:
            raise ValueError("sparse and very_sparse are two densities of the bases, and sparse would be ignored; give one of them")
        return self

    @property
    def sparsity(self) -> Sparsity:
        return "very_sparse" if self.very_sparse else "sparse" if self.sparse else "dense"


class RandLoRAConfig(AdapterConfig):
    """`kind: randlora`."""

    kind: Literal["randlora"] = "randlora"
    params: RandLoRAParameters = Field(default_factory=RandLoRAParameters)  # type: ignore[arg-type]
    unused = {
        "rank_pattern": "all layers share the bases, whose rank is r, and have one alpha",
        "alpha_pattern": "all layers share the bases, whose rank is r, and have one alpha",
        "target_parameters": "it adapts whole layers, which share the bases",
    }


@dataclass(frozen=True)
class RandLoRADelta(Delta):
    """dW = scaling * sum_i B_i diag(lambda_i) A diag(gamma_i), or the transposed sum.

    Attributes:
        wide: I > O.
        key, sparsity, save_projection: From what the bases are drawn, how, and whether a PEFT directory holds them.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    wide: bool = False
    key: int = 0
    sparsity: Sparsity = "dense"
    save_projection: bool = True
    kind = "randlora"
    full_precision = frozenset({"randlora_A", "randlora_B"})  # they are cut to the layer first, and cast then
    shared: ClassVar[Mapping[str, str]] = {"randlora_A": "RUM", "randlora_B": "LKR"}  # M, L: the largest sizes; U = 1

    @property
    def axes(self) -> Mapping[str, str]:
        return {"randlora_lambda": "RN", "randlora_gamma": "NO" if self.wide else "NI"}

    @property
    def scaling(self) -> float:  # type: ignore[override]
        return self.alpha / self.r

    def fit(self, geometry: Geometry) -> Self:
        return replace(self, wide=geometry.into > geometry.out)

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {"O": out, "I": into, "R": self.r, "N": bases(min(out, into), self.r)}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        return None if factor == "randlora_lambda" else lambda w, g: w.fill_(1 / max(w.shape))

    def cost(self, n: int, out: int, into: int) -> Cost:
        """[Note: what RandLoRA costs] Of a wide layer the gradient of A takes x B^T, which is kept."""
        k = self.r * bases(min(out, into), self.r)
        return Cost(2 * n * k * (2 * (out + into) + min(out, into)), n * k if self.wide else 0)

    def bases_here(self, f: Parts) -> tuple[Tensor, Tensor]:
        """A[R,m] and B[M,n,R] for the box, as they are held."""
        short, long = (f.rows, f.cols) if self.wide else (f.cols, f.rows)
        return f["randlora_A"][:, 0, short], f["randlora_B"][long, : f["randlora_lambda"].shape[1]]

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        base_A, base_B = self.bases_here(f)
        A, B = scaled(base_A, f["randlora_lambda"], f["randlora_gamma"]), base_B.flatten(1).to(f["randlora_gamma"].dtype)
        return (A.T, B.T) if self.wide else (B, A)

    def apply(self, x: Tensor, f: Parts) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().apply(x, f)
        y: Tensor = _Sum.apply(x, *self.bases_here(f), f["randlora_lambda"], f["randlora_gamma"], self.wide, self.scaling)
        return y

    def __str__(self) -> str:
        return f"{self.kind} r={self.r} alpha={self.alpha:g}"


def bases(smaller: int, r: int) -> int:
    """How many bases of rank r give full rank."""
    return -(-smaller // r)


def scaled(base: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """diag(lambda_i) A diag(gamma_i) for all i: A[R,m], lambda[R,n], gamma[n,m] -> [R n, m]."""
    # lambda and gamma first: autograd then keeps them and the shared base, and no other tensor of the scaled size
    return (base.to(lam.dtype).unsqueeze(1) * (lam.unsqueeze(2) * gamma)).flatten(0, 1)


class _Sum(torch.autograd.Function):
    """s x A^T B^T for x[..., m], or s x B A for x[..., M], where A[n R, m] is `scaled` and B[M, n R]. [Note: what RandLoRA costs]"""

    @staticmethod
    def forward(ctx, x, base_A, base_B, lam, gamma, wide, s):  # type: ignore[no-untyped-def]
        rows, B, A = x.reshape(-1, x.shape[-1]), base_B.flatten(1).to(x.dtype), scaled(base_A, s * lam.to(x.dtype), gamma.to(x.dtype))
        z = rows @ (B if wide else A.T)
        ctx.save_for_backward(z if wide else x, base_A, base_B, lam, gamma)
        ctx.wide, ctx.s, ctx.shape = wide, s, x.shape
        return (z @ (A if wide else B.T)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        kept, base_A, base_B, lam, gamma = ctx.saved_tensors
        dy, kept = dy.reshape(-1, dy.shape[-1]), kept.reshape(-1, kept.shape[-1])
        trained, lam, gamma = (lam.dtype, gamma.dtype), lam.to(dy.dtype), gamma.to(dy.dtype)
        B, A = base_B.flatten(1).to(dy.dtype), scaled(base_A, ctx.s * lam, gamma)
        u = dy @ (A.T if ctx.wide else B)
        dx = (u @ (B.T if ctx.wide else A)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        dA = kept.T @ dy if ctx.wide else u.T @ kept
        slope = ctx.s * dA.unflatten(0, lam.shape) * base_A.to(dA.dtype).unsqueeze(1)  # of lambda gamma, [R, n, m]
        d_lam, d_gamma = (slope * gamma).sum(2).to(trained[0]), (slope * lam.unsqueeze(2)).sum(0).to(trained[1])
        return dx, None, None, d_lam, d_gamma, None, None


class RandLoRA(AdapterMethod[RandLoRAConfig]):
    """Full-rank adaptation by diagonal scales of shared random bases."""

    kind = "randlora"

    def delta_for(self, name: str) -> RandLoRADelta:
        p = self.config.params
        return RandLoRADelta(
            p.r, p.alpha, p.dropout, key=p.projection_prng_key, sparsity=p.sparsity, save_projection=p.save_projection
        )

    def shared_factors(self, layers: list[AdaptedLayer]) -> dict[str, SharedFactor]:
        p, weight = self.config.params, layers[0].base.weight
        sizes = max(la.in_size for la in layers), max(la.out_size for la in layers)
        dtype = torch.bfloat16 if p.sparsity == "dense" else torch.float32  # as they are drawn: nothing is lost
        like = torch.empty((), dtype=dtype, device=weight.device)  # type: ignore[arg-type]
        draw = partial(_draw, p.projection_prng_key, p.r, min(sizes), max(sizes), p.sparsity)
        shapes = {"randlora_A": (p.r, 1, min(sizes)), "randlora_B": (max(sizes), bases(min(sizes), p.r), p.r)}
        key = p.projection_prng_key
        return {n: SharedFactor(s, like, partial(draw, n), seed=key, name=n, trained=False) for n, s in shapes.items()}


def _draw(key: int, r: int, short: int, long: int, sparsity: Sparsity, name: str, w: Tensor, g: torch.Generator) -> None:
    """Fills w with one of the two bases, in the numbers that PEFT draws on a CPU. B continues the stream that A began."""
    generator = torch.Generator().manual_seed(key)
    n = bases(short, r)
    if sparsity == "dense":
        t = _uniform((r, 1, short), generator)
        if name == "randlora_B":
            t = torch.cat([_uniform((long, 1, r), generator) for _ in range(n)], 1)
    else:
        t = torch.rand((r, 1, short), generator=generator)
        if name == "randlora_B":
            t = torch.rand((long, n, r), generator=generator)
        tail = 1 / (2 * (math.sqrt(short) if sparsity == "very_sparse" else 3))  # the probability of -1, and of 1
        t = (t > 1 - tail).float() - (t < tail).float()
    w.copy_(t / t.std())


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + 5)) / math.sqrt(shape[1] * shape[2]))  # in this order: the last bit is PEFT's too
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)
