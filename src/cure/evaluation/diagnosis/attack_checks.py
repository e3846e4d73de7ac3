"""Checks that attack: did the attack that is reported leave what another one finds?"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from cure.attacks import Objective, perturb
from cure.attacks.early_exit import AnySizeSquare
from cure.attacks.losses import MARGIN, cross_entropy
from cure.evaluation.diagnosis.context import RESTARTS, CheckContext, RunAttack
from cure.evaluation.diagnosis.table import (
    CheckStatus,
    Finding,
    beyond,
    check,
    judged,
    short,
    worst,
)
from cure.utils.random import derive

NOISES = 20
QUERIES = 500
DIRECTIONS = 16
SOFT_MARGIN = 10.0
"""Margin of logits at which the softmax passes a gradient, e^-10, far above float32's 1e-7."""

FOLLOWED = 0.1
"""Least share of what a gradient predicts that must come true: an order of magnitude.

Sound networks come to 0.8 or more at epsilon / 4, a natural ResNet-18 to 0.6 (0.8 for one level).
"""

SOUND_GAP = (0.05, 0.10)
"""Shares that warn and fail where PGD-20 is compared with all that a stronger attack does.

Sound networks keep a gap to AutoAttack, of up to 6.2 points in the tables of CURE (ICLR 2024);
AutoAttack took more than 10 from many published ones, broken defences among them (Croce and Hein,
ICML 2020).
"""


TOTAL_GAP = (5.0, 10.0)
"""Points between PGD-20 and all attacks together from which ``total_gap`` warns and fails."""

TARGETS = 9
"""Other classes that ``total_gap`` aims at, as AutoAttack's targeted parts do."""


def pair_margin(logits: Tensor, pair: Tensor) -> Tensor:
    """Logit of one class minus that of another, [B], for pairs [B, 2] of (label, other class)."""
    label, other = logits.gather(1, pair).unbind(dim=1)
    return other - label


@check("gradient_direction", cheap=True)
def gradient_direction(context: CheckContext) -> Finding | str:
    """A step along the gradient raises what it should raise, and about as much.

    The difference of two logits ahead of the image and behind it, ``f(x + s) - f(x - s)``, against
    what its gradient predicts.  A gradient without meaning has the right sign on half of the images
    at an attack's step of epsilon / 4: more than 5 % wrong warns, more than a quarter, half way to
    chance, fails.  A rise of less than ``FOLLOWED`` of the prediction warns, and fails when the
    same is true for a step of one grey level (1/255), below which no image file differs.
    Source: Athalye et al., ICML 2018 (shattered gradients).
    """
    right = context.right
    if not right.any():
        return "no image is classified right"
    other = context.natural.scatter(1, context.label[:, None], -torch.inf).argmax(dim=1)
    pair = torch.stack([context.label, other], dim=1)
    gradient = context.gradient(pair_margin, pair)
    direction = context.threat.steepest(gradient)

    def follow(length: float) -> tuple[Tensor, float]:
        ahead = (context.image + length * direction).clamp(0, 1)
        behind = (context.image - length * direction).clamp(0, 1)
        rise = pair_margin(context.logits(ahead), pair) - pair_margin(context.logits(behind), pair)
        predicted = (gradient * (ahead - behind)).flatten(1).sum(dim=1)
        known = right & (predicted > 0)
        return rise, float((rise / predicted)[known].median()) if known.any() else 0.0

    step = context.threat.epsilon / 4
    width = 1.0 if context.threat.norm == "Linf" else math.sqrt(context.image[0].numel())
    rise, at_step = follow(step)
    _, at_level = follow(min(step, width / 255))
    wrong, count = int((right & (rise <= 0)).sum()), int(right.sum())
    measured = {
        "images_without_rise": wrong,
        "of": count,
        "rise_over_predicted": short(at_step),
        "rise_over_predicted_for_one_grey_level": short(at_level),
    }
    status = beyond(wrong, count, 0.05, 0.25)
    if at_step < FOLLOWED:
        status = worst(status, "fail" if at_level < FOLLOWED else "warn")
    return judged(
        status,
        measured,
        "A step along the gradient raises the other class, as it should.",
        "A step along the gradient raises the other class less than the gradient predicts: it is "
        "not that of the network, or turns within a step (shattered). Attack with gradients "
        "averaged over noise, through a differentiable stand-in (BPDA), or without them (Square).",
    )


@check("single_step")
def single_step(context: CheckContext) -> Finding:
    """Many steps find what one step finds.  Source: Carlini et al., 2019."""
    one = context.withstand(context.after_pgd20, context.pgd("one step", 1, 1, random=False))
    only = context.after_pgd20 & ~one
    return judged(
        beyond(int(only.sum()), context.count),
        context.points(only),
        "One step finds nothing that twenty steps have not found.",
        "One step (FGSM) fools images that twenty steps (PGD-20) do not: the loss is too rough for "
        "the steps, as where gradients are masked. Use smaller steps, keep the worst of all steps, "
        "and attack with gradients averaged over noise or without gradients.",
    )


@check("convergence")
def convergence(context: CheckContext) -> Finding:
    """More steps and restarts come to an end.  Source: Carlini et al., 2019.

    What the last restart still finds is judged by the usual limits; what all of them find beyond
    PGD-20 by those of ``families``, which say how far PGD-20 is from AutoAttack on sound networks.
    """
    stages = [context.after_pgd20, *context.restarts]
    last, more = stages[-2] & ~stages[-1], stages[0] & ~stages[-1]
    accuracies = [short(100 * int(stage.sum()) / context.count) for stage in stages]
    names = ["pgd20", *(f"pgd100x{restart + 1}" for restart in range(RESTARTS))]
    measured = {
        "accuracy": dict(zip(names, accuracies, strict=True)),
        **context.points(more),
        "images_by_last_restart": int(last.sum()),
    }
    return judged(
        worst(
            beyond(int(last.sum()), context.count),
            beyond(int(more.sum()), context.count, *SOUND_GAP),
        ),
        measured,
        "More steps and restarts come to an end near the accuracy of PGD-20.",
        "More steps and restarts find many more images, so PGD-20 has not converged and its "
        "accuracy is too high. Report an attack with more steps and restarts, or AutoAttack.",
    )


@check("families")
def families(context: CheckContext) -> Finding:
    """Other losses and steps find hardly more than cross-entropy; the limits are ``SOUND_GAP``."""
    found = {name: context.after_restarts & ~left for name, left in context.after_families.items()}
    more = context.after_restarts & ~context.after_white_box
    measured = {
        **context.points(more),
        **{f"images_by_{name}": int(fooled.sum()) for name, fooled in found.items()},
    }
    return judged(
        beyond(int(more.sum()), context.count, *SOUND_GAP),
        measured,
        "Attacks on other losses find hardly more than attacks on cross-entropy.",
        "Attacks on the margin of the logits, or with other steps, fool many images that attacks "
        "on cross-entropy do not: PGD's accuracy is too high. Report the worst case over attacks, "
        "or AutoAttack.",
    )


@check("precision")
def precision(context: CheckContext) -> Finding:
    """Dividing large logits, which changes no decision, finds nothing more.

    Each image's logits are divided so that its margin is at most ``SOFT_MARGIN``; an image
    whose margin is smaller is attacked as it was.
    Source: Carlini and Wagner, S&P 2017 (defensive distillation).
    """
    top = context.natural.topk(2, dim=1).values
    excess = (top[:, 0] - top[:, 1]) / SOFT_MARGIN
    large = excess > 1

    def run(image: Tensor, label: Tensor, number: int) -> Tensor:
        with torch.no_grad():
            highest = context.model(image).topk(2, dim=1).values
        scale = ((highest[:, 0] - highest[:, 1]) / SOFT_MARGIN).clamp_min(1)[:, None]
        softened = Objective(lambda logits, label, _: cross_entropy(logits / scale, label))
        return context.pgd("softened", 20, 1 / 4, softened)(image, label, number)

    tried = context.after_pgd20 & large
    more = tried & ~context.withstand(tried, run)
    measured = {
        **context.points(more),
        "images_with_large_margin": int((large & context.right).sum()),
        "median_margin": short((top[:, 0] - top[:, 1]).median()),
    }
    return judged(
        beyond(int(more.sum()), context.count),
        measured,
        "Logits are small enough for float32: dividing them finds nothing more.",
        "The same attack on divided logits fools more: logits are so large that the softmax "
        "rounds to 1 and the gradient of cross-entropy to 0. Attack the margin (cw) or the ratio "
        "of logits (AutoAttack), or divide the logits by a constant.",
    )


@check("smoothed_gradient")
def smoothed_gradient(context: CheckContext) -> Finding:
    """A gradient that is smoothed by differences finds nothing more than the one at a point.

    ``sum_k (z(x + u_k) - z(x - u_k)) u_k`` over random directions ``u_k`` half as long as epsilon,
    cut off where they leave [0, 1], is up to a factor the gradient of the logits averaged over the
    ball: what is rougher than the attack is levelled, and no derivative is asked for.
    Source: Athalye et al., ICML 2018; Ilyas et al., ICML 2018 (finite differences).
    """
    radius = context.threat.epsilon / 2

    def run(image: Tensor, label: Tensor, number: int) -> Tensor:
        draws = context.draws("smoothed", number)

        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                many = x.repeat(DIRECTIONS, 1, 1, 1)
                normal = torch.randn(many.shape, generator=draws, device=many.device)
                direction = radius * context.threat.steepest(normal)
                ahead, behind = (many + direction).clamp(0, 1), (many - direction).clamp(0, 1)
                direction = (ahead - behind) / (2 * radius)
                difference = context.model(ahead) - context.model(behind)
                logits: Tensor = context.model(x)
            # Adds nothing to the value; its derivative by x is the sum above.
            moved = (x - x.detach()).repeat(DIRECTIONS, 1, 1, 1)
            along = (direction * moved).flatten(1).sum(dim=1, keepdim=True)
            joined: Tensor = (difference * along).reshape(DIRECTIONS, *logits.shape).sum(dim=0)
            return logits + joined

        return perturb(
            forward,
            lambda logits: MARGIN(logits, label, None),
            image,
            context.threat,
            steps=20,
            step_size=context.threat.epsilon / 4,
            start="uniform",
            generator=draws,
        )

    more = context.after_white_box & ~context.withstand(context.after_white_box, run, DIRECTIONS)
    return judged(
        beyond(int(more.sum()), context.count),
        {**context.points(more), "directions": DIRECTIONS},
        "A gradient smoothed over the ball finds nothing more.",
        "A gradient smoothed over the ball fools images that the one at a point does not, which is "
        "zero or shattered. Report an attack that averages gradients over noise, a differentiable "
        "stand-in (BPDA), or AutoAttack with more queries of Square.",
    )


@check("noise")
def noise(context: CheckContext) -> Finding:
    """Random changes of the same size find nothing more than the attack."""
    draws = context.draws("noise")

    def inside(image: Tensor, *_: object) -> Tensor:
        return (image + context.threat.sample(image, draws)).clamp(0, 1)

    def at_the_edge(image: Tensor, *_: object) -> Tensor:
        direction = torch.randn(image.shape, generator=draws, device=image.device)
        return (image + context.threat.epsilon * context.threat.steepest(direction)).clamp(0, 1)

    standing = context.after_pgd20
    for draw in range(NOISES):
        standing = context.withstand(standing, at_the_edge if draw % 2 else inside)
    found = context.after_pgd20 & ~standing
    return judged(
        beyond(int(found.sum()), context.count),
        {**context.points(found), "draws": NOISES},
        "Random noise finds nothing that PGD-20 has not found.",
        "Random noise of the same size fools images that PGD-20 does not: the attack does not find "
        "these changes. See what the other checks say of gradients.",
    )


@check("black_box")
def black_box(context: CheckContext) -> Finding:
    """An attack without gradients finds nothing more than those with gradients.

    Source: Carlini et al., 2019; Square: Andriushchenko et al., ECCV 2020.
    """

    def run(image: Tensor, label: Tensor, number: int) -> Tensor:
        square = AnySizeSquare(
            context.model,
            norm=context.threat.norm,
            eps=context.threat.epsilon,
            n_queries=QUERIES,
            seed=derive(context.seed, "diagnosis", "square", number) % 2**31,
            device=image.device,
        )
        with torch.no_grad():
            found: Tensor = square.perturb(image.contiguous(), label)
        return found

    more = context.after_white_box & ~context.withstand(context.after_white_box, run)
    return judged(
        beyond(int(more.sum()), context.count),
        {**context.points(more), "queries": QUERIES},
        f"Square with {QUERIES} queries finds hardly more than attacks that see the gradient.",
        "Square, which sees no gradient, fools images that attacks with gradients do not: "
        "gradients are masked and their accuracy is too high. Report AutoAttack or Square with "
        "more queries, and an attack made for this network.",
    )


@check("transfer")
def transfer(context: CheckContext) -> Finding | str:
    """Images made on another network fool no more.  Source: Carlini et al., 2019."""
    if context.other is None:
        return "no other network was given (--transfer)"
    left = context.after_white_box
    for objective in (cross_entropy, MARGIN.function):
        run = context.pgd("transfer", 20, 1 / 4, Objective(objective), model=context.other)
        left = context.withstand(left, run)
    more = context.after_white_box & ~left
    return judged(
        beyond(int(more.sum()), context.count),
        context.points(more),
        "Images made on the other network find hardly more than attacks on this one.",
        "Images made on the other network fool this one where attacks on itself do not: gradients "
        "are masked. Report the worst case over both, and an attack made for this network.",
    )


@check("growing_epsilon")
def growing_epsilon(context: CheckContext) -> Finding:
    """Accuracy falls to 0 when the ball grows until it holds every image.

    An image that is fooled in a ball is fooled in every larger one, and is not attacked again.
    Source: Carlini et al., 2019 (unbounded attacks reach 0).
    """
    threat, standing = context.threat, context.after_white_box
    # Linf: the difference of black and white.  L2: that of all values.
    whole = 1.0 if threat.norm == "Linf" else math.sqrt(context.image[0].numel())
    epsilon = threat.epsilon
    curve = {f"{epsilon:.4g}": short(100 * int(standing.sum()) / context.count)}
    while epsilon < whole:
        epsilon = min(2 * epsilon, whole)
        ball = type(threat)(threat.norm, epsilon)
        for objective in (cross_entropy, MARGIN.function):
            name = f"epsilon {epsilon}"
            attack = Objective(objective)
            # From the image itself: in such a ball a random start alone would fool many.
            run = context.pgd(name, 40, 1 / 10, attack, threat=ball, random=False)
            standing = context.withstand(standing, run, in_ball=False)
        curve[f"{epsilon:.4g}"] = short(100 * int(standing.sum()) / context.count)
    return judged(
        beyond(int(standing.sum()), context.count),
        {"accuracy_by_epsilon": curve, **context.points(standing)},
        "Accuracy reaches 0 when the attack may change everything.",
        "Images withstand an attack that may turn them into any image: the attack fails, not the "
        "image withstands. See what the other checks say of gradients.",
    )


@check("training_mode")
def training_mode(context: CheckContext) -> Finding:
    """Nothing that defends works in training mode only, which no evaluation sees.

    PyTorch's own modules stay in evaluation mode: dropout and BatchNorm differ by design.  It warns
    when more than 5 points of adversarial images are right in training mode, where dropout that is
    written as a function may move some.  It never fails: the number is that of evaluation mode.
    """
    fooled = context.right & ~context.after_pgd20
    own = [
        (module, module.training)
        for module in context.given.modules()
        if not isinstance(module, (_NormBase, _DropoutNd))
        and not type(module).__module__.startswith("torch.nn")
    ]
    try:
        for module, _ in own:
            module.training = True
        restored = fooled & context.correct(context.pgd20_images)
        changed = context.logits(context.image).argmax(dim=1) != context.natural.argmax(dim=1)
    finally:
        for module, training in own:
            module.training = training
    return judged(
        beyond(int(restored.sum()), context.count, 0.05, 1.0),
        {**context.points(restored), "natural_predictions_changed": int(changed.sum())},
        "In training mode the network withstands no more than in evaluation mode.",
        "In training mode the network withstands images that fool it in evaluation mode, which is "
        "what is measured: a defence that acts in training mode only. Let it act in evaluation "
        "mode, or leave it out.",
    )


@check("total_gap")
def total_gap(context: CheckContext) -> Finding:
    """PGD-20 is near the worst of all attacks of the diagnosis, image by image.

    All that the checks before it found inside the ball, and PGD-20 on the margin to each of the
    ``TARGETS`` most likely other classes.  It warns from 5 points and fails from 10, provided that
    more than one point is certain: each check may find too little to warn where together they find
    much, as on networks trained with label smoothing.
    Source: Croce and Hein, ICML 2020 (targeted attacks; what AutoAttack takes from PGD).
    """
    left = context.after_white_box & ~context.fooled
    for rank in range(min(TARGETS, context.classes - 1)):
        left = context.withstand(left, _towards(context, rank))
    more = context.after_pgd20 & ~left
    measured = {
        "pgd20": short(100 * int(context.after_pgd20.sum()) / context.count),
        "all_attacks": short(100 * int(left.sum()) / context.count),
        **context.points(more),
    }
    status: CheckStatus = "pass"
    if beyond(int(more.sum()), context.count) != "pass":
        warn, fail = TOTAL_GAP
        found = measured["points"]
        status = "fail" if found >= fail else "warn" if found >= warn else "pass"
    return judged(
        status,
        measured,
        "All attacks together find hardly more than PGD-20.",
        f"PGD-20 leaves {measured['pgd20']} % right and all attacks of this diagnosis together "
        f"{measured['all_attacks']} %: PGD-20 is too high. Report AutoAttack, or the worst case "
        "over several attacks.",
    )


def _towards(context: CheckContext, rank: int) -> RunAttack:
    """PGD-20 on the margin to the other class with the ``rank``-th highest logit."""

    def run(image: Tensor, label: Tensor, number: int) -> Tensor:
        with torch.no_grad():
            others = context.model(image).scatter(1, label[:, None], -torch.inf)
        aim = others.topk(rank + 1, dim=1).indices[:, rank]
        towards = Objective(
            lambda logits, label, _: pair_margin(logits, torch.stack([label, aim], dim=1))
        )
        return context.pgd(f"target {rank}", 20, 1 / 4, towards)(image, label, number)

    return run
