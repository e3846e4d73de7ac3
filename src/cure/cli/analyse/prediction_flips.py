"""``cure analyse conserved``."""

from __future__ import annotations

from typing import Annotated

import typer

from cure.cli.analyse.app import TargetsArgument, analyse, print_study
from cure.cli.console import show_progress
from cure.cli.options import (
    BatchSizeOption,
    Checkpoint,
    CheckpointOption,
    DataOption,
    DataOptionsOption,
    DeviceOption,
    LimitOption,
    OutputOption,
    Split,
    SplitOption,
    pairs,
)


@analyse.command("conserved")
def conserved(
    targets: TargetsArgument,
    natural: Annotated[
        str | None,
        typer.Option(help="The natural network (default: what each run started from)."),
    ] = None,
    data: DataOption = None,
    data_option: DataOptionsOption = None,
    split: SplitOption = Split.test,
    limit: LimitOption = None,
    checkpoint: CheckpointOption = Checkpoint.best,
    tolerance: Annotated[
        float, typer.Option(help="A weight counts as moved beyond so much of its tensor's rms.")
    ] = 0.1,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
    output: OutputOption = None,
) -> None:
    """Images lost and gained against the natural network, and how far weights moved."""
    from cure.analysis.prediction_flips import conserved as study

    with show_progress() as progress:
        result = study(
            targets,
            natural,
            data=data,
            data_options=pairs(data_option),
            split=split.value,
            limit=limit,
            checkpoint=checkpoint.value,
            tolerance=tolerance,
            batch_size=batch_size,
            device=device,
            output=output,
            progress=progress,
        )
    print_study(result)
