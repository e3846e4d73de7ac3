"""What all studies share: what they look at, what they return, and where it is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cure.attacks import Threat
from cure.config import ThreatConfig
from cure.data import ImageSet
from cure.errors import ConfigError
from cure.evaluation.runner import Result
from cure.evaluation.target import ModelOptions, Split, check_counts, subject_of, threat_of
from cure.models import describe
from cure.registry import STUDIES as STUDIES
from cure.runs.folder import RunFolder
from cure.runs.run import Run
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import write_json, write_text
from cure.utils.plotting import Picture

STUDY_FORMAT = "cure-study-1"

Target = str | Path | Run | nn.Module


@dataclass(frozen=True)
class Rows:
    """A table of a study: words only, numbers already rounded and with their units in the head."""

    title: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Study:
    """One study: how its result is told.

    What computes it is a function of its own, with the arguments it needs, that ends in
    :func:`keep`.

    Attributes:
        name: as in ``cure analyse NAME``.
        title: a heading.
        question: what it answers, in words a newcomer understands.
        command: an example that makes it, for a reader who lacks it.
        findings: a result in sentences, the most important first, with numbers and n.
        tables: a result in tables; the first one is printed on the terminal.
        pictures: a result in drawings; their names begin with that of the study and a hyphen.
    """

    name: str
    title: str
    question: str
    command: str
    findings: Callable[[Result], list[str]]
    tables: Callable[[Result], list[Rows]]
    pictures: Callable[[Result], list[Picture]]


@dataclass(frozen=True)
class Looked:
    """Networks and images of a study.

    Attributes:
        networks: in evaluation mode on the engine's device, by a unique name each.
        facts: the same names, what is known of each network, for the result.
        images: the images, in their order.
        threat: the ball.
        engine: device and precision (float32).
        batch_size: images at once.
        seed: of random starts.
        folder: the first run among the targets, which keeps the result.
    """

    networks: dict[str, nn.Module]
    facts: dict[str, Any]
    images: ImageSet
    threat: ThreatConfig
    engine: Engine
    batch_size: int
    seed: int
    folder: RunFolder | None = field(repr=False)

    @property
    def ball(self) -> Threat:
        """The threat, for attacks."""
        return Threat.of(self.threat)

    def add(self, target: Target) -> str:
        """Load one more network for the same images, a run's with its best weights; its name."""
        subject = subject_of(target, "best", None, ModelOptions())
        name = unique(subject.name, self.networks)
        built = subject.build(self.images)
        self.networks[name] = self.engine.place(built).eval()
        self.facts[name] = describe(built) | subject.facts
        return name

    def described(self) -> dict[str, Any]:
        """What was looked at, for the result."""
        return {
            "models": self.facts,
            "data": {
                "name": self.images.name,
                "split": self.images.split,
                "n": len(self.images),
                "classes": list(self.images.classes),
                "size": [self.images.channels, *self.images.size],
            },
            "threat": {
                "norm": self.threat.norm,
                "epsilon": float(self.threat.epsilon),
                "epsilon_text": self.threat.epsilon.text,
            },
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


def look(
    targets: Sequence[Target],
    *,
    data: str | Path | ImageSet | None = None,
    data_options: Mapping[str, Any] | None = None,
    split: Split = "test",
    limit: int | None = None,
    epsilon: str | float | None = None,
    norm: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    weights: str | Path | None = None,
    how: ModelOptions | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Looked:
    """Load what a study looks at.

    Args:
        targets: runs, names of networks, networks; as for :func:`cure.evaluate`.
        data: the images; by default those of the first run among the targets.
        data_options: settings of the data section.
        split: which images.
        limit: only the first so many.
        epsilon: radius; by default that of the first run.
        norm: as ``epsilon``.
        checkpoint: which weights of runs.
        weights: weights file of a named network or one in Python; goes with a single target.
        how: how a named network is built.
        batch_size: images at once.
        device: "auto", "cpu", "cuda".
        seed: of random starts.

    Raises:
        CureError: for every mistake a user can mend.
    """
    check_counts(limit=limit, batch_size=batch_size)
    if not targets:
        raise ConfigError("expected one or more runs or networks to look at")
    if weights is not None and len(targets) > 1:
        raise ConfigError("weights go with one network; name runs to look at several")
    subjects = [
        subject_of(target, checkpoint, weights, how or ModelOptions()) for target in targets
    ]
    # The first run says which images, whatever stands before it.
    first = next((subject for subject in subjects if subject.config is not None), subjects[0])
    images, network = first.load(data, split, data_options or {})
    images = images if limit is None else images.subset(slice(0, limit))
    engine = Engine.for_evaluation(device)
    networks: dict[str, nn.Module] = {}
    facts: dict[str, Any] = {}
    for subject in subjects:
        built = network if subject is first else subject.build(images)
        name = unique(subject.name, networks)
        networks[name] = engine.place(built).eval()
        facts[name] = describe(built) | subject.facts
    config = first.config
    return Looked(
        networks,
        facts,
        images,
        threat_of(config.threat if config else ThreatConfig(), epsilon, norm),
        engine,
        batch_size or (config.evaluation.batch_size if config else 256),
        seed,
        first.folder,
    )


def unique(name: str, taken: Container[str]) -> str:
    """``name``, numbered when it is taken."""
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def keep(
    study: str,
    body: Mapping[str, Any],
    *,
    folder: RunFolder | None = None,
    output: str | Path | None = None,
) -> Result:
    """Finish a study: its result, written with its pictures where it belongs.

    Args:
        study: its registered name.
        body: what it found, plain values only.
        folder: the run that keeps it, in ``studies/STUDY-N.json``.
        output: a JSON file in the place of that; pictures go beside it.

    Returns:
        ``format``, ``study``, the body, ``environment``, all of which is in the file; and ``file``,
        the path of it or None.
    """
    result = {"format": STUDY_FORMAT, "study": study, **body, "environment": environment()}
    path = Path(output) if output is not None else None
    if path is None and folder is not None:
        places = (folder.path / "studies" / f"{study}-{n}.json" for n in itertools.count(1))
        path = next(place for place in places if not place.exists())
        path.parent.mkdir(exist_ok=True)
    if path is not None:
        write_json(path, result)
        for drawn in STUDIES[study].pictures(result):
            name = f"{path.stem}{drawn.name.removeprefix(study)}.svg"
            write_text(path.with_name(name), drawn.svg + "\n")
    return result | {"file": None if path is None else str(path)}
