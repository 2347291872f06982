"""What the pool's fork server imports once, so that a worker starts in milliseconds; the collector of a worker never looks at it again."""

import gc
import importlib.util

import pytest  # noqa: F401
import torch
import torch._dynamo  # the first checkpoint, compiled block or operator of one's own imports it
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

if importlib.util.find_spec("transformers"):
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tests.small_run

import tests.catalogue  # noqa: F401
from tests.pool import caches_of_torch

CACHES = caches_of_torch()  # frozen with the rest: no walk finds them again
gc.collect()
gc.freeze()
