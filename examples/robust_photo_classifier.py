"""Make your own photo classifier robust: python robust_photo_classifier.py [FOLDER]

FOLDER has one sub-folder of images a class; without it, a few are drawn.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

import cure


def drawn_photos() -> Path:
    """Noisy pictures with a bright top ("sky") or a bright bottom ("snow")."""
    folder, draws = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    for name in ("sky", "snow"):
        (folder / name).mkdir()
        for number in range(100):
            pixels = draws.integers(0, 120, (32, 32, 3))
            half = slice(0, 16) if name == "sky" else slice(16, 32)
            pixels[half] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


drawn = len(sys.argv) < 2
folder = drawn_photos() if drawn else Path(sys.argv[1])
classes = sum(entry.is_dir() for entry in folder.iterdir())

# Yours: images [B, C, H, W] in [0, 1] to logits; best with pretrained weights.  A network for
# standardised images is wrapped: cure.models.Normalised(network, mean, std).
network = nn.Sequential(
    nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
    nn.Linear(128, classes),
)  # fmt: skip

settings = {"training.epochs": 8, "data.resize": 32} if drawn else {}
run = cure.train("photos", settings, model=network, data=folder, run=tempfile.mkdtemp() + "/run")
result = cure.evaluate(run, attacks=["pgd20"])
print(f"natural {result['natural']['accuracy']:.1f} %")
print(f"PGD-20 {result['attacks']['pgd20']['accuracy']:.1f} % at 4/255")
robust = run.model()  # a torch.nn.Module, ready to use
