"""Nothing is trusted: hostile directories of every kind, each refused with an error of ours, in bounded time, with nothing changed."""

import io
import json
import os
import pickle
import re
import resource
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.method import InjectionError
from d9d_lora.state.checkpoint_tensors import _collide
from d9d_lora.state.safetensors_dir import CheckpointError, open_checkpoint
from tests.fuzz import CONFIG, KINDS, METHOD, OURS, THOROUGH, WEIGHTS, attempt, campaign, copy, model, snapshot

OUR_WEIGHTS, INDEX, DONE = "weights.safetensors", "model.safetensors.index.json", "step_00000003/COMPLETE"
pytest.importorskip("gguf")
ALL = [(kind, file) for kind, row in KINDS.items() for file in row.files]
JSONS = [(kind, file) for kind, file in ALL if file.endswith(".json") or file == DONE]
TENSORS = [(kind, file) for kind, file in ALL if file.endswith(".safetensors")]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    root = tmp_path_factory.mktemp("valid")
    for number, kind in enumerate(KINDS.values()):
        kind.make(root / str(number))
    return {name: root / str(number) for number, name in enumerate(KINDS)}


@pytest.fixture
def refused(valid, tmp_path):
    """Spoils a file of a kind, and returns the text of the error."""

    THOROUGH.set(True)

    def spoil(kind, file, act):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "it"
        copy(valid[kind], path)
        act(path / file)
        error = attempt(KINDS[kind], path)
        assert isinstance(error, OURS), f"{kind}: {file} was accepted"
        return str(error)

    return spoil


# -- what a path can be --------------------------------------------------------------------------------------------------------------


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_link_out(file: Path) -> None:
    other = file.parents[1] / "outside"
    file.rename(other)
    file.symlink_to(other)


def a_link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def missing(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("act", [a_pipe, a_device, a_directory, a_link_out, a_link_to_itself, missing])
def test_a_path_that_is_no_file(refused, act):
    for kind, file in ALL:
        if act is a_link_out and kind in ("run", "single file", "GGUF", "loralib"):
            continue  # a run may be spread over disks, and a file that is named itself may be anywhere
        if kind == "run" and (act is missing or file == "latest"):
            continue  # without `latest`, the newest step is taken
        said = refused(kind, file, act)
        assert file.rpartition("/")[2] in said or (file, act) == (METHOD, missing), said  # without it, it is no directory of ours


# -- what its bytes can be ------------------------------------------------------------------------------------------------------------


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return stream.getvalue()


BYTES = {
    "empty": b"",
    "a zip": zipped(),
    "a pickle": pickle.dumps({"weights": list(range(100))}),
    "zeros": bytes(64),
    "no UTF-8": b'{"r": "\xff\xfe"}',
    "half a surrogate": rb'{"r": "\ud800"}',
    "deep lists": b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"r":' * 100 + b"1" + b"}" * 100,
    "a key twice": b'{"r": 1, "r": 2}',
    "a key twice, inside": b'{"r": {"a": 1, "a": 1}}',
    "NaN": b'{"r": NaN}',
    "too large a number": b'{"r": 1e999}',
    "too long a number": b'{"r": ' + b"1" * 5000 + b"}",
    "a list": b"[1, 2]",
    "two documents": b"{} {}",
    "a terminal's orders": b"\x1b]0;x\x07\x1b[2J",
}


@pytest.mark.parametrize("content", BYTES)
def test_bytes_that_are_something_else(refused, content):
    for kind, file in ALL:
        if file == "latest":
            continue
        said = refused(kind, file, lambda path: path.write_bytes(BYTES[content]))
        assert "\x1b" not in said
        if file.endswith(".safetensors"):
            said = refused(kind, file, lambda path: path.write_bytes(struct.pack("<Q", len(BYTES[content])) + BYTES[content]))
            assert file in said


def test_a_pickle_is_called_one(refused):
    for content in (BYTES["a zip"], BYTES["a pickle"]):
        for kind, file in TENSORS:
            assert "Pickle runs code" in refused(kind, file, lambda path, content=content: path.write_bytes(content))


def test_huge_files_cost_nothing(refused):
    """Sparse terabytes of zeros where JSON is expected, and a header that claims them."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    def grow(path: Path, header: int | None = None) -> None:
        with path.open("r+b") as stream:
            if header is not None:
                stream.write(struct.pack("<Q", header))
            stream.truncate(2**42)

    for kind, file in JSONS:
        if kind == "run":
            continue  # compared with its size in COMPLETE first
        assert "larger than" in refused(kind, file, grow)
    for kind, file in TENSORS:
        assert "belong to no tensor" in refused(kind, file, grow)
        assert "are allowed" in refused(kind, file, lambda path: grow(path, 2**41))
        assert "header would be 9223372036854775808 bytes" in refused(kind, file, lambda path: grow(path, 2**63))
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_header_of_brackets_is_not_parsed(tmp_path):
    """A megabyte of `[],` would be seventy of lists."""
    path = tmp_path / "x.safetensors"
    text = b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="hardly anything but brackets"):
        open_checkpoint(path)


# -- what a header can say --------------------------------------------------------------------------------------------------------------


def rewritten(change):
    """Writes the header of a .safetensors file anew."""

    def act(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header, next(key for key in header if key != "__metadata__"))
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return act


HEADERS = {
    "no strides": (lambda h, k: h[k].update(shape=[2**40, 0, 2**40]), "bad shape"),
    "a product that overflows": (lambda h, k: h[k].update(shape=[2**61, 2**61]), "bad shape"),
    "many dimensions": (lambda h, k: h[k].update(shape=[1] * 1000), "bad shape"),
    "negative": (lambda h, k: h[k].update(shape=[-6, -3]), "bad shape"),
    "a number in words": (lambda h, k: h[k].update(shape=["3"]), "bad shape"),
    "true": (lambda h, k: h[k].update(data_offsets=[False, True]), "bad shape"),
    "another field": (lambda h, k: h[k].update(more=1), "expected dtype, shape and data_offsets"),
    "dtype": (lambda h, k: h[k].update(dtype="F4"), "is unknown"),
    "dtype is a list": (lambda h, k: h[k].update(dtype=["F32"]), "is unknown"),
    "metadata": (lambda h, k: h.update(__metadata__={"a": 1}), "expected an object of texts"),
    "metadata is a list": (lambda h, k: h.update(__metadata__=["a"]), "expected an object of texts"),
    "no name": (lambda h, k: h.update({"": h.pop(k)}), "cannot be the name"),
    "a long name": (lambda h, k: h.update({"x" * 10_000: h.pop(k)}), "cannot be the name"),
    "a name with a line break": (lambda h, k: h.update({f"{k}\n": h.pop(k)}), "cannot be the name"),
    "a name that acts on a terminal": (lambda h, k: h.update({f"\x1b[2J{k}": h.pop(k)}), "cannot be the name"),
    "shared bytes": (lambda h, k: h.update({f"{k}2": h[k]}), "overlap"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(refused, case):
    change, says = HEADERS[case]
    for kind, file in TENSORS:
        said = refused(kind, file, rewritten(change))
        assert re.search(says, said), said
        assert file in said


# -- what an index can say --------------------------------------------------------------------------------------------------------------


LEADS_OUT = ["../a-1.safetensors", "/etc/a.safetensors", "..\\a.safetensors", "a\n.safetensors", "x" * 600 + ".safetensors", 5]


@pytest.mark.parametrize("where", LEADS_OUT)
def test_an_index_names_files_beside_it_only(refused, where):
    def act(path: Path) -> None:
        index = json.loads(path.read_text())
        index["weight_map"]["up.weight"] = where
        path.write_text(json.dumps(index))

    for kind in ("base", "merge, base"):
        assert "'up.weight'" in refused(kind, INDEX, act)


# -- what a config can say ---------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "r, absurd": ({"r": 10**12}, "r = 1000000000000"),
    "r, longer than a float": ({"r": 10**400}, "r = "),
    "r, negative": ({"r": -3}, "r = -3"),
    "r, text": ({"r": "3"}, "r = '3'"),
    "r, true": ({"r": True}, "r = True"),
    "r, a fraction": ({"r": 3.0}, "r = 3.0"),
    "r, another": ({"r": 4}, r"expected \[4, in\]"),
    "alpha, negative": ({"lora_alpha": -1}, "lora_alpha = -1"),
    "alpha, longer than a float": ({"lora_alpha": 10**400}, "lora_alpha = "),
    "alpha, a list": ({"lora_alpha": [6]}, "lora_alpha"),
    "a pattern that explodes": ({"rank_pattern": {"(a+)+b": 3, "up": 2}}, None),
    "a pattern that looks around": ({"rank_pattern": {"(?=up)up": 2}}, "rank_pattern.*looks around"),
    "a pattern that is broken": ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    "a pattern that is huge": ({"alpha_pattern": {"((a{99}){99}){99}": 2}}, "alpha_pattern.*states"),
    "a pattern, rank absurd": ({"rank_pattern": {"up": 10**12}}, "rank_pattern.*1000000000000"),
    "a pattern, rank 0": ({"rank_pattern": {"up": 0}}, "rank_pattern"),
    "patterns, many": ({"rank_pattern": {f"x{n}": 1 for n in range(20_000)}}, "take too long"),
    "layers stacked for ever": ({"layer_replication": [[0, 10**12]]}, "layer_replication"),
    "layers stacked backwards": ({"layer_replication": [["a", None]]}, "layer_replication"),
    "rslora in words": ({"use_rslora": "false"}, "use_rslora = 'false'"),
    "dora without magnitudes": ({"use_dora": True}, "lora_magnitude_vector"),
    "a bias that is not there": ({"lora_bias": True}, "lora_B"),
    "another method": ({"peft_type": "LOHA"}, None),
    "a method that is a list": ({"peft_type": ["LORA"]}, "peft_type"),
    "a field of tomorrow": ({"use_tomorrow": {"a": "\x1b[2J" * 10**5}}, "use_tomorrow"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(refused, valid, tmp_path, case):
    fields, says = CONFIGS[case]

    def act(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    for kind in ("PEFT directory", "merge, adapter"):
        if case == "a pattern that explodes":  # harmless: it matches no layer, and finding that out takes no time
            copy(valid[kind], tmp_path / kind / "it")
            act(tmp_path / kind / "it" / CONFIG)
            assert isinstance(attempt(KINDS[kind], tmp_path / kind / "it"), dict)
            continue
        said = refused(kind, CONFIG, act)
        assert says is None or re.search(says, said), said
        assert "\x1b" not in said


OWN = {
    "kind": ({"kind": "nonsense"}, "unknown kind"),
    "a kind that is a list": ({"kind": ["loha"]}, METHOD),
    "r, absurd": ({"params": {"r": 10**12, "alpha": 4}}, "give a lower rank"),
    "r, longer than a float": ({"params": {"r": 10**400, "alpha": 4}}, "r"),
    "another r": ({"params": {"r": 3, "alpha": 4}}, "misshapen"),
    "targets that explode": ({"target_modules": r"(\w+)+\1"}, "target_modules"),
    "a broken expression": ({"target_modules": "("}, "target_modules"),
    "a whole module by expression": ({"modules_to_save": ["(a+)+b"]}, "modules_to_save"),
    "a field of tomorrow": ({"more": 1}, "more"),
}


@pytest.mark.parametrize("case", OWN)
def test_configs_of_our_own(refused, case):
    fields, says = OWN[case]
    said = refused("our directory", METHOD, lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields)))
    assert re.search(says, said), said


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "lora", "params": {"r": 10**7, "alpha": 4}},
        {"kind": "vera", "params": {"r": 10**9}},
        {"kind": "vblora", "params": {"r": 2, "num_vectors": 10**10, "vector_length": 2}},
    ],
    ids=lambda config: config["kind"],
)
def test_an_adapter_that_would_take_the_memory_is_not_made(config):
    m = model()
    before = snapshot(m)
    with pytest.raises(InjectionError, match="give a lower rank"):
        inject_peft_and_freeze(peft_method_from_config({"target_modules": ["up", "down"]} | config), m)
    assert snapshot(m) == before


# -- what tensors can be -------------------------------------------------------------------------------------------------------------------


def changed(change):
    def act(path: Path) -> None:
        tensors = load_file(path)
        change(tensors, sorted(tensors)[-1])
        save_file(tensors, path)

    return act


ADAPTERS = (("PEFT directory", WEIGHTS), ("our directory", OUR_WEIGHTS))
TENSOR_CASES = {
    "NaN in the last": (lambda t, k: t[k].view(-1)[-1:].fill_(float("nan")), "finite"),
    "infinite": (lambda t, k: t[k].view(-1)[0:1].fill_(float("-inf")), "finite"),
    "too large for the model": (lambda t, k: t.update({k: t[k].double() * 0 + 1e300}), "not finite"),
    "eight bits, infinite": (lambda t, k: t.update({k: (t[k] * float("nan")).to(torch.float8_e5m2)}), "not finite"),
    "integers": (lambda t, k: t.update({k: t[k].long()}), "dtype|int64|torch.int"),
    "complex": (lambda t, k: t.update({k: t[k].to(torch.complex64)}), "dtype|complex"),
    "one more": (lambda t, k: t.update({"base_model.model.act.weight": t[k].clone()}), "act"),
    "one less": (lambda t, k: t.pop(k), None),
    "another shape": (lambda t, k: t.update({k: t[k][..., :-1].contiguous()}), None),
    "nothing left": (lambda t, k: t.clear(), None),
    "a name that is an expression": (lambda t, k: t.update({"base_model.model.(a+)+b.lora_A.weight": t[k].clone()}), r"\(a\+\)\+b"),
    "a name that leads out": (lambda t, k: t.update({"base_model.model.../../x.lora_A.weight": t[k].clone()}), "x"),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors(refused, case):
    change, says = TENSOR_CASES[case]
    for kind, file in (*ADAPTERS, ("merge, adapter", WEIGHTS), ("merge, our adapter", OUR_WEIGHTS)):
        said = refused(kind, file, changed(change))
        assert says is None or re.search(says, said), (kind, said)


def test_a_file_that_changes_while_it_is_open(tmp_path):
    """The header was checked; what is read is compared with it."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    with open_checkpoint(path) as files:
        save_file({"a": torch.ones(5)}, tmp_path / "y.safetensors")
        os.replace(tmp_path / "y.safetensors", path)
        with pytest.raises(CheckpointError, match="is another now"):
            files.read("a")
    with open_checkpoint(path) as files:
        assert files.read("a").tolist() == [1] * 5
        os.truncate(path, path.stat().st_size - 4)  # of a mapped file the process would die
        with pytest.raises(CheckpointError, match="was longer when it was opened"):
            files.read("a")


def test_shards_that_overlap_leave_a_hole(valid, tmp_path):
    """Two shards of one place have as many elements as the tensor, and the other half of it would stay as it was."""
    def covering(*boxes):
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes]
        return not _collide(TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4, 4]), chunks))

    assert covering(([0, 0], [2, 4]), ([2, 0], [2, 4]))
    assert covering(([0, 0], [2, 2]), ([0, 2], [2, 2]), ([2, 0], [2, 2]), ([2, 2], [2, 2]))
    assert not covering(([0, 0], [2, 4]), ([0, 0], [2, 4]))
    assert not covering(([0, 0], [4, 2]), ([0, 1], [4, 2]))
    assert not covering(([0, 0], [2, 4]), ([3, 0], [2, 4]))


def test_a_valid_directory_of_every_kind_is_read(valid):
    for name, kind in KINDS.items():
        assert isinstance(attempt(kind, valid[name]), dict), name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="its alarm is POSIX")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:resuming from")
def test_spoilt_at_random(kind):
    """Bytes and structure, always the same ones: `python -m tests.fuzz 100000` tries others."""
    count = campaign(kind, 20 if "merge" in kind else 40, fixed=True)
    assert count["refused"] > 8, count


def test_the_model_is_compared():
    """The check itself: a reader that leaves half of a load behind is found out."""
    m = model()
    before = snapshot(m)
    with torch.no_grad():
        m.up.weight[0, 0] += 1
    assert snapshot(m) != before
