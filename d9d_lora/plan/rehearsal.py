"""The trainer's own build and step, on a fake process group: one process stands for rank 0 of any number.

    meta, tensor parallel, inject, FSDP2     as in the trainer, by the trainer
    materialise, forward, backward, the sum  on fake tensors: shapes and storages without bytes, collectives without a wire

Rank 0 holds the most wherever something does not divide evenly. Equal blocks cost equally, so a deep model is rehearsed with three
and with four of its blocks, and every number goes on along that line; where blocks differ, all of them run.

Of a pipeline each rank is told. It runs its stages on one microbatch, one after another; how many are under way at a time is what torch's
schedule says, and what travels between stages is a formula.

[Note: what a rehearsal cannot see]
The caching allocator's slack, workspaces of kernels, buffers of NCCL, the optimiser's temporaries, and that an accelerator may hold
one gathered block more while it fetches the next. Attention keeps what torch's fused attention keeps on a CPU.
"""

import contextlib
import copy
import gc
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from d9d_lora.placement import local_of
from d9d_lora.plan.ledger import Key, Ledger
from d9d_lora.plan.paper import on_paper
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.train import model as models
from d9d_lora.train.batches import MicroBatch, check_batch_size
from d9d_lora.train.build import Built, of_length
from d9d_lora.train.config import ParallelConfig, RunConfig
from d9d_lora.train.loss import Loss
from d9d_lora.train.pipeline import Pipeline, between_stages, most_kept, stages_here
from d9d_lora.train.replicated import decide
from d9d_lora.train.stages import Split, cut
from d9d_lora.train.trainer import Trainer
from d9d_lora.train.world import MESH_AXES, World
from d9d_lora.walk import adapted_layers, adapter_tensors

BLOCKS = 3  # and one more: two points make a line, and the first and the last block may be special
CPU = torch.device("cpu")


@dataclass
class Counts:
    """Of one step; bytes of rank 0, unless the name says `all`, which is the sum over the ranks.

    Attributes:
        base, adapters: Parameters that this rank holds: frozen, trained.
        gradients, optimiser: Of the trained ones, between backward and step; AdamW's two averages.
        kept: Activations that a microbatch's forward leaves for its backward.
        unit: The largest FSDP2 unit, gathered.
        peak: The most at any time of a step's forwards and backwards, everything above included. With a pipeline to a few hidden states.
        pp_rank: Of which rank of the pipeline the bytes are, if there is one. Elements, `whole`, `cut` and what says `all` are of all.
        held: What is kept at most for all microbatches under way.
        wire: Buffers for hidden states from other ranks, and for their gradients.
        replicated: Whether data parallelism leaves the adapters whole (`train/replicated.py`).
        whole, cut: Bytes of the adapters here if it does, and if it does not.
        read: From the base's files, by the dtype that the model's config names (bfloat16 if it names none).
        one, more: Traffic of a step of one microbatch, and what each further one adds.
        paper: What `paper.py` says of a step of one microbatch.
    """

    ranks: int
    accumulation: int
    tokens: int
    base_elements: int = 0
    adapter_elements: int = 0
    base: int = 0
    base_all: int = 0
    adapters: int = 0
    adapters_all: int = 0
    gradients: int = 0
    optimiser: int = 0
    kept: int = 0
    unit: int = 0
    peak: int = 0
    replicated: bool = False
    whole: int = 0
    cut: int = 0
    read: int = 0
    read_all: int = 0
    one: Counter[Key] = field(default_factory=Counter)
    more: Counter[Key] = field(default_factory=Counter)
    paper: Counter[Key] = field(default_factory=Counter)
    pp_rank: int | None = None
    held: int = 0
    wire: int = 0

    @property
    def column(self) -> str:
        return f"{self.ranks:,} ranks" + ("" if self.pp_rank is None else f", pp {self.pp_rank}")

    @property
    def step(self) -> Counter[Key]:
        """Traffic of an optimiser step."""
        return Counter({k: self.one[k] + (self.accumulation - 1) * self.more[k] for k in self.one | self.more})

    def beyond(self, other: "Counts", more: Fraction, more_of_all: Fraction) -> "Counts":
        """This, and `more` times what it has more than `other`; `more_of_all` times of what all ranks of a pipeline have together."""
        values: dict[str, Any] = {}
        for f in fields(self):
            here, there = getattr(self, f.name), getattr(other, f.name)
            if isinstance(here, Counter):
                values[f.name] = Counter({k: here[k] + int(more * (here[k] - there[k])) for k in here | there})
            elif f.name in ("base_elements", "adapter_elements", "whole", "cut"):
                values[f.name] = here + int(more_of_all * (here - there))
            elif f.name not in ("ranks", "accumulation", "tokens", "replicated", "pp_rank"):
                values[f.name] = here + int(more * (here - there))
        return replace(self, **values)


class Rehearsal:
    """The trainer's build and loss without data, files and weights."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config = config = config.model_copy(update={"peft": of_length(config.peft, config.train.steps)})
        self.world = world
        self.built = Built(config, world, torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype))
        if self.built.method.surveys:
            raise ValueError("peft: ranks of a start from data (eva, corda) follow from the data; plan with init_lora_weights=true")
        if config.train.compile:
            raise ValueError("a compiled run cannot be rehearsed; plan with train.compile=false, of which it needs no more")
        self.built.outline()
        self.model, self.split = self.built.model, self.built.split
        if any(layer.delta.moves_base for layer in adapted_layers(self.model)):
            raise ValueError(
                "peft: a start that moves the base (pissa, olora, loftq) keeps its factors beside the trained ones; plan with "
                "init_lora_weights=true, and add the memory of the adapters once more"
            )
        if any(isinstance(m, NF4Linear) for m in self.model.modules()):
            raise ValueError("model.quantise: a base in four bits cannot be rehearsed yet; plan without it, for all but the base")

    def count(self, row: int) -> Counts:
        """One step of rows of `row` tokens."""
        data, world = self.config.data, self.world
        check_batch_size(data.batch_size, data.micro_batch_size, world.dp_size)
        accumulation = data.batch_size // (data.micro_batch_size * world.dp_size)
        counts = Counts(world.size, accumulation, data.batch_size * row)
        counts.pp_rank = None if self.split is None else world.pp_rank
        counts.replicated, counts.whole, counts.cut = self.built.choice.replicate, self.built.choice.whole, self.built.choice.cut
        with _fake(packed=data.packing):
            models.materialise(self.built.base, CPU)
            for layer in adapted_layers(self.model):
                layer.started = True  # without values: there are none here
            self.built.collect()
            self.params = self.built.params
            self.loss = Loss(self.built, pad_id=0)
            self.loss.cuts_logits = False  # which positions have a target is not known here: all of them
            self.model.train()
            self._hold(counts)
            ids = torch.zeros(data.micro_batch_size, row, dtype=torch.int64)
            batch = MicroBatch(ids, ids, torch.arange(row).expand_as(ids), 0, 0, packed=data.packing)
            if self.split is not None:
                self._join_stages(self.split, counts, batch)
            kept: dict[int | None, int] = {}
            beyond: dict[int | None, int] = {}  # of the most that a stage needs at a time, what it does not keep
            with ledger_of(self) as ledger:
                for _ in range(2):  # the first step teaches the ledger which storages FSDP2 takes and gives back
                    self.model.zero_grad(set_to_none=True)
                    gc.collect()  # what the step before left in cycles would be freed in the midst of this one
                    ledger.mark()
                    before = ledger.live
                    first = final = Counter[Key]()
                    for last in (False, True) if accumulation > 1 else (True,):
                        ledger.traffic.clear()
                        for stage in [None] if self.split is None else self.split.here:
                            ledger.peak = ledger.live if self.split else ledger.peak
                            kept[stage] = self._microbatch(ledger, batch, last, stage)
                            beyond[stage] = ledger.peak - before - kept[stage]
                        if last:
                            ledger.phase = "sum"
                            self._sum()
                        first, final = (final, Counter(ledger.traffic))
                    # The first gathers what stays whole, the last adds gradients up, and all do the rest.
                    counts.one, counts.more = (first | final, first & final) if accumulation > 1 else (final, Counter())
                    counts.unit, counts.peak = ledger.largest, ledger.peak - before
            counts.gradients = sum(bytes_of(p.grad) for p in self.params.values() if p.grad is not None)
        counts.kept = counts.held = sum(kept.values())
        if self.split is not None:
            counts.held = most_kept(world.parallel, accumulation, world.pp_rank, {s: n for s, n in kept.items() if s is not None})
            counts.peak = counts.held + max(beyond.values()) + counts.wire
            for traffic in (counts.one, counts.more):
                traffic.update(between_stages(world.parallel, world.pp_rank, self._hidden(batch)))
        counts.peak += counts.base + counts.adapters + counts.optimiser
        if self.split is None:
            counts.paper = on_paper(self, row)
        return counts

    def _sum(self) -> None:
        self.built.sum.reduce()
        if self.split is not None:
            self.pipeline.sum_shared()

    def _hidden(self, batch: MicroBatch) -> int:
        """Bytes of the hidden states of a microbatch."""
        return batch.input_ids.numel() * self.pipeline.width * self.pipeline.dtype.itemsize

    def _join_stages(self, split: Split, counts: Counts, batch: MicroBatch) -> None:
        """What `Trainer._connect` does, but for what asks other ranks; and what comes from them."""
        assert self.world.mesh is not None
        parallel = self.world.parallel
        self.pipeline = Pipeline(split, parallel, self.world.mesh, CPU, begin=lambda *_: None, score=self.loss, around=self.loss.autocast)
        shape = (*batch.input_ids.shape, self.pipeline.width)
        self._given = {s: torch.empty(shape, dtype=self.pipeline.dtype, requires_grad=True) for s in split.here}
        self._gradient = torch.empty(shape, dtype=self.pipeline.dtype)
        ends = sum((s > 0) + (s < parallel.stages - 1) for s in split.here)  # also between two stages of one rank
        counts.wire = counts.accumulation * ends * self._hidden(batch)

    def _microbatch(self, ledger: Ledger, batch: MicroBatch, last: bool, stage: int | None = None) -> int:
        """As in `Trainer.train_step`, of one stage if there are some; the bytes that the forward keeps, what FSDP2 has gathered apart."""
        if stage is None:
            self.built.begin_microbatch(last=last)
        else:
            for m in self.built.fsdp:
                m.set_requires_gradient_sync(last, recurse=False)
        before = ledger.live - ledger.gathered
        ledger.phase = "forward"
        out = self.loss(batch) if stage is None else self.pipeline.forward(stage, batch, self._given[stage] if stage else None)
        kept = ledger.live - ledger.gathered - before
        ledger.phase = "backward"
        if isinstance(out, Tensor):
            if out.requires_grad:  # no stage before it has an adapter: the schedule sends a gradient that nobody uses
                out.backward(self._gradient)
        else:
            out = out[0]
            (out / 1).backward()
        for given in self._given.values() if stage is not None else ():
            given.grad = None
        return kept

    def _hold(self, counts: Counts) -> None:
        """What is there all the time."""
        own = adapter_tensors(self.model)
        base = [p for n, p in self.model.named_parameters() if n not in own and not p.requires_grad]
        trained = [*self.params.values(), *self.built.method.state(self.model).values()]
        counts.base, counts.adapters = sum(map(bytes_of, base)), sum(map(bytes_of, trained))
        counts.base_all, counts.adapters_all = (sum(copies(p, self.world) * p.nbytes for p in ps) for ps in (base, trained))
        with contextlib.nullcontext() if self.split is None else self.split.whole():
            names = adapter_tensors(self.model)
            counts.base_elements = sum(p.numel() for n, p in self.model.named_parameters() if n not in names)
            counts.adapter_elements = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        counts.optimiser = 2 * sum(map(bytes_of, self.params.values()))
        read = [p for n, p in self.model.named_parameters() if n not in own]  # once what is tied: files hold it once
        counts.read, counts.read_all = sum(local_of(p).numel() for p in read), sum(copies(p, self.world) * p.numel() for p in read)


def ledger_of(run: Trainer | Rehearsal) -> Ledger:
    """A ledger that knows the trainer's groups of ranks: what FSDP2 shards over is `dp_shard`, whatever axes it is made of."""
    world = run.world
    first = {}
    if run.built.context is not None and world.mesh is not None:
        first = {"dp_shard": models.fsdp_mesh(world.mesh, world.parallel).get_group(-1), "cp": run.built.context.group}
    return Ledger(world.mesh, {"dp": run.built.groups["data"], **world.expert_axes()}, first=first)


def bytes_of(p: Tensor) -> int:
    return local_of(p).nbytes


def copies(p: Tensor, world: World) -> int:
    """How many ranks of a stage hold each element of a tensor."""
    ranks = world.size // world.parallel.pp
    if not isinstance(p, DTensor):
        return ranks
    return ranks // math.prod(p.device_mesh.size(i) for i, s in enumerate(p.placements) if not s.is_replicate())


def _no_documents(position_ids: Tensor) -> None:
    """A Mock would remember its argument, and keep it alive."""


@contextlib.contextmanager
def _fake(*, packed: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not packed:
            # On fake tensors transformers takes every row for a packed one and builds a mask, which a real run does without.
            stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", _no_documents))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextlib.contextmanager
def fake_world(size: int, parallel: ParallelConfig, pp_rank: int = 0) -> Iterator[World]:
    """This process as rank 0 of `size`, or as the first of another pipeline rank."""
    parallel = parallel.resolved(size)
    if dist.is_initialized():
        raise RuntimeError("a rehearsal makes a process group of its own, and this process is in one already; plan in one process")
    if size == 1:
        yield World(0, 1, CPU, parallel, None)
        return
    rank = pp_rank * size // parallel.pp
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, CPU, parallel, init_device_mesh("cpu", parallel.shape(MESH_AXES), mesh_dim_names=MESH_AXES))
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds this mesh; that of another rank is equal to it, and its groups have other names


# -- depth ----------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def of_shape(config: RunConfig, shape: Any, blocks: int | None = None) -> Iterator[RunConfig]:
    """The config with a model of this Hugging Face config, and of so many blocks. None: the model is a callable of the user's."""
    if shape is None:
        yield config
        return
    with tempfile.TemporaryDirectory() as directory:
        shape = copy.deepcopy(shape)
        if blocks is not None:
            shape.num_hidden_layers = blocks
            if getattr(shape, "layer_types", None):
                shape.layer_types = shape.layer_types[:blocks]
        shape.save_pretrained(directory)
        yield config.model_copy(update={"model": config.model.model_copy(update={"path": directory})})


def depth_of(config: RunConfig, shape: Any) -> int | None:
    """The number of blocks, where all cost the same and there are enough of them to go by a few; else None."""
    depth = getattr(shape, "num_hidden_layers", None)
    mixed = len(set(getattr(shape, "layer_types", None) or ())) > 1
    if depth is None or depth <= BLOCKS + 1 or mixed or shape.get_text_config() is not shape:
        return None
    with of_shape(config, shape) as whole:
        blocks = models.blocks_of(Rehearsal(whole, World(0, 1, CPU, ParallelConfig(dp_shard=1), None)).model)  # type: ignore[call-arg]
    kinds = {tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in b.named_parameters()) for _, b in blocks}
    return depth if len(blocks) == depth and len(kinds) == 1 else None


def rehearse(config: RunConfig, shape: Any, size: int, row: int, depth: int | None, pp_rank: int = 0) -> Counts:
    """Counts of one step on `size` ranks; `depth` is what `depth_of` says, or None to run every block."""

    def counted(blocks: int | None, parallel: ParallelConfig) -> Counts:
        with of_shape(config, shape, blocks) as shallow, fake_world(size, parallel, pp_rank) as world:
            try:
                return Rehearsal(shallow.model_copy(update={"parallel": parallel}), world).count(row)
            except DataDependentOutputException as error:
                raise ValueError(f"this model's forward asks for the values of its tensors ({error}), and a rehearsal has none") from error

    def whole(parallel: ParallelConfig) -> Counts:
        stages = parallel.stages
        if depth is None or depth <= (BLOCKS + 1) * stages:
            return counted(depth, parallel)
        here = stages_here(parallel, pp_rank) if parallel.pp > 1 else [0]
        held = sum(s in here for s in cut(depth, stages)) - (BLOCKS + 1) * len(here)  # blocks beyond those of the second rehearsal
        four, three = (counted(n * stages, parallel) for n in (BLOCKS + 1, BLOCKS))
        return four.beyond(three, Fraction(held, len(here)), Fraction(depth, stages) - BLOCKS - 1)

    found = whole(config.parallel)
    replicate, _ = decide(config.parallel.adapters, found.whole, found.cut)  # of all blocks, where a few may be small enough to be whole
    if found.whole and replicate != found.replicated:
        found = whole(config.parallel.model_copy(update={"adapters": "replicate" if replicate else "shard"}))
    stored: torch.dtype = getattr(shape, "dtype", None) or torch.bfloat16
    return replace(found, read=found.read * stored.itemsize, read_all=found.read_all * stored.itemsize)


def rehearse_ranks(config: RunConfig, shape: Any, size: int, row: int, depth: int | None) -> list[Counts]:
    """`rehearse` of every rank of the pipeline, with the sums over all of them."""
    plans = [rehearse(config, shape, size, row, depth, rank) for rank in range(config.parallel.pp)]
    sums = {name: sum(getattr(p, name) for p in plans) for name in ("base_all", "adapters_all", "read_all")}
    return [replace(p, **sums) for p in plans]
