"""How accuracy depends on settings: trials over a recipe, and the best exchanges they found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cure.analysis.study import STUDIES, Rows, Study, keep
from cure.errors import ConfigError
from cure.evaluation.runner import Progress, Result, no_progress
from cure.experiments.executors import LocalExecutor, stopped_by_signals
from cure.experiments.sweep import Sweep, begin, fitting, read_varied, trials, work
from cure.recipe import check, override, parse_override, read_recipe
from cure.training.trainer import Interrupted
from cure.utils import plotting as drawing
from cure.utils.plotting import Picture
from cure.utils.stats import rank_correlation, wilson

NAME = "sensitivity"
AIMS = ("natural", "robust")
FEW = 20
"""Trials below which a rank correlation is worth a warning."""


# -- numbers -------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: at least as good in both values and better in one.

    Args:
        points: pairs of which more is better, here natural and robust accuracy.

    Source: the Pareto front of two aims.
    """
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]


# -- the study -----------------------------------------------------------------------------------


def sensitivity(
    recipe: str | Path,
    settings: Sequence[str] = (),
    *,
    vary: Sequence[str] = (),
    grid: int | None = None,
    trials: int | None = None,
    storage: str | None = None,
    jobs: int = 1,
    seed: int = 0,
    output: str | Path,
    progress: Progress = no_progress,
) -> Result:
    """Train a recipe with settings that vary, and set natural against robust accuracy.

    Both are those of the best epoch on the validation images; test images are not opened.  The same
    call goes on where it was stopped, and does no finished trial again; several calls at once share
    the work.

    Args:
        recipe: a name or a file.
        settings: ``KEY=VALUE`` for all trials.
        vary: ``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log`` or ``KEY=A,B,C``; by default what the method
            declares.
        grid: so many values of each range, every combination of them.
        trials: in the place of a grid, so many trials in all, chosen by Optuna (default 30); 0
            trains nothing and tells what is there.
        storage: URL of a database or a journal file, for workers that share no folder; by default
            a journal in ``output``.
        jobs: trials at once on this machine.
        seed: of Optuna's choices; the run's own seed is a setting.
        output: folder of the trials and of the result, ``sensitivity.json``.
        progress: told trials done and trials wanted.

    Raises:
        CureError: for every mistake a user can mend; before the first trial where it can be known.
    """
    if grid is not None and trials is not None:
        raise ConfigError("expected a grid or a number of trials, got both; leave one out")
    if grid is not None and grid < 1:
        raise ConfigError(f"grid: expected 1 or more values of each range, got {grid}")
    if trials is not None and trials < 0:
        raise ConfigError(f"trials: expected 0 or more, got {trials}")
    raw = read_recipe(recipe)
    for word in settings:
        override(raw, *parse_override(word))
    config = check(raw, f"recipe {recipe}")
    words = list(vary) or [f"method.{word}" for word in config.method.sweep()]
    if not words:
        raise ConfigError(
            f"the method {config.method.name} does not say what to vary; name settings with --vary"
        )
    varied = fitting(raw, [read_varied(word) for word in words], f"recipe {recipe}")
    for one in varied:
        if one.key in [parse_override(word)[0] for word in settings]:
            raise ConfigError(f"{one.key} is both set and varied; leave one out")
    wanted = 30 if trials is None else trials
    sweep = Sweep(str(recipe), tuple(settings), varied, grid, wanted, seed, storage, Path(output))
    executor = LocalExecutor(jobs)
    begin(sweep)
    if jobs == 1:
        work(sweep, progress)
    else:
        with stopped_by_signals():
            try:
                for job in [executor.submit(work, sweep) for _ in range(jobs)]:
                    job.result()
            except KeyboardInterrupt:
                executor.cancel()
                raise Interrupted("the trials are stopped; the same command goes on") from None
            except BaseException:
                executor.cancel()
                raise
    with sweep.alone():
        return keep(NAME, _told(sweep), output=sweep.output / f"{NAME}.json")


def _told(sweep: Sweep) -> Result:
    """What there is of a sweep, plain values only."""
    config, found = sweep.config, trials(sweep)
    n = int(config.data.validation)
    finished = [trial for trial in found if trial["state"] == "finished"]
    on_front = front([(trial["natural"], trial["robust"]) for trial in finished])
    best = {trial["number"] for trial, good in zip(finished, on_front, strict=True) if good}
    for trial in found:
        trial["front"] = trial["number"] in best
        for aim in AIMS:
            if trial[aim] is not None:
                interval = list(wilson(round(trial[aim] * n / 100), n))
                trial[aim] = {"accuracy": trial[aim], "interval": interval}
    return {
        "recipe": sweep.recipe,
        "method": config.method.name,
        "settings": list(sweep.settings),
        "data": {"name": config.data.source, "split": "validation", "n": n},
        "threat": {"norm": config.threat.norm, "epsilon_text": config.threat.epsilon.text},
        "attack_steps": config.training.validation_steps,
        "varied": {
            one.key: {"choices": list(one.choices)}
            if one.choices
            else {"low": one.low, "high": one.high, "log": one.log}
            for one in sweep.varied
        },
        "grid": sweep.grid,
        "seed": sweep.seed,
        "trials": found,
        "correlations": {
            one.key: {aim: _correlation(one.key, aim, finished) for aim in AIMS}
            for one in sweep.varied
        },
    }


def _correlation(key: str, aim: str, finished: Sequence[Mapping[str, Any]]) -> Any:
    values = [trial["settings"][key] for trial in finished]
    if not all(isinstance(value, int | float) for value in values):
        return None
    return rank_correlation(values, [trial[aim]["accuracy"] for trial in finished])


# -- telling -------------------------------------------------------------------------------------


def _finished(result: Result) -> list[dict[str, Any]]:
    return [trial for trial in result["trials"] if trial["state"] == "finished"]


def _front(result: Result) -> list[dict[str, Any]]:
    chosen = [trial for trial in _finished(result) if trial["front"]]
    return sorted(chosen, key=lambda trial: (-trial["natural"]["accuracy"], trial["number"]))


def _accuracy(part: Mapping[str, Any]) -> str:
    low, high = part["interval"]
    return f"{part['accuracy']:.1f} ({low:.1f}-{high:.1f})"


def findings(result: Result) -> list[str]:
    """What came of the trials, the command line of each point of the front, what mattered."""
    finished, best, n = _finished(result), _front(result), result["data"]["n"]
    counts = {
        state: sum(trial["state"] == state for trial in result["trials"])
        for state in ("failed", "running", "waiting")
    }
    rest = "".join(f", {count} {state}" for state, count in counts.items() if count)
    if not finished:
        return [f"No trial has finished yet{rest}."]
    said = [
        f"{len(finished)} trials finished{rest}. {len(best)} of them form the front: no other "
        "trial is as good on natural and on attacked images and better on one (accuracy in "
        f"percent on n = {n:,} validation images, 95 % interval). Along it more natural accuracy "
        "costs robust accuracy; to choose a point, run its command."
    ]
    said += [
        f"trial {trial['number']}: natural {_accuracy(trial['natural'])}, robust "
        f"{_accuracy(trial['robust'])}: {trial['command']}"
        for trial in best
    ]
    count = len(finished)
    known = [
        (key, aim, part)
        for key, parts in result["correlations"].items()
        for aim, part in parts.items()
        if part is not None
    ]
    for key, aim, part in sorted(known, key=lambda one: -abs(one[2]["rho"])):
        low, high = part["interval"]
        if low > 0 or high < 0:
            way = "higher" if part["rho"] > 0 else "lower"
            said.append(
                f"The larger {key}, the {way} {aim} accuracy: rank correlation {part['rho']:+.2f} "
                f"({low:+.2f} to {high:+.2f}), n = {part['n']} trials."
            )
    unclear = [
        f"{key} with {aim}" for key, aim, p in known if p["interval"][0] <= 0 <= p["interval"][1]
    ]
    if unclear:
        said.append(
            f"Not told apart from chance with {count} trials (the interval of the rank correlation "
            f"holds 0): {', '.join(unclear)}."
        )
    if count < FEW:
        said.append(
            f"{count} trials are few: among as many settings that do nothing, chance alone gives "
            f"rank correlations up to about {min(1.0, 1.96 / math.sqrt(max(count - 1, 1))):.2f}."
        )
    said.append(
        "Each accuracy is that of the best epoch on the images that chose it, and the front takes "
        "the best of many trials, so they are somewhat too high. Evaluate the chosen run on test "
        "images."
    )
    return said


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tables(result: Result) -> list[Rows]:
    """The front; all trials; the correlations."""
    keys = list(result["varied"])

    def rows(chosen: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        return [
            [
                str(trial["number"]),
                *(_value(trial["settings"].get(key, "-")) for key in keys),
                *("-" if trial[aim] is None else _accuracy(trial[aim]) for aim in AIMS),
                trial["state"] if trial["reason"] is None else f"failed: {trial['reason']}",
            ]
            for trial in chosen
        ]

    head = ["trial", *keys, "natural, %", "robust, %", "state"]
    where = f"{result['data']['name']} validation, n = {result['data']['n']:,}"
    found = [
        Rows(f"The front: {where}", head, rows(_front(result))),
        Rows(f"All trials: {where}", head, rows(result["trials"])),
    ]
    cells = [
        [key, *(_told_correlation(parts[aim]) for aim in AIMS)]
        for key, parts in result["correlations"].items()
    ]
    title = "Rank correlation of each setting with accuracy (95 % interval)"
    return [*found, Rows(title, ["setting", *AIMS], cells)]


def _told_correlation(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "-"
    low, high = part["interval"]
    return f"{part['rho']:+.2f} ({low:+.2f} to {high:+.2f}), n = {part['n']}"


def pictures(result: Result) -> list[Picture]:
    """Natural against robust accuracy of all trials; both over each setting."""
    finished = _finished(result)
    if not finished:
        return []
    return [_scatter(result, finished), _by_setting(result, finished)]


def _scatter(result: Result, finished: Sequence[Mapping[str, Any]]) -> Picture:
    best = _front(result)
    figure, (axes,) = drawing.canvas(height=4.2)
    others = [trial for trial in finished if not trial["front"]]
    if others:
        x, y = ([trial[aim]["accuracy"] for trial in others] for aim in AIMS)
        axes.plot(x, y, "o", color=drawing.COLOURS[7], markerfacecolor="none", label="other trials")
    x, y = ([trial[aim]["accuracy"] for trial in best] for aim in AIMS)
    spread = [
        [
            [trial[aim]["accuracy"] - trial[aim]["interval"][0] for trial in best],
            [trial[aim]["interval"][1] - trial[aim]["accuracy"] for trial in best],
        ]
        for aim in AIMS
    ]
    axes.errorbar(
        *(x, y, spread[1], spread[0]),
        fmt="none",
        ecolor=drawing.COLOURS[0],
        elinewidth=0.7,
        alpha=0.6,
    )
    axes.plot(x, y, "-s", color=drawing.COLOURS[0], label="front, with 95 % intervals")
    labels: dict[tuple[float, float], list[str]] = {}
    for trial, across, up in zip(best, x, y, strict=True):
        labels.setdefault((across, up), []).append(str(trial["number"]))
    for point, numbers in labels.items():
        axes.annotate(
            ", ".join(numbers),
            point,
            xytext=(5, 5),
            textcoords="offset points",
            color=drawing.INK,
            parse_math=False,
        )
    axes.set_xlabel("natural accuracy, % of validation images")
    axes.set_ylabel("robust accuracy, % of validation images")
    drawing.legend(axes)
    words = "; ".join(
        f"trial {t['number']}: natural {t['natural']['accuracy']:.1f} %, robust "
        f"{t['robust']['accuracy']:.1f} %"
        for t in best
    )
    return drawing.picture(
        figure,
        "sensitivity-front",
        "Natural against robust accuracy of all trials",
        f"{len(finished)} trials, n = {result['data']['n']:,} validation images each. "
        f"The front: {words}.",
    )


def _by_setting(result: Result, finished: Sequence[Mapping[str, Any]]) -> Picture:
    keys = list(result["varied"])
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, panels = drawing.canvas(
        rows, columns, width=2.4 * columns + 1.2, height=2.4 * rows + 0.4
    )
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    for panel, key in zip(panels, keys, strict=False):
        values = [trial["settings"][key] for trial in finished]
        named = not all(isinstance(value, int | float) for value in values)
        if named:
            known = list(dict.fromkeys(map(str, result["varied"][key]["choices"])))
            values = [known.index(str(value)) for value in values]
            panel.set_xticks(range(len(known)), known, parse_math=False)
        for number, aim in enumerate(AIMS):
            look = drawing.series(number) | {"linestyle": "none", "markerfacecolor": "none"}
            panel.plot(values, [trial[aim]["accuracy"] for trial in finished], label=aim, **look)
        if result["varied"][key].get("log"):
            low, high = (result["varied"][key][end] for end in ("low", "high"))
            ticks = [low, math.sqrt(low * high), high]
            panel.set_xscale("log")
            panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            panel.set_xticks([], minor=True)
        panel.set_xlabel(key, parse_math=False)
    panels[0].set_ylabel("accuracy, %")
    drawing.legend(panels[0])
    return drawing.picture(
        figure,
        "sensitivity-each",
        "Accuracy of every trial over each setting",
        f"{len(finished)} trials; rank correlations: "
        + "; ".join(
            f"{key} with {aim} {part['rho']:+.2f}"
            for key, parts in result["correlations"].items()
            for aim, part in parts.items()
            if part is not None
        )
        + ".",
    )


STUDIES.register(NAME)(
    Study(
        name=NAME,
        title="What the settings do",
        question="How do natural and robust accuracy depend on settings, and which give the best "
        "of both?",
        command="cure analyse sensitivity digits --grid 3 --output sweep",
        findings=findings,
        tables=tables,
        pictures=pictures,
    )
)
