"""LoRA: y = x W^T + s drop(x) A^T B^T, dW = s B A, W[O,I], A[R,I], B[O,R].

s = alpha / r, or alpha / sqrt(r) with `scaling: rslora`. At the start B = 0 and A is Kaiming-uniform with a = sqrt(5), that is
uniform in +-1/sqrt(I), so dW = 0; where the input is an index (embeddings), A = 0 and B is normal. Other starts: `init/blind.py`
and `init/weights.py`. With `lora_bias`, B has a bias b[O], zero at the start, and the output gains s b. All hyperparameters:
`lora_parameters.py`.

Hu et al. 2021, arXiv:2106.09685; rank stabilisation: Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from d9d_lora.adapters import AdapterConfig, AdapterMethod
from d9d_lora.dropout import Clock
from d9d_lora.init import survey as surveys
from d9d_lora.init.blind import draw_of
from d9d_lora.init.loftq import LoftQConfig
from d9d_lora.init.survey import FROM_DATA, CordaConfig, EvaConfig, Start
from d9d_lora.init.weights import factors_of, is_from_weight
from d9d_lora.layers import AdaptedGroupedLinear, AdaptedLayer, AdaptedLinear
from d9d_lora.layers.experts import AdaptedExperts
from d9d_lora.layers.stacked import Stacked
from d9d_lora.method import InjectionError, PeftInjectionResult
from d9d_lora.methods.delta import Delta, DoesNotFit, Draw, Geometry, Parts
from d9d_lora.methods.dora import DoRADelta
from d9d_lora.methods.grouped import GroupedDelta
from d9d_lora.methods.lora_parameters import LoRAParameters
from d9d_lora.methods.merged import MergedDelta, found
from d9d_lora.mixture import top_k_of
from d9d_lora.replicate import restack, restacked
from d9d_lora.sites import Site
from d9d_lora.state.reader import named_state
from d9d_lora.thin import Thin

# The last name of a stack of experts -> its factor at the model's hidden size.
OUTER = {"gate_up_proj": "lora_A", "gate_proj": "lora_A", "up_proj": "lora_A", "down_proj": "lora_B"}
_UNKNOWN = "?"


class LoRAConfig(AdapterConfig):
    """`kind: lora`."""

    kind: Literal["lora"] = "lora"
    params: LoRAParameters = Field(default_factory=LoRAParameters)  # type: ignore[arg-type]
    layer_replication: list[tuple[int, int]] | None = Field(
        None, description="ranges [start, end) of the model's layers to stack anew, which share base weights and have adapters of their own"
    )


class DoRAConfig(LoRAConfig):
    """`kind: dora`: LoRA with `use_dora`."""

    kind: Literal["dora"] = "dora"  # type: ignore[assignment]

    @model_validator(mode="after")
    def _uses_dora(self) -> Self:
        if "use_dora" in self.params.model_fields_set and not self.params.use_dora:
            raise ValueError("kind: dora has a magnitude always; for use_dora: false give kind: lora")
        self.params = LoRAParameters.model_validate({**self.params.model_dump(exclude_unset=True), "use_dora": True})
        return self


@dataclass(frozen=True)
class LoRADelta(Delta):
    """dW = scaling * B A."""

    r: int
    alpha: float
    dropout: float = 0.0
    rule: Literal["lora", "rslora"] = "lora"
    init: bool | str = True
    zero: Literal["A", "B"] | None = None
    bias: bool = False
    loftq_iter: int = 0
    outer: str = ""  # of a stack of experts, the factor that is one for all of them
    given: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # factors that a survey of the data has found
    kind = "lora"
    thin = True
    bare = ("lora_B", "lora_A")

    @property
    def scaling(self) -> float:  # type: ignore[override]
        return self.alpha / (math.sqrt(self.r) if self.rule == "rslora" else self.r)

    @property
    def axes(self) -> Mapping[str, str]:
        return {"lora_A": "RI", "lora_B": "OR", **({"lora_B_bias": "O"} if self.bias else {})}

    @property
    def moves_base(self) -> bool:  # type: ignore[override]
        return is_from_weight(self.init) or self.init == "corda"

    @property
    def from_the_weight(self) -> bool:  # type: ignore[override]
        return self.moves_base or self.init in ("eva", "loftq")

    def fit(self, geometry: Geometry) -> Self:
        if self.loftq_iter and not geometry.quantised:
            raise DoesNotFit("the start loftq takes the error of a quantised base, and this layer is not quantised; set model.quantise=nf4")
        if (self.moves_base or self.loftq_iter) and self.r > min(geometry.out, geometry.into):
            shape = [geometry.out, geometry.into]
            raise DoesNotFit(f"the start {self.init} takes r={self.r} directions of a weight {shape}; give this layer a lower rank")
        if self.init == "orthogonal" and self.r % 2:
            raise DoesNotFit(f"the start orthogonal splits the rank into halves; r={self.r} is odd, give an even rank in rank_pattern")
        return self

    def stacked(self, n: int) -> Delta:
        if self.bias:
            raise DoesNotFit(f"a stack of {n} matrices takes no lora_bias; leave it out")
        if self.outer == _UNKNOWN:
            raise DoesNotFit(
                "experts_shared_outer shares the factor at the model's hidden size, and the name of this stack does not tell which it is; "
                f"expected a last name among {', '.join(OUTER)}. Adapt it by a method of its own without experts_shared_outer"
            )
        return GroupedDelta(self, n, outer=self.outer)

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {"O": out, "I": into, "R": self.r}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        if self.moves_base or self.loftq_iter:
            return None
        return draw_of(True if self.init == "eva" else self.init, self.zero, factor, self.r, lookup=lookup)

    def stream(self, factor: str) -> str:
        return "lora" if self.init == "orthogonal" else factor

    def start_from(self, weight: Thin, f: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.init in FROM_DATA:
            return dict(self.given)
        if not self.moves_base:
            return {}
        B, A = factors_of(str(self.init), weight, self.r, self.scaling)
        return {"lora_A": A, "lora_B": B}

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        return f["lora_B"], f["lora_A"]

    @property
    def has_shift(self) -> bool:  # type: ignore[override]
        return self.bias

    def shift(self, f: Parts) -> Tensor:
        return self.scaling * f["lora_B_bias"]

    def __str__(self) -> str:
        return f"{self.kind} r={self.r} alpha={self.alpha:g}" + "".join(
            [" rslora" if self.rule == "rslora" else "", "" if self.init is True else f" init={self.init}", " bias" if self.bias else ""]
        )


def delta_of(
    params: LoRAParameters,
    *,
    r: int | None = None,
    alpha: float | None = None,
    given: Mapping[str, Tensor] | None = None,
    name: str = "",
) -> LoRADelta | DoRADelta | MergedDelta:
    """The delta that a layer's hyperparameters describe, with its own rank and alpha where a pattern gives them.

    `given` are the factors that a survey of the data has found for it; without any it starts as if no survey were asked for. Its `name`
    tells which factor is outer, with `experts_shared_outer`.
    """
    low: LoRADelta | MergedDelta = LoRADelta(
        params.r if r is None else r,
        params.alpha if alpha is None else alpha,
        params.dropout,
        params.scaling,
        True if params.init_lora_weights in FROM_DATA and given is None else params.init_lora_weights,
        params.init_zero,
        params.lora_bias,
        (params.loftq_config or LoftQConfig()).loftq_iter if params.init_lora_weights == "loftq" else 0,  # type: ignore[call-arg]
        OUTER.get(name.rpartition(".")[2], _UNKNOWN) if params.experts_shared_outer else "",
        given or {},
    )
    if params.enable_lora:
        low = MergedDelta(low, tuple(params.enable_lora), tuple(params.slices or ()))
    return DoRADelta(low) if params.use_dora else low


def with_rank(delta: Delta, r: int) -> Delta:
    """A delta of LoRA's kind with another rank and the same alpha."""
    if isinstance(delta, DoRADelta | MergedDelta):
        return replace(delta, low=with_rank(delta.low, r))
    assert isinstance(delta, LoRADelta)
    return replace(delta, r=r)


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
        delta: LoRADelta | DoRADelta | MergedDelta | None = None,
    ) -> None:
        if params.r == 0 and delta is None:
            raise ValueError("LoRALinear needs r >= 1; with r = 0 there is no adapter: use the layer as it is")
        super().__init__(base_layer, delta or delta_of(params), name=name, seed=seed, clock=clock)
        if clock is None:
            self.take_over()


class LoRAGroupedLinear(AdaptedGroupedLinear):
    """`GroupedLinear` (ours or d9d's) with LoRA factors `lora_A[experts, in, r]` and `lora_B[experts, r, out]`, beside its `base`.

    Args:
        base_layer: The layer to adapt; it is kept, not copied.
        params: Rank, alpha and dropout.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        params: LoRAParameters,
        *,
        name: str = "",
        seed: int | None = None,
        clock: Clock | None = None,
        delta: Delta | None = None,
    ) -> None:
        if params.r == 0 and delta is None:
            raise ValueError("LoRAGroupedLinear needs r >= 1; with r = 0 there is no adapter: use the layer as it is")
        super().__init__(base_layer, delta or delta_of(params), name=name, seed=seed, clock=clock)
        if clock is None:
            self.take_over()


class LoRA(AdapterMethod[LoRAConfig]):
    """Low-rank adaptation of linear layers, GPT-2's Conv1D and embeddings, on every layout of their weights."""

    kind = "lora"

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__(config)
        self._starts: dict[str, Start] | None = None  # what a survey has found, by layer

    def delta_for(self, name: str) -> LoRADelta | DoRADelta | MergedDelta | None:
        params = self.config.params
        r, alpha = self.config.rank(name, params.r), self.config.alpha(name, params.alpha)
        start = (self._starts or {}).get(name)
        if start is None:
            return delta_of(params, r=r, alpha=alpha, name=name) if r else None
        return delta_of(params, r=start.r, alpha=start.alpha, given=start.factors) if start.r else None

    # -- starts from data ------------------------------------------------------------------------------------------------------

    @property
    def surveys(self) -> bool:
        return self.config.params.init_lora_weights in FROM_DATA

    def survey(self, module: nn.Module, steps: Iterable[Any], *, group: Any = None) -> None:
        kind, params = str(self.config.params.init_lora_weights), self.config.params
        config = params.eva_config or EvaConfig() if kind == "eva" else params.corda_config or CordaConfig()  # type: ignore[call-arg]
        self._starts = None
        sites: dict[str, surveys.Site] = {}
        for site in self.sites(module)[0]:
            low = site.delta.low if isinstance(site.delta, DoRADelta) else site.delta
            if issubclass(site.layer, AdaptedLinear) and isinstance(low, LoRADelta):
                wanted = next(n for n in site.names if self.config.wants(n))
                sites[wanted] = surveys.Site(site.base, site.layer.weight_axes, low.r, low.alpha, low.scaling)
        if not sites:
            raise InjectionError(f"init_lora_weights: {kind} looks at the inputs of linear layers, and none is among the targets")
        self._starts = surveys.starts_from_data(kind, config, module, sites, steps, group)

    def findings(self) -> dict[str, Any]:
        return {name: [start.r, start.alpha] for name, start in (self._starts or {}).items()}

    def adopt(self, findings: dict[str, Any]) -> None:
        if self.surveys:
            self._starts = {name: Start(r, alpha) for name, (r, alpha) in findings.items()}

    def inject(self, module: nn.Module) -> PeftInjectionResult:
        if self.surveys and self._starts is None:
            raise InjectionError(
                f"init_lora_weights: {self.config.params.init_lora_weights} starts from data: call `method.survey(model, steps)` on the "
                "model with its weights before the injection (the trainer does), see d9d_lora.init.data.Step"
            )
        if not self.config.layer_replication:
            return super().inject(module)
        stack = restack(module, self.config.layer_replication)
        keys = [name for name, _ in named_state(module)]
        try:
            result = super().inject(module)
        except Exception:
            stack.restore(module)
            raise
        result.load_state_mappers = stack.mappers(keys, result.load_state_mappers)
        return result

    def remove(self, module: nn.Module) -> None:
        super().remove(module)
        if (stack := restacked(module)) is not None:
            stack.restore(module)

    # -- sites -----------------------------------------------------------------------------------------------------------------

    def sites(self, module: nn.Module) -> tuple[list[Site], list[str]]:
        sites, passed_over = super().sites(module)
        for site in sites if self.config.params.enable_lora else ():
            host = module.get_submodule(site.names[0].rpartition(".")[0])
            if issubclass(site.layer, AdaptedExperts) and not getattr(host, "is_concatenated", True):
                raise InjectionError(f"{site.names[0]}: its rows are of gate and up in turn, so enable_lora has no slices; leave it out")
            try:
                site.delta = found(site.delta, host, site.layer.geometry(site.base).out)
            except DoesNotFit as error:
                raise InjectionError(f"{site.names[0]}: {error}") from error
        for site in sites if self.config.params.expert_rank == "r/top_k" else ():
            if issubclass(site.layer, Stacked):
                site.delta = self._divided(module, site)
        if self.config.params.experts_shared_outer and not any(issubclass(site.layer, Stacked) for site in sites):
            raise InjectionError(
                "experts_shared_outer: no stack of experts is among the targets; name some (target_parameters: [experts.gate_up_proj, "
                "experts.down_proj], or grouped linear layers), or leave it out"
            )
        return sites, passed_over

    def _divided(self, module: nn.Module, site: Site) -> Delta:
        """The site's delta with the rank of one of the experts that a token meets."""
        top_k = top_k_of(module, site.names[0])
        if not top_k:
            raise InjectionError(f"{site.names[0]}: expert_rank: r/top_k, and nothing near it tells how many experts a token meets; set r")
        low = site.delta
        while isinstance(low, DoRADelta | MergedDelta):
            low = low.low
        assert isinstance(low, LoRADelta)
        if low.r % top_k:
            raise InjectionError(f"{site.names[0]}: expert_rank: r/top_k, and r={low.r} is no multiple of top_k={top_k}; give one that is")
        return with_rank(site.delta, low.r // top_k)

    def wrap(self, site: Site, clock: Clock) -> AdaptedLayer:
        if site.layer is AdaptedLinear:
            assert isinstance(site.base, nn.Linear)
            assert isinstance(site.delta, LoRADelta | DoRADelta | MergedDelta)
            return LoRALinear(
                site.base, self.config.params, name=site.names[0], seed=self.config.seed, clock=clock, delta=site.delta
            )
        if site.layer is AdaptedGroupedLinear:
            return LoRAGroupedLinear(
                site.base, self.config.params, name=site.names[0], seed=self.config.seed, clock=clock, delta=site.delta
            )
        return super().wrap(site, clock)
