"""What all studies share: their inputs, their results, and where results are kept."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from cure.analysis.render import View
from cure.attacks import Threat
from cure.config import MEMORY
from cure.data import ImageSet
from cure.data.opening import same_source
from cure.data.sources import differing_splits, seen_before
from cure.errors import ConfigError, CureNote
from cure.evaluation.options import TargetOptions, check_options
from cure.evaluation.runner import Progress, Result, no_progress
from cure.evaluation.target import Target, TargetLike
from cure.models import describe
from cure.registry import RENAMED_STUDIES
from cure.registry import STUDIES as STUDIES
from cure.runs.folder import RunFolder, paths_of
from cure.runs.results import StudyRecord
from cure.runs.run import Run
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import check_free, user_path, write_json, write_text
from cure.utils.modes import in_evaluation

STUDY_FORMAT = "cure-study-1"


@dataclass(frozen=True, kw_only=True)
class RunStudyOptions:
    """Options of a study of runs or networks.

    Attributes:
        output: JSON file for the result; by default one in the first run's ``studies/``.
    """

    output: Annotated[str | Path | None, "JSON file to write."] = None


@dataclass(frozen=True, kw_only=True)
class NetworkStudyOptions(RunStudyOptions, TargetOptions):
    """Options of a study of networks on images.

    Attributes:
        epsilon: radius of the threat; by default that of the first run.
        norm: of the threat; by default that of the first run.
    """

    epsilon: Annotated[str | float | None, "Radius, 8/255 (default: the run's)."] = None
    norm: Annotated[str | None, "Linf, L2 or L1 (default: the run's)."] = None


@dataclass(frozen=True)
class Study:
    """A study: a function with options, and how its result is shown. Calling it runs it.

    ``study(*targets, progress=..., **options)`` takes runs or networks; a study of a recipe takes
    ``study(recipe, settings, ...)``.

    Attributes:
        name: as in ``cure analyse NAME``.
        title: a heading.
        question: what it answers, understood without knowledge of the method.
        command: an example command.
        options: a dataclass whose fields are annotated with their help texts.
        compute: from targets, options and progress to a result; ends in :func:`save_result`.
        view: what is shown of a result.
        recipe: whether it trains a recipe rather than reads runs.
        unused: names of options that the study has no use for.
    """

    name: str
    title: str
    question: str
    command: str
    options: type[Any]
    compute: Callable[[Sequence[Any], Any, Progress], Result]
    view: Callable[[Result], View]
    recipe: bool = False
    unused: Sequence[str] = ()

    def accepted(self) -> list[str]:
        """Names of the options that the study takes."""
        return [each.name for each in fields(self.options) if each.name not in self.unused]

    def __call__(self, *targets: Any, progress: Progress = no_progress, **options: Any) -> Result:
        """Run the study.

        Args:
            targets: runs, networks or their names, one or several or a list of them; for a study of
                a recipe its name and its settings.
            progress: receives (what, done, in all).
            options: fields of the study's options.

        Returns:
            ``format``, ``study``, what :attr:`compute` found, ``environment``, and ``file``.

        Raises:
            TypeError: for an option that the study does not have.
            CureError: for every mistake a user can correct; nothing is written then.
        """
        for name in options:
            if name not in self.accepted():
                raise TypeError(
                    f"the study {self.name} has no option '{name}'; its options: "
                    + ", ".join(self.accepted())
                )
        flat = [
            each
            for target in targets
            for each in (target if isinstance(target, list | tuple) else [target])
        ]
        if "output" in options:
            options["output"] = user_path(options["output"])
        read = self.options(**options)
        check_options(read)
        if not self.recipe:
            check_free(read.output)
        return self.compute(flat, read, progress)


def find_study(name: str) -> Study:
    """The study with that name, or with that name in version 0.1.

    Raises:
        ConfigError: when there is none.
    """
    study: Study = STUDIES[RENAMED_STUDIES.get(name, name)]
    return study


@dataclass(frozen=True)
class StudyInputs:
    """Networks and images of a study.

    Attributes:
        networks: in evaluation mode on the engine's device, by unique name.
        facts: what is known of each network, by the same names.
        images: the images, in their order.
        threat: norm and radius of attacks.
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

    @classmethod
    def load(cls, targets: Sequence[TargetLike], options: NetworkStudyOptions) -> StudyInputs:
        """Load networks and images.

        Args:
            targets: runs, names of networks, networks; as for :func:`cure.evaluate`.
            options: ``data`` is by default that of the first run among the targets; ``weights`` go
                with a single target.

        Raises:
            CureError: for every mistake a user can correct.
        """
        given = {each.name: getattr(options, each.name) for each in fields(TargetOptions)}
        if not targets:
            raise ConfigError("expected one or more runs or networks")
        if options.weights is not None and len(targets) > 1:
            raise ConfigError("weights go with one network; name runs to study several")
        resolved = [Target.of(target, **given) for target in targets]
        first = next((target for target in resolved if target.config is not None), resolved[0])
        images, network = first.load()
        engine = Engine.for_evaluation(options.device)
        threat = first.threat(options.epsilon, options.norm)
        inputs = cls({}, {}, images, threat, engine, first.batch_size, options.seed, first.folder)
        for target in resolved:
            inputs._add(target, network if target is first else target.build(images))
            if target is not first and (known := _knows(target, first, images)):
                warnings.warn(known, CureNote, stacklevel=2)
        return inputs

    def add(self, target: TargetLike, name: str | None = None) -> str:
        """Load one more network, a run's with its best weights; returns its name.

        Args:
            target: as for :func:`cure.evaluate`.
            name: in the place of its own.
        """
        added = Target.of(target)
        return self._add(added, added.build(self.images), name)

    def _add(self, target: Target, network: nn.Module, name: str | None = None) -> str:
        name = unique(name or target.name, self.networks)
        self.networks[name] = in_evaluation(self.engine.place(network))
        self.facts[name] = describe(network) | target.facts
        return name

    def described(self) -> dict[str, Any]:
        """The inputs as a part of the result."""
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


def _knows(target: Target, first: Target, images: ImageSet) -> str | None:
    """A sentence on a run that was trained on some of the images, which are those of another run.

    Args:
        target: the run; other networks say nothing of their images.
        first: what names the images.
        images: these.
    """
    folder, owner = target.folder, first.folder
    if folder is None or owner is None or not first.measures_own:
        return None
    ours, theirs, split = owner.config.data, folder.config.data, images.split
    if split == "train" or not same_source(ours.source, theirs.source):
        return None
    if ours.source.startswith(MEMORY):
        return None  # One word for whatever images were given.
    of = f"of the {split} images of {owner.path}"
    if moved := folder.images_changed(images):
        return f"{moved}: it may know some {of}, and its accuracies on them are too high"
    if owner.images_changed(images):
        return None  # Told when they were read.
    tested, validated = seen_before(ours, theirs)
    count = tested if split == "test" else validated
    if not count:
        return None
    same = differing_splits(ours, theirs)
    what = "trained or validated" if split == "test" else "trained"
    return (
        f"{folder.path} was {what} on {count:,} {of}, so its accuracies on them are too high; "
        f"compare runs of one split ({same}), or give new images (--data)"
    )


def open_runs(targets: Sequence[str | Path | Run]) -> list[tuple[str, RunFolder]]:
    """The folders of runs, each with a unique name.

    Raises:
        CureError: when there is none, or one of them is no run.
    """
    if not targets:
        raise ConfigError("expected one or more runs")
    found: dict[str, RunFolder] = {}
    for path in paths_of(targets):
        folder = RunFolder.open(path)
        found[unique(folder.path.name, found)] = folder
    return list(found.items())


def unique(name: str, taken: Container[str]) -> str:
    """``name``, numbered when it is taken.

    >>> unique("run", ["run", "run-2"])
    'run-3'
    """
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def save_result(
    study: str,
    body: Mapping[str, Any],
    *,
    folder: RunFolder | None = None,
    output: str | Path | None = None,
) -> Result:
    """Complete the result of a study and write it with its figures.

    Args:
        study: its name.
        body: what it found, plain values only.
        folder: the run that keeps it, in ``studies/STUDY-N.json``.
        output: a JSON file instead of that; figures are written beside it as SVG.

    Returns:
        ``format``, ``study``, the body and ``environment``, as in the file; and ``file``, its path
        or None.
    """
    result = {"format": STUDY_FORMAT, "study": study, **body, "environment": environment()}
    path = user_path(output)
    if path is not None:
        write_json(path, result)
    elif folder is not None:
        path = folder.keep_numbered("studies", study, StudyRecord.parse(result, study))
    if path is not None:
        for drawn in find_study(study).view(result).pictures():
            name = f"{path.stem}{drawn.name.removeprefix(study)}.svg"
            write_text(path.with_name(name), drawn.svg)
    return result | {"file": None if path is None else str(path)}
