"""The optimiser of a run: its parameter groups, and weights that a step must not move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cure.config import OptimizerConfig
from cure.models.blocks import CLASSIFIER, blocks
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

    The classifier has ``head_rate``; each part before it has ``layer_decay`` times the factor of
    the part that follows, the last block having ``layer_decay``.
    """
    if config.head_rate == 1 and config.layer_decay == 1:
        return {}
    parts = blocks(model)
    prefix = _prefix(model)
    before = [part for part in parts if part != CLASSIFIER]
    factors = dict.fromkeys(parts.get(CLASSIFIER, []), config.head_rate)
    for distance, part in enumerate(reversed(before), 1):
        factors |= dict.fromkeys(parts[part], config.layer_decay**distance)
    return {prefix + name: factor for name, factor in factors.items()}


def _prefix(model: nn.Module) -> str:
    """What names inside wrappers lack to be names of the whole network."""
    inner = core(model)
    return next(f"{name}." if name else "" for name, m in model.named_modules() if m is inner)


@contextmanager
def holding(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    frozen: dict[str, Tensor],
) -> Iterator[None]:
    """Undo what an optimiser step does to frozen weights and to their momentum.

    A zero gradient alone does not hold a weight still: momentum and weight decay move it.

    Args:
        optimizer: the optimiser that steps inside.
        parameters: by name.
        frozen: by name, True where nothing may change.
    """
    before = {
        name: (parameters[name].detach().clone(), _moments(optimizer, parameters[name], clone=True))
        for name in frozen
    }
    yield
    with torch.no_grad():
        for name, (weight, moments) in before.items():
            parameter, mask = parameters[name], frozen[name]
            parameter.copy_(torch.where(mask, weight, parameter))
            for key, moment in _moments(optimizer, parameter).items():
                old = moments.get(key, torch.zeros_like(moment))
                moment.copy_(torch.where(mask, old, moment))


def _moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, clone: bool = False
) -> dict[str, Tensor]:
    """The optimiser's tensors of the shape of the weights: momentum and its like."""
    return {
        key: value.clone() if clone else value
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }
