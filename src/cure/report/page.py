"""The verb ``write_report``: one page of runs, which needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cure.analysis.render import StudyTable
from cure.analysis.study import STUDIES
from cure.attacks.registry import attack_label
from cure.errors import ConfigError, CureError
from cure.experiments.compare.rows import TableRow, flattened
from cure.experiments.compare.sources import no_place
from cure.report import figures
from cure.report.accuracies import Measured, Verdict, measure, results_of, tables, verdict
from cure.report.components import (
    DASH,
    Block,
    Cell,
    Figure,
    Grid,
    Heading,
    Missing,
    Section,
    Words,
    share_cell,
    written,
)
from cure.report.loader import Entry, PageInputs, StudyResult, load_inputs
from cure.runs.records import Environment
from cure.runs.results import Share, Unfinished
from cure.runs.run import Run
from cure.training.overfitting_detector import robust_overfitting
from cure.utils.io import check_free, write_text
from cure.utils.plotting import printable, style_of
from cure.utils.version import VERSION

HERE = Path(__file__).parent
GENERATOR = "cure report"
"""What a page says made it, so that only such a page is ever replaced."""

FROM_FILES = (
    "From the files of the runs alone: nothing was computed anew, nothing is loaded from a network."
)

LARGEST = 5_000_000
"""Bytes of a page; drawings that would make it larger are left out, the largest first."""

TIMES = " \N{MULTIPLICATION SIGN} "

MOST_ROWS = 12
"""Rows of a table of a study that is shown unfolded."""

_FOR_WORDS = 500_000
"""Bytes that are kept for everything but drawings."""

# Studies with a section of their own; the others stand together.
_OWN_SECTIONS = ("overfitting", "cka", "gradients", "minimal-perturbation")


def write_report(
    targets: str | Path | Run | Iterable[str | Path | Run],
    *,
    output: str | Path | None = None,
    title: str | None = None,
) -> Path:
    """Write one page of HTML about runs: no network, no other file, under 5 MB.

    Args:
        targets: one or more run folders, or JSON results of ``cure evaluate``, ``corruptions``,
            ``diagnose`` and ``analyse``.  A natural start inside a run is shown beside it.
        output: a new file; by default ``report.html`` in the folder of the first run, where an
            earlier page of this function is replaced: it says nothing that the run does not.
        title: heading of the page; by default the names of the runs.

    Returns:
        The path of the page.

    Raises:
        CureError: for a target that cannot be read, or a file that cannot be written.

    >>> import torch
    >>> import cure
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> asked = {"data": "digits", "attacks": ["fgsm"], "epsilon": "8/255", "limit": 50}
    >>> result = cure.evaluate(network, output="shown.json", **asked)
    >>> write_report(["shown.json"], output="page.html").name
    'page.html'
    """
    output = check_free(output)
    inputs = load_inputs(targets)
    path = _place(inputs, output)
    try:
        write_text(path, _page(inputs, title))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); name another file with --output"
        ) from None
    return path


def _place(inputs: PageInputs, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    if inputs.first is None:
        raise ConfigError("a page of result files has no run to stand in; name it with --output")
    path = inputs.first / "report.html"
    if not is_ours(path):
        raise ConfigError(f"{path} was not made by `cure report` and is kept; use --output")
    return path


def is_ours(path: Path) -> bool:
    """Whether a page may be written there: it is free, or holds a page of this command."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return f'content="{GENERATOR}' in file.read(2000)
    except FileNotFoundError:
        return True
    except OSError:  # such as a folder
        return False


# The page.


def _page(inputs: PageInputs, title: str | None) -> str:
    measured = measure(inputs.entries)
    return render(inputs, measured, page_sections(inputs, measured), title)


def render(
    inputs: PageInputs,
    measured: Measured,
    sections: list[Section],
    title: str | None,
    *,
    verdicts: Sequence[Verdict] | None = None,
    kind: str = GENERATOR,
    meaning: str = FROM_FILES,
) -> str:
    """The page as HTML.

    Args:
        inputs: what it is about.
        measured: the rows of its networks.
        sections: between what was trained and the glossary; drawings that are too large leave.
        title: heading; by default the names of the runs.
        verdicts: one a network; by default :func:`~cure.report.accuracies.verdict`.
        kind: the command that makes such a page.
        meaning: what its numbers were made from.
    """
    import jinja2
    from markupsafe import Markup

    shown = [entry for entry in inputs.entries if not entry.is_start]
    place = {entry.name: index for index, entry in enumerate(inputs.entries)}
    if verdicts is None:
        verdicts = [verdict(entry, measured) for entry in shown]
    left_out = _fit(sections)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # All that is printed and not ours: names of files, classes, runs; text of result files.
        finalize=lambda value: (
            printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    environment.filters["code"] = lambda text: Markup("").join(
        Markup("<code>{}</code>").format(printable(part)) if index % 2 else printable(part)
        for index, part in enumerate(text.split("`"))
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("page.html").render(
        title=title or _title(shown) or "Studies",
        generator=f"{kind} {VERSION}",
        kind=kind,
        meaning=meaning,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        verdicts=verdicts,
        entries=inputs.entries,
        place=place,
        swatches=[Markup(_swatch(index)) for index in range(len(inputs.entries))],
        trained=[_trained(entry, measured) for entry in inputs.entries],
        sections={section.name: section for section in sections},
        glossary=json.loads((HERE / "glossary.json").read_text(encoding="utf-8")),
        troubles=inputs.troubles,
        left_out=left_out,
        made=_made(),
        made_of=_commands(inputs.entries, inputs.studies),
    )
    # A lone surrogate, which JSON can hold, is no text that can be written.
    return page.encode("utf-8", "replace").decode("utf-8")


def _title(entries: Sequence[Entry]) -> str:
    names = [entry.name for entry in entries]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _swatch(index: int) -> str:
    """The mark of a network, as in the drawings."""
    look = style_of(index)
    shapes = {
        "o": '<circle cx="12" cy="6" r="3.6"/>',
        "s": '<rect x="8.6" y="2.6" width="6.8" height="6.8"/>',
        "^": '<path d="M12 1.8 16 9.4H8Z"/>',
        "D": '<path d="M12 1.4 16.6 6 12 10.6 7.4 6Z"/>',
        "v": '<path d="M12 10.2 16 2.6H8Z"/>',
        "P": '<path d="M10.4 2h3.2v2.4H16v3.2h-2.4V10h-3.2V7.6H8V4.4h2.4Z"/>',
        "X": '<path d="m9.8 1.6 2.2 2.2 2.2-2.2 2.2 2.2L14.2 6l2.2 2.2-2.2 2.2L12 8.2l-2.2 2.2'
        '-2.2-2.2L9.8 6 7.6 3.8Z"/>',
        "*": '<path d="m12 .8 1.5 3.6 3.9.3-3 2.5.9 3.8L12 8.9 8.7 11l.9-3.8-3-2.5 3.9-.3Z"/>',
    }
    dashes = {"-": "", "--": "5 2.5", "-.": "5 2 1 2", ":": "1.2 2"}[look["linestyle"]]
    return (
        f'<svg class="swatch" viewBox="0 0 24 12" width="24" height="12" aria-hidden="true" '
        f'fill="{look["color"]}"><path d="M0 6h24" stroke="{look["color"]}" stroke-width="1.6" '
        f'stroke-dasharray="{dashes}"/>{shapes[look["marker"]]}</svg>'
    )


# Sections.


def page_sections(inputs: PageInputs, measured: Measured) -> list[Section]:
    """The sections of the page of a run, in their order."""
    entries = inputs.entries
    place = {entry.name: index for index, entry in enumerate(entries)}
    runs = [entry for entry in entries if entry.folder is not None]
    names = [entry.typed for entry in entries if not entry.is_start and entry.folder is not None]
    where = names[0] if names else "RUN"
    studies: dict[str, list[StudyResult]] = {}
    for told in inputs.studies:
        studies.setdefault(told.study, []).append(told)
    main = measured.groups[0] if measured.groups else []
    return [
        Section(
            "accuracies",
            "Accuracies",
            "Of a hundred images, how many the network gets right: as they are (natural), and when "
            "an attack has changed each of them to fool it. The bracket is the 95 % interval: how "
            "far the number may be off because only so many images were tried.",
            _accuracies(entries, measured, main, place, where),
        ),
        Section(
            "trade-off",
            "Natural against robust",
            "Training against attacks usually costs accuracy on ordinary images. Each mark is a "
            "network; further right is better on ordinary images, higher is better under attack. "
            "No network can lie above the dotted line.",
            [*_trade_off(main, measured, place, where), *_between(runs, place)],
        ),
        Section(
            "learning",
            "Learning curves",
            "How training went, epoch by epoch (an epoch is one pass over the training images). "
            "Accuracies are on validation images, which training does not learn from.",
            [*figures.learning(runs, place)]
            or [Missing("No epoch is recorded.", ["cure train RECIPE", f"cure resume {where}"])],
        ),
        Section(
            "overfitting",
            "Robust overfitting",
            "Late in training, robust accuracy on new images often falls while it still rises on "
            "the training images. The gap between the best epoch and the last one shows how much.",
            [*_overfitting(runs, measured, place), *_study("overfitting", studies, names)],
        ),
        Section(
            "epsilon",
            "Accuracy over epsilon",
            "Epsilon is how much an attack may change an image. A sound curve starts at natural "
            "accuracy, falls steadily and reaches zero; one that stays up shows that the attack "
            "failed.",
            _over_epsilon(entries, place, where),
        ),
        Section(
            "corruptions",
            "Corruptions",
            "Noise, blur, weather and digital damage: changes that are not an attack. Being "
            "robust to attacks does not make a network robust to these, or the reverse.",
            _corruptions(entries, place, where),
        ),
        Section(
            "cka",
            "Similarity of layers (CKA)",
            "Similarity of activations of two layers, from 0 (nothing in common) to 1 (equal up "
            "to rotation and scale): for natural and for attacked images, or for two networks.",
            _study("cka", studies, names),
        ),
        Section(
            "gradients",
            "Gradients and mask",
            "Size of the gradients of each layer, and which weights CURE lets move and which "
            "it conserves.",
            _study("gradients", studies, names),
        ),
        Section(
            "minimal-perturbation",
            "Smallest perturbations",
            "The smallest change of an image that makes a network err. The larger it has to be, "
            "the more robust the network is.",
            _study("minimal-perturbation", studies, names, _is_drawing),
        ),
        Section(
            "pictures",
            "Pictures",
            "Images as they are, images after an attack, and the change between them, with what "
            "networks take each for.",
            _pictures(studies.get("minimal-perturbation", []), names),
        ),
        Section(
            "studies",
            "Further studies",
            "Studies without a section of their own.",
            _further(studies, names),
        ),
    ]


def _accuracies(
    entries: Sequence[Entry],
    measured: Measured,
    main: Sequence[TableRow],
    place: Mapping[str, int],
    where: str,
) -> list[Block]:
    if not measured.groups:
        return [Missing("No network of this page was evaluated.", [f"cure evaluate {where}"])]
    drawn = figures.by_attack(main, place)
    beyond = _beyond(entries, measured, place)
    return [*tables(entries, measured), *([drawn] if drawn else []), *beyond]


def _beyond(entries: Sequence[Entry], measured: Measured, place: Mapping[str, int]) -> list[Block]:
    """Unseen threats and certificates, each of the newest result of the network in the tables."""
    rows = []
    for entry in entries:
        found: dict[str, Share | Unfinished] = {}
        for result in results_of(entry, measured.row.get(entry.name)):
            found |= dict(result.beyond())
        for title, part in found.items():
            if isinstance(part, Unfinished):
                low, high = part.bounds
                cell = Cell(f"unfinished: {written(low)} to {written(high)}")
            else:
                cell = share_cell(part)
            rows.append([Cell(entry.name, series=place[entry.name]), Cell(title), cell])
    caption = "Beyond the threat: other norms, and what is proved; images correct in %"
    return [Grid(caption, ["network", "measured", "accuracy"], rows, words=2)] if rows else []


def _trade_off(
    main: Sequence[TableRow], measured: Measured, place: Mapping[str, int], where: str
) -> list[Block]:
    drawn = figures.trade_off(main, place) if main else None
    if drawn is None:
        return [Missing("Nothing was measured under attack.", [f"cure evaluate {where}"])]
    figure, beside_paper = drawn
    blocks: list[Block] = [figure]
    if beside_paper:
        known = figures.paper()
        blocks.append(Words([f"The paper's rows: {known['source']}. {known['remark']}"], "aside"))
    left = sum(len(group) for group in measured.groups[1:])
    if left:
        said = f"{left} more were evaluated differently (see the tables above) and are not drawn."
        blocks.append(Words([said], "aside"))
    return blocks


def _between(runs: Sequence[Entry], place: Mapping[str, int]) -> list[Block]:
    """For each run of ``cure tradeoff``: the networks it was chosen from."""
    blocks: list[Block] = []
    for entry in runs:
        if (record := entry.between) is None:
            continue
        blocks.append(figures.between_weights(record, place[entry.name]))
        said = [
            f"{entry.name} was mixed after training from the weights of "
            f"{', '.join(record.ends)}; the choice was made on these validation images."
        ]
        if record.met is False:
            said.append("No point meets what was asked for; the nearest was taken.")
        blocks.append(Words([*said, *(f"{barrier}." for barrier in record.barriers)], "aside"))
    return blocks


def _overfitting(
    runs: Sequence[Entry], measured: Measured, place: Mapping[str, int]
) -> list[Block]:
    blocks: list[Block] = []
    drawn = figures.best_and_last(runs, place)
    if drawn is not None:
        figure, said = drawn
        alarms = [f"{entry.name}: {told}." for entry in runs if (told := _alarm(entry))]
        blocks += [Words([*said, *alarms]), figure]
    cells = []
    for name, row in measured.row.items():
        for key in [n for n in row if n.startswith("best_minus_last_")]:
            gap = row[key]
            if gap is not None:
                attack = key.removeprefix("best_minus_last_")
                cells.append(
                    [
                        Cell(name, series=place[name]),
                        Cell(attack_label(attack)),
                        Cell(written(row[attack])),
                        Cell(written(row[f"last_{attack}"])),
                        Cell(written(gap)),
                    ]
                )
    if cells:
        header = ["network", "measured", "best (%)", "last (%)", "gap (points)"]
        caption = "Best checkpoint against the last one, on the images of the evaluation"
        blocks.append(Grid(caption, header, cells, words=2, sortable=True, folded=len(cells) > 8))
    return blocks


def _alarm(entry: Entry) -> str | None:
    """The warning of training, from its metrics."""
    images = entry.validation_images()
    lines = [line for line in entry.metrics if line.validation is not None]
    return None if images is None else robust_overfitting(lines, images)


def _over_epsilon(entries: Sequence[Entry], place: Mapping[str, int], where: str) -> list[Block]:
    drawn, said = figures.over_epsilon(entries, place)
    if not drawn:
        return [
            Missing(
                "No accuracy over epsilon was measured.", [f"cure evaluate {where} --curve pgd20"]
            )
        ]
    return [Words(said), *drawn]


def _corruptions(entries: Sequence[Entry], place: Mapping[str, int], where: str) -> list[Block]:
    drawn, grids, said = figures.corrupted(entries, place)
    if not drawn:
        return [Missing("No corruption was measured.", [f"cure corruptions {where}"])]
    return [Words(said), *drawn, *grids]


# Studies.


def _commands_of(study: str, names: Sequence[str]) -> list[str]:
    """What makes a study, the runs of the page in the place of RUN where runs are looked at."""
    shown = STUDIES[study].command if study in STUDIES else f"cure analyse {study} RUN"

    def named(found: re.Match[str]) -> str:
        return " ".join(names if " " in found[0] else names[:1])

    return [
        re.sub(r"\bRUN\b(?: RUN\b)*(?: \.\.\.)?", named, command)
        if command.startswith("cure analyse") and names
        else command
        for command in shown.split("; ")
    ]


def _study(
    name: str,
    studies: Mapping[str, list[StudyResult]],
    names: Sequence[str],
    shown: Callable[[str], bool] = bool,
) -> list[Block]:
    """All results of one study, or the command that makes one."""
    told = studies.get(name, [])
    if not told:
        return [Missing("This study was not made.", _commands_of(name, names))]
    blocks: list[Block] = []
    for one in told:
        if len(told) > 1:
            blocks.append(Heading(one.owner))
        blocks += _blocks(one, True, shown)
    return blocks


def _pictures(told: Sequence[StudyResult], names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    for one in told:
        drawn = _blocks(one, False, lambda name: not _is_drawing(name))
        blocks += [Heading(one.owner), *drawn] if drawn and len(told) > 1 else drawn
    return blocks or [
        Missing("No pictures were kept.", _commands_of("minimal-perturbation", names))
    ]


def _further(studies: Mapping[str, list[StudyResult]], names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    others = [name for name in STUDIES.names() if name not in _OWN_SECTIONS]
    lacking = []
    for name in others:
        if name in studies:
            blocks += [Heading(STUDIES[name].title), Words([STUDIES[name].question], "aside")]
            blocks += _study(name, studies, names)
        else:
            lacking.append(name)
    if lacking:
        sentence = "Not made: " + "; ".join(f"{STUDIES[n].title}" for n in lacking) + "."
        blocks.append(
            Missing(
                sentence, [command for name in lacking for command in _commands_of(name, names)]
            )
        )
    return blocks or [Missing("There are none.", ["cure list studies"])]


def _is_drawing(name: str) -> bool:
    """Whether a picture of ``minimal-perturbation`` is anything but its grid of images."""
    return "images" not in name


def _blocks(told: StudyResult, words: bool, shown: Callable[[str], bool]) -> list[Block]:
    """One result of a study, with those of its figures that belong here.

    Where the result is damaged there is a sentence in its place.
    """
    blocks: list[Block] = []
    try:
        view = STUDIES[told.study].view(told.record.content())
        grids = [_grid(table) for table in view.tables] if words else []
        if words:
            blocks.append(Words([view.finding], "findings"))
            blocks += [grid for grid in grids[:1] if not grid.folded]
            rows = [[Cell(what), Cell(command)] for what, command in view.commands]
            grids += [Grid("Commands", ["for", "command"], rows, words=2)] if rows else []
        blocks += [Figure(figure.draw()) for figure in view.figures if shown(figure.name)]
        blocks += [replace(grid, folded=True) for grid in grids if grid not in blocks]
    # A file can hold anything, and views rely on its keys.
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, CureError):
        sentence = (
            f"A result of `cure analyse {told.study}` of {told.owner} is damaged or incomplete and "
            "cannot be shown; make it again."
        )
        return [Words([sentence], "warn")]
    return blocks


def _grid(table: StudyTable) -> Grid:
    def order(text: str) -> float | str:
        found = re.match(r"[-+]?\d[\d,]*(\.\d+)?", text)
        return float(found[0].replace(",", "")) if found else text

    cells = [[Cell(text, order=order(text)) for text in row] for row in table.rows]
    folded = len(cells) > MOST_ROWS
    return Grid(table.title, list(table.header), cells, sortable=len(cells) > 1, folded=folded)


def _fit(sections: Sequence[Section]) -> list[str]:
    """Leave out the largest drawings until the page is small enough; say which."""
    drawings = [
        (len(block.picture.address), section, block)
        for section in sections
        for block in section.blocks
        if isinstance(block, Figure)
    ]
    total, left_out = sum(size for size, _, _ in drawings), []
    for size, section, block in sorted(drawings, key=lambda drawing: -drawing[0]):
        if total <= LARGEST - _FOR_WORDS:
            break
        total -= size
        said = f"{block.picture.title} ({size / 1e6:.1f} MB)"
        left_out.append(said)
        place = section.blocks.index(block)
        section.blocks[place] = Words(
            [
                f"Left out to keep the page below {LARGEST // 1_000_000} MB: {said}; a study keeps "
                "its drawings beside its result."
            ],
            "warn",
        )
    return left_out


# What was trained, and how the page was made.


@dataclass(frozen=True)
class Trained:
    """What a run was.

    Attributes:
        entry: which.
        facts: a term and what it was.
        command: that began it.
        settings: all of them.
    """

    entry: Entry
    facts: Sequence[tuple[str, str]]
    command: str
    settings: Grid | None


def _trained(entry: Entry, measured: Measured) -> Trained:
    config, row = no_place(entry.config), measured.row.get(entry.name, {})
    facts: list[tuple[str, str]] = []
    if config:
        threat = f"{config['threat'].get('norm')}, epsilon {config['threat'].get('epsilon')}"
        facts += [("method", str(config["method"]["name"])), ("data", _data(entry, config))]
        facts += [("start", _start(config)), ("threat", threat)]
    if row.get("network"):
        count = row.get("parameters")
        parameters = f", {count:,.0f} parameters" if isinstance(count, int | float) else ""
        facts.append(("network", f"{row['network']}{parameters}"))
    if config:
        facts.append(("training", _training(entry, config)))
    facts += _times(entry)
    environment = entry.environment
    if environment is not None:
        facts += [("made with", _versions(environment)), ("on", _machine(environment))]
        facts += [("begun", environment.time)] if environment.time else []
    if not config:
        facts.append(("known", "only results; name the run's folder for what was trained"))
    flat = flattened(config)
    rows = [[Cell(key), Cell(str(value))] for key, value in flat.items()]
    caption = f"All {len(flat)} settings"
    grid = Grid(caption, ["setting", "value"], rows, words=2, folded=True) if flat else None
    command = (environment.command if environment is not None else None) or ""
    return Trained(entry, facts, command, grid)


def _data(entry: Entry, config: Mapping[str, Any]) -> str:
    data, images = config.get("data") or {}, entry.images
    said = str(data.get("source", "unknown"))
    if isinstance(data.get("limit"), int):
        said += f", the first {data['limit']:,} training images"
    if images is not None:
        size = TIMES.join(map(str, images.size))
        said += f", {len(images.classes)} classes, {size} pixels"
    if (held_out := entry.validation_images()) is not None:
        said += f"; {held_out:,} of them validate"
    return said


def _start(config: Mapping[str, Any]) -> str:
    start = str(config.get("start") or "scratch")
    epochs = (config.get("natural") or {}).get("epochs")
    known = {
        "scratch": "random weights",
        "natural": "a network trained on natural images first"
        + (f", for {epochs} epochs" if epochs else ""),
        "model": "the weights that the network came with",
    }
    return known.get(start, f"weights of {start}")


def _training(entry: Entry, config: Mapping[str, Any]) -> str:
    training = config["training"]
    done = entry.metrics[-1].epoch if entry.metrics else 0
    said = f"{done} of {training['epochs']} epochs"
    if training.get("batch_size"):
        said += f" of batches of {training['batch_size']}"
    if entry.status is not None:
        said += f"; {entry.status.state}"
    return said + f"; seed {config.get('seed')}"


def _times(entry: Entry) -> list[tuple[str, str]]:
    seconds = [line.seconds for line in entry.timing if line.seconds is not None]
    memory = [line.peak_memory_mib for line in entry.timing if line.peak_memory_mib is not None]
    if not seconds:
        return []
    said = f"{_duration(sum(seconds))} in all, {_duration(statistics.median(seconds))} an epoch"
    return [("time", said + (f"; at most {max(memory):,.0f} MiB of memory" if memory else ""))]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _versions(environment: Environment) -> str:
    return (
        f"cure {environment.cure}, commit {environment.commit or 'unknown'}, "
        f"torch {environment.packages.get('torch')}, Python {environment.python}"
    )


def _machine(environment: Environment) -> str:
    said = f"{environment.processor or 'unknown processor'}, "
    said += f"{environment.threads} of {environment.cores} cores"
    return said + (f", {environment.gpu}" if environment.gpu else "")


def _made() -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("matplotlib", "jinja2"))
    return [
        ("made with", f"cure {VERSION}, {packages}"),
        ("time", datetime.now(UTC).isoformat(timespec="seconds")),
    ]


def _commands(entries: Sequence[Entry], studies: Sequence[StudyResult]) -> Grid | None:
    """Every result that the page shows, with the command and the version that made it."""
    found: list[tuple[str, str, Environment | None]] = [
        (entry.name, result.made_by.removeprefix("cure "), result.environment)
        for entry in entries
        for result in entry.results()
    ]
    found += [(told.owner, f"analyse {told.study}", told.record.environment) for told in studies]
    rows = [
        [
            *(Cell(owner), Cell(kind)),
            *(Cell(str(getattr(of, key, None) or DASH)) for key in ("command", "commit", "time")),
        ]
        for owner, kind, of in found
    ]
    header = ["of", "result", "command", "commit", "time"]
    caption = "Where each number comes from"
    return Grid(caption, header, rows, words=5, folded=True) if rows else None
