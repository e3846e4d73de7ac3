"""The examples of docs/integrations.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
SHARED, *EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
TITLES = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(SHARED + code, "docs/integrations.md", "exec"), names)
    return names


def test_each_part_has_an_example() -> None:
    assert TITLES == ["Lightning", "timm", "scikit-learn", "MAITE", "Trackers"]
    assert len(EXAMPLES) == 5


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    names = run(EXAMPLES[0])
    found = {key: float(value) for key, value in names["trainer"].callback_metrics.items()}
    assert found["val_natural"] > found["val_robust"] > 40
    assert names["robust"] is names["method"].model


def test_timm(timm: Any) -> None:
    names = run(EXAMPLES[1])
    assert names["method"].progress.done == len(names["test_loader"]) == 3
    assert names["task"].get_eval_model() is names["model"]


def test_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(EXAMPLES[2])
    assert (tmp_path / "runs" / "sklearn" / "checkpoints").is_dir()
    assert names["result"]["attacks"]["pgd20"]["accuracy"] > 10


def test_maite() -> None:
    names = run(EXAMPLES[3])
    assert len(names["adversarial"]) == len(names["targets"]) == 8
    names = run(EXAMPLES[4])
    assert set(names["result"]["attacks"]) == {"noise", "square"}
