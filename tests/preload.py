"""What the pool's fork server imports once, so that a worker starts in milliseconds."""

import importlib.util

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

if importlib.util.find_spec("transformers"):
    import transformers  # noqa: F401

import d9d_lora  # noqa: F401
