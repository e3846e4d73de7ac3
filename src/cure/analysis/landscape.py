"""The study ``landscape``: the loss around a network's weights and around images.

Source: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018 (weights); an
adversarial and a random direction around images, and accuracy over epsilon, as signs of masked
gradients: Athalye, Carlini & Wagner, ICML 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure.analysis.study import STUDIES, Looked, Rows, Study, keep, look
from cure.attacks import Threat, attack_mode
from cure.attacks.registry import evaluation_attack
from cure.data import ImageSet, batches
from cure.errors import ConfigError
from cure.evaluation.options import Split
from cure.evaluation.runner import Curve, Progress, Result, measure, no_progress
from cure.evaluation.target import TargetLike
from cure.utils import plotting as drawing
from cure.utils.io import check_free
from cure.utils.plotting import Picture
from cure.utils.random import generator

NAME = "landscape"
ATTACK = "pgd20"
FAR_WEIGHTS, FAR_INPUT = 1.0, 2.0
"""Ends of the planes, in filter norms and in epsilon."""

LEVELS = 12

Batches = Sequence[tuple[Tensor, Tensor]]

# -- planes ----------------------------------------------------------------------------------------


@torch.no_grad()
def filter_normalised(model: nn.Module, draws: torch.Generator) -> dict[str, Tensor]:
    """A random direction in weight space in which each filter is as long as the network's own.

    ``d_f <- d_f |w_f| / |d_f|`` for normal ``d`` and each row ``w_f`` along the first dimension of
    a weight (a filter of a convolution, a unit of a linear layer).  Parameters of one dimension
    (biases, scale and shift of norms) are left out: they are not moved.

    Args:
        model: any network.
        draws: a generator on the processor.

    Returns:
        A tensor for each moved parameter, by its name.

    Source: Li et al., NeurIPS 2018, Sec. 4.
    """
    direction = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        drawn = torch.randn(weight.shape, generator=draws).to(weight)
        ours, theirs = (t.flatten(1).norm(dim=1) for t in (drawn, weight))
        scale = theirs / ours.clamp_min(torch.finfo(ours.dtype).tiny)
        direction[name] = drawn * scale.view(-1, *[1] * (weight.dim() - 1))
    return direction


@contextmanager
def movable(model: nn.Module) -> Iterator[Callable[[Sequence[Mapping[str, Tensor]], Any], None]]:
    """Lend the weights: a function (directions, lengths) sets ``w + sum_k length_k direction_k``.

    At the end they are what they were, to the bit, also on errors.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def move(directions: Sequence[Mapping[str, Tensor]], lengths: Sequence[float]) -> None:
        for name, parameter in parameters.items():
            moved = before[name].clone()
            for direction, length in zip(directions, lengths, strict=True):
                if name in direction:
                    moved += length * direction[name]
            parameter.copy_(moved)

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def directions_of_images(
    model: nn.Module, image: Tensor, label: Tensor, threat: Threat, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """For each image the direction in which the loss rises fastest and a random one.

    Both have length epsilon in the threat's norm: in Linf the sign of the gradient and random
    signs, in L2 the gradient and a normal vector, set to that length.

    Args:
        model: in evaluation mode.
        image: [B, C, H, W] in [0, 1].
        label: [B].
        threat: norm and radius.
        draws: a generator on the processor.

    Returns:
        Two tensors like ``image``.
    """
    with attack_mode(model), torch.enable_grad():
        point = image.detach().requires_grad_(True)
        loss = F.cross_entropy(model(point), label, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
    noise = torch.randn(image.shape, generator=draws).to(image)
    return threat.epsilon * threat.steepest(gradient), threat.epsilon * threat.steepest(noise)


@torch.no_grad()
def _measured(model: nn.Module, inputs: Batches) -> tuple[float, float]:
    """Mean cross-entropy, and accuracy in percent."""
    loss, right, count = 0.0, 0, 0
    for image, label in inputs:
        logits = model(image).double()
        loss += float(F.cross_entropy(logits, label, reduction="sum"))
        right += int((logits.argmax(dim=1) == label).sum())
        count += len(label)
    return loss / count, 100 * right / count


def _steps(points: int, far: float) -> list[float]:
    """Places along a direction, the middle one 0."""
    half = points // 2
    return [far * (place - half) / half for place in range(points)]


# -- the study -------------------------------------------------------------------------------------


def landscape(
    *targets: TargetLike,
    data: str | Path | ImageSet | None = None,
    split: Split = "test",
    limit: int | None = 200,
    points: int = 13,
    recompute: bool = False,
    epsilon: str | float | None = None,
    norm: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    weights: str | Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    progress: Progress = no_progress,
) -> Result:
    """The loss over a plane of weights and over a plane of images, and accuracy over epsilon.

    Weights: two random filter-normalised directions, from -1 to 1; BatchNorm stays in evaluation
    mode with its statistics as they are, so that away from the network they no longer fit and the
    loss is an upper bound of what recomputed ones would give.  Images: from -2 to 2 epsilon along
    the direction in which the loss rises fastest and along a random one, each image along its own;
    changed images are clipped to [0, 1].  Costs ``3 points^2`` forward passes an image and network,
    and PGD-20 at up to 15 radii.

    Args:
        targets: runs, names of networks, networks.
        data: images; by default those of the first run.
        split: which images.
        limit: only the first so many; all with None.
        points: of each direction: 5, 9, 13, ...
        recompute: make adversarial images (PGD-20) anew at each point of the plane of weights, at
            40 times the cost; else those made on the unmoved network are used everywhere, and the
            adversarial loss away from it is a lower bound.
        epsilon: radius; by default that of the first run.
        norm: as ``epsilon``.
        checkpoint: which weights of runs.
        weights: weights file of a single network.
        batch_size: images at once.
        device: "auto", "cpu", "cuda".
        seed: of directions and random starts.
        output: JSON file.
        progress: told (network and part, done, in all).

    Returns:
        ``networks``: by name ``weights`` {"steps", "natural", "adversarial"} and ``input``
        {"steps", "natural"}, each of which holds ``loss`` and ``accuracy`` [second][first
        direction] (null where it is not finite), and ``natural`` and ``curve`` as in
        :func:`cure.evaluate`.

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.
    """
    check_free(output)
    if points < 5 or points % 4 != 1:
        raise ConfigError(
            "--points: expected 5, 9, 13 or 4 more, and so on, so that the middle and one epsilon "
            f"are among them, got {points}"
        )
    looked = look(
        targets,
        data=data,
        split=split,
        limit=limit,
        epsilon=epsilon,
        norm=norm,
        checkpoint=checkpoint,
        weights=weights,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    # Refuses L1, too.
    evaluation_attack(ATTACK).defined(len(looked.images.classes), looked.threat)
    images = looked.images.checked().to(looked.engine.device)
    networks = {}
    for name, network in looked.networks.items():
        # First: it refuses networks that return no logits.
        measured = measure(
            network,
            images,
            [],
            looked.threat,
            engine=looked.engine,
            batch_size=looked.batch_size,
            seed=seed,
            progress=_named(name, progress),
            curve=Curve(ATTACK),
        )
        inputs = [
            (looked.engine.arrange(batch.image), batch.label)
            for batch in batches(images, looked.batch_size)
        ]
        networks[name] = {
            "natural": measured["natural"],
            "curve": measured["curve"],
            "weights": _over_weights(looked, network, inputs, points, recompute, name, progress),
            "input": _over_images(looked, network, inputs, points, name, progress),
        }
    body = {
        **looked.described(),
        "n": len(images),
        "attack": {"name": ATTACK} | evaluation_attack(ATTACK).settings,
        "recompute": recompute,
        "networks": networks,
    }
    return keep(NAME, body, folder=looked.folder, output=output)


def _named(network: str, progress: Progress) -> Progress:
    return lambda name, done, count: progress(f"{network} {name}", done, count)


def _attacked(looked: Looked, network: nn.Module, inputs: Batches) -> Batches:
    run = evaluation_attack(ATTACK).parts[ATTACK].run
    return [
        (
            looked.engine.arrange(run(network, image, label, looked.threat, looked.seed, number)),
            label,
        )
        for number, (image, label) in enumerate(inputs)
    ]


def _over_weights(
    looked: Looked,
    network: nn.Module,
    inputs: Batches,
    points: int,
    recompute: bool,
    name: str,
    progress: Progress,
) -> dict[str, Any]:
    plane = [
        filter_normalised(network, generator("cpu", looked.seed, NAME, number)) for number in (0, 1)
    ]
    steps, adversarial = _steps(points, FAR_WEIGHTS), _attacked(looked, network, inputs)
    found = {"natural": _empty(), "adversarial": _empty()}
    with movable(network) as move:
        for row, second in enumerate(steps):
            for of in found.values():
                of["loss"].append([])
                of["accuracy"].append([])
            for column, first in enumerate(steps):
                move(plane, (first, second))
                attacked = _attacked(looked, network, inputs) if recompute else adversarial
                for kind, shown in (("natural", inputs), ("adversarial", attacked)):
                    _note(found[kind], _measured(network, shown))
                progress(f"{name} weights", row * points + column + 1, points**2)
    return {"steps": steps} | found


def _over_images(
    looked: Looked, network: nn.Module, inputs: Batches, points: int, name: str, progress: Progress
) -> dict[str, Any]:
    draws = generator("cpu", looked.seed, NAME, "images")
    around = [
        (image, label, *directions_of_images(network, image, label, looked.threat, draws))
        for image, label in inputs
    ]
    steps, found = _steps(points, FAR_INPUT), _empty()
    for row, second in enumerate(steps):
        found["loss"].append([])
        found["accuracy"].append([])
        for column, first in enumerate(steps):
            moved = (
                ((image + first * steepest + second * random).clamp(0, 1), label)
                for image, label, steepest, random in around
            )
            _note(found, _measured(network, moved))  # type: ignore[arg-type]
            progress(f"{name} images", row * points + column + 1, points**2)
    return {"steps": steps, "natural": found}


def _empty() -> dict[str, list[list[float | None]]]:
    return {"loss": [], "accuracy": []}


def _note(found: dict[str, list[list[float | None]]], came: tuple[float, float]) -> None:
    loss, accuracy = came
    found["loss"][-1].append(float(f"{loss:.6g}") if math.isfinite(loss) else None)
    found["accuracy"][-1].append(accuracy)


# -- how it is told --------------------------------------------------------------------------------


def _at(of: Mapping[str, Any], kind: str, what: str, first: float, second: float) -> float | None:
    """A value of a plane at the point nearest to two lengths."""
    steps = of["steps"]
    row, column = (
        min(range(len(steps)), key=lambda place: abs(steps[place] - length))
        for length in (second, first)
    )
    value: float | None = of[kind][what][row][column]
    return value


def _rise(of: Mapping[str, Any], kind: str) -> float | None:
    """Mean rise of the loss over the points at most half a filter norm away, without the centre."""
    steps, centre = of["steps"], _at(of, kind, "loss", 0, 0)
    rises = [
        of[kind]["loss"][r][c]
        for r, second in enumerate(steps)
        for c, first in enumerate(steps)
        if 0 < math.hypot(first, second) <= 0.5 + 1e-9
    ]
    if centre is None or not rises or any(value is None for value in rises):
        return None
    return math.fsum(rises) / len(rises) - centre


def _number(value: float | None, sign: str = "") -> str:
    return "not finite" if value is None else f"{value:{sign}.2f}"


def _beyond_half(network: Mapping[str, Any]) -> str | None:
    """The first radius at which fewer than half of the naturally right images are right."""
    half = network["natural"]["accuracy"] / 2
    for point in network["curve"]["points"]:
        if point["accuracy"] < half:
            return str(point["epsilon_text"])
    return None


def _lost(network: Mapping[str, Any]) -> str:
    radius = _beyond_half(network)
    if radius is None:
        return "at least half of these images stay right at every epsilon tried"
    return f"fewer than half of these images stay right from epsilon {radius} on"


def findings(result: Result) -> list[str]:
    """What was found, in sentences."""
    said, threat = [], result["threat"]
    for name, of in result["networks"].items():
        centre = _at(of["input"], "natural", "loss", 0, 0)
        steep = _at(of["input"], "natural", "loss", 1, 0)
        random = _at(of["input"], "natural", "loss", 0, 1)
        natural = of["natural"]
        low, high = natural["interval"]
        said.append(
            f"{name}: one epsilon along the direction in which the loss rises fastest takes it "
            f"from {_number(centre)} to {_number(steep)}, one along a random direction to "
            f"{_number(random)}. Up to half a filter norm away in weights the natural loss differs "
            f"by {_number(_rise(of['weights'], 'natural'), '+')} on average, the adversarial one "
            f"by {_number(_rise(of['weights'], 'adversarial'), '+')}. Natural accuracy is "
            f"{natural['accuracy']:.1f} % ({low:.1f} to {high:.1f}); under PGD-20 {_lost(of)}."
        )
        if None not in (centre, steep, random) and steep <= random and random > centre:  # type: ignore[operator]
            said.append(
                f"{name}: a random direction raises the loss as much as the gradient's: a sign of "
                "masked gradients; see `cure diagnose`."
            )
        # Only in Linf: half of the range makes any image grey.
        for last in of["curve"]["points"][-1:] if threat["norm"] == "Linf" else ():
            if last["epsilon"] < 0.5 or not last["correct"]:
                continue
            said.append(
                f"{name}: {last['accuracy']:.1f} % are still right at epsilon "
                f"{last['epsilon_text']}, where any image can be made grey: attacks fail on this "
                "network; see `cure diagnose`."
            )
    made = (
        "made anew at every point"
        if result["recompute"]
        else "made on the unmoved network, so the adversarial loss away from it is a lower bound"
    )
    said.append(
        f"n = {result['n']:,} images, epsilon {threat['norm']} {threat['epsilon_text']}; two "
        f"random directions of weights (seed {result['seed']}), filter by filter as long as the "
        "weights; parameters of one dimension and BatchNorm's statistics stay. Adversarial "
        f"images: PGD-20, {made}. A flat picture in two directions of many does not prove a flat "
        "valley."
    )
    return said


def tables(result: Result) -> list[Rows]:
    """The numbers of the findings, and accuracy over epsilon."""
    rows = []
    for name, of in result["networks"].items():
        rows.append(
            [
                name,
                *(
                    _number(_at(of["input"], "natural", "loss", *place))
                    for place in ((0, 0), (1, 0), (0, 1))
                ),
                _number(_rise(of["weights"], "natural"), "+"),
                _number(_rise(of["weights"], "adversarial"), "+"),
                _beyond_half(of) or "-",
            ]
        )
    radii = list(
        dict.fromkeys(
            point["epsilon_text"]
            for of in result["networks"].values()
            for point in of["curve"]["points"]
        )
    )
    radii.sort(key=lambda text: _radius(result, text))
    curves = [
        [
            name,
            _accuracy(of["natural"]),
            *(
                next(
                    (_accuracy(p) for p in of["curve"]["points"] if p["epsilon_text"] == text),
                    "0.0",
                )
                for text in radii
            ),
        ]
        for name, of in result["networks"].items()
    ]
    return [
        Rows(
            f"Loss around images and weights, n = {result['n']:,}",
            [
                "model",
                "loss",
                "1 epsilon up",
                "1 epsilon at random",
                "weights: natural",
                "weights: adversarial",
                "half lost from",
            ],
            rows,
        ),
        Rows(
            f"Accuracy under PGD-20 over {result['threat']['norm']} epsilon, percent "
            "(Wilson 95 % interval)",
            ["model", "0", *radii],
            curves,
        ),
    ]


def _radius(result: Result, text: str) -> float:
    return next(
        float(point["epsilon"])
        for of in result["networks"].values()
        for point in of["curve"]["points"]
        if point["epsilon_text"] == text
    )


def _accuracy(of: Mapping[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['accuracy']:.1f} ({low:.1f}-{high:.1f})"


def pictures(result: Result) -> list[Picture]:
    """Accuracy over epsilon, and for each network its two planes; scales are common to all."""
    made = [_curves(result)]
    networks = result["networks"]
    in_weights = _scale([of["weights"][k] for of in networks.values() for k in _KINDS])
    in_images = _scale([of["input"]["natural"] for of in networks.values()])
    for number, (name, of) in enumerate(networks.items()):
        made.append(
            _planes(
                f"landscape-weights-{number + 1}",
                f"Loss around the weights of {name}",
                of["weights"],
                [(kind, "loss", f"{kind} loss") for kind in _KINDS],
                in_weights,
                ("first direction, filter norms", "second direction, filter norms"),
                "Along two random filter-normalised directions; the network is in the middle.",
            )
        )
        made.append(
            _planes(
                f"landscape-images-{number + 1}",
                f"Loss and accuracy around images, {name}",
                of["input"],
                [("natural", "loss", "loss"), ("natural", "accuracy", "accuracy, percent")],
                in_images,
                ("direction of the gradient, epsilon", "random direction, epsilon"),
                f"Epsilon is {result['threat']['norm']} {result['threat']['epsilon_text']}; the "
                "unchanged images are in the middle.",
            )
        )
    return made


_KINDS = ("natural", "adversarial")


def _scale(planes: Sequence[Mapping[str, Any]]) -> list[float]:
    """Levels of the loss in equal ratios, over all planes."""
    values = [v for plane in planes for row in plane["loss"] for v in row if v is not None]
    low = max(min(values, default=1.0), 1e-3)
    high = max(max(values, default=1.0), 1.01 * low)
    return [low * (high / low) ** (place / LEVELS) for place in range(LEVELS + 1)]


def _planes(
    name: str,
    title: str,
    of: Mapping[str, Any],
    shown: Sequence[tuple[str, str, str]],
    losses: list[float],
    labels: tuple[str, str],
    told: str,
) -> Picture:
    from matplotlib.colors import LogNorm, Normalize

    figure, panels = drawing.canvas(1, len(shown), width=7.6, height=3.9, sharey=True)
    for axes, (kind, what, heading) in zip(panels, shown, strict=True):
        levels = losses if what == "loss" else [10.0 * place for place in range(11)]
        norm = (LogNorm if what == "loss" else Normalize)(levels[0], levels[-1])
        # What is not finite, or beyond a scale that begins above 0, stays blank or at its end.
        values = [
            [math.nan if v is None else min(max(v, levels[0]), levels[-1]) for v in row]
            for row in of[kind][what]
        ]
        steps = of["steps"]
        axes.contourf(steps, steps, values, levels=levels, norm=norm, cmap="cividis")
        inner = levels[1:-1]
        light = [1.0 if norm(level) < 0.5 else 0.0 for level in inner]
        drawn = axes.contour(
            steps,
            steps,
            values,
            levels=inner,
            colors=["#ffffff" if one else "#111111" for one in light],
            linewidths=0.7,
            linestyles="solid",
        )
        axes.clabel(drawn, fontsize=7, fmt=lambda level: f"{level:.3g}")
        axes.plot([0], [0], marker="o", color="#ffffff", markeredgecolor="#111111")
        axes.set_title(heading)
        axes.set_aspect("equal")
        axes.set_xlabel(labels[0])
    panels[0].set_ylabel(labels[1])
    ends = "; ".join(
        f"{heading}: {_number(_at(of, kind, what, 0, 0))} in the middle, from "
        + " to ".join(_number(end) for end in _range([v for row in of[kind][what] for v in row]))
        for kind, what, heading in shown
    )
    return drawing.picture(figure, name, title, f"{told} {ends}. Lines carry their values.")


def _range(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (None, None)


def _curves(result: Result) -> Picture:
    norm = result["threat"]["norm"]
    unit = 255 if norm == "Linf" else 1
    curves, intervals = {}, {}
    for name, of in result["networks"].items():
        points = [{"epsilon": 0.0} | of["natural"], *of["curve"]["points"]]
        curves[name] = [(unit * point["epsilon"], point["accuracy"]) for point in points]
        intervals[name] = [tuple(point["interval"]) for point in points]
    told = "; ".join(
        f"{name}: natural {of['natural']['accuracy']:.1f} percent, {_lost(of)}"
        for name, of in result["networks"].items()
    )
    return drawing.lines(
        "landscape-curve",
        "Accuracy under PGD-20 over epsilon",
        curves,
        x=f"{norm} epsilon" + (", of 255 levels" if norm == "Linf" else ""),
        y="accuracy, percent",
        description=f"{told}. Bands: Wilson 95 % intervals, n = {result['n']:,}.",
        intervals=intervals,
    )


STUDIES.register(NAME)(
    Study(
        NAME,
        "Landscape of the loss",
        "Is the loss flat around the network's weights and around images, and how does accuracy "
        "fall as the adversary may change more?",
        "cure analyse landscape RUN RUN ...",
        findings,
        tables,
        pictures,
    )
)
