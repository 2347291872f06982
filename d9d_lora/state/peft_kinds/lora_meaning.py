"""What a LoRA file says of each of its layers: rank and scaling, the parameter it stands for, the heads that are tied to embeddings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from d9d_lora.methods.dora import MAGNITUDE
from d9d_lora.state.peft_config import AdapterError, N
from d9d_lora.state.peft_kinds.dialect import Reading
from d9d_lora.targets import by_name, named
from d9d_lora.walk import names_of_modules


@dataclass(frozen=True)
class LayerMeaning:
    """What a PEFT directory says of one adapted layer."""

    r: int
    alpha: float
    scaling: float


def meaning(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """(rank, scaling) of a layer, as PEFT reads them."""
    r = by_name(config.get("rank_pattern") or {}, name, config["r"])
    alpha = by_name(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return r, alpha / (r**0.5 if config.get("use_rslora") else r)


def layer_meanings(reading: Reading, names: Mapping[str, str] | None = None) -> dict[str, LayerMeaning]:
    """What each layer's rank and scaling are, ranks compared with the tensors.

    Args:
        names: The parameters that layers of the file stand for, which patterns go by.

    Raises:
        AdapterError: for tensors of another rank, and a magnitude that is not there or should not be.
    """
    config, parts, files = reading.config, reading.parts, reading.files
    found, faults = {}, []
    for layer, pair in parts.factors.items():
        parameter = (names or {}).get(layer)
        r, scaling = meaning(config, parameter or layer)
        A, B = files.shape(pair["A"]), files.shape(pair["B"])
        if parameter is None:
            ok = len(A) == len(B) >= 2 and (A[0], B[1]) == (r, r) and all(n == 1 for n in B[2:])
            wide = "".join(", taps" for _ in A[2:])
        else:  # a stack of matrices
            ok = len(A) == len(B) == 2 and A[0] == B[1] and A[0] % r == 0
            wide = ""
        if not ok:
            faults.append(f"{layer}: A {A} and B {B}, expected [{r}, in{wide}] and [out, {r}{wide.replace('taps', '1')}]")
        magnitude = files.shape(parts.magnitudes[layer]) if layer in parts.magnitudes else None
        expected = None
        if config.get("use_dora"):
            expected = B[:1] if len(B) == 2 else (1, B[0], *B[2:])
        if magnitude != expected:
            faults.append(f"{layer}: {MAGNITUDE} {magnitude}, expected {expected}, as use_dora is {config.get('use_dora')}")
        shift = files.shape(parts.shifts[layer]) if layer in parts.shifts else None
        expected = B[:1] if config.get("lora_bias") and layer not in parts.lookups else None
        if shift != expected:
            faults.append(f"{layer}: lora_B.bias {shift}, expected {expected}, as lora_bias is {config.get('lora_bias')}")
        alpha = by_name(config.get("alpha_pattern") or {}, parameter or layer, config["lora_alpha"])
        found[layer] = LayerMeaning(r, alpha, scaling)
    if faults:
        raise AdapterError(f"{reading.path}: the tensors are not of the ranks the config gives them:\n  " + "\n  ".join(faults[:12]))
    if not found:
        raise AdapterError(f"{reading.path}: the file holds no adapter at all, only {sorted(parts.others)[:5]}")
    return found


def parameters_of(reading: Reading) -> dict[str, str]:
    """Layers of the file that stand for a parameter -> its name in the model. [Note: a parameter's key]"""
    wanted = reading.config["target_parameters"]
    if reading.model is None:
        raise AdapterError(
            f"{reading.path} adapts bare parameters ({wanted[:3]}), and its keys say only how deep each is wrapped: give the model, "
            "as in method_of(path, model)"
        )
    found = {}
    for names, module in names_of_modules(reading.model):
        adapted = [name for name in dict(module.named_parameters(recurse=False)) if named(f"{names[0]}.{name}", wanted)]
        for depth, name in enumerate(reversed(adapted)):
            found[names[0] + ".base_layer" * depth] = f"{names[0]}.{name}"
    if idle := [w for w in wanted if not any(named(name, [w]) for name in found.values())]:
        raise AdapterError(f"{reading.path}: target_parameters {idle} are no parameters of this model; give the one it was trained on")
    if lacking := sorted(found.keys() - reading.parts.factors.keys()):
        raise AdapterError(f"{reading.path}: target_parameters {wanted} should have factors at {lacking[:5]}, and the file has none there")
    return found


def for_heads(heads: list[str], reading: Reading, pattern: dict[str, N]) -> dict[str, N]:
    """A pattern in which what is said of an embedding is said of its heads too."""
    names = "|".join(f"^{re.escape(head)}" for head in heads)
    lookups = reading.parts.lookups if heads else set()
    return {f"{key}|{names}" if any(by_name({key: 1}, e, 0) for e in lookups) else key: value for key, value in pattern.items()}


def tied_heads(reading: Reading) -> list[str]:
    """The layers whose factors are those of an embedding, transposed. [Note: tied heads]"""
    parts, files = reading.parts, reading.files
    heads = []
    for layer in sorted(parts.factors.keys() - parts.lookups):
        A, B = parts.factors[layer]["A"], parts.factors[layer]["B"]
        for embedding in sorted(parts.lookups):
            turned = parts.factors[embedding]["B"], parts.factors[embedding]["A"]
            pairs = list(zip((A, B), turned))
            alike = all(files.shape(a) == files.shape(b)[::-1] for a, b in pairs)
            if alike and all(torch.equal(files.read(a), files.read(b).t()) for a, b in pairs):
                heads.append(layer)
    if not heads:
        raise AdapterError(
            f"{reading.path}: ensure_weight_tying, but no layer of the file has the transposed factors of an embedding "
            f"({sorted(parts.lookups) or 'there is none'}): the pair was trained apart, or is not in the file"
        )
    return heads
