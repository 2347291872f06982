"""What a piece of training costs, counted and not timed: the numbers are exact, and the same on every machine.

    saved_bytes    what autograd keeps between a forward and its backward
    flops          of matrix products
    traffic        collectives, and the bytes of their buffers

`launch/bench.py` prints them, and tests compare them with what the design promises.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
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
    """Counts the collectives of this rank and their bytes, as `collective` does: those of FSDP2, DTensor and plain calls."""
    found = Traffic()
    with _Watch(found):
        yield found


class _Watch(TorchDispatchMode):
    def __init__(self, found: Traffic) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_plain(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if (kind_and_size := collective(func, args, result)) is not None:
            kind, size = kind_and_size
            self.found.count[kind] += 1
            self.found[kind] += size
        return result


KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send", "recv", "p2p", "scatter", "gather", "reduce")


def collective(func: Any, args: Any, result: Any) -> tuple[str, int] | None:
    """The kind of a collective that an operator is, and its bytes; None if it is none.

    The bytes are those of its whole buffer, the larger of what goes in and what comes out: what an all-gather gives, what a
    reduce-scatter takes. A ring of n ranks sends (n - 1) / n of them from each rank, and an all-reduce twice that.
    """
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    word = func._schema.name.partition("::")[2]
    for short, spelled in (("allgather", "all_gather"), ("allreduce", "all_reduce"), ("alltoall", "all_to_all")):
        word = word.replace(short, spelled)
    kind = next((k for k in KINDS if k in word), None)
    if kind is None:
        return None
    # c10d's operators take input and output as two arguments, each a tensor or lists of them; functional ones return the output.
    buffers = [sum(t.numel() * t.element_size() for t in tree_leaves(part) if isinstance(t, Tensor)) for part in (*args, result)]
    if func.namespace == "c10d":
        buffers.pop()  # what it returns is an argument once more
    return kind, max(buffers, default=0)


def is_plain(types: Any) -> bool:
    """Whether an operator acts on tensors as they are. On a DTensor a mode steps back: what it does to local tensors comes by again."""
    return all(t in (Tensor, nn.Parameter, FakeTensor) for t in types)


def max_memory(device: torch.device) -> int:
    """Peak bytes of this process: of the accelerator, or resident on the CPU."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


__all__ = ["Traffic", "collective", "flops", "is_plain", "max_memory", "saved_bytes", "traffic"]
