"""``cure analyse overfitting``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cure.cli.analyse.app import LimitOption, SeedOption, analyse, print_study
from cure.cli.console import show_progress
from cure.cli.options import BatchSizeOption, DeviceOption, OutputOption


@analyse.command("overfitting")
def overfitting(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    limit: LimitOption = 1000,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """Accuracy on training, validation and test images over epochs; best against last."""
    from cure.analysis.overfitting import overfitting as study

    with show_progress() as progress:
        result = study(
            runs,
            limit=limit,
            batch_size=batch_size,
            device=device,
            seed=seed,
            output=output,
            progress=progress,
        )
    print_study(result)
