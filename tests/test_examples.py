"""The examples run, in seconds, and print what they promise."""

from __future__ import annotations

import re
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

from cure.registry import ATTACKS, METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = (
    "add_a_method",
    "add_an_attack",
    "evaluate_any_model",
    "export_and_serve",
    "own_training_loop",
    "robust_photo_classifier",
)


@pytest.fixture
def printed(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What the example of that name prints; names that it registers are removed afterwards."""
    monkeypatch.setattr(sys, "argv", ["example.py"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = [(registry, set(registry.names())) for registry in (METHODS, ATTACKS)]
    runpy.run_path(str(EXAMPLES / f"{request.param}.py"), run_name="__main__")
    for registry, names in before:
        for name in set(registry.names()) - names:
            del registry._entries[name]
    return capsys.readouterr().out


def example(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("printed", [name], indirect=True)


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(number) for number in found.groups()]


def test_the_folder_holds_what_is_tested_here_one_screen_each() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NAMES)
    for name in NAMES:
        lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
        # A service must also refuse what is no image.
        assert len(lines) <= (100 if name == "export_and_serve" else 60), name


@example("own_training_loop")
def test_own_training_loop(printed: str) -> None:
    natural, robust = numbers(r"natural accuracy ([\d.]+) %\nPGD-20 accuracy ([\d.]+) %", printed)
    assert natural > 65
    assert 25 < robust < natural


@example("robust_photo_classifier")
def test_robust_photo_classifier(printed: str) -> None:
    natural, robust = numbers(r"natural ([\d.]+) %\nPGD-20 ([\d.]+) % at 4/255", printed)
    assert natural >= robust > 90


@example("add_a_method")
def test_add_a_method(printed: str) -> None:
    assert 15 < float(printed.splitlines()[-1]) < 80


@example("add_an_attack")
def test_add_an_attack(printed: str) -> None:
    own, pgd = numbers(r"bars: ([\d.]+) % still right\npgd20: ([\d.]+) % still right", printed)
    assert own >= pgd


@example("evaluate_any_model")
def test_evaluate_any_model(printed: str) -> None:
    natural, weak, strong = numbers(
        r"natural: ([\d.]+) %\nfgsm: ([\d.]+) % .*\npgd20: ([\d.]+) %", printed
    )
    assert natural > weak >= strong
    assert "diagnosis: " in printed


@example("export_and_serve")
def test_export_and_serve(printed: str) -> None:
    difference, allowed = numbers(
        r"'largest_difference': ([\d.e-]+), 'tolerance': ([\d.e-]+)", printed
    )
    assert difference <= allowed < 0.01
