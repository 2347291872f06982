"""LOKR: <layer>.lokr_w1 [P, Q] or lokr_w1_a [P, r], lokr_w1_b [r, Q]; lokr_w2 [U, V] or lokr_w2_a [U, r], lokr_w2_b [r, V].

Scaled by alpha / r. Of a convolution lokr_w2 is [U, C, taps], and with a Tucker core there are lokr_t2 [r, r, taps], lokr_w2_a [r, U]
and lokr_w2_b [r, C]. Names and shapes are ours. PEFT has it on nn.Linear, Conv1d and Conv2d.
"""

from d9d_lora.methods.lokr import LoKr, LoKrConfig
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

    def method(self, reading: Reading) -> LoKr:
        return LoKr(LoKrConfig.model_validate(self.fields_of(reading)))
