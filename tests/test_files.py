"""The two verbs: every format there and back, on layouts, and what must leave the model as it was."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

import d9d_lora
from d9d_lora import inject_peft_and_freeze, load_adapter, peft_method_from_config, save_adapter
from d9d_lora.methods.full_tune import FullTune
from d9d_lora.placement import fill_, local_of
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.safetensors_dir import CheckpointError
from d9d_lora.walk import adapted_layers
from tests.catalogue import LAYOUTS, Toy, batch, build, mesh_of, peft_config, plan_of, shard_data_parallel
from tests.parity.test_peft_format import adapted, base, logits
from tests.test_laws import make, wake


def toy(method, layer):
    model, made = make(method, layer, LAYOUTS["one"])
    wake(model)
    return model, made


def apart(one, other):
    ids = batch(0)[0]
    with torch.no_grad():
        return float((one(ids) - other(ids)).abs().max())


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors", "adapter.gguf"])
def test_every_format_there_and_back(name, tmp_path):
    if name.endswith("gguf"):
        pytest.importorskip("gguf")
    kind, model = adapted("rslora")
    path = tmp_path / "new folder" / name
    for _ in range(2):  # an earlier one is replaced
        save_adapter(model, path, base="some/base")
    assert [p.name for p in path.parent.iterdir()] == [name]
    fresh = base(kind)
    method = load_adapter(fresh, path)
    assert method.config.kind == "lora"
    assert float((logits(fresh) - logits(model)).abs().max()) < 1e-6
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {n for n, p in fresh.named_parameters() if ".lora_" in n}
    method.merge(fresh)
    assert float((logits(fresh) - logits(model)).abs().max()) < 1e-5


def test_one_file_holds_what_the_directory_holds(tmp_path):
    _, model = adapted("whole modules")
    save_adapter(model, tmp_path / "a", base="some/base")
    save_adapter(model, tmp_path / "a.safetensors", base="some/base")
    single, several = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "a/adapter_model.safetensors")
    assert single.keys() == several.keys()
    assert all(torch.equal(single[k], several[k]) for k in single)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["adapter_config"] == (tmp_path / "a/adapter_config.json").read_text()


@pytest.mark.parametrize("method,layer", [("loha", "embedding"), ("lokr", "conv1d"), ("adalora", "conv_groups")])
def test_what_peft_lacks_is_kept_in_our_own_format(method, layer, tmp_path):
    model, made = toy(method, layer)
    with pytest.raises(AdapterError, match=r"PEFT has no|groups|Conv2d"):
        save_adapter(model, tmp_path / "a")
    for _ in range(2):
        save_adapter(model, tmp_path / "a", method=made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["method.json", "weights.safetensors"]
    fresh = build(layer)
    load_adapter(fresh, tmp_path / "a")
    assert apart(fresh, model) < 1e-12
    wake(fresh, 0.7)
    load_adapter(fresh, tmp_path / "a")  # in place
    assert apart(fresh, model) < 1e-12
    config = json.loads((tmp_path / "a/method.json").read_text())
    config["params"] |= {"alpha": 1.0} if "alpha" in config["params"] else {"lora_alpha": 1.0}
    (tmp_path / "a/method.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="describes"):
        load_adapter(fresh, tmp_path / "a")
    (tmp_path / "a/strange.txt").write_text("x")
    with pytest.raises(AdapterError, match="no part of our format"):
        save_adapter(model, tmp_path / "a", method=made)


def broken(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})


def test_a_load_that_fails_leaves_the_model_bare(tmp_path):
    kind, model = adapted("llama")
    save_adapter(model, tmp_path)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    broken(tmp_path, lambda tensors: tensors.update({key: torch.full_like(tensors[key], float("inf"))}))
    fresh = base(kind)
    names = [n for n, _ in fresh.named_parameters()]
    fresh.lm_head.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"v_proj\.lora_B"):
        load_adapter(fresh, tmp_path)
    assert not list(adapted_layers(fresh))
    assert [n for n, p in fresh.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert [n for n, _ in fresh.named_parameters()] == names
    assert torch.equal(logits(fresh), logits(base(kind)))


def test_an_adapter_of_another_scale_is_not_filled(tmp_path):
    kind, model = adapted("llama")
    save_adapter(model, tmp_path)
    other = base(kind)
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "target_modules": ["q_proj", "v_proj"], "params": {"r": 4}}), other)
    with pytest.raises(AdapterError, match=r"scaling 1.5; the layer has lora r=4 alpha=8"):
        load_adapter(other, tmp_path)
    inplace = adapted("llama")[1]
    with torch.no_grad():
        for layer in adapted_layers(inplace):
            layer.factor("lora_B").zero_()
    load_adapter(inplace, tmp_path)
    assert torch.equal(logits(inplace), logits(model))


def test_paths_that_are_something_else(tmp_path):
    _, model = adapted("llama")
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(AdapterError, match="is no file"):
        save_adapter(model, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="no adapter_config in its header"):
        load_adapter(model, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="not there"):
        load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="has no `config`"):
        save_adapter(toy("lora", "linear")[0], tmp_path / "a.gguf")


def test_what_is_trained_beside_an_adapter_decides_too(tmp_path):
    """PEFT's LoHa has no biases, and no PEFT directory has a parameter of a module that holds adapters."""
    config = {**peft_config("loha", "linear_bias"), "bias": "lora_only"}
    model = build("linear_bias")
    made = peft_method_from_config(config)
    inject_peft_and_freeze(made, model)
    with pytest.raises(AdapterError, match="no field for them"):
        save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a", method=made)
    assert (tmp_path / "a/method.json").exists()


def test_a_full_tune_is_kept_too(tmp_path):
    model = build("linear")
    method = peft_method_from_config({"kind": "full_tune", "module_name_pattern": r".*norm"})
    inject_peft_and_freeze(method, model)
    with torch.no_grad():
        model.blocks[0].norm.weight.add_(1)
    save_adapter(model, tmp_path / "a", method=method)
    fresh = build("linear")
    assert isinstance(load_adapter(fresh, tmp_path / "a"), FullTune)
    assert apart(fresh, model) == 0


# -- layouts ------------------------------------------------------------------------------------------------------------------------


def _sharded(layout, layer, method=None):
    layout = LAYOUTS[layout]
    model, mesh = build(layer), mesh_of(layout)
    if layout.tp > 1:
        parallelize_module(model, mesh["tp"], plan_of(model, layout.sequence))
    if method:
        inject_peft_and_freeze(method, model)
    shard_data_parallel(model, mesh, layout)
    return model


def _load_on(rank, layout, path):
    if layout == "fsdp2":  # already under fully_shard
        with pytest.raises(AdapterError, match="Call load_adapter before fully_shard"):
            load_adapter(_sharded(layout, "linear_bias"), path)
        model = _sharded(layout, "linear_bias", peft_method_from_config(peft_config("patterns", "linear_bias")))
    else:
        model = _sharded(layout, "linear_bias")
    load_adapter(model, path)
    save_adapter(model, path.parent / f"{layout}.safetensors")
    wanted = {n: p for n, p in toy("patterns", "linear_bias")[0].named_parameters() if ".lora_" in n}
    mine = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert mine.keys() == wanted.keys()
    same = all(local_of(p).numel() <= wanted[n].numel() for n, p in mine.items())
    return same, d9d_lora.total_parameter_count(model), d9d_lora.trainable_parameter_count(model)


@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_layouts_read_their_part_and_count_the_whole(pool, tmp_path, layout):
    model, _ = toy("patterns", "linear_bias")
    for name, p in model.named_parameters():
        if p.requires_grad and "lora" not in name:
            fill_(p, lambda w, g: w.normal_(generator=g), seed=6, name=name)
    save_adapter(model, tmp_path / "one")
    save_adapter(model, tmp_path / "one.safetensors")
    found = pool.run(LAYOUTS[layout].world, _load_on, layout, tmp_path / "one")
    assert set(found) == {(True, d9d_lora.total_parameter_count(model), d9d_lora.trainable_parameter_count(model))}
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / f"{layout}.safetensors").read_bytes()


def test_counts():
    model = Toy(lambda i, o: nn.Linear(i, o, bias=False))
    whole = d9d_lora.total_parameter_count(model)
    assert whole == sum(p.numel() for p in model.parameters())
    model.blocks[1].up.weight = model.blocks[0].up.weight
    assert d9d_lora.total_parameter_count(model) == whole - 12 * 20
    packed = build("nf4")
    assert d9d_lora.total_parameter_count(packed) == d9d_lora.total_parameter_count(build("nf4", quantise=False))
    assert d9d_lora.trainable_parameter_count(toy("lora", "linear")[0]) == 2 * 2 * 3 * (12 + 20)
