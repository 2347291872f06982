"""`python launch/plan.py model.path=... data.path=... ranks=8,64`: what a run would need, found on one process in seconds.

Takes every setting of `launch/train.py`, and of its own:

    ranks=8,64        numbers of processes, a column each   (8)
    shape=llama3-8b   a model by its shape alone, in the place of model.path
    output=plan.png   also write the picture (.png, .svg, .pdf), the table (.md) or every number (.json); more than one with commas
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d9d_lora.keyvalue import UsageError

OWN = ("ranks", "shape", "output")
_LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama3-70b": {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "llama-405b": {**_LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}


def main(arguments: Sequence[str]) -> int:
    """The command: 0, or 1 with one sentence on stderr."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    from d9d_lora.train.main import KNOWN

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")  # advice to a loop, and this is none
            plan(arguments)
    except KNOWN as error:
        if os.environ.get("D9D_LORA_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def plan(arguments: Sequence[str]) -> None:
    own = {k: v for k, _, v in (a.partition("=") for a in arguments) if k in OWN}
    ranks, outputs = _numbers(own.get("ranks", "8")), _outputs(own.get("output", ""))
    if own.get("shape", next(iter(SHAPES))) not in SHAPES:
        raise UsageError(f"shape={own['shape']}: known are {', '.join(SHAPES)}; any other model by its model.path, for its config.json")
    config = _compose([a for a in arguments if a.partition("=")[0] not in OWN], shaped="shape" in own)

    from d9d_lora.plan import rehearsal, report

    shape = _shape(config, own.get("shape"))
    if config.peft is None:
        config = _with_the_adapters_method(config, shape)
    row = config.data.seq_len if config.data.path == NONE else _look_at_data(config)
    depth = rehearsal.depth_of(config, shape)
    plans, refused = [], []
    for n in ranks:
        try:
            plans.extend(rehearsal.rehearse_ranks(config, shape, n, row, depth))
        except ValueError as error:
            refused.append(f"{n} ranks: {error}")
    if not plans:
        raise ValueError("; ".join(refused))
    parallel = config.parallel
    layout = ", ".join(f"{k}={v}" for k, v in parallel.model_dump().items() if v != type(parallel).model_fields[k].default)
    title = f"{own.get('shape') or config.model.path or config.model.target}, rows of {row:,} tokens"
    title += f", {config.data.micro_batch_size} at once"
    title += f", {layout or 'FSDP2 over all ranks'}" + (", blocks recomputed" if config.train.activation_checkpointing else "")
    print(title)
    report.show(plans)
    if parallel.pp == 1:
        print(f"paper: {report.agreement(plans, sequence_parallel=parallel.sequence_parallel)}")
    few = f"{rehearsal.BLOCKS} and {rehearsal.BLOCKS + 1}" + (" blocks a stage" if parallel.pp > 1 else "")
    by = f"{few} of {depth} equal blocks were rehearsed" if depth else "every block was rehearsed"
    print(f"{by}; not in the peak: the allocator's slack, workspaces of kernels, buffers of the network")
    for line in refused:
        print(f"does not fit: {line}")
    for output in outputs:
        report.write(plans, title, output)
        print(f"written: {output}")


NONE = "none"


def _compose(arguments: Sequence[str], *, shaped: bool) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from d9d_lora.train.config import check_config
    from d9d_lora.train.main import config_directory

    given = {a.lstrip("+").partition("=")[0] for a in arguments}
    extra = [f"model.path={NONE}"] if shaped and "model.path" not in given else []
    try:
        with initialize_config_dir(config_directory(), version_base="1.3"):
            composed = compose("train", [*arguments, *extra])
    except HydraException as error:
        raise ValueError(error) from error
    if OmegaConf.is_missing(composed.data, "path"):
        composed.data.path = NONE
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ValueError(f"these have no value: {', '.join(missing)}. Give them on the command line, as in {missing[0]}=...")
    container = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(container, dict)
    return check_config({str(k): v for k, v in container.items() if k != "hydra"})


def _shape(config: Any, name: str | None) -> Any:
    """The Hugging Face config; nothing but its JSON is fetched. None for a callable of the user's."""
    from transformers import AutoConfig, LlamaConfig

    if name is not None:
        return LlamaConfig(**SHAPES[name])
    if config.model.target:
        return None
    try:
        return AutoConfig.from_pretrained(config.model.path)
    except OSError as error:
        raise FileNotFoundError(f"model.path={config.model.path}: no config.json there, nor on the hub ({error})") from error


def _with_the_adapters_method(config: Any, shape: Any) -> Any:
    """For `peft=from_adapter`; layers are named by the whole model, so that their names hold for a few of its blocks."""
    import torch
    from transformers import AutoModelForCausalLM

    from d9d_lora.train.start import Start, with_method

    with torch.device("meta"):
        bare = None if shape is None else AutoModelForCausalLM.from_config(shape)
    return with_method(config, Start(config.model), bare)


def _look_at_data(config: Any) -> int:
    """Shows what would be trained, and returns the length of the longest row."""
    from transformers import AutoTokenizer

    from d9d_lora.train.data import load_data, show_samples

    data, source = config.data, config.model.tokenizer or config.model.path
    if source in (None, NONE):
        raise ValueError("data.path needs a tokenizer: give model.tokenizer=..., or leave data.path out and rows have data.seq_len tokens")
    tokenizer = AutoTokenizer.from_pretrained(source)
    loaded = load_data(data, tokenizer, seed=config.train.seed)
    print(f"data: {loaded.report}\n\n{show_samples(loaded.train, tokenizer, 3)}\n")
    longest = max(len(e.input_ids) for e in loaded.train)
    return data.seq_len if data.packing else min(data.seq_len, max(8, -(-longest // 8) * 8))


def _numbers(text: str) -> list[int]:
    if not all(n.isdigit() and int(n) for n in text.split(",")):
        raise UsageError(f"ranks={text}: expected whole numbers with commas between them, as in ranks=8,64")
    return [int(n) for n in text.split(",")]


def _outputs(text: str) -> list[Path]:
    from d9d_lora.plan.report import SUFFIXES

    paths = [Path(p) for p in text.split(",") if p]
    if odd := [str(p) for p in paths if p.suffix not in SUFFIXES]:
        raise UsageError(f"output={odd[0]}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    return paths
