"""The function ``cure.evaluate``: accuracy of a target on natural and on attacked images."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.registry import attack_name, check_attacks, evaluation_attack
from cure.config import EvaluationConfig, Ratio, checked, checked_words
from cure.data import ImageSet, batches
from cure.errors import CheckpointError, ConfigError, CureNote, notes_kept
from cure.evaluation.auto import AUTO, choose_attacks
from cure.evaluation.bounds import check_linf, verified_accuracy
from cure.evaluation.diagnosis import cheap_checks
from cure.evaluation.gate import Requirement, check_requirements
from cure.evaluation.journal import (
    SUFFIX,
    Identity,
    Journal,
    begun_attacks,
    partial_of,
    short,
)
from cure.evaluation.options import TargetKeywords
from cure.evaluation.replay import compared, masking_note
from cure.evaluation.robustbench import robustbench_record, save_adversarial
from cure.evaluation.runner import WORST, Curve, Progress, Result, identify, measure, no_progress
from cure.evaluation.shards import MergedShards, Shard
from cure.evaluation.smoothing import check_sigma, smoothed_accuracy
from cure.evaluation.target import Target, TargetLike, describe_images
from cure.evaluation.unseen import attack_unseen, check_unseen, unseen_threats, with_all_threats
from cure.models import describe
from cure.models.failure import network_errors
from cure.models.trial import traits_of
from cure.runs.results import EvaluationRecord
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import check_free, read_json, user_path, write_json
from cure.utils.modes import in_evaluation

EVALUATION_FORMAT = "cure-evaluation-1"


@torch.inference_mode(False)  # of a caller, whose tensors would have no gradient
def evaluate(
    target: TargetLike,
    *,
    attacks: str | Sequence[str] | None = None,
    epsilon: str | float | None = None,
    norm: str | None = None,
    precision: Literal["fp32", "bf16_attack"] = "fp32",
    transfer: TargetLike | None = None,
    float_network: TargetLike | None = None,
    require: Sequence[str] = (),
    require_lower_bound: bool = False,
    curve: str | None = None,
    epsilons: Sequence[str | float] | None = None,
    output: str | Path | None = None,
    robustbench: str | Path | None = None,
    adversarial: str | Path | None = None,
    time_limit: float | None = None,
    per_image: bool = False,
    unseen: bool = False,
    bounds: bool = False,
    smoothing: float | None = None,
    shard: str | None = None,
    shards: int | None = None,
    progress: Progress = no_progress,
    **options: Unpack[TargetKeywords],
) -> Result:
    """Accuracy on natural and on attacked images, with all it takes to repeat the number.

    Args:
        target: a run (or its folder), a network, or the name of one (``cure list models``,
            ``package.module:callable``, ``hf:...``, ``timm:...``).
        attacks: names from ``cure list attacks``, as a list or as "pgd20,cw"; "natural" is
            implied.  "auto", with ``time_limit``, takes the strongest set that fits into the time
            (:data:`cure.evaluation.auto.LADDER`) and says in a note what was left out.
        epsilon: radius of the threat, "8/255" or a number; by default the run's, else 8/255.
        norm: "Linf", "L2" or "L1"; by default the run's, else Linf.
        precision: "bf16_attack" attacks in bfloat16, in less time and less strongly; every image
            that counts as fooled is wrong in float32.
        transfer: a network to make the images of the attack "transfer" on: a run, or whatever
            ``target`` may be, for the same classes.
        float_network: of an exported file without gradients: the run it was made from.  Attacks
            with gradients make their images on it and try them on the file; it is measured too, and
            "float" in the result has the differences.
        require: limits such as "natural>=75" or "pgd20>40", percent; "requirements" in the result
            says which are met (:mod:`cure.evaluation.gate`).  An attack that is named here is run.
        require_lower_bound: compare the lower ends of the 95 % intervals instead.
        curve: also measure accuracy over epsilon with this attack, from 0.25/255 up to where none
            is right.
        epsilons: the radii of the curve instead: ["1/255", 0.01].
        output: JSON file to write; must not exist, unless it is the unfinished result that this
            call continues.
        robustbench: file to write the record to that RobustBench's leaderboard takes; needs
            "autoattack" among the attacks.
        adversarial: file (.pt) to write the worst-case images to, which :func:`cure.verify` checks;
            written when all attacks are finished.  An interrupted call finds its images again.
        time_limit: seconds after which attacks stop; what is missing is then listed under
            "unfinished".
        per_image: also keep which images are right, for paired comparisons
            (:func:`cure.evaluation.metrics.unpack` reads it).
        unseen: also attack in the other two norms, at customary radii
            (:func:`cure.evaluation.unseen.customary`).
        bounds: also prove accuracy within the threat by interval bounds
            (:mod:`cure.evaluation.bounds`).
        smoothing: standard deviation of Gaussian noise, such as 0.25: also certify the network that
            this noise smooths (:mod:`cure.evaluation.smoothing`).
        shard: "2/8" attacks only the second eighth of the images, every eighth one, and keeps what
            it found in ``OUTPUT.shard-2-of-8``, for jobs that share an evaluation.
        shards: 8 attacks nothing and merges the files of eight shards into the result.
            :func:`cure.evaluate_in_shards` does all of it.
        progress: called with (attack, images done, images in all).
        options: ``data``, ``split``, ``limit``, ``checkpoint``, ``weights``, ``mean``, ``std``,
            ``options``, ``data_options``, ``batch_size``, ``device``, ``seed``: see
            :class:`~cure.evaluation.options.TargetOptions`.

    Returns:
        The result, as documented in docs/result-files.md.  Until it is finished, its batches are
        kept in ``OUTPUT.partial``, or in the ``evaluations`` of the run: the same call continues
        there.  Of one shard: {"format": "cure-evaluation-shard-1", "shard": "2/8", "file": ...}.

    Raises:
        CureError: for every mistake a user can correct; nothing is written then.

    >>> import torch
    >>> import cure
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> result = cure.evaluate(network, data="digits", attacks=["pgd20"], epsilon="8/255", limit=50)
    >>> result["natural"]["n"], sorted(result["attacks"])
    (50, ['pgd20'])
    """
    asked = _Asked(
        attacks=attacks,
        epsilon=epsilon,
        norm=norm,
        precision=precision,
        transfer=transfer,
        float_network=float_network,
        limits=[Requirement.parse(text) for text in require],
        lower_bound=require_lower_bound,
        curve=_curve(curve, epsilons),
        output=user_path(output),
        robustbench=user_path(robustbench),
        adversarial=user_path(adversarial),
        time_limit=checked("time_limit", time_limit, float | None),
        per_image=per_image,
        unseen=unseen,
        bounds=bounds,
        smoothing=smoothing,
        sharded=_sharded(shard, shards),
    )
    asked.check()
    with notes_kept() as notes:
        evaluation = _prepare(asked, Target.of(target, **options))
        with evaluation.journal, network_errors():
            if isinstance(asked.sharded, Shard):
                return _measure_shard(evaluation, asked.sharded, progress)
            result = _measure(evaluation, progress)
            result["notes"] = notes
            if asked.limits:
                result["requirements"] = check_requirements(result, asked.limits, asked.lower_bound)
            _record(evaluation, result)
    return result


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What an evaluation is asked for, besides its target: the arguments of :func:`evaluate`.

    Attributes:
        attacks: see :func:`evaluate`, as all that are not named here.
        limits: ``require``, parsed.
        lower_bound: ``require_lower_bound``.
        curve: of ``curve`` and ``epsilons``.
        sharded: the shard to measure, or the number of those to merge.
    """

    attacks: str | Sequence[str] | None
    epsilon: str | float | None
    norm: str | None
    precision: Literal["fp32", "bf16_attack"]
    transfer: TargetLike | None
    float_network: TargetLike | None
    limits: Sequence[Requirement]
    lower_bound: bool
    curve: Curve | None
    output: Path | None
    robustbench: Path | None
    adversarial: Path | None
    time_limit: float | None
    per_image: bool
    unseen: bool
    bounds: bool
    smoothing: float | None
    sharded: Shard | int | None

    def check(self) -> None:
        """Refuse what can be refused before the target is read.

        Raises:
            ConfigError: in one sentence.
        """
        if self.sharded is not None:
            self._check_sharded()
        if self.output is None or not _unfinished(self.output):
            check_free(self.output)
        for further in (self.robustbench, self.adversarial):
            check_free(further)
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise ConfigError(f"time_limit: expected seconds above 0, got {self.time_limit:g}")
        if self.smoothing is not None:
            check_sigma(self.smoothing)

    def _check_sharded(self) -> None:
        if self.output is None:
            raise ConfigError("shards are merged into a file; name it: --output result.json")
        others = {
            "adversarial": self.adversarial,
            "float": self.float_network,
            "time_limit": self.time_limit,
        }
        for name, value in others.items():
            if value is not None:
                raise ConfigError(
                    f"{name} is not kept by shards; leave it out, or evaluate in one process"
                )

    def attack_names(self, target: Target) -> Sequence[str]:
        """The attacks that were asked for, else the run's, and those that a requirement names.

        Raises:
            ConfigError: for an unknown one, or one that the other arguments do not allow.
        """
        attacks = self.attacks
        if attacks is None and target.is_onnx:
            by_gradients = () if self.float_network is None else EvaluationConfig().attacks
            attacks = [*by_gradients, "noise", "square"]
        if attacks is None:
            usual = target.config.evaluation if target.config else EvaluationConfig()
            attacks = usual.attacks
        attacks = checked_words("attacks", attacks)
        wanted = [limit.attack for limit in self.limits if limit.attack not in ("natural", WORST)]
        given = () if self.transfer is None else ("transfer",)
        check_attacks(name for name in attacks if name not in (AUTO, *given))
        check_attacks(name for name in wanted if name not in given)
        names = [attack_name(name) for name in attacks]
        if AUTO in names and self.time_limit is None:
            raise ConfigError(
                "attacks: auto needs a time limit in seconds; say --attacks auto --time-limit 600"
            )
        names += [name for name in dict.fromkeys(wanted) if name not in names]
        if self.robustbench is not None and "autoattack" not in names:
            raise ConfigError(
                "RobustBench's record needs AutoAttack's accuracy; add autoattack to the attacks"
            )
        return names


@dataclass(frozen=True)
class _Prepared:
    """An evaluation before its first attack.

    Attributes:
        asked: what it is asked for.
        target: what is evaluated.
        images: on which images.
        model: the network, on the device of ``engine``.
        attacks: names.
        threat: the ball.
        engine: device, precision and ranks.
        source: the network that the attack "transfer" uses.
        replay: the float network that a file without gradients was made from.
        journal: batches that are finished.
        kept: the fooling images (see :func:`~cure.evaluation.runner.measure`), where asked for.
    """

    asked: _Asked
    target: Target
    images: ImageSet
    model: nn.Module
    attacks: Sequence[str]
    threat: Threat
    engine: Engine
    source: nn.Module | None
    replay: nn.Module | None
    journal: Journal
    kept: dict[str, Tensor] | None


def _prepare(asked: _Asked, target: Target) -> _Prepared:
    """Load images and networks, and open the journal."""
    attacks, threat = asked.attack_names(target), target.threat(asked.epsilon, asked.norm)
    if asked.bounds:
        check_linf(threat)
    engine = Engine.for_evaluation(target.options.device, asked.precision)
    if slow := engine.slow_precision():
        warnings.warn(slow, CureNote, stacklevel=3)
    keep_images = asked.adversarial is not None
    if keep_images and engine.world > 1:
        raise ConfigError(
            f"adversarial images are kept by one process, got {engine.world} ranks; evaluate "
            "without a launcher"
        )
    with engine.agreeing():
        images, model = target.load()
        if asked.float_network is not None and traits_of(model).gradient:
            raise ConfigError(f"{target.name} has gradients, so attacks run on it; leave out float")
        source, replay = (
            None if given is None else _surrogate(given, images, engine)
            for given in (asked.transfer, asked.float_network)
        )
    model = engine.place(model)
    size, seed = target.batch_size, target.options.seed
    if AUTO in attacks:
        found, sentence = engine.first(
            lambda: _chosen(asked, in_evaluation(model), images, threat, engine, size)
        )
        attacks = list(dict.fromkeys([*found, *(name for name in attacks if name != AUTO)]))
        warnings.warn(sentence, CureNote, stacklevel=3)
    identity = identify(
        model, images, attacks, threat, engine, size, seed, source, asked.curve, replay
    )
    if asked.bounds:
        verified_accuracy(in_evaluation(model), images.subset(slice(0, 1)), threat, engine=engine)
    if asked.unseen:
        check_unseen(model, images, threat, replay)
        others = unseen_threats(threat, images)
        identity["unseen"] = {norm: float(other.epsilon) for norm, other in others.items()}
    with engine.agreeing():
        journal = _journal(asked, target, identity, engine)
    kept: dict[str, Tensor] | None = {} if keep_images else None
    return _Prepared(
        asked, target, images, model, attacks, threat, engine, source, replay, journal, kept
    )


def _surrogate(given: TargetLike, images: ImageSet, engine: Engine) -> nn.Module:
    """A surrogate: attacks make their images on it, which are then tried on the target."""
    network = engine.place(Target.of(given).build(images))
    return in_evaluation(network).requires_grad_(False)


def _chosen(
    asked: _Asked, model: nn.Module, images: ImageSet, threat: Threat, engine: Engine, size: int
) -> tuple[Sequence[str], str]:
    """The attacks that "auto" stands for, and a sentence: those of the evaluation that goes on."""
    assert asked.time_limit is not None
    if asked.output is not None and asked.adversarial is None:
        begun = begun_attacks(partial_of(asked.output))
        if begun:
            return begun, f"attacks as chosen when it was begun: {' and '.join(begun)}"
    return choose_attacks(model, images, threat, engine, size, asked.time_limit)


def _journal(asked: _Asked, target: Target, identity: Identity, engine: Engine) -> Journal:
    """The batches that are finished: of the evaluation, of a shard, or of all shards to merge."""
    if asked.sharded is None:
        # A journal holds no images, so nothing can be continued where images are kept.
        resumable = engine.rank == 0 and asked.adversarial is None
        return Journal(_partial(asked.output, target, identity) if resumable else None, identity)
    if engine.world > 1:
        raise ConfigError("ranks share the batches already; leave out shards, or the launcher")
    assert asked.output is not None
    if isinstance(asked.sharded, int):
        return MergedShards(asked.output, asked.sharded, identity)
    return Journal(asked.sharded.file(asked.output), asked.sharded.identity(identity))


def _attacked(this: _Prepared, progress: Progress, **options: Any) -> Result:
    """What the attacks find; ``options`` are further ones of :func:`measure`."""
    return measure(
        this.model,
        this.images,
        this.attacks,
        this.threat,
        engine=this.engine,
        batch_size=this.target.batch_size,
        seed=this.target.options.seed,
        progress=progress,
        journal=this.journal,
        source=this.source,
        curve=this.asked.curve,
        **options,
    )


def _measure_shard(this: _Prepared, shard: Shard, progress: Progress) -> Result:
    """Run the attacks on the images of a shard; what they found stays in its file."""
    _attacked(this, progress, shard=shard)
    if this.asked.unseen:
        _unseen(this, math.inf, progress, shard)
    return {
        "format": "cure-evaluation-shard-1",
        "shard": str(shard),
        "images": int(shard.holds(len(this.images)).sum()),
        "file": str(this.journal.path),
    }


def _measure(this: _Prepared, progress: Progress) -> Result:
    """Run the attacks and all else that was asked for: the content of the result file."""
    asked, limit = this.asked, this.asked.time_limit
    ends = math.inf if limit is None else time.monotonic() + limit
    measured = _attacked(
        this,
        progress,
        ends=ends,
        keep=this.kept,
        per_image=asked.per_image or asked.unseen or this.replay is not None,
        replay=this.replay,
    )
    result: Result = {"format": EVALUATION_FORMAT, "target": this.target.name, **measured}
    if this.replay is not None:
        result["float"] = compared(
            measured,
            this.replay,
            this.images,
            this.threat,
            engine=this.engine,
            batch_size=this.target.batch_size,
            seed=this.target.options.seed,
            ends=ends,
            progress=progress,
        )
    result |= _described(this)
    if asked.unseen:
        threats = unseen_threats(this.threat, this.images)
        result["unseen"] = with_all_threats(result, _unseen(this, ends, progress), threats)
    result |= _certificates(this, progress)
    if note := masking_note(result, traits_of(this.model).gradient):
        warnings.warn(note, CureNote, stacklevel=3)
    return result


def _described(this: _Prepared) -> Result:
    """The findings of the cheap checks, and all that it takes to repeat the evaluation."""
    target, images, threat, engine = this.target, this.images, this.threat, this.engine
    diagnosis = engine.first(
        lambda: cheap_checks(
            this.model,
            images,
            threat,
            engine=replace(engine, rank=0, world=1, precision="fp32"),
            seed=target.options.seed,
            expected=target.validation_accuracy(),
            gradients=not target.is_onnx,
        )
    )
    own = target.measures_own and target.images_changed(images) is None
    return {
        "diagnosis": diagnosis,
        "threat": {
            "norm": threat.norm,
            "epsilon": float(threat.epsilon),
            "epsilon_text": str(threat.epsilon),
        },
        "data": describe_images(images) | {"limit": target.options.limit, "own": own},
        "model": describe(this.model) | target.facts,
        "seed": target.options.seed,
        "batch_size": target.batch_size,
        "environment": environment(),
    }


def _unseen(this: _Prepared, ends: float, progress: Progress, shard: Shard | None = None) -> Result:
    """Attacks in the other norms."""
    return attack_unseen(
        this.model,
        this.images,
        this.threat,
        engine=this.engine,
        batch_size=this.target.batch_size,
        seed=this.target.options.seed,
        ends=ends,
        progress=progress,
        journal=this.journal,
        shard=shard,
        replay=this.replay,
    )


def _certificates(this: _Prepared, progress: Progress) -> Result:
    """What can be proved; the first rank does it for all."""
    size, engine, found = this.target.batch_size, this.engine, Result()
    smoothing = this.asked.smoothing
    alone = replace(engine, rank=0, world=1, precision="fp32")
    common: dict[str, Any] = {"engine": alone, "batch_size": size, "progress": progress}
    if this.asked.bounds:
        found["verified"] = engine.first(
            lambda: verified_accuracy(this.model, this.images, this.threat, **common)
        )
    if smoothing is not None:
        seed = this.target.options.seed
        found["smoothed"] = engine.first(
            lambda: smoothed_accuracy(this.model, this.images, smoothing, seed=seed, **common)
        )
    return found


def _record(this: _Prepared, result: Result) -> None:
    """Write the files that were asked for; a finished result goes to its run as well."""
    asked, writes, folder = this.asked, this.engine.rank == 0, this.target.folder
    if asked.output is not None and writes:
        EvaluationRecord.parse(result, asked.output).write(asked.output)
    if is_unfinished(result):
        return
    if this.kept is not None and asked.adversarial is not None:
        natural = next(batches(this.images, len(this.images))).image
        save_adversarial(asked.adversarial, result, this.kept.get(WORST, natural), this.images)
    if asked.robustbench is not None and writes:
        write_json(asked.robustbench, robustbench_record(result))
    if folder is not None and writes:
        folder.keep("evaluations", result)
    this.journal.remove()


def _sharded(shard: str | None, shards: int | None) -> Shard | int | None:
    """The shard that was asked for, or the number of those to merge."""
    if shard is not None and shards is not None:
        raise ConfigError(f"shard {shard} is one of its shards already; leave out shards={shards}")
    if shards is not None and shards < 1:
        raise ConfigError(f"shards: expected 1 or more, got {shards}")
    return shards if shard is None else Shard.parse(shard)


def _curve(attack: str | None, epsilons: Sequence[str | float] | None) -> Curve | None:
    if attack is None:
        if epsilons is not None:
            raise ConfigError("epsilons are the radii of a curve; name its attack: curve=pgd20")
        return None
    check_attacks([attack])
    if evaluation_attack(attack).minimum:
        raise ConfigError(
            f"the attack {attack} measures the whole curve by itself; put it among the attacks"
        )
    if epsilons is None:
        return Curve(attack)
    radii = []
    for text in epsilons:
        try:
            radii.append(Ratio(text))
        except ValueError as error:
            raise ConfigError(f"epsilons: {error}") from None
    if not radii or min(radii) <= 0:
        raise ConfigError("epsilons: expected radii above 0 such as 1/255,2/255")
    return Curve(attack, tuple(dict.fromkeys(radii)))


def _partial(output: Path | None, target: Target, identity: Identity) -> Path | None:
    """The file of the journal; None for a network alone."""
    if output is not None:
        return partial_of(output)
    if target.folder is None:
        return None
    how = target.options
    return target.folder.partial_evaluation(
        f"{how.checkpoint}-{how.split}-{short(identity)}{SUFFIX}"
    )


def is_unfinished(result: Result) -> bool:
    """Whether time ran out for an attack, in any norm."""
    return any("unfinished" in part for part in (result, *result.get("unseen", {}).values()))


def _unfinished(output: Path) -> bool:
    """Whether it is a result that ran out of time and can be continued."""
    if not partial_of(output).is_file():
        return False
    try:
        EvaluationRecord.read(output)
    except CheckpointError:
        return False
    return is_unfinished(read_json(output))
