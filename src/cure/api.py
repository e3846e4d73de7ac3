"""Every public name and the module that holds it.

``import cure`` loads none of these modules: PyTorch takes seconds to import.  :func:`load` imports
one when its name is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "CureError": "cure.errors",
    "ImageSet": "cure.data",
    "Run": "cure.runs.run",
    "Threat": "cure.attacks.threat",
    "compare": "cure.experiments.compare",
    "corruptions": "cure.evaluation.corruptions.measure",
    "diagnose": "cure.evaluation.diagnosis.api",
    "evaluate": "cure.evaluation.evaluate",
    "evaluate_in_shards": "cure.experiments.sharded",
    "export": "cure.exporters.export",
    "from_pretrained": "cure.models.artefact",
    "front": "cure.experiments.front",
    "load_recipe": "cure.recipe",
    "recommend": "cure.experiments.recommend",
    "resume": "cure.training.run",
    "tradeoff": "cure.experiments.tradeoff",
    "train": "cure.training.run",
    "verify": "cure.evaluation.verify",
    "write_report": "cure.report.page",
    "write_evidence": "cure.report.evidence",
}
"""Public name -> module."""

MODULES = {
    "attacks": "cure.attacks",
    "losses": "cure.methods.common.losses",
    "methods": "cure.methods",
}
"""Public name of a module -> the module itself."""


def load(name: str) -> Any:
    """The object behind a public name.

    Raises:
        AttributeError: when there is no such name.
    """
    if name in MODULES:
        return importlib.import_module(MODULES[name])
    if name not in HOMES:
        raise AttributeError(f"module 'cure' has no attribute '{name}'")
    return getattr(importlib.import_module(HOMES[name]), name)
