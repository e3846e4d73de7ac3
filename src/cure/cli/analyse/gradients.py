"""``cure analyse gradients``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cure.cli.analyse.app import analyse, print_study
from cure.cli.options import OutputOption
from cure.cli.printing import show_progress


@analyse.command("gradients")
def gradients(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs trained with training.record_gradients."),
    ],
    output: OutputOption = None,
) -> None:
    """Size of gradients by layer over training, which weights move, what a mask conserves."""
    from cure.analysis.gradients import gradients as study

    with show_progress() as progress:
        result = study(runs, output=output, progress=progress)
    print_study(result)
