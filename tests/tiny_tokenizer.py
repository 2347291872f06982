"""A byte-level tokenizer of a few hundred tokens, made in milliseconds and without a network."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
MARKED = (  # the mark leaves out the end-of-turn token, as some published templates do
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
REWRITES = (  # only the last turn keeps its text: no turn is a continuation of those before it
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
EVERYTHING = "{% generation %}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}{% endgeneration %}"

WORDS = "what is the name of a city where people eat apples answer: question: rome paris hello world the end"


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ("<|start|>", "<|end|>", "<|eos|>", "<|bos|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = CHAT, *, bos: bool = False, closes: bool = False) -> Any:
    """`bos`: begins every text with <|bos|>; `closes`: also ends every text with <|eos|>, as some tokenizers do."""
    backend = Tokenizer.from_str(_backend())
    if bos or closes:
        ids = [(name, backend.token_to_id(name)) for name in ("<|bos|>", "<|eos|>")]
        form = "<|bos|> $A <|eos|>" if closes else "<|bos|> $A"
        backend.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=form, special_tokens=ids)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|eos|>", bos_token="<|bos|>", pad_token="<|eos|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer
