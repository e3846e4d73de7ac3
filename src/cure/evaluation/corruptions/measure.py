"""Accuracy of a classifier on corrupted images: the function ``cure.corruptions``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cure.data import ImageSet, to_unit
from cure.errors import CheckpointError, ConfigError, DataError, unknown
from cure.evaluation.corruptions.constants import CIFAR_SIDE, IMAGENET_SIDE, SEVERITIES
from cure.evaluation.corruptions.operations import (
    CORRUPTIONS,
    GROUPS,
    SMALLEST_SIDE,
    Pixels,
    corrupt,
    frost_photographs,
)
from cure.evaluation.corruptions.published import Published, open_published
from cure.evaluation.metrics import by_class
from cure.evaluation.options import TargetKeywords
from cure.evaluation.runner import Progress, Result, no_progress
from cure.evaluation.target import Target, TargetLike, describe_images
from cure.models import describe
from cure.models.checks import check_outputs, predicted
from cure.models.failure import network_errors
from cure.runs.results import CorruptionRecord
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import check_free, user_path
from cure.utils.launcher import launched
from cure.utils.sheet import write_sheet
from cure.utils.stats import wilson

CORRUPTIONS_FORMAT = "cure-corruptions-1"
BASELINES = Path(__file__).parent / "baselines"
"""Results that a baseline may be named by: of commands of this repository (docs/corruptions.md)."""

# The two that CURE's figures leave out, and the severity of its figures.
_NOT_IN_CURE = ("spatter", "saturate")
_CURE_SEVERITY = 3

Truths = NDArray[np.bool_]
Give = Callable[[str, int, int, int], Pixels]
"""(corruption, severity, first, last) to images [B, H, W, C]."""


def corruptions(
    target: TargetLike,
    *,
    severity: str | int | Sequence[int] = "1-5",
    only: str | Sequence[str] | None = None,
    files: str | Path | None = None,
    baseline: str | Path | None = None,
    sheet: str | Path | None = None,
    output: str | Path | None = None,
    progress: Progress = no_progress,
    **options: Unpack[TargetKeywords],
) -> Result:
    """Accuracy on natural images and on what 19 corruptions make of them.

    Args:
        target: what :func:`cure.evaluate` takes.
        severity: 3, "3", "1,3", "1-5" or [1, 3].
        only: names of corruptions, as a list or as "fog,snow"; by default all that are defined for
            the images, with ``frost_procedural`` where the photographs of frost are missing.
        files: the folder of CIFAR-10-C or CIFAR-100-C (or ``owner/name`` on the hub) to read
            instead of corrupting images; ``data`` is then only the natural images, and may be left
            out.
        baseline: a result of this function (a JSON file, or the name of one that is shipped), for
            the mean corruption error.
        sheet: ``.png`` file to write: the first image under everything that is measured.
        output: JSON file to write; must not exist.
        progress: called with (corruption, images done, images in all).
        options: see :class:`~cure.evaluation.options.TargetOptions`.  An image's corruption depends
            on ``seed``, the corruption, the severity and the image's position in its split, and on
            nothing else.

    Returns:
        The result, as documented in docs/corruptions.md.

    Raises:
        CureError: for every mistake a user can correct; nothing is written then.

    >>> import cure
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> result = cure.corruptions(network, data="digits", only=["fog"], severity=[3], limit=50)
    >>> sorted(result["corruptions"])
    ['fog']
    """
    output, sheet = check_free(output), check_free(sheet)
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ConfigError(f"expected a .png file for the sheet of pictures, got {sheet}; rename it")
    chosen = Target.of(target, **options)
    if launched().world > 1:
        raise ConfigError(
            f"corruptions are measured in one process, got {launched().world} ranks; start it "
            "without torchrun"
        )
    severities = _severities(severity)
    reference = _read_baseline(baseline) if baseline is not None else None
    published = open_published(files) if files is not None else None
    # Labels of files are compared with those of all images, before the limit.
    unlimited = replace(chosen, options=replace(chosen.options, limit=None))
    images, natural, model = _load(unlimited if published is not None else chosen, published)
    names, left_out = _names(only, images, published)
    if chosen.options.limit is not None:
        images = images.subset(slice(0, chosen.options.limit))
    seed = chosen.options.seed
    give = published.pixels if published is not None else _corrupted(images, seed)
    about = describe_images(images)
    source = "files" if published is not None else "generated"
    if reference is not None:
        _check_baseline(reference, names, severities, about, source)
    engine = Engine.for_evaluation(chosen.options.device)
    with network_errors():
        measured = _measure(
            engine.place(model),
            images,
            natural,
            give,
            names,
            severities,
            engine,
            chosen.batch_size,
            progress,
        )
    result = {
        "format": CORRUPTIONS_FORMAT,
        "target": chosen.name,
        **measured,
        "mce": _mce(measured["corruptions"], severities, reference),
        "settings": {
            "corruptions": names,
            "severities": severities,
            "left_out": left_out,
            "source": source,
            "files": published.name if published is not None else None,
            **(_generation(names, images) if published is None else {}),
        },
        "data": about,
        "model": describe(model) | chosen.facts,
        "seed": seed if published is None else None,
        "environment": environment(),
    }
    if sheet is not None:
        heads = [f"severity {severity}" for severity in severities]
        rows = [(name, [give(name, level, 0, 1)[0] for level in severities]) for name in names]
        if natural:
            first = images.rows(slice(0, 1))[0].permute(1, 2, 0).contiguous().numpy()
            heads, rows = ["natural", *heads], [(name, [first, *cells]) for name, cells in rows]
        write_sheet(Path(sheet), heads, rows)
    if output is not None:
        CorruptionRecord.parse(result, output).write(Path(output))
    if chosen.folder is not None:
        chosen.folder.keep("corruptions", result)
    return result


# What is measured.


def _severities(given: str | int | Sequence[int]) -> list[int]:
    expected = f"severity: expected 1 to 5, for example 3, 1,3 or 1-5, got '{given}'"
    if isinstance(given, int):
        given = [given]
    if isinstance(given, str):
        numbers: list[int] = []
        for part in given.split(","):
            first, _, last = part.partition("-")
            try:
                span = range(int(first), int(last or first) + 1)
            except ValueError:
                raise ConfigError(expected) from None
            if not span:
                raise ConfigError(expected)
            numbers += span
        given = numbers
    if not given or not set(given) <= set(SEVERITIES):
        raise ConfigError(expected)
    return sorted(set(given))


def _load(target: Target, published: Published | None) -> tuple[ImageSet, bool, nn.Module]:
    """The images, whether they are the natural ones (else only their labels count), the network."""
    if published is None:
        images = target.images()
        return images.checked(), True, target.build(images)
    label = torch.from_numpy(published.label)
    if target.options.data is None and target.config is None:
        first = next(iter(published.images))
        pixels = torch.from_numpy(published.pixels(first, 1, 0, len(label)))
        classes = tuple(map(str, range(1 + int(label.max()))))
        image = pixels.permute(0, 3, 1, 2)
        images = ImageSet(image, label, classes, published.name, "test").checked()
        return images, False, target.build(images)
    images = target.images()
    model = target.build(images)
    if not torch.equal(images.label, label):
        raise DataError(
            f"expected the {len(images)} labels of '{images.name}' {images.split} in the files of "
            f"'{published.name}', got {len(label)} others; name the images that the files were "
            "made of (--data)"
        )
    height, width = next(iter(published.images.values())).shape[1:3]
    if (images.channels, *images.size) != (3, height, width):
        raise DataError(
            f"expected natural images of the files' size, 3x{height}x{width}, got "
            f"{'x'.join(map(str, (images.channels, *images.size)))}; leave out what resizes them"
        )
    return images, True, model


def _names(
    only: str | Sequence[str] | None, images: ImageSet, published: Published | None
) -> tuple[list[str], dict[str, str]]:
    """The corruptions to measure in the order of the table, and those left out with the reason."""
    reasons: dict[str, str] = {}
    if published is not None:
        absent = [name for name in CORRUPTIONS if name not in published.images]
        reasons = dict.fromkeys(absent, "no file")
        reasons.pop("frost_procedural", None)
        known: list[str] = list(published.images)
    else:
        if min(images.size) < SMALLEST_SIDE:
            raise DataError(
                f"expected images of {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels or more, got "
                f"{images.size[1]}x{images.size[0]}; enlarge them with data.resize"
            )
        for name, corruption in CORRUPTIONS.items():
            if images.channels == 1 and not corruption.grey:
                reasons[name] = "changes colours, and the images are grey"
        if frost_photographs() is None:
            reasons["frost"] = (
                "needs the photographs of the package imagecorruptions: `pip install --no-deps "
                "imagecorruptions`; frost_procedural stands in"
            )
        known = list(CORRUPTIONS)
    if only is None:
        replaced = "frost" not in reasons or published is not None
        chosen = {name for name in known if name not in reasons}
        return (
            [n for n in CORRUPTIONS if n in chosen and not (replaced and n == "frost_procedural")],
            reasons,
        )
    wanted = only.split(",") if isinstance(only, str) else only
    asked = {name.strip() for name in wanted if name.strip()}
    for name in sorted(asked):
        if name not in CORRUPTIONS:
            raise ConfigError(unknown("corruption", name, known))
        if name not in known:
            raise DataError(f"expected {name}.npy among the files, got none; leave it out")
        if name in reasons:
            raise ConfigError(f"{name} cannot be measured here: it {reasons[name]}; leave it out")
    if not asked:
        raise ConfigError("expected names of corruptions, got none; leave `only` out for all")
    return [name for name in CORRUPTIONS if name in asked], {}


def _corrupted(images: ImageSet, seed: int) -> Give:
    """Corrupts images when they are asked for."""

    def give(name: str, severity: int, first: int, last: int) -> Pixels:
        pixels = images.rows(slice(first, last)).permute(0, 2, 3, 1).contiguous().numpy()
        whole = enumerate(pixels, first)
        return np.stack([corrupt(one, name, severity, seed, i) for i, one in whole])

    return give


def _generation(names: list[str], images: ImageSet) -> Result:
    """How the images were corrupted, for the result file."""
    side = min(images.size)
    table = "CIFAR" if side <= CIFAR_SIDE else "ImageNet" if side >= IMAGENET_SIDE else "between"
    versions = {name: version(name) for name in ("numpy", "scipy", "pillow")}
    if "frost" in names:
        try:
            versions["imagecorruptions"] = version("imagecorruptions")
        except PackageNotFoundError:
            versions["imagecorruptions"] = "unknown"
    return {"constants": table, "stored_as": "uint8, fractions cut off", "versions": versions}


# Measuring.


@torch.no_grad()
def _measure(
    model: nn.Module,
    images: ImageSet,
    natural: bool,
    give: Give,
    names: list[str],
    severities: list[int],
    engine: Engine,
    batch_size: int,
    progress: Progress,
) -> Result:
    """Accuracies: natural, the means, by group, by severity and by corruption.

    The network was built or copied for this call, so it is left in evaluation mode.
    """
    count = len(images)
    label = images.label.cpu()
    model.eval()

    def arranged(pixels: torch.Tensor) -> torch.Tensor:
        return engine.arrange(to_unit(pixels.to(engine.device)))

    def corrupted(name: str, severity: int, first: int, last: int) -> torch.Tensor:
        return torch.from_numpy(give(name, severity, first, last)).permute(0, 3, 1, 2)

    def right(name: str, severity: int | None) -> Truths:
        """Which images are classified right, corrupted or (severity None) as they are."""
        found = []
        before = 0 if severity is None else severities.index(severity) * count
        total = count if severity is None else len(severities) * count
        for first in range(0, count, batch_size):
            last = min(first + batch_size, count)
            if severity is None:
                pixels = images.rows(slice(first, last))
            else:
                pixels = corrupted(name, severity, first, last)
            found.append(predicted(model(arranged(pixels))).cpu() == label[first:last])
            progress(name, before + last, total)
        truths: Truths = torch.cat(found).numpy()
        return truths

    some = corrupted(names[0], severities[0], 0, min(batch_size, count))
    check_outputs(model, arranged(some), len(images.classes))
    alone = None
    if natural:
        truths = right("natural", None)
        alone = _cell(truths) | by_class(torch.from_numpy(truths), label, len(images.classes))
    truth: dict[tuple[str, int], Truths] = {}
    seconds = {}
    for name in names:
        began = time.perf_counter()
        for severity in severities:
            truth[name, severity] = right(name, severity)
        seconds[name] = round(time.perf_counter() - began, 2)

    def mean(over: Sequence[str] | None, at: Sequence[int] = severities) -> Result | None:
        if not over or not set(at) <= set(severities):
            return None
        together = _mean([truth[name, severity] for name in over for severity in at])
        return together | {"over": list(over), "severities": list(at)}

    def classes_of(name: str) -> Result:
        """By class, over severities; without an interval, because images come several times."""
        together = torch.from_numpy(np.concatenate([truth[name, s] for s in severities]))
        found = by_class(together, label.repeat(len(severities)), len(images.classes))
        return {key: found[key] for key in ("balanced_accuracy", "accuracy_by_class")}

    by_group = {
        group: [name for name in names if CORRUPTIONS[name].group == group] for group in GROUPS
    }
    return {
        "natural": alone,
        "means": {
            "benchmark": mean(_complete(names, _extras())),
            "all": mean(_complete(names, ())),
            "cure": mean(_complete(names, _NOT_IN_CURE), [_CURE_SEVERITY]),
        },
        "groups": {group: mean(over) for group, over in by_group.items() if over},
        "severities": {str(severity): mean(names, [severity]) for severity in severities},
        "corruptions": {
            name: {
                "group": CORRUPTIONS[name].group,
                **_mean([truth[name, severity] for severity in severities]),
                **classes_of(name),
                "severities": {str(s): _cell(truth[name, s]) for s in severities},
                "seconds": seconds[name],
            }
            for name in names
        },
    }


def _extras() -> list[str]:
    return [name for name, corruption in CORRUPTIONS.items() if corruption.extra]


def _complete(names: Sequence[str], without: Sequence[str]) -> list[str] | None:
    """The 19 corruptions without some, if all were measured; either frost will do."""
    stand_in = "frost_procedural" if "frost" in names else "frost"
    wanted = [name for name in CORRUPTIONS if name not in (*without, stand_in)]
    return wanted if set(wanted) <= set(names) else None


def _cell(truths: Truths) -> Result:
    """Accuracy in percent on one kind of images, with its Wilson interval."""
    right, count = int(truths.sum()), len(truths)
    return {
        "accuracy": 100 * right / count,
        "interval": list(wilson(right, count)),
        "correct": right,
        "n": count,
    }


def _mean(truths: Sequence[Truths]) -> Result:
    """Mean accuracy over several kinds of the same N images, with a 95 % interval.

    The images come again and again, so what counts is N: the interval is that of the mean of N
    shares, one an image, ``m +- 1.96 s / sqrt(N)``.  Where all shares are equal, or there is one
    kind alone, it is Wilson's.
    """
    if len(truths) == 1:
        return {key: _cell(truths[0])[key] for key in ("accuracy", "interval")}
    shares = np.mean(truths, axis=0)
    count, mean = len(shares), 100 * float(shares.mean())
    half = 196 * float(shares.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    if half:
        interval = [max(0.0, mean - half), min(100.0, mean + half)]
    else:
        interval = list(wilson(round(mean * count / 100), count))
    return {"accuracy": mean, "interval": interval}


# The mean corruption error.


def _read_baseline(given: str | Path) -> Result:
    path = user_path(given)
    if not path.is_file():
        shipped = sorted(file.stem for file in BASELINES.glob("*.json"))
        if path.suffix or len(path.parts) > 1 or str(given) not in shipped:
            raise ConfigError(
                f"baseline: expected a result of `cure corruptions --output FILE` or a name, and "
                f"'{given}' is no file: " + unknown("name", str(given), shipped)
            )
        path = BASELINES / f"{given}.json"
    try:
        return CorruptionRecord.read(path).content()
    except CheckpointError as error:
        raise ConfigError(f"baseline: {error}") from None


def _check_baseline(
    baseline: Result, names: Sequence[str], severities: Sequence[int], data: Result, source: str
) -> None:
    """Like against like: the same data set, split, size and kind of images, and enough of it."""
    pairs = {
        "data": (baseline["data"]["name"], data["name"]),
        "split": (baseline["data"]["split"], data["split"]),
        "size": (baseline["data"]["size"], data["size"]),
        "images": (baseline["settings"]["source"], source),
    }
    measured = {
        name: {int(s): float(c["accuracy"]) for s, c in cell["severities"].items()}
        for name, cell in baseline["corruptions"].items()
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ConfigError(
                f"baseline: expected one measured on the same {what} ({ours}), got {theirs}; make "
                "it with the same options"
            )
    for name in names:
        missing = [severity for severity in severities if severity not in measured.get(name, {})]
        if missing:
            raise ConfigError(
                f"baseline: it was not measured under {name} at severity {missing[0]}; make it "
                "again with that, or leave that out here"
            )
        if all(measured[name][severity] == 100 for severity in severities):
            raise ConfigError(
                f"baseline: it makes no error under {name}, so nothing can be relative to it; "
                "choose a weaker one"
            )


def _mce(corrupted: Result, severities: Sequence[int], baseline: Result | None) -> Result | None:
    """The mean corruption error, in percent of the baseline's.

    ``CE_c = 100 sum_s E_{s,c} / sum_s E^baseline_{s,c}`` with E the error rate, and mCE the mean of
    CE over the corruptions.  Source: Hendrycks and Dietterich, ICLR 2019, Sec. 4.
    """
    if baseline is None:
        return None

    def errors(cells: Result, name: str) -> float:
        return float(sum(100 - cells[name]["severities"][str(s)]["accuracy"] for s in severities))

    each = {
        name: 100 * errors(corrupted, name) / errors(baseline["corruptions"], name)
        for name in corrupted
    }
    benchmark, every = (_complete(list(each), without) for without in (_extras(), ()))
    return {
        "benchmark": float(np.mean([each[name] for name in benchmark])) if benchmark else None,
        "all": float(np.mean([each[name] for name in every])) if every else None,
        "corruptions": each,
        "baseline": {
            "target": baseline["target"],
            "model": baseline["model"],
            "n": baseline["data"]["n"],
            "seed": baseline["seed"],
            "cure": baseline["environment"]["cure"],
        },
    }
