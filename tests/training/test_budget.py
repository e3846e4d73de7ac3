"""A budget of minutes, or a least number of steps, becomes a number of epochs of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

import cure
from cure.errors import ConfigError
from cure.recipe import load_recipe
from cure.training import budget
from cure.training.prerequisites import natural_config

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
    both = load_recipe("photos", [*PHOTOS, word, f"{section}.min_steps=7"])
    assert getattr(both, section).min_steps == 7


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
