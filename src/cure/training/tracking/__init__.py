"""Who is told how a run goes: the terminal, and by ``tracking: [...]`` others, one file each."""

from cure.training.tracking.base import TRACKERS, Tracker, check_trackers, trackers_of
from cure.training.tracking.terminal import TerminalTracker

__all__ = ["TRACKERS", "TerminalTracker", "Tracker", "check_trackers", "trackers_of"]
