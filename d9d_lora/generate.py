"""Asks a model: the base alone, with an adapter, or merged (which is a base to whoever loads it).

load(model, adapter)  ->  Chat: model and tokenizer  ->  answer(chat, prompt)
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d9d_lora.inject import inject_peft_and_freeze
from d9d_lora.keyvalue import Key, UsageError
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of

KEYS = {
    "model.path": Key("directory of the base model, or of a merged one"),
    "prompt": Key("what to ask"),
    "adapter": Key("an adapter's directory; without it the base alone answers", ""),
    "max_new_tokens": Key("how many tokens the answer may have", "64"),
    "chat": Key("true: put the prompt through the tokenizer's chat template", "false"),
    "temperature": Key("0 takes the likeliest token each time; more draws at random", "0"),
    "seed": Key("of the draws", "0"),
}


@dataclass
class Chat:
    """A model that is ready to answer, and its tokenizer."""

    model: Any
    tokenizer: Any


def load(model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None) -> Chat:
    """Loads a causal language model and its tokenizer from a directory, and puts an adapter on it.

    Raises:
        ValueError: if the directory is not there, has no tokenizer, or the adapter does not fit it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # optional: only this command needs it

    path = Path(model)
    if not (path / "config.json").is_file():
        raise ValueError(f"model.path={path}: expected a directory with config.json, weights and a tokenizer")
    if (path / "adapter_config.json").exists():
        raise ValueError(f"model.path={path} is an adapter; give the base model there, and adapter={path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.path={path} has no tokenizer that can be read: {error}") from error
    base: Any = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    if adapter:
        inject_peft_and_freeze(method_of(adapter, base), base)
        load_adapter_weights(base, adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Chat(base.to(device).eval(), tokenizer)  # eval() after the injection: adapted layers are born in training mode


@torch.no_grad()
def answer(
    chat: Chat,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    templated: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The answer to one prompt, without the prompt and without special tokens.

    Args:
        chat: What `load` gives.
        prompt: The text; with `templated`, a user's turn in the tokenizer's chat template.
        max_new_tokens: At most this many tokens.
        templated: Whether to use the chat template.
        temperature: 0 is greedy.
        seed: Of the draws at a temperature above 0.
    """
    tokenizer = chat.tokenizer
    if templated:
        if not tokenizer.chat_template:
            raise ValueError("chat=true, but the tokenizer has no chat template; use chat=false and write the prompt out")
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # the template has written the special tokens already
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated).to(chat.model.device)
    if not inputs["input_ids"].numel():
        raise ValueError("prompt= is empty; there is nothing to continue")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ids = chat.model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def main(arguments: dict[str, str]) -> None:
    """The command: prints the answer."""
    tokens = _number(arguments, "max_new_tokens", int, 1)
    temperature = _number(arguments, "temperature", float, 0)
    seed = _number(arguments, "seed", int, 0)
    if arguments["chat"] not in ("true", "false"):
        raise UsageError(f"chat={arguments['chat']}: expected true or false")
    chat = load(arguments["model.path"], arguments["adapter"] or None)
    print(
        answer(
            chat,
            arguments["prompt"],
            max_new_tokens=int(tokens),
            templated=arguments["chat"] == "true",
            temperature=temperature,
            seed=int(seed),
        )
    )


def _number(arguments: dict[str, str], key: str, kind: type[int] | type[float], least: float) -> float:
    try:
        number = kind(arguments[key])
    except ValueError:
        number = float("nan")
    if not least <= number < float("inf"):
        word = "a whole number" if kind is int else "a number"
        raise UsageError(f"{key}={arguments[key]}: expected {word} of at least {least}")
    return number
