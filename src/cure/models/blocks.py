"""The parts of a network, from input to output: stem, blocks B1 to B4, classifier.

For a ResNet these are its first convolution, its stages ``layer1`` to ``layer4`` and its linear
layer.  In other networks they are found in the module tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cure.errors import ConfigError, ModelError, unknown
from cure.models.batch_norm import freeze_statistics
from cure.models.head import head_name
from cure.models.trial import traits_of
from cure.models.wrapper import core

STEM, CLASSIFIER = "stem", "classifier"

MOST_BLOCKS = 4

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def blocks(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of each part, in the order of the network.

    The blocks are the containers (``Sequential``, ``ModuleList``) that lie beside each other
    nearest to the root; inside a single one, its children; where there is none, the layers with
    matrices.  More than four are joined to four neighbourhoods of equal number.  What comes before
    belongs to the stem, the last linear layer (or 1x1 convolution of the logits) is the classifier,
    what stands between the two and
    no block (a last norm) belongs to the block before it.  "Before" is the order in which modules
    were made; a network for which this is not the order of its layers says its parts itself, in an
    attribute ``parts``: modules by part.

    Args:
        model: any network; wrappers are looked through, and names are those inside.

    Returns:
        "stem" (where it has parameters), "B1" to at most "B4", "classifier".
    """
    network = core(model)
    declared: Mapping[str, Sequence[str]] | None = getattr(network, "parts", None)
    if declared is not None:
        return {
            part: [key for name in inside for key in _below(name, network.get_submodule(name))]
            for part, inside in declared.items()
        }
    order = [name for name, _ in network.named_parameters()]
    last = _classifier(model)
    heads = _units(network, last)
    count = min(len(heads), MOST_BLOCKS)
    owner: dict[str, str] = {}
    for number, unit in enumerate(heads):
        for name in unit:
            owner[name] = f"B{number * count // len(heads) + 1}"
    parts: dict[str, list[str]] = {}
    current = STEM
    for name in order:
        if last is not None and name.startswith(f"{last}."):
            parts.setdefault(CLASSIFIER, []).append(name)
            continue
        current = owner.get(name, current)
        parts.setdefault(current, []).append(name)
    known = [STEM, *(f"B{number + 1}" for number in range(count)), CLASSIFIER]
    return {part: parts[part] for part in known if part in parts}


def _classifier(model: nn.Module) -> str | None:
    """Name of the layer that makes the logits; where the trial of the network did not tell, of the
    last linear layer, or the 1x1 convolution of the logits."""
    network, heads = core(model), traits_of(model).heads
    if heads is not None and len(heads) == 1:
        return heads[0]
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if found:
        return str(found[-1])
    try:
        return head_name(model, True)
    except ModelError:
        return None


def _units(network: nn.Module, last: str | None) -> list[list[str]]:
    """Names of the parameters of what a block is made of, in order."""
    level = [(name, child) for name, child in network.named_children()]
    while level:
        stages: list[tuple[str, nn.Module]] = [
            (name, module)
            for name, module in level
            if isinstance(module, _CONTAINERS) and _has_matrix(module) and not _holds(name, last)
        ]
        if len(stages) == 1:
            name, module = stages[0]
            stages = [(f"{name}.{key}", child) for key, child in module.named_children()]
            stages = [(key, child) for key, child in stages if _has_matrix(child)]
            if len(stages) == 1:
                level = stages
                continue
        if stages:
            return [_below(name, module) for name, module in stages]
        level = [
            (f"{name}.{key}", child)
            for name, module in level
            for key, child in module.named_children()
        ]
    return [
        [f"{name}.{key}" for key, _ in module.named_parameters()]
        for name, module in network.named_modules()
        if name not in ("", last) and not list(module.children()) and _has_matrix(module)
    ]


def _holds(name: str, inner: str | None) -> bool:
    return inner is not None and (inner == name or inner.startswith(f"{name}."))


def _below(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{key}" for key, _ in module.named_parameters()]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def chosen(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of the parameters that ``names`` mean: blocks, or modules of the network.

    Args:
        model: any network.
        names: "B1", "classifier", or a module's name, "layer3.0.conv1".

    Raises:
        ConfigError: when a name means nothing, or holds no parameter.
    """
    parts, network = blocks(model), core(model)
    modules = dict(network.named_modules())
    found: set[str] = set()
    for name in names:
        if name in parts:
            found |= set(parts[name])
            if name == CLASSIFIER:
                found |= set(classifier_weights(model))  # shared weights belong to a block, too
            continue
        if name not in modules or not name:
            raise ConfigError(
                f"layers.update: {unknown('part', name, parts)}; modules of the network by their "
                "name are parts, too"
            )
        inside = _below(name, modules[name])
        if not inside:
            raise ConfigError(f"layers.update: the module {name} has no weights")
        found |= set(inside)
    return _once(network, found)


def classifier_weights(model: nn.Module) -> list[str]:
    """Names of the parameters of the layer that makes the logits; also of those that it shares.

    Args:
        model: any network; names are those inside its wrappers.
    """
    network, last = core(model), _classifier(model)
    return [] if last is None else _once(network, _below(last, network.get_submodule(last)))


def _once(network: nn.Module, names: Iterable[str]) -> list[str]:
    """The first name of each of these parameters: those that layers share have several."""
    every = dict(network.named_parameters(remove_duplicate=False))
    wanted = {id(every[name]) for name in names}
    return [name for name, weight in network.named_parameters() if id(weight) in wanted]


def learn_only(model: nn.Module, names: Sequence[str], *, statistics: bool) -> None:
    """Let only the parameters ``names`` learn.

    Args:
        model: the network, changed in place.
        names: see :func:`chosen`.
        statistics: whether BatchNorm in frozen parts goes on normalising by its batch and
            updating its running statistics; else it stays in evaluation mode, whatever mode the
            network is put in.
    """
    network, kept = core(model), set(names)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in kept)
    if statistics:
        return
    freeze_statistics(
        network,
        lambda name, norm: norm.affine and not any(key in kept for key in _below(name, norm)),
    )


def reinitialise(
    model: nn.Module, names: Sequence[str], generator: torch.Generator, *, norms: bool = False
) -> None:
    """Draw the parameters ``names`` anew.

    Convolutions: Kaiming uniform by the number of outputs, for ReLU; linear layers: N(0, 0.01^2),
    bias 0; norms: weight 1 and bias 0, where ``norms`` asks for it; BatchNorm's running statistics
    stay.  Attention's projections are drawn like linear layers, and parameters of a module that is
    none of these from N(0, 0.02^2).

    Args:
        model: the network, changed in place.
        names: see :func:`chosen`.
        generator: draws, on the processor.
        norms: also the weights and biases of norms.

    Source: released code of CURE (``ReInit``); the last sentence is ours.
    """
    network, wanted = core(model), set(names)
    for prefix, module in network.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if (f"{prefix}.{key}" if prefix else key) in wanted:
                _draw(module, key, parameter, generator, norms)


@torch.no_grad()
def _draw(
    module: nn.Module, key: str, parameter: nn.Parameter, generator: torch.Generator, norms: bool
) -> None:
    fresh = torch.empty_like(parameter, device="cpu", memory_format=torch.contiguous_format)
    if isinstance(module, _NORMS):
        if not norms:
            return
        fresh.fill_(1.0 if key == "weight" else 0.0)
    elif parameter.dim() < 2 and "bias" in key:
        fresh.zero_()
    elif isinstance(module, _CONVOLUTIONS):
        nn.init.kaiming_uniform_(fresh, mode="fan_out", nonlinearity="relu", generator=generator)
    else:
        spread = 0.01 if isinstance(module, nn.Linear | nn.MultiheadAttention) else 0.02
        fresh.normal_(0.0, spread, generator=generator)
    parameter.copy_(fresh)
