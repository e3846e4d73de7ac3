"""The study ``perturbation``: the least change of an image that fools each of several networks.

Source: CURE, ICLR 2024, Fig. 8; FAB: Croce & Hein, Minimally distorted adversarial examples with a
fast adaptive boundary attack, ICML 2020.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from cure.analysis.study import STUDIES, Looked, Rows, Study, keep, look
from cure.attacks import PGD, PerSample, Threat, attack_mode
from cure.attacks.early_exit import PlainLayout, early_exit
from cure.attacks.losses import MARGIN
from cure.data import ImageSet, batches
from cure.errors import ConfigError
from cure.evaluation.options import Split
from cure.evaluation.runner import Progress, Result, no_progress
from cure.evaluation.target import TargetLike
from cure.models.checks import check_outputs
from cure.utils import plotting as drawing
from cure.utils.io import check_free
from cure.utils.plotting import Cell, Picture
from cure.utils.random import generator
from cure.utils.stats import median_interval, wilson

NAME = "perturbation"
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
        return model(candidate).argmax(dim=1) != label[rows]  # type: ignore[no-any-return]

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
    draws = generator(image.device, seed, NAME, number)
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
        share = middle.view(-1, *[1] * (image.dim() - 1))
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
        # In a ball without volume nobody is done before the last iteration.
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


def perturbation(
    *targets: TargetLike,
    data: str | Path | ImageSet | None = None,
    split: Split = "test",
    limit: int | None = 500,
    norm: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    weights: str | Path | None = None,
    shown: int = 6,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    progress: Progress = no_progress,
) -> Result:
    """The least change that fools each network, on the same images.

    Costs about 280 forward and 170 backward passes an image and network.

    Args:
        targets: runs, names of networks, networks.
        data: images; by default those of the first run.
        split: which images.
        limit: only the first so many; all with None.  A median of fewer than 500 is rough.
        norm: "Linf" or "L2"; by default that of the first run.
        checkpoint: which weights of runs.
        weights: weights file of a single network.
        shown: images in the grid, up to 8: the first of different classes that all networks get
            right.
        batch_size: images at once.
        device: "auto", "cpu", "cuda".
        seed: of random starts.
        output: JSON file.
        progress: told (network, images done, images in all).

    Returns:
        ``networks``: by name ``n``, ``wrong`` (misclassified as they are: distance 0),
        ``not_found`` (counted as infinite), ``all`` and ``common`` (median over the images that
        every network gets right), ``distances`` (null: nothing found); ``common``: how many images
        those are; ``farthest``: how many of them need their largest change in which network;
        ``shown``: the grid.

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.
    """
    check_free(output)
    if not 0 <= shown <= MOST_SHOWN:
        raise ConfigError(f"expected 0 to {MOST_SHOWN} images to show, got {shown}")
    looked = look(
        targets,
        data=data,
        split=split,
        limit=limit,
        norm=norm,
        checkpoint=checkpoint,
        weights=weights,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    if looked.threat.norm == "L1":
        raise ConfigError("the least change is looked for in Linf or L2, the threat is in L1")
    images = looked.images.checked().to(looked.engine.device)
    right = torch.stack([_right(looked, name, images) for name in looked.networks])
    common = right.all(dim=0)
    chosen = _of_different_classes(images.label, common, shown)
    found, kept = {}, {}
    for name in looked.networks:
        found[name], kept[name] = _distances(looked, name, images, chosen, progress)
    together = common.nonzero().flatten().tolist()
    body = {
        **looked.described(),
        "norm": looked.threat.norm,
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
        "shown": _shown(looked, images, chosen, found, kept),
    }
    return keep(NAME, body, folder=looked.folder, output=output)


@torch.no_grad()
def _right(looked: Looked, name: str, images: ImageSet) -> Tensor:
    network, arrange = looked.networks[name], looked.engine.arrange
    found: list[Tensor] = []
    for batch in batches(images, looked.batch_size):
        image = arrange(batch.image)
        if not found:
            check_outputs(network, image[:8], len(images.classes))
        found.append(network(image).argmax(dim=1) == batch.label)
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
    looked: Looked, name: str, images: ImageSet, chosen: Sequence[int], progress: Progress
) -> tuple[list[float], dict[int, Tensor]]:
    """The distance of each image, and the fooling images of those that are chosen."""
    values: list[float] = []
    kept: dict[int, Tensor] = {}
    for batch in batches(images, looked.batch_size):
        before, size = len(values), len(batch.label)

        def tell(share: float, before: int = before, size: int = size) -> None:
            progress(name, min(before + int(share * size), len(images) - 1), len(images))

        made, distance = least_change(
            looked.networks[name],
            batch.image,
            batch.label,
            looked.threat.norm,  # type: ignore[arg-type]
            classes=len(images.classes),
            seed=looked.seed,
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
    looked: Looked,
    images: ImageSet,
    chosen: Sequence[int],
    found: Mapping[str, Sequence[float]],
    kept: Mapping[str, Mapping[int, Tensor]],
) -> dict[str, Any]:
    """What the grid shows, as small PNG files: all changes on one scale."""
    natural = {place: images.image[place].float() / 255 for place in chosen}
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
        for name, network in looked.networks.items():
            if (name, place) not in changes:
                of_networks[name] = {"distance": None}
                continue
            change, made = changes[name, place], kept[name][place]
            with torch.no_grad():
                after = int(network(looked.engine.arrange(made[None])).argmax())
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


# -- how it is told --------------------------------------------------------------------------------


def _size(value: float | None, norm: str, missing: str = "not found") -> str:
    """A distance in words: of 255 in Linf, a length in L2."""
    if value is None:
        return missing
    return f"{255 * value:.2f}/255" if norm == "Linf" else f"{value:.3f}"


def _median(of: Mapping[str, float | None], norm: str) -> str:
    if of["median"] is None:
        return "not known"
    if of["low"] is None:
        return _size(of["median"], norm)
    # Where the upper end lies among images for which nothing was found, it is open.
    middle, low, high = (
        "unbounded" if of[key] is None else _size(of[key], norm).removesuffix("/255")
        for key in ("median", "low", "high")
    )
    return f"{middle} ({low} to {high})" + ("/255" if norm == "Linf" else "")


def findings(result: Result) -> list[str]:
    """What was found, in sentences."""
    norm, networks, common = result["norm"], result["networks"], result["common"]
    n = result["data"]["n"]
    said = [
        f"{name}: half of the {n:,} images are misclassified after a change of at most "
        f"{_median(of['all'], norm)}; {of['wrong']:,} of them are misclassified as they are and "
        "count as 0."
        for name, of in networks.items()
    ]
    if len(networks) > 1 and common:
        order = sorted(networks, key=lambda name: -(networks[name]["common"]["median"] or math.inf))
        said.append(
            f"On the {common:,} images that all of them get right, from the hardest to fool to the "
            "easiest, medians: "
            + "; ".join(f"{name} {_median(networks[name]['common'], norm)}" for name in order)
            + "."
        )
        name = max(result["farthest"], key=lambda name: result["farthest"][name])
        count = result["farthest"][name]
        low, high = wilson(count, common)
        said.append(
            f"{name} needs the largest change on {count:,} of them: {100 * count / common:.1f} % "
            f"({low:.1f} to {high:.1f} %)."
        )
    lost = {name: of["not_found"] for name, of in networks.items() if of["not_found"]}
    if lost:
        said.append(
            "No change was found, counted as infinite: "
            + ", ".join(f"{count:,} images of {name}" for name, count in lost.items())
            + ". A network that attacks cannot climb is not one that withstands them: see "
            "`cure diagnose`."
        )
    said.append(
        f"Sizes are {norm} distances"
        + (" in steps of the 256 levels of a pixel" if norm == "Linf" else "")
        + " of the nearest fooling image that FAB or PGD found, each verified: an upper bound, the "
        "least change may be smaller. In brackets 95 % intervals over images."
    )
    return said


def tables(result: Result) -> list[Rows]:
    """Medians by network."""
    norm = result["norm"]
    return [
        Rows(
            f"Least {norm} change that fools, n = {result['data']['n']:,} images "
            "(median, 95 % interval)",
            [
                "model",
                "all images",
                f"the {result['common']:,} all get right",
                "wrong",
                "not found",
            ],
            [
                [
                    name,
                    _median(of["all"], norm),
                    _median(of["common"], norm),
                    f"{of['wrong']:,}",
                    f"{of['not_found']:,}",
                ]
                for name, of in result["networks"].items()
            ],
        )
    ]


def pictures(result: Result) -> list[Picture]:
    """The grid of changes, and the share of images not yet fooled over their size."""
    curve = _curve(result)
    return [_grid(result), curve] if result["shown"]["rows"] else [curve]


def _grid(result: Result) -> Picture:
    norm, names = result["norm"], list(result["networks"])
    rows = []
    for row in result["shown"]["rows"]:
        cells = [Cell(row["image"], [row["label"]])]
        for name in names:
            of = row["networks"][name]
            if of["distance"] is None:
                cells += [Cell(None, ["none found"]), Cell(None)]
            else:
                cells.append(Cell(of["change"], [_size(of["distance"], norm)]))
                cells.append(Cell(of["adversarial"], [f"seen: {of['after']}"]))
        rows.append(cells)
    scale = result["shown"]["scale"]
    smaller = " Of larger images every few pixels are shown." if result["shown"]["smaller"] else ""
    sizes = "; ".join(
        f"{name} "
        + ", ".join(
            _size(row["networks"][name]["distance"], norm) for row in result["shown"]["rows"]
        )
        for name in names
    )
    return drawing.image_grid(
        "perturbation-images",
        "The least change that fools: image, change and changed image for each network",
        f"A row an image that all networks get right, its class below it; for each network the "
        f"change, its {norm} size below it, and the changed image with the class it is taken for. "
        f"All changes on one scale: grey is none, black and white are {255 * scale:.1f} of 255 "
        f"levels.{smaller} Sizes from the first row to the last: {sizes}.",
        [("natural", 1), *((name, 2) for name in names)],
        rows,
    )


def _curve(result: Result) -> Picture:
    norm, networks = result["norm"], result["networks"]
    unit = 255 if norm == "Linf" else 1
    known = {
        name: [math.inf if value is None else value for value in of["distances"]]
        for name, of in networks.items()
    }
    finite = sorted(v for values in known.values() for v in values if math.isfinite(v))
    end = finite[int(0.97 * (len(finite) - 1))] if finite else 0.0
    radii = [(end or 1.0) * place / POINTS for place in range(POINTS + 1)]
    curves, intervals = {}, {}
    for name, values in known.items():
        standing = [sum(value > radius for value in values) for radius in radii]
        n = len(values)
        curves[name] = [(unit * r, 100 * s / n) for r, s in zip(radii, standing, strict=True)]
        intervals[name] = [wilson(count, n) for count in standing]
    medians = "; ".join(
        f"{name} {_size(of['all']['median'], norm, 'not known')}" for name, of in networks.items()
    )
    return drawing.lines(
        "perturbation-curve",
        "Images not yet fooled, by the size of the change",
        curves,
        x=f"{norm} size of the change" + (", of 255 levels" if norm == "Linf" else ""),
        y="images not yet fooled, percent",
        description=f"At 0: natural accuracy. Bands: Wilson 95 % intervals, "
        f"n = {result['data']['n']:,}. Medians: {medians}.",
        intervals=intervals,
    )


STUDIES.register(NAME)(
    Study(
        NAME,
        "The least change that fools",
        "How much must an image be changed until each network gets it wrong, and what does the "
        "change look like?",
        "cure analyse perturbation RUN RUN ...",
        findings,
        tables,
        pictures,
    )
)
