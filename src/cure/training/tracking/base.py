"""The interface of a tracker, and the isolation of a run from trackers that fail."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from cure.config import RunConfig
from cure.errors import ConfigError
from cure.methods import Metrics
from cure.registry import TRACKERS as TRACKERS
from cure.runs.records import TrackingIds


class Tracker(Protocol):
    """Receives the progress of a run; cannot influence it."""

    def start(self, steps: int, done: int) -> None:
        """The run has ``steps`` optimiser steps, ``done`` of them behind it."""

    def step(self, images: int, metrics: Metrics) -> None:
        """A step on so many images is done; ``metrics`` are 0-dim tensors, to be read seldom."""

    def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """An epoch is done; see ``metrics.jsonl`` and ``timing.jsonl``."""

    def say(self, sentence: str) -> None:
        """A line about the run: its start, its end."""

    def warn(self, sentence: str) -> None:
        """Something the user should know."""

    def close(self) -> None:
        """The run ended, well or not."""


class EpochTracker:
    """A tracker of another project, which takes numbers by epoch.

    Registered in :data:`TRACKERS` under the name that a recipe says; the extra of the same name
    installs it.  Made when the run's training begins or goes on, on the first rank alone.

    Args:
        folder: the run's.
        config: the run.
    """

    module: ClassVar[str]
    """What must be importable for it."""
    complete = False
    """Whether every epoch is done."""

    @abstractmethod
    def __init__(self, folder: Path, config: RunConfig) -> None: ...

    def start(self, steps: int, done: int) -> None:
        """Keep whether only the last measurement is left."""
        self.complete = done == steps

    def step(self, images: int, metrics: Metrics) -> None:
        """Numbers go by epoch."""

    def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """Log the epoch's numbers."""
        self.log(record["epoch"], scalars(record, timing))
        self.complete = record["epoch"] == record["epochs"]

    @abstractmethod
    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of an epoch; those of an epoch that is done again are the same."""

    def say(self, sentence: str) -> None:
        """Trackers of other projects take numbers and warnings only."""

    @abstractmethod
    def warn(self, sentence: str) -> None:
        """Keep the sentence with the run."""

    @abstractmethod
    def close(self) -> None:
        """The run ended, well or not."""


def scalars(record: Mapping[str, Any], timing: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch by name: ``train/loss``, ``validation/robust``."""
    found = {
        f"{group}/{name}": float(value)
        for group in ("train", "validation")
        for name, value in (record.get(group) or {}).items()
    }
    return found | {
        "train/learning_rate": record["learning_rate"],
        "train/images_per_second": timing["images_per_second"],
    }


def check_trackers(names: Iterable[str]) -> None:
    """Refuse a tracker that is unknown or not installed.

    Raises:
        ConfigError: in one sentence.
    """
    for name in names:
        module = TRACKERS[name].module
        try:
            importlib.import_module(module)
        except ImportError:
            raise ConfigError(
                f"tracking: {name} is not installed: pip install 'cure-at[{name}]', or leave it out"
            ) from None


def trackers_of(folder: Path, config: RunConfig, tell: Callable[[str], None]) -> list[Tracker]:
    """The trackers that a run names; none of them can end it.

    Args:
        folder: the run's.
        config: the run.
        tell: told when a tracker fails and is left out from there on.
    """
    return [Isolated(name, folder, config, tell) for name in dict.fromkeys(config.tracking)]


class Isolated:
    """Wraps a tracker: after its first failure a warning is printed and it is not called again."""

    def __init__(
        self, name: str, folder: Path, config: RunConfig, tell: Callable[[str], None]
    ) -> None:
        self.name = name
        self.tell = tell
        self.inner: Tracker | None = None
        self._guard(lambda: self._begin(folder, config))

    def _begin(self, folder: Path, config: RunConfig) -> None:
        self.inner = TRACKERS[self.name](folder, config)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.inner = None
            said = " ".join(str(error).split()) or type(error).__name__
            self.tell(
                f"{self.name} failed ({said}); the run goes on without it, its numbers are in "
                "metrics.jsonl, and a resumed run tries again"
            )

    def start(self, steps: int, done: int) -> None:
        """See :class:`Tracker`."""
        if (inner := self.inner) is not None:
            self._guard(lambda: inner.start(steps, done))

    def step(self, images: int, metrics: Metrics) -> None:
        """See :class:`Tracker`."""
        if (inner := self.inner) is not None:
            self._guard(lambda: inner.step(images, metrics))

    def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """See :class:`Tracker`."""
        if (inner := self.inner) is not None:
            self._guard(lambda: inner.epoch(record, timing))

    def say(self, sentence: str) -> None:
        """See :class:`Tracker`."""
        if (inner := self.inner) is not None:
            self._guard(lambda: inner.say(sentence))

    def warn(self, sentence: str) -> None:
        """See :class:`Tracker`."""
        if (inner := self.inner) is not None:
            self._guard(lambda: inner.warn(sentence))

    def close(self) -> None:
        """See :class:`Tracker`."""
        if (inner := self.inner) is not None:
            self._guard(inner.close)


def known_identity(folder: Path, name: str) -> str | None:
    """The identity of this run at a tracker, from ``tracking.json``."""
    return TrackingIds.read(folder / "tracking.json").root.get(name)


def keep_identity(folder: Path, name: str, identity: str) -> None:
    """Store the identity of this run at a tracker, so that a resumed run continues there."""
    path = folder / "tracking.json"
    TrackingIds(TrackingIds.read(path).root | {name: identity}).write(path)
