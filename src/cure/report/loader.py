"""What a page is about: runs, and results in files, read with care.

A file that a user named and that cannot be read is refused.  A damaged file inside a run costs the
page one sentence in its place, not the page: the rest of the run is still worth looking at.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import yaml

from cure.analysis.study import STUDIES, STUDY_FORMAT
from cure.errors import CheckpointError, ConfigError, CureError, unknown
from cure.experiments.compare.rows import IMAGES, checked_config, no_place
from cure.experiments.compare.rows import Source as ComparedSource
from cure.runs.records import (
    Environment,
    EpochTiming,
    EvaluationRecord,
    RunRecord,
    number_of,
)
from cure.runs.run import Run
from cure.utils.io import read_json

Content = dict[str, Any]

_EVALUATION = "cure-evaluation-1"
_CORRUPTIONS = "cure-corruptions-1"
_DIAGNOSIS = "cure-diagnosis-1"


@dataclass
class Source:
    """Evaluations of one run and what is known of it, with the keys of its files.

    Attributes:
        name: in the page.
        typed: as the user named it, for messages.
        results: of ``cure evaluate``, oldest first.
        config: its settings; None where only results are known.
        timing: seconds and memory of each epoch.
        environment: where it was trained, where that is known.
        finished: whether it was trained to its end, where known.
        label: of the row, where a plan gives it one.
    """

    name: str
    typed: str
    results: list[Content]
    config: Content | None = None
    timing: Sequence[Content] = ()
    environment: Content | None = None
    finished: bool | None = None
    label: str | None = None

    def of(self, checkpoint: str | None, images: tuple[Any, ...]) -> list[Content]:
        """Results of one checkpoint on one kind of images, oldest first."""
        return [
            result
            for result in self.results
            if result["model"].get("checkpoint") == checkpoint and images_of(result) == images
        ]

    def compared(self) -> ComparedSource:
        """The same for ``cure compare``."""
        return ComparedSource(
            self.name,
            self.typed,
            [EvaluationRecord.parse(result, self.typed) for result in self.results],
            self.config,
            [
                EpochTiming(
                    epoch=int(line["epoch"]),
                    seconds=line.get("seconds"),
                    processor_seconds=line.get("processor_seconds"),
                    peak_memory_mib=line.get("peak_memory_mib"),
                )
                for line in self.timing
            ],
            None if self.environment is None else Environment.parse(self.environment, self.typed),
            self.finished,
            self.label,
        )


def images_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Data, split, size, norm and epsilon of a result or of a row."""
    if "attack_settings" in record:
        return tuple(record[name] for name in IMAGES)
    data, threat = record["data"], record["threat"]
    size = "x".join(map(str, data["size"]))
    return no_place(data["name"]), data["split"], size, threat["norm"], float(threat["epsilon"])


def time_of(result: Mapping[str, Any]) -> str:
    """When it was measured, so that the newest is the last in alphabetical order."""
    time: str = result["environment"]["time"]
    return time


def current(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those of a checkpoint that was replaced when the run went on."""
    now = {r["model"].get("checkpoint"): r["model"].get("epoch") for r in results}
    return [r for r in results if r["model"].get("epoch") == now[r["model"].get("checkpoint")]]


def read_lines(path: Path) -> list[Content]:
    """The whole lines of a file of JSON."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # The run was killed while it wrote this line.
    return records


def checked_result(content: Content, path: Path) -> Content:
    """A whole result of ``cure evaluate``."""
    return EvaluationRecord.parse(content, path).content()


@dataclass
class Entry:
    """A network of the page: a run, the natural start of one, or what result files are about.

    Attributes:
        name: unique in the page.
        source: results of ``cure evaluate``, settings, times; as ``cure compare`` reads them.
        folder: of a run.
        typed: as the user named it, for commands to copy: quoted where a shell would act on it.
        metrics: a record an epoch.
        images: what ``data.json`` says.
        status: how far it came.
        corruptions: results of ``cure corruptions``, the newest last.
        diagnoses: results of ``cure diagnose``, the newest last.
        start: the network that its training began from, where that is in the page.
        starts: whether it is here only as the start of another.
    """

    name: str
    source: Source
    folder: Path | None = None
    typed: str = "RUN"
    metrics: Sequence[Content] = ()
    images: Content = field(default_factory=dict)
    status: Content = field(default_factory=dict)
    corruptions: list[Content] = field(default_factory=list)
    diagnoses: list[Content] = field(default_factory=list)
    start: Entry | None = None
    starts: bool = False

    @property
    def config(self) -> Content:
        """Settings of the run; empty when only results are known."""
        return self.source.config or {}


@dataclass(frozen=True)
class Told:
    """A result of ``cure analyse``, and whose it is."""

    study: str
    owner: str
    result: Content


@dataclass
class Gathered:
    """All that a page is made from.

    Attributes:
        entries: networks, a start after the first run that has it.
        studies: results of studies, in the order of entries.
        troubles: a sentence a file that could not be read.
        first: the folder of the first run, if there is a run.
    """

    entries: list[Entry]
    studies: list[Told]
    troubles: list[str]
    first: Path | None


def gather(targets: Iterable[str | Path | Run]) -> Gathered:
    """Read runs and result files.

    Args:
        targets: run folders; results of ``evaluate``, ``corruptions``, ``diagnose`` and
            ``analyse`` as JSON files; records that a plan keeps of its runs.

    Raises:
        CureError: when one of them is none of these, or is named twice.
    """
    made = Gathered([], [], [], None)
    loose: list[tuple[str, Content]] = []
    seen: set[Path] = set()
    for target in targets:
        path = Path(target.path if isinstance(target, Run) else target)
        if path.resolve() in seen:
            raise ConfigError(f"{path} is named twice; name it once")
        seen.add(path.resolve())
        if path.is_file():
            _read_file(path, made, loose)
        else:
            _read_run(path, made)
            made.first = made.first or path
    if not seen:
        raise ConfigError("expected one or more runs, got none; name the folder of a run")
    for typed, content in loose:
        _attach(typed, content, made)
    for entry in made.entries:
        entry.source.results = current(sorted(entry.source.results, key=time_of))
        for kind in (entry.corruptions, entry.diagnoses):
            kind.sort(key=time_of)
    _find_starts(made.entries)
    return made


def _read_file(path: Path, made: Gathered, loose: list[tuple[str, Content]]) -> None:
    content = read_json(path)
    kind = content.get("format") if isinstance(content, dict) else None
    if kind == "cure-run-1":
        record = RunRecord.parse(content, path)
        compared = ComparedSource.of_record(record, path.stem, str(path))
        source = Source(
            _free(compared.name, made.entries),
            compared.typed,
            [result.content() for result in compared.results],
            compared.config,
            [line.content() for line in record.timing],
            None if record.environment is None else record.environment.content(),
            True,
            compared.label,
        )
        made.entries.append(Entry(source.name, source))
    elif kind == STUDY_FORMAT:
        made.studies.append(_checked_study(content, path, path.name))
    elif kind in _CHECKED:
        loose.append((str(path), _CHECKED[kind](content, path)))
    else:
        raise CheckpointError(
            f"expected a run folder, or a result of `cure evaluate`, `corruptions`, `diagnose` or "
            f"`analyse` in JSON, got {path} (its format is '{kind}'); name one of these"
        )


def _read_run(path: Path, made: Gathered) -> None:
    """A run, what it keeps, and its natural start."""
    if not (path / "config.yaml").is_file():
        what = "holds no run (no config.yaml)" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; name the folder that `cure train` printed")
    entry = _entry(path, path.resolve().name, made)
    made.entries.append(entry)
    if not (path / "natural" / "config.yaml").is_file():
        return
    start = _entry(path / "natural", f"{entry.name}/natural", made)
    start.starts = True
    # Runs that copy one start each would fill the page with the same network.
    same = next((e for e in made.entries if e.starts and _same(e, start)), None)
    if same is None:
        made.entries.append(start)
    else:
        same.source.results += start.source.results
        same.corruptions += start.corruptions
        same.diagnoses += start.diagnoses
    entry.start = same or start


def _same(first: Entry, second: Entry) -> bool:
    """Whether two runs are one training: its settings and every number it wrote are the same."""
    return bool(first.metrics) and (first.config, first.metrics) == (second.config, second.metrics)


def _entry(path: Path, name: str, made: Gathered) -> Entry:
    """What the folder of one run holds; what is damaged in it becomes a sentence."""
    config_file = path / "config.yaml"
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    name = _free(name, made.entries)
    source = Source(name, str(path), [], checked_config(config, config_file))
    entry = Entry(name, source, path, shlex.quote(str(no_place(str(path)))))

    def careful(file: Path, read: Callable[[Path], Any], otherwise: Any) -> Any:
        if not file.exists():
            return otherwise
        try:
            return read(file)
        except CureError as error:
            said = str(error)
        except (OSError, ValueError) as error:
            said = f"{file} cannot be read ({error}); restore it from a copy"
        # The page may be shown to others, whom it does not concern where on a machine runs lie.
        made.troubles.append(said.replace(str(path), entry.typed))
        return otherwise

    source.environment = careful(path / "environment.json", _object, None)
    entry.images = careful(path / "data.json", _object, {})
    entry.status = careful(path / "status.json", _object, {})
    source.finished = entry.status.get("state") == "finished" if entry.status else None
    entry.metrics = [_epoch(r) for r in careful(path / "metrics.jsonl", _records, [])]
    source.timing = [_numbers(r) for r in careful(path / "timing.jsonl", _records, [])]
    kept = {
        "evaluations": (source.results, _EVALUATION),
        "corruptions": (entry.corruptions, _CORRUPTIONS),
        "diagnoses": (entry.diagnoses, _DIAGNOSIS),
    }
    for folder, (results, kind) in kept.items():
        for file in sorted((path / folder).glob("*.json"), key=number_of):
            result = careful(file, partial(_read_result, kind), None)
            results += [] if result is None else [result]
    for file in sorted((path / "studies").glob("*.json"), key=number_of):
        told = careful(file, lambda f: _checked_study(read_json(f), f, name), None)
        made.studies += [] if told is None else [told]
    return entry


def _free(name: str, entries: Iterable[Entry]) -> str:
    taken = {entry.name for entry in entries}
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in names if candidate not in taken)


def _object(path: Path) -> Content:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content


def _records(path: Path) -> list[Content]:
    records = [line for line in read_lines(path) if isinstance(line, dict)]
    return [line for line in records if number(line.get("epoch")) is not None]


def number(value: object) -> float | None:
    """``value`` if it is a finite number."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None  # type: ignore[arg-type]


def _numbers(section: object) -> dict[str, float]:
    """The finite numbers of a section."""
    items = section.items() if isinstance(section, Mapping) else ()
    found = {str(key): number(value) for key, value in items}
    return {key: value for key, value in found.items() if value is not None}


def _epoch(record: Content) -> Content:
    """A record of ``metrics.jsonl`` with nothing but numbers where numbers belong."""
    return _numbers(record) | {
        "train": _numbers(record.get("train")),
        "validation": _numbers(record.get("validation")),
    }


# Results of other commands.


def _checked_corruptions(content: Content, path: Path) -> Content:
    try:
        cells = [*content["groups"].values(), *content["corruptions"].values()]
        cells += [
            each["severities"][str(s)]
            for each in content["corruptions"].values()
            for s in content["settings"]["severities"]
        ]
        cells += [c for c in (content["natural"], *content["means"].values()) if c is not None]
        for cell in cells:
            low, high = cell["interval"]
            _need(all(number(value) is not None for value in (cell["accuracy"], low, high)))
        _need(number(content["data"]["n"]) is not None)
        _need(all(isinstance(each["group"], str) for each in content["corruptions"].values()))
        _need_facts(content)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _not_whole(path, "corruptions") from None
    return content


def _checked_diagnosis(content: Content, path: Path) -> Content:
    try:
        for item in content["checks"]:
            _need(item["status"] in ("pass", "warn", "fail"))
            _need(isinstance(item["name"], str) and isinstance(item["meaning"], str))
        _need(content["verdict"] in ("pass", "warn", "fail"))
        _need(number(content["n"]) is not None)
        _need_facts(content)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _not_whole(path, "diagnose") from None
    return content


def _need_facts(content: Content) -> None:
    _need(isinstance(content["target"], str) and isinstance(content["model"], dict))
    _need(isinstance(content["data"]["name"], str) and isinstance(time_of(content), str))


def _need(true: bool) -> None:
    if not true:
        raise ValueError


def _not_whole(path: Path, command: str) -> CheckpointError:
    return CheckpointError(f"{path} is no whole result of `cure {command}`; make it again")


def _checked_study(content: Content, path: Path, owner: str) -> Told:
    name = content.get("study")
    if not isinstance(name, str) or name not in STUDIES:
        raise CheckpointError(f"{path}: " + unknown("study", str(name), STUDIES.names()))
    return Told(name, owner, content)


_CHECKED: dict[Any, Callable[[Content, Path], Content]] = {
    _EVALUATION: checked_result,
    _CORRUPTIONS: _checked_corruptions,
    _DIAGNOSIS: _checked_diagnosis,
}


def _read_result(kind: str, path: Path) -> Content:
    return _CHECKED[kind](read_json(path), path)


def _attach(typed: str, content: Content, made: Gathered) -> None:
    """File a result that was named by itself under the network it says it is of."""
    target, facts = str(no_place(content["target"])), content["model"]
    entry = next((e for e in made.entries if _is_of(e, target, facts)), None)
    if entry is None:
        name = _free(target, made.entries)
        entry = Entry(name, Source(name, typed, []), typed=shlex.quote(target))
        made.entries.append(entry)
    kinds = {
        _EVALUATION: entry.source.results,
        _CORRUPTIONS: entry.corruptions,
        _DIAGNOSIS: entry.diagnoses,
    }
    if content not in kinds[content["format"]]:
        kinds[content["format"]].append(content)


def _is_of(entry: Entry, target: str, facts: Mapping[str, Any]) -> bool:
    """Whether a result that names ``target`` is about this network."""
    if entry.folder is not None:
        # Every natural start is in a folder called "natural".
        said = (facts.get("method"), facts.get("run_seed"), facts.get("recipe"))
        ours = (entry.config["method"]["name"], entry.config["seed"], entry.config.get("name"))
        return target == entry.folder.resolve().name and said == ours
    known = [*entry.source.results, *entry.corruptions, *entry.diagnoses]
    return any(
        str(no_place(other["target"])) == target
        and all(other["model"].get(key) == facts.get(key) for key in _IDENTITY)
        for other in known
    )


_IDENTITY = ("method", "recipe", "run_seed", "weights", "name", "parameters", "epoch")


def _find_starts(entries: list[Entry]) -> None:
    """Tell each run which other run of the page it began from, where its settings say so."""
    for entry in entries:
        start = str(entry.config.get("start") or "")
        if entry.start is not None or start in ("", "natural", "scratch", "model"):
            continue
        # The path is from where training was started, which is not where we are: as for results of
        # a run, its name says which run, and what it trained has to fit.
        alike = [
            other
            for other in entries
            if other is not entry
            and other.folder is not None
            and other.folder.resolve().name == PurePath(start).name
            and all(other.config.get(key) == entry.config.get(key) for key in ("model", "data"))
        ]
        entry.start = alike[0] if len(alike) == 1 else None
