"""From a config to a model that is ready to be trained, on whatever layout.

    outline    meta, tensor parallel, inject, table, stages, FSDP2: no byte is allocated (`plan/` rehearses on the same)
    fill       memory, the base's weights, the adapters' starts
    collect    what a step needs to know of the model

It knows methods by their interface only.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from d9d_lora.context import ContextParallel
from d9d_lora.inject import inject_peft_and_freeze
from d9d_lora.layers.stacked import Stacked
from d9d_lora.method import PeftMethod
from d9d_lora.mixture import stacks
from d9d_lora.placement import at_least_fp32, is_of_own_experts
from d9d_lora.registry import peft_method_from_config
from d9d_lora.share_experts import share_experts
from d9d_lora.state.mappers import ModelStateMapper
from d9d_lora.state.names import clean
from d9d_lora.state.peft_trained import holds_all
from d9d_lora.state.reader import LoadReport
from d9d_lora.styles import take_column_path
from d9d_lora.sums import ReplicatedSum
from d9d_lora.train import model as models
from d9d_lora.train.batches import ROWS_OF
from d9d_lora.train.config import RunConfig
from d9d_lora.train.exports import check_exports
from d9d_lora.train.pipeline import check_microbatches, stages_here
from d9d_lora.train.replicated import choose, is_over_data
from d9d_lora.train.report import census
from d9d_lora.train.stages import Split, check_pieces
from d9d_lora.train.start import Start
from d9d_lora.train.tensor_parallel import apply_tensor_parallel
from d9d_lora.train.world import GRADIENT_AXES, World
from d9d_lora.walk import adapted_layers, clock_of


class Built:
    """A model with its adapters.

    Attributes, after `outline`:
        base, model: The base and what is known of it; the module itself.
        held: Whether PEFT's directory can hold all that is trained.
        autocast: Whether a forward needs it: something is trained in fp32 beside a base in bfloat16.
        choice: Which parameters data parallelism leaves whole, and why.
        census, passed_over: What will be trained, and what the targets matched and nothing adapts.
        trained_names: Of all that the run trains, whichever stage has it.
        split, context: The stages of this rank; how rows are shared. None without such axes.
        groups: Process groups by what is summed over them.
    After `collect`:
        params: The trained parameters of this rank by name, sorted.
        sum: Adds up what FSDP2 does not.
        fsdp: What FSDP2 manages.
        clocks: What the masks of dropout are drawn by.
    """

    def __init__(self, config: RunConfig, world: World, dtype: torch.dtype, *, start: Start | None = None, own: bool = False) -> None:
        """`start`: the adapter that the run will start from; `own`: the method is its own."""
        self.config, self.world, self.dtype = config, world, dtype
        self.start, self.own = start, own
        self.method: PeftMethod[Any] = peft_method_from_config(seeded(config.peft, config.train.seed))

    # -- outline -------------------------------------------------------------------------------------------------------------

    def outline(self) -> None:
        """The model with its adapters, sharded, and its table; on meta, unless a callable made it."""
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
            apply_tensor_parallel(self.base, world.mesh["tp"], sequence=world.parallel.sequence_parallel)
        if world.experts is not None:
            # losses are parts of one global mean, so gradients of experts are sums, as all others are
            share_experts(self.model, world.experts["ep"], average=False)
        if self.start is not None:
            self.start.check(self.method, self.model, own=self.own)
        self.mapper = self._inject()
        self.autocast = in_fp32(self.model) and self.dtype == torch.bfloat16
        self.choice = choose(self.model, world.parallel)
        self.census = census(self.model, world.parallel.shards, self.choice)
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

    def _inject(self) -> ModelStateMapper:
        """The mapper from the base's names to those of the adapted model."""
        remembered = _Remember(self.method)
        mapper = inject_peft_and_freeze(remembered, self.model)  # type: ignore[arg-type]
        self.passed_over = remembered.passed_over
        self.held = holds_all(self.model)
        if not self.held and any(layer.delta.moves_base for layer in adapted_layers(self.model)):
            raise ValueError(
                "peft: a start that moves the base weight (pissa, olora, corda) is saved as a PEFT directory, which does not hold every "
                "method or layer of this config; choose another init_lora_weights"
            )
        check_exports(self.config.export, self.model, self.base.directory, held=self.held)
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

    # -- fill and collect ------------------------------------------------------------------------------------------------------

    def fill(self, *, resume: bool) -> LoadReport | None:
        """Memory, the base's weights, the starts. None if the base came with its weights."""
        models.materialise(self.base, self.world.device)
        report = models.load(self.base, self.mapper, self.config.model, self.split)
        self.method.initialise(self.model, resume=resume)
        return report

    def collect(self) -> None:
        """What a step needs to know of the model."""
        self.params = {clean(n): p for n, p in sorted(self.model.named_parameters(), key=lambda x: clean(x[0])) if p.requires_grad}
        # Found by where they lie, and not by what was chosen: what FSDP2 does not manage, nobody else would add.
        groups = {p: self.groups["experts" if is_of_own_experts(p) else "data"] for p in self.params.values()}
        whole = [p for p, group in groups.items() if group is not None and not is_over_data(p)]
        self.sum = ReplicatedSum(adapted_layers(self.model), in_parts=self._thawed_parts(), over_data=whole, **self.groups)
        self.fsdp = list(models.fsdp_modules(self.model))
        self.clocks = {id(c): c for la in adapted_layers(self.model) if (c := la.dropout.clock) is not None}.values()

    def begin_microbatch(self, *, last: bool) -> None:
        """Tells FSDP2 whether a microbatch is the last of its step: gradients are reduced after that one alone. The root is whole until the
        end of a backward in any case, and stays so for the forward that follows."""
        for m in self.fsdp:
            m.set_requires_gradient_sync(last, recurse=False)
        if isinstance(self.model, FSDPModule):
            self.model.set_reshard_after_backward(last, recurse=False)

    def _thawed_parts(self) -> list[tuple[nn.Module, str, Any]]:
        if self.world.parallel.tp == 1 or self.world.mesh is None:
            return []
        mesh, here = self.world.mesh["tp"], set(self.model.modules())
        return [(m, leaf, mesh) for m, leaf in self.base.in_parts if m in here and m.get_parameter(leaf).requires_grad]

    def whole(self) -> contextlib.AbstractContextManager[Any]:
        """The model with all its pieces, where this rank has some of them; those of others are on meta."""
        return contextlib.nullcontext() if self.split is None else self.split.whole()


class _Remember:
    """Passes an injection through and keeps what its table should tell."""

    def __init__(self, method: PeftMethod) -> None:
        self._method = method
        self.passed_over: list[str] = []

    def inject(self, module: nn.Module) -> Any:
        result = self._method.inject(module)
        self.passed_over = result.passed_over
        return result


def in_fp32(model: nn.Module) -> bool:
    """Parameters trained whole are trained in fp32, as factors are; returns whether there are any."""
    layers = list(adapted_layers(model))
    factors = {id(p) for la in layers for p in [*la.factors().values(), *(f.weight for f in la.shared.values())]}
    widened: dict[int, nn.Parameter] = {}  # `p.data = ...` would do nothing on a DTensor, so parameters are replaced; ties hold
    for m in model.modules():
        for name, p in m.named_parameters(recurse=False, remove_duplicate=False):
            if p.requires_grad and id(p) not in factors:
                widened.setdefault(id(p), nn.Parameter(at_least_fp32(p.detach())))
                m.register_parameter(name, widened[id(p)])
    return bool(widened)


# -- the method of a run ----------------------------------------------------------------------------------------------------------------


def seeded(peft: Any, seed: int) -> Any:
    """The starts follow train.seed, unless the method's config sets a seed of its own."""
    if hasattr(peft, "methods"):
        return peft.model_copy(update={"methods": [seeded(m, seed) for m in peft.methods]})
    if "seed" in type(peft).model_fields and "seed" not in peft.model_fields_set:
        return peft.model_copy(update={"seed": seed})
    return peft


def of_length(peft: Any, steps: int) -> Any:
    """A method whose schedule is that of the run learns how long the run is; a resume with another length is then another run."""
    if hasattr(peft, "methods"):
        return peft.model_copy(update={"methods": [of_length(m, steps) for m in peft.methods]})
    return peft.of_length(steps) if hasattr(peft, "of_length") else peft
