"""``cure analyse conserved``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cure.cli.analyse.app import TargetsArgument, analyse, print_study
from cure.cli.options import OutputOption, with_options
from cure.cli.printing import show_progress


@analyse.command("conserved")
@with_options("checkpoint", "data", "data_options", "split", "limit", "batch_size", "device")
def conserved(
    targets: TargetsArgument,
    options: dict[str, Any],
    natural: Annotated[
        str | None,
        typer.Option(help="The natural network (default: what each run started from)."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="A weight counts as moved beyond so much of its tensor's rms.")
    ] = 0.1,
    output: OutputOption = None,
) -> None:
    """Images lost and gained against the natural network, and how far weights moved."""
    from cure.analysis.prediction_flips import conserved as study

    with show_progress() as progress:
        result = study(
            targets,
            natural,
            tolerance=tolerance,
            output=output,
            progress=progress,
            **options,
        )
    print_study(result)
