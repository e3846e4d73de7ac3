"""Registries of what users choose by name: methods, models, attacks, trackers, studies.

A package of plug-ins (``cure.methods``) is imported file by file on the first look-up, so a new
method is one new file: nothing else lists it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from cure.errors import ConfigError, unknown

T = TypeVar("T")

PLUGINS = "CURE_PLUGINS"
"""Environment variable: modules of your own methods, models, attacks and studies, with commas."""


class Registry(Generic[T]):
    """A table of named entries, filled by importing the modules of one package.

    Args:
        kind: what one entry is, in the singular, for messages ("method").
        package: the package whose modules register entries when they are imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers an entry under ``name``.

        Raises:
            ValueError: when the name is taken by something else.
        """

        def keep(entry: T) -> T:
            if self._entries.get(name, entry) is not entry:
                raise ValueError(f"two entries claim the {self.kind} name '{name}'")
            self._entries[name] = entry
            return entry

        return keep

    def __getitem__(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            ConfigError: when there is none; the message gives the nearest and all known names.
        """
        self._load()
        if name not in self._entries:
            raise ConfigError(self.unknown(name))
        return self._entries[name]

    def unknown(self, name: str) -> str:
        """The sentence for a name that is not registered."""
        self._load()
        hint = f" (one of your own is found when {PLUGINS} names its module)"
        return unknown(self.kind, name, self._entries) + hint

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._entries

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.ispkg:
                importlib.import_module(f"{self._package}.{module.name}")
        import_plugins()


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Put the working directory first on the path of imports, as ``python -m`` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def import_plugins() -> None:
    """Import the modules that :data:`PLUGINS` names, which register what they hold.

    Raises:
        ConfigError: when there is no such module, or it fails.
    """
    for name in filter(None, map(str.strip, os.environ.get(PLUGINS, "").split(","))):
        try:
            with working_directory_importable():
                importlib.import_module(name)
        except Exception as error:
            raise ConfigError(
                f"{PLUGINS}: the module '{name}' could not be imported from here ({error}); it "
                "takes names of modules, such as mine,package.other"
            ) from error


METHODS: Registry[Any] = Registry("method", "cure.methods")
"""Training methods: classes derived from :class:`cure.methods.Method`."""

MODELS: Registry[Any] = Registry("model", "cure.models")
"""Architectures: ``builder(classes, channels, size, *, options...) -> network``."""

ATTACKS: Registry[Any] = Registry("attack", "cure.attacks")
"""Attacks that evaluation runs: :class:`cure.attacks.registry.EvaluationAttack` or families."""

TRACKERS: Registry[Any] = Registry("tracker", "cure.training.tracking")
"""Experiment trackers."""

STUDIES: Registry[Any] = Registry("study", "cure.analysis")
"""Studies of trained networks."""

RENAMED_STUDIES = {"conserved": "prediction-flips", "perturbation": "minimal-perturbation"}
"""Names of studies in version 0.1, and their names now."""
