"""A method from another package, found by its entry point: it obeys the laws though this project never heard of it."""

import sys
from pathlib import Path

import pytest
import torch

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config, registry
from d9d_lora.sums import ReplicatedSum
from d9d_lora.walk import adapted_layers
from tests.catalogue import LAYERS, LAYOUTS, batch, build
from tests.test_laws import backward, close, grads_of, make, wake

# Its delta says nothing of stacks of matrices, so grouped layers refuse it.
BY_MODULE = [name for name, row in LAYERS.items() if row.field == "target_modules" and name != "grouped"]
PLUGIN = str(Path(__file__).parent / "plugin")


def install():
    if PLUGIN not in sys.path:
        sys.path.insert(0, PLUGIN)
    registry._installed.cache_clear()


@pytest.fixture(autouse=True)
def installed():
    install()
    yield
    sys.path.remove(PLUGIN)
    registry._installed.cache_clear()


def config(layer):
    return {"kind": "diagonal", "target_modules": LAYERS[layer].targets, "r": 3}


def test_the_registry_finds_it():
    assert "diagonal" in registry.kinds()
    method = peft_method_from_config(config("linear"))
    assert type(method).__name__ == "Diagonal"
    assert type(method).__module__ == "diagonal_lora"


@pytest.mark.parametrize("layer", BY_MODULE)
def test_its_start_changes_nothing_and_merged_is_adapted(layer):
    model = build(layer)
    ids, _ = batch(0)
    plain = model(ids)
    method = peft_method_from_config(config(layer))
    inject_peft_and_freeze(method, model)
    assert torch.equal(model(ids), plain)
    wake(model)
    adapted = model(ids)
    assert (adapted - plain).abs().max() > 0.1
    merge_peft(method, model)
    assert (model(ids) - adapted).abs().max() < 1e-10


def gradients(rank, layer, layout_name):
    install()
    from tests import catalogue

    catalogue.METHODS["diagonal"] = catalogue.Method({"kind": "diagonal", "r": 3}, {"diag_d"})
    layout = LAYOUTS[layout_name]
    reference, _ = make("diagonal", layer, LAYOUTS["one"], rank_pattern={}, alpha_pattern={})
    model, _ = make("diagonal", layer, layout, rank_pattern={}, alpha_pattern={})
    wake(reference)
    wake(model)
    bucket = ReplicatedSum(adapted_layers(model))
    backward(model, layout)
    backward(reference, LAYOUTS["one"])
    bucket.reduce()
    close(grads_of(model), grads_of(reference))


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "tp2_sp", "fsdp2_tp2"])
@pytest.mark.parametrize("layer", BY_MODULE)
def test_its_gradients_on_layouts_equal_one_process(pool, layer, layout):
    pool.run(LAYOUTS[layout].world, gradients, layer, layout)


def trained_with_it(rank, assets, output, parallel):
    install()
    from tests.small_run import run

    return run(rank, assets, output, {"peft": {"kind": "diagonal", "target_modules": ["q_proj", "down_proj"], "r": 3}, **parallel})


def test_the_trainer_trains_it_on_layouts_and_its_result_is_read_again(pool, tmp_path):
    from transformers import AutoModelForCausalLM

    from d9d_lora.state.native_format import load_trained, method_of_trained
    from tests.small_run import losses, make_assets

    assets = make_assets(tmp_path / "assets")
    (one,) = pool.run(1, trained_with_it, assets, tmp_path / "one", {})
    for layout, degrees in (("fsdp2", {}), ("tp2", {"parallel__tp": 2})):
        found = pool.run(2, trained_with_it, assets, tmp_path / layout, degrees)[0]
        assert max(abs(a - b) for a, b in zip(losses(found), losses(one))) < 1e-9
    outputs = []
    for layout in ("one", "fsdp2", "tp2"):
        model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float64)
        inject_peft_and_freeze(method_of_trained(tmp_path / layout / "adapter"), model)
        load_trained(model, tmp_path / layout / "adapter")
        outputs.append(model(input_ids=torch.arange(8).view(1, 8)).logits)
    plain = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float64)(input_ids=torch.arange(8).view(1, 8)).logits
    assert (outputs[0] - plain).abs().max() > 1e-5
    assert all((o - outputs[0]).abs().max() < 1e-9 for o in outputs)
