"""Training methods, one file each; a file that registers a method is all it takes to add one."""

from cure.methods.base import (
    METHODS,
    AdversarialBatch,
    Context,
    Masking,
    Method,
    Metrics,
    StepOutput,
)

__all__ = ["METHODS", "AdversarialBatch", "Context", "Masking", "Method", "Metrics", "StepOutput"]
