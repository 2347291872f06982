"""Products of a placed weight W[O,I] with thin matrices: how a start reads the base weight without gathering it.

    times(X[I,k])  = W X      each rank multiplies its own box; one sum of O k numbers over the ranks that share W
    turned(Y[O,k]) = W^T Y    the same, of I k numbers

Results are whole and equal on every rank, in fp32 (fp64 for fp64). Collective where W is sharded.
"""

from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from d9d_lora.placement import at_least_fp32, box_of, local_of


class Thin:
    """A weight on any layout, to be multiplied by thin matrices.

    Args:
        weight: The base weight; of a convolution [O, I, taps...], whose columns are channels times taps.
        axes: "OI" or "IO", its first two dimensions.
        values: This rank's part of it, where it is not the weight itself (a quantised weight, dequantised).
    """

    def __init__(self, weight: Tensor, axes: str, values: Tensor | None = None) -> None:
        taps = prod(weight.shape[2:])
        box = box_of(weight)
        rows, cols = (box[axes.index(letter)] for letter in "OI")
        out, into = (weight.shape[axes.index(letter)] for letter in "OI")
        self.rows, self.cols = rows, slice(cols.start * taps, cols.stop * taps)
        self.shape = (out, into * taps)
        local = local_of(weight).detach() if values is None else values.detach()
        self._local = (local if axes == "OI" else local.transpose(0, 1)).reshape(rows.stop - rows.start, -1)
        self._groups = _groups_of(weight)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self._local.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        return self._local.device

    def times(self, x: Tensor) -> Tensor:
        """W X: [I, k] -> [O, k]."""
        y = x.new_zeros((self.shape[0], x.shape[1]))
        y[self.rows] = at_least_fp32(self._local).to(x.dtype) @ x[self.cols]
        return self._sum(y)

    def turned(self, y: Tensor) -> Tensor:
        """W^T Y: [O, k] -> [I, k]."""
        x = y.new_zeros((self.shape[1], y.shape[1]))
        x[self.cols] = at_least_fp32(self._local).to(y.dtype).T @ y[self.rows]
        return self._sum(x)

    def columns(self, n: int) -> Tensor:
        """The first n columns of W, [O, n]."""
        y = torch.zeros((self.shape[0], n), dtype=self.dtype, device=self.device)
        stop = min(n, self.cols.stop)
        if stop > self.cols.start:
            y[self.rows, self.cols.start : stop] = at_least_fp32(self._local[:, : stop - self.cols.start])
        return self._sum(y)

    def row_squares(self) -> Tensor:
        """The square norm of every row of W, [O]."""
        y = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        y[self.rows] = at_least_fp32(self._local).square().sum(1)
        return self._sum(y)

    def _sum(self, t: Tensor) -> Tensor:
        for group in self._groups:
            dist.all_reduce(t, group=group)
        return t


class ThinStack(Thin):
    """A stack of matrices, W[E, O, I] or W[E, I, O]: as a whole the matrix [E O, I], and each of them by `one`.

    Its ranks may hold any box of it: some experts, some rows or some columns.
    """

    def __init__(self, weight: Tensor, axes: str) -> None:
        self._weight, self._axes = weight, axes
        self._groups = _groups_of(weight)
        box = box_of(weight)
        self.experts, self.rows, self.cols = (box[axes.index(letter)] for letter in "EOI")
        experts, out, into = (weight.shape[axes.index(letter)] for letter in "EOI")
        self.one_shape, self.shape = (out, into), (experts * out, into)
        local = local_of(weight).detach()
        self._local = local if axes == "EOI" else local.mT

    def one(self, e: int) -> Thin:
        """The matrix of expert e. Its products are collective, as those of the stack; ranks that hold none of it add nothing."""
        here = self.experts.start <= e < self.experts.stop
        one = Thin.__new__(Thin)
        one.rows, one.cols = (self.rows, self.cols) if here else (slice(0, 0), slice(0, 0))
        one.shape, one._groups = self.one_shape, self._groups
        one._local = self._local[e - self.experts.start] if here else self._local.new_empty(0, 0)
        return one


def _groups_of(weight: Tensor) -> list[dist.ProcessGroup]:
    """The ranks that hold other parts of a weight, one group a dimension of its mesh."""
    if not isinstance(weight, DTensor):
        return []
    mesh = weight.device_mesh
    return [mesh.get_group(i) for i, p in enumerate(weight.placements) if not p.is_replicate()]
