"""Methods and attacks of one's own, in commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cure.errors import ConfigError
from cure.registry import import_plugins

METHOD = '''
from typing import Literal
from cure.methods.at import AT, AdversarialConfig
from cure.methods import METHODS

class MineConfig(AdversarialConfig):
    name: Literal["mine"] = "mine"

@METHODS.register("mine")
class Mine(AT):
    """Adversarial training under another name."""

    Config = MineConfig
'''


def test_commands_know_the_modules_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(METHOD)

    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cure", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    before = ran("show", "digits", "method=mine")
    assert before.returncode == 2
    assert "CURE_PLUGINS" in before.stderr
    monkeypatch.setenv("CURE_PLUGINS", "mine")
    after = ran("show", "digits", "method=mine")
    assert after.returncode == 0, after.stderr
    assert "name: mine" in after.stdout
    assert "Adversarial training under another name." in ran("list", "methods").stdout


def test_a_module_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURE_PLUGINS", "no_such_module")
    with pytest.raises(ConfigError, match="'no_such_module' could not be imported"):
        import_plugins()
