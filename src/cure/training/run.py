"""Train a run, or resume one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cure.config import MEMORY, OBJECT
from cure.data import ImageSet
from cure.data.accounting import account_of_run
from cure.data.cache import CachePlace, no_words
from cure.data.objects import as_images, is_object
from cure.errors import DataError
from cure.models.checks import check_network
from cure.recipe import check, dump, override, override_all, parse_override, read_recipe
from cure.runs.folder import RunFolder, path_of
from cure.runs.run import Run
from cure.training.budget import settle
from cure.training.extend import changed
from cure.training.prerequisites import carry_out
from cure.training.setup import prepare
from cure.training.start import standardised_as_start
from cure.training.tracking import TerminalTracker
from cure.utils.io import write_text

Overrides = str | Iterable[str] | Mapping[str, Any]


def train(
    recipe: str | Path,
    overrides: Overrides = (),
    *,
    run: str | Path | None = None,
    model: nn.Module | None = None,
    data: str | Path | ImageSet | Any = None,
    quiet: bool = False,
) -> Run:
    """Train by a recipe into a new run folder.

    Args:
        recipe: a name (``cure list recipes``) or the path of a YAML file.
        overrides: ``{"training.epochs": 10}``, ``["training.epochs=10"]``, or one such word; a
            dictionary as value replaces the whole section.
        run: the folder to make; by default the first free ``runs/NAME[-N]``.
        model: your network: images [B, C, H, W] in [0, 1] to logits.  It is copied, not changed.
            Its weights are what ``start: model`` begins with and ``start: natural`` trains first.
        data: what ``data.source`` would say, or images in memory (the training split): whatever
            :func:`cure.data.as_images` takes.
        quiet: print nothing.

    Returns:
        The finished run.

    Raises:
        CureError: for every mistake a user can correct, before or while training.

    >>> import cure
    >>> small = ["method=at", "start=scratch", "training.epochs=1", "data.limit=400"]
    >>> run = cure.train("digits", small, run="runs/one", quiet=True)
    >>> sorted(cure.evaluate(run, attacks=["pgd20"], limit=50)["attacks"])
    ['pgd20']
    """
    if model is not None:
        check_network(model)
    raw = read_recipe(recipe)
    if isinstance(section := raw.get("training"), dict):
        # The recipe may be the config.yaml of a run that was extended.
        for name in ("schedule_from", "schedule_length"):
            section.pop(name, None)
    override_all(raw, _pairs(overrides))
    if model is not None:
        given = {"name": OBJECT + f"{type(model).__module__}.{type(model).__qualname__}"}
        old = raw.get("model")
        kept = {k: old[k] for k in ("mean", "std") if k in old} if isinstance(old, dict) else {}
        raw["model"] = kept | given
    if is_object(data):
        name = data.name if isinstance(data, ImageSet) else "data"
        override(raw, "data.source", MEMORY + name)
    elif data is not None:
        override(raw, "data.source", str(data))
    config = standardised_as_start(check(raw, f"recipe {recipe}"), model)
    images = as_images(data, "train", config.data) if is_object(data) else None
    # All mistakes are found before the folder is made.
    terminal = TerminalTracker(config.name)
    place = CachePlace.beside(run, no_words if quiet else terminal.say)
    prepared = prepare(config, images, model, place=place)
    config, of_memory = settle(config, prepared)
    engine = prepared.engine

    def create() -> Path:
        # A quiet run shows nobody the duplicates, so the test images are not decoded for them.
        with_test = images is None and not quiet
        found = account_of_run(
            config.data, prepared.training, prepared.validation, with_test, place
        )
        if prepared.extra is not None:
            found = replace(found, extra=prepared.extra.account)
        made = RunFolder.create(run, config, prepared.training.kind, found.content())
        if prepared.extra is not None:
            prepared.extra.save(made)
        if not quiet:
            for line in found.lines():
                terminal.say(line)
            for line in of_memory:
                (terminal.warn if "training needs" in line else terminal.say)(line)
            for sentence in found.warnings():
                terminal.warn(sentence)
        return made.path

    path = engine.first(create)
    folder = RunFolder(path, writes=engine.rank == 0)
    carry_out(folder, config, prepared, quiet)
    return Run(folder.path, model)


def _pairs(overrides: Overrides) -> list[tuple[str, Any]]:
    """Settings and their values, however they were given."""
    if isinstance(overrides, Mapping):
        return [(key, _plain(value)) for key, value in overrides.items()]
    words = [overrides] if isinstance(overrides, str) else overrides
    return [parse_override(word) for word in words]


def _plain(value: Any) -> Any:
    """A value as a YAML file holds it: runs and paths as text, numbers of NumPy as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Run | Path):
        return str(path_of(value))
    return value.item() if isinstance(value, np.generic) else value


def resume(
    run: str | Path | Run,
    overrides: Overrides = (),
    *,
    model: nn.Module | None = None,
    data: ImageSet | Any = None,
    quiet: bool = False,
) -> Run:
    """Continue a run that was stopped or killed; it ends with the bits it would have had.

    With more ``training.epochs`` (or ``training.minutes``) a finished run goes on from its end; the
    schedule of the learning rate starts again there.

    Args:
        run: it or its folder, which knows its recipe.
        overrides: ``training.epochs`` or ``training.minutes`` of a finished run, in all;
            ``training.accumulation_steps`` of any; as for :func:`train`.
        model: the network, when the run was given one as a Python object.
        data: the images, when the run was given images in memory, as for :func:`train`.
        quiet: print nothing.

    Raises:
        CureError: also for a setting that a run cannot change.

    >>> import cure
    >>> small = ["method=at", "start=scratch", "training.epochs=1", "data.limit=400"]
    >>> run = cure.train("digits", small, run="runs/longer", quiet=True)
    >>> cure.resume(run, ["training.epochs=2"], quiet=True).config.training.epochs
    2
    """
    if isinstance(run, Run):
        model = run.network if model is None else model
        run = run.path
    if model is not None:
        check_network(model)
    folder = RunFolder.open(run)
    config, told = changed(folder, _pairs(overrides))
    if folder.status().finished and not told:
        return Run(folder.path, model)
    images = as_images(data, "train", config.data) if is_object(data) else None
    place = CachePlace.beside(folder.path, no_words) if quiet else None
    prepared = prepare(config, images, model, folder, place)
    if moved := folder.images_changed(prepared.training):
        raise DataError(f"{moved}; restore them, or train a new run")
    folder.writes = prepared.engine.rank == 0

    def keep() -> None:
        status = folder.status()
        if status.finished:
            # First: a run that is killed here is one that was not extended.
            folder.set_status(**(status.content() | {"state": "stopped"}))
        write_text(folder.path / "config.yaml", dump(config))
        if not quiet:
            for line in told:
                TerminalTracker(config.name).say(line)

    carry_out(folder, config, prepared, quiet, keep if told else None)
    return Run(folder.path, model)
