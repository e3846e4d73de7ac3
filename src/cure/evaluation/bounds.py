"""Accuracy that is proved within the Linf ball, by interval bounds.

Every value of the network is enclosed between a lower and an upper bound, layer by layer.  The
bounds are loose: networks that were not trained for them are proved robust in tiny balls alone.

Source: Gowal et al., "On the effectiveness of interval bound propagation for training verifiably
robust models", 2018.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cure.attacks import Threat
from cure.data import ImageSet, batches
from cure.errors import ConfigError, ModelError
from cure.evaluation.metrics import Result, accuracy_of
from cure.evaluation.runner import Progress, no_progress
from cure.models.failure import reason_of
from cure.utils.engine import Engine
from cure.utils.modes import in_evaluation


@dataclass(frozen=True)
class Interval:
    """All tensors between two."""

    lower: Tensor
    upper: Tensor

    def each(self, function: Callable[..., Any], *args: Any, **options: Any) -> Interval:
        """A function that does not fall, of both ends."""
        return Interval(
            function(self.lower, *args, **options), function(self.upper, *args, **options)
        )

    def affine(
        self, layer: Callable[[Tensor], Tensor], size: Callable[[Tensor], Tensor]
    ) -> Interval:
        """An affine layer: of the middle, and of the distance with the sizes of the weights."""
        middle, distance = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        middle, distance = layer(middle), size(distance)
        return Interval(middle - distance, middle + distance)


_RISING_LAYERS = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Flatten),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Dropout, nn.Dropout2d, nn.ZeroPad2d),
)
_RISING_FUNCTIONS = (
    *(F.relu, torch.relu, F.relu6, torch.sigmoid, torch.tanh, torch.flatten, torch.mean),
    *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, torch.reshape, torch.squeeze, F.pad),
    operator.getitem,
)
_RISING_METHODS = (
    *("relu", "relu_", "sigmoid", "tanh", "flatten", "mean", "view", "reshape", "squeeze"),
    *("contiguous", "permute", "transpose", "clone"),
)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, _BatchNorm) and m.__module__.startswith("cure.")
        return ours or super().is_leaf_module(m, module_qualified_name)


class _Bounds(fx.Interpreter):
    """Runs a traced network on an interval."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if not isinstance(args[0], Interval):
            return super().call_module(target, args, kwargs)
        value: Interval = args[0]
        if isinstance(layer, nn.Linear):
            return value.affine(layer, lambda d: F.linear(d, layer.weight.abs()))
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
            how: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return value.affine(layer, lambda d: F.conv2d(d, layer.weight.abs(), None, *how))
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            return value.affine(layer, lambda d: (layer(d) - layer(torch.zeros_like(d))).abs())
        if isinstance(layer, nn.LeakyReLU) and layer.negative_slope >= 0:
            return value.each(layer)
        if isinstance(layer, _RISING_LAYERS):
            return value.each(layer)
        raise _unknown(type(layer).__name__)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = args[0] if args and isinstance(args[0], list | tuple) else args
        if not any(isinstance(part, Interval) for part in parts):
            return super().call_function(target, args, kwargs)
        if target is torch.cat:
            ends = [[getattr(part, end) for part in parts] for end in ("lower", "upper")]
            return Interval(*(torch.cat(one, *args[1:], **kwargs) for one in ends))
        if target is getattr and args[1] == "shape":
            return args[0].lower.shape
        if target in (operator.add, torch.add) and not kwargs:
            first, second = map(_ends, args)
            return Interval(first.lower + second.lower, first.upper + second.upper)
        if target in (operator.sub, torch.sub) and not kwargs:
            first, second = map(_ends, args)
            return Interval(first.lower - second.upper, first.upper - second.lower)
        if target in (operator.mul, operator.truediv, torch.mul, torch.div) and not kwargs:
            value, factor = args
            if target in (operator.mul, torch.mul) and not isinstance(value, Interval):
                value, factor = factor, value
            if isinstance(value, Interval) and not isinstance(factor, Interval):
                low, high = target(value.lower, factor), target(value.upper, factor)
                return Interval(torch.minimum(low, high), torch.maximum(low, high))
        if target in _RISING_FUNCTIONS and isinstance(args[0], Interval):
            return args[0].each(target, *args[1:], **kwargs)
        raise _unknown(getattr(target, "__name__", str(target)))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, *rest = args
        if not isinstance(value, Interval):
            return super().call_method(target, args, kwargs)
        if target in ("size", "dim"):
            return getattr(value.lower, target)(*rest, **kwargs)
        if target in ("add", "add_") and not kwargs:
            found = self.call_function(torch.add, args, {})
            if target == "add":
                return found
            # Other names of the same tensor change with it.
            value.lower.copy_(found.lower)
            value.upper.copy_(found.upper)
            return value
        if target in _RISING_METHODS:
            return value.each(getattr(Tensor, target), *rest, **kwargs)
        raise _unknown(target)


def _ends(value: Any) -> Interval:
    return value if isinstance(value, Interval) else Interval(value, value)


def _unknown(name: str) -> ModelError:
    return ModelError(
        f"interval bounds know linear and convolutional layers, BatchNorm, rising activations, "
        f"pooling, additions and concatenations, got {name}; leave the bounds out"
    )


def logit_bounds(model: nn.Module, image: Tensor, epsilon: float) -> Interval:
    """Bounds of the logits [B, K] for all images in [0, 1] within ``epsilon`` in Linf.

    Computed in float64, whose rounding is not bounded itself.

    Args:
        model: takes images in [0, 1]; in evaluation mode; not changed.
        image: [B, C, H, W].
        epsilon: radius.

    Raises:
        ModelError: the network cannot be traced, or holds something that has no rule here.
    """
    network = in_evaluation(copy.deepcopy(model).double())
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
    except Exception as error:  # Whatever the code of a network raises on symbols.
        raise ModelError(
            "interval bounds need a network that torch.fx can trace "
            f"({reason_of(error)}); leave the bounds out"
        ) from None
    exact = image.double()
    box = Interval((exact - epsilon).clamp(0, 1), (exact + epsilon).clamp(0, 1))
    with torch.no_grad():
        if not torch.allclose(traced(exact), network(exact), equal_nan=True):
            raise ModelError(
                "interval bounds need a network that torch.fx traces as it computes; this one may "
                "change a tensor in place (+=) that has another name; leave the bounds out"
            )
        found = _Bounds(traced).run(box)
    if not isinstance(found, Interval):
        raise ModelError("interval bounds need a network that returns logits; leave the bounds out")
    return found


def check_linf(threat: Threat) -> None:
    """Refuse a threat in another norm.

    Raises:
        ConfigError: in one sentence.
    """
    if threat.norm != "Linf":
        raise ConfigError(
            f"interval bounds are for threats in Linf, got {threat.norm}; leave the bounds out"
        )


def verified_accuracy(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    *,
    engine: Engine,
    batch_size: int = 256,
    progress: Progress = no_progress,
) -> Result:
    """Share of images that no change within the threat can fool, as far as the bounds prove it.

    Args:
        model: on the engine's device.
        images: what to prove it for.
        threat: in Linf.
        engine: the device.
        batch_size: images at once.
        progress: called with ("interval bounds", images done, images in all).

    Raises:
        ConfigError: the threat is in another norm.
        ModelError: see :func:`logit_bounds`.
    """
    check_linf(threat)
    began = time.perf_counter()
    proved = torch.zeros(len(images), dtype=torch.bool)
    for batch in batches(images.to(engine.device), batch_size):
        bounds = logit_bounds(model, batch.image, float(threat.epsilon))
        own = bounds.lower.gather(1, batch.label[:, None])[:, 0]
        others = bounds.upper.scatter(1, batch.label[:, None], -torch.inf).amax(1)
        proved[batch.index.cpu()] = (own > others).cpu()
        progress("interval bounds", int(batch.index[-1]) + 1, len(images))
    return accuracy_of(proved, time.perf_counter() - began) | {"method": "interval bounds"}
