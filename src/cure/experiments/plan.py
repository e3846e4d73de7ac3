"""A plan of runs that belong together: which rows, which seeds, what is measured; and its work.

``cure table PLAN`` trains and evaluates what is missing and writes a JSON a run, so that it can be
stopped at any time and goes on where it was.  Independent runs are handed to an executor, of this
machine or of a cluster; runs that start from others or learn from them wait for those.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from cure.config import RunConfig, Section
from cure.errors import CheckpointError, ConfigError, CureError, unknown
from cure.evaluation.evaluate import evaluate
from cure.experiments.compare import ResultTable, difference, read_rows, table
from cure.recipe import Raw, check, check_kept, override, read_recipe
from cure.runs.folder import RunFolder
from cure.training.prerequisites import carry_out
from cure.training.setup import check_attacks, prepare
from cure.training.trainer import Interrupted
from cure.utils.io import write_json, write_text
from cure.utils.memory import keep_freed_memory

REFERENCE = "run:"
"""A text ``run:ROW`` in a row's settings is the folder of that row's run of the same seed."""

FORMAT = "cure-run-1"

COLUMNS = (
    *("natural", "pgd20", "cw", "autoattack", "nrr_cw", "nrr_autoattack"),
    *("last_natural", "last_pgd20", "best_minus_last_pgd20"),
    *("seconds_per_epoch", "processor_seconds_per_epoch", "peak_memory_mib"),
)
"""Columns of a plan's table, those that were measured."""


class Measurement(Section):
    """One evaluation of every run."""

    attacks: tuple[str, ...] = ("pgd20", "cw")
    """Names from ``cure list attacks``."""
    limit: PositiveInt | None = None
    """Only the first so many test images."""
    checkpoints: tuple[Literal["best", "last"], ...] = ("best",)
    """Which weights; the last are left out where they are the best ones."""
    seeds: tuple[NonNegativeInt, ...] | None = None
    """Only runs of these seeds."""
    rows: tuple[str, ...] | None = None
    """Only these rows."""


class Row(Section):
    """One way to train, repeated over seeds."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """What differs from the plan's settings: ``{method: at}``."""
    seeds: tuple[NonNegativeInt, ...] | None = None
    """Seeds of the runs; by default the plan's."""
    note: str = ""
    """What a reader of the table should know."""


class Plan(Section):
    """Runs to compare: one recipe, settings for all, and rows that differ from them."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the plan."""
    description: str = ""
    """What it is for."""
    recipe: str
    """Recipe of every run."""
    runs: str = "runs"
    """Folder of the runs; plans that share it share their runs."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe, for all rows."""
    seeds: tuple[NonNegativeInt, ...] = (0,)
    """Seeds of the rows that name none."""
    evaluations: tuple[Measurement, ...] = (Measurement(),)
    """What is measured."""
    rows: dict[str, Row]
    """The rows by label."""
    reference: str | None = None
    """Label of the row that the others are subtracted from, seed by seed."""


@dataclass(frozen=True)
class Entry:
    """One run of a plan.

    Attributes:
        label: its row.
        seed: its seed.
        config: what it is, other runs of the plan written as ``run:ROW``.
        needs: the rows whose run of the same seed must be there first.
    """

    label: str
    seed: int
    config: RunConfig
    needs: frozenset[str]

    @property
    def name(self) -> str:
        """Name of its folder and of its result."""
        return f"{self.label}-seed{self.seed}"


def read_plan(path: str | Path) -> Plan:
    """The plan in a YAML file, every run of it checked.

    Raises:
        ConfigError: when it cannot be read, or a row is no valid run.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        plan = Plan.model_validate(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan {path} cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"plan {path} is not valid YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"plan {path}: {where or 'it'}: {first['msg']}") from None
    stages(plan)
    for measurement in plan.evaluations:
        check_attacks(measurement.attacks)
        for label in measurement.rows or ():
            _known(plan, label, "evaluations.rows")
    if plan.reference is not None:
        _known(plan, plan.reference, "reference")
    return plan


def _known(plan: Plan, label: str, place: str) -> None:
    if label not in plan.rows:
        raise ConfigError(f"plan {plan.name}: {place}: {unknown('row', label, plan.rows)}")


def entries(plan: Plan) -> list[Entry]:
    """All runs of a plan, seed by seed, so that the first rows to be complete are of one seed."""
    seeds = {label: row.seeds or plan.seeds for label, row in plan.rows.items()}
    found = []
    for seed in sorted({seed for own in seeds.values() for seed in own}):
        found += [_entry(plan, label, seed) for label, own in seeds.items() if seed in own]
    return found


def _entry(plan: Plan, label: str, seed: int) -> Entry:
    raw = read_recipe(plan.recipe)
    for key, value in (plan.settings | plan.rows[label].settings | {"seed": seed}).items():
        override(raw, key, value)
    raw["name"] = label
    needs: set[str] = set()

    def note(needed: str) -> str:
        _known(plan, needed, f"row {label}")
        if seed not in (plan.rows[needed].seeds or plan.seeds):
            raise ConfigError(
                f"plan {plan.name}: row {label} needs {REFERENCE}{needed} of seed {seed}, which "
                "that row leaves out; add the seed there"
            )
        needs.add(needed)
        return REFERENCE + needed

    raw = _referring(raw, note)
    return Entry(label, seed, check(raw, f"row {label} of plan {plan.name}"), frozenset(needs))


def _referring(value: Any, replacement: Callable[[str], str]) -> Any:
    """The same data with every text ``run:ROW`` replaced."""
    if isinstance(value, dict):
        return {key: _referring(item, replacement) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_referring(item, replacement) for item in value]
    if isinstance(value, str) and value.startswith(REFERENCE):
        return replacement(value.removeprefix(REFERENCE))
    return value


def stages(plan: Plan) -> list[list[Entry]]:
    """The runs in groups; those of a group are independent and need only earlier groups.

    Raises:
        ConfigError: when rows need each other in a circle.
    """
    left, done, found = entries(plan), set[tuple[str, int]](), []
    while left:
        ready = [e for e in left if all((label, e.seed) in done for label in e.needs)]
        if not ready:
            circle = ", ".join(sorted({entry.label for entry in left}))
            raise ConfigError(f"plan {plan.name}: the rows {circle} need each other in a circle")
        found.append(ready)
        done |= {(entry.label, entry.seed) for entry in ready}
        left = [entry for entry in left if entry not in ready]
    return found


# -- the work ------------------------------------------------------------------------------------


def result_path(output: Path, entry: Entry) -> Path:
    """Where the result of a run is written."""
    return output / "runs" / f"{entry.name}.json"


def is_done(plan: Plan, entry: Entry, output: Path) -> bool:
    """Whether the run's result is there and holds all that the plan measures.

    Raises:
        ConfigError: when it is there and was made with other settings.
    """
    path = result_path(output, entry)
    if not path.exists():
        return False
    record = read_record(path)
    # Read as a configuration, so that settings which are newer than the result have their defaults.
    theirs = check_kept(record["config"], str(path))
    _check_same(_comparable(theirs), _comparable(entry.config), str(path))
    return all(_found(record, wanted) for wanted in _wanted(plan, entry, record["best_epoch"]))


def read_record(path: Path) -> dict[str, Any]:
    """The result of one run, as :func:`work` wrote it.

    Raises:
        CheckpointError: when the file is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no result of a run; move it away and repeat the run")
    return record


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], place: str) -> None:
    """Refuse a run made with other settings, naming the first that differs."""
    before, now = dict(_flat(theirs)), dict(_flat(ours))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{place} was made with {key} {before.get(key)!r}, the plan says {now.get(key)!r}; "
                "move it away to repeat the run, or restore the plan"
            )


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


@dataclass(frozen=True)
class Wanted:
    """One evaluation that a run must have."""

    checkpoint: Literal["best", "last"]
    attacks: tuple[str, ...]
    limit: int | None


def _wanted(plan: Plan, entry: Entry, best_epoch: int) -> list[Wanted]:
    last_is_best = best_epoch == entry.config.training.epochs
    return [
        Wanted(checkpoint, tuple(name for name in m.attacks if name != "natural"), m.limit)
        for m in plan.evaluations
        if (m.seeds is None or entry.seed in m.seeds) and (m.rows is None or entry.label in m.rows)
        for checkpoint in m.checkpoints
        if not (checkpoint == "last" and last_is_best)
    ]


def _found(record: Mapping[str, Any], wanted: Wanted) -> dict[str, Any] | None:
    """The evaluation of ``record`` that answers ``wanted``."""
    for result in record["evaluations"]:
        if (
            result["model"]["checkpoint"] == wanted.checkpoint
            and result["data"]["split"] == "test"
            and set(wanted.attacks) <= result["attacks"].keys()
            and (wanted.limit is None or result["data"]["n"] == wanted.limit)
        ):
            return dict(result)
    return None


def work(plan: Plan, entry: Entry, output: Path) -> str:
    """Train and evaluate one run as far as it is not yet done, and write its result.

    Returns:
        The entry's name.
    """
    runs = Path(plan.runs)
    path = runs / entry.name
    raw = _referring(
        entry.config.model_dump(mode="json"), lambda label: str(runs / f"{label}-seed{entry.seed}")
    )
    config = check(raw, entry.name)
    if path.exists():
        folder = RunFolder.open(path)
        _check_same(_comparable(folder.config), _comparable(config), str(path))
    if not path.exists() or not folder.status().finished:
        prepared = prepare(config, None, None, folder if path.exists() else None)
        if not path.exists():
            folder = RunFolder.create(path, config, prepared.training.kind)
        carry_out(folder, config, prepared, quiet=True)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    record: dict[str, Any] = {
        "format": FORMAT,
        "plan": plan.name,
        "label": entry.label,
        "seed": entry.seed,
        "note": plan.rows[entry.label].note,
        "config": entry.config.model_dump(mode="json"),
        "best_epoch": _best_epoch(folder),
        "environment": folder.environment().content(),
        "metrics": [line.content() for line in folder.metrics()],
        "timing": [line.content() for line in folder.timing()],
        "evaluations": [result.content() for result in folder.evaluations()],
    }
    for wanted in _wanted(plan, entry, record["best_epoch"]):
        if _found(record, wanted) is None:
            evaluate(
                path,
                attacks=wanted.attacks,
                limit=wanted.limit,
                checkpoint=wanted.checkpoint,
                device=config.training.device,
            )
            record["evaluations"] = [result.content() for result in folder.evaluations()]
    target = result_path(output, entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, record)
    return entry.name


def _best_epoch(folder: RunFolder) -> int:
    best = folder.status().best
    if best is None:
        raise CheckpointError(f"{folder.path} has no best epoch; train it again")
    return best.epoch


def _comparable(config: RunConfig) -> Raw:
    """What makes two runs the same; a name does not, nor who was told of them."""
    return {**config.model_dump(mode="json"), "name": "", "description": "", "tracking": []}


# -- who does it ---------------------------------------------------------------------------------


class Job(Protocol):
    """Work that was handed out."""

    def result(self) -> str:
        """Wait for it; what it raised is raised here."""


class Executor(Protocol):
    """Somebody who works: ``concurrent.futures`` on this machine, ``submitit`` on a cluster."""

    def submit(self, function: Callable[..., str], /, *arguments: Any) -> Job:
        """Hand out work."""


class LocalExecutor:
    """So many runs at a time on this machine, each in a fresh process of its own.

    A process of its own, so that the peak of its memory is the run's.  Threads hand them out,
    because a pool of processes begins a run more than it works on, which then cannot be called off.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ConfigError(f"--jobs: expected 1 or more, got {jobs}")
        self.threads = ThreadPoolExecutor(jobs)
        self.over = False

    def submit(self, function: Callable[..., str], /, *arguments: Any) -> Job:
        """Hand out work."""
        return self.threads.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., str], *arguments: Any) -> str:
        if self.over:
            raise Interrupted("called off before it began")
        try:
            return _in_own_process(function, *arguments)
        except (Interrupted, KeyboardInterrupt):
            # A signal to all processes ends a run before this one hears of it and calls off.
            self.over = True
            raise

    def call_off(self) -> None:
        """Begin nothing more, and let what runs stop in order: a training after its step."""
        self.over = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        self.threads.shutdown()


def _in_own_process(function: Callable[..., str], *arguments: Any) -> str:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, keep_freed_memory) as process:
        return process.submit(function, *arguments).result()


def cluster_executor(cluster: str, folder: Path, options: Mapping[str, Any]) -> Executor:
    """Jobs of a cluster through submitit: "slurm", or "local" to try the way.

    Args:
        cluster: submitit's name of it.
        folder: where submitit keeps its files and the jobs' logs.
        options: submitit's parameters (``timeout_min``, ``slurm_partition``, ``cpus_per_task``).

    Raises:
        ConfigError: when submitit is not installed or does not know the cluster or an option.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "--cluster needs submitit: pip install 'cure-at[cluster]', or use --jobs"
        ) from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{"timeout_min": 24 * 60, **options})
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        raise ConfigError(f"--cluster {cluster}: {str(error).splitlines()[0]}") from None
    return executor


def carry_out_plan(
    plan: Plan,
    output: Path,
    executor: Executor,
    *,
    only: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    tell: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> list[str]:
    """Do what is not yet done; a run that fails does not keep others from being done.

    Args:
        plan: what to do.
        output: folder of the results.
        executor: who does it.
        only: only these rows, and what they need.
        seeds: only these seeds.
        tell: told a line a run.

    Returns:
        One sentence a run that failed or could not begin.
    """
    for label in only or ():
        _known(plan, label, "--only")
    chosen = _with_needs(plan, set(only) if only is not None else set(plan.rows))
    wanted_seeds = set(seeds) if seeds is not None else None
    with stopped_by_signals():
        try:
            return _carry_out(plan, output, executor, chosen, wanted_seeds, tell)
        except BaseException:
            # Jobs of a cluster go on.
            if isinstance(executor, LocalExecutor):
                executor.call_off()
            raise


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM as KeyboardInterrupt, also where a shell has them ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _carry_out(
    plan: Plan,
    output: Path,
    executor: Executor,
    chosen: set[str],
    wanted_seeds: set[int] | None,
    tell: Callable[[str], None],
) -> list[str]:
    failures: dict[tuple[str, int], str] = {}
    for stage in stages(plan):
        handed: list[tuple[Entry, Job]] = []
        for entry in stage:
            if entry.label not in chosen or not (
                wanted_seeds is None or entry.seed in wanted_seeds
            ):
                continue
            if is_done(plan, entry, output):
                tell(f"{entry.name}: done before")
                continue
            missing = [label for label in sorted(entry.needs) if (label, entry.seed) in failures]
            if missing:
                failures[entry.label, entry.seed] = (
                    f"{entry.name}: needs {missing[0]}, which failed"
                )
                continue
            handed.append((entry, executor.submit(work, plan, entry, output)))
        for entry, job in handed:
            try:
                job.result()
                tell(f"{entry.name}: done")
            # What submitit and a dying process raise are RuntimeErrors.
            except (CureError, RuntimeError) as error:
                failures[entry.label, entry.seed] = f"{entry.name}: {error}"
                tell(failures[entry.label, entry.seed])
    return list(failures.values())


def _with_needs(plan: Plan, labels: set[str]) -> set[str]:
    """The rows and all that they need."""
    needs = {entry.label: entry.needs for entry in entries(plan)}
    while more := {need for label in labels for need in needs.get(label, ())} - labels:
        labels = labels | more
    return labels


# -- what comes of it ----------------------------------------------------------------------------


def write_tables(plan: Plan, output: Path) -> ResultTable | None:
    """``table.json`` and ``table.md`` of the runs that are done; None while there are none."""
    done = [path for entry in entries(plan) if (path := result_path(output, entry)).exists()]
    if not done:
        return None
    rows = read_rows(done)
    both = any("last" in measurement.checkpoints for measurement in plan.evaluations)
    columns = [
        name
        for name in COLUMNS
        # Without a plan to measure it, the last is known only where it happens to be the best.
        if (both or "last" not in name) and any(row.get(name) is not None for row in rows)
    ]
    shown = table(rows, columns)
    write_text(output / "table.json", shown.json())
    text = shown.markdown()
    if plan.reference is not None:
        text += "\n" + differences(plan, rows)
    labels = {row["label"] for row in rows}
    notes = [f"- {k}: {row.note}" for k, row in plan.rows.items() if row.note and k in labels]
    wanted = entries(plan)
    missing: dict[str, list[str]] = {}
    for entry in wanted:
        if not result_path(output, entry).exists():
            missing.setdefault(entry.label, []).append(str(entry.seed))
    notes.append(f"- {len(done)} of the plan's {len(wanted)} runs are done.")
    if missing:
        lacking = [f"{label} (seed {', '.join(seeds)})" for label, seeds in missing.items()]
        notes[-1] += f" Missing: {'; '.join(lacking)}."
    write_text(output / "table.md", text + "\n" + "\n".join(notes) + "\n")
    return shown


def differences(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> str:
    """By how much each row lies above the plan's reference, paired by seed, in Markdown."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(str(row["label"]), []).append(dict(row))
    base = by_label.pop(str(plan.reference), [])
    accuracies = ("natural", "pgd20", "cw", "autoattack")
    columns = [name for name in accuracies if any(row.get(name) is not None for row in rows)]
    lines = [
        f"Differences to {plan.reference}, paired by seed: mean, 95 % Student t interval over "
        "seeds (none for one seed).",
        "",
        "| row | seeds | " + " | ".join(columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for label, own in by_label.items():
        found = {name: difference(own, base, name) for name in columns}
        cells = []
        for part in found.values():
            cell = "-" if part.mean is None else f"{part.mean:+.1f}"
            if part.interval is not None:
                cell += f" ({part.interval[0]:+.1f} to {part.interval[1]:+.1f})"
            cells.append(cell)
        count = max(part.n for part in found.values())
        lines.append(f"| {label} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
