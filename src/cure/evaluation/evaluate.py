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
from cure.config import EvaluationConfig, Ratio
from cure.data import ImageSet, batches
from cure.errors import CheckpointError, ConfigError, CureNote, notes_kept
from cure.evaluation.auto import AUTO, choose_attacks
from cure.evaluation.bounds import check_linf, verified_accuracy
from cure.evaluation.diagnosis import cheap_checks
from cure.evaluation.gate import Requirement, check_requirements
from cure.evaluation.journal import SUFFIX, Identity, Journal, partial_of, short
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
    output, robustbench = user_path(output), user_path(robustbench)
    adversarial = user_path(adversarial)
    sharded = _sharded(
        shard,
        shards,
        output,
        adversarial=adversarial,
        float=float_network,
        time_limit=time_limit,
    )
    if output is None or not _unfinished(Path(output)):
        check_free(output)
    for further in (robustbench, adversarial):
        check_free(further)
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise ConfigError(f"time_limit: expected seconds above 0, got {time_limit:g}")
    limits = [Requirement.parse(text) for text in require]
    with notes_kept() as notes:
        chosen = Target.of(target, **options)
        names = _attack_names(attacks, chosen, transfer is not None, float_network is not None)
        names = _with_required(names, limits, transfer is not None)
        _check_attacks_fit(names, time_limit, robustbench)
        threat = chosen.threat(epsilon, norm)
        if bounds:
            check_linf(threat)
        if smoothing is not None:
            check_sigma(smoothing)
        engine = Engine.for_evaluation(chosen.options.device, precision)
        if slow := engine.slow_precision():
            warnings.warn(slow, CureNote, stacklevel=3)
        evaluation = _prepare(
            chosen,
            names,
            _curve(curve, epsilons),
            threat,
            engine,
            transfer,
            output,
            keep_images=adversarial is not None,
            per_image=per_image or unseen,
            unseen=unseen,
            bounds=bounds,
            float_network=float_network,
            time_limit=time_limit,
            sharded=sharded,
        )
        with evaluation.journal, network_errors():
            if isinstance(sharded, Shard):
                return _measure_shard(evaluation, sharded, progress)
            ends = math.inf if time_limit is None else time.monotonic() + time_limit
            result = _measure(evaluation, ends, progress)
            if unseen:
                found = _unseen(evaluation, ends, progress)
                threats = unseen_threats(evaluation.threat, evaluation.images)
                result["unseen"] = with_all_threats(result, found, threats)
            result |= _certificates(evaluation, bounds, smoothing, progress)
            note = masking_note(result, traits_of(evaluation.model).gradient)
            if note:
                warnings.warn(note, CureNote, stacklevel=3)
            result["notes"] = notes
            if limits:
                result["requirements"] = check_requirements(result, limits, require_lower_bound)
            _record(evaluation, result, output, robustbench, adversarial)
    return result


@dataclass(frozen=True)
class _Prepared:
    """An evaluation before its first attack.

    Attributes:
        target: what is evaluated.
        images: on which images.
        model: the network, on the device of ``engine``.
        attacks: names.
        curve: accuracy over epsilon, where it was asked for.
        threat: the ball.
        engine: device, precision and ranks.
        source: the network that the attack "transfer" uses.
        journal: batches that are finished.
        kept: the fooling images (see :func:`~cure.evaluation.runner.measure`), where asked for.
        per_image: whether to say which images are right.
        unseen: whether to attack in the other norms too.
        replay: the float network that a file without gradients was made from.
    """

    target: Target
    images: ImageSet
    model: nn.Module
    attacks: Sequence[str]
    curve: Curve | None
    threat: Threat
    engine: Engine
    source: nn.Module | None
    journal: Journal
    kept: dict[str, Tensor] | None
    per_image: bool
    unseen: bool
    replay: nn.Module | None = None


def _prepare(
    target: Target,
    attacks: Sequence[str],
    curve: Curve | None,
    threat: Threat,
    engine: Engine,
    transfer: TargetLike | None,
    output: str | Path | None,
    *,
    keep_images: bool,
    per_image: bool,
    unseen: bool,
    bounds: bool,
    float_network: TargetLike | None = None,
    time_limit: float | None,
    sharded: Shard | int | None = None,
) -> _Prepared:
    """Load images and networks, and open the journal."""
    if keep_images and engine.world > 1:
        raise ConfigError(
            f"adversarial images are kept by one process, got {engine.world} ranks; evaluate "
            "without a launcher"
        )
    with engine.agreeing():
        images, model = target.load()
        source = None
        if transfer is not None:
            source = engine.place(Target.of(transfer).build(images))
            source = in_evaluation(source).requires_grad_(False)
        replay = None
        if float_network is not None:
            if traits_of(model).gradient:
                raise ConfigError(
                    f"{target.name} has gradients, so attacks run on it; leave out float"
                )
            replay = engine.place(Target.of(float_network).build(images))
            replay = in_evaluation(replay).requires_grad_(False)
    size, seed = target.batch_size, target.options.seed
    model = engine.place(model)
    if AUTO in attacks:
        assert time_limit is not None
        limit, network = time_limit, in_evaluation(model)
        found, sentence = engine.first(
            lambda: choose_attacks(network, images, threat, engine, size, limit)
        )
        attacks = list(dict.fromkeys([*found, *(name for name in attacks if name != AUTO)]))
        warnings.warn(sentence, CureNote, stacklevel=2)
    identity = identify(model, images, attacks, threat, engine, size, seed, source, curve, replay)
    if bounds:
        verified_accuracy(in_evaluation(model), images.subset(slice(0, 1)), threat, engine=engine)
    if unseen:
        check_unseen(model, images, threat, replay)
        others = unseen_threats(threat, images)
        identity["unseen"] = {norm: float(other.epsilon) for norm, other in others.items()}
    with engine.agreeing():
        if sharded is not None and engine.world > 1:
            raise ConfigError("ranks share the batches already; leave out shards, or the launcher")
        # A journal holds no images, so nothing can be continued where images are kept.
        resumable = engine.rank == 0 and not keep_images
        journal = (
            _shard_journal(sharded, output, identity)
            if sharded is not None
            else Journal(_partial(output, target, identity) if resumable else None, identity)
        )
    return _Prepared(
        target,
        images,
        model,
        attacks,
        curve,
        threat,
        engine,
        source,
        journal,
        {} if keep_images else None,
        per_image,
        unseen,
        replay,
    )


def _shard_journal(sharded: Shard | int, output: str | Path | None, identity: Identity) -> Journal:
    """The file of one shard, or those of all to be merged."""
    assert output is not None
    whole = Path(output)
    if isinstance(sharded, int):
        return MergedShards(whole, sharded, identity)
    return Journal(sharded.file(whole), sharded.identity(identity))


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
        curve=this.curve,
        **options,
    )


def _measure_shard(this: _Prepared, shard: Shard, progress: Progress) -> Result:
    """Run the attacks on the images of a shard; what they found stays in its file."""
    _attacked(this, progress, shard=shard)
    if this.unseen:
        _unseen(this, math.inf, progress, shard)
    return {
        "format": "cure-evaluation-shard-1",
        "shard": str(shard),
        "images": int(shard.holds(len(this.images)).sum()),
        "file": str(this.journal.path),
    }


def _measure(this: _Prepared, ends: float, progress: Progress) -> Result:
    """Run the attacks and the cheap checks: the content of the result file."""
    target, images, threat, engine = this.target, this.images, this.threat, this.engine
    measured = _attacked(
        this,
        progress,
        ends=ends,
        keep=this.kept,
        per_image=this.per_image or this.replay is not None,
        replay=this.replay,
    )
    beside: Result = {}
    if this.replay is not None:
        beside["float"] = compared(
            measured,
            this.replay,
            images,
            threat,
            engine=engine,
            batch_size=target.batch_size,
            seed=target.options.seed,
            ends=ends,
            progress=progress,
        )
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
    return {
        "format": EVALUATION_FORMAT,
        "target": target.name,
        **measured,
        **beside,
        "diagnosis": diagnosis,
        "threat": {
            "norm": threat.norm,
            "epsilon": float(threat.epsilon),
            "epsilon_text": str(threat.epsilon),
        },
        "data": describe_images(images)
        | {"limit": target.options.limit, "own": target.measures_own},
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


def _certificates(
    this: _Prepared, bounds: bool, smoothing: float | None, progress: Progress
) -> Result:
    """What can be proved; the first rank does it for all."""
    size, engine, found = this.target.batch_size, this.engine, Result()
    alone = replace(engine, rank=0, world=1, precision="fp32")
    common: dict[str, Any] = {"engine": alone, "batch_size": size, "progress": progress}
    if bounds:
        found["verified"] = engine.first(
            lambda: verified_accuracy(this.model, this.images, this.threat, **common)
        )
    if smoothing is not None:
        seed = this.target.options.seed
        found["smoothed"] = engine.first(
            lambda: smoothed_accuracy(this.model, this.images, smoothing, seed=seed, **common)
        )
    return found


def _record(
    this: _Prepared,
    result: Result,
    output: str | Path | None,
    robustbench: str | Path | None,
    adversarial: str | Path | None,
) -> None:
    """Write the files that were asked for; a finished result goes to its run as well."""
    writes, folder = this.engine.rank == 0, this.target.folder
    if output is not None and writes:
        EvaluationRecord.parse(result, output).write(Path(output))
    if is_unfinished(result):
        return
    if this.kept is not None and adversarial is not None:
        natural = next(batches(this.images, len(this.images))).image
        save_adversarial(Path(adversarial), result, this.kept.get(WORST, natural), this.images)
    if robustbench is not None and writes:
        write_json(Path(robustbench), robustbench_record(result))
    if folder is not None and writes:
        folder.keep("evaluations", result)
    this.journal.remove()


def _attack_names(
    attacks: str | Sequence[str] | None, target: Target, with_source: bool, with_float: bool
) -> Sequence[str]:
    """The attacks that were asked for, else the run's; unknown ones are refused."""
    if attacks is None and target.is_onnx:
        attacks = [*(EvaluationConfig().attacks if with_float else ()), "noise", "square"]
    if isinstance(attacks, str):
        attacks = [name.strip() for name in attacks.split(",")]
    if attacks is None:
        attacks = target.config.evaluation.attacks if target.config else EvaluationConfig().attacks
    known = (AUTO, "transfer") if with_source else (AUTO,)
    check_attacks(name for name in attacks if name not in known)
    return [attack_name(name) for name in attacks]


def _with_required(
    names: Sequence[str], limits: Sequence[Requirement], with_source: bool
) -> Sequence[str]:
    """The attacks, and those that a requirement names."""
    wanted = [limit.attack for limit in limits if limit.attack not in ("natural", WORST)]
    check_attacks(name for name in wanted if name != "transfer" or not with_source)
    return [*names, *(name for name in dict.fromkeys(wanted) if name not in names)]


def _check_attacks_fit(
    names: Sequence[str], time_limit: float | None, robustbench: str | Path | None
) -> None:
    """Refuse attacks that what else was asked for does not go with."""
    if AUTO in names and time_limit is None:
        raise ConfigError(
            "attacks: auto needs a time limit in seconds; say --attacks auto --time-limit 600"
        )
    if robustbench is not None and "autoattack" not in names:
        raise ConfigError(
            "RobustBench's record needs AutoAttack's accuracy; add autoattack to the attacks"
        )


def _sharded(
    shard: str | None, shards: int | None, output: str | Path | None, **others: Any
) -> Shard | int | None:
    """The shard that was asked for, or the number of those to merge; what it goes with."""
    if shard is None and shards is None:
        return None
    if shard is not None and shards is not None:
        raise ConfigError(f"shard {shard} is one of its shards already; leave out shards={shards}")
    if shards is not None and shards < 1:
        raise ConfigError(f"shards: expected 1 or more, got {shards}")
    if output is None:
        raise ConfigError("shards are merged into a file; name it: --output result.json")
    for name, value in others.items():
        if value is not None:
            raise ConfigError(
                f"{name} is not kept by shards; leave it out, or evaluate in one process"
            )
    return Shard.parse(shard) if shard is not None else shards


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


def _partial(output: str | Path | None, target: Target, identity: Identity) -> Path | None:
    """The file of the journal; None for a network alone."""
    if output is not None:
        return partial_of(Path(output))
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
