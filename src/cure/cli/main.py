"""The command ``cure``: parses and prints, nothing else."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cure.cli.analyse import analyse
from cure.cli.options import (
    EpsilonOption,
    NormOption,
    OutputOption,
    RecipeArgument,
    SettingsArgument,
    numbers,
    pairs,
    whole_numbers,
    with_options,
    words,
)
from cure.cli.printing import (
    QUIET,
    SEVERAL,
    err,
    out,
    print_corruptions,
    print_diagnosis,
    print_evaluation,
    print_replay,
    print_results,
    print_table,
    print_verification,
    say,
    show_progress,
    warn,
)
from cure.errors import (
    ConfigError,
    CureError,
    CureNote,
    Interrupted,
    ModelError,
    OutOfMemory,
    RanksLost,
    TrainingStopped,
)
from cure.utils.launcher import launched
from cure.utils.memory import keep_freed_memory

FAILED_CHECK = 1
USER_MISTAKE = 2
INTERRUPTED = 130
UNFINISHED = 3
NOT_MET = 4
# Seconds in which the launcher ends the other ranks of a run after the first one has ended.
SECONDS_FOR_THE_FIRST = 15

TOGETHER = ("train", "resume", "evaluate")
"""Commands that several ranks may run together."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make an image classifier withstand adversarial changes and keep its natural accuracy.",
)
app.add_typer(analyse, name="analyse")


Kind = StrEnum(
    "Kind",
    ["methods", "models", "recipes", "attacks", "corruptions", "data", "studies", "settings"],
)
Precision = StrEnum("Precision", ["fp32", "bf16_attack"])
ExportFormat = StrEnum("ExportFormat", ["onnx", "safetensors", "torch-export", "hub"])
Split = StrEnum("Split", ["train", "validation", "test"])

RunOption = Annotated[
    Path | None,
    # torchrun takes --run for one of its own options, wherever it stands.
    typer.Option("--run", "--folder", help="Folder to make for the run (default: runs/NAME)."),
]


JobsOption = Annotated[int, typer.Option(help="So many at a time on this machine.")]
ClusterOption = Annotated[
    str | None,
    typer.Option(help="Instead: slurm (through submitit; local to try it), or ray."),
]
ClusterParameter = Annotated[
    list[str] | None,
    typer.Option(
        help="Parameter of the cluster: slurm_partition=gpu, timeout_min=600, num_gpus=1."
    ),
]


@app.command()
def train(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
    run: RunOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only where the run is.")] = False,
) -> None:
    """Train by a recipe into a new run folder."""
    from cure.training.run import train as start

    done = start(recipe, settings or [], run=run, quiet=quiet)
    _print_ended(done.path, quiet)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    settings: SettingsArgument = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only where the run is.")] = False,
) -> None:
    """Continue a run that was stopped, bit-identically; or a finished one, for more epochs."""
    from cure.runs.folder import RunFolder
    from cure.training.run import resume as go_on

    finished = RunFolder.open(run).status().finished and not settings
    done = go_on(run, settings or [], quiet=quiet)
    if finished:
        err.print(f"{run} had already finished; nothing was changed", markup=False)
    _print_ended(done.path, quiet or finished)


@app.command()
@with_options(texts={"batch_size": "Images attacked at once.", "seed": "Seed of random starts."})
def evaluate(
    target: str,
    options: dict[str, Any],
    attacks: Annotated[
        str | None,
        typer.Option(help="For example pgd20,cw,autoattack; auto: what fits into --time-limit."),
    ] = None,
    epsilon: EpsilonOption = None,
    norm: NormOption = None,
    precision: Annotated[
        Precision, typer.Option(help="bf16_attack: less time; what fools is verified in fp32.")
    ] = Precision.fp32,
    transfer: Annotated[
        str | None, typer.Option(help="Run on which the attack transfer makes its images.")
    ] = None,
    float_: Annotated[
        str | None,
        typer.Option(
            "--float", help="Of an ONNX file: the run it is of, to make images with gradients on."
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Least accuracy: natural>=75, pgd20>=40; repeatable; else status 4."),
    ] = None,
    require_lower_bound: Annotated[
        bool,
        typer.Option("--require-lower-bound", help="Of the intervals' lower ends."),
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the requirements as JUnit XML.")] = None,
    sarif: Annotated[Path | None, typer.Option(help="Write the requirements as SARIF.")] = None,
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
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Also attack in the other norms, at customary radii.")
    ] = False,
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Also prove accuracy in Linf by interval bounds.")
    ] = False,
    smoothing: Annotated[
        float | None,
        typer.Option(
            metavar="SIGMA", help="Also certify the network that Gaussian noise smooths: 0.25."
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Share the images among so many jobs: see --jobs and --cluster."),
    ] = None,
    jobs: JobsOption = 1,
    cluster: ClusterOption = None,
    cluster_option: ClusterParameter = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Only the job 2/8, for another scheduler; --shards 8 then merges."),
    ] = None,
) -> None:
    """Measure accuracy on natural and on attacked images."""
    from cure.evaluation import evaluate as api
    from cure.evaluation.evaluate import is_unfinished
    from cure.evaluation.gate import write_junit, write_sarif
    from cure.utils.io import check_free

    if (junit or sarif or require_lower_bound) and not require:
        raise ConfigError("--junit, --sarif and --require-lower-bound go with --require")
    for file in (junit, sarif):
        check_free(file)
    if verify is not None:
        print_verification(
            api.verify(verify, target, epsilon=epsilon, norm=norm, output=output, **options)
        )
        return
    arguments: dict[str, Any] = {
        "attacks": attacks,
        "epsilon": epsilon,
        "norm": norm,
        "precision": precision.value,
        "transfer": transfer,
        "float_network": float_,
        "require": require or (),
        "require_lower_bound": require_lower_bound,
        "curve": curve,
        "epsilons": words(epsilons),
        "robustbench": robustbench,
        "adversarial": adversarial,
        "time_limit": time_limit,
        "unseen": unseen,
        "bounds": bounds,
        "smoothing": smoothing,
        **options,
    }
    if shards is not None and shard is None:
        from cure.experiments.executors import executor_for
        from cure.experiments.sharded import evaluate_in_shards

        if output is None:
            raise ConfigError("shards are merged into a file; name it: --output result.json")
        executor = executor_for(
            jobs, cluster, output.with_name(f"{output.name}.jobs"), pairs(cluster_option) or {}
        )
        result = evaluate_in_shards(
            target, shards, output=output, executor=executor, tell=say, **arguments
        )
    else:
        if jobs != 1 or cluster is not None or cluster_option:
            raise ConfigError("--jobs, --cluster and --cluster-option go with --shards; add it")
        with show_progress() as progress:
            result = api.evaluate(
                target, output=output, shard=shard, shards=shards, progress=progress, **arguments
            )
        if shard is not None:
            say(f"shard {shard}: {result['images']} images, kept in {result['file']}")
            return
    print_evaluation(result, kept=output is not None or "checkpoint" in result["model"])
    if not QUIET and junit is not None:
        write_junit(junit, result)
    if not QUIET and sarif is not None:
        write_sarif(sarif, result, target)
    if is_unfinished(result):
        sys.exit(UNFINISHED)
    if not all(row["met"] for row in result.get("requirements", ())):
        sys.exit(NOT_MET)


@app.command()
@with_options(
    texts={"batch_size": "Images classified at once.", "seed": "Seed of the corruptions."}
)
def corruptions(
    target: str,
    options: dict[str, Any],
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
    output: OutputOption = None,
) -> None:
    """Measure accuracy under 19 natural corruptions: noise, blur, weather, digital."""
    from cure.evaluation.corruptions.measure import corruptions as measure

    with show_progress() as progress:
        result = measure(
            target,
            severity=severity,
            only=only,
            files=files,
            baseline=baseline,
            sheet=sheet,
            output=output,
            progress=progress,
            **options,
        )
    print_corruptions(result)


@app.command()
@with_options(texts={"batch_size": "Images attacked at once."}, limit=200)
def diagnose(
    target: str,
    options: dict[str, Any],
    epsilon: EpsilonOption = None,
    norm: NormOption = None,
    transfer: Annotated[
        str | None, typer.Option(help="Another run: its adversarial images are tried, too.")
    ] = None,
    output: OutputOption = None,
) -> None:
    """Check whether accuracy under attack can be believed; status 1 when a check fails."""
    from cure.evaluation.diagnosis.api import diagnose as check

    with show_progress() as progress:
        result = check(
            target,
            epsilon=epsilon,
            norm=norm,
            transfer=transfer,
            output=output,
            progress=progress,
            **options,
        )
    print_diagnosis(result)
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
    """Compare evaluated runs in a table; seeds of one method share a row."""
    from cure.experiments.compare import compare as side_by_side

    done = side_by_side(
        runs, columns=columns, sort=sort, split=split.value if split else None, output=output
    )
    print_table(done)


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Run folders; results of `cure evaluate`, `corruptions`, `diagnose`, `analyse`.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="New file (default: report.html in the first run, which is replaced)."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading (default: names of the runs).")] = None,
    evidence: Annotated[
        bool,
        typer.Option(
            "--evidence",
            help="For a reviewer of one run: evidence.html, evidence.pdf and SHA256SUMS in it.",
        ),
    ] = False,
    sign: Annotated[
        Path | None,
        typer.Option(help="With --evidence: private SSH key that signs SHA256SUMS."),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(help="With --evidence: test images of the calibration (default 200)."),
    ] = None,
) -> None:
    """Write one HTML page with the settings and results of runs."""
    if evidence:
        _write_evidence(runs, output, sign, calibration_images, title)
        return
    if sign is not None or calibration_images is not None:
        raise ConfigError("--sign and --calibration-images go with --evidence; add it")
    from cure.report.page import write_report

    made = write_report(runs, output=output, title=title)
    say(f"report: {made}")


def _write_evidence(
    runs: list[str], output: Path | None, sign: Path | None, images: int | None, title: str | None
) -> None:
    """``cure report --evidence``."""
    from cure.report.evidence import CALIBRATION_IMAGES, write_evidence

    if len(runs) != 1 or output is not None:
        raise ConfigError("--evidence takes one run and writes into its folder; leave out --output")
    count = CALIBRATION_IMAGES if images is None else images
    made = write_evidence(runs[0], sign=sign, calibration_images=count, title=title)
    for name in ("page", "pdf", "hashes", "signature"):
        if (path := getattr(made, name)) is not None:
            say(f"{name}: {path}")
    for note in made.notes:
        say(note)


@app.command("table")
def table_(
    plan: Annotated[Path, typer.Argument(help="YAML file: a recipe, and rows that differ.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results (default: that of the plan).")
    ] = None,
    jobs: JobsOption = 1,
    cluster: ClusterOption = None,
    cluster_option: ClusterParameter = None,
    only: Annotated[str | None, typer.Option(help="Only these rows and what they need.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds: 0,1.")] = None,
) -> None:
    """Train and evaluate all runs of a plan that are not done yet; write their table."""
    from cure.experiments.executors import executor_for
    from cure.experiments.plan import carry_out_plan, read_plan, write_tables

    made = read_plan(plan)
    folder = plan.parent if output is None else output
    executor = executor_for(jobs, cluster, Path(made.runs) / "jobs", pairs(cluster_option) or {})
    failures = carry_out_plan(
        made,
        folder,
        executor,
        only=words(only),
        seeds=whole_numbers("seeds", seeds),
        tell=say,
    )
    shown = write_tables(made, folder)
    if shown is not None:
        print_table(shown)
    if failures:
        raise TrainingStopped(f"{len(failures)} of the plan's runs failed: " + "; ".join(failures))


@app.command()
def front(
    words_: Annotated[
        list[str],
        typer.Argument(
            metavar="METHOD... RECIPE [KEY=VALUE]...",
            help="Methods to compare, a recipe, and settings of all runs; {seed} is the seed.",
        ),
    ],
    values: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD=A,B,C",
            help="Values of its trade-off setting, or METHOD:KEY=A,B,C of another; repeatable.",
        ),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="METHOD:KEY=VALUE", help="For one method; repeatable."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the runs: 0,1,2.")] = "0",
    attacks: Annotated[
        str, typer.Option(help="Attacks to measure; the first is that of the front.")
    ] = "pgd20",
    split: Annotated[Split, typer.Option(help="Which images are measured.")] = Split.test,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    reference: Annotated[
        str, typer.Option(help="Natural and robust accuracy the hypervolume begins at.")
    ] = "0,0",
    at: Annotated[
        str | None, typer.Option(help="Robust accuracies to compare at: 20,30 (default: one).")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Of runs and results (default: fronts/NAME).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file (default: front.json in the folder).")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time on this machine.")] = 1,
) -> None:
    """Train methods with several values of their trade-off setting; compare their fronts."""
    from cure.experiments.front import front as compare_fronts
    from cure.experiments.front import lines, read_values

    plain = [word for word in words_ if "=" not in word]
    if len(plain) < 2:
        raise ConfigError(
            f"expected one method or more and then a recipe, got '{' '.join(plain)}'; for example "
            "cure front at trades cure cifar10-mini"
        )
    given = read_values(values or [])
    only: dict[str, dict[str, object]] = {}
    for word in own or []:
        method, colon, setting = word.partition(":")
        if not colon:
            raise ConfigError(f"--with: expected METHOD:KEY=VALUE, got '{word}'")
        only.setdefault(method, {}).update(pairs([setting]))
    low = numbers("reference", reference) or []
    made = compare_fronts(
        plain[:-1],
        plain[-1],
        [word for word in words_ if "=" in word],
        values=given,
        own=only,
        seeds=whole_numbers("seeds", seeds) or [],
        attacks=words(attacks) or [],
        split=split.value,
        limit=limit,
        reference=tuple(low),  # type: ignore[arg-type]
        at=numbers("at", at),
        folder=folder,
        output=output,
        jobs=jobs,
        say=say,
    )
    for line in lines(made):
        say(line)


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="An evaluated run.")],
    fronts: Annotated[
        list[Path] | None,
        typer.Option(
            "--front", help="File of `cure front`; repeatable (default: those of the package)."
        ),
    ] = None,
) -> None:
    """Say where a run lies beside the measured front of its recipe, and what to change."""
    from cure.experiments.recommend import recommend as compare_run

    found = compare_run(run, fronts)
    say(found.place)
    say(found.change)


@app.command()
def tradeoff(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Robust runs of one network and data.")
    ],
    natural_at_least: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Keep the most robust point with this accuracy."),
    ] = None,
    robust_at_least: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Keep the most accurate point that is so robust."),
    ] = None,
    points: Annotated[int, typer.Option(help="Points on each line, with its ends.")] = 9,
    strong: Annotated[
        str | None,
        typer.Option(help="Attacks on the chosen point (default: apgd-ce,apgd-t; '': none)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run to write the chosen network to.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
) -> None:
    """Choose natural against robust accuracy after training, between weights that exist."""
    from cure.experiments.tradeoff import tradeoff as walk

    found = walk(
        runs,
        natural_at_least=natural_at_least,
        robust_at_least=robust_at_least,
        points=points,
        strong=words(strong),
        output=output,
        device=device,
        say=say,
    )
    for sentence in found.barriers:
        warn(sentence)
    if found.chosen is None:
        return
    asked = (
        f"natural accuracy of {natural_at_least:g} %"
        if natural_at_least is not None
        else f"robust accuracy of {robust_at_least:g} %"
    )
    reached = f"natural {found.chosen.natural:.1f} %, robust {found.chosen.robust:.1f} %"
    if not found.met:
        warn(f"no point has a {asked}; the nearest has {reached}")
        raise typer.Exit(UNFINISHED)
    say(f"chosen: {reached} of {found.chosen.n:,} validation images")
    if found.strong is not None:
        low, high = found.strong.robust_interval
        say(
            f"under {', '.join(found.strong.attacks)}: {found.strong.robust:.1f} % "
            f"({low:.1f} to {high:.1f}) of the same images; the front: {found.run}/tradeoff.svg"
        )
    _print_ended(Path(str(found.run)))


@app.command()
def watch(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders.")],
    once: Annotated[bool, typer.Option("--once", help="Show the present state, and end.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two updates.")
    ] = 2.0,
) -> None:
    """Show runs while they train, or as they ended: epochs, curves, speed, time left."""
    from rich.live import Live

    from cure.cli.watch import shown

    unicode = out.encoding.startswith("utf")

    def look() -> tuple[Any, bool]:
        return shown(runs, time.time(), out.width, unicode)

    drawn, ended = look()
    if once or not out.is_terminal:
        out.print(drawn)
        return
    with Live(drawn, console=out, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while not ended:
            time.sleep(interval)
            drawn, ended = look()
            live.update(drawn, refresh=True)


@app.command("export")
@with_options("checkpoint", "data", "data_options", "limit", limit=1000)
def export_(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write to, or the file.")],
    options: dict[str, Any],
    to: Annotated[ExportFormat, typer.Option(help="What to write.")] = ExportFormat.onnx,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX: also quantise, with validation images.")
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX: version of the operators.")] = 18,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="hub: also upload, to a private repository."),
    ] = None,
) -> None:
    """Write a run's network for other programs; checks the file against the run."""
    from cure.exporters.export import export, next_command

    made = export(run, to.value, folder, int8=int8, opset=opset, push=push, **options)  # type: ignore[arg-type]
    say(f"exported: {made}")
    say(f"next: {next_command(run, made)}")


@app.command("list")
def list_(what: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what can be named in a recipe or on the command line."""
    from cure.cli.listing import listing

    rows = listing(what.value)
    width = max(len(name) for name, _ in rows)
    for name, description in rows:
        # A row a line, whatever the terminal's width, so that grep finds whole rows.
        typer.echo(f"{name:<{width}}  {description}")


@app.command()
def show(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
) -> None:
    """Print every setting of a recipe as it would run, in YAML."""
    from cure.recipe import show_recipe

    typer.echo(show_recipe(recipe, settings or []), nl=False)


@app.command()
def demo(
    run: RunOption = None,
    photos: Annotated[
        bool, typer.Option("--photos", help="Photographs and a pretrained network; a few minutes.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", help="With --photos: a folder with one sub-folder a class."),
    ] = None,
) -> None:
    """Train on handwritten digits naturally and with CURE, study both, write a page, export."""
    from cure.cli.demo import begin, begin_photos, deploy, examine, examine_photos

    if data is not None and not photos:
        raise ConfigError("--data: expected --photos with it; say cure demo --photos --data FOLDER")
    done = begin_photos(data, run) if photos else begin(run)
    with show_progress() as progress:
        results, page = (examine_photos if photos else examine)(done, progress)
    print_results(results)
    if not photos:
        try:
            with show_progress() as progress:
                file, result = deploy(done, progress)
        except ModelError as error:
            warn(f"not exported: {error}")
        else:
            print_replay(result)
            say(f"exported: {file}")
    _print_ended(done.path)
    say(f"open in a browser: {page}")


def _print_ended(path: Path, quiet: bool = True) -> None:
    """Where the run is, and what is next where the training has not said that already."""
    from cure.runs.folder import RunFolder

    say(f"run folder: {path}")
    if quiet or RunFolder.open(path).outcome() is None:
        say(f"next: cure evaluate {path}")


def _say(word: str, error: CureError) -> None:
    """One message on stderr, whichever of the ranks of a run the error is on.

    An error on all ranks is printed by the first one, and the launcher ends the others while they
    wait.  A rank that is still there after that has an error of its own.
    """
    if not QUIET:
        err.print(f"{word}: {error}", markup=False, highlight=False, soft_wrap=True, style="bold")
        return
    if not isinstance(error, RanksLost):
        time.sleep(SECONDS_FOR_THE_FIRST)
    print(f"{word} (rank {os.environ['RANK']}): {error}", file=sys.stderr, flush=True)


@app.callback()
def _alone_or_together(
    context: typer.Context,
    show_traceback: Annotated[  # noqa: ARG001 - taken off before the words are parsed
        bool,
        typer.Option(
            "--traceback", help="Show where an error was raised, too; anywhere on the line."
        ),
    ] = False,
) -> None:
    if launched().world > 1 and context.invoked_subcommand not in TOGETHER:
        raise ConfigError(
            f"cure {context.invoked_subcommand} runs in one process, got {launched().world} ranks; "
            f"torchrun is for {', '.join(TOGETHER)}"
        )


def _note(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Show a note of this project as one line, any other warning as Python does."""
    if issubclass(category, CureNote):
        if str(message) not in _noted:
            warn(f"note: {message}")
        _noted.add(str(message))
    else:
        _show_warning(message, category, *place)


_show_warning = warnings.showwarning
_noted: set[str] = set()


def _sentence(error: Exception) -> CureError | None:
    """What is said of an error; None of one that is this project's own."""
    if isinstance(error, CureError):
        return error
    if "torch" not in sys.modules:
        return None
    from cure.models.failure import failed_in, network_error
    from cure.utils.memory import is_out_of_memory

    if is_out_of_memory(error):
        return OutOfMemory(
            f"there is not enough memory ({str(error).splitlines()[0][:120]}); work on fewer or "
            "smaller images at once (--batch-size, --limit, data.limit, data.resize)"
        )
    if network_error(error) is None:
        return None
    return ModelError(failed_in(error, "the network", None) + "; --traceback shows the rest")


def main() -> None:
    """Run the command; a user's mistake is one message and status 2."""
    keep_freed_memory()
    warnings.showwarning = _note  # type: ignore[assignment]
    whole = "--traceback" in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--traceback"]
    try:
        try:
            app()
        except SystemExit as ended:
            if SEVERAL and ended.code in (None, 0, UNFINISHED, NOT_MET):
                from cure.utils.distributed import leave

                leave()
            raise
    except Exception as error:
        said = _sentence(error)
        if said is None:
            raise
        if whole:
            traceback.print_exception(error)
        stopped = isinstance(said, Interrupted)
        _say("stopped" if stopped else "error", said)
        status = INTERRUPTED if stopped else USER_MISTAKE
        if SEVERAL:
            # At once: the launcher reports the first rank that ended, and gloo's threads can abort
            # an interpreter that ends slowly while other ranks close their connections.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(INTERRUPTED)
