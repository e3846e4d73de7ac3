"""The command ``cure``: its commands, notes and errors."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cure.cli import comparing, measuring, training
from cure.cli.analyse import analyse
from cure.cli.printing import QUIET, SEVERAL, err, warn
from cure.cli.status import ExitStatus
from cure.errors import (
    ConfigError,
    CureError,
    CureNote,
    Interrupted,
    ModelError,
    OutOfMemory,
    RanksLost,
)
from cure.utils.io import first_line
from cure.utils.launcher import launched
from cure.utils.memory import keep_freed_memory

# Seconds in which the launcher ends the other ranks of a run after the first one has ended.
SECONDS_FOR_THE_FIRST = 15

TOGETHER = ("train", "resume", "evaluate")
"""Commands that several ranks may run together."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make an image classifier withstand adversarial changes and keep its natural accuracy.",
)
app.add_typer(analyse, name="analyse")
# In the order of the help.
COMMANDS: dict[str, Callable[..., None]] = {
    "train": training.train,
    "resume": training.resume,
    "evaluate": measuring.evaluate,
    "corruptions": measuring.corruptions,
    "diagnose": measuring.diagnose,
    "compare": comparing.compare,
    "report": comparing.report,
    "table": comparing.table,
    "front": comparing.front,
    "recommend": comparing.recommend,
    "tradeoff": comparing.tradeoff,
    "watch": training.watch,
    "export": training.export,
    "list": training.list_names,
    "show": training.show,
    "demo": training.demo,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _say(word: str, error: CureError) -> None:
    """One message on stderr, whichever of the ranks of a run the error is on.

    An error on all ranks is printed by the first one, and the launcher ends the others while they
    wait.  A rank that is still there after that has an error of its own.
    """
    if not QUIET:
        err.print(f"{word}: {error}", markup=False, highlight=False, soft_wrap=True, style="bold")
        return
    if not isinstance(error, RanksLost):
        time.sleep(SECONDS_FOR_THE_FIRST)
    print(f"{word} (rank {os.environ['RANK']}): {error}", file=sys.stderr, flush=True)


@app.callback()
def _alone_or_together(
    context: typer.Context,
    show_traceback: Annotated[  # noqa: ARG001 - taken off before the words are parsed
        bool,
        typer.Option(
            "--traceback", help="Show where an error was raised, too; anywhere on the line."
        ),
    ] = False,
) -> None:
    if launched().world > 1 and context.invoked_subcommand not in TOGETHER:
        raise ConfigError(
            f"cure {context.invoked_subcommand} runs in one process, got {launched().world} ranks; "
            f"torchrun is for {', '.join(TOGETHER)}"
        )


def _note(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Show a note of this project as one line, any other warning as Python does."""
    if issubclass(category, CureNote):
        if str(message) not in _noted:
            warn(f"note: {message}")
        _noted.add(str(message))
    else:
        _show_warning(message, category, *place)


_show_warning = warnings.showwarning
_noted: set[str] = set()


def _sentence(error: Exception) -> CureError | None:
    """The message for an error that a user can correct, else None."""
    if isinstance(error, CureError):
        return error
    if "torch" not in sys.modules:
        return None
    from cure.models.failure import failed_in, network_error
    from cure.utils.memory import is_out_of_memory

    if is_out_of_memory(error):
        return OutOfMemory(
            f"there is not enough memory ({first_line(error)[:120]}); work on fewer or "
            "smaller images at once (--batch-size, --limit, data.limit, data.resize)"
        )
    if network_error(error) is None:
        return None
    return ModelError(failed_in(error, "the network", None) + "; --traceback shows the rest")


def main() -> None:
    """Run the command; a user's mistake is one message and status 2."""
    keep_freed_memory()
    warnings.showwarning = _note  # type: ignore[assignment]
    whole = "--traceback" in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--traceback"]
    try:
        try:
            app()
        except SystemExit as ended:
            if SEVERAL and ended.code in (None, 0, ExitStatus.UNFINISHED, ExitStatus.NOT_MET):
                from cure.utils.distributed import leave

                leave()
            raise
    except Exception as error:
        said = _sentence(error)
        if said is None:
            raise
        if whole:
            traceback.print_exception(error)
        stopped = isinstance(said, Interrupted)
        _say("stopped" if stopped else "error", said)
        status = ExitStatus.INTERRUPTED if stopped else ExitStatus.USER_MISTAKE
        if SEVERAL:
            # At once: the launcher reports the first rank that ended, and gloo's threads can abort
            # an interpreter that ends slowly while other ranks close their connections.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(ExitStatus.INTERRUPTED)
