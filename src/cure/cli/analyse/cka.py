"""``cure analyse cka``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cure.cli.analyse.app import LimitOption, SeedOption, TargetsArgument, analyse, print_study
from cure.cli.console import show_progress
from cure.cli.options import (
    Checkpoint,
    CheckpointOption,
    DataOption,
    DeviceOption,
    EpsilonOption,
    NormOption,
    OutputOption,
    Split,
    SplitOption,
    words,
)


@analyse.command("cka")
def cka(
    runs: TargetsArgument,
    other: Annotated[
        str | None, typer.Option(help="Compare each with this run instead of with itself.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Names of modules, with * and ?: 'layer?.?,linear' (default: leaves)."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights file of a single network.")] = None,
    checkpoint: CheckpointOption = Checkpoint.best,
    data: DataOption = None,
    split: SplitOption = Split.test,
    limit: LimitOption = 1000,
    epsilon: EpsilonOption = None,
    norm: NormOption = None,
    batch_size: Annotated[int, typer.Option(help="Images compared at once.")] = 100,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """How alike features are, layer by layer: of natural and adversarial images, of two runs."""
    from cure.analysis.cka import cka as study

    with show_progress() as progress:
        result = study(
            *runs,
            other=other,
            layers=words(layers),
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
