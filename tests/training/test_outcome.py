"""What is said of a training when it ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import cure
from cure.config import RunConfig
from cure.errors import ConfigError
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.runs.records import EpochMetrics
from cure.runs.records import MeasuredAccuracies as Accuracies
from cure.training.collapse import Guessing
from cure.training.outcome import judge, short_run_warnings, start_warnings
from helpers import bright_or_dark

CONFIG = load_recipe("digits")


def accuracies(natural: float, robust: float, steps: int = 20, n: int = 200) -> Accuracies:
    return Accuracies(natural=float(natural), robust=float(robust), n=n, steps=steps)


def record(training: float, robust: float, **balanced: float) -> EpochMetrics:
    return EpochMetrics.model_validate(
        {
            "epoch": 1,
            "train": {"loss": 1.0, "robust_accuracy": training / 100},
            "validation": {"natural": 80.0, "robust": float(robust), **balanced},
        }
    )


def test_a_training_that_gained_says_only_what_it_traded() -> None:
    result = judge(accuracies(90, 0), accuracies(80, 50), [record(55, 51)], CONFIG, 10.0)
    assert result.gained
    assert result.warnings == []
    lines = result.lines("runs/mine")
    assert lines[1].endswith("+50.0 points of robust accuracy for -10.0 points of natural accuracy")
    assert lines[2] == "next:  cure evaluate runs/mine"


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (accuracies(90, 0), accuracies(88, 1)),
        (accuracies(90, 30), accuracies(80, 33)),
        (accuracies(90, 0), accuracies(90, 4.5)),
        # A network that always names one class "withstands" every attack.
        (accuracies(90, 0), accuracies(10, 10)),
    ],
)
def test_no_gain_is_the_first_line(start: Accuracies, end: Accuracies) -> None:
    result = judge(start, end, [record(end.robust, end.robust)], CONFIG, 10.0)
    assert not result.gained
    assert result.lines("run")[0].startswith("no gain: robust accuracy went from")


def test_a_start_that_guessed_is_the_cause_that_no_gain_names() -> None:
    def cause(start: Accuracies, end: Accuracies, kind: str) -> str:
        config = CONFIG.model_copy(update={"start": kind})
        return judge(start, end, [record(end.robust, end.robust)], config, 10.0).warnings[0]

    guessing = accuracies(11, 4)
    assert "classes are in the order of the data" in cause(guessing, guessing, "model")
    assert "train the start longer (natural.epochs)" in cause(guessing, guessing, "natural")
    assert "the network fell to guessing" in cause(accuracies(90, 0), guessing, "natural")
    assert "the network stayed at guessing" in cause(guessing, guessing, "scratch")


def test_advice_against_guessing_names_only_what_can_be_changed() -> None:
    def said(*settings: str) -> str:
        config = load_recipe("photos", ["data.source=photos", "model.name=resnet10", *settings])
        end = accuracies(10, 10)
        return judge(accuracies(90, 0), end, [record(10, 10)], config, 10.0).warnings[0]

    mixed = said("data.augment.cutmix=1")
    assert "data.augment.cutmix=0" in mixed
    assert "attack.warmup" not in mixed
    plain = said("data.augment.cutmix=0", "attack.warmup=0")
    assert "cutmix" not in plain
    assert "set attack.warmup=0.5" in plain


def test_few_images_are_named_where_nothing_else_is_to_be_changed() -> None:
    def said(policy: str) -> str:
        config = load_recipe(
            "photos",
            ["data.source=photos", "model.name=resnet10", f"training.batch_norm={policy}"],
        )
        end = accuracies(60, 2)
        return judge(accuracies(90, 0), end, [record(60, 2)], config, 10.0).warnings[0]

    assert said("frozen").endswith("the network learns but does not generalise: give more images")
    assert "set training.batch_norm=frozen, or give more images" in said("train")


def test_training_images_at_chance_are_not_called_learnt() -> None:
    start, end = accuracies(100, 0, n=10), accuracies(80, 0, n=10)
    result = judge(start, end, [record(35.9, 0)], CONFIG, 40.0)
    assert "generalise" not in result.warnings[0]
    assert "train longer" in result.warnings[0] or "attack.warmup" in result.warnings[0]


@pytest.mark.parametrize(
    ("start", "end", "training", "cause"),
    [
        ((100, 100), (100, 100), 100, r"the start withstands Linf 0\.15 already: set a larger"),
        ((90, 86), (90, 85), 99, "a larger threat.epsilon"),
        ((90, 60), (80, 58), 62, "robust already: train longer"),
        ((90, 30), (80, 33), 34, "200 images are too few to tell this difference from chance"),
        # It fits its training images and no others, whatever it was before.
        ((90, 30), (80, 25), 90, "does not generalise"),
        ((90, 0), (80, 4), 6, "set attack.warmup=0.5"),
    ],
)
def test_the_cause_fits_the_figures(start, end, training: float, cause: str) -> None:
    result = judge(accuracies(*start), accuracies(*end), [record(training, end[1])], CONFIG, 10.0)
    assert not result.gained
    assert re.search(cause, result.warnings[0])


def test_mixed_images_in_a_short_run_are_warned_of() -> None:
    settings = ["data.source=photos", "model.name=resnet10", "data.augment.cutmix=1"]
    photos = load_recipe("photos", settings)
    (sentence,) = short_run_warnings(photos, 126)
    assert sentence.startswith("126 steps are few to learn from mixed images")
    assert short_run_warnings(photos, 1512) == []
    assert short_run_warnings(CONFIG, 126) == []
    scratch = photos.model_copy(update={"start": "scratch"})
    assert short_run_warnings(scratch, 126) == []


def test_a_gap_between_training_and_validation_is_named_with_its_cause() -> None:
    (sentence,) = judge(
        accuracies(90, 0), accuracies(80, 40), [record(85, 42)], CONFIG, 10.0
    ).warnings
    assert "85.0 % in training and 42.0 % in validation" in sentence
    assert "training.batch_norm=frozen" in sentence


def test_what_few_validation_images_cannot_show_is_not_claimed() -> None:
    # 0 of 7: up to 35.4 % by Wilson's interval.
    few = accuracies(90, 0, n=7)
    for training, said in ((35, False), (36, True)):
        warnings = judge(few, accuracies(80, 0, n=7), [record(training, 0)], CONFIG, 10.0).warnings
        assert any("in validation: " in line for line in warnings) == said
    # Two of 16 images by chance; 6 of 16 one way: p = 2 / 2**6 = 0.03.
    for robust, said in ((37.5, False), (12.5, True)):
        result = judge(few, accuracies(80, robust, n=16), [record(50, 50)], CONFIG, 10.0)
        assert any("the validation attack is weak" in line for line in result.warnings) == said


def test_a_weak_validation_attack_is_said() -> None:
    (sentence,) = judge(
        accuracies(90, 0), accuracies(80, 40), [record(50, 52)], CONFIG, 10.0
    ).warnings
    assert "52.0 % under PGD-10, 40.0 % under PGD-20" in sentence
    few = CONFIG.model_copy(
        update={"training": CONFIG.training.model_copy(update={"validation_steps": 5})}
    )
    (sentence,) = judge(accuracies(90, 0), accuracies(80, 40), [record(50, 41)], few, 10.0).warnings
    assert "PGD-5, which is weaker than PGD-10" in sentence


def test_the_validation_attack_is_judged_where_balanced_accuracy_was_best() -> None:
    named_largest = {"natural_balanced": 50.0, "robust_balanced": 50.0}
    learnt = {"natural_balanced": 80.0, "robust_balanced": 58.0}
    records = [record(50, 90, **named_largest), record(50, 60, **learnt)]
    assert judge(accuracies(90, 0), accuracies(80, 59), records, CONFIG, 50.0).warnings == []


def test_a_start_at_chance_names_what_to_check() -> None:
    taken = CONFIG.model_copy(update={"start": "model"})

    def said(natural: float, config: RunConfig = taken) -> list[str]:
        return start_warnings(accuracies(natural, 0), config, Guessing([20] * 10, balanced=False))

    assert said(90) == []
    assert "set model.mean and model.std" in said(12)[0]
    given = CONFIG.model.model_copy(update={"mean": (0.5,), "std": (0.5,)})
    assert "remove model.mean" in said(12, taken.model_copy(update={"model": given}))[0]
    assert said(12, CONFIG.model_copy(update={"start": "scratch"})) == []
    assert "train the start longer (natural.epochs)" in said(12, CONFIG)[0]


def test_a_start_that_names_only_the_largest_class_is_at_chance() -> None:
    taken = CONFIG.model_copy(update={"start": "model"})
    start = accuracies(90, 90).model_copy(update={"natural_balanced": 50.0})
    (sentence,) = start_warnings(start, taken, Guessing([180, 20], balanced=True))
    assert "only 50.0 % natural accuracy over classes (guessing: 50.0 %)" in sentence
    good = start.model_copy(update={"natural_balanced": 80.0})
    assert start_warnings(good, taken, Guessing([180, 20], balanced=True)) == []


class Blind(nn.Module):
    """Looks at no pixel: nothing can be gained."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.1, 0.0]))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 0 * image.flatten(1)[:, :2] + self.bias


def test_a_run_keeps_and_prints_its_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "method": "at",
        "start": "model",
        "threat.epsilon": 0.3,
        "data.validation": 32,
        "training.epochs": 1,
        "training.batch_size": 32,
        "training.collapse_patience": 9,
    }
    run = cure.train(
        "digits", settings, run=tmp_path / "run", model=Blind(), data=bright_or_dark(128)
    )
    result = RunFolder.open(run.path).outcome()
    assert result is not None
    assert result.end is not None
    # Its answer does not depend on the image: "robust" as it is, but not by training.
    assert result.start.robust == result.end.robust == pytest.approx(50, abs=15)
    assert result.start.steps == result.end.steps == 20, "a gain is that of one attack"
    assert result.gained is False
    said = capsys.readouterr().err
    assert "no gain" in said
    assert f"next:  cure evaluate {run.path}" in said


@pytest.mark.parametrize("check", ["refuse", "warn", "off"])
def test_a_start_that_guesses_is_refused_warned_of_or_let_be(
    check: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "method": "at",
        "start": "model",
        "start_check": check,
        "data.validation": 32,
        "training.epochs": 1,
        "training.batch_size": 32,
        "training.collapse_patience": 9,
    }

    def run() -> cure.Run:
        path, images = tmp_path / "run", bright_or_dark(128)
        return cure.train("digits", settings, run=path, model=Blind(), data=images)

    sentence = "the start has only"
    if check == "refuse":
        with pytest.raises(ConfigError, match=rf"{sentence} .*set start_check=warn to train"):
            run()
        folder = RunFolder.open(tmp_path / "run")
        assert folder.metrics() == []
        # Neither does the run go on without having been looked at again.
        with pytest.raises(ConfigError, match=sentence):
            cure.resume(tmp_path / "run", model=Blind(), data=bright_or_dark(128))
        return
    assert run().metrics
    said = capsys.readouterr().err
    assert (sentence in said) is (check == "warn")
    assert "start: natural" in said


def test_few_images_of_a_rare_class_are_not_a_start_at_chance() -> None:
    """16 images, one of them of the rare class: always naming the other is right on 15."""
    config = CONFIG.model_copy(update={"start": "model"})
    perfect = Accuracies(
        natural=100, robust=100, natural_balanced=100, robust_balanced=100, n=16, steps=20
    )
    guessing = Guessing([1, 15], balanced=True)
    assert start_warnings(perfect, config, guessing) == []
    named = perfect.model_copy(update={"natural": 93.75, "natural_balanced": 50.0})
    assert len(start_warnings(named, config, guessing)) == 1
    end = accuracies(93.75, 93.75, n=16)
    sentence = judge(perfect, end, [record(90, 93.75)], config, 93.75).warnings[0]
    assert sentence.endswith(
        "16 images are too few to tell a network from one that always names the largest class: set "
        "a larger data.validation"
    )
