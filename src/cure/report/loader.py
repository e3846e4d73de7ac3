"""What a page is about: runs, and results in files, as records of :mod:`cure.runs.results`.

A file that a user named and that cannot be read is refused. A damaged file inside a run costs the
page one sentence in its place, not the page.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml

from cure.analysis.study import find_study, unique
from cure.config import NATURAL, ROBUST, starts_naturally
from cure.errors import CheckpointError, ConfigError, CureError, counted
from cure.experiments.compare.sources import Source, checked_config, current, no_place
from cure.recipe import read_yaml
from cure.runs.folder import RunFolder, paths_of
from cure.runs.records import (
    Environment,
    EpochMetrics,
    EpochTiming,
    Images,
    Line,
    Outcome,
    Status,
    TradeoffRecord,
)
from cure.runs.results import (
    RESULTS,
    CorruptionRecord,
    DiagnosisRecord,
    EvaluationRecord,
    ResultRecord,
    RunRecord,
    StudyRecord,
    number_of,
    oldest_first,
    read_result,
)
from cure.runs.run import Run

T = TypeVar("T")
LineKind = TypeVar("LineKind", bound=Line)


@dataclass
class Entry:
    """A network of the page: a run, the natural start of one, or the network of result files.

    Attributes:
        name: unique in the page.
        typed: as the user named it, quoted where a shell would act on it, for commands to copy.
        folder: of a run.
        config: settings of the run; empty when only results are known.
        evaluations: results of ``cure evaluate``, oldest first.
        corruptions: results of ``cure corruptions``, oldest first.
        diagnoses: results of ``cure diagnose``, oldest first.
        metrics: a record for each epoch.
        timing: the same for times.
        images: the images of the run.
        status: how far it came.
        outcome: what the training gained.
        between: of a run of ``cure tradeoff``, the points that it was chosen from.
        environment: where it was trained.
        label: of the row, where a plan gives it one.
        start: the network that its training began from, where that is in the page.
        is_start: whether it is here only as the start of another.
    """

    name: str
    typed: str = "RUN"
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    corruptions: list[CorruptionRecord] = field(default_factory=list)
    diagnoses: list[DiagnosisRecord] = field(default_factory=list)
    metrics: Sequence[EpochMetrics] = ()
    timing: Sequence[EpochTiming] = ()
    images: Images | None = None
    status: Status | None = None
    outcome: Outcome | None = None
    between: TradeoffRecord | None = None
    environment: Environment | None = None
    label: str | None = None
    start: Entry | None = None
    is_start: bool = False

    @property
    def source(self) -> Source:
        """The same for ``cure compare``."""
        return Source(
            self.name,
            self.typed,
            self.evaluations,
            self.config or None,
            self.timing,
            self.environment,
            None if self.status is None else self.status.finished,
            self.label,
        )

    def results(self) -> list[ResultRecord]:
        """All results but studies."""
        return [*self.evaluations, *self.corruptions, *self.diagnoses]

    def file(self, result: ResultRecord) -> None:
        """Add a result, once."""
        kinds: dict[type[ResultRecord], list[Any]] = {
            EvaluationRecord: self.evaluations,
            CorruptionRecord: self.corruptions,
            DiagnosisRecord: self.diagnoses,
        }
        if result not in kinds[type(result)]:
            kinds[type(result)].append(result)

    def validation_images(self) -> int | None:
        """Number of validation images, where it is known."""
        known = None if self.images is None else self.images.validation
        count = self.setting("data", "validation") if known is None else known
        return count if isinstance(count, int) and count else None

    def setting(self, section: str, key: str) -> Any:
        """A setting of the run; None where it has none."""
        of = self.config.get(section)
        return of.get(key) if isinstance(of, dict) else None


@dataclass(frozen=True)
class StudyResult:
    """A result of ``cure analyse``.

    Attributes:
        study: name of the study today.
        owner: the run or file that holds it.
        record: the file.
    """

    study: str
    owner: str
    record: StudyRecord


@dataclass
class PageInputs:
    """All that a page is made from.

    Attributes:
        entries: networks, a start after the first run that has it.
        studies: results of studies, in the order of entries.
        troubles: a sentence for each file that could not be read.
        first: the folder of the first run, if there is a run.
    """

    entries: list[Entry] = field(default_factory=list)
    studies: list[StudyResult] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    first: Path | None = None

    def free(self, name: str) -> str:
        """``name``, numbered where another entry has it."""
        return unique(name, {entry.name for entry in self.entries})


def load_inputs(targets: str | Path | Run | Iterable[str | Path | Run]) -> PageInputs:
    """Read runs and result files.

    Args:
        targets: run folders; results of ``evaluate``, ``corruptions``, ``diagnose`` and
            ``analyse`` as JSON files; records that a plan keeps of its runs.

    Raises:
        CureError: when one of them is none of these, or is named twice.
    """
    inputs = PageInputs()
    loose: list[tuple[str, ResultRecord]] = []
    paths = paths_of(targets)
    for path in paths:
        if not path.is_file():
            _read_run(path, inputs)
            inputs.first = inputs.first or path
            continue
        record = read_result(path)
        if isinstance(record, RunRecord):
            inputs.entries.append(_of_record(record, path, inputs))
        elif isinstance(record, StudyRecord):
            inputs.studies.append(_study(record, path, path.name))
        else:
            loose.append((str(path), record))
    if not paths:
        raise ConfigError("expected one or more runs, got none; name the folder of a run")
    for _, result in loose:
        _attach(result, inputs)
    for entry in inputs.entries:
        entry.evaluations = current(oldest_first(entry.evaluations))
        entry.corruptions = oldest_first(entry.corruptions)
        entry.diagnoses = oldest_first(entry.diagnoses)
    _find_starts(inputs.entries)
    return inputs


def _of_record(record: RunRecord, path: Path, inputs: PageInputs) -> Entry:
    source = Source.of_record(record, path.stem, str(path))
    return Entry(
        inputs.free(source.name),
        config=source.config or {},
        evaluations=source.results,
        metrics=record.metrics,
        timing=source.timing,
        environment=source.environment,
        label=source.label,
        status=Status(state="finished"),
    )


def _read_run(path: Path, inputs: PageInputs) -> None:
    """A run, what it keeps, and its natural start."""
    if not (path / "config.yaml").is_file():
        what = "holds no run (no config.yaml)" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; name the folder that `cure train` printed")
    entry = _of_folder(path, path.resolve().name, inputs)
    inputs.entries.append(entry)
    own = starts_naturally(str(entry.config.get("start") or NATURAL))  # Else it is a teacher.
    if not own or not (path / "natural" / "config.yaml").is_file():
        return
    start = _of_folder(path / "natural", f"{entry.name}/natural", inputs)
    start.is_start = True
    # Several runs that copied one start would fill the page with the same network.
    same = next((each for each in inputs.entries if each.is_start and _same(each, start)), None)
    if same is None:
        inputs.entries.append(start)
    else:
        for result in start.results():
            same.file(result)
    entry.start = same or start


def _same(first: Entry, second: Entry) -> bool:
    """Whether two runs are one training: its settings and every number it wrote are the same."""
    return bool(first.metrics) and (first.config, first.metrics) == (second.config, second.metrics)


def _of_folder(path: Path, name: str, inputs: PageInputs) -> Entry:
    """What the folder of one run holds; what is damaged in it becomes a sentence."""
    try:
        config = read_yaml((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    config = checked_config(config, path / "config.yaml")
    entry = Entry(inputs.free(name), shlex.quote(str(no_place(str(path)))), path, config)

    def trouble(sentence: str) -> None:
        # A page may be shown to others, who need not know where on a machine the run lies.
        inputs.troubles.append(sentence.replace(str(path), entry.typed))

    def read(file: Path, parse: Callable[[Path], T]) -> T | None:
        try:
            return parse(file) if file.exists() else None
        except CureError as error:
            trouble(str(error))
            return None

    def lines(kind: type[LineKind]) -> list[LineKind]:
        file, found, lost = path / kind.file, [], 0
        texts = read(file, lambda file: file.read_bytes().splitlines()) or []
        for place, text in enumerate(texts, 1):
            try:
                found.append(kind.model_validate(json.loads(text)))
            except ValueError:
                # A run that is killed while it writes leaves the beginning of a line at the end.
                cut = place == len(texts) and text[:1] == b"{" and text[-1:] != b"}"
                lost += not cut
        if lost:
            trouble(f"{file}: {counted(lost, 'damaged line')} left out; restore it from a copy")
        return found

    run = RunFolder(path)
    entry.environment = read(path / "environment.json", Environment.read)
    entry.images = read(path / "data.json", Images.read)
    entry.status = read(path / "status.json", Status.read)
    entry.outcome = read(path / "outcome.json", Outcome.read)
    entry.between = read(path / "tradeoff.json", TradeoffRecord.read)
    entry.metrics, entry.timing = lines(EpochMetrics), lines(EpochTiming)
    for folder, kind in RESULTS.items():
        files = sorted((path / folder).glob("*.json"), key=number_of)
        kept = [result for file in files if (result := read(file, kind.read)) is not None]
        present = run.of_present_weights(kept)
        for result in present:
            entry.file(result)
        if len(present) < len(kept):
            trouble(
                f"{entry.typed}: {counted(len(kept) - len(present), 'result')} of earlier weights "
                f"in {folder}/ left out; measure the present ones"
            )
    for file in sorted((path / "studies").glob("*.json"), key=number_of):
        study = read(file, lambda file: _study(StudyRecord.read(file), file, entry.name))
        inputs.studies += [] if study is None else [study]
    return entry


def _study(record: StudyRecord, path: Path, owner: str) -> StudyResult:
    try:
        return StudyResult(find_study(record.study).name, owner, record)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _attach(result: ResultRecord, inputs: PageInputs) -> None:
    """File a result that was named by itself under the network that it names."""
    entry = next((each for each in inputs.entries if _is_of(each, result)), None)
    if entry is None:
        target = str(no_place(result.target))
        entry = Entry(inputs.free(target), shlex.quote(target))
        inputs.entries.append(entry)
    entry.file(result)


def _is_of(entry: Entry, result: ResultRecord) -> bool:
    """Whether a result is about this network."""
    facts, target = result.model, str(no_place(result.target))
    if entry.folder is not None:
        # Every natural start is in a folder called "natural".
        said = (facts.method, facts.run_seed, facts.recipe)
        own = (entry.config["method"]["name"], entry.config["seed"], entry.config.get("name"))
        return target == entry.folder.resolve().name and said == own
    return any(
        str(no_place(other.target)) == target
        and all(getattr(other.model, key) == getattr(facts, key) for key in _IDENTITY)
        for other in entry.results()
    )


_IDENTITY = ("method", "recipe", "run_seed", "weights", "name", "parameters", "epoch")


def _find_starts(entries: list[Entry]) -> None:
    """Link each run to the run of the page that it began from, where its settings say so."""
    for entry in entries:
        start = str(entry.config.get("start") or "").removeprefix(ROBUST)
        if entry.start is not None or start in ("", "natural", "scratch", "model"):
            continue
        # The path counts from where training was started, so only its name identifies the run;
        # what it trained has to fit as well.
        alike = [
            other
            for other in entries
            if other is not entry
            and other.folder is not None
            and other.folder.resolve().name == PurePath(start).name
            and all(other.config.get(key) == entry.config.get(key) for key in ("model", "data"))
        ]
        entry.start = alike[0] if len(alike) == 1 else None
