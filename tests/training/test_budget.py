"""A budget of minutes becomes a number of epochs, fixed for the run."""

from __future__ import annotations

from pathlib import Path

import pytest

import cure
from cure.errors import ConfigError
from cure.training import budget

SETTINGS = {
    "method": "at",
    "start": "scratch",
    "data.limit": 300,
    "data.validation": 0.2,
    "training.batch_size": 48,
    "training.threads": 1,
    "attack.steps": 2,
    "training.validation_steps": 2,
}


def test_as_many_epochs_as_fit_are_trained_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step of 1 s, a validation of 2 s: 5 steps and a validation take 7 s, and 3 validations
    # (6 s) are kept for start and end: 0.95 * 60 - 6 = 51 s hold 7 epochs.
    monkeypatch.setattr(budget, "_times", lambda config, prepared: (1.0, 2.0))
    run = cure.train("digits", SETTINGS | {"training.minutes": 1}, run=tmp_path / "run", quiet=True)
    assert run.config.training.epochs == 7
    assert run.config.data.validation == 60
    assert [record["epoch"] for record in run.metrics] == list(range(1, 8))


def test_a_budget_below_one_epoch_is_refused_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_times", lambda config, prepared: (100.0, 2.0))
    with pytest.raises(ConfigError, match=r"an epoch takes about 8.4 minutes here.*data.limit"):
        cure.train("digits", SETTINGS | {"training.minutes": 1}, run=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_steps_are_really_timed(tmp_path: Path) -> None:
    run = cure.train(
        "digits", SETTINGS | {"training.minutes": 0.02}, run=tmp_path / "run", quiet=True
    )
    assert run.config.training.epochs >= 1
