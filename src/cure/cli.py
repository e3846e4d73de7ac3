"""The command ``cure``: parses and prints, nothing else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cure.allocator import keep_freed_memory
from cure.errors import ConfigError, CureError, RanksLost, TrainingStopped
from cure.ranks import launched

if TYPE_CHECKING:
    from rich.progress import TaskID

    from cure.comparison import Table as ComparisonTable

FAILED_CHECK = 1
USER_MISTAKE = 2
INTERRUPTED = 130
UNFINISHED = 3
# Seconds in which the launcher ends the other ranks of a run once the first one has spoken.
SECONDS_FOR_THE_FIRST = 15

MOST_COLUMNS = 4
"""Attacks that a table of results has columns for; more have rows."""

TOGETHER = ("train", "resume", "evaluate")
"""Commands that several ranks may run together."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make an image classifier withstand adversarial changes and keep its natural accuracy.",
)
# Of several processes that train together only the first one speaks.
SEVERAL = os.environ.get("WORLD_SIZE", "1") != "1"
QUIET = SEVERAL and os.environ.get("RANK", "0") != "0"
# Written to a file or a pipe, a table keeps its rows whole.
out = Console(quiet=QUIET) if sys.stdout.isatty() else Console(width=160, quiet=QUIET)
err = Console(stderr=True, quiet=QUIET)


class Checkpoint(StrEnum):
    """Which weights of a run."""

    best = "best"
    last = "last"


class Split(StrEnum):
    """Which images."""

    train = "train"
    validation = "validation"
    test = "test"


class Precision(StrEnum):
    """What attacks compute in."""

    fp32 = "fp32"
    bf16_attack = "bf16_attack"


class Kind(StrEnum):
    """What can be listed."""

    methods = "methods"
    models = "models"
    recipes = "recipes"
    attacks = "attacks"
    corruptions = "corruptions"
    data = "data"
    settings = "settings"


RunOption = Annotated[
    Path | None,
    # torchrun takes --run for one of its own options, wherever it stands.
    typer.Option("--run", "--folder", help="Folder to make for the run (default: runs/NAME)."),
]


# What `evaluate`, `diagnose` and `corruptions` say of a target and its images.
TargetArgument = Annotated[
    str | None, typer.Argument(help="A run folder; or name a network with --model.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="A network: `cure list models`, package.module:callable, hf:..., timm:..."),
]
WeightsOption = Annotated[Path | None, typer.Option(help="Weights file for --model.")]
OptionsOption = Annotated[
    list[str] | None, typer.Option(help="Option of --model, for example width=16; repeatable.")
]
MeanOption = Annotated[
    str | None, typer.Option(help="What --model subtracts from its input: 0.49,0.48,0.45")
]
StdOption = Annotated[str | None, typer.Option(help="What --model divides its input by.")]
CheckpointOption = Annotated[Checkpoint, typer.Option(help="Weights of a run.")]
DataOption = Annotated[
    str | None, typer.Option(help="Images (default: those of the run); see `cure list data`.")
]
DataOptionsOption = Annotated[
    list[str] | None, typer.Option(help="Key of the data section: resize=32; repeatable.")
]
SplitOption = Annotated[Split, typer.Option(help="Which images.")]
LimitOption = Annotated[int | None, typer.Option(help="Only the first so many images.")]
EpsilonOption = Annotated[str | None, typer.Option(help="Radius, 8/255 (default: the run's).")]
NormOption = Annotated[str | None, typer.Option(help="Linf, L2 or L1 (default: the run's).")]
BatchSizeOption = Annotated[int | None, typer.Option(help="Images attacked at once.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
OutputOption = Annotated[Path | None, typer.Option(help="JSON file to write.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A name from `cure list recipes`, or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change: training.epochs=10"),
    ] = None,
    run: RunOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only where the run is.")] = False,
) -> None:
    """Train by a recipe into a new run folder."""
    from cure.api import train as start

    done = start(recipe, settings or [], run=run, quiet=quiet)
    _print_ended(done.path)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a run that was stopped.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only where the run is.")] = False,
) -> None:
    """Continue a run that was stopped or killed, to the bits it would have ended with."""
    from cure.api import resume as go_on
    from cure.run_folder import RunFolder

    finished = RunFolder.open(run).status()["state"] == "finished"
    done = go_on(run, quiet=quiet)
    if finished:
        err.print(f"{run} had already finished; nothing was changed", markup=False)
    _print_ended(done.path)


@app.command()
def evaluate(
    target: TargetArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    option: OptionsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    checkpoint: CheckpointOption = Checkpoint.best,
    data: DataOption = None,
    data_option: DataOptionsOption = None,
    split: SplitOption = Split.test,
    limit: LimitOption = None,
    attacks: Annotated[
        str | None, typer.Option(help="For example natural,pgd20,cw,autoattack.")
    ] = None,
    epsilon: EpsilonOption = None,
    norm: NormOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed of random starts.")] = 0,
    precision: Annotated[
        Precision, typer.Option(help="bf16_attack: less time; what fools is verified in fp32.")
    ] = Precision.fp32,
    transfer: Annotated[
        str | None, typer.Option(help="Run that the attack transfer crafts on.")
    ] = None,
    curve: Annotated[
        str | None, typer.Option(help="Also accuracy over epsilon, by this attack: pgd20.")
    ] = None,
    epsilons: Annotated[
        str | None, typer.Option(help="Radii of the curve: 1/255,2/255 (default: up to 0 %).")
    ] = None,
    output: OutputOption = None,
    robustbench: Annotated[
        Path | None, typer.Option(help="Write RobustBench's record of the model.")
    ] = None,
    adversarial: Annotated[
        Path | None, typer.Option(help="Write the worst-case images (.pt), for --verify.")
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(help="Instead: recompute what such a file claims and check its images."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Stop attacking after so long and say what is missing; the same command goes on.",
        ),
    ] = None,
) -> None:
    """Measure accuracy on natural and on attacked images."""
    from cure.api import evaluate as measure

    named = _named(target, model, weights, option, mean, std)
    if verify is not None:
        from cure.api import verify as recompute

        _print_verification(
            recompute(
                verify,
                named,
                data=data,
                split=split.value,
                epsilon=epsilon,
                norm=norm,
                checkpoint=checkpoint.value,
                weights=weights,
                mean=_numbers("mean", mean),
                std=_numbers("std", std),
                options=_pairs(option),
                data_options=_pairs(data_option),
                batch_size=batch_size or 256,
                device=device,
                output=output,
            )
        )
        return
    with _progress() as progress:
        result = measure(
            named,
            data=data,
            split=split.value,
            limit=limit,
            attacks=attacks,
            epsilon=epsilon,
            norm=norm,
            checkpoint=checkpoint.value,
            weights=weights,
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            options=_pairs(option),
            data_options=_pairs(data_option),
            batch_size=batch_size,
            device=device,
            seed=seed,
            precision=precision.value,
            transfer=transfer,
            curve=curve,
            epsilons=_words(epsilons),
            output=output,
            robustbench=robustbench,
            adversarial=adversarial,
            time_limit=time_limit,
            progress=progress,
        )
    print_results([result])
    _print_distances(result)
    for check in result["diagnosis"]["checks"]:
        if check["status"] != "pass":
            err.print(
                f"warning: {check['name']}: {check['meaning']}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    present, known = result["data"]["classes_present"], len(result["data"]["classes"])
    if present < known:
        err.print(
            f"warning: these {result['data']['n']:,} images hold only {present} of the {known} "
            "classes; the images may be sorted by class: leave out --limit",
            markup=False,
            highlight=False,
        )
    if "unfinished" in result:
        _print_unfinished(result, kept=target is not None or output is not None)
        sys.exit(UNFINISHED)


@app.command()
def corruptions(
    target: TargetArgument = None,
    severity: Annotated[str, typer.Option(help="1 to 5: 3, 1,3 or 1-5.")] = "1-5",
    only: Annotated[
        str | None, typer.Option(help="Only these: fog,snow; see `cure list corruptions`.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="For the mean corruption error: a file that --output wrote, or a name."),
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Picture to write: .png.")] = None,
    files: Annotated[
        str | None,
        typer.Option(help="Read CIFAR-10-C or CIFAR-100-C: folder of .npy files, or hub name."),
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    option: OptionsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    checkpoint: CheckpointOption = Checkpoint.best,
    data: DataOption = None,
    data_option: DataOptionsOption = None,
    split: SplitOption = Split.test,
    limit: LimitOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images classified at once.")] = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the corruptions.")] = 0,
    output: OutputOption = None,
) -> None:
    """Measure accuracy under 19 natural corruptions: noise, blur, weather, digital."""
    from cure.corruption.measure import corruptions as measure

    named = _named(target, model, weights, option, mean, std)
    with _progress() as progress:
        result = measure(
            named,
            severity=severity,
            only=only,
            files=files,
            baseline=baseline,
            sheet=sheet,
            data=data,
            split=split.value,
            limit=limit,
            checkpoint=checkpoint.value,
            weights=weights,
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            options=_pairs(option),
            data_options=_pairs(data_option),
            batch_size=batch_size,
            device=device,
            seed=seed,
            output=output,
            progress=progress,
        )
    _print_corruptions(result)


@app.command()
def diagnose(
    target: TargetArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    option: OptionsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    checkpoint: CheckpointOption = Checkpoint.best,
    data: DataOption = None,
    data_option: DataOptionsOption = None,
    split: SplitOption = Split.test,
    limit: Annotated[int, typer.Option(help="Only the first so many images.")] = 200,
    epsilon: EpsilonOption = None,
    norm: NormOption = None,
    transfer: Annotated[
        str | None, typer.Option(help="Another run: its adversarial images are tried, too.")
    ] = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    output: OutputOption = None,
) -> None:
    """Check whether accuracy under attack can be believed; status 1 when a check fails."""
    from cure.diagnosis.verb import diagnose as examine

    named = _named(target, model, weights, option, mean, std)
    with _progress() as progress:
        result = examine(
            named,
            data=data,
            split=split.value,
            limit=limit,
            epsilon=epsilon,
            norm=norm,
            checkpoint=checkpoint.value,
            weights=weights,
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            options=_pairs(option),
            data_options=_pairs(data_option),
            transfer=transfer,
            batch_size=batch_size,
            device=device,
            seed=seed,
            output=output,
            progress=progress,
        )
    _print_diagnosis(result)
    if result["verdict"] == "fail":
        raise typer.Exit(FAILED_CHECK)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Run folders, results of `cure evaluate --output`, tables of this command (JSON).",
        ),
    ],
    columns: Annotated[
        str | None, typer.Option(help="Columns to show: natural,pgd20,nrr_cw,seconds_per_epoch.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(help="Column to sort by; by default NRR of the strongest attack.")
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Evaluations on these images; by default test, if there.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write: .md, .csv or .json.")] = None,
) -> None:
    """Set evaluated runs side by side, seeds of one method together, like against like."""
    from cure.comparison import compare as side_by_side

    done = side_by_side(
        runs, columns=columns, sort=sort, split=split.value if split else None, output=output
    )
    _print_table(done)


@app.command("table")
def table_(
    plan: Annotated[Path, typer.Argument(help="YAML file: a recipe, and rows that differ.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results (default: that of the plan).")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time on this machine.")] = 1,
    cluster: Annotated[
        str | None, typer.Option(help="Instead: slurm (through submitit), or local to try it.")
    ] = None,
    cluster_option: Annotated[
        list[str] | None,
        typer.Option(help="Parameter of submitit: slurm_partition=gpu, timeout_min=600."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Only these rows and what they need.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds: 0,1.")] = None,
) -> None:
    """Train and evaluate all runs of a plan that are not done yet; write their table."""
    from cure.plan import (
        Executor,
        LocalExecutor,
        carry_out_plan,
        cluster_executor,
        read_plan,
        write_tables,
    )

    made = read_plan(plan)
    folder = plan.parent if output is None else output
    executor: Executor = (
        LocalExecutor(jobs)
        if cluster is None
        else cluster_executor(cluster, Path(made.runs) / "jobs", _pairs(cluster_option))
    )
    failures = carry_out_plan(
        made,
        folder,
        executor,
        only=_words(only),
        seeds=_whole_numbers("seeds", seeds),
        tell=lambda line: out.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    shown = write_tables(made, folder)
    if shown is not None:
        _print_table(shown)
    if failures:
        raise TrainingStopped(f"{len(failures)} of the plan's runs failed: " + "; ".join(failures))


@app.command("list")
def list_(what: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what can be named in a recipe or on the command line."""
    from cure.listing import listing

    rows = listing(what.value)
    width = max(len(name) for name, _ in rows)
    for name, description in rows:
        # A row a line, whatever the terminal's width, so that grep finds whole rows.
        typer.echo(f"{name:<{width}}  {description}")


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A name from `cure list recipes`, or a YAML file.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")
    ] = None,
) -> None:
    """Print every setting of a recipe as it would run, in YAML."""
    from cure.recipe import dump, load_recipe

    typer.echo(dump(load_recipe(recipe, settings or [])), nl=False)


@app.command()
def demo(run: RunOption = None) -> None:
    """Handwritten digits: train naturally, make robust with CURE, evaluate both (a minute)."""
    from cure.api import evaluate as measure
    from cure.api import train as start

    done = start("digits", run=run)
    results = []
    for folder in (done.path / "natural", done.path):
        with _progress() as progress:
            results.append(measure(folder, output=folder / "evaluation.json", progress=progress))
    print_results(results)
    _print_ended(done.path)


def _named(target: str | None, model: str | None, *of_model: object) -> str:
    """What a command is to look at: a run, or the name of a network with what goes with it."""
    if target is not None and model is None:
        if any(of_model):
            raise ConfigError("--weights, --option, --mean and --std go with --model")
        return target
    if model is not None and target is None:
        return model
    raise ConfigError("expected a run folder, or --model NAME, and not both")


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """A table of results of one threat, one row each; intervals are Wilson's at 95 %."""
    threat, data = results[0]["threat"], results[0]["data"]
    shown = [result["attacks"] | result.get("unfinished", {}) for result in results]
    names = list(dict.fromkeys(name for attacks in shown for name in attacks))
    table = Table(
        title=escape(
            f"{data['name']} {data['split']}, {data['n']:,} images, "
            f"{threat['norm']} {threat['epsilon_text']}"
        ),
        caption="accuracy in percent, 95 % interval; NRR: harmonic mean with natural accuracy",
    )
    if len(results) == 1 and len(names) > MOST_COLUMNS:
        _by_attack(table, results[0], shown[0])
        return
    table.add_column("model")
    for name in ("natural", *names):
        table.add_column(name, justify="right")
    ratios = [name for name in ("cw", "autoattack") if name in names]
    for name in ratios:
        table.add_column(f"NRR {name}", justify="right")
    for result, attacks in zip(results, shown, strict=True):
        cells = [result["natural"], *(attacks.get(name) for name in names)]
        table.add_row(
            escape(result["target"]),
            *(_accuracy(cell) for cell in cells),
            *(_ratio(result["nrr"][name]) for name in ratios),
        )
    out.print(table)


def _by_attack(table: Table, result: dict[str, Any], attacks: dict[str, Any]) -> None:
    """One row an attack, where there are too many for columns."""
    table.caption = "accuracy in percent, 95 % interval; the worst case is over all, image by image"
    for heading in (escape(result["target"]), "accuracy", "seconds"):
        table.add_column(heading, justify="left" if table.columns == [] else "right")
    rows = {"natural": result["natural"]} | attacks
    if "worst_case" in result:
        rows["worst case"] = result["worst_case"]
    for name, part in rows.items():
        table.add_row(escape(name), _accuracy(part), f"{part.get('seconds', 0):,.0f}")
    out.print(table)


def _print_distances(result: dict[str, Any]) -> None:
    """Smallest changes and the curve over epsilon, where they were measured."""
    for name, part in result["attacks"].items():
        if "median_distance" in part:
            low, high = (_distance(limit) for limit in part["median_interval"])
            out.print(
                f"{name}: the median image is fooled by a change of "
                f"{_distance(part['median_distance'])} ({low} to {high})",
                markup=False,
                highlight=False,
            )
    if "curve" not in result:
        return
    table = Table(title=f"accuracy over epsilon, {escape(result['curve']['attack'])}")
    for heading in ("epsilon", "accuracy"):
        table.add_column(heading, justify="right")
    for point in result["curve"]["points"]:
        table.add_row(point["epsilon_text"], _accuracy(point))
    out.print(table)


def _distance(length: float | None) -> str:
    return "none found" if length is None else f"{length:.4g}"


def _print_verification(result: dict[str, Any]) -> None:
    """Whether a claim holds; status 1 when it does not."""
    low, high = result["interval"]
    out.print(
        f"{result['correct']:,} of {result['n']:,} images are right: {result['accuracy']:.2f} % "
        f"({low:.1f} to {high:.1f}); largest change {result['largest_change']:.6f}, epsilon "
        f"{result['threat']['epsilon']:.6f} ({result['threat']['norm']})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if result["outside"]:
        say = f"{result['outside']:,} images leave the ball or [0, 1]; they prove nothing"
        err.print(f"the claim fails: {say}", markup=False, highlight=False, soft_wrap=True)
    elif not result["holds"]:
        err.print(
            f"the claim fails: it says {result['claimed_correct']:,} right",
            markup=False,
            highlight=False,
        )
    if not result["holds"]:
        sys.exit(1)


def _print_unfinished(result: dict[str, Any], kept: bool) -> None:
    """What the time did not suffice for."""
    for name, part in result["unfinished"].items():
        low, high = part["bounds"]
        where = f" in {part['stopped_in']}" if part["stopped_in"] != name else ""
        err.print(
            f"unfinished: {name} ran out of time{where}; {part['undecided']:,} of {part['n']:,} "
            f"images are undecided, so its accuracy lies between {low:.1f} and {high:.1f}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if kept:
        err.print("the same command goes on where this one stopped", markup=False, highlight=False)


def _print_corruptions(result: dict[str, Any]) -> None:
    """A row a corruption with its severities and their mean; then groups and means."""
    data, severities = result["data"], result["settings"]["severities"]
    errors = result["mce"]
    table = Table(
        title=escape(f"{result['target']}: {data['name']} {data['split']}, {data['n']:,} images"),
        caption="accuracy in percent, 95 % interval"
        + ("; CE: error in percent of the baseline's" if errors else ""),
    )
    for heading in ("", "group"):
        table.add_column(heading)
    for heading in (*map(str, severities), "mean", *(["CE"] if errors else [])):
        table.add_column(heading, justify="right")
    blank = [""] * len(severities)
    if result["natural"] is not None:
        table.add_row("natural", "", *blank, _accuracy(result["natural"]))
    for name, cell in result["corruptions"].items():
        cells = [f"{cell['severities'][str(s)]['accuracy']:.1f}" for s in severities]
        own = [f"{errors['corruptions'][name]:.1f}"] if errors else []
        table.add_row(name, cell["group"], *cells, _accuracy(cell), *own)
    table.add_section()
    for group, cell in result["groups"].items():
        table.add_row(f"mean of {len(cell['over'])}", group, *blank, _accuracy(cell))
    cells = [f"{result['severities'][str(s)]['accuracy']:.1f}" for s in severities]
    table.add_row(f"mean of {len(result['corruptions'])}", "", *cells)
    for kind, title in (
        ("benchmark", "mean of the 15"),
        ("all", "mean of all 19"),
        ("cure", "CURE's 17, severity 3"),
    ):
        cell = result["means"][kind]
        own = [f"{errors[kind]:.1f}"] if errors and errors.get(kind) is not None else []
        if cell is not None:
            table.add_row(title, "", *blank, _accuracy(cell), *own)
    out.print(table)
    for name, reason in result["settings"]["left_out"].items():
        err.print(f"left out: {name} ({reason})", markup=False, highlight=False)


def _print_diagnosis(result: dict[str, Any]) -> None:
    """A line a check with its numbers, then what is not in order and what to do about it."""
    table = Table(
        title=escape(
            f"{result['target']}: {result['verdict']} ({result['n']:,} images of "
            f"{result['data']['name']} {result['data']['split']}, "
            f"{result['norm']} {result['epsilon_text']})"
        )
    )
    for heading in ("check", "status", "measured"):
        table.add_column(heading)
    colours = {"pass": "green", "warn": "yellow", "fail": "red"}
    for item in result["checks"]:
        numbers = _in_words(item["measured"])
        status = f"[{colours[item['status']]}]{item['status']}[/]"
        table.add_row(item["name"], status, escape(numbers))
    out.print(table)
    for item in result["checks"]:
        if item["status"] != "pass":
            line = f"{item['status']} {item['name']}: {item['meaning']}"
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, why in result["left_out"].items():
        line = f"left out {name}: {why}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _in_words(measured: dict[str, Any]) -> str:
    """Numbers with their names in a line, without those that are not there."""
    words = []
    for name, value in measured.items():
        if isinstance(value, dict):
            words += [f"{name.replace('_', ' ')} ({_in_words(value)})"]
        elif value is not None and value != []:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            words += [f"{name.replace('_', ' ')} {shown}"]
    return ", ".join(words)


def _print_table(shown: ComparisonTable) -> None:
    table = Table(caption=escape(shown.caption))
    for number, heading in enumerate(shown.header()):
        table.add_column(escape(heading), justify="right" if number else "left")
    for cells in shown.cells():
        table.add_row(*map(escape, cells))
    out.print(table)


def _accuracy(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if "bounds" in cell:
        low, high = cell["bounds"]
        return f"unfinished: {low:.1f} to {high:.1f}"
    low, high = cell["interval"]
    return f"{cell['accuracy']:.1f} ({low:.1f}-{high:.1f})"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _print_ended(path: Path) -> None:
    out.print(f"run folder: {path}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"next: cure evaluate {path}", markup=False, highlight=False, soft_wrap=True)


def _say(word: str, error: CureError) -> None:
    """One message on stderr, whichever of the ranks of a run the error is on.

    What ends all ranks is the first one's to say: the launcher ends the others meanwhile.  What one
    of the others has to say then is its own.
    """
    if not QUIET:
        err.print(f"{word}: {error}", markup=False, highlight=False, soft_wrap=True, style="bold")
        return
    if not isinstance(error, RanksLost):
        time.sleep(SECONDS_FOR_THE_FIRST)
    print(f"{word} (rank {os.environ['RANK']}): {error}", file=sys.stderr, flush=True)


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.strip("[]() ").replace(",", " ").split()]
    except ValueError:
        raise ConfigError(
            f"--{name}: expected numbers such as 0.49,0.48,0.45, got '{text}'"
        ) from None


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _whole_numbers(name: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(word) for word in _words(text) or ()]
    except ValueError:
        raise ConfigError(f"--{name}: expected whole numbers such as 0,1, got '{text}'") from None


def _pairs(words: list[str] | None) -> dict[str, object]:
    from cure.recipe import parse_override

    return dict(parse_override(word) for word in words or [])


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar an attack on a terminal, a line an attack elsewhere."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    bars: dict[str, TaskID] = {}
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:

        def tell(name: str, done: int, count: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=count)
            progress.update(bars[name], completed=done)
            if done >= count and not err.is_terminal:
                err.print(f"{name}: done on {count} images", highlight=False, markup=False)

        yield tell


@app.callback()
def _alone_or_together(context: typer.Context) -> None:
    if launched().world > 1 and context.invoked_subcommand not in TOGETHER:
        raise ConfigError(
            f"cure {context.invoked_subcommand} runs in one process, got {launched().world} ranks; "
            f"torchrun is for {', '.join(TOGETHER)}"
        )


def main() -> None:
    """Run the command; a user's mistake is one message and status 2."""
    keep_freed_memory()
    try:
        try:
            app()
        except SystemExit as ended:
            if SEVERAL and ended.code in (None, 0, UNFINISHED):
                from cure.engine import leave

                leave()
            raise
    except CureError as error:
        from cure.trainer import Interrupted

        stopped = isinstance(error, Interrupted)
        _say("stopped" if stopped else "error", error)
        status = INTERRUPTED if stopped else USER_MISTAKE
        if SEVERAL:
            # At once: the launcher looks for the first rank that ended, and gloo's threads, whose
            # other ends are going away, can abort an interpreter that takes its time to end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(INTERRUPTED)
