"""A start whose classes have another order, or whose images are standardised."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cure
from cure.data import ImageSet
from cure.errors import CheckpointError, ConfigError, CureNote, ModelError
from cure.models import core
from cure.models.head import order_head
from cure.runs.folder import RunFolder
from helpers import bright_or_dark

SETTINGS = {
    "method": "at",
    "model.name": "small_cnn",
    "data.validation": 16,
    "threat.epsilon": "1/255",
    "attack.step_size": "1/255",
    "attack.steps": 1,
    "training.batch_size": 16,
    "training.threads": 1,
    "training.validation_steps": 1,
    "training.epochs": 1,
    "training.averaging": None,
    "training.optimizer.learning_rate": 1e-9,
    "start_check": "off",
}
LEARNS = {"training.epochs": 6, "training.optimizer.learning_rate": 0.05, "start": "scratch"}
CONSTANTS = {"model.mean": [0.3], "model.std": [0.2]}
THREE = bright_or_dark(classes=3)


def turned(images: ImageSet) -> ImageSet:
    """The same images with their classes in the reverse order."""
    count = len(images.classes)
    return replace(images, label=count - 1 - images.label, classes=images.classes[::-1])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that knows three classes and standardises, and its file of weights."""
    path = tmp_path_factory.mktemp("start") / "run"
    made = cure.train("digits", SETTINGS | LEARNS | CONSTANTS, data=THREE, run=path, quiet=True)
    for form, place in (("safetensors", ""), ("torch-export", ""), ("hub", "hub")):
        cure.export(made, form, path.parent / place, data=THREE)
    return RunFolder.open(path)


def starts(first: RunFolder) -> dict[str, str]:
    return {
        "run": str(first.path),
        "checkpoint": str(first.weights("best")),
        "file": str(first.path.parent / "model.safetensors"),
        "program": str(first.path.parent / "model.pt2"),
        "hub": str(first.path.parent / "hub"),
        "natural": f"natural:{first.path}",
    }


def train(path: Path, start: str, data: ImageSet = THREE, **more: Any) -> RunFolder:
    given = SETTINGS | {"start": start, "natural.learning_rate": 1e-9} | more
    return RunFolder.open(cure.train("digits", given, data=data, run=path, quiet=True).path)


def natural(run: RunFolder) -> float:
    outcome = run.outcome()
    assert outcome is not None
    return outcome.start.natural


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file", "program", "hub", "natural"])
def test_the_last_layer_is_put_in_the_order_of_the_data(
    first: RunFolder, tmp_path: Path, kind: str
) -> None:
    with pytest.warns(CureNote, match="put in the order of the data's classes"):
        run = train(tmp_path / "run", starts(first)[kind], turned(THREE), **CONSTANTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CureNote)  # the same names and constants
        same = train(tmp_path / "same", starts(first)[kind], **CONSTANTS)
    assert natural(run) == natural(same) > 80


def test_new_head_keeps_the_layer_of_a_run_of_the_same_classes(
    first: RunFolder, tmp_path: Path
) -> None:
    run = train(tmp_path / "a", str(first.path), turned(THREE), new_head=True, **CONSTANTS)
    assert natural(run) > 80


def test_classes_of_other_names_are_refused(first: RunFolder, tmp_path: Path) -> None:
    other = replace(THREE, classes=("level 0", "level 1", "bright"))
    with pytest.raises(ModelError, match=r"^start: .*'bright' is unknown to it.*new_head=true"):
        train(tmp_path / "a", str(first.path), other, **CONSTANTS)
    assert not (tmp_path / "a").exists()
    train(tmp_path / "b", str(first.path), other, new_head=True, **CONSTANTS)


@pytest.mark.parametrize("kind", ["run", "file", "program", "hub", "natural"])
def test_a_run_standardises_as_its_start_does(first: RunFolder, tmp_path: Path, kind: str) -> None:
    start = starts(first)[kind]
    with pytest.warns(CureNote, match=r"with model\.mean=0\.3 model\.std=0\.2, which this run tak"):
        run = train(tmp_path / "run", start)
    assert run.config.model.mean == pytest.approx((0.3,))
    assert run.config.model.std == pytest.approx((0.2,))
    assert natural(run) > 80
    with warnings.catch_warnings():
        warnings.simplefilter("error", CureNote)
        model = cure.Run(first.path).model()
        given = SETTINGS | {"start": start, "natural.learning_rate": 1e-9}
        given.pop("model.name")
        twice = cure.train("digits", given, model=model, data=THREE, run=tmp_path / "b", quiet=True)
    assert natural(RunFolder.open(twice.path)) > 80
    others = {"model.mean": [0.0], "model.std": [1.0]}
    with pytest.warns(CureNote, match=r"model\.std=0\.2, this run with others; leave out model\."):
        assert train(tmp_path / "others", start, **others).config.model.mean == (0,)


def test_a_file_with_its_computation_is_not_trained(first: RunFolder, tmp_path: Path) -> None:
    network = cure.from_pretrained(starts(first)["program"])
    with pytest.raises(ModelError, match=r"a torch\.export file cannot be trained.*start=FILE"):
        cure.train("digits", SETTINGS, model=network, data=THREE, run=tmp_path / "run")


@pytest.mark.parametrize("kind", ["file", "program", "hub"])
def test_an_evaluation_of_weights_takes_names_and_constants(first: RunFolder, kind: str) -> None:
    weights, test = starts(first)[kind], bright_or_dark(48, "test", classes=3)
    expected = cure.evaluate(first.path, data=test, attacks=[])["natural"]["correct"]
    for data in (test, turned(test)):
        with pytest.warns(CureNote, match=r"with mean 0\.3 and std 0\.2, which are"):
            found = cure.evaluate("small_cnn", weights=weights, data=data, attacks=[])
        assert found["natural"]["correct"] == expected > 40
    plain = {"mean": [0.3], "std": [0.2]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CureNote)
        found = cure.evaluate("small_cnn", weights=weights, data=test, attacks=[], **plain)
        assert found["natural"]["correct"] == expected
        model = cure.Run(first.path).model()  # it standardises inside
        found = cure.evaluate(model, weights=weights, data=test, attacks=[])
        assert found["natural"]["correct"] == expected


def test_a_start_that_does_not_standardise_is_told(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", "scratch")
    with pytest.warns(CureNote, match=r"has no model\.mean and model\.std, this run sets some"):
        train(tmp_path / "run", str(plain.path), **CONSTANTS)


def test_a_file_teaches_classes_in_its_own_order_alone(first: RunFolder, tmp_path: Path) -> None:
    teacher = {"method": "hat", "method.natural_teacher": {"path": starts(first)["file"]}}
    with pytest.raises((ModelError, CheckpointError), match="the teacher knows the classes"):
        train(tmp_path / "run", "scratch", turned(THREE), **teacher, **CONSTANTS)


@pytest.mark.parametrize("norm", [None, "weight_norm", "spectral_norm"])
def test_only_a_layer_whose_outputs_are_the_logits_is_put_in_order(norm: str | None) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    if norm is not None:
        getattr(nn.utils.parametrizations, norm)(layers[3])
    image = torch.rand(5, 1, 2, 2)
    before = layers.eval()(image)
    order_head(layers, (2, 0, 1), image)
    torch.testing.assert_close(layers(image), before[:, [2, 0, 1]])

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.layers(image) * torch.tensor([1.0, 2.0, 3.0])

    with pytest.raises(ModelError, match="are not the logits"):
        order_head(core(Scaled()), (2, 0, 1), image)


def test_what_a_run_began_with_is_found_again(first: RunFolder, tmp_path: Path) -> None:
    """With its classes in the order of the data."""
    with pytest.warns(CureNote, match="put in the order"):
        run = train(tmp_path / "run", str(first.path), turned(THREE), **CONSTANTS)
    line = cure.tradeoff(run.path, data=turned(THREE), points=3)
    begun = next(point for point in line.points if point.shares[0] == 1)
    assert begun.natural == natural(run) > 80


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            "small_cnn",
            r"as a torch\.nn\.Module, got 'small_cnn'; a name goes into the settings: m",
        ),
        (nn.Flatten, r"got the class Flatten; pass a network of it, Flatten\(\)"),
        (torch.relu, "got builtin_function_or_method; put a function or several networks into a m"),
    ],
)
def test_what_is_no_network_is_refused(given: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        cure.train("digits", model=given, data=THREE, run=tmp_path / "run")
    with pytest.raises(ConfigError, match=sentence):
        cure.resume(tmp_path, model=given)
    if not isinstance(given, str):
        with pytest.raises(ConfigError, match=sentence):
            cure.evaluate(given, data=THREE)


def test_settings_may_be_runs_paths_and_numbers_of_numpy(first: RunFolder, tmp_path: Path) -> None:
    start, epsilon = cure.Run(first.path), np.float32(0.25)
    more = CONSTANTS | {"threat.epsilon": epsilon, "training.epochs": np.int64(1)}
    run = train(tmp_path / "run", start, THREE, **more)  # type: ignore[arg-type]
    assert run.config.start == str(first.path)
    assert run.config.threat.epsilon == 0.25
    with pytest.raises(CheckpointError, match="nowhere' does not exist"):
        train(tmp_path / "path", tmp_path / "nowhere", THREE)  # type: ignore[arg-type]
