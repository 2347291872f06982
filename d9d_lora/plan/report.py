"""The plan for people: one table with a column for each number of ranks, and one picture of what a rank's memory goes to."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from d9d_lora.plan.ledger import Key
from d9d_lora.plan.rehearsal import Counts
from d9d_lora.state.atomic import write_text
from d9d_lora.train.replicated import KEPT
from d9d_lora.train.report import size

KIND_NAMES = {
    "dp_shard": {"all_gather": "FSDP gathers", "reduce_scatter": "FSDP scatters gradients"},
    "dp_replicate": {"all_reduce": "replicas sum gradients"},
    "cp": {
        "all_to_all": "cp exchanges tokens for heads",
        "all_gather": "cp gathers keys and values",
        "reduce_scatter": "cp scatters their gradients",
    },
    "tp": {},
    "efsdp": {"all_gather": "FSDP gathers experts", "reduce_scatter": "FSDP scatters gradients of experts"},
    "ep": {"all_to_all": "tokens to their experts and back, evenly routed"},
}
SUFFIXES = (".md", ".json", ".png", ".svg", ".pdf")


def name_of(key: Key) -> str:
    """What a person calls a kind of traffic."""
    phase, axis, kind = key
    if phase == "sum":
        return {"tp": "one sum over tp, of factors it replicates", "world": "one sum over all ranks, of whole adapters"}.get(
            axis, f"one sum over {axis}, of whole adapters"
        )
    spelled = kind.replace("_", "-")
    return f"{KIND_NAMES.get(axis, {}).get(kind, f'{axis} {spelled}')}, {phase}"


def rows_of(plans: Sequence[Counts]) -> list[tuple[str, str, list[str]]]:
    """(quantity, how it was found, a value for each plan)."""

    def row(name: str, how: str, value: Callable[[Counts], Any], write: Callable[[Any], str] = size) -> tuple[str, str, list[str]]:
        return name, how, [write(value(p)) for p in plans]

    whole = "{:,}".format
    staged = [
        row("memory: kept activations of all microbatches under way", "schedule", lambda p: p.held),
        row("memory: hidden states from other stages, and gradients", "formula", lambda p: p.wire),
    ]
    rows = [
        row("parameters of the base", "shapes", lambda p: p.base_elements, whole),
        row("parameters trained", "shapes", lambda p: p.adapter_elements, whole),
        row("tokens a step", "config", lambda p: p.tokens, whole),
        row("microbatches a step, each rank", "config", lambda p: p.accumulation, whole),
        row("memory: base", "shapes", lambda p: p.base),
        row("memory: adapters", "shapes", lambda p: p.adapters),
        row("adapters are, over data parallelism", "rule", lambda p: p, _lie),
        row("memory: their being whole adds, to adapters, gradients, AdamW", "shapes", lambda p: KEPT * (p.whole - p.cut)),
        row("memory: gradients", "counted", lambda p: p.gradients),
        row("memory: AdamW", "shapes", lambda p: p.optimiser),
        row("memory: kept activations", "counted", lambda p: p.kept),
        *([] if plans[0].pp_rank is None else staged),
        row("memory: largest FSDP unit, whole", "counted", lambda p: p.unit),
        row("memory: peak, all of it", "counted", lambda p: p.peak),
        row("base, on all ranks together", "shapes", lambda p: p.base_all),
        row("adapters, on all ranks together", "shapes", lambda p: p.adapters_all),
        row("read from the checkpoint", "shapes", lambda p: p.read),
        row("read, all ranks together", "shapes", lambda p: p.read_all),
    ]
    keys = list(dict.fromkeys(k for p in plans for k in p.one))
    for k in sorted(keys, key=once_a_step):
        when = "step" if once_a_step(k) else "microbatch"
        rows.append(row(f"{when}: {name_of(k)}", "formula" if k[1:] == ("pp", "send") else "counted", lambda p, k=k: p.one[k]))  # type: ignore[misc]
    if any(_root(p) for p in plans):
        rows.append(row("later microbatches of a step: less, for the root is whole", "counted", _root))
    rows.append(row("step: all traffic", "counted", lambda p: sum(p.step.values())))
    return rows


def _lie(p: Counts) -> str:
    return "whole" if p.replicated else "sharded" if p.whole else "alone"


def _root(p: Counts) -> int:
    """What the first microbatch of a step gathers for all that follow; nothing where none follows."""
    return sum(p.one[k] - p.more[k] for k in p.one if not once_a_step(k)) if p.accumulation > 1 else 0


def once_a_step(key: Key) -> bool:
    """Whether it travels with the last microbatch alone."""
    return key[0] == "sum" or key[1:] in (("dp_shard", "reduce_scatter"), ("efsdp", "reduce_scatter"), ("dp_replicate", "all_reduce"))


def agreement(plans: Sequence[Counts], *, sequence_parallel: bool) -> str:
    """Whether the formulas say what was counted."""
    apart = []
    for p in plans:
        keys = [k for k in p.one | p.paper if p.one[k] != p.paper[k] and not (sequence_parallel and k[1] == "tp" and k[0] != "sum")]
        apart += [f"{p.ranks} ranks, {name_of(k)}: counted {p.one[k]:,}, on paper {p.paper[k]:,}" for k in keys]
    left_out = " (what tensor parallelism moves was only counted: there is no formula for sequence_parallel)" if sequence_parallel else ""
    if not apart:
        return f"the traffic on paper is the traffic counted, to the byte{left_out}"
    return "the formulas are for Llama's plan, and differ from what was counted: " + "; ".join(apart)


def markdown(plans: Sequence[Counts]) -> str:
    head = ["of one rank, unless it says all", "found by", *(p.column for p in plans)]
    lines = [head, ["---", "---", *("---:" for _ in plans)], *([name, how, *values] for name, how, values in rows_of(plans))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(plans: Sequence[Counts]) -> None:
    from rich import box
    from rich.table import Table

    from d9d_lora.train.report import console

    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("of one rank, unless it says all", no_wrap=True)
    table.add_column("found by")
    for p in plans:
        table.add_column(p.column, justify="right", no_wrap=True)
    for name, how, values in rows_of(plans):
        table.add_row(name, how, *values)
    console.print(table)


def write(plans: Sequence[Counts], title: str, output: Path) -> None:
    """By its suffix: a Markdown table, every number as JSON, or the picture."""
    if output.suffix == ".md":
        write_text(output, f"{title}\n\n{markdown(plans)}")
    elif output.suffix == ".json":
        import json

        write_text(output, json.dumps([_plain(p) for p in plans], indent=1))
    else:
        draw(plans, title, output)


def _plain(p: Counts) -> dict[str, Any]:
    def spelled(traffic: Mapping[Key, int]) -> dict[str, int]:
        return {" ".join(k): v for k, v in traffic.items()}

    values = {f.name: getattr(p, f.name) for f in fields(p)}
    return {k: spelled(v) if isinstance(v, Counter) else v for k, v in values.items()} | {"step": spelled(p.step)}


def draw(plans: Sequence[Counts], title: str, picture: Path) -> None:
    """Memory of a rank, stacked up to its peak, for each number of ranks."""
    from matplotlib.figure import Figure

    parts: list[tuple[str, Callable[[Counts], int]]] = [
        ("base", lambda p: p.base),
        ("adapters, AdamW", lambda p: p.adapters + p.optimiser),
        ("kept activations", lambda p: p.held),
        ("the rest of the peak: gathered units, gradients, temporaries", lambda p: p.peak - p.base - p.adapters - p.optimiser - p.held),
    ]
    figure = Figure(figsize=(1.6 * len(plans) + 4, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names, floor = [p.column.removesuffix(" ranks").replace(" ranks, ", "\n") for p in plans], [0.0] * len(plans)
    for label, value in parts:
        heights = [max(0, value(p)) / 2**30 for p in plans]
        axes.bar(names, heights, bottom=floor, label=label, width=0.6)
        floor = [a + b for a, b in zip(floor, heights)]
    axes.set_xlabel("ranks")
    axes.set_ylabel("GiB on a rank at the peak")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=120)
