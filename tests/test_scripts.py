"""Scripts outside the package import what the package has."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "docs", "examples", "results")
    for path in (ROOT / folder).rglob("*.py")
)


def missing(source: str) -> list[str]:
    """Names that a script imports from the package and that are not there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "cure":
            continue
        module = importlib.import_module(str(node.module))
        found += [
            f"{node.module}.{alias.name}"
            for alias in node.names
            if not hasattr(module, alias.name)
            and not (hasattr(module, "__path__") and find_spec(f"{node.module}.{alias.name}"))
        ]
    return found


def test_a_name_that_moved_is_found() -> None:
    assert missing("from cure.runs.folder import RunFolder, Moved") == ["cure.runs.folder.Moved"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_what_is_there(script: str) -> None:
    if "integrations" in (source := (ROOT / script).read_text(encoding="utf-8")):
        pytest.skip("it needs a library of its own")
    assert missing(source) == []
