"""The speedrun: time is what ends it, a killed run gets no more of it, and the log is complete."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cure.config import DataConfig
from cure.data import load_training
from cure.errors import ConfigError

DIGITS = DataConfig(source="digits", validation=100)
SMALL = ["batch_size=32", "options={width: 2}", "precision=fp32"]


def script() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "speedrun.py"
    spec = importlib.util.spec_from_file_location("speedrun", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["speedrun"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in(folder: Path, minutes: float) -> Any:
    module = script()

    class Counted(module.Clock):  # type: ignore[misc, name-defined]
        """Each reading is 20 ms after the one before, whatever the machine does."""

        readings = 0

        @property
        def now(self) -> float:
            self.readings += 1
            return 0.02 * self.readings

    clock = Counted(folder / "clock.json", minutes)
    settings = module.settings_of(SMALL)
    images, _ = load_training(DIGITS)
    return module.Run(folder, settings, images, clock, torch.device("cpu"), 0)


def words(tmp_path: Path, *more: str) -> list[str]:
    places = [("--folder", "run"), ("--output", "cpu.json"), ("--log", "log.jsonl")]
    options = [word for name, file in places for word in (name, str(tmp_path / file))]
    common = ["--data", "digits", "--held-out", "100", "--threads", "1", "--limit", "6"]
    return [*SMALL, *common, *options, *more]


def test_it_ends_with_its_time_and_goes_on_where_it_was_saved(tmp_path):
    first = run_in(tmp_path, 3 / 60)
    first.train()
    assert first.clock.spent < 3.3
    assert first.step > 3
    again = run_in(tmp_path, 10)
    assert again.step == first.step
    for kind, network in first.networks().items():
        theirs = again.networks()[kind].state_dict()
        assert all(torch.equal(theirs[n], t) for n, t in network.state_dict().items())
    for before, after in zip(
        first.method.trainable().values(), again.method.trainable().values(), strict=True
    ):
        momentum = [
            r.optimizer.state[p]["momentum_buffer"] for r, p in ((first, before), (again, after))
        ]
        assert torch.equal(*momentum)
        assert momentum[0].abs().max() > 0
    # The time of the first process, of which up to one beat was not written down, stays spent.
    assert again.clock.spent > 2.9
    late = run_in(tmp_path, 3 / 60)
    late.train()
    assert late.step <= first.step + 1


def test_epsilon_and_size_follow_the_time(tmp_path):
    run = run_in(tmp_path, 10)
    batch = next(run.batches_of_epoch(0, 0))
    sizes, radii = [], []
    for share in (0.0, 0.1, 0.3, 0.6):
        run.clock.began = run.clock.now - share * run.clock.budget
        sizes.append(run.arranged(batch, run.engine).image.shape[-1])
        radii.append(run.method.context.attack_at(0).threat.epsilon * 255)
    assert sizes == [6, 6, 6, 8]
    assert radii == pytest.approx([0.08, 4, 8, 8], abs=0.01)


def test_choices_are_logged_and_the_result_is_autoattack_on_test_images(tmp_path):
    module = script()
    module.main(words(tmp_path, "--minutes", "0.02", "--validation", "--attacks", "pgd2"))
    (logged,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert logged["split"] == "validation"
    assert logged["settings"]["options"] == {"width": 2}
    assert logged["environment"]["packages"]["torch"]
    with pytest.raises(ConfigError, match="a run with other settings"):
        module.main(words(tmp_path, "--minutes", "0.02"))
    module.main(words(tmp_path, "--minutes", "0.02", "--folder", str(tmp_path / "final")))
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["split"] == "test"
    assert result["n"] == 6
    assert result["autoattack"] == result["worst_case"] <= result["natural"]
    assert len(result["interval"]) == 2
    assert result["seconds"] > 0
    with pytest.raises(ConfigError, match="by the clock on the wall"):
        module.main(words(tmp_path, "--clock", "processor"))
