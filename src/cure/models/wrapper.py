"""Thin modules around a network: they change what goes in or comes out, and own no weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from cure.errors import ConfigError


class Wrapper(nn.Module):
    """A module without weights of its own around ``network``; :func:`core` looks through it."""

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def eval(self) -> Self:
        """Evaluation mode, as the network's own ``eval()`` sets it where it has one."""
        super().eval()
        self.network.eval()
        return self


class Normalised(Wrapper):
    """A network that standardises its images itself: ``network((image - mean) / std)``.

    The two constants are buffers that follow the device and stay out of the state dict, so that
    weights saved with and without the wrapper are the same.

    Args:
        network: takes standardised images [B, C, H, W].
        mean: one number a channel, for images in [0, 1].
        std: one positive number a channel.

    Raises:
        ConfigError: when the two differ in length or are no numbers, or a standard deviation is
            not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(network)
        try:
            numbers = [[float(value) for value in given] for given in (mean, std)]
            finite = all(math.isfinite(value) for value in (*numbers[0], *numbers[1]))
            valid = len(mean) == len(std) > 0 and finite and min(numbers[1]) > 0
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ConfigError(
                "expected mean and std with one number a channel each, and std above 0, "
                f"got mean {mean} and std {std}"
            )
        for name, values in zip(("mean", "std"), numbers, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] in [0, 1]."""
        logits: Tensor = self.network((image - self.mean) / self.std)
        return logits


def constants_inside(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of the :class:`Normalised` in a network; None where it has none."""
    inside = next((m for m in model.modules() if isinstance(m, Normalised)), None)
    if inside is None:
        return None
    return tuple(inside.mean.flatten().tolist()), tuple(inside.std.flatten().tolist())


class Selected(Wrapper):
    """A network of which some logits are taken, in another order.

    Args:
        network: returns logits [B, classes].
        places: position among them of each logit to return.
    """

    places: Tensor

    def __init__(self, network: nn.Module, places: Sequence[int]) -> None:
        super().__init__(network)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, len(places)] of images [B, C, H, W]."""
        logits: Tensor = self.network(image)
        return logits[:, self.places]


ONE_LOGIT = ", one logit"
"""What the place of an output ends in where it is the single logit of two classes."""


class OutputError(ValueError):
    """An output in which no logits were found; the text says what came."""


def main_output(output: object, classes: int) -> tuple[Tensor, str, str]:
    """The logits in what a network returned.

    A tensor is taken as it is; of an object or dictionary its ``logits``; else, of a tuple, list
    or dictionary, the first tensor of shape [B, classes], or the only one in a dictionary.  The
    single logit z of a network for two classes, [B] or [B, 1], becomes (0, z): its cross-entropy is
    the binary one.

    Returns:
        The logits; where they were ("tensor", "Outputs.logits"); and a note where other tensors,
        such as those for auxiliary losses, are left out.

    Raises:
        OutputError: when there are no logits, or several tensors of a dictionary may be them.

    >>> main_output({"logits": torch.zeros(2, 3), "aux": torch.zeros(2, 3)}, 3)[1]
    "dict['logits']"
    >>> main_output(torch.tensor([3.0, -1.0]), 2)[0]
    tensor([[ 0.,  3.],
            [ 0., -1.]])
    """
    logits, place, note = raw_output(output, classes)
    if classes != 2 or not (logits.dim() == 1 or logits.shape[1:] == (1,)):
        return logits, place, note
    single = logits.reshape(-1, 1)
    told = "its one logit is that of the second class; the first has 0"
    return torch.cat([torch.zeros_like(single), single], 1), place + ONE_LOGIT, told


def raw_output(output: object, classes: int) -> tuple[Tensor, str, str]:
    """The tensor of logits as the network returns it, its place and a note."""
    if isinstance(output, Tensor):
        if not output.dtype.is_floating_point:
            raise OutputError(f"got a tensor of {str(output.dtype).removeprefix('torch.')}")
        return output, "tensor", ""
    kind = type(output).__name__
    parts = _parts(output)
    named = getattr(output, "logits", None)
    if isinstance(output, Mapping) and not isinstance(named, Tensor):
        named = output.get("logits")
        place = f"{kind}['logits']"
    else:
        place = f"{kind}.logits"
    if not isinstance(named, Tensor):
        fitting = {n: t for n, t in parts.items() if t.dim() == 2 and t.shape[1] == classes}
        if not fitting or (isinstance(output, Mapping) and len(fitting) > 1):
            came = ", ".join(f"{n} {list(t.shape)}" for n, t in list(parts.items())[:5])
            raise OutputError(
                f"got {kind}{f' with {came}' if came else ''}; return the logits [B, {classes}] "
                "alone, or name them logits"
            )
        name, named = next(iter(fitting.items()))
        place = f"{kind}[{name!r}]" if isinstance(output, Mapping) else f"{kind}[{name}]"
    left = [name for name, tensor in parts.items() if tensor is not named]
    note = f"its logits are {place}" if place.startswith("dict") else ""
    if left:
        note = (
            f"logits are taken from {place}; the rest of its output is left out: {', '.join(left)}"
        )
    return named, place, note


def _parts(output: object) -> dict[str, Tensor]:
    """The tensors in an output by name or position."""
    if isinstance(output, Mapping):
        items = {str(name): value for name, value in output.items()}
    elif isinstance(output, Sequence) and not isinstance(output, str):
        names = getattr(output, "_fields", range(len(output)))
        items = {str(name): value for name, value in zip(names, output, strict=False)}
    else:
        items = dict(getattr(output, "__dict__", {}))
    return {name: value for name, value in items.items() if isinstance(value, Tensor)}


def contiguous_input(image: Tensor) -> Tensor:
    """Images [B, C, H, W] in the default layout; their gradient comes back in that of ``image``."""
    # Of one image or channel, both layouts may be contiguous; what a network does then depends on
    # the strides.
    plain = image.stride() == torch.empty(image.shape, device="meta").stride()
    inside = image if plain else image.clone(memory_format=torch.contiguous_format)
    if inside is not image and inside.requires_grad:
        inside.register_hook(_channel_innermost)  # type: ignore[no-untyped-call]
    return inside


def _channel_innermost(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def only_main_output(output: object, classes: int) -> Tensor:
    """The first result of :func:`main_output`."""
    return main_output(output, classes)[0]


def two_at_least(image: Tensor) -> Tensor:
    """Images [B, C, H, W]; one alone is given twice."""
    return torch.cat([image, image]) if len(image) == 1 else image


def as_many(logits: Tensor, image: Tensor) -> Tensor:
    """The logits of ``image``, without those of a second copy."""
    return logits[: len(image)]


# torch.fx keeps them as calls, so that a network inside can still be traced and folded.
fx.wrap("contiguous_input")
fx.wrap("only_main_output")
fx.wrap("two_at_least")
fx.wrap("as_many")


class Adapted(Wrapper):
    """A network with what :func:`cure.models.trial.adapt` decided for it.

    Args:
        network: takes images [B, C, H, W].
        classes: number of logits.
        contiguous: weights and images stay in PyTorch's default memory layout.
        copies_input: the network changes its input, so it is given a copy.
        takes_main: the network returns more than a tensor of logits.
        casts: the network returns another floating-point type than that of the images, or tensors
            of ``torch.inference_mode()``.
        pairs: the network does not take one image alone, which it is given twice.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        *,
        contiguous: bool = False,
        copies_input: bool = False,
        takes_main: bool = False,
        casts: bool = False,
        pairs: bool = False,
    ) -> None:
        super().__init__(network)
        self.training = network.training
        self.classes, self.contiguous, self.copies_input = classes, contiguous, copies_input
        self.takes_main, self.casts, self.pairs = takes_main, casts, pairs

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        inside = contiguous_input(image) if self.contiguous else image
        if self.copies_input:
            inside = inside.clone()
        if self.pairs:
            inside = two_at_least(inside)
        output = self.network(inside)
        logits: Tensor = only_main_output(output, self.classes) if self.takes_main else output
        if self.pairs:
            logits = as_many(logits, image)
        if not self.casts:
            return logits
        # Attacks write into logits, which those of torch.inference_mode() do not allow.
        return logits.clone() if logits.is_inference() else logits.to(image.dtype)

    def to(self, *args: Any, **kwargs: Any) -> Adapted:
        """As any module; a network in the default layout is not moved to another one."""
        if self.contiguous and kwargs.pop("memory_format", None) and not args and not kwargs:
            return self
        super().to(*args, **kwargs)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        """A copy, in which tensors that belong to a past computation are detached."""
        for tensor in self.kept_tensors(self.network):
            memo[id(tensor)] = tensor.detach().clone()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.no_grad():  # parameters of copied TorchScript would have a graph
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @staticmethod
    def kept_tensors(model: nn.Module) -> Iterator[Tensor]:
        """Tensors with a graph that modules keep in attributes, containers or plain objects."""
        seen: set[int] = set()
        waiting: list[Any] = [vars(module) for module in model.modules()]
        while waiting:
            value = waiting.pop()
            if id(value) in seen or isinstance(value, nn.Module | type):
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                if value.grad_fn is not None:
                    yield value
            elif isinstance(value, Mapping):
                waiting += value.values()
            elif isinstance(value, list | tuple | set | frozenset):
                waiting += value
            elif hasattr(value, "__dict__") and not callable(value):
                waiting.append(vars(value))


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without what modules keep there besides tensors (``get_extra_state``)."""
    state = network.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def core(model: nn.Module) -> nn.Module:
    """The network inside all wrappers: the one whose state dict is saved and loaded.

    Call ``model`` itself for logits; the core may expect standardised images, or (networks from
    transformers) return more than logits.
    """
    while isinstance(model, Wrapper):
        model = model.network
    return model
