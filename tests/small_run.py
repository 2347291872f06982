"""A whole run in seconds: a tiny random Llama in fp64, a tiny tokenizer, a few dozen questions, the real Trainer."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from d9d_lora.train.config import RunConfig, check_config
from d9d_lora.train.report import read_metrics
from d9d_lora.train.trainer import Trainer
from d9d_lora.train.world import device_of, join
from tests.tiny_tokenizer import tiny_tokenizer


def make_assets(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """`directory/model` and `directory/data.jsonl`."""
    torch.manual_seed(11)
    fields = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
    config = CONFIG_MAPPING[family](vocab_size=400, **{"tie_word_embeddings": True, **fields, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    words = ["rome", "paris", "hello", "world", "the", "end", "city", "name", "people", "eat", "apples"]
    rows = [{"prompt": f"what is {a} {b}", "completion": f" {b}"} for a in words for b in words if a != b]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return directory


def config_of(assets: Path, output: Path, **overrides: Any) -> RunConfig:
    """A config of six steps; keys are dotted (`train.steps`)."""
    container: dict[str, Any] = {
        "output_dir": str(output),
        "model": {"path": str(assets / "model"), "dtype": "float64"},
        "data": {"path": str(assets / "data.jsonl"), "eval_fraction": 0.1, "seq_len": 64, "batch_size": 8, "micro_batch_size": 1},
        "peft": {"kind": "lora", "target_modules": "all-linear", "params": {"r": 3, "alpha": 8, "dropout": 0.1}},  # no shards divide 3
        "parallel": {},
        "optim": {"lr": 0.01, "warmup": 2},
        "train": {"steps": 6, "log_every": 100, "device": "cpu", "check_every": 2},
        "checkpoint": {"resume": "never"},
        "tracker": {"tensorboard": False, "plot": False},
        "export": {},
    }
    for key, value in overrides.items():
        node = container
        *path, last = key.split("__")
        for step in path:
            node = node[step]
        node[last] = value
    return check_config(container)


def run(rank: int, assets: Path, output: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """One run on however many ranks there are; the metrics, on rank 0."""
    config = config_of(assets, output, **overrides)
    world = join(device_of("cpu"), config.parallel, 60)
    summary = Trainer(config, world).run()
    return {**summary, "metrics": read_metrics(output / "metrics.jsonl") if world.is_first else []}


def losses(summary: dict[str, Any]) -> list[float]:
    return [m["loss"] for m in summary["metrics"] if "loss" in m]


class Bigram(torch.nn.Module):
    """A model of the user's own: ids alone in, logits out."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(2)])
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x))
        return self.head(x)
