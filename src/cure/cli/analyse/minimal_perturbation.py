"""``cure analyse perturbation``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cure.cli.analyse.app import LimitOption, SeedOption, TargetsArgument, analyse, print_study
from cure.cli.console import show_progress
from cure.cli.options import (
    BatchSizeOption,
    Checkpoint,
    CheckpointOption,
    DataOption,
    DeviceOption,
    OutputOption,
    Split,
    SplitOption,
)


@analyse.command("perturbation")
def perturbation(
    runs: TargetsArgument,
    norm: Annotated[str | None, typer.Option(help="Linf or L2 (default: the run's).")] = None,
    shown: Annotated[int, typer.Option(help="Images in the grid, up to 8.")] = 6,
    weights: Annotated[Path | None, typer.Option(help="Weights file of a single network.")] = None,
    checkpoint: CheckpointOption = Checkpoint.best,
    data: DataOption = None,
    split: SplitOption = Split.test,
    limit: LimitOption = 500,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """The least change of an image that fools each network, and what it looks like."""
    from cure.analysis.minimal_perturbation import perturbation as study

    with show_progress() as progress:
        result = study(
            *runs,
            data=data,
            split=split.value,
            limit=limit,
            norm=norm,
            checkpoint=checkpoint.value,
            weights=weights,
            shown=shown,
            batch_size=batch_size,
            device=device,
            seed=seed,
            output=output,
            progress=progress,
        )
    print_study(result)
