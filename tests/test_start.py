"""A run that starts from an adapter: every layout begins where one process does, with the file's numbers; what does not fit is told."""

import json
import re
import shutil
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from d9d_lora import peft_method_from_config
from d9d_lora.placement import full_of
from d9d_lora.state import reader
from d9d_lora.state.peft_config import AdapterError, dump
from d9d_lora.train import model as models
from d9d_lora.train import start, trainer
from d9d_lora.train.checks import AdapterFault
from d9d_lora.train.config import ConfigError, ModelConfig
from d9d_lora.train.main import config_directory
from tests.small_run import config_of, losses, make_assets, run

LORA = {"kind": "lora", "target_modules": "all-linear", "params": {"r": 3, "alpha": 8, "dropout": 0.1}}
SHARD = {"parallel__adapters": "shard"}
LAYOUTS = {
    "fsdp2": (2, SHARD),
    "tp2": (2, {"parallel__tp": 2}),
    "fsdp2_tp2": (4, {"parallel__tp": 2, **SHARD}),
    "pp2": (2, {"parallel__pp": 2}),
    "cp2": (2, {"parallel__cp": 2, "parallel__adapters": "replicate"}),
}
FIRST = {"train__steps": 4, "optim__lr": 0.1}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def first(pool, assets, tmp_path_factory):
    """Run A: its directory, and what it told."""
    output = tmp_path_factory.mktemp("first")
    return output, pool.run(1, run, assets, output, FIRST)[0]


def begun(rank, assets, output, overrides, skipped=None, proven=True):
    """One step at a rate of 0 from an adapter: what the run told, its gradients whole, and the bytes read of the file.

    `skipped`: a factor that the reader leaves as it is; `proven`: whether the run compares with the file.
    """
    gradients, read = {}, []
    clip, fill, put = trainer.Trainer._clip, start.Start.fill, reader._fill

    def clipped(self):
        norm = clip(self)
        gradients.update({n: full_of(p.grad).clone() for n, p in self.params.items()})
        return norm

    def filled(self, *args):
        read.append(fill(self, *args))
        return read[0]

    def skips(name, *args):
        if skipped is None or not name.endswith(skipped):
            put(name, *args)

    prove = start.Start.prove if proven else lambda *_: None
    with (
        mock.patch.object(trainer.Trainer, "_clip", clipped),
        mock.patch.object(trainer, "set_learning_rate", lambda optimiser, rate: [g.update(lr=0.0) for g in optimiser.param_groups]),
        mock.patch.multiple(start.Start, fill=filled, prove=prove),
        mock.patch.object(reader, "_fill", skips),
    ):
        try:
            told = run(rank, assets, output, {"train__steps": 1, **overrides})
        except AdapterFault as fault:
            return str(fault)
    return {**told, "gradients": gradients, "bytes": read[0].bytes_read}


def from_(path, **overrides):
    return {"model__adapter": str(path), **overrides}


@pytest.fixture(scope="module")
def one(pool, assets, first, tmp_path_factory):
    """The oracle: one process that starts from A's adapter."""
    return pool.run(1, begun, assets, tmp_path_factory.mktemp("one"), from_(first[0] / "adapter"))[0]


def weights(path):
    return load_file(path / "adapter_model.safetensors")


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours), [k for k in ours if not torch.equal(ours[k], theirs[k])]


def alike(ranks, one):
    assert abs(losses(ranks[0])[0] - losses(one)[0]) < 1e-9 * losses(one)[0]
    every = {}
    for rank in ranks:
        every |= rank["gradients"]
    assert every.keys() == one["gradients"].keys()
    for name, expected in one["gradients"].items():
        assert (every[name] - expected).abs().max() <= 1e-7 * expected.abs().max(), name


def test_one_process_goes_on_where_the_first_run_ended(first, one):
    assert one["before"] == first[1]["after"]
    assert abs(one["before"]["loss"] - first[1]["before"]["loss"]) > 0.05


@pytest.mark.parametrize("peft", [None, LORA], ids=["own", "given"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_begins_where_one_process_does(pool, assets, first, one, tmp_path, layout, peft):
    """Loss, every gradient; and the file after a step at a rate of 0 is A's."""
    world, degrees = LAYOUTS[layout]
    ranks = pool.run(world, begun, assets, tmp_path, from_(first[0] / "adapter", peft=peft, **degrees))
    alike(ranks, one)
    same(weights(tmp_path / "adapter"), weights(first[0] / "adapter"))
    if layout == "fsdp2":
        whole = sum(t.nbytes for t in weights(tmp_path / "adapter").values())
        assert sum(rank["bytes"] for rank in ranks) == whole
        assert all(rank["bytes"] < 0.6 * whole for rank in ranks)


def test_mutation_a_factor_that_is_not_loaded(pool, assets, first, one, tmp_path):
    """The run stops before its first step and names it; without that look, its first step is another."""
    skipped = "layers.1.mlp.up_proj.lora_B.weight"
    degrees = from_(first[0] / "adapter", **LAYOUTS["tp2"][1])
    for told in pool.run(2, begun, assets, tmp_path / "proven", degrees, skipped):
        assert re.search(rf"before the first step .*rank 1.*{re.escape(skipped)}", told, re.DOTALL)
    assert not (tmp_path / "proven" / "adapter").exists()
    ranks = pool.run(2, begun, assets, tmp_path / "blind", degrees, skipped, False)
    with pytest.raises(AssertionError):
        alike(ranks, one)


METHODS = {
    "dora": {"kind": "dora", "target_modules": ["q_proj", "embed_tokens"], "params": {"r": 2, "alpha": 4}},
    "patterns": {**LORA, "rank_pattern": {"q_proj": 4}, "params": {"r": 2, "alpha": 4, "scaling": "rslora"}},
    "whole": {"kind": "lora", "target_modules": ["q_proj"], "modules_to_save": ["norm"], "params": {"r": 2, "alpha": 4}},
    "loha": {"kind": "loha", "target_modules": ["q_proj"], "params": {"r": 2, "alpha": 4}},
    "lokr": {"kind": "lokr", "target_modules": ["q_proj"], "params": {"r": 2, "alpha": 4}},
    "vblora": {"kind": "vblora", "target_modules": ["q_proj"], "params": {"r": 2, "num_vectors": 8, "vector_length": 4}},
    "vera": {"kind": "vera", "target_modules": ["q_proj"], "params": {"r": 4}},
    "randlora": {"kind": "randlora", "target_modules": ["q_proj"], "params": {"r": 4, "alpha": 8}},
    "stack": {"kind": "stack", "methods": [
        {"kind": "lora", "target_modules": ["q_proj"], "params": {"r": 2, "alpha": 4}},
        {"kind": "loha", "target_modules": ["down_proj"], "params": {"r": 2, "alpha": 4}},
        {"kind": "full_tune", "module_name_pattern": ".*norm"},
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_from_its_own_file(pool, assets, tmp_path, name):
    """Two stages on two pipeline ranks, by what the file says; every second one on two shards, by the config."""
    layout, peft = [("pp2", None), ("fsdp2", METHODS[name])][sorted(METHODS).index(name) % 2]
    (ended,) = pool.run(1, run, assets, tmp_path / "a", {"peft": METHODS[name], "train__steps": 2, "optim__lr": 0.1})
    world, degrees = LAYOUTS[layout]
    told = pool.run(world, begun, assets, tmp_path / "b", from_(tmp_path / "a" / "adapter", peft=peft, **degrees))[0]
    tolerance = 1e-9 if name not in ("whole", "stack") else 1e-6  # norms of this family are computed in fp32
    assert abs(told["before"]["loss"] - ended["after"]["loss"]) < tolerance
    files = [next((tmp_path / d / "adapter").glob("*.safetensors")) for d in "ab"]
    same(*map(load_file, files))


def test_experts_shared_out_begin_with_their_part(pool, tmp_path):
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}
    assets = make_assets(tmp_path, "qwen3_moe", **shape)
    peft = {**LORA, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "params": {"r": 4, "alpha": 8}}
    pool.run(1, run, assets, tmp_path / "a", {"peft": peft, "train__steps": 2, "optim__lr": 0.1})
    path = tmp_path / "a" / "adapter"
    (alone,) = pool.run(1, begun, assets, tmp_path / "one", from_(path, peft=peft))
    ranks = pool.run(2, begun, assets, tmp_path / "b", from_(path, peft=None, parallel__ep=2))
    assert abs(losses(ranks[0])[0] - losses(alone)[0]) < 1e-7 * losses(alone)[0]
    found, expected = (next(m["gradient_norm"] for m in told["metrics"] if "loss" in m) for told in (ranks[0], alone))
    assert abs(found - expected) < 1e-6 * expected
    same(weights(tmp_path / "b" / "adapter"), weights(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_a_single_file(pool, assets, first, one, tmp_path, suffix):
    path, source = tmp_path / f"a{suffix}", first[0] / "adapter"
    if suffix == ".gguf":
        pytest.importorskip("gguf")
        from d9d_lora.export.gguf import write_gguf

        write_gguf(source, path, base_config=assets / "model")
    else:
        config = json.loads((source / "adapter_config.json").read_text())
        save_file(weights(source), path, {"format": "pt", "adapter_config": dump(config)})
    told = pool.run(2, begun, assets, tmp_path / "b", from_(path, peft=None, **SHARD))[0]
    assert abs(told["before"]["loss"] - one["before"]["loss"]) < (1e-9 if suffix != ".gguf" else 1e-5)


def test_a_checkpoint_of_the_run_goes_first(pool, assets, first, one, tmp_path):
    begin = from_(first[0] / "adapter", checkpoint__every=1, peft=None, train__steps=2, optim__schedule="constant")
    (whole,) = pool.run(1, run, assets, tmp_path / "whole", begin)
    path = str(tmp_path / "whole" / "checkpoints" / "step_00000001")
    (resumed,) = pool.run(1, run, assets, tmp_path / "again", {**begin, "checkpoint__resume": path})
    assert losses(resumed) == losses(whole)[1:]
    assert (tmp_path / "again" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(AssertionError, match=r"adapter: the checkpoint has '.*', this run None"):
        pool.run(1, run, assets, tmp_path / "other", {**begin, "checkpoint__resume": path, "model__adapter": None, "peft": LORA})


# -- what does not fit -----------------------------------------------------------------------------------------------------------------


def check(assets, path, peft):
    config = ModelConfig(path=str(assets / "model"), adapter=str(path), dtype="float64")
    start.Start(config).check(peft_method_from_config(peft), models.open_model(config, torch.float64).module, own=False)


def params(**changes):
    return {**LORA, "params": {**LORA["params"], **changes}}


@pytest.mark.parametrize("peft,told", [
    (params(r=4, alpha=8), r"and 13 more: peft asks for lora r=4 alpha=8, the adapter is lora r=3 .*expected r 4, came 3, scaling 2.0"),
    (params(alpha=9), r"expected scaling 3\.0, came 2\.66"),
    ({**LORA, "target_modules": ["q_proj", "lm_head"]}, r"lm_head only in peft(.|\n)*mlp.down_proj.* and 7 more only in the adapter"),
    ({**LORA, "kind": "dora"}, r"expected method DoRA of LoRA, came LoRA"),
    ({**LORA, "modules_to_save": ["norm"]}, r"model\.norm\.weight only in peft"),
    (params(init_lora_weights="pissa"), "moves the base weight"),
    (params(init_lora_weights="eva"), r"start from data .*peft=from_adapter"),
    ({"kind": "adalora", "target_modules": ["q_proj"], "params": {"init_r": 4, "target_r": 2, "total_step": 10}}, "schedule has given out"),
])  # fmt: skip
def test_another_method_is_refused_with_every_difference(assets, first, peft, told):
    with pytest.raises(AdapterError, match=told):
        check(assets, first[0] / "adapter", peft)


def test_what_a_file_does_not_settle_is_free(assets, first):
    check(assets, first[0] / "adapter", params(dropout=0.5, init_lora_weights="gaussian"))


def broken(source, to, **changes):
    """A copy of an adapter without some tensors (None), or with others."""
    shutil.copytree(source, to)
    held = {**load_file(to / "adapter_model.safetensors"), **{k: v for k, v in changes.items() if v is not None}}
    save_file({k: v for k, v in held.items() if changes.get(k, v) is not None}, to / "adapter_model.safetensors", {"format": "pt"})
    return to


def test_files_that_are_not_whole_or_of_another_base_are_refused(pool, assets, first, tmp_path):
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    without = broken(first[0] / "adapter", tmp_path / "without", **{key.format("A"): None, key.format("B"): None})
    stranger = broken(first[0] / "adapter", tmp_path / "stranger", **{"base_model.model.model.norm.weight": torch.ones(24)})
    wide = make_assets(tmp_path / "wide", intermediate_size=48)
    for base, path, told in [
        (assets, without, "model.layers.0.mlp.up_proj only in peft"),
        (assets, stranger, r"model.norm.weight only in the adapter"),
        (wide, first[0] / "adapter", r"was not loaded(.|\n)*misshapen(.|\n)*expected \(48, 3\), the file gives \(40, 3\)"),
        (assets, tmp_path / "nowhere", "nowhere cannot be read"),
    ]:
        with pytest.raises(AssertionError, match=told):
            pool.run(1, run, base, tmp_path / "b", from_(path))


def test_the_config(assets, tmp_path):
    with pytest.raises(ConfigError, match=r"peft: no method; give one \(peft=lora\), or an adapter to start from"):
        config_of(assets, tmp_path, peft=None)
    with initialize_config_dir(config_directory(), version_base="1.3"):
        assert compose("train", ["peft=from_adapter", "model.adapter=x"]).peft is None
