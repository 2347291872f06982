"""The experts of a transformers model: y = sum over a token's experts e of p_e down_e(act(gate_up_e(x))), with adapters on the stacks.

transformers keeps the experts of a layer in one module: `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I] (turned where it says
`is_transposed`), and asks a registry how to multiply them (`config._experts_implementation`). Ours is registered there as "d9d_lora": it
sorts rows by expert, and each product is a grouped one with its adapter beside it (`layers/grouped_mm.py`), so no W + dW is ever built, and
the adapter has an input: dropout and a magnitude work.

[Note: one config for each adapted module]
The config that names the implementation is shared by all modules. An adapted module gets a copy of its own that names ours, and its old
one back with its last adapter; modules without adapters keep theirs.
"""

import copy
import sys
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.layers.grouped import AdaptedProduct, Sorted
from d9d_lora.layers.grouped_mm import Groups, grouped_mm
from d9d_lora.layers.parameter import SUFFIX, AdaptedParameter, AdaptedStack, Held

NAME = "d9d_lora"
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "num_experts")  # what the registry gives a module


class AdaptedExperts(AdaptedProduct, AdaptedStack):
    """An adapted stack of an experts module of transformers."""

    sees_input = True
    _shared: Any = None  # the config that its module had, while it is at work

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return AdaptedStack.fits(module) and isinstance(module, Held) and module.parameter in _products(module.host)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        assert isinstance(module, Held)
        if getattr(module.host, "_is_expert_parallel", False):
            return "its experts are shared out over ranks by transformers, which adapters do not follow; load the model without that plan"
        return AdaptedStack.refuses(module)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:  # type: ignore[override]
        """x [rows, in], sorted by expert -> [rows, out]."""
        self.refuse_unstarted()
        if isinstance(self.base.weight, DTensor):
            raise RuntimeError(f"{self.name} has become {self.base.weight.placements}, and its adapter has not; leave it out of the plan")
        x = x.to(self.base_dtype)
        return self.adapted(Sorted(x, groups), lambda: grouped_mm(x, self.weight_turned(), groups))

    def take_over(self) -> Self:
        """[Note: one config for each adapted module]"""
        host: Any = self.base.host
        _register()
        beside = _adapted(host)
        self._shared = beside[0]._shared if beside else host.config
        if not beside:
            host.config = copy.copy(host.config)
            host.config.__dict__["_experts_implementation_internal"] = NAME
        return self

    def give_back(self) -> nn.Module:
        host: Any = self.base.host
        shared, self._shared = self._shared, None
        if shared is not None and not _adapted(host):
            host.config = shared
        return self.base


def kind_of_parameter(base: Held) -> type[AdaptedParameter]:
    """The layer kind that adapts a parameter; its `refuses` says which it cannot."""
    return next((kind for kind in (AdaptedExperts, AdaptedStack) if kind.fits(base)), AdaptedParameter)


def _adapted(host: nn.Module) -> list[AdaptedExperts]:
    return [m for m in host._modules.values() if isinstance(m, AdaptedExperts) and m._shared is not None]


def _products(host: Any) -> tuple[str, ...]:
    """The stacks that a module of transformers' registry multiplies by, in their order; none of another module."""
    if "transformers.integrations.moe" not in sys.modules or not all(hasattr(host, mark) for mark in _MARKS):
        return ()
    if not hasattr(getattr(host, "config", None), "_experts_implementation"):
        return ()
    return ("gate_up_proj" if host.has_gate else "up_proj", "down_proj")


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(host: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module: hidden_states [N, H], top_k_index and top_k_weights [N, K] -> [N, H]."""
    if getattr(host, "_is_expert_parallel", False):
        raise RuntimeError("the experts were shared out over ranks after the injection, and their adapters were not; leave them whole")
    top_k = top_k_index.shape[-1]
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(host.num_experts, device=ids.device), right=True).int()
    groups = Groups(ends, tail=False)
    up, down = _products(host)
    h = _product(host, up, hidden_states[order // top_k], ids, groups)
    h = host._apply_gate(h) if host.has_gate else host.act_fn(h)
    h = _product(host, down, h, ids, groups)
    if getattr(host, "has_post_expert_norm", False):
        h = host.post_expert_norm(h)
    h = h * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return h[back].view(-1, top_k, h.shape[-1]).sum(1).to(hidden_states.dtype)


def _product(host: Any, name: str, x: Tensor, ids: Tensor, groups: Groups) -> Tensor:
    adapter = host._modules.get(name + SUFFIX)
    if isinstance(adapter, AdaptedExperts):
        y: Tensor = adapter(x, groups)
    else:
        weight = getattr(host, name)
        y = grouped_mm(x.to(weight.dtype), weight if host.is_transposed else weight.mT, groups)
    return y + getattr(host, f"{name}_bias")[ids] if host.has_bias else y
