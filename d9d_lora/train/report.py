"""What a person sees: the table of what will be trained, one line of progress, the curve. And `metrics.jsonl`, for everything else."""

import json
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.mixture import stacks
from d9d_lora.placement import local_of, ranks_of_experts
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.state.names import clean
from d9d_lora.train.config import TrackerConfig
from d9d_lora.train.replicated import KEPT, Choice
from d9d_lora.walk import adapted_layers

# Wide where there is no terminal to ask: a table in a log file should not be folded to 80 columns.
console = Console(file=sys.stdout, soft_wrap=True, width=None if sys.stdout.isatty() else 150)


def census(module: nn.Module, shards: int = 1, choice: Choice | None = None) -> dict[str, Any]:
    """What will be trained, from shapes alone (nothing need be allocated): one row for all layers that are alike.

    Args:
        shards: How many FSDP2 ranks will share what is here now; the table is made before they do.
        choice: What of it they will not share.
    """
    whole = set() if choice is None else set(map(id, choice.params))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen: set[int] = set()

    def tell(name: str, how: str, weight: Tensor, base: str, params: Mapping[str, nn.Parameter], form: str = "") -> None:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", clean(name))
        shape = " x ".join(map(str, weight.shape)) + form
        trained = {n: f"{' x '.join(map(str, p.shape))} {placement_of(p)}" for n, p in params.items()}
        row = rows.setdefault(
            (kind, how, shape, base, str(trained)),
            {"name": kind, "count": 0, "method": how, "weight": shape, "base": base, "trained": trained, "elements": 0, "bytes_here": 0},
        )
        row["count"] += 1
        row["elements"] += sum(p.numel() for p in params.values())
        row["bytes_here"] += sum(local_of(p).nbytes / (1 if id(p) in whole else shards // ranks_of_experts(p)) for p in params.values())
        seen.update(map(id, params.values()))

    for layer in adapted_layers(module):
        packed = isinstance(layer.base, NF4Linear)
        weight: Tensor = layer.base.outline() if packed else layer.base.weight  # type: ignore[assignment,operator]
        tell(layer.name, str(layer.delta), weight, str(layer.placing), layer.factors(), " nf4" if packed else "")
    shared = {id(f.weight) for layer in adapted_layers(module) for f in layer.shared.values()}
    for name, p in module.named_parameters():
        if id(p) in shared:
            tell(name, "shared by all layers", p, placement_of(p), {"weight": p})
        elif p.requires_grad and id(p) not in seen:
            tell(name, "whole", p, placement_of(p), {"weight": p})
    table = list(rows.values())
    return {
        "rows": table,
        "trained": sum(r["elements"] for r in table),
        "total": sum(p.numel() for p in module.parameters()) + sum(m.hidden() for m in module.modules() if isinstance(m, NF4Linear)),
        "bytes_here": int(sum(r["bytes_here"] for r in table)),
        "over_data": over_data(choice),
        "experts": experts_of(module),
    }


def over_data(choice: Choice | None) -> str:
    """How adapters lie over the data-parallel ranks, and why; empty where there are none."""
    if choice is None or not choice.whole:
        return ""
    more = size(KEPT * (choice.whole - choice.cut))
    how = "whole on each data-parallel rank, with one sum a step" if choice.replicate else "sharded with their blocks"
    return f"adapters: {how} ({choice.why}; being whole takes {more} more, optimiser state included)"


def experts_of(module: nn.Module) -> dict[str, int] | None:
    """How many of the experts' stacks are adapted, and what they weigh; None of a model without any."""
    found = stacks(module)
    if not found:
        return None
    adapted = [stack for stack in found if stack.adapted]
    weights = {"elements": sum(stack.elements for stack in found), "adapted_elements": sum(stack.elements for stack in adapted)}
    return {"stacks": len(found), "adapted": len(adapted), "experts": max(stack.experts for stack in found), **weights}


def placement_of(p: nn.Parameter) -> str:
    return ", ".join(map(str, p.placements)) if isinstance(p, DTensor) else "whole"


def show_census(found: Mapping[str, Any], passed_over: list[str]) -> None:
    table = Table(title="What will be trained", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("layer", "count", "method", "weight", "base"):
        table.add_column(head, no_wrap=True, justify="right" if head == "count" else "left")
    table.add_column("trained, with its placement")
    table.add_column("a rank", justify="right", no_wrap=True)
    for row in found["rows"]:
        factors = "\n".join(f"{n}  {how}" for n, how in row["trained"].items())
        table.add_row(row["name"], str(row["count"]), row["method"], row["weight"], row["base"], factors, size(row["bytes_here"]))
    console.print(table)
    share = 100 * found["trained"] / max(found["total"], 1)
    console.print(
        f"{found['trained']:,} of {found['total']:,} parameters are trained ({share:.2f} %); a rank holds {size(found['bytes_here'])} of "
        f"them and {size(2 * found['bytes_here'])} of optimiser state",
        highlight=False,
    )
    if found["over_data"]:
        console.print(found["over_data"], highlight=False)
    if experts := found.get("experts"):
        part = 100 * experts["elements"] / max(found["total"], 1)
        said = f"experts: {part:.1f} % of the parameters, in {experts['stacks']} stacks; {experts['adapted']} of these are adapted"
        none = "WARNING: no expert is adapted. Name them, as peft.target_parameters=[experts.gate_up_proj,experts.down_proj]"
        console.print(said if experts["adapted"] else f"{said}\n{none}", highlight=False, markup=False)
    if passed_over:
        console.print(f"matched, and left alone: {', '.join(passed_over[:8])}{' ...' if len(passed_over) > 8 else ''}")


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def span(seconds: float) -> str:
    """A duration for people."""
    s = int(seconds)
    return f"{s // 3600}:{s % 3600 // 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


class Tracker:
    """metrics.jsonl, TensorBoard and the line of progress, on the first rank only; a no-op on the others."""

    def __init__(self, directory: Path | None, config: TrackerConfig, steps: int) -> None:
        self._directory, self._config, self._steps = directory, config, steps
        self._board: Any = None
        self._began = time.monotonic()
        self._first: int | None = None
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(directory / "tb"))
            except ImportError:
                self.say("tensorboard is not installed: no events are written (pip install d9d_lora[report])")

    def say(self, text: str) -> None:
        if self._directory is not None:
            console.print(text, markup=False, highlight=False)

    def rewind(self, step: int) -> None:
        """Drops what a killed run logged beyond the checkpoint it resumes from (all of it, from -1): each step is told once."""
        if self._directory is None:
            return
        self._file.close()
        path = self._directory / "metrics.jsonl"
        rows = [r for r in read_metrics(path) if r["step"] < step or (r["step"] == step and "loss" in r)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def step(self, step: int, values: Mapping[str, float], *, show: bool) -> None:
        """One optimiser step; `values` has loss, learning_rate, gradient_norm, tokens, tokens_per_second."""
        self._write({"step": step, **values})
        if self._first is None:
            self._first, self._began = step, time.monotonic()
        if show and self._directory is not None:
            done = step - self._first
            left = span((time.monotonic() - self._began) / done * (self._steps - step)) if done else "?"
            self.say(
                f"step {step:>5}/{self._steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  |g| "
                f"{values['gradient_norm']:.3f}  {values['tokens_per_second']:,.0f} tokens/s  {left} left"
            )

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._write({"step": step, **{f"eval_{k}": v for k, v in values.items()}})
        told = f"evaluation at step {step}: loss {values['loss']:.4f}, perplexity {values['perplexity']:.3f}"
        self.say(told + f", exact match {100 * values['exact_match']:.1f} %")

    def _write(self, row: dict[str, Any]) -> None:
        if self._directory is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if key != "step" and math.isfinite(value):
                    self._board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Draws the curve, in a line and as a picture, and closes the files."""
        if self._directory is None:
            return
        self._file.close()
        curve = [r["loss"] for r in read_metrics(self._directory / "metrics.jsonl") if "loss" in r]
        if curve:
            self.say(f"loss  {curve[0]:.3f} {sparkline(_smooth(curve))} {_smooth(curve)[-1]:.3f}")
        if self._board is not None:
            self._board.close()
        if self._config.plot:
            try:
                draw_curve(self._directory / "metrics.jsonl", self._directory / "report.png")
            except ImportError:
                self.say("matplotlib is not installed: no report.png (pip install d9d_lora[report])")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_curve(metrics: Path, picture: Path) -> None:
    """Training and evaluation loss, and the learning rate, over steps."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    train = [(r["step"], r["loss"], r["learning_rate"]) for r in rows if "loss" in r]
    evaluation = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot([t[0] for t in train], [t[1] for t in train], color="tab:blue", alpha=0.35, linewidth=1)
        axes.plot([t[0] for t in train], _smooth([t[1] for t in train]), color="tab:blue", label="training loss")
        rate = axes.twinx()
        rate.plot([t[0] for t in train], [t[2] for t in train], color="tab:gray", linewidth=0.8, linestyle=":")
        rate.set_ylabel("learning rate (dotted)")
    if evaluation:
        axes.plot(*zip(*evaluation), color="tab:orange", marker="o", linewidth=0.8, linestyle="--", label="held-out loss")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss a target token")
    values = [v for _, v, *_ in [*train, *evaluation] if v > 0]
    if values and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.legend()
    figure.savefig(picture, dpi=120)


def sparkline(values: list[float], width: int = 60) -> str:
    """The shape of a positive curve in one line of text, on a logarithmic scale."""
    picked = [values[i * (len(values) - 1) // max(1, min(width, len(values)) - 1)] for i in range(min(width, len(values)))]
    logs = [math.log(max(v, 1e-12)) for v in picked]
    low, spread = min(logs), (max(logs) - min(logs)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (v - low) / spread))] for v in logs)


def _smooth(values: list[float], keep: float = 0.7) -> list[float]:
    smooth, weight, out = 0.0, 0.0, []
    for v in values:
        smooth, weight = keep * smooth + (1 - keep) * v, keep * weight + (1 - keep)
        out.append(smooth / weight)
    return out
