"""What saving costs: `python launch/bench_io.py [LAYERS [FOLDER]]`, on one process.

The adapter of a model of Llama-3-8B's shape (LoRA, r 16, every linear layer: 42 million parameters for 32 layers) with AdamW's moments;
the base stays on meta. "Stall" is how long a step waits for a save; "whole" is until `latest` names it. Steps that go on meanwhile are
products of matrices; how much slower they are is told too. Medians of three.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from d9d_lora import LoRA, LoRAConfig, LoRAParameters, inject_peft_and_freeze
from d9d_lora.state.checkpoint import Checkpoints
from d9d_lora.state.peft_save import adapter_writer
from d9d_lora.train.config import OptimConfig
from d9d_lora.train.optim import adamw, optimiser_state
from d9d_lora.walk import adapted_layers

SHAPES = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
SHAPES |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}


def build(layers: int) -> nn.Module:
    model = nn.Module()
    with torch.device("meta"):
        blocks = [nn.ModuleDict({n: nn.Linear(*s, bias=False, dtype=torch.bfloat16) for n, s in SHAPES.items()}) for _ in range(layers)]
        model.layers = nn.ModuleList(blocks)
        inject_peft_and_freeze(LoRA(LoRAConfig(target_modules=list(SHAPES), params=LoRAParameters(r=16, alpha=32))), model)
    for layer in adapted_layers(model):
        for name in ("lora_A", "lora_B"):
            getattr(layer, name).to_empty(device="cpu").weight.data.fill_(0.5)
    return model


def work(seconds: float) -> list[float]:
    """Steps of a product each; how long each took."""
    a, took, end = torch.ones(768, 768), [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        took.append(time.perf_counter() - start)
    return took


def main(layers: int, folder: Path) -> None:
    torch.set_num_threads(1)
    model = build(layers)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = adamw(params, OptimConfig())
    tensors = {f"model.{n}": p.detach() for n, p in params.items()} | optimiser_state(params, optimiser)
    print(f"{sum(p.numel() for p in params.values()):,} parameters, {len(tensors)} tensors")
    free = statistics.median(work(1.0))
    for wait in (True, False):
        root, stalls, wholes, slower, copies = folder / str(wait), [], [], [], []
        checkpoints = Checkpoints(root, keep=1)
        for step in range(4):
            start = time.perf_counter()
            write = adapter_writer(model)
            copies.append(time.perf_counter() - start)
            checkpoints.save(step, tensors, {}, extras={"adapter": write}, wait=wait)
            stalls.append(time.perf_counter() - start)
            if not wait:
                slower.append(statistics.median(work(0.5)) / free)
            checkpoints.wait()
            wholes.append(time.perf_counter() - start)
        stall, copy, whole, slow = (statistics.median(x[1:]) if x else 0.0 for x in (stalls, copies, wholes, slower))
        size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) / 2**20
        told = f", steps meanwhile take {slow:.2f} of their time" if slow else ""
        name = "waited for" if wait else "beside the training"
        print(f"{name}: stall {stall:.2f} s (of it copying the adapter {copy:.2f} s), whole {whole:.2f} s{told}, {size:.0f} MiB")


if __name__ == "__main__":
    given = sys.argv[2] if len(sys.argv) > 2 else None
    place = Path(given or tempfile.gettempdir()) / "bench_io"
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 32, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
