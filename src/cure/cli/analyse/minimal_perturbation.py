"""``cure analyse perturbation``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cure.cli.analyse.app import TARGET_OPTIONS, TargetsArgument, analyse, print_study
from cure.cli.options import OutputOption, with_options
from cure.cli.printing import show_progress


@analyse.command("perturbation")
@with_options(*TARGET_OPTIONS, limit=500)
def perturbation(
    runs: TargetsArgument,
    options: dict[str, Any],
    norm: Annotated[str | None, typer.Option(help="Linf or L2 (default: the run's).")] = None,
    shown: Annotated[int, typer.Option(help="Images in the grid, up to 8.")] = 6,
    output: OutputOption = None,
) -> None:
    """The least change of an image that fools each network, and what it looks like."""
    from cure.analysis.minimal_perturbation import perturbation as study

    with show_progress() as progress:
        result = study(
            *runs,
            norm=norm,
            shown=shown,
            output=output,
            progress=progress,
            **options,
        )
    print_study(result)
