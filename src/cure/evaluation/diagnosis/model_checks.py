"""Checks without an attack: what goes in, what comes out, and whether it is a function at all."""

from __future__ import annotations

import torch
from torch import Tensor

from cure.evaluation.diagnosis.context import CheckContext
from cure.evaluation.diagnosis.table import LEVEL, Finding, Status, beyond, check, judged, short
from cure.models import Normalised
from cure.utils.stats import at_least, wilson

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
    if measured["different_values"] <= context.classes:
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
        "The same images give other logits at every call: an attack chases a moving target. Turn "
        "the randomness off (dropout, noise, random resizing), or, when it is the defence, attack "
        "its average over many draws (AutoAttack rand).",
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
    shared by the candidates.
    """
    mean = context.image.mean(dim=(0, 2, 3), keepdim=True)
    std = context.image.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
    candidates = {
        "standardised": (context.image - mean) / std,
        "standardising_undone": context.image * std + mean,
        "from_0_to_255": context.image * 255,
        "from_-1_to_1": context.image * 2 - 1,
    }
    measured = {"as_it_is": 100 * float(context.right.float().mean())}
    better: dict[str, float] = {}
    for name, image in candidates.items():
        right = context.correct(image)
        measured[name] = 100 * float(right.float().mean())
        gained, lost = int((right & ~context.right).sum()), int((context.right & ~right).sum())
        if at_least(gained, gained + lost, 0.5) < LEVEL / len(candidates):
            better[name] = measured[name]
    measured = {name: short(value) for name, value in measured.items()}
    remedy = {
        "standardised": "It expects standardised images: give mean and std.",
        "standardising_undone": "Images are standardised twice: leave out mean and std, or the "
        "standardising inside the network.",
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
    return judged(
        "warn" if times > 1 else "pass",
        measured | {"times_standardised": times},
        "No other way to standardise the images makes the network more accurate.",
        f"Images are standardised {times} times in a row. Leave out mean and std unless the "
        "network was trained like that.",
    )


@check("natural_accuracy", cheap=True, attacks=False)
def natural_accuracy(context: CheckContext) -> Finding:
    """Better than guessing, and not far below what is known of the network."""
    right = int(context.right.sum())
    measured = {
        "accuracy": short(100 * right / context.count),
        "interval": [short(limit) for limit in wilson(right, context.count)],
        "of": context.count,
        "expected": context.expected,
    }
    # With one class among the images, always naming it would be right always: nothing to compare.
    several = len(torch.unique(context.label)) > 1
    if several and at_least(right, context.count, 1 / context.classes) > LEVEL:
        return Finding(
            "fail",
            measured,
            "The network is not better than guessing on these images. Compare the order of the "
            "classes, the weights and the standardisation with those it was trained with.",
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


@check("gradients", cheap=True)
def gradients(context: CheckContext) -> Finding:
    """Images from which cross-entropy has no gradient: there an attack on it goes nowhere.

    As many points of accuracy as there are such images are not attacked at all.
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
    status: Status = beyond(int(zero.sum()), len(zero))
    if not context.model.connected:
        return Finding(
            "fail",
            measured,
            "No gradient reaches the image: a step of the network is not differentiable or "
            "detached. Attack through a differentiable stand-in for it (BPDA), and without "
            "gradients (Square).",
        )
    return judged(
        status,
        measured,
        "Cross-entropy has a gradient at the images.",
        "The gradient of cross-entropy is exactly zero at images that are then not attacked. Look "
        "for rounding, thresholds and detached values in the network, and for logits so large that "
        "the softmax is flat; attack a differentiable stand-in (BPDA) or the margin of the logits.",
    )
