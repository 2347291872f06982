"""Tensor parallelism inside the experts of a transformers model: each rank has rows of gate and of up of every expert, columns of down.

    door       x [N, H] and the weights of a token's experts p [N, K] are whole on every rank
    inside     g, u = x W_gate^T, x W_up^T      [n, I/t] each, this rank's rows      h = act(g) u      y = p h W_down^T, a part of the sum
    leave      y [N, H], after the sum over a token's experts, is completed: one all-reduce

An adapter joins inside, before the output is completed, so it adds no collective. Backwards every rank has a part of dx and of dp: they
are added at the door, in one all-reduce. So the router, which stands before the door, has whole gradients and may be trained as it is.

Under sequence parallelism each rank has its own tokens between blocks. The door and the leave are then those of the whole mixture, router
included: tokens are gathered there, and the output's parts are scattered as they are summed; backwards the same, the other way round.
All that is inside has gradients that are parts: the trainer sums those of a router that is trained whole, and refuses an adapter of it;
a mixture with other layers in it (shared experts) is refused here.

The plan of a transformers model says it by words: `moe_tp_experts` for the module, and `packed_colwise` (gate above up), `colwise` or
`rowwise` for each of its stacks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from d9d_lora.boxes import cut, shard
from d9d_lora.layers.experts import place, products

EXPERTS = "moe_tp_experts"  # the plan's word for a module of experts
_CUT = {"packed_colwise": ("O", 2), "colwise": ("O", 1), "rowwise": ("I", 1)}  # of its stacks: the letter, and in how many blocks


class ExpertsParallel(ParallelStyle):
    """Shares out the rows and columns of every expert of one module.

    Args:
        words: The plan's word for each stack.
        alone: It brings whole inputs and completes the output by itself; else what is around it does (`MixtureOfTokens`).
    """

    def __init__(self, words: Mapping[str, str], *, alone: bool = True) -> None:
        super().__init__()
        self.words, self.alone = words, alone

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        axes = "EIO" if module.is_transposed else "EOI"
        for name in products(module):
            letter, blocks = _CUT[self.words[name]]
            p = module._parameters[name]
            assert p is not None
            part = cut(p, device_mesh, shard(axes.index(letter), blocks))
            module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
        if self.alone:
            module.register_forward_pre_hook(lambda m, args, kwargs: _enter(args, kwargs, device_mesh), with_kwargs=True)
            module.register_forward_hook(lambda m, args, y: _Complete.apply(y, device_mesh.get_group()))
        place(module)
        return module


class MixtureOfTokens(ParallelStyle):
    """A mixture, router and experts, between blocks that have shards of the tokens: x [B, S / t, H] -> [B, S / t, H]."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(m: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = args
            whole = DTensor.from_local(x, device_mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
            return whole.to_local(grad_placements=[Partial()]), *others

        def scatter(m: nn.Module, args: object, y: Any) -> Tensor:
            if not isinstance(y, Tensor):
                raise ValueError(f"{type(m).__name__} gives a {type(y).__name__}; expected its output alone, of which each rank has a part")
            return DTensor.from_local(y, device_mesh, [Partial()], run_check=False).redistribute(placements=[Shard(1)]).to_local()

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(scatter)
        return module


def expert_styles(
    module: nn.Module, plan: Mapping[str, str], tp: int, *, sequence: bool = False
) -> tuple[dict[str, ParallelStyle], set[str]]:
    """A style for each module of experts that a plan names, and the names of the plan that they settle.

    Args:
        plan: Words by starred names.
        sequence: Between blocks each rank has its own tokens.

    Raises:
        ValueError: experts that cannot be shared out so.
    """
    modules = {name for name, word in plan.items() if word == EXPERTS}
    settled = modules | {name for name in plan if name.rpartition(".")[0] in modules}
    found: dict[str, ParallelStyle] = {}
    for name, m in module.named_modules():
        starred = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if starred in modules:
            words = {leaf: plan.get(f"{starred}.{leaf}", "") for leaf in products(m)}
            if why := _refuses(m, words, tp):
                raise ValueError(f"parallel.tp={tp}: {name}: {why}")
            found[name] = ExpertsParallel(words, alone=not sequence)
            if sequence:
                mixture = name.rpartition(".")[0]
                _refuse_others(module.get_submodule(mixture), mixture)
                found[mixture] = MixtureOfTokens()
    return found, settled


def _refuse_others(mixture: nn.Module, name: str) -> None:
    """What else a mixture computes would be added on every rank."""
    others = [n for n, m in mixture.named_modules() if isinstance(m, nn.Linear)]
    if others:
        raise ValueError(
            f"parallel.sequence_parallel: {name} has the layers {others[:3]} beside its experts, and the parts of sums in a mixture of "
            "shards are proven for experts alone; give sequence_parallel=false"
        )


def _refuses(host: Any, words: Mapping[str, str], tp: int) -> str | None:
    if not words:
        return "its module is none of transformers' registry of experts, so nothing is known of how it multiplies; use parallel.tp=1"
    if unknown := {name: word for name, word in words.items() if word not in _CUT}:
        return f"the model's plan says {unknown} of its stacks; known are {', '.join(_CUT)}. Use parallel.tp=1"
    if host.has_bias or (host.has_gate and not host.is_concatenated) or getattr(host, "has_post_expert_norm", False):
        return "experts with biases, rows of gate and up in turn, or a norm behind them are not shared out inside; use parallel.tp=1"
    first, last = (words[name] for name in products(host))
    if (first, last) != ("packed_colwise" if host.has_gate else "colwise", "rowwise"):
        return f"the model's plan says {dict(words)}; expected rows first and columns then. Use parallel.tp=1"
    down = host._parameters["down_proj"]
    inner = down.shape[1 if host.is_transposed else 2]
    if inner % tp:
        fits = [t for t in range(1, min(inner, 64) + 1) if inner % t == 0]
        return f"its experts are {inner} wide, which {tp} ranks cannot share; degrees that can: {fits}"
    return None


def _enter(args: tuple[Any, ...], kwargs: dict[str, Any], mesh: DeviceMesh) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(hidden_states, top_k_index, top_k_weights), by position or by name."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = dict(zip(names, args)) | kwargs
    if set(given) != set(names) or any(isinstance(t, DTensor) for t in given.values()):
        kinds = {name: type(t).__name__ for name, t in given.items()}
        raise ValueError(f"experts under tensor parallelism were called with {kinds}; expected plain tensors {', '.join(names)}")
    x, p = _Door.apply(given["hidden_states"], given["top_k_weights"], mesh.get_group())
    return (x, given["top_k_index"], p), {}


class _Door(torch.autograd.Function):
    """Whole tensors, whose gradients are parts of a sum from here on."""

    @staticmethod
    def forward(ctx, x, p, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x), p.view_as(p)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dp):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad
        parts = [d for d, on in zip((dx, dp), wanted) if on]
        if len({d.dtype for d in parts}) > 1:
            wholes = [_sum(d, ctx.group) for d in parts]
        else:
            flat = _sum(torch.cat([d.reshape(-1) for d in parts]), ctx.group)
            wholes = [whole.view_as(d) for whole, d in zip(flat.split([d.numel() for d in parts]), parts)]
        every = iter(wholes)
        return *(next(every) if on else None for on in wanted[:2]), None


class _Complete(torch.autograd.Function):
    """A part of a sum becomes the sum; its gradient is whole already."""

    @staticmethod
    def forward(ctx, y, group):  # type: ignore[no-untyped-def]
        return _sum(y, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dy, None


def _sum(t: Tensor, group: Any) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(t.contiguous(), "sum", group))


__all__ = ["EXPERTS", "ExpertsParallel", "MixtureOfTokens", "expert_styles"]
