"""The figures of many runs in one file: a first line that all share, then a line a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cure.errors import CheckpointError
from cure.runs.records import EpochTiming
from cure.runs.results import RunRecord
from cure.utils.io import write_text

PACKED_FORMAT = "cure-runs-1"

_KEPT_OF_ACCURACY = ("accuracy", "interval", "correct", "n", "right", "balanced_accuracy")
_KEPT_OF_EVALUATION: dict[str, Any] = {
    **dict.fromkeys(("format", "target", "nrr", "threat", "model", "seed", "batch_size"), True),
    "natural": {*_KEPT_OF_ACCURACY},
    "majority": True,
    "attacks": {"__all__": {*_KEPT_OF_ACCURACY, "settings", "seed"}},
    # What they were asked to be is needed, too: see DataFacts.answers.
    "data": {"name", "split", "n", "limit", "size", "sha256", "own"},
    "environment": {
        *("cure", "commit", "python", "packages", "processor", "cores", "threads", "gpu", "time"),
    },
}


def summary(record: RunRecord) -> RunRecord:
    """The figures of a run without its curves: what tables and comparisons are made from.

    Metrics of the epochs, findings of the diagnosis, names of classes and counts of passes are
    left out. Of the times of its epochs, the medians are kept, and the largest peak of memory.
    """
    timing = []
    if record.timing:
        costs = {"epoch": record.timing[-1].epoch, **costs_of(record.timing)}
        timing = [EpochTiming.model_validate(costs)]
    evaluations = [
        result.model_dump(exclude_unset=True, include=_KEPT_OF_EVALUATION)
        for result in record.evaluations
    ]
    content = record.content() | {
        "metrics": [],
        "timing": [line.content() for line in timing],
        "evaluations": evaluations,
    }
    return RunRecord.model_validate(content)


def costs_of(timing: Sequence[EpochTiming]) -> dict[str, float]:
    """The costs of a run, by name of the field: those that were recorded in an epoch or more.

    The median of ``seconds`` and ``processor_seconds`` over the epochs, and the largest
    ``peak_memory_mib``.

    >>> costs_of([EpochTiming(epoch=1, seconds=3.0), EpochTiming(epoch=2, seconds=5.0)])
    {'seconds': 4.0}
    """
    found: dict[str, float] = {}
    for key, of in (("seconds", median), ("processor_seconds", median), ("peak_memory_mib", max)):
        values = [value for line in timing if (value := getattr(line, key)) is not None]
        found |= {key: of(values)} if values else {}
    return found


def settings_hash(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that identify the settings of a run."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def write_packed(path: Path, records: Mapping[str, RunRecord]) -> None:
    """Write runs into one file: what all share once, then a line a run with what differs.

    Args:
        path: the file to write or replace (``records.jsonl``).
        records: by name of the run; :func:`summary` makes them small.
    """
    whole: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        content = record.content()
        content["evaluations"] = dict(enumerate(content["evaluations"]))
        whole[name] = json.loads(json.dumps(content))
    shared = _shared(list(whole.values()))
    lines: list[dict[str, Any]] = [{"format": PACKED_FORMAT, "shared": shared}]
    for name, content in whole.items():
        own = {"run": name, "settings_hash": settings_hash(content["config"])}
        lines.append(own | _without(content, shared))
    texts = [json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines]
    write_text(path, "\n".join(texts) + "\n")


def read_packed(path: Path) -> dict[str, RunRecord]:
    """The runs of a file that :func:`write_packed` wrote, by name.

    Raises:
        CheckpointError: when the file is damaged.
    """
    found = {}
    try:
        texts = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        head, *lines = (json.loads(text) for text in texts)
        if head["format"] != PACKED_FORMAT:
            raise ValueError(f"its format is '{head['format']}'")
        for line in lines:
            name, known = line.pop("run"), line.pop("settings_hash")
            content = merged(head["shared"], line)
            results = content["evaluations"]
            content["evaluations"] = [results[key] for key in sorted(results, key=int)]
            if settings_hash(content["config"]) != known:
                raise ValueError(f"the settings of {name} were changed")
            found[name] = RunRecord.parse(content, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from None
    return found


def _shared(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all have in common, nested."""
    first, *others = contents
    found: dict[str, Any] = {}
    for key, value in first.items():
        values = [other.get(key, _MISSING) for other in others]
        if isinstance(value, dict) and all(isinstance(other, dict) for other in values):
            inner = _shared([value, *values])
            found |= {key: inner} if inner else {}
        elif all(other == value and type(other) is type(value) for other in values):
            found[key] = value
    return found


_MISSING = object()


def _without(content: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What ``content`` has besides ``shared``."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key not in shared:
            found[key] = value
        elif isinstance(value, dict) and (inner := _without(value, shared[key])):
            found[key] = inner
    return found


def merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` above ``shared``, nested: the inverse of :func:`_without`."""
    found = dict(shared)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(shared.get(key), dict)
        found[key] = merged(shared[key], value) if both else value
    return found
