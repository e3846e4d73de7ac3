"""The main job on photographs: skipped where CIFAR-10 is not to be found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cure

PLACES = [os.environ.get("CURE_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
FOUND = next((place for place in PLACES if place and (Path(place) / "cifar10").is_dir()), None)

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(FOUND is None, reason="set CURE_DATA to a folder with cifar10/*.parquet"),
]


@pytest.fixture(autouse=True)
def real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURE_DATA", str(FOUND))


@pytest.fixture(scope="module")
def third_party() -> Path:
    """Weights of a ResNet-18 that somebody else trained naturally on CIFAR-10."""
    package = pytest.importorskip("pyautoattack")
    weights = Path(package.__file__).parent / "examples" / "model_test.pt"
    if not weights.is_file():
        pytest.skip("this build of pyautoattack comes without its example model")
    return weights


def test_a_third_partys_classifier_is_accurate_and_not_robust(third_party: Path) -> None:
    """On the first 2,000 test images it is known to be right on 94.1 % and under PGD on none."""
    model = {"weights": third_party, "data": "cifar10"}
    natural = cure.evaluate("resnet18", limit=100, attacks=[], **model)["natural"]
    assert natural["interval"][0] < 94.1 < natural["interval"][1]
    attacked = cure.evaluate("resnet18", limit=6, attacks=["pgd20"], **model)["attacks"]["pgd20"]
    assert attacked["correct"] == 0
    assert attacked["largest_change"] == pytest.approx(8 / 255, abs=1e-6)


def test_the_mini_recipe_trains_on_photographs(tmp_path: Path) -> None:
    run = cure.train(
        "cifar10-mini",
        {
            "data.limit": 900,
            "data.validation": 100,
            "natural.epochs": 3,
            "training.epochs": 1,
            "training.optimizer.learning_rate": 0.05,
            "method.revision.horizon": 1.0,
            "attack.steps": 3,
        },
        run=tmp_path / "run",
        quiet=True,
    )
    natural = cure.Run(run.path / "natural").metrics
    assert natural[-1]["train"]["loss"] < natural[0]["train"]["loss"]
    result = cure.evaluate(run, limit=64, attacks="pgd20,cw")
    assert result["data"] == result["data"] | {"name": "cifar10", "split": "test", "n": 64}
    assert set(result["attacks"]) == {"pgd20", "cw"}
