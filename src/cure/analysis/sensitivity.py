"""How accuracy depends on settings: trials over a recipe, and the best exchanges they found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cure.analysis.render import (
    MISSING,
    StudyTable,
    View,
    accuracy,
    listed,
    number,
    with_interval,
)
from cure.analysis.study import STUDIES, Study, save_result
from cure.errors import ConfigError, Interrupted, counted
from cure.evaluation.runner import Progress, Result
from cure.experiments.executors import LocalExecutor, stopped_by_signals
from cure.experiments.pareto import undominated
from cure.experiments.sweep import Sweep, begin, fitting, read_varied, trials, work
from cure.recipe import check, override_all, parse_override, read_recipe
from cure.runs.folder import RunFolder
from cure.utils.plotting import Chart, Panel, Series
from cure.utils.stats import rank_correlation, wilson

NAME = "sensitivity"
AIMS = ("natural", "robust")
FEW = 20
"""Fewer trials leave most effects within chance."""


# -- the study -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions:
    """Options of the study.

    Attributes:
        output: folder of the trials and of the result, ``sensitivity.json``.
        vary: ``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log`` or ``KEY=A,B,C``; by default what the method
            declares.
        grid: so many values of each range, every combination of them.
        trials: in the place of a grid, so many trials in all, chosen by Optuna (default 30); where
            every setting lists its values and there are no more combinations, each is tried once.
            0 trains nothing and shows what is there.
        storage: URL of a database or a journal file, for workers that share no folder; by default
            a journal in ``output``.
        jobs: trials at once on this machine.
        seed: of Optuna's choices; the run's own seed is a setting.
    """

    output: Annotated[str | Path, "Folder of the trials; the same command continues in it."]
    vary: Annotated[
        list[str],
        "KEY=LOW:HIGH[:log] or KEY=A,B,C, as in method.percent=10:50; repeatable (default: what "
        "the method declares).",
    ] = field(default_factory=list)
    grid: Annotated[int | None, "So many values of each range, in all combinations."] = None
    trials: Annotated[
        int | None,
        "Or so many trials, chosen by Optuna (default 30, or all listed values; 0 only shows).",
    ] = None
    storage: Annotated[
        str | None, "sqlite:///FILE, postgresql://..., or a journal file, to share trials."
    ] = None
    jobs: Annotated[int, "Trials at a time on this machine."] = 1
    seed: Annotated[int, "Seed of Optuna's choices."] = 0


def compute(arguments: Sequence[str], options: SensitivityOptions, progress: Progress) -> Result:
    """Train a recipe with settings that vary: natural against robust accuracy.

    Both are those of the best epoch on the validation images; test images are not opened.  The same
    call continues where it was stopped, and repeats no finished trial; several calls at once share
    the work.

    Returns:
        ``trials`` with their settings, accuracies, whether they are on the Pareto front and their
        command; and ``correlations`` of each setting with both accuracies.
    """
    recipe, *settings = arguments
    grid, trials, jobs = options.grid, options.trials, options.jobs
    if grid is not None and trials is not None:
        raise ConfigError("expected a grid or a number of trials, got both; leave one out")
    if grid is not None and grid < 1:
        raise ConfigError(f"grid: expected 1 or more values of each range, got {grid}")
    if trials is not None and trials < 0:
        raise ConfigError(f"trials: expected 0 or more, got {trials}")
    raw = read_recipe(recipe)
    override_all(raw, map(parse_override, settings))
    config = check(raw, f"recipe {recipe}")
    words = list(options.vary) or [f"method.{word}" for word in config.method.sweep()]
    if not words:
        raise ConfigError(
            f"the method {config.method.name} does not say what to vary; name settings with --vary"
        )
    varied = fitting(raw, [read_varied(word) for word in words], f"recipe {recipe}")
    for one in varied:
        if one.key in [parse_override(word)[0] for word in settings]:
            raise ConfigError(f"{one.key} is both set and varied; leave one out")
    wanted = 30 if trials is None else trials
    output = Path(options.output)
    if grid is None and math.prod(len(one.choices) or math.inf for one in varied) <= wanted:
        grid = 1  # Drawing from a few listed values would repeat some and leave others out.
    sweep = Sweep(
        *(str(recipe), tuple(settings), varied, grid, wanted),
        *(options.seed, options.storage, output),
    )
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
        return save_result(NAME, _body(sweep), output=sweep.output / f"{NAME}.json")


def _body(sweep: Sweep) -> Result:
    """The trials of a sweep so far, as plain values."""
    config, found = sweep.config, trials(sweep)
    finished = [trial for trial in found if trial["state"] == "finished"]
    n = 0
    if finished:
        n = RunFolder.open(sweep.folder(finished[0]["number"])).validation_images()
    on_front = undominated([(trial["natural"], trial["robust"]) for trial in finished])
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


# -- what is shown ---------------------------------------------------------------------------------


def view(result: Result) -> View:
    """The front with its commands, all trials, and correlations."""
    keys, front_ = list(result["varied"]), _front(result)
    finished = _finished(result)
    where = f"{result['data']['name']} validation, n = {result['data']['n']:,}"
    head = ["trial", *keys, "natural, %", "robust, %", "state"]
    tables = [
        StudyTable(f"The front: {where}", head, [_row(trial, keys) for trial in front_]),
        StudyTable(f"All trials: {where}", head, [_row(t, keys) for t in result["trials"]]),
        StudyTable(
            "Rank correlation of each setting with accuracy (95 % interval)",
            ["setting", *AIMS],
            [
                [key, *(_correlation_text(parts[aim]) for aim in AIMS)]
                for key, parts in result["correlations"].items()
            ],
        ),
    ]
    counts = {
        state: sum(trial["state"] == state for trial in result["trials"])
        for state in ("failed", "repeated", "running", "waiting")
    }
    rest = "".join(f", {count} {state}" for state, count in counts.items() if count)
    if not finished:
        return View(f"No trial has finished yet{rest}.", tables)
    clear = [
        f"{key} {'raises' if part['rho'] > 0 else 'lowers'} {aim} accuracy"
        for key, parts in result["correlations"].items()
        for aim, part in parts.items()
        if part is not None and (part["interval"][0] > 0 or part["interval"][1] < 0)
    ]
    few = f" ({len(finished)} trials are few)" if len(finished) < FEW else ""
    finding = (
        f"{counted(len(finished), 'trial')} finished{rest}; {len(front_)} form the Pareto front of "
        f"natural and robust accuracy; clear effects: {listed(clear) or 'none'}{few}; accuracies "
        "are those of the best epoch on the images that chose it, so evaluate the chosen run on "
        "test images."
    )
    commands = [(f"trial {trial['number']}", trial["command"]) for trial in front_]
    return View(finding, tables, [_scatter(finished), _each(result, finished)], commands)


def _finished(result: Result) -> list[dict[str, Any]]:
    return [trial for trial in result["trials"] if trial["state"] == "finished"]


def _front(result: Result) -> list[dict[str, Any]]:
    chosen = [trial for trial in _finished(result) if trial["front"]]
    return sorted(chosen, key=lambda trial: (-trial["natural"]["accuracy"], trial["number"]))


def _row(trial: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    values = [trial["settings"].get(key, MISSING) for key in keys]
    return [
        str(trial["number"]),
        *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values),
        *(MISSING if trial[aim] is None else accuracy(trial[aim]) for aim in AIMS),
        trial["state"] if trial["reason"] is None else f"{trial['state']}: {trial['reason']}",
    ]


def _correlation_text(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return MISSING
    return f"{with_interval(part['rho'], part['interval'], 2, sign=True)}, n = {part['n']}"


def _scatter(finished: Sequence[Mapping[str, Any]]) -> Chart:
    groups = {
        good: sorted(
            (trial for trial in finished if bool(trial["front"]) == good),
            key=lambda trial: float(trial["natural"]["accuracy"]),
        )
        for good in (True, False)
    }
    series = [
        Series(
            "Pareto front" if good else "other trials",
            [trial["natural"]["accuracy"] for trial in group],
            [trial["robust"]["accuracy"] for trial in group],
            [trial["robust"]["interval"] for trial in group] if good else [],
            [trial["natural"]["interval"] for trial in group] if good else [],
            style=0 if good else 7,
            line=False,
        )
        for good, group in groups.items()
        if group
    ]
    at: dict[tuple[float, float], list[str]] = {}
    for trial in groups[True]:
        place = (trial["natural"]["accuracy"], trial["robust"]["accuracy"])
        at.setdefault(place, []).append(str(trial["number"]))
    said = listed(
        f"trial {trial['number']}: natural {number(trial['natural']['accuracy'])} %, robust "
        f"{number(trial['robust']['accuracy'])} %"
        for trial in groups[True]
    )
    panel = Panel(
        series,
        "natural accuracy, % of validation images",
        "robust accuracy, % of validation images",
        names=[(*place, ", ".join(numbers)) for place, numbers in at.items()],
    )
    title = "Natural against robust accuracy of all trials"
    description = f"{counted(len(finished), 'trial')}. The front: {said}."
    return Chart("sensitivity-front", title, description, [panel], height=4.2)


def _each(result: Result, finished: Sequence[Mapping[str, Any]]) -> Chart:
    panels = []
    for key, varied in result["varied"].items():
        values = [trial["settings"][key] for trial in finished]
        categories: list[str] = []
        if not all(isinstance(value, int | float) for value in values):
            categories = list(dict.fromkeys(map(str, [*varied.get("choices", ()), *values])))
            values = [categories.index(str(value)) for value in values]
        series = [
            Series(aim, values, [trial[aim]["accuracy"] for trial in finished], line=False)
            for aim in AIMS
        ]
        log = "x" if varied.get("log") else ""
        panels.append(Panel(series, key, "accuracy, %", categories=categories, log=log))
    columns = min(3, len(panels))
    return Chart(
        "sensitivity-each",
        "Accuracy of every trial over each setting",
        f"{counted(len(finished), 'trial')}, a mark for each.",
        panels,
        columns=columns,
        width=2.6 * columns + 1.2,
        height=2.6,
    )


sensitivity: Study = STUDIES.register(NAME)(
    Study(
        NAME,
        "Effect of settings",
        "How do natural and robust accuracy depend on settings, and which give the best of both?",
        "cure analyse sensitivity digits --grid 3 --output sweep",
        SensitivityOptions,
        compute,
        view,
        recipe=True,
    )
)
