"""The head of a network, the layer that makes its logits: found, drawn anew, made wider."""

from __future__ import annotations

import warnings

from torch import nn

from cure.errors import CureNote, ModelError
from cure.models.trial import adapt, traits_of
from cure.models.wrapper import core
from cure.utils.random import derive, seeded


def find_head(model: nn.Module, classes: int | None = None, name: str | None = None) -> str:
    """The name of the layer that makes the logits: the last linear one or 1x1 convolution.

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
        path: _width(module) for path, module in model.named_modules() if _width(module) is not None
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
        raise ModelError(
            f"new_head: found no linear layer or 1x1 convolution with {classes} outputs; name the "
            "layer: new_head=NAME"
        )
    return str(fitting[-1])


def head_name(model: nn.Module, new_head: bool | str) -> str:
    """The layer of the logits inside ``core(model)``, or the one that ``new_head`` names."""
    shape = traits_of(model).shape
    name = new_head if isinstance(new_head, str) else None
    return find_head(core(model), shape[1] if len(shape) == 2 else None, name)


def draw_head(model: nn.Module, name: str, seed: int) -> None:
    """Draw the weights of a layer anew, as PyTorch initialises it.

    Args:
        model: the network inside its wrappers.
        name: of the layer.
        seed: of the run.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    with seeded(derive(seed, "new head")):
        layer.reset_parameters()


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
    network = core(model)
    parent, _, attribute = name.rpartition(".")
    if not attribute:
        raise ModelError(f"new_head: {title} is a single layer and has no other weights to keep")
    layer = network.get_submodule(name)
    if _width(layer) != classes:
        setattr(network.get_submodule(parent), attribute, _widened(layer, classes))
    draw_head(network, name, seed)


def _widened(layer: nn.Module, classes: int) -> nn.Module:
    """A layer of the same kind and device with another number of outputs."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    bias, device = layer.bias is not None, layer.weight.device
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, classes, bias, device)
    return nn.Conv2d(layer.in_channels, classes, 1, bias=bias, device=device)


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
        return module.out_channels
    return None
