"""A low-rank update for each matrix of a stack W[E, O, I] (the fused experts of a mixture): dW_e = s B_e A_e.

`lora_A` [E R, I] holds A_e in the rows e R to (e + 1) R; `lora_B` [O, R E] holds column r of B_e at r E + e. These are the orders in
PEFT's files. At the start B = 0. As a matrix, the stack is [E O, I].
"""

from dataclasses import dataclass

from torch import Tensor

from d9d_lora.methods.delta import Around, Parts


@dataclass(frozen=True)
class StackedDelta(Around):
    """The delta `low`, with the factors of LoRA, for each of `n` matrices."""

    n: int
    axes = {"lora_A": "SI", "lora_B": "PS"}  # P, the rows of one matrix, is no axis of [E O, I]

    def sizes(self, out: int, into: int) -> dict[str, int]:
        size = self.low.sizes(out, into)
        return {**size, "S": size["R"] * self.n, "P": out // self.n}

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def dense(self, f: Parts) -> Tensor:
        A, B = f["lora_A"], f["lora_B"]
        A = A.view(self.n, -1, A.shape[1])
        B = B.view(B.shape[0], -1, self.n).permute(2, 0, 1)
        out = B.shape[1]
        first, last = f.rows.start // out, -(-f.rows.stop // out)  # the matrices that the rows of the box touch
        update = ((B[first:last] * self.scaling) @ A[first:last]).flatten(0, 1)
        return update[f.rows.start - first * out : f.rows.stop - first * out]

    def __str__(self) -> str:
        return f"{self.low} x {self.n}"
