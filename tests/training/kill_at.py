"""Run a training that ends itself at a chosen moment: ``python kill_at.py MOMENT RUN``.

What a power cut would do, at a place that a test can name.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cure.errors import CureError
from cure.runs.folder import RunFolder
from cure.training import run as api
from cure.training import trainer
from cure.utils import engine, io

SETTINGS = [
    "data.limit=400",
    "data.validation=100",
    "natural.epochs=2",
    "training.epochs=3",
    "training.threads=1",
    "training.checkpoint_every=3",
    "training.averaging.decay=0.9",
    "attack.steps=3",
    "method.revision.horizon=0.8",
]


def after(
    calls: int, function: Callable[..., Any], how: int = signal.SIGKILL, late: bool = False
) -> Callable[..., Any]:
    """``function``, which sends this process ``how`` at its call number ``calls``."""
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls and not late:
            os.kill(os.getpid(), how)
        result = function(*arguments, **options)
        if count == calls and late:
            os.kill(os.getpid(), how)
        return result

    return counted


def half_written(calls: int) -> Callable[[Path, bytes], int]:
    """``Path.write_bytes`` that is cut off in the middle of its call number ``calls``."""
    count = 0
    whole = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        nonlocal count
        count += 1
        if count == calls:
            whole(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, content)

    return write


def plant(moment: str) -> None:
    """Arrange the end.  Natural training has 8 steps (4 an epoch), CURE 12."""
    step, gradients = trainer.Trainer.train_step, engine.Engine.gradients
    if moment == "natural":
        trainer.Trainer.train_step = after(6, step)
    elif moment == "between-steps":
        trainer.Trainer.train_step = after(8 + 6, step)
    elif moment == "inside-a-step":
        engine.Engine.gradients = after(8 + 3 * 5 + 2, gradients)
    elif moment == "writing-weights":
        # Each epoch writes best, last and state, and step 3 of each epoch a state.
        Path.write_bytes = half_written(12)
    elif moment == "renaming":
        io.os.replace = after(26, os.replace)
    elif moment == "making-the-natural-folder":
        Path.rename = after(2, Path.rename)
    elif moment == "after-metrics":
        RunFolder.append = after(2 * 2 + 2 * 1 + 1, RunFolder.append, late=True)
    elif moment == "ctrl-c-in-natural":
        trainer.Trainer.train_step = after(3, step, signal.SIGINT)
    elif moment == "ctrl-c":
        trainer.Trainer.train_step = after(8 + 6, step, signal.SIGINT)
    else:
        raise ValueError(moment)


if __name__ == "__main__":
    plant(sys.argv[1])
    try:
        api.train("digits", SETTINGS, run=sys.argv[2], quiet=True)
    except CureError as stopped:
        sys.exit(str(stopped))
