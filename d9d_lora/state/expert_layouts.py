"""How other programs lay out the factors of a stack of experts: pure functions of whole tensors.

Ours: A[E, I, R], B[E, R, O], dW_e = s (A_e B_e)^T. Letters as in `methods/grouped.py`; the layouts here are

    fused        A[E R, I] expert after expert, B[O, R E] rank after rank: column r E + e of B is column r of B_e. PEFT writes it for
                 `target_parameters`; vLLM reads it for models that it calls 3-D (`experts.base_layer`: gate and up, `experts`: down)
    per expert   A_e[R, I], B_e[O, R] under a name for each expert, and for gate and up: what PEFT writes for models whose experts
                 are modules, and what vLLM reads for all other models
    GGUF         A[E, R, I], B[E, O, R]: llama.cpp multiplies the row of a token by matrix e of both, `alpha / R` being the scale

Sources: peft 0.21.2, `ParamWrapper`; vLLM, `lora/model_manager.py`; llama.cpp, `build_lora_mm_id`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # A[R, I], B[O, R] of one matrix


def fused_A(A: Tensor) -> Tensor:
    """[E, I, R] -> [E R, I]"""
    return A.mT.flatten(0, 1)


def fused_B(B: Tensor) -> Tensor:
    """[E, R, O] -> [O, R E]"""
    return B.permute(2, 1, 0).flatten(1)


def from_fused_A(A: Tensor, experts: int) -> Tensor:
    """[E R, I] -> [E, I, R]"""
    return A.unflatten(0, (experts, -1)).mT


def from_fused_B(B: Tensor, experts: int) -> Tensor:
    """[O, R E] -> [E, R, O]"""
    return B.unflatten(1, (-1, experts)).permute(2, 1, 0)


def stacked_A(A: Tensor) -> Tensor:
    """[E, I, R] -> [E, R, I]: A_e of expert e is a matrix [R, I] of it."""
    return A.mT


def stacked_B(B: Tensor) -> Tensor:
    """[E, R, O] -> [E, O, R]"""
    return B.mT


def beside(value: Tensor, start: Tensor, *, is_A: bool) -> Tensor:
    """[A|A0] along the rank, or [B|-B0], of rank 2 R: A B - A0 B0."""
    start = start.to(value)
    return torch.cat([value, start if is_A else -start], 2 if is_A else 1)


def per_expert(A: Tensor, B: Tensor, slices: Sequence[int] | None = None) -> list[list[Pair]]:
    """[expert][slice] -> (A_e[R, I], B_e[O_k, R]); `slices`: the rows O_k of what is fused in one matrix (gate, up)."""
    cut = list(slices or [B.shape[2]])
    if sum(cut) != B.shape[2]:
        raise ValueError(f"slices {cut} are {sum(cut)} rows, and the matrices have {B.shape[2]}")
    return [[(A_e.T, B_k.T) for B_k in B_e.split(cut, 1)] for A_e, B_e in zip(A, B)]
