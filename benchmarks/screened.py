"""AutoAttack by its package and `cure evaluate --attacks screened`, in turn, on the same images.

    python benchmarks/screened.py [TARGET ...] [--images 200] [--batch-size 200] [--threads 2]

TARGETs are what `cure evaluate` takes: run folders, or networks with ``--data``; by default up to
eight run folders below ``--runs``.  Both sides get the same network, images, seed, batches and
threads; seconds are those of the whole call.  A network that keeps a tenth of the images under
the package's AutoAttack counts as robust, others as fragile.

``ratio`` is the median over the robust networks of the package's seconds over ours,
``ratio_fragile`` that over the others, and ``ratio_of_others`` that of further sides, in processor
seconds.  For each network the file lists the images on which the
verdicts differ: ``only_package_breaks`` (possible only by other random starts and rounding, since
what stands takes the whole of AutoAttack) and ``only_screened_breaks``.  Each image that ours
counts as broken is tried once more on the network itself: ``not_confirmed`` counts those that are
outside the ball or classified right, and should be 0.

``--sides`` also takes ``screened-ordered`` (which leaves images alone; its verdicts that differ are
listed as well), ``autoattack`` (as `cure evaluate` runs it), ``screened-bf16`` and
``autoattack-bf16`` (attacks in bfloat16, which might miss what float32 finds).  What is done is
kept beside the output, so that the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from cure.attacks import Threat
from cure.data import ImageSet, batches
from cure.errors import ConfigError
from cure.evaluation.metrics import unpack
from cure.evaluation.runner import measure
from cure.evaluation.target import Target
from cure.models import describe, digest
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import write_json

PACKAGE, SCREENED, ORDERED = "package", "screened", "screened-ordered"
ROBUST = 0.1
"""Share of the images that a robust network keeps under AutoAttack."""

Verdict = tuple[Tensor, int]
"""Which images stand [N], and how many of the broken ones were not confirmed."""


def package(options: argparse.Namespace) -> Callable[[nn.Module, ImageSet, Threat], Verdict]:
    """pyautoattack as its documentation says."""

    def run(model: nn.Module, images: ImageSet, threat: Threat) -> Verdict:
        whole = next(batches(images, len(images)))
        suite = AutoAttack(
            model, norm=threat.norm, eps=threat.epsilon, seed=options.seed, version="standard"
        )
        _, said = suite.run_standard_evaluation(
            whole.image, whole.label, batch_size=options.batch_size
        )
        return said == whole.label, 0

    return run


def ours(
    attack: str, precision: Any, options: argparse.Namespace
) -> Callable[[nn.Module, ImageSet, Threat], Verdict]:
    """What `cure evaluate` does."""

    def run(model: nn.Module, images: ImageSet, threat: Threat) -> Verdict:
        engine = Engine(torch.device("cpu"), precision, channels_last=True)
        kept: dict[str, Tensor] = {}
        found = measure(
            engine.place(model),
            images,
            [attack],
            threat,
            engine=engine,
            batch_size=options.batch_size,
            seed=options.seed,
            per_image=True,
            keep=kept,
        )
        natural, stands = (
            torch.tensor(unpack(part["right"], len(images))).bool()
            for part in (found["natural"], found["attacks"][attack])
        )
        broken = natural & ~stands
        if not bool(broken.any()):
            return stands, 0
        return stands, unconfirmed(
            model, images.subset(broken.nonzero().flatten()), kept[attack][broken], threat
        )

    return run


@torch.no_grad()
def unconfirmed(model: nn.Module, images: ImageSet, adversarial: Tensor, threat: Threat) -> int:
    """How many are no adversarial images: outside the ball or [0, 1], or classified right."""
    whole = next(batches(images, len(images)))
    fools = model(adversarial).argmax(dim=1) != whole.label
    inside = threat.within(threat.distance(adversarial - whole.image))
    in_box = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(dim=1)
    return int((~(fools & inside & in_box)).sum())


def timed(run: Callable[..., Verdict], *arguments: Any) -> dict[str, Any]:
    """The verdict of one side and the seconds of its call."""
    wall, processor = time.perf_counter(), time.process_time()
    stands, wrong = run(*arguments)
    return {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "stand": stands.nonzero().flatten().tolist(),
        "not_confirmed": wrong,
    }


def targets_of(options: argparse.Namespace) -> list[str]:
    """The networks that were named, else up to eight runs."""
    if options.targets:
        return list(options.targets)
    found = sorted(
        path.parents[1] for path in Path(options.runs).glob("**/checkpoints/best.safetensors")
    )
    if not found:
        raise ConfigError(
            f"no run below {options.runs}; name targets, or train some: "
            "cure train cifar10-mini method=at --run runs/at"
        )
    return [str(path) for path in found[:8]]


def summary(made: dict[str, dict[str, Any]], n: int) -> dict[str, Any]:
    """Ratios, kind and differing verdicts of one network."""
    stand = {name: set(side["stand"]) for name, side in made.items()}
    package_stands, ours_stand = stand[PACKAGE], stand[SCREENED]
    return {
        "kind": "robust" if len(package_stands) >= ROBUST * n else "fragile",
        "accuracy": {name: 100 * len(left) / n for name, left in stand.items()},
        "ratio": {
            name: {kind: made[PACKAGE][kind] / side[kind] for kind in ("wall", "processor")}
            for name, side in made.items()
        },
        "only_package_breaks": sorted(ours_stand - package_stands),
        "only_screened_breaks": sorted(package_stands - ours_stand),
        "differences": {
            name: {
                "only_package_breaks": sorted(left - package_stands),
                "only_this_breaks": sorted(package_stands - left),
            }
            for name, left in stand.items()
            if name not in (PACKAGE, SCREENED)
        },
        "not_confirmed": sum(side["not_confirmed"] for side in made.values()),
    }


def overall(
    networks: dict[str, dict[str, Any]], kind: str, clock: str, side: str = SCREENED
) -> float | None:
    """Median ratio of a side over the networks of one kind; None where there is none."""
    ratios = [row["ratio"][side][clock] for row in networks.values() if row["kind"] == kind]
    return statistics.median(ratios) if ratios else None


def loaded(options: argparse.Namespace) -> Iterator[tuple[str, Target, dict[str, Any]]]:
    """Targets by name, with what their results depend on."""
    for number, given in enumerate(targets_of(options)):
        data = {"data": options.data} if options.data else {}
        target = Target.of(given, split=options.split, limit=options.images, **data)
        images, model = target.load()
        threat = target.threat(options.epsilon)
        identity = {
            "model": describe(model) | {"weights": digest(model.state_dict())},
            "images": images.digest(),
            "threat": [threat.norm, threat.epsilon],
        }
        name = Path(given).name if Path(given).exists() else given
        yield f"{number} {name}", target, identity


def main(words: list[str] | None = None) -> None:
    """Measure what is missing, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--runs", default="runs", help="where runs are looked for")
    parser.add_argument("--data", help="images, for targets that are no runs")
    parser.add_argument("--split", default="test")
    parser.add_argument("--epsilon", help="default: the run's, else 8/255")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", default=f"{PACKAGE},{SCREENED}")
    parser.add_argument("--output", type=Path, default=Path("results/bench/screened.json"))
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    logging.getLogger("auto-attack").setLevel(logging.CRITICAL)
    known = {
        PACKAGE: package(options),
        SCREENED: ours("screened", "fp32", options),
        "autoattack": ours("autoattack", "fp32", options),
        ORDERED: ours(ORDERED, "fp32", options),
        "screened-bf16": ours("screened", "bf16_attack", options),
        "autoattack-bf16": ours("autoattack", "bf16_attack", options),
    }
    chosen = options.sides.split(",")
    if not {PACKAGE, SCREENED} <= set(chosen) <= set(known):
        raise ConfigError(f"sides: {PACKAGE},{SCREENED} and further of {', '.join(known)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial")
    settings = {
        "batch_size": options.batch_size,
        "seeds": [options.seed],
        "threads": options.threads,
        "split": options.split,
    }
    done = json.loads(partial.read_text()) if partial.exists() else {"settings": settings}
    if done["settings"] != settings:
        sys.exit(f"{partial} was begun with other options; repeat those, or delete it")
    networks: dict[str, dict[str, Any]] = {}
    for name, target, identity in loaded(options):
        images, _ = target.load()
        made: dict[str, dict[str, Any]] = {}
        for side in chosen:
            key = json.dumps([side, identity])
            if key not in done:
                # A fresh network each time: what one side does to its layout is not another's.
                _, model = target.load()
                model.eval()
                done[key] = timed(known[side], model, images, target.threat(options.epsilon))
                write_json(partial, done)
                print(f"{name}, {side}: {done[key]['wall']:.1f} s", file=sys.stderr, flush=True)
            made[side] = done[key]
        seconds = {side: {k: r[k] for k in ("wall", "processor")} for side, r in made.items()}
        row = identity | {"n": len(images), "seconds": seconds} | summary(made, len(images))
        networks[name] = row
        result = settings | {
            "ratio": overall(networks, "robust", "wall"),
            "ratio_processor": overall(networks, "robust", "processor"),
            "ratio_fragile": overall(networks, "fragile", "wall"),
            "ratio_fragile_processor": overall(networks, "fragile", "processor"),
            "ratio_of_others": {
                side: overall(networks, "robust", "processor", side)
                for side in chosen
                if side not in (PACKAGE, SCREENED)
            },
            "n": options.images,
            "networks": networks,
            "environment": environment(),
        }
        write_json(options.output, result)
        print(
            f"{name} ({row['kind']}): "
            + ", ".join(
                f"{side} {row['accuracy'][side]:.1f} % in {seconds[side]['wall']:.1f} s "
                f"(processor {seconds[side]['processor']:.1f} s, ratio "
                f"{row['ratio'][side]['processor']:.2f})"
                for side in made
            )
            + f"; only the package breaks {row['only_package_breaks']}, only screened "
            f"{row['only_screened_breaks']}, not confirmed {row['not_confirmed']}",
            flush=True,
        )
    partial.unlink(missing_ok=True)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
