"""The two verbs that users call on a method: in and out. Module second, as in d9d."""

from torch import nn

from d9d_lora.method import PeftMethod
from d9d_lora.quant.linear import dequantising
from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperParallel
from d9d_lora.walk import refuse_adapted


def inject_peft_and_freeze(method: PeftMethod, module: nn.Module) -> ModelStateMapper:
    """Injects a method, and freezes every parameter it does not train.

    Works on plain, meta and tensor-parallel models. Call it before `fully_shard`.

    Returns:
        The mapper from the keys of the model as it was to its keys now; it covers only the keys that changed.

    Raises:
        ValueError: if a target matches nothing, a layer cannot be adapted, the model already has adapters or is already sharded. The
            module, its `requires_grad` flags included, is then as it was.
    """
    refuse_adapted(module)  # it would be frozen, and what it learned so far would silently stop learning
    flags = [(p, p.requires_grad) for p in module.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        result = method.inject(module)
    except Exception:
        for p, flag in flags:
            p.requires_grad_(flag)
        raise
    for p in result.parameters_to_train:
        p.requires_grad_(True)
    return ModelStateMapperParallel(result.load_state_mappers)


def merge_peft(method: PeftMethod, module: nn.Module, *, dequantise: bool = False) -> None:
    """Folds what a method learned into the base weights and removes its layers. Undone by `unmerge_peft`.

    `dequantise`: put plain layers in the place of quantised ones, which cannot hold the sum; without it those are refused.
    """
    with dequantising(module, dequantise):
        method.merge(module)


def unmerge_peft(method: PeftMethod, module: nn.Module) -> None:
    """Undoes the last merge: base weights as they were to the bit, adapters in place."""
    method.unmerge(module)
