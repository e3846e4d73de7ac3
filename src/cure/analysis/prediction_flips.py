"""What adversarial training kept of the natural network: images, predictions, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cure.analysis.study import STUDIES, Looked, Rows, Study, keep, look
from cure.data import ImageSet, batches
from cure.errors import ConfigError
from cure.evaluation.metrics import accuracy_of
from cure.evaluation.options import Split
from cure.evaluation.runner import Progress, Result, no_progress
from cure.evaluation.target import TargetLike
from cure.models import core
from cure.models.checks import check_outputs
from cure.runs.folder import RunFolder
from cure.runs.run import Run
from cure.utils import plotting as drawing
from cure.utils.io import check_free
from cure.utils.plotting import Picture
from cure.utils.stats import holm, mcnemar, paired_difference, wilson

LEVEL = 0.05
"""Probability of calling a class changed that is not, over all classes together."""

SHOWN = 20
"""Classes in a picture."""


def kept(natural: Tensor, robust: Tensor, label: Tensor, classes: Sequence[str]) -> Result:
    """Images lost and gained between two networks, in all and by class.

    Args:
        natural: predicted labels [N] of the natural network.
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
    agreement = accuracy_of(natural == robust, 0.0)
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


def conserved(
    robust: TargetLike | Sequence[TargetLike],
    natural: TargetLike | None = None,
    *,
    data: str | Path | ImageSet | None = None,
    data_options: Mapping[str, Any] | None = None,
    split: Split = "test",
    limit: int | None = None,
    checkpoint: Literal["best", "last"] = "best",
    tolerance: float = 0.1,
    batch_size: int | None = None,
    device: str = "auto",
    output: str | Path | None = None,
    progress: Progress = no_progress,
) -> Result:
    """What one or several trainings kept of the natural network they are compared with.

    Args:
        robust: runs, or networks, one or several.
        natural: the natural network, a run with its best weights; by default what each run started
            from: its own natural start, or the run that its setting ``start`` names.
        data: images; by default those of the first run.
        data_options: settings of the data section.
        split: which images.
        limit: only the first so many; all with None.
        checkpoint: which weights of the robust runs.
        tolerance: see :func:`moved`.
        batch_size: images at once.
        device: "auto", "cpu", "cuda".
        output: a JSON file in the place of the run's ``studies/``.
        progress: told (network, images done, images in all).

    Returns:
        ``accuracy`` of each network, and ``comparisons``: the names of both networks, what
        :func:`kept` says of their predictions, and ``weights`` (:func:`moved`) or, in its place,
        ``no_weights``: why there are none.

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.
    """
    check_free(output)
    if not tolerance >= 0:
        raise ConfigError(f"tolerance: expected a number from 0, got {tolerance}")
    several = isinstance(robust, Sequence) and not isinstance(robust, str)
    targets: list[TargetLike] = list(robust) if several else [robust]  # type: ignore[arg-type,list-item]
    starts = [start_of(target) if natural is None else natural for target in targets]
    looked = look(
        targets,
        data=data,
        data_options=data_options,
        split=split,
        limit=limit,
        checkpoint=checkpoint,
        batch_size=batch_size,
        device=device,
    )
    names = list(looked.networks)
    # Networks can be equal without being the same: each start is loaded once.
    added: list[tuple[TargetLike, str]] = []
    pairs = []
    for name, start in zip(names, starts, strict=True):
        known = next((other for target, other in added if _same(target, start)), None)
        if known is None:
            known = looked.add(start)
            added.append((start, known))
        pairs.append((known, name))
    predicted = {name: _predict(looked, name, progress) for name in looked.networks}
    label = looked.images.label
    comparisons = []
    for first, second in pairs:
        body: Result = {"natural": first, "robust": second}
        body |= kept(predicted[first], predicted[second], label, looked.images.classes)
        try:
            body["weights"] = moved(looked.networks[first], looked.networks[second], tolerance)
        except ValueError as error:
            body["no_weights"] = (
                f"the two networks differ in their parameters ('{error}' first), so how far "
                "weights moved cannot be said"
            )
        comparisons.append(body)
    accuracy = {name: accuracy_of(predicted[name] == label, 0.0) for name in predicted}
    for part in accuracy.values():
        del part["seconds"]
    described = looked.described()
    del described["threat"], described["seed"]  # Nothing is attacked, nothing is drawn.
    result = {**described, "accuracy": accuracy, "comparisons": comparisons}
    return keep("conserved", result, folder=looked.folder, output=output)


def _same(one: TargetLike, other: TargetLike) -> bool:
    if isinstance(one, nn.Module) or isinstance(other, nn.Module):
        return one is other
    return one == other


def start_of(target: TargetLike) -> Path:
    """The run that a run started from.

    Raises:
        ConfigError: when it started from none, or is no run.
    """
    path = target.path if isinstance(target, Run) else target
    if isinstance(path, str | Path) and (Path(path) / "config.yaml").is_file():
        folder = RunFolder.open(path)
        for place in (folder.path / "natural", Path(folder.config.start)):
            if (place / "config.yaml").is_file():
                return place
        what = f"{path} has no natural start of its own and its setting start names no run here"
    else:
        name = type(path).__name__ if isinstance(path, nn.Module) else path
        what = f"{name} is no run whose start could be found"
    raise ConfigError(f"{what}; name the natural network (--natural)")


@torch.no_grad()
def _predict(looked: Looked, name: str, progress: Progress) -> Tensor:
    """Predicted labels [N] on the processor."""
    network, engine = looked.networks[name], looked.engine
    images, predicted, done = looked.images.to(engine.device), [], 0
    for batch in batches(images, looked.batch_size):
        image = engine.arrange(batch.image)
        if not done:
            check_outputs(network, image, len(images.classes))
        predicted.append(network(image).argmax(dim=1).cpu())
        done += len(image)
        progress(name, done, len(images))
    return torch.cat(predicted)


# What is told of a result.


def _percent(part: int, whole: int) -> str:
    low, high = wilson(part, whole)
    return f"{100 * part / whole:.1f} %, {low:.1f} to {high:.1f}"


def _probability(value: float) -> str:
    return "p below 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def _findings(result: Result) -> list[str]:
    data, told = result["data"], []
    for this in result["comparisons"]:
        natural, robust = this["natural"], this["robust"]
        before, after = this["both"] + this["lost"], this["both"] + this["gained"]
        low, high = this["interval"]
        change = this["difference"]
        sure = this["p_value"] < LEVEL
        verdict = (
            f"{abs(change):.1f} points {'less' if change < 0 else 'more'}"
            if sure
            else f"a difference of {change:+.1f} points that chance alone explains"
        )
        told.append(
            f"Of {this['n']:,} {data['split']} images {natural} has {before:,} right and {robust} "
            f"{after:,}: {verdict} (95 % interval {low:+.1f} to {high:+.1f}; McNemar's exact test, "
            f"{_probability(this['p_value'])})."
        )
        parts = []
        if before:
            parts.append(
                f"loses {this['lost']:,} of the {before:,} images that {natural} had right "
                f"({_percent(this['lost'], before)})"
            )
        if wrong := this["n"] - before:
            parts.append(
                f"gains {this['gained']:,} of the {wrong:,} it had wrong "
                f"({_percent(this['gained'], wrong)})"
            )
        low, high = this["agreement"]["interval"]
        told.append(
            f"{robust} {' and '.join(parts)}; the two say the same of "
            f"{this['agreement']['accuracy']:.1f} % of the images ({low:.1f} to {high:.1f})."
        )
        told.append(_of_classes(this))
        told.append(_of_weights(this))
    return told


def _of_classes(this: Result) -> str:
    by_name = {row["name"]: row for row in this["classes"]}
    sure = holm({name: row["p_value"] for name, row in by_name.items()})
    worse = [name for name in sure if by_name[name]["difference"] < 0]
    better = [name for name in sure if by_name[name]["difference"] > 0]
    if not sure:
        return (
            f"In no single class do {this['robust']} and {this['natural']} differ by more than "
            f"chance explains ({len(by_name)} classes tested together, Holm, 5 %)."
        )

    def named(names: list[str]) -> str:
        names = sorted(names, key=lambda name: -abs(by_name[name]["difference"]))
        shown = [f"{name} ({by_name[name]['difference']:+.1f} points)" for name in names[:5]]
        return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    parts = [f"less accurate in {named(worse)}"] if worse else []
    parts += [f"more accurate in {named(better)}"] if better else []
    rest = len(by_name) - len(sure)
    others = (
        f"in the other {rest} of {len(by_name)} classes chance alone explains the difference"
        if rest
        else f"these are all {len(by_name)} classes"
    )
    return (
        f"By class {this['robust']} is {' and '.join(parts)}; {others} (tested together, Holm, "
        "5 %)."
    )


def _of_weights(this: Result) -> str:
    if "weights" not in this:
        return f"{this['robust']}: {this['no_weights']}."
    weights = this["weights"]
    if not weights["distance"]:
        return f"{this['robust']} has the weights of {this['natural']}: nothing moved."
    ranked = [row for row in weights["tensors"] if len(row["shape"]) > 1 and row["distance"]]
    if not ranked:
        return f"Of {this['robust']} only scales and biases moved."
    most = max(ranked, key=lambda row: row["distance"])
    least = min(ranked, key=lambda row: row["distance"])
    return (
        f"The weights of {this['robust']} lie {100 * weights['distance']:.0f} % of their own "
        f"length from those of {this['natural']}; among weight matrices {most['name']} moved most "
        f"({100 * most['distance']:.0f} %) and {least['name']} least "
        f"({100 * least['distance']:.0f} %)."
    )


def _tables(result: Result) -> list[Rows]:
    header = ["robust", "natural", "n", "both right", "lost", "gained", "neither"]
    header += ["difference, points", "same prediction, %", "weights moved, %"]
    cells = []
    for this in result["comparisons"]:
        low, high = this["interval"]
        distance = this.get("weights", {}).get("distance")
        cells.append(
            [
                *(this["robust"], this["natural"]),
                *(f"{this[key]:,}" for key in ("n", "both", "lost", "gained", "neither")),
                f"{this['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
                f"{this['agreement']['accuracy']:.1f}",
                "-" if distance is None else f"{100 * distance:.0f}",
            ]
        )
    tables = [Rows("Images kept, lost and gained", header, cells)]
    for this in result["comparisons"]:
        pair = f"{this['robust']} against {this['natural']}"
        rows = [
            [
                row["name"],
                *(f"{row[key]:,}" for key in ("n", "lost", "gained")),
                f"{row['difference']:+.1f}",
                "{:+.1f} to {:+.1f}".format(*row["interval"]),
                f"{row['p_value']:.2g}",
            ]
            for row in this["classes"]
        ]
        head = ["class", "n", "lost", "gained", "difference, points", "95 % interval", "p"]
        tables.append(Rows(f"By class, {pair}", head, rows))
        if "weights" in this:
            rows = [
                [
                    row["name"],
                    "x".join(map(str, row["shape"])),
                    "-" if row["distance"] is None else f"{100 * row['distance']:.1f}",
                    f"{row['share']:.1f}",
                ]
                for row in this["weights"]["tensors"]
            ]
            beyond = f"beyond {this['weights']['tolerance']:g} rms, % of weights"
            head = ["tensor", "shape", "distance, % of its length", beyond]
            tables.append(Rows(f"Weights moved, {pair}", head, rows))
    return tables


def _pictures(result: Result) -> list[Picture]:
    pictures = [
        _classes_picture(this, f"conserved-classes-{number}")
        for number, this in enumerate(result["comparisons"], 1)
    ]
    weighed = {
        this["robust"]: this
        for this in result["comparisons"]
        if any(len(row["shape"]) > 1 for row in this.get("weights", {}).get("tensors", ()))
    }
    return [*pictures, _weights_picture(weighed)] if weighed else pictures


def _classes_picture(this: Result, name: str) -> Picture:
    rows = this["classes"]
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: -abs(row["difference"]))[:SHOWN]
    figure, (axes,) = drawing.canvas(width=6.4, height=max(3.2, 0.3 * len(rows) + 1.1))
    places = range(len(rows))
    for key, sign, hatch, number in (("lost", -1, "//", 1), ("gained", 1, "\\\\", 0)):
        lengths = [100 * sign * row[key] / row["n"] for row in rows]
        axes.barh(
            places,
            lengths,
            color=drawing.COLOURS[number],
            alpha=0.75,
            hatch=hatch,
            edgecolor=drawing.INK,
            linewidth=0.6,
            label=f"{key} ({this[key]:,} images)",
        )
        for place, row, length in zip(places, rows, lengths, strict=True):
            side = "right" if sign < 0 else "left"
            axes.annotate(
                str(row[key]),
                (length, place),
                xytext=(3 * sign, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                color=drawing.INK,
                fontsize=8,
            )
    axes.axvline(0, color=drawing.INK, linewidth=0.8)
    axes.set_yticks(list(places), [drawing.plain(row["name"]) for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_xlabel("images of the class, percent (numbers: images)")
    drawing.legend(axes, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2)
    worst = min(this["classes"], key=lambda row: row["difference"])
    shown = "" if len(this["classes"]) <= SHOWN else f"; the {SHOWN} classes that differ most"
    return drawing.picture(
        figure,
        name,
        f"Images that {this['robust']} lost and gained against {this['natural']}, by class{shown}",
        f"Two bars a class: images that only {this['natural']} has right, to the left, and images "
        f"that only {this['robust']} has right, to the right. In all {this['lost']:,} are lost and "
        f"{this['gained']:,} gained of {this['n']:,}. The class with the largest net loss is "
        f"{worst['name']} ({worst['difference']:+.1f} points).",
    )


def _weights_picture(weighed: Mapping[str, Result]) -> Picture:
    """Distance of each weight matrix, a curve a run."""
    figure, (axes,) = drawing.canvas(width=7.2, height=4.2)
    order: list[str] = []
    for this in weighed.values():
        order += [
            row["name"]
            for row in this["weights"]["tensors"]
            if len(row["shape"]) > 1 and row["name"] not in order
        ]
    for number, (name, this) in enumerate(weighed.items()):
        far = {row["name"]: row["distance"] for row in this["weights"]["tensors"]}
        points = [
            (place, 100 * far[tensor])
            for place, tensor in enumerate(order)
            if far.get(tensor) is not None
        ]
        across, up = zip(*points, strict=True) if points else ((), ())
        axes.plot(across, up, label=drawing.plain(name), **drawing.series(number))
    every = -(-len(order) // 40)
    labels = [drawing.plain(name.removesuffix(".weight")) for name in order]
    axes.set_xticks(range(0, len(order), every), labels[::every], rotation=90, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("distance from the start,\n% of the tensor's length")
    axes.grid(axis="y", alpha=0.25)
    if len(weighed) > 1:
        drawing.legend(axes)
    totals = ", ".join(
        f"{name} {100 * (this['weights']['distance'] or 0):.0f} %" for name, this in weighed.items()
    )
    return drawing.picture(
        figure,
        "conserved-weights",
        "How far each weight tensor lies from the natural network, in the order of layers",
        "A point a tensor of two or more dimensions, from the input to the output: the length of "
        f"its change as a share of its own length. Over all weights: {totals}.",
    )


STUDIES.register("conserved")(
    Study(
        "conserved",
        "What was kept of the natural network",
        "Which images does the robust network lose and gain against the natural one, and how far "
        "did its weights move?",
        "cure analyse conserved RUN",
        _findings,
        _tables,
        _pictures,
    )
)
