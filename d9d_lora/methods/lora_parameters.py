"""The hyperparameters of a LoRA layer, and which of them exclude each other; what they make of it: `methods/lora.py`."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from d9d_lora.init.blind import BLIND
from d9d_lora.init.loftq import LoftQConfig
from d9d_lora.init.survey import FROM_DATA, CordaConfig, EvaConfig
from d9d_lora.init.weights import is_from_weight
from d9d_lora.methods.merged import check_slices


class LoRAParameters(BaseModel):
    """Hyperparameters of a LoRA layer."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(8, ge=0, description="rank; 0 leaves the matched layers alone (as loralib does)")
    alpha: float = Field(8, gt=0, allow_inf_nan=False, description="scale of the update: s = alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")
    scaling: Literal["lora", "rslora"] = Field("lora", description="s = alpha / r, or alpha / sqrt(r), which suits high ranks")
    init_lora_weights: bool | str = Field(
        True, description="start: true, false, gaussian, orthogonal, pissa, pissa_niter_N, olora, eva, corda or loftq"
    )
    init_zero: Literal["A", "B"] | None = Field(
        None, description="the factor that starts at zero, for the starts true and gaussian; null: B, and on embeddings A"
    )
    eva_config: EvaConfig | None = Field(None, description="settings of init_lora_weights: eva")
    corda_config: CordaConfig | None = Field(None, description="settings of init_lora_weights: corda")
    loftq_config: LoftQConfig | None = Field(None, description="settings of init_lora_weights: loftq")
    lora_bias: bool = Field(False, description="a bias on B as well; merging needs a base with a bias")
    use_dora: bool = Field(False, description="learn a magnitude for every output row as well: `methods/dora.py`")
    enable_lora: list[bool] | None = Field(None, description="of layers that are several in one, which have an update: `methods/merged.py`")
    expert_rank: Literal["r", "r/top_k"] = Field(
        "r", description="rank of each expert of a stack: r, or r divided by the experts a token meets, whose ranks are then r together"
    )
    experts_shared_outer: bool = Field(
        False, description="of stacks of experts, one factor for all at the model's hidden size: A of gate and up, B of down"
    )
    slices: list[int] | None = Field(None, description="the output features of each of these; null: as the model tells, or equal")

    @model_validator(mode="before")
    @classmethod
    def _peft_spellings(cls, fields: Any) -> Any:
        """`lora_alpha`, `lora_dropout` and `use_rslora` are PEFT's names of `alpha`, `dropout` and `scaling`."""
        if not isinstance(fields, dict):
            return fields
        rules = {True: "rslora", False: "lora"}
        for theirs, ours in {"lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "scaling"}.items():
            if theirs not in fields:
                continue
            value = fields[theirs]
            if theirs == "use_rslora":
                if not isinstance(value, bool):
                    raise ValueError(f"use_rslora is true or false, got {value!r}")
                value = rules[value]
            if ours in fields and fields[ours] != value:
                raise ValueError(f"{theirs} = {fields[theirs]!r} and {ours} = {fields[ours]!r} are two spellings of one field; give one")
            fields = {**{k: v for k, v in fields.items() if k != theirs}, ours: value}
        return fields

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        start = self.init_lora_weights = start_of(self.init_lora_weights)
        if self.init_zero and start not in (True, "gaussian"):
            raise ValueError(f"init_zero goes with init_lora_weights true or gaussian; {start!r} says itself how both factors start")
        for name in (*FROM_DATA, "loftq"):
            if getattr(self, f"{name}_config") is not None and start != name:
                raise ValueError(f"{name}_config goes with init_lora_weights: {name}, and would be ignored with {start!r}")
        if start == "orthogonal" and self.r % 2:
            raise ValueError(f"init_lora_weights: orthogonal splits the rank into halves, so r must be even, got {self.r}")
        if self.lora_bias and not isinstance(start, bool):
            raise ValueError(f"lora_bias goes with init_lora_weights true or false, got {start!r}: other starts say nothing of the bias")
        if self.lora_bias and self.enable_lora:
            raise ValueError("lora_bias and enable_lora exclude each other: a slice without an update would get a bias. Give one of them")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias and use_dora exclude each other: the magnitude would scale the bias too. Give one of them")
        if self.experts_shared_outer and (self.use_dora or self.enable_lora or start not in (True, False, "gaussian")):
            raise ValueError(
                "experts_shared_outer is of plain LoRA: with a magnitude, slices (enable_lora) or a start that reads each expert's weight "
                "it is not proven. Leave use_dora and enable_lora out, and take init_lora_weights true, false or gaussian"
            )
        check_slices(self.enable_lora, self.slices)
        if self.enable_lora and (self.lora_bias or start not in (True, False, "gaussian")):
            raise ValueError("enable_lora goes with init_lora_weights true, false or gaussian, and without lora_bias")
        return self


# Starts of PEFT that are not made here, with the reason and the mend.
_REFUSED_STARTS = {
    "lora_ga": "it needs the gradient of the full weight before the first step, which no frozen base has",
    "mica": "it freezes B at the smallest singular directions, which is another method; use pissa or olora",
}


def start_of(value: bool | str) -> bool | str:
    """`init_lora_weights`, checked."""
    if isinstance(value, bool):
        return value
    start = value.lower()
    if start in _REFUSED_STARTS:
        raise ValueError(f"init_lora_weights: {value!r} is not made here: {_REFUSED_STARTS[start]}")
    if start not in (*BLIND, *FROM_DATA, "loftq") and not is_from_weight(start):
        raise ValueError(
            f"init_lora_weights: {value!r} is no start; expected true, false, gaussian, orthogonal, pissa, pissa_niter_N (such as "
            "pissa_niter_16), olora, eva, corda or loftq"
        )
    return start
