"""Context parallelism: several ranks hold different tokens of the same rows."""

from d9d_lora.context.model import ContextParallel, Split

__all__ = ["ContextParallel", "Split"]
