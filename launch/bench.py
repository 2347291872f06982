"""What an adapter costs beside the frozen layers it adapts: ours, its peers, and the floor, in the same run on the same weights.

    python launch/bench.py                                   a few rows, some minutes
    python launch/bench.py shapes=8b ranks=8,16,64,256 dtypes=float32,bfloat16 dropouts=0,0.05 targets=all,qv output=docs

The floor is the same block with its base frozen and no adapter: forward, and the backward for its input alone. Steps are timed in
turn, one of each contender after another, and a ratio is of two steps of the same turn. That ours is slower than a peer
is said where the interval that holds the median of their ratios with 95 % lies above 1; it needs no distribution, only turns. Counts are
exact. What a contender allocates is counted by the storages that a step makes, so workspaces of kernels are not in it.

`layouts=fsdp2,tp3` counts, and times nothing: one process stands for rank 0 of that many, on torch's fake process group. That a contender
runs there does not say that its gradients are right.
"""

import copy
import gc
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as count_from
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.keyvalue import Key, UsageError, run
from d9d_lora.measure import flops, saved_bytes
from d9d_lora.plan.ledger import Ledger
from d9d_lora.sums import ReplicatedSum
from d9d_lora.walk import adapted_layers

KEYS = {
    "shapes": Key("linear (one 4096 x 4096 layer), smollm2, 8b: one decoder block of that shape", "linear,smollm2"),
    "ranks": Key("ranks", "16"),
    "dtypes": Key("of the base: float32, bfloat16", "float32,bfloat16"),
    "dropouts": Key("dropout on the adapter's input", "0,0.05"),
    "targets": Key("all linear layers, or qv", "all"),
    "tokens": Key("tokens of a step", "1024"),
    "turns": Key("timed steps of each contender, at least", "7"),
    "seconds": Key("of each setting: more turns until they are over, of all but DoRA", "0"),
    "contenders": Key("names, comma-separated; without it all whose package is installed", ""),
    "layouts": Key("single (timed), and fsdpN or tpN, of which collectives are counted on fake ranks", "single"),
    "device": Key("where", "cuda" if torch.cuda.is_available() else "cpu"),
    "output": Key("folder for a page and a picture; without it nothing is written", ""),
    "page": Key("their name in it", "benchmarks"),
}
SHAPES = {"smollm2": (576, 1536, 9, 3), "8b": (4096, 14336, 32, 8)}  # hidden, feed-forward, heads, key-value heads
OURS = "d9d_lora"
AS_BASE = "d9d_lora as base"
PEFT = "peft"
QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Setting:
    shape: str
    rank: int
    dtype: str
    dropout: float
    targets: str

    def wants(self, name: str) -> bool:
        return self.targets == "all" or name.rpartition(".")[2] in QV


class Block(nn.Module):
    """One decoder layer, or one linear layer, from hidden states to hidden states."""

    def __init__(self, shape: str, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        if shape == "linear":
            self.size = 4096
            self.layer: nn.Module = nn.Sequential()
            self.layer.add_module("q_proj", nn.Linear(4096, 4096, bias=False))
            return
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        hidden, inner, heads, kv = SHAPES[shape]
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv, attn_implementation="sdpa"
        )
        self.size = hidden
        self.layer = LlamaDecoderLayer(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Sequential):
            return self.layer(x)  # type: ignore[no-any-return]
        angles = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        y = self.layer(x, position_embeddings=angles, attention_mask=None)
        return y[0] if isinstance(y, tuple) else y


# -- contenders: each puts adapters into a block that shares the base weights ------------------------------------------------------


def floor(block: nn.Module, s: Setting) -> nn.Module:
    return block


def ours(block: nn.Module, s: Setting, **params: Any) -> nn.Module:
    params |= {"r": s.rank, "alpha": 2 * s.rank, "dropout": s.dropout}
    inject_peft_and_freeze(peft_method_from_config({"kind": "lora", "target_modules": targets(block, s), "params": params}), block)
    return block


def ours_as_base(block: nn.Module, s: Setting) -> nn.Module:
    """With factors in the dtype of the base, as loralib, torchtune and d9d have them: nothing is cast, and small updates round away."""
    for p in (p for p in ours(block, s).parameters() if p.requires_grad):
        p.data = p.data.to(getattr(torch, s.dtype))
    return block


def ours_dora(block: nn.Module, s: Setting) -> nn.Module:
    return ours(block, s, use_dora=True)


def peft(block: nn.Module, s: Setting, **params: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=s.rank, lora_alpha=2 * s.rank, lora_dropout=s.dropout, target_modules=targets(block, s), **params)
    return get_peft_model(block, config)  # type: ignore[arg-type]


def peft_dora(block: nn.Module, s: Setting) -> nn.Module:
    return peft(block, s, use_dora=True)


def loralib(block: nn.Module, s: Setting) -> nn.Module:
    import loralib as lora

    def adapted(base: nn.Linear) -> nn.Module:
        layer = lora.Linear(
            base.in_features, base.out_features, r=s.rank, lora_alpha=2 * s.rank, lora_dropout=s.dropout, bias=False, merge_weights=False
        )
        layer = layer.to(device=base.weight.device, dtype=base.weight.dtype)
        layer.weight = base.weight
        return layer

    return replaced(block, s, adapted)


def d9d(block: nn.Module, s: Setting) -> nn.Module:
    from d9d.peft.lora.config import LoRAParameters
    from d9d.peft.lora.layer import LoRALinear

    return replaced(block, s, lambda base: LoRALinear(base, LoRAParameters(r=s.rank, alpha=2 * s.rank, dropout=s.dropout)).to(base.weight))


def torchtune(block: nn.Module, s: Setting) -> nn.Module:
    from torchtune.modules.peft import LoRALinear

    def adapted(base: nn.Linear) -> nn.Module:
        layer = LoRALinear(base.in_features, base.out_features, rank=s.rank, alpha=2 * s.rank, dropout=s.dropout).to(base.weight)
        layer.weight = base.weight
        return layer  # type: ignore[no-any-return]

    return replaced(block, s, adapted)


CONTENDERS: dict[str, Callable[[nn.Module, Setting], nn.Module]] = {
    "floor": floor,
    OURS: ours,
    AS_BASE: ours_as_base,
    PEFT: peft,
    "loralib": loralib,
    "torchtune": torchtune,
    "d9d": d9d,
    "d9d_lora dora": ours_dora,
    "peft dora": peft_dora,
}


def targets(block: nn.Module, s: Setting) -> list[str]:
    return [name for name, m in block.named_modules() if isinstance(m, nn.Linear) and s.wants(name)]


def replaced(block: nn.Module, s: Setting, adapted: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name in targets(block, s):
        block.set_submodule(name, adapted(block.get_submodule(name)))  # type: ignore[arg-type]
    for name, p in block.named_parameters():
        p.requires_grad_("lora_" in name)
    return block


def sharing(block: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same weights."""
    return copy.deepcopy(block, {id(p): p for p in block.parameters()})


# -- measuring ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    setting: Setting
    name: str
    times: dict[str, list[float]]  # seconds by turn, of all contenders; some have had fewer turns
    saved: int  # bytes beyond the floor
    extra: int  # FLOPs beyond the floor
    peak: int  # bytes of what a step makes, at the most

    def over(self, other: str) -> list[float]:
        """Step time over that of another contender, by turn."""
        return [a / b for a, b in zip(self.times[self.name], self.times[other])]


@dataclass
class Counted:
    """Of one step, on rank 0 of a layout."""

    setting: Setting
    layout: str
    name: str
    collectives: int
    travelled: int  # bytes: whole buffers, as in the plan
    peak: int


def measure(s: Setting, names: list[str], tokens: int, turns: int, budget: float, device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    names = [n for n in names if n != AS_BASE or s.dtype != "float32"]
    base = Block(s.shape, tokens).to(device, getattr(torch, s.dtype)).requires_grad_(False).train()
    x = torch.randn(1, tokens, base.size, device=device, dtype=getattr(torch, s.dtype), requires_grad=True)
    dy = torch.randn_like(x)
    models = {name: CONTENDERS[name](sharing(base), s).train() for name in names}
    known = [p for m in models.values() for p in m.parameters()]
    saved, work, peaks = {}, {}, {}
    for name, model in models.items():
        wake(model)
        peaks[name] = ledger_of(lambda: step(model, x, dy), None).peak  # noqa: B023
        saved[name] = saved_bytes(lambda: model(x), [*known, *model.buffers()])  # noqa: B023
        work[name] = flops(lambda: step(model, x, dy))  # noqa: B023
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    for turn in count_from(-1):  # the first is not counted
        if turn >= turns and time.perf_counter() > end:
            break
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order if turn < turns else [n for n in order if not n.endswith("dora")]:
            seconds = timed(lambda: models[name](x).backward(dy), device)  # noqa: B023
            clear(models[name], x)
            if turn >= 0:
                times[name].append(seconds)
    for name in names:
        yield Row(s, name, times, saved[name] - saved["floor"], work[name] - work["floor"], peaks[name])


def ledger_of(act: Callable[[], None], mesh: DeviceMesh | None) -> Ledger:
    """What one step sends and makes."""
    act()  # what is made once, by the first
    with Ledger(mesh) as ledger:
        act()
        gc.collect()  # what the step before left in cycles would be freed in the midst of this one
        ledger.mark()
        before = ledger.live
        act()
    ledger.peak -= before
    return ledger


# -- counting on fake ranks ---------------------------------------------------------------------------------------------------------


COLUMN, ROW = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def count(s: Setting, layout: str, names: list[str], tokens: int, device: torch.device) -> Iterator[Counted]:
    """Rank 0's step of every contender that runs on the layout; the sum of replicated factors is the trainer's."""
    kind = "fsdp" if layout.startswith("fsdp") else "tp"
    ranks = int(layout.removeprefix(kind))
    with fake_ranks(ranks):
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp_shard" if kind == "fsdp" else "tp",))
        for name in names:
            torch.manual_seed(0)
            block = Block(s.shape, tokens).to(device, getattr(torch, s.dtype)).requires_grad_(False).train()
            x = torch.randn(1, tokens, block.size, device=device, dtype=getattr(torch, s.dtype), requires_grad=True)
            dy = torch.randn_like(x)
            try:
                if kind == "tp":
                    parallelize_module(block, mesh, plan_of(block, s))
                    block.requires_grad_(False)
                model = CONTENDERS[name](block, s).train()
                if kind == "fsdp":
                    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # as a block of a model
                total = ReplicatedSum(adapted_layers(model))
                ledger = ledger_of(lambda: step(model, x, dy, total), mesh)  # noqa: B023
            except Exception as error:  # a peer that has no way for this layout; told, and not counted
                print(f"without {name} on {layout}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
                if name in ("floor", "d9d_lora"):
                    raise
                continue
            yield Counted(s, layout, name, sum(ledger.count.values()), sum(ledger.traffic.values()), ledger.peak)


def plan_of(block: nn.Module, s: Setting) -> dict[str, Any]:
    """As decoders are split: columns first, rows after; one linear layer alone gives its output back whole."""
    whole = ColwiseParallel(output_layouts=Replicate()) if s.shape == "linear" else ColwiseParallel()
    linear = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    plan: dict[str, Any] = {name: whole for name in linear if name.endswith(COLUMN)}
    return plan | {name: RowwiseParallel() for name in linear if name.endswith(ROW)}


@contextmanager
def fake_ranks(n: int) -> Iterator[None]:
    """This process is rank 0 of n; nothing travels, and what the others would have sent is not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wake(model: nn.Module) -> None:
    """B away from zero, or its products might be told from others."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_B" in name:
                p.normal_(std=0.01)


def step(model: nn.Module, x: Tensor, dy: Tensor, total: ReplicatedSum | None = None) -> None:
    model(x).backward(dy)
    if total is not None:
        total.reduce()
    clear(model, x)


def clear(model: nn.Module, x: Tensor) -> None:
    for p in [x, *model.parameters()]:
        p.grad = None


def timed(act: Callable[[], None], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    act()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def six_products(s: Setting, tokens: int) -> int:
    """The FLOPs that LoRA cannot do without."""
    hidden, inner, heads, kv = SHAPES.get(s.shape, (4096, 0, 1, 1))
    narrow = hidden // heads * kv
    layers = {"q_proj": hidden, "k_proj": narrow, "v_proj": narrow, "o_proj": hidden}  # of the other side: hidden
    layers |= {"gate_proj": inner, "up_proj": inner, "down_proj": inner} if s.shape != "linear" else {}
    chosen = ["q_proj"] if s.shape == "linear" else [name for name in layers if s.wants(name)]
    return sum(3 * 2 * tokens * s.rank * (hidden + layers[name]) for name in chosen)


# -- telling -----------------------------------------------------------------------------------------------------------------------


def spread(ratios: list[float]) -> str:
    if len(ratios) < 4:
        return f"{statistics.median(ratios):.3f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def line(row: Row, tokens: int) -> str:
    s = row.setting
    extra = f"{row.extra / six_products(s, tokens):.2f}"
    to_peft = spread(row.over(PEFT)) if PEFT in row.times else ""
    cells = [s.shape, s.targets, str(s.rank), s.dtype, f"{s.dropout:g}", row.name, spread(row.over("floor")), to_peft]
    return "| " + " | ".join([*cells, f"{row.saved / 2**20:.2f}", f"{row.peak / 2**20:.1f}", extra]) + " |"


def against_peers(rows: list[Row]) -> list[str]:
    """A line for each setting: our step over that of each peer, the median and the interval that holds it with 95 %."""
    found = [row for row in rows if row.name in (OURS, AS_BASE)]
    peers = [n for n in dict.fromkeys(row.name for row in rows) if n not in (OURS, AS_BASE, "floor") and not n.endswith("dora")]
    if not found or not peers:
        return []
    text = ["| block | targets | r | base | dropout | ours | turns | " + " | ".join(peers) + " |", "|---" * (7 + len(peers)) + "|"]
    for row in found:
        s = row.setting
        cells = [s.shape, s.targets, str(s.rank), s.dtype, f"{s.dropout:g}", row.name, str(len(row.times[OURS]))]
        text.append("| " + " | ".join(cells + [verdict(row.over(p)) for p in peers]) + " |")
    return text


def verdict(ratios: list[float]) -> str:
    low, high = median_interval(ratios)
    mark = " slower" if low > 1 else ""
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}){mark}"


def median_interval(values: list[float]) -> tuple[float, float]:
    """The order statistics between which the median of what was sampled lies with 95 %; of five values and fewer, the ends."""
    values, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n // 2 and tail + math.comb(n, k) / 2**n <= 0.025:
        tail += math.comb(n, k) / 2**n
        k += 1
    at = max(k - 1, 0)
    return values[at], values[n - 1 - at]


def counted_line(row: Counted) -> str:
    s = row.setting
    cells = [s.shape, s.targets, str(s.rank), s.dtype, f"{s.dropout:g}", row.layout, row.name, str(row.collectives)]
    return "| " + " | ".join([*cells, f"{row.travelled / 2**20:.2f}", f"{row.peak / 2**20:.1f}"]) + " |"


HEAD = """| block | targets | r | base | dropout | | step / floor | step / PEFT | MiB kept over it | MiB peak | FLOPs over it, of six |
|---|---|---|---|---|---|---|---|---|---|---|"""
COUNTED = """| block | targets | r | base | dropout | layout | | collectives | MiB in them | MiB peak |
|---|---|---|---|---|---|---|---|---|---|"""


def main(arguments: dict[str, str]) -> None:
    listed = {key: arguments[key].split(",") for key in ("shapes", "ranks", "dtypes", "dropouts", "targets")}
    if unknown := [x for x in listed["shapes"] if x not in (*SHAPES, "linear")]:
        raise UsageError(f"shapes={unknown}: expected some of linear, {', '.join(SHAPES)}")
    tokens, turns, device = int(arguments["tokens"]), int(arguments["turns"]), torch.device(arguments["device"])
    seconds = float(arguments["seconds"])
    names = present(arguments["contenders"].split(",") if arguments["contenders"] else list(CONTENDERS))
    layouts = arguments["layouts"].split(",")
    if unknown := [x for x in layouts if x != "single" and not re.fullmatch("(fsdp|tp)[1-9][0-9]*", x)]:
        raise UsageError(f"layouts={unknown}: expected single, or fsdp or tp with a number of ranks, as in fsdp2,tp3")
    settings = [
        Setting(shape, int(rank), dtype, float(dropout), where)
        for shape, where, dtype, rank, dropout in product(*(listed[k] for k in ("shapes", "targets", "dtypes", "ranks", "dropouts")))
    ]
    for s, layout in product(settings, layouts):
        check_heads(s.shape, layout)
    if arguments["output"]:  # checked before the minutes it takes
        if "single" not in layouts:
            raise UsageError("output= wants the timed rows too: put single among the layouts")
        Path(arguments["output"]).mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    if "single" in layouts:
        print(HEAD, flush=True)
        for s in settings:
            for row in measure(s, names, tokens, turns, seconds, device):
                rows.append(row)
                print(line(row, tokens), flush=True)
            gc.collect()
        print("\n" + "\n".join(against_peers(rows)), flush=True)
    counts: list[Counted] = []
    if parallel := [x for x in layouts if x != "single"]:
        print(f"\n{COUNTED}", flush=True)
        for s, layout in product(settings, parallel):
            for counted in count(s, layout, names, tokens, device):
                counts.append(counted)
                print(counted_line(counted), flush=True)
    if arguments["output"]:
        write(rows, counts, tokens, turns, Path(arguments["output"]) / arguments["page"], device)


def check_heads(shape: str, layout: str) -> None:
    if layout.startswith("tp") and shape in SHAPES and SHAPES[shape][3] % int(layout[2:]):
        raise UsageError(f"layouts={layout}: {shape} has {SHAPES[shape][3]} key-value heads, which tensor parallelism must divide")


def present(names: list[str]) -> list[str]:
    """Those whose package is there; the floor always."""
    if unknown := [n for n in names if n not in CONTENDERS]:
        raise UsageError(f"contenders={unknown}: expected some of {', '.join(CONTENDERS)}")
    found = ["floor"]
    for name in names:
        try:
            CONTENDERS[name](nn.Sequential(nn.Linear(4, 4, bias=False).requires_grad_(False)), Setting("linear", 2, "float32", 0.0, "all"))
        except ImportError as error:
            print(f"without {name}: {error}", file=sys.stderr)
        else:
            found += [name] if name != "floor" else []
    return found


def write(rows: list[Row], counts: list[Counted], tokens: int, turns: int, page: Path, device: torch.device) -> None:
    from matplotlib.figure import Figure

    told = " ".join(shlex.quote(a) for a in sys.argv[1:] if not a.startswith(("output=", "page=")))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    text = ["# Benchmarks", "", f"Written by `python launch/bench.py {told}`: torch {torch.__version__}, {machine}."]
    text += [f"A step is the forward and backward of one block with {tokens} tokens; {turns} turns or more;"]
    text += ["median, and quartiles in brackets.", ""]
    text += [f"![Step time over the floor]({page.name}.svg)", "", HEAD, *(line(row, tokens) for row in rows)]
    if peers := against_peers(rows):
        text += ["", "Our step over that of each peer: the median, and the interval that holds it with 95 %;"]
        text += ["`slower` where that lies above 1. Factors of loralib, torchtune and d9d are in the dtype of the base; PEFT's and ours"]
        text += [f"in fp32, which are cast in each forward and backward, but for the rows of `{AS_BASE}`.", "", *peers]
    if counts:
        text += ["", "Counted on rank 0 of fake ranks; bytes are those of whole buffers, and the sum of replicated factors is in them.", ""]
        text += [COUNTED, *map(counted_line, counts)]
    page.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure = Figure(figsize=(10, 1 + 0.5 * len(settings)), layout="constrained")
    ax = figure.subplots()
    names = [n for n in dict.fromkeys(row.name for row in rows) if n != "floor"]
    for k, name in enumerate(names):
        mine = [row for row in rows if row.name == name]
        at = [settings.index(row.setting) + 0.8 * (k + 0.5) / len(names) - 0.4 for row in mine]
        ax.barh(at, [statistics.median(row.over("floor")) - 1 for row in mine], height=0.8 / len(names), label=name)
    ax.set_yticks(range(len(settings)), [f"{s.shape} {s.targets} r={s.rank} {s.dtype} p={s.dropout:g}" for s in settings], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("step time beyond the floor, as a share of it")
    ax.legend(fontsize=8)
    figure.savefig(page.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(run("launch/bench.py", "Adapters beside the frozen layers they adapt.", KEYS, main))
