"""Who is told how a run goes: the terminal, TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

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


class Tracker(Protocol):
    """Listens to a run; tells it nothing."""

    def start(self, steps: int, done: int) -> None:
        """The run has ``steps`` optimiser steps, ``done`` of them behind it."""

    def step(self, images: int) -> None:
        """A step on so many images is done."""

    def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """An epoch is done; see ``metrics.jsonl`` and ``timing.jsonl``."""

    def warn(self, sentence: str) -> None:
        """Something the user should know."""

    def close(self) -> None:
        """The run ended, well or not."""


class TerminalTracker:
    """A progress bar with images a second and time left, and one line an epoch."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.title = title
        self._images = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
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
        self.task = self.progress.add_task(self.title, total=steps, completed=done, rate="")
        self.progress.start()

    def step(self, images: int) -> None:
        """Advance the bar."""
        speed = self.progress.tasks[0].speed
        rate = f"{speed * images:,.0f} images/s" if speed else ""
        self.progress.update(self.task, advance=1, rate=rate)

    def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """Print the epoch's line."""
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

    def warn(self, sentence: str) -> None:
        """Print the sentence."""
        self.console.print(
            f"[yellow]warning:[/] {escape(sentence)}", highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Take the bar away."""
        self.progress.stop()


class TensorBoardTracker:
    """Scalars by epoch for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def start(self, steps: int, done: int) -> None:
        """Nothing to do before the first epoch."""

    def step(self, images: int) -> None:
        """Scalars are written by epoch."""

    def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """Write the epoch's numbers."""
        for group in ("train", "validation"):
            for name, value in (record.get(group) or {}).items():
                self.writer.add_scalar(f"{group}/{name}", value, record["epoch"])
        rate = record["learning_rate"]
        self.writer.add_scalar("train/learning_rate", rate, record["epoch"])
        speed = timing["images_per_second"]
        self.writer.add_scalar("train/images_per_second", speed, record["epoch"])

    def warn(self, sentence: str) -> None:
        """Keep the sentence with the run."""
        self.writer.add_text("warning", sentence)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


def tensorboard_tracker(folder: Path) -> list[Tracker]:
    """A TensorBoard tracker when TensorBoard is installed, else none."""
    try:
        return [TensorBoardTracker(folder)]
    except ImportError:
        return []
