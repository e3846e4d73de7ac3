"""What a first evaluation meets: files without gradients, another norm, broken images, slips."""

from __future__ import annotations

import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import cure
from cure.analysis.overfitting import SPLITS, overfitting
from cure.analysis.prediction_flips import prediction_flips
from cure.attacks import Threat
from cure.cli.options import numbers
from cure.config import DataConfig
from cure.data import ImageSet, load_split
from cure.errors import ConfigError, CureNote, DataError, ModelError
from cure.evaluation.replay import masking_note
from cure.models import Normalised
from cure.recipe import load_recipe
from cure.training.validation import validate, validation_attack
from linear_models import ENGINE, linear_case

PHOTOS = ["data.source=photos", "model.name=resnet18", "start=model"]


@pytest.mark.parametrize(
    ("epsilon", "step"),
    # 1/255 is a quarter and a fifth of the first two; from the third it would not cross the ball.
    [("4/255", 1 / 255), ("5/255", 1 / 255), ("8/255", 2 / 255), ("12/255", 3 / 255)],
)
def test_steps_of_the_validation_attack_cross_the_ball(epsilon: str, step: float) -> None:
    config = load_recipe("photos", [*PHOTOS, f"threat.epsilon={epsilon}"])
    assert validation_attack(config, ENGINE).step_size == pytest.approx(step)


class BetweenTheEdges(nn.Module):
    """Wrong only where its pixel is near 0.6; the loss rises towards that from both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        away = (image[:, 0, 0, 0] - 0.6).abs() - 0.06
        return torch.stack([self.scale * away, 0 * away], dim=1)


@pytest.mark.parametrize("step", [0.4, 0.05])
def test_long_steps_of_a_single_step_training_do_not_measure_it(step: float) -> None:
    """From 0.5 with a radius of 0.2, steps of 0.4 see the pixel at 0.3 and 0.7 alone."""
    words = ["threat.epsilon=0.2", "attack.steps=1", f"attack.step_size={step}"]
    config = load_recipe("digits", words)
    grey = torch.full((20, 1, 8, 8), 0.5)
    images = ImageSet.of(grey, torch.zeros(20, dtype=torch.long), ("away", "near"))
    found = validate(BetweenTheEdges(), images, config, ENGINE)
    assert found == {"natural": 100.0, "robust": 0.0}


def test_recipes_keep_the_steps_of_their_validation() -> None:
    for recipe in ("digits", "cifar10-mini", "cifar10-resnet18-cure-released", "finetune"):
        config = load_recipe(recipe, PHOTOS if recipe == "finetune" else [])
        assert validation_attack(config, ENGINE).step_size == config.attack.step_size


def test_without_gradients_an_accuracy_is_an_upper_bound() -> None:
    attacks: dict[str, Any] = {"square": {"accuracy": 60.4, "settings": {}}}
    result = {"model": {}, "attacks": attacks}
    assert "an upper bound of what gradients would leave" in masking_note(result, gradient=False)
    assert masking_note(result, gradient=True) == ""
    attacks["pgd20"] = {"accuracy": 2.1, "settings": {"made_on": "float network"}}
    assert masking_note(result, gradient=False) == ""


def test_another_norm_has_its_usual_radius_and_says_so() -> None:
    model, images, *_ = linear_case(4, 0.03)
    with pytest.warns(CureNote, match=r"in L2 the radius is 0\.5, .*set another one with epsilon"):
        found = cure.evaluate(model, data=images, norm="L2", attacks=["noise"])
    assert found["threat"]["epsilon"] == 0.5
    assert any("in L2 the radius" in note for note in found["notes"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cure.evaluate(model, data=images, norm="L2", epsilon=0.2, attacks=["noise"])


def test_images_that_are_left_out_are_noted(tmp_path: Path) -> None:
    for number in range(12):
        place = tmp_path / "test" / ("a" if number % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8, 3), 20 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        (tmp_path / "train" / place.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "train" / place.name / f"{number}.png")
    (tmp_path / "test" / "a" / "1.png").write_bytes(b"broken")
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.warns(CureNote, match="1 damaged image skipped"):
        found = cure.evaluate(
            network, data=str(tmp_path), data_options={"damaged": "skip"}, attacks=["noise"]
        )
    assert found["data"]["n"] == 11
    assert any("1 damaged image skipped" in note for note in found["notes"])


def shades(folder: Path) -> str:
    """Twenty grey images of two classes, without a split."""
    for number in range(20):
        place = folder / ("a" if number % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8, 3), 10 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return str(folder)


def test_a_carved_test_split_is_noted(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.warns(CureNote, match=r"no test split: 4 of 20 images .*test_fraction=0\.2"):
        cure.evaluate(network, data=shades(tmp_path), attacks=["noise"])


def test_a_carved_test_split_of_other_images_than_those_of_the_run_is_noted(tmp_path: Path) -> None:
    settings = {
        "start": "scratch",
        "model.name": "small_cnn",
        "data.validation": 4,
        "attack.steps": 1,
        "training.batch_size": 4,
        "training.validation_steps": 1,
        "training.epochs": 1,
        "training.threads": 1,
    }
    own, other = shades(tmp_path / "own"), shades(tmp_path / "other")
    run = cure.train("digits", settings, data=own, run=tmp_path / "run", quiet=True)
    with pytest.warns(CureNote, match="other: no test split: 4 of 20 images"):
        cure.evaluate(run, data=other, attacks=["natural"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", CureNote)  # the training told it
        cure.evaluate(run, attacks=["natural"])


@pytest.mark.parametrize("target", [lambda image: image, [nn.Identity(), nn.Identity()]])
def test_what_is_no_network_is_refused(target: Any) -> None:
    _, images, *_ = linear_case(4, 0.03)
    with pytest.raises(ConfigError, match=r"expected a run, a network .*, got (function|list)"):
        cure.evaluate(target, data=images)


def test_constants_may_be_fractions() -> None:
    assert numbers("std", "1/255,0.5") == [pytest.approx(1 / 255), 0.5]


def test_images_a_little_outside_are_to_be_clipped() -> None:
    image = np.random.default_rng(0).random((4, 8, 8, 3)) + 1e-4
    image[0, 0, 0, 0] = 1.0001
    with pytest.raises(DataError, match=r"to 1\.0001; clip them to \[0, 1\]"):
        cure.evaluate(nn.Identity(), data=(image, np.arange(4)))


class _Noisy(nn.Module):
    """Dropout that stays on in evaluation, by an ``eval()`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 4)

    def eval(self) -> _Noisy:
        super().eval()
        self.drop.train()
        return self

    def forward(self, image: Tensor) -> tuple[Tensor, int]:
        return self.head(self.drop(image.flatten(1))), 0


def test_an_eval_of_its_own_holds_inside_wrappers() -> None:
    network = Normalised(_Noisy(), [0.5], [0.5])
    network.train().eval()
    assert (network.training, network.network.head.training) == (False, False)
    assert network.network.drop.training


class _Of(nn.Module):
    """A linear network whose logits are put into something."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.network, self.make = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), make

    def forward(self, image: Tensor) -> Any:
        return self.make(self.network(image))


@pytest.mark.parametrize(
    ("make", "label", "kind", "says"),
    [
        (lambda x: {"logits": x}, [0, 1, 2, 0], ModelError, "logits .*got dict"),
        (lambda x: (x, x), [0, 1, 2, 0], ModelError, "got tuple"),
        (
            lambda x: x,
            [1, 2, 3, 1],
            ConfigError,
            "labels 0 to 2 for 3 logits, got 1 to 3; labels count from 0",
        ),
        (lambda x: x, [0.0, 1.0, 2.0, 0.0], ConfigError, "labels in int64, got torch.float32"),
    ],
)
def test_a_method_refuses_a_batch_that_it_would_misread(
    make: Any, label: Any, kind: type[Exception], says: str
) -> None:
    method = cure.methods.TRADES(_Of(make), threat=Threat("Linf", 0.03), steps=3)
    with pytest.raises(kind, match=says):
        method(torch.rand(4, 3, 4, 4), torch.tensor(label))


def shapes(root: Path, split: str = "") -> None:
    """Twenty grey pictures of each of two classes."""
    draws = np.random.default_rng(0)
    for number in range(40):
        place = root / split / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.png")


SHAPES = {
    "data.source": "shapes",
    "data.validation": 8,
    "method": "at",
    "start": "scratch",
    "threat.epsilon": 0.1,
    "attack.steps": 1,
    "training.epochs": 1,
    "training.batch_size": 8,
    "training.collapse_patience": 100,
}


@pytest.mark.parametrize("change", ["added", "removed", "of another class"])
def test_images_that_were_trained_on_are_not_silently_tested(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture more shuffles what is carved, so that tests meet what was trained on."""
    monkeypatch.chdir(tmp_path)
    shapes(tmp_path / "shapes")
    run = cure.train("digits", SHAPES, run="run", quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CureNote)
        warnings.filterwarnings("ignore", message="no test split")
        assert cure.evaluate(run, attacks=[])["data"]["own"] is True
    before = cure.evaluate(run, attacks=[])
    first = tmp_path / "shapes" / "a" / "00.png"
    if change == "removed":
        first.unlink()
    else:
        where = {"added": "a/new.png", "of another class": "b/00.png"}[change]
        (first.rename if change != "added" else partial(shutil.copy, first))(
            tmp_path / "shapes" / where
        )
    with pytest.warns(CureNote, match=r"added, removed or given another class since run was tra"):
        after = cure.evaluate(run, attacks=[])
    assert after["data"]["own"] is False
    assert any("some of these test images were trained on" in note for note in after["notes"])
    assert after["data"]["sha256"] != before["data"]["sha256"]
    with pytest.raises(DataError, match="restore them, or train a new run"):
        cure.resume(run, {"training.epochs": 2}, quiet=True)
    # New images stand for themselves.
    shapes(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CureNote)
        warnings.filterwarnings("ignore", message="no test split")
        cure.evaluate(run, data="new", attacks=[])


def test_a_start_that_knows_the_test_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes(tmp_path / "shapes")
    cure.train("digits", SHAPES, run="first", quiet=True)

    def train(name: str, **changes: Any) -> None:
        cure.train("digits", SHAPES | {"start": "first"} | changes, run=name, quiet=True)

    # The carved test images of the first run and of this one, by their pixels.
    found = {}
    for seed in (0, 1):
        config = load_recipe("digits", [f"{key}={SHAPES[key]}" for key in list(SHAPES)[:2]]).data
        config = config.model_copy(update={"split_seed": seed})
        found[seed] = {part: rows_of(config, part) for part in ("train", "validation", "test")}
    known = len(found[1]["test"] & (found[0]["train"] | found[0]["validation"]))
    assert known > 0
    words = (
        rf"first was trained or validated on {known} of the test images .*set data\.split_seed=0"
    )
    for start in ("first", "first/checkpoints/best.safetensors", str(tmp_path / "first")):
        with pytest.raises(DataError, match=words):
            train("second", **{"data.split_seed": 1, "start": start})
    with pytest.raises(DataError, match=words):  # the same folder by another name
        train("second", **{"data.split_seed": 1, "data.source": str(tmp_path / "shapes")})
    assert not Path("second").exists()
    with pytest.warns(CureNote, match=r"first was trained on 8 of the images that validate"):
        train("more", **{"data.validation": 16})
    with warnings.catch_warnings():
        warnings.simplefilter("error", CureNote)
        warnings.filterwarnings("ignore", message="no test split")
        train("same")
        shapes(tmp_path / "other")
        train("elsewhere", **{"data.split_seed": 1, "data.source": "other"})
    shutil.copy(tmp_path / "shapes/a/00.png", tmp_path / "shapes/a/new.png")
    with pytest.raises(DataError, match=r"^start: images of 'shapes' were added.*may be among"):
        train("third")


def test_studies_tell_which_networks_know_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that were trained on other splits of the same source, and on other images of it."""
    monkeypatch.chdir(tmp_path)
    shapes(tmp_path / "shapes")
    for seed in (0, 1):
        cure.train("digits", SHAPES | {"data.split_seed": seed}, run=f"seed{seed}", quiet=True)
    found = {
        seed: {part: rows_of(cure.Run(f"seed{seed}").config.data, part) for part in SPLITS}
        for seed in (0, 1)
    }
    known = len(found[0]["test"] & (found[1]["train"] | found[1]["validation"]))
    held = len(found[0]["validation"] & found[1]["train"])
    assert known > 0 < held

    def notes(*runs: str, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            prediction_flips(list(runs), natural=runs[0], device="cpu", **options)
        return [str(note.message) for note in told if "seed1 was" in str(note.message)]

    assert notes("seed0") == []
    (note,) = notes("seed0", "seed1")
    assert note == (
        f"seed1 was trained or validated on {known} of the test images of seed0, so its accuracies "
        "on them are too high; compare runs of one split (data.split_seed=0), or give new images "
        "(--data)"
    )
    (note,) = notes("seed0", "seed1", split="validation")
    assert note.startswith(f"seed1 was trained on {held} of the validation images of seed0")
    shapes(tmp_path / "new")
    assert notes("seed0", "seed1", data="new") == []
    overfitting("seed0", limit=5, device="cpu")
    shutil.copy(tmp_path / "shapes/a/00.png", tmp_path / "shapes/a/new.png")
    with pytest.raises(
        DataError, match=r"added, removed .* since seed0 was trained.*; restore them"
    ):
        overfitting("seed0", limit=5, device="cpu")
    cure.train("digits", SHAPES, run="later", quiet=True)
    with pytest.warns(
        CureNote, match=r"since seed0 was trained.*it may know some of the test images of later"
    ):
        prediction_flips("later", "seed0", natural="later", device="cpu")


def rows_of(config: DataConfig, part: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in load_split(config, part).image}


def test_test_images_of_their_own_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        shapes(tmp_path / "shapes", split)
    run = cure.train("digits", SHAPES, run="run", quiet=True)
    shutil.copy(tmp_path / "shapes/train/a/00.png", tmp_path / "shapes/train/a/new.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CureNote)
        assert cure.evaluate(run, attacks=[])["data"]["own"] is True
    with pytest.warns(CureNote, match="some of these validation images were trained on"):
        cure.evaluate(run, attacks=[], split="validation")
