"""One optimiser step over a pipeline: torch's schedules move hidden states, and everything else a rank knows by itself.

    wire        hidden [B, T, D], and their gradients; T is the longest row of the step
    stage       finds ids, positions and targets by the number of the microbatch: all stages read the same batches
    loss        on the last stage: sum over target tokens / target tokens of the whole global batch, so nothing is divided by stages
    after it    what all stages hold is summed over them; one norm over all stages

A microbatch is computed at its own length, whatever the wire's, at its own time of the dropout clock, whatever the schedule's order: so
masks and sums are those of one process.

[Note: frozen stages]
The output of a stage that trains nothing before it needs no gradient, and autograd would leave out what torch's schedules wait for. So
it is marked as one that does: the stage after it computes a gradient of [B, T, D] that nobody uses.

[Note: one backward]
Zero-bubble schedules part a backward in two, gradients of inputs first and of weights later, where a rank would be idle. Here the base is
frozen, so the second part is thin; and a fused layer computes all its gradients at once. torch's own way of parting runs such a layer
twice, or loses gradients where a layer has several outputs. So the whole backward runs in the place of its first part, and the second is
empty.

[Note: the last backward of a stage]
FSDP2 reduces gradients in the backward it is told to. A stage's backwards run in the order of its microbatches, so the one that begins
last is the last: a hook on the output counts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn.functional import pad

from d9d_lora.placement import local_of
from d9d_lora.train.batches import MicroBatch
from d9d_lora.train.config import ParallelConfig
from d9d_lora.train.stages import Split

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
UNDER_WAY = 4  # microbatches that a stage may be ahead of the next in an evaluation
Scores = tuple[Tensor, Tensor, Tensor]


def stages_here(parallel: ParallelConfig, rank: int) -> list[int]:
    """The stages of a pipeline rank: every `pp`-th, or with `zbv` one on the way there and one on the way back."""
    if parallel.schedule == "zbv":
        return [rank, 2 * parallel.pp - 1 - rank]
    return [rank + v * parallel.pp for v in range(parallel.stages_per_rank)]


def check_microbatches(parallel: ParallelConfig, n: int, unit: int) -> None:
    """Raises ValueError unless a schedule can run n microbatches a step. `unit`: rows of the global batch in one on every rank."""

    def fits(m: int) -> bool:
        rounds = max(1, m // parallel.pp)  # a round fills the pipeline once
        return m >= parallel.pp and (parallel.schedule not in ("interleaved_1f1b", "zero_bubble") or m % rounds == 0)

    if fits(n):
        return
    near = sorted((m for m in range(1, 2 * max(n, parallel.pp) + 1) if fits(m)), key=lambda m: abs(m - n))[:2]
    raise ValueError(
        f"parallel.pp={parallel.pp} with schedule={parallel.schedule}: a step has {n} microbatches on each rank, and needs at least one "
        "for each pipeline rank" + ("" if n < parallel.pp else ", and whole rounds of them") + "; numbers that do: "
        f"{' or '.join(str(m) for m in sorted(near))}, that is data.batch_size={' or '.join(str(m * unit) for m in sorted(near))}"
    )


def most_kept(parallel: ParallelConfig, n: int, rank: int, kept: Mapping[int, int]) -> int:
    """The most that a rank keeps at a time in a step of n microbatches, if a forward of a stage keeps so many bytes for its backward."""
    if parallel.schedule in ("gpipe", "1f1b"):
        return sum(kept.values()) * (n if parallel.schedule == "gpipe" else min(n, parallel.pp - rank))

    class Held:  # what the schedule asks of a stage before it runs
        group_size, group_rank, num_stages, submod = parallel.pp, rank, parallel.stages, nn.Identity()

    held = [Held() for _ in range(parallel.stages_per_rank)]
    order = SCHEDULES[parallel.schedule](held, n, loss_fn=lambda loss, _: loss).pipeline_order[rank]
    now = most = 0
    for action in order:
        if action is not None:
            begun = {"FORWARD": 1, "FULL_BACKWARD": -1, "BACKWARD_INPUT": -1}.get(action.computation_type.name, 0)  # [Note: one backward]
            now += begun * kept[action.stage_index]
            most = max(most, now)
    return most


def between_stages(parallel: ParallelConfig, rank: int, hidden: int) -> dict[tuple[str, str, str], int]:
    """Bytes that a rank sends for a microbatch, whose hidden states have so many: forth, and the gradients back. It is sent as many.

    What a stage hands to one on the same rank does not travel.
    """
    here = stages_here(parallel, rank)
    forth = sum(s + 1 < parallel.stages and s + 1 not in here for s in here) * hidden
    back = sum(s > 0 and s - 1 not in here for s in here) * hidden
    return {key: n for key, n in ((("forward", "pp", "send"), forth), (("backward", "pp", "send"), back)) if n}


def _no_second_part() -> Callable[[], None]:
    return lambda: None


class Stage(nn.Module):
    """What torch's schedules call: a stage by its number. The pieces are the model's, not its own."""

    def __init__(self, run: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        """x: the hidden states of the stage before; the first has none, and is given the number again."""
        return self._run(int(number), x)


class Pipeline:
    """The stages of this rank at work.

    Args:
        split: The model, cut.
        begin: Called before the forward of a microbatch on a stage: sets clock and seed.
        score: (microbatch, what computes logits of its inputs) -> sums of loss, rows right and rows asked.
        around: The context of a forward (autocast).
    """

    def __init__(
        self,
        split: Split,
        parallel: ParallelConfig,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        begin: Callable[[MicroBatch, int], None],
        score: Callable[[MicroBatch, Callable[..., Any]], Scores],
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.split, self.parallel, self.device = split, parallel, device
        self.group: dist.ProcessGroup = mesh["pp"].get_group()
        self.rank: int = mesh.get_local_rank("pp")
        self._begin, self._score, self._around = begin, score, around
        self._holder = {s: r for r in range(parallel.pp) for s in stages_here(parallel, r)}
        self._fsdp = {s: [f for m in split.modules(s) for f in m.modules() if isinstance(f, FSDPModule)] for s in split.here}
        self._root = [split.model] if isinstance(split.model, FSDPModule) else []
        split.model.stage_forward = self._between  # type: ignore[assignment]
        register_fsdp_forward_method(split.model, "stage_forward")
        with split.whole():
            # the residual stream has the dtype of the embeddings: what is trained whole is held in fp32, and so is what it makes
            self.dtype: torch.dtype = split.model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        self.width: int = split.model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
        self._schedule: Any = None
        self._wire = 0
        self._micro: list[MicroBatch] = []

    @property
    def last(self) -> int:
        return self.split.stages - 1

    # -- a stage -----------------------------------------------------------------------------------------------------------------

    def _between(self, inputs: dict[str, Any], hidden: Tensor | None) -> Tensor:
        """The decoder on the pieces that hang in it. FSDP2 takes it for a forward of the model."""
        return self.split.decoder(**_from(inputs, hidden)).last_hidden_state

    def forward(self, stage: int, batch: MicroBatch, hidden: Tensor | None) -> Tensor | Scores:
        """Hidden states, or on the last stage the scores."""
        self._begin(batch, stage)
        with self.split.only(stage) as model:
            if stage == self.last:
                return self._score(batch, lambda **inputs: model(**_from(inputs, hidden)))
            with self._around():
                out: Tensor = model.stage_forward(batch.inputs(), hidden)  # type: ignore[operator]
        if out.dtype != self.dtype:
            raise TypeError(f"stage {stage} makes hidden states of {out.dtype}; its embeddings are {self.dtype}, and so is the wire")
        return out

    # -- training ----------------------------------------------------------------------------------------------------------------

    def train(self, micro: Sequence[MicroBatch], targets: float) -> Tensor:
        """Forward and backward of a step's microbatches; the sum of their losses / targets, on the last stage, and zero elsewhere."""
        longest = max(b.input_ids.shape[1] for b in micro)
        if self._schedule is None or longest > self._wire or len(micro) != len(self._micro):
            self._plan(micro, longest)
        self._micro, self._targets = list(micro), targets
        self._total = torch.zeros((), dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        self._begun = dict.fromkeys(self.split.here, 0)
        for m in [*self._root, *(m for s in self.split.here for m in self._fsdp[s])]:
            m.set_requires_gradient_sync(False, recurse=False)
        numbers = torch.arange(len(micro))
        first = (numbers,) if 0 in self.split.here else ()
        self._schedule.step(*first, target=numbers, number=numbers)
        return self._total

    def _plan(self, micro: Sequence[MicroBatch], wire: int) -> None:
        """torch's schedule for rows of `wire` tokens; made anew only for longer ones, as it holds buffers for every microbatch."""
        self._wire = wire
        hidden = torch.empty(micro[0].input_ids.shape[0], wire, self.width, dtype=self.dtype, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                Stage(lambda number, x, s=s: self._step(s, number, x)),  # type: ignore[misc]
                s,
                self.split.stages,
                self.device,
                input_args=torch.empty(1, dtype=torch.int64, device="meta") if s == 0 else hidden,
                output_args=torch.empty(1, dtype=torch.float64, device="meta", requires_grad=True) if s == self.last else hidden,
                group=self.group,
                dw_builder=_no_second_part,  # [Note: one backward]
            )
            for s in self.split.here
        ]
        several = self.parallel.schedule not in ("gpipe", "1f1b")
        make = SCHEDULES[self.parallel.schedule]
        self._schedule = make(stages if several else stages[0], len(micro), loss_fn=lambda loss, _: loss.sum(), scale_grads=False)

    def _step(self, stage: int, number: int, x: Tensor) -> Tensor:
        batch = self._micro[number]
        tokens = batch.input_ids.shape[1]
        out = self.forward(stage, batch, x[:, :tokens] if stage else None)
        if stage == self.last:
            out = (out[0] / self._targets).reshape(1)
            self._total += out.detach().squeeze(0)
        else:
            assert isinstance(out, Tensor)
            out = pad(out, (0, 0, 0, self._wire - tokens)) if tokens < self._wire else out
            if not out.requires_grad:
                out.requires_grad_()  # [Note: frozen stages]
        assert isinstance(out, Tensor)
        out.register_hook(lambda _: self._backward_begins(stage))
        return out

    def _backward_begins(self, stage: int) -> None:
        """[Note: the last backward of a stage]"""
        self._begun[stage] += 1
        n = len(self._micro)
        done = self._root if all(b == n for b in self._begun.values()) else []
        for m in [*done, *(self._fsdp[stage] if self._begun[stage] == n else [])]:
            m.set_requires_gradient_sync(True, recurse=False)

    # -- what all stages hold, and what is of all stages ---------------------------------------------------------------------------

    @torch.no_grad()
    def sum_shared(self) -> None:
        """Adds the gradients of factors that layers of several stages share: each stage has the part of its own layers."""
        for factor in self.split.shared():
            p = factor.weight
            if isinstance(p, nn.Parameter) and p.requires_grad:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                dist.all_reduce(local_of(p.grad), group=self.group)

    def counted(self, p: nn.Parameter) -> bool:
        """Whether this stage counts a parameter in a sum over all stages: what all hold, the first does."""
        return self.rank == 0 or not any(p is f.weight for f in self.split.shared())

    def total(self, square: Tensor) -> Tensor:
        """A sum over the stages."""
        square = square.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64, copy=True)
        dist.all_reduce(square, group=self.group)
        return square

    # -- evaluation --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, micro: Sequence[MicroBatch]) -> list[Scores]:
        """Forwards alone, each row at its own length; the scores, on the last stage.

        With one stage a rank, ranks work on different microbatches at a time. With several, one microbatch goes all the way before the
        next sets out: slow, and nobody waits for one who waits for him.
        """
        waves = [micro] if self.parallel.stages_per_rank == 1 else [[b] for b in micro]
        found: list[Scores] = []
        for wave in waves:
            here: list[Tensor] = []  # hidden states that stay on this rank
            sent: list[tuple[Any, Tensor]] = []
            for stage in self.split.here:
                for batch in wave:
                    hidden = None if stage == 0 else here.pop(0) if stage - 1 in self.split.here else self._receive(stage, batch)
                    out = self.forward(stage, batch, hidden)
                    if isinstance(out, tuple):
                        found.append(out)
                    elif stage + 1 in self.split.here:
                        here.append(out)
                    else:
                        out = out.contiguous()
                        sent.append((dist.isend(out, group=self.group, group_dst=self._holder[stage + 1]), out))
                        if len(sent) > UNDER_WAY:
                            sent.pop(0)[0].wait()
            for work, _ in sent:
                work.wait()
        return found

    def _receive(self, stage: int, batch: MicroBatch) -> Tensor:
        hidden = torch.empty(*batch.input_ids.shape, self.width, dtype=self.dtype, device=self.device)
        dist.recv(hidden, group=self.group, group_src=self._holder[stage - 1])
        return hidden


class Alone(nn.Module):
    """Runs one stage on hidden states that are a function of the ids, in the place of those of the stage before."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        super().__init__()
        self._pipeline = pipeline
        self.stage = stage

    @property
    def config(self) -> Any:
        return self._pipeline.split.model.config

    def train(self, mode: bool = True) -> "Alone":
        self._pipeline.split.model.train(mode)
        return super().train(mode)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        """An output whose `logits` are the stage's own output."""
        p = self._pipeline
        columns = torch.arange(1, p.width + 1, device=input_ids.device)
        hidden = torch.sin((input_ids.unsqueeze(-1) + 1) * columns * math.sqrt(2)).to(p.dtype)
        given = {**inputs, "input_ids": input_ids}
        with p.split.only(self.stage) as model, p._around():
            if self.stage == p.last:
                return model(**_from(given, hidden if self.stage else None))
            return _Output(model.stage_forward(given, hidden if self.stage else None))  # type: ignore[operator]


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def _from(inputs: dict[str, Any], hidden: Tensor | None) -> dict[str, Any]:
    """The inputs of the model, with hidden states in the place of ids."""
    if hidden is None:
        return inputs
    return {**{k: v for k, v in inputs.items() if k != "input_ids"}, "inputs_embeds": hidden}
