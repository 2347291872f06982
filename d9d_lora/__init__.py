"""Adapters that shard the way the layer they adapt is sharded.

    model = build on meta                                     # shapes only
    parallelize_module(model, mesh, plan)                     # base weights become DTensors
    mapper = inject_peft_and_freeze(method, model)            # layers wrapped, factors placed after the base
    fully_shard(block) for each block; fully_shard(model)     # FSDP2 or HSDP
    model.to_empty(device=...)                                # memory, no values yet
    load_checkpoint(model, path, mapper, skip=factors)        # each rank reads the bytes of its shard
    method.initialise(model)                                  # starts that need the real weights
    train; save_adapter(model, path)                          # or merge_peft(method, model)
"""

from d9d_lora.combine import add_weighted_adapter
from d9d_lora.files import load_adapter, save_adapter, total_parameter_count, trainable_parameter_count
from d9d_lora.inject import inject_peft_and_freeze, merge_peft, unmerge_peft
from d9d_lora.layers import GroupedLinear
from d9d_lora.method import PeftInjectionResult, PeftMethod
from d9d_lora.methods.full_tune import FullTune, FullTuneConfig
from d9d_lora.methods.lora import LoRA, LoRAConfig, LoRAGroupedLinear, LoRALinear
from d9d_lora.methods.lora_parameters import LoRAParameters
from d9d_lora.methods.stack import PeftStack, PeftStackConfig
from d9d_lora.named import (
    active_adapters,
    adapter_names,
    adapter_rows,
    adapter_status,
    add_adapter,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    only_adapter,
    set_adapter,
    unmerge_adapters,
)
from d9d_lora.registry import peft_method_from_config
from d9d_lora.share_experts import fully_shard_experts, share_experts
from d9d_lora.state.mappers import (
    ModelStateMapper,
    ModelStateMapperParallel,
    ModelStateMapperRename,
    ModelStateMapperSequential,
    StateGroup,
)
from d9d_lora.state.merge_live import save_merged

__all__ = [
    "FullTune",
    "FullTuneConfig",
    "GroupedLinear",
    "LoRA",
    "LoRAConfig",
    "LoRAGroupedLinear",
    "LoRALinear",
    "LoRAParameters",
    "ModelStateMapper",
    "ModelStateMapperParallel",
    "ModelStateMapperRename",
    "ModelStateMapperSequential",
    "PeftInjectionResult",
    "PeftMethod",
    "PeftStack",
    "PeftStackConfig",
    "StateGroup",
    "active_adapters",
    "adapter_names",
    "adapter_rows",
    "adapter_status",
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapters",
    "fully_shard_experts",
    "inject_peft_and_freeze",
    "load_adapter",
    "merge_adapters",
    "merge_peft",
    "only_adapter",
    "peft_method_from_config",
    "save_adapter",
    "save_merged",
    "set_adapter",
    "share_experts",
    "total_parameter_count",
    "trainable_parameter_count",
    "unmerge_adapters",
    "unmerge_peft",
]
