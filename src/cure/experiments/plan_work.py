"""The work that a plan describes: training, evaluation, and tables of what is done.

``cure table PLAN`` trains and evaluates what is missing and writes one JSON file a run, so it can
be stopped at any time and continues where it was. Independent runs are submitted to an executor of
this machine or of a cluster; a run that starts from another run or learns from it waits for it.

The folder of a plan's results holds ``runs/ROW-seedN.json`` (a :class:`RunRecord` each),
``records.jsonl`` (their figures, small enough to publish), ``table.md`` and ``table.json``. The
results in ``records.jsonl`` count as done where ``runs/`` is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cure.config import RunConfig
from cure.errors import ConfigError, CureError, Interrupted, some
from cure.evaluation.evaluate import evaluate
from cure.experiments.compare import ResultTable, difference, table
from cure.experiments.compare.rows import TableRow, check_alike, rows_of
from cure.experiments.compare.sources import Source
from cure.experiments.executors import (
    Executor,
    Job,
    LocalExecutor,
    NoProcess,
    stopped_by_signals,
)
from cure.experiments.plan import Entry, Plan, Wanted, check_row, entries, referring, stages
from cure.recipe import Raw, check, check_kept
from cure.runs.folder import RunFolder
from cure.runs.packed import read_packed, summary, write_packed
from cure.runs.results import EvaluationRecord, RunRecord
from cure.training.run import resume, train
from cure.utils.io import user_path, write_text

PACKED = "records.jsonl"
"""File of a plan's folder with the figures of all runs, see :mod:`cure.runs.packed`."""

COLUMNS = (
    *("natural", "pgd20", "cw", "autoattack", "nrr_cw", "nrr_autoattack"),
    *("last_natural", "last_pgd20", "best_minus_last_pgd20"),
    *("seconds_per_epoch", "processor_seconds_per_epoch", "peak_memory_mib"),
)
"""Columns of a plan's table, those that were measured."""


def result_path(output: Path, entry: Entry) -> Path:
    """Where the result of a run is written."""
    return output / "runs" / f"{entry.name}.json"


def results_of(plan: Plan, output: Path) -> dict[str, RunRecord]:
    """The results of a plan's runs that are done, by name of the run.

    Raises:
        CheckpointError: when a file is damaged.
    """
    packed = output / PACKED
    known = read_packed(packed) if packed.exists() else {}
    found = {}
    for entry in entries(plan):
        path = result_path(output, entry)
        if path.exists():
            found[entry.name] = RunRecord.read(path)
        elif entry.name in known:
            found[entry.name] = known[entry.name]
    return found


def is_done(
    plan: Plan, entry: Entry, output: Path, known: Mapping[str, RunRecord] | None = None
) -> bool:
    """Whether the run's result is there and holds all that the plan measures.

    Args:
        plan: the plan.
        entry: the run.
        output: folder of the results.
        known: what :func:`results_of` returned for that folder; read anew when it is left out.

    Raises:
        ConfigError: when the result is there and was made with other settings.
    """
    record = (results_of(plan, output) if known is None else known).get(entry.name)
    if record is None:
        return False
    path = str(result_path(output, entry))
    # Read as a configuration, so that settings which are newer than the result have their defaults.
    theirs = check_kept(record.config, path)
    _check_same(theirs, _settled(entry.config, theirs), path)
    last_is_best = record.best_epoch == theirs.training.epochs
    return all(
        answer(record.of_best_weights(), wanted, theirs) is not None
        for wanted in wanted_of(plan, entry, last_is_best)
    )


def _settled(config: RunConfig, run: RunConfig) -> RunConfig:
    """The plan's configuration with the numbers that a run fixed for a share or a budget."""
    data, training = config.data, config.training
    if data.validation < 1:
        data = data.model_copy(update={"validation": run.data.validation})
    if data.augment.cutmix == "auto":
        augment = data.augment.model_copy(update={"cutmix": run.data.augment.cutmix})
        data = data.model_copy(update={"augment": augment})
    fixed = ["epochs"] if training.minutes is not None else []
    if training.min_steps is not None:
        fixed = ["epochs", "min_steps", "validate_every"]
    training = training.model_copy(update={name: getattr(run.training, name) for name in fixed})
    return config.model_copy(update={"data": data, "training": training})


def _check_same(theirs: RunConfig, ours: RunConfig, place: str) -> None:
    """Refuse a run made with other settings, naming the first that differs."""
    before, now = dict(_flat(_comparable(theirs))), dict(_flat(_comparable(ours)))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{place} was made with {key} {before.get(key)!r}, this call says "
                f"{now.get(key)!r}; give another folder for other settings, or move it away to "
                "repeat the run"
            )


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


def wanted_of(plan: Plan, entry: Entry, last_is_best: bool) -> list[Wanted]:
    """What is measured of a run; not the last weights where they are the best."""
    return [
        m.of(checkpoint)
        for m in plan.evaluations
        if (m.seeds is None or entry.seed in m.seeds) and (m.rows is None or entry.label in m.rows)
        for checkpoint in m.checkpoints
        if not (checkpoint == "last" and last_is_best and "best" in m.checkpoints)
    ]


def answer(
    results: Sequence[EvaluationRecord], wanted: Wanted, config: RunConfig
) -> EvaluationRecord | None:
    """The newest result of a run, of those oldest first, that answers what is measured.

    Plans measure with seed 0 in float32; results of earlier versions do not tell their seed.
    """
    threat = config.threat
    found = (
        result
        for result in reversed(results)
        if result.model.checkpoint == wanted.checkpoint
        and result.data.split == wanted.split
        and set(wanted.attacks) <= result.attacks.keys()
        and result.data.answers(wanted.limit)
        and result.seed in (None, 0)
        and not any("precision" in result.attacks[name].settings for name in wanted.attacks)
        and result.threat.same(threat.norm, threat.epsilon)
        and not (wanted.per_image and result.natural.right is None)
    )
    return next(found, None)


def work(plan: Plan, entry: Entry, output: Path) -> str:
    """Train and evaluate one run as far as it is not yet done, and write its result.

    Returns:
        The entry's name.

    Raises:
        CureError: when the run fails, or its folder has other settings.
    """
    runs = user_path(plan.runs)
    path = runs / entry.name

    def placed(value: Any) -> Any:
        return referring(value, lambda label: str(runs / f"{label}-seed{entry.seed}"))

    if path.exists():
        theirs = RunFolder.open(path).config
        ours = check(placed(entry.config.model_dump(mode="json")), entry.name)
        _check_same(theirs, _settled(ours, theirs), str(path))
        resume(path, quiet=True)
    else:
        train(plan.recipe, placed(entry.settings), run=path, quiet=True)
    settings = entry.config.training
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = RunFolder.open(path)
    config = _settled(entry.config, folder.config)
    best = folder.status().best
    best_epoch = None if best is None else best.epoch
    for wanted in wanted_of(plan, entry, best_epoch == config.training.epochs):
        if answer(folder.evaluations(), wanted, config) is None:
            evaluate(
                path,
                attacks=wanted.attacks,
                limit=wanted.limit,
                checkpoint=wanted.checkpoint,
                split=wanted.split,
                per_image=wanted.per_image,
                device=settings.device,
            )
    record = RunRecord(
        format="cure-run-1",
        plan=plan.name,
        label=entry.label,
        seed=entry.seed,
        note=plan.rows[entry.label].note,
        config=config.model_dump(mode="json"),
        best_epoch=best_epoch,
        environment=folder.environment(),
        metrics=folder.metrics(),
        timing=folder.timing(),
        evaluations=folder.evaluations(),
    )
    target = result_path(output, entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    record.write(target)
    return entry.name


def _comparable(config: RunConfig) -> Raw:
    """The settings that make two runs the same run; names and trackers are left out."""
    return {**config.model_dump(mode="json"), "name": "", "description": "", "tracking": []}


def carry_out_plan(
    plan: Plan,
    output: Path,
    executor: Executor,
    *,
    only: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    tell: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> list[str]:
    """Do what is not yet done; the failure of a run does not stop the others.

    Args:
        plan: what to do.
        output: folder of the results.
        executor: runs the calls.
        only: only these rows, and what they need.
        seeds: only these seeds.
        tell: called with a line about each run.

    Returns:
        One sentence a run that failed or could not begin.

    Raises:
        ConfigError: for a row or a seed that the plan does not have.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    for label in only or ():
        check_row(plan, label, "--only")
    rows = set(only) if only is not None else set(plan.rows)
    chosen = _with_needs(plan, rows)
    wanted_seeds = set(seeds) if seeds is not None else None
    known = sorted({entry.seed for entry in entries(plan) if entry.label in rows})
    if absent := sorted((wanted_seeds or set()).difference(known)):
        raise ConfigError(
            f"plan {plan.name}: --seeds: no row that is asked for has seed {absent[0]}; expected "
            f"some of {', '.join(map(str, known))}"
        )
    with stopped_by_signals():
        try:
            return _carry_out(plan, output, executor, chosen, wanted_seeds, tell)
        except BaseException as error:
            # Jobs of a cluster go on.
            told = "no longer waiting; jobs of the cluster go on"
            if isinstance(executor, LocalExecutor):
                executor.cancel()
                told = "the runs are stopped; the same command goes on"
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(told) from None
            raise


def _carry_out(
    plan: Plan,
    output: Path,
    executor: Executor,
    chosen: set[str],
    wanted_seeds: set[int] | None,
    tell: Callable[[str], None],
) -> list[str]:
    failures: dict[tuple[str, int], str] = {}
    wanted = [
        [
            entry
            for entry in stage
            if entry.label in chosen and (wanted_seeds is None or entry.seed in wanted_seeds)
        ]
        for stage in stages(plan)
    ]
    known = results_of(plan, output)
    left = to_do(plan, output, wanted, known)
    lost = [name for name, entry in left.items() if is_done(plan, entry, output, known)]
    if lost:
        tell(
            f"trained again, because other runs need their weights, which are not in {plan.runs}: "
            f"{some(sorted(lost))}; their new figures replace the known ones"
        )
    for stage in wanted:
        handed: list[tuple[Entry, Job]] = []
        for entry in stage:
            if entry.name not in left:
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
            except NoProcess:
                raise
            # What submitit raises are RuntimeErrors.
            except (CureError, RuntimeError) as error:
                failures[entry.label, entry.seed] = f"{entry.name}: {error}"
                tell(failures[entry.label, entry.seed])
    return list(failures.values())


def to_do(
    plan: Plan,
    output: Path,
    wanted: Sequence[Sequence[Entry]] | None = None,
    known: Mapping[str, RunRecord] | None = None,
) -> dict[str, Entry]:
    """The runs that are not done, and those that one of these needs and whose folder is not there.

    Results without the folders of their runs are enough for all others, on another machine too.

    Args:
        plan: the plan.
        output: folder of the results.
        wanted: some of its :func:`stages`; by default all.
        known: what :func:`results_of` returned for that folder; read anew when it is left out.

    Raises:
        ConfigError: when a result was made with other settings.
    """
    known, found = results_of(plan, output) if known is None else known, dict[str, Entry]()
    needed = set[tuple[str, int]]()
    groups = stages(plan) if wanted is None else wanted
    for entry in (entry for stage in reversed(groups) for entry in stage):
        lost = (entry.label, entry.seed) in needed and not (
            user_path(plan.runs) / entry.name
        ).exists()
        if lost or not is_done(plan, entry, output, known):
            found[entry.name] = entry
            needed |= {(label, entry.seed) for label in entry.needs}
    return found


def _with_needs(plan: Plan, labels: set[str]) -> set[str]:
    """The rows and all that they need."""
    needs = {entry.label: entry.needs for entry in entries(plan)}
    while more := {need for label in labels for need in needs.get(label, ())} - labels:
        labels = labels | more
    return labels


# Tables.


def pack(done: Mapping[str, RunRecord], output: Path) -> None:
    """Write ``records.jsonl``, where :func:`results_of` finds what ``runs/`` has no file of.

    Runs of other rows that it holds stay in it, behind these.
    """
    file = output / PACKED
    found = {name: summary(record) for name, record in done.items()}
    others = read_packed(file) if file.exists() else {}
    write_packed(file, found | {k: v for k, v in others.items() if k not in found})


def write_tables(plan: Plan, output: Path) -> ResultTable | None:
    """Write ``table.json``, ``table.md`` and ``records.jsonl`` of the runs that are done.

    Returns:
        The table; None while no run is done.
    """
    done = results_of(plan, output)
    if not done:
        return None
    rows = rows_of([Source.of_record(r, name, str(output / name)) for name, r in done.items()])
    check_alike(rows)
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
    pack(done, output)
    labels = {row["label"] for row in rows}
    notes = [f"- {k}: {row.note}" for k, row in plan.rows.items() if row.note and k in labels]
    wanted = entries(plan)
    missing: dict[str, list[str]] = {}
    for entry in wanted:
        if entry.name not in done:
            missing.setdefault(entry.label, []).append(str(entry.seed))
    notes.append(f"- {len(done)} of the plan's {len(wanted)} runs are done.")
    if missing:
        lacking = [f"{label} (seed {', '.join(seeds)})" for label, seeds in missing.items()]
        notes[-1] += f" Missing: {'; '.join(lacking)}."
    write_text(output / "table.md", text + "\n" + "\n".join(notes) + "\n")
    return shown


def differences(plan: Plan, rows: Sequence[TableRow]) -> str:
    """Differences of each row to the plan's reference row, paired by seed, in Markdown."""
    by_label: dict[str, list[TableRow]] = {}
    for row in rows:
        by_label.setdefault(str(row["label"]), []).append(row)
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
