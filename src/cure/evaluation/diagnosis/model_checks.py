"""Checks without an attack: what goes in, what comes out, and whether it is a function at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cure.evaluation.diagnosis.context import CheckContext
from cure.evaluation.diagnosis.table import (
    LEVEL,
    CheckStatus,
    Finding,
    beyond,
    check,
    judged,
    short,
)
from cure.models import Normalised
from cure.utils.memory import is_out_of_memory
from cure.utils.stats import at_least, balanced_accuracy, balanced_guessing, wilson

TOLERANCE = 1e-3
"""Largest difference of two equal calls, as a share of the spread of the logits.

Another order of summation in float32 changes logits by 1e-7 to 1e-5 of their spread; dropout, noise
and random resizing change them by more than 1e-2.
"""

OPTIMISM = 5.0
"""Points by which an accuracy on validation images may flatter.

The best of 25 epochs on 1,000 images is about two standard errors (3 points) too high, and what the
images at hand decide by chance is in the test.
"""

LEAST_SPREAD = 0.05
"""Difference of an image's highest and lowest logit, below which their scale is unusual: logits of
networks with random weights already differ by tenths."""

ONE_CLASS = 0.95
"""Share of the images from which a network is said to name one class only."""

REPEATS = 4
ALONE = 8


def difference(one: Tensor, other: Tensor, spread: Tensor) -> float:
    """Largest difference of two sets of logits as a share of their spread."""
    return short((one - other).abs().max() / spread.std().clamp_min(1e-12))


@check("input", cheap=True, attacks=False)
def input_range(context: CheckContext) -> Finding:
    """Images that fill [0, 1], and weights that are not in half precision."""
    types = {str(p.dtype).removeprefix("torch.") for p in context.given.parameters()}
    half = sorted(types & {"float16", "bfloat16"})
    low, high = float(context.image.min()), float(context.image.max())
    measured = {
        "lowest": short(low),
        "highest": short(high),
        "mean": short(context.image.mean()),
        "weights": sorted(types),
    }
    if high < 1.5 / 255:
        return Finding(
            "fail",
            measured,
            "All images are black: no value is above 1/255. Floats in [0, 1] were stored as whole "
            "numbers; convert them with ImageSet.of, or store 0 to 255.",
        )
    if high - low < 0.25:
        return Finding(
            "warn",
            measured,
            "The images use less than a quarter of [0, 1], in which epsilon is measured. Look at "
            "how they were stored.",
        )
    if half:
        return Finding(
            "warn",
            measured,
            f"Weights are {' and '.join(half)}: small gradients are lost in rounding. Evaluate the "
            "network in float32 (model.float()).",
        )
    return Finding("pass", measured, "Images fill [0, 1] and weights have full precision.")


@check("finite", cheap=True, attacks=False)
def finite(context: CheckContext) -> Finding:
    """No NaN and no infinity, in outputs and gradients, on images, extremes and noise."""
    noise = torch.rand(
        context.image.shape, generator=context.draws("noise images"), device=context.image.device
    )
    extremes = [torch.zeros_like(context.image[:1]), torch.ones_like(context.image[:1]), noise]
    strange = ~context.logits(torch.cat(extremes)).isfinite().all(dim=1)
    outputs = ~context.natural.isfinite().all(dim=1)
    gradients = ~context.loss_gradient.flatten(1).isfinite().all(dim=1)
    measured = {
        "images_with_infinite_logits": int(outputs.sum()),
        "images_with_infinite_gradient": int(gradients.sum()),
        "extreme_or_noise_images_with_infinite_logits": int(strange.sum()),
        "of": context.count,
    }
    if outputs.any() or gradients.any():
        return Finding(
            "fail",
            measured,
            "Logits or gradients are NaN or infinite on images of the data; attacks then go astray "
            "and such images count as withstanding. Look for divisions by 0, roots and logarithms "
            "of 0 and overflows in the network.",
        )
    return judged(
        "warn" if strange.any() else "pass",
        measured,
        "Logits and gradients are finite on the images; logits also on black, white and noise.",
        "Logits are finite on the images but not on black, white or random ones, where strong "
        "attacks may pass. Look for divisions by 0 and overflows in the network.",
    )


@check("logits", cheap=True, attacks=False)
def logits(context: CheckContext) -> Finding:
    """Neither probabilities nor decisions, through which gradients vanish."""
    values = context.natural
    sums = values.sum(dim=1)
    measured = {
        "lowest": short(values.min()),
        "highest": short(values.max()),
        "sums_from": short(sums.min()),
        "sums_to": short(sums.max()),
        "different_values": len(torch.unique(values)),
    }
    inside = bool(((values >= 0) & (values <= 1)).all())
    if context.count > 1 and measured["different_values"] <= context.classes:
        return Finding(
            "fail",
            measured,
            "The network returns decisions or a constant, not logits: it has no useful gradient. "
            "Return the values of its last layer.",
        )
    if inside and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return Finding(
            "fail",
            measured,
            "The network returns probabilities, not logits: gradients vanish through its softmax "
            "and attacks look weaker than they are. Remove the softmax.",
        )
    spread = measured["median_spread"] = short(
        (values.amax(dim=1) - values.amin(dim=1)).nanmedian()
    )
    if spread < LEAST_SPREAD:
        return Finding(
            "warn",
            measured,
            f"The logits of an image differ by {spread:.1g} only: the gradient of the loss almost "
            "vanishes, and attacks that do not rescale logits look weaker than they are. Run `cure "
            "diagnose`, and attack with AutoAttack (its DLR loss rescales logits), or multiply the "
            "logits by a constant.",
        )
    return judged(
        "warn" if inside else "pass",
        measured,
        "The network returns logits: they are neither probabilities nor bounded by [0, 1].",
        "All outputs lie in [0, 1], as after a sigmoid: gradients vanish where it is flat. "
        "Return what goes into the sigmoid, if there is one.",
    )


@check("evaluation_mode", cheap=True, attacks=False)
def evaluation_mode(context: CheckContext) -> Finding:
    """After ``model.eval()`` and a forward pass no module is in training mode."""
    context.logits(context.image[:2])
    left = [
        name or "the network" for name, module in context.given.named_modules() if module.training
    ]
    return judged(
        "fail" if left else "pass",
        {"modules_in_training_mode": len(left), "first": left[:5]},
        "No module is left in training mode.",
        "Modules are in training mode although the network was put into evaluation mode: dropout "
        "drops, or BatchNorm uses the batch's statistics. Let train() and forward() of the network "
        "leave the mode alone.",
    )


@check("determinism", cheap=True, attacks=False)
def determinism(context: CheckContext) -> Finding:
    """The same input gives the same logits, and is not changed."""
    image = context.engine.arrange(context.image[: context.batch_size])
    with torch.no_grad():
        calls = [context.model(image) for _ in range(REPEATS)]
        shown = image.clone()
        context.given(shown)
    changed = not torch.equal(shown, image)
    largest = max(difference(calls[0], other, calls[0]) for other in calls[1:])
    decisions = torch.stack([call.argmax(dim=1) for call in calls])
    measured = {
        "largest_difference": largest,
        "predictions_changed": int((decisions != decisions[0]).any(dim=0).sum()),
        "of": len(image),
        "calls": REPEATS,
        "input_changed_in_place": changed,
    }
    if changed:
        return Finding(
            "fail",
            measured,
            "The network changes the images that it is given, so an attack loses track of them. "
            "Replace operations in place (-=, /=, clamp_) on its input.",
        )
    return judged(
        "fail" if largest > TOLERANCE else "pass",
        measured,
        "The same images give the same logits.",
        "The same images give other logits at every call: the gradient of one call does not fit "
        "the next. Turn the randomness off (dropout, noise, random resizing), or, when it is the "
        "defence, attack its average over many draws (AutoAttack rand).",
    )


@check("batch_dependence", cheap=True, attacks=False)
def batch_dependence(context: CheckContext) -> Finding:
    """An image has the same logits alone, in a batch, and in another order."""
    image = context.image[: context.batch_size]
    together = context.natural[: len(image)]
    backwards = context.logits(image.flip(0)).flip(0)
    alone = torch.cat([context.logits(one[None]) for one in image[:ALONE]])
    spread = context.natural
    measured = {
        "difference_alone": difference(alone, together[:ALONE], spread),
        "difference_in_another_order": difference(backwards, together, spread),
        "images_alone": len(alone),
    }
    largest = max(measured["difference_alone"], measured["difference_in_another_order"])
    return judged(
        "fail" if largest > TOLERANCE else "pass",
        measured,
        "An image has the same logits alone and in a batch.",
        "What the network says of an image depends on the images beside it, so its accuracy is "
        "that of the batches, not of the images. Let BatchNorm use its running statistics and draw "
        "nothing at random.",
    )


@check("normalisation", cheap=True, attacks=False)
def normalisation(context: CheckContext) -> Finding:
    """No usual way to standardise, or to undo it, makes the network better.

    By the exact test of McNemar, on the images that only one of the two gets right; the level is
    shared by the candidates.  Where the network clamps its input to [0, 1], a candidate outside it
    reaches the network as an image of another contrast, so it says nothing of the range that the
    network expects and only warns.  A candidate that the network refuses with an error is not
    what it expects.
    """
    mean = context.image.mean(dim=(0, 2, 3), keepdim=True)
    std = context.image.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
    candidates = {
        "standardised": (context.image - mean) / std,
        "standardising_undone": context.image * std + mean,
        "from_0_to_255": context.image * 255,
        "from_-1_to_1": context.image * 2 - 1,
    }
    measured: dict[str, Any] = {"as_it_is": 100 * float(context.right.float().mean())}
    better: dict[str, float] = {}
    clamped: list[str] = []
    refused: list[str] = []
    for name, image in candidates.items():
        try:
            right = context.correct(image)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            refused.append(name)
            continue
        measured[name] = 100 * float(right.float().mean())
        gained, lost = int((right & ~context.right).sum()), int((context.right & ~right).sum())
        if at_least(gained, gained + lost, 0.5) < LEVEL / len(candidates):
            if _is_clamped(context, image):
                clamped.append(name)
            else:
                better[name] = measured[name]
    measured = {name: short(value) for name, value in measured.items()}
    if refused:
        measured["refused_by_the_network"] = refused
    remedy = {
        "standardised": "It expects standardised images: give mean and std.",
        "standardising_undone": "It takes images as they are, or standardises them itself: leave "
        "out mean and std, or the standardising inside the network.",
        "from_0_to_255": "It expects values from 0 to 255: give mean 0 and std 1/255.",
        "from_-1_to_1": "It expects values from -1 to 1: give mean 0.5 and std 0.5.",
    }
    times = sum(isinstance(module, Normalised) for module in context.given.modules())
    if better:
        best = max(better, key=lambda name: better[name])
        return Finding(
            "fail",
            measured | {"times_standardised": times},
            f"The network is more accurate on images that are treated otherwise ({best}), so it is "
            f"given what it was not trained on. {remedy[best]}",
        )
    if clamped:
        return Finding(
            "warn",
            measured | {"times_standardised": times},
            f"The network clamps its input to [0, 1], and is more accurate on images of another "
            f"contrast ({clamped[0]}, then clamped). It needs no mean and std for that: compare "
            "brightness and contrast of these images with those it was trained on.",
        )
    return judged(
        "warn" if times > 1 else "pass",
        measured | {"times_standardised": times},
        "No other way to standardise the images makes the network more accurate.",
        f"Images are standardised {times} times in a row. Leave out mean and std unless the "
        "network was trained like that.",
    )


def _is_clamped(context: CheckContext, image: Tensor) -> bool:
    """Whether the network gives images that leave [0, 1] the logits of the clamped images."""
    inside = image.clamp(0, 1)
    if torch.equal(inside, image):
        return False
    given, cut = context.logits(image), context.logits(inside)
    return difference(given, cut, cut) <= TOLERANCE


@check("natural_accuracy", cheap=True, attacks=False)
def natural_accuracy(context: CheckContext) -> Finding:
    """Better than guessing and than naming the largest class, and not far below what is known.

    A network that is no more accurate than always naming the largest class warns, and fails when
    its balanced accuracy (mean over the classes) is no better than guessing either.
    """
    right = int(context.right.sum())
    counts = context.label.bincount(minlength=context.classes).tolist()
    of_class = context.label[context.right].bincount(minlength=context.classes).tolist()
    balanced, _, _ = balanced_accuracy(of_class, counts)
    measured = {
        "accuracy": short(100 * right / context.count),
        "interval": [short(limit) for limit in wilson(right, context.count)],
        "of": context.count,
        "expected": context.expected,
        "balanced_accuracy": short(balanced),
        "always_the_largest_class": short(100 * max(counts) / context.count),
    }
    # With one class among the images, always naming it would be right always: nothing to compare.
    several = len(torch.unique(context.label)) > 1
    # Even all right would be no better than guessing by this measure.
    if several and at_least(context.count, context.count, 1 / context.classes) > LEVEL:
        return Finding(
            "warn", measured, f"{context.count} images are too few to tell accuracy from guessing."
        )
    if several and at_least(right, context.count, 1 / context.classes) > LEVEL:
        return Finding(
            "fail",
            measured,
            "The network is not better than guessing on these images. Compare the order of the "
            "classes, the weights and the standardisation with those it was trained with.",
        )
    if several and right <= max(counts):
        guessing = balanced <= balanced_guessing(counts)
        return Finding(
            "fail" if guessing else "warn",
            measured,
            "The network is no more accurate than always naming the largest class"
            + (", and its balanced accuracy is that of guessing" if guessing else "")
            + ". Look at its accuracy by class, and train it with data.sampler=balanced or "
            "training.class_weights=balanced.",
        )
    if context.expected is None:
        return Finding("pass", measured, "Better than guessing; no other accuracy is known of it.")
    least = max(0.0, (context.expected - OPTIMISM) / 100)
    low = 1 - at_least(right + 1, context.count, least) < LEVEL
    return judged(
        "fail" if low else "pass",
        measured,
        "As accurate as its validation images let expect.",
        "Far less accurate than on its validation images: it is given other images or another "
        "standardisation than in training, or other weights than those that were validated.",
    )


@check("one_class", cheap=True, attacks=False)
def one_class(context: CheckContext) -> Finding:
    """The network does not name one class on more than 95 % of the images where the data does not.

    Such a network withstands every attack on the images of that class.  The share has to be
    certainly above that of the class in the data, so that few images decide nothing.
    """
    named = context.natural.argmax(dim=1).bincount(minlength=context.classes)
    most = int(named.argmax())
    count, there = int(named[most]), int((context.label == most).sum())
    measured = {
        "class": context.images.classes[most],
        "percent_of_predictions": short(100 * count / context.count),
        "percent_of_images": short(100 * there / context.count),
    }
    share = there / context.count
    always = count > ONE_CLASS * context.count and share <= ONE_CLASS
    always &= at_least(count, context.count, share) < LEVEL
    return judged(
        "fail" if always else "pass",
        measured,
        "The network predicts more than one class.",
        f"The network predicts '{measured['class']}' for {measured['percent_of_predictions']} % of "
        f"the images, {measured['percent_of_images']} % of which are: no attack can change a "
        "constant prediction. Train it again with data.sampler=balanced or "
        "training.class_weights=balanced, or a lower learning rate.",
    )


@check("gradients", cheap=True)
def gradients(context: CheckContext) -> Finding:
    """Images from which cross-entropy has no gradient: there an attack on it goes nowhere.

    As many points of accuracy as there are such images are not attacked at all.  Units that are
    zero after a ReLU at all images pass no gradient; they are named where the check does not pass,
    and a layer of nothing but such units warns.
    """
    gradient = context.loss_gradient[context.right].flatten(1)
    if not len(gradient):
        return Finding("pass", {"of": 0}, "No image is classified right, so none is attacked.")
    zero = (gradient == 0).all(dim=1)
    measured = {
        **context.points(zero),
        "images_right": len(zero),
        "zero_entries": short((gradient == 0).float().mean()),
        "median_length": short(gradient.norm(dim=1).median()),
        "connected": context.model.connected,
        "error": context.model.error,
    }
    status: CheckStatus = beyond(int(zero.sum()), len(zero))
    dead = _units_that_never_fire(context)
    measured["units_that_never_fire"] = {name: f"{n} of {of}" for name, (n, of) in dead.items()}
    named = "; ".join(f"{n} of {of} in '{name}'" for name, (n, of) in dead.items())
    said = f" Units that never fire on these images: {named}." if dead else ""
    whole = [name for name, (n, of) in dead.items() if n == of]
    if not context.model.connected:
        return Finding(
            "fail",
            measured,
            "No gradient reaches the image: a step of the network is not differentiable or "
            "detached. Attack through a differentiable stand-in for it (BPDA), and without "
            "gradients (Square)." + said,
        )
    if status == "pass" and whole:
        return Finding(
            "warn",
            measured,
            f"No unit after the ReLU of layer '{whole[0]}' fires on any image, so no gradient "
            "passes it and the layer does nothing: lower the learning rate, or check the bias "
            "before it." + said,
        )
    return judged(
        status,
        measured,
        "Cross-entropy has a gradient at the images.",
        "The gradient of cross-entropy is exactly zero at images that are then not attacked. Look "
        "for rounding, thresholds and detached values in the network, and for logits so large that "
        "the softmax is flat; attack a differentiable stand-in (evaluate --attacks bpda-pgd20) or "
        "the margin of the logits." + said,
    )


MOST_LAYERS = 5
"""Layers that are named, those with the largest share of such units."""


class _Rectified(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers which units were above zero after each ReLU, module or function."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: list[str] = []
        self.fired: dict[str, Tensor] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.relu, torch.ops.aten.relu_):
            name = self.inside[-1] if self.inside else "the network"
            # Units are channels of pictures and vectors, the last dimension of sequences.
            axis = found.dim() - 1 if found.dim() == 3 else 1
            over = [d for d in range(found.dim()) if d != axis]
            alive = (found > 0).any(dim=over[0]) if len(over) == 1 else (found > 0).amax(dim=over)
            before = self.fired.get(name)
            self.fired[name] = (
                alive if before is None or before.shape != alive.shape else (before | alive)
            )
        return found


def _units_that_never_fire(context: CheckContext) -> dict[str, tuple[int, int]]:
    """By layer with a ReLU: units that are zero at all images, units in all."""
    watch, handles = _Rectified(), []
    for name, module in context.given.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return {}  # takes no hooks

        def enter(module: nn.Module, args: Any, name: str = name) -> None:  # noqa: ARG001
            watch.inside.append(name or "the network")

        def leave(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            watch.inside.pop()

        handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        with watch:
            context.logits(context.image)
    finally:
        for handle in handles:
            handle.remove()
    dead = {
        name: (int((~fired).sum()), fired.numel())
        for name, fired in watch.fired.items()
        if not bool(fired.all())
    }
    worst_first = sorted(dead.items(), key=lambda item: -item[1][0] / item[1][1])
    return dict(worst_first[:MOST_LAYERS])
