"""Accuracies of a page: the verdict, the table, and the diagnosis beside its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cure.attacks.registry import attack_label, attack_order, is_reference
from cure.errors import ConfigError
from cure.evaluation.diagnosis import CHECKS
from cure.experiments.compare.rows import (
    RATIOS,
    TableRow,
    alike,
    check_alike,
    rows_of,
)
from cure.experiments.compare.sources import IMAGES, no_place
from cure.report.components import (
    NO_BREAK,
    Block,
    Cell,
    Grid,
    Missing,
    Words,
    accuracy_cell,
    between,
    percent,
    points,
    share_cell,
    written,
)
from cure.report.loader import Entry
from cure.runs.results import Accuracy, DiagnosisRecord, EvaluationRecord, Finding
from cure.utils.stats import newcombe

_BELIEVED = "can it be believed?"


@dataclass(frozen=True)
class Measured:
    """The evaluated networks of a page.

    Attributes:
        row: of each entry by name, as ``cure compare`` reads it.
        groups: the rows, those that compare together, the largest group first.
    """

    row: Mapping[str, TableRow]
    groups: Sequence[Sequence[TableRow]]


def measure(entries: Iterable[Entry]) -> Measured:
    """The rows of all entries that were evaluated."""
    having = [entry.source for entry in entries if entry.evaluations]
    rows = rows_of(having) if having else []
    groups = sorted(alike(rows), key=len, reverse=True)
    return Measured({str(row["run"]): row for row in rows}, groups)


def results_of(entry: Entry, row: TableRow | None) -> list[EvaluationRecord]:
    """The results that a row is made from, oldest first: one checkpoint on one kind of images."""
    if row is None:
        return []
    return entry.source.of(row["checkpoint"], tuple(row[name] for name in IMAGES))


def measured_attacks(row: TableRow) -> list[str]:
    """The attacks of a row, the weakest first."""
    return sorted(row["attack_settings"], key=attack_order)


def strongest(row: TableRow) -> str | None:
    """The attack that left fewest right, of those on most images; of equals the usual strongest.

    Which attack is the strongest depends on the network: gradients that are masked mislead those
    that use them.  An attack on fewer images, as AutoAttack often is, counts where none on more
    images left fewer.
    """
    names = measured_attacks(row)
    if not names:
        return None
    usual = names[-1]
    on_as_many = [name for name in names if row[f"{name}_n"] >= row[f"{usual}_n"]]
    return min(reversed(on_as_many), key=lambda name: float(row[name]))


def about(row: TableRow) -> str:
    """What a row's numbers are of: ``cifar10 test images, Linf ε = 8/255``."""
    return f"{row['data']} ({row['split']} images), {row['norm']} ε{NO_BREAK}={NO_BREAK}" + str(
        row["epsilon_text"]
    )


def change(row: TableRow) -> str:
    """The threat in words."""
    size = float(row["epsilon"])
    if row["norm"] == "Linf":
        return (
            f"change every pixel by up to {row['epsilon_text']} of the way from black to white"
            if size <= 1
            else f"change every pixel by up to {row['epsilon_text']}"
        )
    what = {"L2": "Euclidean length", "L1": "sum of changes"}.get(str(row["norm"]), "size")
    return f"change the image by a {what} of up to {row['epsilon_text']}"


# The diagnosis.


@dataclass(frozen=True)
class Note:
    """A finding that a reader of a number should know.

    Attributes:
        status: "warn" or "fail".
        text: who, which check, what it means.
        attacks: whether it concerns accuracies under attack only.
    """

    status: str
    text: str
    attacks: bool


def _is_about(diagnosis: DiagnosisRecord, row: TableRow) -> bool:
    """Whether a diagnosis is of a row's weights, images and threat."""
    data = diagnosis.data
    return (
        diagnosis.model.checkpoint in (None, row["checkpoint"])
        and (no_place(data.name), data.split) == (row["data"], row["split"])
        and diagnosis.norm in (None, row["norm"])
        and (diagnosis.epsilon is None or math.isclose(diagnosis.epsilon, row["epsilon"]))
    )


def checks_of(entry: Entry, row: TableRow | None) -> tuple[list[Finding], bool]:
    """The newest finding of each check on this network, and whether ``cure diagnose`` was run."""
    found: dict[str, Finding] = {}
    if row is not None:
        images = tuple(row[name] for name in IMAGES)
        for result in entry.source.of(row["checkpoint"], images):
            found |= (
                {each.name: each for each in result.diagnosis.checks} if result.diagnosis else {}
            )
    diagnoses = [each for each in entry.diagnoses if row is None or _is_about(each, row)]
    for diagnosis in diagnoses:
        found |= {each.name: each for each in diagnosis.checks}
    return list(found.values()), bool(diagnoses)


def notes_of(entry: Entry, row: TableRow | None) -> list[Note]:
    """Findings that did not pass, the worst first."""
    checks, _ = checks_of(entry, row)
    notes = [
        Note(
            check.status,
            f"{entry.name}: {check.name.replace('_', ' ')}: {check.meaning}",
            check.name in CHECKS and CHECKS[check.name].attacks,
        )
        for check in checks
        if check.status != "pass"
    ]
    return sorted(notes, key=lambda note: note.status != "fail")


# The verdict.


@dataclass(frozen=True)
class Number:
    """A large number of the verdict; ``status`` "pass", "warn" or "fail" colours it."""

    title: str
    value: str
    interval: str = ""
    bar: tuple[float, float, float] | None = None
    detail: str = ""
    status: str = ""


@dataclass(frozen=True)
class Verdict:
    """The shortest summary of one network.

    Attributes:
        entry: which.
        sentences: the accuracies, the change against the start, in this order.
        threat: what an attack may do.
        warnings: what makes the numbers less than they seem.
        numbers: the same in large figures.
    """

    entry: Entry
    sentences: list[str]
    threat: str = ""
    warnings: Sequence[str] = ()
    numbers: Sequence[Number] = ()


def verdict(entry: Entry, measured: Measured) -> Verdict:
    """The verdict on one network."""
    gained = list(entry.outcome.warnings) if entry.outcome is not None else []
    row = measured.row.get(entry.name)
    if row is None:
        sentence = f"{entry.name} has not been evaluated, so nothing is known of its accuracy."
        return Verdict(entry, [sentence], warnings=gained)
    attack = strongest(row)
    images = f"{int(row['n']):,} {row['split']} images"
    sentence = (
        f"{entry.name} is right on {percent(row['natural'])} "
        f"({between(row['natural_interval'])}) of {images}"
    )
    baseline = row.get("majority")
    detail = f"right on {images} as they are"
    if baseline is not None:
        detail += f"; always naming the largest class is right on {percent(baseline)}"
    below = baseline is not None and row["natural"] <= baseline
    numbers = [_number("natural images", row, "natural", detail, "fail" if below else "")]
    robust = None
    if attack is None:
        sentence += " as they are; under attack it was not measured."
    else:
        shown, robust, n = attack_label(attack), float(row[attack]), int(row[f"{attack}_n"])
        of = f"{n:,} {row['split']} images"
        sentence += (
            f" as they are. It withstands {shown}, the strongest attack tried, on "
            f"{percent(robust)} ({between(row[f'{attack}_interval'])}) of "
            f"{'these' if n == row['n'] else of}."
        )
        detail = f"withstands {shown}, {row['norm']} ε = {row['epsilon_text']}, on {of}"
        worst, figures = _worst(entry, row), row
        if worst is not None and worst.accuracy < robust:
            robust, shown = worst.accuracy, "all attacks"
            sentence += (
                f" {percent(robust)} ({between(worst.interval)}) withstand every attack that was "
                "tried."
            )
            detail = f"withstands every attack, {row['norm']} ε = {row['epsilon_text']}, on {of}"
            figures = row | {attack: robust, f"{attack}_interval": worst.interval}
        broken = round(robust, 1) == 0
        numbers.append(_number("under attack", figures, attack, detail, "fail" if broken else ""))
        if broken:
            gained.insert(0, f"No image withstands {shown}: {entry.name} is not robust.")
    sentences = [sentence, *_against_start(entry, row, measured)]
    numbers.append(_trust(entry, row, robust))
    threat = f"An attack may {change(row)}." if attack else ""
    return Verdict(entry, sentences, threat, [*gained, *_warnings(entry, row, attack)], numbers)


def _number(title: str, row: TableRow, name: str, detail: str, status: str = "") -> Number:
    low, high = row[f"{name}_interval"]
    bar = (float(row[name]), low, high)
    said = f"95 % interval {between((low, high))}"
    return Number(title, percent(row[name]), said, bar, detail, status)


def _against_start(entry: Entry, row: TableRow, measured: Measured) -> list[str]:
    """The change that training made, where both were evaluated alike."""
    start = entry.start
    before = measured.row.get(start.name) if start is not None else None
    if start is None:
        return []
    if before is None:
        return [
            f"The network it started from ({start.name}) was not evaluated, so what training "
            "changed is not known."
        ]
    if not _comparable(row, before):
        return [f"{start.name}, where it started, was evaluated otherwise; the two do not compare."]

    def changed(name: str) -> str:
        # One test set is not two independent samples: the true interval is as wide or narrower.
        limits = newcombe(
            row[name], row[f"{name}_interval"], before[name], before[f"{name}_interval"]
        )
        return points(row[name] - before[name], limits)

    said = f"Against the network it started from ({start.name}): {changed('natural')}"
    said += " on natural images"
    shared = [
        name
        for name in measured_attacks(row)
        if name in before["attack_settings"] and before[f"{name}_n"] == row[f"{name}_n"]
    ]
    if shared:
        said += f", {changed(shared[-1])} under {attack_label(shared[-1])}"
    return [said + "."]


def _comparable(first: TableRow, second: TableRow) -> bool:
    try:
        check_alike([first, second])
    except ConfigError:
        return False
    return True


def _trust(entry: Entry, row: TableRow, robust: float | None) -> Number:
    """Whether the numbers can be believed; never green without a diagnosis or robust accuracy."""
    checks, diagnosed = checks_of(entry, row)
    failed, warned = (sum(check.status == kind for check in checks) for kind in ("fail", "warn"))
    made_by = "of cure diagnose" if diagnosed else "of the evaluation; cure diagnose has more"
    if not checks:
        return Number(_BELIEVED, "unchecked", detail="no checks were run", status="warn")
    status = "fail" if failed else "warn" if warned else "pass"
    value = {"fail": "no", "warn": "with care", "pass": "no check failed"}[status]
    if status == "pass" and (not diagnosed or robust is None or round(robust, 1) == 0):
        status = ""
    passed = len(checks) - failed - warned
    detail = f"{passed} of {len(checks)} checks passed ({made_by})"
    return Number(_BELIEVED, value, detail=detail, status=status)


def _warnings(entry: Entry, row: TableRow, attack: str | None) -> list[str]:
    where = entry.typed
    warnings = []
    if attack is None:
        warnings.append(f"Under attack nothing was measured: `cure evaluate {where}`.")
    elif not any(map(is_reference, tried := measured_attacks(row))):
        names = " and ".join(attack_label(name) for name in tried)
        warnings.append(
            f"The accuracy under attack comes from {names} alone, and a stronger "
            f"attack can only lower it: `cure evaluate {where} --attacks autoattack`."
        )
    checks, diagnosed = checks_of(entry, row)
    for status, says in (("fail", "fails"), ("warn", "warns")):
        found = [check for check in checks if check.status == status]
        names = ", ".join(check.name.replace("_", " ") for check in found)
        if found:
            warnings.append(f"The diagnosis {says} ({names}): {found[0].meaning}")
    if not diagnosed:
        warnings.append(
            f"Whether attacks were misled was checked briefly only: `cure diagnose {where}`."
        )
    if row.get("majority") is not None and row["natural"] <= row["majority"]:
        warnings.append(
            f"It is no more accurate than always naming the largest class "
            f"({percent(row['majority'])}); see the accuracy by class."
        )
    warnings += [f"Noted while evaluating: {note}." for note in _notes_given(entry, row)]
    if row["split"] != "test":
        warnings.append(
            f"These are {row['split']} images, which training has seen or chosen by; "
            "test images are usually harder."
        )
    if row["finished"] is False:
        warnings.append("It was not trained to its end.")
    return warnings


def _notes_given(entry: Entry, row: TableRow) -> list[str]:
    """What was decided for the user while evaluating, each sentence once."""
    results = results_of(entry, row)
    return list(dict.fromkeys(note.rstrip(".") for result in results for note in result.notes))


# The tables.


def tables(entries: Sequence[Entry], measured: Measured) -> list[Block]:
    """Accuracies with intervals, a table for each set of rows that compare."""
    blocks: list[Block] = []
    place = {entry.name: index for index, entry in enumerate(entries)}
    by_name = {entry.name: entry for entry in entries}
    remarks: list[Note] = []
    for number_of_group, group in enumerate(measured.groups):
        if number_of_group:
            why = _why(measured.groups[0][0], group[0])
            said = f"Measured differently, so not to be compared with the table above: {why}."
            blocks.append(Words([said]))
        blocks.append(_table(group, by_name, place, remarks))
        blocks += [grid for row in group for grid in _by_class(by_name[row["run"]], row)]
    if remarks:
        blocks.append(Words([f"{note.status}: {note.text}" for note in remarks], "remarks"))
    unmeasured = [entry for entry in entries if entry.name not in measured.row]
    for entry in unmeasured:
        sentence = f"{entry.name} has no evaluation."
        blocks.append(Missing(sentence, [f"cure evaluate {entry.typed}"]))
    blocks += _unfinished(entries) + _estimates(entries)
    return blocks


def _why(first: TableRow, other: TableRow) -> str:
    try:
        check_alike([first, other])
    except ConfigError as error:
        return str(error).partition(": ")[2].partition("; evaluate")[0]
    return "another way"


def _table(
    rows: Sequence[TableRow],
    entries: Mapping[str, Entry],
    place: Mapping[str, int],
    remarks: list[Note],
) -> Grid:
    attacks = {name: None for row in rows for name in row["attack_settings"]}
    # What counts most stands first: a reader of a phone sees it without scrolling.
    names = measured_attacks({"attack_settings": attacks})[::-1]
    first = rows[0]
    counts = {n: {row[f"{n}_n"] for row in rows if row.get(f"{n}_n") is not None} for n in names}
    ratios = [n for n in RATIOS if any(row.get(f"nrr_{n}") is not None for row in rows)]
    worst = {row["run"]: _worst(entries[row["run"]], row) for row in rows}
    header = ["network", "method", "natural", *(["worst case"] if any(worst.values()) else [])]
    for name in names:
        alone = len(counts[name]) == 1 and counts[name] != {first["n"]}
        header.append(attack_label(name) + (f", n = {min(counts[name]):,}" if alone else ""))
        header += [f"NRR, {attack_label(name)}"] if name in ratios else []
    cells = []
    for row in rows:
        entry = entries[row["run"]]
        own = [(len(remarks) + i, note) for i, note in enumerate(notes_of(entry, row), start=1)]
        remarks += [note for _, note in own]
        every = [(i, note.status) for i, note in own]
        natural = [(i, note.status) for i, note in own if not note.attacks]
        line = [
            Cell(entry.name, series=place[entry.name]),
            Cell(str(row["method"] or "unknown")),
            accuracy_cell(row["natural"], row["natural_interval"], natural, bar=True),
        ]
        if any(worst.values()):
            part = worst[row["run"]]
            count = part.n if part is not None and part.n != row["n"] else None
            line.append(share_cell(part, every, count, bar=True))
        for name in names:
            count = row.get(f"{name}_n") if len(counts[name]) > 1 else None
            value, limits = row.get(name), row.get(f"{name}_interval")
            line.append(accuracy_cell(value, limits, every, count, bar=True))
            if name in ratios:
                value = row.get(f"nrr_{name}")
                line.append(Cell(written(value), order=-1.0 if value is None else value))
        cells.append(line)
    caption = (
        f"Accuracy in percent (95 % interval) on {about(first)}, n = {int(first['n']):,} images"
        + (f", {first['checkpoint']} checkpoint" if first["checkpoint"] else "")
    )
    return Grid(caption, header, cells, words=2, sortable=len(cells) > 1)


MOST_CLASSES = 100
"""Rows of a table of accuracies by class."""

UNFOLDED_CLASSES = 12


def _by_class(entry: Entry, row: TableRow) -> list[Grid]:
    """Accuracy of each class, natural and under each attack; none for results without it."""
    names = measured_attacks(row)[::-1]
    results = results_of(entry, row)
    results = [result for result in results if result.natural.n == row["n"]] or results
    counts = next((r.data.images_by_class for r in reversed(results) if _counted(r)), None)
    if counts is None:
        return []
    parts: dict[str, Accuracy] = {}
    for result in results:
        if result.data.images_by_class == counts:
            parts |= {"natural": result.natural} | result.attacks
    parts = {
        name: part
        for name in ("natural", *names)
        if (part := parts.get(name)) is not None
        and len(part.accuracy_by_class or ()) == len(counts)
    }
    classes = next(r.data.classes for r in reversed(results) if _counted(r))
    present = [k for k, count in enumerate(counts) if count]

    def lowest(k: int) -> tuple[float, ...]:
        return tuple((part.accuracy_by_class or [])[k] or 0.0 for part in list(parts.values())[1:])

    shown = present if len(present) <= MOST_CLASSES else sorted(present, key=lowest)[:MOST_CLASSES]
    cells = [
        [
            Cell("balanced (mean over the classes)"),
            Cell(f"{sum(counts):,}", order=float(sum(counts))),
            *(accuracy_cell(p.balanced_accuracy, p.balanced_interval) for p in parts.values()),
        ]
    ]
    for k in shown:
        figures = [(part.accuracy_by_class or [])[k] for part in parts.values()]
        line = [Cell(classes[k]), Cell(f"{counts[k]:,}", order=float(counts[k]))]
        cells.append([*line, *(Cell(written(value), order=value) for value in figures)])
    caption = f"{entry.name}: accuracy by class in percent"
    if len(shown) < len(present):
        caption += f", the {len(shown)} lowest of {len(present)} classes"
    header = ["class", "images", *(n if n == "natural" else attack_label(n) for n in parts)]
    folded = len(cells) > UNFOLDED_CLASSES
    return [Grid(caption, header, cells, sortable=True, folded=folded)]


def _counted(result: EvaluationRecord) -> bool:
    """Whether it has figures by class that fit its classes."""
    counts, figures = result.data.images_by_class, result.natural.accuracy_by_class
    sizes = {len(values) for values in (counts or [], figures or [], result.data.classes)}
    return bool(counts) and len(sizes) == 1


def _worst(entry: Entry, row: TableRow) -> Accuracy | None:
    """Accuracy under all attacks of the evaluation with the strongest one, image by image."""
    name = strongest(row)
    # An evaluation of fewer images, made later, is not what the row is of.
    results = [
        result
        for result in results_of(entry, row)
        if name in result.attacks and result.attacks[name].n == row[f"{name}_n"]
    ]
    results = [result for result in results if result.worst_case is not None]
    part = results[-1].worst_case if results else None
    over = part.content().get("over") if part is not None else None
    return part if isinstance(over, list) and len(over) > 1 else None


def _unfinished(entries: Iterable[Entry]) -> list[Block]:
    """Attacks that ran out of time have bounds and no accuracy."""
    said = [
        f"{entry.name}, {attack_label(name)}: not finished; its accuracy lies between "
        f"{percent(part.bounds[0])} and {percent(part.bounds[1])}."
        for entry in entries
        for result in entry.evaluations
        for name, part in (result.unfinished or {}).items()
    ]
    return [Words(said, "warn")] if said else []


def _estimates(entries: Iterable[Entry]) -> list[Block]:
    """Attacks that left images alone give an estimate."""
    said = [
        f"{entry.name}, {attack_label(name)}: {estimate}."
        for entry in entries
        for result in entry.evaluations
        for name, part in result.attacks.items()
        if (estimate := part.estimate()) is not None
    ]
    return [Words(said, "remarks")] if said else []
