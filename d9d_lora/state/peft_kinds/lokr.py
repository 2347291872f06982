"""LOKR: <layer>.lokr_w1 [P, Q] or lokr_w1_a [P, r], lokr_w1_b [r, Q]; lokr_w2 [U, V] or lokr_w2_a [U, r], lokr_w2_b [r, V].

Scaled by alpha / r. Of a convolution lokr_w2 is [U, C, taps], and with a Tucker core there are lokr_t2 [r, r, taps], lokr_w2_a [r, U]
and lokr_w2_b [r, C]. Names and shapes are ours. PEFT has it on nn.Linear, Conv1d and Conv2d.

[Note: a whole w2 of a Conv1d]
torch.kron of w1 [P, Q] and w2 [U, C, taps] lines up the last dimensions, so PEFT 0.21.2 computes another tensor there and reshapes it
to the weight. Such a file does not mean what it says, so it is neither written nor read.
"""

from torch import nn

from d9d_lora.layers import AdaptedLayer
from d9d_lora.methods.lokr import LoKr, LoKrConfig, LoKrDelta
from d9d_lora.state.peft_kinds.dialect import Reading
from d9d_lora.state.peft_kinds.loha import LyCORISDialect


class LoKrDialect(LyCORISDialect):
    peft_type = "LOKR"
    kind = "lokr"
    factors = ("lokr_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    fields = {**LyCORISDialect.fields, "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False}
    common = {
        **LyCORISDialect.common,
        "both": "decompose_both",
        "factor": "decompose_factor",
        "rank_dropout_scale": "rank_dropout_scale",
    }

    def refuses(self, layer: AdaptedLayer) -> str | None:
        if (reason := super().refuses(layer)) is not None:
            return reason
        if isinstance(layer.base, nn.Conv1d) and isinstance(layer.delta, LoKrDelta) and not layer.delta.product2:
            return f"PEFT scrambles a whole lokr_w2 of a Conv1d; with a rank below {layer.delta.r} it is a product"
        return None

    def method(self, reading: Reading) -> LoKr:
        return LoKr(LoKrConfig.model_validate(self.fields_of(reading)))
