"""The study ``minimal-perturbation``: the smallest change that makes a network misclassify.

Source: CURE, ICLR 2024, Fig. 8; FAB: Croce & Hein, Minimally distorted adversarial examples with a
fast adaptive boundary attack, ICML 2020.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from cure.analysis.render import StudyTable, View, listed, number, with_interval
from cure.analysis.study import STUDIES, NetworkStudyOptions, Study, StudyInputs, save_result
from cure.attacks import PGD, PerSample, Threat, attack_mode
from cure.attacks.early_exit import PlainLayout, early_exit
from cure.attacks.losses import MARGIN
from cure.attacks.threat import per_image
from cure.data import ImageSet, batches
from cure.errors import ConfigError
from cure.evaluation.runner import Progress, Result
from cure.evaluation.target import TargetLike
from cure.models.checks import check_outputs, predicted
from cure.utils.plotting import Chart, Figures, ImageGrid, Panel, Series
from cure.utils.random import generator
from cure.utils.stats import median_interval, wilson

NAME = "minimal-perturbation"
_DRAWS = "perturbation"
"""Key of the random starts, as in version 0.1: the same seed draws the same numbers."""

MOST_SHOWN = 8
"""Images in the grid at most."""

BUDGET = 600_000
"""Bytes of all pictures in the grid, about; larger images are made smaller for it."""

POINTS = 25

# On a network trained by AT (CIFAR-10, 24 images) the changes found so are 2 % longer than those of
# FAB with ten times as many iterations, which takes six times as long; aiming at three classes
# with thirty iterations each makes them 4 % longer.
TARGETS, ITERATIONS, ROUNDS, STEPS = 9, 10, 4, 20

# -- the least change ------------------------------------------------------------------------------


def least_change(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    norm: Literal["Linf", "L2"],
    *,
    classes: int,
    seed: int = 0,
    number: int = 0,
    targets: int = TARGETS,
    iterations: int = ITERATIONS,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    progress: Callable[[float], None] = lambda share: None,  # noqa: ARG005
) -> tuple[Tensor, Tensor]:
    """Images as near as they were found that ``model`` misclassifies: an upper bound of the least.

    The nearer of two, image by image: FAB towards the likeliest wrong classes; and PGD on the C&W
    margin whose radius is bisected below what is known to fool.  Then the straight line from the
    image to what was found is bisected.  Everything is verified by the network itself.

    Args:
        model: in evaluation mode, images in [0, 1] to logits; comes back as it was.
        image: [B, C, H, W] in [0, 1].
        label: [B].
        norm: "Linf" or "L2", in which the change is measured.
        classes: number of logits.
        seed: of PGD's random starts.
        number: of the batch, a part of the seed.
        targets: classes that FAB aims at, the likeliest wrong ones first.
        iterations: of FAB for each of them.
        rounds: of the bisection of PGD's radius.
        steps: of PGD in each round, of a quarter of the radius.
        progress: told the share of the work that is done.

    Returns:
        [B, C, H, W], the image itself where nothing was found; and its distance [B] of float64: 0
        where the image is misclassified as it is, infinite where nothing was found.
    """
    threat, image = Threat(norm, 0.0), image.contiguous()
    found = image.clone()
    distance = torch.full((len(image),), math.inf, dtype=torch.float64, device=image.device)

    @torch.no_grad()
    def fools(candidate: Tensor, rows: Tensor) -> Tensor:
        return predicted(model(candidate)) != label[rows]

    def take(candidate: Tensor, rows: Tensor) -> Tensor:
        """Keep what fools and is nearer; which fooled."""
        fooled = fools(candidate, rows)
        length = threat.distance(candidate - image[rows]).double()
        better = fooled & (length < distance[rows])
        found[rows[better]], distance[rows[better]] = candidate[better], length[better]
        return fooled

    every = torch.arange(len(image), device=image.device)
    take(image, every)
    rows = (distance > 0).nonzero().flatten()
    if not len(rows):
        return found, distance
    targets = min(targets, classes - 1)
    work = targets * iterations * 2 + rounds * steps * 2
    done = 0
    for target in range(targets):
        take(_fab(model, image[rows], label[rows], norm, target, iterations, seed), rows)
        done += iterations * 2
        progress(done / work)
    draws = generator(image.device, seed, _DRAWS, number)
    attack = PGD(Threat(norm, 1.0), steps, 0.25, start="uniform")
    # Where FAB found nothing, the first radius is the whole cube's.
    whole = 1.0 if norm == "Linf" else math.sqrt(image[0].numel())
    low = torch.zeros(len(rows), dtype=torch.float64, device=image.device)
    for _ in range(rounds):
        high = distance[rows].clamp_max(2 * whole)
        radius = (low + high) / 2
        size = radius.to(image.dtype)
        own = PerSample(size, size / 4)
        made = attack(model, image[rows], label[rows], MARGIN, draws, hooks=own)
        fooled = take(made, rows)
        low = torch.where(fooled, low, radius)
        done += steps * 2
        progress(done / work)
    rows = distance.isfinite().logical_and(distance > 0).nonzero().flatten()
    if len(rows):
        _along_the_line(image, found, rows, take)
    return found, distance


def _along_the_line(
    image: Tensor, found: Tensor, rows: Tensor, take: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Bisect the line from each image to what fools."""
    change, low = found[rows] - image[rows], torch.zeros(len(rows), device=image.device)
    high = torch.ones_like(low)
    for _ in range(10):
        middle = (low + high) / 2
        share = per_image(middle, image)
        fooled = take((image[rows] + share * change).clamp(0, 1), rows)
        low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)


def _fab(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    norm: Literal["Linf", "L2"],
    target: int,
    iterations: int,
    seed: int,
) -> Tensor:
    """FAB's nearest images that are of another class, aimed at the wrong class of that rank."""
    with attack_mode(model), torch.no_grad():
        network = PlainLayout(model)
        # In a ball without volume no image is finished before the last iteration.
        attack = early_exit("fab-t", network, image, Threat(norm, 0.0), seed)
        attack.n_iter, attack.target_class = iterations, target + 2
        made: Tensor = attack.attack_single_run(image, label, False, True)
    return made


def median(distances: Sequence[float]) -> dict[str, float | None]:
    """The median of distances and its 95 % interval, see :func:`median_interval`.

    Args:
        distances: any numbers; infinity where nothing was found.

    Returns:
        ``median``, ``low``, ``high``; None for infinite or for none at all.
    """
    if not distances:
        return {"median": None, "low": None, "high": None}
    return dict(
        zip(("median", "low", "high"), map(_finite, median_interval(distances)), strict=True)
    )


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


# -- the study -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MinimalPerturbationOptions(NetworkStudyOptions):
    """Options of the study.

    Attributes:
        shown: images in the grid: the first of different classes that all networks classify
            correctly.
    """

    norm: Annotated[str | None, "Linf or L2 (default: the run's)."] = None
    shown: Annotated[int, "Images in the grid, up to 8."] = 6
    limit: Annotated[int | None, "Only the first so many images."] = 500


def compute(
    targets: Sequence[TargetLike], options: MinimalPerturbationOptions, progress: Progress
) -> Result:
    """The smallest change that makes each network misclassify, on the same images.

    Costs about 280 forward and 170 backward passes for each image and network.

    Returns:
        ``networks``: by name ``n``, ``wrong`` (misclassified without a change: distance 0),
        ``not_found`` (counted as infinite), ``all`` and ``common`` (median over the images that
        every network classifies correctly), ``distances`` (null: nothing found); ``common``: how
        many images those are; ``farthest``: how many of them need their largest change in which
        network; ``shown``: the grid.
    """
    shown = options.shown
    if not 0 <= shown <= MOST_SHOWN:
        raise ConfigError(f"expected 0 to {MOST_SHOWN} images to show, got {shown}")
    inputs = StudyInputs.load(targets, options)
    if inputs.threat.norm == "L1":
        raise ConfigError("the smallest change is searched in Linf or L2, the threat is in L1")
    images = inputs.images.checked().to(inputs.engine.device)
    right = torch.stack([_right(inputs, name, images) for name in inputs.networks])
    common = right.all(dim=0)
    chosen = _of_different_classes(images.label, common, shown)
    found, kept = {}, {}
    for name in inputs.networks:
        found[name], kept[name] = _distances(inputs, name, images, chosen, progress)
    together = common.nonzero().flatten().tolist()
    body = {
        **inputs.described(),
        "norm": inputs.threat.norm,
        "attack": {
            "name": "nearer of FAB and PGD with a bisected radius, bisected along the line",
            "fab": {"targets": TARGETS, "iterations": ITERATIONS},
            "pgd": {
                "rounds": ROUNDS,
                "steps": STEPS,
                "step_size": "radius/4",
                "objective": "margin",
            },
        },
        "common": len(together),
        "networks": {
            name: {
                "n": len(images),
                "wrong": sum(value == 0 for value in values),
                "not_found": sum(math.isinf(value) for value in values),
                "all": median(values),
                "common": median([values[place] for place in together]),
                "distances": [_finite(value) for value in values],
            }
            for name, values in found.items()
        },
        "farthest": _farthest(found, together),
        "shown": _shown(inputs, images, chosen, found, kept),
    }
    return save_result(NAME, body, folder=inputs.folder, output=options.output)


@torch.no_grad()
def _right(inputs: StudyInputs, name: str, images: ImageSet) -> Tensor:
    network, arrange = inputs.networks[name], inputs.engine.arrange
    found: list[Tensor] = []
    for batch in batches(images, inputs.batch_size):
        image = arrange(batch.image)
        if not found:
            check_outputs(network, image[:8], len(images.classes))
        found.append(predicted(network(image)) == batch.label)
    return torch.cat(found)


def _of_different_classes(label: Tensor, allowed: Tensor, count: int) -> list[int]:
    """The first images of each class, then the second of each, and so on; in their order."""
    seen: dict[int, int] = {}
    ranked = []
    for place in allowed.nonzero().flatten().tolist():
        kind = int(label[place])
        seen[kind] = seen.get(kind, 0) + 1
        ranked.append((seen[kind], place))
    return sorted(place for _, place in sorted(ranked)[:count])


def _distances(
    inputs: StudyInputs, name: str, images: ImageSet, chosen: Sequence[int], progress: Progress
) -> tuple[list[float], dict[int, Tensor]]:
    """The distance of each image, and the fooling images of those that are chosen."""
    values: list[float] = []
    kept: dict[int, Tensor] = {}
    for batch in batches(images, inputs.batch_size):
        before, size = len(values), len(batch.label)

        def tell(share: float, before: int = before, size: int = size) -> None:
            progress(name, min(before + int(share * size), len(images) - 1), len(images))

        made, distance = least_change(
            inputs.networks[name],
            batch.image,
            batch.label,
            inputs.threat.norm,  # type: ignore[arg-type]
            classes=len(images.classes),
            seed=inputs.seed,
            number=batch.step,
            progress=tell,
        )
        values += distance.tolist()
        kept |= {p: made[p - before].clone() for p in chosen if before <= p < before + size}
    progress(name, len(images), len(images))
    return values, kept


def _farthest(found: Mapping[str, Sequence[float]], together: Sequence[int]) -> dict[str, int]:
    """On how many images each network alone needs the largest change."""
    count = dict.fromkeys(found, 0)
    for place in together:
        largest = max(values[place] for values in found.values())
        holders = [name for name, values in found.items() if values[place] == largest]
        if len(holders) == 1:
            count[holders[0]] += 1
    return count


def _shown(
    inputs: StudyInputs,
    images: ImageSet,
    chosen: Sequence[int],
    found: Mapping[str, Sequence[float]],
    kept: Mapping[str, Mapping[int, Tensor]],
) -> dict[str, Any]:
    """What the grid shows, as small PNG files: all changes on one scale."""
    natural = {place: images.rows(slice(place, place + 1))[0].float() / 255 for place in chosen}
    changes = {
        (name, place): kept[name][place] - natural[place]
        for name in found
        for place in chosen
        if math.isfinite(found[name][place])
    }
    scale = max((float(change.abs().max()) for change in changes.values()), default=0.0)
    files = max(1, len(chosen) * (1 + 2 * len(found)))
    side = int(math.sqrt(BUDGET / (files * images.channels * 1.4)))
    rows = []
    for place in chosen:
        of_networks: dict[str, dict[str, Any]] = {}
        for name, network in inputs.networks.items():
            if (name, place) not in changes:
                of_networks[name] = {"distance": None}
                continue
            change, made = changes[name, place], kept[name][place]
            with torch.no_grad():
                after = int(network(inputs.engine.arrange(made[None])).argmax())
            grey = 0.5 + change / (2 * scale)
            of_networks[name] = {
                "distance": _finite(found[name][place]),
                "after": images.classes[after],
                "change": _png(grey, side),
                "adversarial": _png(made, side),
            }
        rows.append(
            {
                "index": place,
                "label": images.classes[int(images.label[place])],
                "image": _png(natural[place], side),
                "networks": of_networks,
            }
        )
    return {"scale": scale, "smaller": max(images.size) > side, "rows": rows}


def _png(image: Tensor, side: int) -> str:
    """An image [C, H, W] in [0, 1] as the base64 of a PNG, no side longer than ``side``.

    To make it smaller pixels are left out, not averaged: the mean of a change is no change.
    """
    every = max(1, math.ceil(max(image.shape[1:]) / side))
    small = image[:, ::every, ::every].clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    pixels = small[0].numpy() if len(small) == 1 else small.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


# -- what is shown ---------------------------------------------------------------------------------


def view(result: Result) -> View:
    """Medians, the share of images that withstand each size of change, and the grid of images."""
    norm, networks, n = result["norm"], result["networks"], result["data"]["n"]
    unit = "1/255" if norm == "Linf" else "length"
    rows = [
        [
            name,
            *(_median(of[part], norm) for part in ("all", "common")),
            *(f"{of[part]:,}" for part in ("wrong", "not_found")),
        ]
        for name, of in networks.items()
    ]
    common = f"the {result['common']:,} images all classify correctly"
    title = (
        f"Smallest {norm} change that misleads ({unit}), n = {n:,} images (median, 95 % interval)"
    )
    table = StudyTable(title, ["model", "all images", common, "wrong", "not found"], rows)
    found = {name: of["not_found"] for name, of in networks.items() if of["not_found"]}
    missing = listed(f"{count:,} images of {name}" for name, count in found.items())
    finding = (
        f"Half of the {n:,} images are misclassified after a {norm} change ({unit}) of at most: "
        + listed(f"{row[0]} {row[1]}" for row in rows)
        + (f"; none was found for {missing}: check with `cure diagnose`." if found else ".")
    )
    figures: list[Figures] = [_grid(result)] if result["shown"]["rows"] else []
    return View(finding, [table], [*figures, _curve(result)])


def _size(value: float | None, norm: str) -> str:
    """A distance: of 255 in Linf, a length in L2."""
    return (
        "none" if value is None else number(*((255 * value, 2) if norm == "Linf" else (value, 3)))
    )


def _median(of: Mapping[str, float | None], norm: str) -> str:
    scale, digits = (255, 2) if norm == "Linf" else (1, 3)
    middle, low, high = (
        math.inf if of[key] is None else scale * float(of[key] or 0)
        for key in ("median", "low", "high")
    )
    # With few images there is no interval; an upper limit among images not misled is open.
    return with_interval(middle, (low, high) if of["low"] is not None else None, digits)


def _grid(result: Result) -> ImageGrid:
    norm, names, shown = result["norm"], list(result["networks"]), result["shown"]
    rows = []
    for row in shown["rows"]:
        cells: list[tuple[str | None, str]] = [(row["image"], row["label"])]
        for of in (row["networks"][name] for name in names):
            cells.append((of.get("change"), _size(of["distance"], norm)))
            cells.append((of.get("adversarial"), of.get("after", "")))
        rows.append(cells)
    smaller = " Of larger images every few pixels are shown." if shown["smaller"] else ""
    return ImageGrid(
        "minimal-perturbation-images",
        "Images, the smallest change that misleads each network, and changed images",
        "Below: the class, the size of the change, and the class of the changed image. All changes "
        f"on one scale: grey is none, black and white are {255 * shown['scale']:.1f} of 255 "
        f"levels.{smaller}",
        ["natural", *(text for name in names for text in (f"change, {name}", name))],
        rows,
    )


def _curve(result: Result) -> Chart:
    norm, networks = result["norm"], result["networks"]
    unit = 255 if norm == "Linf" else 1
    known = {
        name: [math.inf if value is None else value for value in of["distances"]]
        for name, of in networks.items()
    }
    finite = sorted(v for values in known.values() for v in values if math.isfinite(v))
    end = (finite[int(0.97 * (len(finite) - 1))] if finite else 0.0) or 1.0
    radii = [end * place / POINTS for place in range(POINTS + 1)]
    series = []
    for name, values in known.items():
        n = len(values)
        counts = [sum(value > radius for value in values) for radius in radii]
        shares, limits = (
            [100 * count / n for count in counts],
            [wilson(count, n) for count in counts],
        )
        series.append(Series(name, [unit * radius for radius in radii], shares, limits))
    return Chart(
        "minimal-perturbation-curve",
        "Images still classified correctly, by the size of the change",
        f"At 0: natural accuracy. Bands: 95 % intervals, n = {result['data']['n']:,}.",
        [Panel(series, f"{norm} change" + (" (1/255)" if unit == 255 else ""), "images, %")],
    )


minimal_perturbation: Study = STUDIES.register(NAME)(
    Study(
        NAME,
        "Smallest change that misleads",
        "How much must an image be changed until each network misclassifies it, and what does the "
        "change look like?",
        "cure analyse minimal-perturbation RUN RUN ...",
        MinimalPerturbationOptions,
        compute,
        view,
        unused=("epsilon",),
    )
)
