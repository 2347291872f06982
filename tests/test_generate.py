"""Answers of the base, of base and adapter, and of the merged model, through the command and in process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.generate import answer, load
from d9d_lora.keyvalue import Key, UsageError, parse
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.peft_save import save_adapter
from tests.parity.test_peft_format import SMALL, stir
from tests.tiny_tokenizer import CHAT, tiny_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with `base`, `adapter` and `merged`."""
    root = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(CHAT)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}))
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    config = {"kind": "lora", "target_modules": "all-linear", "params": {"r": 4, "alpha": 64, "dropout": 0.5}}
    inject_peft_and_freeze(peft_method_from_config(config), model)
    stir(model)
    save_adapter(model, root / "adapter")
    merge_files(root / "adapter", root / "base", root / "merged")
    return root


def test_adapted_and_merged_answer_alike_and_not_as_the_base(home):
    said = {}
    for name, adapter in (("base", None), ("base", home / "adapter"), ("merged", None)):
        chat = load(home / name, adapter)
        said[name, bool(adapter)] = [answer(chat, "hello world", max_new_tokens=8, templated=t) for t in (False, True)]
    assert said["base", True] == said["merged", False] != said["base", False]


def test_draws_follow_the_seed(home):
    chat = load(home / "base")
    draws = [answer(chat, "hello", max_new_tokens=12, temperature=2.0, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_clear_errors(home):
    with pytest.raises(ValueError, match=r"directory with config\.json"):
        load(home / "nowhere")
    chat = load(home / "base")
    chat.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        answer(chat, "x", templated=True)
    with pytest.raises(ValueError, match="is empty"):
        answer(chat, "")


def test_the_command(home):
    def run(*arguments):
        line = [sys.executable, ROOT / "launch/generate.py", *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)

    where = [f"model.path={home / 'base'}", f"adapter={home / 'adapter'}", "prompt=hello world", "max_new_tokens=8"]
    done = run(*where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == answer(load(home / "base", home / "adapter"), "hello world", max_new_tokens=8).rstrip("\n")
    wrong = run(*where, "temperature=warm")
    assert (wrong.returncode, "expected a number" in wrong.stderr) == (2, True)


def test_arguments():
    keys = {"model.path": Key("the model"), "seed": Key("of the draws", "0")}
    assert parse(["model.path=a=b"], keys) == {"model.path": "a=b", "seed": "0"}
    for arguments, said in (
        (["modelpath=x"], "did you mean model.path="),
        (["model.path"], "has no value"),
        (["model.path=a", "model.path=b"], "given twice"),
        (["seed=1"], "missing: model.path"),
    ):
        with pytest.raises(UsageError, match=said):
            parse(arguments, keys)
