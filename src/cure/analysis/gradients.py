"""Gradients over training: their size by layer, which weights move, which are held back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import safetensors
import torch
from torch import Tensor

from cure.analysis.render import MISSING, StudyTable, View, listed, number
from cure.analysis.study import STUDIES, RunStudyOptions, Study, open_runs, save_result
from cure.errors import CheckpointError, ConfigError
from cure.evaluation.runner import Progress, Result
from cure.runs.folder import RunFolder
from cure.runs.records import GradientLine
from cure.training.gradient_logger import COUNTS
from cure.utils.plotting import Chart, Panel, Series

NAME = "gradients"
BINS = 40
"""Stretches of a run over which sizes are averaged."""

PHASE = 0.1
"""Share of the records that is the first phase, and the last."""

FREQUENCIES = 10
"""Bars of a histogram of how often weights are conserved."""

FIXED = "0.001"
"""The fixed size of a gradient that the sentences and pictures take."""


def stretches(count: int, most: int = BINS) -> list[tuple[int, int]]:
    """Consecutive parts (first, end) of ``count`` things, almost equally long, at most ``most``.

    >>> stretches(5, 2)
    [(0, 2), (2, 5)]
    """
    parts = min(most, count)
    return list(pairwise(number * count // parts for number in range(parts + 1))) if parts else []


def frequencies(counts: Tensor, samples: int, bars: int = FREQUENCIES) -> Result:
    """How often weights were conserved.

    Args:
        counts: of each weight, in how many records it was conserved.
        samples: number of records.

    Returns:
        ``mean`` share of the records in percent; ``never`` and ``always``: share of weights in
        percent; ``histogram``: share of weights in percent by how often, in ``bars`` equal parts of
        0 to 100 % of the records, each with its lower end, the last with both.
    """
    flat = counts.flatten().to(torch.int64)
    # In whole numbers: 0.3 * 10 in floating point is not 3.
    bar = (flat * bars // samples).clamp_max(bars - 1)
    histogram = torch.bincount(bar, minlength=bars).double() / flat.numel()
    return {
        "mean": 100 * float(flat.double().mean()) / samples,
        "never": 100 * float((flat == 0).double().mean()),
        "always": 100 * float((flat == samples).double().mean()),
        "histogram": [100 * share for share in histogram.tolist()],
    }


def by_chance(share: float, samples: int) -> list[float]:
    """The histogram of :func:`frequencies` that masks drawn anew at every step would have.

    Args:
        share: of weights conserved at a step, in [0, 1].
        samples: number of records.
    """
    found = [0.0] * FREQUENCIES
    for count in range(samples + 1):
        logarithm = math.lgamma(samples + 1) - math.lgamma(count + 1)
        logarithm -= math.lgamma(samples - count + 1)
        if (share == 0 and count) or (share == 1 and count < samples):
            continue
        if 0 < share < 1:
            logarithm += count * math.log(share) + (samples - count) * math.log1p(-share)
        found[min(count * FREQUENCIES // samples, FREQUENCIES - 1)] += 100 * math.exp(logarithm)
    return found


def overlap(
    before: Sequence[int | None],
    now: Sequence[int | None],
    again: Sequence[int | None],
    sizes: Sequence[int],
) -> dict[str, float] | None:
    """How much of one mask is found again in another, and how much chance would leave.

    Args:
        before: weights conserved by the first mask, by tensor; None without a mask.
        now: by the second.
        again: by both.
        sizes: weights of each tensor.

    Returns:
        ``again``: share in percent of what the first conserves that the second conserves too;
        ``jaccard``: share of what either conserves that both do; ``chance`` and
        ``jaccard_chance``: the same for independent masks with as many weights in each tensor.
        None when the first mask is empty.
    """
    rows = [
        (a, b, c, n)
        for a, b, c, n in zip(before, now, again, sizes, strict=True)
        if a is not None and b is not None and c is not None
    ]
    first, second, both = (sum(row[place] for row in rows) for place in range(3))
    expected = sum(a * b / n for a, b, _, n in rows)
    if not first:
        return None
    return {
        "again": 100 * both / first,
        "chance": 100 * expected / first,
        "jaccard": 100 * both / (first + second - both),
        "jaccard_chance": 100 * expected / (first + second - expected),
    }


def compute(targets: Sequence[Any], options: RunStudyOptions, progress: Progress) -> Result:
    """Sizes of gradients, shares of weights that move, and what masks hold back, from records.

    Returns:
        ``runs``: for each ``tensors`` and ``shapes``; ``sizes``: mean \\|gradient\\| by tensor,
        ``before`` and ``after`` the mask, averaged over stretches of the run that begin at
        ``steps``; ``phases``, "first" and "last": percent of the weights of each tensor that the
        optimiser is given a gradient for (``moved``), that a threshold for each tensor (``layer``)
        and one for the network (``global``) leave free to move, and whose gradient is larger than
        fixed sizes (``above``); of a method with a mask also ``frequency`` (:func:`frequencies`, of
        all weights and by tensor, and :func:`by_chance`) and ``overlap`` (:func:`overlap`, with the
        record before, ``every`` steps, and with the step before).

    Source: CURE, ICLR 2024, Figs. 6 and 10.  With one threshold for each tensor the share that
    moves is 100 - p percent in every tensor at all times, so the shares of Figs. 6b and 10, which
    differ by layer, can only come from one threshold for the network or from a fixed size.
    """
    runs = []
    opened = open_runs(targets)
    for name, folder in opened:
        runs.append(_studied(name, folder))
        progress(name, 1, 1)
    return save_result(NAME, {"runs": runs}, folder=opened[0][1], output=options.output)


def _studied(name: str, folder: RunFolder) -> Result:
    lines = [line.content() for line in folder.gradients()]
    full = [line for line in lines if "before" in line]
    if not full:
        raise ConfigError(
            f"{folder.path} recorded no gradients; train it with training.record_gradients=20, "
            "which records every 20 steps"
        )
    try:
        return _body(name, folder, lines[0], full, [line for line in lines if "again" in line])
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder.path / GradientLine.file} is damaged ({type(error).__name__}: {error}); "
            "restore it from a copy"
        ) from None


def _body(
    name: str, folder: RunFolder, header: Result, full: list[Result], repeated: list[Result]
) -> Result:
    shapes = header["shapes"]
    sizes = [math.prod(shape) for shape in shapes]
    parts = stretches(len(full))
    config = folder.config
    body: Result = {
        "name": name,
        "method": config.method.name,
        "every": header["every"],
        "records": len(full),
        "last_step": full[-1]["step"],
        "tensors": header["tensors"],
        "shapes": shapes,
        "sizes": {
            "steps": [full[first]["step"] for first, _ in parts],
            **{
                when: [_mean([line[when] for line in full[first:end]]) for first, end in parts]
                for when in ("before", "after")
            },
        },
    }
    length = max(1, round(PHASE * len(full)))
    body["phases"] = {
        "first": _phase(full[:length], sizes),
        "last": _phase(full[-length:], sizes),
    }
    masked = [line for line in full if "mask" in line]
    if masked:
        body["frequency"] = _frequency(folder, header["tensors"])
        at = {line["step"]: line["mask"] for line in masked}
        body["overlap"] = {
            what: _overlaps(at, repeated, gap, header["every"], sizes)
            for what, gap in (("record_before", header["every"]), ("step_before", 1))
        }
    return body


def _overlaps(
    at: Mapping[int, Sequence[int | None]],
    repeated: Sequence[Result],
    gap: int,
    every: int,
    sizes: Sequence[int],
) -> list[Result]:
    """Means of :func:`overlap` over stretches of the run: masks so many steps apart."""
    pairs = []
    for line in repeated:
        if line["step"] % every == gap % every:
            found = overlap(at[line["step"] - gap], line["mask"], line["again"], sizes)
            pairs += [{"step": line["step"]} | found] if found is not None else []
    return [
        {"step": pairs[first]["step"], "pairs": end - first}
        | {
            key: float(f"{sum(pair[key] for pair in pairs[first:end]) / (end - first):.4g}")
            for key in ("again", "chance", "jaccard", "jaccard_chance")
        }
        for first, end in stretches(len(pairs))
    ]


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each column, with four digits."""
    return [float(f"{sum(column) / len(rows):.4g}") for column in zip(*rows, strict=True)]


def _phase(lines: Sequence[Result], sizes: Sequence[int]) -> Result:
    def free(held: Sequence[Sequence[int | None]]) -> list[float | None]:
        """Percent of each tensor that is not held, over the lines."""
        return [
            None if None in column else 100 - 100 * sum(filter(None, column)) / (size * len(column))
            for column, size in zip(zip(*held, strict=True), sizes, strict=True)
        ]

    body: Result = {
        "steps": [lines[0]["step"], lines[-1]["step"]],
        "records": len(lines),
        "before": _mean([line["before"] for line in lines]),
        "after": _mean([line["after"] for line in lines]),
        "above": {
            size: [100 * share for share in _mean([line["above"][size] for line in lines])]
            for size in lines[0]["above"]
        },
    }
    masked = [line for line in lines if "mask" in line]
    if masked:
        # Before a warm-up ends nothing is held.
        moved = free([line.get("mask", [0] * len(sizes)) for line in lines])
        body["moved"] = [100.0 if share is None else share for share in moved]
        for scope in ("layer", "global"):
            body[scope] = free([line["conserved"][scope] for line in masked])
    else:
        body["moved"] = [100.0] * len(sizes)
    return body


def _frequency(folder: RunFolder, names: Sequence[str]) -> Result | None:
    """From the counts of the last finished epoch; None before the first."""
    path = folder.path / COUNTS
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            samples = int((file.metadata() or {})["samples"])
            counts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it from a copy") from None
    every = torch.cat([count.flatten() for count in counts.values()])
    body = {"records": samples, "all": frequencies(every, samples)}
    body["chance"] = by_chance(body["all"]["mean"] / 100, samples)  # type: ignore[index]
    body["tensors"] = {name: frequencies(counts[name], samples) for name in names if name in counts}
    return body


# What is shown of a result.


def view(result: Result) -> View:
    """Sizes first and last, how often masks hold back the same weights, and all tensors."""
    runs = result["runs"]
    header = ["run", "method", "records", "mean |gradient| first", "last", "after mask, last"]
    header += [f"above {FIXED} last, %", "held back again, %", "by chance, %"]
    rows, said = [], []
    for run in runs:
        first, last = run["phases"]["first"], run["phases"]["last"]
        found = run.get("overlap", {}).get("record_before", ())
        again, chance = (
            number(_over_pairs(found, key)) if found else MISSING for key in ("again", "chance")
        )
        start, end = (f"{_total(run, phase['before']):.2g}" for phase in (first, last))
        row = [run["name"], run["method"], f"{run['records']:,}", start, end]
        row += [f"{_total(run, last['after']):.2g}", number(_total(run, last["above"][FIXED]))]
        rows.append([*row, again, chance])
        mask = (
            f", {again} % of the weights held back are held back again after "
            f"{run['every']:,} steps ({chance} % by chance)"
            if found
            else ""
        )
        said.append(f"{run['name']} {start} to {end} in {run['records']:,} records{mask}")
    tables = [StudyTable("Gradients", header, rows), *map(_by_tensor, runs)]
    figures = [_sizes(runs)] if _shown(runs) else []
    for serial, run in enumerate(runs, 1):
        figures.append(_moved(run, serial))
        if run.get("frequency") is not None:
            figures.append(_often(run, serial))
        if run.get("overlap", {}).get("record_before"):
            figures.append(_again(run, serial))
    finding = (
        f"Mean |gradient| of a weight in the first and last tenth of training: {listed(said)}."
    )
    return View(finding, tables, figures)


def _shown(runs: Sequence[Result], most: int = 4) -> list[str]:
    """A few weight matrices that all runs have, evenly from the input to the output."""
    first = runs[0]
    common = [
        name
        for name, shape in zip(first["tensors"], first["shapes"], strict=True)
        if len(shape) > 1 and all(name in run["tensors"] for run in runs)
    ]
    if len(common) <= most:
        return common
    return [common[round(place * (len(common) - 1) / (most - 1))] for place in range(most)]


def _total(run: Result, values: Sequence[float]) -> float:
    """Mean over all weights of what is a mean over each tensor."""
    sizes = [math.prod(shape) for shape in run["shapes"]]
    total = sum(value * size for value, size in zip(values, sizes, strict=True))
    return float(total / sum(sizes))


def _over_pairs(parts: Sequence[Result], key: str) -> float:
    """Mean over all pairs of masks."""
    total = sum(part[key] * part["pairs"] for part in parts)
    return float(total / sum(part["pairs"] for part in parts))


def _by_tensor(run: Result) -> StudyTable:
    phases = run["phases"]
    columns: list[tuple[str, Sequence[float | None]]] = [
        (f"mean |gradient| {phase}", of["before"]) for phase, of in phases.items()
    ]
    columns += [(f"above {FIXED} {phase}, %", of["above"][FIXED]) for phase, of in phases.items()]
    columns += [
        (f"{scope} threshold moves {phase}, %", of[scope])
        for scope in ("layer", "global")
        for phase, of in phases.items()
        if scope in of
    ]
    rows = [
        [
            name,
            "x".join(map(str, run["shapes"][place])),
            *(f"{values[place]:.2g}" for _, values in columns[:2]),
            *(number(values[place]) for _, values in columns[2:]),
        ]
        for place, name in enumerate(run["tensors"])
    ]
    head = ["tensor", "shape", *(label for label, _ in columns)]
    return StudyTable(f"Gradients by tensor, {run['name']}", head, rows)


def _sizes(runs: Sequence[Result]) -> Chart:
    panels = []
    for name in _shown(runs):
        series = []
        for run in runs:
            masked = "overlap" in run
            for when in ("before", "after") if masked else ("before",):
                sizes = [row[run["tensors"].index(name)] for row in run["sizes"][when]]
                label = run["name"] + (f", {when} mask" if masked else "")
                series.append(Series(label, run["sizes"]["steps"], sizes))
        panels.append(Panel(series, "step", "mean |gradient|", name, limits=(0, None)))
    return Chart(
        "gradients-sizes",
        "Mean size of gradients over training",
        f"A panel for each of {len(panels)} weight tensors, from the input to the output; curves "
        "are means over stretches of the run.",
        panels,
        columns=2,
        width=8.4,
        height=2.7,
    )


def _moved(run: Result, serial: int) -> Chart:
    """The share of each tensor that moves, in the first and the last phase."""
    phases = run["phases"]
    kinds = [("above", f"|gradient| > {FIXED},\n% of weights")]
    if all("global" in phase for phase in phases.values()):
        kinds.insert(0, ("global", "free with one threshold\nfor the network, %"))
    panels = []
    for kind, label in kinds:
        series = [
            Series(
                f"{phase} tenth",
                range(len(run["tensors"])),
                of["above"][FIXED] if kind == "above" else of[kind],
                line=False,
            )
            for phase, of in phases.items()
        ]
        if kind == "global":
            layer = [share for share in phases["last"]["layer"] if share is not None]
            mean, ends = sum(layer) / len(layer), [0, len(run["tensors"]) - 1]
            series.append(Series("a threshold for each tensor", ends, [mean] * 2, reference=True))
        names = [name.removesuffix(".weight") for name in run["tensors"]]
        panels.append(Panel(series, y=label, categories=names, limits=(-3, 103)))
    return Chart(
        f"gradients-moved-{serial}",
        f"Weights of {run['name']} that move, by tensor, in the first and the last tenth",
        "A mark for each tensor, from the input to the output.",
        panels,
        width=8.4,
        height=3.2,
    )


def _often(run: Result, serial: int) -> Chart:
    often = run["frequency"]
    bars = len(often["all"]["histogram"])
    middles = [100 * (place + 0.5) / bars for place in range(bars)]
    series = [Series("all weights", middles, often["all"]["histogram"])]
    series += [
        Series(name, middles, often["tensors"][name]["histogram"])
        for name in _shown([run])
        if name in often["tensors"]
    ]
    series.append(Series("independent masks", middles, often["chance"], reference=True))
    return Chart(
        f"gradients-conserved-{serial}",
        f"How often weights of {run['name']} are held back",
        f"{often['all']['never']:.1f} % of the weights are never held back, "
        f"{often['all']['always']:.1f} % always.",
        [Panel(series, f"how often, % of {often['records']:,} records", "weights, %")],
    )


def _again(run: Result, serial: int) -> Chart:
    before = run["overlap"]["record_before"]
    kinds = [(before, f"after {run['every']:,} steps")]
    if run["every"] > 1 and run["overlap"]["step_before"]:
        kinds.insert(0, (run["overlap"]["step_before"], "after one step"))
    series = [
        Series(label, [part["step"] for part in parts], [part["again"] for part in parts])
        for parts, label in kinds
    ]
    chance = [part["chance"] for part in before]
    steps = [part["step"] for part in before]
    series.append(Series("independent masks", steps, chance, reference=True))
    return Chart(
        f"gradients-overlap-{serial}",
        f"Weights of {run['name']} that a later mask holds back again",
        f"From {before[0]['again']:.1f} % at first to {before[-1]['again']:.1f} % at last; "
        f"independent masks: {chance[-1]:.1f} %.",
        [Panel(series, "step", "held back again, %", limits=(0, 100))],
    )


gradients: Study = STUDIES.register(NAME)(
    Study(
        NAME,
        "Gradients and mask",
        "How large are the gradients of each layer over training, which weights move, and are the "
        "same ones held back again and again?",
        "cure train RECIPE training.record_gradients=20 --run RUN; cure analyse gradients RUN",
        RunStudyOptions,
        compute,
        view,
    )
)
