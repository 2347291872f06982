"""What a run leaves for other programs: checked before the first step, written from the run's adapter after the last."""

from pathlib import Path

from torch import nn

from d9d_lora.export.profiles import PROFILES, ExportError, Job, check, export
from d9d_lora.export.sketch import sketch_of_model
from d9d_lora.state.atomic import RanksFailed, decided
from d9d_lora.train.config import ExportConfig


def check_exports(config: ExportConfig, model: nn.Module, base: Path | None, *, held: bool) -> None:
    """Raises `ExportError` if a consumer that the config names could not load what will be trained. Call it after the injection.

    Args:
        held: Whether the adapter will be written in PEFT's format, which exports start from.
    """
    if not config.profiles:
        return
    if not held:
        raise ExportError("export.profiles: PEFT's format does not hold this adapter, and exports start from it; leave the list empty")
    sketch = sketch_of_model(model).on(base)
    check({name: PROFILES[name].faults(sketch, config.rank) for name in config.profiles})


def write_exports(config: ExportConfig, adapter: Path, output: Path, base: Path | None) -> list[str]:
    """Writes every export into `output`, on rank 0; returns a line for each. Collective.

    Raises:
        ExportError: on every rank; the adapter itself is safe.
    """
    lines = []
    for name in config.profiles:
        job = Job(adapter, output / PROFILES[name].file, base, config.rank, replace=True)
        try:
            told = decided(f"the export for {name}", lambda name=name, job=job: export(name, job))  # type: ignore[misc]
        except RanksFailed as error:
            raise ExportError(f"{error}. The adapter is whole: {adapter}; export it again with launch/export.py") from error
        lines.append(f"{job.output}: {told}")
    return lines
