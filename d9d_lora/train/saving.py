"""What a run leaves and what a resumed one must share with it: its identity, and the files of its adapter."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from d9d_lora.state.atomic import decided
from d9d_lora.state.checkpoint import CheckpointError, Found
from d9d_lora.state.native_format import trained_writer
from d9d_lora.state.peft_save import adapter_writer
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.train.batches import Batches
from d9d_lora.train.build import Built
from d9d_lora.train.config import RunConfig
from d9d_lora.train.start import Start


def identity(config: RunConfig, batches: Batches, dtype: torch.dtype, start: Start | None, base: Path | None) -> dict[str, Any]:
    """What a resumed run must share with the run it continues, as JSON; layout and length of the run are free. Collective.

    `base`: the directory of the base's weights.
    """
    assert config.peft is not None
    return {
        "peft": plain(config.peft),
        "base": decided("fingerprinting the base", lambda: fingerprint(base)),
        "data": batches.fingerprint,
        "batch_size": config.data.batch_size,
        "seed": config.train.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "adapter": start and start.digest,
        "quantise": config.model.quantise and [config.model.quantise, config.model.quantise_modules],
    }


def expect_same_run(found: Found, ours: dict[str, Any]) -> None:
    """Raises CheckpointError with each difference between a checkpoint's identity and ours."""
    theirs = found.document["identity"]
    differences = [f"{k}: the checkpoint has {theirs.get(k)!r}, this run {ours[k]!r}" for k in ours if theirs.get(k) != ours[k]]
    if differences:
        raise CheckpointError(
            f"{found.path} belongs to another run:\n  " + "\n  ".join(differences) + "\nResume with the config it was made with, "
            "choose another output_dir, or start anew with checkpoint.resume=never"
        )


def writer_of(built: Built, peft: BaseModel) -> Callable[[Path], None]:
    """Copies the adapter, and gives what writes it: PEFT's directory where PEFT has the method, else our own; either is read back
    and compared with the copy before it counts. Collective, both."""
    if built.held:
        with built.whole():
            return adapter_writer(built.model, base=built.config.model.path)
    return trained_writer(built.method.compact(built.model, dict(built.params)), peft)


def plain(config: BaseModel) -> dict[str, Any]:
    """A config as JSON has it."""
    fields: dict[str, Any] = json.loads(config.model_dump_json())
    return fields


def changes(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {k: (was.get(k), v) for k, v in now.items() if was.get(k) != v}


def fingerprint(directory: Path | None) -> str:
    """A short name for the weights of a directory: names, shapes, dtypes, and 4 KiB from the middle of every file."""
    if directory is None:
        return "none"
    digest = hashlib.sha256()
    with open_checkpoint(directory) as files:
        for name in files.names():
            digest.update(f"{name} {files.shape(name)} {files.dtype(name)}\n".encode())
        for file in sorted(files.files()):
            with file.open("rb") as stream:
                stream.seek(file.stat().st_size // 2)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:32]
