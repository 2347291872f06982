"""The blocks of docs/hosts.md, run: each host gives the losses and the adapter of one plain process without a host, and resumes."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d9d_lora import LoRA, LoRAConfig, LoRAParameters, inject_peft_and_freeze

PAGE = Path(__file__).resolve().parents[2] / "docs/hosts.md"
STEPS, LR, BATCH = 4, 1e-2, 8
HALF = STEPS // 2
LOSSES, FACTORS = 1e-6, 1e-6  # everything is fp64 but the loss, which transformers computes in fp32


def rows():
    ids = torch.randint(64, (BATCH * STEPS, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def block(host):
    """The code of one host, with what all of them share before it."""
    found = dict(re.findall(r"<!-- host: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
    return found["all"] + found[host]


def call(host):
    names = {"__name__": f"docs.hosts.{host}"}
    exec(compile(block(host), f"{PAGE.name}:{host}", "exec"), names)
    return names


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny Llama in fp64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    path = tmp_path_factory.mktemp("hosts") / "base"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def expected(base):
    losses, factors = plain(base, call("loop")["adapter"]())
    assert losses[-1] < losses[0]
    assert all(t.abs().max() > 1e-3 for t in factors[-1].values())
    return losses, factors


def plain(base, method):
    """One process, no host, nothing sharded: the losses and the factors after every step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    inject_peft_and_freeze(method, model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    data, losses, factors = rows(), [], []
    for step in range(STEPS):
        mine = data[BATCH * step : BATCH * (step + 1)]
        loss = model(**{key: torch.stack([row[key] for row in mine]) for key in mine[0]}).loss
        loss.backward()
        method.add_extra_loss(model)
        optimiser.step()
        method.after_step(model, step + 1)
        optimiser.zero_grad()
        losses.append(loss.item())
        factors.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    return losses, factors


def same(path, factors):
    """A PEFT directory holds these factors."""
    held = load_file(Path(path) / "adapter_model.safetensors")
    assert {n.removeprefix("base_model.model.") for n in held} == set(factors)
    for name, value in held.items():
        torch.testing.assert_close(value, factors[name.removeprefix("base_model.model.")], rtol=0, atol=FACTORS)


def alike(ranks, losses):
    for seen in ranks:
        assert seen == pytest.approx(losses, rel=0, abs=LOSSES)


# -- a loop of one's own ------------------------------------------------------------------------------------------------------------


def _loop(rank, *args):
    return call("loop")["train"](*args)


@pytest.mark.parametrize("ranks,tp", [(1, 1), (4, 2)])
def test_the_loop(pool, base, expected, tmp_path, ranks, tp):
    alike(pool.run(ranks, _loop, base, tmp_path, rows(), tp), expected[0])
    same(tmp_path / "adapter", expected[1][-1])


# -- transformers.Trainer -----------------------------------------------------------------------------------------------------------


def adalora():
    from d9d_lora.registry import peft_method_from_config

    params = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1, "lora_alpha": 8, "total_step": STEPS}
    return peft_method_from_config({"kind": "adalora", "target_modules": "all-linear", "params": params})


def _trainer(rank, wrap, make, *args):
    """`wrap`: "fsdp2" lets gloo on a CPU pass for an accelerator; without that, accelerate drops fsdp there and takes DDP."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FSDPModule

    environment, prepare = dict(os.environ), PartialState._prepare_backend
    try:
        if wrap == "fsdp2":
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        names = call("trainer")
        names["adapter"] = make or names["adapter"]
        models, save = [], names["save_adapter"]
        names["save_adapter"] = lambda model, *a, **k: (models.append(model), save(model, *a, **k))
        losses = names["train"](*args, use_cpu=wrap != "fsdp2")
        assert any(isinstance(m, FSDPModule) for m in models[-1].modules()) == (wrap == "fsdp2")
        return losses
    finally:
        PartialState._prepare_backend = prepare
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)


def test_the_trainer_of_transformers(pool, base, expected, tmp_path):
    pytest.importorskip("accelerate")
    first = pool.run(2, _trainer, "fsdp2", None, base, tmp_path / "run", rows(), HALF)
    checkpoint = tmp_path / f"run/checkpoint-{HALF}"
    same(checkpoint / "adapter", expected[1][HALF - 1])
    second = pool.run(2, _trainer, "fsdp2", None, base, tmp_path / "more", rows(), STEPS, str(checkpoint))
    alike([a + b for a, b in zip(first, second)], expected[0])
    same(tmp_path / "more/adapter", expected[1][-1])


def test_the_trainer_of_transformers_as_it_wraps_on_a_cpu(pool, base, expected, tmp_path):
    pytest.importorskip("accelerate")
    alike(pool.run(2, _trainer, "ddp", None, base, tmp_path, rows(), STEPS), expected[0])
    same(tmp_path / "adapter", expected[1][-1])
    # what the Trainer itself saves is no model of anybody else's
    held = load_file(tmp_path / f"checkpoint-{STEPS}/model.safetensors")
    assert "model.layers.0.self_attn.q_proj.base.weight" in held
    assert "model.layers.0.self_attn.q_proj.weight" not in held


def test_the_trainer_of_transformers_calls_a_method_with_a_schedule(pool, base, tmp_path):
    pytest.importorskip("accelerate")
    losses, factors = plain(base, adalora())
    ranks = [t.flatten().count_nonzero().item() for n, t in factors[-1].items() if "lora_E" in n]
    assert 0 < sum(ranks) < 4 * len(ranks)  # some were dropped
    alike(pool.run(2, _trainer, "fsdp2", adalora, base, tmp_path, rows(), STEPS), losses)


# -- Lightning ----------------------------------------------------------------------------------------------------------------------


def _lightning(rank, *args):
    environment, modes = dict(os.environ), []
    try:
        os.environ["TORCHELASTIC_RUN_ID"] = "pool"  # as torchrun says: the processes are there already
        names = call("lightning")
        names["Module"].on_train_end = lambda module: modes.append(module.model.training)
        losses = names["train"](*args)
        assert modes == [True]  # else dropout is off
        return losses
    finally:
        os.environ.clear()
        os.environ.update(environment)


def test_lightning(pool, base, expected, tmp_path):
    pytest.importorskip("lightning")
    first = pool.run(2, _lightning, base, tmp_path / "run", rows(), HALF)
    same(tmp_path / "run/adapter", expected[1][HALF - 1])
    rest = rows()[BATCH * HALF :] + rows()[: BATCH * HALF]  # Lightning counts on, but a plain loader starts anew
    second = pool.run(2, _lightning, base, tmp_path / "more", rest, STEPS, str(tmp_path / "run/checkpoint"))
    alike([a + b for a, b in zip(first, second)], expected[0])
    same(tmp_path / "more/adapter", expected[1][-1])


def test_a_host_that_injects_under_meta_has_masks():
    """d9d calls the provider, and so the injection, inside `torch.device("meta")`: the clock of the masks must not end up there."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
        method = LoRA(LoRAConfig(target_modules=["0"], params=LoRAParameters(r=2, alpha=2, dropout=0.5)))
        inject_peft_and_freeze(method, model)
    model.to_empty(device="cpu")
    torch.nn.init.ones_(model[0].base.weight)
    method.initialise(model)
    torch.nn.init.ones_(model[0].lora_B.weight)
    x = torch.ones(64, 8)
    y = model(x) - model[0].base(x)
    assert y.isfinite().all()
    assert 2 < y.unique().numel() <= 2**8  # of each row some columns are kept, the others are not


# -- d9d ----------------------------------------------------------------------------------------------------------------------------


def _d9d(rank, mesh, base, out, steps, checkpoints):
    """d9d's Trainer around the provider of the page; the losses it logs, and its export."""
    from d9d.core.dist_context import DeviceMeshParameters
    from d9d.loop.auto import AutoDataConfig, AutoDataProvider
    from d9d.loop.config import TrainerConfig
    from d9d.loop.control import BuildForwardInputsResult, ComputeLossResult, CreateMetricsResult, TrainTask
    from d9d.loop.run import TrainingConfigurator

    from tests.d9d_shim import cpu

    class Task(TrainTask):
        def build_forward_inputs(self, ctx):
            return BuildForwardInputsResult(input={"input_ids": ctx.batch["input_ids"]}, shared={}, state=ctx.batch["labels"])

        def compute_loss(self, ctx):
            logits, labels = ctx.pipeline_results[:, :-1].float(), ctx.state[:, 1:]
            return ComputeLossResult(loss=torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), loss_weight=None)

        def create_metrics(self, ctx):
            return CreateMetricsResult(metrics={})

    config = TrainerConfig.model_validate(
        {
            "run": {"name": "run"},
            "schedule": {"total_steps": steps},
            "data_prefetch": {"prefetch_factor": 0},
            "logging": {"period_steps": 1, "tracker": {"provider": "null"}},
            "pipelining": {"schedule": {"schedule": "gpipe"}},
            "model_stage_factory": {"source_checkpoint": str(base), "checkpoint_only_trainable_parameters": True},
            "determinism": {"base_seed": 3},
            "gc": {"period_steps": "disable"},
            "checkpointing": {"save_dir": str(checkpoints), "period_steps": "last_step", "num_to_keep": None},
            "gradient_clipping": {"max_norm": None},
            "profiling": None,
            "gradient_manager": {"grad_dtype": None, "bucket_size_mb": 1},
            "timeout": {"init_timeout": 60, "step_timeout": 60},
        }
    )
    names, losses, degrees = call("d9d"), [], DeviceMeshParameters(**mesh)
    micro = BATCH // (degrees.data_parallel_replicate * degrees.data_parallel_shard)
    with cpu():
        trainer = TrainingConfigurator(
            mesh=degrees,
            parameters=config,
            task_provider=lambda ctx: Task(),
            model_provider=names["Provider"](base, out),
            data_provider=AutoDataProvider(
                dataset_factory=lambda context: rows(),
                collator=torch.utils.data.default_collate,
                config=AutoDataConfig(global_batch_size=BATCH, microbatch_size=micro, num_workers=0, pin_memory=False),
            ),
            optimizer_provider=names["optimiser"],
            lr_scheduler_provider=lambda ctx: torch.optim.lr_scheduler.ConstantLR(ctx.optimizer, factor=1.0),
        ).configure()
        trainer._state.logger.log = lambda loss, **_: losses.append(loss.item())
        trainer.train()
        trainer.export(Path(out) / "merged", load_checkpoint=False)
    return losses


@pytest.mark.parametrize("mesh", [{"data_parallel_shard": 2}, {"data_parallel_replicate": 2}], ids=["fsdp", "replicas"])
def test_d9d(pool, base, expected, tmp_path, mesh):
    pytest.importorskip("d9d")
    first = pool.run(2, _d9d, mesh, base, tmp_path / "run", HALF, tmp_path / "checkpoints")
    same(tmp_path / "run/adapter", expected[1][HALF - 1])
    second = pool.run(2, _d9d, mesh, base, tmp_path / "more", STEPS, tmp_path / "checkpoints")
    alike([a + b for a, b in zip(first, second)], expected[0])
    same(tmp_path / "more/adapter", expected[1][-1])
    held = {name: t for file in (tmp_path / "more/merged").glob("*.safetensors") for name, t in load_file(file).items()}
    before = load_file(base / "model.safetensors")
    assert held.keys() == before.keys()
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in expected[1][-1]:
            A, B = (expected[1][-1][f"{layer}.lora_{f}.weight"] for f in "AB")
            weight = weight + 2.0 * B @ A
        torch.testing.assert_close(held[name], weight, rtol=0, atol=FACTORS)
