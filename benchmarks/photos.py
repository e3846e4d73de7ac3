"""The recipe ``photos`` on photographs, beside a plain script: accuracies and minutes.

    python benchmarks/photos.py --data FOLDER [--methods at,trades,cure,plain] [--seeds 0,1,2]

For each network and seed: a natural start (four epochs, shared by all methods), then each method
from it.  ``plain`` is a short training loop of this file that uses nothing of the package but the
reading of images and the final evaluation: N-FGSM, epsilon rising over half of the run, frozen
BatchNorm, averaged weights, 16 epochs.  Every choice in training uses images carved from the
training split; the final figures are of the test split.  Rows that are done are skipped, so the
script can be stopped and called again.  ``results/photos/table.json`` holds a row a method, network
and seed.  ``--pixels``, ``--epsilon`` and ``--epochs`` with another ``--output``
(``results/photos/budgets.json``) show what a budget buys.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import cure
from cure.data import load
from cure.data.augment import augment
from cure.models import load_weights, save_weights
from cure.models.batch_norm import freeze_statistics
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.utils.environment import environment
from cure.utils.io import write_json
from cure.utils.memory import keep_freed_memory

NETWORKS: dict[str, dict[str, Any]] = {
    "efficientnet-lite0": {
        "model.name": "efficientnet_lite0",
        "start": "model",
    },
    "resnet18": {
        "model.name": "resnet18",
        "model.options": {"stem": "imagenet"},
        "start": "scratch",
    },
}
"""Settings of each network; ``start`` is what the natural training begins with."""

NATURAL = {
    "efficientnet-lite0": {
        "training.epochs": 4,
        "training.optimizer.learning_rate": 0.01,
        "training.optimizer.weight_decay": 1e-4,
    },
    "resnet18": {"training.epochs": 30, "training.optimizer.learning_rate": 0.05},
}
"""Settings of the natural start of a network."""

NATURAL_COMMON = {
    "method": "natural",
    "data.augment.cutmix": 0,
    "training.batch_norm": "eval_attack",
    "training.schedule": {"name": "one_cycle", "peak": 0.3},
    "training.averaging": None,
}
"""Settings of every natural start."""

METHODS: dict[str, dict[str, Any]] = {
    "at": {"method": "at", "attack.epsilon_factor": 1},
    "trades": {"method": {"name": "trades", "beta": 3.0}, "attack.epsilon_factor": 1},
    "cure": {},
}
"""What each row changes about the recipe."""


def main() -> None:
    """Train and evaluate what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--network", default="efficientnet-lite0", choices=NETWORKS)
    parser.add_argument("--methods", default="at,trades,cure,plain")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--minutes", type=float, help="budget of each method; default: the recipe's epochs"
    )
    parser.add_argument("--epochs", type=int, help="of each method; default: the recipe's")
    parser.add_argument("--pixels", type=int, default=96, help="side of the resized photographs")
    parser.add_argument("--epsilon", default="4/255", help="radius of the threat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--autoattack", type=int, default=200, help="test images for AutoAttack; 0: leave it out"
    )
    parser.add_argument("--runs", default="runs/photos", help="folder of the trained runs")
    parser.add_argument("--output", default="results/photos/table.json")
    options = parser.parse_args()
    keep_freed_memory()  # As the command does.
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    for seed in map(int, options.seeds.split(",")):
        start = natural_start(options, seed)
        for method in ["natural", *options.methods.split(",")]:
            key = {"method": method, "network": options.network, "seed": seed} | budget(options)
            row = next((row for row in rows_of(output) if same(row, key)), None)
            if row is None:
                target, facts = trained_by(options, method, seed, start)
                row = key | facts | accuracies(options, target, ["pgd20"], None)
                keep(output, row | {"autoattack": None})
            if options.autoattack and row.get("autoattack") is None:
                target, _ = trained_by(options, method, seed, start)
                keep(output, row | accuracies(options, target, ["autoattack"], options.autoattack))


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The rows that are done."""
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"] if output.exists() else []
    return rows


def budget(options: argparse.Namespace) -> dict[str, Any]:
    """What of a row's key is not the table's: empty for the table itself."""
    asked = {"pixels": options.pixels, "epsilon": options.epsilon}
    if asked == {"pixels": 96, "epsilon": "4/255"} and Path(options.output).stem.startswith(
        "table"
    ):
        return {}
    return asked | {"epochs": options.epochs}


def same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    """Whether a row has the method, network, seed and budget of another."""
    names = ("method", "network", "seed", "pixels", "epsilon", "epochs")
    return all(row.get(name) == key.get(name) for name in names)


def place(options: argparse.Namespace, method: str, seed: int) -> Path:
    """Folder of a run."""
    words = [options.network, method, f"seed{seed}"]
    extra = budget(options)
    if extra and method == "natural":
        words.append(f"{options.pixels}px")
    elif extra:
        words.append("-".join(str(value).replace("/", "_") for value in extra.values()))
    return Path(options.runs) / "-".join(words)


def keep(output: Path, row: dict[str, Any]) -> None:
    """Write a row in place of the one of the same method, network and seed."""
    print(json.dumps(row), flush=True)
    row["processor"] = {k: environment()[k] for k in ("processor", "cores", "commit")}
    rows = [other for other in rows_of(output) if not same(other, row)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"rows": [*rows, row], "environment": environment()})


def common(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Settings of every run."""
    return NETWORKS[options.network] | {
        "data.source": options.data,
        "data.resize": options.pixels,
        "threat.epsilon": options.epsilon,
        "seed": seed,
        "training.threads": options.threads,
    }


def natural_start(options: argparse.Namespace, seed: int) -> Path:
    """The run that all methods of a seed begin with, trained where it is missing."""
    return trained(
        place(options, "natural", seed),
        common(options, seed) | NATURAL[options.network] | NATURAL_COMMON,
    )


def trained(path: Path, settings: dict[str, Any]) -> Path:
    """A finished run at ``path``: trained, resumed or there already."""
    if path.exists():
        if not RunFolder.open(path).status().finished:
            cure.resume(path)
    else:
        cure.train("photos", settings, run=path)
    return path


def trained_by(
    options: argparse.Namespace, method: str, seed: int, start: Path
) -> tuple[Any, dict[str, Any]]:
    """The network of a row, trained where it is missing; minutes, threads and settings."""
    path = place(options, method, seed)
    if method == "natural":
        return cure.Run(start), {"minutes": 0.0, "threads": options.threads, "settings": {}}
    if method == "plain":
        network, facts = plain(options, seed, start, path)
        return network, facts
    settings = dict(METHODS[method])
    if options.minutes:
        settings["training.minutes"] = options.minutes
    if options.epochs:
        settings["training.epochs"] = options.epochs
    began = time.perf_counter()
    trained(path, common(options, seed) | settings | {"start": str(start)})
    whole = (time.perf_counter() - began) / 60
    run = RunFolder.open(path)
    timing = run.timing()
    inside = sum((line.seconds or 0) + (line.validation_seconds or 0) for line in timing) / 60
    settings["training.epochs"] = run.config.training.epochs
    return cure.Run(path), {
        # A resumed run's wall time here is that of its last part alone.
        "minutes": round(max(whole, inside), 1),
        # Without validation; of all threads, so other work on the machine hardly changes it.
        "processor_minutes": round(sum(line.processor_seconds or 0 for line in timing) / 60, 1),
        "threads": run.config.training.threads,
        "settings": settings,
    }


def accuracies(
    options: argparse.Namespace, target: Any, attacks: list[str], limit: int | None
) -> dict[str, Any]:
    """Accuracies on the test split, in percent, each with its interval and number of images."""
    config = load_recipe(
        "photos",
        [f"data.source={options.data}", "model.name=resnet18", f"data.resize={options.pixels}"],
    )
    result = cure.evaluate(
        target,
        data=options.data,
        data_options=config.data.model_dump(include={"resize", "fit", "color"}),
        attacks=attacks,
        epsilon=options.epsilon,
        batch_size=100,
        limit=limit,
    )
    found = {name: result["attacks"][name] for name in attacks}
    if limit is None:
        found["natural"] = result["natural"]
    return {
        key: value
        for name, accuracy in found.items()
        for key, value in (
            (name, round(accuracy["accuracy"], 2)),
            (f"{name}_interval", accuracy["interval"]),
            (f"{name}_n", accuracy["n"]),
        )
    }


def plain(
    options: argparse.Namespace, seed: int, start: Path, path: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The plain script: 16 epochs from the natural start; its averaged network, and its cost."""
    weights, record = path / "weights.safetensors", path / "cost.json"
    if record.exists():
        network = cure.Run(start).model()
        freeze_statistics(network)
        load_weights(network, weights)
        facts: dict[str, Any] = json.loads(record.read_text())
        return network.eval(), facts
    epochs, batch, epsilon, rate = 16, 32, float(Fraction(options.epsilon)), 0.02
    run = cure.Run(start)
    network, images = run.model(), load(run.config.data, "train")
    network = network.to(memory_format=torch.channels_last)
    freeze_statistics(network)
    average = copy.deepcopy(network)
    draws = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(
        network.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = len(images) // batch
    began, worked = time.perf_counter(), time.process_time()
    for done in range(epochs * steps):
        if done % steps == 0:
            order = torch.randperm(len(images), generator=draws)
            network.train()
        index = order[done % steps * batch :][:batch]
        natural = augment(images.image[index], run.config.data.augment, draws).float() / 255
        natural = natural.contiguous(memory_format=torch.channels_last)
        label, share = images.label[index], done / (epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, share / 0.1)
            group["lr"] *= 0.5 * (1 + math.cos(math.pi * max(0, share - 0.1) / 0.9))
        reach = epsilon * min(1, share / 0.5)
        point = natural + reach * (2 * torch.rand_like(natural) - 1)
        attacked = (point + reach * input_gradient(network, point, label).sign()).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(network(attacked), label).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.99, (done + 1) / (10 + done))
            for ours, theirs in zip(average.parameters(), network.parameters(), strict=True):
                ours.lerp_(theirs, 1 - decay)
    facts = {
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "processor_minutes": round((time.process_time() - worked) / 60, 1),
        "threads": options.threads,
        "settings": {"epochs": epochs},
    }
    path.mkdir(parents=True, exist_ok=True)
    save_weights(average, weights, {})
    write_json(record, facts)
    return average.eval(), facts


def input_gradient(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """Gradient of the cross-entropy by the image [B, C, H, W]."""
    image = image.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(image), label), image)
    return gradient


if __name__ == "__main__":
    main()
