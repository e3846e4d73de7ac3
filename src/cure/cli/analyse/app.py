"""The command group ``cure analyse``, and how a study is told on the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cure.cli.printing import out

analyse = typer.Typer(
    no_args_is_help=True,
    help="Study what training did to a network; `cure list studies` says what each one asks.",
)

TargetsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="Run folders; or networks: hf:..., package.module:callable"
    ),
]

TARGET_OPTIONS = (
    *("weights", "checkpoint", "data", "split", "limit", "batch_size", "device", "seed"),
)
"""Fields of :class:`~cure.evaluation.options.TargetOptions` that most studies take."""


def print_study(result: dict[str, Any]) -> None:
    """A study's first table, what it found in sentences, and where it is kept."""
    from cure.analysis.study import STUDIES

    study = STUDIES[result["study"]]
    for rows in study.tables(result)[:1]:
        table = Table(title=escape(rows.title))
        for number, heading in enumerate(rows.header):
            table.add_column(escape(heading), justify="right" if number else "left")
        for cells in rows.cells:
            table.add_row(*map(escape, cells))
        out.print(table)
    for sentence in study.findings(result):
        out.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if result["file"] is not None:
        out.print(f"kept in {result['file']}", markup=False, highlight=False, soft_wrap=True)
