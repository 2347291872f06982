"""What the demonstration's run has made, asked of three readers: the PEFT library, this package, and the merged model.

    python -m d9d_lora.demo verify --run outputs/quickstart

[Note: tolerances of the comparison]
All is computed in fp32, where the two readers may differ in the order of sums only. `TOLERANCE` is a part of the largest logit; a
fault is larger by orders of magnitude, also one that exact match cannot see, such as rows of one layer in another order
(`tests/test_demo_verify.py` makes some). `verify` also says how far the adapter moves the logits at all.

The merged model is in the dtype of the base, so its weights are rounded. Compared are therefore its weights, with PEFT's own merge
rounded once: each may differ by one step of the dtype, since two fp32 sums in another order may round to either side of a tie. How far
the rounding moves the logits is told, and no fault.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from d9d_lora.demo import DemoError, _quiet
from d9d_lora.generate import Chat, answer
from d9d_lora.inject import inject_peft_and_freeze
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of
from d9d_lora.train.report import size

TOLERANCE = 1e-4  # of the largest logit
ROWS = 16  # held-out questions whose logits are compared, at every token


@dataclass(frozen=True)
class Run:
    """Where the parts of a finished run are."""

    model: Path
    questions: Path
    adapter: Path
    merged: Path
    metrics: Path


def run_of(directory: Path) -> Run:
    """The parts of a run directory, as its own config names them."""
    config_file = directory / "config.resolved.yaml"
    if not config_file.is_file():
        raise DemoError(f"{directory} holds no {config_file.name}: expected the output directory of a run")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    if not config["data"]["eval_path"]:
        raise DemoError(f"{config_file}: data.eval_path is not set, and the comparison asks held-out questions")
    model, questions = Path(config["model"]["path"]), Path(config["data"]["eval_path"])
    run = Run(model, questions, directory / "adapter", directory / "merged", directory / "metrics.jsonl")
    for part in (run.model, run.questions, run.adapter):
        if not part.exists():
            raise DemoError(f"{part} is not there (looked from {Path.cwd()}): has the run finished?")
    return run


@torch.no_grad()
def verify(directory: Path) -> None:
    """Compares the readers and prints what was found.

    Raises:
        DemoError: two readers of one adapter differ by more than the tolerances above.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    run = run_of(directory)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    rows = [json.loads(line) for line in run.questions.read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] + row["completion"] for row in rows[:ROWS]]

    model = open_fp32(run.model)
    base = logits_of(model, tokenizer, texts)
    prompt, right = rows[0]["prompt"], rows[0]["completion"]
    before = answer(Chat(model, tokenizer), prompt, max_new_tokens=12)
    inject_peft_and_freeze(method_of(run.adapter, model), model)
    load_adapter_weights(model, run.adapter)
    model.eval()
    ours = logits_of(model, tokenizer, texts)
    after = answer(Chat(model, tokenizer), prompt, max_new_tokens=12)
    del model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of names that transformers will drop: not the reader's affair
        theirs_model: Any = PeftModel.from_pretrained(open_fp32(run.model), str(run.adapter)).eval()
    theirs = logits_of(theirs_model, tokenizer, texts)
    largest = float(theirs.abs().max())
    told = [
        ("largest logit", f"{largest:.4g}  ({len(texts)} questions, {base.shape[0]} tokens, fp32)"),
        ("the adapter moves a logit by up to", f"{gap(theirs, base):.4g}"),
        ("PEFT and d9d_lora differ by up to", f"{gap(ours, theirs):.2e}  (allowed: {TOLERANCE * largest:.2e})"),
    ]
    faults = []
    if not gap(ours, theirs) <= TOLERANCE * largest:  # so that NaN is a fault
        faults.append("d9d_lora reads another model out of the adapter than PEFT does")
    if not gap(theirs, base) > TOLERANCE * largest:
        faults.append("the adapter changes nothing")
    if run.merged.is_dir():
        merged = open_fp32(run.merged)
        differing, steps = weights_apart(theirs_model.merge_and_unload(), merged, stored_dtype(run.merged))
        rounded = logits_of(merged, tokenizer, texts)
        told += [
            ("weights of merged/ unlike PEFT's merge", f"{differing:.2e} of them, by up to {steps:g} rounding steps (allowed: 1)"),
            ("merged/ and adapter differ by up to", f"{gap(rounded, theirs):.4g}  (its weights are rounded to {stored_dtype(run.merged)})"),
        ]
        if not steps <= 1:
            faults.append("the merged model is not W + s B A")
    for name, value in told:
        print(f"{name:40} {value}")

    for name, value in measured(run.metrics):
        print(f"{name:40} {value}")
    print(f"\n{prompt}\n  base      {before!r}\n  adapter   {after!r}\n  expected  {right!r}")
    if faults:
        raise DemoError("; ".join(faults))


def open_fp32(path: Path) -> Any:
    """A causal language model with its weights in fp32, ready to answer."""
    from transformers import AutoModelForCausalLM, utils

    with _quiet(utils.logging):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()


def logits_of(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """[all tokens of the texts, vocabulary], one text at a time: no padding that could hide or make a difference."""
    return torch.cat([model(input_ids=tokenizer(t, return_tensors="pt")["input_ids"]).logits[0] for t in texts])


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype a model directory says its weights have."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def weights_apart(exact: nn.Module, stored: nn.Module, dtype: torch.dtype) -> tuple[float, float]:
    """(share of values that differ, by how many steps of `dtype` at most) once `exact` is rounded to what `stored` holds."""
    expected, found = exact.state_dict(), stored.state_dict()
    if expected.keys() != found.keys():
        raise DemoError(f"the merged model has other weights than the base: {sorted(expected.keys() ^ found.keys())[:5]}")
    differing, total, most = 0, 0, 0.0
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise DemoError(f"{name} is {tuple(found[name].shape)} in the merged model; the base has {tuple(value.shape)}")
        rounded, held = value.to(dtype), found[name].to(dtype)
        wrong = rounded != held
        total += wrong.numel()
        if not wrong.any():
            continue
        differing += int(wrong.sum())
        a, b = rounded[wrong], held[wrong]
        up = torch.nextafter(a, torch.full_like(a, torch.inf))
        down = torch.nextafter(a, torch.full_like(a, -torch.inf))
        beside = (b == up) | (b == down)
        step = torch.maximum((up.float() - a.float()).abs(), (a.float() - down.float()).abs())
        steps = torch.where(beside, 1.0, (b.float() - a.float()).abs() / step)
        most = max(most, float(steps.max()) if bool(steps.isfinite().all()) else torch.inf)
    return differing / max(total, 1), most


def measured(metrics: Path) -> list[tuple[str, str]]:
    """What the run itself logged: held-out figures before and after, and how fast it went."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    held_out = [r for r in rows if "eval_exact_match" in r]
    memory = max((r["peak_memory_bytes"] for r in rows if "peak_memory_bytes" in r), default=0)
    steps = sorted(r["tokens_per_second"] for r in rows if "tokens_per_second" in r)
    told = []
    if held_out:
        first, last = held_out[0], held_out[-1]
        told = [
            ("held-out exact match", f"{100 * first['eval_exact_match']:.1f} % -> {100 * last['eval_exact_match']:.1f} %"),
            ("held-out loss", f"{first['eval_loss']:.4f} -> {last['eval_loss']:.4f}  (step {first['step']} -> {last['step']})"),
        ]
    if steps:
        told.append(("tokens a second, median step", f"{steps[len(steps) // 2]:,.0f}"))
    if memory:
        told.append(("peak memory of rank 0", size(memory)))
    return told
