"""Which weights are the best where classes have unequal numbers of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cure
from cure.data import ImageSet
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.training.validation import validate
from cure.utils.engine import Engine
from helpers import bright_or_dark

SETTINGS = {
    "data.validation": 60,
    "model.name": "small_cnn",
    "model.options": {"width": 2},
    "start": "scratch",
    "method": "at",
    "attack.steps": 1,
    "attack.step_size": "2/255",
    "threat.epsilon": "2/255",
    "training.batch_size": 16,
    "training.threads": 1,
    "training.epochs": 2,
    "training.averaging": None,
}


def unequal(few: int = 30, many: int = 270) -> ImageSet:
    """Images of which one class has nine tenths."""
    images = bright_or_dark(2 * many)
    first = (images.label == 0).nonzero().squeeze(1)[:many]
    second = (images.label == 1).nonzero().squeeze(1)[:few]
    return images.subset(torch.cat([first, second]))


class Always(nn.Module):
    """Names the first class whatever the image; the gradient is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        logit = 5 + self.scale * image.mean(dim=(1, 2, 3))
        return torch.stack([logit, -logit], dim=1)


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    config = load_recipe("digits", ["model.name=small_cnn"])
    engine = Engine(torch.device("cpu"))
    found = validate(Always(), unequal(), config, engine, steps=1, balanced=True)
    assert found == {
        "natural": 90.0,
        "robust": 90.0,
        "natural_balanced": 50.0,
        "robust_balanced": 50.0,
    }
    plain = validate(Always(), unequal(), config, engine, steps=1)
    assert plain == {"natural": 90.0, "robust": 90.0}


@pytest.mark.parametrize(
    ("images", "select", "balanced"),
    [
        (unequal(), "auto", True),
        (unequal(), "accuracy", False),
        (bright_or_dark(300), "auto", False),
        (bright_or_dark(300), "balanced", True),
    ],
)
def test_the_figure_of_the_choice(
    images: ImageSet, select: str, balanced: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    cure.train("digits", SETTINGS | {"training.select": select}, data=images, run=run)
    said = capsys.readouterr()
    assert ("chosen by balanced accuracy" in said.out + said.err) == balanced
    lines = [line.validation for line in RunFolder.open(run).metrics()]
    assert all((line.robust_balanced is not None) == balanced for line in lines)
    best = RunFolder.open(run).status().content()["best"]["validation"]
    figure = "robust_balanced" if balanced else "robust"
    assert best[figure] == max(getattr(line, figure) for line in lines)
