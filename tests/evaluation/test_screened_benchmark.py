"""The benchmark of `--attacks screened`: ratios by hand, planted images, going on after a kill."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cure.attacks import Threat
from cure.data import ImageSet
from cure.errors import ConfigError


def script() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "screened.py"
    spec = importlib.util.spec_from_file_location("screened_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def side(wall: float, stand: list[int], wrong: int = 0) -> dict[str, Any]:
    return {"wall": wall, "processor": wall / 2, "stand": stand, "not_confirmed": wrong}


def test_ratios_and_differences_by_hand():
    module = script()
    rows = {
        "a": module.summary({"package": side(8, [1, 2, 5]), "screened": side(2, [1, 3])}, 20),
        "b": module.summary({"package": side(9, [0, 1]), "screened": side(3, [0, 1], 1)}, 20),
        "c": module.summary({"package": side(9, [4]), "screened": side(1, [4])}, 20),
    }
    assert rows["a"]["only_package_breaks"] == [3]
    assert rows["a"]["only_screened_breaks"] == [2, 5]
    assert rows["a"]["accuracy"] == {"package": 15, "screened": 10}
    assert [row["kind"] for row in rows.values()] == ["robust", "robust", "fragile"]
    assert rows["b"]["not_confirmed"] == 1
    assert module.overall(rows, "robust", "wall") == 3.5
    assert module.overall(rows, "fragile", "processor") == 9
    assert module.overall({}, "robust", "wall") is None


def test_images_that_are_no_adversarial_images_are_counted():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data, model[1].bias.data = torch.tensor([[-1.0], [1.0]]), torch.tensor([1.0, 0])
    image = torch.full((4, 1, 1, 1), 120, dtype=torch.uint8)
    images = ImageSet(image, torch.zeros(4, dtype=torch.int64), ("a", "b"), "made", "test")
    # Above one half the class is 1: allowed, too far, classified right, outside [0, 1].
    tried = torch.tensor([0.52, 0.7, 0.48, 1.1]).view(4, 1, 1, 1)
    assert script().unconfirmed(model, images, tried, Threat("Linf", 0.1)) == 3
    assert script().unconfirmed(model, images, tried, Threat("Linf", 0.3)) == 2


def test_it_goes_on_after_a_kill(tmp_path, monkeypatch):
    module, calls = script(), []

    def fake(name: str, fails: list[bool]) -> Any:
        def run(model: nn.Module, images: ImageSet, threat: Threat) -> Any:
            calls.append(name)
            if fails:
                fails.pop()
                raise KeyboardInterrupt
            return torch.arange(len(images)) < 2, 0

        return run

    fails = [True]
    monkeypatch.setattr(module, "package", lambda options: fake("package", []))
    monkeypatch.setattr(
        module,
        "ours",
        lambda attack, precision, options: fake(attack, fails),
    )
    (tmp_path / "made_network.py").write_text(
        "import torch\n"
        "def linear():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["made_network:linear", "--data", "digits", "--images", "5", "--threads", "1"]
    words += ["--output", str(tmp_path / "out.json")]
    with pytest.raises(KeyboardInterrupt):
        module.main(words)
    module.main(words)
    assert calls == ["package", "screened", "screened"]
    made = json.loads((tmp_path / "out.json").read_text())
    row = made["networks"]["0 made_network:linear"]
    assert row["accuracy"] == {"package": 40, "screened": 40}
    assert made["ratio"] == row["ratio"]["screened"]["wall"]
    assert made["ratio_fragile"] is None
    assert made["seeds"] == [0]
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ConfigError, match="no run below"):
        module.main(["--runs", str(tmp_path)])
    with pytest.raises(ConfigError, match="sides: package,screened"):
        module.main([*words, "--sides", "package"])
