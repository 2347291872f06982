"""One pool of worker processes for the whole run of a process of tests: starting Python and importing torch is what makes such suites slow.

`pool.run(world, fn, *args)` runs `fn(rank, *args)` on `world` gloo ranks and returns what each rank returned, in the
order of ranks. `fn` is a module-level function; arguments and results travel by pickle. A rank that raises, dies or
hangs fails the call, and the pool is replaced: its other ranks may be stuck in a collective.
"""

import functools
import gc
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_S = 180


class RankFailed(AssertionError):
    """One or more ranks of a job failed; the message holds their tracebacks."""


def _serve(pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        rank, world, init_file, fn, args = job
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
            dist.init_process_group(
                "gloo",
                init_method=f"file://{init_file}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=60),
            )
            torch.manual_seed(1000 + rank)  # ambient seeds differ on purpose: nothing may depend on them
            result = fn(rank, *args)
            dist.barrier()
            pipe.send(("ok", result))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_meshes()
            torch.set_default_dtype(torch.float32)


def caches_of_torch() -> list[Any]:
    """The `lru_cache`s of torch.distributed among the objects that the garbage collector walks over."""
    caches = (o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper)
    return [o for o in caches if getattr(o, "__module__", "").startswith("torch.distributed")]


def _forget_meshes() -> None:
    """Lets the process groups of a job go: while a cycle or a cache of DTensor's holds a mesh, the threads of its groups live on, and
    hundreds of them make the next jobs slow. Cheap, because what the fork server has imported is frozen: the collector walks over what
    jobs have left, not over 300,000 objects of libraries."""
    import torch
    from torch.distributed.tensor import _redistribute

    from tests.preload import CACHES

    _redistribute.clear_redistribute_planner_cache()
    torch._C._clear_DTensor_sharding_propagator_cache()
    for cache in [*CACHES, *caches_of_torch()]:
        cache.cache_clear()
    gc.collect()


class Pool:
    def __init__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preload"])
        self._workers: list[tuple[Any, Any]] = []
        self._scratch = tempfile.TemporaryDirectory()
        self._jobs = 0

    def _grow(self, world: int) -> None:
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """`[fn(0, *args), ..., fn(world - 1, *args)]`, each on its own rank of one gloo world."""
        self._grow(world)
        self._jobs += 1
        init_file = str(Path(self._scratch.name) / f"job{self._jobs}")
        for rank in range(world):
            self._workers[rank][1].send((rank, world, init_file, fn, args))
        results: list[Any] = [None] * world
        failures: dict[int, str] = {}
        waiting, deadline = set(range(world)), time.monotonic() + TIMEOUT_S
        while waiting:
            for rank in sorted(waiting):
                process, pipe = self._workers[rank]
                try:
                    if pipe.poll(0.001):
                        verdict, value = pipe.recv()
                        waiting.discard(rank)
                        if verdict == "ok":
                            results[rank] = value
                        else:
                            failures[rank] = value
                            deadline = min(deadline, time.monotonic() + 2)  # the others may hang: do not wait for them
                    elif not process.is_alive():
                        waiting.discard(rank)
                        failures[rank] = f"the process died with exit code {process.exitcode}"
                        deadline = min(deadline, time.monotonic() + 2)
                except EOFError:
                    waiting.discard(rank)
                    process.join(2)
                    failures[rank] = f"the process closed its pipe, exit code {process.exitcode}"
            if time.monotonic() > deadline:
                break
        if failures or waiting:
            self.close()
            late = [f"rank {rank}: no answer" for rank in sorted(waiting)]
            raise RankFailed("\n".join([f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())] + late))
        return results

    def close(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            pipe.close()
        for process, _ in self._workers:
            process.join()
        self._workers = []
