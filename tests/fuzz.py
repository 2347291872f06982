"""Hostile files, made: a valid directory of every kind that is read, what reads it, and strategies that spoil it.

`python -m tests.fuzz 100000` tries so many of each kind, anew each time; the suite tries a few hundred, always the same ones.
"""

import atexit
import hashlib
import json
import shutil
import signal
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as library_reads
from safetensors.torch import save_file
from torch import Tensor, nn

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.export.gguf import read_gguf, write_gguf
from d9d_lora.files import load_adapter, save_adapter
from d9d_lora.method import InjectionError
from d9d_lora.state import checkpoint, native_format, peft_config
from d9d_lora.state.loralib_format import LoralibError, load_loralib, loralib_state_dict
from d9d_lora.state.merge_files import merge_files
from d9d_lora.state.safetensors_dir import CheckpointError, open_checkpoint
from d9d_lora.targets import NoMatch

OURS = (CheckpointError, peft_config.AdapterError, checkpoint.CheckpointError, InjectionError, NoMatch, LoralibError)
CONFIG, WEIGHTS, METHOD, ONE = peft_config.CONFIG, peft_config.WEIGHTS, native_format.METHOD, "one.safetensors"
GGUF = "one.gguf"
FOR_LORALIB = {"kind": "lora", "target_modules": ["up", "down"], "params": {"r": 2, "alpha": 4}}
PATIENCE_S = 10
THOROUGH = ContextVar("THOROUGH", default=True)  # whether adapters are loaded in both ways; a campaign does so for every fourth


def model() -> nn.Sequential:
    """Small and always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(embed=nn.Embedding(11, 6), up=nn.Linear(6, 8), act=nn.ReLU(), down=nn.Linear(8, 6), norm=nn.LayerNorm(6))
    )


def stirred(config: dict[str, Any]) -> tuple[Any, nn.Module]:
    m, method = model(), peft_method_from_config(config)
    inject_peft_and_freeze(method, m)
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return method, m


# -- a valid directory of every kind --------------------------------------------------------------------------------------------


def peft_directory(path: Path) -> None:
    path.mkdir(exist_ok=True)
    fields = {"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 5}, "modules_to_save": ["norm"]}
    _, m = stirred({"kind": "lora", "target_modules": ["up", "down", "embed"], "params": {"r": 3, "alpha": 6}, **fields})
    save_adapter(m, path)


def single_file(path: Path) -> None:
    """A PEFT directory as one file, beside nothing."""
    path.mkdir()
    _, m = stirred({"kind": "loha", "target_modules": ["up"], "params": {"r": 2, "alpha": 4}})
    save_adapter(m, path / ONE)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def gguf_file(path: Path) -> None:
    """From a PEFT directory for the smallest Llama."""
    path.mkdir()
    draw = torch.Generator().manual_seed(0)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.randn(3, 8, generator=draw), f"{layer}.lora_B.weight": torch.randn(8, 3, generator=draw)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, WEIGHTS))
        Path(folder, CONFIG).write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}')
        write_gguf(Path(folder), path / GGUF, base_config=LLAMA)


def loralib_file(path: Path) -> None:
    path.mkdir()
    save_file({name: t.detach().clone() for name, t in loralib_state_dict(stirred(FOR_LORALIB)[1]).items()}, path / ONE)


def native_directory(path: Path) -> None:
    method, m = stirred({"kind": "loha", "target_modules": ".*(up|down)", "params": {"r": 2, "alpha": 4}})
    native_format.save_trained({n: p for n, p in m.named_parameters() if p.requires_grad}, method.config, path)


def base_directory(path: Path) -> None:
    """Two shards with an index, and a PEFT adapter for them beside."""
    path.mkdir()
    state = model().state_dict()
    halves = {"a-1.safetensors": [n for n in state if "down" in n], "a-2.safetensors": [n for n in state if "down" not in n]}
    for file, names in halves.items():
        save_file({n: state[n] for n in names}, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, names in halves.items() for n in names}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "x", "tie_word_embeddings": false, "dtype": "float32"}')


def run_directory(path: Path) -> None:
    tensors = {name: t.detach().clone() for name, t in model().state_dict().items()}
    checkpoint.Checkpoints(path).save(3, tensors, {"a": [1, 2]})


# -- what reads it: into a model, which is left as it was if it fails ----------------------------------------------------------------


def reads_adapter(path: Path, m: nn.Module) -> dict[str, Tensor]:
    """Into a bare model, and into one that has the adapter already: which is left as it was, or is the same function then."""
    if not THOROUGH.get():
        load_adapter(m, path)
        return {name: p.detach() for name, p in m.named_parameters() if p.requires_grad}
    again = model()
    load_adapter(again, a_valid("single file" if path.name == ONE else "our directory" if (path / METHOD).exists() else "PEFT directory"))
    before = snapshot(again)
    try:
        load_adapter(again, path)
        filled = True
    except OURS:
        assert snapshot(again) == before, "a failed load has changed an adapted model"
        filled = False
    load_adapter(m, path)
    if filled:
        ids = torch.arange(11)
        torch.testing.assert_close(again(ids), m(ids), equal_nan=True, msg=lambda text: f"two ways to load one file: {text}")
    return {name: p.detach() for name, p in m.named_parameters() if p.requires_grad}


@cache
def a_valid(name: str) -> Path:
    path = Path(tempfile.mkdtemp(prefix="d9d_lora_fuzz_"), "it")
    atexit.register(shutil.rmtree, path.parent)
    KINDS[name].make(path)
    return path / ONE if name == "single file" else path


def reads_gguf(path: Path, m: nn.Module) -> dict[str, Tensor]:
    return read_gguf(path / GGUF, LLAMA)[1]


def reads_loralib(path: Path, m: nn.Module) -> dict[str, Tensor]:
    again = stirred(FOR_LORALIB)[1]
    before = snapshot(again)
    try:
        load_loralib(again, path / ONE)
    except Exception:
        assert snapshot(again) == before, "a failed load has changed the model"
        raise
    return {name: p.detach() for name, p in again.named_parameters() if p.requires_grad}


def reads_single(path: Path, m: nn.Module) -> dict[str, Tensor]:
    return reads_adapter(path / ONE, m)


def reads_base(path: Path, m: nn.Module) -> dict[str, Tensor]:
    with open_checkpoint(path) as files:
        return {name: files.read(name) for name in files.names()}


def merges(path: Path, m: nn.Module) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as other:
        peft_directory(Path(other, "adapter"))
        out = Path(other, "merged")
        try:
            merge_files(Path(other, "adapter"), path, out)
        except Exception:
            assert sorted(p.name for p in Path(other).iterdir()) == ["adapter"], "a failed merge has left something"
            raise
        return reads_base(out, m)


def merged_into(path: Path, m: nn.Module) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as other:
        base_directory(Path(other, "base"))
        out = Path(other, "merged")
        try:
            merge_files(path, Path(other, "base"), out)
        except Exception:
            assert sorted(p.name for p in Path(other).iterdir()) == ["base"], "a failed merge has left something"
            raise
        return reads_base(out, m)


def resumes(path: Path, m: nn.Module) -> dict[str, Tensor]:
    found = checkpoint.Checkpoints(path).find("must")
    assert found is not None
    tensors = {name: torch.zeros_like(t) for name, t in m.state_dict().items()}
    found.load(tensors)
    return tensors


@dataclass(frozen=True)
class Kind:
    """What is read: how a valid one is made, what reads it, and the files of it that are spoilt."""

    make: Callable[[Path], None]
    read: Callable[[Path, nn.Module], dict[str, Tensor]]
    files: tuple[str, ...]


KINDS = {
    "PEFT directory": Kind(peft_directory, reads_adapter, (CONFIG, WEIGHTS)),
    "our directory": Kind(native_directory, reads_adapter, (METHOD, native_format.WEIGHTS)),
    "single file": Kind(single_file, reads_single, (ONE,)),
    "GGUF": Kind(gguf_file, reads_gguf, (GGUF,)),
    "loralib": Kind(loralib_file, reads_loralib, (ONE,)),
    "base": Kind(base_directory, reads_base, ("model.safetensors.index.json", "a-1.safetensors")),
    "merge, base": Kind(base_directory, merges, ("model.safetensors.index.json", "config.json", "a-2.safetensors")),
    "merge, adapter": Kind(peft_directory, merged_into, (CONFIG, WEIGHTS)),
    "merge, our adapter": Kind(native_directory, merged_into, (METHOD, native_format.WEIGHTS)),
    "run": Kind(run_directory, resumes, ("latest", "step_00000003/COMPLETE", "step_00000003/trainer.json")),
}


def snapshot(m: nn.Module) -> dict[str, str]:
    """Every module's class and every tensor, by name, as a hash."""
    state = {name: hashlib.sha256(t.detach().numpy().tobytes() + str(t.dtype).encode()).hexdigest() for name, t in m.state_dict().items()}
    state |= {f"gradient of {name}": str(p.requires_grad) for name, p in m.named_parameters()}
    return state | {f"class of {name}": type(part).__name__ for name, part in m.named_modules()}


def tree(path: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in path.rglob("*")}


@contextmanager
def patience(seconds: int = PATIENCE_S):
    """An error if it takes longer."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(kind: Kind, path: Path) -> dict[str, Tensor] | Exception:
    """What the reader makes of a directory: the tensors, or an error of ours, after which nothing has changed."""
    m = model()
    before, files = snapshot(m), tree(path.parent)
    try:
        with patience():
            return kind.read(path, m)
    except OURS as error:
        outcome = error
    assert snapshot(m) == before, "an error has changed the model"
    assert tree(path.parent) == files, "an error has left something on the disk"
    assert 10 < len(str(outcome)) < 30_000, f"an error of {len(str(outcome))} characters"
    return outcome


# -- spoiling ----------------------------------------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([b"\xff" * 8, b"\0" * 8, b"{", b"]", b'"', b"-", b"1e999", b"NaN", b"..", b"[" * 50, b"\xed\xa0", b"9" * 30]),
        ),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for what, where, new in edits:
        at = int(where * len(data))
        if at % 3 == 0:
            at = min(at, 8 + at % 400)  # the header is a small part of a file, and most of what can go wrong
        if what == "cut":
            data = data[:at]
        elif what == "repeat":
            data = data[:at] + data[max(0, at - 40) : at] + data[at:]
        else:
            data = data[:at] + (b"" if what == "delete" else new) + data[at + (0 if what == "insert" else len(new)) :]
    return data


NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 6, 8, 16, -1, 10**12, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0, 5e-324, 1.5]),
    st.integers(-3, 20),
    st.sampled_from(["", "F32", "BF16", "F8_E4M3", "I64", "../x", "up", "(a+)+b", "(", "x" * 3000, "\u202e", "\ud800", "a\nb", "\x1b[2J"]),
    st.sampled_from([[], {}, [0], [[1]], [0, 2**62], ["up"], {"up": 2}, {"(a|a)*$": 3}, {"up": 10**12}, [[0, 10**12]], [[[[[]]]]]]),
    st.text(max_size=5),
)
WAY = st.lists(st.integers(0, 40), min_size=1, max_size=4)
STEPS = st.lists(st.tuples(st.sampled_from(["set", "drop", "add", "rename", "swap"]), WAY, NASTY, NASTY), min_size=1, max_size=3)


def restructured(document: Any, steps: list[tuple[str, list[int], Any, Any]]) -> Any:
    """A JSON document with values, keys and entries replaced."""
    for what, way, value, other in steps:
        at, holder, last = document, None, None
        for number in way:
            keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
            if not keys:
                break
            holder, last = at, keys[number % len(keys)]
            at = at[last]
        if holder is None:
            continue
        if what == "set":
            holder[last] = deepcopy(value)
        elif what == "drop":
            del holder[last]
        elif what == "swap":
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            holder[last], holder[keys[0]] = holder[keys[0]], holder[last]
        elif isinstance(holder, dict):
            holder[str(value)] = holder.pop(last) if what == "rename" else deepcopy(other)
        else:
            holder.insert(0, deepcopy(value))
    return document


def spoil(file: Path, edits: list[tuple[str, float, bytes]], steps: list[tuple[str, list[int], Any, Any]], structured: bool) -> None:
    data = file.read_bytes()
    if not structured or file.suffix == ".gguf" or file.name == "latest":
        file.write_bytes(edited(data, edits))
        return
    binary = file.suffix == ".safetensors"
    length = int.from_bytes(data[:8], "little") if binary else len(data)
    text, rest = (data[8 : 8 + length], data[8 + length :]) if binary else (data, b"")
    text = json.dumps(restructured(json.loads(text), deepcopy(steps))).encode()
    file.write_bytes((len(text).to_bytes(8, "little") if binary else b"") + text + rest)


def check(kind: Kind, valid: Path, file: str, edits: Any, steps: Any, structured: bool) -> bool:
    """Spoils a copy of a valid directory and reads it; whether it was still accepted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "it")
        copy(valid, path)
        spoil(path / file, edits, steps, structured)
        THOROUGH.set((path / file).stat().st_size % 4 == 0)
        outcome = attempt(kind, path)
        if isinstance(outcome, Exception):
            return False
        for weights in path.glob("*.safetensors"):  # whatever is accepted, the library reads it too, and every number is finite
            library_reads(weights.read_bytes())
        if kind.read in (reads_adapter, reads_single):
            held = {k: v for weights in path.glob("*.safetensors") for k, v in library_reads(weights.read_bytes()).items()}
            assert all(t.isfinite().all() for t in outcome.values())
            assert sorted(hashed(t) for t in outcome.values()) == sorted(hashed(t.float()) for t in held.values())
        return True


def hashed(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes() + str(tuple(t.shape)).encode()).hexdigest()


def copy(valid: Path, path: Path) -> None:
    for source in sorted(valid.rglob("*")):
        target = path / source.relative_to(valid)
        if source.is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def campaign(name: str, examples: int, *, fixed: bool) -> dict[str, int]:
    """Tries `examples` spoilt copies of one kind; how many were refused and how many accepted."""
    kind, count = KINDS[name], {"refused": 0, "accepted": 0}
    with tempfile.TemporaryDirectory() as folder:
        valid = Path(folder, "valid")
        kind.make(valid)

        @settings(max_examples=examples, derandomize=fixed, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(kind.files), EDITS, STEPS, st.booleans())
        def each(file: str, edits: Any, steps: Any, structured: bool) -> None:
            count["accepted" if check(kind, valid, file, edits, steps, structured) else "refused"] += 1

        each()
    return count


if __name__ == "__main__":
    for chosen in sys.argv[2:] or KINDS:
        print(chosen, campaign(chosen, int(sys.argv[1]), fixed=False), flush=True)
