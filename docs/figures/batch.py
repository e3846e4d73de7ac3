"""The picture of "How a batch travels": `make figures` writes docs/figures/batch.svg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEAL, GREY, RED = "#00796b", "#546e7a", "#d84315"

BOXES = {
    # name: (x, y, width, title, what happens)
    "command": (0, 8, 2.6, "cli, api", "cure train photos\ndata.source=photos/"),
    "config": (3.4, 8, 2.6, "config, recipe", "recipe + key=value\n-> RunConfig"),
    "data": (6.8, 8, 2.6, "data", "images -> splits\n-> ImageSet, uint8"),
    "batch": (10.2, 8, 2.6, "data: loader, augment", "images [B,C,H,W] in [0, 1],\nlabels [B]"),
    "method": (10.2, 5.2, 2.6, "methods", "make_adversarial\ncompute_loss"),
    "attack": (6.8, 5.2, 2.6, "attacks", "climb the loss inside\nthe ball of the threat"),
    "model": (6.8, 2.4, 2.6, "models", "standardise inside,\nimages -> logits"),
    "trainer": (10.2, 2.4, 2.6, "training", "clip, optimiser step,\naverages, validation"),
    "run": (10.2, -0.4, 2.6, "runs", "checkpoints/best.safetensors\nmetrics.jsonl, outcome.json"),
    "evaluation": (6.8, -0.4, 2.6, "evaluation", "accuracies under attack\n-> evaluations/*.json"),
    "report": (3.4, -0.4, 2.6, "analysis, report", "studies, one page\nof HTML"),
}  # fmt: skip

ARROWS = [
    # from, to, text, both ways
    ("command", "config", "words", False),
    ("config", "data", "source", False),
    ("data", "batch", "index", False),
    ("batch", "method", "one batch a step", False),
    ("method", "attack", "images", True),
    ("attack", "model", "K passes", True),
    ("method", "model", "", True),
    ("method", "trainer", "gradients", False),
    ("trainer", "run", "weights, state", False),
    ("run", "evaluation", "", False),
    ("evaluation", "report", "", False),
]
HEIGHT = 1.7


def middle(name: str) -> tuple[float, float]:
    """The centre of a box."""
    x, y, width, *_ = BOXES[name]
    return x + width / 2, y + HEIGHT / 2


def edge(name: str, other: str) -> tuple[float, float]:
    """Where the line from a box to another leaves it."""
    (x, y), (to_x, to_y), width = middle(name), middle(other), BOXES[name][2]
    dx, dy = to_x - x, to_y - y
    share = min(
        width / 2 / abs(dx) if dx else float("inf"), HEIGHT / 2 / abs(dy) if dy else float("inf")
    )
    return x + share * dx, y + share * dy


def draw(axis: Any) -> None:
    """Boxes and arrows."""
    from matplotlib.patches import FancyBboxPatch

    for x, y, width, title, text in BOXES.values():
        axis.add_patch(
            FancyBboxPatch((x, y), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12",
                           facecolor="#e0f2f1", edgecolor=TEAL)
        )  # fmt: skip
        middle_x = x + width / 2
        axis.text(middle_x, y + 1.38, title, ha="center", va="center", weight="bold", color=TEAL)
        axis.text(middle_x, y + 0.66, text, ha="center", va="center", fontsize=9)
    for first, second, text, both in ARROWS:
        start, end = edge(first, second), edge(second, first)
        axis.annotate(
            "",
            end,
            xytext=start,
            arrowprops={"arrowstyle": "<->" if both else "->", "color": GREY, "linewidth": 1.4,
                        "shrinkA": 3, "shrinkB": 3},
        )  # fmt: skip
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        upright = abs(start[0] - end[0]) < 0.1
        axis.text(
            x + (0.12 if upright else 0), y + (0 if upright else 0.2), text,
            ha="left" if upright else "center", va="center", fontsize=8.5, color=GREY,
        )  # fmt: skip
    axis.annotate(
        "", (13.1, 7.9), xytext=(13.1, 2.9),
        arrowprops={"arrowstyle": "->", "color": RED, "linewidth": 1.4},
    )  # fmt: skip
    axis.text(13.2, 5.4, "next\nstep", color=RED, fontsize=8, va="center")


def write(path: Path) -> None:
    """Draw the picture into an SVG file."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "cure", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axis = plt.subplots(figsize=(11, 7.6))
    draw(axis)
    axis.set(xlim=(-0.2, 13.9), ylim=(-0.7, 10))
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    write(HERE / "batch.svg")
