"""The demonstration's proof: it passes on a real run, and fails on faults that a loss or an accuracy would not show."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from d9d_lora import demo, demo_verify
from d9d_lora.state.merge_files import merge_files
from d9d_lora.walk import adapted_layers
from tests.small_run import make_assets, run


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory):
    """A run directory as the quickstart leaves one: trained, exported, merged, with a held-out file."""
    assets = make_assets(tmp_path_factory.mktemp("assets"))
    output = assets / "run"
    shutil.copy(assets / "data.jsonl", assets / "eval.jsonl")
    data = {"path": str(assets / "data.jsonl"), "eval_path": str(assets / "eval.jsonl"), "seq_len": 64, "batch_size": 8}
    pool.run(2, run_and_resolve, assets, output, {"data": data, "model__dtype": "float32"})
    merge_files(output / "adapter", assets / "model", output / "merged", dtype=torch.bfloat16)
    return output


def run_and_resolve(rank, assets, output, overrides):
    from d9d_lora.train.main import claim_directory
    from d9d_lora.train.world import device_of, join
    from tests.small_run import config_of

    config = config_of(assets, output, **overrides)
    claim_directory(config, join(device_of("cpu"), config.parallel, 60))
    run(rank, assets, output, overrides)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_is_verified(finished, capsys):
    assert demo.main(["verify", "--run", str(finished)]) == 0
    out = capsys.readouterr().out
    for told in ("PEFT and d9d_lora differ by up to", "weights of merged/", "held-out exact match", "tokens a second", "expected"):
        assert told in out


def refused(run, capsys):
    assert demo.main(["verify", "--run", str(run)]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("fault", ["rows in another order", "scale", "one layer left out"])
def test_a_reader_that_errs_is_found(finished, capsys, monkeypatch, fault):
    def load(model, path):
        report = real(model, path)
        layer = next(la for la in adapted_layers(model) if la.name.endswith("0.self_attn.q_proj"))
        b = layer.factor("lora_B").data
        if fault == "rows in another order":
            b.copy_(b.view(2, -1, b.shape[1]).transpose(0, 1).reshape(b.shape))  # what a GGUF export does to q and k
        else:
            b.mul_(2 if fault == "scale" else 0)
        return report

    real = demo_verify.load_adapter_weights
    monkeypatch.setattr(demo_verify, "load_adapter_weights", load)
    assert "reads another model out of the adapter" in refused(finished, capsys)


def test_an_adapter_that_changes_nothing_is_found(copied, capsys):
    file = copied / "adapter" / "adapter_model.safetensors"
    save_file({k: t * (".lora_B." not in k) for k, t in load_file(file).items()}, file, {"format": "pt"})
    assert "the adapter changes nothing" in refused(copied, capsys)


def test_a_merged_model_that_is_off_is_found(copied, capsys):
    file = copied / "merged" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] *= 1.05
    save_file(state, file, {"format": "pt"})
    assert "the merged model is not W + s B A" in refused(copied, capsys)


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert "holds no config.resolved.yaml" in refused(tmp_path, capsys)


def test_steps_of_a_dtype():
    one, other = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    one.weight.data = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    for value, share, steps in ((1.0, 0, 0), (1.0078125, 0.25, 1), (1.015625, 0.25, 2)):  # bf16 has 1/128 between 1 and 2
        other.weight.data = torch.tensor([[value, 2.0], [0.0, -1.0]])
        assert demo_verify.weights_apart(one, other, torch.bfloat16) == (share, steps)
