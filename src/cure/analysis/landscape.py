"""The study ``landscape``: the loss around a network's weights and around images.

Source: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018 (weights); an
adversarial and a random direction around images, and accuracy over epsilon, as signs of masked
gradients: Athalye, Carlini & Wagner, ICML 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure.analysis.render import (
    MISSING,
    StudyTable,
    View,
    accuracy,
    accuracy_series,
    listed,
    number,
)
from cure.analysis.study import STUDIES, NetworkStudyOptions, Study, StudyInputs, save_result
from cure.attacks import Threat, attack_mode
from cure.attacks.registry import evaluation_attack
from cure.attacks.threat import per_image
from cure.data import batches
from cure.errors import ConfigError
from cure.evaluation.runner import Curve, Progress, Result, measure
from cure.evaluation.target import TargetLike
from cure.models.checks import predicted
from cure.utils.plotting import Chart, HeatMap, HeatMaps, Panel
from cure.utils.random import generator

NAME = "landscape"
ATTACK = "pgd20"
FAR_WEIGHTS, FAR_INPUT = 1.0, 2.0
"""Ends of the planes, in filter norms and in epsilon."""

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
        direction[name] = drawn * per_image(scale, weight)
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
def _measured(model: nn.Module, examples: Batches) -> tuple[float, float]:
    """Mean cross-entropy, and accuracy in percent."""
    loss, right, count = 0.0, 0, 0
    for image, label in examples:
        logits = model(image).double()
        loss += float(F.cross_entropy(logits, label, reduction="sum"))
        right += int((predicted(logits) == label).sum())
        count += len(label)
    return loss / count, 100 * right / count


def _steps(points: int, far: float) -> list[float]:
    """Places along a direction, the middle one 0."""
    half = points // 2
    return [far * (place - half) / half for place in range(points)]


# -- the study -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LandscapeOptions(NetworkStudyOptions):
    """Options of the study.

    Attributes:
        points: of each direction: 5, 9, 13, ...
        recompute: make adversarial images anew at each point of the plane of weights, at 40 times
            the cost; else those made on the unmoved network are used everywhere, and the
            adversarial loss away from it is a lower bound.
    """

    points: Annotated[int, "Points of each direction: 5, 9, 13, ..."] = 13
    recompute: Annotated[bool, "Attack anew at each point of the weights (slow)."] = False
    limit: Annotated[int | None, "Only the first so many images."] = 200


def compute(targets: Sequence[TargetLike], options: LandscapeOptions, progress: Progress) -> Result:
    """The loss over a plane of weights and over a plane of images, and accuracy over epsilon.

    Weights: two random filter-normalised directions, from -1 to 1; BatchNorm stays in evaluation
    mode with its statistics as they are, so that away from the network they no longer fit and the
    loss is an upper bound of what recomputed ones would give.  Images: from -2 to 2 epsilon along
    the direction in which the loss rises fastest and along a random one, each image along its own;
    changed images are clipped to [0, 1].  Costs ``3 points^2`` forward passes for each image and
    network, and PGD-20 at up to 15 radii.

    Returns:
        ``networks``: by name ``weights`` {"steps", "natural", "adversarial"} and ``input``
        {"steps", "natural"}, each of which holds ``loss`` and ``accuracy`` [second][first
        direction] (null where it is not finite), and ``natural`` and ``curve`` as in
        :func:`cure.evaluate`.
    """
    points, recompute = options.points, options.recompute
    if points < 5 or points % 4 != 1:
        raise ConfigError(
            "--points: expected 5, 9, 13 or 4 more, and so on, so that the middle and one epsilon "
            f"are among them, got {points}"
        )
    inputs = StudyInputs.load(targets, options)
    # Refuses L1, too.
    evaluation_attack(ATTACK).defined(len(inputs.images.classes), inputs.threat)
    images = inputs.images.checked().to(inputs.engine.device)
    networks = {}
    for name, network in inputs.networks.items():
        # First: it refuses networks that return no logits.
        measured = measure(
            network,
            images,
            [],
            inputs.threat,
            engine=inputs.engine,
            batch_size=inputs.batch_size,
            seed=inputs.seed,
            progress=_named(name, progress),
            curve=Curve(ATTACK),
        )
        examples = [
            (inputs.engine.arrange(batch.image), batch.label)
            for batch in batches(images, inputs.batch_size)
        ]
        networks[name] = {
            "natural": measured["natural"],
            "curve": measured["curve"],
            "weights": _over_weights(inputs, network, examples, points, recompute, name, progress),
            "input": _over_images(inputs, network, examples, points, name, progress),
        }
    body = {
        **inputs.described(),
        "n": len(images),
        "attack": {"name": ATTACK} | evaluation_attack(ATTACK).settings,
        "recompute": recompute,
        "networks": networks,
    }
    return save_result(NAME, body, folder=inputs.folder, output=options.output)


def _named(network: str, progress: Progress) -> Progress:
    return lambda name, done, count: progress(f"{network} {name}", done, count)


def _attacked(inputs: StudyInputs, network: nn.Module, examples: Batches) -> Batches:
    run = evaluation_attack(ATTACK).parts[ATTACK].run
    return [
        (
            inputs.engine.arrange(run(network, image, label, inputs.threat, inputs.seed, number)),
            label,
        )
        for number, (image, label) in enumerate(examples)
    ]


def _over_weights(
    inputs: StudyInputs,
    network: nn.Module,
    examples: Batches,
    points: int,
    recompute: bool,
    name: str,
    progress: Progress,
) -> dict[str, Any]:
    plane = [
        filter_normalised(network, generator("cpu", inputs.seed, NAME, number)) for number in (0, 1)
    ]
    steps, adversarial = _steps(points, FAR_WEIGHTS), _attacked(inputs, network, examples)
    found = {"natural": _empty(), "adversarial": _empty()}
    with movable(network) as move:
        for row, second in enumerate(steps):
            for of in found.values():
                of["loss"].append([])
                of["accuracy"].append([])
            for column, first in enumerate(steps):
                move(plane, (first, second))
                attacked = _attacked(inputs, network, examples) if recompute else adversarial
                for kind, shown in (("natural", examples), ("adversarial", attacked)):
                    _note(found[kind], _measured(network, shown))
                progress(f"{name} weights", row * points + column + 1, points**2)
    return {"steps": steps} | found


def _over_images(
    inputs: StudyInputs,
    network: nn.Module,
    examples: Batches,
    points: int,
    name: str,
    progress: Progress,
) -> dict[str, Any]:
    draws = generator("cpu", inputs.seed, NAME, "images")
    around = [
        (image, label, *directions_of_images(network, image, label, inputs.threat, draws))
        for image, label in examples
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


# -- what is shown ---------------------------------------------------------------------------------

_KINDS = ("natural", "adversarial")


def view(result: Result) -> View:
    """Losses at a few points, accuracy over epsilon, and the two planes of each network."""
    threat, networks = result["threat"], result["networks"]
    rows = [
        [
            name,
            *(number(_at(of["input"], *place), 2) for place in ((0, 0), (1, 0), (0, 1))),
            *(number(_rise(of["weights"], kind), 2, sign=True) for kind in _KINDS),
            _half_lost(of) or MISSING,
        ]
        for name, of in networks.items()
    ]
    header = ["model", "loss", "at 1 epsilon, gradient", "at 1 epsilon, random"]
    header += ["rise in weights, natural", "rise in weights, adversarial", "half lost from epsilon"]
    radii = {
        point["epsilon_text"]: float(point["epsilon"])
        for of in networks.values()
        for point in of["curve"]["points"]
    }
    texts = sorted(radii, key=radii.__getitem__)
    curves = []
    for name, of in networks.items():
        known = {point["epsilon_text"]: accuracy(point) for point in of["curve"]["points"]}
        # A curve ends where no image is left.
        curves.append([name, accuracy(of["natural"]), *(known.get(text, "0.0") for text in texts)])
    tables = [
        StudyTable(f"Loss around images and weights, n = {result['n']:,}", header, rows),
        StudyTable(
            f"Accuracy under PGD-20 over {threat['norm']} epsilon, % (95 % interval)",
            ["model", "0", *texts],
            curves,
        ),
    ]
    finding = (
        f"Loss at the images and one epsilon ({threat['norm']} {threat['epsilon_text']}) away "
        "along the gradient and at random: "
        + listed(
            f"{row[0]} {row[1]}, {row[2]} and {row[3]}{_suspect(of, threat)}"
            for row, of in zip(rows, networks.values(), strict=True)
        )
        + f"; n = {result['n']:,} images."
    )
    return View(finding, tables, [_over_epsilon(result), *_planes(result)])


def _at(of: Mapping[str, Any], first: float, second: float, kind: str = "natural") -> float | None:
    """The loss of a plane at the point nearest to two lengths."""
    steps = of["steps"]
    row, column = (
        min(range(len(steps)), key=lambda place: abs(steps[place] - length))
        for length in (second, first)
    )
    value: float | None = of[kind]["loss"][row][column]
    return value


def _rise(of: Mapping[str, Any], kind: str) -> float | None:
    """Mean rise of the loss over the points at most half a filter norm away, without the centre."""
    steps, centre = of["steps"], _at(of, 0, 0, kind)
    rises = [
        of[kind]["loss"][r][c]
        for r, second in enumerate(steps)
        for c, first in enumerate(steps)
        if 0 < math.hypot(first, second) <= 0.5 + 1e-9
    ]
    if centre is None or not rises or any(value is None for value in rises):
        return None
    return math.fsum(rises) / len(rises) - centre


def _half_lost(of: Mapping[str, Any]) -> str | None:
    """The first radius at which fewer than half of the naturally correct images are correct."""
    half = of["natural"]["accuracy"] / 2
    radii = (p["epsilon_text"] for p in of["curve"]["points"] if p["accuracy"] < half)
    return next(radii, None)


def _suspect(of: Mapping[str, Any], threat: Mapping[str, Any]) -> str:
    """A sign of masked gradients, if there is one."""
    centre, steep, random = (_at(of["input"], *place) for place in ((0, 0), (1, 0), (0, 1)))
    flat = (
        centre is not None
        and steep is not None
        and random is not None
        and steep <= random
        and random > centre
    )
    last = of["curve"]["points"][-1:]
    # In Linf half of the range makes any image grey, on which no network can be right.
    stays = threat["norm"] == "Linf" and any(p["epsilon"] >= 0.5 and p["correct"] for p in last)
    return " (a sign of masked gradients: run `cure diagnose`)" if flat or stays else ""


def _over_epsilon(result: Result) -> Chart:
    norm, networks = result["threat"]["norm"], result["networks"]
    unit = 255 if norm == "Linf" else 1
    series = []
    for name, of in networks.items():
        parts = [{"epsilon": 0.0} | of["natural"], *of["curve"]["points"]]
        series.append(accuracy_series(name, [unit * part["epsilon"] for part in parts], parts))
    half = listed(
        f"{name} from epsilon {_half_lost(of) or MISSING}" for name, of in networks.items()
    )
    return Chart(
        "landscape-curve",
        "Accuracy under PGD-20 over epsilon",
        f"Half of the images are lost: {half}. Bands: 95 % intervals, n = {result['n']:,}.",
        [Panel(series, f"{norm} epsilon" + (" (1/255)" if unit == 255 else ""), "accuracy, %")],
    )


def _planes(result: Result) -> Iterator[HeatMaps]:
    """For each network its two planes; scales of the loss are common to all networks."""
    networks = result["networks"]
    in_weights = _scale([of["weights"][kind] for of in networks.values() for kind in _KINDS])
    made = (
        "Adversarial images are made anew at every point."
        if result["recompute"]
        else "Adversarial images are those of the unmoved network, so their loss is a lower bound."
    )
    in_images = _scale([of["input"]["natural"] for of in networks.values()])
    for serial, (name, of) in enumerate(networks.items(), 1):
        axes = ("first direction, filter norms", "second direction, filter norms")
        maps = [_plane(of["weights"], kind, "loss", in_weights, axes) for kind in _KINDS]
        yield HeatMaps(
            f"landscape-weights-{serial}",
            f"Loss around the weights of {name}",
            f"Along two random filter-normalised directions; the network is in the middle. {made}",
            maps,
        )
        axes = ("direction of the gradient, epsilon", "random direction, epsilon")
        yield HeatMaps(
            f"landscape-images-{serial}",
            f"Loss and accuracy around images, {name}",
            "The unchanged images are in the middle.",
            [
                _plane(of["input"], "natural", "loss", in_images, axes),
                _plane(of["input"], "natural", "accuracy", (0.0, 100.0), axes),
            ],
        )


def _plane(
    of: Mapping[str, Any], kind: str, what: str, ends: tuple[float, float], axes: tuple[str, str]
) -> HeatMap:
    steps = [f"{step:g}" for step in of["steps"]]
    # The second direction rises from the bottom to the top.
    values = of[kind][what][::-1]
    loss = what == "loss"
    title = f"{kind} loss" if loss else "accuracy, %"
    return HeatMap(values, steps[::-1], steps, *axes, title, *ends, loss)


def _scale(planes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Ends of a logarithmic scale of the loss, over all planes."""
    values = [v for plane in planes for row in plane["loss"] for v in row if v is not None]
    low = max(min(values, default=1.0), 1e-3)
    return low, max(max(values, default=1.0), 1.01 * low)


landscape: Study = STUDIES.register(NAME)(
    Study(
        NAME,
        "Landscape of the loss",
        "Is the loss flat around the weights of the network and around images, and how does "
        "accuracy fall as an attack may change more?",
        "cure analyse landscape RUN RUN ...",
        LandscapeOptions,
        compute,
        view,
    )
)
