"""The run: check, train, prove, save. What is trained is made in `build.py`; the loss of a microbatch is `loss.py`.

One optimiser step, on every layout:

    loss of a microbatch = sum over its target tokens / target tokens of the whole global batch
    backward of each     no collective of the adapters; FSDP2 reduces what it shards with the last one
    ReplicatedSum        one all-reduce over tensor parallelism for the whole model, and one over data parallelism for what is whole there
    clip, AdamW          fp32

Nothing of a step depends on the layout: data, starts, masks and the random numbers of the base come from (seed, step, microbatch).
"""

import contextlib
import json
import math
import signal
import time
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from d9d_lora.measure import max_memory
from d9d_lora.placement import key_of
from d9d_lora.state.atomic import RanksFailed, decided, together, write_text
from d9d_lora.state.checkpoint import CheckpointError, CheckpointFailed, Checkpoints
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.train import model as models
from d9d_lora.train.batches import MicroBatch
from d9d_lora.train.build import Built, of_length
from d9d_lora.train.checks import Coverage, check_replicas
from d9d_lora.train.config import RunConfig
from d9d_lora.train.exports import write_exports
from d9d_lora.train.inputs import Inputs
from d9d_lora.train.loss import Loss, summary, wide
from d9d_lora.train.optim import adamw, clip_, learning_rate, optimiser_state, set_learning_rate
from d9d_lora.train.packing import check_packing
from d9d_lora.train.pipeline import Alone, Pipeline
from d9d_lora.train.report import Tracker, show_census, size
from d9d_lora.train.saving import changes, expect_same_run, identity, plain, writer_of
from d9d_lora.train.stages import Split
from d9d_lora.train.start import Start, outline_of, with_method
from d9d_lora.train.survey import survey
from d9d_lora.train.world import World
from d9d_lora.walk import adapted_layers

REQUEUE = 75  # the exit code of a run that was told to stop and saved: EX_TEMPFAIL, "try again"
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
        self.config = config = config.model_copy(update={"peft": self.peft})
        self.built = Built(config, world, self.dtype, start=self.start, own=self.own_method)
        self.method = self.built.method
        self.output = config.output_dir
        self.tracker = Tracker(self.output if world.is_first else None, config.tracker, config.train.steps)
        self.inputs = Inputs(config, world)
        self.batches = self.inputs.batches
        self.tracker.say("\n".join(self.inputs.told))
        self.checkpoints = Checkpoints(self.output / "checkpoints", keep=config.checkpoint.keep)
        self.found = self.checkpoints.find(config.checkpoint.resume)
        self._build()
        self._identity = identity(config, self.batches, self.dtype, self.start, self.built.base.directory)
        self.optimiser = adamw(self.params, config.optim, self.built.trained_names)
        self.step, self.consumed, self.best = 0, 0, math.inf
        self._told = self._stop = False  # this process has been signalled; some process has

    # -- building ------------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """[the data's way through the house] outline, table, memory, weights, starts; then the stages meet."""
        built = self.built
        if self.found is not None:
            self.method.adopt(self.found.document.get("method", {}))
        elif self.method.surveys and self.start is None:
            began = time.monotonic()
            survey(built, self.batches)
            self.tracker.say(f"survey of the data: {time.monotonic() - began:.1f} s")
        built.outline()
        if self.world.is_first:
            show_census(built.census, built.passed_over)
        report = built.fill(resume=self.found is not None)
        if report:
            self.tracker.say(
                f"base: {report.tensors} tensors, {size(report.bytes_read)} read by this rank in {report.seconds:.1f} s, {self.dtype}, "
                f"{size(models.bytes_held(built.model))} held"
            )
        built.collect()
        self.model, self.params = built.model, built.params
        self.loss = Loss(built, self.inputs.pad_id)
        if built.split is not None:
            self._connect(built.split)
        if built.context is not None:
            self.tracker.say(f"rows are shared by {self.world.parallel.cp} ranks: {built.context.kind} attention ({built.context.why})")

    def _connect(self, split: Split) -> None:
        """After memory and starts: factors that all stages share begin alike, also where no layer uses them; the stages meet."""
        assert self.world.mesh is not None
        used = {id(f) for la in adapted_layers(self.model) for f in la.shared.values()}
        for factor in split.shared():
            if id(factor) not in used:
                factor.reset_parameters()
        self.pipeline = Pipeline(
            split, self.world.parallel, self.world.mesh, self.world.device, begin=self._begin, score=self.loss, around=self.loss.autocast
        )
        self.method.across(self.model, self.pipeline.group)

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
        if self.built.context is not None:
            self.built.context.check(vocab_size=len(self.inputs.tokenizer), device=self.world.device, packed=self.config.data.packing)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._told_to_stop)
        check_replicas(self.params, "at the start", self.world.device)
        if self.start is not None and self.found is None:
            self.start.prove(self.model, self.built.whole())
        before = self.evaluate() if self.inputs.held_out else {}
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
            if self.inputs.held_out and (last or (loop.eval_every and self.step % loop.eval_every == 0)):
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
            "trained": self.built.census["trained"],
        }

    def train_step(self, coverage: Coverage | None = None) -> dict[str, float]:
        """One optimiser step over this rank's microbatches; returns its metrics."""
        config, device = self.config, self.world.device
        began = time.monotonic()
        self.model.train()
        micro = [b.to(device) for b in self.batches.step(self.consumed)]
        here = [sum(b.target_tokens for b in micro), sum(b.tokens for b in micro), self._told]
        targets, tokens, told = self.world.sum_over_dp(torch.tensor(here, **wide(device))).tolist()
        self._stop = told > 0  # every rank learns of a signal in the same step
        rate = learning_rate(config.optim, self.step, config.train.steps)
        set_learning_rate(self.optimiser, rate)
        total = self._forward_backward(micro, targets) if self.built.split is None else self.pipeline.train(micro, targets)
        self.built.sum.reduce()
        if self.built.split is not None:
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
        total = torch.zeros((), **wide(self.world.device))
        for i, batch in enumerate(micro):
            self.built.begin_microbatch(last=i == len(micro) - 1)
            self._begin(batch)
            with contextlib.nullcontext() if self.built.context is None else self.built.context.running():
                loss, _, _ = self.loss(batch)
                loss = loss / targets
                total += loss.detach()
                loss.backward()
        return total

    def _begin(self, batch: MicroBatch, stage: int = 0) -> None:
        """Before a forward: the time of the masks, and the seed of the base's own dropout, which alone is another on each stage, and for
        other tokens of the same rows."""
        other = [f"part {self.built.context.part}"] if self.built.context is not None else [stage] if stage else []
        torch.manual_seed(key_of(self.config.train.seed, "ambient", self.step, batch.index, *other))
        for clock in self.built.clocks:
            clock.set(self.step, batch.index)

    def _clip(self) -> float:
        if self.built.split is None:
            return clip_(self.params.values(), self.config.optim.clip)
        return clip_(self.params.values(), self.config.optim.clip, counted=self.pipeline.counted, total=self.pipeline.total)

    def _check_packing(self) -> None:
        """Each stage by itself, where there are stages: what none of them mixes, the model does not."""
        seen: list[Any] = [self.model] if self.built.split is None else [Alone(self.pipeline, s) for s in self.built.split.here]

        def look() -> None:
            with contextlib.nullcontext() if self.built.context is None else self.built.context.off():
                for model in seen:
                    check_packing(model, vocab_size=len(self.inputs.tokenizer), device=self.world.device)

        try:
            look() if self.built.split is None else together("looking whether packed documents stay apart", look)
        except RanksFailed as error:
            raise ValueError(f"{type(self.model).__name__}, stage by stage: {error}") from error

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`summary` of the held-out rows."""
        self.model.eval()
        batches = self.inputs.evaluated()
        moved = (batch.to(self.world.device) for batch in batches)
        scores = map(self.loss, moved) if self.built.split is None else self.pipeline.evaluate(list(moved))
        return summary(batches, scores, self.built)

    # -- saving and resuming -----------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"model.{n}": p.detach() for n, p in self.params.items()}
        method = {f"method.{n}": t for n, t in self.method.state(self.model).items()}
        return weights | optimiser_state(self.params, self.optimiser) | method

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
        best_loss = None if self.best == math.inf else self.best
        document = {"consumed": self.consumed, "best": best_loss, "identity": self._identity, "optim": plain(self.config.optim)}
        document["method"] = self.method.findings()
        wait = last or self._stop or not self.config.checkpoint.asynchronous
        try:
            extras = {"adapter": writer_of(self.built, self.peft)}
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
        expect_same_run(found, self._identity)
        found.load(self._tensors())
        self.method.restore(self.model)
        self.step, self.consumed = found.step, found.document["consumed"]
        self.best = math.inf if found.document["best"] is None else found.document["best"]
        self.tracker.rewind(self.step)
        for key, (was, now) in changes(found.document["optim"], plain(self.config.optim)).items():
            self.tracker.say(f"optim.{key} was {was} until here and is {now} from here on")
        began = f"; it began with {self.start.path}, which is not read again" if self.start else ""
        self.tracker.say(f"resumed from {found.path} at step {self.step}{began}")

    def _begin_with(self, start: Start) -> None:
        """Puts the file's numbers in the place of the method's starts."""
        report, own = start.fill(self.model, self.built.whole()), ", which says what is trained" if self.own_method else ""
        self.tracker.say(f"adapter: starts from {start.path}{own}: {report.tensors} tensors, {size(report.bytes_read)} read by this rank")

    def _export(self) -> None:
        """The adapter on its own, read back and compared with the live model before the run says it is done."""
        writer_of(self.built, self.peft)(self.output / "adapter")
        self.tracker.say(f"adapter: {self.output / 'adapter'} (read back and equal to the live model)")
        for line in write_exports(self.config.export, self.output / "adapter", self.output / "export", self.built.base.directory):
            self.tracker.say(f"export: {line}")
        if self.world.is_first:
            write_text(self.output / "census.json", json.dumps(self.built.census, indent=1))

    def _told_to_stop(self, number: int, frame: object) -> None:
        self._told = True
