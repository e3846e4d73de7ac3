"""``cure analyse overfitting``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cure.cli.analyse.app import analyse, print_study
from cure.cli.options import OutputOption, with_options
from cure.cli.printing import show_progress


@analyse.command("overfitting")
@with_options("limit", "batch_size", "device", "seed", limit=1000)
def overfitting(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    options: dict[str, Any],
    output: OutputOption = None,
) -> None:
    """Accuracy on training, validation and test images over epochs; best against last."""
    from cure.analysis.overfitting import overfitting as study

    with show_progress() as progress:
        result = study(
            runs,
            output=output,
            progress=progress,
            **options,
        )
    print_study(result)
