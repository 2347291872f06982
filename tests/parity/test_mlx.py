"""The real mlx-lm, on a CPU, loads what we write for it, and we read what it writes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.export.low_rank import read_products
from d9d_lora.export.mlx import SAME_NAMES, keys_of, mlx_to_peft
from d9d_lora.export.profiles import ExportError, Job, export
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from tests.parity.test_peft_format import IDS, SMALL, base, logits, stir

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402
from mlx_lm.utils import _get_classes, load_model  # noqa: E402

CLOSE = 1e-4  # fp32 logits of about 10, through two libraries


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    base("llama").save_pretrained(path)
    return path


def mlx_logits(source, adapter=None):
    model = load_model(source)[0]
    model = model if adapter is None else load_adapters(model, str(adapter))
    model.eval()
    return torch.tensor(model(mx.array(IDS.numpy())).tolist())


def saved(path, **config):
    model = base("llama")
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "params": {"r": 4, "alpha": 6}, **config}), model)
    stir(model)
    save_adapter(model, path)
    return model


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": {"target_modules": ALL},
    "lora, some layers, head, embedding": {"target_modules": ["model.layers.0.self_attn.q_proj", "down_proj", "lm_head", "embed_tokens"]},
    "lora, last block": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "lora, rsLoRA and patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"v_proj": 1.5},
        "params": {"r": 4, "alpha": 6, "scaling": "rslora"},
    },
    "dora": {"target_modules": ["q_proj", "up_proj"], "params": {"r": 4, "alpha": 6, "use_dora": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_reads_ours_and_back(case, source, tmp_path, proof):
    model = saved(tmp_path / "adapter", **CASES[case])
    export("mlx", Job(tmp_path / "adapter", tmp_path / "mlx", source))
    moved = (logits(model) - logits(base("llama"))).abs().max()
    difference = (mlx_logits(source, tmp_path / "mlx") - logits(model)).abs().max()
    assert difference < CLOSE < moved / 1000
    proof("mlx-lm", case, "written", by="mlx-lm", compared="logits", difference=difference)

    mlx_to_peft(tmp_path / "mlx", tmp_path / "back")
    again = base("llama")
    inject_peft_and_freeze(method_of(tmp_path / "back", again), again)
    load_adapter_weights(again, tmp_path / "back")
    assert (logits(again) - logits(model)).abs().max() < 1e-5


def test_factors_are_transposed_and_nothing_else(source, tmp_path):
    """A plain adapter keeps every value to the bit, there and back."""
    saved(tmp_path / "adapter", **CASES["lora"])
    export("mlx", Job(tmp_path / "adapter", tmp_path / "mlx", source))
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert (config["lora_parameters"]["scale"], config["lora_parameters"]["rank"], config["num_layers"]) == (1.5, 4, 2)
    assert config["lora_parameters"]["keys"] == sorted([f"self_attn.{n}" for n in ALL[:4]] + [f"mlp.{n}" for n in ALL[4:]])
    mlx_to_peft(tmp_path / "mlx", tmp_path / "back")
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "back"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_we_read_what_mlx_lm_writes(kind, source, tmp_path, proof):
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    model = load_model(source)[0]
    model.freeze()
    linear_to_lora_layers(model, 1, parameters, use_dora=kind == "dora")
    mx.random.seed(3)
    from mlx.utils import tree_flatten

    tensors = {name: t + 0.2 * mx.random.normal(t.shape) for name, t in tree_flatten(model.trainable_parameters())}
    (tmp_path / "mlx").mkdir()
    mx.save_safetensors(str(tmp_path / "mlx/adapters.safetensors"), tensors)
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters, "model": "m", "iters": 3}
    (tmp_path / "mlx/adapter_config.json").write_text(json.dumps(config))
    mlx_to_peft(tmp_path / "mlx", tmp_path / "peft")
    ours = base("llama")
    inject_peft_and_freeze(method_of(tmp_path / "peft", ours), ours)
    load_adapter_weights(ours, tmp_path / "peft")
    difference = (mlx_logits(source, tmp_path / "mlx") - logits(ours)).abs().max()
    assert difference < CLOSE
    assert (logits(ours) - logits(base("llama"))).abs().max() > 0.1
    proof("mlx-lm", kind, "read", by="mlx-lm", compared="logits", difference=difference)


def test_the_scale_matters(source, tmp_path):
    """The comparison above sees a scale that is 1 % off."""
    model = saved(tmp_path / "adapter", **CASES["lora"])
    export("mlx", Job(tmp_path / "adapter", tmp_path / "mlx", source))
    file = tmp_path / "mlx/adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["scale"] *= 1.01
    file.write_text(json.dumps(config))
    assert (mlx_logits(source, tmp_path / "mlx") - logits(model)).abs().max() > 10 * CLOSE


TINY = {**SMALL, "head_dim": 4, "pad_token_id": 0, "max_position_embeddings": 64, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("family", sorted(SAME_NAMES))
def test_families_whose_names_are_the_same(family):
    from mlx.nn import Embedding, Linear

    config = CONFIG_MAPPING[family](**TINY)
    with torch.device("meta"):
        ours = AutoModelForCausalLM.from_config(config)
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    expected = {n: tuple(m.weight.shape) for n, m in ours.named_modules() if isinstance(m, kinds)}
    model_class, arguments = _get_classes(json.loads(config.to_json_string(use_diff=False)))
    theirs = model_class(arguments.from_dict(json.loads(config.to_json_string(use_diff=False))))
    assert {n: tuple(m.weight.shape) for n, m in theirs.named_modules() if isinstance(m, (Linear, Embedding))} == expected


def test_what_mlx_lm_cannot_hold(source, tmp_path):
    saved(tmp_path / "a", target_modules=["embed_tokens"], params={"r": 4, "alpha": 6, "use_dora": True})
    with pytest.raises(ExportError, match="magnitude for every token"):
        export("mlx", Job(tmp_path / "a", tmp_path / "mlx", source))
    saved(tmp_path / "b", target_modules=["q_proj", "embed_tokens", "lm_head"])
    tied = tmp_path / "tied"
    tied.mkdir()
    (tied / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ExportError, match=r"(?s)lm_head: the base ties it.*embed_tokens: the base ties it"):
        export("mlx", Job(tmp_path / "b", tmp_path / "mlx", tied))
    (tied / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(ExportError, match="gpt_neox are not known"):
        export("mlx", Job(tmp_path / "b", tmp_path / "mlx", tied))
    assert not (tmp_path / "mlx").exists()


def test_keys():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(4)]
    assert keys_of(names[2:], 4) == (["mlp.up_proj"], 2)
    assert keys_of(names[:2], 4) == (names[:2], 2)  # not the last blocks
    assert keys_of([*names, "lm_head"], 4) == (["lm_head", "mlp.up_proj"], 4)
    assert keys_of([*names, "model.layers.1.mlp.down_proj"], 4)[0] == sorted([*names, "model.layers.1.mlp.down_proj"])


@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda c, t: c.update(fine_tune_type="full"), "only lora and dora"),
        (lambda c, t: c["lora_parameters"].update(rank=True), "rank is True"),
        (lambda c, t: c["lora_parameters"].update(rank=5), r"expected \[in, 5\]"),
        (lambda c, t: c["lora_parameters"].pop("scale"), "scale is 0"),
        (lambda c, t: c["lora_parameters"].update(scale=float("nan")), "nan|NaN"),
        (lambda c, t: t.pop("model.layers.1.mlp.up_proj.lora_a"), r"up_proj has the tensors \['lora_b'\]"),
        (lambda c, t: t.update(stranger=torch.zeros(2)), "the root has the tensors"),
        (lambda c, t: t.update({"model.layers.1.mlp.up_proj.lora_b": torch.full((4, 24), float("inf"))}), "not finite"),
    ],
)
def test_files_that_are_refused(damage, said, source, tmp_path):
    saved(tmp_path / "adapter", target_modules=["up_proj"])
    export("mlx", Job(tmp_path / "adapter", tmp_path / "mlx", source))
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "mlx/adapters.safetensors")
    damage(config, tensors)
    (tmp_path / "mlx/adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "mlx/adapters.safetensors")
    with pytest.raises(AdapterError, match=said):
        mlx_to_peft(tmp_path / "mlx", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert read_products(tmp_path / "adapter")
