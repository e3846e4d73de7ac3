"""Progress of a run in the terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cure.methods import Metrics
from cure.utils import memory

SHOWN_EVERY = 10
"""Steps between two readings of loss and accuracies, each of which waits for the device."""

TIMED = 4
"""Steps from whose times the length of the run is estimated."""


def duration(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3 h 20 min".

    >>> duration(40), duration(750), duration(12000)
    ('40 s', '12 min', '3 h 20 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _figures(metrics: Metrics) -> str:
    """Loss and accuracies of the training batch."""
    shown = {"loss": "loss", "accuracy": "natural", "robust_accuracy": "attacked"}
    parts = []
    for name, word in shown.items():
        if name in metrics:
            value = float(metrics[name])
            parts.append(f"{word} {value:.2f}" if name == "loss" else f"{word} {100 * value:.0f} %")
    return "  ".join(parts)


class TerminalTracker:
    """A progress bar with images a second and time left, and one line an epoch."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.title = title
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )

    def start(self, steps: int, done: int) -> None:
        """Show the bar."""
        self.task = self.progress.add_task(
            self.title, total=steps, completed=done, rate="", figures=""
        )
        self.progress.start()
        self._times: list[float] = []

    def step(self, images: int, metrics: Metrics) -> None:
        """Advance the bar; after a few steps, print how long the run will take."""
        speed = self.progress.tasks[0].speed
        rate = f"{speed * images:,.0f} images/s" if speed else ""
        self.progress.update(self.task, advance=1, rate=rate)
        task = self.progress.tasks[0]
        if self.console.is_terminal and task.completed % SHOWN_EVERY == 1:
            self.progress.update(self.task, figures=_figures(metrics))
        if len(self._times) < TIMED:
            self._times.append(time.perf_counter())
            if len(self._times) == TIMED and task.total is not None:
                self._estimate(task.total - task.completed)

    def _estimate(self, left: float) -> None:
        """Time and memory, from the steps so far; the first, which is slower, is left out."""
        each = (self._times[-1] - self._times[0]) / (TIMED - 1)
        self.say(
            f"{self.title}: {left:,.0f} steps left, about {duration(each * left)} without "
            f"validation; memory so far {memory.peak() / 1024:.1f} GB"
        )

    def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """Print the epoch's line; set the bar, as a run may have gone back meanwhile."""
        self.progress.update(self.task, completed=record["step"])
        parts = [
            f"{self.title} epoch {record['epoch']}/{record['epochs']}",
            f"loss {record['train']['loss']:.3f}",
        ]
        if record.get("validation"):
            parts += [
                f"validation natural {record['validation']['natural']:.1f} %",
                f"robust {record['validation']['robust']:.1f} %",
            ]
        parts.append(f"{timing['images_per_second']:,.0f} images/s")
        self.console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)

    def say(self, sentence: str) -> None:
        """Print the line."""
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print the sentence."""
        self.console.print(
            f"[yellow]warning:[/] {escape(sentence)}", highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Remove the bar."""
        self.progress.stop()
