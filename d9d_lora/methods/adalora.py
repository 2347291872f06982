"""AdaLoRA: dW = s B diag(E) A, W[O,I], A[R,I], E[R,1], B[O,R], s = alpha / (init_r + 1e-5) (as PEFT).

At the start E = 0, and A and B are normal with deviation 0.02, so dW = 0. Zhang et al. 2023, arXiv:2303.10512.

Training spends one budget of triplets (E_k, A_k, B_k) for all layers together. It begins with init_r a layer and falls as a cubic
to target_r a layer on average; the triplets of least importance get E_k = 0. The importance of an entry w with gradient g is

    S <- beta1 S + (1 - beta1) |w g|          sensitivity
    U <- beta2 U + (1 - beta2) | |w g| - S |  its uncertainty
    s(w) = S U,   and of a triplet   s(E_k) + mean_I s(A_k) + mean_O s(B_k)

A term of the loss holds A and B near orthogonal: orth_reg_weight times the mean over factors of |A A^T - 1|_F and |B^T B - 1|_F.

[Note: one budget on every layout]
S and U are placed as their factors are. A rank adds up the scores of its own boxes, and one flat sum over the mesh, of 3 R numbers a
layer, makes them whole and equal on all ranks: so all choose the same triplets. That is all that an allocation sends, and other steps
send nothing for S, U and masks. Gram matrices are summed in the same way; only where FSDP2 shards the letter R, which every row of
A A^T needs, the thin A of all layers are gathered along it, in one collective. Pipeline stages
gather the scores of each other's layers, and the budget, the threshold and the mean of the orthogonality term are those of all stages.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import pad

from d9d_lora.adapters import AdapterConfig, AdapterMethod
from d9d_lora.layers import AdaptedLayer
from d9d_lora.method import InjectionError, PeftInjectionResult
from d9d_lora.methods.delta import Cost, Delta, Draw, Parts
from d9d_lora.placement import box_of, full_of, local_of
from d9d_lora.sums import gather_flat, sum_over_boxes
from d9d_lora.walk import adapted_layers


class AdaLoRAParameters(BaseModel):
    """Hyperparameters of AdaLoRA, by PEFT's names. Steps count from 1."""

    model_config = ConfigDict(extra="forbid")

    target_r: int = Field(8, ge=1, description="mean rank of a layer at the end")
    init_r: int = Field(12, ge=1, description="rank of every layer at the start")
    tinit: int = Field(0, ge=0, description="steps before the budget begins to fall")
    tfinal: int = Field(0, ge=0, description="last steps, with the ranks as they were found")
    deltaT: int = Field(1, ge=1, description="steps between two allocations of the budget")
    beta1: float = Field(0.85, gt=0, lt=1, description="average of the sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="average of its uncertainty")
    orth_reg_weight: float = Field(0.5, ge=0, description="weight of the term that keeps A and B near orthogonal")
    total_step: int | None = Field(None, gt=0, description="steps of the run; the trainer puts train.steps here")
    lora_alpha: float = Field(
        8,
        gt=0,
        allow_inf_nan=False,
        validation_alias=AliasChoices("lora_alpha", "alpha"),
        description="scale of the update: s = lora_alpha / (init_r + 1e-5)",
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, validation_alias=AliasChoices("lora_dropout", "dropout"), description="dropout on the input of A"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_r(cls, given: Any) -> Any:
        if isinstance(given, dict) and "r" in given:
            raise ValueError("AdaLoRA has no use for `r`: give init_r, the rank at the start, and target_r, the mean rank at the end")
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target_r > self.init_r:
            raise ValueError(f"target_r={self.target_r} is above init_r={self.init_r}: ranks only fall; lower target_r or raise init_r")
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of total_step={self.total_step} for the budget to fall in; "
                "lower tinit or tfinal, or train longer"
            )
        return self

    @property
    def end(self) -> int:
        """The step of the last allocation."""
        assert self.total_step is not None
        return self.total_step - self.tfinal

    def budget(self, step: int, layers: int) -> int | None:
        """How many triplets `layers` layers may keep after this step; None where nothing is allocated."""
        most, least = self.init_r * layers, self.target_r * layers
        if step == self.end:
            return least
        if step <= self.tinit or step > self.end or step % self.deltaT:
            return None
        left = 1 - (step - self.tinit) / (self.end - self.tinit)
        return int((most - least) * left**3 + least)


class AdaLoRAConfig(AdapterConfig):
    """`kind: adalora`."""

    kind: Literal["adalora"] = "adalora"
    params: AdaLoRAParameters = Field(default_factory=AdaLoRAParameters)  # type: ignore[arg-type]
    unused = {
        "rank_pattern": "AdaLoRA finds the rank of each layer itself",
        "alpha_pattern": "all layers have one alpha",
        "target_parameters": "the budget counts the triplets of layers",
    }

    def of_length(self, steps: int) -> Self:
        """This config for a run of so many steps: `total_step` where it is not given."""
        if self.params.total_step is not None:
            return self
        return self.model_copy(update={"params": AdaLoRAParameters(**{**self.params.model_dump(), "total_step": steps})})


@dataclass(frozen=True)
class AdaLoRADelta(Delta):
    """dW = scaling * B diag(E) A."""

    r: int
    alpha: float
    dropout: float = 0.0
    params: AdaLoRAParameters | None = field(default=None, compare=False, repr=False)  # the schedule, for a file
    kind = "adalora"
    thin = True
    makes = "A"
    axes = {"lora_A": "RI", "lora_E": "R1", "lora_B": "OR"}

    @property
    def scaling(self) -> float:  # type: ignore[override]
        return self.alpha / (self.r + 1e-5)

    def sizes(self, out: int, into: int) -> dict[str, int]:
        return {"O": out, "I": into, "R": self.r, "1": 1}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        return None if factor == "lora_E" else lambda w, g: w.normal_(0, 0.02, generator=g)

    def cost(self, n: int, out: int, into: int) -> Cost:
        """LoRA's, with E A kept."""
        like = super().cost(n, out, into)
        return like._replace(kept=like.kept + self.r * into)

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        return f["lora_B"], f["lora_A"] * f["lora_E"]

    def __str__(self) -> str:
        return f"{self.kind} r={self.r} alpha={self.alpha:g}"


class Memory:
    """What AdaLoRA remembers of a layer from step to step.

    Attributes:
        sensitivity, uncertainty: S and U of every factor, placed as it is.
        kept: [R], the triplets that the last allocation kept; whole on every rank.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        factors = {name: p.detach() for name, p in layer.factors().items()}
        self.sensitivity = {name: torch.zeros_like(p) for name, p in factors.items()}
        self.uncertainty = {name: torch.zeros_like(p) for name, p in factors.items()}
        e = factors["lora_E"]
        self.kept = torch.ones(e.shape[0], dtype=torch.bool, device=e.device)

    def observe(self, name: str, p: nn.Parameter, beta1: float, beta2: float) -> None:
        """S and U after a step; a factor that had no part in it has no gradient, and its |w g| is zero."""
        s, u = local_of(self.sensitivity[name]), local_of(self.uncertainty[name])
        now = torch.zeros_like(s) if p.grad is None else (local_of(p) * local_of(p.grad)).abs()
        s.mul_(beta1).add_(now, alpha=1 - beta1)
        u.mul_(beta2).add_((now - s).abs(), alpha=1 - beta2)

    def score(self, name: str, axes: str) -> Tensor:
        """This rank's part of the triplets' scores, [R]: the sum over its box, over the size of the other letter."""
        placed = self.sensitivity[name]
        dim = axes.index("R")
        rows = box_of(placed)[dim]
        whole = local_of(placed).new_zeros(placed.shape[dim])
        whole[rows] = (local_of(placed) * local_of(self.uncertainty[name])).sum(1 - dim) / placed.shape[1 - dim]
        return whole

    @torch.no_grad()
    def mask(self, layer: AdaptedLayer) -> None:
        """E = 0 in the triplets that are not kept."""
        e = layer.factor("lora_E")
        local_of(e).masked_fill_(~self.kept[box_of(e)[0], None], 0)


class AdaLoRA(AdapterMethod[AdaLoRAConfig]):
    """Low-rank adaptation that shares a budget of ranks out among the layers."""

    kind = "adalora"

    def __init__(self, config: AdaLoRAConfig) -> None:
        if config.params.total_step is None:
            raise ValueError(
                "params.total_step: AdaLoRA's budget falls over the whole run; give its number of optimiser steps (the trainer takes "
                "train.steps)"
            )
        super().__init__(config)
        self._memory: WeakKeyDictionary[AdaptedLayer, Memory] = WeakKeyDictionary()
        self._stages: Any = None  # the ranks that hold the other stages of a pipeline
        self._elsewhere = 0  # how many layers those have

    def delta_for(self, name: str) -> AdaLoRADelta:
        p = self.config.params
        return AdaLoRADelta(p.init_r, p.lora_alpha, p.lora_dropout, p)

    def inject(self, module: nn.Module) -> PeftInjectionResult:
        other = next((la for la in adapted_layers(module) if la.delta.kind == self.kind), None)
        if other is not None:
            raise InjectionError(
                f"{other.name} has an AdaLoRA adapter already, and all layers share one budget: name them in one config"
            )
        return super().inject(module)

    # -- state ---------------------------------------------------------------------------------------------------------------

    def initialise(self, module: nn.Module, batches: Iterable[Any] = (), *, resume: bool = False) -> None:
        super().initialise(module, batches, resume=resume)
        for _, layer in self.layers(module):
            self._memory.pop(layer, None)  # what was remembered of other starts, or placed otherwise

    def memory(self, layer: AdaptedLayer) -> Memory:
        """Made when it is first asked for: factors are then where they stay."""
        return self._memory.get(layer) or self._memory.setdefault(layer, Memory(layer))

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        tensors = super().state(module)
        for _, layer in self.layers(module):
            memory = self.memory(layer)
            for what in ("sensitivity", "uncertainty"):
                tensors |= {f"{layer.name}.{name}.{what}": t for name, t in getattr(memory, what).items()}
            tensors[f"{layer.name}.kept"] = memory.kept
        return tensors

    def trained(self, module: nn.Module) -> list[AdaptedLayer]:
        """The layers that spend the budget: none where another adapter is active and this one is frozen."""
        return [layer for _, layer in self.layers(module) if layer.factor("lora_E").requires_grad]

    def across(self, module: nn.Module, group: Any) -> None:
        self._stages = group
        self._elsewhere = int(self._gathered([torch.tensor([len(self.trained(module))])], module).sum()) - len(self.trained(module))

    def _gathered(self, values: list[Tensor], module: nn.Module) -> Tensor:
        """The numbers of all stages, of which one may have none."""
        if self._stages is None:
            return torch.cat(values)
        device = next(module.parameters()).device
        here = [v.to(device, torch.float64) for v in values] or [torch.zeros(0, device=device, dtype=torch.float64)]
        return gather_flat(torch.cat(here), self._stages)

    # -- the budget ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_step(self, module: nn.Module, step: int) -> None:
        """Weights are those after the step, gradients those it was made with: the order of PEFT's `update_and_allocate`."""
        p = self.config.params
        layers = self.trained(module)
        if step < p.end:
            self._observe(layers)
        budget = p.budget(step, len(layers) + self._elsewhere)
        if budget is not None and len(layers) + self._elsewhere:
            self._allocate(layers, budget, module)
        if budget is not None or step > p.end:
            for layer in layers:
                self.memory(layer).mask(layer)

    def _observe(self, layers: list[AdaptedLayer]) -> None:
        p = self.config.params
        if layers and all(q.grad is None for layer in layers for q in layer.factors().values()):
            raise ValueError("AdaLoRA scores weights by their gradients, and there are none: call after_step before zero_grad")
        for layer in layers:
            for name, q in layer.factors().items():
                self.memory(layer).observe(name, q, p.beta1, p.beta2)

    def _allocate(self, layers: list[AdaptedLayer], budget: int, module: nn.Module) -> None:
        """Keeps the triplets above the score of rank `budget` among all; equal scores fall together, as in PEFT."""
        scores = self.scores(layers)
        every = self._gathered(scores, module)
        drop = len(every) - budget
        threshold = every.kthvalue(drop).values if drop > 0 else None
        for layer, s in zip(layers, scores):
            kept = self.memory(layer).kept
            kept.copy_(torch.ones_like(kept) if threshold is None else s > threshold)

    def scores(self, layers: list[AdaptedLayer]) -> list[Tensor]:
        """The importance of every triplet, [R] a layer, whole on every rank. [Note: one budget on every layout]"""
        parts = []
        for layer in layers:
            memory = self.memory(layer)
            for name, axes in layer.delta.axes.items():
                parts.append((memory.sensitivity[name], memory.score(name, axes)))
        sums = sum_over_boxes(parts)
        return [e + (a + b) for a, e, b in zip(sums[::3], sums[1::3], sums[2::3])]

    # -- orthogonality -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_extra_loss(self, module: nn.Module) -> Tensor | None:
        """Adds the term's gradient, weight / n * 2 (A A^T - 1) A / |A A^T - 1|_F (of B: B (B^T B - 1)), to each rank's own box."""
        weight = self.config.params.orth_reg_weight
        factors = [layer.factor(name) for layer in self.trained(module) for name in ("lora_A", "lora_B")]
        count = len(factors) + 2 * self._elsewhere
        if not weight or not count:
            return None
        thin = whole_along_rank(factors)
        # of A its rows, of B its columns: [R, this rank's part of the other letter]
        flat = [local_of(t) if i % 2 == 0 else local_of(t).T for i, t in enumerate(thin)]
        grams = sum_over_boxes([(t, x @ x.T) for t, x in zip(thin, flat)])
        like = grams[0] if grams else torch.zeros((), device=next(module.parameters()).device)
        total = torch.zeros((), dtype=like.dtype, device=like.device)
        for i, (p, x, gram) in enumerate(zip(factors, flat, grams)):
            gram.diagonal().sub_(1)
            norm = gram.norm()
            total += norm.to(total)
            slope = (gram @ x) * torch.where(norm > 0, 2 * weight / count / norm, 0)  # at the least value, 0 is a gradient
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            local_of(p.grad).add_(slope[box_of(p)[0]] if i % 2 == 0 else slope.T[:, box_of(p)[1]])
        return self._gathered([total.reshape(1)], module).sum() * weight / count

    # -- what an export needs ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rank_pattern(self, module: nn.Module) -> dict[str, list[bool]]:
        """The triplets of every layer that act: those the last allocation kept, and those that have grown back since (AdamW's
        moments move a masked E until the next allocation). From `total_step - tfinal` on it does not change. Collective."""
        return {
            names[0]: (self.memory(layer).kept | (full_of(layer.factor("lora_E").detach())[:, 0] != 0)).tolist()
            for names, layer in self.layers(module)
        }

    def pruned(self, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Every layer's factors with the triplets of `rank_pattern` alone, whole: A [r, I], E [r, 1], B [O, r]. Collective.

        They are scaled as the whole ones: by init_r, not by r.
        """
        patterns = self.rank_pattern(module)
        found = {}
        for names, layer in self.layers(module):
            f, kept = layer.whole_factors(), torch.tensor(patterns[names[0]])
            found[names[0]] = {name: t[:, kept] if name == "lora_B" else t[kept] for name, t in f.items()}
        return found


def whole_along_rank(factors: Sequence[Tensor]) -> list[Tensor]:
    """lora_A and lora_B in turn, each gathered along its letter R where it is sharded there. All travel in one flat all-gather."""
    whole = [p.detach() for p in factors]
    buckets: dict[tuple[DeviceMesh, int, torch.dtype], list[int]] = {}
    for i, p in enumerate(whole):
        if isinstance(p, DTensor):
            for dim in (k for k, s in enumerate(p.placements) if s.is_shard(i % 2)):  # R is dimension 0 of A, 1 of B
                buckets.setdefault((p.device_mesh, dim, p.dtype), []).append(i)
    for (mesh, dim, _), members in buckets.items():
        n = mesh.size(dim)
        local = [whole[i].to_local().transpose(0, i % 2) for i in members]  # type: ignore[attr-defined]
        rows = [whole[i].shape[i % 2] for i in members]
        padded = [pad(t, (0, 0, 0, -(-r // n) - t.shape[0])) for t, r in zip(local, rows)]
        flat = torch.cat([t.reshape(-1) for t in padded])
        found = flat.new_empty(n, flat.numel())
        dist.all_gather_into_tensor(found.view(-1), flat, group=mesh.get_group(dim))
        for i, r, t, part in zip(members, rows, padded, found.split([t.numel() for t in padded], 1)):
            p = whole[i]
            placements = [Replicate() if k == dim else s for k, s in enumerate(p.placements)]  # type: ignore[attr-defined]
            together = part.reshape(-1, t.shape[1])[:r].transpose(0, i % 2)
            whole[i] = DTensor.from_local(together, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())
    return whole
