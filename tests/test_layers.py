"""The order of imports: a folder imports only from folders above it in the list."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "cure"

FOUNDATION = ("errors", "registry", "config", "recipe", "utils")
"""The lowest layer: its modules import one another and nothing else of the package."""

LAYERS = (
    "data",
    "models",
    "attacks",
    "methods",
    "runs",
    "training",
    "evaluation",
    "exporters",
    "integrations",
    "experiments",
    "analysis",
    "report",
    "cli",
)
"""A folder may import itself, the foundation, and the folders before it."""

ENTRY = ("__init__", "__main__", "api")
"""The public names: they use everything, and nothing below imports them."""


def layer_of(part: str) -> int:
    """Position of a top-level module or folder of the package in the order."""
    if part in FOUNDATION:
        return 0
    if part in LAYERS:
        return 1 + LAYERS.index(part)
    if part in ENTRY:
        return 1 + len(LAYERS)
    raise AssertionError(f"cure.{part} has no place in the order of imports")


def imported_parts(source: str, package: str = "cure") -> list[tuple[int, str]]:
    """Line and top-level part of every import of the package, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            names = [str(node.module)]
            if node.module == package:
                names = [f"{package}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == package:
                found.append((node.lineno, rest.split(".")[0] or "__init__"))
    return found


def violations(folder: Path) -> list[str]:
    """Imports of a later layer, as "file:line imports cure.part"."""
    wrong = []
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        own = relative.parts[0].removesuffix(".py")
        for line, part in imported_parts(file.read_text(encoding="utf-8")):
            is_module = (folder / part).is_dir() or (folder / f"{part}.py").exists()
            # `from cure import __version__` and the like name the package itself.
            target = part if is_module else "__init__"
            if layer_of(target) > layer_of(own):
                wrong.append(f"{relative}:{line} imports cure.{part}")
    return wrong


def test_every_import_goes_to_the_same_or_an_earlier_layer() -> None:
    assert violations(PACKAGE) == []


def test_the_root_holds_only_the_named_modules() -> None:
    names = {file.stem for file in PACKAGE.glob("*.py")}
    assert names == {*ENTRY, "config", "recipe", "registry", "errors"}


def test_an_import_of_a_later_layer_is_found_also_inside_a_function(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "cli").mkdir()
    (tmp_path / "data" / "images.py").write_text("def f():\n    from cure.cli import main\n")
    (tmp_path / "cli" / "main.py").write_text("from cure.data import images\n")
    assert violations(tmp_path) == ["data/images.py:2 imports cure.cli"]


@pytest.mark.parametrize(
    "code",
    ["import cure", "import sys; sys.argv = ['cure', '--help']; from cure.cli.main import main"],
)
def test_no_torch_is_loaded_before_it_is_needed(code: str) -> None:
    program = f"{code}\nimport sys\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
