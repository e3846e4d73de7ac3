"""From the ``model`` section of a recipe to a network."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from cure.config import OBJECT, ModelConfig, RunConfig
from cure.data.images import ImageKind
from cure.errors import ConfigError, CureNote, unknown
from cure.models.checks import check_network
from cure.models.classes import in_order, own_classes, rename_classes
from cure.models.external import build_external, check_shape, is_external
from cure.models.head import renew_head
from cure.models.registry import MODELS, Builder
from cure.models.trial import adapt, copy_network
from cure.models.wrapper import Normalised, core
from cure.utils.random import derive, seeded

_NAME = "_cure_name"


def build_model(
    config: ModelConfig,
    *,
    classes: int,
    channels: int,
    size: tuple[int, int],
    seed: int,
    names: Sequence[str] | None = None,
    new_head: bool | str = False,
) -> nn.Module:
    """The network that ``config`` names, on the processor.

    Its random initialisation depends on ``seed`` alone; PyTorch's global generators are left as
    they were.

    Args:
        config: name, options, and the constants for standardising images.
        classes: number of logits.
        channels: channels of the images.
        size: height and width of the images in pixels.
        seed: the run's seed.
        names: of the classes; a network that comes with names of its own (``hf:``) is matched with
            them, and returns the logits of these classes in this order.
        new_head: give it a new last layer (:func:`~cure.models.head.renew_head`).

    Returns:
        A network that takes images [B, channels, H, W] in [0, 1] and returns logits [B, classes].

    Raises:
        ConfigError: when the name or an option is unknown, an option's value does not fit, or
            ``mean`` has not one number a channel.
        ModelError: when a network from elsewhere cannot be had or is no such classifier.
    """
    if config.mean is not None and len(config.mean) != channels:
        raise ConfigError(
            f"expected model.mean and model.std with {channels} numbers, one for each channel of "
            f"the images, got {len(config.mean)}"
        )
    with seeded(derive(seed, "model")):
        if is_external(config.name):
            model = unwrapped(
                build_external(
                    config,
                    classes=classes,
                    channels=channels,
                    size=size,
                    names=names,
                    new_head=bool(new_head),
                )
            )
        else:
            builder = MODELS[config.name]
            options = _checked(config.name, builder, config.options)
            model = builder(classes, channels, size, **options)
            if config.mean is not None and isinstance(model, Normalised):
                model = model.network  # The constants that were given replace its own.
        if config.mean is not None and config.std is not None:
            model = Normalised(model, config.mean, config.std)
        title = f"model {config.name}"
        if new_head:
            renew_head(model, classes, channels, size, new_head=new_head, seed=seed, title=title)
            rename_classes(model, names)
        model = adapt(model, classes, channels, size, title=title)
    if is_external(config.name):
        check_shape(model, config.name, classes)
    setattr(model, _NAME, config.name)
    return model


def describe(model: nn.Module) -> dict[str, Any]:
    """What a report says of a network.

    Returns:
        ``name`` (as in the recipe, else the class's name) and ``parameters`` (how many numbers
        are trained or frozen; buffers such as running means are not counted).
    """
    return {
        "name": getattr(model, _NAME, type(core(model)).__name__),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _checked(name: str, builder: Builder, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` checked against the keyword-only parameters of a registered builder."""
    parameters = inspect.signature(builder).parameters.values()
    known = [item.name for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY]
    hints = get_type_hints(builder, include_extras=True)
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in known:
            raise ConfigError(unknown(f"option of model {name}", option, known))
        adapter: TypeAdapter[Any] = TypeAdapter(hints[option], config=ConfigDict(strict=True))
        try:
            values[option] = adapter.validate_python(value)
        except ValidationError as error:
            text = error.errors()[0]["msg"]
            raise ConfigError(
                f"option '{option}' of model {name} does not fit: {text[0].lower()}{text[1:]}, "
                f"got {value!r}"
            ) from None
    return values


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile`` and ``DataParallel``, which a note tells."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            note = (
                "the network is taken without its torch.compile; training.compile=true compiles "
                "the passes of the attack"
            )
            model = compiled
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            note = (
                f"the network is taken without its {type(model).__name__}; torchrun trains on "
                "several GPUs"
            )
            model = model.module
        else:
            return model
        warnings.warn(note, CureNote, stacklevel=3)


def adapted_copy(
    model: nn.Module,
    classes: int,
    channels: int,
    size: tuple[int, int],
    config: ModelConfig,
    seed: int = 0,
    new_head: bool | str = False,
    names: Sequence[str] | None = None,
) -> nn.Module:
    """A copy of a network that was given as a Python object, adapted after one trial pass.

    Args:
        model: is not changed.
        classes: number of logits.
        channels: channels of the images.
        size: height and width of the images in pixels.
        config: for its constants for standardising.
        seed: of the weights of lazy layers, and of a new head.
        new_head: give it a new last layer (:func:`~cure.models.head.renew_head`).
        names: of the classes; a network with names of its own is matched with them.

    Raises:
        ModelError: when it cannot be copied, does not take such images or has other classes.
    """
    check_network(model)
    model = unwrapped(model)
    network = copy_network(model)
    if config.mean is not None and config.std is not None:
        if len(config.mean) != channels:
            raise ConfigError(
                f"expected mean and std with {channels} numbers, one a channel, "
                f"got {len(config.mean)}"
            )
        network = Normalised(network, config.mean, config.std)
    with seeded(derive(seed, "model")):
        if new_head:
            renew_head(network, classes, channels, size, new_head=new_head, seed=seed)
            rename_classes(network, names)
        # A wrapper has no names, so they are read from what was given.
        known = own_classes(network if new_head else model)
        network = adapt(network, classes, channels, size)
    return network if names is None else in_order(network, names, known)


def network_of(config: RunConfig, kind: ImageKind, model: nn.Module | None) -> nn.Module:
    """The network of a run, not yet with the run's weights.

    Args:
        config: the run.
        kind: the images it is trained on.
        model: the network, when the run was given one as a Python object; it is copied.
    """
    if config.model.name.startswith(OBJECT):
        if model is None:
            raise ConfigError(
                f"the run was given its network ({config.model.name}) in Python; pass it again: "
                "cure.resume(path, model=...), cure.Run(path, model).model() or "
                "cure.evaluate(cure.Run(path, model))"
            )
        return adapted_copy(
            model,
            len(kind.classes),
            kind.channels,
            kind.size,
            config.model,
            config.seed,
            config.draws_head,
            kind.classes,
        )
    return build_model(
        config.model,
        classes=len(kind.classes),
        channels=kind.channels,
        size=kind.size,
        seed=config.seed,
        names=kind.classes,
        new_head=config.draws_head,
    )
