"""The batches of an epoch and one step of the optimiser: for training, and to time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from cure.config import RunConfig
from cure.data import Batch, ImageSet, epoch
from cure.methods import Method
from cure.methods.step import Step
from cure.utils.engine import Engine, Grads


def training_batches(
    config: RunConfig,
    images: ImageSet,
    extra: ImageSet | None,
    engine: Engine,
    number: int,
    start: int = 0,
) -> Iterator[Batch]:
    """This rank's batches of an epoch.

    Args:
        config: of the run.
        images: training images, on the engine's device.
        extra: extra images on that device.
        engine: gives the rank.
        number: of the epoch, from 0.
        start: batches that are left out at its beginning.
    """
    return epoch(
        images,
        batch_size=config.training.batch_size,
        epoch=number,
        seed=config.seed,
        augment=config.data.augment,
        sampler=config.data.sampler,
        class_weights=config.training.class_weights,
        start=start,
        rank=engine.rank,
        world=engine.world,
        extra=extra,
        extra_share=config.data.extra_share,
    )


def optimizer_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    config: RunConfig,
    look: Callable[[Step, Grads], None] | None = None,
) -> Step:
    """Gradients of the method, clipping, and the optimiser's step without frozen weights.

    Args:
        method: what makes the gradients.
        optimizer: of its weights.
        parameters: these weights by name.
        batch: images in the layout of the engine.
        config: of the run.
        look: is called with the step and its gradients before they are clipped.
    """
    step = method.take_step(batch, config.training.parts)
    gradients = step.gradients()
    if look is not None:
        look(step, gradients)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    if config.training.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters.values(), config.training.clip_norm)
    with method.freeze(optimizer):
        optimizer.step()
    return step


def arranged(batch: Batch, engine: Engine) -> Batch:
    """The batch in the memory layout of the engine."""
    return replace(batch, image=engine.arrange(batch.image))
