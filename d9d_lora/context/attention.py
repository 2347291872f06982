"""Attention of a row whose tokens P ranks share, as a function of transformers' attention registry.

    n = N / P tokens here (`tokens.py`);  H query heads and G key-value heads of D numbers here;  b rows

               a layer's forward             elements of its buffers    its backward           computes
    ulysses    2 all-to-alls: q, k, v; out   b n (2 H + 2 G) D          the same               H / P heads of all N tokens
    gather     1 gather: k and v             b N 2 G D                  1 reduce-scatter       all heads of n tokens; keeps k, v of N
    ring       P - 1 exchanges of k and v, by torch                                            all heads of n tokens

Ulysses: Jacobs et al. 2023, arXiv:2309.14509. Gathered keys and values: as in Llama 3 (Dubey et al. 2024, arXiv:2407.21783, 3.3.2).

[Note: documents]
The model hands its 4-D attention mask to every layer untouched. What travels there is no mask but the number of each token's document,
[b, 1, 1, N] of the *whole* row: all ranks know it, since they have the same data. Queries go by chunks, each with the keys up to its
own end, so what a mask would hide is mostly not computed; the masks of the chunks are made once a forward, for all layers.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d9d_lora.tokens import chunks_of, dealt, in_order

# What models hand to every attention, and changes nothing here. Anything else that is set is refused: it would be ignored.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "num_items_in_batch", "output_router_logits", "return_dict", "logits_to_keep"}
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SharedAttention:
    """Stands where an attention function of transformers stands: (module, q, k, v [b, heads, n, D]) -> [b, n, H, D].

    Args:
        group: The ranks that share rows, in order.
        kind: ulysses, gather or ring.
        inner: transformers' function for tokens that are all here.
    """

    def __init__(self, group: dist.ProcessGroup, kind: str, inner: Callable[..., Any]) -> None:
        self.group, self.kind, self.inner = group, kind, inner
        self.part, self.parts = dist.get_rank(group), dist.get_world_size(group)
        self._documents: weakref.ref[Tensor] | None = None  # of the masks that are kept: they go with the batch
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        total = query.shape[2] * self.parts
        _refuse(module, others, attention_mask, total)
        window = sliding_window if sliding_window is not None and sliding_window < total else None

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            y: Tensor = self.inner(module, q, k, v, mask, dropout=dropout, scaling=scaling)[0]
            return y

        def by_chunks(q: Tensor, k: Tensor, v: Tensor, chunks: Iterable[int]) -> Tensor:
            size, ys = total // (2 * self.parts), []
            for i, q_i in zip(chunks, q.split(size, 2), strict=True):
                first = 0 if window is None else max(0, i * size - window + 1)
                keys = slice(first, (i + 1) * size)
                mask = self._mask(i * size, keys, size, window, attention_mask, query.device)
                ys.append(attend(q_i, k[:, :, keys], v[:, :, keys], mask))
            return torch.cat(ys, 1)

        plain = attention_mask is None and window is None
        if self.kind == "ring":
            if not plain:
                raise ValueError("ring attention has no masks: packed documents and sliding windows need cp_attention ulysses or gather")
            return attend(query, key, value, None), None
        if self.kind == "gather":
            k, v = self._gathered(key, value)
            return by_chunks(query, k, v, chunks_of(self.part, self.parts)), None
        q, k, v = self._to_heads(query, key, value)
        y = attend(q, k, v, None) if plain else by_chunks(q, k, v, range(2 * self.parts))
        return self._to_tokens(y), None

    # -- what travels -----------------------------------------------------------------------------------------------------------

    def _gathered(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[b, G, n, D] -> [b, G, N, D], both in one gather; their D may differ."""
        both: Tensor = _Gather.apply(torch.cat([k, v], -1), self.group, self.parts)
        k, v = in_order(both, 2).split([k.shape[-1], v.shape[-1]], -1)
        return k, v

    def _to_heads(self, *ts: Tensor) -> list[Tensor]:
        """[b, heads, n, D] -> [b, heads / P, N, D] of each, in one all-to-all."""
        for t in ts:
            if t.shape[1] % self.parts:
                raise ValueError(f"ulysses: {self.parts} context-parallel ranks do not divide {t.shape[1]} heads; use cp_attention=gather")
        cut = [t.unflatten(1, (self.parts, -1)).movedim(1, 0) for t in ts]
        here = _exchange(torch.cat([t.flatten(1) for t in cut], 1), self.group).split([t[0].numel() for t in cut], 1)
        return [in_order(flat.reshape(t.shape), 2) for flat, t in zip(here, cut, strict=True)]

    def _to_tokens(self, y: Tensor) -> Tensor:
        """[b, N, H / P, D] -> [b, n, H, D], in one all-to-all."""
        shares = dealt(y, self.parts, 1)
        heads = _exchange(shares, self.group)
        return heads.movedim(0, 2).flatten(2, 3)

    # -- masks ------------------------------------------------------------------------------------------------------------------

    def _mask(
        self, start: int, keys: slice, size: int, window: int | None, documents: Tensor | None, device: torch.device
    ) -> Tensor:
        """[b or 1, 1, size, keys]: True where queries `start` and on may look: back, within their document and the window."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return _mask(start, keys, size, window, documents, device)
        if documents is not (None if self._documents is None else self._documents()):
            self._masks.clear()
            self._documents = None if documents is None else weakref.ref(documents, lambda _: self._masks.clear())
        at = (start, keys.start, keys.stop, size, window, device)
        if at not in self._masks:
            if len(self._masks) > 4 * self.parts:  # rows of other lengths have come and gone
                self._masks.clear()
            self._masks[at] = _mask(start, keys, size, window, documents, device)
        return self._masks[at]


class _Exchange(torch.autograd.Function):
    """rows[i] goes to rank i, and comes from it: its own backward."""

    @staticmethod
    def forward(ctx, rows, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        rows = rows.contiguous()
        came = torch.empty_like(rows)
        dist.all_to_all_single(came, rows, group=group)
        return came

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Exchange.forward(ctx, grad, ctx.group), None


def _exchange(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    came: Tensor = _Exchange.apply(rows, group)
    return came


class _Gather(torch.autograd.Function):
    """[...] -> [P, ...] of all ranks; every rank's gradient of a part goes back to it."""

    @staticmethod
    def forward(ctx, part, group, parts):  # type: ignore[no-untyped-def]
        ctx.group = group
        whole = part.new_empty(parts, *part.shape)
        _all_gather(whole, part.contiguous()[None], group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        part = grad.new_empty(1, *grad.shape[1:])
        _reduce_scatter(part, grad.contiguous(), group=ctx.group)
        return part[0], None, None


def _mask(start: int, keys: slice, size: int, window: int | None, documents: Tensor | None, device: torch.device) -> Tensor:
    back = torch.arange(start, start + size, device=device)[:, None] - torch.arange(keys.start, keys.stop, device=device)
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    if documents is None:
        return seen[None, None]
    return seen & (documents[:, :, :, start : start + size].mT == documents[..., keys])


def _refuse(module: nn.Module, others: dict[str, Any], documents: Tensor | None, total: int) -> None:
    if not getattr(module, "is_causal", True) or others.pop("is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal: context parallelism is for causal language models")
    unknown = sorted(k for k, v in others.items() if v is not None and v is not False and k not in _HARMLESS)
    if unknown:
        raise ValueError(
            f"{type(module).__name__} gives its attention {', '.join(unknown)}, which context parallelism does not know and would ignore "
            "(attention sinks, soft caps, position biases); use cp=1 for this model"
        )
    if documents is not None and tuple(documents.shape[1:]) != (1, 1, total):
        raise ValueError(
            f"attention_mask has the shape {tuple(documents.shape)}; under context parallelism it holds the documents of the whole row, "
            f"[rows, 1, 1, {total}]. Leave it to ContextParallel.split"
        )
