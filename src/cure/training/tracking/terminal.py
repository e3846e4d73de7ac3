"""The terminal, which every run that is not quiet tells how it goes."""

from __future__ import annotations

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

    def say(self, sentence: str) -> None:
        """Print the line."""
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print the sentence."""
        self.console.print(
            f"[yellow]warning:[/] {escape(sentence)}", highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Take the bar away."""
        self.progress.stop()
