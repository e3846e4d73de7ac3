"""What adversarial training kept of the natural network: images, predictions, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from cure.analysis.render import MISSING, StudyTable, View, listed, number, points
from cure.analysis.study import STUDIES, NetworkStudyOptions, Study, StudyInputs, save_result
from cure.config import NATURAL
from cure.data import batches
from cure.errors import ConfigError, counted
from cure.evaluation.metrics import accuracy_of
from cure.evaluation.runner import Progress, Result
from cure.evaluation.target import TargetLike
from cure.models import core, load_weights
from cure.models.build import network_of
from cure.models.checks import check_outputs, predicted
from cure.runs.folder import RunFolder
from cure.runs.run import Run
from cure.utils.io import user_path
from cure.utils.plotting import Chart, Figures, Panel, Series
from cure.utils.stats import holm, mcnemar, paired_difference

NAME = "prediction-flips"
LEVEL = 0.05
"""Probability of calling a class changed that is not, over all classes together."""

SHOWN = 20
"""Classes in a picture."""


def flips(natural: Tensor, robust: Tensor, label: Tensor, classes: Sequence[str]) -> Result:
    """Images lost and gained between two networks, in all and by class.

    Args:
        natural: predicted labels [N] of the natural network; -1 for no prediction.
        robust: predicted labels [N] of the other, of the same images.
        label: true labels [N].
        classes: name of each class.

    Returns:
        ``n``; ``both``, ``lost`` (right in the natural network only), ``gained`` (right in the
        other only) and ``neither``; ``difference`` of the accuracies in points with its interval
        (:func:`paired_difference`); ``p_value`` (:func:`mcnemar`); ``agreement``:
        share of images with the same prediction, right or wrong; and ``classes``, the same counts
        by class.
    """
    before, after = natural == label, robust == label
    agreement = accuracy_of((natural == robust) & (natural >= 0), 0.0)
    del agreement["seconds"]
    by_class = [
        {"name": name} | _counts(before[label == number], after[label == number])
        for number, name in enumerate(classes)
        if bool((label == number).any())
    ]
    return _counts(before, after) | {"agreement": agreement, "classes": by_class}


def _counts(before: Tensor, after: Tensor) -> Result:
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    difference, low, high = paired_difference(lost, gained, len(before))
    return {
        "n": len(before),
        "both": int((before & after).sum()),
        "lost": lost,
        "gained": gained,
        "neither": int((~before & ~after).sum()),
        "difference": difference,
        "interval": [low, high],
        "p_value": mcnemar(lost, gained),
    }


def moved(start: nn.Module, end: nn.Module, tolerance: float = 0.1) -> Result:
    """How far the weights of one network lie from those of another, tensor by tensor.

    For each parameter tensor ``distance = ||w - w0|| / ||w0||``, and ``share``: of its weights, in
    percent, those with ``|w - w0| > tolerance * rms(w0)``, where rms is the root of the mean
    square of the tensor.  The distance is None where w0 is 0 throughout.

    Args:
        start: network with the weights w0.
        end: network with the weights w.
        tolerance: of the share, relative to the size of the tensor's weights.

    Returns:
        ``tolerance``; ``distance`` over all tensors as one vector; ``tensors``: name, shape, size,
        distance, share, in the network's order.

    Raises:
        ValueError: when the two have other parameters, with what differs first.
    """
    ours = dict(core(start).named_parameters())
    theirs = dict(core(end).named_parameters())
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            raise ValueError(name)
    tensors, total, change = [], 0.0, 0.0
    for name, weight in ours.items():
        first = weight.detach().cpu().double()
        difference = theirs[name].detach().cpu().double() - first
        length, far = float(first.norm()), float(difference.norm())
        limit = tolerance * length / first.numel() ** 0.5
        tensors.append(
            {
                "name": name,
                "shape": list(first.shape),
                "size": first.numel(),
                "distance": far / length if length else None,
                "share": 100 * float((difference.abs() > limit).double().mean()),
            }
        )
        total, change = total + length**2, change + far**2
    return {
        "tolerance": tolerance,
        "distance": (change / total) ** 0.5 if total else None,
        "tensors": tensors,
    }


@dataclass(frozen=True, kw_only=True)
class PredictionFlipsOptions(NetworkStudyOptions):
    """Options of the study.

    Attributes:
        natural: the natural network, a run with its best weights; by default what each run started
            from: its own natural start, or the run that its setting ``start`` names.
        tolerance: see :func:`moved`.
    """

    natural: Annotated[
        TargetLike | None, "The natural network (default: what each run started from)."
    ] = None
    tolerance: Annotated[
        float, "A weight counts as moved beyond this share of its tensor's rms."
    ] = 0.1


def compute(
    targets: Sequence[TargetLike], options: PredictionFlipsOptions, progress: Progress
) -> Result:
    """Predictions and weights of robust networks against those of the natural network.

    Returns:
        ``accuracy`` of each network, and ``comparisons``: the names of both networks, the counts of
        :func:`flips`, and ``weights`` (:func:`moved`) or, in its place, ``no_weights``: why there
        are none.
    """
    natural, tolerance = options.natural, options.tolerance
    if not tolerance >= 0:
        raise ConfigError(f"tolerance: expected a number from 0, got {tolerance}")
    starts = [start_of(target) if natural is None else natural for target in targets]
    inputs = StudyInputs.load(targets, options)
    names = list(inputs.networks)
    # Networks can be equal without being the same: each start is loaded once.
    loaded: list[tuple[TargetLike, str]] = []
    pairs = []
    for name, start in zip(names, starts, strict=True):
        known = next((other for target, other in loaded if _same(target, start)), None)
        if known is None:
            given = None if natural is not None else _name_of(start, name, starts, names)
            known = inputs.add(start, given)
            loaded.append((start, known))
        pairs.append((known, name))
    named = {name: _predict(inputs, name, progress) for name in inputs.networks}
    label = inputs.images.label
    comparisons = []
    for first, second in pairs:
        body: Result = {"natural": first, "robust": second}
        body |= flips(named[first], named[second], label, inputs.images.classes)
        try:
            body["weights"] = moved(inputs.networks[first], inputs.networks[second], tolerance)
        except ValueError as error:
            body["no_weights"] = (
                f"the two networks differ in their parameters ('{error}' first), so how far "
                "weights moved cannot be said"
            )
        comparisons.append(body)
    accuracy = {name: accuracy_of(named[name] == label, 0.0) for name in named}
    for part in accuracy.values():
        del part["seconds"]
    described = inputs.described()
    del described["threat"], described["seed"]  # Nothing is attacked, nothing is drawn.
    result = {**described, "accuracy": accuracy, "comparisons": comparisons}
    return save_result(NAME, result, folder=inputs.folder, output=options.output)


def _same(one: TargetLike, other: TargetLike) -> bool:
    if isinstance(one, nn.Module) or isinstance(other, nn.Module):
        return one is other
    return one == other


def _name_of(
    start: TargetLike, run: str, starts: Sequence[TargetLike], names: Sequence[str]
) -> str | None:
    """What tells a start from others of its name, by the folder that it is in; else None.

    Args:
        start: as :func:`start_of` gives it.
        run: name of the network that began with it.
        starts: of all networks.
        names: of all networks.
    """
    if not isinstance(start, Path):
        return f"{run}/start"
    others = [s for s in starts if isinstance(s, Path) and s != start and s.name == start.name]
    return f"{start.parent.name}/{start.name}" if others or start.name in names else None


def start_of(target: TargetLike) -> Path | nn.Module:
    """The run that a run started from, or its network with the weights that it started with.

    Raises:
        ConfigError: when these are not kept, or it is no run.
    """
    path = target.path if isinstance(target, Run) else target
    if isinstance(path, str | Path) and (user_path(path) / "config.yaml").is_file():
        folder = RunFolder.open(path)
        # In a run with another start, a natural run inside is a teacher.
        inside = folder.path / (NATURAL if folder.config.starts_naturally else "head")
        for place in (inside, user_path(folder.config.start_path)):
            if place is None or not (place / "config.yaml").is_file():
                continue
            if RunFolder.open(place).kind.classes == folder.kind.classes:
                return place
        if (weights := folder.start_weights()) is not None:
            given = target.network if isinstance(target, Run) else None
            network = network_of(folder.config, folder.kind, given)
            load_weights(network, weights)
            return network
        what = f"{path} has no natural start of its own and its setting start names no run here"
    else:
        name = type(path).__name__ if isinstance(path, nn.Module) else path
        what = f"{name} is no run whose start could be found"
    raise ConfigError(f"{what}; name the natural network (--natural)")


@torch.no_grad()
def _predict(inputs: StudyInputs, name: str, progress: Progress) -> Tensor:
    """Predicted labels [N] on the processor; -1 for no prediction."""
    network, engine = inputs.networks[name], inputs.engine
    images, found, done = inputs.images.to(engine.device), [], 0
    for batch in batches(images, inputs.batch_size):
        image = engine.arrange(batch.image)
        if not done:
            check_outputs(network, image, len(images.classes))
        found.append(predicted(network(image)).cpu())
        done += len(image)
        progress(name, done, len(images))
    return torch.cat(found)


# What is shown of a result.


def view(result: Result) -> View:
    """Counts of each pair, in all and by class, and how far weights moved."""
    header = ["robust", "natural", "n", "both right", "lost", "gained", "neither"]
    header += ["difference, points", "same prediction, %", "weights moved, %"]
    rows, others, said = [], [], []
    for this in result["comparisons"]:
        distance = this.get("weights", {}).get("distance")
        pair = f"{this['robust']} against {this['natural']}"
        counts = [f"{this[key]:,}" for key in ("n", "both", "lost", "gained", "neither")]
        same = number(this["agreement"]["accuracy"])
        moved_by = MISSING if distance is None else number(100 * distance, 0)
        rows.append([this["robust"], this["natural"], *counts, points(this), same, moved_by])
        others.append(_by_class(this, pair))
        chance = "" if this["p_value"] < LEVEL else ", which chance can explain"
        clear = holm({each["name"]: each["p_value"] for each in this["classes"]}, LEVEL)
        said.append(
            f"{this['robust']} loses {counted(this['lost'], 'image')} that {this['natural']} "
            f"classifies correctly and gains {this['gained']:,} of {this['n']:,}, {points(this)} "
            f"points{chance}, with a clear change in {len(clear)} of {len(this['classes'])} classes"
        )
        if "weights" in this:
            others.append(_by_tensor(this["weights"], pair))
        else:
            said[-1] += f" ({this['no_weights']})"
    tables = [StudyTable("Images kept, lost and gained", header, rows), *others]
    figures: list[Figures] = [
        _classes(this, serial) for serial, this in enumerate(result["comparisons"], 1)
    ]
    return View(f"{listed(said)}.", tables, [*figures, *_weights(result)])


def _by_class(this: Result, pair: str) -> StudyTable:
    rows = [
        [
            row["name"],
            *(f"{row[key]:,}" for key in ("n", "lost", "gained")),
            points(row),
            f"{row['p_value']:.2g}",
        ]
        for row in this["classes"]
    ]
    head = ["class", "n", "lost", "gained", "difference, points", "p (McNemar)"]
    return StudyTable(f"By class, {pair}", head, rows)


def _by_tensor(weights: Result, pair: str) -> StudyTable:
    rows = [
        [
            row["name"],
            "x".join(map(str, row["shape"])),
            number(None if row["distance"] is None else 100 * row["distance"]),
            number(row["share"]),
        ]
        for row in weights["tensors"]
    ]
    beyond = f"beyond {weights['tolerance']:g} rms, % of weights"
    head = ["tensor", "shape", "distance, % of its norm", beyond]
    return StudyTable(f"Weights moved, {pair}", head, rows)


def _classes(this: Result, serial: int) -> Chart:
    rows = sorted(this["classes"], key=lambda row: row["difference"])
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: -abs(row["difference"]))[:SHOWN]
    series = [
        Series(key, range(len(rows)), [100 * row[key] / row["n"] for row in rows], line=False)
        for key in ("lost", "gained")
    ]
    panel = Panel(
        series,
        y="images of the class, %",
        categories=[row["name"] for row in rows],
        horizontal=True,
        limits=(0, None),
    )
    most = max(this["classes"], key=lambda row: abs(row["difference"]))
    return Chart(
        f"prediction-flips-classes-{serial}",
        f"Images that {this['robust']} lost and gained against {this['natural']}, by class",
        f"In all {this['lost']:,} images are lost and {this['gained']:,} gained of {this['n']:,}; "
        f"class {most['name']} changes most ({number(most['difference'], sign=True)} points).",
        [panel],
        height=max(3.0, 0.28 * len(rows) + 0.8),
    )


def _weights(result: Result) -> list[Chart]:
    """Distance of each weight matrix from the start, a curve for each network."""
    far = {
        this["robust"]: {
            row["name"]: row["distance"]
            for row in this["weights"]["tensors"]
            if len(row["shape"]) > 1
        }
        for this in result["comparisons"]
        if "weights" in this
    }
    order = list(dict.fromkeys(name for of in far.values() for name in of))
    if not order:
        return []
    series = [
        Series(
            name,
            range(len(order)),
            [None if of.get(tensor) is None else 100 * of[tensor] for tensor in order],
        )
        for name, of in far.items()
    ]
    panel = Panel(
        series,
        y="distance from the start,\n% of the tensor's norm",
        categories=[name.removesuffix(".weight") for name in order],
        limits=(0, None),
    )
    return [
        Chart(
            "prediction-flips-weights",
            "Distance of each weight tensor from the natural network",
            "Tensors of two or more dimensions, from the input to the output.",
            [panel],
            width=7.2,
            height=4.0,
        )
    ]


prediction_flips: Study = STUDIES.register(NAME)(
    Study(
        NAME,
        "Predictions lost and gained",
        "Which images does the robust network lose and gain against the natural one, and how far "
        "did its weights move?",
        "cure analyse prediction-flips RUN",
        PredictionFlipsOptions,
        compute,
        view,
        unused=("epsilon", "norm", "weights", "seed"),
    )
)
