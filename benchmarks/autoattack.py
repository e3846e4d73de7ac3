"""AutoAttack by its package and as `cure evaluate` runs it, in turn, on the same images.

    python benchmarks/autoattack.py --run RUN [--images 200] [--batch-size 200] [--threads 2]

Every side gets the same network, seed, batches and threads, one part of the attack at a time: the
package (as its documentation says), `cure evaluate`, and `cure evaluate --precision bf16_attack`.
Seconds of the package are those inside its attacks; ours are of the whole call, with the folding
of the network and the verification of what was found.

Where verdicts of the package and of `cure evaluate` differ, both run again in float64, where
rounding is a billion times smaller: a difference that is gone there was made by rounding.

Prints a table and writes results/bench/autoattack.json.  Parts that are done are kept beside it, so
that the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.autoattack import AUTOATTACK
from cure.data import ImageSet, batches, load_split
from cure.evaluation.journal import Journal
from cure.evaluation.runner import AttackRunner, no_progress
from cure.models import describe, digest
from cure.runs.run import Run
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import write_json

KINDS = ("wall", "processor")
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")

Side = Callable[[str, Tensor], tuple[Tensor, dict[str, float]]]
"""(part, which images stand [N]) to which stand after it, and seconds."""


class Watch:
    """Seconds inside its context: by the clock, and of this process on all cores."""

    def __init__(self) -> None:
        self.seconds = {"wall": 0.0, "processor": 0.0}

    def __enter__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, processor = self.began
        self.seconds["wall"] += time.perf_counter() - wall
        self.seconds["processor"] += time.process_time() - processor


class InItsType(AttackRunner):
    """An evaluation on images in the type of the network's weights."""

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1] and labels [B], on the device."""
        image, label = super().batch(index)
        return image.to(next(self.model.parameters()).dtype), label


def package(model: nn.Module, images: ImageSet, threat: Threat, seed: int, batch_size: int) -> Side:
    """pyautoattack as its documentation says."""
    whole = next(batches(images, len(images)))
    image = whole.image.to(next(model.parameters()).dtype)

    def run(part: str, stands: Tensor) -> tuple[Tensor, dict[str, float]]:
        suite = AutoAttack(
            model, norm=threat.norm, eps=threat.epsilon, seed=seed, version="standard"
        )
        suite.attacks_to_run = [part]
        watch = Watch()
        attack = {
            "apgd-ce": suite.apgd,
            "apgd-t": suite.apgd_targeted,
            "fab-t": suite.fab,
            "square": suite.square,
        }[part]
        perturb = attack.perturb

        def timed(*arguments: Tensor) -> Tensor:
            with watch:
                found: Tensor = perturb(*arguments)
            return found

        attack.perturb = timed
        rows = stands.nonzero().flatten()
        _, said = suite.run_standard_evaluation(
            image[rows], whole.label[rows], batch_size=batch_size
        )
        after = stands.clone()
        after[rows] = said == whole.label[rows]
        return after, watch.seconds

    return run


def ours(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    seed: int,
    batch_size: int,
    precision: str = "fp32",
) -> Side:
    """What `cure evaluate --attacks autoattack` does."""
    engine = Engine(torch.device("cpu"), precision, channels_last=True)  # type: ignore[arg-type]
    evaluation = InItsType(
        engine.place(model),
        images,
        threat,
        engine,
        batch_size,
        seed,
        no_progress,
        Journal(),
        math.inf,
    )

    def run(part: str, stands: Tensor) -> tuple[Tensor, dict[str, float]]:
        watch = Watch()
        attack = replace(AUTOATTACK, name=part, parts={part: AUTOATTACK.parts[part]})
        with watch:
            after = evaluation.run(attack, stands).robust
        return after, watch.seconds

    return run


class Work:
    """Parts that are done, kept in a file; an interrupted benchmark goes on with the next one."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"identity": identity, "done": {}}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["identity"] != json.loads(json.dumps(identity)):
                sys.exit(f"{path} was begun with other options; repeat those, or delete it")
            self.content = kept

    def do(
        self, name: str, part: str, side: Side, stands: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """What ``side`` made of a part, now or before."""
        key = f"{name} {part}"
        if key not in self.content["done"]:
            after, seconds = side(part, stands)
            self.content["done"][key] = {"stands": after.nonzero().flatten().tolist()} | {
                "seconds": seconds
            }
            write_json(self.path, self.content)
            print(
                f"{key}: {int(stands.sum())} images, {seconds['wall']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        done = self.content["done"][key]
        after = torch.zeros_like(stands)
        after[done["stands"]] = True
        return after, done["seconds"]


def in_turn(
    work: Work, sides: dict[str, Side], natural: Tensor, kind: str = ""
) -> dict[str, dict[str, Any]]:
    """Every part by every side, one after the other, so that other work meets all of them."""
    stands = dict.fromkeys(sides, natural)
    found: dict[str, dict[str, Any]] = {name: {"seconds": {}, "fooled": {}} for name in sides}
    for part in PARTS:
        for name, side in sides.items():
            before = stands[name]
            stands[name], seconds = work.do(f"{kind}{name}", part, side, before)
            found[name]["seconds"][part] = seconds
            found[name]["fooled"][part] = (before & ~stands[name]).nonzero().flatten().tolist()
    for name, made in found.items():
        parts = list(made["seconds"].values())
        made["seconds"]["total"] = {kind: sum(part[kind] for part in parts) for kind in KINDS}
        made["stand"] = stands[name].nonzero().flatten().tolist()
    return found


def differing(found: dict[str, dict[str, Any]], one: str, other: str) -> list[int]:
    """Images on which two sides differ."""
    return sorted(set(found[one]["stand"]) ^ set(found[other]["stand"]))


def fate(made: dict[str, Any], image: int) -> str:
    """What became of an image on one side."""
    return next((part for part in PARTS if image in made["fooled"][part]), "stands")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run on real images")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/autoattack.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("auto-attack").setLevel(logging.CRITICAL)
    run = Run(given.run)
    config = run.config
    images = load_split(config.data, "test").subset(slice(0, given.images))
    threat = Threat.of(config.threat)
    identity = {
        "n": len(images),
        "batch_size": given.batch_size,
        "seed": given.seed,
        "threads": given.threads,
        "threat": [threat.norm, threat.epsilon],
        "model": describe(run.model()),
        "weights": digest(run.model().state_dict()),
        "method": config.method.name,
        "recipe": config.name,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    work = Work(given.output.with_suffix(".partial"), identity)
    whole = next(batches(images, len(images)))
    with torch.no_grad():
        natural = run.model()(whole.image).argmax(dim=1) == whole.label

    # A fresh network each time: what one side does to its layout is not another's.
    settings = (images, threat, given.seed, given.batch_size)
    sides = {
        "package": package(run.model(), *settings),
        "cure": ours(run.model(), *settings),
        "cure bf16_attack": ours(run.model(), *settings, precision="bf16_attack"),
    }
    found = in_turn(work, sides, natural)
    odd = differing(found, "package", "cure")
    result = identity | {
        "right": int(natural.sum()),
        "sides": found,
        "ratio": {
            name: {
                part: {
                    kind: found["package"]["seconds"][part][kind] / made["seconds"][part][kind]
                    for kind in KINDS
                }
                for part in (*PARTS, "total")
            }
            for name, made in found.items()
        },
        "differing": {i: {name: fate(found[name], i) for name in sides} for i in odd},
        "differing_bf16_attack": len(differing(found, "package", "cure bf16_attack")),
    }
    if odd:
        sides = {
            "package": package(run.model().double(), *settings),
            "cure": ours(run.model().double(), *settings),
        }
        torch.set_default_dtype(torch.float64)
        # APGD calls float() on its images.
        with mock.patch.object(Tensor, "float", Tensor.double):
            exact = in_turn(work, sides, natural, "float64 ")
        torch.set_default_dtype(torch.float32)
        result["float64"] = {"sides": exact, "differing": differing(exact, "package", "cure")}
    write_json(given.output, result | {"environment": environment()})
    work.path.unlink(missing_ok=True)
    report(result)
    print(f"written: {given.output}")


def report(result: dict[str, Any]) -> None:
    """The table."""
    print(
        f"AutoAttack standard, {result['n']} images, {result['right']} classified right, batch "
        f"{result['batch_size']}, {result['threads']} threads"
    )
    for kind in KINDS:
        print(f"\nseconds ({kind}), and how often the package's time is ours")
        print(f"{'':<18}" + "".join(f"{part:>16}" for part in (*PARTS, "total")) + "  stand")
        for name, made in result["sides"].items():
            cells = [
                f"{made['seconds'][part][kind]:.1f} ({result['ratio'][name][part][kind]:.2f})"
                for part in (*PARTS, "total")
            ]
            stand = f"{len(made['stand']):>7}"
            print(f"{name:<18}" + "".join(f"{cell:>16}" for cell in cells) + stand)
    print()
    print(
        f"verdicts that differ from the package's: {len(result['differing'])} (cure), "
        f"{result['differing_bf16_attack']} (cure bf16_attack)"
    )
    for image, fates in result["differing"].items():
        print(f"  image {image}: " + ", ".join(f"{name}: {what}" for name, what in fates.items()))
    if "float64" in result:
        print(f"in float64 {len(result['float64']['differing'])} verdicts differ")


if __name__ == "__main__":
    main()
