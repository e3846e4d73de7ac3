"""What is written down of the command that made a result."""

from __future__ import annotations

import pytest

from cure.utils.environment import environment


def test_the_command_names_no_place_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/usr/bin/cure", "train", "photos", "data.source=/home/me/photos", "start=a/b=/c"]
    monkeypatch.setattr("sys.argv", [*words, "--run", "/home/me/run", "--values", "at=0.5"])
    expected = "cure train photos data.source=photos start=a/b=/c --run run --values at=0.5"
    assert environment()["command"] == expected


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("benchmarks/photos.py", "photos.py"),
        ("/usr/lib/cure/__main__.py", "cure"),
        ("/usr/bin/pytest", "cure"),
        ("", "cure"),
    ],
)
def test_a_script_is_named(monkeypatch: pytest.MonkeyPatch, program: str, name: str) -> None:
    monkeypatch.setattr("sys.argv", [program, "--seeds", "0"])
    assert environment()["command"] == f"{name} --seeds 0"
