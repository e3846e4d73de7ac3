"""What ``cure watch`` shows of runs, from their records; it reads and never writes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cure.config import RunConfig
from cure.runs.folder import RunFolder, epoch_of
from cure.runs.records import (
    Accuracies,
    EpochMetrics,
    EpochTiming,
    Status,
    TradeoffPoint,
    TradeoffRecord,
)
from cure.training.overfitting_detector import robust_overfitting

LAST = 5
"""Epochs in the table."""
RECENT = 3
"""Epochs from which the time left is estimated."""
NARROW = 60
"""Columns of the terminal below which the table shows accuracies only."""
OVERDUE = 3
"""A warning comes after this many times the length of an epoch without the end of one."""
BAR = 40
"""Columns of the progress bar and of a curve, at most."""


@dataclass(frozen=True)
class RunSnapshot:
    """A run folder at one moment.

    Attributes:
        path: as the user named it.
        config: of the run.
        status: of the run.
        phases: what is trained inside it now ("natural start"), the outermost first; none for the
            run itself.
        active: the configuration of what is trained now.
        validation_images: number of images that it is validated on.
        metrics: epochs of what is trained now.
        timing: their times by epoch.
        best: epoch of the best weights, once they are written.
        chosen: the point that ``cure tradeoff`` chose; None of a run that was trained.
        since: time of the last epoch, or of the beginning, in seconds since 1970.
        held: whether a process of this machine trains the run; None where that is not known.
    """

    path: str
    config: RunConfig
    status: Status
    phases: tuple[str, ...]
    active: RunConfig
    validation_images: int
    metrics: Sequence[EpochMetrics]
    timing: dict[int, EpochTiming]
    best: int | None
    chosen: TradeoffPoint | None
    since: float
    held: bool | None

    @property
    def epochs(self) -> int:
        """Epochs of what is trained now."""
        return self.active.training.epochs

    @property
    def state(self) -> str:
        """State in words, with the phase."""
        state = {"new": "not begun"}.get(self.status.state, self.status.state)
        return f"{state} ({', '.join(self.phases)})" if self.phases else state

    @property
    def epoch_seconds(self) -> float | None:
        """Mean seconds of the last epochs, validation included."""
        times = [self.timing[line.epoch] for line in self.metrics if line.epoch in self.timing]
        seconds = [line.total_seconds for line in times[-RECENT:]]
        return sum(seconds) / len(seconds) if seconds else None

    def left(self, now: float) -> float | None:
        """Seconds to the end of this phase, if it is running and has an epoch behind it."""
        each = self.epoch_seconds
        if each is None or self.status.state != "running":
            return None
        return max(0.0, (self.epochs - len(self.metrics)) * each - min(now - self.since, each))


def read(path: str | Path) -> RunSnapshot:
    """The run folder at this moment.

    Raises:
        CheckpointError: when there is no run, or a file of it is damaged.
    """
    folder = RunFolder.open(path)
    active, phases = folder, tuple[str, ...]()
    while phase := active.status().phase:
        inner = active.inner(phase)
        if not (inner / "config.yaml").is_file():
            break
        active, phases = RunFolder(inner), (*phases, phase)
    files = [active.path / name for name in ("metrics.jsonl", "status.json", "config.yaml")]
    mixed = folder.path / "tradeoff.json"
    return RunSnapshot(
        path=str(path),
        config=folder.config,
        status=folder.status(),
        phases=phases,
        active=active.config,
        validation_images=active.validation_images(),
        metrics=active.metrics(),
        timing={line.epoch: line for line in active.timing()},
        best=epoch_of(active.checkpoints / "best.safetensors"),
        chosen=TradeoffRecord.read(mixed).chosen if mixed.is_file() else None,
        since=max(file.stat().st_mtime for file in files if file.exists()),
        held=_held(folder.path / ".lock"),
    )


def _held(lock: Path) -> bool | None:
    """Whether a process of this machine holds the lock, from the list that Linux keeps.

    Trying the lock would hold it for a moment, in which a run could not begin.
    """
    try:
        inode = lock.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return any(word.endswith(f":{inode}") for line in lines for word in line.split())


def view(run: RunSnapshot, now: float, width: int, unicode: bool = True) -> Group:
    """One run: progress, warnings, last epochs, curves.

    Args:
        run: from :func:`read`.
        now: seconds since 1970.
        width: columns of the terminal.
        unicode: False where the terminal shows ASCII only.
    """
    config = run.config
    facts = f"{config.method.name}, recipe {config.name}, seed {config.seed}"
    lines = [
        (f"{run.path}: {run.state}", "bold"),
        (f"{facts}, {config.data.source}, {config.model.name}", ""),
        *((text, "") for text in _progress(run, now, width, unicode)),
        *((f"warning: {text}", "yellow") for text in warnings(run, now)),
    ]
    parts: list[RenderableType] = [Text(_printable(text, unicode), style) for text, style in lines]
    if run.metrics:
        parts += [Text(""), _epochs(run, width), Text(""), _curves(run, unicode)]
    return Group(*parts)


def overview(runs: Sequence[RunSnapshot], now: float, unicode: bool = True) -> Table:
    """Several runs, a line each; arguments as for :func:`view`."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for heading in ("state", "epoch", "natural %", "robust %", "left"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    for run in runs:
        measured = [line.validation for line in run.metrics if line.validation is not None]
        left = run.left(now)
        cells = (
            *(run.path, run.state, "-" if run.chosen else f"{len(run.metrics)}/{run.epochs}"),
            *_percent(run.chosen or (measured[-1] if measured else None)),
            "" if left is None else span(left),
        )
        table.add_row(*(Text(_printable(cell, unicode)) for cell in cells))
    return table


def warnings(run: RunSnapshot, now: float) -> Iterator[str]:
    """Sentences about what a user should look at."""
    if run.status.reason is not None:
        yield run.status.reason
    overfits = robust_overfitting(run.metrics, run.validation_images)
    if overfits is not None:
        yield overfits
    if run.status.state != "running":
        return
    if run.held is False:
        yield (
            "no process of this machine trains it; if none of another does, it was killed: "
            f"`{RunFolder(Path(run.path)).resume_command()}` goes on"
        )
    each = run.epoch_seconds
    if each is not None and now - run.since > OVERDUE * each:
        yield f"no epoch ended for {span(now - run.since)}; one takes {span(each)}"


def _bar(run: RunSnapshot, width: int, unicode: bool) -> str:
    done = len(run.metrics)
    words = f"epoch {done} of {run.epochs}"
    room = max(5, min(BAR, width - len(words) - 10))
    full = min(room, room * done // run.epochs)
    signs = "━─" if unicode else "#-"
    return f"{words} {signs[0] * full}{signs[1] * (room - full)} {100 * done // run.epochs} %"


def _progress(run: RunSnapshot, now: float, width: int, unicode: bool) -> Iterator[str]:
    """Epochs, the best of them, speed, time left; of weights that were mixed their accuracies."""
    if run.chosen is not None:
        natural, robust = _percent(run.chosen)
        yield f"weights mixed by `cure tradeoff`: natural {natural} %, robust {robust} %"
        return
    yield _bar(run, width, unicode)
    best = next((line for line in run.metrics if line.epoch == run.best), None)
    if best is not None:
        natural, robust = _percent(best.validation)
        yield f"best epoch {run.best}: natural {natural} %, robust {robust} %"
    each = run.epoch_seconds
    if each is None:
        yield f"no epoch yet, {span(now - run.since)} since it began"
        return
    left = run.left(now)
    if left is not None:
        time = f"about {span(left)} left{' of this part' if run.phases else ''}"
    else:
        time = f"{span(sum(line.total_seconds for line in run.timing.values()))} spent"
    speed = run.timing[max(run.timing)].images_per_second or 0
    yield f"{speed:,.0f} images/s, {span(each)} an epoch, {time}"


def _epochs(run: RunSnapshot, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = ["epoch", "loss", "natural %", "robust %"]
    names += ["images/s", "seconds"] if width >= NARROW else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for line in run.metrics[-LAST:]:
        timing = run.timing.get(line.epoch)
        cells = [str(line.epoch), f"{line.train['loss']:.3f}", *_percent(line.validation)]
        cells += (
            ["-", "-"]
            if timing is None
            else [f"{timing.images_per_second or 0:,.0f}", f"{timing.seconds or 0:.1f}"]
        )
        table.add_row(*cells[: len(names)])
    return table


def _curves(run: RunSnapshot, unicode: bool) -> Table:
    """Accuracies on validation images and loss over the epochs, a line each."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    measured = [line.validation for line in run.metrics if line.validation is not None]
    for name, values in (
        ("robust %", [accuracies.robust for accuracies in measured]),
        ("natural %", [accuracies.natural for accuracies in measured]),
        ("loss", [line.train["loss"] for line in run.metrics]),
    ):
        values = [value for value in values if math.isfinite(value)]
        if len(values) > 1:
            ends = f"{min(values):.4g} to {max(values):.4g}"
            table.add_row(name, sparkline(values, BAR, unicode), ends)
    return table


def sparkline(values: Sequence[float], width: int, unicode: bool = True) -> str:
    """Bars of one character between the least value and the largest.

    Args:
        values: one or more; where there are more than columns, means of neighbours are drawn.
        width: columns, at most.
        unicode: whether eighths of a block can be shown; otherwise the digits 0 to 7.

    >>> sparkline([0, 1, 2, 7], 4)
    '▁▂▃█'
    """
    if len(values) > width:
        edges = [len(values) * place // width for place in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    signs = "▁▂▃▄▅▆▇█" if unicode else "01234567"
    return "".join(signs[round(7 * (v - low) / (high - low)) if high > low else 0] for v in values)


def _percent(accuracies: Accuracies | None) -> tuple[str, str]:
    if accuracies is None:
        return "-", "-"
    return f"{accuracies.natural:.1f}", f"{accuracies.robust:.1f}"


def span(seconds: float) -> str:
    """A duration.

    >>> span(8.44), span(125), span(11400)
    ('8.4 s', '2:05', '3:10:00')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _printable(text: str, unicode: bool) -> str:
    """The text without control characters, and without what the terminal cannot show."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if unicode else text.encode("ascii", "replace").decode("ascii")


def over(runs: Sequence[RunSnapshot]) -> bool:
    """Whether no run will change by itself any more."""
    return all(run.status.state in ("stopped", "failed", "finished") for run in runs)


def shown(
    paths: Sequence[str | Path], now: float, width: int, unicode: bool
) -> tuple[RenderableType, bool]:
    """What to show of these runs now, and whether that is final."""
    runs = [read(path) for path in paths]
    if len(runs) == 1:
        return view(runs[0], now, width, unicode), over(runs)
    return overview(runs, now, unicode), over(runs)
