"""How other programs lay out the factors of a stack of experts: pure functions of whole tensors.

Ours: A[E, I, R], B[E, R, O], dW_e = s (A_e B_e)^T. Letters as in `methods/grouped.py`; the layouts here are

    PEFT, fused       A[E R, I] expert after expert, B[O, R E] rank after rank: column r E + e of B is column r of B_e
    PEFT, per expert  A_e[R, I], B_e[O, R] under a name for each expert: files of models whose experts are modules
    GGUF              A[E, R, I], B[E, O, R]: llama.cpp multiplies the rows of an expert by matrix e of both
"""

import torch
from torch import Tensor


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
