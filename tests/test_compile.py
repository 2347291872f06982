"""torch.compile of each block, in the trainer: losses of every layout are those of one eager process, and graphs stay as they are."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.dropout import AdapterDropout, Clock
from d9d_lora.train.config import ConfigError
from d9d_lora.train.trainer import Trainer
from d9d_lora.train.world import device_of, join
from tests.small_run import config_of, losses, make_assets, run

STEPS = 3
DORA = {"peft__params": {"r": 4, "alpha": 8, "dropout": 0.1, "use_dora": True}}
RECOMPUTED = {"train__activation_checkpointing": True}
CELLS = {  # all with dropout
    "single": (1, {}),
    "single, blocks recomputed": (1, RECOMPUTED),
    "fsdp2, four bits": (2, {"model__quantise": "nf4"}),
    "fsdp2, dora": (2, DORA),
    "tp2_sp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "fsdp2_tp2": (4, {"parallel__tp": 2}),
    "replicate2": (2, {"parallel__dp_replicate": 2}),
    "pp2": (2, {"parallel__pp": 2}),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"), num_hidden_layers=2)


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
    assert max(abs(a - b) / abs(b) for a, b in zip(found, eager(cell), strict=True)) < 1e-9
    assert graphs[-1] == graphs[1] > 0, graphs  # the second step may have other lengths than the first
    assert breaks == left == {}


def test_recomputed_blocks_on_tensor_parallel_ranks_are_refused(assets, tmp_path):
    with pytest.raises(ConfigError, match="leave one of the three out"):
        config_of(assets, tmp_path, **RECOMPUTED, train__compile=True, parallel__tp=2)


# -- one graph for all layers --------------------------------------------------------------------------------------------------------


def graphs_of(kind, params, layers=4):
    """Graphs that are compiled for blocks of one linear layer each."""
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(layers)))
    inject_peft_and_freeze(peft_method_from_config({"kind": kind, "module_name_pattern": r"\d\.0", "params": params}), model)
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    model(torch.randn(2, 8, requires_grad=True))
    return counters["stats"]["unique_graphs"]


DROPS = [("lora", {"r": 2, "alpha": 2, "dropout": 0.2}), ("lokr", {"r": 2, "alpha": 2, "rank_dropout": 0.2})]


@pytest.mark.parametrize("kind,params", DROPS)
def test_layers_that_drop_share_one_graph(kind, params):
    assert graphs_of(kind, params) == 1


def test_mutation_the_key_of_a_mask_is_a_number(monkeypatch):
    monkeypatch.setattr(AdapterDropout, "_time_and_key", lambda self, clock: (clock.now, self.key))
    assert graphs_of(*DROPS[0]) > 1


def test_masks_of_a_compiled_layer_are_those_of_an_eager_one():
    dropout = AdapterDropout(0.5, "layer", Clock(3))
    dropout.clock.set(1)
    x = torch.ones(6, 40)
    assert torch.equal(torch.compile(dropout, backend="eager", fullgraph=True)(x), dropout(x))
