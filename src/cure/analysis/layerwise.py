"""What each block learns: update only some blocks of a natural network by adversarial training.

U-b: draw the blocks b of a naturally trained network anew, keep the rest as it is, train
adversarially, measure natural and robust accuracy; and the same without drawing anew.

Source: CURE, ICLR 2024, Section 3 and Appendix G (Figures 2, 4 and 11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from cure.analysis.study import STUDIES, Rows, Study, keep
from cure.config import RunConfig
from cure.data import load
from cure.errors import ConfigError, TrainingStopped
from cure.evaluation.runner import Result
from cure.experiments.executors import Executor, LocalExecutor
from cure.experiments.plan import Measurement, Plan, PlanRow, carry_out_plan, results_of
from cure.models.blocks import CLASSIFIER, STEM, blocks
from cure.models.build import network_of
from cure.recipe import load_recipe, parse_override
from cure.utils.plotting import INK, Picture, canvas, legend, picture

SETS = ("1", "2", "3", "4", "12", "23", "34", "123", "234", "all")
"""The paper's nine sets of blocks, and all."""

TOLD = {"reinitialised": "Blocks drawn anew", "kept": "Blocks kept"}

VARIANTS = {"reinitialised": "weights", "kept": "none"}
"""Whether the chosen blocks are drawn anew, and what ``layers.reinitialise`` says then."""

HATCHES = {"reinitialised": "", "kept": "///"}


def layerwise(
    recipe: str,
    settings: Sequence[str] = (),
    *,
    output: str | Path,
    sets: Sequence[str] | None = None,
    variants: Sequence[Literal["reinitialised", "kept"]] = ("reinitialised", "kept"),
    stem: Literal["frozen", "updated"] = "frozen",
    statistics: Literal["frozen", "updated"] = "frozen",
    method: str = "at",
    attack: str = "pgd20",
    limit: int | None = 1000,
    executor: Executor | None = None,
    tell: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> Result:
    """Train and evaluate the sets of blocks that are not done yet.

    Args:
        recipe: what is trained but for the method: data, network, epochs.
        settings: changes to it, ``training.epochs=5``.
        output: folder of the study; its runs are in ``runs``, each resumable, and the natural
            network that all start from is one of them.  The same call goes on where it stopped.
        sets: blocks that learn, as digits ("23") or "all"; by default the paper's, as far as the
            network has the blocks.
        variants: whether the blocks are drawn anew before training.
        stem: whether what comes before the first block learns with them (paper's text: frozen;
            released code: updated).
        statistics: whether BatchNorm of frozen blocks goes on with its statistics (released code:
            updated).
        method: how the blocks are trained; the paper: Madry's adversarial training.
        attack: measures robust accuracy.
        limit: only the first so many test images.
        executor: who trains; by default this machine, a run at a time.
        tell: told a line a run.

    Returns:
        ``rows``: for every run its set, variant, natural and robust accuracy on test images with
        interval, robust accuracy on the last epoch's training batches and on validation images
        (their difference is how far it overfits), and share of weights that learnt.

    Raises:
        CureError: for every mistake a user can mend, and when runs fail; the others are kept.
    """
    config = load_recipe(recipe, list(settings))
    parts = _parts(config)
    wanted = _sets(sets, parts)
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigError(f"variants: expected reinitialised or kept, got '{variant}'")
    folder = Path(output)
    plan = _plan(
        recipe, settings, folder, config, wanted, variants, stem, statistics, method, attack, limit
    )
    failures = carry_out_plan(plan, folder, executor or LocalExecutor(1), tell=tell)
    done = results_of(plan, folder)
    records = {
        label: done[name].content()
        for label in plan.rows
        if (name := f"{label}-seed{config.seed}") in done
    }
    if failures:
        raise TrainingStopped(f"{len(failures)} of the study's runs failed: " + "; ".join(failures))
    return keep("layerwise", _result(records, parts, plan, attack), output=_file(folder))


def _file(folder: Path) -> Path:
    return folder / "layerwise.json"


def _parts(config: RunConfig) -> dict[str, list[str]]:
    """The parts of the recipe's network, from images' kind alone."""
    with torch.random.fork_rng([]):
        return blocks(network_of(config, load(config.data, "train").kind, None))


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
    folder: Path,
    config: RunConfig,
    sets: Sequence[str],
    variants: Sequence[str],
    stem: str,
    statistics: str,
    method: str,
    attack: str,
    limit: int | None,
) -> Plan:
    """The study as a plan: the natural start, and a row a set and variant."""
    change = dict(parse_override(word) for word in settings)
    natural = {"method": "natural", "start": "scratch"}
    for key, value in config.natural.model_dump(exclude_none=True, mode="json").items():
        group = "training.optimizer" if key in ("learning_rate", "weight_decay") else "training"
        natural[f"{group}.{key}"] = value
    given = config.start != "natural"
    rows = {} if given else {"natural": PlanRow(settings=natural)}
    for variant in variants:
        for name in sets:
            update = [] if name == "all" else [f"B{digit}" for digit in name]
            rows[f"U-{name}-{variant}"] = PlanRow(
                settings={
                    "method": method,
                    "start": config.start if given else "run:natural",
                    "layers.update": update,
                    "layers.reinitialise": VARIANTS[variant],
                    "layers.stem": stem,
                    "layers.statistics": statistics,
                }
            )
    return Plan(
        name="layerwise",
        recipe=recipe,
        runs=str(folder / "training"),
        settings=change,
        seeds=(config.seed,),
        evaluations=(Measurement(attacks=(attack,), limit=limit, checkpoints=("best", "last")),),
        rows=rows,
    )


def _result(
    records: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, list[str]],
    plan: Plan,
    attack: str,
) -> dict[str, Any]:
    rows = []
    for label, record in records.items():
        last = _evaluation(record, "last")
        best = _evaluation(record, "best")
        final = record["metrics"][-1]
        name, _, variant = label.removeprefix("U-").partition("-")
        rows.append(
            {
                "label": label,
                "set": None if label == "natural" else name,
                "variant": variant or None,
                "natural": _accuracy(last["natural"]),
                "robust": _accuracy(last["attacks"][attack]),
                "best_robust": _accuracy(best["attacks"][attack]),
                "best_epoch": record["best_epoch"],
                # On batches as they are trained on: augmented, by the training attack.
                "training_robust": _percent(final["train"].get("robust_accuracy")),
                "validation_robust": final["validation"]["robust"],
            }
        )
    some = next(iter(records.values()))
    layers: dict[str, Any] = next(
        (r["config"]["layers"] for n, r in records.items() if n != "natural"), {}
    )
    return {
        "blocks": {part: len(names) for part, names in parts.items()},
        "rows": rows,
        "attack": attack,
        "stem": layers.get("stem"),
        "statistics": layers.get("statistics"),
        "epochs": max(
            r["config"]["training"]["epochs"] for n, r in records.items() if n != "natural"
        ),
        "recipe": plan.recipe,
        "settings": plan.settings,
        "seed": some["seed"],
        "data": some["evaluations"][0]["data"],
        "threat": some["evaluations"][0]["threat"],
        "model": some["config"]["model"],
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _evaluation(record: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """The evaluation of one checkpoint; of the best where the last is the same."""
    by_checkpoint = {e["model"]["checkpoint"]: e for e in record["evaluations"]}
    found: dict[str, Any] = by_checkpoint.get(checkpoint, by_checkpoint["best"])
    return found


def _accuracy(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {key: cell[key] for key in ("accuracy", "interval", "n") if key in cell}


# -- how it is told ------------------------------------------------------------------------------


def _of(result: Result, variant: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["variant"] == variant]


def _variants(result: Result) -> list[str]:
    return [variant for variant in VARIANTS if _of(result, variant)]


def _gap(row: Mapping[str, Any]) -> float | None:
    """By how much a run does better on what it trains on than on new images."""
    training: float | None = row["training_robust"]
    return None if training is None else training - float(row["validation_robust"])


def findings(result: Result) -> list[str]:
    """A result in sentences."""
    count = result["rows"][0]["natural"]["n"]
    sentences = [
        f"{len(result['rows'])} networks, {result['epochs']} epochs, seed {result['seed']}, "
        f"{count:,} test images of {result['data']['name']}, {result['attack']} at "
        f"{result['threat']['norm']} {result['threat']['epsilon_text']}; one seed is an anecdote."
    ]
    start = next((row for row in result["rows"] if row["set"] is None), None)
    if start is not None:
        sentences.append(
            f"The natural network that all start from: {start['natural']['accuracy']:.1f} % "
            f"natural, {start['robust']['accuracy']:.1f} % robust."
        )
    for variant in _variants(result):
        rows = [row for row in _of(result, variant) if row["set"] != "all"]
        if len(rows) < 2:
            continue
        for what in ("natural", "robust"):
            best = max(rows, key=lambda row: row[what]["accuracy"])
            worst = min(rows, key=lambda row: row[what]["accuracy"])
            sentences.append(
                f"{TOLD[variant]}: {what} accuracy is highest for U-{best['set']} "
                f"({_shown(best[what])}) and lowest for U-{worst['set']} ({_shown(worst[what])})."
            )
        everything = next((row for row in _of(result, variant) if row["set"] == "all"), None)
        both = [
            row["set"]
            for row in rows
            if everything is not None
            and all(row[k]["accuracy"] > everything[k]["accuracy"] for k in ("natural", "robust"))
        ]
        if everything is not None:
            sentences.append(
                f"{TOLD[variant]}: better than updating all blocks in both ("
                f"{_shown(everything['natural'])} natural; {_shown(everything['robust'])} robust): "
                f"{', '.join(f'U-{name}' for name in both) or 'no set'}."
            )
        gaps = {row["set"]: gap for row in _of(result, variant) if (gap := _gap(row)) is not None}
        if gaps:
            least, most = min(gaps, key=gaps.__getitem__), max(gaps, key=gaps.__getitem__)
            sentences.append(
                f"{TOLD[variant]}: the gap of robust accuracy between training batches and "
                f"validation images is smallest for U-{least} ({gaps[least]:+.1f} points) and "
                f"largest for U-{most} ({gaps[most]:+.1f})."
            )
    return sentences


def _shown(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{cell['accuracy']:.1f} %, {low:.1f} to {high:.1f}"


def tables(result: Result) -> list[Rows]:
    """A result in tables."""
    cells = []
    for row in result["rows"]:
        gap = _gap(row)
        cells.append(
            [
                "start" if row["set"] is None else f"U-{row['set']}",
                row["variant"] or "",
                *(_in_cell(row[what]) for what in ("natural", "robust", "best_robust")),
                str(row["best_epoch"]),
                "-" if gap is None else f"{gap:+.1f}",
            ]
        )
    header = ["blocks", "variant", "natural, %", f"{result['attack']}, %"]
    header += ["at its best epoch, %", "best epoch", "training - validation, points"]
    title = f"Only some blocks learn: {result['data']['name']} test images after the last epoch"
    return [Rows(title, header, cells)]


def _in_cell(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{cell['accuracy']:.1f} ({low:.1f}-{high:.1f})"


def pictures(result: Result) -> list[Picture]:
    """A result in drawings."""
    names = list(dict.fromkeys(row["set"] for row in result["rows"] if row["set"] is not None))
    start = next((row for row in result["rows"] if row["set"] is None), None)
    variants = _variants(result)
    figure, axes = canvas(2, 1, width=7.2, height=5.2, sharex=True)
    for panel, what, colour in zip(
        axes, ("natural", "robust"), ("#0072b2", "#d55e00"), strict=True
    ):
        width = 0.8 / len(variants)
        for number, variant in enumerate(variants):
            own = {row["set"]: row[what] for row in _of(result, variant)}
            at = [names.index(name) + (number - (len(variants) - 1) / 2) * width for name in own]
            high = [cell["accuracy"] for cell in own.values()]
            errors = [
                [cell["accuracy"] - cell["interval"][0] for cell in own.values()],
                [cell["interval"][1] - cell["accuracy"] for cell in own.values()],
            ]
            panel.bar(
                at,
                high,
                width,
                yerr=errors,
                color=colour,
                alpha=0.9 if not number else 0.5,
                hatch=HATCHES[variant],
                label=variant,
                error_kw={"ecolor": INK, "capsize": 2, "elinewidth": 1},
            )
        if start is not None:
            level = start[what]["accuracy"]
            panel.axhline(level, color=INK, linestyle=":", linewidth=1, label="natural start")
        panel.set_ylabel(f"{what} accuracy, %")
        panel.set_ylim(0, 100 if what == "natural" else None)
        legend(panel, loc="upper right", ncols=3, fontsize=8)
    axes[-1].set_xticks(range(len(names)), [f"U-{name}" for name in names])
    axes[-1].set_xlabel("blocks that learn")
    told = "; ".join(
        f"U-{row['set']} {row['variant']}: {row['natural']['accuracy']:.1f} natural, "
        f"{row['robust']['accuracy']:.1f} robust"
        for row in result["rows"]
        if row["set"] is not None
    )
    return [
        picture(figure, "layerwise-accuracy", "Accuracy when only some blocks learn", told + ".")
    ]


STUDIES.register("layerwise")(
    Study(
        "layerwise",
        "Which blocks learn what",
        "What do natural and robust accuracy become when only some blocks learn to be robust?",
        "cure analyse layerwise cifar10-mini --output layerwise",
        findings,
        tables,
        pictures,
    )
)
