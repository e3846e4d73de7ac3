"""The terminal: what is said, and how far something came."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import TaskID

# Of several processes that train together only the first one speaks.
SEVERAL = os.environ.get("WORLD_SIZE", "1") != "1"
QUIET = SEVERAL and os.environ.get("RANK", "0") != "0"
# Written to a file or a pipe, a table keeps its rows whole.
out = Console(quiet=QUIET) if sys.stdout.isatty() else Console(width=160, quiet=QUIET)
err = Console(stderr=True, quiet=QUIET)


@contextmanager
def show_progress() -> Iterator[Any]:
    """A bar an attack on a terminal, a line an attack elsewhere."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    bars: dict[str, TaskID] = {}
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:

        def tell(name: str, done: int, count: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=count)
            progress.update(bars[name], completed=done)
            if done >= count and not err.is_terminal:
                err.print(f"{name}: done on {count} images", highlight=False, markup=False)

        yield tell
