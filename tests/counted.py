"""A real trainer whose steps are counted: what plans are held against."""

import gc
import time
from unittest import mock

import torch

from d9d_lora.placement import local_of
from d9d_lora.train import model as models
from d9d_lora.train.batches import MicroBatch
from d9d_lora.train.trainer import Trainer
from d9d_lora.train.world import device_of, join
from tests.small_run import config_of, make_assets


def trainer_of(assets, output, overrides, row):
    """A trainer of equal rows of `row` tokens, and the bytes that it has read."""
    config = config_of(assets, output, **overrides)
    world = join(device_of("cpu"), config.parallel, 60)
    reports, load = [], models.load
    with mock.patch.object(models, "load", lambda *args: reports.append(load(*args))):
        trainer = Trainer(config, world)
    ids = torch.zeros(config.data.micro_batch_size, row, dtype=torch.int64)
    positions = torch.arange(row).expand_as(ids)
    batches = [MicroBatch(ids, ids, positions, i, 0, tokens=ids.numel()) for i in range(trainer.batches.accumulation)]
    trainer.batches.step = lambda consumed: batches
    trainer.loss.cuts_logits = False
    return trainer, reports[0].bytes_read


def held_by(trainer):
    """Bytes that are there all the time: of the base, of what is trained, of the optimiser's averages."""
    trained = list(trainer.params.values())
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    optimiser = sum(local_of(t).nbytes for p in trained for k, t in trainer.optimiser.state[p].items() if k != "step")
    return {"base": sum(local_of(p).nbytes for p in frozen), "adapters": sum(local_of(p).nbytes for p in trained), "optimiser": optimiser}


def let_go(*, cycles=False):
    """Gives threads of gloo time to let go of the buffers of collectives that have ended; of reference cycles, too, where asked (slow)."""
    if cycles:
        gc.collect()
    time.sleep(0.03)


def mixture(path):
    """A tiny Qwen3-MoE."""
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "tie_word_embeddings": False}
    return make_assets(path, "qwen3_moe", **fields)


def of_experts(dtype, **params):
    """Settings that adapt all of it but the routers."""
    peft = {"kind": "lora", "target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return {"model__dtype": dtype, "peft": {**peft, "params": {"r": 4, **params}}}


def even_routers():
    """Its routers send as many rows to every expert, as a plan has it."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router

    real = Router.forward

    def forward(self, hidden_states):
        logits, scores, index = real(self, hidden_states)
        return logits, scores, torch.arange(index.numel()).view_as(index) % self.num_experts

    return mock.patch.object(Router, "forward", forward)
