"""Experiment trackers, one file each: the terminal, and those that ``tracking`` names."""

from cure.training.tracking.base import TRACKERS, Tracker, check_trackers, trackers_of
from cure.training.tracking.terminal import TerminalTracker

__all__ = ["TRACKERS", "TerminalTracker", "Tracker", "check_trackers", "trackers_of"]
