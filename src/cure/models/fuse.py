"""Fold BatchNorm into convolutions while a network is attacked in evaluation mode.

In evaluation mode BatchNorm is ``scale * x + shift`` with constants.  Where it alone reads the
result of a convolution it is folded into that layer's weights, which saves passes over memory,
forward and backward.  The network's own code runs; only the weights of its layers are exchanged.
The folded weights are computed in float64, more exactly than ``torch.nn.utils.fusion`` does.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cure.models.batch_norm import FrozenStatistics
from cure.utils.modes import evaluating, in_evaluation

TOLERANCE = 1e-3
"""How far logits may move, as a share of the largest one; float32 rounding stays far below."""

# Not linear layers: theirs is the last dimension, BatchNorm's the second.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Pair = tuple[str, str]
"""Names of a convolution and of the BatchNorm that alone reads its result."""

_known: WeakKeyDictionary[nn.Module, list[Pair]] = WeakKeyDictionary()
_known_frozen: WeakKeyDictionary[nn.Module, list[Pair]] = WeakKeyDictionary()


@contextmanager
def folded(
    model: nn.Module,
    example: Tensor,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[None]:
    """Inside, ``model`` computes the same logits, up to rounding, with its BatchNorm folded.

    With ``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean scale``, a convolution and
    the BatchNorm after it become one convolution: ``W <- scale W``, ``b <- scale b + shift``.  With
    a lower precision, weights are also rounded once instead of at every pass.

    A network is left as it is when it carries hooks (a hook must see it unchanged).
    Which layer reads which is found once, by ``torch.fx`` on a copy; where that fails, or logits
    of ``example`` then differ by more than ``TOLERANCE``, nothing is folded.

    Args:
        model: in evaluation mode, no parameter requires a gradient; restored at the end, also when
            the inside raises.
        example: images [B, C, H, W] that ``model`` takes.
        precision: makes the context in which the passes will be made.
    """
    if any(_hooked(module) for module in model.modules()):
        yield
        return
    if model not in _known:
        _known[model] = _checked(model, _pairs(model), example)
    with precision():
        kind = _lower_type(example)
    with _holding(model, _known[model], kind):
        yield


def folded_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` in evaluation mode, fixed, with its BatchNorm folded for good.

    See :func:`folded`; for attacks so long that a copy is worth its memory.

    Args:
        model: not changed, and shares no memory with the copy.
        example: images [B, C, H, W] that it takes.
    """
    twin = in_evaluation(copy.deepcopy(model)).requires_grad_(False)
    if not any(_hooked(module) for module in twin.modules()):
        with torch.no_grad():
            FoldedWeights().fold(twin, _checked(twin, _pairs(twin), example), None)
    return twin


def _hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _lower_type(example: Tensor) -> torch.dtype | None:
    """The type that autocast computes in here, if it is on."""
    kind = example.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _plain(module: nn.Module) -> bool:
    """Whether its weight is a parameter of its own, not computed by a parametrisation."""
    return module._parameters.get("weight") is not None


class _LayerTracer(fx.Tracer):
    """Traces into no convolution or norm, also where a network has subclasses of its own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _CONVOLUTIONS + _NORMS) or super().is_leaf_module(
            m, module_qualified_name
        )


def _pairs(model: nn.Module) -> list[Pair]:
    """Convolutions that can be folded with their BatchNorm; none in code that cannot be traced."""
    # A copy, because the code of a network may keep what passes through it.
    twin = copy.deepcopy(model)
    tracer = _LayerTracer()
    try:
        graph = tracer.trace(twin)
    except Exception:  # whatever the code of a network does with a stand-in for a tensor
        return []
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    # A module that is called twice, or has two names, must not be changed for one call.
    times = Counter(id(modules[str(node.target)]) for node in calls)
    found = []
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        norm, layer = modules[str(node.target)], modules[str(source.target)]
        alone = len(source.users) == 1 and times[id(layer)] == times[id(norm)] == 1
        if (
            alone
            and isinstance(layer, _CONVOLUTIONS)
            and _plain(layer)
            and isinstance(norm, _NORMS)
            and norm.running_mean is not None
        ):
            found.append((str(source.target), str(node.target)))
    return found


@contextmanager
def folded_frozen(model: nn.Module, example: Tensor) -> Iterator[None]:
    """As :func:`folded`, for a training pass of a network whose statistics are frozen.

    The folded weights are part of the autograd graph, so gradients reach the weights of the
    convolution and of BatchNorm; they equal those of the unfolded network up to rounding (relative
    error about 1e-6 in float32).  Only layers with :class:`FrozenStatistics` are folded, and none
    where layers are called again in the backward pass (gradient checkpointing).

    Args:
        model: any mode; restored at the end.
        example: images [B, C, H, W] that ``model`` takes.
    """
    if any(_hooked(module) for module in model.modules()):
        yield
        return
    if model not in _known_frozen:
        modules = dict(model.named_modules())
        pairs = [p for p in _pairs(model) if isinstance(modules[p[1]], FrozenStatistics)]
        if pairs and _recomputes(model, pairs, example):
            pairs = []
        with evaluating(model):
            _known_frozen[model] = _checked(model, pairs, example.detach())
    with _holding(model, _known_frozen[model], None, differentiable=True):
        yield


def _recomputes(model: nn.Module, pairs: list[Pair], example: Tensor) -> bool:
    """Whether the backward pass calls a layer of ``pairs`` again, as gradient checkpointing does.

    The layer would have other weights there than in the forward pass.
    """
    twin, called = copy.deepcopy(model), []
    for name in chain.from_iterable(pairs):
        twin.get_submodule(name).register_forward_pre_hook(lambda *_: called.append(True))
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        logits = twin(example[:2].detach().clone().requires_grad_())
        called.clear()
        # Reentrant checkpoints take no torch.autograd.grad().
        logits.sum().backward()
    return bool(called)


@torch.no_grad()
def _checked(model: nn.Module, pairs: list[Pair], example: Tensor) -> list[Pair]:
    """``pairs``, or none where folding them changes the logits."""
    image = example[:2]
    with torch.autocast(image.device.type, enabled=False), _whole_float32():
        expected = model(image)
        with _holding(model, pairs, None):
            came = model(image)
    bound = TOLERANCE * expected.abs().max().clamp_min(1.0)
    return pairs if bool(((came - expected).abs() <= bound).all()) else []


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Convolutions in float32: by default a GPU rounds their input to 11 bits (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _folded_weights(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that is ``norm(layer)``."""
    norm = cast(_BatchNorm, norm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    # Few numbers: one a channel.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    if bias is not None:
        shift = shift + bias * scale
    by_channel = scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
    return weight * by_channel, shift.to(weight.dtype)


class Folded(nn.Identity):
    """Stands in for a BatchNorm layer that is folded into the convolution before it."""


class FoldedWeights:
    """Layers that hold folded weights for a while, in the place of their own."""

    def __init__(self) -> None:
        self.held: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def hold(
        self, layer: nn.Module, weight: Tensor, bias: Tensor | None, kind: torch.dtype | None
    ) -> None:
        """Let ``layer`` compute with these, rounded to ``kind`` if given."""
        self.held.append((layer, dict(layer._parameters)))
        if kind is not None:
            weight, bias = weight.to(kind), None if bias is None else bias.to(kind)
        # Plain tensors serve as well as parameters while the network only computes.
        layer._parameters["weight"] = cast(nn.Parameter, weight)
        layer._parameters["bias"] = cast("nn.Parameter | None", bias)

    def fold(self, model: nn.Module, pairs: list[Pair], kind: torch.dtype | None) -> None:
        """Fold each pair of ``pairs``; weights get the type ``kind`` if given."""
        modules = dict(model.named_modules())
        for layer_name, norm_name in pairs:
            self.hold(
                modules[layer_name], *_folded_weights(modules[layer_name], modules[norm_name]), kind
            )
            parent, _, key = norm_name.rpartition(".")
            self.replaced.append((modules[parent], key, modules[norm_name]))
            modules[parent]._modules[key] = Folded()
        if kind is None:
            return
        done = {id(layer) for layer, _ in self.held}
        for layer in modules.values():
            whole = type(layer) in (*_CONVOLUTIONS, nn.Linear) and _plain(layer)
            if whole and id(layer) not in done:
                weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
                self.hold(layer, weight, bias, kind)

    def restore(self) -> None:
        """Give every layer its own weights back."""
        for parent, key, norm in self.replaced:
            parent._modules[key] = norm
        for layer, parameters in self.held:
            layer._parameters.update(parameters)


@contextmanager
def _holding(
    model: nn.Module, pairs: list[Pair], kind: torch.dtype | None, differentiable: bool = False
) -> Iterator[None]:
    folded_weights = FoldedWeights()
    try:
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            folded_weights.fold(model, pairs, kind)
        yield
    finally:
        folded_weights.restore()
