"""Which copies of held-out photographs are found, by their pixels and by a network's features.

    python benchmarks/leaks.py --data FOLDER [--copies 100] [--held 300] [--training 1000]

Copies of test photographs are changed in one way each and looked for among the held-out ones, as
``data.extra`` does.  ``found`` counts copies that are suspect and led to what they copy.  The
network is an EfficientNet-lite0 with ImageNet weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cure.config import DataConfig, ModelConfig
from cure.data import ImageSet, load
from cure.data.leaks import nearest, resembling, threshold
from cure.models.build import build_model
from cure.models.features import Features
from cure.utils.environment import environment
from cure.utils.io import write_json
from cure.utils.stats import wilson


def turned(degrees: float, side: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Rotates photographs [N, C, H, W] and keeps a middle square of that share of the side."""
    angle = math.radians(degrees)
    rows = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]

    def change(image: Tensor) -> Tensor:
        turn = (side * torch.tensor(rows)).expand(len(image), 2, 3)
        grid = F.affine_grid(turn, list(image.shape), align_corners=False)
        return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)

    return change


def noisy(image: Tensor) -> Tensor:
    """Adds noise of 25 levels."""
    draws = torch.Generator().manual_seed(0)
    return image + 25 * torch.randn(image.shape, generator=draws)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda image: image,
    "mirrored": lambda image: image.flip(-1),
    "rotated by 15 degrees": turned(15),
    "rotated by 30 degrees": turned(30),
    "cropped to 70 % of the side": turned(0, 0.7),
    "cropped to 50 % of the side": turned(0, 0.5),
    "channels exchanged": lambda image: image[:, [1, 2, 0]],
    "grey": lambda image: image.mean(1, keepdim=True).expand_as(image),
    "half as bright": lambda image: image / 2,
    "noise of 25 levels": noisy,
    "blurred over 5 pixels": lambda image: F.avg_pool2d(image, 5, 1, 2),
}


def chosen(images: ImageSet, count: int) -> ImageSet:
    """Images that a seed draws."""
    draws = torch.Generator().manual_seed(0)
    return images.subset(torch.randperm(len(images), generator=draws)[:count])


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--held", type=int, default=300)
    parser.add_argument("--training", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("results/bench/leaks.json"))
    options = parser.parse_args()
    config = DataConfig(source=options.data, resize=96, fit="crop")
    held = chosen(load(config, "test"), options.held)
    training = chosen(load(config, "train"), options.training)
    model = ModelConfig(name="efficientnet_lite0")
    network = build_model(model, classes=10, channels=3, size=held.size, seed=0).eval()
    describe, limit = Features(network, 10), threshold(training, held)
    originals = torch.arange(options.copies)
    rows = {}
    for name, change in CHANGES.items():
        changed = change(held.image[: options.copies].float()).round().clamp(0, 255)
        copies = replace(held, image=changed.to(torch.uint8), label=held.label[: options.copies])
        pixels = nearest(copies, held)
        features = resembling(copies, held, training, describe)
        found = {
            "pixels": int(((pixels.similarity >= limit) & (pixels.position == originals)).sum()),
            "features": int((features.position == features.rows).sum()),
        }
        rows[name] = {
            side: {"found": count, "interval": wilson(count, options.copies)}
            for side, count in found.items()
        }
        print(f"{name}: {found}", flush=True)
    sizes = {name: getattr(options, name) for name in ("copies", "held", "training")}
    facts = {"threshold": limit, "usual": features.usual, "seed": 0, "pixels": 96}
    write_json(options.output, sizes | facts | {"changes": rows, "environment": environment()})


if __name__ == "__main__":
    main()
