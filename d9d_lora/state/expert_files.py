"""Files that hold each expert by itself, for a model that holds experts in stacks: the mapper between them.

Which names make up a stack, and other renamings of a family, is transformers' own knowledge: its list of conversions for a model. A load
reads each rank's experts only, as the mapper has a route (`mappers.StackRoute`).
"""

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from d9d_lora.state.mappers import ModelStateMapper, ModelStateMapperParallel, ModelStateMapperRename, ModelStateMapperStack


def expert_mapper(module: nn.Module, file_names: Collection[str]) -> ModelStateMapper | None:
    """From the names of a file to those of a transformers model; None where nothing needs it.

    Raises:
        ValueError: for a conversion that is neither a renaming nor a stack of matrices.
    """
    transforms = _conversions(module)
    stacks: dict[str, dict[str, list[str]]] = {}  # name in the model -> its patterns, in their order -> names in the file
    renames: list[ModelStateMapper] = []
    for name in sorted(file_names, key=_natural):
        new, stack = name, None
        for transform in transforms:
            new, pattern = transform.rename_source_key(new)
            if pattern is not None and (operations := getattr(transform, "operations", None)):
                _refuse_others(new, operations)
                stack = stacks.setdefault(new, {p: [] for p in transform.source_patterns})
                stack[pattern].append(name)
                break
        if stack is None and new != name:
            renames.append(ModelStateMapperRename(name, new))
    for new, parts in stacks.items():
        if len({len(names) for names in parts.values()}) != 1:
            counts = {pattern: len(names) for pattern, names in parts.items()}
            raise ValueError(f"{new}: the file has {counts} tensors of its experts; expected as many of each")
        renames.append(ModelStateMapperStack(list(zip(*parts.values())), new))
    return ModelStateMapperParallel(renames) if renames else None


def _conversions(module: nn.Module) -> list[Any]:
    if not hasattr(module, "_init_weights"):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # an older transformers, whose models hold experts as its files do
        return []
    return get_model_conversion_mapping(module, add_legacy=False)  # type: ignore[arg-type]


def _refuse_others(name: str, operations: list[Any]) -> None:
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in operations]
    if kinds not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        raise ValueError(
            f"{name}: transformers makes it of the file's tensors by {operations}, which is not done here; save the model once with "
            "transformers' save_original_format=False, and give that directory"
        )


def _natural(name: str) -> list[Any]:
    """Experts in the order of their numbers: 10 after 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
