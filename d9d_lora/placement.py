"""Where the factors of an adapter lie, derived from the weight they adapt; what is added up over ranks is in `sums.py`.

Letters name axes, here and everywhere: `O` out, `I` in, `R` rank; W[O,I] is the frozen weight, dW = s B A with B[O,R] and A[R,I].

The one rule: the adapter's output is in the same parallel state as the base's output *before the base's own collective*, and
the two are added there. So an adapter adds no activation traffic of its own (where tokens are sharded, thin one may be worth it:
`layers/rank_space.py`):

    base                 A           B           output     gradient that is only this rank's part
    column, O sharded    Replicate   Shard(O)    Shard(-1)  A, and x (which shares the base's own reduction)
    row,    I sharded    Shard(I)    Replicate   Partial    B, and the bias
    replicated           Replicate   Replicate   as x       none (both, when x is a shard of the tokens)

A factor that has the sharded letter is sharded along it; one that has not is replicated, and each rank computes only a part of
its gradient. See [Note: who sums the replicated factor's gradient].

[Note: who sums the replicated factor's gradient]
By default the part is labelled `Partial`, and whoever meets it reduces it: FSDP2 before its reduce-scatter, DTensor operators,
or, where neither stands between, a hook on the parameter (`sum_after_backward`). Plain loops that know nothing of us are right.
A trainer that can do better builds `ReplicatedSum(layers)` (`sums.py`): the parts are then labelled as the parameter is, and `reduce()`
adds all of them in one flat all-reduce per optimiser step, after FSDP2's reduce-scatter and before the clip. Never do both: the sum
would be taken twice. Parameters that FSDP2 was told to ignore are whole on each data-parallel rank, and nobody but it adds those.

[Note: starts do not depend on the layout]
DTensor's own random operators give every shard of a CPU mesh the same values. So each factor is drawn whole, on the CPU, by a
generator seeded from (seed, full name), and each rank keeps its part (`fill_`).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from d9d_lora.boxes import box_of as box_of
from d9d_lora.boxes import cut, index_of, shard


@dataclass(frozen=True)
class Placing:
    """Where a layer's weight lies: the tensor-parallel mesh, and the letter of the axis which that mesh shards.

    Attributes:
        blocks: How many blocks of equal size that axis consists of, of each of which every rank has its part. [Note: blocks] in `boxes.py`
        experts, both: Of experts that are shared out over ranks, and inside over the ranks of `mesh` as well: the mesh which shards the
            letter E, and it with `mesh`, on which everything lies.
    """

    mesh: DeviceMesh | None = None
    letter: str | None = None
    blocks: int = 1
    experts: DeviceMesh | None = None
    both: DeviceMesh | None = None

    @classmethod
    def of(cls, weight: Tensor, axes: str, site: str) -> "Placing":
        """Reads the placement of a base weight whose dimensions are `axes`, for example "OI"."""
        if not isinstance(weight, DTensor):
            return cls()
        first, *rest = weight.placements
        if weight.device_mesh.ndim == 2 and axes[0] == "E" and type(first) is Shard and first.dim == 0:
            both = weight.device_mesh
            ep, tp = (both[name] for name in both.mesh_dim_names or ())
            inside = cls.of(DTensor.from_local(weight.to_local(), tp, rest, run_check=False), axes, site)
            return cls(tp, inside.letter, inside.blocks, ep, both)
        if weight.device_mesh.ndim != 1:
            raise ValueError(
                f"{site}: its weight lies on the {weight.device_mesh.ndim}-D mesh {weight.device_mesh}, and an adapter follows the "
                "tensor-parallel axis alone. Apply the tensor-parallel plan, inject, and only then call fully_shard."
            )
        (placement,) = weight.placements
        if placement.is_replicate():
            return cls(weight.device_mesh, None)
        if not isinstance(placement, Shard | _StridedShard):
            raise ValueError(f"{site}: its weight is {placement}; expected Shard or Replicate.")
        return cls(weight.device_mesh, axes[placement.dim], getattr(placement, "split_factor", 1))

    def of_factor(self, axes: str) -> Placement:
        """The placement of a factor whose dimensions are `axes`: sharded along the base's letter if it has it."""
        return shard(axes.index(self.letter), self.blocks) if self.letter and self.letter in axes else Replicate()

    def distribute(self, factor: Tensor, axes: str) -> Tensor:
        """Gives each rank its part of a factor; no communication, so its values must come from `fill_`."""
        if self.mesh is None:
            return factor
        if self.both is None:
            return cut(factor, self.mesh, self.of_factor(axes))
        inside = factor if isinstance(factor, DTensor) else cut(factor, self.mesh, self.of_factor(axes))
        part, over_experts = inside.to_local(), Replicate()  # type: Tensor, Placement
        if "E" in axes:
            start, n = self.span(factor.shape[0], "E")
            part, over_experts = part[start : start + n], Shard(0)
        placements = [over_experts, self.of_factor(axes)]
        return DTensor.from_local(part.clone(), self.both, placements, run_check=False, shape=factor.shape, stride=factor.stride())

    def span(self, size: int, letter: str) -> tuple[int, int]:
        """(start, length) of this rank's part of an axis of `size` named `letter`."""
        mesh = self.experts if letter == "E" and self.experts is not None else self.mesh if letter == self.letter else None
        if mesh is None:
            return 0, size
        if mesh is self.mesh and self.blocks > 1:
            raise RuntimeError(f"axis {letter} is sharded in {self.blocks} blocks, and a rank's part of it is no one span: ask `index_of`")
        chunk = -(-size // mesh.size())  # as torch.chunk cuts; torch's own helper makes a tensor of it, at every forward
        start = min(size, chunk * mesh.get_local_rank())
        return start, min(chunk, size - start)

    def enter(self, x: Tensor, wanted: Placement | None, site: str) -> tuple[Tensor, bool]:
        """The local part of a layer's input, and whether the gradients of replicated factors are parts.

        `wanted` is the state the layer computes in; None takes x as it comes. The hooks that `parallelize_module` put on the
        layer have already brought x there, so nothing travels here.
        """
        if self.mesh is None:
            return x, False
        if not isinstance(x, DTensor):
            raise ValueError(
                f"{site}: its weight is tensor-parallel, but its input is a plain tensor of shape {tuple(x.shape)}, of which nobody "
                "can say what part it is. Use the styles of torch.distributed.tensor.parallel (they annotate inputs), or DTensors."
            )
        if wanted is not None and x.placements != (wanted,):
            x = x.redistribute(placements=[wanted])
        (state,) = x.placements
        grad_state: Placement = Partial() if self.letter == "O" else state
        local = x.to_local(grad_placements=[grad_state]) if x.requires_grad else x.to_local()
        return local, self.letter is not None or state.is_shard()

    def leave(self, y: Tensor, x: Any, out_size: int) -> Tensor:
        """Labels the layer's local output with the state it is in; the base's own output hook takes it from there."""
        if self.mesh is None:
            return y
        if self.letter == "I":
            return DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        if self.letter is None:
            return DTensor.from_local(y, self.mesh, x.placements, run_check=False)
        # The global shape is told, not guessed: with `out` not a multiple of the ranks, local x ranks is wrong.
        shape = torch.Size((*y.shape[:-1], out_size))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, self.mesh, [Shard(y.ndim - 1)], run_check=False, shape=shape, stride=stride)

    def local(self, p: Tensor, axes: str, *, parts: bool) -> Tensor:
        """The local part of a parameter; with `parts`, its gradient is labelled as only this rank's part of the sum."""
        if not isinstance(p, DTensor):
            return p
        states = list(p.placements)
        if parts and not (self.letter and self.letter in axes):
            states[-1] = Partial()
        if parts and self.both is not None and "E" not in axes:
            states[0] = Partial()
        return p.to_local(grad_placements=states)

    @property
    def over_experts(self) -> DeviceMesh | None:
        """The ranks that hold other experts."""
        return self.mesh if self.letter == "E" else self.experts

    def total(self, t: Tensor) -> Tensor:
        """Adds a tensor over the ranks that hold the other columns of the same rows; no gradient passes."""
        if self.mesh is None or self.letter != "I":
            return t
        t = t.contiguous()
        dist.all_reduce(t, group=self.mesh.get_group())
        return t

    def is_first(self) -> bool:
        """Whether this rank adds what must be added once to a Partial sum, such as the bias of a row-parallel layer."""
        return self.mesh is None or self.letter != "I" or self.mesh.get_local_rank() == 0

    def __str__(self) -> str:
        names = {None: "replicated", "O": "column", "I": "row", "E": "experts"}
        around = "" if self.experts is None else f"experts / {self.experts.size()}, "
        return "local" if self.mesh is None else f"{around}{names[self.letter]} / {self.mesh.size()}"


def place_like(
    weight: Tensor, weight_axes: str, shape: torch.Size, axes: str, dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """An empty tensor with dimensions `axes`, sharded as the weight is along the letters they share, whole along the others.

    `device`: where it is, if not where the weight is; "meta" for its outline alone.
    """
    if not isinstance(weight, DTensor):
        return torch.empty(shape, dtype=dtype, device=device or weight.device)
    placements: list[Placement] = []
    for p in weight.placements:
        letter = None if p.is_replicate() else weight_axes[p.dim]  # type: ignore[attr-defined]
        if letter is None or letter not in axes:
            placements.append(Replicate())
        else:
            dim = axes.index(letter)  # a _StridedShard stays one
            placements.append(_StridedShard(dim, split_factor=p.split_factor) if isinstance(p, _StridedShard) else Shard(dim))
    empty = torch.empty(shape, dtype=dtype, device="meta")
    local, _ = compute_local_shape_and_global_offset(shape, weight.device_mesh, placements)
    part = torch.empty(local, dtype=dtype, device=device or weight.to_local().device)
    return DTensor.from_local(part, weight.device_mesh, placements, run_check=False, shape=shape, stride=empty.stride())


def ranks_of_experts(p: Tensor) -> int:
    """Over how many ranks the experts are shared out that a parameter is of: those of the axis `ep` of its mesh, where it has one."""
    mesh = p.device_mesh if isinstance(p, DTensor) else None
    return mesh["ep"].size() if mesh is not None and "ep" in (mesh.mesh_dim_names or ()) else 1


def is_of_own_experts(p: Tensor) -> bool:
    """Whether ranks of `ep` hold other parts of a parameter, so that its gradient is a sum over their data already. A factor that is one
    for all experts is whole on each of them, and its gradient is a part."""
    if ranks_of_experts(p) == 1:
        return False
    assert isinstance(p, DTensor)
    return not p.placements[(p.device_mesh.mesh_dim_names or ()).index("ep")].is_replicate()


def local_of(p: Tensor) -> Tensor:
    """The tensor this rank holds of `p` (writing to it under `no_grad` writes to `p`; `p.data = ...` would do nothing)."""
    return p.to_local() if isinstance(p, DTensor) else p


def full_of(p: Tensor) -> Tensor:
    """All of `p` on every rank. For rank-r factors only: never gather a base weight."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def at_least_fp32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def key_of(*parts: object) -> int:
    """A 63-bit number from any printable parts, the same in every process (Python's own `hash` is not)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def fill_(p: Tensor, draw: Callable[[Tensor, torch.Generator], Any] | None, *, seed: int, name: str) -> None:
    """Starts a factor: `draw(whole, generator)` fills the whole tensor, each rank keeps its box. None means zero.

    Runs on plain and on sharded parameters of any layout, with one result; does nothing on meta, where there is no data.
    """
    if p.is_meta:
        return
    if draw is None:
        local_of(p).zero_()
        return
    whole = torch.empty(p.shape, dtype=torch.float32)
    draw(whole, torch.Generator().manual_seed(key_of(seed, name)))
    local_of(p).copy_(whole[index_of(p)])


def sum_after_backward(p: nn.Parameter) -> None:
    """Makes a plain loop right: after each backward, a gradient left as parts becomes the whole, one all-reduce a parameter."""

    def complete(q: Tensor) -> None:
        if isinstance(q, DTensor) and isinstance(q.grad, DTensor) and q.grad.placements != q.placements:
            q.grad = q.grad.redistribute(placements=q.placements)

    trained = p.requires_grad
    p.requires_grad_(True)  # torch takes the hook of a trained parameter only; a frozen one (a bias, say) may be thawed later
    p.register_post_accumulate_grad_hook(complete)
    p.requires_grad_(trained)
