"""What CURE costs and what it reaches on one GPU, in pieces that continue one another.

    python benchmarks/gpu.py bench
    python benchmarks/gpu.py collect --data DATA SHARD ...
    python benchmarks/gpu.py train --data DATA --epochs 40 --precision bf16 --compile
    python benchmarks/gpu.py evaluate --data DATA --attacks pgd20,cw
    python benchmarks/gpu.py evaluate --data DATA --attacks autoattack --limit 1000
    python benchmarks/gpu.py report

A call works for ``--seconds`` (540), stops in order, and ends with status 3 when something is left:
the same words then go on.  Runs with their state lie under ``--out``, figures for people and
programs under ``--results``.  ``--device cpu --tiny`` tries the whole of it.  See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cure
import step
from cure.errors import CureError, Interrupted
from cure.methods.cure import threshold
from cure.recipe import check, override, read_recipe
from cure.runs.folder import RunFolder
from cure.utils.device import pick_device
from cure.utils.environment import environment
from cure.utils.io import write_json, write_text
from step import COMPILED, YARDSTICK, Net

LEFT = 3
"""Exit status when the time was over before the work was."""
RECIPE = "cifar10-resnet18-cure"
RUNS = ("natural", "cure", "trades", "at")
NAMES = {"natural": "natural start", "cure": "CURE", "trades": "TRADES", "at": "AT"}
PAPER = {"natural": 86.8, "pgd20": 54.9, "autoattack": 49.7}
"""CURE, ResNet-18, CIFAR-10, percent. Source: Gowda et al., ICLR 2024."""
ATTACKS = {"natural": "natural", "pgd20": "PGD-20", "cw": "C&W", "autoattack": "AutoAttack"}
IMAGES = 50_000
"""Of an epoch of CIFAR-10."""

Measured = dict[str, Any]


class Clock:
    """How much of a call's time is left."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()


class Results:
    """A result file that every call adds to."""

    def __init__(self, options: argparse.Namespace, name: str, words: Sequence[str]) -> None:
        self.path = Path(options.results) / f"{name}.json"
        self.content: Measured = {"format": f"cure-gpu-{name}-1", "commands": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        self.content["machine"] = step.machine()
        self.content["environment"] = environment()
        command = shlex.join(["python", "benchmarks/gpu.py", *map(short, words)])
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.content["commands"].append({"command": command, "time": now})

    def save(self) -> None:
        """Write it whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def short(word: str) -> str:
    """A word of a command; an absolute path says where on a machine, so its last part is kept."""
    return Path(word).name if Path(word).is_absolute() else word


# -- what a step costs ---------------------------------------------------------------------------


def nets(options: argparse.Namespace) -> dict[str, Net]:
    """What is measured, by name."""
    device = options.device
    if options.tiny:
        return {"tiny": Net("resnet10", {"width": 4}, 8, device)}
    return {
        "resnet18-128": Net("resnet18", {}, 128, device),
        "resnet18-512": Net("resnet18", {}, 512, device),
        "wrn-34-10-128": Net("wide_resnet", {}, 128, device),
    }


SIDE_ORDER = ("bf16" + COMPILED, "bf16", "exact", "bf16_attack", "trades")
ALL_SIDES = (*SIDE_ORDER, *(f"{side}{COMPILED}" for side in SIDE_ORDER[2:]))
"""The most telling first: the time may not suffice for all."""
TINY_SIDES = "exact,bf16"


def bench(options: argparse.Namespace, clock: Clock, results: Results) -> bool:
    """Each side beside the yardstick; whether all is measured."""
    found = results.content
    known = nets(options)
    chosen = {name: known[name] for name in named(options.nets, known)}
    sides = named(options.sides or (TINY_SIDES if options.tiny else None), ALL_SIDES)
    found.setdefault("nets", {})
    if "ceilings_gflops" not in found:
        found["ceilings_gflops"] = step.ceilings(options.device, 256 if options.tiny else None)
    # Both sides' convolutions are chosen by speed, as training.deterministic=false has it.
    torch.backends.cudnn.benchmark = found["cudnn_benchmark"] = True
    for name, net in chosen.items():
        row = found["nets"].setdefault(name, {"net": step.describe(net), "sides": {}})
        for side in (YARDSTICK, *sides):
            if "peak_memory_mib" in row["sides"].get(side, {}):
                continue
            if clock.left() < options.piece_seconds:
                results.save()
                return False
            print(f"{name}, {side} ...", file=sys.stderr, flush=True)
            row["sides"][side] = attempt(side, net, options, found["ceilings_gflops"])
            results.save()
        if "thresholds_ms" not in row:
            row["thresholds_ms"] = thresholds(net)
            results.save()
    return True


def named(words: str | None, known: Sequence[str] | dict[str, Net]) -> list[str]:
    """The names in a list with commas, by default all."""
    chosen = list(known) if words is None else [word.strip() for word in words.split(",")]
    wrong = [name for name in chosen if name not in known]
    if wrong:
        raise CureError(f"expected names among {', '.join(known)}, got {', '.join(wrong)}")
    return chosen


def attempt(
    side: str, net: Net, options: argparse.Namespace, ceilings: dict[str, float]
) -> Measured:
    """What was measured, or why not: a side that does not run must not cost the others theirs."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return alone(net) if side == YARDSTICK else beside(side, net, options, ceilings)
    except RuntimeError as error:
        print(f"failed: {error}", file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def alone(net: Net) -> Measured:
    """What is measured of the yardstick by itself."""
    return {
        "passes": step.count_passes(YARDSTICK, net),
        "gflop_per_image": sum(step.operations(YARDSTICK, net).values()) / net.batch,
        "peak_memory_mib": step.peak_memory(YARDSTICK, net, torch.get_num_threads()),
    }


def beside(
    side: str, net: Net, options: argparse.Namespace, ceilings: dict[str, float]
) -> Measured:
    """One of ours and the yardstick in turn."""
    times = step.in_turn(net, (YARDSTICK, side), options.repetitions, options.steps)
    row: Measured = times[side]
    row["yardstick_images_per_second"] = times[YARDSTICK]["images_per_second"]
    row["epoch_seconds"] = IMAGES / row["images_per_second"]
    row["passes"] = step.count_passes(side, net)
    row["gflop_per_image"] = sum(step.operations(side, net).values()) / net.batch
    row["share_of_ceiling"] = step.share_of_ceiling(side, net, row["seconds_per_step"], ceilings)
    if not side.startswith("trades"):
        row["error"] = step.errors(side, net)
    row["peak_memory_mib"] = step.peak_memory(side, net, torch.get_num_threads())
    return row


def thresholds(net: Net) -> dict[str, float]:
    """Milliseconds for the thresholds of all tensors of a network: ours, and by other means."""
    device = torch.device(net.device)
    scores = [torch.rand(p.shape, device=device) for p in net.ours().parameters()]

    def rank(score: Tensor) -> int:
        return 1 + int(0.3 * (score.numel() - 1))

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda score: threshold(score, 30.0),
        "kthvalue": lambda score: score.flatten().kthvalue(rank(score)).values,
        "sort": lambda score: score.flatten().sort().values[rank(score) - 1],
    }
    found = {}
    for name, way in ways.items():
        times = []
        for _ in range(4):
            began = step._now(device)
            for score in scores:
                way(score)
            times.append(step._now(device) - began)
        found[name] = 1000 * statistics.median(times[1:])
    return found


# -- data ----------------------------------------------------------------------------------------


def collect(options: argparse.Namespace) -> bool:
    """Copy shards to where training looks for them; whether all are there.

    A shard is ``SPLIT-NUMBER-of-COUNT.parquet``: its name says how many there are.
    """
    folder = Path(options.data) / "cifar10"
    folder.mkdir(parents=True, exist_ok=True)
    for shard in map(Path, options.shards):
        if shard_of(shard) is None:
            raise CureError(
                f"expected shards such as train-00000-of-00002.parquet, got {shard.name}"
            )
        target = folder / shard.name
        temporary = target.with_suffix(".tmp")
        shutil.copyfile(shard, temporary)
        temporary.replace(target)
    missing = missing_shards(folder)
    print(f"missing: {', '.join(missing)}" if missing else f"{folder} is complete")
    return not missing


def shard_of(path: Path) -> tuple[str, int, int] | None:
    """Split, number and count of a shard."""
    match = re.fullmatch(r"(\w+)-(\d{5})-of-(\d{5})\.parquet", path.name)
    return (match[1], int(match[2]), int(match[3])) if match else None


def missing_shards(folder: Path) -> list[str]:
    """Names of the shards of CIFAR-10 that are not in a folder."""
    there = {found for path in folder.glob("*.parquet") if (found := shard_of(path))}
    counts = {"train": 2, "test": 1} | {split: count for split, _, count in there}
    return [
        f"{split}-{number:05}-of-{count:05}.parquet"
        for split, count in counts.items()
        for number in range(count)
        if (split, number, count) not in there
    ]


# -- training ------------------------------------------------------------------------------------


def settings(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a run changes in the recipe: the paper's settings, as many epochs as are asked for."""
    natural = name == "natural"
    # The paper's memory of 5,000 of 78,200 steps, so that a short run has it too; an average needs
    # some updates.
    revision = {"rate": 0.2, "horizon": 0.8 if options.tiny else 0.064}
    found: dict[str, Any] = {
        "name": f"gpu-{name}",
        "seed": options.seed,
        "method": (
            {**read_recipe(RECIPE)["method"], "revision": revision}
            if name == "cure"
            else {"name": name}
        ),
        "start": "scratch" if natural else str(Path(options.out) / "natural"),
        "training.epochs": options.natural_epochs if natural else options.epochs,
        "training.precision": options.precision,
        "training.compile": options.compile and not natural,
        "training.deterministic": options.deterministic,
        "training.device": options.device,
    }
    if options.tiny:
        found |= {
            "data": {"source": "digits", "limit": 400, "validation": 100},
            "model": {"name": "resnet10", "options": {"width": 4}},
            "attack.steps": 2,
            "training.batch_size": 50,
            "training.validation_steps": 2,
            "training.collapse_patience": 1000,
            "training.threads": 1,
        }
    return found


def train(options: argparse.Namespace, clock: Clock, results: Results) -> bool:
    """The natural start, then each method from it; whether all are finished."""
    if not options.tiny:
        missing = missing_shards(Path(options.data) / "cifar10")
        if missing:
            raise CureError(f"{options.data}/cifar10 lacks {', '.join(missing)}: collect them")
    found = results.content.setdefault("runs", {})
    methods = [name for name in named(options.methods, RUNS) if name != "natural"]
    for name in ("natural", *methods):
        path, changes = Path(options.out) / name, settings(name, options)
        if path.exists():
            begun_so(path, changes)
        torch.compiler.reset()
        try:
            with stopping(clock):
                if path.exists():
                    cure.resume(path, quiet=options.quiet)
                else:
                    cure.train(RECIPE, changes, run=path, quiet=options.quiet)
        except (Interrupted, KeyboardInterrupt):
            print(f"{name}: stopped in order", file=sys.stderr)
            if path.exists():
                found[name] = summary(path)
            results.save()
            return False
        found[name] = summary(path)
        results.save()
    return True


def begun_so(path: Path, changes: dict[str, Any]) -> None:
    """Refuse to go on with a run of other settings."""
    raw = read_recipe(RECIPE)
    for key, value in changes.items():
        override(raw, key, value)
    if check(raw, "this call") != RunFolder.open(path).config:
        raise CureError(f"{path} was begun with other settings: repeat them, or give another --out")


@contextmanager
def stopping(clock: Clock) -> Iterator[None]:
    """Interrupt when the time is over, as Ctrl-C does: a run in training stops after its step."""

    def ask(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, ask)
    signal.setitimer(signal.ITIMER_REAL, max(clock.left(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def summary(path: Path) -> Measured:
    """How far a run came, how fast, and how well it does on the validation split."""
    folder = RunFolder.open(path)
    status, metrics, timing = folder.status(), folder.metrics(), folder.timing()
    config = folder.config
    found: Measured = {
        "state": status.state,
        "settings": config.model_dump(mode="json") | {"start": short(config.start)},
        "epochs": len(metrics),
        "metrics": [line.content() for line in metrics],
    }
    if timing:
        # Of an epoch that was interrupted the second half is timed: a rate, not its seconds.
        speed = statistics.median(line.images_per_second for line in timing)
        found["images_per_second"] = speed
        found["epoch_seconds"] = IMAGES / speed
        found["peak_memory_mib"] = max(line.peak_memory_mib for line in timing)
    return found


# -- evaluation ----------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace, clock: Clock, results: Results) -> bool:
    """Every finished run under the attacks, one after another; whether all is measured."""
    found = results.content.setdefault("runs", {})
    attacks = [word.strip() for word in options.attacks.split(",")]
    key = f"{'+'.join(attacks)} n={options.limit or 'all'}"
    for name in named(options.methods, RUNS):
        path = Path(options.out) / name
        if not path.exists() or RunFolder.open(path).status().state != "finished":
            print(f"{name} is not trained: left out", file=sys.stderr)
            continue
        known = found.setdefault(name, {})
        if key in known and "unfinished" not in known[key]:
            continue
        if clock.left() <= 0:
            return False
        output = Path(options.out) / f"{name}-{'-'.join(attacks)}-{options.limit or 'all'}.json"
        known[key] = cure.evaluate(
            path,
            attacks=attacks,
            limit=options.limit,
            batch_size=options.batch,
            device=options.device,
            seed=options.seed,
            time_limit=clock.left(),
            output=output,
        )
        results.save()
        if "unfinished" in known[key]:
            return False
    return True


# -- report --------------------------------------------------------------------------------------


def report(options: argparse.Namespace) -> None:
    """All that there is as Markdown."""
    there: dict[str, Measured] = {}
    for name in ("bench", "train", "evaluate"):
        path = Path(options.results) / f"{name}.json"
        if path.exists():
            there[name] = json.loads(path.read_text(encoding="utf-8"))
    if not there:
        raise CureError(f"{options.results} holds no results: bench, train or evaluate first")
    lines = ["# One GPU", ""]
    machine = next(reversed(there.values()))["machine"]
    facts = [f"{key} {value}" for key, value in machine.items() if value is not None]
    lines += ["; ".join(facts) + f"; cure {cure.__version__}.", ""]
    if "bench" in there:
        lines += bench_table(there["bench"])
    lines += reproduction(there.get("train", {}), there.get("evaluate", {}))
    lines += ["## Commands", "", "```"]
    for content in there.values():
        lines += [f"{entry['command']}  # {entry['time']}" for entry in content["commands"]]
    lines += ["```", ""]
    write_text(Path(options.results) / "report.md", "\n".join(lines))
    print("\n".join(lines))


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def bench_table(found: Measured) -> list[str]:
    """Speed and memory of a step, against the yardstick on the same machine."""
    ceilings = ", ".join(f"{v / 1000:.3g} {k}" for k, v in found["ceilings_gflops"].items())
    lines = ["## A step", "", f"Matrix products: {ceilings} TFLOP/s.", ""]
    lines += [
        row(
            "net, batch",
            "step",
            "images/s",
            "ratio (range)",
            "seconds an epoch",
            "of ceiling",
            "peak MiB",
            "largest gradient error",
        ),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, net in found["nets"].items():
        plain = net["sides"].get(YARDSTICK, {})
        for side, cells in net["sides"].items():
            if "failed" in cells:
                lines.append(row(name, side, f"failed: {cells['failed']}", *["-"] * 5))
            elif side != YARDSTICK:
                low, high = cells["ratio_range"]
                memory = f"{cells['peak_memory_mib']:.0f}"
                if "peak_memory_mib" in plain:
                    memory += f" ({cells['peak_memory_mib'] / plain['peak_memory_mib']:.2f})"
                error = cells.get("error")
                lines.append(
                    row(
                        name,
                        side,
                        f"{cells['images_per_second']:.0f}",
                        f"{cells['ratio']:.2f} ({low:.2f}-{high:.2f})",
                        f"{cells['epoch_seconds']:.1f}",
                        f"{100 * cells['share_of_ceiling']:.0f} %",
                        memory,
                        f"{error['largest']:.1e}" if error else "-",
                    )
                )
    lines += ["", "Milliseconds a step for the thresholds of all tensors:", ""]
    for name, net in found["nets"].items():
        ways = ", ".join(f"{way} {ms:.2f}" for way, ms in net.get("thresholds_ms", {}).items())
        lines += [f"- {name}: {ways or 'not measured yet'}"]
    return [*lines, ""]


def reproduction(trained: Measured, evaluated: Measured) -> list[str]:
    """Accuracies on test images beside the paper's row."""
    runs = trained.get("runs", {})
    settings = next((run["settings"] for run in runs.values()), None)
    lines = [
        f"## {settings['model']['name']} on {settings['data']['source']}"
        if settings
        else "## No network is trained yet",
        "",
        row("run", "epochs", "seconds an epoch", *ATTACKS.values()),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        row(
            "CURE, paper (resnet18, cifar10)", 200, "-", *(PAPER.get(name, "-") for name in ATTACKS)
        ),
    ]
    for name in RUNS:
        run = runs.get(name)
        if run is None:
            continue
        planned = run["settings"]["training"]["epochs"]
        seconds = f"{run['epoch_seconds']:.1f}" if "epoch_seconds" in run else "-"
        results = list(evaluated.get("runs", {}).get(name, {}).values())
        lines.append(
            row(
                NAMES[name],
                f"{run['epochs']} of {planned}",
                seconds,
                *(accuracy(attack, results) for attack in ATTACKS),
            )
        )
    return [
        *lines,
        "",
        "Percent of test images (Wilson 95 % interval; n), best checkpoint by validation images.",
        "",
    ]


def accuracy(attack: str, results: list[Measured]) -> str:
    """A cell: of the evaluation with the most images."""
    parts = [
        result["natural"] if attack == "natural" else result["attacks"][attack]
        for result in results
        if attack == "natural" or attack in result["attacks"]
    ]
    if not parts:
        return "-"
    part = max(parts, key=lambda part: part["n"])
    low, high = part["interval"]
    return f"{part['accuracy']:.1f} ({low:.1f}-{high:.1f}; {part['n']})"


# -- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The words that this script understands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cuda")
    common.add_argument("--seconds", type=float, default=540, help="work for so long")
    common.add_argument("--out", default="runs/gpu", help="runs and their state")
    common.add_argument("--results", default="results/gpu", help="figures")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--tiny", action="store_true", help="a tiny network: try the script")
    main_parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = main_parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("bench", parents=[common], help="what a step costs")
    one.add_argument("--nets", help="resnet18-128,resnet18-512,wrn-34-10-128")
    one.add_argument("--sides", help=",".join(ALL_SIDES))
    one.add_argument("--repetitions", type=int, default=3)
    one.add_argument("--steps", type=int, default=5, help="in each repetition")
    one.add_argument("--piece-seconds", type=float, default=120, help="begin none with less left")
    one = commands.add_parser("collect", help="put shards of CIFAR-10 where training finds them")
    one.add_argument("--data", required=True)
    one.add_argument("shards", nargs="+")
    one = commands.add_parser("train", parents=[common], help="natural start, then CURE and others")
    one.add_argument("--data", help="the folder that holds cifar10")
    one.add_argument("--epochs", type=int, default=40)
    one.add_argument("--natural-epochs", type=int, default=20)
    one.add_argument("--precision", choices=["fp32", "bf16_attack", "bf16"], default="fp32")
    one.add_argument("--compile", action="store_true", help="the attack, into CUDA graphs")
    one.add_argument("--deterministic", action="store_true")
    one.add_argument("--methods", help="cure,trades,at")
    one.add_argument("--quiet", action="store_true")
    one = commands.add_parser("evaluate", parents=[common], help="attack what was trained")
    one.add_argument("--data", help="the folder that holds cifar10")
    one.add_argument("--attacks", default="pgd20,cw,autoattack")
    one.add_argument("--limit", type=int, help="only the first so many test images")
    one.add_argument("--batch", type=int, default=500, help="images attacked at once")
    one.add_argument("--methods", help="natural,cure,trades,at")
    commands.add_parser("report", parents=[common], help="one table of all")
    return main_parser


def main(words: Sequence[str] | None = None) -> int:
    """Do a piece; the exit status."""
    words = sys.argv[1:] if words is None else words
    options = parser().parse_args(words)
    if getattr(options, "data", None):
        os.environ["CURE_DATA"] = options.data
    try:
        if options.command == "collect":
            collect(options)
            return 0
        if options.command == "report":
            report(options)
            return 0
        clock = Clock(options.seconds)
        if options.command != "evaluate" and options.device != "cpu":
            # What the engine would say only after the data was read.
            pick_device(options.device)
        results = Results(options, options.command, words)
        piece = {"bench": bench, "train": train, "evaluate": evaluate}[options.command]
        finished = piece(options, clock, results)
        results.save()
    except CureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("all done" if finished else "time is over: the same command goes on")
    return 0 if finished else LEFT


if __name__ == "__main__":
    sys.exit(main())
