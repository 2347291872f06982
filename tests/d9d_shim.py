"""d9d's Trainer on a CPU: it names CUDA in its loop, its meshes and its metrics. For tests; nothing of it is about adapters."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


class CudaMeansCpu(TorchFunctionMode):
    """Every operator that is told a CUDA device is told "cpu"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_cpu, args), **{key: _cpu(value) for key, value in (kwargs or {}).items()})


def _cpu(value: Any) -> Any:
    named = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if named else value


def _wait(context: Any) -> None:
    if context.mesh_params.is_distributed:
        dist.barrier()


@contextlib.contextmanager
def cpu() -> Iterator[None]:
    """Inside, d9d builds and trains on a CPU with gloo. Streams and events are empty: a CPU does one thing after the other."""
    from d9d.core.dist_context import DistributedContext, device_mesh_domains
    from d9d.loop.component import garbage_collector, model_stage_factory

    build, load = device_mesh_domains.init_device_mesh, model_stage_factory.load_model_state
    nothing = {name: mock.MagicMock() for name in ("set_device", "synchronize", "empty_cache", "Stream", "Event", "current_stream")}
    with contextlib.ExitStack() as stack:
        patch = [
            mock.patch.multiple(torch.cuda, device_count=lambda: 1, current_device=lambda: 0, stream=contextlib.nullcontext, **nothing),
            mock.patch.object(device_mesh_domains, "init_device_mesh", lambda device_type, **kwargs: build("cpu", **kwargs)),
            mock.patch.object(model_stage_factory, "load_model_state", lambda device, **kwargs: load(device="cpu", **kwargs)),
            mock.patch.object(DistributedContext, "current_device", torch.device("cpu")),
            mock.patch.object(DistributedContext, "set_timeout", return_value=None),  # torch 2.13 has no such call
            mock.patch.object(garbage_collector.ManualGarbageCollector, "_collect", return_value=None),  # a second a time
            mock.patch.object(DistributedContext, "wait_world", _wait),
            CudaMeansCpu(),
        ]
        for one in patch:
            stack.enter_context(one)
        yield
