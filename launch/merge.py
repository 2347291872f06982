"""Merges an adapter into its base model, file to file: see `d9d_lora/state/merge_files.py`."""

import sys
from pathlib import Path

import torch

from d9d_lora.keyvalue import Key, UsageError, run
from d9d_lora.state.merge_files import merge_files

KEYS = {
    "adapter": Key("the adapter: a directory of PEFT's or of ours, a .safetensors or a .gguf file"),
    "model.path": Key("the base model's directory"),
    "output": Key("directory of the merged model; it must not exist"),
    "dtype": Key("float32, bfloat16, float16 or float64; without it each tensor keeps its own", ""),
    "dequantise": Key("true: unpack the weights of a quantised base, which is refused else", "false"),
    "probe": Key("text, or a file of lines: compare the logits with those of base and adapter (needs transformers)", ""),
}


def main(arguments: dict[str, str]) -> None:
    word = arguments["dtype"]
    if word and word not in ("float32", "bfloat16", "float16", "float64"):
        raise UsageError(f"dtype={word}: expected float32, bfloat16, float16 or float64")
    if arguments["dequantise"] not in ("true", "false"):
        raise UsageError(f"dequantise={arguments['dequantise']}: expected true or false")
    adapter, base, output = (Path(arguments[key]) for key in ("adapter", "model.path", "output"))
    texts = []
    if arguments["probe"]:
        from d9d_lora.state import merge_probe  # only here: it loads models

        merge_probe.check_transformers()
        texts = merge_probe.texts_of(arguments["probe"])
    dtype, dequantise = getattr(torch, word) if word else None, arguments["dequantise"] == "true"
    report = merge_files(adapter, base, output, dtype=dtype, dequantise=dequantise)
    for note in report.notes:
        print(f"note: {note}")
    print(f"{output}: {report}; read back and compared")
    if texts:
        print(merge_probe.probe(adapter, base, output, texts))


if __name__ == "__main__":
    sys.exit(run("launch/merge.py", "Merges an adapter into its base model, in little memory.", KEYS, main))
