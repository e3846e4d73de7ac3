"""The set of attacks that ``--attacks auto`` takes for a time limit."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import cure
from cure.attacks import Threat
from cure.errors import ConfigError, CureNote
from cure.evaluation import auto
from cure.evaluation.auto import choose_attacks, passes, seconds_per_pass
from cure.utils.engine import Engine
from helpers import bright_or_dark

THREAT = Threat("Linf", 8 / 255)
ENGINE = Engine(torch.device("cpu"))


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval()


def chosen(monkeypatch: pytest.MonkeyPatch, seconds: float, classes: int = 4) -> tuple[str, ...]:
    """The choice for 100 images of which a pass takes a millisecond."""
    monkeypatch.setattr(auto, "seconds_per_pass", lambda *_: 1e-3)
    images = bright_or_dark(100, classes=classes)
    names, sentence = choose_attacks(network(classes), images, THREAT, ENGINE, 50, seconds)
    assert all(name in sentence for name in names)
    return names


def test_passes_are_those_of_the_parts() -> None:
    assert passes(("pgd20",), 10, THREAT) == 20
    # 100 steps, and 100 for each of three other classes.
    assert passes(("apgd-ce", "apgd-t"), 4, THREAT) >= 400
    assert passes(("autoattack",), 10, THREAT) > passes(("apgd-ce", "apgd-t"), 10, THREAT) + 5000


def test_the_strongest_set_within_the_limit_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # 100 images of a millisecond: a tenth of a second a pass.
    middle = 0.1 * passes(("apgd-ce", "apgd-t"), 4, THREAT)
    assert chosen(monkeypatch, middle - 0.01) == ("pgd20",)
    assert chosen(monkeypatch, middle + 0.01) == ("apgd-ce", "apgd-t")
    assert chosen(monkeypatch, 1e9) == ("autoattack",)
    assert chosen(monkeypatch, 0.1) == ("pgd20",), "the weakest where nothing fits"


def test_a_set_that_is_not_defined_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    few = 0.1 * passes(("autoattack",), 2, THREAT)
    assert chosen(monkeypatch, few - 0.01, classes=2) == ("pgd20",)


def test_a_pass_is_timed_without_touching_the_network() -> None:
    model = network(2)
    assert 0 < seconds_per_pass(model, bright_or_dark(), ENGINE, 32) < 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_says_what_it_took() -> None:
    images = bright_or_dark(40, "test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CureNote)
        result = cure.evaluate(network(2), data=images, attacks="auto", time_limit=1e-3)
    assert any("attacks chosen" in note and "autoattack" in note for note in result["notes"])
    result_names = {*result["attacks"], *result.get("unfinished", [])}
    assert result_names == {"pgd20"}


def test_auto_needs_a_limit() -> None:
    with pytest.raises(ConfigError, match="auto needs a time limit"):
        cure.evaluate(network(2), data=bright_or_dark(40, "test"), attacks="auto")


def test_further_attacks_are_kept() -> None:
    images = bright_or_dark(40, "test")
    result = cure.evaluate(network(2), data=images, attacks="auto,noise", time_limit=1e-3)
    assert {*result["attacks"], *result.get("unfinished", [])} == {"pgd20", "noise"}


def test_the_same_command_goes_on_with_the_attacks_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the second call, on a machine that is less busy, would choose stronger ones."""
    output, images, model = tmp_path / "result.json", bright_or_dark(40, classes=4), network(4)
    asked = {"data": images, "attacks": "auto", "output": output, "epsilon": 0.01, "batch_size": 8}
    monkeypatch.setattr(auto, "seconds_per_pass", lambda *_: 1.0)
    first = cure.evaluate(model, time_limit=1e-9, **asked)
    assert list(first["unfinished"]) == ["pgd20"]
    monkeypatch.setattr(auto, "seconds_per_pass", lambda *_: 1e-9)
    second = cure.evaluate(model, time_limit=600, **asked)
    assert list(second["attacks"]) == ["pgd20"]
    assert any("chosen when it was begun: pgd20" in note for note in second["notes"])
