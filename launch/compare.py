"""Every method on the demonstration's model and data, side by side: what it learns, what it trains, what a step costs.

    python launch/compare.py                              all of them: docs/comparison.md and docs/comparison.svg
    python launch/compare.py methods=lora,dora steps=10   some of them; the page is written for all or nothing

Each method is one run of `launch/train.py` on one process, with the same samples in the same order. A run that is there already is
not made again.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from d9d_lora.keyvalue import Key, UsageError, run
from d9d_lora.train.report import read_metrics, size

ROOT = Path(__file__).resolve().parents[1]
FLOOR = "lora"  # step costs are told as a ratio to this one

# name -> settings. A learning rate is that of the method's paper or of PEFT's examples, scaled to this short run; none was searched for.
METHODS: dict[str, list[str]] = {
    "lora": [],
    "rslora": ["peft.params.scaling=rslora"],
    "lora+": ["optim.lora_plus_ratio=8", "optim.lr=5e-4"],
    "orthogonal": ["peft.params.init_lora_weights=orthogonal"],
    "pissa": ["peft.params.init_lora_weights=pissa_niter_4", "optim.lr=5e-4"],
    "olora": ["peft.params.init_lora_weights=olora", "optim.lr=2e-4"],
    "eva": ["peft.params.init_lora_weights=eva"],
    "corda": ["peft.params.init_lora_weights=corda", "peft.target_modules=[q_proj,v_proj]", "optim.lr=5e-4"],
    "dora": ["peft=dora"],
    "adalora": ["peft=adalora", "peft.params.lora_alpha=32", "peft.params.tinit=4", "peft.params.tfinal=8", "optim.lr=5e-3"],
    "loha": ["peft=loha", "peft.params.alpha=16", "optim.lr=5e-3"],
    "lokr": ["peft=lokr", "peft.params.alpha=16", "optim.lr=5e-3"],
    "vblora": ["peft=vblora", "peft.params.vector_length=64", "optim.lr=1e-2"],
    "vera": ["peft=vera", "optim.lr=1e-2"],
    "randlora": ["peft=randlora", "peft.params.alpha=64"],
    "full_tune": ["peft=full_tune", "peft.module_name_pattern='.*layers.*'", "optim.lr=2e-5"],
    "lora on nf4": ["model.quantise=nf4"],
    "loftq": ["model.quantise=nf4", "peft.params.init_lora_weights=loftq"],
}
DEMO = ROOT / ".cache/demo"
COMMON = [
    f"model.path={DEMO / 'smollm2'}",
    f"data.path={DEMO / 'trec/train.jsonl'}",
    "data.seq_len=128",
    "data.batch_size=16",
    "data.micro_batch_size=8",
    "optim.lr=2e-3",
    "optim.warmup=4",
    "optim.schedule=linear",
    "checkpoint.resume=never",
]

KEYS = {
    "methods": Key("names, comma-separated; all without it", ""),
    "steps": Key("optimiser steps of each", "24"),
    "held_out": Key("held-out questions", "100"),
    "output": Key("where the runs go", "outputs/compare"),
}


def main(arguments: dict[str, str]) -> None:
    names = arguments["methods"].split(",") if arguments["methods"] else list(METHODS)
    if unknown := [n for n in names if n not in METHODS]:
        raise UsageError(f"methods={unknown}: expected some of {', '.join(METHODS)}")
    output, steps = Path(arguments["output"]).absolute(), int(arguments["steps"])
    held_out = few(DEMO / "trec/eval.jsonl", output / "eval.jsonl", int(arguments["held_out"]))
    rows = []
    for name in names:
        rows.append(measure(name, output / name.replace(" ", "_"), steps, held_out))
        print(f"{name}: held-out loss {rows[-1]['before']:.3f} -> {rows[-1]['after']:.3f}, {rows[-1]['seconds']:.2f} s a step", flush=True)
    if set(names) == set(METHODS):
        picture(rows, ROOT / "docs/comparison.svg")
        (ROOT / "docs/comparison.md").write_text(page(rows, steps, int(arguments["held_out"])), encoding="utf-8")
        print("docs/comparison.md and docs/comparison.svg are written")
    worse = [r["name"] for r in rows if not r["after"] < r["before"]]
    if worse:
        raise UsageError(f"the held-out loss of {worse} did not fall")


def few(source: Path, target: Path, count: int) -> Path:
    """The first `count` rows of a file."""
    if not source.exists():
        raise UsageError(f"{source} is not there: python -m d9d_lora.demo fetch --dir .cache/demo")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    return target


def measure(name: str, output: Path, steps: int, held_out: Path) -> dict[str, Any]:
    """One run, and what its files tell."""
    if not (output / "census.json").exists():
        own = METHODS[name]
        given = {setting.partition("=")[0] for setting in own}
        common = [setting for setting in COMMON if setting.partition("=")[0] not in given]
        command = [sys.executable, str(ROOT / "launch/train.py"), *common, *own]
        command += [f"output_dir={output}", f"data.eval_path={held_out}", f"train.steps={steps}"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "WORLD_SIZE": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"{name}: {(done.stderr or done.stdout).strip()[-4000:]}")
    metrics = read_metrics(output / "metrics.jsonl")
    training = [m for m in metrics if "loss" in m]
    held = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    return {
        "name": name,
        "curve": [m["loss"] for m in training],
        "before": held[0],
        "after": held[-1],
        "trained": json.loads((output / "census.json").read_text(encoding="utf-8"))["trained"],
        "seconds": statistics.median(m["seconds"] for m in training[2:] or training),
    }


def page(rows: list[dict[str, Any]], steps: int, held_out: int) -> str:
    floor = next(r["seconds"] for r in rows if r["name"] == FLOOR)
    lines = [
        "# The methods side by side",
        "",
        f"Written by `python launch/compare.py`: SmolLM2-135M-Instruct on TREC questions, {steps} steps of 16 samples, one process",
        f"on a CPU; loss on {held_out} held-out questions. State is the trained parameters with AdamW's two moments, in fp32. A step's",
        f"cost is the median of a run over that of `{FLOOR}`; the runs were made one after another, and other work on the machine",
        "shows in it. Settings are in `launch/compare.py`; learning rates were not searched for, so this is no ranking of methods.",
        "",
        "![Training loss of each method](comparison.svg)",
        "",
        "| method | held-out loss | trained | state | a step |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: r["after"]):
        cost = f"{r['seconds'] / floor:.2f}"
        state = size(12 * r["trained"])
        lines.append(f"| `{r['name']}` | {r['before']:.3f} → {r['after']:.3f} | {r['trained']:,} | {state} | {cost} |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    columns = 6
    figure = Figure(figsize=(12, 1.9 * -(-len(rows) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(rows) // columns), columns, sharex=True, sharey=True).flatten()
    base = next(r["curve"] for r in rows if r["name"] == FLOOR)
    for ax, row in zip(axes, rows):
        ax.plot(range(1, len(base) + 1), base, color="0.75", linewidth=1)
        ax.plot(range(1, len(row["curve"]) + 1), row["curve"], color="tab:blue", linewidth=1.4)
        ax.set_title(f"{row['name']}  {row['after']:.2f}", fontsize=9)
        ax.tick_params(labelsize=7)
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    figure.suptitle("Training loss; held-out loss after it in the title; grey: LoRA", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(run("launch/compare.py", "Every method on the demonstration, side by side.", KEYS, main))
