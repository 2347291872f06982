"""From a row to token ids and labels: what the model sees, and which of it is trained.

    text                     every token, and the eos token after it
    prompt + completion      the completion and the end token after it
    messages                 every assistant turn and its end-of-turn token

An answer is trained *with* the token that ends it: a model that never learned to say it never stops.

[Note: the prompt is an exact prefix]
At inference the model is given `tokenize(prompt)` and nothing else. A tokenizer may split `prompt + answer` otherwise
than the prompt alone (it merges across the border), and training on that teaches an answer to a prompt which is never
asked. So the pieces of a sample are tokenised cumulatively: the ids up to a border must start with the ids up to the
border before; where they do not, the new piece is tokenised by itself and appended. Both ways the prefix is exact; the
first is kept where it can be, because some tokenizers put a space before whatever stands first.
"""

import re
from dataclasses import dataclass
from typing import Any

from d9d_lora.tokens import IGNORE
from d9d_lora.train.rows import DataError, Format, Row


@dataclass(frozen=True)
class Example:
    """One tokenised sample. Labels stand at the position of their own token, as in Hugging Face: see `shift_labels`.

    Attributes:
        input_ids: the tokens.
        labels: the same, or -100 where not trained; the first is always -100: nothing before it predicts it.
        source: file and line.
        key: equal for samples that ask the same (same prompt, text or conversation up to case and spaces); a split
            keeps them on one side.
    """

    input_ids: list[int]
    labels: list[int]
    source: str
    key: str = ""

    @property
    def target_tokens(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def encode(row: Row, format: Format, tokenizer: Any, *, chat: bool = False) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row, not yet cut to a length.

    Raises:
        DataError: the tokenizer lacks what the format needs, or the chat template does not tell where an answer is.
    """
    if format == "messages" or (format == "completion" and chat):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{row.source}: the tokenizer has no chat template, which "
                f"{'data.format=messages' if format == 'messages' else 'data.chat=true'} needs; "
                "use an instruction-tuned tokenizer, or prompt and completion with data.chat=false"
            )
        ids, trained = _conversation(row, tokenizer)
    else:
        ids, trained = _plain(row, format, tokenizer)
    labels = [token if train else IGNORE for token, train in zip(ids, trained)]
    if labels:
        labels[0] = IGNORE
    return ids, labels


def as_messages(row: Row) -> list[dict[str, Any]]:
    """The conversation of a row; a prompt and its completion are one of two turns."""
    if "messages" not in row.values:
        return [
            {"role": "user", "content": row.values["prompt"]},
            {"role": "assistant", "content": row.values["completion"]},
        ]
    messages = row.values["messages"]
    # Parquet gives every turn the fields of all turns, with None for absent ones.
    return [{name: value for name, value in turn.items() if value is not None} for turn in messages]


def _plain(row: Row, format: Format, tokenizer: Any) -> tuple[list[int], list[bool]]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(f"{row.source}: the tokenizer has no eos token to end a sample with; set tokenizer.eos_token")
    if format == "text":
        pieces = [(row.values["text"], True)]
    else:
        pieces = [(row.values["prompt"], False), (row.values["completion"], True)]
    ids, trained = _tokenize(tokenizer, pieces, special=True)
    if not ids or ids[-1] != eos:
        ids, trained = [*ids, eos], [*trained, True]
    return ids, trained


def _tokenize(tokenizer: Any, pieces: list[tuple[str, bool]], *, special: bool) -> tuple[list[int], list[bool]]:
    """[Note: the prompt is an exact prefix]. `special`: let the tokenizer add its first token (bos), never its last."""
    ids: list[int] = []
    trained: list[bool] = []
    text = ""
    # Some tokenizers close every text with eos: inside a sample that would end the prompt.
    closes = special and tokenizer("x")["input_ids"][-1:] == [tokenizer.eos_token_id]
    for piece, train in pieces:
        text += piece
        if not piece:
            continue
        whole = tokenizer(text, add_special_tokens=special)["input_ids"]
        if closes:
            whole = whole[:-1]
        if whole[: len(ids)] != ids:
            whole = ids + tokenizer(piece, add_special_tokens=False)["input_ids"]
        trained += [train] * (len(whole) - len(ids))
        ids = whole
    return ids, trained


def _conversation(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    messages = as_messages(row)
    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
            ids, trained = _by_marks(messages, tokenizer, row.source)
        else:
            ids, trained = _by_prefixes(messages, tokenizer, row.source)
    except DataError:
        raise
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise DataError(f"{row.source}: the chat template refused this conversation: {error}") from error
    if all(trained):
        raise DataError(
            f"{row.source}: the chat template marks every token as the assistant's; expected the answers only"
        )
    return ids, trained


def _by_marks(messages: list[dict[str, Any]], tokenizer: Any, source: str) -> tuple[list[int], list[bool]]:
    """The template says itself, by {% generation %}, which part an assistant turn is."""
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids = list(out["input_ids"])
    trained = [bool(mark) for mark in out["assistant_masks"]]
    special = _special_ids(tokenizer)
    ends = [i for i, mark in enumerate(trained) if mark and not (i + 1 < len(ids) and trained[i + 1])]
    turns = sum(turn.get("role") == "assistant" for turn in messages)
    if len(ends) != turns:
        raise DataError(
            f"{source}: {turns} assistant turns, but the chat template's generation marks enclose {len(ends)}"
        )
    for end in ends:
        if ids[end] in special:
            continue
        # Some templates put the mark around the words only.
        if end + 1 == len(ids) or ids[end + 1] not in special:
            raise DataError(f"{source}: {_NO_END}")
        trained[end + 1] = True
    return ids, trained


_NO_END = (
    "expected the chat template to end an assistant turn with a special token (as <|im_end|> is), and found none: "
    "a model trained so would never stop. Use another template, or prompt and completion with data.chat=false"
)


def _by_prefixes(messages: list[dict[str, Any]], tokenizer: Any, source: str) -> tuple[list[int], list[bool]]:
    """The template has no marks: an assistant turn is what the conversation grows by when the turn is rendered too."""

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    whole = render(len(messages), False)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for index, turn in enumerate(messages):
        if turn.get("role") != "assistant":
            continue
        if index == 0:
            raise DataError(f"{source}: the conversation begins with an assistant turn; expected a system or user turn")
        before, after = render(index, True), render(index + 1, False)
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) <= len(after)):
            raise DataError(
                f"{source}: the chat template has no generation marks and does not render turn {index + 1} of "
                f"{len(messages)} as a continuation of the turns before it (it rewrites earlier turns, or adds another "
                "header for an answer than for a question to be answered), so the answer cannot be told from the rest; "
                "put {% generation %} marks into the template, or train on the last answer as prompt and completion"
            )
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    pieces.append((whole[done:], False))
    ids, trained = _tokenize(tokenizer, pieces, special=False)  # the template writes bos itself
    return ids, _cut_at_end_of_turn(ids, trained, _special_ids(tokenizer), source)


def _cut_at_end_of_turn(ids: list[int], trained: list[bool], special: set[int], source: str) -> list[bool]:
    """Do not train what a template writes after the end-of-turn token (mostly a newline): nobody generates that far."""
    result = list(trained)
    for end in range(len(ids) - 1, -1, -1):
        if not trained[end] or (end + 1 < len(ids) and trained[end + 1]):
            continue
        while end >= 0 and trained[end] and ids[end] not in special:
            result[end] = False
            end -= 1
        if end < 0 or not trained[end]:
            raise DataError(f"{source}: {_NO_END}")
    return result


def _special_ids(tokenizer: Any) -> set[int]:
    added = {token for token, value in tokenizer.added_tokens_decoder.items() if value.special}
    return added | set(tokenizer.all_special_ids)
