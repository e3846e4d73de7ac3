"""The real timm beside a PyTorch whose torchvision is missing or does not import."""

from __future__ import annotations

import enum
import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
from torch import nn

MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)
INTERPOLATION = enum.Enum(
    "INTERPOLATION",
    ["NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"],
)


def _empty(name: str) -> Any:
    """A class that timm imports and its networks do not use."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (nn.Module,), {})


def stand_in() -> dict[str, types.ModuleType]:
    """torchvision without content."""
    made = {}
    for name in MODULES:
        module = made[name] = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__getattr__ = _empty  # type: ignore[method-assign]
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, module)
    made[MODULES[-1]].InterpolationMode = INTERPOLATION  # type: ignore[attr-defined]
    return made


@pytest.fixture(scope="session")
def timm() -> Any:
    """The real timm; torchvision is put in its place for the import alone."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    try:
        importlib.import_module("torchvision")
        return importlib.import_module("timm")
    except Exception:
        pass
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]
    made = stand_in()
    sys.modules.update(made)
    try:
        importlib.import_module("timm.task")
        importlib.import_module("timm.optim")
        return importlib.import_module("timm")
    finally:
        for name in made:
            del sys.modules[name]
