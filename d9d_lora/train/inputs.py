"""What a run reads: its tokenizer, the batches of this rank, and the rows that are held out."""

from typing import Any

from d9d_lora.train.batches import Batches, MicroBatch, sweep
from d9d_lora.train.config import ModelConfig, RunConfig
from d9d_lora.train.data import load_data, show_samples
from d9d_lora.train.model import local_directory
from d9d_lora.train.world import World


class Inputs:
    """Of one run.

    Attributes:
        pad_id: The token that fills rows up.
        batches: The microbatches of any step, for this rank.
        held_out: Samples that are never trained on.
        told: What a user should see of them, a line each.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self._data, self._world = config.data, world
        self.tokenizer = open_tokenizer(config.model)
        loaded = load_data(self._data, self.tokenizer, seed=config.train.seed)
        self.held_out = loaded.eval
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self.pad_id: int = pad or 0
        self.batches = Batches(
            loaded.train,
            batch_size=self._data.batch_size,
            micro_batch_size=self._data.micro_batch_size,
            seq_len=self._data.seq_len,
            pad_id=self.pad_id,
            seed=config.train.seed,
            packing=self._data.packing,
            dp_rank=world.dp_rank,
            dp_size=world.dp_size,
        )
        self.told = [f"data: {loaded.report}"]
        if self.held_out:
            self.told.append(f"held out: {len(self.held_out):,} samples")
        self.told.append(f"as it is trained: {show_samples(loaded.train, self.tokenizer, 1)}")

    def evaluated(self) -> list[MicroBatch]:
        """The held-out rows of this rank, once."""
        longest = max(len(e.input_ids) for e in self.held_out)
        return sweep(
            self.held_out,
            micro_batch_size=max(1, self._data.micro_batch_size * self._data.seq_len // longest),  # the tokens that training has room for
            seq_len=self._data.seq_len,
            pad_id=self.pad_id,
            dp_rank=self._world.dp_rank,
            dp_size=self._world.dp_size,
        )


def open_tokenizer(config: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    source = config.tokenizer or config.path
    if source is None:
        raise ValueError("model.tokenizer: a model from a callable needs to be told where its tokenizer is")
    return AutoTokenizer.from_pretrained(local_directory(source))
