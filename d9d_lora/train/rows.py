"""Reading raw rows: JSON lines, Parquet, a directory of either, or a directory that `datasets.save_to_disk` wrote.

A row keeps the place it came from (`train.jsonl:17`), because every later complaint about it must name that place.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SUFFIXES = (".jsonl", ".json", ".parquet")

Format = Literal["text", "completion", "messages"]
COLUMNS: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
}


class DataError(ValueError):
    """Training data that cannot be used as it is; the message names the file and the line."""


@dataclass(frozen=True)
class Row:
    """The columns of one sample, and where it stands: `file:line`, or `file:row N` for formats without lines."""

    values: dict[str, Any]
    source: str


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file or a directory, files in the order of their names.

    Raises:
        DataError: nothing there, nothing in it, an unknown kind of file, or a line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory (looked from {Path.cwd()})")
    if path.is_dir():
        rows = list(_directory(path))
    else:
        rows = list(_file(path))
    if not rows:
        raise DataError(f"{path}: is empty; expected at least one row")
    return rows


def _file(path: Path) -> Iterator[Row]:
    if path.suffix in (".jsonl", ".json"):
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    raise DataError(
        f"{path}: expected a file that ends in one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}"
    )


def _directory(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise DataError(
            f"{path}: holds several splits ({', '.join(splits)}); name one of them, as in {path / splits[0]}"
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield from _saved_dataset(path)
        return
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    if not files:
        raise DataError(f"{path}: a directory without a file that ends in one of {', '.join(SUFFIXES)}")
    for file in files:
        yield from _file(file)


def _json_lines(path: Path) -> Iterator[Row]:
    # utf-8-sig: files from Windows editors begin with a byte-order mark, which JSON does not know.
    with open(path, encoding="utf-8-sig") as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: is not UTF-8 ({error}); convert it first") from None
            source = f"{path}:{number}"
            if not line.strip():
                continue  # a blank line holds no sample: most often it is the last one
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                hint = " (a file that is one JSON array must be rewritten as one object a line)" if number == 1 else ""
                raise DataError(f"{source}: broken JSON at column {error.colno}: {error.msg}{hint}") from None
            if not isinstance(values, dict):
                raise DataError(f"{source}: expected a JSON object a line, got {type(values).__name__}")
            yield Row(values, source)


def _parquet(path: Path) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{path}: reading Parquet needs pyarrow; install it with `pip install d9d_lora[data]`")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path}:row {number}")
    except pa.ArrowException as error:
        raise DataError(f"{path}: is not a readable Parquet file: {error}") from None


def _saved_dataset(path: Path) -> Iterator[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{path}: was written by `datasets.save_to_disk`, and the package datasets is not installed; install it, "
            "or write the rows as JSON lines (`dataset.to_json(...)`) or Parquet"
        )
    from datasets import load_from_disk

    for number, values in enumerate(load_from_disk(str(path)), start=1):
        yield Row(dict(values), f"{path}:row {number}")


def detect_format(row: Row) -> Format:
    """The one format whose columns a row has."""
    fits = [name for name, columns in COLUMNS.items() if all(column in row.values for column in columns)]
    if len(fits) == 1:
        return fits[0]
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in COLUMNS.items())
    raise DataError(
        f"{row.source}: cannot tell the format from the columns {', '.join(row.values) or '(none)'} "
        f"({'several' if fits else 'none'} of these fit: {known}); set data.format, or rename the columns"
    )


def check_columns(row: Row, format: Format, ignored: list[str]) -> None:
    """Raise a DataError unless the row has the columns of the format, of the right kind, and no unknown ones."""
    wanted = COLUMNS[format]
    missing = [name for name in wanted if row.values.get(name) is None]
    if missing:
        raise DataError(
            f"{row.source}: format {format} needs {' and '.join(wanted)}; missing: {', '.join(missing)}; "
            f"there are: {', '.join(row.values) or 'none'}"
        )
    unknown = [name for name in row.values if name not in wanted and name not in ignored]
    if unknown:
        raise DataError(
            f"{row.source}: unknown columns for format {format}: {', '.join(unknown)}; it uses {' and '.join(wanted)}. "
            f"If they are not needed, set data.ignore_columns=[{','.join(unknown)}]"
        )
    if format != "messages":
        wrong = [name for name in wanted if not isinstance(row.values[name], str)]
        if wrong:
            raise DataError(f"{row.source}: {wrong[0]} must be text, got {type(row.values[wrong[0]]).__name__}")
        return
    turns = row.values["messages"]
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, dict) and turn.get("role") for turn in turns)
    ):
        raise DataError(f"{row.source}: messages must be a list of turns such as {{'role': 'user', 'content': '...'}}")
