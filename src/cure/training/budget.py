"""Settings that depend on the data and the machine, fixed before a run begins."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import torch

from cure.config import NATURAL, ROBUST, RunConfig
from cure.data import Batch, steps_per_epoch
from cure.errors import ConfigError
from cure.methods.wrappers.averaging import recompute_statistics
from cure.registry import METHODS
from cure.training.catastrophic import detector_of
from cure.training.optimizer import build_optimizer
from cure.training.outcome import FEW_STEPS, FINAL_STEPS
from cure.training.resources import fit_memory
from cure.training.setup import Prepared, build_method, natural_images
from cure.training.step import arranged, optimizer_step, training_batches
from cure.training.validation import validate

TIMED_STEPS = 3

MARGIN = 0.95
"""Share of the budget that is planned, for what is not timed: saving, the measured start."""


def settle(config: RunConfig, prepared: Prepared) -> tuple[RunConfig, list[str]]:
    """The run with numbers in the place of shares and budgets that depend on the machine and data,
    and what to tell of its memory.

    A share in ``data.validation`` becomes a count, ``training.minutes`` and ``training.min_steps``
    a number of epochs, ``accumulation_steps=auto`` a number of parts and ``cutmix=auto`` an alpha;
    what is written to the run folder is what a resumed run repeats.
    """
    if config.data.validation < 1:
        # The split is drawn from all images, so the damaged ones in it count.
        carved = prepared.training.findings.held_out
        count = len(prepared.validation) if carved is None else carved
        data = config.data.model_copy(update={"validation": count})
        config = config.model_copy(update={"data": data})
    config, told = fit_memory(config, prepared)
    steps = steps_per_epoch(prepared.training, config.training.batch_size)
    config, raised = reach_steps(config, steps)
    config, mixed = decide_cutmix(fit_epochs(config, prepared), steps)
    slow = prepared.engine.slow_precision()
    told += [] if slow is None else [f"training.precision: {slow}"]
    return config, told + raised + mixed + _beside(config)


def _beside(config: RunConfig) -> list[str]:
    """Notes on settings that are valid but may be unintended."""
    told, radius, threat = [], config.training_epsilon, config.threat.epsilon
    if radius < threat:
        told.append(
            f"the training attack has the radius {radius:.4g}, smaller than "
            f"threat.epsilon={threat}: training sees a weaker attack than evaluation"
        )
    reach = config.attack.steps * config.attack.step_size
    across = f"attack.step_size={radius / 4:.4g}"
    if config.attack.name == "pgd" and reach < radius / 2:
        told.append(
            f"{config.attack.steps} attack steps of {config.attack.step_size} go {reach:.3g} of "
            f"the radius {radius:.4g}, so training sees a weak attack: {across} crosses it"
        )
    if not METHODS[config.method.name].takes_objective and config.attack.objective != "method":
        told.append(
            f"attack.objective={config.attack.objective} does nothing with {config.method.name}, "
            "whose attack has an objective of its own: leave it out"
        )
    if config.attack.check_every and config.attack.name == "pgd" and config.attack.steps == 1:
        told.append(
            "attack.check_every does nothing with attack.name=pgd, although one step of it can "
            "overfit catastrophically: set attack.name=n-fgsm, or attack.steps=2"
        )
    if config.training.minutes is not None and (besides := _besides(config)):
        told.append(f"{besides} trained besides the budget of training.minutes")
    return told


def _besides(config: RunConfig) -> str:
    """What is trained before the first step of a run, with its verb."""
    teachers = config.method.teachers().values()
    found = []
    if config.starts_naturally:
        found.append("the natural start")
    elif any(teacher.path == NATURAL for teacher in teachers):
        found.append("the natural teacher")
    if config.start.startswith(ROBUST) and config.head.share:
        found.append("the new head")
    trained = sum(teacher.recipe is not None for teacher in teachers)
    if trained:
        found.append("the teacher" if trained == 1 else "the teachers")
    verb = "is" if len(found) == 1 and trained < 2 else "are"
    return f"{' and '.join(found)} {verb}" if found else ""


def reach_steps(config: RunConfig, steps: int) -> tuple[RunConfig, list[str]]:
    """The run with epochs enough for ``training.min_steps``, and a line where there are more.

    Where there are, ``training.validate_every`` grows with them.  A budget in ``training.minutes``
    goes before it.

    Args:
        config: the run.
        steps: of an epoch.

    Example:
        >>> from cure.recipe import load_recipe
        >>> config = load_recipe("digits", ["training.min_steps=1000"])
        >>> config, told = reach_steps(config, 20)
        >>> config.training.epochs, config.training.min_steps
        (50, None)
    """
    training = config.training
    if training.min_steps is None:
        return config, []
    least = 0 if training.minutes is not None else training.min_steps
    epochs = max(training.epochs, -(-least // steps))
    every = training.validate_every * epochs // training.epochs
    if epochs > training.epochs:
        every = min(every, max(training.validate_every, epochs // 4))
    fixed = {"epochs": epochs, "min_steps": None, "validate_every": every}
    changed = training.model_copy(update=fixed)
    told = []
    if epochs > training.epochs:
        told.append(
            f"{epochs} epochs in the place of {training.epochs}, to reach {training.min_steps:,} "
            f"steps with few images (training.epochs={training.epochs} keeps the fewer)"
        )
    return config.model_copy(update={"training": changed}), told


def decide_cutmix(config: RunConfig, steps: int) -> tuple[RunConfig, list[str]]:
    """The run with a number in the place of ``data.augment.cutmix=auto``, and why where it is 0.

    Args:
        config: the run, with its number of epochs.
        steps: of an epoch.
    """
    augment, steps = config.data.augment, steps * config.training.epochs
    if augment.cutmix != "auto":
        return config, []
    told = []
    if not METHODS[config.method.name].soft_labels:
        told.append(f"no CutMix: the loss of {config.method.name} takes no soft labels")
    elif steps < FEW_STEPS:
        told.append(
            f"no CutMix: {steps:,} steps are too few for mixed images (it takes {FEW_STEPS})"
        )
    chosen = augment.model_copy(update={"cutmix": 0.0 if told else 1.0})
    data = config.data.model_copy(update={"augment": chosen})
    return config.model_copy(update={"data": data}), told


def fit_epochs(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The run with as many epochs as fit into ``training.minutes``.

    A few steps and a validation are timed on a copy of the network.  The schedule of the learning
    rate and of epsilon is a function of the share of the run, so it fits any number of epochs.

    Args:
        config: the run; returned as it is where it has no budget.
        prepared: its data and networks; not changed.

    Raises:
        ConfigError: when not even one epoch fits.
    """
    minutes = config.training.minutes
    if minutes is None:
        return config
    step, validation = _times(config, prepared)
    each = step * steps_per_epoch(prepared.training, config.training.batch_size)
    each += validation / config.training.validate_every
    # The start and the best weights are validated under more steps.
    used = config.training.validation_steps
    longer = max(2.0, (max(FINAL_STEPS, used) + 1) / (used + 1))
    left = MARGIN * 60 * minutes - 2 * longer * validation
    (left, each) = (prepared.engine.largest(-left)[0] * -1, prepared.engine.largest(each)[0])
    epochs = int(left // each)
    if epochs < 1:
        raise ConfigError(
            f"training.minutes: an epoch takes about {each / 60:.1f} minutes here, got a budget of "
            f"{minutes:g}; give more minutes, fewer images (data.limit) or smaller ones "
            "(data.resize)"
        )
    training = config.training.model_copy(update={"epochs": epochs})
    return config.model_copy(update={"training": training})


def _times(config: RunConfig, prepared: Prepared) -> tuple[float, float]:
    """Seconds of a training step, with its share of what is done seldom, and of a validation."""
    engine = prepared.engine
    network = engine.place(copy.deepcopy(prepared.network))
    teachers = {role: engine.place(teacher) for role, teacher in prepared.teachers.items()}
    method = build_method(config, replace(prepared, network=network, teachers=teachers))
    parameters = method.trainable()
    optimizer = build_optimizer(config.training.optimizer, method.model, parameters)
    each = steps_per_epoch(prepared.training, config.training.batch_size)
    method.on_epoch(0)
    method.train()
    extra = None if prepared.extra is None else prepared.extra.images.to(engine.device)
    found = training_batches(config, prepared.training.to(engine.device), extra, engine, 0)

    def step(batch: Batch) -> None:
        method.on_epoch(batch.step // each)
        optimizer_step(method, optimizer, parameters, arranged(batch, engine), config)
        method.after_step(batch.step)

    batches = [batch for batch, _ in zip(found, range(TIMED_STEPS), strict=False)]
    step(batches[0])  # The first call allocates and, where it is asked for, compiles.
    # Steps differ along a run: warm-ups end, and wrappers begin.
    last, period = config.training.epochs * each - 1, method.period
    timed = []
    for share, batch in zip((0, 1 / 2, 1), cycle(batches), strict=False):
        place = round(share * last)
        due = place - place % period + period - 1
        once = _seconds(step, replace(batch, step=due), engine.device)
        if period > 1:
            other = _seconds(step, replace(batch, step=due - 1), engine.device)
            once = (once + (period - 1) * other) / period
        timed.append(once)
    seconds = sum(timed) / len(timed)
    detector = detector_of(config, method)
    if detector is not None and detector.every <= last + 1:
        checked, parts = detector, config.training.parts
        checks = (last + 1) // detector.every
        shown = replace(batches[0], step=checks * detector.every - 1)
        check = _seconds(lambda batch: checked.overfits(batch, parts), shown, engine.device)
        seconds += check / detector.every
    if passes := _statistics_passes(config):
        image = next(natural_images(prepared, config.evaluation.batch_size))
        once = _seconds(lambda one: recompute_statistics(network, [one]), image, engine.device)
        seconds += passes * once * len(prepared.training) / len(image) / each
    count = min(len(prepared.validation), config.evaluation.batch_size)
    some = prepared.validation.subset(slice(0, count)).to(engine.device)
    part = _seconds(lambda _: validate(network, some, config, engine), None, engine.device)
    return seconds, part * len(prepared.validation) / count


def _statistics_passes(config: RunConfig) -> int:
    """How often the training images are passed in an epoch for BatchNorm's statistics."""
    averaging = config.training.averaging
    own = averaging is not None and averaging.batch_norm == "recomputed"
    return int(config.training.batch_norm == "train") + int(own)


def _seconds(call: Callable[..., object], argument: object, device: torch.device) -> float:
    """Wall time of a call; on a GPU until its work is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    call(argument)
    return now() - began
