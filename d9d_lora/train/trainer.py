"""The trainer, in one sitting: build, check, train, prove, save. It knows methods by their interface only.

One optimiser step, on every layout:

    loss of a microbatch = sum over its target tokens / target tokens of the whole global batch
    backward of each     no collective of the adapters; FSDP2 reduces what it shards with the last one
    ReplicatedSum        one all-reduce over tensor parallelism for the whole model, and one over data parallelism for what is whole there
    clip, AdamW          fp32

Nothing of a step depends on the layout: data, starts, masks and the random numbers of the base come from (seed, step, microbatch).
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from d9d_lora.context import ContextParallel
from d9d_lora.dropout import Share
from d9d_lora.init.data import Step
from d9d_lora.inject import inject_peft_and_freeze
from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.stacked import Stacked
from d9d_lora.method import PeftMethod
from d9d_lora.mixture import stacks
from d9d_lora.placement import ReplicatedSum, at_least_fp32, is_of_own_experts, key_of
from d9d_lora.registry import peft_method_from_config
from d9d_lora.share_experts import share_experts
from d9d_lora.state.atomic import RanksFailed, decided, together, write_text
from d9d_lora.state.checkpoint import CheckpointError, CheckpointFailed, Checkpoints
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperParallel
from d9d_lora.state.names import clean
from d9d_lora.state.native_format import trained_writer
from d9d_lora.state.peft_format import AdapterError, adapter_writer, holds_all
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.styles import take_column_path
from d9d_lora.tokens import IGNORE, lengthened
from d9d_lora.train import model as models
from d9d_lora.train.batches import ROWS_OF, Batches, MicroBatch, shift_labels, sweep
from d9d_lora.train.checks import Coverage, check_replicas
from d9d_lora.train.config import RunConfig
from d9d_lora.train.data import load_data, show_samples
from d9d_lora.train.exports import check_exports, write_exports
from d9d_lora.train.optim import adamw, clip_, learning_rate, optimiser_state, set_learning_rate
from d9d_lora.train.packing import check_packing
from d9d_lora.train.pipeline import Alone, Pipeline, check_microbatches, stages_here
from d9d_lora.train.replicated import choose, is_over_data
from d9d_lora.train.report import Tracker, census, show_census, size
from d9d_lora.train.stages import Split, check_pieces
from d9d_lora.train.start import Start, outline_of, with_method
from d9d_lora.train.world import GRADIENT_AXES, World
from d9d_lora.walk import adapted_layers, clock_of

REQUEUE = 75  # the exit code of a run that was told to stop and saved: EX_TEMPFAIL, "try again"
SURVEYED = 32  # steps of data that a start from data may look at; it ends earlier when its directions have settled
COVERED_AFTER = 2  # a zero factor wakes its partner: after two steps every factor must have had a gradient


class Stopped(SystemExit):
    """The run was told to stop (SIGTERM, SIGUSR1), saved, and can be resumed."""

    def __init__(self) -> None:
        super().__init__(REQUEUE)


class Trainer:
    """Everything of one run. `Trainer(config, world).run()`."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.world = world
        torch.manual_seed(config.train.seed)
        self.dtype = decided("choosing the dtype", lambda: models.choose_dtype(config.model.dtype, world.device))
        self.start, self.own_method = Start(config.model) if config.model.adapter else None, config.peft is None
        if self.own_method:
            config = with_method(config, self.start, outline_of(config.model, self.dtype))
        self.peft: BaseModel = of_length(config.peft, config.train.steps)
        self.config = config.model_copy(update={"peft": self.peft})
        self.output = config.output_dir
        self.tracker = Tracker(self.output if world.is_first else None, config.tracker, config.train.steps)
        self.tokenizer = self._tokenizer()
        self._open_data()
        self.checkpoints = Checkpoints(self.output / "checkpoints", keep=config.checkpoint.keep)
        self.found = self.checkpoints.find(config.checkpoint.resume)
        self._build()
        self.optimiser = adamw(self.params, config.optim, self.trained_names)
        self.step, self.consumed, self.best = 0, 0, math.inf
        self._told = self._stop = False  # this process has been signalled; some process has

    # -- building ------------------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        source = self.config.model.tokenizer or self.config.model.path
        if source is None:
            raise ValueError("model.tokenizer: a model from a callable needs to be told where its tokenizer is")
        return AutoTokenizer.from_pretrained(models.local_directory(source))

    def _open_data(self) -> None:
        data, loop, world = self.config.data, self.config.train, self.world
        loaded = load_data(data, self.tokenizer, seed=loop.seed)
        self.held_out = loaded.eval
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self.pad_id: int = pad or 0
        self.batches = Batches(
            loaded.train,
            batch_size=data.batch_size,
            micro_batch_size=data.micro_batch_size,
            seq_len=data.seq_len,
            pad_id=self.pad_id,
            seed=loop.seed,
            packing=data.packing,
            dp_rank=world.dp_rank,
            dp_size=world.dp_size,
        )
        self.tracker.say(f"data: {loaded.report}")
        if self.held_out:
            self.tracker.say(f"held out: {len(self.held_out):,} samples")
        self.tracker.say(f"as it is trained: {show_samples(loaded.train, self.tokenizer, 1)}")

    def _build(self) -> None:
        """[the data's way through the house] meta, tensor parallel, inject, table, FSDP2, memory, weights, starts."""
        config, world = self.config, self.world
        self.method: PeftMethod = peft_method_from_config(self._seeded(config.peft))
        if self.found is not None:
            self.method.adopt(self.found.document.get("method", {}))
        elif self.method.surveys and self.start is None:
            self._survey()
        mapper = self._outline()
        if world.is_first:
            show_census(self.census, self.passed_over)
        models.materialise(self.base, world.device)
        report = models.load(self.base, mapper, config.model, self.split)
        if report:
            self.tracker.say(
                f"base: {report.tensors} tensors, {size(report.bytes_read)} read by this rank in {report.seconds:.1f} s, {self.dtype}, "
                f"{size(models.bytes_held(self.model))} held"
            )
        self.method.initialise(self.model, resume=self.found is not None)
        self._collect()
        if self.split is not None:
            self._connect(self.split)
        if self.context is not None:
            self.tracker.say(f"rows are shared by {world.parallel.cp} ranks: {self.context.kind} attention ({self.context.why})")

    def _outline(self) -> ModelStateMapper:
        """The model with its adapters, sharded, and its table; on meta, unless a callable made it. `plan/` rehearses on the same."""
        config, world = self.config, self.world
        torch.manual_seed(config.train.seed)
        self.base = models.open_model(config.model, self.dtype)
        self.model: nn.Module = self.base.module
        if world.parallel.pp > 1:
            check_pieces(self.model)
            check_microbatches(world.parallel, *self._microbatches())
        if world.parallel.cp > 1 and world.parallel.sequence_parallel and stacks(self.model):
            raise ValueError("parallel.cp and sequence_parallel: not proven together for models with experts; give sequence_parallel=false")
        if world.parallel.tp > 1:
            assert world.mesh is not None
            models.apply_tensor_parallel(self.base, world.mesh["tp"], sequence=world.parallel.sequence_parallel)
        self._share_experts(self.model)
        if self.start is not None:
            self.start.check(self.method, self.model, own=self.own_method)
        result_of = _Remember(self.method)
        mapper = inject_peft_and_freeze(result_of, self.model)  # type: ignore[arg-type]
        self.held = holds_all(self.model)
        if not self.held and any(layer.delta.moves_base for layer in adapted_layers(self.model)):
            raise ValueError(
                "peft: a start that moves the base weight (pissa, olora, corda) is saved as a PEFT directory, which does not hold every "
                "method or layer of this config; choose another init_lora_weights"
            )
        check_exports(config.export, self.model, self.base.directory, held=self.held)
        whole = self._in_fp32()
        self.autocast = whole and self.dtype == torch.bfloat16
        self.choice = choose(self.model, world.parallel)
        self.census, self.passed_over = census(self.model, world.parallel.shards, self.choice), result_of.passed_over
        if world.parallel.sequence_parallel:
            lost = [la.name for la in adapted_layers(self.model) if la.placing.mesh is None]
            if lost:
                raise ValueError(f"parallel.sequence_parallel: {lost[:4]} are not in the model's plan, so their gradients would be partial")
            self._check_rows_of_experts()
            take_column_path(self.model, world.parallel.column_path(recomputed=config.train.activation_checkpointing))
        self.trained_names = [clean(n) for n, p in self.model.named_parameters() if p.requires_grad]
        if not self.trained_names:
            raise ValueError("nothing would be trained: the targets match, but every one has r = 0; give at least one layer a rank")
        self.split = self._cut() if world.parallel.pp > 1 else None
        self.context = self._share_rows() if world.parallel.cp > 1 else None
        if config.train.activation_checkpointing:
            models.recompute(self.model, clock_of(self.model) if self.split else None)
        if config.train.compile:
            for _, block in models.blocks_of(self.model):
                block.compile(backend=config.train.compile_backend)
        if world.mesh is not None:
            models.apply_data_parallel(self.model, world.mesh, world.parallel, self.choice.params, same_experts=world.same_experts)
        self.groups = {"data": world.dp_group(), "both": world.group_over(*GRADIENT_AXES, "tp")}
        self.groups |= {"experts": world.expert_group(), "experts_both": world.expert_group("tp")}
        return mapper

    def _check_rows_of_experts(self) -> None:
        """Tokens of padding that one process has not come between the rows of experts, and would move their masks."""
        tp, seq_len = self.world.parallel.tp, self.config.data.seq_len
        padded = seq_len % tp or (ROWS_OF % tp and not self.config.data.packing)
        if padded and any(isinstance(la, Stacked) and la.dropout.p for la in adapted_layers(self.model)):
            mend = f"a data.seq_len that is a multiple of {tp}" if seq_len % tp else f"a parallel.tp that divides {ROWS_OF}"
            raise ValueError(
                f"dropout on adapted experts with parallel.sequence_parallel: rows are padded to a multiple of {tp} tokens, and masks "
                f"would not be those of one process; give {mend}, or set dropout to 0"
            )

    def _collect(self) -> None:
        """What a step needs to know of the model."""
        self.params = {clean(n): p for n, p in sorted(self.model.named_parameters(), key=lambda x: clean(x[0])) if p.requires_grad}
        # Found by where they lie, and not by what was chosen: what FSDP2 does not manage, nobody else would add.
        groups = {p: self.groups["experts" if is_of_own_experts(p) else "data"] for p in self.params.values()}
        whole = [p for p, group in groups.items() if group is not None and not is_over_data(p)]
        self.sum = ReplicatedSum(adapted_layers(self.model), in_parts=self._thawed_parts(), over_data=whole, **self.groups)
        self.cuts_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters and not _drops_at_head(self.model)
        self.fsdp = list(models.fsdp_modules(self.model))
        self.clocks = {id(c): c for la in adapted_layers(self.model) if (c := la.dropout.clock) is not None}.values()

    def _share_experts(self, module: nn.Module) -> None:
        """Losses are parts of one global mean, so gradients of experts are sums, as all others are."""
        if self.world.experts is not None:
            share_experts(module, self.world.experts["ep"], average=False)

    def _microbatches(self) -> tuple[int, int]:
        """(microbatches of a step on each rank, rows of the global batch in one on every rank)."""
        unit = self.config.data.micro_batch_size * self.world.dp_size
        return self.config.data.batch_size // unit, unit

    def _cut(self) -> Split:
        """Puts aside what other pipeline stages hold."""
        parallel = self.world.parallel
        split = Split(self.model, parallel.stages, stages_here(parallel, self.world.pp_rank))
        self.census["bytes_here"] = census(self.model, parallel.shards, self.choice)["bytes_here"]
        return split

    def _share_rows(self) -> ContextParallel:
        """Attention becomes one over the tokens of all context-parallel ranks."""
        parallel, mesh = self.world.parallel, self.world.mesh
        assert mesh is not None
        multiple = parallel.tp if parallel.sequence_parallel else 1
        context = ContextParallel(mesh["cp"], parallel.cp_attention, multiple=multiple)
        context.prepare(self.model)
        return context

    def _connect(self, split: Split) -> None:
        """After memory and starts: factors that all stages share begin alike, also where no layer uses them; the stages meet."""
        assert self.world.mesh is not None
        used = {id(f) for la in adapted_layers(self.model) for f in la.shared.values()}
        for factor in split.shared():
            if id(factor) not in used:
                factor.reset_parameters()
        self.pipeline = Pipeline(
            split, self.world.parallel, self.world.mesh, self.world.device, begin=self._begin, score=self.loss, around=self._autocast
        )
        self.method.across(self.model, self.pipeline.group)

    def _survey(self) -> None:
        """Runs the bare model over a few steps of the trainer's own data, for starts that follow from it; then lets it go.

        The base is read twice for it, but ranks are known before the injection, as the table of what is trained must tell them.
        """
        config, world = self.config, self.world
        began = time.monotonic()
        torch.manual_seed(config.train.seed)
        if world.parallel.pp > 1:
            raise ValueError(
                "peft: a start from data (eva, corda) looks at the whole model at once, which no rank of a pipeline holds; begin with "
                "parallel.pp=1 and save a checkpoint, which resumes with any pp, or choose another init_lora_weights"
            )
        if world.parallel.ep > 1:
            raise ValueError(
                "peft: a start from data (eva, corda) with parallel.ep is not proven; begin with parallel.ep=1 and save a checkpoint, "
                "which resumes with any ep, or choose another init_lora_weights"
            )
        base = models.open_model(config.model, self.dtype)
        module = base.module.requires_grad_(False)
        if world.parallel.tp > 1:
            assert world.mesh is not None
            models.apply_tensor_parallel(base, world.mesh["tp"], sequence=world.parallel.sequence_parallel)
            module.requires_grad_(False)
        if world.mesh is not None:
            models.apply_data_parallel(module, world.mesh, world.parallel)
        models.materialise(base, world.device)
        models.load(base, ModelStateMapperParallel([]), config.model)

        def steps() -> Iterator[Step]:
            for step in range(SURVEYED):
                micro = self.batches.step(step * config.data.batch_size)
                for i, batch in enumerate(micro):
                    batch = batch.to(world.device)
                    inputs = models.accepted(module, batch.inputs())
                    last = i == len(micro) - 1
                    yield Step(lambda inputs=inputs: module(**inputs), batch.filled, batch.labels != IGNORE, last)  # type: ignore[misc]

        # The bare model takes whole rows, also where training shares them: without gradients nothing is kept.
        self.method.survey(module, steps(), group=world.group_over("dp_replicate", "dp_shard"))
        self.tracker.say(f"survey of the data: {time.monotonic() - began:.1f} s")

    def _seeded(self, peft: Any) -> Any:
        """The starts follow train.seed, unless the method's config sets a seed of its own."""
        if hasattr(peft, "methods"):
            return peft.model_copy(update={"methods": [self._seeded(m) for m in peft.methods]})
        if "seed" in type(peft).model_fields and "seed" not in peft.model_fields_set:
            return peft.model_copy(update={"seed": self.config.train.seed})
        return peft

    def _in_fp32(self) -> bool:
        """Parameters trained whole are trained in fp32, as factors are; returns whether there are any."""
        layers = list(adapted_layers(self.model))
        factors = {id(p) for la in layers for p in [*la.factors().values(), *(f.weight for f in la.shared.values())]}
        widened: dict[int, nn.Parameter] = {}  # `p.data = ...` would do nothing on a DTensor, so parameters are replaced; ties hold
        for m in self.model.modules():
            for name, p in m.named_parameters(recurse=False, remove_duplicate=False):
                if p.requires_grad and id(p) not in factors:
                    widened.setdefault(id(p), nn.Parameter(at_least_fp32(p.detach())))
                    m.register_parameter(name, widened[id(p)])
        return bool(widened)

    def _thawed_parts(self) -> list[tuple[nn.Module, str, Any]]:
        if self.world.parallel.tp == 1 or self.world.mesh is None:
            return []
        mesh, here = self.world.mesh["tp"], set(self.model.modules())
        return [(m, leaf, mesh) for m, leaf in self.base.in_parts if m in here and m.get_parameter(leaf).requires_grad]

    # -- the run ---------------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains to the last step, and returns what a summary needs. Resumes by itself, as the config says."""
        try:
            return self._run()
        except BaseException:
            with contextlib.suppress(Exception):  # a save that is under way is worth keeping; what goes wrong there is not the news
                self.checkpoints.wait()
            raise

    def _run(self) -> dict[str, Any]:
        loop = self.config.train
        self._resume()
        if self.config.data.packing:  # not before: a resume completes the starts that move the base
            self._check_packing()
        if self.context is not None:
            self.context.check(vocab_size=len(self.tokenizer), device=self.world.device, packed=self.config.data.packing)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._told_to_stop)
        check_replicas(self.params, "at the start", self.world.device)
        if self.start is not None and self.found is None:
            self.start.prove(self.model, self._whole())
        before = self.evaluate() if self.held_out else {}
        if before:
            self.tracker.evaluation(self.step, before)
        first, began = self.step, time.monotonic()
        coverage = Coverage(self.params) if first + COVERED_AFTER <= loop.steps else None
        latest = before
        while self.step < loop.steps:
            values = self.train_step(coverage)
            self.tracker.step(self.step, values, show=self.step % loop.log_every == 0 or self.step == loop.steps)
            if coverage and self.step == first + COVERED_AFTER:
                coverage.check(COVERED_AFTER, self.world.device)
                coverage = None
            if self.step % loop.check_every == 0:
                check_replicas(self.params, f"at step {self.step}", self.world.device)
            last = self.step == loop.steps
            improved = False
            if self.held_out and (last or (loop.eval_every and self.step % loop.eval_every == 0)):
                latest = self.evaluate()
                self.tracker.evaluation(self.step, latest)
                improved, self.best = latest["loss"] < self.best, min(self.best, latest["loss"])
            every = self.config.checkpoint.every
            if last or self._stop or improved or (every and self.step % every == 0):
                self.save(best=improved)
            if self._stop and not last:
                self.tracker.say(f"told to stop: saved at step {self.step}; the same command resumes")
                self.tracker.close()
                raise Stopped
        seconds = time.monotonic() - began
        self._export()
        self.tracker.close()
        peak = max_memory(self.world.device)
        return {
            "before": before,
            "after": latest,
            "seconds": seconds,
            "steps": self.step - first,
            "peak_bytes": peak,
            "trained": self.census["trained"],
        }

    def train_step(self, coverage: Coverage | None = None) -> dict[str, float]:
        """One optimiser step over this rank's microbatches; returns its metrics."""
        config, device = self.config, self.world.device
        began = time.monotonic()
        self.model.train()
        micro = [b.to(device) for b in self.batches.step(self.consumed)]
        here = [sum(b.target_tokens for b in micro), sum(b.tokens for b in micro), self._told]
        targets, tokens, told = self.world.sum_over_dp(torch.tensor(here, **_wide(device))).tolist()
        self._stop = told > 0  # every rank learns of a signal in the same step
        rate = learning_rate(config.optim, self.step, config.train.steps)
        set_learning_rate(self.optimiser, rate)
        total = self._forward_backward(micro, targets) if self.split is None else self.pipeline.train(micro, targets)
        self.sum.reduce()
        if self.split is not None:
            self.pipeline.sum_shared()
        extra = self.method.add_extra_loss(self.model)
        if coverage:
            coverage.observe()
        norm = self._clip()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step + 1}: the gradient norm is {norm}; nothing was changed by this step. Lower optim.lr, use "
                "model.dtype=float32, or look at the samples of this step"
            )
        self.optimiser.step()
        self.step += 1
        self.consumed += config.data.batch_size
        self.method.after_step(self.model, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss_value = self.world.sum_over_dp(total, alike=("tp",)).item()
        seconds = time.monotonic() - began
        return {
            "loss": loss_value,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": tokens,
            "target_tokens": targets,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": max_memory(device),
            **({} if extra is None else {"extra_loss": float(extra)}),
        }

    def _forward_backward(self, micro: list[MicroBatch], targets: float) -> Tensor:
        """Gradients of a step's microbatches, one after another; the sum of their losses / targets."""
        total = torch.zeros((), **_wide(self.world.device))
        for i, batch in enumerate(micro):
            for m in self.fsdp:
                m.set_requires_gradient_sync(i == len(micro) - 1, recurse=False)
            self._begin(batch)
            with contextlib.nullcontext() if self.context is None else self.context.running():
                loss, _, _ = self.loss(batch)
                loss = loss / targets
                total += loss.detach()
                loss.backward()
        return total

    def _begin(self, batch: MicroBatch, stage: int = 0) -> None:
        """Before a forward: the time of the masks, and the seed of the base's own dropout, which alone is another on each stage, and for
        other tokens of the same rows."""
        other = [f"part {self.context.part}"] if self.context is not None else [stage] if stage else []
        torch.manual_seed(key_of(self.config.train.seed, "ambient", self.step, batch.index, *other))
        for clock in self.clocks:
            clock.set(self.step, batch.index)

    def _clip(self) -> float:
        if self.split is None:
            return clip_(self.params.values(), self.config.optim.clip)
        return clip_(self.params.values(), self.config.optim.clip, counted=self.pipeline.counted, total=self.pipeline.total)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.autocast)

    def _check_packing(self) -> None:
        """Each stage by itself, where there are stages: what none of them mixes, the model does not."""
        seen: list[Any] = [self.model] if self.split is None else [Alone(self.pipeline, s) for s in self.split.here]

        def look() -> None:
            with contextlib.nullcontext() if self.context is None else self.context.off():
                for model in seen:
                    check_packing(model, vocab_size=len(self.tokenizer), device=self.world.device)

        try:
            look() if self.split is None else together("looking whether packed documents stay apart", look)
        except RanksFailed as error:
            raise ValueError(f"{type(self.model).__name__}, stage by stage: {error}") from error

    def loss(self, batch: MicroBatch, forward: Callable[..., Any] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the losses of target tokens, number of rows answered exactly, number of rows with a target).

        `forward`: what makes logits of the inputs; the model, if not a stage of it.
        """
        inputs, targets = batch.inputs(), shift_labels(batch.labels)
        sequence = self.world.parallel.sequence_parallel
        if self.context is not None:
            inputs, targets = self.context.split(batch.input_ids, batch.position_ids, targets, packed=batch.packed, pad_id=self.pad_id)
        elif sequence:
            several, short = len(batch.input_ids), -batch.input_ids.shape[1] % self.world.parallel.tp
            for clock in self.clocks:
                clock.share = Share(batch=several, more=short) if short and several > 1 else Share()
            if short:
                ids, positions, packed = inputs["input_ids"], inputs["position_ids"], self.config.data.packing
                ids, positions, targets = lengthened(ids, positions, targets, short, packed=packed, pad_id=self.pad_id)
                inputs = {**inputs, "input_ids": ids, "position_ids": positions}
        if self.cuts_logits and not sequence:
            # Logits only where a row has a target: the head is the widest layer, and most positions teach nothing.
            keep = (targets != IGNORE).any(0).nonzero().squeeze(1)
            if 0 < len(keep) < targets.shape[1]:
                inputs, targets = {**inputs, "logits_to_keep": keep}, targets[:, keep]
        with self._autocast():
            output = (forward or self.model)(**models.accepted(self.model, inputs))
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        asked = targets != IGNORE
        rows = torch.stack([asked.sum(1), ((logits.argmax(-1) != targets) & asked).sum(1)])
        if self.context is not None and not self.model.training:
            self.context.sum(rows)  # a row is right where all its parts are
        right = (rows[0] > 0) & (rows[1] == 0)
        return loss, right.sum(), (rows[0] > 0).sum()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss a target token, perplexity, and the share of held-out rows answered exactly (teacher-forced greedy: every
        target token is the most likely one, which is what greedy decoding would produce)."""
        self.model.eval()
        device = self.world.device
        sums = torch.zeros(4, **_wide(device))
        data = self.config.data
        longest = max(len(e.input_ids) for e in self.held_out)
        batches = sweep(
            self.held_out,
            micro_batch_size=max(1, data.micro_batch_size * data.seq_len // longest),  # the tokens that training has room for
            seq_len=data.seq_len,
            pad_id=self.pad_id,
            dp_rank=self.world.dp_rank,
            dp_size=self.world.dp_size,
        )
        moved = (batch.to(device) for batch in batches)
        scores = map(self.loss, moved) if self.split is None else self.pipeline.evaluate(list(moved))
        for batch, (loss, right, asked) in zip(batches, scores):  # on the last stage alone, where there are stages
            here = torch.tensor(batch.target_tokens / self.world.parallel.cp, device=device)  # cp ranks have parts of a loss, and all rows
            sums += torch.stack([loss, here, right, asked]).to(sums)
        loss, tokens, right, asked = self.world.sum_over_dp(sums, alike=("tp",)).tolist()
        mean = loss / tokens
        return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "exact_match": right / asked}

    # -- saving and resuming -----------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"model.{n}": p.detach() for n, p in self.params.items()}
        method = {f"method.{n}": t for n, t in self.method.state(self.model).items()}
        return weights | optimiser_state(self.params, self.optimiser) | method

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues; layout and length of the run are free."""
        return {
            "peft": json.loads(self.peft.model_dump_json()),
            "base": self._fingerprint,
            "data": self.batches.fingerprint,
            "batch_size": self.config.data.batch_size,
            "seed": self.config.train.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "adapter": self.start and self.start.digest,
            "quantise": self.config.model.quantise and [self.config.model.quantise, self.config.model.quantise_modules],
        }

    def _optim(self) -> dict[str, Any]:
        return json.loads(self.config.optim.model_dump_json())

    @property
    def _fingerprint(self) -> str:
        if not hasattr(self, "_fingerprint_"):
            self._fingerprint_ = decided("fingerprinting the base", lambda: fingerprint(self.base.directory))
        return self._fingerprint_

    def save(self, *, best: bool = False) -> None:
        """A checkpoint, after a last look that replicas agree. A failed save is told, at the latest by the next one, and the run goes on.

        It is waited for at the end of the run and before a stop, and where the config says so.
        """
        last = self.step == self.config.train.steps
        try:
            self.checkpoints.wait()
        except CheckpointFailed as error:
            self.tracker.say(f"WARNING: {error}")
        check_replicas(self.params, f"at the save of step {self.step}", self.world.device)
        document = {"consumed": self.consumed, "best": self.best, "identity": self._identity(), "optim": self._optim()}
        document["method"] = self.method.findings()
        if document["best"] == math.inf:
            document["best"] = None
        wait = last or self._stop or not self.config.checkpoint.asynchronous
        try:
            extras = {"adapter": self._adapter_writer()}
            self.checkpoints.save(self.step, self._tensors(), document, extras=extras, best=best, wait=wait)
        except (CheckpointFailed, AdapterError, RanksFailed) as error:
            if last:
                raise
            self.tracker.say(f"WARNING: {error}")

    def _resume(self) -> None:
        found = self.found
        if found is None:
            self.tracker.rewind(-1)
            if self.start is not None:
                self._begin_with(self.start)
            return
        if found.step > self.config.train.steps:
            raise CheckpointError(
                f"{found.path} is at step {found.step}, beyond train.steps={self.config.train.steps}: there is nothing left to train. "
                "Raise train.steps, or resume from an earlier checkpoint by its path"
            )
        theirs, ours = found.document["identity"], self._identity()
        differences = [f"{k}: the checkpoint has {theirs.get(k)!r}, this run {ours[k]!r}" for k in ours if theirs.get(k) != ours[k]]
        if differences:
            raise CheckpointError(
                f"{found.path} belongs to another run:\n  " + "\n  ".join(differences) + "\nResume with the config it was made with, "
                "choose another output_dir, or start anew with checkpoint.resume=never"
            )
        found.load(self._tensors())
        self.method.restore(self.model)
        self.step, self.consumed = found.step, found.document["consumed"]
        self.best = math.inf if found.document["best"] is None else found.document["best"]
        self.tracker.rewind(self.step)
        for key, (was, now) in _changes(found.document["optim"], self._optim()).items():
            self.tracker.say(f"optim.{key} was {was} until here and is {now} from here on")
        began = "" if self.start is None else f"; it began with {self.start.path}, which is not read again"
        self.tracker.say(f"resumed from {found.path} at step {self.step}{began}")

    def _begin_with(self, start: Start) -> None:
        """Puts the file's numbers in the place of the method's starts."""
        report = start.fill(self.model, self._whole())
        own = ", which says what is trained" if self.own_method else ""
        self.tracker.say(f"adapter: starts from {start.path}{own}: {report.tensors} tensors, {size(report.bytes_read)} read by this rank")

    def _whole(self) -> contextlib.AbstractContextManager[Any]:
        """The model with all its pieces, where this rank has some of them; those of others are on meta."""
        return contextlib.nullcontext() if self.split is None else self.split.whole()

    def _adapter_writer(self) -> Callable[[Path], None]:
        """Copies the adapter, and gives what writes it: PEFT's directory where PEFT has the method, else our own; either is read back
        and compared with the copy before it counts."""
        if self.held:
            with self._whole():
                return adapter_writer(self.model, base=self.config.model.path)
        return trained_writer(self.method.compact(self.model, dict(self.params)), self.peft)

    def _export(self) -> None:
        """The adapter on its own, read back and compared with the live model before the run says it is done."""
        self._adapter_writer()(self.output / "adapter")
        self.tracker.say(f"adapter: {self.output / 'adapter'} (read back and equal to the live model)")
        for line in write_exports(self.config.export, self.output / "adapter", self.output / "export", self.base.directory):
            self.tracker.say(f"export: {line}")
        if self.world.is_first:
            write_text(self.output / "census.json", json.dumps(self.census, indent=1))

    def _told_to_stop(self, number: int, frame: object) -> None:
        self._told = True


class _Remember:
    """Passes an injection through and keeps what its table should tell."""

    def __init__(self, method: PeftMethod) -> None:
        self._method = method
        self.passed_over: list[str] = []

    def inject(self, module: nn.Module) -> Any:
        result = self._method.inject(module)
        self.passed_over = result.passed_over
        return result


def _drops_at_head(model: Any) -> bool:
    """Whether an adapter on the output head drops: its masks number the rows it is given, so they would follow where logits are cut, and
    that is another place for tokens that ranks share."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return isinstance(head, AdaptedLayer) and head.dropout.p > 0


def of_length(peft: Any, steps: int) -> Any:
    """A method whose schedule is that of the run learns how long the run is; a resume with another length is then another run."""
    if hasattr(peft, "methods"):
        return peft.model_copy(update={"methods": [of_length(m, steps) for m in peft.methods]})
    return peft.of_length(steps) if hasattr(peft, "of_length") else peft


def _changes(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
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


def max_memory(device: torch.device) -> int:
    """Peak bytes of this process: of the accelerator, or resident on the CPU."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


def _wide(device: torch.device) -> dict[str, Any]:
    """Where sums are kept: float64, but for devices that have none."""
    return {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}

