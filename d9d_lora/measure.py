"""What a piece of training costs, counted and not timed: the numbers are exact, and the same on every machine.

    saved_bytes    what autograd keeps between a forward and its backward
    flops          of matrix products
    traffic        collectives, and the bytes that a rank puts in

`launch/bench.py` prints them, and tests compare them with what the design promises.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def saved_bytes(run: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """The bytes that a forward leaves behind for its backward, each storage once.

    Args:
        run: The forward; what it returns is kept until it is counted.
        known: Tensors that are there anyway, such as parameters; their storages are not counted.
    """
    there = {_storage(t) for t in known}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage would lend its address to the next

    def note(t: Tensor) -> Tensor:
        local = t.to_local() if isinstance(t, DTensor) else t
        if _storage(local) not in there:
            kept[_storage(local)] = local.untyped_storage().nbytes()
            alive.append(local)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = run()
    del result
    return sum(kept.values())


def _storage(t: Tensor) -> int:
    return (t.to_local() if isinstance(t, DTensor) else t).untyped_storage().data_ptr()


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, attention and convolutions in a run, backward included if it has one."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counter:
        run()
    return counter.get_total_flops()


def _in_place(y: Any, a: Any, b: Any, out_shape: Any = None, **_: Any) -> int:
    """y += a b, of shapes: torch counts only the kind that makes a new y."""
    return int(2 * a[0] * a[1] * b[1])


class Traffic(Counter[str]):
    """Bytes by kind of collective; `count` has how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts the collectives of this rank, with the bytes of their inputs; those of FSDP2, DTensor and plain calls."""
    found = Traffic()
    with _Watch(found):
        yield found


class _Watch(TorchDispatchMode):
    def __init__(self, found: Traffic) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            called = func._schema.name.partition("::")[2].replace("allgather", "all_gather").replace("allreduce", "all_reduce")
            if kind := next((word for word in KINDS if word in called), None):
                self.found.count[kind] += 1
                self.found[kind] += max((t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)), default=0)
        return func(*args, **(kwargs or {}))


KINDS = ("all_gather", "reduce_scatter", "all_reduce", "alltoall", "all_to_all", "broadcast", "send", "recv")


__all__ = ["Traffic", "flops", "saved_bytes", "traffic"]
