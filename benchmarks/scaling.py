"""What large trainings by CURE cost on 1, 8 and 64 GPUs, worked out: the tables of docs/scaling.md.

``python benchmarks/scaling.py [--peak 790 --share 0.35 --inside 300 --between 40]``

Operations are counted on tensors without values, in every convolution and product of a forward
pass and of both halves of a backward pass; passes are those of the method's card; bytes are what
``benchmarks/ranks.py`` counts: one exchange of the network's size for each gradient.  Speeds are
assumptions, and arguments.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

import cure
from cure.config import ModelConfig
from cure.data import Batch
from cure.models import build_model
from step import _Operations

PASSES = {
    "cure": {"forward": 15, "data": 14, "weights": 4, "gradients": 3},
    "trades": {"forward": 13, "data": 12, "weights": 2, "gradients": 1},
}
"""A step with 10 attack steps.  ``data`` and ``weights``: the halves of a backward pass, of which
an attack needs the first alone; ``gradients``: what ranks average."""
GPUS = (1, 8, 64)
MACHINE = 8
"""GPUs in a machine."""


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        name: for people.
        model: network.
        options: of the network.
        classes: of the data.
        side: of its images, pixels.
        images: for training.
        epochs: passes over them.
        batch: images a step, of all GPUs together.
    """

    name: str
    model: str
    options: dict[str, str]
    classes: int
    side: int
    images: int
    epochs: int
    batch: int

    def network(self) -> nn.Module:
        """It, without storage."""
        size = (self.side, self.side)
        config = ModelConfig(name=self.model, options=self.options)
        built = build_model(config, classes=self.classes, channels=3, size=size, seed=0)
        return built.to("meta")


CASES = (
    Case("WideResNet-34-10, CIFAR-10", "wide_resnet", {}, 10, 32, 50_000, 200, 128),
    Case("ResNet-50, ImageNet", "resnet50", {"stem": "imagenet"}, 1000, 224, 1_281_167, 90, 1024),
)


def operations(case: Case) -> dict[str, float]:
    """GFLOP of one image: a forward pass, and the halves of a backward pass."""
    network, count = case.network(), 2
    image = torch.empty(count, 3, case.side, case.side, device="meta", requires_grad=True)

    def passes(weights: bool, back: bool) -> float:
        network.requires_grad_(weights)
        with _Operations() as counter:
            logits = network(image)
            if back:
                wanted = list(network.parameters()) if weights else []
                torch.autograd.grad(logits.sum(), [image, *wanted])
        return counter.count / 1e9 / count

    forward = passes(weights=False, back=False)
    with_data = passes(weights=False, back=True)
    return {
        "forward": forward,
        "data": with_data - forward,
        "weights": passes(weights=True, back=True) - with_data,
    }


ONE_GPU = ("cifar10-resnet18-trades-awp", "cifar10-resnet18-cure-awp", "cifar10-resnet18-cure")
"""Recipes whose cost on one GPU is printed."""


def step_cost(recipe: str) -> float:
    """GFLOP of one image in one step of a recipe: counted while two images go through it."""
    config = cure.load_recipe(recipe)
    network = build_model(config.model, classes=10, channels=3, size=(32, 32), seed=0)
    attack = cure.attacks.PGD(
        cure.Threat(config.threat.norm, config.threat.epsilon),
        steps=config.attack.steps,
        step_size=config.attack.step_size,
    )
    options = {"beta": 6.0} if config.method.name == "trades" else {"steps": 1000}
    method = getattr(cure.methods, config.method.name.upper())(network, attack=attack, **options)
    if config.training.weight_perturbation is not None:
        method = cure.methods.AWP(method, gamma=config.training.weight_perturbation.gamma)
    batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2), 0)
    with _Operations() as counter:
        method.train().take_step(batch).gradients()
    return counter.count / 1e9 / len(batch.image)


def exchange(size: float, gpus: int, inside: float, between: float) -> float:
    """Seconds of an all-reduce in a ring, whose slowest link decides; speeds in bytes a second."""
    if gpus == 1:
        return 0.0
    return 2 * (gpus - 1) / gpus * size / (inside if gpus <= MACHINE else between)


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", type=float, default=790, help="bf16 products, TFLOP/s")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that a step reaches")
    parser.add_argument("--inside", type=float, default=300, help="GB/s a GPU inside a machine")
    parser.add_argument("--between", type=float, default=40, help="GB/s a GPU between machines")
    options = parser.parse_args()
    speed = options.peak * 1e12 * options.share
    print("| | parameters | tensors | F | D | W | TRADES | CURE | MB a step, TRADES | CURE |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    costs = {}
    for case in CASES:
        parameters = list(case.network().parameters())
        count = sum(parameter.numel() for parameter in parameters)
        parts = operations(case)
        image = {
            method: sum(passes[part] * parts[part] for part in parts)
            for method, passes in PASSES.items()
        }
        size = {method: 4.0 * count * passes["gradients"] for method, passes in PASSES.items()}
        costs[case.name] = (image, size)
        print(
            f"| {case.name} | {count / 1e6:.2f} M | {len(parameters)} "
            + "".join(f"| {value:.2f} " for value in parts.values())
            + "".join(f"| {image[method]:.0f} " for method in ("trades", "cure"))
            + "".join(f"| {size[method] / 1e6:.0f} " for method in ("trades", "cure"))
            + "|"
        )
    print()
    print("| CURE | GPUs | images a GPU | computing, ms | exchange, ms | epoch | run |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in CASES:
        image, size = costs[case.name]
        for gpus in GPUS:
            computing = image["cure"] * 1e9 * case.batch / gpus / speed
            waiting = exchange(size["cure"], gpus, options.inside * 1e9, options.between * 1e9)
            epoch = case.images // case.batch * (computing + waiting)
            print(
                f"| {case.name} | {gpus} | {case.batch // gpus} | {1000 * computing:.1f} "
                f"| {1000 * waiting:.1f} | {epoch:.0f} s | {case.epochs * epoch / 3600:.1f} h |"
            )
    print()
    print("| recipe | GFLOP an image and step | epochs | minutes on one GPU |")
    print("| --- | ---: | ---: | ---: |")
    for recipe in ONE_GPU:
        training, cost = cure.load_recipe(recipe).training, step_cost(recipe)
        minutes = 50_000 * training.epochs * cost * 1e9 / speed / 60
        print(f"| {recipe} | {cost:.1f} | {training.epochs} | {minutes:.0f} |")


if __name__ == "__main__":
    main()
