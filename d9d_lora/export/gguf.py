"""A LoRA adapter as one GGUF file, which llama.cpp loads beside a base GGUF; and back into a PEFT directory.

    general.type = adapter    general.architecture    adapter.type = lora    adapter.lora.alpha
    <weight>.lora_a  [r, in]      <weight>.lora_b  [out, r]      delta W = (alpha / r) B A, and B A where alpha is 0
    token_embd.weight.lora_a  [V, r]: transposed, so that a token's row can be looked up
    blk.3.ffn_gate_exps.weight.lora_a  [E, r, in], .lora_b  [E, out, r]: of experts; gate and up are two tensors with one lora_a

[Note: the scale]
llama.cpp divides one alpha by the rank that a tensor has, and knows neither rsLoRA nor patterns. So `adapter.lora.alpha` is the
commonest of r s over the layers (s: the scaling PEFT would use), and the layers that have it keep B to the bit: all of them, in a plain
adapter, under rsLoRA with one rank, and with a rank pattern. Any other layer's B is multiplied by r s / alpha, in fp64 and rounded
once; that is exact where the factor is a power of two.

Facts from llama.cpp: `src/llama-adapter.cpp` (names, shapes), `llama_adapter_lora_weight::get_scale`, `convert_lora_to_gguf.py`.
"""

import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from d9d_lora.export.gguf_experts import meanings_on, stack_to_gguf
from d9d_lora.export.gguf_file import Array, GGUFFile
from d9d_lora.export.gguf_names import Base, BaseConfig, Weight, base_of, package, reorder, restore
from d9d_lora.export.plain import write_directory
from d9d_lora.state.atomic import TEMPORARY, sync
from d9d_lora.state.names import PEFT_PREFIX
from d9d_lora.state.peft_config import CONFIG, PEFT_VERSION, WEIGHTS, AdapterError, dump, pattern_of, targets_of
from d9d_lora.state.peft_read import LayerMeaning, Parts
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.targets import by_name, named

__all__ = ["gguf_to_peft", "read_gguf", "refusals", "write_gguf"]

N = TypeVar("N", int, float)
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_ALPHA = "adapter.lora.alpha"
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_KNOWN = {"adapter.type", _ALPHA, "adapter.lora.task_name", "adapter.lora.prompt_prefix"}
_HINT = "or export the merged model, and convert that"
# Fields of adapter_config.json that llama.cpp's LoRA has no place for: what they are, and the mend.
_REFUSED = {
    "use_dora": "DoRA's magnitude: llama.cpp adds B A only. Train without it",
    "lora_bias": "a bias of B: llama.cpp adds B A only. Train without it",
    "modules_to_save": "modules trained whole: a GGUF adapter holds low-rank factors only. Adapt them, or leave them frozen",
    "trainable_token_indices": "trained rows of an embedding: a GGUF adapter holds low-rank factors only. Adapt the embedding",
    "layer_replication": "layers that stand several times: the base GGUF has each of them once. Train without it",
    "ensure_weight_tying": "one adapter for the embedding and the head: llama.cpp applies it to one of them. Leave both out",
    "alora_invocation_tokens": "aLoRA: not written here. Train without it",
    "use_qalora": "QA-LoRA pools its input: llama.cpp does not. Train without it",
    "use_bdlora": "block-diagonal factors: not written here. Train without it",
}


def refusals(
    config: Mapping[str, Any],
    parts: Parts | None = None,
    base_config: BaseConfig | None = None,
    bare: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Why llama.cpp could not take this adapter; empty if it can.

    Args:
        config: The contents of an `adapter_config.json`, also one of an adapter that is still to be trained.
        parts: The keys of the adapter's file, if there is one.
        bare: Layers of `parts` that stand for a parameter -> its name.
        base_config: The base's `config.json`; without it, the names of layers are not judged.

    Returns:
        One sentence for each reason, with the mend.
    """
    kind = config.get("peft_type")
    if kind not in (None, "LORA"):
        return [f"peft_type {kind}: llama.cpp knows LoRA only. Project the adapter to LoRA, {_HINT}"]
    faults = [f"{name} = {config[name]!r}: {why}, {_HINT}" for name, why in _REFUSED.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        faults.append(f"bias = {config['bias']!r}: a GGUF adapter holds no biases. Train with bias='none', {_HINT}")
    for what in ("shifts", "magnitudes", "biases", "others") if parts else ():
        if keys := sorted(getattr(parts, what).values()):
            faults.append(f"{keys[:3]}{' and more' if len(keys) > 3 else ''}: no low-rank factors, {_HINT}")
    base = None
    if base_config is not None:
        try:
            base = base_of(base_config)
        except AdapterError as error:
            return [*faults, str(error)]
        faults += [base.why_not(layer) for layer in _strangers(base, config, parts, bare)]
    lost = [p for p in config.get("target_parameters") or () if base is None or not any(named(stack, [p]) for stack in base.stacks)]
    lost += sorted(set(bare.values()) - set(base.stacks if base else ()))
    if lost:
        faults.append(f"target_parameters {lost}: bare parameters, and no stacks of experts that this base is known to have, {_HINT}")
    return faults


def _strangers(base: Base, config: Mapping[str, Any], parts: Parts | None, bare: Mapping[str, str]) -> list[str]:
    """Adapted layers that are no weight of the base's GGUF; before a file is there, the targets that select nothing else."""
    if parts is not None:
        return sorted(parts.factors.keys() - base.weights.keys() - bare.keys())
    targets = config.get("target_modules")
    if not isinstance(targets, (list, tuple, set)):
        return []  # a regular expression, or "all-linear", which spares the head
    selected = [layer for layer in base.ends if base.tied and named(layer, list(targets))]
    names = [*base.weights, *(weight.layer for stack in base.stacks.values() for weight in stack), *selected]
    one = {t: _ONE_EXPERT.sub(".experts.", t) for t in targets}  # the files of a base name each expert by itself
    known = {short: any(named(name, [short]) for name in names) for short in set(one.values())}
    return sorted([*selected, *(t for t in targets if not known[one[t]])])


def write_gguf(
    adapter: str | os.PathLike[str], output: str | os.PathLike[str], *, base_config: BaseConfig, dtype: str = "f32"
) -> None:
    """Writes a PEFT LoRA directory as a GGUF adapter, reads it back, and only then gives it its name.

    Args:
        adapter: The PEFT directory.
        output: The file. An earlier GGUF adapter is replaced, anything else is left alone.
        base_config: The base's `config.json`: its contents, its path, or the model's directory.
        dtype: "f32", "f16" or "bf16".

    Raises:
        AdapterError: for what llama.cpp has no place for, what does not fit the base, and values that the dtype cannot hold.
    """
    if dtype not in _DTYPES:
        raise AdapterError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    output = Path(output).absolute()
    _refuse_other(output)
    base = base_of(base_config)
    config, parts, layers, bare = meanings_on(Path(adapter), base_config)
    if faults := refusals(config, parts, base_config, bare):
        raise AdapterError(f"{adapter} cannot become a GGUF adapter:\n  " + "\n  ".join(faults[:12]))
    alpha, factors = _alpha_of(layers, bool(config.get("use_rslora")))
    tensors: dict[str, Tensor] = {}
    with open_checkpoint(Path(adapter) / WEIGHTS if Path(adapter).is_dir() else adapter) as files:
        for layer, pair in sorted(parts.factors.items()):
            a, b = (files.read(pair[factor]) for factor in "AB")
            if layer in bare:
                tensors |= stack_to_gguf(base.stacks[bare[layer]], a, b, factors[layer], _DTYPES[dtype])
            else:
                tensors |= _to_gguf(base.weights[layer], a, b, factors[layer], _DTYPES[dtype])
    _install(output, base.architecture.gguf, alpha, tensors)


def _alpha_of(layers: Mapping[str, LayerMeaning], rslora: bool) -> tuple[float, dict[str, float]]:
    """(the file's alpha, what each layer's B is multiplied by): see the note above."""
    products = {name: m.alpha * (math.sqrt(m.r) if rslora else 1) for name, m in layers.items()}
    # never 0, which llama.cpp reads as "no scale", nor what is 0 in fp32
    usable = Counter(p for p in products.values() if float(torch.tensor(p, dtype=torch.float32)) != 0)
    alpha = min(usable.items(), key=lambda item: (-item[1], item[0]))[0] if usable else 1.0
    return alpha, {name: p / alpha for name, p in products.items()}


def _to_gguf(weight: Weight, a: Tensor, b: Tensor, factor: float, dtype: torch.dtype) -> dict[str, Tensor]:
    _check_shapes(weight, a, b)
    b = reorder(b, weight.heads)
    a = a.T if weight.lookup else a
    found = {
        f"{weight.tensor}.lora_a": a.to(dtype).contiguous(),
        f"{weight.tensor}.lora_b": (b if factor == 1 else b.double() * factor).to(dtype).contiguous(),
    }
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{weight.layer}: {name} has values that are not finite in {dtype}; write f32, or train again")
    return found


def _check_shapes(weight: Weight, a: Tensor, b: Tensor) -> None:
    """A [r, in] and B [out, r], as PEFT has them; an embedding is looked up along its rows."""
    into, out = (weight.rows, weight.columns) if weight.lookup else (weight.columns, weight.rows)
    if a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0], a.shape[0]) != (into, out, b.shape[1]) or not a.shape[0]:
        raise AdapterError(
            f"{weight.layer} ({weight.tensor}): A {tuple(a.shape)} and B {tuple(b.shape)}; this base expects [r, {into}] and [{out}, r]. "
            "Is it the adapter of another model?"
        )


def _install(output: Path, architecture: str, alpha: float, tensors: dict[str, Tensor]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(f"{TEMPORARY}{output.name}_{secrets.token_hex(6)}")
    try:
        _write(fresh, architecture, alpha, tensors)
        sync(fresh)
        _read_back(fresh, alpha, tensors)
        os.replace(fresh, output)
        sync(output.parent)
    finally:
        fresh.unlink(missing_ok=True)


def _write(path: Path, architecture: str, alpha: float, tensors: dict[str, Tensor]) -> None:
    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16:  # numpy has none: its bytes, and what they are
                writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _read_back(path: Path, alpha: float, tensors: dict[str, Tensor]) -> None:
    file = GGUFFile(path)
    same = file.shapes().keys() == tensors.keys() and file.fields[_ALPHA] == float(torch.tensor(alpha, dtype=torch.float32))
    if not same or not all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items()):
        raise AdapterError(f"{path} reads back otherwise than it was written: the disk, or the installed gguf package, is at fault")


def _refuse_other(output: Path) -> None:
    if not os.path.lexists(output):
        return
    if output.is_file():
        try:
            kind = GGUFFile(output).fields.get("general.type")
        except AdapterError:
            kind = None
        if kind == "adapter":
            return
    raise AdapterError(f"{output} is there and is no GGUF adapter. Give another path, or remove it first.")


def read_gguf(path: str | os.PathLike[str], base_config: BaseConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A GGUF adapter, ours or llama.cpp's own, as PEFT would have it.

    Args:
        path: The file.
        base_config: The base's `config.json`: its contents, its path, or the model's directory.

    Returns:
        `adapter_config.json` and the tensors by PEFT's names, in the file's dtypes (Q8_0 as fp32).

    Raises:
        AdapterError: for a file that is no LoRA adapter, is for another architecture, is broken, or has a tensor that the base has not.
    """
    base, file = base_of(base_config), GGUFFile(path)
    alpha = _check_fields(file, base)
    pairs = _pairs(file, base)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for weight in sorted(pairs, key=lambda w: w.layer):
        a, b = (file.read(f"{weight.tensor}.lora_{factor}") for factor in "ab")
        a = (a.T if weight.lookup and a.ndim == 2 else a).contiguous()
        _check_shapes(weight, a, b)
        b = restore(b, weight.heads).contiguous()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterError(f"{file.path}: the factors of {weight.tensor} have values that are not finite")
        keys = ("lora_embedding_A", "lora_embedding_B") if weight.lookup else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PEFT_PREFIX}{weight.layer}.{key}": t for key, t in zip(keys, (a, b))}
        ranks[weight.layer] = a.shape[0]
    alphas = {layer: alpha if alpha else float(r) for layer, r in ranks.items()}  # 0: llama.cpp does not scale
    return _config(ranks, alphas, base), tensors


def _config(ranks: dict[str, int], alphas: dict[str, float], base: Base) -> dict[str, Any]:
    """`adapter_config.json` of a plain LoRA: the scaling of a layer is its alpha / rank."""
    r, alpha = _commonest(ranks), _commonest(alphas)
    config: dict[str, Any] = {
        "alpha_pattern": {name: _plain(a) for name, a in pattern_of(alphas, alpha).items()},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": base.architecture.conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": r,
        "rank_pattern": pattern_of(ranks, r),
        "revision": None,
        "target_modules": targets_of(sorted(ranks), list(base.weights)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    for layer in ranks:
        said = by_name(config["rank_pattern"], layer, r), by_name(config["alpha_pattern"], layer, alpha)
        if said != (ranks[layer], alphas[layer]):
            raise AdapterError(f"{layer}: its rank and alpha could not be said in patterns: they are read as {said}")
    return config


def _commonest(values: Mapping[str, N]) -> N:
    return Counter(values.values()).most_common(1)[0][0]


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def gguf_to_peft(path: str | os.PathLike[str], base_config: BaseConfig, output: str | os.PathLike[str]) -> None:
    """Writes a GGUF adapter as a PEFT directory, which must not exist; as `read_gguf`."""
    config, tensors = read_gguf(path, base_config)
    write_directory(Path(output), {CONFIG: dump(config)}, WEIGHTS, tensors)


def _check_fields(file: GGUFFile, base: Base) -> float:
    """The file's alpha, if its metadata is that of a LoRA adapter for this base."""
    fields, path = file.fields, file.path
    if fields.get("general.type") != "adapter":
        raise AdapterError(f"{path}: general.type is {fields.get('general.type')!r}; expected 'adapter'. Is it a model?")
    if fields.get("adapter.type") != "lora":
        raise AdapterError(f"{path}: adapter.type is {fields.get('adapter.type')!r}; only 'lora' is known here")
    if fields.get("general.architecture") != base.architecture.gguf:
        raise AdapterError(
            f"{path} is for the architecture {fields.get('general.architecture')!r}; "
            f"this base, of model_type {base.kind!r}, is {base.architecture.gguf!r}"
        )
    if strange := sorted(k for k in fields if k.startswith(("adapter.", "split.")) and k not in _KNOWN):
        raise AdapterError(f"{path}: {strange} may change what the adapter does, and are not known here")
    alpha = fields.get(_ALPHA, 0.0)
    if isinstance(alpha, Array) or not isinstance(alpha, float) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: {_ALPHA} is {alpha!r}; expected a number")
    return alpha


def _pairs(file: GGUFFile, base: Base) -> list[Weight]:
    known, shapes = base.by_tensor(), file.shapes()
    stacks = {weight.tensor for stack in base.stacks.values() for weight in stack}
    if of_experts := sorted(name for name in shapes if name.rpartition(".lora_")[0] in stacks):
        raise AdapterError(f"{file.path}: {of_experts[:2]}: adapters of experts are written as GGUF and not read back into PEFT's format")
    found: dict[str, set[str]] = {}
    strange = []
    for name in shapes:
        tensor, _, factor = name.rpartition(".lora_")
        if factor not in ("a", "b") or tensor not in known:
            strange.append(name)
        else:
            found.setdefault(tensor, set()).add(factor)
    if strange:
        tied = base.tied and any(name.startswith(("token_embd.", "output.")) for name in strange)
        raise AdapterError(
            f"{file.path}: {sorted(strange)[:5]} are no factors of a weight of this base ({base.kind}): expected <tensor>.lora_a and "
            f".lora_b of {', '.join(sorted(known)[:3])}, ..."
            + (". Its embedding and output head are one tensor, and an adapter of one of them is not read" if tied else "")
        )
    if lonely := sorted(tensor for tensor, factors in found.items() if len(factors) == 1):
        raise AdapterError(f"{file.path}: {lonely[:5]} have one of lora_a and lora_b; the other is missing")
    if not found:
        raise AdapterError(f"{file.path} holds no factors at all")
    return [known[tensor] for tensor in found]
