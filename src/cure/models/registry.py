"""The table of architectures; a leaf module, so that every architecture can import it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cure.registry import MODELS as MODELS

Builder = Callable[..., nn.Module]
"""``builder(classes, channels, size, *, options...) -> network``; the options are keyword-only,
and their annotations are what :func:`cure.models.build_model` checks a recipe against."""
