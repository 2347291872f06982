"""VB-LoRA: y = x W^T + drop(x) A^T B^T, where A[R,I] and B[O,R] are put together from one bank of vectors bank[N,V].

Rows of A and columns of B are cut into blocks of V numbers. Each block is a mixture of the K vectors of the bank that have the
largest logits:

    block = sum_k softmax(top-K logits)_k bank[which_k]      logits_A [R, I/V, N], logits_B [O/V, R, N]

A and B are put together anew in every forward and take LoRA's step from there; of the blocks nothing of length V is kept.

All layers share the bank. There is no scale. At the start logits are normal and the bank is uniform in a small bound, so dW is small
but not zero; a bank of zeros would get no gradient.

Li et al. 2024, arXiv:2405.15179.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from d9d_lora.adapters import AdapterConfig, AdapterMethod
from d9d_lora.layers import AdaptedLayer
from d9d_lora.layers.base import adapter_dtype
from d9d_lora.layers.shared import SharedFactor
from d9d_lora.methods.delta import Cost, Delta, DoesNotFit, Draw, Geometry, Parts
from d9d_lora.placement import box_of, full_of, local_of

BANK = "vblora_vector_bank"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"  # what PEFT appends to the names of logits


class VBLoRAParameters(BaseModel):
    """Hyperparameters of VB-LoRA."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(4, ge=1, description="rank")
    num_vectors: int = Field(256, ge=2, description="vectors in the bank")
    vector_length: int = Field(256, ge=1, description="their length; it divides the input and the output size of every adapted layer")
    topk: int = Field(2, ge=1, description="vectors mixed in a block; with 1 there is no mixture, and logits get no gradient")
    dropout: float = Field(
        0.0, ge=0, lt=1, validation_alias=AliasChoices("dropout", "vblora_dropout"), description="dropout on the input of A"
    )
    init_vector_bank_bound: float = Field(
        0.02, gt=0, allow_inf_nan=False, description="the bank starts uniform in plus or minus this"
    )
    init_logits_std: float = Field(0.1, gt=0, allow_inf_nan=False, description="logits start normal with this deviation")
    save_only_topk_weights: bool = Field(
        False, description="PEFT's small files: the chosen vectors and their weights, for inference and merging, instead of all logits"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} vectors cannot be chosen from num_vectors={self.num_vectors}; lower topk")
        return self


class VBLoRAConfig(AdapterConfig):
    """`kind: vblora`."""

    kind: Literal["vblora"] = "vblora"
    params: VBLoRAParameters = Field(default_factory=VBLoRAParameters)  # type: ignore[arg-type]
    unused = {
        "rank_pattern": "VB-LoRA has one rank for all layers, and no alpha",
        "alpha_pattern": "VB-LoRA has one rank for all layers, and no alpha",
        "target_parameters": "it adapts whole layers, whose sizes are multiples of the vectors' length",
    }


@dataclass(frozen=True)
class VBLoRADelta(Delta):
    """dW = B A, from logits and a shared bank.

    Attributes:
        chosen: The logits were read from the small form: good for inference, not for training.
        small: They are to be written in it.
        bank_bound: The bank starts uniform in plus or minus this.
    """

    r: int
    num_vectors: int
    vector_length: int
    topk: int
    logits_std: float
    dropout: float = 0.0
    chosen: bool = False
    small: bool = False
    bank_bound: float = 0.02
    kind = "vblora"
    scaling = 1.0
    thin = True
    makes = "AB"
    axes = {"vblora_logits_A": "RJN", "vblora_logits_B": "PRN"}
    shared: ClassVar[Mapping[str, str]] = {BANK: "NV"}
    full_precision = frozenset(axes)  # rounding would choose other vectors than a merge does

    def fit(self, geometry: Geometry) -> Self:
        common = math.gcd(geometry.out, geometry.into)
        if common % self.vector_length:
            lengths = [v for v in range(1, common + 1) if common % v == 0]
            raise DoesNotFit(
                f"vector_length={self.vector_length} does not divide its sizes in={geometry.into} and out={geometry.out}. Lengths that "
                f"do: {', '.join(map(str, lengths))}; or leave the layer out with exclude_modules"
            )
        return self

    def sizes(self, out: int, into: int) -> dict[str, int]:
        v = self.vector_length
        return {"R": self.r, "J": into // v, "P": out // v, "N": self.num_vectors, "V": v}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        return lambda w, g: w.normal_(0, self.logits_std, generator=g)

    def cost(self, n: int, out: int, into: int) -> Cost:
        """LoRA's, with A and B kept too, and of each block K weights in fp32, and 2 K + 1 numbers of 8 bytes that say which
        vectors."""
        like, blocks = super().cost(n, out, into), self.r * (out + into) // self.vector_length
        return Cost(like.flops, like.kept + self.r * (out + into), blocks * (4 * self.topk + 8 * (2 * self.topk + 1)))

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        if self.chosen and f.dropout is not None and torch.is_grad_enabled():
            raise RuntimeError(
                "this adapter was read from a file with its top-k weights only (save_only_topk_weights), which has no logits to train. "
                "Call model.eval() to use or merge it; to train on, start from a file with all logits"
            )
        bank, v = f[BANK], self.vector_length
        (js, cols), (ps, rows) = blocks_of(f.cols, v), blocks_of(f.rows, v)
        A = self.blocks(f["vblora_logits_A"][:, js], bank).flatten(1)  # [R, J V]
        B = self.blocks(f["vblora_logits_B"][ps], bank).transpose(1, 2).flatten(0, 1)  # [P, V, R] -> [P V, R]
        return B[rows], A[:, cols]

    def blocks(self, logits: Tensor, bank: Tensor) -> Tensor:
        """[..., N] -> [..., V]."""
        top, which = logits.topk(self.topk, dim=-1)
        weights = top.softmax(-1).to(bank.dtype)
        flat = embedding_bag(which.flatten(0, -2), bank, mode="sum", per_sample_weights=weights.flatten(0, -2))
        return flat.unflatten(0, which.shape[:-1])  # in one step: autograd would keep the chosen vectors of every block

    def __str__(self) -> str:
        return f"{self.kind} r={self.r} {self.topk} of {self.num_vectors} x {self.vector_length}"


def blocks_of(box: slice, length: int) -> tuple[slice, slice]:
    """The blocks of a length that cover a box of an axis, and the box counted from the first of them."""
    first, last = box.start // length, -(-box.stop // length)
    return slice(first, last), slice(box.start - first * length, box.stop - first * length)


class VBLoRA(AdapterMethod[VBLoRAConfig]):
    """Vector-bank LoRA on every layer whose sizes are multiples of the vectors' length."""

    kind = "vblora"

    def delta_for(self, name: str) -> VBLoRADelta:
        p = self.config.params
        return VBLoRADelta(
            p.r,
            p.num_vectors,
            p.vector_length,
            p.topk,
            p.init_logits_std,
            p.dropout,
            small=p.save_only_topk_weights,
            bank_bound=p.init_vector_bank_bound,
        )

    def shared_factors(self, layers: list[AdaptedLayer]) -> dict[str, SharedFactor]:
        p, weight = self.config.params, layers[0].base.weight
        like = torch.empty((), dtype=adapter_dtype(layers[0].base_dtype), device=weight.device)  # type: ignore[arg-type]
        draw = partial(_uniform, p.init_vector_bank_bound)
        shape = (p.num_vectors, p.vector_length)
        return {BANK: SharedFactor(shape, like, draw, seed=self.config.seed, name=BANK, trained=True)}

    def compact(self, module: nn.Module, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.config.params.save_only_topk_weights:
            return params
        small = dict(params)
        for _, layer in self.layers(module):
            for name in layer.delta.axes:
                del small[f"{layer.name}.{name}.weight"]
            small |= {f"{layer.name}.{name}": t for name, t in small_form(layer).items()}
        return small

    def expand(self, module: nn.Module, held: Mapping[str, Callable[[], Tensor]]) -> tuple[set[str], set[str]]:
        keys, names = set(), set()
        for _, layer in self.layers(module):
            parts = {f"{name}{part}": f"{layer.name}.{name}{part}" for name in layer.delta.axes for part in (INDICES, WEIGHTS)}
            if all(key in held for key in parts.values()):
                read_small_form_(layer, {part: held[key]() for part, key in parts.items()})
                keys |= set(parts.values())
                names |= {f"{layer.name}.{name}.weight" for name in layer.delta.axes}
        return keys, names


def _uniform(bound: float, w: Tensor, g: torch.Generator) -> Tensor:
    return w.uniform_(-bound, bound, generator=g)


# -- the small form: save_only_topk_weights -------------------------------------------------------------------------------------------


def small_form(layer: AdaptedLayer) -> dict[str, Tensor]:
    """The layer's logits as PEFT writes them: `<factor>_topk_indices`, and `<factor>_topk_weights` without the last. Collective."""
    assert isinstance(layer.delta, VBLoRADelta)
    found = {}
    for name, p in layer.factors().items():
        found[name + INDICES], found[name + WEIGHTS] = chosen_of(full_of(p.detach()), layer.delta.topk, layer.delta.num_vectors)
    return found


def chosen_of(logits: Tensor, topk: int, num_vectors: int) -> tuple[Tensor, Tensor]:
    """The small form of logits [..., N]: which vectors [..., K], and their weights without the last [..., K - 1]; all add up to 1."""
    top, which = logits.topk(topk, dim=-1)
    return which.to(index_dtype(num_vectors)), top.softmax(-1)[..., :-1].contiguous()


@torch.no_grad()
def read_small_form_(layer: AdaptedLayer, tensors: Mapping[str, Tensor]) -> None:
    """Fills the layer's logits from their small form, on any layout; the layer then refuses to be trained."""
    assert isinstance(layer.delta, VBLoRADelta)
    for name, p in layer.factors().items():
        whole = logits_of(tensors[name + INDICES], tensors[name + WEIGHTS], layer.delta.num_vectors)
        if whole.shape != p.shape:
            raise ValueError(f"{layer.name}.{name}: expected logits of shape {tuple(p.shape)}, the file has {tuple(whole.shape)}")
        local_of(p).copy_(whole[box_of(p)])
    layer.delta = replace(layer.delta, chosen=True)


def logits_of(indices: Tensor, weights: Tensor, num_vectors: int) -> Tensor:
    """Logits whose top-k are these. The others are the lowest finite number, so that a merge finds only finite values."""
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    top = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()  # the last is 1 - the others, and may round below zero
    others = top.new_full((*top.shape[:-1], num_vectors), torch.finfo(top.dtype).min)
    return others.scatter(-1, indices.long(), top)


def index_dtype(n: int) -> torch.dtype:
    """The smallest dtype that PEFT writes for numbers below n."""
    sizes = {2**8: torch.uint8, 2**15: torch.int16, 2**31: torch.int32}
    return next((dtype for bound, dtype in sizes.items() if n < bound), torch.int64)
