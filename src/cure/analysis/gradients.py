"""Gradients over training: their size by layer, which weights move, which are held back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from cure.analysis.study import STUDIES, Rows, Study, keep, unique
from cure.errors import CheckpointError, ConfigError
from cure.evaluation.runner import Progress, Result, no_progress
from cure.runs.folder import RunFolder
from cure.runs.records import GradientLine
from cure.runs.run import Run
from cure.training.gradient_logger import COUNTS
from cure.utils import plotting as drawing
from cure.utils.io import check_free
from cure.utils.plotting import Picture

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
        bars: of the histogram.

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


def by_chance(share: float, samples: int, bars: int = FREQUENCIES) -> list[float]:
    """The histogram of :func:`frequencies` that masks drawn anew at every step would have.

    Args:
        share: of weights conserved at a step, in [0, 1].
        samples: number of records.
        bars: of the histogram.
    """
    found = [0.0] * bars
    for count in range(samples + 1):
        logarithm = math.lgamma(samples + 1) - math.lgamma(count + 1)
        logarithm -= math.lgamma(samples - count + 1)
        if (share == 0 and count) or (share == 1 and count < samples):
            continue
        if 0 < share < 1:
            logarithm += count * math.log(share) + (samples - count) * math.log1p(-share)
        found[min(count * bars // samples, bars - 1)] += 100 * math.exp(logarithm)
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


def gradients(
    runs: str | Path | Run | Sequence[str | Path | Run],
    *,
    output: str | Path | None = None,
    progress: Progress = no_progress,
) -> Result:
    """Sizes of gradients, shares of weights that move, and what masks conserve, from records.

    Args:
        runs: runs, or their folders, trained with ``training.record_gradients``.
        output: a JSON file in the place of the first run's ``studies/``.
        progress: told (run, 1, 1).

    Returns:
        ``runs``: for each ``tensors`` and ``shapes``; ``sizes``: mean \\|gradient\\| by tensor,
        ``before`` and ``after`` the mask, averaged over stretches of the run that begin at
        ``steps``; ``phases``, "first" and "last": percent of the weights of each tensor that the
        optimiser is given a gradient for (``moved``), that a threshold a tensor (``layer``) and one
        for the network (``global``) leave free to move, and whose gradient is larger than fixed
        sizes (``above``); of a method with a mask also ``frequency`` (:func:`frequencies`, of all
        weights and by tensor, and :func:`by_chance`) and ``overlap`` (:func:`overlap`, with the
        record before, ``every`` steps, and with the step before).

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.

    Source: CURE, ICLR 2024, Figs. 6 and 10.  With one threshold a tensor the share that moves is
    100 - p percent in every tensor at all times, so the shares of Figs. 6b and 10, which differ by
    layer, can only come from one threshold for the network or from a fixed size.
    """
    check_free(output)
    targets = [runs] if isinstance(runs, str | Path | Run) else list(runs)
    if not targets:
        raise ConfigError("expected one or more runs")
    folders = [RunFolder.open(run.path if isinstance(run, Run) else run) for run in targets]
    body: Result = {"runs": []}
    names: list[str] = []
    for folder in folders:
        names.append(unique(folder.path.name, names))
        body["runs"].append(_studied(names[-1], folder))
        progress(names[-1], 1, 1)
    return keep("gradients", body, folder=folders[0], output=output)


def _studied(name: str, folder: RunFolder) -> Result:
    lines = [line.content() for line in folder.gradients()]
    full = [line for line in lines if "before" in line]
    if not full:
        raise ConfigError(
            f"{folder.path} recorded no gradients; train it with training.record_gradients=20, "
            "which records every 20 steps"
        )
    try:
        return _told(name, folder, lines[0], full, [line for line in lines if "again" in line])
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder.path / GradientLine.file} is damaged ({type(error).__name__}: {error}); "
            "restore it from a copy"
        ) from None


def _told(
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
        moved = free([line["mask"] for line in masked])
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


# What is told of a result.


def _ago(steps: int) -> str:
    return "the step before" if steps == 1 else f"{steps:,} steps before"


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


def _over_pairs(points: Sequence[Result], key: str) -> float:
    """Mean over all pairs of masks."""
    return float(
        sum(point[key] * point["pairs"] for point in points)
        / sum(point["pairs"] for point in points)
    )


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.1f} to {max(known):.1f} %" if known else "-"


def _findings(result: Result) -> list[str]:
    told = []
    for run in result["runs"]:
        name, first, last = run["name"], run["phases"]["first"], run["phases"]["last"]
        start, end = (_total(run, phase["before"]) for phase in (first, last))
        told.append(
            f"{name} ({run['method']}): the mean |gradient| of a weight goes from {start:.2g} in "
            f"the first tenth of the run to {end:.2g} in the last, before a mask "
            f"({run['records']:,} records, one every {run['every']:,} steps)."
        )
        beyond = [_total(run, phase["above"][FIXED]) for phase in (first, last)]
        told.append(
            f"{name}: {beyond[0]:.0f} % of the weights have a gradient larger than {FIXED} at "
            f"first and {beyond[1]:.0f} % at last."
        )
        if "layer" not in last:
            told.append(f"{name} holds no weight back: all weights move at every step.")
            continue
        after = [_total(run, phase["after"]) for phase in (first, last)]
        told.append(
            f"{name}: what it holds back leaves {100 * after[0] / start if start else 0:.0f} % of "
            f"the mean |gradient| at first and {100 * after[1] / end if end else 0:.0f} % at last."
        )
        at_first = f"{_range(first['global'])} at first and " if "global" in first else ""
        told.append(
            f"{name}: with a threshold a tensor, {_range(last['layer'])} of every tensor may move, "
            "at all times and by construction; with one threshold for the network, on the same "
            f"scores, by tensor {at_first}{_range(last['global'])} at last. Shares that differ by "
            "layer can only come from the second."
        )
        often = run["frequency"]
        if often is not None:
            told.append(
                f"{name}: over {often['records']:,} records {often['all']['never']:.1f} % of the "
                f"weights were never conserved and {often['all']['always']:.1f} % always; one is "
                f"conserved in {often['all']['mean']:.0f} % of the records on average."
            )
        for what, words in (
            ("step_before", "the step before"),
            ("record_before", _ago(run["every"])),
        ):
            found = run["overlap"][what]
            if not found or (what == "step_before" and run["every"] == 1):
                continue
            again, chance = (_over_pairs(found, key) for key in ("again", "chance"))
            pairs = sum(point["pairs"] for point in found)
            told.append(
                f"{name}: of the weights conserved {words} "
                f"{again:.1f} % are conserved again; masks drawn anew would give {chance:.1f} % "
                f"(means of {pairs:,} pairs of masks)."
            )
    return told


def _tables(result: Result) -> list[Rows]:
    header = ["run", "method", "records", "mean |gradient| first", "last", "after mask, last"]
    header += [f"beyond {FIXED} last, %", "conserved again, %", "by chance, %"]
    cells = []
    for run in result["runs"]:
        first, last = run["phases"]["first"], run["phases"]["last"]
        found = run.get("overlap", {}).get("record_before", ())
        cells.append(
            [
                *(run["name"], run["method"], f"{run['records']:,}"),
                *(f"{_total(run, phase['before']):.2g}" for phase in (first, last)),
                f"{_total(run, last['after']):.2g}",
                f"{_total(run, last['above'][FIXED]):.1f}",
                *(
                    f"{_over_pairs(found, key):.1f}" if found else "-"
                    for key in ("again", "chance")
                ),
            ]
        )
    tables = [Rows("Gradients", header, cells)]
    for run in result["runs"]:
        first, last = run["phases"]["first"], run["phases"]["last"]
        columns: list[tuple[str, Sequence[float | None]]] = [
            ("mean |gradient| first", first["before"]),
            ("last", last["before"]),
            (f"beyond {FIXED} first, %", first["above"][FIXED]),
            ("last, %", last["above"][FIXED]),
        ]
        for scope in ("layer", "global"):
            if scope in last and scope in first:
                columns += [
                    (f"{scope} threshold moves first, %", first[scope]),
                    ("last, %", last[scope]),
                ]
        rows = [
            [
                name,
                "x".join(map(str, run["shapes"][place])),
                *(
                    "-"
                    if values[place] is None
                    else f"{values[place]:{'.2g' if place_of < 2 else '.1f'}}"
                    for place_of, (_, values) in enumerate(columns)
                ),
            ]
            for place, name in enumerate(run["tensors"])
        ]
        head = ["tensor", "shape", *(label for label, _ in columns)]
        tables.append(Rows(f"Gradients by tensor, {run['name']}", head, rows))
    return tables


def _pictures(result: Result) -> list[Picture]:
    runs = result["runs"]
    pictures = [_sizes_picture(runs)] if _shown(runs) else []
    for number, run in enumerate(runs, 1):
        pictures.append(_moved_picture(run, number))
        if run.get("frequency") is not None:
            pictures.append(_frequency_picture(run, number))
        if run.get("overlap", {}).get("record_before"):
            pictures.append(_overlap_picture(run, number))
    return pictures


def _sizes_picture(runs: Sequence[Result]) -> Picture:
    shown = _shown(runs)
    rows = -(-len(shown) // 2)
    figure, panels = drawing.canvas(rows, 2, width=8.4, height=2.7 * rows, sharex=True)
    for axes, name in zip(panels, shown, strict=False):
        number = 0
        for run in runs:
            place = run["tensors"].index(name)
            masked = "mask" if "overlap" in run else None
            for when in ("before", "after") if masked else ("before",):
                label = run["name"] + (f", {when} the mask" if masked else "")
                sizes = [row[place] for row in run["sizes"][when]]
                axes.plot(
                    run["sizes"]["steps"],
                    sizes,
                    label=drawing.plain(label),
                    markevery=max(1, len(sizes) // 8),
                    **drawing.series(number),
                )
                number += 1
        axes.set_title(drawing.plain(name))
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes in panels[-2:]:
        axes.set_xlabel("step")
    for axes in panels[::2]:
        axes.set_ylabel("mean |gradient|")
    drawing.legend(panels[0], fontsize=8)
    ends = "; ".join(
        f"{run['name']} from {_total(run, run['phases']['first']['before']):.2g} to "
        f"{_total(run, run['phases']['last']['before']):.2g}"
        for run in runs
    )
    return drawing.picture(
        figure,
        "gradients-sizes",
        "Mean size of gradients over training",
        f"A panel for each of {len(shown)} weight tensors, from the input to the output; curves "
        f"are means over stretches of the run. Over all weights and before a mask: {ends}.",
    )


def _moved_picture(run: Result, number: int) -> Picture:
    """A dot a tensor: the share that moves, first and last phase."""
    phases = run["phases"]
    masked = all("global" in phase for phase in phases.values())
    matrices = [place for place, shape in enumerate(run["shapes"]) if len(shape) > 1]
    others = [place for place, shape in enumerate(run["shapes"]) if len(shape) <= 1]
    figure, panels = drawing.canvas(2 if masked else 1, 1, width=8.4, height=5.4 if masked else 3.4)
    kinds = [("global", "free with one threshold\nfor the network, %")] if masked else []
    kinds.append(("above", f"|gradient| beyond\n{FIXED}, % of weights"))
    for axes, (kind, label) in zip(panels, kinds, strict=True):
        for series, (phase, part) in enumerate(phases.items()):
            values = part["above"][FIXED] if kind == "above" else part[kind]
            for places, filled, what in (
                (matrices, True, "matrices"),
                (others, False, "scales and biases"),
            ):
                known = [place for place in places if values[place] is not None]
                axes.plot(
                    known,
                    [values[place] for place in known],
                    linestyle="none",
                    marker=drawing.MARKS[series],
                    color=drawing.COLOURS[series],
                    markerfacecolor=drawing.COLOURS[series] if filled else "none",
                    label=f"{phase} tenth, {what}",
                )
        if kind == "global":
            layer = [share for share in phases["last"]["layer"] if share is not None]
            axes.axhline(sum(layer) / len(layer), color=drawing.INK, linestyle=":", linewidth=1)
        axes.set_ylim(-3, 103)
        axes.set_ylabel(label)
        axes.set_xticks([])
    every = -(-len(matrices) // 32) or 1
    ticks = matrices[::every]
    labels = [drawing.plain(run["tensors"][place].removesuffix(".weight")) for place in ticks]
    panels[-1].set_xticks(ticks, labels, rotation=90, fontsize=8)
    drawing.legend(panels[0], fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    line = (
        " The dotted line is what a threshold a tensor leaves free: the same in every tensor."
        if masked
        else ""
    )
    ranges = (
        f" From {_range(phases['first']['global'])} by tensor at first to "
        f"{_range(phases['last']['global'])} at last."
        if masked
        else ""
    )
    return drawing.picture(
        figure,
        f"gradients-moved-{number}",
        f"Which weights of {run['name']} move, by tensor, in the first and the last tenth",
        f"A mark a tensor from the input to the output.{line}{ranges}",
    )


def _frequency_picture(run: Result, number: int) -> Picture:
    often = run["frequency"]
    bars = len(often["all"]["histogram"])
    middles = [100 * (place + 0.5) / bars for place in range(bars)]
    figure, (axes,) = drawing.canvas(width=7.2, height=3.8)
    axes.bar(
        middles,
        often["all"]["histogram"],
        width=92 / bars,
        color=drawing.COLOURS[7],
        alpha=0.4,
        hatch="//",
        edgecolor=drawing.INK,
        linewidth=0.6,
        label="all weights",
    )
    axes.plot(middles, often["chance"], color=drawing.INK, linestyle=":", label="masks drawn anew")
    for place, name in enumerate(_shown([run])):
        if name in often["tensors"]:
            shares = often["tensors"][name]["histogram"]
            axes.plot(middles, shares, label=drawing.plain(name), **drawing.series(place))
    axes.set_xlabel(f"how often a weight is conserved, % of {often['records']:,} records")
    axes.set_ylabel("weights, %")
    drawing.legend(axes, fontsize=8)
    return drawing.picture(
        figure,
        f"gradients-conserved-{number}",
        f"How often weights of {run['name']} are conserved",
        f"Bars: all weights; lines: a few tensors, and what masks drawn anew at each step would "
        f"give. {often['all']['never']:.1f} % are never conserved, {often['all']['always']:.1f} % "
        f"always; the mean is {often['all']['mean']:.1f} % of the records.",
    )


def _overlap_picture(run: Result, number: int) -> Picture:
    figure, (axes,) = drawing.canvas(width=7.2, height=3.6)
    ends = []
    for place, (what, label) in enumerate(
        (("step_before", "the step before"), ("record_before", _ago(run["every"])))
    ):
        points = run["overlap"][what]
        if not points or (what == "step_before" and run["every"] == 1):
            continue
        axes.plot(
            [point["step"] for point in points],
            [point["again"] for point in points],
            label=f"conserved {label}",
            markevery=max(1, len(points) // 12),
            **drawing.series(place),
        )
        ends.append(f"{label} {points[0]['again']:.1f} % at first and {points[-1]['again']:.1f} %")
    points = run["overlap"]["record_before"]
    axes.plot(
        [point["step"] for point in points],
        [point["chance"] for point in points],
        color=drawing.INK,
        linestyle=":",
        label="masks drawn anew",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("conserved again, %")
    axes.set_ylim(0, 100)
    drawing.legend(axes, fontsize=8)
    return drawing.picture(
        figure,
        f"gradients-overlap-{number}",
        f"How much of a mask of {run['name']} is found again",
        "Of the weights conserved before, the share conserved again: "
        + "; ".join(f"{words} at last" for words in ends)
        + f". Masks drawn anew would give {points[-1]['chance']:.1f} %.",
    )


STUDIES.register("gradients")(
    Study(
        "gradients",
        "Gradients and the mask",
        "How large are the gradients of each layer over training, which weights move, and are the "
        "same ones held back again and again?",
        "cure train RECIPE training.record_gradients=20 --run RUN; cure analyse gradients RUN",
        _findings,
        _tables,
        _pictures,
    )
)
