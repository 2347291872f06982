"""torch.compile of each block, in the trainer: losses of every layout are those of one eager process, and graphs stay as they are."""

import pytest
import torch
from torch._dynamo.utils import counters

from d9d_lora.train.trainer import Trainer
from d9d_lora.train.world import device_of, join
from tests.small_run import config_of, losses, make_assets, run

STEPS = 4
DORA = {"peft__params": {"r": 4, "alpha": 8, "dropout": 0.1, "use_dora": True}}
NF4 = {"model__quantise": "nf4"}
PLAIN = {"peft__params": {"r": 4, "alpha": 8}}
CELLS = {
    "single": (1, {}),
    "single, no dropout": (1, PLAIN),
    "single, blocks recomputed": (1, {"train__activation_checkpointing": True}),
    "single, four bits": (1, NF4),
    "fsdp2": (2, {}),
    "fsdp2, dora": (2, DORA),
    "tp2": (2, {"parallel__tp": 2}),
    "tp2, dora": (2, DORA | {"parallel__tp": 2}),
    "tp2_sp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "fsdp2_tp2, blocks recomputed": (4, {"parallel__tp": 2, "train__activation_checkpointing": True}),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"), num_hidden_layers=3)


def options(cell):
    """What of a cell changes the losses."""
    ours = {k: v for k, v in CELLS[cell][1].items() if k.startswith(("peft", "model"))}
    return ours | {"train__steps": STEPS, "data__eval_fraction": 0.0}


@pytest.fixture(scope="module")
def eager(pool, assets, tmp_path_factory):
    """Losses of one eager process, by what changes them."""
    found = {}

    def get(cell):
        key = repr(options(cell))
        if key not in found:
            found[key] = losses(pool.run(1, run, assets, tmp_path_factory.mktemp("eager"), options(cell))[0])
        return found[key]

    return get


def compiled(rank, assets, output, overrides):
    """The losses of a compiled run, and after each step how many graphs there are, and why any frame was left."""
    torch._dynamo.reset()
    counters.clear()
    config = config_of(assets, output, **overrides, train__compile=True, train__compile_backend="aot_eager")
    trainer = Trainer(config, join(device_of("cpu"), config.parallel, 60))
    trainer._resume()
    found, graphs = [], []
    for _ in range(STEPS):
        found.append(trainer.train_step()["loss"])
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs, dict(counters["graph_break"]), dict(counters["unimplemented"])


@pytest.mark.parametrize("cell", CELLS)
def test_losses_are_those_of_one_eager_process_and_nothing_is_compiled_anew(pool, assets, eager, tmp_path, cell):
    world, degrees = CELLS[cell]
    found, graphs, breaks, left = pool.run(world, compiled, assets, tmp_path, options(cell) | degrees)[0]
    print(cell, graphs, breaks, left)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, eager(cell), strict=True)) < 1e-9
    assert graphs[-1] == graphs[1], graphs  # the second step may have other lengths than the first
    assert not left, left
