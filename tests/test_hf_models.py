"""Hugging Face models through meta, their own plan, injection, FSDP2 and the reader; one process is the oracle."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.placement import fill_, full_of
from d9d_lora.sums import ReplicatedSum
from d9d_lora.train import model as models
from d9d_lora.train import tensor_parallel
from d9d_lora.train.config import ModelConfig, ParallelConfig
from d9d_lora.train.world import World, join
from d9d_lora.walk import adapted_layers

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 52}
GEMMA = {**SHAPE, "head_dim": 8, "num_key_value_heads": 4}
FAMILIES = {
    "llama": ("llama", {**SHAPE, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {**SHAPE, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("qwen2", SHAPE),
    "qwen3": ("qwen3", {**SHAPE, "head_dim": 8}),
    "gemma": ("gemma", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
}
PEFT = {
    "kind": "lora",
    "target_modules": "all-linear",
    "bias": "lora_only",
    "params": {"r": 3, "alpha": 6},
}


def save_family(family: str, directory: Path) -> Path:
    """A small random model of a family on disk, in fp64 values that fp32 can hold."""
    kind, fields = FAMILIES[family]
    torch.manual_seed(3)
    config = CONFIG_MAPPING[kind](vocab_size=67, bos_token_id=0, eos_token_id=1, pad_token_id=None, **fields)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(directory)
    return directory


def open_and_adapt(directory: Path, world: World, peft: dict, recompute: bool = False):
    base = models.open_model(ModelConfig(path=str(directory)), torch.float64)
    parallel = world.parallel
    if parallel.tp > 1:
        tensor_parallel.apply_tensor_parallel(base, world.mesh["tp"], sequence=parallel.sequence_parallel)
    method = peft_method_from_config(peft)
    mapper = inject_peft_and_freeze(method, base.module)
    if recompute:
        models.recompute(base.module)
    if world.mesh is not None:
        models.apply_data_parallel(base.module, world.mesh, parallel)
    models.materialise(base, torch.device("cpu"))
    models.load(base, mapper, ModelConfig(path=str(directory)))
    for layer in adapted_layers(base.module):
        for name, p in layer.factors().items():
            fill_(p, lambda w, g: w.normal_(0, 0.2, generator=g), seed=5, name=f"{layer.name}.{name}")
    parts = [(m, leaf, world.mesh["tp"]) for m, leaf in base.in_parts if m.get_parameter(leaf).requires_grad]
    return base, ReplicatedSum(adapted_layers(base.module), in_parts=parts)


def gradients(directory: Path, world: World, peft: dict, recompute: bool = False):
    base, bucket = open_and_adapt(directory, world, peft, recompute)
    model = base.module.train()
    ids = torch.randint(0, 67, (4, 8), generator=torch.Generator().manual_seed(1))
    rows = slice(world.dp_rank * 4 // world.dp_size, (world.dp_rank + 1) * 4 // world.dp_size)
    positions = torch.arange(8).expand(4, 8)
    next(adapted_layers(model)).dropout.clock.set(0, world.dp_rank)
    logits = model(input_ids=ids[rows], position_ids=positions[rows], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[rows, 1:].flatten(), reduction="sum") / 28
    loss.backward()
    bucket.reduce()
    found = {n: full_of(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    total = world.sum_over_dp(loss.detach().clone())
    return total.item(), found


def compare(rank, directory, peft, degrees, recompute, tolerance=1e-10, drop_norms=False):
    if drop_norms:
        real = tensor_parallel.apply_tensor_parallel
        tensor_parallel.apply_tensor_parallel = lambda base, *a, **k: (real(base, *a, **k), base.in_parts.clear())
    one = World(0, 1, torch.device("cpu"), ParallelConfig(dp_shard=1), None)
    expected = gradients(directory, one, peft)
    found = gradients(directory, join(torch.device("cpu"), ParallelConfig(**degrees), 60), peft, recompute)
    assert abs(found[0] - expected[0]) < 1e-10 * abs(expected[0]), (found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    worst = max((float((found[1][n] - g).abs().max() / g.abs().max().clamp(min=1e-9)), n) for n, g in expected[1].items())
    assert worst[0] < tolerance, f"{worst[1]} is off by {worst[0]:.2e}"
    if drop_norms:
        tensor_parallel.apply_tensor_parallel = real
    dist.barrier()


LAYOUTS = {
    "fsdp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "fsdp2_tp2": (4, {"tp": 2}),
    "fsdp2_tp2_sp": (4, {"tp": 2, "sequence_parallel": True}),
}
CELLS = [(f, la) for f in FAMILIES for la in LAYOUTS if not (f == "gpt2" and la != "fsdp2")]


@pytest.mark.parametrize("family,layout", CELLS)
def test_gradients_of_every_family_equal_one_process(pool, tmp_path, family, layout):
    world, degrees = LAYOUTS[layout]
    # Masks follow the data: replicas have their own.
    dropout = 0.0 if layout.startswith("fsdp2") else 0.3
    peft = {**PEFT, "params": {**PEFT["params"], "dropout": dropout}}
    pool.run(world, compare, save_family(family, tmp_path), peft, degrees, layout == "fsdp2_tp2")


STACK = {
    "kind": "stack",
    "methods": [
        {"kind": "lora", "target_modules": ["q_proj", "o_proj", "embed_tokens"], "params": {"r": 3, "alpha": 6}},
        {"kind": "full_tune", "module_name_pattern": ".*norm"},
    ],
}


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp", "fsdp2_tp2_sp"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_norms_trained_whole_beside_adapters(pool, tmp_path, family, layout):
    world, degrees = LAYOUTS[layout]
    # these families compute norms in fp32 whatever the model's dtype: sums over ranks agree to fp32
    pool.run(world, compare, save_family(family, tmp_path), STACK, degrees, False, 1e-6)


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_mutation_norms_of_sharded_activations_not_summed(pool, tmp_path, layout):
    world, degrees = LAYOUTS[layout]
    with pytest.raises(AssertionError, match=r"norm\.weight is off by"):
        pool.run(world, compare, save_family("qwen3", tmp_path), STACK, degrees, False, 1e-6, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_meta_is_the_model(tmp_path, family):
    directory = save_family(family, tmp_path)
    one = World(0, 1, torch.device("cpu"), ParallelConfig(dp_shard=1), None)
    base, _ = open_and_adapt(directory, one, PEFT)
    real = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    buffers = dict(real.named_buffers())
    for name, buffer in base.module.named_buffers():
        assert torch.equal(buffer, buffers[name.replace(".base.", ".")]), name
    for layer in adapted_layers(base.module):
        layer.reset_parameters()
    ids = torch.arange(12).view(2, 6)
    assert (base.module(input_ids=ids).logits - real(input_ids=ids).logits).abs().max() < 1e-12


def test_a_degree_that_does_not_divide_the_heads_is_refused():
    config = CONFIG_MAPPING["llama"](vocab_size=67, **SHAPE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"tp=4 does not divide num_key_value_heads=2.*\[1, 2\]"):
        tensor_parallel.check_heads(model, 4, model._tp_plan)
