"""``cure analyse sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cure.cli.analyse.app import analyse, print_study
from cure.cli.printing import show_progress


@analyse.command("sensitivity")
def sensitivity(
    recipe: Annotated[str, typer.Argument(help="A name from `cure list recipes`, or a YAML file.")],
    output: Annotated[
        Path, typer.Option(help="Folder of the trials; the same command goes on in it.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of all trials."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW:HIGH[:log]|KEY=A,B,C",
            help="method.percent=10:50; repeatable (default: what the method declares).",
        ),
    ] = None,
    grid: Annotated[
        int | None, typer.Option(help="So many values of each range, in all combinations.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Or so many trials, chosen by Optuna (default 30; 0 only tells)."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="sqlite:///FILE, postgresql://..., or a journal file, to share trials."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Trials at a time on this machine.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of Optuna's choices.")] = 0,
) -> None:
    """Natural against robust accuracy while settings vary; stopped, it goes on."""
    from cure.analysis.sensitivity import sensitivity as study

    with show_progress() as progress:
        result = study(
            recipe,
            settings or [],
            vary=vary or [],
            grid=grid,
            trials=trials,
            storage=storage,
            jobs=jobs,
            seed=seed,
            output=output,
            progress=progress,
        )
    print_study(result)
