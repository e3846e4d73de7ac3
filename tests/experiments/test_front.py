"""Fronts of methods: what varies, what is trained, what is found, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cure
from cure.errors import ConfigError
from cure.evaluation.metrics import pack, unpack
from cure.experiments.front import Curve, curves_of, lines, plan_of, read_values, record_of
from cure.experiments.plan import Plan, entries
from cure.registry import METHODS
from cure.runs.results import EvaluationRecord, FrontRecord, RunRecord
from cure.utils.stats import wilson
from helpers import Command, refused

TINY = {
    "data.limit": 300,
    "data.validation": 50,
    "model": {"name": "small_cnn", "options": {"width": 4}},
    "natural.epochs": 6,
    "attack.steps": 1,
    "training.epochs": 1,
    "training.validation_steps": 1,
    "training.collapse_patience": 100,
    "training.threads": 1,
}


def planned(curves: list[Curve], settings: dict[str, Any], **more: Any) -> Plan:
    whole: dict[str, Any] = {
        "own": {},
        "seeds": (0, 1),
        "attacks": ("pgd2",),
        "split": "test",
        "limit": None,
        "folder": None,
    }
    return plan_of(curves, "digits", settings, **(whole | more))


# What varies.


@pytest.mark.parametrize("name", METHODS.names())
def test_every_declared_setting_takes_its_values(name: str) -> None:
    method = METHODS[name]
    needed: dict[str, Any] = {}
    for role, field in method.Config.model_fields.items():
        if field.is_required() and role != "name":
            needed[role] = "run"
    for one in method.tradeoff:
        assert len(one.values) > 1
        assert list(one.values) == sorted(one.values)
        for value in one.values:
            content: dict[str, Any] = dict(needed)
            place = content
            *sections, last = one.setting.split(".")
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
            method.Config.model_validate(content)
    assert bool(method.tradeoff) == (name != "natural")


def test_the_guide_names_what_every_method_declares() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "trade-off.md"
    rows = {
        cells[1].strip(" `"): cells[2]
        for line in guide.read_text(encoding="utf-8").splitlines()
        if len(cells := line.split("|")) == 4 and cells[1].startswith(" `")
    }
    for name in METHODS.names():
        said = rows[name]
        for one in METHODS[name].tradeoff:
            favours = "not known" if one.more is None else f"more {one.more}"
            values = ", ".join(f"{value:g}" for value in one.values)
            assert f"`{one.setting}` {values} ({favours})" in said
        assert METHODS[name].tradeoff or said.strip() == "none"


def test_values_are_those_declared_or_given() -> None:
    (declared,) = curves_of(["trades"], {})
    assert (declared.key, declared.values, declared.more) == (
        "method.beta",
        (1.0, 3.0, 6.0, 10.0),
        "robust",
    )
    given = curves_of(["cure"], read_values(["cure=1,3", "cure:method.percent=10,60"]))
    assert [(c.label, c.knob, c.values) for c in given] == [
        ("cure", "gamma", (1, 3)),
        ("cure-percent", "percent", (10, 60)),
    ]
    (alone,) = curves_of(["natural"], {})
    assert (alone.key, alone.values) == (None, (None,))
    (radius,) = curves_of(["at"], read_values(["at:threat.epsilon=2/255,4/255"]))
    assert radius.row("2/255") == "at-threat.epsilon-2-255"


@pytest.mark.parametrize(
    ("methods", "values", "word"),
    [
        (["at"], {"trades": [1]}, "trades"),
        (["ta"], {}, "unknown method"),
        (["natural"], {"natural": [1]}, "declares no setting"),
        (["at"], {"at": [0.5, 0.5]}, "different values"),
    ],
)
def test_values_that_do_not_fit(methods: list[str], values: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        curves_of(methods, values)


def test_a_natural_start_is_shared_by_all_values_of_a_seed() -> None:
    plan = planned(curves_of(["hat", "trades"], {"hat": [0.5], "trades": [1, 6]}), TINY)
    assert set(plan.rows) == {"natural", "hat-0.5", "trades-1", "trades-6"}
    made = {entry.name: entry for entry in entries(plan)}
    assert made["trades-6-seed1"].needs == {"natural"}
    assert made["trades-6-seed1"].config.method.beta == 6  # type: ignore[attr-defined]
    assert made["hat-0.5-seed0"].config.method.natural_teacher.path == "run:natural"  # type: ignore[attr-defined]
    natural = made["natural-seed0"].config
    assert (natural.method.name, natural.training.epochs, natural.start) == ("natural", 6, "model")


def test_a_start_by_seed_and_settings_of_one_method() -> None:
    settings = {**TINY, "start": "runs/natural-seed{seed}"}
    own = {"at": {"attack.epsilon": "24/255"}, "cure": {"method.percent": 10}}
    plan = planned(curves_of(["at", "cure"], {"at": [0], "cure": [2]}), settings, own=own)
    assert set(plan.rows) == {"at-0", "cure-2"}
    made = {entry.name: entry.config for entry in entries(plan)}
    assert made["at-0-seed1"].start == "runs/natural-seed1"
    assert str(made["at-0-seed1"].attack.epsilon) == "24/255"
    assert made["cure-2-seed1"].attack.epsilon is None
    # The recipe's method keeps the recipe's other settings.
    horizon = cure.load_recipe("digits").method.revision.horizon  # type: ignore[attr-defined]
    assert made["cure-2-seed0"].method.revision.horizon == horizon  # type: ignore[attr-defined]
    assert made["cure-2-seed0"].method.percent == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", ["method.beta", "seed", "method"])
def test_settings_of_one_method_are_not_for_all(key: str) -> None:
    with pytest.raises(ConfigError, match="--with METHOD"):
        planned(curves_of(["at"], {}), {key: 1})


@pytest.mark.parametrize("key", ["threat.epsilon", "data.split_seed"])
def test_points_of_one_front_share_threat_and_images(key: str) -> None:
    with pytest.raises(ConfigError, match="under one threat on the same images"):
        planned(curves_of(["at"], read_values([f"at:{key}=1,2"])), {})
    with pytest.raises(ConfigError, match="under one threat on the same images"):
        planned(curves_of(["at"], {}), {}, own={"at": {key: 1}})


# What is found.


def evaluated(natural: list[bool], robust: list[bool]) -> dict[str, Any]:
    def accuracy(right: list[bool]) -> dict[str, Any]:
        n, correct = len(right), sum(right)
        found = {"accuracy": 100 * correct / n, "interval": list(wilson(correct, n))}
        return {**found, "correct": correct, "n": n, "right": pack(torch.tensor(right))}

    return {
        "format": "cure-evaluation-1",
        "target": "run",
        "natural": accuracy(natural),
        "attacks": {"pgd2": accuracy(robust) | {"settings": {}}},
        "nrr": {},
        "threat": {"norm": "Linf", "epsilon": 0.15, "epsilon_text": "0.15"},
        "data": {"name": "/home/me/images", "split": "test", "size": [1, 8, 8], "classes": []},
        "model": {"checkpoint": "best"},
        "environment": {"time": "2026"},
    }


def shares(natural: int, robust: int, n: int = 100) -> dict[str, Any]:
    return evaluated([i < natural for i in range(n)], [i < robust for i in range(n)])


def done(plan: Plan, figures: dict[str, tuple[int, int]]) -> dict[str, RunRecord]:
    configs = {entry.name: entry.config.model_dump(mode="json") for entry in entries(plan)}
    return {
        name: RunRecord.model_validate(
            {"format": "cure-run-1", "config": configs[name], "evaluations": [shares(*pair)]}
        )
        for name, pair in figures.items()
    }


def test_which_images_are_right_survives_its_text() -> None:
    right = np.random.default_rng(0).uniform(size=37) < 0.5
    assert unpack(pack(torch.from_numpy(right)), 37).tolist() == right.tolist()


def found_with(at: list[float] | None = None, **left_out: bool) -> FrontRecord:
    curves = curves_of(["at", "trades"], {"at": [0, 0.5], "trades": [1, 6]})
    plan = planned(curves, {**TINY, "start": "scratch"})
    figures = {
        "at-0-seed0": (50, 30),
        "at-0.5-seed0": (70, 10),
        "at-0-seed1": (52, 30),
        "at-0.5-seed1": (68, 10),
        "trades-1-seed0": (60, 12),
        "trades-6-seed0": (40, 28),
        "trades-1-seed1": (60, 12),
        "trades-6-seed1": (40, 28),
    }
    kept = {name: pair for name, pair in figures.items() if name not in left_out}
    made = record_of(plan, curves, done(plan, kept), (0.0, 0.0), at, {})
    assert made is not None
    return made


def test_hypervolume_and_comparison_by_hand() -> None:
    record = found_with([20.0, 29.0])
    at, trades = record.curves["at"].hypervolume, record.curves["trades"].hypervolume
    assert at is not None
    assert trades is not None
    # 70 x 10 + 50 x 20, 68 x 10 + 52 x 20; 60 x 12 + 40 x 16.
    assert at.mean == pytest.approx((17.0 + 17.2) / 2)
    assert trades.mean == pytest.approx(7.2 + 6.4)
    assert at.seeds == pytest.approx([17.1 - 12.7062 * 0.1, 17.1 + 12.7062 * 0.1], abs=1e-4)
    assert at.images[0] < at.mean < at.images[1]
    assert record.curves["at"].robust_range == [10, 30]
    assert record.common_range == [12, 28]
    first, second = record.comparisons
    assert first.natural["at"] is not None
    assert first.natural["trades"] is not None
    assert first.natural["at"].mean == pytest.approx(60.0)
    assert first.natural["trades"].mean == pytest.approx(50.0)
    assert second.natural["trades"] is None, "29 % lies beyond its points"
    assert any("at 60.0" in line and "trades 50.0" in line for line in lines(record))
    assert any("trades has no points around it" in line for line in lines(record))
    below = next(line for line in lines(found_with([5.0])) if "at pgd2 5 %" in line)
    assert below.count("has no points around it") == 2, "both curves lie above 5 %"
    assert record.missing == []
    assert record.data.name == "images", "no folder of a machine is published"


def test_rows_and_points() -> None:
    record = found_with()
    assert record.comparisons[0].robust == 20, "the middle of what both reach"
    row = record.rows[0].content()
    assert {key: row[key] for key in ("method", "knob", "value", "seed", "natural", "n")} == {
        "method": "at",
        "knob": "natural_share",
        "value": 0,
        "seed": 0,
        "natural": 50,
        "n": 100,
    }
    assert row["pgd2"] == 30
    assert row["pgd2_interval"] == list(wilson(30, 100))
    assert [(p.curve, p.value, p.dominated) for p in record.points] == [
        ("at", 0, False),
        ("at", 0.5, False),
        ("trades", 1, False),
        ("trades", 6, True),
    ]
    (beaten,) = [line for line in lines(record) if "is as good in both and better in one" in line]
    assert beaten.startswith("trades beta 6:")


def test_a_front_that_is_not_complete_says_what_is_missing() -> None:
    record = found_with(**{"at-0-seed1": True, "trades-1-seed0": True, "trades-6-seed1": True})
    assert record.missing == ["trades-1-seed0", "at-0-seed1", "trades-6-seed1"]
    assert record.curves["at"].seeds == [0]
    assert record.curves["trades"].hypervolume is None
    assert record.common_range == [10, 30]
    assert "not done yet: trades-1-seed0" in lines(record)[-1]


def test_seeds_on_other_numbers_of_images_are_refused_in_one_sentence() -> None:
    """As where photos were added to the test images between two seeds."""
    curves = curves_of(["at"], {"at": [0]})
    plan = planned(curves, {**TINY, "start": "scratch"})
    kept = done(plan, {"at-0-seed0": (50, 30), "at-0-seed1": (52, 30)})
    kept["at-0-seed1"].evaluations[:] = [EvaluationRecord.model_validate(shares(52, 30, 120))]
    with pytest.raises(ConfigError, match="measured on other images"):
        record_of(plan, curves, kept, (0.0, 0.0), None, {})


# The command.


class InThisProcess:
    """An executor that starts no processes, which would import PyTorch again."""

    def __init__(self, jobs: int) -> None:
        assert jobs == 1

    def submit(self, function: Any, *arguments: Any) -> Any:
        function(*arguments)
        return self

    def result(self) -> str:
        return ""


def test_the_command_trains_once_and_writes_a_record_and_pictures(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cure.experiments.front.run.LocalExecutor", InThisProcess)
    settings = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    words = ("front", "at", "trades", "digits", *settings, "--values", "at=0", "--values")
    more = ("trades=1,6", "--attacks", "pgd2", "--limit", 50, "--output", "fronts.json")
    ended = command(*words, *more)
    assert ended.status == 0, ended
    assert "4 runs, 0 of them done before; 9 epochs to train" in ended.out
    assert "hypervolume above natural 0 %, robust 0 % (pgd2, 50 test images" in ended.out
    record = FrontRecord.read(tmp_path / "fronts.json")
    assert [row.method for row in record.rows] == ["natural", "at", "trades", "trades"]
    run = tmp_path / "fronts" / "digits" / "trained" / "trades-6-seed0"
    again = cure.evaluate(run, attacks=["pgd2"], limit=50, per_image=True)
    assert again["attacks"]["pgd2"]["accuracy"] == record.rows[-1].content()["pgd2"]
    right = unpack(again["natural"]["right"], 50)
    assert right.mean() * 100 == again["natural"]["accuracy"]
    assert (tmp_path / "fronts.png").read_bytes()[1:4] == b"PNG"
    assert "trades" in (tmp_path / "fronts.svg").read_text()
    ended = command(*words, *more)
    assert "4 runs, 4 of them done before; 0 epochs to train" in ended.out
    # On another machine the packed results are enough.
    for part in ("trained", "runs"):
        (tmp_path / "fronts" / "digits" / part).rename(tmp_path / part)
    ended = command(*words, *more)
    assert "4 runs, 4 of them done before; 0 epochs to train" in ended.out
    assert FrontRecord.read(tmp_path / "fronts.json").curves == record.curves
    # Packed results and new ones make one front.
    (packed,) = tmp_path.rglob("records.jsonl")
    assert "trades-6-seed0" in packed.read_text().splitlines()[-1]
    packed.write_text("\n".join(packed.read_text().splitlines()[:-1]) + "\n")
    ended = command(*words, *more)
    assert ended.status == 0, ended
    assert "make no front" not in ended.out + ended.err
    assert FrontRecord.read(tmp_path / "fronts.json").curves == record.curves
    (tmp_path / "fronts.json").write_text('{"mine": 1}')
    refused(command(*words, *more), "is no front of this command")


def test_words_that_are_no_front(command: Command) -> None:
    refused(command("front", "digits"), "expected one method or more and then a recipe")
    refused(command("front", "at", "trades"), "one method or more and then a recipe")
    refused(command("front", "at", "digits", "--values", "at"), "METHOD=A,B,C")
    refused(command("front", "at", "digits", "--with", "a=1"), "METHOD:KEY=VALUE")
    refused(command("front", "at", "digits", "--reference", "1"), "reference: expected")
    refused(command("front", "at", "digits", "--limit", "0"), "evaluations.0.limit", "got 0")
    refused(command("front", "at", "digits", "--seeds=-1"), "front: seeds.0: ", "got -1")
    refused(command("front", "at", "digits", "--seeds", "1,0,1"), "seeds", "each once", "1, 0, 1")
    ended = command("front", "at", "digits", "--split", "train")
    assert ended.status == 2
    assert "'validation', 'test'" in ended.err
    refused(command("front", "at", "digits", "--at", "20,120"), "at: expected", "got 120")
    assert not Path("fronts").exists()


@pytest.mark.parametrize("name", ["front.svg", "front.txt", "there", "there.json"])
def test_files_that_the_record_cannot_have(command: Command, name: str, tmp_path: Path) -> None:
    for folder in ("there", "there.json"):
        (tmp_path / folder).mkdir()
    path = tmp_path / name
    refused(command("front", "at", "digits", "--output", path), "ends in .json", str(path))
