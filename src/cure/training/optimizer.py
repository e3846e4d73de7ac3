"""The optimiser of a run: its parameter groups, and weights that a step must not move."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cure.config import OptimizerConfig
from cure.models.blocks import CLASSIFIER, blocks, classifier_weights
from cure.models.wrapper import core


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """SGD or AdamW over groups that share a rate and a weight decay.

    Each group has ``rate_factor``, what the schedule's learning rate is multiplied with.

    Args:
        config: rates, decay and which groups they differ in.
        model: the network that is trained, for its parts.
        parameters: what learns, by name; names that the network does not have (of a second network
            of the method) get the plain rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    factors = rate_factors(config, model)
    for name, parameter in parameters.items():
        decay = config.weight_decay if config.decay_norms or parameter.dim() > 1 else 0.0
        groups.setdefault((factors.get(name, 1.0), decay), []).append(parameter)
    described = [
        {"params": members, "rate_factor": factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(described, lr=config.learning_rate, betas=(config.momentum, 0.999))
    return torch.optim.SGD(
        described,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


def rate_factors(config: OptimizerConfig, model: nn.Module) -> dict[str, float]:
    """Factor on the learning rate by parameter name, where it is not 1.

    The classifier has ``head_rate``, also for weights that it shares with other layers; each part
    before it has ``layer_decay`` times the factor of the part that follows, the last block having
    ``layer_decay``.
    """
    if config.head_rate == 1 and config.layer_decay == 1:
        return {}
    parts = blocks(model)
    prefix = _prefix(model)
    before = [part for part in parts if part != CLASSIFIER]
    factors: dict[str, float] = {}
    for distance, part in enumerate(reversed(before), 1):
        factors |= dict.fromkeys(parts[part], config.layer_decay**distance)
    heads = [*parts.get(CLASSIFIER, []), *classifier_weights(model)]
    factors |= dict.fromkeys(heads, config.head_rate)
    return {prefix + name: factor for name, factor in factors.items()}


def _prefix(model: nn.Module) -> str:
    """What names inside wrappers lack to be names of the whole network."""
    inner = core(model)
    return next(f"{name}." if name else "" for name, m in model.named_modules() if m is inner)
