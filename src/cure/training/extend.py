"""What `cure resume` may change about a run: its length, and how its batches are worked on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from cure.config import RunConfig
from cure.errors import ConfigError
from cure.recipe import check_kept, override
from cure.runs.folder import RunFolder
from cure.training.budget import MARGIN

LENGTH = ("training.epochs", "training.minutes")
PARTS = "training.accumulation_steps"
FROM = "training.schedule_from"
SHAPE = "training.schedule_length"


def changed(folder: RunFolder, settings: Iterable[tuple[str, Any]]) -> tuple[RunConfig, list[str]]:
    """The configuration with which a run goes on, and a line on each change.

    Args:
        folder: of the run.
        settings: names and values.

    Raises:
        ConfigError: for a setting that would make it another run, a run that is not finished and
            shall be longer, or one that shall be shorter.
    """
    before, raw = folder.config, copy.deepcopy(folder.settings())
    for key, value in settings:
        override(raw, key, value)
        if key in LENGTH:
            override(raw, FROM, 0)
            override(raw, SHAPE, 0)
    after = check_kept(raw, f"{folder.path} with these settings")
    names = _different(before.model_dump(mode="json"), after.model_dump(mode="json"))
    if not set(names) - {FROM, SHAPE}:
        return before, []
    if set(names) & set(LENGTH):
        names = [name for name in names if name not in (FROM, SHAPE)]
    told = []
    for name in names:
        if name not in (*LENGTH, PARTS):
            raise ConfigError(
                f"{name}: a run keeps its settings (only {', '.join(LENGTH)} and {PARTS} change); "
                f"train a new run from its weights: cure train {folder.path / 'config.yaml'} "
                f"start={folder.path} {name}={_value(raw, name)}"
            )
    if PARTS in names:
        if after.training.accumulation_steps == "auto":
            raise ConfigError(f"{PARTS}: expected a number to go on with, got auto; say 2 or more")
        told.append(f"a batch is worked on in {after.training.parts} parts from here on")
    if set(names) & set(LENGTH):
        after = _longer(folder, before, after)
        rate = f"{after.training.schedule.name} from {after.training.optimizer.learning_rate:g}"
        told.append(
            f"goes on from epoch {before.training.epochs} to {after.training.epochs}: the schedule "
            f"of the learning rate ({rate}) starts again there, over the added epochs; schedules "
            "of the method and the attack stay at their end"
        )
    return after, told


def _longer(folder: RunFolder, before: RunConfig, after: RunConfig) -> RunConfig:
    """The run with its new number of epochs."""
    old, new = before.training, after.training
    if not folder.status().finished:
        raise ConfigError(
            f"training.epochs: the run is not finished, and its schedule is made for its "
            f"{old.epochs} epochs; finish it first with `{folder.resume_command()}`"
        )
    epochs = new.epochs
    if new.minutes != old.minutes and new.minutes is not None:
        seconds = [line.total_seconds for line in folder.timing()]
        # Epochs may have been added to a budget, which counts as used.
        spent = max(sum(seconds), 60 * (old.minutes or 0.0))
        each = sum(seconds) / max(1, len(seconds))
        added = int(MARGIN * (60 * new.minutes - spent) // each) if each else 0
        if added < 1:
            raise ConfigError(
                f"training.minutes: the run took {spent / 60:.1f} minutes and an epoch takes "
                f"{each / 60:.1f}; give at least {(spent + each / MARGIN) / 60:.1f} in all"
            )
        epochs = old.epochs + added
    if epochs <= old.epochs:
        raise ConfigError(
            f"training.epochs: the run has {old.epochs} epochs behind it, got {epochs}; say more, "
            "in all, or evaluate the weights of an earlier epoch (training.keep_every)"
        )
    training = new.model_copy(
        update={
            "epochs": epochs,
            "schedule_from": old.epochs,
            "schedule_length": old.schedule_epochs,
        }
    )
    return after.model_copy(update={"training": training})


def _different(one: Any, other: Any, place: str = "") -> list[str]:
    """Names of the settings that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = list(dict.fromkeys([*one, *other]))
        return [
            name
            for key in keys
            for name in _different(
                one.get(key), other.get(key), f"{place}.{key}" if place else str(key)
            )
        ]
    return [] if one == other else [place]


def _value(raw: dict[str, Any], name: str) -> Any:
    value: Any = raw
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
