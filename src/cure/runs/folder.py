"""The folder of a run: its paths, its creation, its lock, and the records in it.

What a folder holds:

- ``config.yaml``: every setting of the run; ``environment.json``: versions and hardware.
- ``data.json``: classes and size of the images, and what was found in them.
- ``extra.safetensors``: which extra images are trained on, and their labels.
- ``copies.png``: extra images that copy held-out ones, beside these.
- ``metrics.jsonl``: a line an epoch, the same bits for the same run; ``timing.jsonl``: seconds.
- ``gradients.jsonl``, ``gradients.safetensors``: what ``training.record_gradients`` records.
- ``status.json``: how far the run came; ``outcome.json``: what it gained.
- ``checkpoints/{last,best}.safetensors``: weights.
- ``checkpoints/start.safetensors``: weights that a run with ``start: model`` or a path began with.
- ``checkpoints/epoch-0005.safetensors``: weights that ``training.keep_every`` keeps.
- ``checkpoints/state.safetensors``: everything that resuming needs.
- ``evaluations/``: results of ``cure evaluate``, and journals of unfinished ones.
- ``corruptions/``, ``diagnoses/``: results of ``cure corruptions`` and ``cure diagnose``.
- ``studies/``: results of ``cure analyse`` and their pictures.
- ``natural/``, ``head/``, ``teachers/ROLE/``: runs that this run needed first (:func:`inner`).
- ``tradeoff.json``: of a run that `cure tradeoff` made, the points that it was chosen from.
- ``tracking.json``: identities at W&B and MLflow; ``tensorboard/``, ``wandb/``: their files.

The formats of the JSON files are in :mod:`cure.runs.records` and :mod:`cure.runs.results`.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from safetensors import SafetensorError, safe_open

from cure.config import MEMORY, NATURAL, OBJECT, RunConfig
from cure.errors import CheckpointError, ConfigError, CureError
from cure.recipe import check_kept, dump, read_yaml
from cure.runs.records import (
    Environment,
    EpochMetrics,
    EpochTiming,
    FileRecord,
    GradientLine,
    Images,
    Line,
    LineKind,
    Outcome,
    Status,
    line_text,
    read_lines,
)
from cure.runs.results import (
    RESULTS,
    CorruptionRecord,
    DiagnosisRecord,
    EvaluationRecord,
    ResultKind,
    StudyRecord,
    of_epochs,
    oldest_first,
    read_numbered,
)
from cure.utils.environment import environment
from cure.utils.io import first_line, user_path, write_text

if TYPE_CHECKING:
    from cure.data.images import ImageKind, ImageSet
    from cure.runs.run import Run


def epoch_name(epoch: int) -> str:
    """Name of the checkpoint that keeps the weights after so many epochs.

    >>> epoch_name(5)
    'epoch-0005'
    """
    return f"epoch-{epoch:04d}"


def best_weights(path: Path) -> Path:
    """The best weights of a run folder; a file, or another folder with weights, as it is.

    Raises:
        CheckpointError: when a folder holds neither a run nor weights.
    """
    from cure.models.weight_files import holds_weights

    if not path.is_dir() or (not (path / "config.yaml").is_file() and holds_weights(path)):
        return path
    return RunFolder.open(path).weights("best")


def path_of(run: Run | str | Path) -> Path:
    """The folder of a run; a file as it is.

    Raises:
        ConfigError: for what is no path.
    """
    # By its attribute: the class Run needs PyTorch, and tables are made without.
    place: str | Path = getattr(run, "path", cast("str | Path", run))
    return user_path(place)


def paths_of(runs: Run | str | Path | Iterable[Run | str | Path]) -> list[Path]:
    """The folders of one run or several, each named once; files as they are.

    Raises:
        ConfigError: when one is named twice, or for what is no path.
    """
    if isinstance(runs, str | Path) or not isinstance(runs, Iterable):
        return [path_of(runs)]
    found: dict[Path, Path] = {}
    for path in map(path_of, runs):
        if path.resolve() in found:
            raise ConfigError(f"{path} is named twice; a run counts once: name it once")
        found[path.resolve()] = path
    return list(found.values())


class RunFolder:
    """The folder of one run. Nothing here deletes or replaces a run.

    Attributes:
        path: of the folder.
        resumed_by: the run that ``cure resume`` continues: this one, or the run that needs it.
        writes: whether this process writes. Of several ranks only the first does; on the others
            every call that would write does nothing.
    """

    def __init__(self, path: Path, resumed_by: Path | None = None, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.resumed_by = resumed_by or path
        self.checkpoints = path / "checkpoints"
        self.state = self.checkpoints / "state.safetensors"

    @classmethod
    def create(
        cls,
        path: Path | str | None,
        config: RunConfig,
        kind: ImageKind,
        account: dict[str, Any] | None = None,
        fill: Callable[[RunFolder], None] = lambda folder: None,  # noqa: ARG005
    ) -> RunFolder:
        """A new folder for ``config``; without a path the first free ``runs/NAME[-N]``.

        Args:
            path: where; parents are made.
            config: what the run is.
            kind: the images it is trained on.
            account: what was found in them.
            fill: writes what else the folder holds when it appears.

        Raises:
            CheckpointError: when the path exists, or cannot be written; nothing is left then.
        """
        candidates = [user_path(path)] if path is not None else cls._numbered(config.name)
        target = next((place for place in candidates if not place.exists()), None)
        if target is None:
            raise CheckpointError(
                f"{path} exists; a run never overwrites: name another folder with --run, "
                f"or continue that run with `cure resume {path}`"
            )
        # Filled under another name, so that a folder with the run's name is always a whole one.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            (temporary / "checkpoints").mkdir(parents=True)
            Environment(**environment()).write(temporary / "environment.json")
            images = Images(
                classes=list(kind.classes),
                channels=kind.channels,
                size=list(kind.size),
                account=account,
            )
            images.write(temporary / "data.json")
            write_text(temporary / "config.yaml", dump(config))
            fill(cls(temporary))
            temporary.rename(target)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise CheckpointError(f"the run folder {target} cannot be made: {error}") from None
        return cls(target)

    @staticmethod
    def _numbered(name: str) -> Iterator[Path]:
        yield Path("runs") / name
        for number in itertools.count(2):
            yield Path("runs") / f"{name}-{number}"

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The run at ``path``.

        Raises:
            CureError: when there is none.
        """
        folder = cls(user_path(path))
        if not (folder.path / "config.yaml").is_file():
            what = "holds no run (no config.yaml)" if folder.path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}; name the folder that `cure train` printed")
        return folder

    def start_weights(self) -> Path | None:
        """The file of the weights that the run began with; None where they were not kept."""
        config, kept = self.config, self.checkpoints / "start.safetensors"
        if kept.exists():
            return kept
        if config.starts_naturally:
            natural = self.path / NATURAL
            return best_weights(natural) if natural.exists() else None
        if config.start_path is None:
            return None
        if (self.path / "head").is_dir():
            return RunFolder.open(self.path / "head").weights("best")
        path = Path(config.start_path).expanduser()
        return best_weights(path) if path.exists() else None

    def settings(self) -> dict[str, Any]:
        """``config.yaml`` as it was written, not checked.

        Raises:
            CheckpointError: when the file is damaged.
        """
        path = self.path / "config.yaml"
        try:
            raw = read_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} holds no configuration; restore it from a copy")
        return raw

    @property
    def config(self) -> RunConfig:
        """The settings of the run.

        Raises:
            CheckpointError: when the file is damaged.
        """
        return check_kept(self.settings(), str(self.path / "config.yaml"))

    @property
    def kind(self) -> ImageKind:
        """The images that the run was trained on.

        Raises:
            CheckpointError: when the file is missing or damaged.
        """
        from cure.data.images import ImageKind

        known = Images.read(self.path / "data.json")
        height, width = known.size
        return ImageKind(tuple(known.classes), known.channels, (height, width))

    def validation_images(self) -> int:
        """Number of validation images.

        Not always ``data.validation``, which a split of the source replaces, and which counts
        damaged images, too.

        Raises:
            CheckpointError: when a file is missing or damaged.
        """
        known = Images.read(self.path / "data.json").validation
        return int(self.config.data.validation) if known is None else known

    @property
    def account(self) -> dict[str, Any] | None:
        """What was found in the images when the run was made, where it was kept."""
        return Images.read(self.path / "data.json").account

    def images_changed(self, images: ImageSet) -> str | None:
        """The beginning of a sentence on images that are not carved as they were in training.

        Args:
            images: of a split, read from the run's own source.

        Returns:
            None where they are, and where that is not known.
        """
        known, now = (self.account or {}).get("labels"), images.findings.labels
        if known is None or now is None or known == now:
            return None
        return (
            f"images of '{images.name}' were added, removed or given another class since "
            f"{self.path} was trained, so other ones are now carved for training, validation and "
            "test"
        )

    def shares(self) -> str | None:
        """Shares of the weights that ``cure tradeoff`` mixed, the start's first; None of others."""
        if not (self.path / "tradeoff.json").is_file():
            return None
        told = _metadata(self.checkpoints / "best.safetensors").get("shares", "unknown")
        return "/".join(
            f"{float(share):.2f}" if share[0].isdigit() else share for share in told.split()
        )

    def inner(self, phase: str) -> Path:
        """Where a run that this one needs first lies.

        Args:
            phase: as in ``status.json``: "natural start", "head" or "teacher ROLE".
        """
        kind, _, role = phase.partition(" ")
        if kind == "teacher":
            return self.path / "teachers" / role
        return self.path / {"natural": NATURAL, "head": "head"}[kind]

    def weights(self, checkpoint: str = "best") -> Path:
        """The weights file called ``checkpoint`` ("best" or "last").

        Raises:
            CheckpointError: when the run has not written it yet.
        """
        path = self.checkpoints / f"{checkpoint}.safetensors"
        if not path.is_file():
            status = self.status()
            if status.state == "failed":
                raise CheckpointError(
                    f"{self.path} has no '{checkpoint}' checkpoint, it failed: {status.reason}"
                )
            raise CheckpointError(
                f"{self.path} has no '{checkpoint}' checkpoint yet; "
                f"let it go on with `{self.resume_command()}`"
            )
        return path

    def kept(self) -> dict[int, Path]:
        """The weights that ``training.keep_every`` kept, by epoch."""
        paths = sorted(self.checkpoints.glob("epoch-*.safetensors"))
        names = {path: path.stem.removeprefix("epoch-") for path in paths}
        return {int(number): path for path, number in names.items() if number.isdecimal()}

    def status(self) -> Status:
        """How far the run came; state "new" where nothing is written yet.

        Raises:
            CheckpointError: when the file is damaged.
        """
        path = self.path / "status.json"
        return Status.read(path) if path.exists() else Status(state="new")

    def set_status(self, state: str, **details: object) -> None:
        """Record how far the run came; ``details`` are fields of :class:`Status`."""
        if self.writes:
            Status.model_validate({"state": state, **details}).write(self.path / "status.json")

    def set_failed(self, error: BaseException, step: int | None = None) -> None:
        """Record that the run ended by an error, which stays the one that is raised.

        Args:
            error: why.
            step: optimiser steps that are done, where that is known.
        """
        if isinstance(error, CureError):
            reason = str(error)
        else:
            said = first_line(error)
            name = type(error).__name__
            reason = name if said == name else f"{name}: {said}"
        details: dict[str, Any] = {"reason": reason} | ({} if step is None else {"step": step})
        with suppress(CureError):  # a disk that is full holds the last status
            known = {k: v for k, v in self.status().content().items() if k != "state"}
            self.set_status("failed", **(known | details))

    def resume_command(self, settings: str = "") -> str:
        """What goes on with the run: a command, or Python where the run was given objects.

        Args:
            settings: what to change, ``key=value``.
        """
        place = self.resumed_by
        try:
            raw = RunFolder(place).settings()
        except CheckpointError:
            raw = {}
        objects = [
            f"{word}={word}"
            for word, section, key, prefix in (
                ("model", "model", "name", OBJECT),
                ("data", "data", "source", MEMORY),
            )
            if str((raw.get(section) or {}).get(key, "")).startswith(prefix)
        ]
        if not objects:
            return " ".join(filter(None, ["cure resume", str(place), settings]))
        key, _, value = settings.partition("=")
        change = f", {{'{key}': {value}}}" if settings else ""
        return f"cure.resume('{place}'{change}, {', '.join(objects)})"

    def outcome(self) -> Outcome | None:
        """What the training gained; None for natural trainings and runs of version 0.1.

        Raises:
            CheckpointError: when the file is damaged.
        """
        path = self.path / "outcome.json"
        return Outcome.read(path) if path.exists() else None

    def set_outcome(self, outcome: Outcome) -> None:
        """Record the start of a training, or what it gained."""
        if self.writes:
            outcome.write(self.path / "outcome.json")

    def metrics(self) -> list[EpochMetrics]:
        """The complete lines of ``metrics.jsonl``, one an epoch."""
        return read_lines(self.path / EpochMetrics.file, EpochMetrics)

    def timing(self) -> list[EpochTiming]:
        """The complete lines of ``timing.jsonl``, one an epoch."""
        return read_lines(self.path / EpochTiming.file, EpochTiming)

    def gradients(self) -> list[GradientLine]:
        """The complete lines of ``gradients.jsonl``, which the gradient logger writes."""
        return read_lines(self.path / GradientLine.file, GradientLine)

    def environment(self) -> Environment:
        """On what the run was begun.

        Raises:
            CheckpointError: when the file is missing or damaged.
        """
        return Environment.read(self.path / "environment.json")

    def evaluations(self) -> list[EvaluationRecord]:
        """Results of ``cure evaluate`` of the run's present weights, the oldest first."""
        kept = read_numbered(self.path / "evaluations", EvaluationRecord)
        return oldest_first(self.of_present_weights(kept))

    def corruptions(self) -> list[CorruptionRecord]:
        """Results of ``cure corruptions`` of the run's present weights, the oldest first."""
        kept = read_numbered(self.path / "corruptions", CorruptionRecord)
        return oldest_first(self.of_present_weights(kept))

    def diagnoses(self) -> list[DiagnosisRecord]:
        """Results of ``cure diagnose`` of the run's present weights, the oldest first."""
        kept = read_numbered(self.path / "diagnoses", DiagnosisRecord)
        return oldest_first(self.of_present_weights(kept))

    def of_present_weights(self, results: Iterable[ResultKind]) -> list[ResultKind]:
        """Without results of weights that training replaced since, as their epoch tells."""
        kinds = ("best", "last")
        now = {kind: epoch_of(self.checkpoints / f"{kind}.safetensors") for kind in kinds}
        return of_epochs(results, now)

    def studies(self) -> list[StudyRecord]:
        """Results of ``cure analyse`` that the run keeps, by number."""
        return list(read_numbered(self.path / "studies", StudyRecord))

    def keep(self, kind: str, result: Mapping[str, Any]) -> Path:
        """Write a result into the run, under the first free number.

        Args:
            kind: folder: "evaluations", "corruptions" or "diagnoses".
            result: of the command, with its checkpoint and split.

        Returns:
            The file.

        Raises:
            CheckpointError: when it cannot be written.
        """
        record = RESULTS[kind].parse(result, f"a result for {self.path / kind}")
        return self.keep_numbered(kind, f"{record.model.checkpoint}-{record.data.split}", record)

    def keep_numbered(self, kind: str, name: str, record: FileRecord) -> Path:
        """Write ``KIND/NAME-N.json`` with the first free number N; see :meth:`keep`."""
        folder = self.path / kind
        paths = (folder / f"{name}-{number}.json" for number in itertools.count(1))
        try:
            folder.mkdir(exist_ok=True)
            path = next(path for path in paths if not path.exists())
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be written ({error.strerror}); make {self.path} writable"
            ) from None
        record.write(path)
        return path

    def partial_evaluation(self, name: str) -> Path:
        """The file called ``name`` in which an unfinished evaluation keeps its journal.

        Raises:
            CheckpointError: when its folder cannot be made.
        """
        folder = self.path / "evaluations"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be made ({error.strerror}); make {self.path} writable"
            ) from None
        return folder / name

    def append(self, line: Line) -> None:
        """Add a line to its file; it is on the disk afterwards.

        Raises:
            CheckpointError: when it cannot be written.
        """
        if not self.writes:
            return
        path = self.path / line.file
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line_text(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror}); make room and "
                f"continue with `{self.resume_command()}`"
            ) from None

    def rewind(self, epochs: int, steps: int) -> None:
        """Remove what was recorded after so many epochs and steps: it will be done again."""
        self._rewrite([line for line in self.metrics() if line.epoch <= epochs], EpochMetrics)
        self._rewrite([line for line in self.timing() if line.epoch <= epochs], EpochTiming)
        self._rewrite([line for line in self.gradients() if line.step < steps], GradientLine)
        for epoch, path in self.kept().items():
            if self.writes and epoch > epochs:
                path.unlink()

    def _rewrite(self, lines: list[LineKind], kind: type[LineKind]) -> None:
        path = self.path / kind.file
        if self.writes and path.exists():
            write_text(path, "".join(map(line_text, lines)))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from training in this folder.

        Raises:
            CheckpointError: when another process does.
        """
        if not self.writes:
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(
                    f"{self.path} is being trained by another process; wait for it or stop it"
                ) from None
            yield


def epoch_of(path: Path) -> int | None:
    """The epoch whose weights a file of a run holds, if it says so."""
    epoch = _metadata(path).get("epoch")
    return int(epoch) if epoch else None


def _metadata(path: Path) -> dict[str, str]:
    """What a file of weights says of itself."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}  # What is wrong with the file is said when its weights are read.
