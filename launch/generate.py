"""Prints a model's answer to a prompt: base, base and adapter, or merged. See `d9d_lora/generate.py`."""

import sys

from d9d_lora.generate import KEYS, main
from d9d_lora.keyvalue import run

if __name__ == "__main__":
    sys.exit(run("launch/generate.py", "Prints a model's answer to a prompt.", KEYS, main))
