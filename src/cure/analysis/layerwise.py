"""What each block learns: update only some blocks of a natural network by adversarial training.

U-b: draw the blocks b of a naturally trained network anew, keep the rest as it is, train
adversarially, measure natural and robust accuracy; and the same without drawing anew.

Source: CURE, ICLR 2024, Section 3 and Appendix G (Figures 2, 4 and 11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from cure.analysis.render import StudyTable, View, accuracy, accuracy_series, listed, number
from cure.analysis.study import STUDIES, Study, save_result
from cure.config import RunConfig
from cure.data import load
from cure.errors import ConfigError, TrainingStopped
from cure.evaluation.runner import Progress, Result
from cure.experiments.executors import Executor, LocalExecutor
from cure.experiments.plan import Measurement, Plan, PlanRow
from cure.experiments.plan_work import answer, carry_out_plan, results_of
from cure.models.blocks import CLASSIFIER, STEM, blocks
from cure.models.build import network_of
from cure.recipe import check_kept, load_recipe, parse_override
from cure.runs.results import Accuracy, EvaluationRecord, RunRecord
from cure.utils.plotting import Chart, Panel, Series

NAME = "layerwise"
SETS = ("1", "2", "3", "4", "12", "23", "34", "123", "234", "all")
"""The paper's nine sets of blocks, and all."""

VARIANTS = {"reinitialised": "weights", "kept": "none"}
"""Whether the chosen blocks are reinitialised, and what ``layers.reinitialise`` says then."""

Learning = Literal["frozen", "updated"]
"""Whether something changes while other parts learn."""


@dataclass(frozen=True, kw_only=True)
class LayerwiseOptions:
    """Options of the study; what is trained but for the method is the recipe's.

    Attributes:
        output: folder of the study; its runs are in ``runs``, each resumable, and the natural
            network that all start from is one of them.  The same call continues it.
        sets: blocks that learn, as digits ("23") or "all"; by default the paper's, as far as the
            network has the blocks.
        variants: whether the blocks are reinitialised before training.
        stem: whether what comes before the first block learns with them (paper's text: frozen;
            released code: updated).
        statistics: whether BatchNorm of frozen blocks updates its statistics (released code:
            updated).
        method: how the blocks are trained; the paper: Madry's adversarial training.
        attack: measures robust accuracy.
        limit: only the first so many test images.
        jobs: runs at a time on this machine.
        executor: who trains instead of this machine.
        tell: receives a line for each run.
    """

    output: Annotated[str | Path, "Folder of the study; the same one continues."] = "layerwise"
    sets: Annotated[Sequence[str] | None, "Blocks that learn: 1,23,all (default: the paper's)."] = (
        None
    )
    variants: Annotated[Sequence[str], "Whether these are reinitialised first, or kept."] = (
        "reinitialised",
        "kept",
    )
    stem: Annotated[Learning, "What comes before the first block (released code: updated)."] = (
        "frozen"
    )
    statistics: Annotated[Learning, "BatchNorm of frozen blocks (released code: updated)."] = (
        "frozen"
    )
    method: Annotated[str, "How the blocks are trained."] = "at"
    attack: Annotated[str, "Measures robust accuracy."] = "pgd20"
    limit: Annotated[int | None, "Only the first so many test images."] = 1000
    jobs: Annotated[int, "Runs at a time."] = 1
    executor: Executor | None = None
    tell: Callable[[str], None] = lambda line: None  # noqa: ARG005


def compute(arguments: Sequence[str], options: LayerwiseOptions, progress: Progress) -> Result:  # noqa: ARG001
    """Train and evaluate the sets of blocks that are not done yet.

    Returns:
        ``rows``: for every run its set, variant, natural and robust accuracy on test images with
        interval, at its end (of the start with its best weights, as the others begin), robust
        accuracy on the last epoch's training batches and on validation images (their difference is
        how far it overfits), and share of weights that learnt.

    Raises:
        CureError: for every mistake a user can correct, and when runs fail; the others are kept.
    """
    recipe, *settings = arguments
    config = load_recipe(recipe, settings)
    parts = _parts(config)
    wanted = _sets(options.sets, parts)
    for name, given in (("sets", wanted), ("variants", options.variants)):
        if not given:
            raise ConfigError(f"{name}: expected one or more, got none; leave it out for the usual")
    for variant in options.variants:
        if variant not in VARIANTS:
            raise ConfigError(f"variants: expected reinitialised or kept, got '{variant}'")
    folder = Path(options.output)
    plan = _plan(recipe, settings, config, wanted, options)
    executor = options.executor or LocalExecutor(options.jobs)
    failures = carry_out_plan(plan, folder, executor, tell=options.tell)
    done = results_of(plan, folder)
    records = {
        label: done[name] for label in plan.rows if (name := f"{label}-seed{config.seed}") in done
    }
    if failures:
        raise TrainingStopped(f"{len(failures)} of the study's runs failed: " + "; ".join(failures))
    body = _result(records, parts, plan)
    return save_result(NAME, body, output=folder / f"{NAME}.json")


def _parts(config: RunConfig) -> dict[str, list[str]]:
    """The parts of the recipe's network, from images' kind alone."""
    with torch.random.fork_rng([]):
        return blocks(network_of(config, load(config.data, "train", limit=1).kind, None))


def _sets(sets: Sequence[str] | None, parts: Mapping[str, object]) -> list[str]:
    known = {part[1:] for part in parts if part not in (STEM, CLASSIFIER)}
    if sets is None:
        return [name for name in SETS if name == "all" or set(name) <= known]
    for name in sets:
        if name != "all" and (not name or not set(name) <= known or len(set(name)) < len(name)):
            raise ConfigError(
                f"sets: expected blocks of this network as digits, such as "
                f"{max(known, default='1')} or {''.join(sorted(known))}, or all; got '{name}'"
            )
    return list(dict.fromkeys(sets))


def _plan(
    recipe: str,
    settings: Sequence[str],
    config: RunConfig,
    sets: Sequence[str],
    options: LayerwiseOptions,
) -> Plan:
    """The study as a plan: the natural start, and a row a set and variant."""
    change = dict(parse_override(word) for word in settings)
    natural = {"method": "natural", "start": "scratch"}
    for key, value in config.natural.model_dump(exclude_none=True, mode="json").items():
        group = "training.optimizer" if key in ("learning_rate", "weight_decay") else "training"
        natural[f"{group}.{key}"] = value
    given = config.start != "natural"
    rows = {} if given else {"natural": PlanRow(settings=natural)}
    for variant in options.variants:
        for name in sets:
            update = [] if name == "all" else [f"B{digit}" for digit in name]
            rows[f"U-{name}-{variant}"] = PlanRow(
                settings={
                    "method": options.method,
                    "start": config.start if given else "run:natural",
                    "layers.update": update,
                    "layers.reinitialise": VARIANTS[variant],
                    "layers.stem": options.stem,
                    "layers.statistics": options.statistics,
                }
            )
    return Plan(
        name="layerwise",
        recipe=recipe,
        runs=str(Path(options.output) / "training"),
        settings=change,
        seeds=(config.seed,),
        evaluations=(
            Measurement(
                attacks=(options.attack,), limit=options.limit, checkpoints=("best", "last")
            ),
        ),
        rows=rows,
    )


def _result(
    records: Mapping[str, RunRecord], parts: Mapping[str, list[str]], plan: Plan
) -> dict[str, Any]:
    (measurement,) = plan.evaluations
    (attack,) = measurement.attacks
    measured = {label: _evaluations(label, record, plan) for label, record in records.items()}
    rows = []
    for label, record in records.items():
        best, last = measured[label]
        # The others begin with its best weights.
        shown = best if label == "natural" else last
        final = record.metrics[-1]
        assert final.validation is not None, "the last epoch is always validated"
        name, _, variant = label.removeprefix("U-").partition("-")
        rows.append(
            {
                "label": label,
                "set": None if label == "natural" else name,
                "variant": variant or None,
                "natural": _cell(shown.natural),
                "robust": _cell(shown.attacks[attack]),
                "best_robust": _cell(best.attacks[attack]),
                "best_epoch": record.best_epoch,
                # On batches as they are trained on: augmented, by the training attack.
                "training_robust": _percent(final.train.get("robust_accuracy")),
                "validation_robust": final.validation.robust,
            }
        )
    some = next(iter(records))
    data, threat = measured[some][0].data, measured[some][0].threat
    trained = [record.config for label, record in records.items() if label != "natural"]
    layers: dict[str, Any] = trained[0]["layers"] if trained else {}
    return {
        "blocks": {part: len(names) for part, names in parts.items()},
        "rows": rows,
        "attack": attack,
        "stem": layers.get("stem"),
        "statistics": layers.get("statistics"),
        "epochs": max(config["training"]["epochs"] for config in trained),
        "recipe": plan.recipe,
        "settings": plan.settings,
        "seed": records[some].seed,
        "data": data.content(),
        "threat": threat.content(),
        "model": records[some].config["model"],
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _evaluations(
    label: str, record: RunRecord, plan: Plan
) -> tuple[EvaluationRecord, EvaluationRecord]:
    """What the plan measures of the best weights and of the last ones, where these are others."""
    (measurement,) = plan.evaluations
    config = check_kept(record.config, label)
    best, last = (
        answer(record.of_best_weights(), measurement.of(checkpoint), config)
        for checkpoint in measurement.checkpoints
    )
    assert best is not None, "no run failed"
    return best, last or best


def _cell(part: Accuracy) -> dict[str, Any]:
    return {"accuracy": part.accuracy, "interval": part.interval, "n": part.n}


# -- what is shown ---------------------------------------------------------------------------------


def view(result: Result) -> View:
    """Accuracy of each set of blocks that learns."""
    rows, said = [], []
    for row in result["rows"]:
        gap = row["training_robust"]
        gap = None if gap is None else gap - row["validation_robust"]
        rows.append(
            [
                "start" if row["set"] is None else f"U-{row['set']}",
                row["variant"] or "",
                *(accuracy(row[what]) for what in ("natural", "robust", "best_robust")),
                str(row["best_epoch"]),
                number(gap, sign=True),
            ]
        )
    header = ["blocks", "variant", "natural, %", f"{result['attack']}, %"]
    header += ["at its best epoch, %", "best epoch", "training - validation, points"]
    title = f"Only some blocks learn: {result['data']['name']} test images after the last epoch"
    for variant in VARIANTS:
        own = [row for row in result["rows"] if row["variant"] == variant]
        best = max(own, key=lambda row: row["robust"]["accuracy"], default=None)
        # Of equal ones the last, so that two sets are named wherever there are two.
        worst = min(reversed(own), key=lambda row: row["robust"]["accuracy"], default=None)
        if best is not None and worst is not None:
            low, high = (f"U-{row['set']} {accuracy(row['robust'])}" for row in (worst, best))
            said.append(f"{variant} blocks " + (high if low == high else f"from {low} to {high}"))
    finding = (
        f"Robust accuracy ({result['attack']}, {result['threat']['norm']} "
        f"{result['threat']['epsilon_text']}, %): {listed(said)}; {result['epochs']} epochs, one "
        f"seed, {result['rows'][0]['natural']['n']:,} test images."
    )
    return View(finding, [StudyTable(title, header, rows)], [_chart(result)])


def _chart(result: Result) -> Chart:
    names = list(dict.fromkeys(row["set"] for row in result["rows"] if row["set"] is not None))
    panels = []
    for what in ("natural", "robust"):
        series = []
        for variant in VARIANTS:
            own = [row for row in result["rows"] if row["variant"] == variant]
            if own:
                places = [names.index(row["set"]) for row in own]
                parts = [row[what] for row in own]
                series.append(accuracy_series(variant, places, parts, line=False))
        for start in (row for row in result["rows"] if row["set"] is None):
            level = [start[what]["accuracy"]] * 2
            series.append(Series("natural start", [0, len(names) - 1], level, reference=True))
        panels.append(
            Panel(
                series,
                "blocks that learn" if what == "robust" else "",
                f"{what} accuracy, %",
                categories=[f"U-{name}" for name in names],
                limits=(0, None),
            )
        )
    said = f"Sets of blocks from {names[0]} to {names[-1]}, with 95 % intervals." if names else ""
    title = "Accuracy when only some blocks learn"
    return Chart("layerwise-accuracy", title, said, panels, width=7.2, height=2.6)


layerwise: Study = STUDIES.register(NAME)(
    Study(
        NAME,
        "Which blocks learn what",
        "What do natural and robust accuracy become when only some blocks learn to be robust?",
        "cure analyse layerwise cifar10-mini --output layerwise",
        LayerwiseOptions,
        compute,
        view,
        recipe=True,
    )
)
