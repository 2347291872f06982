"""The base model: shapes on meta, FSDP2, recomputation, and its weights streamed in.

    open_model -> (apply_tensor_parallel -> inject) -> apply_data_parallel -> materialise -> load
"""

import contextlib
import importlib
import inspect
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from d9d_lora.dropout import Clock
from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.experts import place, products
from d9d_lora.layers.grouped_mm import operator_takes
from d9d_lora.placement import local_of
from d9d_lora.quant.load import packed_tensors, quantise_, quantised, sinks
from d9d_lora.replicate import groups_that_share
from d9d_lora.share_experts import fully_shard_experts, shared_out
from d9d_lora.state.expert_files import expert_mapper
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperSequential
from d9d_lora.state.reader import LoadReport, hf_prefix_mapper, load_checkpoint, named_state
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.styles import retie, tied_names
from d9d_lora.train.config import ModelConfig, ParallelConfig
from d9d_lora.train.replicated import axis_to_cut
from d9d_lora.train.stages import Split
from d9d_lora.walk import adapter_tensors


@dataclass
class Base:
    """A base model and what is known of it.

    Attributes:
        directory: Where its weights are; None for a callable without a checkpoint, whose weights are already there.
        in_parts: (owner, name) of parameters outside any tensor-parallel layer of which each rank sees only a part of the
            activations (the query and key norms of local heads; norms in sequence-parallel regions).
    """

    module: nn.Module
    directory: Path | None
    in_parts: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def is_hf(self) -> bool:
        return hasattr(self.module, "config") and hasattr(self.module, "_init_weights")


def local_directory(path: str) -> Path:
    """A model directory: a local one as it is, a hub id downloaded (safetensors, JSON and tokenizer files only, never pickle)."""
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise FileNotFoundError(f"model.path={path}: no such directory, and it is no hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:
        raise FileNotFoundError(f"model.path={path}: neither a local directory nor a model the hub can give now ({error})") from error


def open_model(config: ModelConfig, dtype: torch.dtype) -> Base:
    """Builds the module: on meta if its weights come from a directory, for real if a callable makes them. Quantised as the config says."""
    base = _open(config, dtype)
    if config.quantise is not None:
        quantise_(base.module, config.quantise_modules)
    _take_experts(base.module)
    return base


def _open(config: ModelConfig, dtype: torch.dtype) -> Base:
    directory = local_directory(config.path) if config.path else None
    if config.target:
        make = _callable(config.target)
        with torch.device("meta") if directory else contextlib.nullcontext():
            module = make(**config.kwargs)
        if not isinstance(module, nn.Module):
            raise TypeError(f"model._target_={config.target} returned a {type(module).__name__}; expected a torch.nn.Module")
        return Base(module.to(dtype), directory)
    from transformers import AutoConfig, AutoModelForCausalLM

    assert directory is not None
    hf_config = AutoConfig.from_pretrained(directory)
    hf_config.use_cache = False
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=config.attention)
    module.tie_weights()
    return Base(module, directory)


def _take_experts(module: nn.Module) -> None:
    """Experts that torch's grouped product refuses (float64, rows of no multiple of 16 bytes) are multiplied by ours, adapted or not: what
    transformers takes by default would stop in the first forward."""
    for m in module.modules():
        stacks = [m.get_parameter(name) for name in products(m)]
        if not all(operator_takes(p, *p.shape[1:]) for p in stacks):
            place(m)


def _callable(target: str) -> Callable[..., Any]:
    module, _, name = target.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model._target_={target}: cannot be imported ({error}); expected package.module.name") from error


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on accelerators, and on a CPU if a product in bfloat16 is not slower than in float32 (0.1 s of timing)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 1024, dtype=dtype)
        a @ a.T
        start = time.perf_counter()
        for _ in range(10):
            a @ a.T
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda d: seconds[d])


# -- data parallelism, recomputation, compilation ------------------------------------------------------------------------------------


def blocks_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks: what a Hugging Face model names as not to be split, else the children of the longest ModuleList."""
    names = set(getattr(module, "_no_split_modules", None) or ())
    found = [(n, m) for n, m in module.named_modules() if type(m).__name__ in names]
    if found:
        return found
    lists = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and not isinstance(m, AdaptedLayer)]
    if not lists:
        return []
    name, longest = max(lists, key=lambda item: len(item[1]))
    return [(f"{name}.{i}" if name else str(i), m) for i, m in enumerate(longest)]


def recompute(module: nn.Module, clock: Clock | None = None) -> None:
    """Keeps only the inputs of each block and computes the rest again in the backward (never reentrant: adapters would get
    no gradient).

    `clock`: set back to the time of its forward for what is computed again, where other forwards come between.
    """
    again: dict[str, Any] = {} if clock is None else {"context_fn": lambda: (contextlib.nullcontext(), clock.again())}
    for _, block in blocks_of(module):
        inner = block.forward
        block.forward = lambda *args, _inner=inner, **kwargs: checkpoint(_inner, *args, use_reentrant=False, **again, **kwargs)  # type: ignore[method-assign]


def apply_data_parallel(
    module: nn.Module,
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    whole: Collection[nn.Parameter] = frozenset(),
    *,
    same_experts: DeviceMesh | None = None,
) -> None:
    """FSDP2 of every block and the root, HSDP if there are replicas. Gradients are summed: losses are parts of a global mean.

    `whole`: parameters that it leaves as they are on each rank; whoever trains must add their gradients (`ReplicatedSum`).
    `same_experts`: the ranks that hold the same experts, where experts are shared out.
    """
    ignored = set(whole)
    if parallel.shards == 1 and all(p in ignored for p in module.parameters() if p.requires_grad):
        return  # nothing to cut, and no gradient to add
    dp = fsdp_mesh(mesh, parallel)

    if same_experts is not None and shared_out(module):
        ignored = fully_shard_experts(module, same_experts, ignored_params=ignored)

    def cut(p: nn.Parameter) -> Shard:
        return Shard(axis_to_cut(p, parallel.shards) if p.requires_grad else 0)  # the base is read from files, by rows

    for blocks in groups_that_share([block for _, block in blocks_of(module)]):
        fully_shard(blocks, mesh=dp, ignored_params=ignored, shard_placement_fn=cut)
    fully_shard(module, mesh=dp, ignored_params=ignored, shard_placement_fn=cut)
    sum_gradients(module)


def fsdp_mesh(mesh: DeviceMesh, parallel: ParallelConfig) -> DeviceMesh:
    """(replicas, if any; shards). Ranks with other tokens of the same rows have parts of one gradient, as those with other rows have."""
    shards = mesh["dp_shard"] if parallel.cp == 1 else mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    if parallel.dp_replicate == 1:
        return shards
    return mesh["dp_replicate", "dp_shard"] if parallel.cp == 1 else DeviceMesh._concatenate([mesh["dp_replicate"], shards])


def sum_gradients(module: nn.Module) -> None:
    """FSDP2 adds gradients instead of averaging them: a loss that is divided by a global count needs no other divisor."""
    for m in fsdp_modules(module):  # neither setting recurses
        m.set_gradient_divide_factor(1.0)
        m.set_force_sum_reduction_for_comms(True)  # dividing by 1 inside the collective is an operation gloo does not have


def fsdp_modules(module: nn.Module) -> Iterator[FSDPModule]:
    return (m for m in module.modules() if isinstance(m, FSDPModule))


# -- memory and weights ---------------------------------------------------------------------------------------------------------------


def materialise(base: Base, device: torch.device) -> None:
    """Memory for every tensor; buffers that no checkpoint holds (rotary caches, embedding scales) get their values."""
    module = base.module
    if any(p.is_meta for p in module.parameters()):
        ties = tied_names(module)
        module.to_empty(device=device)
        retie(module, ties)  # to_empty gives each name a tensor of its own
        for m in module.modules():
            if m._non_persistent_buffers_set and base.is_hf:
                with torch.no_grad():
                    module._init_weights(m)  # type: ignore[operator]
    else:
        module.to(device)


def load(base: Base, mapper: ModelStateMapper, config: ModelConfig, split: Split | None = None) -> LoadReport | None:
    """Streams the base weights in, each rank the bytes of its shard, of its stages. None if the module came with its weights."""
    if base.directory is None:
        return None
    module = base.module
    with open_checkpoint(base.directory) as files, contextlib.nullcontext() if split is None else split.whole():
        chain: list[ModelStateMapper] = [mapper]
        names = list(files.names())
        converted = expert_mapper(module, names)
        if converted is not None:
            groups = converted.state_dependency_groups()
            taken = {name for group in groups for name in group.inputs}
            names = [name for name in names if name not in taken] + [name for group in groups for name in group.outputs]
        prefix = getattr(module, "base_model_prefix", "")
        if prefix:
            renamed = {out: inp for g in mapper.state_dependency_groups() for inp in g.inputs for out in g.outputs}
            expected = [renamed.get(n, n) for n, _ in module.named_parameters(remove_duplicate=False)]
            mend = hf_prefix_mapper(expected, names, prefix)
            if mend is not None:
                chain.insert(0, mend)
        if converted is not None:
            chain.insert(0, converted)
        ignore = [*config.ignore_unexpected, *(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or [])]
        ignore += [r"rotary_emb\.inv_freq$", r"attn\.(masked_)?bias$"]  # caches that older files hold
        whole = chain[0] if len(chain) == 1 else ModelStateMapperSequential(chain)
        skip = adapter_tensors(module) | packed_tensors(module)
        elsewhere: set[str] = set()
        if split is not None:
            elsewhere = {n for n, t in named_state(module) if t.is_meta and n not in skip}
            elsewhere |= {f"{n}.weight" for n, layer, _ in quantised(module) if layer.weight.is_meta}
        twins = {} if split is None else split.twins()
        return load_checkpoint(
            module, files, whole, skip=skip, ignore_unexpected=ignore, sinks=sinks(module), elsewhere=elsewhere - twins.keys(), twins=twins
        )


def accepted(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of the inputs that the module's forward takes: a module of the user's own may want the ids alone."""
    signature = inspect.signature(module.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        return inputs
    return {k: v for k, v in inputs.items() if k in signature}


def bytes_held(module: nn.Module) -> int:
    """Bytes of the parameters this rank holds."""
    return sum(local_of(p).numel() * p.element_size() for p in module.parameters())
