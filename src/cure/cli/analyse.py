"""The command group ``cure analyse``: a command for each study, made from its options."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.markup import escape
from rich.table import Table

from cure.cli.listing import listing
from cure.cli.options import (
    RecipeArgument,
    SettingsArgument,
    option_name,
    option_parameter,
    read_option,
)
from cure.cli.printing import out, say, show_progress
from cure.errors import ConfigError
from cure.registry import RENAMED_STUDIES, STUDIES

RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="Run folders; for studies of networks alone also hf:..., package.module:callable.",
    ),
]


class Studies(typer.core.TyperGroup):
    """A command for each study, whose options are read when it is called.

    A study imports PyTorch, for which the help of the group does not wait.  Contexts and commands
    are those of click, which newer releases of Typer carry and older ones import.
    """

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Names of all studies."""
        return [name for name, _ in listing("studies")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """A study with its question and no options, for the help of the group."""
        questions = dict(listing("studies"))
        if cmd_name not in questions:
            return None
        return typer.core.TyperCommand(cmd_name, help=questions[cmd_name])

    def resolve_command(
        self,
        ctx: Any,  # noqa: ARG002
        args: list[str],
    ) -> tuple[str | None, Any, list[str]]:
        """The command of a study with its options.

        Raises:
            ConfigError: for a name of version 0.1 or one that is no study.
        """
        name, *rest = args
        if name in RENAMED_STUDIES:
            now = RENAMED_STUDIES[name]
            raise ConfigError(f"the study {name} is now called {now}: cure analyse {now}")
        return name, command_of(name), rest


analyse = typer.Typer(
    cls=Studies,
    no_args_is_help=True,
    help="Study what training did to a network; `cure list studies` lists the questions.",
)


@analyse.callback()
def _group() -> None:
    pass


def command_of(name: str) -> Any:
    """The command of a study, with an option for each field of its options.

    Raises:
        ConfigError: when there is no such study.
    """
    study = STUDIES[name]
    hints = get_type_hints(study.options, localns={"ImageSet": object}, include_extras=True)
    # What has no help text is for Python only.
    options = [
        each
        for each in fields(study.options)
        if each.name in study.accepted()
        and len(get_args(hints[each.name])) > 1
        and hasattr(hints[each.name], "__metadata__")
    ]
    positional = (
        {"recipe": RecipeArgument, "settings": SettingsArgument}
        if study.recipe
        else {"runs": RunsArgument}
    )

    def run(**given: Any) -> None:
        values = {
            each.name: read_option(each.name, hints[each.name], given[option_name(each.name)])
            for each in options
        }
        targets = [given[argument] or [] for argument in positional]
        if "tell" in study.accepted():
            values["tell"] = say
        with show_progress() as progress:
            result = study(*targets, progress=progress, **values)
        print_study(result)

    parameters = [
        inspect.Parameter(
            argument,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=kind,
            default=None if argument == "settings" else inspect.Parameter.empty,
        )
        for argument, kind in positional.items()
    ]
    for each in options:
        default = inspect.Parameter.empty if each.default is MISSING else each.default
        if each.name == "output" and isinstance(default, str):
            default = Path(default)
        parameters.append(option_parameter(each.name, hints[each.name], default))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    app = typer.Typer(add_completion=False)
    app.command(name, help=study.question)(run)
    return typer.main.get_command(app)


def print_study(result: dict[str, Any]) -> None:
    """The first table of a study, its finding, and where it is kept."""
    from cure.analysis.study import find_study

    view = find_study(result["study"]).view(result)
    for shown in view.tables[:1]:
        table = Table(title=escape(shown.title))
        for place, heading in enumerate(shown.header):
            table.add_column(escape(heading), justify="right" if place else "left")
        for row in shown.rows:
            table.add_row(*map(escape, row))
        out.print(table)
    say(view.finding)
    for what, command in view.commands:
        say(f"{what}: {command}")
    if result["file"] is not None:
        say(f"kept in {result['file']}")
