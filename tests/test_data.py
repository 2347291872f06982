"""Training data: what is trained is exactly the answers, no row is lost in silence, every complaint names its line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from d9d_lora.tokens import IGNORE
from d9d_lora.train.data import DataConfig, DataError, DataReport, load_data, load_examples, show_samples, split
from tests.tiny_tokenizer import CHAT, ENDLESS, EVERYTHING, MARKED, REWRITES, tiny_tokenizer


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def load(path, tokenizer=None, report=None, **config):
    tokenizer = tokenizer or tiny_tokenizer()
    return load_examples(path, DataConfig(path=str(path), **config), tokenizer, report=report)


def trained(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return {"messages": [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(contents)]}


# --- what is trained ---------------------------------------------------------------------------------------------


def test_text_trains_everything_and_the_end(tmp_path):
    tokenizer = tiny_tokenizer()
    [example] = load(write(tmp_path / "a.jsonl", [{"text": "hello world"}]), tokenizer)
    assert example.input_ids == [*tokenizer("hello world")["input_ids"], tokenizer.eos_token_id]
    assert example.labels == [IGNORE, *example.input_ids[1:]]


@pytest.mark.parametrize("options", [{}, {"bos": True}, {"bos": True, "closes": True}])
@pytest.mark.parametrize("prompt, completion", [("question: what", " rome"), ("answer: ro", "me paris"), ("", "rome")])
def test_completion_prompt_is_an_exact_prefix(tmp_path, options, prompt, completion):
    tokenizer = tiny_tokenizer(**options)
    [example] = load(write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}]), tokenizer)
    asked = tokenizer(prompt)["input_ids"] if prompt else []
    asked = asked[:-1] if options.get("closes") else asked
    assert example.input_ids[: len(asked)] == asked
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    if prompt:
        assert trained(example, tokenizer) == completion + "<|eos|>"
        assert all(label == IGNORE for label in example.labels[: len(asked)])


def test_a_token_across_the_border_is_not_made(tmp_path):
    """The pair above that matters: `rome` alone is fewer tokens than `ro` + `me`, and the border must win."""
    tokenizer = tiny_tokenizer()
    whole = tokenizer("answer: rome")["input_ids"]
    part = tokenizer("answer: ro")["input_ids"]
    assert whole[: len(part)] != part


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_messages_train_every_answer_with_its_end(tmp_path, template):
    tokenizer = tiny_tokenizer(template)
    path = write(tmp_path / "a.jsonl", [turns("hello", "rome", "what is the city", "paris")])
    [example] = load(path, tokenizer)
    assert trained(example, tokenizer) == "rome<|end|>paris<|end|>"
    rendered = tokenizer.apply_chat_template(json.loads(path.read_text())["messages"], tokenize=True)["input_ids"]
    assert example.input_ids == rendered


def test_chat_makes_two_turns(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": "rome"}])
    [example] = load(path, tokenizer, chat=True)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert example.input_ids[: len(asked)] == asked
    assert trained(example, tokenizer) == "rome<|end|>"


@pytest.mark.parametrize(
    "template, row, message",
    [
        (REWRITES, turns("hello", "rome", "what", "paris"), "does not render turn 2 of 4 as a continuation"),
        (ENDLESS, turns("hello", "rome"), "would never stop"),
        (EVERYTHING, turns("hello", "rome"), "marks every token"),
        (EVERYTHING, turns("hello", "rome", "what", "paris"), "2 assistant turns.*enclose 1"),
        (CHAT, turns("hello"), "without a target token"),
        (CHAT, {"messages": [{"role": "assistant", "content": "rome"}]}, "begins with an assistant turn"),
        (CHAT, {"messages": [{"role": "user"}]}, "the chat template refused"),
        (None, turns("hello", "rome"), "no chat template"),
    ],
)
def test_a_template_that_does_not_tell_is_refused(tmp_path, template, row, message):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{message}"):
        load(path, tiny_tokenizer(template))


# --- files -------------------------------------------------------------------------------------------------------


def test_parquet_directory_and_blank_lines(tmp_path):
    write(tmp_path / "b.jsonl", [{"text": "hello"}, "", {"text": "world"}])
    pq.write_table(pa.table({"text": ["rome", "paris"]}), tmp_path / "a.parquet")
    sources = [example.source.removeprefix(f"{tmp_path}/") for example in load(tmp_path)]
    assert sources == ["a.parquet:row 1", "a.parquet:row 2", "b.jsonl:1", "b.jsonl:3"]


def test_parquet_messages(tmp_path):
    pq.write_table(pa.Table.from_pylist([turns("hello", "rome")]), tmp_path / "a.parquet")
    tokenizer = tiny_tokenizer()
    assert trained(load(tmp_path / "a.parquet", tokenizer)[0], tokenizer) == "rome<|end|>"


@pytest.mark.parametrize(
    "rows, config, message",
    [
        ([], {}, r"a\.jsonl: is empty"),
        ([{"text": "hello"}, '{"text": '], {}, r"a\.jsonl:2: broken JSON at column \d+"),
        (["[1, 2]"], {}, r"a\.jsonl:1: expected a JSON object a line, got list"),
        ([{"prompt": "hello"}], {}, r"a\.jsonl:1: cannot tell the format.*prompt.*data\.format"),
        ([{"text": "a", "prompt": "b", "completion": "c"}], {}, r"cannot tell the format.*several"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, r"a\.jsonl:2: .*missing: completion"),
        ([{"text": "hello", "id": 3}], {}, r"a\.jsonl:1: unknown columns.*id.*data\.ignore_columns=\[id\]"),
        ([{"text": 3}], {}, r"a\.jsonl:1: text must be text, got int"),
        ([{"messages": "hello"}], {}, r"a\.jsonl:1: messages must be a list of turns"),
        ([{"text": "hello world " * 9}], {"seq_len": 8}, r"a\.jsonl:1: \d+ tokens.*overlong=drop"),
        ([{"text": "hello world " * 9}], {"seq_len": 8, "overlong": "drop"}, r"all 1 rows are longer"),
        (
            [{"prompt": "hello " * 9, "completion": "a"}],
            {"seq_len": 8, "overlong": "truncate"},
            r"a\.jsonl:1: a sample without a target token.*use drop",
        ),
        ([{"text": "hello"}], {"chat": True}, "chat=true is for prompt and completion, and the rows hold text"),
    ],
)
def test_errors_name_the_place_and_the_mend(tmp_path, rows, config, message):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        load(path, **config)


def test_errors_about_paths(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="a directory without a file"):
        load(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="several splits"):
        load(tmp_path)
    (tmp_path / "c.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"ends in one of .*got \.csv"):
        load(tmp_path / "c.csv")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match="not a readable Parquet"):
        load(tmp_path / "x.parquet")


def test_columns_to_ignore(tmp_path):
    assert len(load(write(tmp_path / "a.jsonl", [{"text": "hello", "id": 3}]), ignore_columns=["id"])) == 1


# --- counting and splitting --------------------------------------------------------------------------------------


def test_report_counts_what_is_lost(tmp_path):
    rows = [{"text": "hello world"}, {"text": " Hello   WORLD\n"}, {"text": "rome " * 40}, {"text": "paris"}]
    path = write(tmp_path / "a.jsonl", rows)
    report = DataReport()
    examples = load(path, report=report, seq_len=16, overlong="drop")
    assert (report.rows, report.duplicates, report.dropped, report.truncated, report.kept) == (4, 1, 1, 0, 2)
    assert report.tokens == sum(len(example.input_ids) for example in examples)
    assert report.target_tokens == sum(example.target_tokens for example in examples)
    assert str(report).startswith("4 rows, 1 duplicates, 1 dropped, 2 kept")

    report = DataReport()
    examples = load(path, report=report, seq_len=16, overlong="truncate", deduplicate=False)
    assert (report.duplicates, report.truncated, report.kept, report.longest) == (0, 1, 4, 16)
    assert len(examples[2].input_ids) == 16


def test_split_leaks_nothing_and_depends_on_the_data_only(tmp_path):
    rows = [{"prompt": f"question: {i}", "completion": answer} for i in range(50) for answer in (" rome", " paris")]
    rows += [{"prompt": f" QUESTION: {i}", "completion": "rome "} for i in range(50)]  # repeats, once folded
    path, turned = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])
    tokenizer = tiny_tokenizer()
    data = load_data(DataConfig(path=str(path), eval_fraction=0.2), tokenizer, seed=7)
    assert data.report.duplicates == 50
    assert (len(data.train), len(data.eval)) == (80, 20)
    assert not {example.key for example in data.train} & {example.key for example in data.eval}
    again = load_data(DataConfig(path=str(turned), eval_fraction=0.2), tokenizer, seed=7)
    assert {example.key for example in again.eval} == {example.key for example in data.eval}
    other = split(data.train + data.eval, 0.2, seed=8)[1]
    assert {example.key for example in other} != {example.key for example in data.eval}
    with pytest.raises(DataError, match="expected at least one each"):
        split(data.train[:1], 0.2, seed=0)


def test_questions_shared_with_the_evaluation_file_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": "a"}, {"prompt": "world", "completion": "b"}])
    held = write(tmp_path / "b.jsonl", [{"prompt": "Hello", "completion": "c"}])
    data = load_data(DataConfig(path=str(path), eval_path=str(held)), tiny_tokenizer())
    assert (len(data.train), len(data.eval), data.report.shared_with_eval) == (2, 1, 1)


def test_config_refuses_what_cannot_be_meant():
    for wrong in ({"eval_fraction": 0.1, "eval_path": "b"}, {"eval_fraction": 0.1, "deduplicate": False}):
        with pytest.raises(ValidationError, match="eval_fraction"):
            DataConfig(path="a", **wrong)
    with pytest.raises(ValidationError, match="chat=true"):
        DataConfig(path="a", chat=True, format="text")
    with pytest.raises(ValidationError, match="Extra inputs"):
        DataConfig(path="a", sequence_length=3)
    assert all(info.description for info in DataConfig.model_fields.values())


def test_shown_samples_mark_what_is_trained(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "a.jsonl", [turns("hello", "rome", "what", "paris")])
    shown = show_samples(load(path, tokenizer), tokenizer)
    assert "a.jsonl:1" in shown
    assert "assistant\n【rome<|end|>】\n" in shown
    assert "assistant\n【paris<|end|>】\n" in shown
