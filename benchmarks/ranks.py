"""Images a second with one and with two processes, and the bytes that a step exchanges.

``python benchmarks/ranks.py [--steps 5] [--model resnet10 --width 16] [--batch 64]``

Both share the machine's cores evenly and train on the same random images, in turn, so the ratio is
what a second process gains over a second set of threads.  On one machine that is little; the bytes
are what a network between machines must carry.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cure import data
from cure.data import ImageSet
from cure.recipe import check, override, read_recipe
from cure.runs.folder import RunFolder
from cure.training.setup import build_method, prepare
from cure.training.trainer import Trainer
from cure.utils.distributed import leave


def measured(method: str, options: argparse.Namespace) -> dict[str, float]:
    """Images a second of this process's run, and what a step of it exchanges."""
    import torch

    draws = torch.Generator().manual_seed(0)
    count = options.batch * (options.steps + 1)
    image = torch.randint(0, 256, (count + 10, 3, 32, 32), generator=draws).to(torch.uint8)
    label = torch.arange(count + 10) % 10
    images = ImageSet(image, label, tuple(map(str, range(10))), "random", "train")
    raw = read_recipe("digits")
    settings = {
        "model": {"name": options.model, "options": {"width": options.width}},
        "method": {"name": method},
        "start": "scratch",
        "data.validation": 10,
        "attack.steps": 10,
        "training.batch_size": options.batch,
        "training.device": options.device,
        "training.threads": options.threads,
    }
    for key, value in settings.items():
        override(raw, key, value)
    config = check(raw, "the benchmark")
    prepared = prepare(config, images, None)
    engine = prepared.engine
    engine.place(prepared.network)
    made = build_method(config, prepared)
    folder = RunFolder(Path("."), writes=False)
    loop = Trainer(config, made, prepared.training, prepared.validation, engine, folder)
    made.on_epoch(0)
    made.train()
    began, before, loss = 0.0, (0, 0), 0.0
    for batch in data.epoch(
        loop.training,
        batch_size=options.batch,
        epoch=0,
        seed=0,
        augment=config.data.augment,
        rank=engine.rank,
        world=engine.world,
    ):
        # Reading the loss waits for the device.
        loss = loop.train_step(batch)["loss"].item()
        if batch.step == 0:  # It warmed up.
            began = time.perf_counter()
            before = (engine.traffic.calls, engine.traffic.bytes)
    assert loss == loss, "the loss is not a number"
    seconds = time.perf_counter() - began
    return {
        "images_per_second": options.batch * options.steps / seconds,
        "calls": (engine.traffic.calls - before[0]) / options.steps,
        "bytes": (engine.traffic.bytes - before[1]) / options.steps,
        "weights": sum(p.numel() * p.element_size() for p in loop.parameters.values()),
    }


def launch(world: int, method: str, options: argparse.Namespace) -> dict[str, float]:
    """What the first of ``world`` processes measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = max(1, options.cores // world)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--worker", method, "--output", f"{folder}/found.json"]
        for name in ("steps", "model", "width", "batch", "device"):
            words += [f"--{name}", str(getattr(options, name))]
        started = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own["OMP_NUM_THREADS"] = str(threads)
            started.append(
                subprocess.Popen([*words, "--threads", str(threads)], env=os.environ | own)
            )
        for process in started:
            process.wait()
        found: dict[str, float] = json.loads(Path(folder, "found.json").read_text())
    return found


def main() -> None:
    """Both numbers of processes in turn, for two methods, as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--model", default="resnet10")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        found = measured(options.worker, options)
        if os.environ["RANK"] == "0":
            Path(options.output).write_text(json.dumps(found))
        leave()
        return
    print(f"{options.model} of width {options.width}, batch {options.batch}, {options.cores} cores")
    print("method  processes  images/s  ratio  exchanges a step  MB a step  of the weights")
    for method in ("trades", "cure"):
        alone = launch(1, method, options)
        for world, found in ((1, alone), (2, launch(2, method, options))):
            ratio = found["images_per_second"] / alone["images_per_second"]
            print(
                f"{method:<6}  {world:>9}  {found['images_per_second']:>8.1f}  {ratio:>5.2f}  "
                f"{found['calls']:>16.1f}  {found['bytes'] / 1e6:>9.2f}  "
                f"{found['bytes'] / found['weights']:>14.2f}"
            )


if __name__ == "__main__":
    main()
