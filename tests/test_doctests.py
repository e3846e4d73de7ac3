"""The examples in docstrings run, and public methods, attacks and losses have one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import warnings
from pathlib import Path

import pytest

import cure

SOURCE = Path(__file__).parents[1] / "src"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in (SOURCE / "cure").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = doctest.testmod(importlib.import_module(name))
    assert done.failed == 0


def public() -> list[object]:
    methods = [getattr(cure.methods, name) for name in cure.methods.__all__]
    losses = [
        value
        for name, value in vars(cure.losses).items()
        if inspect.isfunction(value)
        and value.__module__ == cure.losses.__name__
        and not name.endswith("_terms")
    ]
    found = [m for m in methods if inspect.isclass(m) and issubclass(m, cure.methods.Method)]
    verbs = [
        value
        for name in cure.__all__
        if callable(value := getattr(cure, name)) and value is not cure.CureError
    ]
    return [*found, *losses, *verbs, cure.attacks.PGD]


@pytest.mark.parametrize("entry", public(), ids=lambda entry: entry.__name__)
def test_what_users_call_has_an_example_and_a_source(entry: object) -> None:
    text = inspect.getdoc(entry) or ""
    assert ">>> " in text or entry in (cure.methods.Method, cure.losses.accuracy)
