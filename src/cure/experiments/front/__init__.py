"""Fronts of methods: a few values of the setting that trades natural for robust accuracy.

A method compared at one value of such a setting is compared at one operating point.  Here each
method is trained with several values and seeds, through a plan (:mod:`cure.experiments.plan`), and
compared by what its points reach together: the hypervolume, and the natural accuracy at an equal
robust accuracy.
"""

from cure.experiments.front.curves import Curve, curves_of, plan_of, read_values
from cure.experiments.front.picture import lines
from cure.experiments.front.record import record_of
from cure.experiments.front.run import front

__all__ = ["Curve", "curves_of", "front", "lines", "plan_of", "read_values", "record_of"]
