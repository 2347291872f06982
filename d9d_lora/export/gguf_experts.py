"""The adapter of a stack of experts in a GGUF file: A[E, r, in], B[E, out, r], for each of the stacks that llama.cpp has of it.

    experts.gate_up_proj   fused A[E r, in], B[2 out, r E]   ->   blk.3.ffn_gate_exps, blk.3.ffn_up_exps: one lora_a, the rows of lora_b
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d9d_lora.export.gguf_names import BaseConfig, Weight, config_of
from d9d_lora.state import expert_layouts as experts
from d9d_lora.state.expert_base import outline_of
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_kinds.lora_meaning import layer_meanings, parameters_of
from d9d_lora.state.peft_read import LayerMeaning, Parts, meanings, open_weights, read_adapter_config, reading_of


def meanings_on(
    adapter: Path, base_config: BaseConfig
) -> tuple[dict[str, Any], Parts, dict[str, LayerMeaning], dict[str, str]]:
    """`meanings`, and which layers of the file stand for which parameter of the base's model."""
    config = read_adapter_config(adapter)
    if config["peft_type"] != "LORA" or not config.get("target_parameters"):
        return *meanings(adapter), {}
    told = base_config if isinstance(base_config, Mapping) else config_of(base_config)
    with open_weights(adapter) as files:
        reading = reading_of(adapter, config, files, outline_of(told))
        bare = parameters_of(reading)
        return config, reading.parts, layer_meanings(reading, bare), bare


def stack_to_gguf(weights: Sequence[Weight], a: Tensor, b: Tensor, factor: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """A fused pair of a stack of experts (`expert_layouts.py`) as the stacks that llama.cpp has of it."""
    n, rows = weights[0].experts, [weight.rows for weight in weights]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] % n or (a.shape[1], b.shape) != (weights[0].columns, (sum(rows), a.shape[0])):
        raise AdapterError(
            f"{weights[0].layer}: A {tuple(a.shape)} and B {tuple(b.shape)}; this base expects [{n} r, {weights[0].columns}] and "
            f"[{sum(rows)}, {n} r]. Is it the adapter of another model?"
        )
    A = experts.stacked_A(experts.from_fused_A(a, n)).to(dtype).contiguous()
    B = experts.stacked_B(experts.from_fused_B(b, n))
    B = (B if factor == 1 else B.double() * factor).to(dtype)
    found: dict[str, Tensor] = {}
    for weight, part in zip(weights, B.split(rows, 1)):
        found |= {f"{weight.tensor}.lora_a": A, f"{weight.tensor}.lora_b": part.contiguous()}
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{name} has values that are not finite in {dtype}; write f32, or train again")
    return found


__all__ = ["meanings_on", "stack_to_gguf"]
