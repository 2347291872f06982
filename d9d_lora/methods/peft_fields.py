"""A `LoRAConfig` from the fields of PEFT's own `LoraConfig`, none of which is dropped in silence.

A field of PEFT 0.21.2 is mapped, or says nothing about the adapter, or is refused with the reason unless it has its inert value.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from d9d_lora.init.survey import CordaConfig, EvaConfig
from d9d_lora.methods.lora import LoRAConfig

_TARGETS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "target_parameters",
    "layer_replication",
    "ensure_weight_tying",
)
_PARAMETERS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "lora_bias", "use_dora")
_SAYS_NOTHING = {
    "peft_version": "who wrote it",
    "auto_mapping": "how PEFT finds the base's class",
    "base_model_name_or_path": "which base: the model is given",
    "revision": "which base: the model is given",
    "task_type": "which of PEFT's wrappers is used; there is none here",
    "inference_mode": "every saved config says true, also of adapters that will be trained on",
    "fan_in_fan_out": "each layer tells itself how its weight is stored",
    "megatron_core": "where PEFT imports Megatron from; goes with megatron_config, which is refused",
}
_REFUSED = {
    "megatron_config": "Megatron's layers are not adapted here; shard torch's own layers with a tensor-parallel plan",
    "trainable_token_indices": "single rows of an embedding are not trained here; adapt the embedding, or name it in modules_to_save",
    "loftq_config": "it goes with init_lora_weights: loftq, and means nothing without",
    "lora_ga_config": "LoRA-GA needs the gradient of the full weight before the first step, which no frozen base has",
    "velora_config": "VeLoRA compresses the activations of A's backward, so its gradients are others than LoRA's",
    "alora_invocation_tokens": "aLoRA is on for a part of the tokens only, so the model's forward would have to find them",
    "use_qalora": "QA-LoRA pools the input by groups of a GPTQ base, which is not read here",
    "qalora_group_size": "it goes with use_qalora, which is refused, and means nothing without",
    "monteclora_config": "MonteCLoRA samples its factors in every forward and adds a loss of its own",
    "runtime_config": "ephemeral offloading is not done here; shard the base instead",
    "use_bdlora": "BD-LoRA's factors are block-diagonal, so that servers need no sum; ours add no collective as they are",
    "arrow_config": "Arrow mixes several adapters by the input; this config is of one",
    "kasa_config": "KaSA truncates the base weight and learns singular values, which is another method",
}
# Settings of a start from data: ours, and what of PEFT's has a meaning of its own only with another value than this.
_FROM_DATA: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "eva_config": (EvaConfig, {"label_mask_value": -100}),
    "corda_config": (
        CordaConfig,
        {"cache_file": None, "covariance_file": None, "verbose": None, "use_float16_for_covariance": None, "prune_temporary_fields": None},
    ),
}
_INERT = {"qalora_group_size": 16, "runtime_config": {"ephemeral_gpu_offload": False}}  # others: whatever is empty or false


def from_peft(fields: Mapping[str, Any]) -> LoRAConfig:
    """The config of a LoRA method from PEFT's fields: `dataclasses.asdict(lora_config)`, or the content of an adapter_config.json.

    Raises:
        ValueError: with a line for each field that cannot be followed.
    """
    fields = {name: _plain(value) for name, value in fields.items()}
    faults = _faults(fields)
    if faults:
        raise ValueError("this LoraConfig cannot be followed:\n  " + "\n  ".join(faults))
    targets = {name: fields[name] for name in _TARGETS if fields.get(name) is not None}
    params = {name: fields[name] for name in _PARAMETERS if fields.get(name) is not None}
    for name, (config, _) in _FROM_DATA.items():
        if fields.get(name):
            params[name] = {key: value for key, value in fields[name].items() if key in config.model_fields}
    return LoRAConfig.model_validate({**targets, "params": params})


def _faults(fields: dict[str, Any]) -> list[str]:
    known = [*_TARGETS, *_PARAMETERS, *_SAYS_NOTHING, *_REFUSED, *_FROM_DATA, "peft_type"]
    faults = []
    for name, value in fields.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            faults.append(f"{name}: no field of PEFT 0.21.2" + (f"; did you mean {near[0]!r}?" if near else ""))
        elif name in _REFUSED and value and value != _INERT.get(name):
            faults.append(f"{name} = {value!r}: {_REFUSED[name]}")
    for name, (config, inert) in _FROM_DATA.items():
        for key, value in (fields.get(name) or {}).items():
            if key.endswith("_file") and value:
                faults.append(f"{name}.{key} = {value!r}: surveys are made anew from the data, and no pickled file is read")
            elif key not in config.model_fields and value != inert.get(key, value if key in inert else None):
                faults.append(f"{name}.{key} = {value!r}: expected {inert.get(key)!r}, or no such field")
    if str(fields.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        faults.append(f"peft_type = {fields['peft_type']!r}: this is the reader of LORA; give the config of that method its own kind")
    if not fields.get("target_modules") and not fields.get("target_parameters"):
        faults.append("target_modules is not given: PEFT then looks the layers up by the model's type; name them, or say 'all-linear'")
    if fields.get("r", 8) < 1:
        faults.append(f"r = {fields['r']!r}: expected at least 1")
    return faults


def _plain(value: Any) -> Any:
    """PEFT holds names as sets and its inner configs as dataclasses."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return vars(value) if hasattr(value, "__dataclass_fields__") else value
