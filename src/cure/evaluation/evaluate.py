"""Evaluate a target, or verify adversarial images that somebody made for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.registry import evaluation_attack
from cure.config import Ratio, ThreatConfig
from cure.data import ImageSet, batches
from cure.errors import ConfigError
from cure.evaluation.diagnosis import cheap_checks
from cure.evaluation.export import check_claim, read_claim, robustbench_record, save_adversarial
from cure.evaluation.journal import SUFFIX, Identity, Journal, partial_of, short
from cure.evaluation.runner import WORST, Curve, Progress, Result, identify, measure, silent
from cure.evaluation.target import ModelOptions, Split, check_counts, subject_of, threat_of
from cure.models import describe
from cure.runs.folder import RunFolder
from cure.runs.run import Run
from cure.training.setup import check_attacks
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import check_free, write_json

RESULT_FORMAT = "cure-evaluation-1"


def evaluate(
    target: str | Path | Run | nn.Module,
    *,
    data: str | Path | ImageSet | None = None,
    split: Split = "test",
    limit: int | None = None,
    attacks: str | Sequence[str] | None = None,
    epsilon: str | float | None = None,
    norm: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    precision: Literal["fp32", "bf16_attack"] = "fp32",
    transfer: str | Path | Run | nn.Module | None = None,
    curve: str | None = None,
    epsilons: Sequence[str | float] | None = None,
    output: str | Path | None = None,
    robustbench: str | Path | None = None,
    adversarial: str | Path | None = None,
    time_limit: float | None = None,
    progress: Progress = silent,
) -> Result:
    """Accuracy on natural and on attacked images, with all it takes to repeat the number.

    Args:
        target: a run (or its folder), a network, or the name of one (``cure list models``,
            ``package.module:callable``, ``hf:...``, ``timm:...``).
        data: images; needed unless the target is a run, which knows its own.
        split: which split; test images are for final figures.
        limit: only the first so many images.
        attacks: names from ``cure list attacks``, as a list or as "pgd20,cw"; "natural" is
            implied.
        epsilon: radius of the threat, "8/255" or a number; by default the run's, else 8/255.
        norm: "Linf" or "L2"; by default the run's, else Linf.
        checkpoint: which weights of a run.
        weights: weights file for a named network.
        mean: with ``std``: what the network expects its input to be standardised with.
        std: see ``mean``.
        options: options of a named network.
        data_options: further keys of the ``data`` section ({"resize": 224}).
        batch_size: images attacked at once.
        device: "auto", "cpu", "cuda".
        seed: of random starts.
        precision: "bf16_attack" attacks in bfloat16, in less time and less strongly; every image
            that counts as fooled is wrong in float32.
        transfer: a network to craft the attack "transfer" on: a run, or whatever ``target`` may
            be, for the same classes.
        curve: also measure accuracy over epsilon with this attack, from 0.25/255 up to where none
            is right.
        epsilons: the radii of the curve instead: ["1/255", 0.01].
        output: JSON file to write; must not exist, unless it is the unfinished result that this
            call goes on with.
        robustbench: file to write the record to that RobustBench's leaderboard takes; needs
            "autoattack" among the attacks.
        adversarial: file (.pt) to write the worst-case images to, which :func:`verify` checks;
            written when all attacks are finished.  What an interrupted call found is found again.
        time_limit: seconds after which attacks stop; what is missing then stands under
            "unfinished".
        progress: told (attack, images done, images in all).

    Returns:
        The result, as documented in docs/results.md.  Until it is finished, its verdicts are kept
        in ``OUTPUT.partial``, or in the ``evaluations`` of the run: the same call goes on there.

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.
    """
    if output is None or not _unfinished(Path(output)):
        check_free(output)
    for further in (robustbench, adversarial):
        check_free(further)
    check_counts(limit=limit, batch_size=batch_size)
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise ConfigError(f"time_limit: expected seconds above 0, got {time_limit:g}")
    subject = subject_of(target, checkpoint, weights, ModelOptions(mean, std, dict(options or {})))
    config = subject.config
    if isinstance(attacks, str):
        attacks = [name.strip() for name in attacks.split(",")]
    if attacks is None:
        attacks = config.evaluation.attacks if config else ("natural", "pgd20", "cw")
    check_attacks(name for name in attacks if name != "transfer" or transfer is None)
    over = _curve(curve, epsilons)
    if robustbench is not None and "autoattack" not in attacks:
        raise ConfigError(
            "RobustBench's record needs AutoAttack's accuracy; add autoattack to the attacks"
        )
    engine = Engine.for_evaluation(device, precision)
    if adversarial is not None and engine.world > 1:
        raise ConfigError(
            f"adversarial images are kept by one process, got {engine.world} ranks; evaluate "
            "without a launcher"
        )
    with engine.agreeing():
        images, model = subject.load(data, split, data_options or {})
        source = None if transfer is None else _source(transfer, images, engine)
    if limit is not None:
        images = images.subset(slice(0, limit))
    threat = threat_of(config.threat if config else ThreatConfig(), epsilon, norm)
    size = batch_size or (config.evaluation.batch_size if config else 256)
    ball = Threat(threat.norm, threat.epsilon)
    identity = identify(model, images, attacks, ball, engine, size, seed, source, over)
    keep: dict[str, Tensor] | None = None if adversarial is None else {}
    with engine.agreeing():
        writes = engine.rank == 0
        # Of what a journal knows there are no images.
        resumable = writes and keep is None
        where = _partial(output, subject.folder, checkpoint, split, identity) if resumable else None
        journal = Journal(where, identity)
    with journal:
        result = measure(
            engine.place(model),
            images,
            attacks,
            ball,
            engine=engine,
            batch_size=size,
            seed=seed,
            progress=progress,
            time_limit=time_limit,
            journal=journal,
            source=source,
            curve=over,
            keep=keep,
        )
        # Of other images a run knows nothing.
        known = subject.validation_accuracy() if data is None and not data_options else None
        result = {
            "format": RESULT_FORMAT,
            "target": subject.name,
            **result,
            "diagnosis": engine.first(
                lambda: cheap_checks(
                    model,
                    images,
                    ball,
                    engine=replace(engine, rank=0, world=1, precision="fp32"),
                    seed=seed,
                    expected=known,
                )
            ),
            "threat": {
                "norm": threat.norm,
                "epsilon": float(threat.epsilon),
                "epsilon_text": threat.epsilon.text,
            },
            "data": {
                "name": images.name,
                "split": images.split,
                "n": len(images),
                "classes": list(images.classes),
                "classes_present": len(set(images.label.tolist())),
                "size": [images.channels, *images.size],
            },
            "model": describe(model) | subject.facts,
            "seed": seed,
            "batch_size": size,
            "environment": environment(),
        }
        if output is not None and writes:
            write_json(Path(output), result)
        if "unfinished" not in result:
            if keep is not None and adversarial is not None:
                natural = next(batches(images, len(images))).image
                save_adversarial(Path(adversarial), result, keep.get(WORST, natural), images)
            if robustbench is not None and writes:
                write_json(Path(robustbench), robustbench_record(result))
            if subject.folder is not None and writes:
                subject.folder.keep("evaluations", result)
            journal.remove()
    return result


def verify(
    file: str | Path,
    target: str | Path | Run | nn.Module,
    *,
    data: str | Path | ImageSet | None = None,
    split: Split = "test",
    epsilon: str | float | None = None,
    norm: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    batch_size: int = 256,
    device: str = "auto",
    output: str | Path | None = None,
) -> Result:
    """Recompute an accuracy that is claimed of adversarial images, and check the images.

    Args:
        file: what ``evaluate(adversarial=...)`` wrote, ``{"adv_complete": images}`` as AutoAttack's
            users save it, or a tensor alone; images of the first N natural ones, in their order.
        target: the network, and the following: as in :func:`evaluate`.
        data: as there.
        split: as there.
        epsilon: radius of the ball; by default what the file says, else the run's.
        norm: as ``epsilon``.
        checkpoint: as in :func:`evaluate`.
        weights: as there.
        mean: as there.
        std: as there.
        options: as there.
        data_options: as there.
        batch_size: images at once.
        device: as there.
        output: JSON file to write; must not exist.

    Returns:
        ``format`` "cure-verification-1" and what :func:`~cure.evaluation.export.check_claim` says.

    Raises:
        CureError: for every mistake a user can mend.
    """
    check_free(output)
    claim = read_claim(file)
    subject = subject_of(target, checkpoint, weights, ModelOptions(mean, std, dict(options or {})))
    engine = Engine.for_evaluation(device)
    images, model = subject.load(data, split, data_options or {})
    base = subject.config.threat if subject.config else ThreatConfig()
    if claim.threat is not None:
        base = threat_of(base, claim.threat.epsilon, claim.threat.norm)
    threat = threat_of(base, epsilon, norm)
    result = {
        "format": "cure-verification-1",
        "target": subject.name,
        "file": str(file),
        **check_claim(
            claim,
            engine.place(model).eval(),
            images,
            Threat(threat.norm, threat.epsilon),
            engine,
            batch_size,
        ),
        "threat": {"norm": threat.norm, "epsilon": float(threat.epsilon)},
        "environment": environment(),
    }
    if output is not None:
        write_json(Path(output), result)
    return result


def _source(transfer: str | Path | Run | nn.Module, images: ImageSet, engine: Engine) -> nn.Module:
    """The network that a transfer attack crafts on, in evaluation mode."""
    network = subject_of(transfer, "best", None, ModelOptions()).build(images)
    return engine.place(network).eval().requires_grad_(False)


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
    return Curve(attack, tuple(radii))


def _partial(
    output: str | Path | None,
    folder: RunFolder | None,
    checkpoint: str,
    split: str,
    identity: Identity,
) -> Path | None:
    """Where the verdicts of an unfinished evaluation are kept; nowhere for a network alone."""
    if output is not None:
        return partial_of(Path(output))
    if folder is None:
        return None
    return folder.partial_evaluation(f"{checkpoint}-{split}-{short(identity)}{SUFFIX}")


def _unfinished(output: Path) -> bool:
    """Whether it is a result that ran out of time and can be gone on with."""
    if not partial_of(output).is_file():
        return False
    try:
        content = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(content, dict)
        and content.get("format") == RESULT_FORMAT
        and bool(content.get("unfinished"))
    )
