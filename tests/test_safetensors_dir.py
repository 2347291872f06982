"""Checkpoints on disk: what is read, how little of it, and every broken or hostile input refused with its own words."""

import json
import pickle
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d9d_lora.state.safetensors_dir import DTYPES, INDEX, SINGLE, CheckpointError, open_checkpoint


def write(path: Path, header: dict | bytes, size: int = 0, *, length: int | None = None) -> Path:
    """A safetensors file by hand: whatever header, then `size` zero bytes (sparse)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write((len(text) if length is None else length).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + size)
    return path


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_index(root: Path, weight_map: dict) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_every_dtype_whole_and_by_the_box(tmp_path):
    tensors = {code: torch.arange(35).reshape(7, 5).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as files:
        assert files.names() == sorted(tensors)
        assert files.files() == [tmp_path / SINGLE]
        for name, tensor in tensors.items():
            assert (files.shape(name), files.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert files.read(name).tolist() == tensor.tolist()
        for code in DTYPES:
            before = files.bytes_read
            assert files.read(code, (slice(2, 5), slice(1, 3))).tolist() == tensors[code][2:5, 1:3].tolist()
            assert files.bytes_read - before == 6 * tensors[code].element_size()
        assert files.read("F32", (slice(7, 7), slice(0, 5))).shape == (0, 5)
        for box in [(slice(0, 8), slice(0, 5)), (slice(0, 7),), (slice(-1, 7), slice(0, 5))]:
            with pytest.raises(CheckpointError, match=r"'F32' has shape \(7, 5\)"):
                files.read("F32", box)
        with pytest.raises(CheckpointError, match=r"No tensor 'absent'"):
            files.read("absent")


def test_a_slice_of_a_huge_file_touches_only_its_pages(tmp_path):
    rows = 2**21  # 8 GiB, sparse: reading all of it would take minutes and the memory would show
    path = write(tmp_path / "huge.safetensors", {"huge": entry([rows, 1024], 0, rows * 4096)}, rows * 4096)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with open_checkpoint(path) as files:
        assert files.read("huge", (slice(rows - 4, rows), slice(0, 1024))).shape == (4, 1024)
        assert files.bytes_read == 4 * 4096
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_index_of_two_files_and_the_index_itself(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x-1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "x-2.safetensors")
    write_index(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    for path in (tmp_path, tmp_path / INDEX):
        with open_checkpoint(path) as files:
            assert files.names() == ["a", "b"]
            assert torch.equal(files.read("b"), torch.ones(3))


def test_hub_cache_links_are_followed_and_no_others(tmp_path):
    model, other = tmp_path / "models--x--y", tmp_path / "elsewhere"
    snapshot = model / "snapshots" / "0123"
    for folder in (snapshot, model / "blobs", other):
        folder.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, model / "blobs" / "cafe")
    save_file({"a": torch.ones(2)}, other / "cafe")
    (snapshot / SINGLE).symlink_to("../../blobs/cafe")
    with open_checkpoint(snapshot) as files:
        assert files.read("a").tolist() == [1, 1]
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(other / "cafe")
    with pytest.raises(CheckpointError, match=r"leads out of the checkpoint"):
        open_checkpoint(snapshot)
    (snapshot / SINGLE).unlink()
    (model / "blobs" / "cafe").unlink()
    (model / "blobs").rmdir()
    (model / "blobs").symlink_to(other)  # the cache's own folder turned into a way out
    (snapshot / SINGLE).symlink_to("../../blobs/cafe")
    with pytest.raises(CheckpointError, match=r"leads out of the checkpoint"):
        open_checkpoint(snapshot)


HEADERS = {
    "cut short": ({"w": entry([4], 0, 16)}, 8, r"'w': bytes 0 to 16 are not in the file's 8"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, r"'a' and 'b' overlap at byte 4"),
    "hole": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, r"'a' and 'b' leave a hole at byte 8"),
    "left over": ({"a": entry([2], 0, 8)}, 16, r"8 bytes after 'a' belong to no tensor"),
    "wrong bytes": ({"a": entry([3], 0, 8)}, 8, r"'a': F32 \[3\] takes 12 bytes, offsets give 8"),
    "backwards": ({"a": entry([2], 8, 0)}, 8, r"'a': bytes 8 to 0"),
    "negative": ({"a": entry([-2, -1], 0, 8)}, 8, r"'a': bad shape \[-2, -1\]"),
    "no integer": ({"a": entry([2.0], 0, 8)}, 8, r"'a': bad shape \[2.0\]"),
    "true is no size": ({"a": entry([True], 0, 4)}, 4, r"'a': bad shape"),
    "three offsets": ({"a": {**entry([2], 0, 8), "data_offsets": [0, 4, 8]}}, 8, r"'a': bad shape .* data_offsets"),
    "dtype": ({"a": entry([2], 0, 8, "F4")}, 8, r"'a': dtype 'F4' is unknown"),
    "no entry": ({"a": 5}, 8, r"'a': expected dtype, shape and data_offsets, got 5"),
    "not JSON": (b"\x80\x04 pickle?", 8, r"is not JSON"),
    "a list": (b"[1]", 0, r"expected a JSON object, got a list"),
    "deep": (b'{"a":' + b"[" * 100_000, 0, r"is not JSON"),
    "twice": (b'{"a":1,"a":2}', 0, r"the key 'a' stands there twice"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_refuses_header(tmp_path, case):
    header, size, says = HEADERS[case]
    path = write(tmp_path / SINGLE, header, size)
    for source in (path, tmp_path):
        with pytest.raises(CheckpointError, match=says) as caught:
            open_checkpoint(source)
        assert str(path) in str(caught.value)


def test_refuses_files_that_are_none(tmp_path):
    path = tmp_path / SINGLE
    for content, says in {
        b"": "cut short",
        b"\x05\0\0": "cut short",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        (2**63).to_bytes(8, "little") + b"{}": "header would be 9223372036854775808 bytes long, the whole file has 10",
    }.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(path)
    save_file({"a": torch.ones(1000)}, path)
    for size in (7, 30, 200, path.stat().st_size - 1):
        save_file({"a": torch.ones(1000)}, path)
        with path.open("r+b") as stream:
            stream.truncate(size)
        with pytest.raises(CheckpointError, match=r"cut short|header"):
            open_checkpoint(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Bomb()))
    for source in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"Pickle runs code.*convert to safetensors"):
            open_checkpoint(source)
    (tmp_path / SINGLE).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": path.name})
    (tmp_path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"'a' is said to be in 'pytorch_model.bin'"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "file, says",
    [
        ("../out.safetensors", "outside"),
        ("/out.safetensors", "outside"),
        ("sub/../../out.safetensors", "outside"),
        ("link.safetensors", "leads out of the checkpoint"),
        ("folder.safetensors", "no regular file"),
        ("absent.safetensors", "not there"),
        ("circle.safetensors", "leads nowhere|not there"),
        ("nul\0.safetensors", "no .safetensors file"),
        (5, "no .safetensors file"),
        ("good.safetensors", r"puts \['w'\] in .*good.safetensors"),
    ],
)
def test_refuses_index(tmp_path, file, says):
    root = tmp_path / "model"
    root.mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "out.safetensors")
    save_file({"other": torch.ones(1)}, root / "good.safetensors")
    (root / "link.safetensors").symlink_to("../out.safetensors")
    (root / "circle.safetensors").symlink_to("circle.safetensors")
    (root / "folder.safetensors").mkdir()
    write_index(root, {"w": file})
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(root)
    assert "'w'" in str(caught.value)
    assert "model" in str(caught.value)


def test_refuses_directories(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"is empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*config.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a .safetensors file"):
        open_checkpoint(tmp_path / "config.json")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"path of the file itself, say adapter_model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match=r"weight_map"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"holds both"):
        open_checkpoint(tmp_path)


def test_refuses_a_key_in_two_files(tmp_path):
    for name in ("one", "two"):
        save_file({"w": torch.ones(1), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, {"w": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"'w' is in two files.*one.safetensors.*two.safetensors"):
        open_checkpoint(tmp_path)
