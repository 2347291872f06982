"""A Hugging Face causal model, and its batches, for ranks that hold different tokens of the same rows.

    context = ContextParallel(mesh["cp"])
    context.prepare(model)                                # after the injection: attention becomes one over all ranks' tokens
    inputs, targets = context.split(input_ids, targets=shift_labels(labels))      # every rank gives the same rows, and gets its tokens
    loss = cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / all_targets

No source of the model is patched: attention is chosen by name in transformers' registry. What the split must keep right:

    positions    those of the whole row (or document), for RoPE
    targets      shifted before the split: the target of a chunk's last token is the next chunk's first
    loss         each rank's is a part of a sum; divided by the target tokens of *all* ranks, and gradients are added over them
    masks        of adapters' dropout are one process's, cut (`dropout.py`)
"""

import itertools
import math
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from d9d_lora.context.attention import SharedAttention
from d9d_lora.dropout import Share
from d9d_lora.layers.stacked import Stacked
from d9d_lora.tokens import IGNORE, lengthened, share_of
from d9d_lora.walk import adapted_layers, clock_of, tensor_parallel_mesh

Attention = Literal["auto", "ulysses", "gather", "ring"]
_PREFIX = "d9d_lora_"
_numbers = itertools.count()


class Split(NamedTuple):
    """This rank's part of a batch.

    Attributes:
        inputs: For the model's forward.
        targets: What each position should say next, [b, n]; already shifted: do not give them to the model as `labels`.
    """

    inputs: dict[str, Any]
    targets: Tensor


class ContextParallel:
    """Rows shared by the ranks of `mesh`.

    Args:
        mesh: One dimension: the ranks that hold different tokens of the same rows.
        attention: How keys and values meet; `auto`: by `choose`.
        multiple: Rows are padded so that each rank's tokens are a multiple of this too (sequence parallelism).
    """

    def __init__(self, mesh: DeviceMesh, attention: Attention = "auto", *, multiple: int = 1) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"expected a mesh of one dimension, got {mesh}; give mesh['cp']")
        self.mesh, self.asked, self.multiple = mesh, attention, multiple
        self.part, self.parts = mesh.get_local_rank(), mesh.size()
        # A group of its own, where torch's mesh would take the one of all ranks: what FSDP2 fetches early is not in its way.
        self.group = dist.new_group() if self.parts == dist.get_world_size() else mesh.get_group()
        self._model: Any = None
        self._name = ""
        self.kind = self.why = ""

    def prepare(self, model: nn.Module) -> str:
        """Makes the model's attention one over all ranks' tokens; returns which, and why. After tensor parallelism and the injection.

        Raises:
            ValueError: for a model whose tokens meet elsewhere than in transformers' attention, and for degrees that do not fit it.
        """
        config: Any = getattr(model, "config", None)
        if config is None or not hasattr(model, "set_attn_implementation"):
            raise ValueError(f"context parallelism is for Hugging Face causal models; {type(model).__name__} chooses its attention itself")
        check_model(model)
        tp = tensor_parallel_mesh(model)
        self.kind, self.why = choose(self.asked, *heads_of(config, 1 if tp is None else tp.size()), self.parts, self.mesh.device_type)
        self._name = f"{_PREFIX}{self.kind}_{next(_numbers)}"
        self._model = model
        _register(self._name, SharedAttention(self.group, self.kind, _sdpa))
        weakref.finalize(model, _forget, self._name)  # the registry would keep the ranks' group alive
        self._model.set_attn_implementation(self._name)
        clock = clock_of(model)
        if clock is not None:
            clock.context = self.mesh
            if self.parts > 1 and any(isinstance(la, Stacked) and la.dropout.p for la in adapted_layers(model)):
                raise ValueError(
                    "dropout on adapted experts: masks follow tokens in the order of the router, which has other rows on each "
                    "context-parallel rank; set dropout to 0, or leave the experts out"
                )
        return f"{self.kind} ({self.why})"

    def split(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        packed: bool | None = None,
        pad_id: int = 0,
    ) -> Split:
        """Rows [b, N], the same on all ranks of the mesh -> this rank's n tokens of each.

        Args:
            position_ids: Counted from 0 in each document of a packed row; None: the row is one document. Documents do not see one another.
            targets: What each position should say next: `shift_labels(labels)` of the whole rows; -100 is not trained.
            packed: Whether there may be several documents; None: it is looked up, which an accelerator must be waited for.
            pad_id: Fills rows on the right up to a multiple of 2 P; seen by no token.
        """
        rows, length = input_ids.shape
        more = -length % self.row_multiple
        positions = torch.arange(length, device=input_ids.device).expand(rows, -1) if position_ids is None else position_ids
        targets = torch.full_like(input_ids, IGNORE) if targets is None else targets
        if packed is None:
            packed = position_ids is not None and bool((positions[:, 1:] == 0).any())
        if more:
            last = positions[:, -1:]
            input_ids, positions, targets = lengthened(input_ids, positions, targets, more, packed=packed, pad_id=pad_id)
            positions = positions if packed else positions.minimum(last)  # a table of learned positions may end where the row ends
        inputs = {"input_ids": self.share(input_ids), "position_ids": self.share(positions), "use_cache": False}
        if packed:
            inputs["attention_mask"] = (positions == 0).cumsum(-1)[:, None, None]  # [Note: documents] in `attention`
        clock = None if self._model is None else clock_of(self._model)
        if clock is not None:
            clock.context, clock.share = self.mesh, Share(self.parts, self.part, rows, more)
        return Split(inputs, self.share(targets))

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this: two chunks a rank, and what sequence parallelism wants."""
        return math.lcm(2 * self.parts, self.multiple * self.parts)

    def share(self, t: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of whole rows."""
        return share_of(t, self.part, self.parts, dim)

    def sum(self, values: Tensor) -> Tensor:
        """Adds a small tensor over the ranks that share rows, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model takes whole rows, as one process does: to generate, or to look at its data."""
        clock = clock_of(self._model)
        share, within = (Share(), None) if clock is None else (clock.share, clock.context)
        self._model.set_attn_implementation("sdpa")
        if clock is not None:
            clock.share, clock.context = Share(), None
        try:
            yield
        finally:
            self._model.set_attn_implementation(self._name)
            if clock is not None:
                clock.share, clock.context = share, within

    def running(self) -> AbstractContextManager[None]:
        """Around each forward with its backward: torch's ring attention is on inside it; the others need nothing."""
        if self.kind != "ring":
            return nullcontext()
        from torch.distributed.tensor.experimental import context_parallel

        nothing = torch.zeros(2 * self.parts, device=self.mesh.device_type)  # it asks for a buffer to cut
        return context_parallel(self.mesh, buffers=[nothing], buffer_seq_dims=[0], no_restore_buffers={nothing})

    @torch.no_grad()
    def check(self, *, vocab_size: int, device: Any = "cpu", packed: bool = False) -> None:
        """Two small forwards: the logits of a row that the ranks share are those of the row taken whole, or a ValueError. Collective."""
        size = self.row_multiple * 4
        ids = torch.randint(vocab_size, (1, size), generator=torch.Generator().manual_seed(0)).to(device)
        border = size // 2 - 3
        positions = torch.cat([torch.arange(border), torch.arange(size - border)])[None] if packed else torch.arange(size)[None]
        positions = positions.to(device)
        training = self._model.training
        self._model.eval()
        try:
            with self.off():
                whole = self._model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
            with self.running():
                mine = self._model(**self.split(ids, position_ids=positions).inputs).logits.float()
        finally:
            self._model.train(training)
        apart = (mine - self.share(whole)).abs().max() / whole.abs().max().clamp_min(1e-12)
        dist.all_reduce(apart, op=dist.ReduceOp.MAX, group=self.group)
        allowed = 1e-3 if next(self._model.parameters()).dtype in (torch.float32, torch.float64) else 0.1
        if not float(apart) < allowed:
            raise ValueError(
                f"{type(self._model).__name__}: logits of a row that {self.parts} ranks share ({self.kind}) differ from those of the whole "
                f"row by {float(apart):.0%}, so its tokens meet elsewhere than in its attention; use cp=1 for this model"
            )


def choose(asked: str, heads: int, kv_heads: int, cp: int, device_type: str) -> tuple[str, str]:
    """(kind, why). The rule of `auto`: ulysses where cp divides the heads of a tensor-parallel rank, else gather (design note 12).

    Raises:
        ValueError: what was asked for does not fit, with the nearest that does.
    """
    common = math.gcd(heads, kv_heads)
    if asked == "ring" and device_type == "cpu":
        raise ValueError("cp_attention=ring is torch's ring attention, which has no kernels for the CPU; use ulysses or gather there")
    if asked == "ulysses" and common % cp:
        fits = [d for d in range(1, common + 1) if common % d == 0]
        raise ValueError(
            f"cp_attention=ulysses: cp={cp} does not divide the {heads} attention and {kv_heads} key-value heads of a tensor-parallel "
            f"rank; degrees that do: {fits}. Or use cp_attention=gather, which takes any"
        )
    if asked != "auto":
        return asked, "asked for"
    if common % cp:
        return "gather", f"auto: {cp} does not divide {heads} attention and {kv_heads} key-value heads"
    return "ulysses", f"auto: {cp} divides {heads} attention and {kv_heads} key-value heads"


def heads_of(config: Any, tp: int) -> tuple[int, int]:
    """(attention heads, key-value heads) of a tensor-parallel rank."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = text.num_attention_heads
    return heads // tp, (getattr(text, "num_key_value_heads", None) or heads) // tp


def check_model(model: Any) -> None:
    """Refuses a model whose tokens meet elsewhere than in transformers' attention, as far as its config tells; `check` tries it."""
    text = model.config.get_text_config()
    name = type(model).__name__
    if odd := sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"{name} has layers of the kinds {', '.join(odd)}: context parallelism knows full and sliding attention; use cp=1")
    if model.config._attn_implementation != "sdpa" and not model.config._attn_implementation.startswith(_PREFIX):
        raise ValueError(
            f"{name} was built with attention {model.config._attn_implementation!r}; context parallelism computes with 'sdpa': give "
            "attn_implementation='sdpa' (model.attention=sdpa)"
        )
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} does not take its attention from transformers' registry, so its tokens would not meet; use cp=1")


def _sdpa(*args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


def _register(name: str, attention: SharedAttention) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
        if attention_mask is not None:
            raise ValueError("under context parallelism an attention_mask would be lost: pad rows on the right, and leave it out")

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, no_mask)


def _forget(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)
