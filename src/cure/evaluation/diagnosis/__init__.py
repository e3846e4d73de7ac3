"""Whether an accuracy under attack can be believed: a table of checks, and who runs them.

``table.py`` says how a check judges, ``examination.py`` holds what checks share; the checks are
``behaviour.py`` (no attack) and ``strength.py`` (attacks).  ``verb.py`` is :func:`cure.diagnose`,
which stands above the rest of the package in the order of imports.
"""

# Imported for the checks that they register, in this order.
from cure.evaluation.diagnosis import attack_checks, model_checks  # noqa: F401
from cure.evaluation.diagnosis.context import Examination
from cure.evaluation.diagnosis.report import cheap_checks, examine
from cure.evaluation.diagnosis.table import CHECKS, Finding

__all__ = ["CHECKS", "Examination", "Finding", "cheap_checks", "examine"]
