"""Several documents in one row: which go together, and how the model keeps them apart.

[Note: packed documents stay apart]
Positions begin at 0 in each document, and a query may look only back and within its own document. transformers (5.23)
reads the borders off position ids that restart, also for sliding windows, but only if no mask is given *and* there is
no cache; and a cache is what most configs make by default, even in training. So `MicroBatch.inputs()` says
use_cache=False. Tried with eager and SDPA, exact to 1e-6: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Mixtral,
GPT-2, GPT-NeoX, Gemma2, Phi3. Flash attention has a path of its own for such position ids, which was not tried.

Some models ignore position ids when they make their mask (GPT-OSS, Falcon, OPT): documents see each other, and nothing
is said. They need `Batches(mask_dtype=...)`, a 4-D mask; which in turn replaces a sliding window. Hence
`check_packing`: two small forward passes before the training say whether this model, so called, keeps documents apart.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Indices of the examples of each row: longest first, each into the fullest row that still holds it."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(open_rows, (lengths[index], -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > lengths[index]:
            insort(open_rows, (room - lengths[index], row))
    return rows


def block_causal_mask(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, S, S), 0 where a query may look and the lowest number elsewhere: back, and within its own document.

    For models that do not find the borders in the position ids themselves. `dtype` is that of the queries (some SDPA
    backends take no other). It also replaces a sliding window, should the model have one that is shorter than the row.
    """
    document = (position_ids == 0).cumsum(-1)
    same = document[:, :, None] == document[:, None, :]
    length = position_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    blocked = ~(same & causal)
    mask = torch.zeros(blocked.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(blocked, torch.finfo(dtype).min).unsqueeze(1)


@torch.no_grad()
def check_packing(model: Any, *, vocab_size: int, mask_dtype: torch.dtype | None = None, device: Any = "cpu") -> None:
    """Raise unless a document's logits stay the same when the document packed before it is another.

    On a sharded model every rank calls it: the same ids everywhere, two forward passes.

    Args:
        model: called as `model(input_ids=, position_ids=, use_cache=False[, attention_mask=])`, returns `.logits`.
        vocab_size: ids are drawn below it.
        mask_dtype: as given to `Batches`.
        device: where the ids go.

    Raises:
        ValueError: documents see each other, or with a mask, the model's sliding window would be lost.
    """
    half, name = 8, type(model).__name__
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    if mask_dtype is not None and window:
        raise ValueError(
            f"{name} has a sliding window of {window} tokens, which an explicit mask would replace; "
            "leave mask_dtype out, or train it without packing"
        )
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, 2 * half), generator=draw)
    other = torch.cat([(ids[:, :half] + 1) % vocab_size, ids[:, half:]], dim=1)
    position_ids = torch.arange(half).repeat(1, 2).to(device)
    inputs: dict[str, Any] = {"position_ids": position_ids, "use_cache": False}
    if mask_dtype is not None:
        inputs["attention_mask"] = block_causal_mask(position_ids, mask_dtype)
    was_training = model.training
    model.eval()  # dropout would differ between the two passes
    try:
        one, two = (model(input_ids=x.to(device), **inputs).logits[:, half:].float() for x in (ids, other))
    finally:
        model.train(was_training)
    # Equal to the bit in most models; routed experts may round otherwise when their other tokens change.
    change = float((one - two).abs().max() / one.abs().max().clamp_min(1e-12))
    if not change < 1e-2:
        mend = "train it without packing (data.packing=false)"
        if mask_dtype is None and not window:
            mend = f"pass mask_dtype=<the model's dtype> to Batches, or {mend}"
        raise ValueError(
            f"{name} lets packed documents see each other: the logits of a document changed by {change:.0%} with the "
            f"one before it; {mend}"
        )
