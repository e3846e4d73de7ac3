"""Sources of a comparison: what is known of each run, from its folder or its result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from cure.config import RunConfig, defaults
from cure.errors import CheckpointError
from cure.runs.folder import RunFolder
from cure.runs.packed import merged
from cure.runs.records import Environment, EpochTiming
from cure.runs.results import EvaluationRecord, RunRecord, oldest_first

IMAGES = ("data", "split", "size", "norm", "epsilon")
"""What two evaluations must share to be compared, besides the number of images."""

Images = tuple[Any, ...]
"""Values of :data:`IMAGES`: on what and against what was evaluated."""


@dataclass
class Source:
    """What is known of one run.

    Attributes:
        name: in the table.
        typed: as the user named it, for messages.
        results: of ``cure evaluate``, oldest first.
        config: its settings as they were written; None where only results are known.
        timing: seconds and memory of each epoch.
        environment: where it was trained, where that is known.
        finished: whether it was trained to its end, where known.
        label: of the row, where a plan gives it one.
        mixed: shares of the weights of which ``cure tradeoff`` made it; None of other networks.
    """

    name: str
    typed: str
    results: list[EvaluationRecord]
    config: dict[str, Any] | None = None
    timing: Sequence[EpochTiming] = ()
    environment: Environment | None = None
    finished: bool | None = None
    label: str | None = None
    mixed: str | None = None

    @classmethod
    def of_folder(cls, path: Path) -> Source:
        """A run with all its evaluations.

        Raises:
            CheckpointError: when it is no run, was not evaluated, or a file of it is damaged.
        """
        folder, place = RunFolder.open(path), path.resolve()
        config = checked_config(folder.settings(), path / "config.yaml")
        results = folder.evaluations()
        if not results:
            earlier = any((path / "evaluations").glob("*.json"))
            why = "has other weights since it was evaluated" if earlier else "was not evaluated yet"
            raise CheckpointError(f"{path} {why}; do so with `cure evaluate {path}`")
        known = (path / "environment.json").is_file()
        status = folder.status() if (path / "status.json").is_file() else None
        # All natural starts are in folders called "natural".
        inside = (place.parent / "config.yaml").is_file()
        return cls(
            name=f"{place.parent.name}/{place.name}" if inside else place.name,
            typed=str(path),
            results=current(results),
            config=config,
            timing=folder.timing(),
            environment=folder.environment() if known else None,
            finished=None if status is None else status.finished,
            mixed=folder.shares(),
        )

    @classmethod
    def of_record(cls, record: RunRecord, name: str, typed: str) -> Source:
        """A run that a plan keeps in one file.

        Raises:
            CheckpointError: when it has no evaluation or no settings.
        """
        if not record.evaluations:
            raise CheckpointError(
                f"{typed} holds no evaluation of its run; move it away and do that run of the "
                "plan again"
            )
        return cls(
            name=name,
            typed=typed,
            results=current(oldest_first(record.of_best_weights())),
            config=checked_config(record.config, typed),
            timing=record.timing,
            environment=record.environment,
            finished=True,
            label=record.label,
        )

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the row is about: the best where it was evaluated."""
        kinds = {result.model.checkpoint for result in self.results}
        return next((kind for kind in ("best", "last") if kind in kinds), None)

    def of(self, checkpoint: str | None, images: Images | None = None) -> list[EvaluationRecord]:
        """Results of one checkpoint, on one kind of images or on all, oldest first."""
        return [
            result
            for result in self.results
            if result.model.checkpoint == checkpoint and images in (None, images_of(result))
        ]


def checked_config(config: Any, path: str | Path) -> dict[str, Any]:
    """The settings, once those that rows are made from were found in them.

    Settings that came with a later version are there at their defaults; those of the method are
    left out, which would take PyTorch.

    Raises:
        CheckpointError: when one is missing.
    """
    try:
        whole = isinstance(config["seed"], int)
        for section, key in (("method", "name"), ("training", "epochs"), ("threat", "epsilon")):
            whole = whole and config[section][key] is not None
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{path} holds no whole configuration; restore it from a copy"
        ) from None
    known = {key: value for key, value in defaults(RunConfig).items() if key != "method"}
    return merged(known, config)


def current(results: list[EvaluationRecord]) -> list[EvaluationRecord]:
    """Without results of a checkpoint that was replaced when the run went on."""
    now = {result.model.checkpoint: result.model.epoch for result in results}
    return [result for result in results if result.model.epoch == now[result.model.checkpoint]]


def images_of(result: EvaluationRecord) -> Images:
    """Values of :data:`IMAGES` for a result."""
    data, threat = result.data, result.threat
    size = "x".join(map(str, data.size))
    return no_place(data.name), data.split, size, threat.norm, threat.epsilon


def no_place(value: Any) -> Any:
    """The same value with every absolute path cut to its last part: it names a machine's folder."""
    if isinstance(value, Mapping):
        return {key: no_place(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [no_place(inner) for inner in value]
    if not isinstance(value, str):
        return value
    prefix, colon, rest = value.rpartition(":")
    return prefix + colon + PurePath(rest).name if rest.startswith(("/", "~", "..")) else value
