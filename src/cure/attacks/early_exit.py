"""The four parts of AutoAttack's standard version, with less work for the same results.

The classes derive from those of pyautoattack and keep its images, targets, random numbers and
steps; only the loops are replaced.  This is the one module that uses internals of the package, so
it asks for one version of it.

- An image that is fooled is dropped from the batch.  No image depends on another: random numbers
  are drawn for the whole batch, as the package draws them, before anything is dropped.
- FAB projects on a hyperplane by Newton's method instead of sorting all pixels; in L2 this is
  also more accurate than the package's running sums in float32 (error 3e-5 against 3e-2 at worst
  on random planes), so there the two drift apart by rounding.
- Square (Linf) changes the pixels of its square only, computes no cross-entropy, and of the first
  feature maps only what the square reaches (:mod:`cure.attacks.local_forward`).

Source: Croce & Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks, ICML 2020; FAB: Croce & Hein, ICML 2020; Square: Andriushchenko et al., ECCV
2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from cure.attacks.local_forward import LocalNetwork
from cure.attacks.threat import Threat
from cure.errors import ConfigError

PACKAGE_VERSION = "0.2.0"
"""Of pyautoattack, as in pyproject.toml."""

STEPS, TARGETS, QUERIES = 100, 9, 5000
"""Steps of APGD and FAB, target classes, and queries of Square in the standard version."""

NONE_FOUND = 1e10
"""The package's length of the fooling change before one is found."""

CLEAR = 1e-4
"""Lead of a wrong logit that rounding in another batch cannot reverse."""


class PlainLayout(nn.Module):
    """A network with the channel innermost, for attacks that keep it outermost.

    AutoAttack reshapes gradients in a way that fails on images stored with the channel innermost,
    and arithmetic between the two layouts is slow.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        # A copy, so that the hook sees the gradient that comes out of the network, and a network
        # that changes its input in place does not change the attack's image.
        inside = image.clone(memory_format=torch.channels_last)
        if inside.requires_grad:
            inside.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
        # Lower precision ends here: the attacks subtract logits from each other.
        logits: Tensor = self.model(inside).to(image.dtype)
        return logits


def standard_part(
    part: str, model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int
) -> Tensor:
    """One part of the standard version on one batch.

    Args:
        part: "apgd-ce", "apgd-t", "fab-t" or "square".
        model: in evaluation mode, no parameter requires a gradient.
        image: [B, C, H, W] contiguous, classified right.
        label: [B].
        threat: the ball, Linf or L2.
        seed: of PyTorch's global generator, which is seeded at the beginning of each batch.

    Returns:
        [B, C, H, W]: a fooling image in the ball where one was found, else the image itself.
    """
    attack = early_exit(part, PlainLayout(model), image, threat, seed)
    with torch.no_grad():
        found: Tensor = attack.perturb(image, label)
    return found


def early_exit(part: str, network: nn.Module, image: Tensor, threat: Threat, seed: int) -> Any:
    """The attack of one part, with the settings of the package's standard version.

    Args:
        part: "apgd-ce", "apgd-t", "fab-t" or "square".
        network: in evaluation mode, takes contiguous images and gives contiguous gradients.
        image: [B, C, H, W] contiguous, for the number of classes and the device.
        threat: the ball, Linf or L2.
        seed: see :func:`standard_part`.

    Returns:
        An object with the package's methods ``perturb`` and ``attack_single_run``.

    Raises:
        ConfigError: when another version of pyautoattack is installed.
    """
    installed = version("pyautoattack")
    if installed != PACKAGE_VERSION:
        raise ConfigError(
            f"expected pyautoattack {PACKAGE_VERSION}, whose internals AutoAttack uses here, got "
            f"{installed}; pip install pyautoattack=={PACKAGE_VERSION}"
        )
    with torch.no_grad():
        targets = min(TARGETS, network(image[:1]).shape[1] - 1)
    common = {
        "norm": threat.norm,
        "eps": threat.epsilon,
        "seed": seed,
        "device": image.device,
        "n_restarts": 1,
    }
    if part == "apgd-ce":
        return EarlyExitAPGD(network, n_iter=STEPS, **common)
    if part == "apgd-t":
        return EarlyExitTargetedAPGD(network, n_iter=STEPS, n_target_classes=targets, **common)
    if part == "fab-t":
        return EarlyExitFAB(
            network, n_iter=STEPS, targeted=True, n_target_classes=targets, **common
        )
    return FastSquare(network, n_queries=QUERIES, resc_schedule=False, **common)


class EarlyExit:
    """APGD loop that drops misclassified samples from the batch."""

    def attack_single_run(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fooling images where found; see ``APGDAttack.attack_single_run`` for what is returned."""
        epsilon, steps = self.eps, self.n_iter
        # Drawn for all, as the package does, so that the stream of numbers is the same.
        if self.norm == "Linf":
            noise = 2 * torch.rand(x.shape).to(x.device) - 1
        else:
            noise = torch.randn(x.shape).to(x.device)
        found, stands = x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
        state = {
            "index": torch.arange(len(x), device=x.device),
            "image": x,
            "label": y,
            "point": (x + epsilon * self.normalize(noise)).clamp(0.0, 1.0),
            "step_size": torch.full((len(x), 1, 1, 1), 2.0 * epsilon, device=x.device),
            "reduced": torch.ones(len(x), device=x.device),
            "losses": torch.zeros(len(x), steps, device=x.device),
        }
        if self.y_target is not None:
            state["target"] = self.y_target
        if self.norm == "Linf":
            state["low"], state["high"] = x - epsilon, x + epsilon

        def ask() -> tuple[Tensor, Tensor]:
            """Losses and gradients at the points; clearly misclassified samples are dropped."""
            point = state["point"].requires_grad_()
            with torch.enable_grad():
                logits = self.model(point)
                losses = self._losses(logits, state)
                (gradient,) = torch.autograd.grad(losses.sum(), point)
            state["point"], losses = point.detach(), losses.detach()
            logits = logits.detach()
            own = logits.gather(1, state["label"][:, None]).flatten()
            wrong = logits.argmax(dim=1) != state["label"]
            if bool(wrong.any()):
                found[state["index"][wrong]] = state["point"][wrong]
                stands[state["index"][wrong]] = False
                # One that is narrowly misclassified stays: in another batch it may be right.
                stays = ~(wrong & (logits.amax(dim=1) - own > CLEAR))
                for name, value in state.items():
                    state[name] = value[stays]
                losses, gradient = losses[stays], gradient[stays]
            return losses, gradient

        losses, gradient = ask()
        state |= {
            "before": state["point"].clone(),
            "best": state["point"].clone(),
            "gradient": gradient,
            "best_gradient": gradient.clone(),
            "best_loss": losses.clone(),
            "best_loss_checked": losses.clone(),
        }
        period, since_check = self.n_iter_2, 0
        for step in range(steps):
            if not len(state["index"]):
                break
            before, state["before"] = state["before"], state["point"]
            state["point"] = self._moved(state, before, 0.75 if step > 0 else 1.0)
            losses, gradient = ask()
            state["gradient"] = gradient
            state["losses"][:, step] = losses
            better = losses > state["best_loss"]
            state["best"][better] = state["point"][better]
            state["best_gradient"][better] = gradient[better]
            state["best_loss"][better] = losses[better]
            since_check += 1
            if since_check == period:
                self._check_step_size(state, step, period)
                since_check, period = 0, max(period - self.size_decr, self.n_iter_min)
        return found, stands, losses, found

    def _losses(self: Any, logits: Tensor, state: dict[str, Tensor]) -> Tensor:
        """What is maximised, one number a sample [B]."""
        if "target" in state:
            self.y_target = state["target"]
            targeted: Tensor = self.dlr_loss_targeted(logits, state["label"])
            return targeted
        return nn.functional.cross_entropy(logits, state["label"], reduction="none")

    def _moved(self: Any, state: dict[str, Tensor], before: Tensor, share: float) -> Tensor:
        image, point = state["image"], state["point"]
        momentum = (point - before) * (1 - share)
        if self.norm == "Linf":
            low, high = state["low"], state["high"]
            moved = point + state["step_size"] * torch.sign(state["gradient"])
            moved = torch.minimum(torch.maximum(moved, low), high).clamp_(0.0, 1.0)
            moved = point + (moved - point) * share + momentum
            return torch.minimum(torch.maximum(moved, low), high).clamp_(0.0, 1.0)
        moved = self._in_ball(image, point + state["step_size"] * self.normalize(state["gradient"]))
        return self._in_ball(image, point + (moved - point) * share + momentum)  # type: ignore[no-any-return]

    def _in_ball(self: Any, image: Tensor, point: Tensor) -> Tensor:
        change = point - image
        length = (change**2).flatten(1).sum(dim=1).sqrt().view(-1, 1, 1, 1)
        kept = self.normalize(change) * length.clamp_max(self.eps)
        inside: Tensor = (image + kept).clamp_(0.0, 1.0)
        return inside

    def _check_step_size(self: Any, state: dict[str, Tensor], step: int, period: int) -> None:
        """Halve the steps of samples without progress, which restart at their best point."""
        recent = state["losses"][:, max(step - period, 0) : step + 1]
        rises = (recent[:, 1:] > recent[:, :-1]).sum(dim=1)
        if step < period:
            # The package compares the first loss with the row before the first: the last, zeros.
            rises = rises + (state["losses"][:, 0] > 0)
        stuck = (rises <= period * self.thr_decr) | (
            (state["reduced"] == 0) & (state["best_loss_checked"] >= state["best_loss"])
        )
        state["reduced"] = stuck.float()
        state["best_loss_checked"] = state["best_loss"].clone()
        state["step_size"][stuck] /= 2.0
        state["point"][stuck] = state["best"][stuck]
        state["gradient"][stuck] = state["best_gradient"][stuck]


class EarlyExitAPGD(EarlyExit, APGDAttack):  # type: ignore[misc]
    """APGD on cross-entropy."""


class EarlyExitTargetedAPGD(EarlyExit, APGDAttack_targeted):  # type: ignore[misc]
    """APGD on the targeted DLR loss."""


class EarlyExitFAB(FABAttack_PT):  # type: ignore[misc]
    """Targeted FAB from the image itself; a sample with a fooling image in the ball is dropped."""

    def attack_single_run(
        self,
        x: Tensor,
        y: Tensor,
        use_rand_start: bool = False,
        is_targeted: bool = True,
    ) -> Tensor:
        """The nearest fooling images found, else the images; one restart, no random number."""
        if use_rand_start or not is_targeted:
            raise ValueError("expected the targeted form without a random start")
        found = x.clone()
        logits = self.predict(x)
        index = (logits.argmax(dim=1) == y).nonzero().flatten()
        state = {
            "index": index,
            "image": x[index],
            "label": y[index],
            "target": logits.sort(dim=-1)[1][index, -self.target_class],
            "point": x[index],
            "nearest": x[index],
            "length": torch.full((len(index),), NONE_FOUND, device=x.device),
        }
        for _ in range(self.n_iter):
            if not len(state["index"]):
                break
            state["point"] = self._stepped(state)
            fooled = self.predict(state["point"]).argmax(dim=1) != state["label"]
            self._take(state, fooled, found)
        rest = state["length"] < NONE_FOUND
        found[state["index"][rest]] = state["nearest"][rest]
        return found

    def _margin(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Lead of the target's logit over the label's [B], and its gradient [B, C, H, W]."""
        point = state["point"].requires_grad_()
        with torch.enable_grad():
            logits = self.predict(point)
            own = logits.gather(1, state["label"][:, None])
            margin = (logits.gather(1, state["target"][:, None]) - own).flatten()
            (gradient,) = torch.autograd.grad(margin.sum(), point)
        state["point"] = point.detach()
        return margin.detach(), gradient

    def _stepped(self, state: dict[str, Tensor]) -> Tensor:
        """The points after one step: towards the linearised boundary, and towards the image."""
        margin, gradient = self._margin(state)
        image, point, normal = state["image"], state["point"], gradient.flatten(1)
        offset = (normal * point.flatten(1)).sum(dim=1) - margin
        step = projection(point.flatten(1), normal, offset, self.norm)
        from_image = projection(image.flatten(1), normal, offset, self.norm)
        length = self._length(step).clamp_min(1e-8)
        share = length / (length + self._length(from_image).clamp_min(1e-8))
        share = share.clamp(0.0, self.alpha_max).view(-1, 1, 1, 1)
        step, from_image = step.view_as(point), from_image.view_as(point)
        towards = (point + self.eta * step) * (1 - share)
        back = (image + self.eta * from_image) * share
        moved: Tensor = (towards + back).clamp_(0.0, 1.0)
        return moved

    def _length(self, change: Tensor) -> Tensor:
        if self.norm == "Linf":
            return change.abs().amax(dim=1)
        return (change**2).sum(dim=1).sqrt()

    def _take(self, state: dict[str, Tensor], fooled: Tensor, found: Tensor) -> None:
        """Record the fooling points; those outside the ball move back, those inside are dropped."""
        rows = fooled.nonzero().flatten()
        if not len(rows):
            return
        image, point = state["image"][rows], state["point"][rows]
        length = self._length((point - image).flatten(1))
        nearer = length < state["length"][rows]
        state["nearest"][rows[nearer]] = point[nearer]
        state["length"][rows[nearer]] = length[nearer]
        state["point"][rows] = image + (point - image) * self.beta
        inside = state["length"] <= self.eps
        if bool(inside.any()):
            found[state["index"][inside]] = state["nearest"][inside]
            for name, value in state.items():
                state[name] = value[~inside]


def projection(point: Tensor, normal: Tensor, offset: Tensor, norm: str) -> Tensor:
    """The shortest change d with ``normal . (point + d) = offset`` and ``point + d`` in [0, 1].

    Along the hyperplane's normal every pixel moves until it meets 0 or 1:
    ``d_i = -sign_i min(lambda v_i, room_i)`` with ``v_i = 1`` (Linf) or ``|normal_i|`` (L2), and
    ``lambda`` is the root of the concave, piecewise linear
    ``sum_i |normal_i| min(lambda v_i, room_i) - |normal . point - offset|``, which Newton's
    method reaches from below in a few steps.  Where there is none, every pixel goes as far as it
    can.

    Args:
        point: [B, D] in [0, 1].
        normal: [B, D].
        offset: [B].
        norm: "Linf" or "L2", in which the change is shortest.

    Returns:
        [B, D].
    """
    gap = (normal * point).sum(dim=1) - offset
    sign = torch.sign(normal) * torch.where(gap >= 0, 1.0, -1.0)[:, None]
    weight, gap = normal.abs(), gap.abs()
    room = torch.where(sign > 0, point, 1 - point)
    speed = torch.ones_like(weight) if norm == "Linf" else weight
    if norm == "L2":
        sign = torch.where(weight > 1e-8, sign, 0.0)
    slope, reach = weight * speed, weight * room
    far = torch.full_like(gap, 1e12)
    factor, stopped = gap / slope.sum(dim=1).clamp_min(1e-30), None
    while True:
        at_end = room < factor[:, None] * speed
        count = at_end.sum(dim=1)
        if stopped is not None and bool((count <= stopped).all()):
            break
        left = torch.where(at_end, 0.0, slope).sum(dim=1)
        missing = gap - torch.where(at_end, reach, 0.0).sum(dim=1)
        moved = torch.where(left > 0, missing / left.clamp_min(1e-30), far)
        # From below it only rises; rounding must not undo that.
        factor, stopped = torch.maximum(moved, factor).clamp_max(1e12), count
    return -sign * torch.minimum(factor[:, None] * speed, room)


class _Tile:
    """A pattern of the first tiling, cut off at the edge of the image when it is viewed."""

    def __init__(self, pattern: Tensor, height: int, width: int) -> None:
        self.cut = pattern[:height, :width]

    def view(self, *shape: int) -> Tensor:  # noqa: ARG002 - the package asks for the whole tile
        """[1, 1, height, width]."""
        return self.cut[None, None]


class AnySizeSquare(SquareAttack):  # type: ignore[misc]
    """Square attack on images of any height and width, as the package's where that runs.

    In L2 and L1 the package begins with square tiles of a fifth of the height, and fails where
    they do not end inside the image: here they are cut off.
    """

    _tiles: Iterator[tuple[int, int]] = iter(())

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Number of queries and the best images found.

        Raises:
            ConfigError: in L2 and L1 for images less than 5 pixels high.
        """
        height, width = x.shape[2:]
        if self.norm != "Linf" and height < 5:
            raise ConfigError(
                f"square in {self.norm} begins with tiles of a fifth of the height: expected "
                f"images at least 5 pixels high, got {height}x{width}; give larger images, or "
                "attacks without it (pgd20, apgd-ce, apgd-t)"
            )
        side = max(1, height // 5)
        first = (height - side * 5) // 2
        if self.norm != "Linf":
            rows = [max(0, min(side, height - first - n * side)) for n in range(height // side)]
            columns = [max(0, min(side, width - first - n * side)) for n in range(width // side)]
            self._tiles = iter([(row, column) for row in rows for column in columns])
        queries, best = super().attack_single_run(x, y)
        return queries, best

    def eta(self, s: int) -> Tensor | _Tile:
        """The pattern of side ``s``; cut off while the image is tiled first."""
        pattern, size = self.pattern(s), next(self._tiles, None)
        return pattern if size is None else _Tile(pattern, *size)

    def pattern(self, s: int) -> Tensor:
        """The package's pattern of side ``s``."""
        made: Tensor = super().eta(s)
        return made


class FastSquare(AnySizeSquare):
    """Square attack, margin loss, untargeted."""

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The lead of the label over the best other class [B], twice."""
        logits = self.predict(x)
        rows = torch.arange(len(x), device=x.device)
        own = logits[rows, y].clone()
        logits[rows, y] = -float("inf")
        margin = own - logits.amax(dim=-1)
        return margin, margin

    def pattern(self, s: int) -> Tensor:
        """The pattern of the L2 form, side ``s``; the package makes it anew at every query."""
        kept = self.__dict__.setdefault("_patterns", {})
        if s not in kept:
            pattern = torch.zeros([s, s], device=self.device)
            pattern[: s // 2] = self.eta_rectangles(s // 2, s)
            pattern[s // 2 :] = -self.eta_rectangles(s - s // 2, s)
            kept[s] = pattern / (pattern**2).sum(dim=(0, 1), keepdim=True).sqrt()
        turned = bool(torch.rand([1]) > 0.5)
        made: Tensor = kept[s]
        return made.permute([1, 0]) if turned else made

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Number of queries (not counted here, zeros) and the best images found."""
        if self.norm != "Linf":
            queries, best = super().attack_single_run(x, y)
            return queries, best
        channels, height, width = x.shape[1:]
        pixels = x[0].numel()
        best = (x + self.eps * self.random_choice([len(x), channels, 1, width])).clamp(0.0, 1.0)
        margin, _ = self.margin_and_loss(best, y)
        queries = torch.zeros(len(x), device=x.device)
        if bool((margin < 0).all()):
            return queries, best
        found = best.clone()
        low, high = (x - self.eps).clamp_min(0.0), (x + self.eps).clamp_max(1.0)
        index = torch.arange(len(x), device=x.device)
        local = next((m for m in self.predict.modules() if isinstance(m, LocalNetwork)), None)
        planned = 0
        for query in range(self.n_queries):
            stands = margin > 0
            if not bool(stands.all()):
                found[index[~stands]] = best[~stands]
                index, best, margin = index[stands], best[stands], margin[stands]
                low, high, y = low[stands], high[stands], y[stands]
                if not len(index):
                    break
                if local is not None and planned:
                    local.select(stands)
            side = max(round(math.sqrt(self.p_selection(query) * pixels / channels)), 1)
            side = min(side, height, width)
            if local is not None and side != planned:
                local.begin(best.clone(memory_format=torch.channels_last), side)
                planned = side
            top, left = (
                int(self.random_int(0, height - side)),
                int(self.random_int(0, width - side)),
            )
            change = 2.0 * self.eps * self.random_choice([channels, 1, 1])
            square = (..., slice(top, top + side), slice(left, left + side))
            # Outside the square nothing changes, so the rest of the image is left alone.
            before = best[square].clone()
            best[square] = torch.minimum(torch.maximum(before + change, low[square]), high[square])
            with nullcontext() if local is None else local.changed(top, left, side):
                new, _ = self.margin_and_loss(best, y)
            fools = new <= 0
            if local is not None and bool(fools.any()):
                # What ends the attack on an image is decided by the whole network.
                new[fools], _ = self.margin_and_loss(best[fools], y[fools])
            better = (new < margin) | (new <= 0)
            if local is not None:
                local.settle(better)
            worse = ~better
            best[worse, :, top : top + side, left : left + side] = before[worse]
            margin = torch.where(better, new, margin)
        found[index] = best
        return queries, found
