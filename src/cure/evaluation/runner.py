"""How well a classifier does, with what it was asked: accuracies, intervals, settings, seconds."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.registry import EvaluationAttack, Part, evaluation_attack
from cure.config import Ratio
from cure.data import ImageSet, batches
from cure.evaluation.journal import Identity, Journal, Verdict
from cure.models import digest
from cure.models.checks import check_outputs
from cure.utils.engine import Engine
from cure.utils.stats import median_interval, wilson

Result = dict[str, Any]
Progress = Callable[[str, int, int], None]

WORST = "worst_case"
"""All attacks together, image by image."""

RADII = tuple(
    Ratio(f"{size}/255")
    for size in (
        "0.25",
        "0.5",
        "1",
        "2",
        "4",
        "6",
        "8",
        "12",
        "16",
        "24",
        "32",
        "48",
        "64",
        "128",
        "255",
    )
)


@dataclass(frozen=True)
class Curve:
    """Accuracy over epsilon.

    Attributes:
        attack: a name of :func:`~cure.attacks.registry.evaluation_attack`.
        epsilons: radii; those after the first that leaves no image right are left out.
    """

    attack: str = "pgd20"
    epsilons: tuple[Ratio, ...] = RADII


def no_progress(name: str, done: int, count: int) -> None:
    """Tell nobody."""


def nrr(natural: float, robust: float) -> float:
    """Natural-Robust Ratio: the harmonic mean of two accuracies in percent.

    ``2 natural robust / (natural + robust)``; 0 when both are.  Source: CURE, ICLR 2024, Sec. 5.
    """
    return 2 * natural * robust / (natural + robust) if natural + robust else 0.0


def accuracy_of(correct: Tensor, seconds: float) -> Result:
    """Accuracy in percent with its interval, from one truth value an image [N]."""
    count, right = len(correct), int(correct.sum())
    return {
        "accuracy": 100 * right / count,
        "interval": list(wilson(right, count)),
        "correct": right,
        "n": count,
        "seconds": round(seconds, 2),
    }


def measure(
    model: nn.Module,
    images: ImageSet,
    attacks: Sequence[str],
    threat: Threat,
    *,
    engine: Engine,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = no_progress,
    time_limit: float | None = None,
    journal: Journal | None = None,
    source: nn.Module | None = None,
    curve: Curve | None = None,
    keep: dict[str, Tensor] | None = None,
) -> Result:
    """Natural accuracy and accuracy under each attack, of one model on one set of images.

    An image that is misclassified as it is counts as lost and is not attacked; the worst case
    combines the attacks image by image and runs nothing twice.  Several ranks share the batches,
    and each has the result of one process.

    Args:
        model: takes images in [0, 1], returns logits; used in evaluation mode, then restored.
        images: what to evaluate on.
        attacks: names from :func:`~cure.attacks.registry.evaluation_attack`; "natural" is implied.
        threat: the ball.
        engine: device, memory layout and ranks; with precision "bf16_attack" attacks compute in
            bfloat16.  The verdict on what they find is float32's, and an image that is fooled in
            bfloat16 only is attacked again in float32.
        batch_size: images attacked at once.
        seed: of random starts.
        progress: told (attack, and its part where there are several; images done, images in all).
        time_limit: seconds after which attacks stop; natural accuracy is always measured.
        journal: verdicts that exist already, and where new ones are kept; with several ranks
            that of the first is the one.
        source: the network that the attack "transfer" crafts on.
        curve: also measure accuracy over epsilon.
        keep: is given the fooling images: for each attack, and for the worst case over all, a
            tensor like ``images.image`` in [0, 1], with the images themselves where none fooled.
            Only with one rank, and verdicts that a journal knows already have no images.

    Returns:
        {"natural": ..., "attacks": {name: ...}, "worst_case": ..., "nrr": {...}, "curve": ...},
        accuracies in percent with Wilson 95 % intervals.  Attacks that the time did not suffice for
        are under "unfinished" instead, with bounds of what their accuracy can be.

    Raises:
        ConfigError: for an unknown attack, before anything is computed.
        DataError: when there is no image, or a label without a class.
        ModelError: when the model's output is no logits.
    """
    ends = math.inf if time_limit is None else time.monotonic() + time_limit
    images = images.checked().to(engine.device)
    chosen = [
        evaluation_attack(name, source).defined(len(images.classes), threat)
        for name in dict.fromkeys(attacks)
        if name != "natural"
    ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        first = next(batches(images, batch_size))
        check_outputs(model, engine.arrange(first.image), len(images.classes))
        began = time.perf_counter()
        natural = _predict(model, images, engine, batch_size) == images.label
        result: Result = {"natural": accuracy_of(natural, time.perf_counter() - began)}
        progress("natural", len(images), len(images))
        journal = journal or Journal()
        # Only the first rank reads and writes a file; what it read is known to all.
        journal.learn(engine.first(journal.verdicts))
        evaluation = _Evaluation(
            model, images, threat, engine, batch_size, seed, progress, journal, ends, keep
        )
        verdicts = {}
        result["attacks"] = {}
        unfinished = {}
        for attack in chosen:
            robust, came, finished = evaluation.attack(attack, natural)
            if finished:
                verdicts[attack.name], result["attacks"][attack.name] = robust, came
            else:
                unfinished[attack.name] = came
        if curve is not None:
            attack = evaluation_attack(curve.attack, source).defined(len(images.classes), threat)
            result["curve"], missing = evaluation.curve(attack, natural, curve)
            if missing is not None:
                unfinished["curve"] = missing
    finally:
        for module, training in modes:
            module.training = training
    if unfinished:
        result["unfinished"] = unfinished
    if verdicts:
        worst = torch.stack(list(verdicts.values())).all(dim=0)
        result["worst_case"] = accuracy_of(worst, 0.0) | {"over": list(verdicts)}
        del result["worst_case"]["seconds"]
    result["nrr"] = {
        name: nrr(result["natural"]["accuracy"], result["attacks"][name]["accuracy"])
        if name in verdicts
        else None
        for name in ("cw", "autoattack")
    }
    return result


def identify(
    model: nn.Module,
    images: ImageSet,
    attacks: Sequence[str],
    threat: Threat,
    engine: Engine,
    batch_size: int,
    seed: int,
    source: nn.Module | None = None,
    curve: Curve | None = None,
) -> Identity:
    """All that verdicts depend on, for :class:`Journal`; see :func:`measure`."""
    chosen = [
        evaluation_attack(name, source).defined(len(images.classes), threat)
        for name in dict.fromkeys(attacks)
        if name != "natural"
    ]
    tensors = _tensors_of(model)
    further: Identity = {} if source is None else {"source": digest(_tensors_of(source))}
    if curve is not None:
        further["curve"] = evaluation_attack(curve.attack, source).settings
    return {
        "network": hashlib.sha256(str(model).encode()).hexdigest(),
        "weights": digest(tensors),
        "images": digest({"image": images.image, "label": images.label}),
        "attacks": {attack.name: _settings(attack, engine) for attack in chosen},
        "threat": [threat.norm, threat.epsilon],
        "device": engine.device.type,
        "batch size": batch_size,
        "seed": seed,
        "version of torch": torch.__version__,
    } | further


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def _predict(model: nn.Module, images: ImageSet, engine: Engine, batch_size: int) -> Tensor:
    predicted = torch.zeros_like(images.label)
    for batch in batches(images, batch_size):
        if batch.step % engine.world == engine.rank:
            predicted[batch.index] = model(engine.arrange(batch.image)).argmax(dim=1)
    return engine.total(predicted)


def _settings(attack: EvaluationAttack, engine: Engine) -> dict[str, Any]:
    """Those of the attack, and how precisely it computes where that is not float32."""
    lower = {} if engine.precision == "fp32" else {"precision": engine.precision}
    return attack.settings | lower


def smallest(distances: Tensor) -> Result:
    """Median of the smallest changes, with its interval, and the accuracy that they leave.

    Args:
        distances: [N]; 0 where an image was wrong as it is, infinite where nothing was found.

    Returns:
        ``median_distance`` over all images and its 95 % interval
        (:func:`~cure.utils.stats.median_interval`); None is infinite;
        ``distance_curve``: [distance, percent of the images still right] at 101 quantiles.
    """
    ordered, count = distances.sort().values, len(distances)
    median, low, high = median_interval(ordered.tolist())

    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    quantiles = [round(share * (count - 1) / 100) for share in range(101)]
    return {
        "median_distance": number(median),
        # No distance is below 0, so that is the limit where order statistics give none.
        "median_interval": [number(max(0.0, low)), number(high)],
        "distance_curve": [
            [number(float(ordered[place])), 100 * float((ordered > ordered[place]).double().mean())]
            for place in dict.fromkeys(quantiles)
        ],
    }


def _renamed(attack: EvaluationAttack, epsilon: float) -> dict[str, Part]:
    """Its parts, of which one that has the attack's name follows it."""
    return {
        f"{name}@{epsilon}" if name == attack.name else name: part
        for name, part in attack.parts.items()
    }


class _OutOfTime(Exception):
    """Raised inside a forward pass, which every attack makes again and again."""


@dataclass
class _Evaluation:
    """What all attacks of one evaluation share."""

    model: nn.Module
    images: ImageSet
    threat: Threat
    engine: Engine
    batch_size: int
    seed: int
    progress: Progress
    journal: Journal
    ends: float
    keep: dict[str, Tensor] | None = None

    def attack(self, attack: EvaluationAttack, natural: Tensor) -> tuple[Tensor, Result, bool]:
        """Which images stand [N], the attack's part of the result, and whether it is finished."""
        robust = natural.clone()
        fooled_by = dict.fromkeys(attack.parts, 0)
        furthest, seconds, stood = 0.0, 0.0, 0
        passes = {"forward": 0, "backward": 0}
        distances = torch.full((len(robust),), math.inf, dtype=torch.float64)
        distances[~natural.cpu()] = 0.0
        prepared = attack.prepare(self.model, self._batch(slice(0, 8))[0])
        stopped: str | None = None
        for part in attack.parts:
            targets = robust.nonzero().flatten()
            pieces = torch.split(targets, self.batch_size) if len(targets) else ()
            stood = 0
            for first in range(0, len(pieces), self.engine.world):
                for verdict in self._round(attack, part, prepared, pieces, first):
                    if verdict is None:
                        stopped = part
                        continue
                    robust[torch.tensor(verdict.fooled, dtype=torch.int64)] = False
                    fooled_by[part] += len(verdict.fooled)
                    stood += len(verdict.attacked) - len(verdict.fooled)
                    furthest = max(furthest, verdict.furthest)
                    seconds += verdict.seconds
                    passes["forward"] += verdict.forward
                    passes["backward"] += verdict.backward
                    if verdict.distances is not None:
                        found = [math.inf if d is None else d for d in verdict.distances]
                        distances[verdict.attacked] = torch.tensor(found, dtype=torch.float64)
                if stopped is not None:
                    break
            if stopped is not None:
                break
        facts: Result = {"attacked": int(natural.sum()), "largest_change": furthest}
        facts |= {"seed": self.seed, "settings": _settings(attack, self.engine), "passes": passes}
        if len(fooled_by) > 1:
            facts["fooled_by"] = fooled_by
        if stopped is None:
            if attack.minimum:
                facts |= smallest(distances)
            return robust, accuracy_of(robust, seconds) | facts, True
        # Whoever stands after the last part withstood the attack; of others none knows.
        sure = stood if stopped == list(attack.parts)[-1] else 0
        most, count = int(robust.sum()), len(robust)
        missing = {
            "bounds": [100 * sure / count, 100 * most / count],
            "undecided": most - sure,
            "n": count,
            "stopped_in": stopped,
            "seconds": round(seconds, 2),
        }
        return robust, missing | facts, False

    def curve(
        self, attack: EvaluationAttack, natural: Tensor, curve: Curve
    ) -> tuple[Result, Result | None]:
        """Accuracy at each radius, and what is missing.

        What fools within a radius fools within a larger one, so only who stands is attacked on.
        """
        found: Result = {"attack": attack.name, "settings": attack.settings}
        points: list[Result] = []
        robust = natural
        for epsilon in sorted(curve.epsilons):
            there = replace(self, threat=Threat(self.threat.norm, float(epsilon)), keep=None)
            named = replace(
                attack, name=f"{attack.name}@{epsilon}", parts=_renamed(attack, epsilon)
            )
            robust, came, finished = there.attack(named, robust)
            if not finished:
                return found | {"points": points}, came
            figures = {
                key: came[key] for key in ("accuracy", "interval", "correct", "n", "seconds")
            }
            points.append({"epsilon": float(epsilon), "epsilon_text": str(epsilon)} | figures)
            if not bool(robust.any()):
                break
        return found | {"points": points}, None

    def _round(
        self,
        attack: EvaluationAttack,
        part: str,
        prepared: nn.Module,
        pieces: Sequence[Tensor],
        first: int,
    ) -> list[Verdict | None]:
        """One batch for each rank, from number ``first`` on: the same verdicts on every rank.

        None stands for a batch that the time did not suffice for.
        """
        ours = pieces[first : first + self.engine.world]
        known = [
            self.journal.known(attack.name, part, first + rank, index.tolist())
            for rank, index in enumerate(ours)
        ]
        said = part if part == attack.name else f"{attack.name} {part}"
        before, count = first * self.batch_size, sum(map(len, ours))

        def tell(share: float) -> None:
            self.progress(said, before + int(share * count), sum(map(len, pieces)))

        if None in known:
            own, rank = None, self.engine.rank
            if rank < len(ours) and known[rank] is None:
                with suppress(_OutOfTime):
                    own = self._decide(attack, part, prepared, first + rank, ours[rank], tell)
            made = self.engine.gather(own)
            for verdict in filter(None, made):
                self.journal.add(verdict)
            known = [old or new for old, new in zip(known, made, strict=False)]
        if None not in known:
            tell(1.0)
        return known

    def _batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        chosen = self.images.subset(index)
        batch = next(batches(chosen, len(chosen)))
        return self.engine.arrange(batch.image), batch.label

    def _decide(
        self,
        attack: EvaluationAttack,
        part: str,
        prepared: nn.Module,
        number: int,
        index: Tensor,
        tell: Callable[[float], None],
    ) -> Verdict:
        """Run one part on one batch."""
        image, label = self._batch(index)
        began, run = time.perf_counter(), attack.parts[part]
        tell(0.0)
        watched = self._watched(prepared, run.passes, tell)
        with watched as count, self.engine.attack_precision():
            adversarial = run.run(prepared, image, label, self.threat, self.seed, number)
        fooled = self._fooled(self.model, adversarial, label)
        replaced = prepared is not self.model or self.engine.precision != "fp32"
        if replaced and not attack.transferred:
            # Rounding decided: what fools the prepared network only is attacked as it is.
            with self.engine.attack_precision():
                lost = self._fooled(prepared, adversarial, label) & ~fooled
            if bool(lost.any()):
                with self._watched(self.model, run.passes, tell, count):
                    adversarial[lost] = run.run(
                        self.model, image[lost], label[lost], self.threat, self.seed, number
                    )
                fooled = self._fooled(self.model, adversarial, label)
        lengths = self.threat.distance(adversarial - image)
        distances = None
        if attack.minimum:
            distances = [
                length if fools else None
                for length, fools in zip(lengths.tolist(), fooled.tolist(), strict=True)
            ]
            fooled &= self.threat.within(lengths)
        else:
            _check_allowed(adversarial, lengths, attack.name, self.threat)
        if self.keep is not None:
            for name in (attack.name, WORST):
                if name not in self.keep:
                    self.keep[name] = self._batch(slice(None))[0].clone()
                self.keep[name][index[fooled]] = adversarial[fooled]
        return Verdict(
            attack.name,
            part,
            number,
            index.tolist(),
            index[fooled].tolist(),
            float(lengths.max()),
            round(time.perf_counter() - began, 3),
            **count,
            distances=distances,
        )

    @torch.no_grad()
    def _fooled(self, model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        return model(self.engine.arrange(image)).argmax(dim=1) != label  # type: ignore[no-any-return]

    @contextmanager
    def _watched(
        self,
        model: nn.Module,
        passes: int,
        tell: Callable[[float], None],
        count: dict[str, int] | None = None,
    ) -> Iterator[dict[str, int]]:
        """At each forward pass: count, tell how far the attack is, and stop it when time is up."""
        calls, count = 0, {"forward": 0, "backward": 0} if count is None else count

        def came_back(gradient: Tensor) -> None:
            count["backward"] += len(gradient)

        def before(*_: object) -> None:
            nonlocal calls
            if time.monotonic() > self.ends:
                raise _OutOfTime
            calls += 1
            tell(min(1.0, calls / passes) * 0.999)

        def after(_: nn.Module, __: object, logits: Tensor) -> None:
            count["forward"] += len(logits)
            if logits.requires_grad:
                logits.register_hook(came_back)  # type: ignore[no-untyped-call]

        handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        try:
            yield count
        finally:
            for handle in handles:
                handle.remove()


def _check_allowed(adversarial: Tensor, lengths: Tensor, name: str, threat: Threat) -> None:
    """An attack that left the ball or [0, 1] would make the number meaningless."""
    inside = bool(((adversarial >= 0) & (adversarial <= 1)).all())
    if not inside or not bool(threat.within(lengths).all()):
        raise RuntimeError(
            f"{name} returned images outside what the threat allows "
            f"(change {float(lengths.max()):.6f} for epsilon {threat.epsilon:.6f}, "
            f"in [0, 1]: {inside})"
        )
