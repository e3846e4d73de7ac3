"""The head of a network, the layer that makes its logits: found, drawn anew, made wider."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cure.errors import CureNote, ModelError, some
from cure.models.logit_layers import same_weights, width_of
from cure.models.trial import adapt, traits_of
from cure.models.wrapper import core
from cure.utils.launcher import launched
from cure.utils.modes import evaluating
from cure.utils.random import derive, seeded


def find_head(model: nn.Module, classes: int | None = None, name: str | None = None) -> str:
    """The name of the last linear layer or 1x1 convolution that is as wide as the logits.

    Args:
        model: the network inside its wrappers.
        classes: number of logits; None takes the last such layer of any width.
        name: the layer, where it was named.

    Raises:
        ModelError: when there is no such layer.

    >>> find_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 3)
    '2'
    """
    layers = {
        path: width_of(module)
        for path, module in model.named_modules()
        if width_of(module) is not None
    }
    if name is not None:
        if name in layers:
            return name
        raise ModelError(
            f"new_head: '{name}' is no linear layer or 1x1 convolution of the network; it has "
            f"{', '.join(list(layers)[-5:])}"
        )
    fitting = [path for path, width in layers.items() if classes is None or width == classes]
    if not fitting:
        raise ModelError(_no_layer(classes))
    return str(fitting[-1])


def head_name(model: nn.Module, new_head: bool | str) -> str:
    """The layer of the logits inside ``core(model)``, or the one that ``new_head`` names.

    The trial of the network (:func:`~cure.models.trial.adapt`) saw which layer makes the logits;
    where it could not, it is that of :func:`find_head`.

    Args:
        model: a network.
        new_head: True, or the name of the layer.

    Raises:
        ModelError: when there is no such layer, or several make the logits together.
    """
    traits, network = traits_of(model), core(model)
    width = traits.shape[1] if len(traits.shape) == 2 else None
    if isinstance(new_head, str) or traits.heads is None:
        return find_head(network, width, new_head if isinstance(new_head, str) else None)
    if not traits.heads:
        raise ModelError(_no_layer(width))
    name = traits.heads[0]
    together = [*traits.heads, *same_weights(network, name)]
    if len(together) > 1:
        raise ModelError(
            f"new_head: expected one layer that makes the logits, got {some(together)}, which "
            "make them together or share weights; name the one to draw anew: new_head=NAME"
        )
    return name


def draw_head(model: nn.Module, name: str, seed: int, classes: int | None = None) -> None:
    """Draw the weights of a layer anew, as PyTorch initialises it.

    Weight and spectral normalisation stay; another parametrisation, and a class of its own where
    the width changes, are given up, which a :class:`~cure.errors.CureNote` tells.

    Args:
        model: the network inside its wrappers.
        name: of the layer.
        seed: of the run.
        classes: outputs of the new layer; None keeps its width.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    width = width_of(layer) if classes is None else classes
    assert width is not None
    with seeded(derive(seed, "new head")):
        if width == width_of(layer) and not _computed(layer):
            layer.reset_parameters()
            return
        drawn, lost = _anew(layer, width)
    if lost and launched().rank == 0:
        warnings.warn(
            f"the new last layer '{name}' is a plain {type(drawn).__name__}, without what the old "
            f"one had: {', '.join(lost)}",
            CureNote,
            stacklevel=2,
        )
    # It may have several names.
    for module in model.modules():
        for key, child in module._modules.items():
            if child is layer:
                module._modules[key] = drawn


@torch.no_grad()
def order_head(model: nn.Module, places: Sequence[int], image: Tensor) -> None:
    """Put the outputs of the layer that makes the logits into another order.

    Args:
        model: its layer is changed in place.
        places: which output each logit is to be.
        image: some images [B, C, H, W], on which the logits are compared with those before.

    Raises:
        ModelError: when no layer is found, or its outputs are not the logits.
    """
    layer, order = core(model).get_submodule(head_name(model, True)), list(places)
    with evaluating(model):
        expected = model(image)[:, order]
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.dim() and len(tensor) == len(order):
                tensor.copy_(tensor[order])
        came = model(image)
    if not torch.allclose(came, expected, rtol=1e-4, atol=1e-5):
        raise ModelError("the outputs of its last layer are not the logits")


def renew_head(
    model: nn.Module,
    classes: int,
    channels: int,
    size: tuple[int, int],
    *,
    new_head: bool | str,
    seed: int,
    title: str = "the network",
) -> None:
    """Give a network a new head with one output a class; all other layers keep their weights.

    Args:
        model: changed in place; see :func:`~cure.models.trial.adapt`.
        classes: outputs of the new layer.
        channels: channels of the images.
        size: height and width of the images in pixels.
        new_head: True takes the layer that makes the logits, a name that layer.
        seed: of the run.
        title: how messages call the network.

    Raises:
        ModelError: when there is no such layer, or the network fails on such images.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CureNote)  # said when the network with its head is adapted
        tried = adapt(model, classes, channels, size, title=title)
    name = head_name(tried, new_head)
    if not name:
        raise ModelError(f"new_head: {title} is a single layer and has no other weights to keep")
    draw_head(core(model), name, seed, classes)


def _computed(layer: nn.Module) -> bool:
    """Whether its weight is computed from other tensors."""
    return layer._parameters.get("weight") is None


def _anew(layer: nn.Linear | nn.Conv2d, classes: int) -> tuple[nn.Module, list[str]]:
    """A layer of the same kind and device with so many outputs, and what it lacks of the old."""
    bias, device = layer.bias is not None, next(layer.parameters()).device
    plain: nn.Module
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, classes, bias, device)
    else:
        plain = nn.Conv2d(layer.in_channels, classes, 1, bias=bias, device=device)
    own = parametrize.type_before_parametrizations(layer)
    lost = [] if own is type(plain) else [own.__name__]
    parts = [part for each in getattr(layer, "parametrizations", {}).values() for part in each]
    for part in [*parts, *layer._forward_pre_hooks.values()]:
        kind = type(part).__name__
        if kind == "_WeightNorm":
            parametrizations.weight_norm(plain, dim=part.dim)
        elif kind == "_SpectralNorm":
            parametrizations.spectral_norm(plain, "weight", part.n_power_iterations, part.eps)
        elif isinstance(part, WeightNorm):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                nn.utils.weight_norm(plain, part.name, part.dim)
        elif isinstance(part, SpectralNorm):
            nn.utils.spectral_norm(plain, part.name, part.n_power_iterations, part.eps)
        elif part in parts:
            lost.append(kind)
    return plain, lost


def _no_layer(classes: int | None) -> str:
    return (
        f"new_head: found no linear layer or 1x1 convolution with {classes} outputs that makes the "
        "logits; name the layer: new_head=NAME"
    )
