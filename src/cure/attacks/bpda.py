"""PGD with a straight-through backward pass (BPDA) where a network masks its gradient.

Forward values are those of the network.  Only the backward pass differs, on a copy:

- rounding operations anywhere in the network (``round``, ``floor``, ``ceil``, ``trunc``, ``sign``,
  as functions or as methods of a tensor) pass the gradient unchanged;
- so do modules of the types in :data:`KINDS`, and every module that is not PyTorch's, has no
  parameters and no children, keeps the shape of its input, and jumps (a change of the input by a
  hundredth of its spread moves a value more than ten times as far) or passes no gradient at all.
  That is how k-winners-take-all, sparsifying and quantising layers and sign activations look;
- a module whose class says ``bpda = True`` passes the gradient unchanged, and one with a method
  ``bpda(self, input)`` has the gradient of that method, which is a differentiable stand-in.

What is written inside the ``forward`` of a larger module with comparisons (``x * (x > 0.5)``) is
not found; give it a module of its own.

Source: Athalye et al., ICML 2018 (Backward Pass Differentiable Approximation).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cure.attacks.losses import CROSS_ENTROPY
from cure.attacks.pgd_attacks import ascent
from cure.attacks.registry import register
from cure.attacks.threat import Threat
from cure.errors import ConfigError, CureNote
from cure.models.trial import copy_network

KINDS = (nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.Hardtanh, nn.Hardsigmoid)
"""Types of PyTorch's modules with a flat part that are replaced; subclasses (ReLU6) are not."""

ROUNDING = {
    f: name
    for name in ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn")
    for f in (getattr(torch, name), getattr(Tensor, name))
}

NUDGE = 1e-2
"""Change of a module's input, as a share of its spread, under which a jump is looked for."""

JUMP = 10.0
"""Change of a module's output over that of its input, from which it jumps."""


def straight_through(value: Tensor, stand_in: Tensor) -> Tensor:
    """``value`` with the gradient of ``stand_in``.

    >>> x = torch.tensor([0.4], requires_grad=True)
    >>> y = straight_through(x.round(), 3 * x)
    >>> y.item(), torch.autograd.grad(y.sum(), x)[0].item()
    (0.0, 3.0)
    """
    # Not value + (s - s.detach()): rounding must not move a value across a threshold.
    found: Tensor = _StraightThrough.apply(value, stand_in)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor, stand_in: Tensor) -> Tensor:  # noqa: ARG004
        return value.detach().clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, gradient


class _Rounding(TorchFunctionMode):
    """Rounding with the gradient of the identity; remembers the operations that it met."""

    def __init__(self, met: set[str]) -> None:
        super().__init__()
        self.met = met

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        of = args[0] if args else None
        if function in ROUNDING and isinstance(of, Tensor) and of.requires_grad:
            self.met.add(ROUNDING[function])
            return straight_through(found, of)
        return found


class _Replaced(nn.Module):
    """A module with another backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tensor:
        """What the module returns."""
        own = getattr(self.module, "bpda", True)
        with torch.no_grad():
            value: Tensor = self.module(image)
        stand_in = own(image) if callable(own) else image
        if stand_in.shape != value.shape:
            raise ConfigError(
                f"bpda-pgd20: expected {type(self.module).__name__} to have a stand-in of shape "
                f"{list(value.shape)}, got {list(stand_in.shape)}; give the class a method "
                "bpda(self, input) that returns it"
            )
        return straight_through(value, stand_in)


class StraightThrough(nn.Module):
    """A network in which rounding operations pass the gradient unchanged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.met: set[str] = set()
        self.train(network.training)

    def forward(self, image: Tensor) -> Any:
        """What the network returns."""
        with _Rounding(self.met):
            return self.network(image)


def smoothed(model: nn.Module, image: Tensor) -> nn.Module:
    """The network with a straight-through backward pass; itself where nothing is replaced.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K]; unchanged.
        image: some images.

    Raises:
        ConfigError: when even so no gradient reaches the image.
        ModelError: when the network cannot be copied.
    """
    network = copy_network(model).requires_grad_(False)
    replaced = []
    for name, module in _masking(network, image):
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, _Replaced(module))
        replaced.append(f"layer '{name}' ({type(module).__name__})")
    found = StraightThrough(network)
    leaf = image.detach().clone().requires_grad_(True)
    gradient: Tensor | None = None
    with torch.enable_grad():
        # What autograd cannot follow (NumPy) raises RuntimeError.
        try:
            logits = found(leaf)
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(logits.sum(), leaf, allow_unused=True)
        except RuntimeError:
            gradient = None
    if gradient is None:
        raise ConfigError(
            "bpda-pgd20: no gradient reaches the image with a straight-through backward pass "
            "either; put the step that loses it into a module of its own whose class says bpda = "
            "True, or has a method bpda(self, input) that returns a differentiable stand-in"
        )
    replaced += [f"torch.{name}" for name in sorted(found.met)]
    if not replaced:
        _note("nothing in the network masks its gradient, so this is PGD-20")
        return model
    _note(f"straight-through backward pass in {', '.join(replaced)}")
    return found


def _note(text: str) -> None:
    warnings.warn(f"bpda-pgd20: {text}", CureNote, stacklevel=3)


def _masking(network: nn.Module, image: Tensor) -> list[tuple[str, nn.Module]]:
    """Modules to replace, with their names."""
    found = []
    with _inputs(network, image) as inputs:
        for name, module in network.named_modules():
            if not name:
                continue
            masks = name in inputs and _masks(module, inputs[name])
            if hasattr(type(module), "bpda") or type(module) in KINDS or masks:
                found.append((name, module))
    return found


def _is_own_activation(module: nn.Module) -> bool:
    return (
        not type(module).__module__.startswith("torch.")
        and not isinstance(module, torch.jit.ScriptModule)
        and next(module.children(), None) is None
        and next(module.parameters(), None) is None
    )


@contextmanager
def _inputs(network: nn.Module, image: Tensor) -> Iterator[dict[str, Tensor]]:
    """What reaches each module of one's own in a pass of some images."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, module in network.named_modules():
        if _is_own_activation(module):

            def look(module: nn.Module, args: Any, name: str = name) -> None:  # noqa: ARG001
                if len(args) == 1 and isinstance(args[0], Tensor):
                    inputs[name] = args[0].detach().clone()

            handles.append(module.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            network(image.detach().clone())
    finally:
        for handle in handles:
            handle.remove()
    yield inputs


def _masks(module: nn.Module, value: Tensor) -> bool:
    """Whether a module that keeps the shape jumps, or passes no gradient."""
    if not value.is_floating_point():
        return False
    draws = torch.Generator().manual_seed(0)
    size = NUDGE * value.std()
    step = size * torch.randn(value.shape, generator=draws).sign().to(value)
    with torch.no_grad():
        here, there = module(value.clone()), module(value + step)
    if not isinstance(here, Tensor) or here.shape != value.shape:
        return False
    if bool((there - here).abs().max() > JUMP * size):
        return True
    leaf = value.clone().requires_grad_(True)
    gradient = None
    with torch.enable_grad():
        try:
            output = module(leaf.clone())
            if output.requires_grad:
                (gradient,) = torch.autograd.grad(output.sum(), leaf, allow_unused=True)
        except RuntimeError:
            gradient = None  # NumPy inside, which autograd cannot follow.
    return gradient is None or not bool(gradient.any())


@register(
    "bpda-pgd20",
    "PGD-20 with a straight-through backward pass (BPDA) where a layer masks the gradient",
    {
        "steps": 20,
        "step_size": "epsilon/4",
        "start": "uniform",
        "restarts": 1,
        "objective": "cross_entropy",
        "backward": "straight-through",
    },
    # The gradient that PGD needs is that of the copy; see smoothed.
    gradient=False,
    label="BPDA PGD-20",
    prepare=smoothed,
)
def bpda_pgd20(
    model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
) -> Tensor:
    """PGD-20 with the random starts of ``pgd20``."""
    # The stream is pgd20's: on a network without masking layers the images are the same.
    return ascent("pgd20", CROSS_ENTROPY, 20)(model, image, label, threat, seed, number)
