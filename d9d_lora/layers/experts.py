"""The experts of a transformers model: y = sum over a token's experts e of p_e down_e(act(gate_up_e(x))), with adapters on the stacks.

transformers keeps the experts of a layer in one module: `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I] (turned where it says
`is_transposed`), and asks a registry how to multiply them (`config._experts_implementation`). Ours is registered there as "d9d_lora": it
sorts rows by expert, and each product is a grouped one with its adapter beside it (`layers/grouped_mm.py`), so no W + dW is ever built, and
the adapter has an input: dropout and a magnitude work.

[Note: one config for each adapted module]
The config that names the implementation is shared by all modules. An adapted module gets a copy of its own that names ours, and its old
one back with its last adapter; modules without adapters keep theirs.

[Note: experts of which ranks hold parts]
Where a plan of ours has placed the stacks (`placed`), they are DTensors, adapters follow them, and the module is multiplied here also where
nothing is adapted. Where the stacks are Shard(0), rows travel to their experts' ranks and back around it (`layers/dispatch.py`).
"""

import copy
import sys
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from d9d_lora.layers.dispatch import Journey
from d9d_lora.layers.grouped import AdaptedProduct, Sorted
from d9d_lora.layers.grouped_mm import Groups, grouped_mm
from d9d_lora.layers.parameter import SUFFIX, AdaptedParameter, AdaptedStack, Held

NAME = "d9d_lora"
_PLACED = "_d9d_lora_placed"
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "num_experts")  # what the registry gives a module


class AdaptedExperts(AdaptedProduct, AdaptedStack):
    """An adapted stack of an experts module of transformers."""

    sees_input = True
    _shared: Any = None  # the config that its module had, while it is at work

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return AdaptedStack.fits(module) and isinstance(module, Held) and module.parameter in products(module.host)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        assert isinstance(module, Held)
        if getattr(module.host, "_is_expert_parallel", False):
            return (
                "its experts are shared out over ranks by transformers, which adapters do not follow; load the model without that plan, "
                "and use `d9d_lora.share_experts`"
            )
        return None if placed(module.host) else AdaptedStack.refuses(module)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:  # type: ignore[override]
        """x [rows, in], sorted by expert -> [rows, out]."""
        self.refuse_unstarted()
        if isinstance(self.base.weight, DTensor) and self.placing.mesh is None:
            raise RuntimeError(f"{self.name} has become {self.base.weight.placements}, and its adapter has not; leave it out of the plan")
        x = x.to(self.base_dtype)
        return self.adapted(Sorted(x, groups), lambda: grouped_mm(x, self.weight_turned(), groups))

    def take_over(self) -> Self:
        """[Note: one config for each adapted module]"""
        host: Any = self.base.host
        if self._shared is not None:  # it follows a base that was placed since
            return self
        _register()
        beside = _adapted(host)
        self._shared = beside[0]._shared if beside else host.config
        if not beside:
            host.config = _naming_ours(host.config)
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


def place(host: Any) -> None:
    """[Note: experts of which ranks hold parts] Call it once the stacks are placed; adapters that are there already follow."""
    _register()
    host.__dict__[_PLACED] = True
    adapters = _adapted(host)
    mine = _naming_ours(adapters[0]._shared if adapters else host.config)
    if not adapters:
        host.config = mine
    for adapter in adapters:
        adapter._shared = mine
        adapter.follow_base()


def placed(host: Any) -> bool:
    """Whether a plan of ours has placed the stacks of a module. [Note: experts of which ranks hold parts]"""
    return _PLACED in host.__dict__


def _naming_ours(config: Any) -> Any:
    mine = copy.copy(config)
    mine.__dict__["_experts_implementation_internal"] = NAME
    return mine


def _adapted(host: nn.Module) -> list[AdaptedExperts]:
    return [m for m in host._modules.values() if isinstance(m, AdaptedExperts) and m._shared is not None]


def products(host: Any) -> tuple[str, ...]:
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
        raise RuntimeError("the experts were shared out over ranks by transformers after the injection; use `share_experts` instead")
    top_k = top_k_index.shape[-1]
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(host.num_experts, device=ids.device), right=True).int()
    rows = hidden_states[order // top_k]
    group = group_of(host)
    if group is None:
        h = _through(host, rows, Groups(ends, tail=False))
    else:
        journey = _journey(host, ends, rows, group)
        h = journey.home(_through(host, journey.out(rows), journey.groups))
    h = h * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return h[back].view(-1, top_k, h.shape[-1]).sum(1).to(hidden_states.dtype)


def group_of(host: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that an experts module's experts are shared out over, as its weights say: Shard(0). None if each rank has all."""
    weight = host._parameters[products(host)[-1]]
    if not isinstance(weight, DTensor):
        return None
    axes = [i for i, p in enumerate(weight.placements) if p.is_shard(0)]
    return weight.device_mesh.get_group(axes[-1]) if axes else None


def is_shared_out(m: nn.Module) -> bool:
    """Whether a module is one of experts that ranks share out."""
    return bool(products(m)) and group_of(m) is not None


def _journey(host: Any, ends: Tensor, rows: Tensor, group: dist.ProcessGroup) -> Journey:
    divide = host.divides_gradients_by
    if isinstance(ends, FakeTensor):
        return Journey.even(len(rows), host.num_experts, group, rows.device, divide=divide)
    dropping = (a.dropout for a in _adapted(host) if a.training and a.dropout.p)
    clock = next((d.clock for d in dropping if d.clock is not None), None)
    return Journey.plan(ends.diff(prepend=ends.new_zeros(1)).long(), group, None if clock is None else clock.now, divide=divide)


def _through(host: Any, rows: Tensor, groups: Groups) -> Tensor:
    """Every row through its expert: [rows, H], sorted by expert -> [rows, H]."""
    up, down = products(host)
    h = _product(host, up, rows, groups)
    h = host._apply_gate(h) if host.has_gate else host.act_fn(h)
    h = _product(host, down, h, groups)
    return host.post_expert_norm(h) if getattr(host, "has_post_expert_norm", False) else h  # type: ignore[no-any-return]


def _product(host: Any, name: str, x: Tensor, groups: Groups) -> Tensor:
    adapter = host._modules.get(name + SUFFIX)
    if isinstance(adapter, AdaptedExperts):
        y: Tensor = adapter(x, groups)
    else:
        weight = _here(getattr(host, name))
        y = grouped_mm(x.to(weight.dtype), weight if host.is_transposed else weight.mT, groups)
    return y + _here(getattr(host, f"{name}_bias"))[groups.experts_of(len(y))] if host.has_bias else y


def _here(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p
