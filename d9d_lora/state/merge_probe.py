"""How far a merged model's logits are from those of the base with its adapter, on some text.

    gap = logits(base + adapter) - logits(merged)        both with activations in fp32, so the gap is that of the rounded weights

Two models are loaded, one after the other. The merged one gets `merge_report.json`. Needs transformers.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d9d_lora.files import load_adapter
from d9d_lora.state.atomic import write_text

REPORT = "merge_report.json"
LONGEST = 1024  # tokens of a text that are asked


class ProbeError(ValueError):
    """A comparison that cannot be made: what is missing, and the mend. The merged model is there all the same."""


@dataclass(frozen=True)
class Gap:
    """What was found.

    Attributes:
        largest, mean: Of the absolute differences of logits.
        logit: The largest logit of the adapted base, to compare with.
        adapter: How far the adapter moves a logit of the base.
        agree: The share of tokens after which both models think the same next one likeliest.
        tokens: How many were asked.
        dtype: Of the merged weights.
    """

    largest: float
    mean: float
    logit: float
    adapter: float
    agree: float
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return (
            f"logits of the merged model ({self.dtype}) differ from those of base and adapter by up to {self.largest:.3g}, in the mean by "
            f"{self.mean:.3g}; the likeliest token is the same after {100 * self.agree:.1f} % of {self.tokens} tokens. (The adapter moves "
            f"a logit by up to {self.adapter:.3g}, and the largest is {self.logit:.3g}.)"
        )


def texts_of(probe: str) -> list[str]:
    """The lines of a file, or the text itself."""
    path = Path(probe)
    try:
        there = path.is_file()
    except OSError:  # too long for a name
        there = False
    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] if there else [probe]
    if not any(text.strip() for text in texts):
        raise ProbeError(f"probe={probe!r} holds no text: give a sentence, or a file with one a line")
    return texts


def check_transformers() -> None:
    """Before a merge that will be compared."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ProbeError("probe=... compares models, which needs transformers: pip install transformers, or leave probe out") from error


@torch.no_grad()
def probe(adapter: Path, base: Path, merged: Path, texts: list[str]) -> Gap:
    """Compares, and writes `merge_report.json` into the merged model's directory.

    Raises:
        ProbeError: no tokenizer, or a model that transformers cannot load.
    """
    check_transformers()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(merged)
        ids = [tokenizer(text, return_tensors="pt")["input_ids"][:, :LONGEST] for text in texts]
    except (OSError, ValueError, KeyError) as error:
        raise ProbeError(f"{merged} has no tokenizer that can be read ({error}), so there are no tokens to ask") from error
    model = _open(base)
    rows = _vocabulary(merged)
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter brings its own values
    before = _logits(model, ids)
    load_adapter(model, adapter)
    adapted = _logits(model.eval(), ids)
    del model
    result = _open(merged)
    found = _logits(result, ids)
    difference = (adapted - found).abs()
    gap = Gap(
        largest=float(difference.max()),
        mean=float(difference.mean()),
        logit=float(adapted.abs().max()),
        adapter=float((adapted - before).abs().max()),
        agree=float((adapted.argmax(-1) == found.argmax(-1)).double().mean()),
        tokens=adapted.shape[0],
        dtype=_stored_dtype(merged),
    )
    write_text(merged / REPORT, json.dumps({"logits": asdict(gap)}, indent=2) + "\n")
    return gap


def _open(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ProbeError(f"{path}: transformers cannot load it as a causal language model: {error}") from error


def _logits(model: Any, ids: list[Tensor]) -> Tensor:
    """[all tokens of the texts, vocabulary], one text at a time: no padding that could hide or make a difference."""
    return torch.cat([model(input_ids=i).logits[0].float() for i in ids])


def _vocabulary(path: Path) -> int | None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    rows: int | None = (config.get("text_config") or config).get("vocab_size")
    return rows


def _stored_dtype(path: Path) -> str:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
