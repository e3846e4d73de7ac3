"""The benchmark that compares variants of CURE: its rows are valid runs, its differences exact."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cure.data import load
from cure.errors import DataError
from cure.evaluation.metrics import pack
from cure.experiments.plan import entries
from cure.runs.results import RunRecord
from cure.utils.stats import student_t, wilson


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what they share from their own folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


def script(name: str) -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**more: Any) -> argparse.Namespace:
    usual = {
        "recipe": "cifar10-mini",
        "seeds": "0,1",
        "limit": 100,
        "natural_epochs": 1,
        "folder": Path("runs"),
        "settings": [],
        "variants": None,
    }
    return argparse.Namespace(**(usual | more))


def test_every_variant_is_a_run_of_its_own() -> None:
    module = script("why_cure")
    made = entries(module.plan_of(options()))
    assert len(made) == 2 * (1 + len(module.VARIANTS))
    settings = [entry.config.model_copy(update={"name": ""}).model_dump_json() for entry in made]
    assert len(set(settings)) == len(settings)
    paper = next(entry.config for entry in made if entry.label == "paper")
    assert paper.method.model_dump()["adversarial_term"] == "kl"
    assert paper.attack.objective == "method"


def test_differences_by_hand() -> None:
    module = script("why_cure")
    plan = module.plan_of(options(variants="paper,no-mask"))
    configs = {entry.name: entry.config.model_dump(mode="json") for entry in entries(plan)}
    figures = {"paper-seed0": 60, "no-mask-seed0": 64, "paper-seed1": 60, "no-mask-seed1": 62}

    def record(name: str, correct: int) -> RunRecord:
        right = pack(torch.arange(100) < correct)
        accuracy = {"accuracy": float(correct), "interval": list(wilson(correct, 100))}
        found = {**accuracy, "n": 100, "right": right}
        evaluation = {
            "format": "cure-evaluation-1",
            "target": name,
            "natural": found,
            "attacks": {"pgd20": {**found, "settings": {}}},
            "nrr": {},
            "threat": {"norm": "Linf", "epsilon": 0.1, "epsilon_text": "0.1"},
            "data": {"name": "x", "split": "test", "size": [1, 8, 8]},
            "model": {},
            "environment": {"time": "2026"},
        }
        return RunRecord.model_validate(
            {"format": "cure-run-1", "config": configs[name], "evaluations": [evaluation]}
        )

    done = {name: record(name, correct) for name, correct in figures.items()}
    found = module.differences(done, plan)
    assert list(found) == ["no-mask"]
    natural = found["no-mask"]["natural"]
    assert natural["difference"] == 3.0
    assert natural["seeds"] == pytest.approx(student_t([4.0, 2.0]))
    assert natural["images"][0] < 3.0 < natural["images"][1]
    # Two unpaired accuracies of 100 images would give an interval of about 27 points.
    assert natural["images"][1] - natural["images"][0] < 8


LENGTH = {"epochs": 150, "validate_every": 5}


def test_overfitting_on_photographs_uses_the_first_of_each_class(tmp_path: Path) -> None:
    for number in range(2 * 124):
        place = tmp_path / "photos" / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        shade = number // 2  # the place of the photo in its class
        Image.new("RGB", (40, 40), (shade, shade, shade)).save(place / f"{shade:03}.png")
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "photos" / "test")
    module = script("robust_overfitting")
    given = {"photos": str(tmp_path / "photos"), "folder": tmp_path, "methods": None} | LENGTH
    made = {
        entry.label: entry.config
        for entry in entries(module.plan_of(options(images=6, validation=4, **given)))
    }
    assert made.keys() == {"natural", *module.METHODS}
    written = made["cure"].data
    for split, shades in (("train", range(5)), ("test", range(120, 124))):
        found = load(written.model_copy(update={"limit": None, "resize": None}), split)
        assert sorted(found.image[:, 0, 0, 0].tolist()) == sorted([*shades, *shades])
    radii = {name: config.attack.epsilon_factor for name, config in made.items()}
    assert radii["at"] == radii["trades"] == radii["at-averaged"] == 1 < radii["cure"]
    averaged = {name for name, config in made.items() if config.training.averaging is not None}
    assert averaged == {"at-averaged"}
    assert made["trades"].method.beta == 3
    with pytest.raises(DataError, match="a multiple of the 2 classes in all, got 9"):
        module.plan_of(options(images=5, validation=4, **given))


def test_every_method_of_the_overfitting_benchmark_is_a_run() -> None:
    module = script("robust_overfitting")
    plan = module.plan_of(
        options(methods=None, photos=None, images=2000, validation=1000, **LENGTH)
    )
    made = entries(plan)
    assert {entry.label for entry in made} == {"natural", *module.METHODS}
    averaged = next(entry.config for entry in made if entry.label == "at-averaged")
    assert averaged.method.name == "at"
    assert averaged.training.averaging is not None
