"""Commands that set several runs side by side."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cure.cli.options import (
    ClusterOption,
    ClusterParameter,
    JobsOption,
    numbers,
    pairs,
    whole_numbers,
    words,
)
from cure.cli.printing import print_run_ended, print_table, say, warn
from cure.cli.status import ExitStatus
from cure.errors import ConfigError, TrainingStopped
from cure.registry import METHODS
from cure.utils.io import user_path

Split = StrEnum("Split", ["train", "validation", "test"])
Measured = StrEnum("Measured", ["validation", "test"])


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
        str | None,
        typer.Option(help="Column to sort by; by default the strongest attack (its NRR, of cw)."),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Evaluations on these images; by default test, if there.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write: .md, .csv or .json.")] = None,
) -> None:
    """Compare evaluated runs in a table; seeds of one method share a row."""
    from cure.experiments.compare import compare as side_by_side

    chosen: Any = split.value if split else None
    done = side_by_side(runs, columns=columns, sort=sort, split=chosen, output=output)
    print_table(done)


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


def table(
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
    from cure.experiments.plan import read_plan
    from cure.experiments.plan_work import carry_out_plan, write_tables

    made = read_plan(plan)
    folder = user_path(plan).parent if output is None else user_path(output)
    executor = executor_for(
        jobs, cluster, user_path(made.runs) / "jobs", pairs(cluster_option) or {}
    )
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
        typer.Option(
            "--with", metavar="METHOD:KEY=VALUE", help="Setting of one method; repeatable."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the runs: 0,1,2.")] = "0",
    attacks: Annotated[
        str, typer.Option(help="Attacks to measure; the first is that of the front.")
    ] = "pgd20",
    split: Annotated[Measured, typer.Option(help="Which images are measured.")] = Measured.test,
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
        Path | None, typer.Option(help=".json file (default: front.json in the folder).")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time on this machine.")] = 1,
) -> None:
    """Train methods with several values of their trade-off setting; compare their fronts."""
    from cure.experiments.front import front as compare_fronts
    from cure.experiments.front import lines, read_values

    plain = [word for word in words_ if "=" not in word]
    if len(plain) < 2 or plain[-1] in METHODS:
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


def recommend(
    run: Annotated[Path, typer.Argument(help="An evaluated run.")],
    fronts: Annotated[
        list[Path] | None,
        typer.Option(
            "--front", help="File of `cure front`; repeatable (default: those of the package)."
        ),
    ] = None,
) -> None:
    """Say where a run lies beside a measured front of its recipe or images, and what to change."""
    from cure.experiments.recommend import recommend as compare_run

    found = compare_run(run, fronts)
    say(found.place)
    say(found.change)


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
        say(f"next: cure tradeoff {' '.join(map(shlex.quote, runs))} --natural-at-least PERCENT")
        return
    asked = (
        f"natural accuracy of {natural_at_least:g} %"
        if natural_at_least is not None
        else f"robust accuracy of {robust_at_least:g} %"
    )
    reached = f"natural {found.chosen.natural:.1f} %, robust {found.chosen.robust:.1f} %"
    if not found.met:
        warn(f"no point has a {asked}; the nearest has {reached}")
        raise typer.Exit(ExitStatus.UNFINISHED)
    say(f"chosen: {reached} of {found.chosen.n:,} validation images")
    if found.strong is not None:
        low, high = found.strong.robust_interval
        say(
            f"under {', '.join(found.strong.attacks)}: {found.strong.robust:.1f} % "
            f"({low:.1f} to {high:.1f}) of the same images; the front: {found.run}/tradeoff.svg"
        )
    print_run_ended(Path(str(found.run)))
