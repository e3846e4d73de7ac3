"""What the benchmarks share that train the runs of a plan: their arguments, and their course."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cure.errors import TrainingStopped
from cure.experiments.executors import LocalExecutor
from cure.experiments.plan import Plan
from cure.experiments.plan_work import carry_out_plan
from cure.utils.io import write_json

Write = Callable[[Plan, Path, Path], dict[str, Any]]
"""(plan, folder of the results, output): write what is done, and return it."""


def arguments(description: str, name: str, epochs: int) -> argparse.ArgumentParser:
    """The arguments of all of them.

    Args:
        description: docstring of the script; its first line is shown.
        name: of the script, for its folders.
        epochs: default of ``--epochs``.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of all runs")
    parser.add_argument("--recipe", default="cifar10-mini")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--natural-epochs", type=int, default=25)
    parser.add_argument("--limit", type=int, default=2000, help="test images")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs") / name)
    parser.add_argument("--output", type=Path, default=Path("results") / name / "cifar10-mini.json")
    return parser


def carry_out(plan: Plan, options: argparse.Namespace, write: Write, shown: str) -> None:
    """Train and evaluate what is missing, and write the output after every run.

    Args:
        plan: what to do.
        options: of :func:`arguments`.
        write: writes the output.
        shown: key of what is printed of it at the end.

    Raises:
        TrainingStopped: when a run failed; the others are done.
    """
    options.folder.mkdir(parents=True, exist_ok=True)

    def tell(line: str) -> None:
        print(line, flush=True)
        if line.endswith(": done"):
            write(plan, options.folder, options.output)

    failures = carry_out_plan(plan, options.folder, LocalExecutor(options.jobs), tell=tell)
    for name, figures in write(plan, options.folder, options.output)[shown].items():
        print(name, figures)
    if failures:
        raise TrainingStopped("; ".join(failures))


def keep(output: Path, result: dict[str, Any]) -> None:
    """Write a result."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
