"""A robust start: the head is trained alone first, then everything from what that gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cure
from cure.errors import CheckpointError
from cure.runs.folder import RunFolder
from helpers import bright_or_dark

SETTINGS = {
    "data.validation": 16,
    "model.name": "small_cnn",
    "threat.epsilon": "8/255",
    "attack.step_size": "4/255",
    "attack.steps": 2,
    "training.batch_size": 16,
    "training.threads": 1,
    "training.validation_steps": 2,
    "training.epochs": 4,
    "training.averaging": None,
}


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of three classes."""
    path = tmp_path_factory.mktemp("robust") / "run"
    cure.train(
        "digits",
        {**SETTINGS, "start": "scratch", "method": "at", "training.epochs": 1},
        data=bright_or_dark(classes=3),
        run=path,
        quiet=True,
    )
    return path


def started(robust: Path, path: Path, **settings: object) -> RunFolder:
    """A run on two classes from the robust backbone."""
    given = SETTINGS | {"start": f"robust:{robust}", "method": "at"} | settings
    cure.train("digits", given, data=bright_or_dark(), run=path, quiet=True)
    return RunFolder.open(path)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def test_only_the_head_learns_first(robust: Path, tmp_path: Path) -> None:
    run = started(robust, tmp_path / "run", **{"head.share": 0.5})
    before = weights(RunFolder.open(robust).weights("best"))
    head = RunFolder.open(run.path / "head")
    assert head.config.training.epochs == 2
    assert head.config.method.name == "at"
    after = weights(head.weights("last"))
    heads = [name for name in after if after[name].shape != before[name].shape]
    assert heads
    assert all("weight" in name or "bias" in name for name in heads)
    alike = [name for name in after if name not in heads]
    assert alike
    assert all(torch.equal(after[name], before[name]) for name in alike)
    assert after[heads[0]].shape[0] == 2
    # Then everything learns, and the start that was measured is that of the trained head.
    end = weights(run.weights("last"))
    assert not any(torch.equal(end[name], before[name]) for name in alike if "weight" in name)
    outcome = run.outcome()
    assert outcome is not None
    measured = [line.validation for line in head.metrics() if line.validation is not None]
    assert outcome.start.natural == max(measured, key=lambda found: found.robust).natural


def test_a_head_without_training_is_drawn(robust: Path, tmp_path: Path) -> None:
    run = started(robust, tmp_path / "run", **{"head.share": 0.0, "training.epochs": 1})
    assert not (run.path / "head").exists()


def test_a_missing_backbone_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*does not exist"):
        started(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()
