"""Runs attacks on one network and one set of images, and adds up what they found."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks import Threat, attack_mode
from cure.attacks.registry import EvaluationAttack, evaluation_attack
from cure.config import Ratio
from cure.data import ImageSet, batches
from cure.errors import ConfigError
from cure.evaluation.journal import BatchResult, Identity, Journal
from cure.evaluation.metrics import Result as Result
from cure.evaluation.metrics import accuracy_of, by_class, majority, nrr, pack, smallest
from cure.evaluation.shards import Shard
from cure.models import digest
from cure.models.checks import check_outputs, predicted
from cure.models.trial import traits_of
from cure.utils.engine import Engine

Progress = Callable[[str, int, int], None]
"""(attack or check, images done, images in all)."""

WORST = "worst_case"
"""All attacks together, image by image."""

RADII = tuple(
    Ratio(f"{size}/255")
    for size in ("0.25", "0.5", 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 255)
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
    """Progress callback that does nothing."""


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
    ends: float = math.inf,
    journal: Journal | None = None,
    source: nn.Module | None = None,
    curve: Curve | None = None,
    replay: nn.Module | None = None,
    keep: dict[str, Tensor] | None = None,
    per_image: bool = False,
    shard: Shard | None = None,
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
            bfloat16.  What they find is classified in float32, and an image that is fooled in
            bfloat16 only is attacked again in float32.
        batch_size: images attacked at once.
        seed: of random starts.
        progress: called with (attack, and its part where there are several; images done, images in
            all).
        ends: time of ``time.monotonic`` at which attacks stop; natural accuracy is always measured.
        journal: batches that are finished already, and where new ones are written; with several
            ranks only the first one's is used.
        source: the network that the attack "transfer" makes its images on.
        curve: also measure accuracy over epsilon.
        replay: the network that attacks with gradients make their images on, for a model that has
            none; what they make is tried on the model.
        keep: receives the fooling images: for each attack, and for the worst case over all, a
            tensor like ``images.image`` in [0, 1], with the images themselves where none fooled.
            Only with one rank, and batches that are in the journal already have no images.
        per_image: also say which images are right (see :func:`~cure.evaluation.metrics.pack`), as
            ``right`` beside each accuracy.
        shard: attack only its images; the others count as withstanding, so what is returned is not
            the accuracy: the journal is what a shard is for.

    Returns:
        {"natural": ..., "attacks": {name: ...}, "worst_case": ..., "nrr": {...}, "curve": ...,
        "majority": ...}, accuracies in percent with Wilson 95 % intervals, and by class.  Attacks
        that ran out of time are under "unfinished" instead, with bounds of what their accuracy
        can be.

    Raises:
        ConfigError: for an unknown attack or a radius of the curve that is too large, before
            anything is computed.
        DataError: when there is no image, or a label without a class.
        ModelError: when the model's output is no logits.
    """
    images = images.checked().to(engine.device)
    chosen = chosen_attacks(attacks, images, threat, source, model, replay)
    along = None
    if curve is not None:
        (along,) = chosen_attacks([curve.attack], images, threat, source, model, replay)
        for epsilon in curve.epsilons:
            Threat(threat.norm, float(epsilon))  # Refuses a radius that is too large.
    if shard is not None and (named := [a.name for a in chosen if a.order is not None]):
        raise ConfigError(
            f"{named[0]} takes all images in one order, so they cannot be shared among shards; "
            "use screened, or leave the shards out"
        )
    with attack_mode(model):
        first = next(batches(images, batch_size))
        check_outputs(model, engine.arrange(first.image), len(images.classes))
        began = time.perf_counter()
        natural = _predict(model, images, engine, batch_size) == images.label
        result: Result = {
            "natural": _accuracies(natural, images, time.perf_counter() - began),
            "majority": majority(images.label.cpu(), images.classes),
            "attacks": {},
        }
        progress("natural", len(images), len(images))
        journal = journal or Journal()
        # Only the first rank reads and writes the file; the others receive what it read.
        journal.learn(engine.first(journal.results))
        runner = AttackRunner(
            model, images, threat, engine, batch_size, seed, progress, journal, ends, keep, shard
        )
        tallies = {attack.name: runner.run(attack, natural) for attack in chosen}
        unfinished = {name: t.result() for name, t in tallies.items() if t.stopped_in is not None}
        if curve is not None and along is not None:
            result["curve"], missing = _measure_curve(runner, along, natural, curve)
            if missing is not None:
                unfinished["curve"] = missing
    robust = {name: t.robust for name, t in tallies.items() if t.stopped_in is None}
    result["attacks"] = {
        name: tallies[name].result() | _by_class(right, images) for name, right in robust.items()
    }
    if unfinished:
        result["unfinished"] = unfinished
    if per_image:
        result["natural"]["right"] = pack(natural)
        for name, right in robust.items():
            result["attacks"][name]["right"] = pack(right)
    if robust:
        worst = torch.stack(list(robust.values())).all(dim=0)
        result["worst_case"] = _accuracies(worst, images) | {"over": list(robust)}
        del result["worst_case"]["seconds"]
    result["nrr"] = {
        name: nrr(result["natural"]["accuracy"], result["attacks"][name]["accuracy"])
        if name in robust
        else None
        for name in ("cw", "autoattack")
    }
    return result


def _accuracies(right: Tensor, images: ImageSet, seconds: float = 0.0) -> Result:
    """Accuracy over all images, and by class."""
    return accuracy_of(right, seconds) | _by_class(right, images)


def _by_class(right: Tensor, images: ImageSet) -> Result:
    return by_class(right.cpu(), images.label.cpu(), len(images.classes))


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
    replay: nn.Module | None = None,
) -> Identity:
    """All that the result of a batch depends on, for :class:`Journal`; see :func:`measure`."""
    chosen = chosen_attacks(attacks, images, threat, source, model, replay)
    further: Identity = {} if source is None else {"source": digest(_tensors_of(source))}
    if replay is not None:
        further["replay"] = digest(_tensors_of(replay))
    if curve is not None:
        further["curve"] = _settings(evaluation_attack(curve.attack, source), engine)
    return {
        "network": hashlib.sha256(str(model).encode()).hexdigest(),
        "weights": digest(_tensors_of(model)),
        "images": images.digest(),
        "attacks": {attack.name: _settings(attack, engine) for attack in chosen},
        "threat": [threat.norm, threat.epsilon],
        "device": engine.device.type,
        "batch size": batch_size,
        "seed": seed,
        "version of torch": torch.__version__,
    } | further


def chosen_attacks(
    attacks: Sequence[str],
    images: ImageSet,
    threat: Threat,
    source: nn.Module | None,
    model: nn.Module,
    replay: nn.Module | None = None,
) -> list[EvaluationAttack]:
    """The attacks of these names, each once, as far as images and network allow them.

    Raises:
        ConfigError: for an attack that they do not allow.
    """
    return [
        _possible(evaluation_attack(name, source), images, threat, model, replay)
        for name in dict.fromkeys(attacks)
        if name != "natural"
    ]


def _possible(
    attack: EvaluationAttack,
    images: ImageSet,
    threat: Threat,
    model: nn.Module,
    replay: nn.Module | None = None,
) -> EvaluationAttack:
    defined = attack.defined(len(images.classes), threat)
    if replay is not None and needs_gradient(attack):
        return replace(
            defined,
            transferred=True,
            settings=defined.settings | {"made_on": "float network"},
            prepare=lambda _, image: attack.prepare(replay, image),
        )
    reason = traits_of(model).no_gradient
    return defined.without_gradient(reason) if reason else defined


def needs_gradient(attack: EvaluationAttack) -> bool:
    """Whether a part of an attack needs the gradient of the network that it is tried on."""
    return not attack.transferred and any(part.gradient for part in attack.parts.values())


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def _predict(model: nn.Module, images: ImageSet, engine: Engine, batch_size: int) -> Tensor:
    named = torch.zeros_like(images.label)
    for batch in batches(images, batch_size):
        if batch.step % engine.world == engine.rank:
            named[batch.index] = predicted(model(engine.arrange(batch.image)))
    return engine.total(named)


def _settings(attack: EvaluationAttack, engine: Engine) -> dict[str, Any]:
    """The settings of an attack, and its precision where that is not float32."""
    lower = {} if engine.precision == "fp32" else {"precision": engine.precision}
    return attack.settings | lower


def _measure_curve(
    runner: AttackRunner, attack: EvaluationAttack, natural: Tensor, curve: Curve
) -> tuple[Result, Result | None]:
    """Accuracy at each radius, and the result of the radius at which time ran out.

    What fools within a radius fools within a larger one, so only images that are still right are
    attacked again.
    """
    found: Result = {"attack": attack.name, "settings": _settings(attack, runner.engine)}
    points: list[Result] = []
    robust = natural
    for epsilon in sorted(curve.epsilons):
        threat = Threat(runner.threat.norm, float(epsilon))
        # A part that has the attack's name is renamed with it.
        parts = {
            f"{name}@{epsilon}" if name == attack.name else name: part
            for name, part in attack.parts.items()
        }
        named = replace(attack, name=f"{attack.name}@{epsilon}", parts=parts)
        tally = replace(runner, threat=threat, keep=None).run(named, robust)
        if tally.stopped_in is not None:
            return found | {"points": points}, tally.result()
        robust, came = tally.robust, tally.result()
        figures = {key: came[key] for key in ("accuracy", "interval", "correct", "n", "seconds")}
        points.append({"epsilon": float(epsilon), "epsilon_text": str(epsilon)} | figures)
        if not bool(robust.any()):
            break
    return found | {"points": points}, None


class Tally:
    """What the batches of one attack add up to.

    Attributes:
        robust: which images are right after all batches so far [N].
        stopped_in: the part in which time ran out, None when the attack is finished.
        in_a_row: how many images withstood the part that runs since the last one that did not.
    """

    def __init__(
        self, attack: EvaluationAttack, natural: Tensor, seed: int, settings: dict[str, Any]
    ) -> None:
        self.attack, self.seed, self.settings = attack, seed, settings
        self.robust = natural.clone()
        self.stopped_in: str | None = None
        self._attacked = int(natural.sum())
        self.in_a_row = 0
        self._not_attacked: dict[str, int] = {}
        self._fooled_by = dict.fromkeys(attack.parts, 0)
        self._withstood = 0
        self._furthest, self._seconds = 0.0, 0.0
        self._passes = {"forward": 0, "backward": 0}
        self._distances = torch.full((len(natural),), math.inf, dtype=torch.float64)
        self._distances[~natural.cpu()] = 0.0

    def begin(self) -> None:
        """A part begins: images withstand the attack when they withstand its last part."""
        self._withstood = self.in_a_row = 0

    def end(self, part: str, images: int) -> None:
        """A part ends, of so many images that withstood those before it."""
        if self.attack.order is not None:
            self._not_attacked[part] = images - self._withstood - self._fooled_by[part]

    def add(self, batch: BatchResult) -> None:
        """Add the result of one part on one batch."""
        self.robust[torch.tensor(batch.fooled, dtype=torch.int64)] = False
        self._fooled_by[batch.part] += len(batch.fooled)
        self._withstood += len(batch.attacked) - len(batch.fooled)
        fooled = set(batch.fooled)
        falls = [place for place, index in enumerate(batch.attacked) if index in fooled]
        since = self.in_a_row if not falls else -1 - falls[-1]
        self.in_a_row = len(batch.attacked) + since
        self._furthest = max(self._furthest, batch.furthest)
        self._seconds += batch.seconds
        self._passes["forward"] += batch.forward
        self._passes["backward"] += batch.backward
        if batch.distances is not None:
            found = [math.inf if length is None else length for length in batch.distances]
            self._distances[batch.attacked] = torch.tensor(found, dtype=torch.float64)

    def result(self) -> Result:
        """Accuracy, or its bounds when time ran out, for the result file."""
        facts: Result = {
            "attacked": self._attacked,
            "largest_change": self._furthest,
            "seed": self.seed,
            "settings": self.settings,
            "passes": self._passes,
        }
        if len(self._fooled_by) > 1:
            facts["fooled_by"] = self._fooled_by
        if self._not_attacked:
            facts["not_attacked"] = self._not_attacked
        if self.stopped_in is None:
            if self.attack.minimum:
                facts |= smallest(self._distances)
            return accuracy_of(self.robust, self._seconds) | facts
        # Images that withstood the last part withstood the attack; the others are undecided.
        last = self.stopped_in == list(self.attack.parts)[-1]
        sure, most, count = self._withstood if last else 0, int(self.robust.sum()), len(self.robust)
        return {
            "bounds": [100 * sure / count, 100 * most / count],
            "undecided": most - sure,
            "n": count,
            "stopped_in": self.stopped_in,
            "seconds": round(self._seconds, 2),
        } | facts


class OutOfTime(Exception):
    """The time limit was reached during an attack."""


class Meter(nn.Module):
    """A network that counts what passes through it, reports progress and keeps a deadline.

    Args:
        network: what it calls.
        passes: about how many calls there will be.
        tell: called with the share of them that is done, below 1.
        ends: a time of ``time.monotonic``; a call after it raises :class:`OutOfTime`.
    """

    def __init__(
        self, network: nn.Module, passes: int, tell: Callable[[float], None], ends: float
    ) -> None:
        super().__init__()
        self.network, self.passes, self.tell, self.ends = network, passes, tell, ends
        self.calls = 0
        self.counted = {"forward": 0, "backward": 0}
        self.train(network.training)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        if time.monotonic() > self.ends:
            raise OutOfTime
        self.calls += 1
        self.tell(min(1.0, self.calls / self.passes) * 0.999)
        logits: Tensor = self.network(image)
        self.counted["forward"] += len(logits)
        if logits.requires_grad:
            logits.register_hook(self._came_back)  # type: ignore[no-untyped-call]
        return logits

    def _came_back(self, gradient: Tensor) -> None:
        self.counted["backward"] += len(gradient)


@dataclass
class AttackRunner:
    """Runs attacks on one network; its attributes are the arguments of :func:`measure`."""

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
    shard: Shard | None = None

    def run(self, attack: EvaluationAttack, natural: Tensor) -> Tally:
        """Run an attack on the images that are right, ``natural`` [N], part by part."""
        tally = Tally(attack, natural, self.seed, _settings(attack, self.engine))
        prepared = attack.prepare(self.model, self.batch(slice(0, 8))[0])
        order: Tensor | None = None
        for part in attack.parts:
            tally.begin()
            targets, size = tally.robust.nonzero().flatten(), self.batch_size
            enough = attack.enough(part)
            if enough is not None:
                order = self._ordered(attack, prepared, targets) if order is None else order
                targets, size = order[tally.robust[order]], min(size, enough)
            for results in self._rounds(attack, part, prepared, targets, size):
                for result in results:
                    # Of a round of all ranks only what one process would have done counts.
                    if enough is not None and tally.in_a_row >= enough:
                        break
                    if result is not None:
                        tally.add(result)
                if enough is not None and tally.in_a_row >= enough:
                    break
                if None in results:
                    tally.stopped_in = part
                    return tally
            tally.end(part, len(targets))
        return tally

    def _ordered(self, attack: EvaluationAttack, prepared: nn.Module, targets: Tensor) -> Tensor:
        """Positions of images in the order of the attack, the same on every rank."""

        def order() -> Tensor:
            assert attack.order is not None
            with self.engine.attack_precision():
                found = [
                    attack.order(prepared, *self.batch(index), self.threat).float()
                    for index in torch.split(targets, self.batch_size)
                ]
            return targets[torch.cat(found).argsort(stable=True)].cpu()

        if not len(targets):
            return targets
        return self.engine.first(order).to(targets.device)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1] and labels [B], on the device."""
        chosen = self.images.subset(index)
        batch = next(batches(chosen, len(chosen)))
        return self.engine.arrange(batch.image), batch.label

    def _rounds(
        self,
        attack: EvaluationAttack,
        part: str,
        prepared: nn.Module,
        targets: Tensor,
        batch_size: int,
    ) -> Iterator[list[BatchResult | None]]:
        """Results of one part, a batch for each rank at a time: the same ones on every rank.

        None in the place of a batch that ran out of time.
        """
        if (merged := self.journal.whole(attack.name, part, targets.tolist())) is not None:
            yield list(merged)
            return
        if self.shard is not None:
            held = self.shard.holds(len(self.images)).to(targets.device)
            targets = targets[held[targets]]
        pieces = torch.split(targets, batch_size) if len(targets) else ()
        title = part if part == attack.name else f"{attack.name} {part}"
        for first in range(0, len(pieces), self.engine.world):
            ours = pieces[first : first + self.engine.world]
            results = [
                self.journal.find(attack.name, part, self._number(first + rank), index.tolist())
                for rank, index in enumerate(ours)
            ]
            before, count = first * batch_size, sum(map(len, ours))

            def tell(share: float, before: int = before, count: int = count) -> None:
                self.progress(title, before + int(share * count), len(targets))

            if None in results:
                own, rank = None, self.engine.rank
                if rank < len(ours) and results[rank] is None:
                    number = self._number(first + rank)
                    own = self._attack(attack, part, prepared, number, ours[rank], tell)
                made = self.engine.gather(own)
                for result in filter(None, made):
                    self.journal.add(result)
                results = [old or new for old, new in zip(results, made, strict=False)]
            if None not in results:
                tell(1.0)
            yield results

    def _number(self, batch: int) -> int:
        """The number that a batch's draws depend on: no two shards share one."""
        if self.shard is None:
            return batch
        return batch * self.shard.of + self.shard.number - 1

    def _attack(
        self,
        attack: EvaluationAttack,
        part: str,
        prepared: nn.Module,
        number: int,
        index: Tensor,
        tell: Callable[[float], None],
    ) -> BatchResult | None:
        """Run one part on the images ``index`` [B]; None when time runs out."""
        image, label = self.batch(index)
        began, run = time.perf_counter(), attack.parts[part]
        meter = Meter(prepared, run.passes, tell, self.ends)
        tell(0.0)
        try:
            with self.engine.attack_precision():
                adversarial = run.run(meter, image, label, self.threat, self.seed, number)
            fooled = self._fooled(self.model, adversarial, label)
            replaced = prepared is not self.model or self.engine.precision != "fp32"
            if replaced and not attack.transferred:
                # Rounding decided: images that fool the prepared network only are attacked again.
                with self.engine.attack_precision():
                    lost = self._fooled(prepared, adversarial, label) & ~fooled
                if bool(lost.any()):
                    meter.network = self.model
                    adversarial[lost] = run.run(
                        meter, image[lost], label[lost], self.threat, self.seed, number
                    )
                    fooled = self._fooled(self.model, adversarial, label)
        except OutOfTime:
            return None
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
                    self.keep[name] = self.batch(slice(None))[0].clone()
                self.keep[name][index[fooled]] = adversarial[fooled]
        return BatchResult(
            attack.name,
            part,
            number,
            index.tolist(),
            index[fooled].tolist(),
            float(lengths.max()),
            round(time.perf_counter() - began, 3),
            **meter.counted,
            distances=distances,
        )

    @torch.no_grad()
    def _fooled(self, model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        return predicted(model(self.engine.arrange(image))) != label


def _check_allowed(adversarial: Tensor, lengths: Tensor, name: str, threat: Threat) -> None:
    """An attack that left the ball or [0, 1] would make the number meaningless."""
    inside = bool(((adversarial >= 0) & (adversarial <= 1)).all())
    if not inside or not bool(threat.within(lengths).all()):
        raise RuntimeError(
            f"{name} returned images outside what the threat allows "
            f"(change {float(lengths.max()):.6f} for epsilon {threat.epsilon:.6f}, "
            f"in [0, 1]: {inside})"
        )
