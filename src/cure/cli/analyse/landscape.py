"""``cure analyse landscape``."""

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
    EpsilonOption,
    NormOption,
    OutputOption,
    Split,
    SplitOption,
)


@analyse.command("landscape")
def landscape(
    runs: TargetsArgument,
    points: Annotated[int, typer.Option(help="Points of each direction: 5, 9, 13, ...")] = 13,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Attack anew at each point of the weights (slow).")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Weights file of a single network.")] = None,
    checkpoint: CheckpointOption = Checkpoint.best,
    data: DataOption = None,
    split: SplitOption = Split.test,
    limit: LimitOption = 200,
    epsilon: EpsilonOption = None,
    norm: NormOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """The loss around weights and around images, and accuracy over epsilon."""
    from cure.analysis.landscape import landscape as study

    with show_progress() as progress:
        result = study(
            *runs,
            points=points,
            recompute=recompute,
            data=data,
            split=split.value,
            limit=limit,
            epsilon=epsilon,
            norm=norm,
            checkpoint=checkpoint.value,
            weights=weights,
            batch_size=batch_size,
            device=device,
            seed=seed,
            output=output,
            progress=progress,
        )
    print_study(result)
