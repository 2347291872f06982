"""The loss of a microbatch, and of held-out rows: next tokens, summed over those that are targets.

    inputs, targets    this rank's tokens of the rows; padded where tensor-parallel ranks share them
    forward            with logits only where a row has a target, if the model can
    cross entropy      a sum; whoever trains divides by the targets of the whole global batch
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from d9d_lora.dropout import Share
from d9d_lora.layers import AdaptedLayer
from d9d_lora.tokens import IGNORE, lengthened
from d9d_lora.train import model as models
from d9d_lora.train.batches import MicroBatch, shift_labels
from d9d_lora.train.build import Built


class Loss:
    """Of a built model. `loss(batch)` is what a step differentiates.

    Attributes:
        cuts_logits: Whether logits are made only where a row has a target.
    """

    def __init__(self, built: Built, pad_id: int) -> None:
        self.built, self.pad_id = built, pad_id
        self.cuts_logits = "logits_to_keep" in inspect.signature(built.model.forward).parameters and not _drops_at_head(built.model)

    def __call__(self, batch: MicroBatch, forward: Callable[..., Any] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the losses of target tokens, number of rows answered exactly, number of rows with a target).

        `forward`: what makes logits of the inputs; the model, if not a stage of it.
        """
        model, context = self.built.model, self.built.context
        inputs, targets = self._shared(batch)
        if self.cuts_logits and not self.built.world.parallel.sequence_parallel:
            # Logits only where a row has a target: the head is the widest layer, and most positions teach nothing.
            keep = (targets != IGNORE).any(0).nonzero().squeeze(1)
            if 0 < len(keep) < targets.shape[1]:
                inputs, targets = {**inputs, "logits_to_keep": keep}, targets[:, keep]
        with self.autocast():
            output = (forward or model)(**models.accepted(model, inputs))
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        asked = targets != IGNORE
        rows = torch.stack([asked.sum(1), ((logits.argmax(-1) != targets) & asked).sum(1)])
        if context is not None and not model.training:
            context.sum(rows)  # a row is right where all its parts are
        right = (rows[0] > 0) & (rows[1] == 0)
        return loss, right.sum(), (rows[0] > 0).sum()

    def _shared(self, batch: MicroBatch) -> tuple[dict[str, Any], Tensor]:
        """(inputs, targets): of the rows, what this rank computes."""
        built, parallel = self.built, self.built.world.parallel
        inputs, targets = batch.inputs(), shift_labels(batch.labels)
        if built.context is not None:
            return built.context.split(batch.input_ids, batch.position_ids, targets, packed=batch.packed, pad_id=self.pad_id)
        if parallel.sequence_parallel:
            several, short = len(batch.input_ids), -batch.input_ids.shape[1] % parallel.tp
            for clock in built.clocks:
                clock.share = Share(batch=several, more=short) if short and several > 1 else Share()
            if short:
                ids, positions, packed = inputs["input_ids"], inputs["position_ids"], built.config.data.packing
                ids, positions, targets = lengthened(ids, positions, targets, short, packed=packed, pad_id=self.pad_id)
                inputs = {**inputs, "input_ids": ids, "position_ids": positions}
        return inputs, targets

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.built.world.device.type, self.built.dtype, enabled=self.built.autocast)


def _drops_at_head(model: Any) -> bool:
    """Whether an adapter on the output head drops: its masks number the rows it is given, so they would follow where logits are cut, and
    that is another place for tokens that ranks share."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return isinstance(head, AdaptedLayer) and head.dropout.p > 0


def summary(batches: Iterable[MicroBatch], scores: Iterable[tuple[Tensor, Tensor, Tensor]], built: Built) -> dict[str, float]:
    """Loss a target token, perplexity, and the share of rows answered exactly (teacher-forced greedy: every target token is the most
    likely one, which is what greedy decoding would produce), over all ranks. Collective.

    Args:
        scores: What `Loss` says of each batch; of a pipeline, on the last stage alone.
    """
    world = built.world
    sums = torch.zeros(4, **wide(world.device))
    for batch, (loss, right, asked) in zip(batches, scores):
        here = torch.tensor(batch.target_tokens / world.parallel.cp, device=world.device)  # cp ranks have parts of a loss, and all rows
        sums += torch.stack([loss, here, right, asked]).to(sums)
    loss, tokens, right, asked = world.sum_over_dp(sums, alike=("tp",)).tolist()
    mean = loss / tokens
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "exact_match": right / asked}


def wide(device: torch.device) -> dict[str, Any]:
    """Where sums are kept: float64, but for devices that have none."""
    return {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}
