"""LoHa: dW = s (A1 B1) o (A2 B2), o elementwise, s = alpha / r.

A1, A2 [O,R] are hada_w1_a, hada_w2_a; B1, B2 [R,I] are hada_w1_b, hada_w2_b. At the start hada_w2_b is zero and the others are
Kaiming-uniform, so dW = 0; on an embedding hada_w1_b is normal, for there no sum over I is taken.

Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098; in the family LyCORIS, Yeh et al. 2023, arXiv:2309.14859.

With `use_effective_conv2d`, a convolution with a kernel larger than 1 has Tucker cores hada_t1, hada_t2 [R,R,taps]: hada_w*_a are [R,O],
hada_w*_b are [R,C] over the C input channels, and B1[R,I] is hada_t1 times hada_w1_b, with I = C taps.

[Note: product or dense]
The elementwise product of two products of rank R is one product of rank R^2 (rows of A1 times rows of A2, columns of B1 times
columns of B2). For n inputs it costs n R^2 (O + I) multiplications; building dW costs O I (n + 2R). The cheaper one is taken. For many
inputs they break even at R^2 = O I / (O + I): R = 45 for 4096 x 4096. Below that the R^2 numbers of an input are fewer than its I or O.
The dense way keeps nothing of size O I for the backward, and builds it again there. `factors` is for many inputs; where the product is
the cheaper way for any number of them, it takes LoRA's step at rank R^2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from d9d_lora.adapters import AdapterConfig, AdapterMethod
from d9d_lora.method import InjectionError
from d9d_lora.methods.delta import Cost, Draw, Parts
from d9d_lora.methods.drops import Drops, DropsParameters, core, kaiming
from d9d_lora.sites import Site


class LoHaParameters(DropsParameters):
    """Hyperparameters of a LoHa layer."""

    init_weights: bool = Field(True, description="start from dW = 0; false draws every factor, so the model is changed at the start")


class LoHaConfig(AdapterConfig):
    """`kind: loha`."""

    kind: Literal["loha"] = "loha"
    params: LoHaParameters = Field(default_factory=LoHaParameters)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LoHaDelta(Drops):
    """dW = scaling * (A1 B1) o (A2 B2)."""

    init_weights: bool = True
    kind = "loha"
    makes = "AB"

    @property
    def axes(self) -> Mapping[str, str]:
        if not self.taps:
            return {"hada_w1_a": "OR", "hada_w1_b": "RI", "hada_w2_a": "OR", "hada_w2_b": "RI"}
        cores = "RR" + "XYZ"[: len(self.taps)]
        return dict.fromkeys(("hada_t1", "hada_t2"), cores) | {f"hada_w{i}_{s}": a for i in "12" for s, a in (("a", "RO"), ("b", "RC"))}

    def sizes(self, out: int, into: int) -> dict[str, int]:
        taps = torch.Size(self.taps)
        return {"O": out, "I": into, "R": self.r, "C": into // taps.numel(), **dict(zip("XYZ", taps))}

    def start(self, factor: str, *, lookup: bool) -> Draw | None:
        if factor == "hada_w2_b" and self.init_weights:
            return None
        if lookup and factor in ("hada_w1_b", "hada_w2_b"):
            return lambda w, g: w.normal_(generator=g)
        return kaiming

    # -- the update --------------------------------------------------------------------------------------------------------

    @property
    def thin(self) -> bool:  # type: ignore[override]
        """[Note: product or dense]"""
        return self.geometry is not None and product_is_cheaper(1 << 30, self.geometry.out, self.geometry.into, self.r)

    def cost(self, n: int, out: int, into: int) -> Cost:
        """[Note: product or dense] LoRA's at rank R^2, with both factors kept; or twice both products of rank R and what
        they take in the backward, and three products with dW itself."""
        rank = self.r**2
        if product_is_cheaper(n, out, into, self.r):
            return Cost(6 * n * rank * (out + into), (n + out + into) * rank)
        return Cost(4 * 2 * 2 * out * self.r * into + 3 * 2 * n * out * into, 0)

    def two(self, f: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A1[O,R], B1[R,I], A2[O,R], B2[R,I] of the box; what drops rows drops those of A1."""
        A1, B1, A2, B2 = f["hada_w1_a"], f["hada_w1_b"], f["hada_w2_a"], f["hada_w2_b"]
        if self.taps:
            A1, A2 = A1.T, A2.T
            B1, B2 = (core(t, b)[:, f.cols] for t, b in ((f["hada_t1"], B1), (f["hada_t2"], B2)))
        gate = self.gate(f)
        return A1 if gate is None else A1 * gate[:, None], B1, A2, B2

    def factors(self, f: Parts) -> tuple[Tensor, Tensor]:
        if not self.thin:
            raise NotImplementedError(f"{self}: a product of rank r^2 costs more than building dW; ask for `dense`, `apply` or `look_up`")
        return self.product(f)

    def product(self, f: Parts) -> tuple[Tensor, Tensor]:
        """(B[O,R^2], A[R^2,I])."""
        A1, B1, A2, B2 = self.two(f)
        return (A1[:, :, None] * A2[:, None, :]).flatten(1), (B1[:, None] * B2[None]).flatten(0, 1)

    def dense(self, f: Parts) -> Tensor:
        return self._dense(*self.two(f))

    def _dense(self, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        return ((A1 * self.scaling) @ B1) * (A2 @ B2)

    def apply(self, x: Tensor, f: Parts) -> Tensor:
        into = x.shape[-1]
        if product_is_cheaper(x.numel() // max(1, into), f.rows.stop - f.rows.start, into, self.r):
            B, A = (t.to(x.dtype) for t in self.product(f))
            return linear(linear(x, A) * self.scaling, B)

        def run(x: Tensor, *two: Tensor) -> Tensor:
            return linear(x, self._dense(*(t.to(x.dtype) for t in two)))  # cast inside: a cast one would be kept

        two = self.two(f)  # outside: a recomputation may come when the clock has moved on
        y: Tensor = checkpoint(run, x, *two, use_reentrant=False, preserve_rng_state=False)
        return y

    def look_up(self, ids: Tensor, f: Parts, *, padding: int | None = None) -> Tensor:
        """Two lookups and two products of rank R: columns are taken before they are multiplied, and nothing has rank R^2."""
        A1, B1, A2, B2 = self.two(f)
        return linear(embedding(ids, B1.T, padding) * self.scaling, A1) * linear(embedding(ids, B2.T, padding), A2)


def product_is_cheaper(n: int, out: int, into: int, r: int) -> bool:
    """[Note: product or dense]"""
    return n * r * r * (out + into) <= out * into * (n + 2 * r)


class LoHa(AdapterMethod[LoHaConfig]):
    """Elementwise products of two low-rank products."""

    kind = "loha"

    def delta_for(self, name: str) -> LoHaDelta:
        p = self.config.params
        r, alpha = self.config.rank(name, p.r), self.config.alpha(name, p.alpha)
        return LoHaDelta(r, alpha, p.rank_dropout, p.module_dropout, p.use_effective_conv2d, init_weights=p.init_weights)

    def sites(self, module: nn.Module) -> tuple[list[Site], list[str]]:
        sites, passed_over = super().sites(module)
        refuse_idle_tucker(sites)
        return sites, passed_over


def refuse_idle_tucker(sites: list[Site]) -> None:
    """`use_effective_conv2d` is for some layers of a model only, but it must be for one."""
    deltas = [site.delta.fit(site.layer.geometry(site.base)) for site in sites]
    tucker = [delta for delta in deltas if isinstance(delta, Drops) and delta.tucker]
    if tucker and not any(delta.taps for delta in tucker):
        raise InjectionError(
            "use_effective_conv2d: none of the targets is a convolution with a kernel larger than 1, so it would be ignored. "
            "Leave it out, or name such a layer"
        )
