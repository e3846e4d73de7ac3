"""What all studies share: what they look at, what they return, and where it is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from cure.attacks import Threat
from cure.data import ImageSet
from cure.errors import ConfigError
from cure.evaluation.options import TargetKeywords, TargetOptions
from cure.evaluation.runner import Result
from cure.evaluation.target import Target, TargetLike
from cure.models import describe
from cure.registry import STUDIES as STUDIES
from cure.runs.folder import RunFolder
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import write_json, write_text
from cure.utils.plotting import Picture

STUDY_FORMAT = "cure-study-1"


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
    threat: Threat
    engine: Engine
    batch_size: int
    seed: int
    folder: RunFolder | None = field(repr=False)

    def add(self, target: TargetLike) -> str:
        """Load one more network for the same images, a run's with its best weights; its name."""
        added = Target.of(target)
        name = unique(added.name, self.networks)
        built = added.build(self.images)
        self.networks[name] = self.engine.place(built).eval()
        self.facts[name] = describe(built) | added.facts
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
                "epsilon_text": str(self.threat.epsilon),
            },
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


def look(
    targets: Sequence[TargetLike],
    *,
    epsilon: str | float | None = None,
    norm: str | None = None,
    **options: Unpack[TargetKeywords],
) -> Looked:
    """Load what a study looks at.

    Args:
        targets: runs, names of networks, networks; as for :func:`cure.evaluate`.
        epsilon: radius; by default that of the first run.
        norm: as ``epsilon``.
        options: see :class:`~cure.evaluation.options.TargetOptions`; ``data`` is by default that of
            the first run among the targets, and ``weights`` go with a single target.

    Raises:
        CureError: for every mistake a user can correct.
    """
    how = TargetOptions(**options)
    if not targets:
        raise ConfigError("expected one or more runs or networks to look at")
    if how.weights is not None and len(targets) > 1:
        raise ConfigError("weights go with one network; name runs to look at several")
    resolved = [Target.of(target, **options) for target in targets]
    # The first run says which images, whatever stands before it.
    first = next((target for target in resolved if target.config is not None), resolved[0])
    images, network = first.load()
    engine = Engine.for_evaluation(how.device)
    networks: dict[str, nn.Module] = {}
    facts: dict[str, Any] = {}
    for target in resolved:
        built = network if target is first else target.build(images)
        name = unique(target.name, networks)
        networks[name] = engine.place(built).eval()
        facts[name] = describe(built) | target.facts
    return Looked(
        networks,
        facts,
        images,
        first.threat(epsilon, norm),
        engine,
        first.batch_size,
        how.seed,
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
