"""What the links between tensor-parallel ranks do, and what the choice between the two column paths makes of it:

    torchrun --nproc-per-node 2 launch/bench_links.py columns=1024 dtype=float32

First latency and bandwidth of an all-gather and the rate of a thin product, as `parallel.link_latency_us` and `parallel.link_gb_s` want
them. Then, for q, k, v of so many columns under sequence parallelism, a step on gathered tokens and in rank space (`layers/chooser.py`), in
turn, one after the other: the median ratio with quartiles, and what the rule says with the numbers measured before.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput

from d9d_lora import LoRA, LoRAConfig, LoRAParameters, inject_peft_and_freeze
from d9d_lora.keyvalue import Key, UsageError, run
from d9d_lora.layers.chooser import Choice, ColumnPath, Group
from d9d_lora.styles import parallelize_adapted, take_column_path
from d9d_lora.sums import ReplicatedSum
from d9d_lora.train.config import ParallelConfig
from d9d_lora.train.world import World, device_of, join, leave
from d9d_lora.walk import adapted_layers

KEYS = {
    "columns": Key("I of q, k and v", "4096"),
    "ranks": Key("r of each", "16,64"),
    "tokens": Key("N of a microbatch", "64,256,1024,4096"),
    "dtype": Key("of base and activations", "bfloat16"),
    "turns": Key("timed steps of each path", "20"),
    "device": Key("cpu, cuda, ...; auto: the accelerator, if there is one", "auto"),
}
PATHS: tuple[Choice, Choice] = ("gathered", "rank_space")
SMALL, LARGE = 32, 1 << 21  # numbers that a rank sends


class Attention(nn.Module):
    """Three layers that read one x."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(columns, columns, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)  # type: ignore[no-any-return]


def median_of(act: Callable[[], object], turns: int, device: torch.device) -> float:
    act()
    return statistics.median(timed(act, device) for _ in range(turns))


def timed(act: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    wait(device)
    start = time.perf_counter()
    act()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def measured(world: World, columns: int, ranks: int, dtype: torch.dtype) -> ColumnPath:
    """The numbers of the rule, the slowest rank's: every rank must have the same."""
    device, n = world.device, world.size
    sent = {size: torch.ones(size, device=device) for size in (SMALL, LARGE)}
    whole = {size: torch.empty(n * size, device=device) for size in sent}
    latency, large = (median_of(lambda: dist.all_gather_single(whole[s], sent[s]), 30, device) for s in (SMALL, LARGE))  # noqa: B023
    x, A = torch.randn(512, columns, device=device, dtype=dtype), torch.randn(3 * ranks, columns, device=device, dtype=dtype)
    product = median_of(lambda: x @ A.T, 30, device)
    slowest = torch.tensor([latency, large, product], dtype=torch.float64, device="cpu")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    latency, large, product = slowest.tolist()
    sends = (1 - 1 / n) * n * LARGE * sent[LARGE].itemsize
    return ColumnPath("auto", latency, sends / max(large - latency, 1e-9), 2 * 512 * columns * 3 * ranks / product)


def build(world: World, columns: int, r: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.attention = Attention(columns).to(world.device, dtype)
    inject_peft_and_freeze(LoRA(LoRAConfig(target_modules=["q", "k", "v"], params=LoRAParameters(r=r, alpha=2 * r))), model)
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=False)
    columnwise = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    assert world.mesh is not None
    parallelize_adapted(model, world.mesh["tp"], {**columnwise, "attention": gather})
    ReplicatedSum(adapted_layers(model))
    return model


def compare(world: World, model: nn.Module, path: ColumnPath, group: Group, turns: int, dtype: torch.dtype) -> str:
    assert world.mesh is not None
    own = torch.randn(1, group.tokens // world.size, group.columns, device=world.device, dtype=dtype, requires_grad=True)
    x = DTensor.from_local(own, world.mesh["tp"], [Shard(1)])
    times: dict[str, list[float]] = {choice: [] for choice in PATHS}
    for turn in range(-2, turns):  # the first two are not counted
        for choice in PATHS[:: 1 if turn % 2 else -1]:
            take_column_path(model, ColumnPath(choice))
            seconds = timed(lambda: model.attention(x).sum().backward(), world.device)  # type: ignore[operator]
            if turn >= 0:
                times[choice].append(seconds)
    low, ratio, high = statistics.quantiles((b / a for a, b in zip(*times.values())), n=4)
    lost = statistics.median(times["rank_space"]) - statistics.median(times["gathered"])
    chosen = PATHS[path.takes_rank_space(group)]
    step = statistics.median(times["gathered"])
    return (
        f"{group.ranks // 3:5d} {group.tokens:7d} {step * 1e3:12.2f} {ratio:8.3f} ({low:.3f} to {high:.3f}) "
        f"{lost * 1e6:+12.0f} {path.lost(group) * 1e6:+12.0f} {path.price(group) * 1e6:12.0f}   {chosen}"
    )


def main(arguments: dict[str, str]) -> None:
    columns, turns, dtype = int(arguments["columns"]), int(arguments["turns"]), getattr(torch, arguments["dtype"])
    tokens, ranks = ([int(n) for n in arguments[key].split(",")] for key in ("tokens", "ranks"))
    device = device_of(arguments["device"])
    world = join(device, ParallelConfig(tp=int(os.environ.get("WORLD_SIZE", 1))), 120)
    if world.size < 2:
        raise UsageError("links are between processes: start this with torchrun --nproc-per-node 2, or more")
    if bad := [n for n in tokens if n % world.size]:
        raise UsageError(f"tokens={bad}: {world.size} ranks must divide them")
    for r in ranks:
        path, model = measured(world, columns, r, dtype), build(world, columns, r, dtype)
        if world.is_first:
            rate = f"thin products of 3 x {r} ranks {path.rate / 1e9:.1f} GFLOP/s"
            print(f"parallel.link_latency_us={path.latency * 1e6:.0f} parallel.link_gb_s={path.bandwidth / 1e9:.3g}   {rate}", flush=True)
            print("    r  tokens  gathered ms  rank space / gathered          lost us  by rule: lost        price   chosen", flush=True)
        for n in tokens:
            line = compare(world, model, path, Group(n, columns, 3 * r, world.size, dtype.itemsize), turns, dtype)
            if world.is_first:
                print(line, flush=True)
    leave()


if __name__ == "__main__":
    sys.exit(run("launch/bench_links.py", "The links between tensor-parallel ranks, and the column path they suggest.", KEYS, main))
