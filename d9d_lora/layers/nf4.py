"""y = x Q^T + b + drop(x) dW^T, with Q[O,I] frozen and packed in four bits (`quant/`): QLoRA, arXiv:2305.14314.

The factors are as beside any other weight: in fp32, placed by the letters O and I. What reads the base weight (DoRA's norm) reads Q.

A merge would give Q + dW, which four bits do not hold. So it is refused unless it is asked for (`merge_peft(..., dequantise=True)`), and
puts a plain `nn.Linear` of the layer's dtype in the place. The packed layer is kept as it is, so undoing is exact.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from d9d_lora.init.loftq import loftq
from d9d_lora.layers.base import HOOKS, Fold
from d9d_lora.layers.fused import Restore
from d9d_lora.layers.linear import AdaptedLinear
from d9d_lora.methods.delta import DoesNotFit, Geometry
from d9d_lora.placement import at_least_fp32, box_of, local_of
from d9d_lora.quant.linear import NF4Linear, restored
from d9d_lora.thin import Thin


class AdaptedNF4Linear(AdaptedLinear):
    """An adapted `NF4Linear`."""

    takes_shift = False  # its merge puts another layer in the base's place
    base: NF4Linear

    def __init__(self, base: NF4Linear, delta: Any, *, name: str = "", **options: Any) -> None:
        if delta.moves_base:
            raise DoesNotFit(
                f"{name}: {delta} moves the base weight, and a quantised one holds sixteen values a block. Use the start loftq, which "
                "takes the error of the quantisation, or a start that leaves the base alone; or do not quantise this layer"
            )
        self.found: dict[str, Tensor] = {}  # LoftQ's factors, this rank's parts, between the load and the start
        super().__init__(base, delta, name=name, **options)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(module, NF4Linear)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        return None

    @classmethod
    def geometry(cls, base: nn.Module) -> Geometry:
        assert isinstance(base, NF4Linear | nn.Linear)  # after a merge a plain one
        return Geometry(base.out_features, base.in_features, quantised=True)

    @property
    def base_dtype(self) -> torch.dtype:
        return self.base.dtype

    # -- the weight --------------------------------------------------------------------------------------------------------

    def weight_here(self) -> Tensor:
        return self.base.unpacked_here()

    def thin(self) -> Thin:
        if not isinstance(self.base, NF4Linear):
            return super().thin()
        return Thin(self.base.outline(), "OI", self.base.unpacked_here(at_least_fp32(torch.empty(0, dtype=self.base.dtype)).dtype))

    @classmethod
    def plain_forward(cls) -> Callable[..., Any]:
        return NF4Linear.forward

    def weight_to_restore(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Restore]:
        return tuple(self.base.packed_here()), partial(restored, self.base.columns_here(), self.base.block, dtype)

    def adds_bias_inside(self) -> bool:
        return False  # as `product`: the same rounding as of the bare layer

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.base.product(x)
        return y if bias is None else y + bias.to(y.dtype)

    # -- starts ------------------------------------------------------------------------------------------------------------

    def start_from_unquantised(self, W: Tensor, *, alone: bool = True) -> None:
        """LoftQ: called while a checkpoint streams, with the weight as the packed one is placed; `alone`: no other adapter shares the base.

        Packs the base, and keeps the factors until `reset_parameters`.
        """
        if self.delta.loftq_iter > 1 and not alone:
            raise ValueError(f"{self.name}: with loftq_iter above 1 a base is made for one adapter, and several share this one. Give 1")
        if self.factor("lora_A").is_meta:
            raise ValueError(f"{self.name}: its factors are on meta; call to_empty(device=...) on the model before the weights are loaded")
        B, A = loftq(self.base, W, self.delta.sizes(self.out_size, self.in_size)["R"], self.delta.scaling, self.delta.loftq_iter)
        for name, value in {"lora_A": A, "lora_B": B}.items():
            self.found[name] = value[box_of(self.factor(name))].clone()

    def start_from_weight(self) -> None:
        if self.delta.loftq_iter:
            if not self.found:
                raise RuntimeError(
                    f"{self.name}: LoftQ starts from the weight as it was before it was quantised, and that has not been seen here. Load "
                    "the checkpoint after the injection (the trainer does, with model.quantise=nf4), or inject with another start and "
                    "call d9d_lora.init.loftq.replace_lora_weights_loftq with the checkpoint"
                )
            for name, value in self.found.items():
                local_of(self.factor(name)).copy_(value)
            self.found = {}
        super().start_from_weight()

    def put_factors(self, whole: dict[str, Tensor]) -> None:
        """Writes whole factors, and starts anew what follows from them (DoRA's magnitude)."""
        for name, value in whole.items():
            local_of(self.factor(name)).copy_(value[box_of(self.factor(name))])
        if self.delta.from_the_weight:
            super().start_from_weight()

    # -- merge -------------------------------------------------------------------------------------------------------------

    def check_merge(self) -> None:
        if not self.base.merge_dequantises:
            raise ValueError(
                f"{self.name} has a quantised base, which cannot hold the sum. Merge with merge_peft(method, model, dequantise=True), "
                f"which puts a plain {self.base.dtype} layer in its place, or merge the adapter into the original checkpoint's files"
            )

    def keep(self) -> NF4Linear:
        return self.base

    def put_back(self, kept: NF4Linear) -> None:
        self.base = kept

    @torch.no_grad()
    def merge_with_base_(self, whole: dict[str, Tensor] | None = None, change: Fold | None = None) -> nn.Module:
        plain: Any = self.plain_base()
        self.base = plain
        return super().merge_with_base_(whole, change)

    def give_back(self) -> nn.Module:
        if isinstance(self.base, NF4Linear):
            return super().give_back()
        self._unwatch()
        for hooks in HOOKS:  # copied: under FSDP2 the plain layer has hooks of its own, which must not come back with ours
            getattr(self.base, hooks).update(getattr(self, hooks))
        return self.base

    def plain_base(self) -> nn.Linear:
        """The base as a plain linear layer with the same placement. Under FSDP2 it is a unit of its own."""
        base = self.base
        new = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, dtype=base.dtype, device="meta")
        new.requires_grad_(False).train(base.training)
        for name, axes in {"weight": "OI", "bias": "O"}.items():
            if (p := getattr(new, name)) is not None:
                setattr(new, name, nn.Parameter(self.placing.distribute(p.detach(), axes), requires_grad=False))
        if (mesh := self._data_parallel_mesh()) is not None:
            fully_shard(new, mesh=mesh)
        new.to_empty(device=local_of(base.weight).device)
        local_of(new.weight).copy_(base.unpacked_here())
        if base.bias is not None:
            local_of(new.bias).copy_(local_of(base.bias))
        return new

    def _data_parallel_mesh(self) -> DeviceMesh | None:
        """The mesh that FSDP2 shards the base over, if it does."""
        weight = self.base.weight
        if not isinstance(weight, DTensor) or weight.device_mesh.ndim == (self.placing.mesh is not None):
            return None
        if self.placing.mesh is None:
            return weight.device_mesh
        names = weight.device_mesh.mesh_dim_names
        assert names is not None  # FSDP2 with tensor parallelism needs them too
        return weight.device_mesh[names[:-1]]
