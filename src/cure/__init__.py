"""CURE: make an image classifier withstand adversarial changes and keep its natural accuracy.

>>> import cure
>>> run = cure.train("digits", quiet=True)                          # doctest: +SKIP
>>> cure.evaluate(run, attacks=["pgd20"])["natural"]["accuracy"]    # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cure.api import evaluate, resume, train, verify
    from cure.comparison import compare
    from cure.corruption.measure import corruptions
    from cure.data import ImageSet
    from cure.diagnosis.verb import diagnose
    from cure.errors import CureError
    from cure.recipe import load_recipe
    from cure.report.page import write_report
    from cure.subject import Run

__all__ = [
    "CureError",
    "ImageSet",
    "Run",
    "compare",
    "corruptions",
    "diagnose",
    "evaluate",
    "load_recipe",
    "resume",
    "train",
    "verify",
    "write_report",
]

_HOMES = {
    "CureError": "cure.errors",
    "ImageSet": "cure.data",
    "Run": "cure.subject",
    "compare": "cure.comparison",
    "corruptions": "cure.corruption.measure",
    "diagnose": "cure.diagnosis.verb",
    "evaluate": "cure.api",
    "load_recipe": "cure.recipe",
    "resume": "cure.api",
    "train": "cure.api",
    "verify": "cure.api",
    "write_report": "cure.report.page",
}


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `cure --help` and `import cure.errors` do not need it.
    if name not in _HOMES:
        raise AttributeError(f"module 'cure' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
