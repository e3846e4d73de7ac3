"""``cure analyse layerwise``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cure.cli.analyse.app import analyse, print_study
from cure.cli.options import words
from cure.cli.printing import out


class Learning(StrEnum):
    """Whether something changes while other parts learn."""

    frozen = "frozen"
    updated = "updated"


@analyse.command()
def layerwise(
    recipe: Annotated[str, typer.Argument(help="A name from `cure list recipes`, or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change: training.epochs=5"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the study; the same one goes on.")] = Path(
        "layerwise"
    ),
    sets: Annotated[
        str | None, typer.Option(help="Blocks that learn: 1,23,all (default: the paper's).")
    ] = None,
    variants: Annotated[
        str, typer.Option(help="Whether these are drawn anew first, or kept.")
    ] = "reinitialised,kept",
    stem: Annotated[
        Learning, typer.Option(help="What comes before the first block (released code: updated).")
    ] = Learning.frozen,
    statistics: Annotated[
        Learning, typer.Option(help="BatchNorm of frozen blocks (released code: updated).")
    ] = Learning.frozen,
    method: Annotated[str, typer.Option(help="How the blocks are trained.")] = "at",
    attack: Annotated[str, typer.Option(help="Measures robust accuracy.")] = "pgd20",
    limit: Annotated[int | None, typer.Option(help="Only the first so many test images.")] = 1000,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
) -> None:
    """Train with only some blocks learning; measure each; goes on where it stopped."""
    from cure.analysis.layerwise import layerwise as study
    from cure.experiments.executors import LocalExecutor

    chosen: Any = words(variants) or []
    print_study(
        study(
            recipe,
            settings or [],
            output=output,
            sets=words(sets),
            variants=chosen,
            stem=stem.value,
            statistics=statistics.value,
            method=method,
            attack=attack,
            limit=limit,
            executor=LocalExecutor(jobs),
            tell=lambda line: out.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    )
