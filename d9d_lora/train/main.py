"""`torchrun --nproc-per-node N launch/train.py model.path=... data.path=...`: from the command line to a verified adapter."""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic_core import to_jsonable_python

from d9d_lora.state.atomic import gather, write_text
from d9d_lora.state.checkpoint import CheckpointError
from d9d_lora.state.safetensors_dir import CheckpointError as FileError
from d9d_lora.train.checks import AdapterFault
from d9d_lora.train.config import RunConfig, check_config
from d9d_lora.train.report import console, size, span
from d9d_lora.train.world import World, device_of, join, leave

KNOWN = (ValueError, TypeError, FileNotFoundError, CheckpointError, FileError, AdapterFault, FloatingPointError, OmegaConfBaseException)


def config_directory() -> str:
    """The clone's `configs/`, or the copy that the installed package carries."""
    here = Path(__file__).resolve()
    clone = here.parents[2] / "configs"
    return str(clone if (clone / "train.yaml").exists() else here.parents[1] / "configs")


@hydra.main(config_path=config_directory(), config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Composes, validates, trains. A fault of the user's ends with one sentence, not a traceback."""
    try:
        run(composed)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # all is saved: a signal while Python exits must not make it a failed run
    except KNOWN as error:
        if os.environ.get("D9D_LORA_TRACEBACK"):
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(2)  # rank 0 most often has the same to say; its exit then ends the others before they repeat it
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # not through the process group: its peers may be waiting in a collective that will never come


def run(composed: DictConfig) -> dict[str, object]:
    """One run from a composed config; returns the trainer's summary."""
    container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    assert isinstance(container, dict)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"these have no value: {', '.join(missing)}. Give them on the command line, as in {missing[0]}=...")
    config = check_config({k: v for k, v in container.items() if k != "hydra"})  # type: ignore[misc]
    device = device_of(config.train.device)
    world = join(device, config.parallel, config.train.timeout_s)
    try:
        claim_directory(config, world)
        from d9d_lora.train.trainer import Trainer  # here, so that a config fault is told before transformers is imported

        summary = Trainer(config, world).run()
        if world.is_first:
            tell(config, summary)
        return summary
    finally:
        if sys.exc_info()[0] in (None, SystemExit) or isinstance(sys.exc_info()[1], SystemExit):
            leave()


def claim_directory(config: RunConfig, world: World) -> None:
    """All ranks have one config; rank 0 makes the run directory and writes down what is run."""
    text = yaml.safe_dump(to_jsonable_python(config.model_dump(by_alias=True)), sort_keys=True)
    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) > 1:
        odd = [rank for rank, d in enumerate(digests) if d != digests[0]]
        raise ValueError(f"ranks {odd} have another config than rank 0; launch every node with the same command and the same files")
    if world.is_first:
        import torch

        config.output_dir.mkdir(parents=True, exist_ok=True)
        versions = f"# torch {torch.__version__}, {world.size} processes, layout {config.parallel.resolved(world.size)}\n"
        write_text(config.output_dir / "config.resolved.yaml", versions + f"# {' '.join(sys.argv)}\n" + text)


def tell(config: RunConfig, summary: dict[str, object]) -> None:
    before, after = summary["before"], summary["after"]
    if summary["steps"] and isinstance(after, dict) and isinstance(before, dict) and before and after:
        console.print(
            f"held out: loss {before['loss']:.4f} -> {after['loss']:.4f}, exact match {100 * before['exact_match']:.1f} % -> "
            f"{100 * after['exact_match']:.1f} %"
        )
    console.print(
        f"done: {summary['steps']} steps in {span(float(summary['seconds']))}, peak memory {size(float(summary['peak_bytes']))} "  # type: ignore[arg-type]
        f"on this rank; everything is in {config.output_dir}",
        highlight=False,
    )
