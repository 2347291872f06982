"""Expert parallelism against one process: loss, every gradient, masks, weights after steps; on Qwen3-MoE and Mixtral shapes."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from d9d_lora import fully_shard_experts, inject_peft_and_freeze, merge_peft, share_experts
from d9d_lora.dropout import Origin
from d9d_lora.layers import dispatch, experts
from d9d_lora.layers.stacked import Stacked
from d9d_lora.measure import traffic
from d9d_lora.placement import full_of
from d9d_lora.registry import peft_method_from_config
from d9d_lora.share_experts import shared_out
from d9d_lora.train import model as models
from d9d_lora.train.config import ModelConfig
from d9d_lora.train.tensor_parallel import apply_tensor_parallel
from d9d_lora.walk import adapted_layers, clock_of
from tests.test_laws import close, grads_of, trained, wake

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12, "moe_intermediate_size": 12, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12},
}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ROWS, LENGTH = 4, 7
IDS = torch.randint(0, 67, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))


def model_of(family, dtype):
    torch.manual_seed(3)
    config = CONFIG_MAPPING[family](vocab_size=67, bos_token_id=0, eos_token_id=1, pad_token_id=None, **SHAPE, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def method_of(**changes):
    params = {"r": 3, "alpha": 6, **changes.pop("params", {})}
    targets = {"target_modules": ["q_proj", "o_proj"], "target_parameters": STACKS}
    return peft_method_from_config({"kind": "lora", **targets, "params": params, **changes})


def one_process(family, dtype, changes):
    model, method = model_of(family, dtype), method_of(**changes)
    inject_peft_and_freeze(method, model)
    method.initialise(model)
    wake(model)
    return model, method


def on_ranks(family, dtype, changes, *, ep, tp=1, average=False, inject_first=False, mutation=None):
    mesh = init_device_mesh("cpu", (dist.get_world_size() // (ep * tp), ep, tp), mesh_dim_names=("efsdp", "ep", "tp"))
    model, method = model_of(family, dtype), method_of(**changes)
    if tp > 1:
        apply_tensor_parallel(models.Base(model, None), mesh["tp"], sequence=False)
    if inject_first:
        inject_peft_and_freeze(method, model)
    share_experts(model, mesh["ep"], average=average and mutation != "gradients of experts not divided")
    if not inject_first:
        inject_peft_and_freeze(method, model)
    ignored = fully_shard_experts(model, mesh["efsdp"])
    dp = mesh["efsdp", "ep"]._flatten("dp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=dp, ignored_params=ignored)
    fully_shard(model, mesh=dp, ignored_params=ignored)
    if not average:
        models.sum_gradients(model)
    method.initialise(model)
    wake(model)
    return model, method


def loss_of(model, step, row, *, mean=False):
    """Of one row of the batch, at the time that is its own; a part of the mean over all rows, or a mean of its own."""
    if (clock := clock_of(model)) is not None:
        clock.set(step, row)
    logits = model(input_ids=IDS[row : row + 1], use_cache=False).logits[0, :-1]
    targets = IDS[row, 1:].roll(step)
    return cross_entropy(logits, targets, reduction="mean" if mean else "sum") / (1 if mean else ROWS * (LENGTH - 1))


def all_to_the_first_rank(model):
    """Routes every token to experts 0 and 1: other ranks have no rows, and these experts all."""
    for layer in model.model.layers[:1]:
        route = layer.mlp.gate.forward

        def first(x, route=route):
            logits, scores, index = route(x)
            return logits, scores, torch.arange(2).expand_as(index)

        layer.mlp.gate.forward = first


CASES = {
    "lora": {},
    "dropout": {"params": {"dropout": 0.4}},
    "dora": {"params": {"use_dora": True, "dropout": 0.3}},
    "ranks shared": {"params": {"r": 8, "expert_rank": "r/top_k"}},
    "a router too": {"target_parameters": [*STACKS, "gate.weight"], "modules_to_save": ["lm_head"]},
    "pissa": {"params": {"init_lora_weights": "pissa"}},
    "one outer factor": {"params": {"r": 4, "dropout": 0.4, "experts_shared_outer": True}},
}


def law(rank, family, case, *, ep, dtype=torch.float64, tolerance=1e-9, recompute=False, nowhere=False, mutation=None, **layout):
    reference, reference_method = one_process(family, dtype, CASES[case])
    with MUTATIONS.get(mutation, contextlib.nullcontext)():
        model, method = on_ranks(family, dtype, CASES[case], ep=ep, mutation=mutation, **layout)
        mean, tp = layout.get("average", False), layout.get("tp", 1)
        world = dist.get_world_size() // tp
        for m in (reference, model):
            if nowhere:
                all_to_the_first_rank(m)
            if recompute:
                models.recompute(m)
        optimisers = [torch.optim.AdamW(trained(m).values(), lr=0.01) for m in (model, reference)]
        for step in range(1 if mutation or mean else 2):
            found = backward(model, step, range(rank // tp, ROWS, world), mean)
            dist.all_reduce(found)
            found /= tp
            expected = backward(reference, step, range(ROWS), mean)
            assert abs(found - expected) < tolerance * expected
            parts = world if mean else 1
            close({n: g * parts for n, g in grads_of(model).items()}, grads_of(reference), tolerance)
            assert all(float(p.grad.abs().max()) > 1e-7 for p in trained(reference).values())
            for optimiser in () if mean else optimisers:
                optimiser.step()
                optimiser.zero_grad()
    weights = {n: full_of(p.detach()) for n, p in trained(model).items()}
    close(weights, {n: p.detach() for n, p in trained(reference).items()}, max(1e-7, 10 * tolerance))
    for each, m in ((method, model), (reference_method, reference)):
        merge_peft(each, m)
    merged = {n: full_of(p.detach()) for n, p in model.named_parameters() if "experts" in n}
    close(merged, {n: p.detach() for n, p in reference.named_parameters() if "experts" in n}, max(1e-7, 10 * tolerance))


def backward(model, step, rows, mean):
    """The sum of the losses of some rows; each backward right after its forward, for a recomputed block reads the clock."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        loss = loss_of(model, step, row, mean=mean)
        loss.backward()
        total += loss.detach()
    return total


def _over_equals():
    def others(host):
        weight = host.down_proj
        return weight.device_mesh._get_root_mesh().get_group("efsdp") if isinstance(weight, DTensor) else None

    return mock.patch.object(experts, "group_of", others)


def _numbered_here():
    return mock.patch.object(dispatch, "Origin", lambda now, among, here: Origin(now, among._replace(first=0), here))


def _at_my_time():
    real = dispatch.Journey.plan.__func__
    late = lambda cls, counts, group, now=None, **k: real(cls, counts, group, now * 0 + 7, **k)  # noqa: E731
    return mock.patch.object(dispatch.Journey, "plan", classmethod(late))


def _as_they_arrive():
    return mock.patch.object(torch.Tensor, "argsort", lambda t, **_: torch.arange(len(t)))


def _over_same_experts():
    return mock.patch.object(Stacked, "in_parts", lambda layer: layer.placing.letter in ("O", "I"))


MUTATIONS = {
    "an outer factor summed over the ranks of the same experts": _over_same_experts,
    "tokens to the ranks of the same experts": _over_equals,
    "rows numbered anew": _numbered_here,
    "masks of one time": _at_my_time,
    "rows not sorted again": _as_they_arrive,
}


LAWS = [
    ("qwen3_moe", "dropout", {"ep": 2}, 2),
    ("mixtral", "lora", {"ep": 2, "inject_first": True}, 2),
    ("gpt_oss", "lora", {"ep": 2}, 2),
    ("qwen3_moe", "a router too", {"ep": 2, "nowhere": True}, 2),
    ("qwen3_moe", "dora", {"ep": 2}, 4),
    ("mixtral", "dropout", {"ep": 2, "recompute": True}, 4),
    ("qwen3_moe", "ranks shared", {"ep": 4}, 4),
    ("mixtral", "ranks shared", {"ep": 2, "dtype": torch.float32, "tolerance": 2e-4}, 4),
    ("qwen3_moe", "pissa", {"ep": 2, "average": True}, 4),
    ("mixtral", "dropout", {"ep": 2, "tp": 2, "tolerance": 1e-7}, 4),
    ("qwen3_moe", "ranks shared", {"ep": 2, "tp": 2, "inject_first": True, "tolerance": 1e-7}, 8),
    ("qwen3_moe", "one outer factor", {"ep": 2, "nowhere": True}, 2),
    ("mixtral", "one outer factor", {"ep": 2, "average": True, "inject_first": True}, 4),
    ("mixtral", "one outer factor", {"ep": 2, "dtype": torch.float32, "tolerance": 2e-4}, 2),
    ("qwen3_moe", "one outer factor", {"ep": 2, "tp": 2, "inject_first": True}, 4),
]


def law_(rank, family, case, options):
    law(rank, family, case, **options)


@pytest.mark.parametrize("family,case,options,world", LAWS, ids=lambda v: v if isinstance(v, str) else None)
def test_loss_gradients_and_steps_are_those_of_one_process(pool, family, case, options, world):
    pool.run(world, law_, family, case, options)


def broken(rank, mutation):
    world_mean = mutation == "gradients of experts not divided"
    case = "one outer factor" if "outer" in mutation else "lora" if world_mean else "dropout"
    with pytest.raises(AssertionError):
        law(rank, "qwen3_moe", case, ep=2, mutation=mutation, average=world_mean)


@pytest.mark.parametrize("mutation", [*MUTATIONS, "gradients of experts not divided"])
def test_mutations_break_the_law(pool, mutation):
    pool.run(4, broken, mutation)


# -- traffic, files -------------------------------------------------------------------------------------------------------------------


def counted(rank, targets):
    """All-to-alls of a forward and of its backward, with their bytes."""
    model, method = model_of("qwen3_moe", torch.float32), method_of(target_parameters=targets)
    share_experts(model, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    inject_peft_and_freeze(method, model)
    found = []
    with traffic() as moved:
        loss = loss_of(model, 0, rank)
        found.append((moved.count["all_to_all"], moved["all_to_all"]))
        loss.backward()
    assert set(moved) == {"all_to_all"}
    return [*found, (moved.count["all_to_all"], moved["all_to_all"])], model.model.layers[0].mlp.experts.num_experts


def test_adapters_add_no_traffic_and_rows_travel_four_times(pool):
    with_, without = pool.run(2, counted, STACKS), pool.run(2, counted, None)
    assert with_ == without
    for ((n, forward), (all_, both)), _ in with_:
        assert (n, all_) == (2 * 3, 2 * 5)
        messages = 2 * 2 * (2 + 3) * 8  # layers, ranks, numbers, bytes
        assert (both - messages) == 2 * (forward - messages)
        rows = LENGTH * 2  # tokens, experts of each
        assert forward - messages >= 2 * 2 * rows * 16 * 4  # layers, ways, rows, hidden, bytes; more where more arrive


def loaded(rank, directory):
    base = models.open_model(ModelConfig(path=str(directory)), torch.float64)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep"))
    method = method_of()
    share_experts(base.module, mesh["ep"])
    mapper = inject_peft_and_freeze(method, base.module)
    ignored = fully_shard_experts(base.module, mesh["efsdp"])
    fully_shard(base.module, mesh=mesh["ep"], ignored_params=ignored)
    models.materialise(base, torch.device("cpu"))
    report = models.load(base, mapper, ModelConfig(path=str(directory)))
    method.initialise(base.module)
    real = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).state_dict()
    for name, p in base.module.named_parameters():
        if (plain := name.replace(".base.", ".")) in real:
            assert torch.equal(full_of(p.detach()), real[plain]), name
    of_experts = sum(4 * t.numel() for n, t in real.items() if "experts." in n)
    rest = sum(4 * t.numel() for n, t in real.items() if "experts." not in n)
    assert abs(report.bytes_read - of_experts // 2 - rest / 2) < 0.1 * rest
    first = next(layer for layer in adapted_layers(base.module) if "experts" in layer.name)
    assert first.lora_A.weight.shape[0] == 4
    assert first.lora_A.weight.to_local().shape[0] == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_rank_reads_its_own_experts_and_no_other(pool, tmp_path, family):
    model_of(family, torch.float32).save_pretrained(tmp_path)
    pool.run(2, loaded, tmp_path)


def refused(rank):
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("ep",))
    with pytest.raises(ValueError, match=r"parallel.ep=3 does not divide the 4 experts of this model; the nearest degrees that do: 2, 4"):
        share_experts(model_of("mixtral", torch.float32), mesh)
    with pytest.raises(ValueError, match="has no experts"):
        share_experts(torch.nn.Linear(2, 2), mesh)


def test_degrees_that_do_not_fit_are_refused(pool):
    pool.run(3, refused)


def trained_beside_the_experts(rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep"))
    model = model_of("mixtral", torch.float32).requires_grad_(False)
    share_experts(model, mesh["ep"])
    shared_out(model)[0].gains = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"MixtralExperts.gains is trained, and whole on every rank of experts"):
        fully_shard_experts(model, mesh["efsdp"])


def test_what_is_trained_and_whole_among_shared_experts_is_refused(pool):
    pool.run(2, trained_beside_the_experts)
