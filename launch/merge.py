"""Merges an adapter into its base model, file to file: see `d9d_lora/state/merge_files.py`."""

import sys

import torch

from d9d_lora.keyvalue import Key, UsageError, run
from d9d_lora.state.merge_files import merge_files

KEYS = {
    "adapter": Key("the adapter's directory (adapter_config.json and adapter_model.safetensors)"),
    "model.path": Key("the base model's directory"),
    "output": Key("directory of the merged model; it must not exist"),
    "dtype": Key("float32, bfloat16, float16 or float64; without it each tensor keeps its own", ""),
}


def main(arguments: dict[str, str]) -> None:
    word = arguments["dtype"]
    if word and word not in ("float32", "bfloat16", "float16", "float64"):
        raise UsageError(f"dtype={word}: expected float32, bfloat16, float16 or float64")
    dtype = getattr(torch, word) if word else None
    report = merge_files(arguments["adapter"], arguments["model.path"], arguments["output"], dtype=dtype)
    print(f"{arguments['output']}: {report}; read back and compared")


if __name__ == "__main__":
    sys.exit(run("launch/merge.py", "Merges an adapter into its base model, in little memory.", KEYS, main))
