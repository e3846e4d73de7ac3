"""``write_evidence``: a page for a reviewer of one run, and hashes of all of its files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cure.attacks import Threat
from cure.attacks.registry import attack_label, is_reference
from cure.errors import ConfigError, CureError
from cure.evaluation.calibration import Reliability, calibration_under_attack
from cure.evaluation.target import Target, describe_images
from cure.experiments.compare.rows import TableRow
from cure.experiments.compare.sources import no_place
from cure.report.accuracies import change, checks_of, measure, verdict
from cure.report.components import (
    DASH,
    Block,
    Cell,
    Figure,
    Grid,
    Missing,
    Section,
    Words,
    between,
    share_cell,
    written,
)
from cure.report.loader import Entry, PageInputs, load_inputs
from cure.report.page import GENERATOR, is_ours, page_sections, render
from cure.runs.folder import path_of
from cure.runs.results import UnseenThreat
from cure.runs.run import Run
from cure.utils.engine import Engine
from cure.utils.io import first_line, user_path, write_bytes
from cure.utils.modes import in_evaluation
from cure.utils.plotting import Chart, Panel, Series

PAGE, PDF, HASHES, SIGNATURE = "evidence.html", "evidence.pdf", "SHA256SUMS", "SHA256SUMS.sig"
NAMESPACE = "cure-evidence"
"""What a signature is for, as ``ssh-keygen -n`` wants it."""

CALIBRATION_IMAGES = 200
ATTACK = "pgd20"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NOT_RECORDED = "not recorded"

_MEANING = (
    "From the files of the run; only the calibration was computed for this page. It is a record of "
    "what was measured, not a certificate, and it claims compliance with nothing."
)


@dataclass(frozen=True)
class Evidence:
    """What was written.

    Attributes:
        page: HTML.
        pdf: the same on paper; None where there is no browser.
        hashes: SHA-256 of all files of the run, for ``sha256sum -c``.
        signature: of ``hashes``; None without a key.
        notes: a sentence for each part that was not written.
    """

    page: Path
    pdf: Path | None
    hashes: Path
    signature: Path | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Calibration:
    """Reliability on images as they are and attacked, and of what it is."""

    found: Mapping[str, Reliability]
    data: Mapping[str, Any]
    threat: Threat
    epoch: int | None
    seed: int


def write_evidence(
    run: str | Path | Run,
    *,
    sign: str | Path | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    title: str | None = None,
    device: str = "auto",
) -> Evidence:
    """Write ``evidence.html``, ``evidence.pdf`` and ``SHA256SUMS`` into a run.

    Args:
        run: the folder of a run.
        sign: a private SSH key; ``SHA256SUMS`` is then signed with ``ssh-keygen -Y sign``.
        calibration_images: how many test images the calibration is measured on, natural and under
            PGD-20; 0 leaves it out.
        title: heading of the page; by default the name of the run.
        device: where the calibration is measured.

    Raises:
        CureError: when there is no such run, the key cannot sign, or a file of another origin is
            in the way; nothing is written then.

    >>> import cure
    >>> small = ["method=at", "start=scratch", "training.epochs=1", "data.limit=400"]
    >>> run = cure.train("digits", small, run="runs/shown", quiet=True)
    >>> write_evidence(run, calibration_images=20).page.name
    'evidence.html'
    """
    folder = path_of(run)
    if folder.is_file() or calibration_images < 0:
        what = f"got the file {folder}" if folder.is_file() else f"got {calibration_images} images"
        raise ConfigError(f"expected the folder of a run and 0 or more images, {what}")
    inputs = load_inputs([folder])
    _check_place(folder)
    inputs.entries = [entry for entry in inputs.entries if not entry.is_start]
    measured = _calibrate(run, calibration_images, device)
    html = _page(inputs, measured, sign is not None, title)
    pdf, notes = _printed(html)
    own = {PAGE: html.encode("utf-8")} | ({PDF: pdf} if pdf is not None else {})
    # Names of files may be no text.
    sums = _sums(folder, own).encode("utf-8", "surrogateescape")
    signature = None if sign is None else _signed(sums, user_path(sign))
    if signature is None:
        notes.append(f"{HASHES} is unsigned: name a private SSH key with --sign to sign it")
    try:
        for name in (PDF, SIGNATURE):
            (folder / name).unlink(missing_ok=True)
        for name, content in own.items():
            write_bytes(folder / name, content)
        write_bytes(folder / HASHES, sums)
        if signature is not None:
            write_bytes(folder / SIGNATURE, signature)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to ({error.strerror}); free it") from None
    return Evidence(
        folder / PAGE,
        folder / PDF if pdf is not None else None,
        folder / HASHES,
        folder / SIGNATURE if signature is not None else None,
        notes,
    )


def _check_place(folder: Path) -> None:
    """Refuse to replace files that this function did not write."""
    ours = (folder / PAGE).exists() and is_ours(folder / PAGE)
    for name in (PAGE, PDF, HASHES, SIGNATURE):
        if (folder / name).exists() and not ours:
            raise ConfigError(
                f"{folder / name} was not made by `cure report --evidence` and is kept; move it"
            )


# Files.


def _sums(folder: Path, own: Mapping[str, bytes]) -> str:
    """A line a file as ``sha256sum`` writes and checks it."""
    found = {name: hashlib.sha256(content).hexdigest() for name, content in own.items()}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (PAGE, PDF, HASHES, SIGNATURE):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return "".join(_sum_line(digest, name) for name, digest in sorted(found.items()))


def _sum_line(digest: str, name: str) -> str:
    r"""A line of SHA256SUMS.

    >>> _sum_line("ab", "a\nb")
    '\\ab  a\\nb\n'
    """
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def _signed(sums: bytes, key: Path) -> bytes:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise ConfigError("ssh-keygen is not installed, which signs; install OpenSSH")
    done = subprocess.run(
        [program, "-Y", "sign", "-n", NAMESPACE, "-f", str(key)],
        input=sums,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise ConfigError(f"{key} cannot sign ({said}); name a private SSH key with --sign")
    return done.stdout


def _printed(html: str) -> tuple[bytes | None, list[str]]:
    """The page as PDF; None and a sentence where that is not possible."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        return None, [f"{PDF} was not written: there is no Chromium or Chrome to print with"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        page, pdf = Path(place) / PAGE, Path(place) / PDF
        page.write_text(html, encoding="utf-8")
        flags = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        # Chromium has no sandbox for the superuser; the page itself may request nothing.
        flags += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        flags += [f"--user-data-dir={place}/profile", "--no-pdf-header-footer"]
        try:
            subprocess.run(
                [program, *flags, f"--print-to-pdf={pdf}", page.as_uri()],
                capture_output=True,
                timeout=120,
                check=False,
            )
            content = pdf.read_bytes()
        except (OSError, subprocess.TimeoutExpired):
            content = b""
    if not content.startswith(b"%PDF"):
        return None, [f"{PDF} was not written: {Path(program).name} did not print the page"]
    return content, []


# Calibration.


def _calibrate(run: str | Path | Run, count: int, device: str) -> Calibration | str:
    """The calibration, or why it was not measured."""
    if count == 0:
        return "it was left out (0 images)"
    try:
        target = Target.of(run, split="test", limit=count, device=device)
        images, model = target.load()
        engine, threat = Engine.for_evaluation(device), target.threat()
        model = in_evaluation(engine.place(model))
        found = calibration_under_attack(model, images, threat, attack=ATTACK, engine=engine)
    except CureError as error:
        return first_line(error)
    return Calibration(found, describe_images(images), threat, target.facts["epoch"], 0)


def _calibration(measured: Calibration | str, where: str) -> list[Block]:
    if isinstance(measured, str):
        return [
            Missing(f"Not measured: {measured}.", [f"cure report --evidence {where}"]),
        ]
    threat, n = measured.threat, measured.data["n"]
    names = {"natural": "natural", ATTACK: attack_label(ATTACK)}
    rows, series = [], []
    for number, (name, found) in enumerate(measured.found.items()):
        right = sum(count * accuracy for count, _, accuracy in found.bins) / n
        sure = sum(count * confidence for count, confidence, _ in found.bins) / n
        figures = [Cell(written(100 * value)) for value in (right, sure, found.ece)]
        rows.append([Cell(names[name]), *figures, Cell(f"{n:,}")])
        series.append(
            Series(
                names[name],
                [confidence for _, confidence, _ in found.bins],
                [accuracy for _, _, accuracy in found.bins],
                style=number,
            )
        )
    series.append(Series("confidence = accuracy", [0, 1], [0, 1], reference=True))
    said = "; ".join(
        f"{names[name]}: expected calibration error {written(100 * found.ece)} points"
        for name, found in measured.found.items()
    )
    panel = Panel(series, "mean confidence of a bin", "share of it that is right", limits=(0, 1))
    chart = Chart("reliability", "Reliability diagram", said, [panel], width=5.2, height=3.6)
    bins = [
        [Cell(names[name]), Cell(f"{count:,}"), *(Cell(written(100 * v)) for v in pair)]
        for name, found in measured.found.items()
        for count, *pair in found.bins
    ]
    data = Grid(
        "Bins of the diagram", ["images", "n", "confidence (%)", "right (%)"], bins, folded=True
    )
    header = ["images", "right (%)", "mean confidence (%)", "ECE (points)", "n"]
    caption = f"Calibration on the first {n:,} test images of {measured.data['name']}"
    return [
        Words(
            [
                f"Best checkpoint, {threat.norm} epsilon {threat.epsilon:.6g}, seed "
                f"{measured.seed}; "
                f"15 bins of equal width. Every image is attacked, and the last iterate counts.",
                f"With {n:,} images the numbers are rough, and ECE in bins is biased upwards.",
            ],
            "aside",
        ),
        Grid(caption, header, rows),
        Figure(chart.draw(), data),
    ]


# Sections.


def _page(
    inputs: PageInputs, calibration: Calibration | str, signed: bool, title: str | None
) -> str:
    (entry,) = inputs.entries
    measured = measure(inputs.entries)
    kept = {section.name: section for section in page_sections(inputs, measured)}
    where, row = entry.typed, measured.row.get(entry.name)
    tested = _tested(entry, row)
    checks, diagnosed = checks_of(entry, row)
    diagnosis: list[Block] = [
        Grid(
            "Checks of the diagnosis",
            ["check", "result", "meaning"],
            [[Cell(c.name.replace("_", " ")), Cell(c.status), Cell(c.meaning)] for c in checks],
            words=3,
        )
    ]
    diagnosis = diagnosis if checks else []
    if not diagnosed:
        diagnosis.append(Missing("Not measured: no diagnosis is kept.", [f"cure diagnose {where}"]))
    threat = f"An attack may {change(row)}." if row else ""
    sections = [
        Section(
            "data",
            "Which data",
            "The images of each result: their hash, number, size and classes.",
            _data(entry, where),
        ),
        Section(
            "threat",
            "Threat",
            "What an attacker was allowed to do. Nothing on this page holds for other attackers.",
            [Words([threat, *_knowledge(tested)])]
            if threat
            else [Missing("Not measured: no evaluation is kept.", [f"cure evaluate {where}"])],
        ),
        Section(
            "attacks",
            "Attacks, settings and budgets",
            "Every attack that was run, with its settings and the passes through the network that "
            "it used, and the accuracy that it left with its 95 % interval (Wilson).",
            _attacks(entry, where),
        ),
        kept["accuracies"],
        kept["epsilon"],
        Section(
            "diagnosis",
            "Diagnosis",
            "Checks for errors that make a network look more robust than it is.",
            diagnosis,
        ),
        kept["corruptions"],
        Section(
            "calibration",
            "Calibration under attack",
            "Whether the probability that the network names for its answer can be believed. "
            "The expected calibration error (ECE) is the mean distance between confidence and "
            "accuracy.",
            _calibration(calibration, where),
        ),
        Section(
            "limits",
            "Limits",
            "What was not tested, read from what the records lack, and what no test here covers.",
            [Words(_limits(tested, calibration, checks, diagnosed))],
        ),
        Section(
            "reproduce",
            "How to reproduce",
            "The commands with their versions and seeds, as the records keep them.",
            _reproduce(entry),
        ),
        Section(
            "integrity",
            "Integrity of the files",
            "Whether a file of the run was changed after this page was written.",
            _intact(signed),
        ),
        Section(
            "clauses",
            "Clauses that this is evidence towards",
            "Where a reviewer may use a section. Evidence towards a clause is not compliance with "
            "it: that is judged of a whole system and its use, by people.",
            _clauses(tested, calibration, bool(checks)),
        ),
    ]
    # No green on a page that others may take for a certificate.
    said = verdict(entry, measured)
    numbers = [replace(n, status="" if n.status == "pass" else n.status) for n in said.numbers]
    return render(
        inputs,
        measured,
        sections,
        title or f"Evidence: {entry.name}",
        verdicts=[replace(said, numbers=numbers)],
        kind=f"{GENERATOR} --evidence",
        meaning=_MEANING,
    )


def _tested(entry: Entry, row: TableRow | None) -> Entry:
    """The network of the verdict: without results of other weights or other images."""
    if row is None:
        return entry
    own = (row["data"], row["split"])
    return replace(
        entry,
        evaluations=[
            result
            for result in entry.source.of(row["checkpoint"])
            if (no_place(result.data.name), result.data.split) == own
        ],
        corruptions=[
            result for result in entry.corruptions if result.model.checkpoint == row["checkpoint"]
        ],
    )


def _extra(record: Any, key: str) -> Any:
    return (record.model_extra or {}).get(key)


def _data(entry: Entry, where: str) -> list[Block]:
    if not entry.results():
        return [Missing("Not measured: no result is kept.", [f"cure evaluate {where}"])]
    rows: list[list[Cell]] = []
    classes: dict[str, Grid] = {}
    for result in entry.results():
        data, count = result.data, result.data.n
        size = "\N{MULTIPLICATION SIGN}".join(map(str, data.size)) if data.size else NOT_RECORDED
        digest = data.sha256 or NOT_RECORDED
        said = [result.made_by.removeprefix("cure "), f"{data.name}, {data.split}", digest, size]
        numbers = [f"{count:,}" if count else NOT_RECORDED, str(len(data.classes) or NOT_RECORDED)]
        cells = [Cell(text) for text in said + numbers]
        if cells not in rows:
            rows.append(cells)
        if data.images_by_class:
            counts = [
                [Cell(c), Cell(f"{n:,}")]
                for c, n in zip(data.classes, data.images_by_class, strict=False)
            ]
            caption = f"Images a class: {data.name}, {data.split}, {count:,} images"
            classes[caption] = Grid(caption, ["class", "images"], counts, folded=len(counts) > 12)
    header = ["result", "images", "SHA-256", "channels, height, width", "n", "classes"]
    blocks: list[Block] = [Grid("Images of the results", header, rows, words=4)]
    blocks += classes.values()
    if not classes:
        blocks.append(
            Missing("Not measured: no result keeps images a class.", [f"cure evaluate {where}"])
        )
    return blocks


def _knowledge(entry: Entry) -> list[str]:
    blind = [n for n in _attack_names(entry) if _black_box(n)]
    white = [n for n in _attack_names(entry) if n not in blind]
    said = []
    if white:
        said.append(
            "With full knowledge of the network (white box): "
            + ", ".join(map(attack_label, white))
            + "."
        )
    if blind:
        names = ", ".join(map(attack_label, blind))
        said.append(f"Without its gradient (black box): {names}.")
    return said


def _attack_names(entry: Entry) -> list[str]:
    return list(dict.fromkeys(name for result in entry.evaluations for name in result.attacks))


def _black_box(name: str) -> bool:
    return name.partition(":")[0] in ("square", "noise", "transfer")


def _attacks(entry: Entry, where: str) -> list[Block]:
    rows, budgets = [], []
    for result in entry.evaluations:
        for name, part in result.attacks.items():
            passes = _extra(part, "passes") or {}
            used = ", ".join(f"{count:,} {kind}" for kind, count in passes.items())
            settings = ", ".join(f"{key} {_plain(v)}" for key, v in part.settings.items())
            checkpoint = result.model.checkpoint or DASH
            threat = f"{result.threat.norm} {result.threat.epsilon_text}"
            seed = part.seed if part.seed is not None else result.seed
            words = [Cell(attack_label(name)), Cell(checkpoint), Cell(threat)]
            rows.append([*words, share_cell(part), Cell(f"{part.n:,}"), Cell(str(seed))])
            budgets.append([words[0], Cell(settings or NOT_RECORDED), Cell(used or NOT_RECORDED)])
    if not rows:
        command = f"cure evaluate {where} --attacks autoattack"
        return [Missing("Not measured: no attack was run.", [command])]
    header = ["attack", "checkpoint", "threat", "right (%)", "n", "seed"]
    blocks: list[Block] = [
        Grid("Attacks", header, rows, words=3),
        Grid("Settings and budgets", ["attack", "settings", "passes of images"], budgets, words=3),
    ]
    for result in entry.evaluations:
        for name, part in result.attacks.items():
            if (estimate := part.estimate()) is not None:
                blocks.append(Words([f"{attack_label(name)}: {estimate}."], "warn"))
        for name, left in (result.unfinished or {}).items():
            said = f"{attack_label(name)} ran out of time: its accuracy lies within "
            blocks.append(Words([f"{said}{between(left.bounds)} %."], "warn"))
    return blocks


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _certified(entry: Entry) -> bool:
    """Whether a bound was proved or certified, of the network or of its smoothed form."""
    return any(result.verified or result.smoothed for result in entry.evaluations)


def _limits(
    entry: Entry, calibration: Calibration | str, checks: Sequence[Any], diagnosed: bool
) -> list[str]:
    where, names = entry.typed, _attack_names(entry)
    lacking = []
    if not entry.evaluations:
        lacking.append(f"Accuracy was not measured: `cure evaluate {where}`.")
    if not any(map(is_reference, names)):
        lacking.append(
            f"AutoAttack was not run, so accuracy under attack is an upper bound that a stronger "
            f"attack may lower much: `cure evaluate {where} --attacks autoattack`."
        )
    if not any(map(_black_box, names)) and not any(map(is_reference, names)):
        lacking.append(f"No black-box attack was run: `cure evaluate {where} --attacks square`.")
    if not any(result.curve for result in entry.evaluations):
        lacking.append(f"Other radii were not measured: `cure evaluate {where} --curve pgd20`.")
    if not diagnosed:
        lacking.append(f"No diagnosis is kept: `cure diagnose {where}`.")
    if not entry.corruptions:
        lacking.append(f"Corruptions were not measured: `cure corruptions {where}`.")
    if isinstance(calibration, str):
        lacking.append(f"Calibration was not measured: {calibration}.")
    bad = [check.name.replace("_", " ") for check in checks if check.status != "pass"]
    if bad:
        lacking.append(f"Checks that did not pass: {', '.join(bad)}.")
    threats = [result.threat for result in entry.evaluations]
    threats += [
        part.threat
        for result in entry.evaluations
        for part in (result.unseen or {}).values()
        if isinstance(part, UnseenThreat)
    ]
    norms = sorted({threat.norm for threat in threats})
    if norms:
        lacking.append(
            f"Attacks were tried in {' and '.join(norms)} only: no other norms, patches, spatial "
            "changes or changes of the scene."
        )
    if not _certified(entry):
        lacking.append(f"No bound was certified: `cure evaluate {where} --bounds`.")
    if entry.status is None or not entry.status.finished:
        lacking.append("The training was not finished, or does not say so.")
    return [
        *lacking,
        f"One training (seed {entry.config.get('seed')}) was tested: intervals are over images, "
        "not over seeds.",
        "Not tested by this package: poisoning and backdoors, privacy (membership inference, "
        "extraction), other data than named above, drift after deployment, and "
        "the system around the network.",
    ]


def _reproduce(entry: Entry) -> list[Block]:
    environments: list[tuple[str, str, Any, Any]] = []
    if entry.environment is not None:
        environments.append(("train", "", entry.environment, entry.config.get("seed")))
    environments += [
        (
            result.made_by.removeprefix("cure "),
            result.model.checkpoint or "",
            result.environment,
            result.seed,
        )
        for result in entry.results()
    ]
    rows = []
    for kind, checkpoint, of, seed in environments:
        packages = ", ".join(f"{name} {text}" for name, text in of.packages.items())
        version = f"cure {of.cure or NOT_RECORDED}, Python {of.python or NOT_RECORDED}, {packages}"
        texts = [f"{kind} {checkpoint}".strip(), of.command, of.commit, version, seed, of.time]
        rows.append([Cell(NOT_RECORDED if text is None else str(text)) for text in texts])
    header = ["of", "command", "commit", "versions", "seed", "time"]
    if not rows:
        return [Words(["No command is recorded."], "warn")]
    return [Grid("Commands", header, rows, words=6)]


def _intact(signed: bool) -> list[Block]:
    check = f"sha256sum -c {HASHES}"
    verify = f"ssh-keygen -Y check-novalidate -n {NAMESPACE} -s {SIGNATURE} < {HASHES}"
    words = [
        f"`{HASHES}` beside this page lists the SHA-256 of all files of the run, this page "
        f"included; `{check}` in that folder finds every changed or missing file, not added ones."
    ]
    if signed:
        words.append(
            f"It is signed (`{SIGNATURE}`): `{verify}` checks it and names the key. Whose key that "
            "is, only `ssh-keygen -Y verify` with a list of trusted keys tells."
        )
    else:
        words.append(
            f"It is unsigned: whoever can change a file can change `{HASHES}` too. "
            "`cure report --evidence RUN --sign KEY` signs it."
        )
    return [Words(words)]


def _clauses(entry: Entry, calibration: Calibration | str, checked: bool) -> list[Block]:
    names = _attack_names(entry)
    calibrated = not isinstance(calibration, str)
    white = any(not _black_box(name) for name in names)
    black = any(_black_box(name) or is_reference(name) for name in names)
    certified = _certified(entry)
    evaluated, corrupted = bool(entry.evaluations), bool(entry.corruptions)
    act, first, second = "EU AI Act, Article 15", "ISO/IEC TR 24029-1:2021", "ISO/IEC 24029-2:2023"
    nist = "NIST AI 100-2 E2023"
    table: list[tuple[str, str, str, bool]] = [
        ("Verdict, Accuracies", act, "(1) appropriate level of accuracy and robustness", evaluated),
        ("Accuracies", act, "(3) levels of accuracy and their metrics, to be declared", evaluated),
        (
            "Calibration",
            act,
            "(3) a further metric, of the probabilities",
            calibrated,
        ),
        ("Corruptions", act, "(4) resilience to errors, faults and inconsistencies", corrupted),
        ("Threat, Attacks", act, "(5) adversarial examples or model evasion", bool(names)),
        ("Diagnosis", act, "(5) whether the test of evasion can be believed", checked),
        ("Integrity", act, "(5) changes of files after the test only", True),
        ("Accuracies, Corruptions", first, "5 statistical methods", evaluated),
        ("Attacks", first, "7 empirical methods", bool(names)),
        ("Accuracies" if certified else DASH, first, "6 formal methods", certified),
        ("Accuracies" if certified else DASH, second, "formal methods", certified),
        ("Threat, Attacks", nist, "2.2 evasion attacks and mitigations", bool(names)),
        ("Attacks", nist, "2.2.1 white-box evasion attacks", white),
        ("Attacks", nist, "2.2.2 black-box evasion attacks", black),
        (DASH, nist, "2.3 poisoning attacks", False),
        (DASH, nist, "2.4 privacy attacks", False),
    ]
    rows = [
        [
            Cell(section),
            Cell(f"{document} {clause}"),
            Cell("evidence towards" if there else "no evidence"),
        ]
        for section, document, clause, there in table
    ]
    return [Grid("Sections and clauses", ["section", "clause", "this page has"], rows, words=3)]
