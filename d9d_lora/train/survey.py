"""What a start from data sees before the injection: the bare model, run over a few steps of the trainer's own batches."""

from collections.abc import Iterator

import torch
from torch import nn

from d9d_lora.init.data import Step
from d9d_lora.state.mappers import ModelStateMapperParallel
from d9d_lora.tokens import IGNORE
from d9d_lora.train import model as models
from d9d_lora.train.batches import Batches
from d9d_lora.train.build import Built
from d9d_lora.train.config import RunConfig
from d9d_lora.train.tensor_parallel import apply_tensor_parallel
from d9d_lora.train.world import World

SURVEYED = 32  # steps of data that a start from data may look at; it ends earlier when its directions have settled


def survey(built: Built, batches: Batches) -> None:
    """Lets the method look, and lets the bare model go.

    The base is read twice for it, but ranks are known before the injection, as the table of what is trained must tell them.
    """
    config, world = built.config, built.world
    torch.manual_seed(config.train.seed)
    if world.parallel.pp > 1:
        raise ValueError(
            "peft: a start from data (eva, corda) looks at the whole model at once, which no rank of a pipeline holds; begin with "
            "parallel.pp=1 and save a checkpoint, which resumes with any pp, or choose another init_lora_weights"
        )
    if world.parallel.ep > 1:
        raise ValueError(
            "peft: a start from data (eva, corda) with parallel.ep is not proven; begin with parallel.ep=1 and save a checkpoint, "
            "which resumes with any ep, or choose another init_lora_weights"
        )
    module = _bare(config, world, built.dtype)

    def steps() -> Iterator[Step]:
        for step in range(SURVEYED):
            micro = batches.step(step * config.data.batch_size)
            for i, batch in enumerate(micro):
                batch = batch.to(world.device)
                inputs = models.accepted(module, batch.inputs())
                last = i == len(micro) - 1
                yield Step(lambda inputs=inputs: module(**inputs), batch.filled, batch.labels != IGNORE, last)  # type: ignore[misc]

    # The bare model takes whole rows, also where training shares them: without gradients nothing is kept.
    built.method.survey(module, steps(), group=world.group_over("dp_replicate", "dp_shard"))


def _bare(config: RunConfig, world: World, dtype: torch.dtype) -> nn.Module:
    """The base with its weights, frozen and sharded."""
    base = models.open_model(config.model, dtype)
    module = base.module.requires_grad_(False)
    if world.parallel.tp > 1:
        assert world.mesh is not None
        apply_tensor_parallel(base, world.mesh["tp"], sequence=world.parallel.sequence_parallel)
        module.requires_grad_(False)
    if world.mesh is not None:
        models.apply_data_parallel(module, world.mesh, world.parallel)
    models.materialise(base, world.device)
    models.load(base, ModelStateMapperParallel([]), config.model)
    return module
