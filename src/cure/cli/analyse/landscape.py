"""``cure analyse landscape``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cure.cli.analyse.app import TARGET_OPTIONS, TargetsArgument, analyse, print_study
from cure.cli.options import EpsilonOption, NormOption, OutputOption, with_options
from cure.cli.printing import show_progress


@analyse.command("landscape")
@with_options(*TARGET_OPTIONS, limit=200)
def landscape(
    runs: TargetsArgument,
    options: dict[str, Any],
    points: Annotated[int, typer.Option(help="Points of each direction: 5, 9, 13, ...")] = 13,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Attack anew at each point of the weights (slow).")
    ] = False,
    epsilon: EpsilonOption = None,
    norm: NormOption = None,
    output: OutputOption = None,
) -> None:
    """The loss around weights and around images, and accuracy over epsilon."""
    from cure.analysis.landscape import landscape as study

    with show_progress() as progress:
        result = study(
            *runs,
            points=points,
            recompute=recompute,
            epsilon=epsilon,
            norm=norm,
            output=output,
            progress=progress,
            **options,
        )
    print_study(result)
