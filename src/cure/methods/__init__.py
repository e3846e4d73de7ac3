"""Training methods, one file each; a file that registers a method is all it takes to add one.

Each class works in a training loop of one's own, see :class:`Method`, and by a recipe under its
registered name (``cure list methods``).
"""

from cure.methods.act import ACT
from cure.methods.ard import ARD
from cure.methods.at import AT
from cure.methods.base import METHODS, Method
from cure.methods.context import Context
from cure.methods.cure import CURE
from cure.methods.fat import FAT
from cure.methods.hat import HAT
from cure.methods.iad import IAD
from cure.methods.kd import KD
from cure.methods.las_at import LASAT
from cure.methods.mart import MART
from cure.methods.natural import Natural
from cure.methods.st_at import STAT
from cure.methods.step import AdversarialBatch, Masking, Metrics, Step, StepOutput
from cure.methods.trades import TRADES
from cure.methods.wrappers.averaging import Averaging
from cure.methods.wrappers.awp import AWP

__all__ = [
    "ACT",
    "ARD",
    "AT",
    "AWP",
    "CURE",
    "FAT",
    "HAT",
    "IAD",
    "KD",
    "LASAT",
    "MART",
    "METHODS",
    "STAT",
    "TRADES",
    "AdversarialBatch",
    "Averaging",
    "Context",
    "Masking",
    "Method",
    "Metrics",
    "Natural",
    "Step",
    "StepOutput",
]
