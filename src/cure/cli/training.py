"""Commands that train, follow and export a run, and name what there is."""

from __future__ import annotations

import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cure.cli.options import RecipeArgument, SettingsArgument, with_options
from cure.cli.printing import (
    err,
    out,
    print_replay,
    print_results,
    print_run_ended,
    say,
    show_progress,
    warn,
)
from cure.errors import ConfigError, ModelError, unknown

KINDS = ("methods", "models", "recipes", "attacks", "corruptions", "data", "studies", "settings")
ExportFormat = StrEnum("ExportFormat", ["onnx", "safetensors", "torch-export", "hub"])

RunOption = Annotated[
    Path | None,
    # torchrun takes --run for one of its own options, wherever it stands.
    typer.Option("--run", "--folder", help="Folder to make for the run (default: runs/NAME)."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print only where the run is.")]


def train(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
    run: RunOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train by a recipe into a new run folder."""
    from cure.training.run import train as start

    done = start(recipe, settings or [], run=run, quiet=quiet)
    print_run_ended(done.path, quiet)


def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    settings: SettingsArgument = None,
    quiet: QuietOption = False,
) -> None:
    """Continue a run that was stopped, bit-identically; or a finished one, for more epochs."""
    from cure.runs.folder import RunFolder
    from cure.training.run import resume as go_on

    finished = RunFolder.open(run).status().finished and not settings
    done = go_on(run, settings or [], quiet=quiet)
    if finished:
        err.print(f"{run} had already finished; nothing was changed", markup=False)
    print_run_ended(done.path, quiet or finished)


def watch(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders.")],
    once: Annotated[bool, typer.Option("--once", help="Show the present state, and end.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two updates.")
    ] = 2.0,
) -> None:
    """Show runs while they train, or as they ended: epochs, curves, speed, time left."""
    from rich.live import Live

    from cure.cli.watch import shown

    unicode = out.encoding.startswith("utf")

    def look() -> tuple[Any, bool]:
        return shown(runs, time.time(), out.width, unicode)

    drawn, ended = look()
    if once or not out.is_terminal:
        out.print(drawn)
        return
    with Live(drawn, console=out, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while not ended:
            time.sleep(interval)
            drawn, ended = look()
            live.update(drawn, refresh=True)


@with_options("checkpoint", "data", "data_options", "limit", limit=1000)
def export(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write to, or the file.")],
    options: dict[str, Any],
    to: Annotated[ExportFormat, typer.Option(help="What to write.")] = ExportFormat.onnx,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX: also quantise, with validation images.")
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX: version of the operators.")] = 18,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="hub: also upload; a new repository is private."),
    ] = None,
) -> None:
    """Write a run's network for other programs; checks the file against the run."""
    from cure.exporters.export import export as write
    from cure.exporters.export import next_command

    made = write(run, to.value, folder, int8=int8, opset=opset, push=push, **options)  # type: ignore[arg-type]
    say(f"exported: {made}")
    say(f"next: {next_command(run, made)}")


def demo(
    run: RunOption = None,
    photos: Annotated[
        bool, typer.Option("--photos", help="Photographs and a pretrained network; a few minutes.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", help="With --photos: a folder with one sub-folder a class."),
    ] = None,
) -> None:
    """Train on handwritten digits naturally and with CURE, study both, write a page, export."""
    from cure.cli.demo import begin, begin_photos, deploy, examine, examine_photos

    if data is not None and not photos:
        raise ConfigError("--data: expected --photos with it; say cure demo --photos --data FOLDER")
    done = begin_photos(data, run) if photos else begin(run)
    with show_progress() as progress:
        results, page = (examine_photos if photos else examine)(done, progress)
    print_results(results)
    if not photos:
        try:
            with show_progress() as progress:
                file, result = deploy(done, progress)
        except ModelError as error:
            warn(f"not exported: {error}")
        else:
            print_replay(result)
            say(f"exported: {file}")
    print_run_ended(done.path)
    say(f"open in a browser: {page}")


def show(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
) -> None:
    """Print every setting of a recipe as it would run, in YAML."""
    from cure.recipe import show_recipe

    typer.echo(show_recipe(recipe, settings or []), nl=False)


def list_names(
    what: Annotated[str, typer.Argument(help=f"What to list: {', '.join(KINDS)}.")],
) -> None:
    """List what can be named in a recipe or on the command line."""
    from cure.cli.listing import listing

    if what not in KINDS:
        raise ConfigError(unknown("list", what, KINDS))
    rows = listing(what)
    width = max(len(name) for name, _ in rows)
    for name, description in rows:
        # A row a line, whatever the terminal's width, so that grep finds whole rows.
        typer.echo(f"{name:<{width}}  {description}")
