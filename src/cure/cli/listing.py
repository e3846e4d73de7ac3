"""What can be named in a recipe or on the command line, with a line on each.

Registries import PyTorch, which takes seconds, so ``listing.json`` holds what they contain.
``python -m cure.cli.listing`` (``make index``) writes it again, and a test compares it with the
registries.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cure.registry import PLUGINS
from cure.utils.io import write_text

if TYPE_CHECKING:
    from cure.config import Section

Rows = list[tuple[str, str]]

INDEX = Path(__file__).with_name("listing.json")
PLUG_INS = ("analysis", "attacks", "methods", "models")
"""Folders whose modules register what is listed."""


def listing(kind: str) -> Rows:
    """Names and descriptions of one kind.

    Args:
        kind: "methods", "models", "recipes", "attacks", "corruptions", "data", "studies", or
            "settings" (keys of a recipe with their defaults).
    """
    if kind == "recipes":
        from cure.recipe import read_recipe, recipe_names

        return [(name, str(read_recipe(name).get("description", ""))) for name in recipe_names()]
    if kind == "data":
        from cure.data import known_sources

        return known_sources()
    index = json.loads(INDEX.read_text(encoding="utf-8"))
    if index["modules"] != _modules() or os.environ.get(PLUGINS):
        # Somebody added a method, model, attack or study.
        index = make_index()
    return [(name, text) for name, text in index[kind]]


def make_index() -> dict[str, Any]:
    """The content of ``listing.json``, from the registries."""
    from cure.attacks.registry import known_attacks
    from cure.config import RunConfig
    from cure.evaluation.corruptions.operations import CORRUPTIONS
    from cure.registry import METHODS, MODELS, STUDIES

    settings = [row for row in _settings(RunConfig, "") if row[0] != "method"]
    for name in METHODS.names():
        settings += _settings(METHODS[name].Config, "method.", f"{name}: ")
    rows = {
        "methods": [(name, _first_line(METHODS[name])) for name in METHODS.names()],
        "models": [
            *((name, _first_line(MODELS[name])) for name in MODELS.names()),
            ("package.module:callable", "your own function or class that returns a network"),
            ("hf:NAME_OR_FOLDER", "an image classifier of transformers (pip install cure-at[hub])"),
            ("timm:NAME", "a network of timm, where timm is installed"),
        ],
        "attacks": list(known_attacks().items()),
        "corruptions": [
            (name, f"{corruption.group}: {_first_line(corruption.apply)}")
            for name, corruption in CORRUPTIONS.items()
        ],
        "studies": [(name, STUDIES[name].question) for name in STUDIES.names()],
        "settings": settings,
    }
    return {"modules": _modules()} | {kind: [list(row) for row in rows[kind]] for kind in rows}


def _modules() -> list[list[str]]:
    """Folders and names of the modules that register something."""
    folders = [Path(__file__).parents[1] / name for name in PLUG_INS]
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return [[file.parent.name, file.stem] for file in files]


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0].replace("``", "")


def _settings(section: type[Section], prefix: str, owner: str = "") -> Rows:
    """Every key below a section of a recipe, with its default and help text."""
    rows: Rows = []
    for name, field in section.model_fields.items():
        inner = _inner_section(field.annotation)
        if inner is not None:
            rows += _settings(inner, f"{prefix}{name}.", owner)
        elif (prefix, name) != ("method.", "name"):
            default = "" if field.is_required() else f" = {_shown(field.default)}"
            text = " ".join((field.description or "").replace("``", "").split())
            rows.append((f"{prefix}{name}{default}", owner + text))
    return rows


def _inner_section(annotation: object) -> type[Section] | None:
    from cure.config import MethodConfig, Section

    options = [annotation, *getattr(annotation, "__args__", ())]
    sections = [o for o in options if isinstance(o, type) and issubclass(o, Section)]
    return sections[0] if sections and sections[0] is not MethodConfig else None


def _shown(default: object) -> str:
    if isinstance(default, bool) or default is None:
        return str(default).lower().replace("none", "null")
    return str(list(default)) if isinstance(default, tuple) else str(default)


def write_index() -> None:
    """Write ``listing.json``, a row a line."""
    blocks = []
    for kind, content in make_index().items():
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        blocks.append(f"{json.dumps(kind)}: [\n{rows}\n]")
    write_text(INDEX, "{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    write_index()
