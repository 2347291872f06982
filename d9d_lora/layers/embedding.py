"""y = E[ids] + dE[ids], with E[V,D] a transposed matrix: I is the vocabulary V, O is the width D, and dE[ids] = s (A^T)[ids] B^T.

Here A starts at zero and B from a normal distribution (loralib, PEFT): looking up a row of a Kaiming A would give values of
size 1/sqrt(V), which learn far too slowly.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.nn.functional import embedding

from d9d_lora.layers.base import AdaptedLayer
from d9d_lora.layers.gained import gained
from d9d_lora.methods.delta import Parts


class AdaptedEmbedding(AdaptedLayer):
    """An adapted `nn.Embedding`; its rows may be scaled by the layer (`embed_scale`, as Gemma's are)."""

    weight_axes = "IO"
    lookup = True
    takes_several = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "max_norm rewrites its weight in every forward, which a frozen base must not do; build the layer without it"
        if module.sparse:
            return "it is sparse, and adapters have dense gradients; build the layer with sparse=False"
        return None

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D]."""
        if (other := self.stand_in()) is not None:
            return other(ids)  # type: ignore[no-any-return]
        self.refuse_unstarted()
        if self.placing.mesh is None and not self.has_gain_at_work():
            return self.plus_updates(self.base(ids), ids, self.base.weight.dtype)  # type: ignore[arg-type,union-attr]
        h, parts = self.placing.enter(ids, None if self.placing.letter is None else Replicate(), self.name)
        if self.placing.letter is None:
            self.saw_part_of_tokens = parts
        y = self.rows_here(h, parts=parts) if self.placing.letter == "I" else self.adapted(h, parts=parts)
        return self.placing.leave(y, ids, self.out_size)

    def adapted(self, ids: Tensor, *, parts: bool) -> Tensor:
        """Rows of E + dE for ids that count from this rank's first row."""
        dtype: torch.dtype = self.base.weight.dtype  # type: ignore[assignment,union-attr]
        y = embedding(ids, self.weight_here().T, self.padding_here())
        y = y if self.scale_of_rows() == 1 else y * y.new_tensor(self.scale_of_rows())
        if not self.has_gain_at_work():
            return self.plus_updates(y, ids, dtype, parts=parts)
        f = self.parts(dtype, parts=parts)
        y = y + self.update(ids, f)
        return gained(y, self.gain(f))

    def update(self, ids: Tensor, f: Parts) -> Tensor:
        y = self.delta.look_up(ids, f, padding=self.padding_here())
        return y if self.scale_of_rows() == 1 else y * self.scale_of_rows()

    def rows_here(self, ids: Tensor, *, parts: bool) -> Tensor:
        """Vocabulary-parallel: rows of other ranks count as zero, so the output is a Partial sum of one whole and zeros."""
        start, length = self.placing.span(self.in_size, "I")
        if length == 0:
            raise ValueError(f"{self.name}: {self.in_size} rows on {self.placing} ranks leave a rank without any")
        elsewhere = (ids < start) | (ids >= start + length)
        here = (ids - start).masked_fill(elsewhere, 0)
        return self.adapted(here, parts=parts).masked_fill(elsewhere.unsqueeze(-1), 0)

    def padding_here(self) -> int | None:
        """The padding row, which has no gradient, as a local number; None where it is not on this rank."""
        padding: int | None = self.base.padding_idx  # type: ignore[assignment]
        if padding is None:
            return None
        start, length = self.placing.span(self.in_size, "I")
        return padding - start if start <= padding < start + length else None

    def scale_of_rows(self) -> float:
        # Gemma keeps the number beside a buffer of it; the buffer holds rubbish between a meta build and its initialisation.
        return float(getattr(self.base, "scalar_embed_scale", getattr(self.base, "embed_scale", 1.0)))
