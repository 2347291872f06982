"""Several adapters, with the real PEFT library: the same factors in both, the same forwards, gradients, merges and combinations."""

import copy

import pytest
import torch

from d9d_lora import (
    adapter_rows,
    add_adapter,
    add_weighted_adapter,
    combine,
    disable_adapters,
    inject_peft_and_freeze,
    merge_adapters,
    peft_method_from_config,
    set_adapter,
)
from d9d_lora.layers import AdaptedLayer
from d9d_lora.named.hosts import hosts
from tests.catalogue import batch, build

peft = pytest.importorskip("peft")
from peft.tuners.lora.layer import LoraLayer  # noqa: E402

IDS = batch(0)[0]
ROWS = ["default", "b", "__base__", "b", "c", "default", "__base__", "c"]
# r, alpha, targets; "c" has a layer that no other adapter has
ADAPTERS = {"default": (3, 6, ["up", "down"]), "b": (3, 4, ["up", "down"]), "c": (2, 5, ["up", "embed"])}
ALIKE = {"default": (3, 6, ["up", "embed"]), "b": (3, 4, ["up", "embed"])}
TURNED = {"default": (3, 6, ["up"]), "b": (3, 4, ["up", "down"])}


def pair(adapters, layer="linear_bias", **options):
    """(our model, PEFT's), with the same weights and the same stirred factors."""
    theirs = build(layer, torch.float32).eval()
    ours = copy.deepcopy(theirs)
    for name, (r, alpha, targets) in adapters.items():
        rslora = options.get("rslora", False)
        config = {"kind": "lora", "target_modules": targets, "params": {"r": r, "alpha": alpha, "scaling": "rslora" if rslora else "lora"}}
        peft_config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, use_rslora=rslora)
        if name == "default":
            inject_peft_and_freeze(peft_method_from_config(config), ours)
            theirs = peft.get_peft_model(theirs, peft_config)
        else:
            add_adapter(ours, name, config, train=True)
            theirs.add_adapter(name, peft_config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in adapters:
            for where, host in our_layers(ours):
                if name in host.adapters_by_name():
                    for p, q in zip(host.adapters_by_name()[name].factors().values(), their_factors(theirs, where, name)):
                        p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
                        q.copy_(p)
    return ours, theirs


def our_layers(model) -> list[tuple[str, AdaptedLayer]]:
    return [(names[0], host) for names, host in hosts(model)]


def their_factors(theirs, where, name):
    layer = theirs.base_model.model.get_submodule(where)
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]


def worst(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("layer", ["linear_bias", "conv1d"])
@pytest.mark.parametrize("active", [["default"], ["b"], ["c"], ["default", "b"], ["c", "default", "b"]])
def test_forward_and_gradients_of_the_active_adapters(active, layer):
    ours, theirs = pair(ADAPTERS, layer)
    set_adapter(ours, active)
    theirs.base_model.set_adapter(active)
    y, z = ours(IDS), theirs(IDS)
    assert worst(y, z) < 1e-5
    y.square().sum().backward()
    z.square().sum().backward()
    for where, host in our_layers(ours):
        for name, adapter in host.adapters_by_name().items():
            for p, q in zip(adapter.factors().values(), their_factors(theirs, where, name)):
                assert (p.grad is None) == (q.grad is None) == (name not in active), (where, name)
                assert p.grad is None or worst(p.grad, q.grad) < 1e-5


def test_an_adapter_for_each_row():
    ours, theirs = pair(ADAPTERS)
    with torch.no_grad(), adapter_rows(ours.eval(), ROWS):
        y = ours(IDS)
    assert worst(y, theirs.eval()(IDS, adapter_names=ROWS)) < 1e-5


def test_disabled_and_merged():
    ours, theirs = pair(ADAPTERS)
    with disable_adapters(ours), theirs.disable_adapter():
        assert worst(ours(IDS), theirs(IDS)) < 1e-6
    set_adapter(ours, ["default", "c"])
    merge_adapters(ours)
    theirs.merge_adapter(["default", "c"])
    for name, module in theirs.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            assert worst(ours.get_submodule(name).weight, module.base_layer.weight) < 1e-5


WEIGHTS = [(1.0, 1.0), (0.7, -0.4), (-1.5, 0.3)]
PLAIN = [("linear", {}), ("magnitude_prune", {"density": 0.4})] + [
    ("ties", {"density": d, "majority_sign_method": m}) for d in (0.3, 1.0) for m in ("total", "frequency")
]
SVD = [("svd", {}), ("svd", {"svd_rank": 2}), ("magnitude_prune_svd", {"density": 0.4, "svd_rank": 4})] + [
    ("ties_svd", {"density": 0.5, "majority_sign_method": m}) for m in ("total", "frequency")
]
DARE = [("dare_linear", {}), ("dare_ties", {}), ("dare_ties", {"majority_sign_method": "frequency"})]


def combined(adapters, kind, weights, layer="linear_bias", **options):
    """(name, our B, our A, PEFT's B, PEFT's A) of every layer of the combination."""
    ours, theirs = pair(adapters, layer)
    add_weighted_adapter(ours, list(adapters), weights, "mix", kind, **options)
    theirs.base_model.add_weighted_adapter(list(adapters), list(weights), "mix", kind, **options)
    found = []
    for where, host in our_layers(ours):
        if "mix" in host.adapters_by_name():
            A, B = (p.detach() for p in host.adapters_by_name()["mix"].factors().values())
            PA, PB = (p.detach() for p in their_factors(theirs, where, "mix"))
            assert not host.adapters_by_name()["mix"].lora_A.weight.requires_grad
            assert host.adapters_by_name()["mix"].delta.scaling == 1
            found.append((where, B, A, PB, PA))
    set_adapter(ours, "mix")
    theirs.base_model.set_adapter("mix")
    assert worst(ours(IDS), theirs(IDS)) < 1e-5
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind,options", PLAIN)
def test_combinations_of_factors(kind, options, weights):
    for where, B, A, PB, PA in combined(ALIKE, kind, weights, **options):
        assert worst(B, PB) < 1e-5, where
        assert worst(A, PA) < 1e-5, where


@pytest.mark.parametrize("layer", ["linear_bias", "conv1d"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind,options", [("cat", {}), *SVD])
def test_combinations_of_updates(kind, options, weights, layer):
    for where, B, A, PB, PA in combined(TURNED, kind, weights, layer, **options):
        assert worst(B @ A, PB @ PA) < 1e-5, where


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_ranks_and_targets_may_differ(kind):
    for where, B, A, PB, PA in combined(ADAPTERS, kind, [0.5, -1.0, 0.8]):
        assert worst(B @ A, PB @ PA) < 1e-5, where


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind,options", DARE)
@pytest.mark.parametrize("svd", [False, True])
def test_combinations_with_a_forced_mask(kind, options, svd, weights, monkeypatch):
    def mask(t, *unused, **also_unused):
        return torch.empty(t.shape, dtype=t.dtype).bernoulli_(0.6, generator=torch.Generator().manual_seed(t.numel()))

    monkeypatch.setattr(torch, "bernoulli", lambda input: mask(input))
    monkeypatch.setattr(combine, "keep_at_random", mask)
    adapters = {name: (r, alpha, ["up"]) for name, (r, alpha, _) in ALIKE.items()}
    for where, B, A, PB, PA in combined(adapters, kind + "_svd" * svd, weights, density=0.6, **options):
        assert worst(B @ A, PB @ PA) < 1e-5, where


# -- where PEFT is wrong; when one of these fails, PEFT was mended: then docs/named.md must change ------------------------------------


def test_peft_scales_a_combination_of_rank_stabilised_adapters_once_more():
    ours, theirs = pair({"default": (4, 6, ["up"]), "b": (4, 4, ["up"])}, rslora=True)
    add_weighted_adapter(ours, ["default", "b"], [1.0, 0.5], "mix", "cat")
    theirs.base_model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "mix", "cat")
    for where, host in our_layers(ours):
        terms = host.adapters_by_name()
        dW = {n: a.delta.update(a.whole_factors(), slice(0, host.out_size), slice(0, host.in_size)) for n, a in terms.items()}
        assert worst(dW["mix"], dW["default"] + 0.5 * dW["b"]) < 1e-5
        their = theirs.base_model.model.get_submodule(where).get_delta_weight("mix")
        assert worst(their, 8**0.5 * dW["mix"]) < 1e-5


def test_peft_ignores_the_rank_of_a_combination_of_one():
    ours, theirs = pair({"default": (3, 6, ["up"])})
    add_weighted_adapter(ours, ["default"], [1.0], "mix", "svd", svd_rank=1)
    theirs.base_model.add_weighted_adapter(["default"], [1.0], "mix", "svd", svd_rank=1)
    where, host = our_layers(ours)[0]
    assert host.adapters_by_name()["mix"].delta.r == 1
    assert their_factors(theirs, where, "mix")[0].shape[0] == 3


def test_peft_disables_a_moved_base_to_another_base():
    base = build("linear_bias", torch.float32)
    before = base(IDS)
    config = peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with theirs.disable_adapter():
        assert worst(theirs(IDS), before) > 1e-2
