"""What a method makes of a survey of the data: a start for every linear layer, with EVA's or CorDA's settings.

A survey comes before the injection, for it may change ranks. Layers it says nothing of (embeddings, convolutions) start as always.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from d9d_lora.init.data import Step, survey
from d9d_lora.init.eva_corda import Covariance, corda, eva
from d9d_lora.thin import Thin

FROM_DATA = ("eva", "corda")


class EvaConfig(BaseModel):
    """PEFT's `eva_config`."""

    model_config = ConfigDict(extra="forbid")

    rho: float = Field(2.0, ge=1, description="a layer's rank may grow to rho times its own; 1 leaves all ranks as they are")
    tau: float = Field(0.99, gt=0, le=1, description="the survey ends when no direction has turned by more than this cosine in a step")
    use_label_mask: bool = Field(True, description="look only at tokens with a label, and not at prompts")
    whiten: bool = Field(False, description="divide each direction by the root of its singular value")
    adjust_scaling_factors: bool = Field(True, description="let alpha follow a rank that has changed, so that the scaling stays")


class CordaConfig(BaseModel):
    """PEFT's `corda_config`, as far as it is not about its cache files."""

    model_config = ConfigDict(extra="forbid")

    corda_method: Literal["ipm", "kpm"] = Field(
        "ipm", description="adapt what the data uses most (ipm, to learn it), or least (kpm, to keep what it shows)"
    )


@dataclass(frozen=True)
class Site:
    """A linear layer that a survey looks at."""

    base: nn.Module
    axes: str
    r: int
    alpha: float
    scaling: float


@dataclass(frozen=True)
class Start:
    """A layer's rank and alpha after a survey, and its factors; none if they come with a checkpoint."""

    r: int
    alpha: float
    factors: Mapping[str, Tensor] = field(default_factory=dict)


def starts_from_data(
    kind: str,
    config: EvaConfig | CordaConfig,
    module: nn.Module,
    sites: Mapping[str, Site],
    steps: Iterable[Step],
    group: dist.ProcessGroup | None,
) -> dict[str, Start]:
    """The start of every site, equal on every rank. Collective.

    Args:
        kind: `eva` or `corda`.
        module: The bare model with its weights, on any layout.
        steps, group: As in `data.survey`.
    """
    targets = {name: site.base for name, site in sites.items()}
    if isinstance(config, EvaConfig):
        found = eva(
            module,
            targets,
            {name: (site.r, site.alpha) for name, site in sites.items()},
            labelled(steps) if config.use_label_mask else steps,
            group=group,
            rho=config.rho,
            tau=config.tau,
            whiten=config.whiten,
            adjust_scaling_factors=config.adjust_scaling_factors,
        )
        return {name: Start(e.r, e.alpha, {"lora_A": e.A}) for name, e in found.items()}
    seen = survey(module, targets, steps, lambda _, x: Covariance(x.whole), group=group)
    starts = {}
    for name, site in sites.items():
        thin = Thin(site.base.weight, site.axes)  # type: ignore[arg-type]
        B, A = corda(thin, seen[name].mean, site.r, site.scaling, config.corda_method)
        starts[name] = Start(site.r, site.alpha, {"lora_A": A, "lora_B": B})
    return starts


def labelled(steps: Iterable[Step]) -> Iterable[Step]:
    """The same microbatches, of which only tokens with a label count."""
    return (step if step.targets is None else replace(step, mask=step.targets) for step in steps)
