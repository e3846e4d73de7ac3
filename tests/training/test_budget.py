"""A budget of minutes, or a least number of steps, becomes a number of epochs of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cure
from cure.data import Batch
from cure.errors import ConfigError
from cure.methods import CURE
from cure.methods.step import StepOutput
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.training import budget
from cure.training.budget import _beside, fit_epochs, settle
from cure.training.prerequisites import natural_config, prerequisites
from cure.training.setup import prepare

PHOTOS = ["data.source=digits", "model.name=small_cnn"]

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
    # A step of 1 s, a validation of 2 s: 5 steps and a validation take 7 s.  Start and end are
    # measured under PGD-20, 21 passes to and fro in the place of 3 with PGD-2, 14 s each:
    # 0.95 * 60 - 28 = 29 s hold 4 epochs.
    monkeypatch.setattr(budget, "_times", lambda config, prepared: (1.0, 2.0))
    run = cure.train("digits", SETTINGS | {"training.minutes": 1}, run=tmp_path / "run", quiet=True)
    assert run.config.training.epochs == 4
    assert run.config.data.validation == 60
    assert [record["epoch"] for record in run.metrics] == list(range(1, 5))


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        # An image attacked by PGD-2, and what is learnt from it.
        ([], 3),
        # N-FGSM and its loss; each 5th step the single step, PGD-10 and the two judged: 13 more.
        (["attack.name=n-fgsm", "attack.check_every=5"], 2 + 13 / 5),
        # 64 of 240 images at once: 3.75 batches in an epoch of 5 steps.
        (["training.batch_norm=train"], 3 + 3.75 / 5),
        (["training.averaging={batch_norm: recomputed}"], 3 + 3.75 / 5),
    ],
)
def test_what_is_done_seldom_counts(
    words: list[str], passes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0

    class Counted(nn.Module):
        """A network that counts its passes."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)
            )

        def forward(self, image: Tensor) -> Tensor:
            nonlocal done
            done += 1
            logits: Tensor = self.layers(image)
            return logits

    def counted(call: Any, argument: Any, device: torch.device) -> float:
        before = done
        call(argument)
        return done - before

    monkeypatch.setattr(budget, "_seconds", counted)
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    settings += ["model={name: object:Counted}", "evaluation.batch_size=64", "training.epochs=3"]
    config = load_recipe("digits", [*settings, *words])
    prepared = prepare(config, None, Counted())
    step, _ = budget._times(config, prepared)
    assert step == pytest.approx(passes)


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


def test_few_images_are_trained_for_more_epochs(tmp_path: Path) -> None:
    # 240 images of 300 are trained on, 5 steps an epoch; 12 steps are reached by 3 epochs, and by 4
    # of the natural start, 17.
    settings = SETTINGS | {
        "start": "natural",
        "natural.epochs": 1,
        "natural.min_steps": 17,
        "training.epochs": 2,
        "training.min_steps": 12,
    }
    run = cure.train("digits", settings, run=tmp_path / "run", quiet=True)
    assert (run.config.training.epochs, run.config.training.min_steps) == (3, None)
    assert [record["epoch"] for record in run.metrics] == [1, 2, 3]
    natural = cure.Run(tmp_path / "run/natural")
    assert [record["epoch"] for record in natural.metrics] == [1, 2, 3, 4]
    longer = cure.resume(tmp_path / "run", {"training.epochs": 4}, quiet=True)
    assert longer.config.training.epochs == 4


def test_a_budget_of_minutes_goes_before_the_least_steps() -> None:
    config = load_recipe("photos", [*PHOTOS, "training.minutes=4", "training.min_steps=1500"])
    kept, told = budget.reach_steps(config, steps=5)
    assert (kept.training.epochs, kept.training.validate_every, told) == (36, 3, [])
    assert kept.training.min_steps is None


def test_a_budget_of_minutes_is_not_that_of_the_natural_start() -> None:
    config = load_recipe("photos", [*PHOTOS, "start=natural", "training.minutes=4"])
    kept, _ = budget.reach_steps(natural_config(config), steps=5)
    assert kept.training.epochs == 60  # natural.min_steps=300
    assert kept.training.minutes is None


def test_many_images_keep_the_epochs_of_the_recipe() -> None:
    config = load_recipe("photos", [*PHOTOS, "training.min_steps=1500"])
    kept, told = budget.reach_steps(config, steps=42)
    assert (kept.training.epochs, told) == (36, [])
    assert kept.training.validate_every == 3
    raised, told = budget.reach_steps(config, steps=5)
    assert raised.training.epochs == 300
    assert raised.training.validate_every == 25, "12 validations, as in 36 epochs"
    assert told == [
        "300 epochs in the place of 36, to reach 1,500 steps with few images "
        "(training.epochs=36 keeps the fewer)"
    ]


@pytest.mark.parametrize("word", ["training.epochs=4", "training.minutes=4", "natural.epochs=4"])
def test_a_length_that_is_asked_for_goes_before_the_least_steps(word: str, tmp_path: Path) -> None:
    config = load_recipe("photos", PHOTOS)
    assert (config.training.min_steps, config.natural.min_steps) == (1500, 300)
    section, name = word.split("=")[0].split(".")
    child = tmp_path / "mine.yaml"
    child.write_text(f"extends: photos\n{section}: {{{name}: 4}}\n")
    for changed in (load_recipe("photos", [*PHOTOS, word]), load_recipe(child, PHOTOS)):
        assert getattr(changed, section).min_steps is None
        other = {"training": "natural", "natural": "training"}[section]
        assert getattr(changed, other).min_steps is not None
    for words in ([word, f"{section}.min_steps=7"], [f"{section}.min_steps=7", word]):
        assert getattr(load_recipe("photos", [*PHOTOS, *words]), section).min_steps == 7


@pytest.mark.parametrize(
    ("words", "steps", "alpha", "told"),
    [
        ([], 14, 1.0, []),
        (
            [],
            13,
            0.0,
            ["no CutMix: 468 steps are too few for mixed images (it takes 500)"],
        ),
        (["method=mart"], 42, 0.0, ["no CutMix: the loss of mart takes no soft labels"]),
        (["data.augment.cutmix=0.5"], 1, 0.5, []),
    ],
)
def test_cutmix_where_it_can_be_learnt_from(
    words: list[str], steps: int, alpha: float, told: list[str]
) -> None:
    config = load_recipe("photos", [*PHOTOS, *words])
    decided, said = budget.decide_cutmix(config, steps)
    assert (decided.data.augment.cutmix, said) == (alpha, told)
    assert decided.data.augment.mixes == bool(alpha)


def test_a_run_keeps_what_was_decided(tmp_path: Path) -> None:
    settings = SETTINGS | {"training.epochs": 1, "data.augment.cutmix": "auto"}
    run = cure.train("digits", settings, run=tmp_path / "run", quiet=True)
    assert run.config.data.augment.cutmix == 0


def test_a_budget_counts_the_later_steps_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """CURE begins with natural steps here, which are much cheaper."""
    settings = [
        *("training.minutes=1", "training.batch_size=32", "training.threads=1", "start=scratch"),
        *("method=cure", "method.warmup=0.4", "data.limit=300", "data.validation=40"),
    ]
    config = load_recipe("digits", settings)
    prepared = prepare(config, None, None)
    asked: list[int] = []
    step = CURE.step

    def noted(self: CURE, batch: Batch) -> StepOutput:
        asked.append(batch.step)
        return step(self, batch)

    monkeypatch.setattr(CURE, "step", noted)
    fit_epochs(config, prepared)
    last = config.training.epochs * (260 // 32) - 1
    assert asked == [0, 0, round(last / 2), last]


def test_settings_that_hide_something_are_told() -> None:
    def told(*words: str) -> list[str]:
        return _beside(load_recipe("digits", words))

    assert told() == []
    (line,) = told("attack.epsilon=0.05", "attack.step_size=0.02")
    assert "smaller than threat.epsilon" in line
    (line,) = told("attack.steps=2", "attack.step_size=0.01")
    assert "a weak attack: attack.step_size=" in line
    (line,) = told("start=natural", "training.minutes=3")
    assert line == "the natural start is trained besides the budget of training.minutes"
    (line,) = told("start=robust:PATH", "training.minutes=3")
    assert line == "the new head is trained besides the budget of training.minutes"
    assert told("start=robust:PATH", "head.share=0", "training.minutes=3") == []
    (line,) = told("start=scratch", "method=hat", "training.minutes=3")
    assert line == "the natural teacher is trained besides the budget of training.minutes"
    words = ("start=natural", "method={name: ard, teacher: {recipe: digits}}")
    (line,) = told(*words, "training.minutes=3")
    assert line == (
        "the natural start and the teacher are trained besides the budget of training.minutes"
    )
    assert told("method=st-at") == told("attack.objective=cross_entropy") == []
    (line,) = told("method=st-at", "attack.objective=cross_entropy")
    assert line.startswith("attack.objective=cross_entropy does nothing with st-at")
    (line,) = told("attack.steps=1", "attack.step_size=0.15", "attack.check_every=5")
    assert line.startswith("attack.check_every does nothing with attack.name=pgd")


def test_the_natural_start_decides_about_cutmix_by_its_own_length(tmp_path: Path) -> None:
    words = [
        *("data.augment.cutmix=auto", "start=natural", "natural.epochs=2", "training.epochs=80"),
        *("method=at", "training.batch_size=32", "data.limit=300", "data.validation=40"),
    ]
    config = load_recipe("digits", words)
    prepared = prepare(config, None, None)
    settled, _ = settle(config, prepared)
    assert settled.data.augment.cutmix == 1
    (natural,) = prerequisites(RunFolder(tmp_path / "run"), settled, prepared)
    assert natural.config.data.augment.cutmix == 0
