"""The launcher as users start it: torchrun, kills, two nodes, signals, faults on the command line. Real processes, few of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d9d_lora.train.report import read_metrics
from tests.small_run import make_assets

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


def arguments(assets: Path, output: Path, *more: str, steps: int = 8) -> list[str]:
    return [
        f"model.path={assets}/model",
        "model.dtype=float32",
        f"data.path={assets}/data.jsonl",
        "data.batch_size=4",
        "data.seq_len=64",
        "peft.params.r=4",
        "peft.params.dropout=0.1",
        f"train.steps={steps}",
        "train.device=cpu",
        "train.timeout_s=30",
        "tracker.tensorboard=false",
        "tracker.plot=false",
        "checkpoint.every=2",
        f"output_dir={output}",
        *more,
    ]


def launch(ranks: int, args: list[str], script: str = "launch/train.py", wait: bool = True, options: tuple[str, ...] = ()):
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", *(options or ("--standalone",)), script, *args]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return finish(process) if wait else process


def finish(process, timeout: float = 120) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{out}") from None
    return process.returncode, out


def losses(output: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def whole(assets, tmp_path_factory):
    """An uninterrupted run of two FSDP2 ranks."""
    output = tmp_path_factory.mktemp("whole") / "run"
    code, out = launch(2, arguments(assets, output))
    assert code == 0, out
    return output, out


def test_a_run_leaves_what_it_promises(whole):
    output, out = whole
    assert "What will be trained" in out
    assert "read back and equal to the live model" in out
    for name in ("config.resolved.yaml", "metrics.jsonl", "census.json", "adapter/adapter_model.safetensors", "checkpoints/latest"):
        assert (output / name).exists(), name
    assert not list(ROOT.glob("multirun"))
    assert not (ROOT / ".hydra").exists()
    assert not (output / ".hydra").exists()


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_kill_nine_in_training_then_the_same_command(assets, whole, tmp_path):
    output = tmp_path / "run"
    process = launch(2, arguments(assets, output, steps=8), "tests/slow_train.py", wait=False)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not ((output / "metrics.jsonl").exists() and len(losses(output)) >= 5):
        time.sleep(0.05)
    workers = [p for p in descendants(process.pid) if b"slow_train" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(max(workers), signal.SIGKILL)
    code, _ = finish(process)
    assert code != 0
    assert 5 <= len(losses(output)) < 8
    code, out = launch(2, arguments(assets, output))
    assert code == 0, out
    assert "resumed from" in out
    assert losses(output) == losses(whole[0])
    same(output, whole[0])


def test_kill_nine_in_the_middle_of_a_save_then_the_same_command(assets, whole, tmp_path):
    output = tmp_path / "run"
    code, _ = launch(2, arguments(assets, output), "tests/die_in_save.py")
    assert code != 0
    assert (output / "checkpoints" / "latest").read_text().strip() == "step_00000002"
    assert list((output / "checkpoints").glob(".tmp_*")), "the kill was meant to leave a half-written directory"
    code, out = launch(2, arguments(assets, output))
    assert code == 0, out
    assert "at step 2" in out
    assert losses(output) == losses(whole[0])
    same(output, whole[0])
    assert not list((output / "checkpoints").glob(".tmp_*"))


def same(one: Path, other: Path) -> None:
    name = "adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_told_to_stop_it_saves_and_the_same_command_resumes(assets, whole, tmp_path):
    output = tmp_path / "run"
    process = launch(2, arguments(assets, output), "tests/slow_train.py", wait=False)
    while not ((output / "metrics.jsonl").exists() and len(losses(output)) >= 3):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code != 0
    assert "told to stop: saved at step" in out, out
    code, out = launch(2, arguments(assets, output))
    assert code == 0, out
    assert losses(output) == losses(whole[0])


def test_one_process_without_torchrun_has_the_exit_code_of_a_requeue(assets, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "tests/slow_train.py", *arguments(assets, output)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not ((output / "metrics.jsonl").exists() and len(losses(output)) >= 3):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 75


def test_two_nodes_by_rendezvous(assets, whole, tmp_path):
    output = tmp_path / "run"
    port = 29000 + os.getpid() % 2000
    nodes = []
    for node in range(2):
        options = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run", "--local-addr=127.0.0.1")
        options += (f"--rdzv-conf=is_host={int(node == 0)}",)
        nodes.append(launch(1, arguments(assets, output), wait=False, options=options))
    for process in nodes:
        code, out = finish(process)
        assert code == 0, out
    assert losses(output) == losses(whole[0])


@pytest.mark.parametrize(
    "changes,told",
    [
        (["+peft.params.alhpa=3"], "peft.params.alhpa: no such field; did you mean 'alpha'?"),
        (["peft.target_modules=[q_porj]"], "near misses: q_proj"),
        (["parallel.tp=3"], "does not make the 1 processes"),
        (["model.path=/nowhere"], "no such directory"),
        (["data.batch_size=3", "data.micro_batch_size=2"], "must be divisible"),
    ],
)
def test_faults_are_told_in_a_sentence(assets, tmp_path, changes, told):
    command = [sys.executable, "launch/train.py", *arguments(assets, tmp_path / "run"), *changes]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()


def test_resolved_config_is_what_ran(whole):
    import yaml

    resolved = yaml.safe_load((whole[0] / "config.resolved.yaml").read_text())
    assert resolved["peft"]["params"]["r"] == 4
    assert json.loads((whole[0] / "census.json").read_text())["rows"][0]["method"].startswith("lora r=4")
