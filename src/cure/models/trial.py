"""One trial pass decides how a network is used: layout, output, precision, gradient, copies.

:func:`adapt` is called wherever a network is built or taken from the user, so that training,
evaluation, diagnosis, corruptions, studies and reports all use the same decision.  A network that
needs nothing is returned as it is; another one gets a thin wrapper without weights of its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.weight_norm import WeightNorm

from cure.errors import CureNote, ModelError
from cure.models.failure import failed_in, reason_of
from cure.models.logit_layers import LogitLayers
from cure.models.wrapper import ONE_LOGIT, Adapted, OutputError, core, main_output, raw_output
from cure.utils.device import Device
from cure.utils.launcher import launched
from cure.utils.modes import modes_kept

_TRAITS = "_cure_traits"
_UNTRAINABLE = "_cure_untrainable"
"""Attribute of networks that are files: why they cannot be trained."""

_Device = TypeVar("_Device", bound=Device)

LAYOUT_TOLERANCE = 1e-2
"""Largest difference of logits between two memory layouts, as a share of the largest logit.

Rounding stays far below.
"""


@dataclass(frozen=True)
class Traits:
    """What a trial pass found of a network.

    Attributes:
        channels_last: it takes images with the channel innermost; else its weights and images stay
            in PyTorch's default layout.
        output: where its logits were found: "tensor", else for example "Outputs.logits".
        shape: of the logits for two images.
        cast: logits come in another floating-point type than the images.
        in_place: it changes its input, so it is given a copy.
        detaches: it keeps tensors of a computation, which are detached in its copies.
        pairs: it fails on one image alone, or loses the batch dimension of one (``squeeze()``), so
            it is given the image twice.
        no_gradient: why no gradient reaches the image; empty where one does.
        untrainable: why it cannot be trained; empty where it can.
        notes: what was decided for the user, a sentence each.
        heads: names inside ``core`` of the layers that make the logits; None where the trial could
            not tell.
        activation_bytes: memory that autograd keeps for one image between the passes.
    """

    channels_last: bool = True
    output: str = "tensor"
    shape: tuple[int, ...] = ()
    cast: bool = False
    in_place: bool = False
    detaches: bool = False
    pairs: bool = False
    no_gradient: str = ""
    untrainable: str = ""
    notes: tuple[str, ...] = ()
    heads: tuple[str, ...] | None = field(default=None, compare=False)
    activation_bytes: int = field(default=0, compare=False)

    @property
    def gradient(self) -> bool:
        """Whether a gradient reaches the image."""
        return not self.no_gradient


def traits_of(model: nn.Module) -> Traits:
    """What the trial of a network found; the defaults for a network that was not tried."""
    found: Traits = getattr(model, _TRAITS, Traits())
    return found


def with_traits(model: nn.Module, traits: Traits) -> nn.Module:
    """The same network, with what a trial of it would find."""
    setattr(model, _TRAITS, traits)
    return model


def adapt(
    model: nn.Module,
    classes: int,
    channels: int,
    size: tuple[int, int],
    *,
    title: str = "the network",
) -> nn.Module:
    """Try a network once and make it usable.

    Half and double precision become float32 (where a network then fails they stay, and it is not
    trained), lazy layers get their weights, and whatever else is decided is done by an
    :class:`~cure.models.wrapper.Adapted` around it.  Modes, buffers and weights are as before;
    PyTorch's global generators are used (see :func:`~cure.utils.random.seeded`).

    Args:
        model: changed only in its precision and by the first pass of lazy layers.
        classes: number of logits.
        channels: channels of the images.
        size: height and width of the images in pixels.
        title: how messages call it.

    Returns:
        A network that takes images [B, channels, H, W] in [0, 1] and returns a tensor.

    Raises:
        ModelError: when it fails on such images in evaluation mode, or returns no logits.
    """
    for module in model.modules():
        if not hasattr(module, "training"):
            module.training = False  # frozen TorchScript has no mode
    stored = _not_float32(model)
    kinds = " and ".join(sorted({str(s.tensor.dtype).removeprefix("torch.") for s in stored}))
    notes = [f"its weights were {kinds} and are converted to float32"] if stored else []
    if stored:
        model.float()
    precise = ""
    device = next((p.device for p in model.parameters() if not is_lazy(p)), torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    image = torch.rand((2, channels, *size), generator=draws).to(device)
    try:
        found = _best_trial(model, image, classes, title)
    except ModelError as error:
        # A network that converts images itself works in its own precision alone.
        for one in stored:
            one.restore()
        kept = _kept_precision(model, image, classes, title) if stored else None
        if kept is None:
            raise
        found = kept
        notes = [f"its weights stay {kinds}, because it fails with float32"]
        precise = (
            f"expected a network that works with float32 weights, which training needs, got one "
            f"of {kinds} that fails once they are converted ({reason_of(error.__cause__ or error)})"
            "; remove conversions such as .bfloat16() and .double() from its forward"
        )
    untrainable = _untrainable(model, found) or precise
    traits = replace(
        found.traits,
        untrainable=untrainable,
        notes=(*notes, *found.traits.notes),
    )
    _say(traits.notes, title)
    if _needs_wrapper(traits) or isinstance(model, torch.jit.ScriptModule):
        model = Adapted(
            model,
            classes,
            contiguous=not traits.channels_last,
            copies_input=traits.in_place,
            takes_main=traits.output != "tensor",
            casts=traits.cast,
            pairs=traits.pairs,
        )
    setattr(model, _TRAITS, traits)
    return model


def check_trainable(model: nn.Module, batch_size: int, frozen_statistics: bool = False) -> None:
    """Refuse a network that cannot be trained, before a run folder is made.

    Args:
        model: see :func:`adapt`.
        batch_size: images a step on one rank.
        frozen_statistics: BatchNorm does not use the statistics of the batch.

    Raises:
        ModelError: in one sentence with the reason.
    """
    if reason := traits_of(model).untrainable:
        raise ModelError(reason)
    if batch_size == 1 and not frozen_statistics:
        for name, module in core(model).named_modules():
            if isinstance(module, _BatchNorm):
                raise ModelError(
                    f"training.batch_size: expected 2 images or more for each process, got 1: "
                    f"BatchNorm (layer '{name or type(module).__name__}') has no variance of a "
                    "single image; say training.batch_size=2 or more, or training.batch_norm=frozen"
                )


def fitted(engine: _Device, model: nn.Module) -> _Device:
    """The engine, in a memory layout in which the network can be trained.

    Args:
        engine: device and layout that were asked for.
        model: see :func:`adapt`.

    Returns:
        The same, or one that leaves images and weights in PyTorch's default layout.
    """
    if traits_of(model).channels_last and not _onednn_spoils_gradients(model, engine.device):
        return engine
    return replace(engine, channels_last=False)


def _onednn_spoils_gradients(model: nn.Module, device: torch.device) -> bool:
    """Whether gradients of weights go wrong with the channel innermost.

    oneDNN writes past its memory there in the gradient of a strided 1x1 convolution with fewer
    input channels than its vectors hold (8 with AVX2, 16 with AVX-512): the process dies, or the
    gradients are wrong (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    return device.type == "cpu" and any(
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
        for module in model.modules()
    )


# -- copies --------------------------------------------------------------------------------------


def copy_network(model: nn.Module) -> nn.Module:
    """A deep copy, in which tensors that belong to a past computation are detached.

    Raises:
        ModelError: when something in it cannot be copied; names the module.
    """
    try:
        with torch.no_grad():  # parameters of copied TorchScript would have a graph
            return copy.deepcopy(model)
    except Exception:
        pass  # tried again below, where the reason is told
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in kept_tensors(model)}
    # PyTorch copies lazy parameters but no lazy buffers.
    memo |= {
        id(b): type(b)(device=b.device, dtype=b.dtype)  # type: ignore[call-arg]
        for b in model.buffers()
        if is_lazy(b)
    }
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(_uncopyable(model, error)) from error


def kept_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep of a past computation: those that ``copy.deepcopy`` refuses."""
    return Adapted.kept_tensors(model)


def _uncopyable(model: nn.Module, error: Exception) -> str:
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                return (
                    f"the network cannot be copied: layer '{name}' uses torch.nn.utils.weight_norm;"
                    " use torch.nn.utils.parametrizations.weight_norm"
                )
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, {id(t): t.detach() for t in kept_tensors(model)})
            except Exception as reason:
                return (
                    f"the network cannot be copied: attribute '{key}' of layer "
                    f"'{name or type(module).__name__}' ({reason_of(reason)}); make it where it is "
                    "used, or give its class a __deepcopy__"
                )
    return f"the network cannot be copied ({reason_of(error)}); copy.deepcopy(model) must work"


# -- before the trial ----------------------------------------------------------------------------


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@dataclass(frozen=True)
class _Stored:
    """A parameter or buffer as it was before its conversion."""

    module: nn.Module
    name: str
    tensor: Tensor

    def restore(self) -> None:
        if self.name in self.module._parameters:
            getattr(self.module, self.name).data = self.tensor
        else:
            self.module._buffers[self.name] = self.tensor


def _not_float32(model: nn.Module) -> list[_Stored]:
    """Weights and buffers of another floating-point precision."""
    return [
        _Stored(module, name, tensor.data)
        for module in model.modules()
        for own in (module.named_parameters, module.named_buffers)
        for name, tensor in own(recurse=False)
        if tensor.dtype.is_floating_point and tensor.dtype != torch.float32
    ]


def _kept_precision(model: nn.Module, image: Tensor, classes: int, title: str) -> _Trial | None:
    """The trial of a network in its own precision; None where it fails, too."""
    try:
        found = _best_trial(model, image, classes, title)
    except ModelError:
        return None
    return found if found.traits.gradient else None


def _fill_lazy(model: nn.Module, image: Tensor, title: str) -> None:
    """One blank pass, in which lazy layers learn their shapes and draw their weights."""
    with modes_kept(model), torch.no_grad():
        model.eval()
        try:
            model(torch.full_like(image, 0.5))
        except Exception as error:
            raise ModelError(failed_in(error, title, image)) from error


# -- the trial -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """A forward pass and a backward pass to the image, in one mode."""

    output: str = "tensor"
    shape: tuple[int, ...] = ()
    cast: bool = False
    in_place: bool = False
    detaches: bool = False
    notes: tuple[str, ...] = ()
    error: Exception | None = None
    no_gradient: str = ""
    heads: tuple[str, ...] | None = None
    activation_bytes: int = 0


@dataclass(frozen=True)
class _Trial:
    traits: Traits
    training: _Pass = field(default_factory=_Pass)

    @property
    def complete(self) -> bool:
        """Everything worked."""
        both = self.traits.no_gradient or self.training.no_gradient
        return not both and self.training.error is None

    def better_than(self, other: _Trial) -> bool:
        """Whether more of it worked: the pass in training mode, then the gradients."""

        def rank(trial: _Trial) -> tuple[bool, bool, bool]:
            training = trial.training
            return (
                training.error is None,
                not trial.traits.no_gradient,
                not training.no_gradient,
            )

        return rank(self) > rank(other)


def _best_trial(model: nn.Module, image: Tensor, classes: int, title: str) -> _Trial:
    """The trial in the layout in which more works.

    Raises:
        ModelError: when the network fails in evaluation mode in both.
    """
    if any(is_lazy(tensor) for tensor in _own_tensors(model)):
        _fill_lazy(model, image, title)
    # A copy for each layout: where a dimension is 1, a change of layout keeps the old strides.
    inner, outer = copy_network(model), copy_network(model)
    inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = None
    if _same_in_both(inner, outer, image, classes):
        found = _tried(inner, image, classes, title, channels_last=True)
    if found is None or not found.complete:
        plain = _tried(outer, image, classes, title, channels_last=False)
        assert plain is not None
        if found is None or plain.better_than(found):
            found = replace(plain, traits=replace(plain.traits, channels_last=False))
    return found


def _tried(
    scratch: nn.Module, image: Tensor, classes: int, title: str, *, channels_last: bool
) -> _Trial | None:
    """The trial in one layout; None where the network fails with the channel innermost.

    Raises:
        ModelError: when it fails in the default layout.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = image.contiguous(memory_format=layout)
    _set_mode(scratch, False)
    evaluated = _pass(scratch, image, classes)
    if evaluated.error is not None:
        if channels_last:
            return None
        if isinstance(evaluated.error, OutputError):
            raise ModelError(
                f"expected {title} to return a tensor of logits, {evaluated.error}"
            ) from None
        raise ModelError(failed_in(evaluated.error, title, image)) from evaluated.error
    training = _Pass()
    if _set_mode(scratch, True):
        training = _pass(scratch, image, classes)
    traits = Traits(
        output=evaluated.output if evaluated.output != "tensor" else training.output,
        shape=evaluated.shape,
        cast=evaluated.cast or training.cast,
        in_place=evaluated.in_place or training.in_place,
        detaches=evaluated.detaches or training.detaches,
        pairs=evaluated.shape == (2, classes) and _fails_alone(scratch, image[:1], classes),
        no_gradient=evaluated.no_gradient,
        notes=tuple(dict.fromkeys(evaluated.notes + training.notes)),
        heads=evaluated.heads,
        activation_bytes=max(evaluated.activation_bytes, training.activation_bytes),
    )
    return _Trial(traits, training)


def _fails_alone(scratch: nn.Module, image: Tensor, classes: int) -> bool:
    """Whether one image gives no logits [1, classes] where two give [2, classes]."""
    _set_mode(scratch, False)
    devices = [image.device] if image.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        try:
            logits, _, _ = main_output(scratch(image.clone()), classes)
        except Exception:
            return True
    return logits.shape != (1, classes)


def _set_mode(model: nn.Module, mode: bool) -> bool:
    """Whether a network could be put into this mode; frozen TorchScript cannot."""
    try:
        model.train(mode)
    except Exception:
        return False
    return True


def _pass(scratch: nn.Module, image: Tensor, classes: int) -> _Pass:
    """Run forward and backward once; what a network does never raises here."""
    with torch.enable_grad():
        leaf = image.clone().requires_grad_(True)
        inside = leaf.clone()
        version = inside._version
        lost: list[str] = []
        handles, layers = _watch(scratch, lost), LogitLayers(core(scratch))
        try:
            output = scratch(inside)
        except Exception as error:
            with torch.no_grad():
                return _without_gradient(scratch, image, classes, error)
        finally:
            layers.end()
            for handle in handles:
                handle.remove()
        in_place = inside._version != version or not torch.equal(inside.detach(), image)
        try:
            logits, found, note = _logits_in(output, classes)
        except OutputError as error:
            return _Pass(error=error)
        heads = layers.of(raw_output(output, classes)[0])
        kept = _kept_for_backward(logits, scratch) // len(image)
        no_gradient = _backward(logits, leaf, lost)
    return _Pass(
        output=found,
        shape=tuple(logits.shape),
        cast=logits.dtype != image.dtype or logits.is_inference(),
        in_place=in_place,
        detaches=next(kept_tensors(scratch), None) is not None,
        notes=(note,) if note else (),
        no_gradient=no_gradient,
        heads=heads,
        activation_bytes=kept,
    )


def _logits_in(output: object, classes: int) -> tuple[Tensor, str, str]:
    """As :func:`main_output`; probabilities are refused.

    Through a sigmoid gradients vanish, and attacks look weaker than they are.
    """
    logits, found, note = main_output(output, classes)
    node = raw_output(output, classes)[0].grad_fn
    shaping = ("Squeeze", "View", "Reshape", "Unsqueeze", "Flatten", "Select")
    while node is not None and node.name().startswith(shaping):
        node = node.next_functions[0][0]
    if node is not None and node.name().startswith("Sigmoid"):
        raise OutputError("got the values of a sigmoid; return what the sigmoid takes instead")
    if found.endswith(ONE_LOGIT) and (node is None or node.name().startswith("Differentiable")):
        raise OutputError(
            "got one value an image, and no gradient that tells a logit from a probability; return "
            "a logit for each of the two classes"
        )
    return logits, found, note


def _kept_for_backward(logits: Tensor, model: nn.Module) -> int:
    """Bytes of the tensors that the graph of ``logits`` keeps, without those of the network."""
    own = {tensor.untyped_storage().data_ptr() for tensor in _own_tensors(model)}
    found: dict[int, int] = {}
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                try:
                    value = getattr(node, name)
                except RuntimeError:  # changed in place since; the backward pass tells
                    continue
                for tensor in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(tensor, Tensor) and not tensor.is_sparse:
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage.nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(size for place, size in found.items() if place not in own)


def _without_gradient(scratch: nn.Module, image: Tensor, classes: int, error: Exception) -> _Pass:
    """The pass again without autograd, where the pass with it failed with ``error``."""
    inside = image.clone()
    try:
        logits, found, note = _logits_in(scratch(inside), classes)
    except OutputError as refused:
        return _Pass(error=refused)
    except Exception:
        return _Pass(error=error)
    return _Pass(
        output=found,
        shape=tuple(logits.shape),
        cast=logits.dtype != image.dtype or logits.is_inference(),
        in_place=not torch.equal(inside, image),
        notes=(note,) if note else (),
        no_gradient=reason_of(error),
    )


def _backward(logits: Tensor, leaf: Tensor, lost: list[str]) -> str:
    """Why no gradient of the logits reaches the image; empty where one does."""
    where = f"it ends in layer {lost[0]}" if lost else ""
    if not logits.requires_grad:
        return where or "the output is detached from the computation"
    try:
        (gradient,) = torch.autograd.grad(logits.sum(), leaf, allow_unused=True)
    except Exception as error:
        return reason_of(error)
    return (where or "a step detaches it from the computation") if gradient is None else ""


def _watch(scratch: nn.Module, lost: list[str]) -> list[Any]:
    """Hooks that name the first layer whose input has a gradient and whose output has none."""
    handles = []
    for name, module in scratch.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or next(module.children(), None) is not None:
            continue

        def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return
            if args[0].requires_grad and not output.requires_grad:
                lost.append(f"'{name}' ({type(module).__name__})")

        handles.append(module.register_forward_hook(look))
    return handles


def _same_in_both(inner: nn.Module, outer: nn.Module, image: Tensor, classes: int) -> bool:
    """Whether two copies of a network agree, up to rounding, one in each memory layout."""
    found = []
    for network, layout in (
        (outer, torch.contiguous_format),
        (outer, torch.contiguous_format),
        (inner, torch.channels_last),
    ):
        _set_mode(network, False)
        try:
            with torch.no_grad():
                inside = image.clone(memory_format=layout)
                found.append(main_output(network(inside), classes)[0].float())
        except Exception:
            return False
    plain, again, last = found
    bound = LAYOUT_TOLERANCE * plain.abs().max().clamp_min(1e-6)
    # Where two equal passes differ, the difference says nothing about the layout.
    return bool(((last - plain).abs() <= bound).all()) or not torch.equal(plain, again)


def _untrainable(model: nn.Module, found: _Trial) -> str:
    """Why a network cannot be trained, in one sentence; empty where it can."""
    for name, module in model.named_modules():
        if reason := getattr(module, _UNTRAINABLE, ""):
            return str(reason)
        if isinstance(module, torch.jit.ScriptModule):
            return (
                "a TorchScript network cannot be trained here; pass the nn.Module that it was "
                "made from, with model.load_state_dict(scripted.state_dict())"
            )
        if "quantized" in type(module).__module__:
            return (
                f"a quantised network cannot be trained: layer '{name}' "
                f"({type(module).__name__}) holds integers, which have no gradient; train the "
                "network in float32 and quantise it afterwards"
            )
    error = found.training.error
    if isinstance(error, OutputError):
        return f"expected a tensor of logits from the network in training mode, {error}"
    if error is not None:
        return failed_in(error, "the network", None, mode="in training mode")
    reason = found.traits.no_gradient or found.training.no_gradient
    if reason:
        return (
            "the network cannot be trained against attacks because no gradient reaches the image: "
            f"{reason}; remove torch.no_grad(), .detach() and conversions to NumPy from forward "
            "(to keep weights fixed, set their requires_grad to False)"
        )
    return ""


def _needs_wrapper(traits: Traits) -> bool:
    return (
        not traits.channels_last
        or traits.output != "tensor"
        or traits.cast
        or traits.in_place
        or traits.detaches
        or traits.pairs
    )


def _say(notes: tuple[str, ...], title: str) -> None:
    if launched().rank == 0:
        for note in notes:
            warnings.warn(f"{title}: {note}", CureNote, stacklevel=2)
