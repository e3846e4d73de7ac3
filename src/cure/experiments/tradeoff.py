"""Choose the trade-off after training: networks on the lines between trained weights.

Weights of one architecture that were trained from one start can be averaged: natural and robust
accuracy change gradually along the line between them, often better than between methods
(Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022).  Nothing is trained; each
point costs one validation, and one pass over the training images where BatchNorm's statistics are
computed anew.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cure.attacks import Threat
from cure.attacks.registry import check_attacks
from cure.config import RunConfig, checked, checked_words
from cure.data import ImageSet, batches, carve, load_split
from cure.data.cache import CachePlace
from cure.data.objects import as_images
from cure.data.sources import DECIDE_SPLITS
from cure.errors import CheckpointError, ConfigError, DataError, counted
from cure.evaluation.metrics import majority
from cure.evaluation.runner import chosen_attacks, measure
from cure.experiments.pareto import undominated
from cure.methods.wrappers.averaging import recompute_statistics
from cure.models import core, load_weights, save_weights
from cure.models.build import network_of
from cure.models.wrapper import tensors_of
from cure.runs.folder import RunFolder, paths_of
from cure.runs.records import (
    MeasuredAccuracies,
    Outcome,
    StrongAccuracies,
    TradeoffPoint,
    TradeoffRecord,
)
from cure.runs.run import Run
from cure.training.outcome import has_gained
from cure.training.validation import validate
from cure.utils.engine import Engine
from cure.utils.io import check_free, user_path, write_bytes, write_text
from cure.utils.plotting import Chart, Panel, Series
from cure.utils.stats import wilson

STEPS = 20
"""Steps of the PGD along the line."""

STRONG = ("apgd-ce", "apgd-t")
"""Attacks that measure the chosen point once more; the second needs four classes."""

BARRIER = 2.0
"""Points of natural accuracy below both ends from which on a barrier is reported."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class End:
    """One of the networks between which points lie.

    Attributes:
        name: for tables.
        state: tensors of the network by name, on the processor.
    """

    name: str
    state: dict[str, Tensor]


def tradeoff(
    runs: str | Path | Run | Sequence[str | Path | Run],
    *,
    natural_at_least: float | None = None,
    robust_at_least: float | None = None,
    points: int = 9,
    strong: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    model: nn.Module | None = None,
    data: object = None,
    device: str = "auto",
    say: Say = lambda line: None,  # noqa: ARG005
) -> TradeoffRecord:
    """Measure networks on the lines between weights, and keep the one that meets a requirement.

    The ends are the natural start of the first run and the best weights of every run.  Two ends
    give a line, three a triangle of points; more give the lines between all pairs.

    Args:
        runs: one or more robust runs of one architecture, data and threat.
        natural_at_least: natural accuracy in percent on the validation split; of the points that
            reach it, the most robust one is chosen.
        robust_at_least: the same for robust accuracy; the most accurate point is chosen.
        points: points on each line, with its ends.
        strong: attacks that measure the chosen point once more on the validation images: names from
            ``cure list attacks``; by default :data:`STRONG`, with fewer than four classes the first
            alone; none when empty.
        output: folder of the run to write the chosen network to; by default
            ``RUN-natural75`` or ``RUN-robust40`` beside the first run.
        model: the network, when the runs were given one as a Python object; a :class:`Run` may
            bring it.
        data: the training images as :func:`cure.train` took them, when it was given them in Python.
        device: "auto", "cpu", "cuda".
        say: receives a line of text for each point.

    Returns:
        The points, and which one was chosen and written.  Without a requirement nothing is written.

    Raises:
        CureError: when the runs do not fit together, or the requirement is no percentage.

    >>> import cure
    >>> small = ["training.epochs=1", "natural.epochs=1", "data.limit=300", "method=at"]
    >>> run = cure.train("digits", small, run="runs/robust", quiet=True)
    >>> len(cure.tradeoff(run, points=3).points)
    3
    """
    _check_requirements(natural_at_least, robust_at_least, points)
    given = list(runs) if isinstance(runs, Iterable) and not isinstance(runs, str) else [runs]
    folders = [RunFolder.open(path) for path in paths_of(given)]
    if not folders:
        raise ConfigError("expected one or more runs")
    if model is None:
        brought = (run.network for run in given if isinstance(run, Run))
        model = next((network for network in brought if network is not None), None)
    config = folders[0].config
    _check_runs(folders)
    wanted = natural_at_least is not None or robust_at_least is not None
    place = user_path(output) if output else _place(folders[0], natural_at_least, robust_at_least)
    kind = folders[0].kind
    if strong is None:
        strong = STRONG if len(kind.classes) >= 4 else STRONG[:1]
    strong = [name for name in checked_words("strong", strong) if name != "natural"]
    check_attacks(strong)
    if wanted:
        check_free(place)
    elif output is not None:
        raise ConfigError(
            f"output: nothing is written to {place} without a requirement; give natural_at_least "
            "or robust_at_least, too"
        )
    network = network_of(config, kind, model)
    ends = [_start(folders[0], config, network), *(_end(folder, network) for folder in folders)]
    engine = Engine.for_evaluation(device)
    validation = _images(folders[0], data, "validation").to(engine.device)
    training = _images(folders[0], data, "train")
    chosen_attacks(strong, validation, Threat.of(config.threat), None, network)
    recompute = _statistics_moved(network, ends)
    shares = combinations(len(ends), points)
    say(
        f"{len(shares)} points of {len(validation):,} validation images under PGD-{STEPS}"
        + (f", BatchNorm statistics from {len(training):,} training images" if recompute else "")
        + (f"; the chosen point once more under {', '.join(strong)}" if wanted and strong else "")
    )
    network = engine.place(network)

    def become(shares: Sequence[float]) -> None:
        """Give the network the weights of a point, and statistics that fit them."""
        _mix(network, ends, shares)
        if recompute:
            arranged = (engine.arrange(b.image.to(engine.device)) for b in batches(training, 128))
            recompute_statistics(network, arranged)

    found: list[TradeoffPoint] = []
    began = time.perf_counter()
    for number, share in enumerate(shares):
        become(share)
        point = _measured(network, share, validation, config, engine)
        found.append(point)
        say(_line(point, ends))
        if number == 0:
            left = math.ceil((time.perf_counter() - began) * (len(shares) - 1) / 60)
            say(f"about {counted(left, 'minute')} left")
    chosen = choose(found, natural_at_least, robust_at_least) if wanted else None
    met = chosen is not None and _meets(chosen, natural_at_least, robust_at_least)
    record = TradeoffRecord(
        ends=[end.name for end in ends],
        steps=STEPS,
        points=found,
        barriers=barriers(found),
        chosen=chosen,
        met=met if wanted else None,
        run=None,
    )
    if chosen is None or not met:
        return record
    become(chosen.shares)
    measured = _strong(network, validation, strong, config, engine) if strong else None
    record = record.model_copy(update={"run": str(place), "strong": measured})
    largest = majority(validation.label.cpu(), validation.classes)["accuracy"]
    _write(place, folders[0], network, record, largest)
    return record


def combinations(ends: int, points: int) -> list[tuple[float, ...]]:
    """Shares of the ends at each point.

    Two ends: a line.  Three: a triangular grid.  More: lines between all pairs.

    >>> combinations(2, 3)
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    >>> len(combinations(3, 3))
    6
    """
    last = points - 1
    if ends <= 3:
        whole = (c for c in itertools.product(range(last + 1), repeat=ends) if sum(c) == last)
        return [tuple(part / last for part in c) for c in sorted(whole, reverse=True)]
    found = dict.fromkeys(
        tuple(
            (last - step) / last if end == first else step / last if end == second else 0.0
            for end in range(ends)
        )
        for first, second in itertools.combinations(range(ends), 2)
        for step in range(last + 1)
    )
    return list(found)


def choose(
    points: Iterable[TradeoffPoint], natural: float | None, robust: float | None
) -> TradeoffPoint:
    """The best point that meets the requirement, else the one that comes nearest to it.

    Args:
        points: the candidates.
        natural: least natural accuracy in percent; the most robust of those that reach it wins.
        robust: least robust accuracy in percent; the most accurate of those that reach it wins.
    """

    def rank(point: TradeoffPoint) -> tuple[float, float]:
        lack = max(0.0, (natural or 0) - point.natural) + max(0.0, (robust or 0) - point.robust)
        return -lack, point.robust if natural is not None else point.natural

    return max(points, key=rank)


def barriers(points: Sequence[TradeoffPoint]) -> list[str]:
    """Sentences for points between two ends whose natural accuracy is below both."""
    ends = {p.shares.index(1.0): p for p in points if 1.0 in p.shares}
    found = []
    for point in points:
        inside = [end for end, share in enumerate(point.shares) if share]
        if len(inside) < 2 or not all(end in ends for end in inside):
            continue
        lowest = min(ends[end].natural for end in inside)
        if lowest - point.natural > BARRIER:
            found.append(
                f"barrier: natural accuracy is {point.natural:.1f} % at shares "
                f"{', '.join(f'{share:.2f}' for share in point.shares)}, below {lowest:.1f} % at "
                "the ends; these weights cannot be averaged there"
            )
    return found


def _check_requirements(natural: float | None, robust: float | None, points: int) -> None:
    for name, given in (("natural_at_least", natural), ("robust_at_least", robust)):
        value = checked(name, given, float | None)
        if value is not None and not 0 <= value <= 100:
            raise ConfigError(f"{name}: expected a percentage from 0 to 100, got {value:g}")
        if value is not None and 0 < value < 1:
            raise ConfigError(
                f"{name}: expected a percentage such as {100 * value:g}, got {value:g}"
            )
    if natural is not None and robust is not None:
        raise ConfigError(
            "natural_at_least and robust_at_least: give one of the two; the other accuracy is what "
            "is maximised"
        )
    if checked("points", points, int) < 2:
        raise ConfigError(f"points: expected 2 or more on a line, got {points}")


def _check_runs(folders: Sequence[RunFolder]) -> None:
    """Refuse runs whose accuracies or weights cannot be set beside each other."""
    for folder in folders:
        if folder.shares() is not None:
            _, *ends = TradeoffRecord.read(folder.path / "tradeoff.json").ends
            raise ConfigError(
                f"{folder.path} was made by cure tradeoff; lines go between trained runs: name "
                f"those that it was made of ({', '.join(ends)}) once more"
            )
    first = folders[0]
    for other in folders[1:]:
        ours, theirs = first.config, other.config
        for what, one, two in (
            ("network", ours.model, theirs.model),
            ("threat", ours.threat, theirs.threat),
            ("classes", first.kind.classes, other.kind.classes),
            ("image size", first.kind.size, other.kind.size),
            *(
                (f"data.{name}", getattr(ours.data, name), getattr(theirs.data, name))
                for name in ("source", *DECIDE_SPLITS)
            ),
        ):
            if one != two:
                raise ConfigError(
                    f"{first.path.name} and {other.path.name} differ in their {what} ({one} and "
                    f"{two}); lines go between runs of one network, threat and data"
                )


def _start(folder: RunFolder, config: RunConfig, network: nn.Module) -> End:
    """The weights that a run began with."""
    path = folder.start_weights()
    if path is None:
        raise CheckpointError(
            f"{folder.path}: the weights that the run began with (start={config.start}) are not "
            "kept; a line needs a natural start: train with start=natural or start=FILE"
        )
    return End("natural start", _loaded(network, path))


def _end(folder: RunFolder, network: nn.Module) -> End:
    return End(folder.path.name, _loaded(network, folder.weights("best")))


def _loaded(network: nn.Module, path: Path) -> dict[str, Tensor]:
    twin = copy.deepcopy(network)
    load_weights(twin, path)
    return {name: value.detach().clone() for name, value in tensors_of(twin).items()}


def _images(folder: RunFolder, data: object, split: Any) -> ImageSet:
    config = folder.config
    if data is None:
        images = load_split(config.data, split, place=CachePlace.beside(folder.path))
        if moved := folder.images_changed(images):
            raise DataError(f"{moved}; restore them, or train the run anew")
        return images
    images = as_images(data, "train", config.data).limited(config.data.limit)
    training, validation = carve(images, config.data.validation, config.data.split_seed)
    return training if split == "train" else validation


def _statistics_moved(network: nn.Module, ends: Sequence[End]) -> bool:
    """Whether BatchNorm's statistics differ between the ends, so that averages do not fit."""
    names = [
        f"{name}.{buffer}"
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
        for buffer in ("running_mean", "running_var")
    ]
    return any(
        not torch.equal(ends[0].state[name], end.state[name]) for name in names for end in ends[1:]
    )


@torch.no_grad()
def _mix(network: nn.Module, ends: Sequence[End], shares: Sequence[float]) -> None:
    """Load the weighted mean of the ends; whole numbers are those of the end with most weight."""
    most = max(range(len(ends)), key=lambda end: shares[end])
    for name, tensor in tensors_of(network).items():
        if not tensor.is_floating_point():
            tensor.copy_(ends[most].state[name])
            continue
        mixed = sum(
            share * end.state[name].double() for share, end in zip(shares, ends, strict=True)
        )
        assert isinstance(mixed, Tensor)
        tensor.copy_(mixed)


def _measured(
    network: nn.Module,
    shares: Sequence[float],
    validation: ImageSet,
    config: RunConfig,
    engine: Engine,
) -> TradeoffPoint:
    found = validate(network, validation, config, engine, STEPS)
    n = len(validation)
    intervals = {name: list(wilson(round(value * n / 100), n)) for name, value in found.items()}
    return TradeoffPoint(
        shares=list(shares),
        natural=found["natural"],
        robust=found["robust"],
        natural_interval=intervals["natural"],
        robust_interval=intervals["robust"],
        n=n,
    )


def _strong(
    network: nn.Module,
    validation: ImageSet,
    attacks: Sequence[str],
    config: RunConfig,
    engine: Engine,
) -> StrongAccuracies:
    """The chosen network under stronger attacks, which count image by image."""
    found = measure(
        network,
        validation,
        attacks,
        Threat.of(config.threat),
        engine=engine,
        batch_size=config.evaluation.batch_size,
    )
    worst = found["worst_case"]
    return StrongAccuracies(
        natural=found["natural"]["accuracy"],
        robust=worst["accuracy"],
        attacks=worst["over"],
        robust_interval=worst["interval"],
        n=len(validation),
    )


def chart(record: TradeoffRecord) -> Chart:
    """Natural against robust accuracy of all points, the chosen one marked."""
    good = undominated([(point.natural, point.robust) for point in record.points])

    def series(label: str, points: Sequence[TradeoffPoint], style: int, hollow: bool) -> Series:
        return Series(
            label,
            [point.natural for point in points],
            [point.robust for point in points],
            [point.robust_interval for point in points],
            [point.natural_interval for point in points],
            style=style,
            line=False,
            hollow=hollow,
        )

    pairs = list(zip(record.points, good, strict=True))
    groups: list[tuple[str, list[TradeoffPoint], int, bool]] = [
        ("front", [point for point, best in pairs if best], 0, False),
        ("dominated", [point for point, best in pairs if not best], 0, True),
        ("chosen", [record.chosen] if record.chosen is not None else [], 1, False),
    ]
    drawn = [series(*group) for group in groups if group[1]]
    if record.strong is not None:
        name = f"chosen, {', '.join(record.strong.attacks)}"
        x, y, limits = record.strong.natural, record.strong.robust, record.strong.robust_interval
        drawn.append(Series(name, [x], [y], [limits], style=2, line=False))
    panel = Panel(
        drawn,
        "natural accuracy, %",
        f"accuracy under PGD-{record.steps}, %",
        names=[
            (point.natural, point.robust, record.ends[point.shares.index(1.0)])
            for point in record.points
            if 1.0 in point.shares
        ],
    )
    n = f"{record.points[0].n:,} validation images"
    description = f"Networks between {', '.join(record.ends)}; Wilson 95 % intervals over {n}."
    return Chart("tradeoff", f"Networks between weights, {n}", description, [panel], height=4.2)


def _line(point: TradeoffPoint, ends: Sequence[End]) -> str:
    shares = ", ".join(
        f"{share:.2f} {end.name}" for share, end in zip(point.shares, ends, strict=True) if share
    )
    return f"natural {point.natural:5.1f} %  robust {point.robust:5.1f} %  ({shares})"


def _meets(point: TradeoffPoint, natural: float | None, robust: float | None) -> bool:
    return point.natural >= (natural or 0) and point.robust >= (robust or 0)


def _place(folder: RunFolder, natural: float | None, robust: float | None) -> Path:
    word = f"natural{natural:g}" if natural is not None else f"robust{robust or 0:g}"
    return folder.path.with_name(f"{folder.path.name}-{word}")


def _write(
    place: Path,
    first: RunFolder,
    network: nn.Module,
    record: TradeoffRecord,
    baseline: float,
) -> None:
    """The chosen network as a run that every command takes.

    ``baseline``: accuracy in percent of always naming the largest class of the validation images.
    """
    config, chosen = first.config, record.chosen
    assert chosen is not None
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in place.name)
    network = core(network.cpu())
    facts = {"run": name, "shares": " ".join(f"{share:.4f}" for share in chosen.shares)}

    def accuracies(point: TradeoffPoint) -> MeasuredAccuracies:
        return MeasuredAccuracies(
            natural=point.natural, robust=point.robust, n=point.n, steps=STEPS
        )

    start = accuracies(next(point for point in record.points if point.shares[0] == 1.0))
    end = accuracies(chosen)

    def fill(folder: RunFolder) -> None:
        for checkpoint in ("best", "last"):
            save_weights(network, folder.checkpoints / f"{checkpoint}.safetensors", facts)
        record.write(folder.path / "tradeoff.json")
        picture = chart(record)
        write_text(folder.path / "tradeoff.svg", picture.draw().svg)
        write_bytes(folder.path / "tradeoff.png", picture.png())
        gained = has_gained(start, end, baseline)
        folder.set_outcome(Outcome(start=start, end=end, gained=gained))

    named = config.model_copy(update={"name": name})
    RunFolder.create(place, named, first.kind, first.account, fill)
