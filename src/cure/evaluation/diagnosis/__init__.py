"""Whether an accuracy under attack can be believed: a table of checks, and what runs them.

``table.py`` defines a check and its status, ``context.py`` what checks share; the checks are in
``model_checks.py`` (no attack) and ``attack_checks.py`` (attacks).  ``api.py`` is
:func:`cure.diagnose`.
"""

# Imported for the checks that they register, in the order in which they run.
from cure.evaluation.diagnosis import model_checks  # noqa: F401

# isort: split
from cure.evaluation.diagnosis import attack_checks  # noqa: F401
from cure.evaluation.diagnosis.context import CheckContext
from cure.evaluation.diagnosis.report import cheap_checks, run_checks
from cure.evaluation.diagnosis.table import CHECKS, Finding

__all__ = ["CHECKS", "CheckContext", "Finding", "cheap_checks", "run_checks"]
