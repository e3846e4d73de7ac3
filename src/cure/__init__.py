"""Make an image classifier withstand adversarial changes and keep its natural accuracy.

>>> import cure
>>> run = cure.train("digits", quiet=True)                          # doctest: +SKIP
>>> cure.evaluate(run, attacks=["pgd20"])["natural"]["accuracy"]    # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cure.api import HOMES, MODULES, load
from cure.utils.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from cure import attacks, methods
    from cure.attacks.threat import Threat
    from cure.data import ImageSet
    from cure.errors import CureError
    from cure.evaluation.corruptions.measure import corruptions
    from cure.evaluation.diagnosis.api import diagnose
    from cure.evaluation.evaluate import evaluate
    from cure.evaluation.verify import verify
    from cure.experiments.compare import compare
    from cure.experiments.front import front
    from cure.experiments.recommend import recommend
    from cure.experiments.sharded import evaluate_in_shards
    from cure.experiments.tradeoff import tradeoff
    from cure.exporters.export import export
    from cure.methods.common import losses
    from cure.models.artefact import from_pretrained
    from cure.recipe import load_recipe
    from cure.report.evidence import write_evidence
    from cure.report.page import write_report
    from cure.runs.run import Run
    from cure.training.run import resume, train

__all__ = [
    "CureError",
    "ImageSet",
    "Run",
    "Threat",
    "__version__",
    "attacks",
    "compare",
    "corruptions",
    "diagnose",
    "evaluate",
    "evaluate_in_shards",
    "export",
    "from_pretrained",
    "front",
    "load_recipe",
    "losses",
    "methods",
    "recommend",
    "resume",
    "tradeoff",
    "train",
    "verify",
    "write_evidence",
    "write_report",
]


def __getattr__(name: str) -> Any:
    return load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES, *MODULES})
