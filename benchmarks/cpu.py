"""What a CURE step costs on a processor: ours against the straightforward one.

``make bench``, or ``python benchmarks/cpu.py [--output results/bench/cpu.json] [--threads 2]
[--repetitions 3] [--quick]``

Both sides run in one process in turn on the same random images; a ratio is of times from the same
round.  It wants a quiet machine: compare ``seconds_range`` before believing a ratio.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import step
from step import SIDES, YARDSTICK, Net

NETS = {
    "resnet10": Net("resnet10", {"width": 16}, 128),
    "resnet18": Net("resnet18", {}, 64),
}
GROWTH = {
    "batch": [Net("resnet10", {"width": 16}, batch) for batch in (32, 64, 128, 256)],
    "width": [Net("resnet10", {"width": width}, 64) for width in (8, 16, 32)],
}
NAMES = {
    YARDSTICK: "straightforward CURE",
    "exact": "CURE, exact (float32)",
    "bf16_attack": "CURE, attack in bfloat16",
    "bf16": "CURE, all in bfloat16",
    "trades": "TRADES, exact (float32)",
}


def measured(net: Net, repetitions: int, threads: int, machine: dict[str, float]) -> dict[str, Any]:
    """All that is measured of one network."""
    sides = (YARDSTICK, *SIDES)
    times = step.in_turn(net, sides, repetitions)
    found: dict[str, Any] = {"net": step.describe(net), "sides": times}
    for name in sides:
        row = times[name]
        row["peak_memory_mib"] = step.peak_memory(name, net, threads)
        row["passes"] = step.count_passes(name, net)
        row["share_of_ceiling"] = step.share_of_ceiling(name, net, row["seconds_per_step"], machine)
        if name not in (YARDSTICK, "trades"):
            row["error"] = step.errors(name, net)
            row["time_by_operation"] = step.groups(name, net)
    return found


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that the goals are about, of one network."""
    sides = found["sides"]
    memory = {name: row["peak_memory_mib"] for name, row in sides.items()}
    return {
        "exact": sides["exact"]["ratio"],
        "bf16_attack": sides["bf16_attack"]["ratio"],
        "bf16": sides["bf16"]["ratio"],
        "memory": memory["exact"] / memory[YARDSTICK],
        # The price of CURE: its time over that of TRADES.
        "trades": sides["trades"]["ratio"] / sides["exact"]["ratio"],
        "spread": {name: sides[name]["ratio_range"] for name in ("exact", "bf16_attack", "bf16")},
        "errors": {name: sides[name]["error"] for name in ("exact", "bf16_attack", "bf16")},
        "share_of_ceiling": {name: row["share_of_ceiling"] for name, row in sides.items()},
    }


def show(console: Console, net: Net, found: dict[str, Any]) -> None:
    """The table of one network."""
    table = Table(title=net.text)
    table.add_column("step")
    headings = (
        "images/s",
        "ratio",
        "(range)",
        "of ceiling",
        "peak MiB",
        "passes",
        "gradient error",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, row in found["sides"].items():
        passes = row["passes"]
        low, high = row["ratio_range"]
        table.add_row(
            NAMES[name],
            f"{row['images_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{100 * row['share_of_ceiling']:.0f} %",
            f"{row['peak_memory_mib']:.0f}",
            f"{passes['forward']}+{passes['backward']} (+{passes['revision']})",
            f"{row['error']['largest']:.1e}" if "error" in row else "",
        )
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/bench/cpu.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one tiny network, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    nets = {"tiny": Net("resnet10", {"width": 4}, 8)} if options.quick else NETS
    growth = {} if options.quick else GROWTH
    ceiling = step.ceilings("cpu")
    result: dict[str, Any] = {
        "format": "cure-bench-1",
        "command": "make bench",
        "machine": step.machine(),
        "ceilings_gflops": ceiling,
        "repetitions": options.repetitions,
        "ratios": {},
        "nets": {},
        "growth": {},
    }
    console.print(
        f"matrix products: {ceiling['fp32']:.0f} GFLOP/s fp32, {ceiling['bf16']:.0f} bf16"
    )
    for name, net in nets.items():
        found = measured(net, options.repetitions, options.threads, ceiling)
        result["nets"][name], result["ratios"][name] = found, ratios(found)
        show(console, net, found)
        # What is done is kept when the rest is interrupted.
        step.write(options.output, result)
    for what, several in growth.items():
        result["growth"][what] = []
        for net in several:
            times = step.in_turn(net, ("exact", "bf16_attack"), options.repetitions)
            row = {name: times[name]["images_per_second"] for name in times}
            result["growth"][what].append({"net": step.describe(net), "images_per_second": row})
            console.print(
                f"{net.text}: {row['exact']:.0f} images/s exact, "
                f"{row['bf16_attack']:.0f} with the attack in bfloat16"
            )
    step.write(options.output, result)
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
