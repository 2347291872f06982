"""VeRA: dW = diag(b) B diag(d) A, with A[R,I] and B[O,R] random, frozen and shared by all layers; b[O] and d[R] are trained.

The shared A[R,Imax] and B[Omax,R] have the largest sizes of all adapted layers; a layer takes the first columns of A and the first
rows of B. They are drawn from `projection_prng_key`, as PEFT draws them on a CPU: uniform in +-sqrt(6 / columns). At the start b = 0
and d is a constant, so dW = 0.

It is LoRA's step with A as it is and b B d in the place of B: both vectors get their gradients from that of the one matrix, [O,R], so
neither the input of A nor the output of B is kept for them, and the frozen A costs no product. Five products of rank R.

Kopiczko et al. 2023, arXiv:2310.11454.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from d9d_lora.adapters import AdapterConfig, AdapterMethod
from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.base import adapter_dtype
from d9d_lora.layers.shared import SharedFactor
from d9d_lora.methods.delta import Cost, Delta, Draw, Parts


class VeRAParameters(BaseModel):
    """Hyperparameters of VeRA."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(256, ge=1, description="rank; larger than LoRA's, as a layer trains only r + out numbers")
    projection_prng_key: int = Field(0, ge=0, description="the key from which the frozen A and B are drawn")
    save_projection: bool = Field(
        True, description="whether a PEFT directory holds A and B; checkpoints never do, as the key gives them again"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, validation_alias=AliasChoices("dropout", "vera_dropout"), description="dropout on the input of A"
    )
    d_initial: float = Field(0.1, allow_inf_nan=False, description="the constant that d starts at; not 0")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_initial == 0:
            raise ValueError("d_initial=0: b starts at zero, and with d at zero too neither would ever get a gradient; give 0.1, say")
        return self


class VeRAConfig(AdapterConfig):
    """`kind: vera`."""

    kind: Literal["vera"] = "vera"
    params: VeRAParameters = Field(default_factory=VeRAParameters)  # type: ignore[arg-type]
    unused = {
        "rank_pattern": "all layers share the bases, whose rank is r, and there is no alpha",
        "alpha_pattern": "all layers share the bases, whose rank is r, and there is no alpha",
        "target_parameters": "it adapts whole layers, which share the bases",
    }


@dataclass(frozen=True)
class VeRADelta(Delta):
    """dW = diag(lambda_b) B diag(lambda_d) A.

    Attributes:
        key, save_projection: From what A and B are drawn, and whether a PEFT directory holds them.
    """

    r: int
    d_initial: float
    dropout: float = 0.0
    key: int = 0
    save_projection: bool = True
    kind = "vera"
    scaling = 1.0
    thin = True
    makes = "B"
    full_precision = frozenset({"vera_A", "vera_B"})  # they are cut to the layer first, and cast then
    axes = {"vera_lambda_b": "O", "vera_lambda_d": "R"}
    shared: ClassVar[Mapping[str, str]] = {"vera_A": "RM", "vera_B": "LR"}  # L, M: the largest sizes

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {"O": out, "R": self.r}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        return None if factor == "vera_lambda_b" else lambda w, g: w.fill_(self.d_initial)

    def cost(self, n: int, out: int, into: int) -> Cost:
        """Five products: A has no gradient. Kept are x A^T, and b B d."""
        return Cost(2 * n * self.r * (3 * out + 2 * into), n * self.r + out * self.r)

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        # the small outer product first: autograd then keeps b, d and the shared base, and no other tensor of B's size
        d = f["vera_lambda_d"]
        B = f["vera_B"][f.rows].to(d.dtype) * (f["vera_lambda_b"].unsqueeze(1) * d)
        return B, f["vera_A"][:, f.cols].to(d.dtype)

    def __str__(self) -> str:
        return f"{self.kind} r={self.r}"


class VeRA(AdapterMethod[VeRAConfig]):
    """Vector-based random matrix adaptation."""

    kind = "vera"

    def delta_for(self, name: str) -> VeRADelta:
        p = self.config.params
        return VeRADelta(p.r, p.d_initial, p.dropout, p.projection_prng_key, p.save_projection)

    def shared_factors(self, layers: list[AdaptedLayer]) -> dict[str, SharedFactor]:
        p, weight = self.config.params, layers[0].base.weight
        into, out = max(la.in_size for la in layers), max(la.out_size for la in layers)
        like = torch.empty((), dtype=adapter_dtype(layers[0].base_dtype), device=weight.device)  # type: ignore[arg-type]
        shapes = {"vera_A": (p.r, into), "vera_B": (out, p.r)}
        key = p.projection_prng_key
        draws = {"vera_A": partial(_draw_A, key), "vera_B": partial(_draw_B, key, (p.r, into))}
        return {n: SharedFactor(s, like, draws[n], seed=key, name=n, trained=False) for n, s in shapes.items()}


def _draw_A(key: int, w: Tensor, g: torch.Generator) -> None:
    _uniform(w, torch.Generator().manual_seed(key))


def _draw_B(key: int, shape_of_A: tuple[int, int], w: Tensor, g: torch.Generator) -> None:
    """B continues the stream of numbers that A began."""
    generator = torch.Generator().manual_seed(key)
    _uniform(torch.empty(shape_of_A), generator)
    _uniform(w, generator)


def _uniform(w: Tensor, generator: torch.Generator) -> None:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(w.shape[1]))  # in this order: the last bit is PEFT's too
    w.uniform_(-bound, bound, generator=generator)
