"""What can be named, with a line on each."""

from __future__ import annotations

import inspect

from cure.analysis.study import STUDIES
from cure.attacks.registry import known_attacks
from cure.config import MethodConfig, RunConfig, Section
from cure.data import known_sources
from cure.evaluation.corruptions.operations import CORRUPTIONS
from cure.methods import METHODS
from cure.models import MODELS
from cure.recipe import read_recipe, recipe_names

Rows = list[tuple[str, str]]


def listing(kind: str) -> Rows:
    """Names and descriptions of one kind.

    Args:
        kind: "methods", "models", "recipes", "attacks", "corruptions", "data", "studies", or
            "settings" (keys of a recipe with their defaults).
    """
    if kind == "methods":
        return [(name, _first_line(METHODS[name])) for name in METHODS.names()]
    if kind == "models":
        own = [(name, _first_line(MODELS[name])) for name in MODELS.names()]
        return [
            *own,
            ("package.module:callable", "your own function or class that returns a network"),
            ("hf:NAME_OR_FOLDER", "an image classifier of transformers (pip install cure-at[hub])"),
            ("timm:NAME", "a network of timm, where timm is installed"),
        ]
    if kind == "recipes":
        return [(name, str(read_recipe(name).get("description", ""))) for name in recipe_names()]
    if kind == "settings":
        rows = [row for row in _settings(RunConfig, "") if row[0] != "method"]
        for name in METHODS.names():
            rows += _settings(METHODS[name].Config, "method.", f"{name}: ")
        return rows
    if kind == "attacks":
        return list(known_attacks().items())
    if kind == "corruptions":
        return [
            (name, f"{corruption.group}: {_first_line(corruption.apply)}")
            for name, corruption in CORRUPTIONS.items()
        ]
    if kind == "studies":
        return [(name, STUDIES[name].question) for name in STUDIES.names()]
    return known_sources()


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
    options = [annotation, *getattr(annotation, "__args__", ())]
    sections = [o for o in options if isinstance(o, type) and issubclass(o, Section)]
    return sections[0] if sections and sections[0] is not MethodConfig else None


def _shown(default: object) -> str:
    if isinstance(default, bool) or default is None:
        return str(default).lower().replace("none", "null")
    return str(list(default)) if isinstance(default, tuple) else str(default)
