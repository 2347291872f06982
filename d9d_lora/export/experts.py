"""The adapter of a stack of experts as one product for each tensor that holds one expert: what vLLM and SGLang read.

    experts.gate_up_proj  A[E, I, R], B[E, R, O]   ->   experts.3.gate_proj  A_3[R, I], B_3[O_gate, R]
                                                        experts.3.up_proj    A_3[R, I], B_3[O_up, R]

The names are those of the base's own files, which consumers go by. A base whose files hold stacks names no single expert, so nothing is
written for it here.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from d9d_lora.export.low_rank import BaseShapes, Product
from d9d_lora.state import expert_layouts
from d9d_lora.state.expert_base import Experts, experts_of
from d9d_lora.state.peft_config import WEIGHTS, AdapterError
from d9d_lora.state.peft_kinds.lora_meaning import layer_meanings, parameters_of
from d9d_lora.state.peft_read import read_adapter_config, reading_of
from d9d_lora.state.safetensors_dir import CheckpointFiles, open_checkpoint
from d9d_lora.state.untrusted import read_json

T = TypeVar("T")
ONE_EXPERT = re.compile(r"(.+\.experts)\.\d+\.\w+")
"""The layer of a tensor that holds one expert."""


def experts_of_base(base: Path, files: CheckpointFiles) -> Experts | None:
    """The stacks of a base directory whose files hold one expert each; None of any other base."""
    return experts_of(read_json(base / "config.json"), files.names())


def spread(layers: Mapping[str, T], experts: Experts | None) -> dict[str, T]:
    """What is said of a stack, said of every tensor that it is made of; a stack that the files do not divide stays."""
    found: dict[str, T] = {}
    for name, value in layers.items():
        route = experts.stacks.get(name) if experts else None
        if route is None:
            found[name] = value
        else:
            found |= {part.removesuffix(".weight"): value for one in route.names for part in one}
    return found


def products_of_stacks(adapter: Path, base: Path | None, project: Callable[[Product], Product]) -> dict[str, Product]:
    """Every layer of a LoRA directory that adapts parameters, each tensor of an expert as a layer of its own.

    Raises:
        AdapterError: without the base; for a parameter that is no stack of matrices which the base's files hold one by one.
    """
    config = read_adapter_config(adapter)
    if base is None:
        raise AdapterError(f"{adapter} adapts experts, and how the base's files name each of them is told by the base: give model.path=...")
    with open_checkpoint(base) as there, open_checkpoint(adapter / WEIGHTS) as files:
        experts = experts_of_base(base, there)
        if experts is None:
            raise AdapterError(f"{base}: {undivided(config['target_parameters'])}")
        reading = reading_of(adapter, config, files, experts.model)
        bare = parameters_of(reading)
        if lost := sorted(set(bare.values()) - set(experts.stacks)):
            raise AdapterError(f"{base}: {undivided(lost)}")
        found: dict[str, Product] = {}
        for layer, meaning in sorted(layer_meanings(reading, bare).items()):
            A, B = (files.read(reading.parts.factors[layer][half]) for half in "AB")
            if layer not in bare:
                found[layer] = project(Product(A, B, meaning.scaling, layer in reading.parts.lookups))
                continue
            names = experts.stacks[bare[layer]].names
            n, rows = len(names), [there.shape(part)[0] for part in names[0]]
            if A.shape[0] != n * meaning.r or B.shape[0] != sum(rows):
                raise AdapterError(f"{bare[layer]}: A {list(A.shape)} and B {list(B.shape)} are not of {n} experts with {sum(rows)} rows")
            pairs = expert_layouts.per_expert(expert_layouts.from_fused_A(A, n), expert_layouts.from_fused_B(B, n), rows)
            for parts, one in zip(names, pairs):
                for part, (A_e, B_e) in zip(parts, one):
                    name = part.removesuffix(".weight")
                    found[name] = project(Product(A_e.contiguous(), B_e.contiguous(), meaning.scaling))
    return found


def whole_experts(products: Mapping[str, Product], base: Path | None) -> dict[str, Product]:
    """With zeros for what the adapter lacks of a layer's experts: vLLM packs gate, up and down of all of them together (`pack_moe`), and
    stops where one is not there."""
    adapted = {match[1] for name in products if (match := ONE_EXPERT.fullmatch(name))}
    if not adapted or base is None:
        return dict(products)
    like = next(iter(products.values()))
    with open_checkpoint(base) as files:
        shapes = BaseShapes(files).all()
    lacking = {n: s for n, s in shapes.items() if n not in products and (match := ONE_EXPERT.fullmatch(n)) and match[1] in adapted}
    zeros = {n: Product(like.A.new_zeros(1, into), like.B.new_zeros(out, 1), like.scaling) for n, (out, into) in lacking.items()}
    return {**products, **zeros}


def undivided(names: list[str]) -> str:
    """Why parameters cannot be written expert by expert."""
    return (
        f"{', '.join(names[:4])}: parameters that the base's files do not hold expert by expert, and this is all that consumers of single "
        "matrices read. Give a base whose files do, or merge the adapter (profile=merged)"
    )


__all__ = ["ONE_EXPERT", "experts_of_base", "products_of_stacks", "spread", "undivided", "whole_experts"]
