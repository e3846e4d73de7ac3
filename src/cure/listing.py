"""What can be named, with a line on each."""

from __future__ import annotations

import inspect

from cure.attacks.suite import KNOWN
from cure.data import known_sources
from cure.methods import METHODS
from cure.models import MODELS
from cure.recipe import read_recipe, recipe_names

Rows = list[tuple[str, str]]


def listing(kind: str) -> Rows:
    """Names and descriptions of "methods", "models", "recipes", "attacks" or "data"."""
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
    if kind == "attacks":
        return [*KNOWN.items(), ("pgdK", "PGD with any number of steps K")]
    return known_sources()


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0].replace("``", "")
