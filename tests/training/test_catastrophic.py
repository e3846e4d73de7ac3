"""Catastrophic overfitting: it happens, is found, and ends with two steps, also when resumed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cure
from cure.attacks import PGD, Threat
from cure.data import Batch
from cure.methods import Context
from cure.training.catastrophic import CatastrophicOverfitting
from cure.training.trainer import Trainer
from cure.utils.engine import Engine

SETTINGS = {
    "method": "at",
    "natural.epochs": 8,
    "data.limit": 600,
    "data.validation": 100,
    "threat.epsilon": 0.2,
    "attack.name": "n-fgsm",
    "attack.noise": 0,
    "attack.check_every": 5,
    "attack.step_size": 0.05,
    "training.epochs": 20,
    "training.batch_size": 50,
    "training.optimizer.learning_rate": 0.3,
    "training.clip_norm": 1.0,
    "training.collapse_patience": 50,
    "training.threads": 1,
}


def test_it_is_found_once_and_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cure.train("digits", SETTINGS, run=tmp_path / "whole")
    said = capsys.readouterr().err
    assert said.count("catastrophic overfitting at step") == 1
    assert "with a two-step attack" in said
    assert [record["epoch"] for record in run.metrics] == list(range(1, 21))

    step, calls = Trainer.train_step, 0

    def stopping(self: Trainer, *arguments: Any) -> Any:
        nonlocal calls
        calls += self.config.method.name == "at"
        if calls == 190:
            raise RuntimeError("planted")
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(RuntimeError, match="planted"):
        cure.train("digits", SETTINGS, run=tmp_path / "stopped")
    monkeypatch.undo()
    cure.resume(tmp_path / "stopped", quiet=True)
    for file in ("metrics.jsonl", "outcome.json"):
        assert (tmp_path / "stopped" / file).read_bytes() == (run.path / file).read_bytes(), file
    expected, came = (
        load_file(tmp_path / name / "checkpoints" / "last.safetensors")
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(expected[name], came[name]) for name in expected)


def test_enough_noise_and_a_small_epsilon_do_not_raise_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"threat.epsilon": 0.1, "attack.noise": 1.0, "training.epochs": 6}
    cure.train("digits", SETTINGS | changes, run=tmp_path / "run")
    assert "catastrophic" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "single_step", "found"),
    [(2, 76, True), (2, 74, False), (10, 21, True), (10, 19, False)],
)
def test_it_is_found_where_the_single_step_leaves_more_than_guessing(
    monkeypatch: pytest.MonkeyPatch, classes: int, single_step: float, found: bool
) -> None:
    attack = PGD(Threat("Linf", 0.1), steps=1, step_size=0.1)
    context = Context(Engine(torch.device("cpu")), attack, 0, 10, 1, classes=classes)
    batch = Batch(
        torch.zeros(100, 1, 8, 8), torch.zeros(100, dtype=torch.long), torch.arange(100), 0
    )
    accuracies = iter([single_step, 0.0])
    monkeypatch.setattr(CatastrophicOverfitting, "_accuracy", lambda *_: next(accuracies))
    method: Any = SimpleNamespace(context=context)
    assert CatastrophicOverfitting(method, every=1).overfits(batch) is found


class Masked(nn.Module):
    """Names class 1 under changes of one pixel of exactly 0.1, and under no smaller one.

    The logits of the classes 0 and 1 differ by the distance of the pixel from 0.45; class 2 has
    the lowest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        lead = self.scale * ((image[:, 0, 0, 0] - 0.45).abs() - 0.04)
        return torch.stack([-lead, lead, lead - 9], dim=1)


def test_mixed_images_are_judged_by_the_class_that_most_of_them_is() -> None:
    """Images of class 0 that consist of class 1 by 70 %: they are right where 1 is named.

    From 0.5 the single step of 0.1 goes down to 0.4, where 1 leads; PGD stays around 0.45, where
    it does not.  An attack on class 0 would go up, to 0.6, where 0 is wrong for both attacks.
    """
    attack = PGD(Threat("Linf", 0.1), steps=1, step_size=0.1, start="none")
    context = Context(Engine(torch.device("cpu")), attack, 0, 10, 1, classes=3)
    soft = torch.tensor([0.3, 0.7, 0.0]).repeat(100, 1)
    label, image = torch.zeros(100, dtype=torch.long), torch.full((100, 1, 8, 8), 0.5)
    batch = Batch(image, label, torch.arange(100), 0, soft)
    method: Any = SimpleNamespace(context=context, model=Masked())
    detector = CatastrophicOverfitting(method, every=1)
    for parts in (1, 4):
        assert detector.overfits(batch, parts)
        assert (detector.single_step, detector.pgd) == (100.0, 0.0)


def test_natural_training_attacks_nothing_and_is_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"method": "natural", "start": "scratch", "training.epochs": 4}
    cure.train("digits", SETTINGS | changes, run=tmp_path / "run")
    assert "catastrophic" not in capsys.readouterr().err
