"""Who loads an adapter, what it refuses or leaves out in silence, and how a directory is written so that it is read right.

    sketch -> faults(sketch)             before training, and before writing: sentences with a mend
    PEFT directory -> write(job)         what folding cures is cured: rsLoRA, patterns, ranks, products of other methods

Rules were read in the source of these releases, and hold for them: vLLM 0.32.0, SGLang 0.5.23, mlx-lm 0.32.2 (tried), llama.cpp (tried:
`gguf.py`). Releases differ, mostly in what they leave out, so a profile writes the least that all of them understand: one rank, one
alpha, no patterns, no rsLoRA.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d9d_lora.export.experts import ONE_EXPERT, products_of_stacks, whole_experts
from d9d_lora.export.fold import Folded, fold_scale
from d9d_lora.export.low_rank import Product, error_of, peft_type, projected, read_products
from d9d_lora.export.mlx import mlx_faults, write_mlx
from d9d_lora.export.plain import appear, plain_config, write_plain
from d9d_lora.export.sketch import Layer, Sketch, base_config, sketch_of_directory
from d9d_lora.state.peft_config import CONFIG, WEIGHTS, AdapterError
from d9d_lora.state.peft_read import read_adapter_config
from d9d_lora.targets import named

SHOWN = 4
_MERGE = "or merge the adapter (profile=merged)"


class ExportError(AdapterError):
    """An adapter that a consumer could not load, or would load as another: one line for each reason, with the mend."""


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        adapter: A PEFT directory.
        output: What is written; it must not exist, unless `replace`.
        base: The base model's directory.
        rank: The largest rank; what is no product of low rank is projected on it.
    """

    adapter: Path
    output: Path
    base: Path | None = None
    rank: int | None = None
    replace: bool = False


@dataclass(frozen=True)
class Profile:
    """One consumer.

    Attributes:
        reads: What it is given.
        file: The name of the output in a run's directory.
        faults: (sketch, rank of the projection) -> why it could not load the adapter, or would read it as another.
        write: Writes the output and returns a sentence on it.
        base: Whether it needs the base's directory.
        takes_all: It takes every adapter that PEFT's format holds, unless a rank is asked for; its writer checks for itself.
    """

    name: str
    reads: str
    file: str
    faults: Callable[[Sketch, int | None], list[str]]
    write: Callable[[Job], str]
    base: bool = False
    takes_all: bool = False


# -- what all but PEFT have in common -------------------------------------------------------------------------------------------


def _plain_faults(sketch: Sketch, rank: int | None, who: str, most: int | None = None) -> list[str]:
    """Consumers that read s B A of matrices, and nothing else."""
    faults = []
    if whole := _some(sketch.whole):
        faults.append(f"{whole}: trained whole; {who} reads low-rank factors only. Adapt them instead, {_MERGE}")
    if biases := _some(sketch.biases):
        faults.append(f"{biases}: trained biases; {who} has no place for them. Train with bias: none, {_MERGE}")
    if shifts := _some(n for n, la in sketch.layers.items() if la.shift):
        faults.append(f"{shifts}: the bias of B (lora_bias); {who} has no place for it. Train without it, {_MERGE}")
    if odd := _some(n for n, la in sketch.layers.items() if not la.matrix):
        faults.append(
            f"{odd}: no matrices (convolutions, or stacks of experts that no base at hand holds one by one: give model.path=...); this "
            f"profile does not write them. Leave them out, {_MERGE}"
        )
    if sketch.replicated:
        faults.append(f"layer_replication: {who} loads a base whose layers stand there once. Save the replicated model as a base")
    if rank is None:
        faults += _unprojected(sketch, who)
    if most is not None and (high := _some(n for n, la in sketch.layers.items() if _rank(la, rank) > most)):
        faults.append(f"{high}: rank above {most}, the largest that {who} serves. Give rank={most} for the nearest product")
    if copies := _some(sketch.copies):
        faults.append(
            f"{copies}: the file holds a base weight beside its factors, perhaps of a changed vocabulary; {who} leaves it out. Load the "
            f"adapter and save it again here, which compares it with the base, {_MERGE}"
        )
    return faults


def _unprojected(sketch: Sketch, who: str) -> list[str]:
    mend = f"Give rank=N for the nearest product of that rank, {_MERGE}"
    dora = _some(n for n, la in sketch.layers.items() if la.magnitude)
    none = _some(f"{n} ({la.kind})" for n, la in sketch.layers.items() if la.rank is None and not la.magnitude)
    faults = [f"{dora}: DoRA; {who} has no magnitudes. {mend}, or train without use_dora"] if dora else []
    return faults + ([f"{none}: no product of low rank, and {who} reads nothing else. {mend}"] if none else [])


def _rank(layer: Layer, rank: int | None) -> int:
    own = layer.rank if layer.rank is not None else rank or 0
    return own if rank is None else min(own, rank)


def _some(names: Any) -> str:
    found = sorted(names)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _products(job: Job) -> dict[str, Product]:
    if peft_type(job.adapter) == "LORA" and read_adapter_config(job.adapter).get("target_parameters"):
        rank = job.rank
        products = products_of_stacks(job.adapter, job.base, lambda p: p if rank is None else projected(p, rank))
        return whole_experts(products, job.base)
    return read_products(job.adapter, job.base, rank=job.rank)


def _write_plain(job: Job, products: Mapping[str, Product], targets: Callable[[dict[str, Any]], list[str] | str]) -> Folded:
    source = read_adapter_config(job.adapter)
    folded = fold_scale(products)
    write_plain(job.output, folded, plain_config(folded, targets(source), source), replace=job.replace)
    return folded


def _told(folded: Folded, products: Mapping[str, Product]) -> str:
    error = error_of(products)
    return str(folded) + (f"; projected, relative error of dW up to {error:.2e}" if error else "")


# -- peft -----------------------------------------------------------------------------------------------------------------------


def _write_peft(job: Job) -> str:
    """A byte copy; with a rank, a LoRA in place of whatever it was."""
    if job.rank is None:
        names = [p.name for p in job.adapter.iterdir() if p.name in (CONFIG, WEIGHTS, "README.md")]

        def fill(fresh: Path) -> None:
            for name in names:
                shutil.copyfile(job.adapter / name, fresh / name)
            read_adapter_config(fresh)

        appear(job.output, fill, replace=job.replace)
        return "copied"
    products = _products(job)
    return _told(_write_plain(job, products, lambda config: _names(config, products)), products)


def _peft_faults(sketch: Sketch, rank: int | None) -> list[str]:
    if rank is None:
        return []
    faults = _plain_faults(sketch, rank, "a projected adapter")
    if single := _some(n for n in sketch.layers if ONE_EXPERT.fullmatch(n)):
        faults.append(f"{single}: PEFT reads experts as stacks, and they are projected one by one; leave rank out, {_MERGE}")
    return faults


def _names(config: Mapping[str, Any], products: Mapping[str, Product]) -> list[str]:
    """The targets as they were, where they are names, and the last names of what these do not name; else every layer by its full name."""
    given = config.get("target_modules")
    if not isinstance(given, list):
        bare = config.get("target_parameters")
        return sorted({name.rpartition(".")[2] for name in products} if bare else products)
    return sorted({*given, *(name.rpartition(".")[2] for name in products if not named(name, frozenset(given)))})


# -- vLLM -----------------------------------------------------------------------------------------------------------------------
# 0.32.0: vllm/lora/peft_helper.py (fields, scaling, `_validate_features`), vllm/config/lora.py (MaxLoRARanks), vllm/lora/lora_model.py and
# vllm/lora/utils.py (names), vllm/lora/layers/logits_processor.py (vocabulary). Releases before it read r and lora_alpha only, so that
# patterns are wrong in silence there (e.g. commit 0214369 of peft_helper.py, which has no such field).

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_VOCABULARY = 258048
_VLLM_LOOKUPS = ("embed_tokens",)
# Families whose classes say `is_3d_moe_weight`: they take the fused pair of a stack, and nothing else.
_VLLM_STACKS = ("gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_vl_moe")


def _vllm_faults(sketch: Sketch, rank: int | None) -> list[str]:
    faults = _plain_faults(sketch, rank, "vLLM", VLLM_RANKS[-1])
    if odd := _some(n for n, la in sketch.layers.items() if la.lookup and n.rpartition(".")[2] not in _VLLM_LOOKUPS):
        faults.append(f"{odd}: an embedding; vLLM adapts one that is called embed_tokens. Leave it out, {_MERGE}")
    family = str(sketch.base.get("model_type"))
    if family.startswith(_VLLM_STACKS) and (single := _some(n for n in sketch.layers if ONE_EXPERT.fullmatch(n))):
        faults.append(f"{single}: vLLM reads experts of {family} as stacks, which this profile does not write. Leave them out, {_MERGE}")
    head = [n for n in sketch.layers if n.rpartition(".")[2] == "lm_head"]
    vocabulary = sketch.base.get("vocab_size") or 0
    if head and vocabulary > _VLLM_VOCABULARY:
        faults.append(f"lm_head: vLLM adapts heads of up to {_VLLM_VOCABULARY} tokens, this has {vocabulary}. Leave it out, {_MERGE}")
    return faults


def _write_vllm(job: Job) -> str:
    products = _products(job)
    folded = _write_plain(job, products, lambda config: _names(config, products))
    return f"{_told(folded, products)}; serve with --enable-lora --max-lora-rank {vllm_rank(folded.r)}"


def vllm_rank(r: int) -> int:
    """The smallest --max-lora-rank that takes a rank."""
    return next(step for step in VLLM_RANKS if step >= r)


# -- SGLang ---------------------------------------------------------------------------------------------------------------------
# 0.5.23: srt/lora/lora_config.py (r, lora_alpha, target_modules; nothing else but use_dora), srt/lora/lora.py (scale alpha / r, names,
# `normalize_qkv_proj`, `normalize_gate_up_proj`), srt/lora/utils.py (known names, target_modules), srt/lora/mem_pool.py (a weight that
# matches no target is left out with a warning). Tensors of other names are not looked at: biases, modules trained whole.

_SGLANG_NAMES = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
    "embed_tokens", "lm_head",
}  # fmt: skip
# A stacked projection is put together from its parts by the name of the first; then these parts must be there.
_STACKED = (("q_proj", ("q_proj", "v_proj")), ("k_proj", ("q_proj", "v_proj")), ("v_proj", ("q_proj",)), ("up_proj", ("gate_proj",)))


def _sglang_faults(sketch: Sketch, rank: int | None) -> list[str]:
    faults = _plain_faults(sketch, rank, "SGLang")
    if odd := _some(n for n in sketch.layers if not _sglang_knows(n)):
        faults.append(f"{odd}: SGLang looks for {', '.join(sorted(_SGLANG_NAMES))} in `layers.N`, and leaves all else out. Do so, {_MERGE}")
    if lacking := [name for name in _partners(sketch.layers) if len(sketch.sizes.get(name, ())) != 2]:
        faults.append(
            f"{_some(lacking)}: not adapted, and SGLang stacks q, k, v and gate, up by parts that must be there. They are written as zeros "
            "where the base's sizes are known: give model.path=..., or adapt them too"
        )
    return faults


def _sglang_knows(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in _SGLANG_NAMES and (leaf in ("embed_tokens", "lm_head") or re.search(r"layers\.\d+\.", name) is not None)


def _partners(layers: Mapping[str, object]) -> dict[str, str]:
    """The parts of stacked projections that SGLang needs and the adapter lacks -> a layer with the same input."""
    found: dict[str, str] = {}
    for name in sorted(layers):
        owner, _, leaf = name.rpartition(".")
        for part, needed in _STACKED:
            if leaf == part:
                found |= {f"{owner}.{n}": name for n in needed if f"{owner}.{n}" not in layers}
    return found


def _write_sglang(job: Job) -> str:
    products = _products(job)
    lacking = _partners(products)
    if lacking:
        sizes = sketch_of_directory(job.adapter, job.base).sizes
        products |= {name: _zero(products[twin], sizes[name][0]) for name, twin in lacking.items()}
    folded = _write_plain(job, products, lambda config: sorted({name.rpartition(".")[2] for name in products}))
    zeros = f", {len(lacking)} of them zero (parts of stacked projections)" if lacking else ""
    return f"{_told(folded, products)}{zeros}; serve with --enable-lora --max-lora-rank {folded.r}"


def _zero(twin: Product, out: int) -> Product:
    return replace(twin, A=twin.A.new_zeros(twin.A.shape), B=twin.B.new_zeros((out, twin.r)), error=0.0)


# -- llama.cpp ------------------------------------------------------------------------------------------------------------------


def _llamacpp_faults(sketch: Sketch, rank: int | None) -> list[str]:
    from d9d_lora.export.gguf import refusals

    faults = _plain_faults(sketch, rank, "llama.cpp")
    if not sketch.base:
        return [*faults, "llama.cpp's names follow from the base's config: give model.path=..."]
    config = {"peft_type": "LORA", "target_modules": sorted(sketch.layers), "bias": "none"}
    if rank is not None and (lone := _some(n for n in sketch.layers if ".experts." in n)):
        faults.append(f"{lone}: experts are written to GGUF as stacks, and projected one by one; leave rank out, {_MERGE}")
    return faults + [f for f in refusals(config, None, sketch.base) if f not in faults]


def _write_llamacpp(job: Job) -> str:
    from d9d_lora.export.gguf import write_gguf

    assert job.base is not None
    if job.rank is None and peft_type(job.adapter) == "LORA":
        write_gguf(job.adapter, job.output, base_config=base_config(job.base))
        return "written in float32; load with --lora"
    between = job.output.with_name(f".{job.output.name}.lora")
    shutil.rmtree(between, ignore_errors=True)
    try:
        told = _write_peft(replace(job, output=between, rank=job.rank or 1 << 30, replace=False))
        write_gguf(between, job.output, base_config=base_config(job.base))
    finally:
        shutil.rmtree(between, ignore_errors=True)
    return f"{told}; written in float32; load with --lora"


# -- mlx-lm ---------------------------------------------------------------------------------------------------------------------


def _mlx_faults(sketch: Sketch, rank: int | None) -> list[str]:
    dora = {n: la.magnitude and rank is None for n, la in sketch.layers.items()}
    bare = replace(sketch, layers={n: replace(la, magnitude=False, rank=0) if dora[n] else la for n, la in sketch.layers.items()})
    lookups = {n for n, la in sketch.layers.items() if la.lookup}
    faults = _plain_faults(bare, rank, "mlx-lm")
    if not sketch.base:
        return [*faults, "mlx-lm's names follow from the base's config: give model.path=..."]
    return faults + mlx_faults(dora, lookups, sketch.base)


def _write_mlx(job: Job) -> str:
    assert job.base is not None
    products = _products(job)
    dropout = read_adapter_config(job.adapter).get("lora_dropout") or 0.0
    folded = write_mlx(job.output, products, base_config(job.base), dropout=dropout, replace=job.replace)
    return f"{_told(folded, products)}; load with --adapter-path"


# -- merged ---------------------------------------------------------------------------------------------------------------------


def _merged_faults(sketch: Sketch, rank: int | None) -> list[str]:
    return [] if rank is None else ["rank: a merge takes the update as it is; leave rank out"]


def _write_merged(job: Job) -> str:
    from d9d_lora.state.merge_files import merge_files

    assert job.base is not None
    return f"{merge_files(job.adapter, job.base, job.output)}"


PROFILES = {
    p.name: p
    for p in (
        Profile("peft", "the directory as it is; with rank=N, a LoRA in its place", "peft", _peft_faults, _write_peft, takes_all=True),
        Profile("vllm", "a PEFT directory of plain LoRA", "vllm", _vllm_faults, _write_vllm),
        Profile("sglang", "a PEFT directory of plain LoRA", "sglang", _sglang_faults, _write_sglang),
        Profile("llamacpp", "one GGUF file", "adapter.gguf", _llamacpp_faults, _write_llamacpp, base=True),
        Profile("mlx", "adapters.safetensors and a config of its own", "mlx", _mlx_faults, _write_mlx, base=True),
        Profile("merged", "a model directory", "merged", _merged_faults, _write_merged, base=True, takes_all=True),
    )
}


def export(profile: str, job: Job) -> str:
    """Writes an adapter for a consumer, after everything that it could not load was looked for.

    Returns:
        What was written, in a sentence.

    Raises:
        ExportError: an unknown profile, or faults; nothing is written.
        AdapterError, CheckpointError: what cannot be read or written.
    """
    if profile not in PROFILES:
        raise ExportError(f"profile={profile}: expected one of {', '.join(PROFILES)}")
    row = PROFILES[profile]
    if row.base and job.base is None:
        raise ExportError(f"profile={profile} needs the base model's directory: give model.path=...")
    if job.rank is not None and job.rank < 1:
        raise ExportError(f"rank={job.rank}: expected a number of at least 1")
    if not job.adapter.is_dir():
        raise ExportError(f"adapter={job.adapter}: expected a directory in PEFT's format (adapter_config.json)")
    if job.rank is not None or not row.takes_all:
        check({profile: row.faults(sketch_of_directory(job.adapter, job.base), job.rank)})
    return row.write(job)


def check(faults: Mapping[str, list[str]]) -> None:
    """Raises what any profile has against an adapter, all at once."""
    lines = [f"  {name}: {fault}" for name, found in faults.items() for fault in found]
    if lines:
        raise ExportError("the adapter cannot be exported as asked:\n" + "\n".join(lines))
