"""Tensor parallelism of a Hugging Face model by its own plan, in torch's styles.

q, k, v and gate, up share one reduction of their input. With sequence parallelism, tokens are sharded between blocks.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleInput, RowwiseParallel

from d9d_lora.expert_styles import MixtureOfTokens, expert_styles
from d9d_lora.styles import parallelize_adapted
from d9d_lora.train.model import Base, blocks_of

_STYLES: dict[str, Callable[[], ParallelStyle | None]] = {
    "colwise": lambda: ColwiseParallel(),
    "rowwise": lambda: RowwiseParallel(),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": lambda: None,
}


def apply_tensor_parallel(base: Base, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Shards a Hugging Face model by its own plan, in torch's styles; q, k, v and gate, up share one reduction of their input.

    With `sequence`, tokens are sharded between blocks: the residual stream and the norms hold 1/tp of them.
    """
    module = base.module
    plan = getattr(module, "_tp_plan", None) or {}
    if not plan:
        raise ValueError(
            f"{type(module).__name__} has no tensor-parallel plan; use parallel.tp=1 with dp_shard, or parallelize the module in your "
            "own loop and inject afterwards"
        )
    check_heads(module, mesh.size(), plan)
    styles, settled = expert_styles(module, plan, mesh.size(), sequence=sequence)
    routers = [name for name, style in styles.items() if isinstance(style, MixtureOfTokens)]
    plan = {name: word for name, word in plan.items() if name not in settled}
    for name, word in plan.items():
        if word not in _STYLES:
            raise ValueError(f"{name}: the model's plan says {word!r}, which is not known here; known: {', '.join(sorted(_STYLES))}")
        style = _STYLES[word]()
        if style is not None:
            styles[name] = style
    between = Shard(1) if sequence else Replicate()
    for parent in _parents({name for name, word in plan.items() if word == "colwise"}, module):
        # The parent's input becomes one DTensor for all its column-parallel layers: one gather, and one reduction of its gradient.
        attention = parent.endswith(("attn", "attention"))
        layout: dict[str, Any] = {"use_local_output": False}
        if attention:
            layout |= {"input_kwarg_layouts": {"hidden_states": between}, "desired_input_kwarg_layouts": {"hidden_states": Replicate()}}
        else:
            layout |= {"input_layouts": (between,), "desired_input_layouts": (Replicate(),)}
        styles[parent] = PrepareModuleInput(**layout)
    if sequence:
        _shard_tokens(styles, plan, module)
    named = {name: key for name, _ in module.named_modules() for key in (_starred(name), name) if key in styles}
    parallelize_adapted(module, mesh, {name: styles[key] for name, key in named.items()}, src_data_rank=None)
    for name, m in module.named_modules():
        norm_of_heads = plan.get(_starred(name)) == "replicated_with_grad_allreduce"
        if norm_of_heads or (sequence and _is_norm(name)):
            base.in_parts += [(m, leaf) for leaf, p in m.named_parameters(recurse=False) if not isinstance(p, DTensor)]
    for mixture in map(module.get_submodule, routers):
        parts = [(m, leaf) for m in mixture.modules() for leaf, p in m.named_parameters(recurse=False) if not isinstance(p, DTensor)]
        base.in_parts += parts


def _parents(starred: Collection[str], module: nn.Module) -> list[str]:
    """The modules that hold layers of these names: a dense feed-forward, and not the mixture that has its name in another block."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in module.named_modules() if _starred(name) in starred))


def _shard_tokens(styles: dict[str, ParallelStyle], plan: dict[str, str], module: nn.Module) -> None:
    # The model's own forward computes masks from the shape of the embeddings, so tokens are sharded at the first block's door.
    blocks = _starred(blocks_of(module)[0][0])
    styles[blocks.replace("*", "0")] = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
    )
    for name, word in plan.items():
        if word == "rowwise":
            styles[name] = RowwiseParallel(output_layouts=Shard(1))
        elif word in ("colwise_gather_output", "colwise_rep"):
            styles[name] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    if "lm_head" not in plan:
        raise ValueError("parallel.sequence_parallel: the model's plan does not name its output head; use sequence_parallel=false")


def _is_norm(name: str) -> bool:
    """Norms of blocks and the last norm: what holds parameters, outside the plan, between the first block's door and the head."""
    return "norm" in name.rpartition(".")[2]


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def check_heads(module: nn.Module, tp: int, plan: Mapping[str, str]) -> None:
    """Heads are not split: tp must divide the key-value heads and the attention heads, where the plan shares them out."""
    if not any(name.rpartition(".")[0].endswith(("attn", "attention")) for name in plan):
        return
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for field_name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, field_name, None)
        if heads and heads % tp:
            fits = [t for t in range(1, heads + 1) if heads % t == 0]
            raise ValueError(f"parallel.tp={tp} does not divide {field_name}={heads} of this model; degrees that do: {fits}")
