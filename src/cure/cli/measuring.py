"""Commands that measure one network."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cure.cli.options import (
    ClusterOption,
    ClusterParameter,
    EpsilonOption,
    JobsOption,
    NormOption,
    OutputOption,
    pairs,
    with_options,
    words,
)
from cure.cli.printing import (
    QUIET,
    print_corruptions,
    print_diagnosis,
    print_evaluation,
    print_verification,
    say,
    show_progress,
)
from cure.cli.status import ExitStatus
from cure.errors import ConfigError, counted

Precision = StrEnum("Precision", ["fp32", "bf16_attack"])


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
            "--float",
            help="For an ONNX file: the run it was exported from, for attacks by gradients.",
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Least accuracy: natural>=75, pgd20>=40; repeatable; else status 4."),
    ] = None,
    require_lower_bound: Annotated[
        bool,
        typer.Option("--require-lower-bound", help="Compare the lower ends of the 95 % intervals."),
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
        typer.Option(help="Attack only shard 2/8, for another scheduler; --shards 8 then merges."),
    ] = None,
) -> None:
    """Measure accuracy on natural and on attacked images."""
    from cure.evaluation.evaluate import evaluate as measure
    from cure.evaluation.evaluate import is_unfinished
    from cure.evaluation.gate import write_junit, write_sarif
    from cure.evaluation.verify import verify as check
    from cure.utils.io import check_free

    if (junit or sarif or require_lower_bound) and not require:
        raise ConfigError("--junit, --sarif and --require-lower-bound go with --require")
    for file in (junit, sarif):
        check_free(file)
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
    shared = pairs(cluster_option) or {}
    if verify is not None:
        used = {*options, "epsilon", "norm"}
        others = {name: value for name, value in arguments.items() if name not in used}
        others |= {"junit": junit, "sarif": sarif, "shards": shards, "shard": shard}
        others |= {"precision": precision is not Precision.fp32, "jobs": jobs != 1}
        _only_verify(others | {"cluster": cluster, "cluster_option": shared})
        found = check(verify, target, epsilon=epsilon, norm=norm, output=output, **options)
        print_verification(found)
        if not found["holds"]:
            sys.exit(ExitStatus.FAILED_CHECK)
        return
    if shards is not None and shard is None:
        result = _in_shards(target, shards, output, jobs, cluster, shared, arguments)
    else:
        if jobs != 1 or cluster is not None or shared:
            raise ConfigError("--jobs, --cluster and --cluster-option go with --shards; add it")
        with show_progress() as progress:
            result = measure(
                target, output=output, shard=shard, shards=shards, progress=progress, **arguments
            )
        if shard is not None:
            say(f"shard {shard}: {counted(result['images'], 'image')}, kept in {result['file']}")
            return
    print_evaluation(result, kept=output is not None or "checkpoint" in result["model"])
    if not QUIET and junit is not None:
        write_junit(junit, result)
    if not QUIET and sarif is not None:
        write_sarif(sarif, result, target)
    if is_unfinished(result):
        sys.exit(ExitStatus.UNFINISHED)
    if not all(row["met"] for row in result.get("requirements", ())):
        sys.exit(ExitStatus.NOT_MET)


def _only_verify(others: dict[str, Any]) -> None:
    """Refuse what ``--verify`` does not do, which would otherwise be left out in silence.

    Raises:
        ConfigError: names the options that were given beside it.
    """
    given = sorted(name for name, value in others.items() if value)
    if given:
        named = ", ".join("--" + name.removesuffix("_network").replace("_", "-") for name in given)
        raise ConfigError(
            "--verify recomputes what a file claims and takes --epsilon, --norm, --output and the "
            f"network's options; leave out {named}"
        )


def _in_shards(
    target: str,
    shards: int,
    output: Path | None,
    jobs: int,
    cluster: str | None,
    parameters: dict[str, object],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """``cure evaluate --shards``: jobs evaluate a share of the images each."""
    from cure.experiments.executors import executor_for
    from cure.experiments.sharded import evaluate_in_shards

    if output is None:
        raise ConfigError("shards are merged into a file; name it: --output result.json")
    executor = executor_for(jobs, cluster, output.with_name(f"{output.name}.jobs"), parameters)
    return evaluate_in_shards(
        target, shards, output=output, executor=executor, tell=say, **arguments
    )


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
        raise typer.Exit(ExitStatus.FAILED_CHECK)
