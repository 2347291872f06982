"""A checkpoint resumes on any layout, exactly; is whole or absent whenever the run dies; is refused when damaged."""

import errno
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from d9d_lora.state import checkpoint
from d9d_lora.state.atomic import digest, write_text
from d9d_lora.state.checkpoint import CheckpointError, CheckpointFailed, Checkpoints
from tests.pool import Pool, RankFailed

WORLD = {"one": 1, "fsdp2": 2, "fsdp4": 4, "hsdp2x2": 4, "tp2": 2, "fsdp2xtp2": 4}


# ---- the state of a small job on a layout: cut by torch's own wrappers, so that its placements are the real ones


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)  # column and row parallel; the row's bias is replicated
        self.odd = nn.Linear(5, 7)  # 7 rows on 4 ranks: uneven
        self.two = nn.Linear(3, 2)  # 2 rows on 4 ranks: two of them hold none
        for i, p in enumerate(self.parameters()):
            p.data = torch.arange(p.numel()).reshape(p.shape).float() + 10 * i


def job(layout: str) -> dict[str, Tensor]:
    """Weights, moments, and the dtypes that state comes in; a value depends on its global place and nothing else."""
    net = Net()
    if layout.startswith("fsdp"):
        sizes = [int(part[-1]) for part in layout.split("x")]
        mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=("dp", "tp")[: len(sizes)])
        if len(sizes) == 2:
            parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
    elif layout == "hsdp2x2":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "tp2":
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    state: dict[str, Tensor] = {"step": torch.tensor(7.0), "drawn": torch.tensor(2**40 + 1)}
    for name, p in net.named_parameters():
        w = p.detach()
        state |= {
            f"model.{name}": w,
            f"moment.{name}": w * 2 + 1,
            f"half.{name}": w.bfloat16(),
            f"count.{name}": w.long(),
        }
    if layout != "one":  # placements that FSDP2 and the plans do not make, and the degenerate shapes
        mesh = init_device_mesh("cpu", (WORLD[layout],))
        state["extra.columns"] = distribute_tensor(torch.arange(21.0).reshape(3, 7), mesh, [Shard(1)])
        state["extra.whole"] = distribute_tensor(torch.arange(4.0), mesh, [Replicate()])
        state["extra.number"] = distribute_tensor(torch.tensor(5.0), mesh, [Replicate()])
        state["extra.empty"] = distribute_tensor(torch.zeros(0, 3), mesh, [Shard(0)])
        turned = distribute_tensor(torch.arange(48.0).reshape(8, 6), mesh, [Shard(0)]).to_local().t().contiguous().t()
        state["extra.turned"] = DTensor.from_local(turned, mesh, [Shard(0)], shape=torch.Size((8, 6)), stride=(6, 1))
        state["extra.strided"] = distribute_tensor(torch.arange(14.0).reshape(7, 2), mesh, [Shard(0)])
        if layout == "fsdp2xtp2":  # first over tp, then over dp, as FSDP2 cuts a column-parallel weight; here unevenly
            grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            whole = torch.arange(14.0).reshape(7, 2)
            mine = whole.chunk(2)[grid.get_local_rank("tp")].chunk(2)[grid.get_local_rank("dp")].clone()
            cut = [_StridedShard(0, split_factor=2), Shard(0)]
            state["extra.strided"] = DTensor.from_local(mine, grid, cut, shape=whole.shape, stride=whole.stride())
    else:
        state["extra.strided"] = torch.arange(14.0).reshape(7, 2)
        state["extra.columns"], state["extra.whole"] = torch.arange(21.0).reshape(3, 7), torch.arange(4.0)
        state["extra.number"], state["extra.empty"] = torch.tensor(5.0), torch.zeros(0, 3)
        state["extra.turned"] = torch.arange(48.0).reshape(8, 6).t().contiguous().t()
    return state


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for tensor in state.values():
        local(tensor).fill_(-3)
    return state


def differing(state: dict[str, Tensor]) -> list[str]:
    """The names whose value, put together from all ranks, is not that of one process."""
    want, wrong = job("one"), []
    for name in sorted(state):
        tensor = state[name]
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if whole.dtype != want[name].dtype or not torch.equal(whole, want[name]):
            wrong.append(name)
    return wrong


def save_on(rank: int, layout: str, root: Path) -> list[str]:
    state = job(layout)
    assert differing(state) == []
    path = Checkpoints(root).save(3, state, {"layout": layout})
    return sorted(file.name for file in (path / "state").iterdir())


def load_on(rank: int, layout: str, root: Path) -> list[str]:
    state = blank(job(layout))
    assert len(differing(state)) > len(state) // 2
    found = Checkpoints(root).find("must")
    assert found is not None
    assert found.step == 3
    found.load(state)
    return differing(state)


@pytest.mark.parametrize("source", WORLD)
def test_a_checkpoint_of_any_layout_loads_exactly_on_every_layout(pool: Pool, tmp_path: Path, source: str) -> None:
    files = pool.run(WORLD[source], save_on, source, tmp_path)[0]
    assert all(name.endswith(".safetensors") for name in files)
    assert len(files) == WORLD[source], "every rank writes a part"
    for target, world in WORLD.items():
        assert pool.run(world, load_on, target, tmp_path) == [[]] * world, f"{source} -> {target}"


def test_replicas_are_written_once(pool: Pool, tmp_path: Path) -> None:
    sizes = {}
    for layout in ("one", "hsdp2x2", "fsdp2xtp2"):
        pool.run(WORLD[layout], save_on, layout, tmp_path / layout)
        files = (tmp_path / layout / "step_00000003" / "state").iterdir()
        sizes[layout] = sum(t.nbytes for file in files for t in load_file(file).values())
    assert sizes["hsdp2x2"] == sizes["fsdp2xtp2"] == sizes["one"]


def load_rank_0s_slice_everywhere(rank: int, layout: str, root: Path) -> list[str]:
    state, real = blank(job(layout)), dcp.load

    def wrong(tensors: dict[str, Tensor], **kwargs: Any) -> None:
        real(tensors, **kwargs)
        for name in sorted(tensors):
            part = local(tensors[name])
            sent = [part.clone()]
            dist.broadcast_object_list(sent, src=0)
            if sent[0].shape == part.shape:
                part.copy_(sent[0])

    dcp.load = wrong
    try:
        found = Checkpoints(root).find("must")
        assert found is not None
        found.load(state)
    finally:
        dcp.load = real
    return differing(state)


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp2xtp2"])
def test_the_comparison_sees_rank_0s_slice_on_every_rank(pool: Pool, tmp_path: Path, layout: str) -> None:
    pool.run(WORLD[layout], save_on, layout, tmp_path)
    for wrong in pool.run(WORLD[layout], load_rank_0s_slice_everywhere, layout, tmp_path):
        assert "model.up.weight" in wrong


def stages(rank: int, root: Path, turn: bool) -> bool:
    mine = rank if not turn else 1 - rank  # a pipeline: each rank names tensors of its own, and one is common
    state = {f"stage{mine}.w": torch.full((3,), 1.0 + mine), "step": torch.tensor(4)}
    if not turn:
        Checkpoints(root).save(1, state, {})
        return True
    found, empty = Checkpoints(root).find("must"), {name: torch.zeros_like(t) for name, t in state.items()}
    assert found is not None
    found.load(empty)
    return all(torch.equal(empty[name], state[name]) for name in state)


def test_ranks_may_name_different_tensors(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, stages, tmp_path, False)
    assert pool.run(2, stages, tmp_path, True) == [True, True]
    found = Checkpoints(tmp_path).find("must")
    assert found is not None
    assert set(found.index) == {"stage0.w", "stage1.w", "step"}


# ---- what the job expects is compared before anything is written to


def small(value: float = 1.0) -> dict[str, Tensor]:
    return {"a": torch.full((2, 3), value), "n": torch.tensor(int(value))}


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s.pop("a"), "no rank of this job expects: a"),
        (lambda s: s.update(b=torch.zeros(2)), "b is missing in the checkpoint"),
        (
            lambda s: s.update(a=torch.zeros(3, 2)),
            r"a is float32\[2, 3\] in the checkpoint, float32\[3, 2\] in the job",
        ),
        (lambda s: s.update(n=torch.zeros(())), r"n is int64\[\] in the checkpoint, float32\[\] in the job"),
        (lambda s: s.update(a=torch.zeros(2, 3, device="meta")), "a is on the meta device"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], told: str
) -> None:
    Checkpoints(tmp_path).save(1, small(), {})
    found, state = Checkpoints(tmp_path).find("must"), small(0.0)
    assert found is not None
    change(state)
    with pytest.raises(CheckpointError, match=told):
        found.load(state)
    assert all(not t.any() for t in state.values() if not t.is_meta)


def misfit_on_rank_1(rank: int, root: Path) -> tuple[str, bool]:
    Checkpoints(root).save(1, small(), {})
    found, state = Checkpoints(root).find("must"), small(0.0)
    assert found is not None
    if rank == 1:
        state["a"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as error:
        found.load(state)
    return str(error.value), any(bool(t.any()) for t in state.values())


def test_a_misfit_on_one_rank_is_told_on_all(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(2, misfit_on_rank_1, tmp_path)
    assert first == second
    assert "rank 1" in first[0]
    assert not first[1]


def save_a_partial(rank: int, root: Path) -> str:
    part = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()])
    with pytest.raises(CheckpointFailed) as error:
        Checkpoints(root).save(1, {"g": part}, {})
    return str(error.value)


def test_a_part_of_a_sum_is_refused(pool: Pool, tmp_path: Path) -> None:
    assert "a part of a sum is no value" in pool.run(2, save_a_partial, tmp_path)[0]
    assert Checkpoints(tmp_path).find("auto") is None


# ---- killed at any moment


SCENARIOS = {"next": 30, "same": 20}  # the step whose save is killed, after whole saves of steps 10 and 20; the next one beside training


def fill(root: Path) -> None:
    for step in (10, 20):
        Checkpoints(root, keep=2).save(step, small(step), {"value": step}, best=step == 10)


def save_killed(root: Path, step: int) -> None:
    extras = {"adapter": lambda path: (path / "adapter.json").write_text("{}") and None}
    checkpoints = Checkpoints(root, keep=2)
    checkpoints.save(step, small(99), {"value": 99}, extras=extras, best=True, wait=step == SCENARIOS["same"])
    checkpoints.wait()


@contextmanager
def counted(root: Path, act: Callable[[int], None]) -> Iterator[None]:
    """Call `act(n)` before the n-th operation that changes what is below `root`."""
    seen, on, real_fsync = 0, True, os.fsync

    def event() -> None:
        nonlocal seen
        seen += 1
        act(seen)

    def audit(name: str, args: tuple[Any, ...]) -> None:
        if not on or not args or not isinstance(args[0], str | os.PathLike):
            return
        writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        changes = name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")
        # inside rmtree, names are relative to a directory handle
        if (writes or changes) and (os.fspath(args[0]).startswith(str(root)) or name in ("os.remove", "os.rmdir")):
            event()

    def fsync(handle: int) -> None:
        event()
        real_fsync(handle)

    sys.addaudithook(audit)
    os.fsync = fsync  # type: ignore[assignment]
    try:
        yield
    finally:
        on, os.fsync = False, real_fsync


def die_at(point: int, operation: int) -> None:
    if operation == point:
        os.kill(os.getpid(), signal.SIGKILL)


def sweep(base: str, scenario: str) -> None:
    """Kill a save before its first, second, ... file operation until one runs through. Prints what each left behind."""
    for point in range(1, 1000):
        root = Path(base, f"{scenario}{point}")
        fill(root)
        if (child := os.fork()) == 0:
            with counted(root, partial(die_at, point)):
                save_killed(root, SCENARIOS[scenario])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps(resumed(root) | {"killed": os.WIFSIGNALED(status), "status": status}), flush=True)
        if not os.WIFSIGNALED(status):
            return


def resumed(root: Path) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, state = Checkpoints(root).find("auto"), small(0)
    assert found is not None
    found.load(state)
    save_again = Checkpoints(root, keep=2).save(40, small(40), {"value": 40})
    return {
        "value": found.document["value"],
        "loaded": state["a"].unique().tolist(),
        "warned": [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)],
        "next": save_again.name,
        "left": sorted(path.name for path in root.iterdir() if path.name.startswith(".")),
        "best_whole": (root / (root / "best").read_text() / "COMPLETE").exists(),
    }


@pytest.mark.parametrize("scenario, previous", [("next", 20), ("same", 20)])
def test_a_save_killed_before_any_file_operation_leaves_a_resumable_root(
    tmp_path: Path, scenario: str, previous: int
) -> None:
    code = f"from tests.test_checkpoint import sweep; sweep({str(tmp_path)!r}, {scenario!r})"
    # one fresh process, which forks for every point: a fork of the test process would inherit its threads
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) > 20
    assert [p["killed"] for p in points] == [True] * (len(points) - 1) + [False]
    assert points[-1]["status"] == 0
    for number, point in enumerate(points, start=1):
        assert point["value"] in (previous, 99), number
        assert point["loaded"] == [point["value"]], f"a mix of two saves at operation {number}"
        assert point["warned"] == [], number
        assert point["left"] == [], f"a later save clears what operation {number} left"
        assert point["best_whole"], number
    values = [p["value"] for p in points]
    assert values == sorted(values), "the new one from one operation on, the old one before"
    assert (values[0], values[-1]) == (previous, 99)


def die_on_rank_1(rank: int, root: Path) -> None:
    if rank == 1:
        with counted(root, partial(die_at, 1)):
            Checkpoints(root).save(2, job("fsdp2"), {})
    Checkpoints(root).save(2, job("fsdp2"), {})


def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, save_on, "fsdp2", tmp_path)
    with pytest.raises(RankFailed, match="rank 1:\nthe process"):
        pool.run(2, die_on_rank_1, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tmp_")]
    assert pool.run(2, load_on, "fsdp2", tmp_path) == [[], []]
    pool.run(2, save_on, "fsdp2", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


# ---- beside the training


def beside(rank: int, root: Path, copies: bool) -> tuple[list[str], bool, bool]:
    """A save that is under way while the state changes and the step's own collectives run; ranks reach it at other times."""
    state, checkpoints, gate = job("fsdp2xtp2"), Checkpoints(root), threading.Event()
    copied, write = checkpoint.copied, checkpoint.write_tensors

    def held(folder: Path, tensors: Any) -> None:
        assert gate.wait(30)
        write(folder, tensors)

    checkpoint.write_tensors = held
    if not copies:  # mutant
        checkpoint.copied = lambda t: t
    try:
        checkpoints.save(3, state, {}, wait=False)
    finally:
        checkpoint.copied = copied
    for n in range(20):
        total = torch.tensor([rank + n])
        dist.all_reduce(total)
        assert total.item() == 6 + 4 * n
        time.sleep(0.002 * rank)
    blank(state)
    early = (root / "latest").exists()
    gate.set()
    dist.barrier()
    checkpoints.wait()
    checkpoint.write_tensors = write
    found = checkpoints.find("must")
    assert found is not None
    found.load(state)
    return differing(state), early, any(t.name == "checkpoint" for t in threading.enumerate())


def test_a_save_beside_the_training_is_of_the_moment_it_was_asked_for(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(4, beside, tmp_path / "a", True) == [([], False, False)] * 4
    wrong, _, _ = pool.run(4, beside, tmp_path / "b", False)[0]
    assert "model.up.weight" in wrong, "the comparison sees a save that did not copy"


def fail_beside(rank: int, root: Path) -> tuple[str, list[str], list[str]]:
    checkpoints = Checkpoints(root)

    def adapter(path: Path) -> None:
        if rank == 1:
            full_fsync(0)

    checkpoints.save(1, small(1), {})
    checkpoints.save(2, small(2), {}, extras={"adapter": adapter}, wait=False)
    with pytest.raises(CheckpointFailed) as error:
        checkpoints.save(3, small(3), {}, wait=False)  # told here, and only once
    dist.barrier()
    left = sorted(path.name for path in root.iterdir())
    dist.barrier()
    with pytest.raises(CheckpointFailed, match="not JSON serializable"):
        checkpoints.save(3, small(3), {"x": object()}, wait=False)
    state = small(3)
    checkpoints.save(3, state, {}, wait=False)
    checkpoints.save(4, state, {}, wait=False)  # waits for the one before
    checkpoints.wait()
    return str(error.value), left, sorted(path.name for path in root.iterdir())


def test_a_save_that_fails_beside_the_training_is_told_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(2, fail_beside, tmp_path)
    assert first == second
    assert "the save of step 2 failed: writing adapter/ failed on rank 1: OSError: [Errno 28]" in first[0]
    assert first[1] == ["latest", "step_00000001"], "what was begun is gone"
    assert first[2] == ["latest", "step_00000001", "step_00000003", "step_00000004"]


# ---- a failure on one rank is a failure on all, and no more than that


def full_fsync(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at(rank: int, root: Path, how: str) -> tuple[str, str, list[str]]:
    checkpoints, extras, real = Checkpoints(root), {}, os.fsync
    state = {"w": distribute_tensor(torch.arange(40_000.0), init_device_mesh("cpu", (2,)), [Shard(0)])}
    checkpoints.save(1, state, {"value": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def adapter(path: Path) -> None:
        if rank == 1:
            full_fsync(0)

    if how == "extras":
        extras = {"adapter": adapter}
    elif how == f"fsync on rank {rank}":
        os.fsync = full_fsync  # type: ignore[assignment]
    elif how == "limit" and rank == 1:  # a write the kernel itself cuts short: Python ignores the signal, write() fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointFailed) as error:
            checkpoints.save(2 + rank if how == "step" else 2, state, {"value": 2}, extras=extras)
    finally:
        os.fsync = real
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(path.name for path in root.iterdir())
    dist.barrier()
    found, weight = checkpoints.find("auto"), state["w"] * 0
    assert found is not None
    assert isinstance(weight, DTensor)
    found.load({"w": weight})
    assert torch.equal(weight.full_tensor(), torch.arange(40_000.0))
    assert found.document == {"value": 1}
    after = checkpoints.save(3, state, {"value": 3})  # the training goes on
    return str(error.value), after.name, left


@pytest.mark.parametrize(
    "how, told",
    [
        ("fsync on rank 1", r"writing state/ failed on rank 1: OSError: \[Errno 28\] No space left on device"),
        ("fsync on rank 0", r"rank 0: OSError: \[Errno 28\] No space left on device"),
        ("limit", r"writing state/ failed on rank 1: OSError: \[Errno 27\] File too large"),
        ("extras", r"writing adapter/ failed on rank 1: OSError: \[Errno 28\] No space left on device"),
        ("step", r"agreeing on step and extras failed on rank 0: \[2, \[\]\]; rank 1: \[3, \[\]\]"),
    ],
)
def test_a_failed_write_on_one_rank_fails_the_save_on_all(pool: Pool, tmp_path: Path, how: str, told: str) -> None:
    first, second = pool.run(2, fail_at, tmp_path, how)
    assert re.sub(r"step \d", "", first[0]) == re.sub(r"step \d", "", second[0]), "the same error on every rank"
    text, after, left = first
    assert re.search(told, text), text
    assert "training may go on" in text
    assert left == ["latest", "step_00000001"], "what was begun is gone"
    assert after == "step_00000003"


def roots_of_their_own(rank: int, base: Path) -> str:
    checkpoint._SEEN_WITHIN_S, before = 0.2, checkpoint._SEEN_WITHIN_S
    try:
        with pytest.raises(CheckpointFailed) as error:
            Checkpoints(base / "node").save(1, {"a": torch.ones(2)}, {}) if rank == 0 else _blind(base)
    finally:
        checkpoint._SEEN_WITHIN_S = before
    return str(error.value)


def _blind(base: Path) -> None:
    """A rank whose disk is another one: rank 0's directory is not on it."""
    real = Path.is_dir
    Path.is_dir = lambda self: False if ".tmp_step" in str(self) else real(self)  # type: ignore[method-assign,assignment]
    try:
        Checkpoints(base / "node").save(1, {"a": torch.ones(2)}, {})
    finally:
        Path.is_dir = real  # type: ignore[method-assign]


def test_nodes_without_a_common_file_system_are_told_so(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(2, roots_of_their_own, tmp_path)
    assert first == second
    assert "rank 1" in first
    assert "must be on a file system that all nodes share" in first
    assert list((tmp_path / "node").iterdir()) == []


def test_a_pointer_that_cannot_be_synced_keeps_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "latest", "step_00000001")
    monkeypatch.setattr(os, "fsync", full_fsync)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "latest", "step_00000002")
    assert (tmp_path / "latest").read_text() == "step_00000001"


def test_a_document_that_is_no_json_fails_the_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFailed, match="not JSON serializable"):
        Checkpoints(tmp_path).save(1, small(), {"x": object()})
    assert list(tmp_path.iterdir()) == []


# ---- damage is seen


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def two(root: Path) -> Path:
    for step in (1, 2):
        path = Checkpoints(root).save(step, small(step), {"value": step})
    return path


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the tensors": lambda p: flip(next((p / "state").iterdir()), -1),
    "a bit of the header": lambda p: flip(next((p / "state").iterdir()), 12),
    "a bit of the document": lambda p: flip(p / "trainer.json", 30),
    "tensors cut short": lambda p: os.truncate(next((p / "state").iterdir()), 100),
    "tensors missing": lambda p: next((p / "state").iterdir()).unlink(),
    "document missing": lambda p: (p / "trainer.json").unlink(),
    "COMPLETE missing": lambda p: (p / "COMPLETE").unlink(),
    "COMPLETE empty": lambda p: (p / "COMPLETE").write_text(""),
    "COMPLETE no object": lambda p: (p / "COMPLETE").write_text("[]"),
    "a stray shard": lambda p: save_file({"a": torch.zeros(2, 3)}, p / "state" / "other.safetensors"),
    "everything": lambda p: [os.truncate(file, 0) for file in p.rglob("*") if file.is_file()],  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name_and_stepped_over_by_auto(tmp_path: Path, damage: str) -> None:
    path = two(tmp_path)
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError, match="step_00000002"):
        Checkpoints(tmp_path).find(str(path))
    with pytest.warns(RuntimeWarning, match="step_00000002"):
        found = Checkpoints(tmp_path).find("auto")
    assert found is not None
    assert (found.step, found.document) == (1, {"value": 1})
    DAMAGE[damage](tmp_path / "step_00000001")
    for choice in ("auto", "must", str(tmp_path)):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
            Checkpoints(tmp_path).find(choice)
    assert Checkpoints(tmp_path).find("never") is None


def test_every_bit_of_the_list_of_hashes_counts(tmp_path: Path) -> None:
    path = two(tmp_path)
    good = (path / "COMPLETE").read_bytes()
    for at in range(len(good)):
        flip(path / "COMPLETE", at)
        with pytest.raises(CheckpointError):
            Checkpoints(tmp_path).find(str(path))
        (path / "COMPLETE").write_bytes(good)
    assert Checkpoints(tmp_path).find(str(path)) is not None


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "state/../../outside.txt", "..\\outside.txt", ""])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    path = two(tmp_path)
    (tmp_path / "outside.txt").write_text("x")
    listed = json.loads((path / "COMPLETE").read_text())
    listed["files"] = {name: listed["files"]["trainer.json"]} | listed["files"]
    (path / "COMPLETE").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="expected a path inside"):
        Checkpoints(tmp_path).find(str(path))


@pytest.mark.parametrize("text", ["../elsewhere", "step_2", "/step_00000002", "step_00000002/..", "", "step_00000002x"])
def test_a_pointer_holds_the_name_of_a_step_and_nothing_else(tmp_path: Path, text: str) -> None:
    two(tmp_path)
    (tmp_path / "latest").write_text(text)
    with pytest.warns(RuntimeWarning, match="expected a name like step_00000200"):
        found = Checkpoints(tmp_path).find("auto")
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("file", ["COMPLETE", "trainer.json"])
def test_an_unknown_version_is_refused(tmp_path: Path, file: str) -> None:
    path = two(tmp_path)
    (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | {"version": 2}))
    _relist(path)
    with pytest.raises(CheckpointError, match="has version 2; this d9d_lora reads version 1"):
        Checkpoints(tmp_path).find(str(path))


def _relist(path: Path) -> None:
    """Make COMPLETE agree with the files again, as a forger or a careless script would."""
    listed = json.loads((path / "COMPLETE").read_text())
    files = {name: entry for name, entry in digest(path).items() if name != "COMPLETE"}
    (path / "COMPLETE").write_text(json.dumps(listed | {"files": files}))


def test_a_hole_in_a_tensor_is_seen_even_when_the_hashes_agree(pool: Pool, tmp_path: Path) -> None:
    pool.run(4, save_on, "fsdp4", tmp_path)
    path = tmp_path / "step_00000003"
    file = sorted((path / "state").iterdir())[1]
    with safe_open(file, "pt") as opened:
        parts, offsets = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    del parts["model.odd.weight"]
    save_file(parts, file, offsets)
    _relist(path)
    found, state = Checkpoints(tmp_path).find("must"), blank(job("one"))
    assert found is not None
    with pytest.raises(
        CheckpointError, match=r"model\.odd\.weight: the shards in state/ make 25 elements of float32\[7, 5\]"
    ):
        found.load(state)
    assert all(torch.equal(t, torch.full_like(t, -3)) for t in state.values())


def test_no_file_is_read_by_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two(tmp_path)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json", ""}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    (path / "state" / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # what DCP's own format would read
    found, state = Checkpoints(tmp_path).find("must"), small(0)
    assert found is not None
    found.load(state)
    assert torch.equal(state["a"], torch.full((2, 3), 2.0))


# ---- which one, and how many


def test_choices(tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert Checkpoints(root).find("auto") is None
    assert Checkpoints(root).find("never") is None
    for choice in ("must", str(root), str(root / "step_00000001")):
        with pytest.raises(CheckpointError, match=r"there is no checkpoint|is missing"):
            Checkpoints(root).find(choice)
    two(root)
    for choice, step in {"auto": 2, "must": 2, str(root): 2, str(root / "step_00000001"): 1}.items():
        found = Checkpoints(root if choice in ("auto", "must") else tmp_path).find(choice)
        assert found is not None
        assert found.step == step
    (root / "latest").unlink()  # killed before the first `latest` was written
    found = Checkpoints(root).find("auto")
    assert found is not None
    assert found.step == 2


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.iterdir() if path.name.startswith("step_"))


def test_retention_keeps_the_last_ones_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        checkpoints.save(step, small(step), {}, best=step == 2)
    assert steps(tmp_path) == [2, 5, 6]
    assert (tmp_path / "best").read_text() == "step_00000002"
    checkpoints.save(7, small(7), {}, best=True)
    assert steps(tmp_path) == [6, 7], "the former best is an ordinary one"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_retention_after_winding_back_leaves_the_later_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 15, 16):
        checkpoints.save(step, small(step), {})
    assert steps(tmp_path) == [15, 16, 20, 30]
    found = checkpoints.find("auto")
    assert found is not None
    assert found.step == 16


def test_a_damaged_best_stops_the_deleting_and_not_the_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, small(1), {}, best=True)
    (tmp_path / "best").write_text("?")
    with pytest.warns(RuntimeWarning, match="could not be deleted"):
        checkpoints.save(2, small(2), {})
    assert steps(tmp_path) == [1, 2]


def test_the_same_step_is_replaced_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1) | {"old": torch.ones(3)}, {"value": "old"})
    checkpoints.save(1, small(5), {"value": "new"})
    found, state = checkpoints.find("must"), small(0)
    assert found is not None
    found.load(state)
    assert found.document == {"value": "new"}
    assert torch.equal(state["a"], torch.full((2, 3), 5.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


@pytest.mark.parametrize("step", [-1, 100_000_000])
def test_a_step_without_a_name_is_refused(tmp_path: Path, step: int) -> None:
    with pytest.raises(CheckpointFailed, match="expected a step from 0 to 99999999"):
        Checkpoints(tmp_path).save(step, small(), {})


@pytest.mark.parametrize("name", ["state", "../up", "COMPLETE", ".hidden", "a/b", ""])
def test_an_extra_needs_a_plain_name_of_its_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointFailed, match="expected plain names of their own"):
        Checkpoints(tmp_path).save(1, small(), {}, extras={name: lambda path: None})


def test_extras_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    def adapter(path: Path) -> None:
        (path / "adapter_config.json").write_text("{}")

    path = Checkpoints(tmp_path).save(1, small(), {}, extras={"adapter": adapter})
    assert Checkpoints(tmp_path).find("must") is not None
    (path / "adapter" / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter/adapter_config\.json has SHA-256"):
        Checkpoints(tmp_path).find(str(path))


def test_thousands_of_names_take_seconds(tmp_path: Path) -> None:
    many = {f"layer.{i}.lora_A.weight": torch.full((2,), float(i)) for i in range(3_000)}
    begun = time.perf_counter()
    Checkpoints(tmp_path).save(1, many, {})
    found, state = Checkpoints(tmp_path).find("must"), {name: torch.zeros(2) for name in many}
    assert found is not None
    found.load(state)
    assert all(torch.equal(state[name], many[name]) for name in many)
    assert time.perf_counter() - begun < 60
