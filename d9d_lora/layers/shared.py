"""A factor that all layers of a method share: a vector bank that is trained, or random bases that never change.

The module that was injected owns it, as a child of its root, so FSDP2 puts it into the root's group, which stays gathered while the
blocks use it. Layers refer to it. On a tensor-parallel mesh it is replicated.

[Note: the gradient of a shared factor]
A layer that holds a shard of its weight computes a part of the gradient, and one that holds all of it computes the whole, on every
rank. With labels (`Partial`, `Replicate`) autograd adds the two rightly. The one sum of a trainer (`ReplicatedSum`) knows no labels:
there a whole gradient counts 1/ranks on each rank, so that every layer's is a part.

[Note: frozen bases]
They are a buffer that no file and no checkpoint holds: each process draws them whole from their key, on the CPU, so they are the same
on every layout and device. A checkpoint holds a digest of them, and a resume that drew others is refused. They stay whole on every
rank, as each layer takes another piece of them. An adapter directory of PEFT holds them; they are taken from there as they are, as
they are what its trained numbers mean.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from d9d_lora.methods.delta import DoesNotFit, Draw
from d9d_lora.placement import fill_, sum_after_backward

MOST = 1 << 30  # numbers in one; RandLoRA's bases on a layer of 32k x 32k


class SharedFactor(nn.Module):
    """One shared tensor, `weight`: a parameter if it is trained, else a buffer [Note: frozen bases].

    Args:
        like: Its dtype and device; on meta it stays there until `reset_parameters`.
        draw: Fills the whole tensor. `seed` and `name` seed the generator it is given.
    """

    weight: Tensor

    def __init__(self, shape: tuple[int, ...], like: Tensor, draw: Draw, *, seed: int, name: str, trained: bool) -> None:
        super().__init__()
        self.draw, self.seed, self.name = draw, seed, name
        self.sums_own_parts = True  # [Note: the gradient of a shared factor]
        self.digest: Tensor | None = None  # of frozen values: what a checkpoint holds of them
        if math.prod(shape) > MOST:
            raise DoesNotFit(f"{name} would be {list(shape)}, more than {MOST} numbers: give a lower rank, or fewer and shorter vectors")
        weight = torch.empty(shape, dtype=like.dtype, device=like.device)
        if trained:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight, persistent=False)
        self.reset_parameters()

    @property
    def trained(self) -> bool:
        return isinstance(self.weight, nn.Parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the values: the same on every layout. Does nothing on meta."""
        fill_(self.weight, self.draw, seed=self.seed, name=self.name)
        if not self.trained and not self.weight.is_meta:
            self.digest = digest_of(self.weight)
        self._watch()  # again: `to_empty` has replaced the parameter

    @torch.no_grad()
    def take(self, values: Tensor) -> None:
        """Frozen values of a file in place of those that were drawn, to the bit: in its dtype, where this one would round them."""
        cast = values.to(self.weight.dtype)
        exact = torch.equal(cast.to(values.dtype), values)
        self.weight = (cast if exact else values).to(self.weight.device)
        self.digest = digest_of(self.weight)

    def is_drawn(self) -> bool:
        """Whether the frozen values are those that their key gives here."""
        fresh = torch.empty(self.weight.shape, dtype=self.weight.dtype)
        fill_(fresh, self.draw, seed=self.seed, name=self.name)
        return torch.equal(fresh, self.weight.cpu())

    def place(self, mesh: DeviceMesh | None) -> None:
        """Replicates a trained factor on the tensor-parallel mesh, if there is one and it is not there yet."""
        if mesh is None or not self.trained or isinstance(self.weight, DTensor):
            return
        placed = distribute_tensor(self.weight.detach(), mesh, [Replicate()], src_data_rank=None)
        self.weight = nn.Parameter(placed, requires_grad=self.weight.requires_grad)
        self._watch()

    def refuse_unsharded(self, layers: Iterable[Any]) -> None:
        """Raises if `fully_shard` manages the layers and not this factor: each data-parallel rank would train another one."""
        if not self.trained:
            return
        for layer in layers:
            meshes = {p.device_mesh for p in layer.factors().values() if isinstance(p, DTensor)} - {layer.placing.mesh}
            if meshes and not meshes & {getattr(self.weight, "device_mesh", None)}:
                raise ValueError(
                    f"{layer.name} is under fully_shard, but the {self.name} it shares with other layers is not: its gradient would not "
                    "be reduced. Call fully_shard on the module that was injected too, after its blocks."
                )

    def refuse_other_values(self) -> None:
        """Raises if `digest`, which a checkpoint has filled, is not that of the values drawn here."""
        if self.digest is not None and not torch.equal(self.digest, digest_of(self.weight)):
            raise ValueError(
                f"{self.name} was drawn anew from its key, and its values are not those of the run that is resumed: this torch draws other "
                "random numbers, so what was trained would mean another update. Resume with the version of torch that the run began with"
            )

    def local(self, *, parts: bool) -> Tensor:
        """To compute with. `parts`: the layer that asks computes only this rank's part of the gradient."""
        p = self.weight
        if not isinstance(p, DTensor):
            return p
        if self.sums_own_parts:
            return p.to_local(grad_placements=[Partial()] if parts else p.placements)
        t = p.to_local()
        return t if parts else t.detach() + (t - t.detach()) / p.device_mesh.size()

    def forward(self, x: Any) -> Any:
        """x: a root that calls its children in turn (`nn.Sequential`) passes here too."""
        return x

    def _watch(self) -> None:
        if isinstance(self.weight, DTensor) and isinstance(self.weight, nn.Parameter):
            sum_after_backward(self.weight)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {'trained' if self.trained else 'frozen'}"


def digest_of(t: Tensor) -> Tensor:
    """63 bits, the same on every machine for the same values."""
    data = hashlib.blake2b(t.detach().float().cpu().contiguous().numpy().tobytes(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(data, "little") >> 1)
