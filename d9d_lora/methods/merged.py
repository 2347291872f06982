"""Several linear layers fused into one (Q, K and V; gate and up), of which each has its own low-rank update or none:

    dW = s diag(B_1, ..., B_n) [A_1; ...; A_n],     W[O, I] in slices of rows O_1 + ... + O_n = O,  A_k[R, I],  B_k[O_k, R]

For the e slices that are enabled the A_k are stacked as `lora_A` [R e, I], the B_k as `lora_B` [sum of their O_k, R]: the shapes of
loralib's MergedLinear, whose slices are equal. The rows of the others have no update, and cost no parameter. At the start B = 0.

Hu et al. 2021, arXiv:2106.09685, and its code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from d9d_lora.methods.delta import Around, Delta, DoesNotFit, Geometry, Parts
from d9d_lora.methods.grouped import GroupedDelta

# Families that keep the rows of a fused projection head by head, so that its parts are no slices.
_INTERLEAVED = {"bloom", "codegen", "falcon", "gpt_neox", "gpt_neox_japanese", "persimmon"}


@dataclass(frozen=True)
class MergedDelta(Around):
    """A delta `low`, with the factors of LoRA, for each enabled slice of the rows.

    Attributes:
        enabled: Which slices have an update.
        slices: Their sizes; empty: equal ones, settled by `fit`.
    """

    enabled: tuple[bool, ...]
    slices: tuple[int, ...] = ()
    makes = "B"

    @property
    def axes(self) -> Mapping[str, str]:
        # P, the rows of enabled slices, is O where all are; else it is no axis of W, and B is whole on every rank.
        return {"lora_A": "SI", "lora_B": "OR" if all(self.enabled) else "PR"}

    def fit(self, geometry: Geometry) -> Self:
        n, out = len(self.enabled), geometry.out
        if geometry.lookup:
            raise DoesNotFit("enable_lora is for fused linear layers, and this is an embedding; leave it out of the targets")
        if not self.slices and out % n:
            raise DoesNotFit(f"{out} output features are not {n} equal slices; give their sizes in params.slices")
        slices = self.slices or (out // n,) * n
        if sum(slices) != out:
            raise DoesNotFit(f"slices {list(slices)} are {sum(slices)} output features, and the layer has {out}")
        return replace(self, slices=slices, low=self.low.fit(geometry))

    def stacked(self, n: int) -> Delta:
        return GroupedDelta(self, n)

    def sizes(self, out: int, into: int) -> dict[str, int]:
        size = self.low.sizes(out, into)
        packed = sum(n for n, on in zip(self.slices, self.enabled) if on)
        return {**size, "S": size["R"] * sum(self.enabled), "P": packed}

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        """B with each B_k in its own R columns: [O, R e]. An enabled slice that is not in the box leaves an empty block, so that
        B has a gradient on every rank."""
        B, A = f["lora_B"], f["lora_A"]
        R = B.shape[1]
        blocks, start, packed, before = [], 0, 0, 0
        for size, on in zip(self.slices, self.enabled):
            low, high = max(start, f.rows.start), min(start + size, f.rows.stop)
            n = max(0, high - low)
            if on:
                first = low - f.rows.start if all(self.enabled) else packed + low - start
                block = B[first : first + n] if n else B[:0]
                blocks.append(pad(block, (before, A.shape[0] - before - R)))
                packed, before = packed + size, before + R
            else:
                blocks.append(B.new_zeros(n, A.shape[0]))
            start += size
        return torch.cat(blocks), A

    def __str__(self) -> str:
        sizes = ", ".join(f"{n}" if on else f"({n})" for n, on in zip(self.slices, self.enabled))
        return f"{self.low} slices={sizes}"


def found(delta: Delta, host: nn.Module, out: int) -> Delta:
    """The delta with the sizes of its slices, where the module that holds the fused layer tells them: fewer heads for K and V.

    Raises:
        DoesNotFit: where the rows of the parts are interleaved, or equal slices would be wrong.
    """
    if not isinstance(delta, MergedDelta):
        return replace(delta, low=found(delta.low, host, out)) if isinstance(getattr(delta, "low", None), Delta) else delta  # type: ignore[type-var,attr-defined,call-arg]
    config = getattr(host, "config", None)
    family = getattr(config, "model_type", None)
    starcoder = family == "gpt_bigcode"  # one head for K and V, or all parts interleaved
    if family in _INTERLEAVED or (starcoder and not config.multi_query):  # type: ignore[union-attr]
        raise DoesNotFit(f"{family} keeps the rows of Q, K and V head by head, so enable_lora has no slices; adapt the whole layer")
    heads = getattr(config, "num_attention_heads", None)
    groups = 1 if starcoder else getattr(config, "num_key_value_heads", None)
    if delta.slices or len(delta.enabled) != 3 or not heads or not groups or heads == groups:
        return delta
    per_head, rest = divmod(out, heads + 2 * groups)
    if rest:
        raise DoesNotFit(f"{out} output features are not {heads} query heads and twice {groups} for K and V; give params.slices")
    return replace(delta, slices=(heads * per_head, groups * per_head, groups * per_head))


def check_slices(enabled: Sequence[bool] | None, slices: Sequence[int] | None) -> None:
    """The fields of `LoRAParameters`, before any layer is known."""
    if enabled is None:
        if slices is not None:
            raise ValueError("slices are the sizes of what enable_lora enables, and would be ignored without it")
        return
    if not any(enabled):
        raise ValueError("enable_lora enables no slice; with r: 0 the layers are left alone")
    if slices is not None and (len(slices) != len(enabled) or min(slices) < 1):
        raise ValueError(f"slices are one positive size for each of the {len(enabled)} entries of enable_lora, got {slices}")
