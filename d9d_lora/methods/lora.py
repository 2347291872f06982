"""LoRA: y = x W^T + s drop(x) A^T B^T, dW = s B A, W[O,I], A[R,I], B[O,R].

s = alpha / r, or alpha / sqrt(r) with `scaling: rslora`. At the start B = 0 and A is Kaiming-uniform with a = sqrt(5), that is
uniform in +-1/sqrt(I), so dW = 0; where the input is an index (embeddings), A = 0 and B is normal.

Hu et al. 2021, arXiv:2106.09685; rank stabilisation: Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from d9d_lora.adapters import AdapterConfig, AdapterMethod, Site
from d9d_lora.dropout import Clock
from d9d_lora.layers import AdaptedLayer, AdaptedLinear
from d9d_lora.methods.delta import Delta, Draw, Parts
from d9d_lora.methods.dora import DoRADelta


class LoRAParameters(BaseModel):
    """Hyperparameters of a LoRA layer."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(8, ge=0, description="rank; 0 leaves the matched layers alone (as loralib does)")
    alpha: float = Field(8, gt=0, allow_inf_nan=False, description="scale of the update: s = alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")
    scaling: Literal["lora", "rslora"] = Field("lora", description="s = alpha / r, or alpha / sqrt(r), which suits high ranks")
    use_dora: bool = Field(False, description="learn a magnitude for every output row as well: `methods/dora.py`")


class LoRAConfig(AdapterConfig):
    """`kind: lora`."""

    kind: Literal["lora"] = "lora"
    params: LoRAParameters = Field(default_factory=LoRAParameters)  # type: ignore[arg-type]


class DoRAConfig(LoRAConfig):
    """`kind: dora`: LoRA with `use_dora`."""

    kind: Literal["dora"] = "dora"  # type: ignore[assignment]

    @model_validator(mode="after")
    def _uses_dora(self) -> Self:
        if "use_dora" in self.params.model_fields_set and not self.params.use_dora:
            raise ValueError("kind: dora has a magnitude always; for use_dora: false give kind: lora")
        self.params = self.params.model_copy(update={"use_dora": True})
        return self


@dataclass(frozen=True)
class LoRADelta(Delta):
    """dW = scaling * B A."""

    r: int
    alpha: float
    dropout: float = 0.0
    rule: Literal["lora", "rslora"] = "lora"
    kind = "lora"
    axes = {"lora_A": "RI", "lora_B": "OR"}

    @property
    def scaling(self) -> float:  # type: ignore[override]
        return self.alpha / (math.sqrt(self.r) if self.rule == "rslora" else self.r)

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {"O": out, "I": into, "R": self.r}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        if lookup:
            return None if factor == "lora_A" else lambda w, g: w.normal_(generator=g)
        if factor == "lora_B":
            return None
        return lambda w, g: w.uniform_(-1 / math.sqrt(w.shape[1]), 1 / math.sqrt(w.shape[1]), generator=g)

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        return f["lora_B"], f["lora_A"]

    def __str__(self) -> str:
        return f"{self.kind} r={self.r} alpha={self.alpha:g}" + (" rslora" if self.rule == "rslora" else "")


def delta_of(params: LoRAParameters, *, r: int | None = None, alpha: float | None = None) -> LoRADelta | DoRADelta:
    """The delta that a layer's hyperparameters describe, with its own rank and alpha where a pattern gives them."""
    low = LoRADelta(params.r if r is None else r, params.alpha if alpha is None else alpha, params.dropout, params.scaling)
    return DoRADelta(low) if params.use_dora else low


class LoRALinear(AdaptedLinear):
    """`nn.Linear` with LoRA factors `lora_A[r, in]` and `lora_B[out, r]`, beside its `base`.

    Args:
        base_layer: The layer to adapt, with or without a bias; it is kept, not copied.
        params: Rank, alpha and dropout.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        params: LoRAParameters,
        *,
        name: str = "",
        seed: int | None = None,
        clock: Clock | None = None,
        delta: LoRADelta | DoRADelta | None = None,
    ) -> None:
        if params.r == 0 and delta is None:
            raise ValueError("LoRALinear needs r >= 1; with r = 0 there is no adapter: use the layer as it is")
        super().__init__(base_layer, delta or delta_of(params), name=name, seed=seed, clock=clock)
        if clock is None:
            self.take_over()


class LoRA(AdapterMethod[LoRAConfig]):
    """Low-rank adaptation of linear layers, GPT-2's Conv1D and embeddings, on every layout of their weights."""

    kind = "lora"

    def delta_for(self, name: str) -> LoRADelta | DoRADelta | None:
        params = self.config.params
        r = self.config.rank(name, params.r)
        return delta_of(params, r=r, alpha=self.config.alpha(name, params.alpha)) if r else None

    def wrap(self, site: Site, clock: Clock) -> AdaptedLayer:
        if site.layer is AdaptedLinear:
            assert isinstance(site.base, nn.Linear)
            assert isinstance(site.delta, LoRADelta | DoRADelta)
            return LoRALinear(
                site.base, self.config.params, name=site.names[0], seed=self.config.seed, clock=clock, delta=site.delta
            )
        return super().wrap(site, clock)
