"""What is done once for every tensor or layer of a model grows with their number and not with its square.

Counted and not timed: the calls that Python makes, of its own functions and of C's, at one size and at ten times that. A walk over all
names for each name makes a hundred times as many.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from d9d_lora import LoRA, LoRAConfig, LoRAParameters, inject_peft_and_freeze, save_adapter
from d9d_lora.quant.load import quantise_
from d9d_lora.state.mappers import ModelStateMapperParallel, ModelStateMapperRename, ModelStateMapperSequential, route_of, sorted_groups
from d9d_lora.state.reader import load_checkpoint
from d9d_lora.targets import named
from d9d_lora.walk import adapter_tensors

SMALL, TIMES = 60, 10


def calls(act: Callable[[], Any]) -> int:
    count = 0

    def seen(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def model(layers: int) -> nn.Module:
    net = nn.Module()
    net.layers = nn.ModuleList()
    for _ in range(layers):
        block = nn.Module()
        block.q, block.k = nn.Linear(2, 2), nn.Linear(2, 2)
        net.layers.append(block)
    return net


def mapped(n: int, folder: Path) -> Callable[[], Any]:
    def act() -> None:
        stages = [ModelStateMapperParallel([ModelStateMapperRename(f"{a}{i}", f"{b}{i}") for i in range(n)]) for a, b in ("ab", "bc")]
        mapper = ModelStateMapperSequential(stages)
        groups = sorted_groups(mapper)
        assert len(groups) == n
        for group in groups:
            (output,) = mapper.apply(dict.fromkeys(group.inputs, torch.zeros(1)))
            assert route_of(mapper, output) is not None

    return act


def loaded(n: int, folder: Path) -> Callable[[], Any]:
    net = model(n)
    save_file({f"old.{name}": p.detach() for name, p in net.named_parameters()}, folder / f"{n}.safetensors")
    renames = [ModelStateMapperRename(f"old.{name}", name) for name, _ in net.named_parameters()]
    return lambda: load_checkpoint(net, folder / f"{n}.safetensors", ModelStateMapperParallel(renames))


def injected(n: int, **config: Any) -> nn.Module:
    net = model(n)
    inject_peft_and_freeze(LoRA(LoRAConfig(params=LoRAParameters(r=1, alpha=1), **config)), net)
    return net


def names(n: int, leaf: str) -> list[str]:
    return [f"layers.{i}.{leaf}" for i in range(n)]


def saved(n: int, folder: Path) -> Callable[[], Any]:
    net = injected(n, target_modules=[*names(n, "q")[1:], "0.k"])
    return lambda: save_adapter(net, folder / str(n))


WORK: dict[str, Callable[[int, Path], Callable[[], Any]]] = {
    "mappers": mapped,
    "loading": loaded,
    "an expression": lambda n, _: lambda: injected(n, target_modules=r"layers\.\d+\.(q|k)"),
    "every layer by its name": lambda n, _: lambda: injected(n, target_modules=names(n, "q")),
    "every layer left out by its name": lambda n, _: lambda: injected(n, target_modules="all-linear", exclude_modules=names(n, "q")),
    "biases": lambda n, _: lambda: injected(n, target_modules=["q"], bias="all"),
    "parameters": lambda n, _: lambda: injected(n, target_parameters=["q.weight"]),
    "modules trained whole": lambda n, _: lambda: injected(n, target_modules=["q"], modules_to_save=["k"]),
    "packing": lambda n, _: lambda: quantise_(model(n), names(n, "q"), block=2),
    "names of factors": lambda n, _: (lambda net: lambda: adapter_tensors(net))(injected(n, target_modules=["q"])),
    "saving": saved,
}


@pytest.mark.parametrize("work", WORK)
def test_ten_times_the_layers_are_ten_times_the_calls(tmp_path, work):
    WORK[work](2, tmp_path)()  # what is done once
    few, many = (calls(WORK[work](n, tmp_path)) for n in (SMALL, TIMES * SMALL))
    assert many < 1.3 * TIMES * few, f"{many / few:.1f} times"


def test_the_count_sees_a_walk_over_all_names_for_each():
    def square(n: int) -> Callable[[], Any]:
        return lambda: [named(name, names(n, "q")) for name in names(n, "k")]

    assert calls(square(TIMES * SMALL)) > 50 * calls(square(SMALL))
