"""What counts as the same sample, and the split that keeps it on one side."""

import hashlib
import json
from typing import Any

from d9d_lora.train.encode import Example, as_messages
from d9d_lora.train.rows import DataError, Format, Row


def digests(row: Row, format: Format) -> tuple[str, str]:
    """Digests of the whole sample and of what it asks, both blind to case and runs of spaces."""
    if format == "text":
        return _digest(row.values["text"]), _digest(row.values["text"])
    turns = as_messages(row)
    last = turns[-1]["role"] == "assistant"
    return _digest(turns), _digest(turns[:-1] if last else turns)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(_fold(value), sort_keys=True).encode()).hexdigest()[:32]


def _fold(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, dict):
        return {name: _fold(item) for name, item in value.items()}
    return [_fold(item) for item in value] if isinstance(value, list | tuple) else value


def split(examples: list[Example], fraction: float, *, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, eval): hold out about `fraction` of the samples, the same ones whatever their order in the file.

    Samples that ask the same (equal keys) stay on one side, even where their answers differ.
    """
    keys = {example.key or example.source for example in examples}
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    count = round(len(order) * fraction)
    if not 0 < count < len(order):
        raise DataError(
            f"holding out {fraction:g} of {len(order)} different samples leaves {len(order) - count} for training and "
            f"{count} for evaluation; expected at least one each: change data.eval_fraction, or give data.eval_path"
        )
    held_out = set(order[:count])
    train = [example for example in examples if (example.key or example.source) not in held_out]
    return train, [example for example in examples if (example.key or example.source) in held_out]
