"""The only file that spells names: of an adapted weight in a state dict, and of an adapter's tensors in PEFT's files.

    as it was                 adapted                             in a PEFT file
    q_proj.weight             q_proj.base.weight                  -
    -                         q_proj.lora_A.weight   [r, in]      base_model.model.q_proj.lora_A.weight
    -                         embed.lora_A.weight    [r, V]       base_model.model.embed.lora_embedding_A
    lm_head.weight (trained)  lm_head.weight                      base_model.model.lm_head.weight
"""

import re

from torch import nn

BASE = "base"
PEFT_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def clean(name: str) -> str:
    """A name free of what torch.compile and checkpoint wrappers put in it."""
    return _WRAPPERS.sub("", name)


def renames(layer: str, base: nn.Module) -> list[tuple[str, str]]:
    """(name as it was, name now) of every tensor of a layer that becomes adapted."""
    return [(f"{layer}.{key}", f"{layer}.{BASE}.{key}") for key in base.state_dict()]


def original(name: str, adapted: set[str]) -> str:
    """The name a tensor had before the injection; `adapted` are the names of the adapted layers."""
    owner, _, tail = clean(name).rpartition(f".{BASE}.")
    return f"{owner}.{tail}" if owner in adapted else clean(name)
