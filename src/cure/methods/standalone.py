"""A method without a run folder: its settings and context from keyword arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cure.attacks import PGD, Threat
from cure.config import MethodConfig, TeacherConfig, checked
from cure.errors import ConfigError, unknown
from cure.methods.context import Context
from cure.models.checks import check_labels, check_range, checked_logits
from cure.recipe import explain
from cure.utils.engine import Engine
from cure.utils.modes import evaluating

GIVEN = "object:"
"""Path of a teacher that was passed as a network."""


def standalone(
    kind: str,
    section: type[MethodConfig],
    model: nn.Module,
    *,
    threat: Threat | None = None,
    attack: PGD | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    images: Iterable[Any] | None = None,
    learning_rate: float | Callable[[int], float] = 0.1,
    weight_decay: float = 0.0,
    **settings: Any,
) -> tuple[MethodConfig, Context]:
    """Settings and context of a method in a training loop of the user's.

    The arguments are explained in :class:`cure.methods.Method`.

    Args:
        kind: name of the method's class, for messages.
        section: the class of its settings.
        model: the network in training.
        threat: see there, like all that follow.
        attack: the training attack.
        steps: optimiser steps of the whole training.
        epochs: equal parts of the training at whose ends epochs end.
        seed: of every random draw.
        images: training images, or batches of images and labels.
        learning_rate: of the optimiser, at a step.
        weight_decay: of the optimiser.
        settings: teachers as networks, and the method's own settings.

    Raises:
        ConfigError: when a setting is unknown or does not fit, or a teacher is missing.
    """
    for value, wanted, what in (
        (model, nn.Module, "model as a torch.nn.Module"),
        (threat, Threat | None, "threat as a cure.Threat"),
        (attack, PGD | None, "attack as a cure.attacks.PGD"),
    ):
        if not isinstance(value, wanted):
            raise ConfigError(f"{kind}: expected {what}, got {value!r}")
    if any(is_lazy(weight) for weight in model.parameters()):
        raise ConfigError(
            f"{kind}: the model has layers whose size is not known yet; call it once on a batch of "
            "images first"
        )
    config, teachers = _settings(kind, section, settings)
    if attack is None:
        threat = threat or Threat()
        attack = PGD(threat, 10, threat.epsilon / 4, "gaussian", fold=True)
    elif threat is not None and threat != attack.threat:
        raise ConfigError(f"{kind}: threat and attack.threat differ; give the attack alone")
    steps, epochs = (
        checked(f"{kind}: {name}", value, int | None)
        for name, value in (("steps", steps), ("epochs", epochs))
    )
    if steps is not None and (steps < 1 or steps % (epochs or 1)):
        raise ConfigError(
            f"{kind}: expected steps as a positive multiple of the {epochs or 1} epochs, "
            f"got {steps}; say steps=len(loader) * epochs"
        )
    if steps is None and (epochs is not None or config.needs_length()):
        raise ConfigError(
            f"{kind}: its schedule depends on the length of the training; "
            "say steps=len(loader) * epochs"
        )
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    rate = learning_rate if callable(learning_rate) else _constant(float(learning_rate))
    return config, Context(
        engine=Engine(device),
        attack=attack,
        seed=seed,
        # Without epochs every step may change a schedule.
        steps_per_epoch=1 if epochs is None else (steps or 1) // epochs,
        epochs=(steps or 1) if epochs is None else epochs,
        teachers=teachers,
        learning_rate=rate,
        weight_decay=weight_decay,
        natural_images=lambda: _images(images, device),
        has_epochs=epochs is not None,
    )


def settings_of(kind: str, section: type[Any], settings: Mapping[str, Any]) -> Any:
    """A section of settings from keyword arguments.

    Raises:
        ConfigError: when a setting is unknown or does not fit.
    """
    for name in settings:
        if name not in section.model_fields:
            known = [field for field in section.model_fields if field != "name"]
            raise ConfigError(f"{kind}: " + unknown("setting", name, known))
    try:
        return section(**settings)
    except ValidationError as error:
        raise ConfigError(f"{kind}: {explain(error.errors()[0], section)}") from None


def _settings(
    kind: str, section: type[MethodConfig], settings: dict[str, Any]
) -> tuple[MethodConfig, dict[str, nn.Module]]:
    """The section of settings, and the teachers that it asks for."""
    roles = [
        name for name, field in section.model_fields.items() if field.annotation is TeacherConfig
    ]
    given = {role: settings.pop(role) for role in roles if role in settings}
    for role, network in given.items():
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"{kind}: expected {role} as a trained network (torch.nn.Module), got "
                f"{type(network).__name__}; for a run say cure.Run(path).model()"
            )
    place = TeacherConfig(path=GIVEN)
    config = settings_of(kind, section, settings | dict.fromkeys(roles, place))
    asked = config.teachers()
    for role in asked:
        if role not in given:
            raise ConfigError(f"{kind}: needs {role}=, a trained network (torch.nn.Module)")
    for role in given:
        if role not in asked:
            raise ConfigError(f"{kind}: does not use {role} with these settings; leave it out")
    return config, {role: copy.deepcopy(given[role]) for role in asked}


def _constant(rate: float) -> Callable[[int], float]:
    return lambda step: rate  # noqa: ARG005


def _images(batches: Iterable[Any] | None, device: torch.device) -> Iterator[Tensor]:
    """The images of batches, which may hold labels as well."""
    if batches is None:
        raise ConfigError(
            "this method looks at training images beforehand; say images=loader (batches of "
            "images, or of images and labels)"
        )
    for batch in batches:
        image = batch[0] if isinstance(batch, tuple | list) else batch
        yield image.to(device)


def check_batch(
    model: nn.Module, images: Tensor, labels: Tensor, teachers: Mapping[str, nn.Module]
) -> None:
    """Refuse a first batch that a method would misread, or fail on without saying why.

    Args:
        model: the network in training.
        images: should be [B, C, H, W] in [0, 1], on the device and of the type of the weights.
        labels: should be classes [B] int64, or probabilities [B, K].
        teachers: by the names of their settings; should take the images and know the classes.

    Raises:
        ConfigError: for images, labels or teachers.
        ModelError: when a network fails or returns no logits.
    """
    weight = next(model.parameters())
    kind = weight.dtype.to_real()
    for name, given in (("images", images), ("labels", labels)):
        if not isinstance(given, Tensor) or not len(given) or given.device != weight.device:
            came = f"{len(given)} on {given.device}" if isinstance(given, Tensor) else type(given)
            raise ConfigError(
                f"expected {name} as a tensor of one or more on {weight.device}, where the network "
                f"is, got {came}"
            )
    check_range(images)
    if images.dtype != kind and not torch.is_autocast_enabled(weight.device.type):
        raise ConfigError(
            f"expected images of the type of the weights, {kind}, got {images.dtype}; "
            f"convert them with .to({kind})"
        )
    with evaluating(model):
        count = checked_logits(model, images[:2]).shape[1]
    for role, teacher in teachers.items():
        with evaluating(teacher):
            theirs = checked_logits(teacher, images[:2]).shape[1]
        if theirs != count:
            raise ConfigError(f"expected a {role} with {count} logits as the model, got {theirs}")
    check_labels(labels, len(images), count)
