"""Training data: files -> rows -> examples -> train and eval, with every lost row counted.

Read in this order: `rows` (files), `encode` (token ids and what is trained), `split` (what counts as the same), this
file (the whole way), `batches`.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from d9d_lora.tokens import IGNORE
from d9d_lora.train.encode import Example, encode
from d9d_lora.train.rows import DataError, check_columns, detect_format, read_rows
from d9d_lora.train.split import digests, split

__all__ = [
    "Data",
    "DataConfig",
    "DataError",
    "DataReport",
    "Example",
    "load_data",
    "load_examples",
    "show_samples",
    "split",
]


class DataConfig(BaseModel):
    """What is trained on, and in which portions."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(
        description="Training data: a .jsonl or .parquet file, a directory of them, or one of `datasets.save_to_disk`."
    )
    eval_path: str | None = Field(
        default=None, description="Evaluation data, in the same formats. Excludes eval_fraction."
    )
    eval_fraction: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="Hold out this part of `path` for evaluation, after deduplication."
    )
    format: Literal["auto", "text", "completion", "messages"] = Field(
        default="auto",
        description="Columns of a row: text; prompt and completion; messages. `auto` looks at the first row.",
    )
    chat: bool = Field(
        default=False,
        description="Put prompt and completion through the tokenizer's chat template, as user and assistant.",
    )
    ignore_columns: list[str] = Field(
        default_factory=list, description="Columns that are there and not used. Any other unknown column is an error."
    )
    deduplicate: bool = Field(
        default=True, description="Drop rows whose text is the same up to case and spaces. Needed by eval_fraction."
    )
    seq_len: int = Field(
        default=512, ge=2, description="Longest sample in tokens; with packing, the length of every row."
    )
    packing: bool = Field(
        default=False, description="Put several samples into a row of seq_len tokens; they do not see one another."
    )
    overlong: Literal["error", "truncate", "drop"] = Field(
        default="error",
        description="What to do with a sample of more than seq_len tokens. Cut and dropped ones are counted.",
    )
    batch_size: int = Field(default=16, ge=1, description="Sequences (packed rows) per optimiser step, over all ranks.")
    micro_batch_size: int = Field(default=1, ge=1, description="Sequences (packed rows) per forward pass on one rank.")

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.eval_fraction and self.eval_path:
            raise ValueError(
                "eval_fraction and eval_path are both set; evaluate on a part of path, or on a file of its own"
            )
        if self.eval_fraction and not self.deduplicate:
            raise ValueError("eval_fraction needs deduplicate=true, or held-out samples would also be trained on")
        if self.chat and self.format in ("text", "messages"):
            raise ValueError(f"chat=true is for prompt and completion, and format is {self.format}; leave chat out")
        return self


@dataclass
class DataReport:
    """What became of the rows. `rows` = kept + duplicates + dropped; truncated samples are kept."""

    rows: int = 0
    duplicates: int = 0
    truncated: int = 0
    dropped: int = 0
    kept: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    shared_with_eval: int = 0

    def __str__(self) -> str:
        told = [f"{getattr(self, f.name):,} {f.name.replace('_', ' ')}" for f in fields(self)]
        return ", ".join(text for text in told if not text.startswith("0 "))


@dataclass
class Data:
    """Training and evaluation examples, and a report of each file that was read."""

    train: list[Example]
    eval: list[Example]
    report: DataReport = field(default_factory=DataReport)
    eval_report: DataReport = field(default_factory=DataReport)


def load_data(config: DataConfig, tokenizer: Any, *, seed: int = 0) -> Data:
    """Read, tokenise and split. Training samples that are asked again in `eval_path` are counted, not removed."""
    data = Data([], [])
    data.train = load_examples(config.path, config, tokenizer, report=data.report)
    if config.eval_path:
        data.eval = load_examples(config.eval_path, config, tokenizer, report=data.eval_report)
        asked = {example.key for example in data.eval}
        data.report.shared_with_eval = sum(example.key in asked for example in data.train)
    elif config.eval_fraction:
        data.train, data.eval = split(data.train, config.eval_fraction, seed=seed)
    return data


def load_examples(
    path: str | Path, config: DataConfig, tokenizer: Any, *, report: DataReport | None = None
) -> list[Example]:
    """Tokenised samples of a file or directory, in its order; `report` is filled with what became of the rows.

    Raises:
        DataError: names the file and line of a row that cannot be used, what was expected and how to mend it.
    """
    report = DataReport() if report is None else report
    rows = read_rows(path)
    format = detect_format(rows[0]) if config.format == "auto" else config.format
    if config.chat and format != "completion":
        raise DataError(
            f"{path}: data.chat=true is for prompt and completion, and the rows hold {format}; leave it out"
        )
    seen: set[str] = set()
    examples = []
    for row in rows:
        report.rows += 1
        check_columns(row, format, config.ignore_columns)
        whole, asked = digests(row, format)
        if config.deduplicate and whole in seen:
            report.duplicates += 1
            continue
        seen.add(whole)
        ids, labels = encode(row, format, tokenizer, chat=config.chat)
        if len(ids) > config.seq_len:
            if config.overlong == "error":
                raise DataError(
                    f"{row.source}: {len(ids)} tokens, and data.seq_len is {config.seq_len}; raise data.seq_len, "
                    "or set data.overlong=truncate or data.overlong=drop"
                )
            if config.overlong == "drop":
                report.dropped += 1
                continue
            report.truncated += 1
            ids, labels = ids[: config.seq_len], labels[: config.seq_len]
        example = Example(ids, labels, row.source, asked)
        if not example.target_tokens:
            raise DataError(
                f"{row.source}: a sample without a target token (of {len(ids)} tokens none is trained); expected one "
                "or more, in text, completion or an assistant turn. If data.overlong=truncate cut it off, use drop"
            )
        examples.append(example)
        report.kept += 1
        report.tokens += len(ids)
        report.target_tokens += example.target_tokens
        report.longest = max(report.longest, len(ids))
    if not examples:
        raise DataError(
            f"{path}: all {report.rows} rows are longer than data.seq_len={config.seq_len}; nothing is left"
        )
    return examples


def show_samples(examples: list[Example], tokenizer: Any, n: int = 3) -> str:
    """The first `n` samples as the model sees them; 【 and 】 enclose what is trained."""
    shown = []
    for example in examples[:n]:
        text, start = "", 0
        while start < len(example.input_ids):
            train = example.labels[start] != IGNORE
            end = start
            while end < len(example.input_ids) and (example.labels[end] != IGNORE) == train:
                end += 1
            piece = tokenizer.decode(example.input_ids[start:end], skip_special_tokens=False)
            text += f"【{piece}】" if train else piece
            start = end
        head = f"{example.source}: {len(example.input_ids)} tokens, {example.target_tokens} of them trained"
        shown.append(f"{head}\n{text}")
    return "\n\n".join(shown)
