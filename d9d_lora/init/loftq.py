"""LoftQ: B and A start as the part of the quantisation's error that they can hold.

    R = W;   repeat n times:   Q = quant(R);   U S V^T = W - Q;   B = U_r sqrt(S_r / s),  A = sqrt(S_r / s) V_r^T;   R = W - s B A

so that Q + s B A is near W[O,I]; with n = 1, Q is quant(W), as without LoftQ. W - Q is only multiplied by thin matrices, so nothing is
gathered. The error has no few large directions. Where the matrix is small its triplets are exact; else they come from `ROUNDS` rounds of
subspace iteration, whose product leaves little more error than the exact ones.

`replace_lora_weights_loftq` does the same for a model that is quantised already, from its original checkpoint.

Li et al. 2023, arXiv:2310.08659.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from d9d_lora.init.weights import EXTRA, leading, roughly_leading
from d9d_lora.placement import box_of, local_of
from d9d_lora.quant.linear import NF4Linear
from d9d_lora.thin import Thin

ROUNDS = 8


class LoftQConfig(BaseModel):
    """Settings of `init_lora_weights: loftq`."""

    model_config = ConfigDict(extra="forbid")

    loftq_bits: int = Field(4, description="4, for NF4; the base has no other form here")
    loftq_iter: int = Field(1, ge=1, description="how often quantising and taking the error's main part alternate")

    @field_validator("loftq_bits")
    @classmethod
    def _four(cls, bits: int) -> int:
        if bits != 4:
            raise ValueError(f"a quantised base has 4 bits here (NF4), got {bits}; leave loftq_bits out")
        return bits


@torch.no_grad()
def loftq(base: NF4Linear, W: Tensor, r: int, scaling: float, iterations: int = 1) -> tuple[Tensor, Tensor]:
    """Packs W, which is placed as the layer's packed weight is, and returns whole (B[O,r], A[r,I]). Collective where it is sharded."""
    rows, cols = box_of(base.outline())
    values = local_of(W).float()
    base.pack(base.placed(values))
    B, A = factors_of_error(base, values, r, scaling)
    for _ in range(iterations - 1):
        base.pack(base.placed(values - scaling * (B[rows] @ A[:, cols])))
        B, A = factors_of_error(base, values, r, scaling)
    return B, A


def factors_of_error(base: NF4Linear, values: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(B, A) with s B A the best rank-r part of W - Q; `values` is this rank's part of W."""
    error = Thin(base.outline(), "OI", values.float() - base.unpacked_here(torch.float32))
    exact = min(error.shape) <= 4 * (r + EXTRA)
    U, S, V = leading(error, r) if exact else roughly_leading(error, r, ROUNDS)
    root = (S / scaling).sqrt()
    return U * root, root[:, None] * V.T


@torch.no_grad()
def replace_lora_weights_loftq(
    model: nn.Module,
    source: str | os.PathLike[str],
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> list[str]:
    """Starts `lora_A` and `lora_B` of every quantised layer from W - Q, layer by layer, each rank reading its part of W.

    Args:
        model: Quantised, loaded and injected, on any layout. Collective.
        source: The original checkpoint: a safetensors file, or a directory of them.
        callback: Called with the model and the layer's name after each layer; where it says False on any rank, the layer gets back the
            factors it had. It may run the model, to see whether the layer has made it better.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: if there is no quantised layer with these factors, or one whose scaling is not positive.
        CheckpointError: if the checkpoint lacks a weight, or has it with another shape; nothing has been changed then.
    """
    from d9d_lora.layers.nf4 import AdaptedNF4Linear
    from d9d_lora.state.reader import assemble, local_runs
    from d9d_lora.state.safetensors_dir import CheckpointError, open_checkpoint
    from d9d_lora.walk import adapted_layers, reshard

    layers = [la for la in adapted_layers(model) if isinstance(la, AdaptedNF4Linear) and {"lora_A", "lora_B"} <= la.delta.axes.keys()]
    if not layers:
        raise ValueError("the model has no quantised layer with lora_A and lora_B; quantise it, inject lora or dora, and load it first")
    replaced = []
    with open_checkpoint(source) as files:
        keys = {la.name: _key(la.name, set(files.names()), getattr(model, "base_model_prefix", "")) for la in layers}
        for la in layers:
            key, shape = keys[la.name], (la.out_size, la.in_size)
            if key is None or tuple(files.shape(key)) != shape:
                found = "is not there" if key is None else f"has the shape {tuple(files.shape(key))}"
                raise CheckpointError(f"{la.name}.weight {found} in {source}; expected the original weight, {shape}")
        for la in layers:
            key = keys[la.name]
            assert key is not None
            reshard(model)
            names = [n for n, axes in la.delta.axes.items() if n in ("lora_A", "lora_B") or la.delta.from_the_weight]
            before = {n: local_of(la.factor(n)).clone() for n in names}
            values = assemble(lambda box, key=key: files.read(key, box), local_runs(la.base.outline()))  # type: ignore[misc]
            r = la.delta.sizes(la.out_size, la.in_size)["R"]
            B, A = factors_of_error(la.base, values.to(local_of(la.base.weight).device), r, la.delta.scaling)
            la.put_factors({"lora_A": A, "lora_B": B})
            if callback is None or _agreed(callback(model, la.name), local_of(la.base.weight).device):
                replaced.append(la.name)
                continue
            reshard(model)
            for n, value in before.items():
                local_of(la.factor(n)).copy_(value)
    return replaced


def _key(layer: str, present: set[str], prefix: str) -> str | None:
    """The name of a layer's weight in the file, with or without the prefix of the model's class."""
    name = f"{layer}.weight"
    return next((n for n in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in present), None)


def _agreed(kept: bool, device: torch.device) -> bool:
    """Whether every rank says so."""
    if not dist.is_initialized():
        return kept
    answer = torch.tensor(int(kept), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)
