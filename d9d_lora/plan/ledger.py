"""Counts what runs under it: bytes of collectives by (phase, axis of the mesh, kind), and bytes of living storages.

It is one dispatch mode, and sees real tensors and fake ones alike; that is how a rehearsal can be held against a real run.

The bytes of a collective are those of its whole buffer, as everywhere here (`measure.collective`). Scalars (norms, sums of losses) are
left out.
"""

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d9d_lora.measure import collective, is_plain

SCALARS = 64  # bytes
Key = tuple[str, str, str]


class Ledger(TorchDispatchMode):
    """Use it in a `with`.

    Args:
        mesh: Its axes name the groups of ranks.
        groups: Names of other groups, such as several axes together; a group without a name is "world".
        first: Names that come before those of the mesh: an axis that has all ranks shares its group with others.

    Attributes:
        phase: What is going on now; the owner sets it.
        traffic, count: Bytes and numbers of collectives by (phase, axis, kind).
        live: Bytes of the storages that were made here and live now.
        gathered: Those of them whose storage was resized at any time: FSDP2's whole parameters.
        peak: The most of `live` since `mark()`.
        largest: The largest buffer that was gathered along `dp_shard` or `efsdp` since `mark()`.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None,
        groups: Mapping[str, ProcessGroup | None] | None = None,
        *,
        first: Mapping[str, ProcessGroup] | None = None,
    ) -> None:
        super().__init__()
        self.phase = ""
        self.traffic: Counter[Key] = Counter()
        self.count: Counter[Key] = Counter()
        self.live = self.peak = self.gathered = self.largest = 0
        names = () if mesh is None else mesh.mesh_dim_names or ()
        self._axes = {str(group.group_name): name for name, group in (first or {}).items()}
        for i, n in enumerate(names):
            if mesh is not None and mesh.size(i) > 1:
                self._axes.setdefault(str(mesh.get_group(n).group_name), n)
        for name, group in (groups or {}).items():
            if group is not None:
                self._axes.setdefault(str(group.group_name), name)
        self._sizes: dict[int, int] = {}  # storage -> its bytes
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resized: set[int] = set()

    def mark(self) -> None:
        """Forgets traffic and peak, from here on."""
        self.traffic.clear()
        self.count.clear()
        self.peak, self.largest = self.live, 0

    def __enter__(self) -> Self:
        self._real = real = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 frees and takes memory so, which no operator sees
            result = real(storage, size)
            self._note(storage)
            key = storage._cdata
            if key not in self._resized:
                self._resized.add(key)
                self.gathered += self._sizes[key]
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._real  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_plain(types):
            return NotImplemented
        if func is torch.ops._c10d_functional.wait_tensor.default and isinstance(args[0], FakeTensor):
            return args[0]  # as it really is: the fake one would be a second tensor, and memory that nobody takes
        result = func(*args, **(kwargs or {}))
        if (kind_and_size := collective(func, args, result)) is not None:
            self._collective(*kind_and_size, args)
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and not isinstance(t, AsyncCollectiveTensor):  # that one has no memory of its own
                self._note(t.untyped_storage())
        return result

    def _collective(self, kind: str, size: int, args: Any) -> None:
        if size <= SCALARS or kind == "recv":  # what is received, another rank has sent
            return
        axis = self._axes.get(_group_name(args), "world")
        self.traffic[self.phase, axis, kind] += size
        self.count[self.phase, axis, kind] += 1
        if axis in ("dp_shard", "efsdp") and kind == "all_gather":
            self.largest = max(self.largest, size)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))  # type: ignore[misc]
        change = size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.live += change
        if key in self._resized:
            self.gathered += change
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        size = self._sizes.pop(key)
        del self._alive[key]
        self.live -= size
        if key in self._resized:
            self._resized.discard(key)
            self.gathered -= size


def _group_name(args: Any) -> str:
    for a in tree_leaves(args):
        if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()):
            return ProcessGroup.unbox(a).group_name
    return next((a for a in reversed(args) if isinstance(a, str)), "")
