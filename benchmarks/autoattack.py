"""AutoAttack plainly by its package and as `cure evaluate` runs it, in turn, on the same images.

    python benchmarks/autoattack.py [--images 200] [--run RUN] [--repetitions 3]

Prints both times, their ratio and the number of images with another verdict, and writes
results/bench/autoattack.json.  Both sides get the same network, seed, batches and threads.  Without
a run a small network is trained first: digits, by CURE, about a minute.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

import cure
from cure.api import Run
from cure.attacks import Threat
from cure.data import ImageSet, batches
from cure.engine import Engine
from cure.evaluation import measure
from cure.models import describe
from cure.run_folder import environment, write_json
from cure.subject import load_split
from cure.verdicts import Journal

Side = Callable[[nn.Module, ImageSet, Threat, int, int], tuple[Tensor, dict[str, float]]]


class Watch:
    """Seconds since it was made: by the clock, and of this process on all cores."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both."""
        return {
            "wall": time.perf_counter() - self.wall,
            "processor": time.process_time() - self.processor,
        }


def package(
    model: nn.Module, images: ImageSet, threat: Threat, seed: int, batch_size: int
) -> tuple[Tensor, dict[str, float]]:
    """pyautoattack as its documentation says; which images stand [N], and seconds."""
    batch = next(batches(images, len(images)))
    watch = Watch()
    suite = AutoAttack(model, norm=threat.norm, eps=threat.epsilon, seed=seed, version="standard")
    _, said = suite.run_standard_evaluation(batch.image, batch.label, batch_size=batch_size)
    return said == batch.label, watch.read()


def ours(
    model: nn.Module, images: ImageSet, threat: Threat, seed: int, batch_size: int
) -> tuple[Tensor, dict[str, float]]:
    """What `cure evaluate --attacks autoattack` does; which images stand [N], and seconds."""
    watch, journal = Watch(), Journal()
    engine = Engine(torch.device("cpu"), channels_last=True)
    measure(
        engine.place(model),
        images,
        ["autoattack"],
        threat,
        engine=engine,
        batch_size=batch_size,
        seed=seed,
        journal=journal,
    )
    seconds = watch.read()
    batch = next(batches(images, len(images)))
    with torch.no_grad():
        stands = model(engine.arrange(batch.image)).argmax(dim=1) == batch.label
    for verdict in journal.verdicts():
        stands[verdict.fooled] = False
    return stands, seconds


def compare(
    run: Run, images: ImageSet, threat: Threat, seed: int, batch_size: int, repetitions: int
) -> dict[str, Any]:
    """Both sides in turn, so that other work on the machine meets both."""
    sides: dict[str, Side] = {"package": package, "ours": ours}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    differing: list[int] = []
    standing: dict[str, int] = {}
    for repetition in range(repetitions):
        verdicts = {}
        for name, side in sides.items():
            # A fresh network each time: what one side did to its layout is not the other's.
            verdicts[name], took = side(run.model(), images, threat, seed, batch_size)
            seconds[name].append(took)
            standing[name] = int(verdicts[name].sum())
            print(
                f"{repetition + 1}/{repetitions} {name}: {took['wall']:.1f} s, "
                f"{took['processor']:.1f} processor seconds, {standing[name]} images stand",
                file=sys.stderr,
            )
        differing.append(int((verdicts["package"] != verdicts["ours"]).sum()))
    ratios = {
        kind: [a[kind] / b[kind] for a, b in zip(seconds["package"], seconds["ours"], strict=True)]
        for kind in ("wall", "processor")
    }
    return {
        "seconds": seconds,
        "ratio": {kind: statistics.median(values) for kind, values in ratios.items()},
        "ratios": ratios,
        "differing_verdicts": max(differing),
        "standing": standing,
    }


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/autoattack.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("auto-attack").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        if given.run is None:
            run = cure.train("digits", run=Path(folder) / "digits")
        else:
            run = Run(given.run)
        config = run.config
        images = load_split(config.data, "test").subset(slice(0, given.images))
        threat = Threat(config.threat.norm, float(config.threat.epsilon))
        result = compare(run, images, threat, given.seed, given.batch_size, given.repetitions) | {
            "n": len(images),
            "seed": given.seed,
            "batch_size": given.batch_size,
            "repetitions": given.repetitions,
            "threat": [threat.norm, threat.epsilon],
            "model": describe(run.model()),
            "recipe": config.name,
            "environment": environment(),
        }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.output, result)
    ratio = result["ratio"]
    print(
        f"{len(images)} images: {ratio['wall']:.2f} times faster by the clock, "
        f"{ratio['processor']:.2f} in processor time (median of {given.repetitions}); "
        f"{result['differing_verdicts']} verdicts differ; {given.output}"
    )


if __name__ == "__main__":
    main()
