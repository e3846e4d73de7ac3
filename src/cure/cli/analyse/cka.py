"""``cure analyse cka``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cure.cli.analyse.app import TARGET_OPTIONS, TargetsArgument, analyse, print_study
from cure.cli.options import EpsilonOption, NormOption, OutputOption, with_options, words
from cure.cli.printing import show_progress


@analyse.command("cka")
@with_options(*TARGET_OPTIONS, limit=1000, batch_size=100)
def cka(
    runs: TargetsArgument,
    options: dict[str, Any],
    other: Annotated[
        str | None, typer.Option(help="Compare each with this run instead of with itself.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Names of modules, with * and ?: 'layer?.?,linear' (default: leaves)."),
    ] = None,
    epsilon: EpsilonOption = None,
    norm: NormOption = None,
    output: OutputOption = None,
) -> None:
    """How alike features are, layer by layer: of natural and adversarial images, of two runs."""
    from cure.analysis.cka import cka as study

    with show_progress() as progress:
        result = study(
            *runs,
            other=other,
            layers=words(layers),
            epsilon=epsilon,
            norm=norm,
            output=output,
            progress=progress,
            **options,
        )
    print_study(result)
