"""From examples to this rank's microbatches: the same global batches on every number of ranks.

A step takes the next `batch_size` rows of an endless stream: epoch 0 in one order, epoch 1 in another, and so on. The
order comes from (seed, epoch) and the data alone, and a position in the stream is the *global* count of rows consumed,
so a run resumes at any world size where it stopped. Within a step, microbatch m = accumulation * dp_size + dp_rank
holds rows m * micro_batch_size and up: the numbering, and so the rows, do not depend on dp_size either.

A row is one example padded on the right, or with packing, several examples that fill `seq_len` tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from d9d_lora.tokens import IGNORE
from d9d_lora.train.encode import Example
from d9d_lora.train.packing import block_causal_mask, pack

ROWS_OF = 8  # rows are as long as a multiple of so many tokens, or `seq_len`


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass on one rank; call `model(**batch.inputs())`.

    Attributes:
        input_ids, labels, position_ids: int64 (B, S). Labels stand at their own token, see `shift_labels`.
        index: which microbatch of the step, counted over all ranks.
        epoch: of its first row.
        packed: whether a row may hold several documents, whose positions each begin at 0.
        mask: additive (B, 1, S, S) attention mask, when one was asked for by `Batches(mask_dtype=...)`.
        tokens: of the samples, without padding.
        filled: bool (B, S), where they are.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    index: int
    epoch: int
    packed: bool = False
    mask: torch.Tensor | None = None
    tokens: int = 0
    filled: torch.Tensor | None = None

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """None where causal attention alone is right: padding on the right is seen by no real token."""
        if self.packed and self.mask is None:
            raise ValueError(
                "a packed microbatch has no attention mask by itself, and without one documents could see each other; "
                "call the model with **batch.inputs(), or build Batches with mask_dtype=<the model's dtype>"
            )
        return self.mask

    def inputs(self) -> dict[str, Any]:
        """Arguments for a Hugging Face causal model: `[Note: packed documents stay apart]` in `packing`."""
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        return inputs if self.mask is None else inputs | {"attention_mask": self.mask}

    @property
    def target_tokens(self) -> int:
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> "MicroBatch":
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "labels", "position_ids")}
        return replace(self, **moved, mask=None if self.mask is None else self.mask.to(device))


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """(B, S) labels at their own token -> the target of each position: what comes next. The last has none."""
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORE)], dim=-1)


class Batches:
    """The endless stream of optimiser steps over `examples`, as one data-parallel rank sees it.

    Args:
        examples: the whole training data, the same on every rank.
        batch_size: rows per optimiser step, over all ranks.
        micro_batch_size: rows per forward pass on one rank.
        seq_len: length of a packed row, and the most an example may have.
        pad_id: token that fills a row; any will do, for it is neither seen nor trained.
        seed: of the order.
        packing: fill rows with several examples; none is split.
        dp_rank, dp_size: this rank among those that hold different data (not tensor or pipeline ranks).
        mask_dtype: with packing, also build a 4-D mask of this dtype; `packing` says which models need it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        micro_batch_size: int,
        seq_len: int,
        pad_id: int,
        seed: int = 0,
        packing: bool = False,
        dp_rank: int = 0,
        dp_size: int = 1,
        mask_dtype: torch.dtype | None = None,
    ) -> None:
        if not examples:
            raise ValueError("Batches needs at least one example, got none")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"expected 0 <= dp_rank < dp_size, got dp_rank={dp_rank}, dp_size={dp_size}")
        longest = max(examples, key=lambda example: len(example.input_ids))
        if len(longest.input_ids) > seq_len:
            raise ValueError(f"{longest.source}: {len(longest.input_ids)} tokens do not fit into seq_len={seq_len}")
        check_batch_size(batch_size, micro_batch_size, dp_size)
        self.examples = examples
        self.batch_size, self.micro_batch_size, self.seq_len = batch_size, micro_batch_size, seq_len
        self.pad_id, self.seed, self.packing, self.mask_dtype = pad_id, seed, packing, mask_dtype
        self.dp_rank, self.dp_size = dp_rank, dp_size
        lengths = [len(example.input_ids) for example in examples]
        self.rows = pack(lengths, seq_len) if packing else [[index] for index in range(len(examples))]
        self._order = lru_cache(maxsize=2)(self._permutation)  # a step touches two epochs at most, save on tiny data

    def __len__(self) -> int:
        """Rows of an epoch: examples, or packed rows."""
        return len(self.rows)

    @property
    def accumulation(self) -> int:
        """Microbatches of a step on each rank."""
        return self.batch_size // (self.micro_batch_size * self.dp_size)

    @property
    def fingerprint(self) -> str:
        """Equal where the stream of rows is equal, whatever the batch size and the number of ranks; for resuming."""
        digest = hashlib.sha256(f"{self.seed} {self.packing} {self.seq_len if self.packing else 0}".encode())
        for example in self.examples:
            digest.update(np.asarray([len(example.input_ids), *example.input_ids, *example.labels], np.int64).tobytes())
        return digest.hexdigest()[:32]

    def step(self, consumed: int) -> list[MicroBatch]:
        """This rank's microbatches of the step that starts when `consumed` rows have been consumed over all ranks."""
        batches = []
        for accumulation in range(self.accumulation):
            index = accumulation * self.dp_size + self.dp_rank
            start = consumed + index * self.micro_batch_size
            places = [divmod(position, len(self.rows)) for position in range(start, start + self.micro_batch_size)]
            documents = [[self.examples[i] for i in self.rows[self._order(epoch)[place]]] for epoch, place in places]
            batch = collate(
                documents,
                seq_len=self.seq_len,
                pad_id=self.pad_id,
                packed=self.packing,
                index=index,
                epoch=places[0][0],
            )
            if self.packing and self.mask_dtype is not None:
                batch = replace(batch, mask=block_causal_mask(batch.position_ids, self.mask_dtype))
            batches.append(batch)
        return batches

    def _permutation(self, epoch: int) -> np.ndarray:
        # RandomState, and not the newer Generator: its streams are promised never to change between numpy versions,
        # and a run may be resumed with another one.
        seed = hashlib.sha256(f"order {self.seed} {epoch}".encode()).digest()[:4]
        return np.random.RandomState(int.from_bytes(seed, "little")).permutation(len(self.rows))


def sweep(
    examples: Sequence[Example], *, micro_batch_size: int, seq_len: int, pad_id: int, dp_rank: int = 0, dp_size: int = 1
) -> list[MicroBatch]:
    """Each example once over all ranks, for evaluation: short ones together, never packed.

    Every rank gets equally many microbatches, since each forward pass may hold collectives; where the examples run out,
    a rank gets a row without any target.
    """
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    rounds = -(-len(ordered) // (micro_batch_size * dp_size))
    batches = []
    for index in range(dp_rank, rounds * dp_size, dp_size):
        chunk = ordered[index * micro_batch_size : (index + 1) * micro_batch_size]
        documents = [[example] for example in chunk] or [[]]
        batches.append(collate(documents, seq_len=seq_len, pad_id=pad_id, packed=False, index=index, epoch=0))
    return batches


def collate(
    rows: Sequence[Sequence[Example]], *, seq_len: int, pad_id: int, packed: bool, index: int, epoch: int
) -> MicroBatch:
    """Rows of documents -> tensors. Padded to a multiple of `ROWS_OF` (but no further than seq_len); packed rows to seq_len."""
    longest = max(sum(len(example.input_ids) for example in row) for row in rows)
    length = seq_len if packed else min(seq_len, max(ROWS_OF, -(-longest // ROWS_OF) * ROWS_OF))
    shape = (len(rows), length)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    position_ids = torch.arange(length).repeat(len(rows), 1)
    filled = torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.input_ids)
            input_ids[r, start:end] = torch.tensor(example.input_ids)
            labels[r, start:end] = torch.tensor(example.labels)
            labels[r, start] = IGNORE  # the token before it belongs to another document
            position_ids[r, start:end] = torch.arange(end - start)
            start = end
        filled[r, :start] = True
        if packed:
            position_ids[r, start:] = torch.arange(length - start)  # the padding is a document of its own
    tokens = sum(len(example.input_ids) for row in rows for example in row)
    return MicroBatch(input_ids, labels, position_ids, index, epoch, packed, tokens=tokens, filled=filled)


def check_batch_size(batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Raise a ValueError that lists the valid choices unless every rank gets whole microbatches, equally many."""
    if batch_size % (micro_batch_size * dp_size) == 0:
        return
    problem = (
        f"batch_size={batch_size} must be divisible by micro_batch_size * dp_size = {micro_batch_size} * {dp_size} = "
        f"{micro_batch_size * dp_size}"
    )
    unit = micro_batch_size * dp_size
    below = batch_size // unit * unit
    sizes = " or ".join(str(size) for size in (below, below + unit) if size)
    if batch_size % dp_size == 0:
        share = batch_size // dp_size
        micro = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
        raise ValueError(f"{problem}; valid: micro_batch_size in {micro}, or batch_size {sizes}")
    ranks = ", ".join(str(size) for size in range(1, batch_size + 1) if batch_size % size == 0)
    raise ValueError(f"{problem}; valid: batch_size {sizes}, or a number of data-parallel ranks in {ranks}")
