"""`layer_replication`: layers that share base weights, with adapters of their own."""

import warnings

import pytest
import torch

from d9d_lora import inject_peft_and_freeze, merge_peft, peft_method_from_config
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.state.peft_save import save_adapter
from tests.parity.test_peft_format import IDS, base, logits, stir
from tests.small_run import losses, make_assets, run

peft = pytest.importorskip("peft")
RANGES = [(0, 2), (1, 2)]  # 0 1 1
CONFIG = {"kind": "lora", "target_modules": ["q_proj", "down_proj"], "params": {"r": 4, "alpha": 6}, "layer_replication": RANGES}


def deeper(**changes):
    model = base("llama")
    model.config.use_cache = False
    method = peft_method_from_config({**CONFIG, **changes})
    mapper = inject_peft_and_freeze(method, model)
    return model.eval(), method, mapper


def test_layers_share_their_base_and_not_their_adapters():
    model, _, _ = deeper()
    one, copy = model.model.layers[1].self_attn.q_proj, model.model.layers[2].self_attn.q_proj
    assert one.base.weight is copy.base.weight
    assert not torch.equal(one.lora_A.weight, copy.lora_A.weight)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert model.config.num_hidden_layers == 3


def test_peft_computes_the_same_and_loads_what_we_save(tmp_path):
    model, _, _ = deeper()
    stir(model)
    save_adapter(model, tmp_path / "a")
    theirs = base("llama")
    theirs.config.use_cache = False
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Mm]issing.*")
        theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "a")).eval()
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5
    assert (logits(model) - logits(base("llama"))).abs().max() > 1e-2
    again = base("llama").eval()
    again.config.use_cache = False
    inject_peft_and_freeze(method_of(tmp_path / "a", again), again)
    load_adapter_weights(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    base("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="no merged weight can hold them all"):
        merge_files(tmp_path / "a", tmp_path / "base", tmp_path / "merged")


def test_a_merge_is_refused_and_a_removal_undoes_it():
    model, method, _ = deeper()
    with pytest.raises(ValueError, match=r"shares its weight with model\.layers\.[12]"):
        merge_peft(method, model)
    method.remove(model)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert torch.equal(logits(model), logits(base("llama")))


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"layer_replication": [(0, 3)]}, r"\[\[0, 3\]\] are no ranges"),
        ({"layer_replication": [(0, 1), (0, 1)]}, r"leaves layers \[1\] of 'model.layers' out"),
        ({"target_modules": ["nothing"]}, "matches no layer"),
        ({"params": {"r": 4, "init_lora_weights": "pissa"}}, "a start that moves it would change both"),
    ],
)
def test_refusals_leave_the_model_as_it_was(changes, told):
    model = base("llama")
    with pytest.raises(ValueError, match=told):
        inject_peft_and_freeze(peft_method_from_config({**CONFIG, **changes}), model)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert torch.equal(model(IDS).logits, base("llama")(IDS).logits)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


def test_a_checkpoint_of_the_base_loads_and_shards(pool, assets, tmp_path):
    peft = {**CONFIG, "layer_replication": [(0, 1), (0, 2)]}  # layer 1 of the base is layer 2 here
    options = {"peft": peft, "train__steps": 3}
    (one,) = pool.run(1, run, assets, tmp_path / "one", options)
    for name, more in {"fsdp2": {}, "recomputed": {"train__activation_checkpointing": True}}.items():
        found = pool.run(2, run, assets, tmp_path / name, {**options, **more})[0]
        assert max(abs(a - b) for a, b in zip(losses(found), losses(one), strict=True)) < 1e-9
    with pytest.raises(AssertionError, match="layer_replication: tensor-parallel"):
        pool.run(2, run, assets, tmp_path / "tp2", {**options, "parallel__tp": 2})
