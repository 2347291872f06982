"""The config of a run. Hydra composes it from `configs/`, pydantic checks it once, here; nothing else reads YAML.

Every field says what it means where it is declared; `configs/` holds the same defaults as YAML for the command line.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from d9d_lora.context.model import Attention
from d9d_lora.layers.chooser import Choice, ColumnPath
from d9d_lora.registry import config_from, kinds, resolve
from d9d_lora.train.data import DataConfig


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ModelConfig(Strict):
    """The base model: a Hugging Face causal language model, or any callable that returns a module."""

    path: str | None = Field(None, description="a local directory of safetensors, or a hub id")
    target: str | None = Field(None, alias="_target_", description="a callable `package.module:name` that returns the module instead")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of that callable")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto",
        description="dtype of the frozen base; auto: bfloat16 where it is fast here, else float32 (no float16: losses are not scaled)",
    )
    attention: str = Field("sdpa", description="attention implementation of transformers: sdpa, eager, flash_attention_2")
    tokenizer: str | None = Field(None, description="where the tokenizer is, if not in `path`")
    adapter: str | None = Field(
        None,
        description="an adapter to start from: a PEFT directory, a .safetensors or .gguf file, or a directory of this trainer; `peft` says "
        "what it is once more, or nothing (peft=from_adapter). A checkpoint of the run goes first",
    )
    ignore_unexpected: list[str] = Field(
        default_factory=list, description="regular expressions for keys of the checkpoint that the model may lack"
    )
    quantise: Literal["nf4"] | None = Field(None, description="hold the frozen weights of linear layers in four bits (QLoRA)")
    quantise_modules: list[str] | str = Field(
        "all-linear", description='which: names, a regular expression, or "all-linear": every linear layer but the output head'
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is None and self.target is None:
            raise ValueError("give model.path (a directory or a hub id) or model._target_ (a callable that returns a module)")
        if self.quantise is None and "quantise_modules" in self.model_fields_set and self.quantise_modules != "all-linear":
            raise ValueError("quantise_modules goes with model.quantise, and would be ignored without it; add quantise: nf4")
        return self


Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"]
PIPELINE = {"schedule": "1f1b", "stages_per_rank": 1}


class ParallelConfig(Strict):
    """The layout. Degrees multiply to the number of processes."""

    pp: int = Field(1, ge=1, description="pipeline ranks: each holds some of the layers")
    schedule: Schedule = Field("1f1b", description="in what order a pipeline's ranks run their microbatches")
    stages_per_rank: int = Field(1, ge=1, description="stages on each pipeline rank; more than one with the schedules that interleave them")
    dp_replicate: int = Field(1, ge=1, description="replicas that hold all of the model (HSDP with dp_shard > 1)")
    dp_shard: int = Field(-1, ge=-1, description="FSDP2 shards; -1: what the other degrees leave")
    ep: int = Field(1, ge=1, description="of the dp_shard ranks, neighbours that hold different experts; divides dp_shard")
    cp: int = Field(1, ge=1, description="ranks that hold different tokens of the same rows")
    cp_attention: Attention = Field(
        "auto", description="how those tokens meet: ulysses (all-to-alls; cp divides the heads), gather (keys and values), ring (torch's)"
    )
    tp: int = Field(1, ge=1, description="tensor-parallel ranks")
    sequence_parallel: bool = Field(False, description="between layers, shard the tokens over the tensor-parallel ranks")
    adapters: Literal["auto", "shard", "replicate"] = Field(
        "auto", description="over data parallelism: sharded with their block, or whole on each rank and summed once a step; auto: by size"
    )
    column: Choice = Field(
        "auto",
        description="with sequence_parallel, the adapter's thin products of column-parallel layers: on the gathered tokens, in rank space "
        "(x is kept sharded), or as two collectives, by link_latency_us and link_gb_s, are worth it",
    )
    link_latency_us: float = Field(20.0, gt=0, description="microseconds of a small collective over the tensor-parallel ranks")
    link_gb_s: float = Field(100.0, gt=0, description="10^9 bytes a second that each of them sends")

    def resolved(self, world: int) -> "ParallelConfig":
        """With dp_shard a number, or an error that says which degrees would fit `world` processes."""
        if self.ep > 1:
            self._check_experts()
        others = self.pp * self.dp_replicate * self.cp * self.tp
        shard = world // others if self.dp_shard == -1 else self.dp_shard
        if self.dp_shard == 0 or others * shard != world:
            asked = {axis: getattr(self, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
            asked = {axis: n for axis, n in asked.items() if n > 1 or axis not in ("pp", "cp")}
            asked["dp_shard"] = self.dp_shard if self.dp_shard != -1 else "(the rest)"
            raise ValueError(
                f"parallel: {' x '.join(f'{axis} {n}' for axis, n in asked.items())} does not make the {world} processes of this run; "
                f"launch {others * max(self.dp_shard, 1)} processes, or choose degrees whose product is {world}"
            )
        if shard % self.ep:
            fits = [e for e in range(1, shard + 1) if shard % e == 0]
            raise ValueError(f"parallel.ep={self.ep} must divide dp_shard={shard}; degrees that do: {fits}")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tp > 1, and would be ignored without it")
        if not self.sequence_parallel and self.column == "rank_space":
            raise ValueError("parallel.column=rank_space keeps shards of tokens: give sequence_parallel=true with it, or column=auto")
        self._check_pipeline()
        self._check_context()
        return self.model_copy(update={"dp_shard": shard})

    def column_path(self, *, recomputed: bool) -> ColumnPath:
        return ColumnPath(self.column, self.link_latency_us * 1e-6, self.link_gb_s * 1e9, recomputed=recomputed)

    def shape(self, axes: Sequence[str]) -> tuple[int, ...]:
        """Degrees along axes of the mesh."""
        return tuple(getattr(self, axis) for axis in axes)

    @property
    def shards(self) -> int:
        """Parts that FSDP2 cuts a parameter into: ranks with other rows, and those with other tokens of the same rows."""
        return self.dp_shard * self.cp

    @property
    def stages(self) -> int:
        """Pipeline stages, over all ranks."""
        return self.pp * self.stages_per_rank

    def _check_experts(self) -> None:
        asked = f"parallel.ep={self.ep} with parallel."
        for axis, mend in (("cp", "cp=1"), ("sequence_parallel", "sequence_parallel=false")):
            if getattr(self, axis) > 1 or getattr(self, axis) is True:
                raise ValueError(f"{asked}{axis}: not proven yet; give {mend}")
        if self.dp_replicate > 1 and (beside := [axis for axis in ("tp", "pp") if getattr(self, axis) > 1]):
            raise ValueError(f"{asked}dp_replicate and {beside[0]}: not proven yet, all three; leave one of them 1")

    def _check_context(self) -> None:
        if self.cp == 1 and self.cp_attention != "auto":
            raise ValueError("parallel.cp_attention needs parallel.cp > 1, and would be ignored without it")
        if self.cp > 1 and self.pp > 1:
            raise ValueError("parallel.cp cannot go with parallel.pp yet: stages hand on whole rows; leave one of them 1")

    def _check_pipeline(self) -> None:
        name, several = self.schedule, self.stages_per_rank
        if self.pp == 1:
            if idle := [f for f, default in PIPELINE.items() if getattr(self, f) != default]:
                raise ValueError(f"parallel.{idle[0]} needs parallel.pp > 1, and would be ignored without it")
            return
        if self.sequence_parallel:
            raise ValueError("parallel.sequence_parallel cannot go with parallel.pp: stages hand on whole rows; leave it out")
        fits = {"interleaved_1f1b": several > 1, "zero_bubble": True, "zbv": several == 2}.get(name, several == 1)
        if not fits:
            wanted = {"interleaved_1f1b": "at least 2", "zbv": "exactly 2"}.get(name, "exactly 1")
            raise ValueError(f"parallel.schedule={name} needs {wanted} stages on each rank; got parallel.stages_per_rank={several}")


class OptimConfig(Strict):
    """AdamW, its schedule and the clip."""

    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    lora_plus_ratio: float | None = Field(None, gt=0, description="LoRA+: the learning rate of B over that of all else")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averages")
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="steps from 0 to the peak")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="from the peak to `final` x the peak")
    final: float = Field(0.0, ge=0, le=1, description="the last learning rate, as a part of the peak")
    clip: float | None = Field(1.0, gt=0, description="largest norm of all gradients together; null: no clip")


class LoopConfig(Strict):
    """The loop."""

    steps: int = Field(100, ge=1, description="optimiser steps in all, whatever was resumed")
    seed: int = Field(0, ge=0, description="of data order, starts and masks")
    device: str = Field("auto", description="cpu, cuda, ...; auto: the accelerator, if there is one")
    activation_checkpointing: bool = Field(False, description="recompute blocks in the backward instead of keeping activations")
    compile: bool = Field(False, description="torch.compile of each block")
    compile_backend: str = Field("inductor", description="backend of torch.compile")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: before the first and after the last step only")
    log_every: int = Field(1, ge=1, description="steps between lines of progress (metrics.jsonl has every step)")
    check_every: int = Field(50, ge=1, description="steps between comparisons of replicated factors across ranks")
    timeout_s: int = Field(600, ge=10, description="how long a collective may wait for a rank before the run is stopped")


class CheckpointConfig(Strict):
    """Checkpoints of adapter and optimiser."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: one at the end")
    keep: int = Field(3, ge=1, description="how many are kept; `latest` and `best` always are")
    resume: str = Field("auto", description="auto, never, must, or the path of a checkpoint")
    asynchronous: bool = Field(
        True, description="write while training goes on, from a copy in CPU memory; the next save and the end of the run wait for it"
    )


class TrackerConfig(Strict):
    """Beside metrics.jsonl, which is always written."""

    tensorboard: bool = Field(True, description="TensorBoard events in <output_dir>/tb")
    plot: bool = Field(True, description="the loss curve as <output_dir>/report.png")


class ExportConfig(Strict):
    """The adapter in the form that other programs load, beside PEFT's: written into <output_dir>/export at the end."""

    profiles: list[Literal["peft", "vllm", "sglang", "llamacpp", "mlx"]] = Field(
        default_factory=list, description="for whom; what one of them could not load is told before the first step"
    )
    rank: int | None = Field(
        None, ge=1, description="put the nearest product of this rank in the place of what is none (DoRA, LoHa) or has a higher rank"
    )


class RunConfig(Strict):
    """One run."""

    output_dir: Path = Field(Path("outputs/run"), description="one directory, whatever the number of ranks")
    model: ModelConfig
    data: DataConfig
    peft: Annotated[SerializeAsAny[BaseModel], BeforeValidator(config_from)] | None = Field(
        None, description="the method; null: that of model.adapter"
    )
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)  # type: ignore[arg-type]
    optim: OptimConfig = Field(default_factory=OptimConfig)  # type: ignore[arg-type]
    train: LoopConfig = Field(default_factory=LoopConfig)  # type: ignore[arg-type]
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)  # type: ignore[arg-type]
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)  # type: ignore[arg-type]
    export: ExportConfig = Field(default_factory=ExportConfig)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _has_a_method(self) -> Self:
        if self.peft is None and self.model.adapter is None:
            raise ValueError("peft: no method; give one (peft=lora), or an adapter to start from, which has its own (model.adapter=...)")
        return self

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        if self.train.compile and self.train.activation_checkpointing and self.parallel.tp > 1:
            raise ValueError(
                "train.compile with train.activation_checkpointing and parallel.tp: torch's compiler fails at blocks that are recomputed "
                "on tensor-parallel ranks once rows have different lengths; leave one of the three out"
            )
        if self.train.compile and self.train.activation_checkpointing and self.parallel.pp > 1:
            raise ValueError(
                "train.compile with train.activation_checkpointing and parallel.pp: what is recomputed sets the clock of its masks back, "
                "and torch's compiler has no way to do that; leave one of the three out"
            )
        return self

    @model_validator(mode="after")
    def _context(self) -> Self:
        if self.parallel.cp == 1:
            return self
        if self.model.attention != "sdpa" or self.model.path is None:
            raise ValueError("parallel.cp is for Hugging Face models by model.path with model.attention=sdpa, and shares that attention")
        if self.parallel.cp_attention == "ring" and self.data.packing:
            raise ValueError("parallel.cp_attention=ring keeps no packed documents apart; use ulysses, gather or auto")
        if self.train.compile:
            raise ValueError("train.compile with parallel.cp: blocks are compiled anew again and again, and given up; compile=false")
        return self

    @model_validator(mode="after")
    def _experts(self) -> Self:
        if self.train.compile and self.parallel.ep > 1:
            raise ValueError("train.compile with parallel.ep: how many rows travel is not known to a compiled block; leave one out")
        return self

    @model_validator(mode="after")
    def _column(self) -> Self:
        if self.train.compile and self.parallel.column == "rank_space":
            raise ValueError("parallel.column=rank_space: compiled blocks compute on gathered tokens; give compile=false, or column=auto")
        return self


class ConfigError(ValueError):
    """A config that cannot be run: every fault with its path, and the nearest valid key."""


def check_config(container: dict[str, Any], *, source: str = "the config") -> RunConfig:
    """Validates a composed config; all faults in one readable error.

    Raises:
        ConfigError: with a line for each fault: its path (`peft.params.r`), what came, what was expected.
    """
    try:
        return RunConfig.model_validate(container)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path = ".".join(str(p) for p in fault["loc"])
            line = f"{path or 'config'}: {fault['msg'].removeprefix('Value error, ')}"
            if fault["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(fault["loc"][-1]), _keys_at(fault["loc"][:-1], container), n=1)
                line = f"{path}: no such field" + (f"; did you mean {near[0]!r}?" if near else "")
            elif fault["type"] not in ("value_error", "missing"):
                line += f", got {fault['input']!r}"
            lines.append(f"  {line}")
        raise ConfigError(f"{source} has {len(lines)} fault(s):\n" + "\n".join(lines)) from None


def _keys_at(path: tuple[int | str, ...], node: Any) -> list[str]:
    """The fields that the config has at a path; a node with a `kind` has those of its kind."""
    model: Any = RunConfig
    step: Any
    for step in path:
        node = node[step] if isinstance(node, list | dict) else {}
        fields = getattr(model, "model_fields", {})
        model = fields[step].annotation if step in fields else None
        if isinstance(node, dict) and node.get("kind") in kinds():
            model = resolve(node["kind"])[0]
    return list(getattr(model, "model_fields", {}))
