"""What a run needs before its first step: data, splits, networks, teachers, method, attack.

:func:`prepare` refuses everything that can be refused before a run folder is made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cure.attacks import PGD, Threat
from cure.attacks.losses import CROSS_ENTROPY
from cure.attacks.nfgsm import NFGSM
from cure.attacks.registry import check_attacks
from cure.config import NATURAL, RunConfig, TeacherConfig
from cure.data import ImageKind, ImageSet, batches, carve, load_training, steps_per_epoch
from cure.data.cache import CachePlace, no_words
from cure.data.sources import check_not_memory
from cure.errors import CheckpointError, ConfigError, CureError, DataError, ModelError, some
from cure.methods import METHODS, Context, Method
from cure.methods.wrappers.averaging import Averaging
from cure.methods.wrappers.awp import AWP
from cure.models import load_weights
from cure.models.batch_norm import freeze_statistics
from cure.models.blocks import STEM, blocks, chosen, learn_only
from cure.models.build import network_of
from cure.models.checks import check_outputs
from cure.models.trial import check_trainable, fitted
from cure.models.wrapper import constants_inside
from cure.recipe import changed, check, read_recipe
from cure.runs.folder import RunFolder, best_weights
from cure.training.extra import Extra, choose_extra, is_chosen
from cure.training.schedule import learning_rate, progress_at
from cure.training.start import Origin, check_unseen, keeps_head, order_start, standardised_as_start
from cure.training.tracking import check_trackers
from cure.utils.engine import Engine
from cure.utils.modes import evaluating, in_evaluation


@dataclass(frozen=True)
class Prepared:
    """What a run needs besides its folder.

    Attributes:
        engine: device and precision.
        training: the images to train on.
        validation: those held out.
        network: the network at its start; a natural start is loaded later.
        initial: the same network as it was built.
        teachers: networks by role; one that is yet to be trained has its first weights.
        extra: more images to train on.
    """

    engine: Engine
    training: ImageSet
    validation: ImageSet
    network: nn.Module
    initial: nn.Module
    teachers: dict[str, nn.Module] = field(default_factory=dict)
    extra: Extra | None = None
    fresh: bool = True
    """Whether the run has no state yet, from which its weights and its teachers' would come."""
    decides_cutmix: bool = False
    """Whether ``cutmix=auto`` was asked for, which each run decides by its own length."""


def prepare(
    config: RunConfig,
    images: ImageSet | None,
    model: nn.Module | None,
    folder: RunFolder | None = None,
    place: CachePlace | None = None,
) -> Prepared:
    """Data, splits, device and networks of a run: whatever can be refused is refused here.

    Args:
        config: the run.
        images: its images, when they are in memory.
        model: its network, when it is a Python object.
        folder: where it already is; a run with a state takes its weights from there, not from its
            start.
        place: where ``data.cache`` keeps decoded images; by default beside ``folder``.
    """
    engine = Engine.of(config.training)
    if place is None:
        place = CachePlace.beside(None if folder is None else folder.path)
    if engine.rank:
        place = replace(place, say=no_words)
    labeller = None
    with engine.agreeing():
        prepared = _prepared(config, images, model, folder, engine, place)
        if config.data.extra_labels is not None and not is_chosen(folder):
            source = TeacherConfig(path=config.data.extra_labels)
            labeller = _teacher("data.extra_labels", source, config, prepared)
    if config.data.extra is None:
        return prepared
    training, validation = prepared.training, prepared.validation
    # A natural start is loaded later, so its features are not known yet.
    untrained = config.starts_naturally or config.start == "scratch"
    trained = None if untrained else prepared.network
    extra = choose_extra(config, training, validation, labeller, engine, folder, place, trained)
    return replace(prepared, extra=extra)


def _prepared(
    config: RunConfig,
    images: ImageSet | None,
    model: nn.Module | None,
    folder: RunFolder | None,
    engine: Engine,
    place: CachePlace,
) -> Prepared:
    _check_start(config)
    if config.threat.norm == "L1":
        raise ConfigError(
            "threat.norm: expected Linf or L2 to train with, got L1, in which only evaluation "
            "attacks; train with L2 and evaluate with --norm L1"
        )
    _check_augmentation(config)
    check_attacks(config.evaluation.attacks)
    check_trackers(config.tracking)
    if images is None:
        check_not_memory(config)
        training, validation = load_training(config.data, place)
    else:
        images = images.limited(config.data.limit)
        if len(images) and bool((images.label == images.label[0]).all()):
            raise DataError(
                "expected images of at least two classes to train on, got only "
                f"'{images.classes[int(images.label[0])]}'; use more images"
            )
        training, validation = carve(images, config.data.validation, config.data.split_seed)
    steps_per_epoch(training, config.training.batch_size)
    initial = network_of(config, training.kind, model)
    check_parts(config, engine)
    _check_trainable(initial, config, engine)
    if not any(parameter.requires_grad for parameter in initial.parameters()):
        raise ModelError(
            "no weight of the model may change: set requires_grad to True for those to train"
        )
    engine = fitted(engine, initial)
    sample = next(batches(training, 2)).image
    with evaluating(initial):
        check_outputs(initial, sample, len(training.classes))
    fresh = folder is None or not folder.state.exists()
    if fresh and images is None:
        check_unseen(config, training)
    network = starting_network(initial, config, training.kind, fresh)
    auto = config.data.augment.cutmix == "auto"
    prepared = Prepared(
        engine, training, validation, network, initial, fresh=fresh, decides_cutmix=auto
    )
    prepared = replace(prepared, teachers=teacher_networks(config, prepared))
    for role, teacher in prepared.teachers.items():
        try:
            check_outputs(in_evaluation(teacher), sample, len(training.classes))
        except ModelError as error:
            raise ModelError(f"method.{role}: {error}") from None
    check_method(config, prepared)
    return prepared


def starting_network(
    initial: nn.Module, config: RunConfig, kind: ImageKind, fresh: bool = True
) -> nn.Module:
    """The network with which a run begins, as far as nothing has to be trained for it.

    Args:
        initial: as it is built; receives the weights that a natural start begins with.
        config: the run.
        kind: its images.
        fresh: whether it has no state yet, so that weights come from ``start``.
    """
    if fresh and config.starts_naturally:
        _load_start(initial, config, kind)
    network = copy.deepcopy(initial)
    if config.training.batch_norm == "frozen":
        freeze_statistics(network)
    if fresh and not config.starts_naturally:
        _load_start(network, config, kind)
    choose_layers(network, config)
    return network


def choose_layers(network: nn.Module, config: RunConfig) -> None:
    """Freeze the layers that are not trained."""
    layers = config.layers
    if layers.update:
        names = chosen(network, layers.update)
        if layers.stem == "updated":
            names += blocks(network).get(STEM, [])
        learn_only(network, names, statistics=layers.statistics == "updated")


def check_parts(config: RunConfig, engine: Engine) -> None:
    """Refuse a batch that has no such parts, and a method that takes none."""
    parts, size = config.training.accumulation_steps, config.training.batch_size // engine.world
    if parts == 1:
        return
    if not METHODS[config.method.name].splits:
        able = [name for name in METHODS.names() if METHODS[name].splits]
        raise ConfigError(
            f"training.accumulation_steps: {config.method.name} rewards strategies by the whole "
            f"batch, which has to be in memory; lower training.batch_size, or take another method "
            f"({', '.join(able)})"
        )
    if parts != "auto" and size % parts:
        fitting = [n for n in range(2, size + 1) if size % n == 0]
        near = min(fitting, key=lambda n: abs(n - parts), default=1)
        raise ConfigError(
            f"training.accumulation_steps: expected a divisor of the {size} images of a batch, got "
            f"{parts}; say {near}"
        )


def _check_trainable(network: nn.Module, config: RunConfig, engine: Engine) -> None:
    check_trainable(
        network,
        config.training.batch_size // engine.world // config.training.parts,
        frozen_statistics=config.training.batch_norm == "frozen",
    )


def _check_start(config: RunConfig) -> None:
    if config.start == "scratch" and config.model.name.startswith("hf:"):
        raise ConfigError(
            f"start: scratch does not fit {config.model.name}, which comes with trained weights: "
            "say start=model, or start=natural to train it naturally first"
        )


def _check_augmentation(config: RunConfig) -> None:
    """Refuse soft labels and single-step attacks where method or threat do not take them."""
    if config.data.augment.soft_labels and not METHODS[config.method.name].soft_labels:
        able = [name for name in METHODS.names() if METHODS[name].soft_labels]
        names = ("mixup", "cutmix", "label_smoothing")
        used = [name for name in names if getattr(config.data.augment, name) not in (0, "auto")]
        raise ConfigError(
            f"data.augment: {' and '.join(used)} need a method whose loss takes soft labels "
            f"({', '.join(able)}), got {config.method.name}; set "
            f"{' '.join(f'data.augment.{name}=0' for name in used)}"
        )
    if config.training.class_weights != "none" and not METHODS[config.method.name].soft_labels:
        able = [name for name in METHODS.names() if METHODS[name].soft_labels]
        raise ConfigError(
            f"training.class_weights: expected a method whose loss takes weights "
            f"({', '.join(able)}), got {config.method.name}; set data.sampler=balanced instead"
        )
    if config.training.class_weights != "none" and config.data.sampler == "balanced":
        raise ConfigError(
            "training.class_weights: expected none beside data.sampler=balanced, which shows rare "
            "classes more often already; set one of the two"
        )
    if config.attack.name == "n-fgsm" and METHODS[config.method.name].needs_pgd:
        raise ConfigError(
            f"attack.name: n-fgsm takes one step, and {config.method.name} changes how PGD takes "
            "its steps; say attack.name=pgd"
        )
    if config.attack.name == "n-fgsm" and config.threat.norm != "Linf":
        raise ConfigError(
            f"attack.name: n-fgsm is an attack in Linf, the threat is {config.threat.norm}; say "
            "attack.name=pgd"
        )


def _load_start(network: nn.Module, config: RunConfig, kind: ImageKind) -> None:
    """Load the weights that ``start`` names, where it names any: a file, or a run (its best)."""
    if config.start_path is None:
        return
    places = keeps_head(network, config, kind)
    weights = _start_weights(config.start_path)
    new_head = config.draws_head if places is None else False
    load_weights(network, weights, key=config.start_key, new_head=new_head, seed=config.seed)
    if places is not None:
        order_start(network, config, kind, places)


def _start_weights(path: str) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        raise CheckpointError(
            f"start: '{path}' does not exist; say natural, scratch, model, or the path of a "
            "checkpoint or run folder"
        )
    return best_weights(place)


# -- teachers ------------------------------------------------------------------------------------


def teacher_networks(config: RunConfig, prepared: Prepared) -> dict[str, nn.Module]:
    """The teachers' networks by role, with their weights where these exist already."""
    return {
        role: _teacher(f"method.{role}", source, config, prepared)
        for role, source in config.method.teachers().items()
    }


def _teacher(place: str, source: TeacherConfig, config: RunConfig, prepared: Prepared) -> nn.Module:
    kind = prepared.training.kind
    if source.recipe is not None:
        theirs = teacher_config(place, source, config)
        prepared.engine.check_batch(theirs.training.batch_size)
        check_parts(theirs, prepared.engine)
        if theirs.training.accumulation_steps == "auto":
            raise ConfigError(
                f"{place}: accumulation_steps=auto is for the run itself; give its teacher a number"
            )
        if theirs.training.minutes is not None:
            raise ConfigError(
                f"{place}: expected training.epochs, got training.minutes, which is for the run "
                "itself; say settings: {training.epochs: 10}"
            )
        initial = network_of(theirs, kind, None)
        try:
            _check_augmentation(theirs)
            _check_trainable(initial, theirs, prepared.engine)
            network = starting_network(initial, theirs, kind, prepared.fresh)
        except CureError as error:
            raise type(error)(f"{place}: {error}") from None
        inner = replace(prepared, network=network, initial=initial, teachers={})
        inner = replace(inner, teachers=teacher_networks(theirs, inner))
        try:
            check_method(theirs, inner)
        except CureError as error:
            raise type(error)(f"{place}: {error}") from None
        return network
    assert source.path is not None
    if source.path == NATURAL:
        return copy.deepcopy(prepared.initial)
    path = Path(source.path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{place}: '{path}' does not exist; name the folder of a run, a weights file of the "
            "run's own network, natural, or train one first with {recipe: NAME}"
        )
    try:
        if path.is_file():
            network = copy.deepcopy(prepared.initial)
            origin = Origin.of(path)
            if origin is not None:
                _check_classes(origin.classes, kind.classes)
                _check_constants(origin, network)
            load_weights(network, path)
            return network
        folder = RunFolder.open(path)
        _check_kind(folder.kind, kind)
        network = network_of(folder.config, kind, None)
        load_weights(network, folder.weights("best"))
    except CureError as error:
        raise type(error)(f"{place}: {error}") from None
    return network


def _check_classes(theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Refuse a teacher of other classes."""
    if tuple(theirs) != tuple(ours):
        raise ModelError(
            f"the teacher knows the classes {some(theirs)}, the images have {some(ours)}; name a "
            "teacher trained on these classes in this order"
        )


def _check_constants(origin: Origin, network: nn.Module) -> None:
    """Refuse a file whose network standardises images in another way than the run's own."""
    if origin.mean is None or origin.std is None:
        return
    inside = constants_inside(network)
    if inside is None or not origin.standardises_with(*inside):
        theirs = "; ".join(
            f"{name} {','.join(f'{number:.6g}' for number in numbers)}"
            for name, numbers in (("mean", origin.mean), ("std", origin.std))
        )
        raise ModelError(
            f"the teacher standardises images ({theirs}), the run's network does not do so with "
            "these; set model.mean and model.std to them, or name the teacher's run folder"
        )


def _check_kind(theirs: ImageKind, ours: ImageKind) -> None:
    """Refuse a teacher of other images."""
    _check_classes(theirs.classes, ours.classes)
    if (theirs.channels, theirs.size) != (ours.channels, ours.size):
        raise ModelError(
            f"the teacher was trained on images of {theirs.channels}x{theirs.size[0]}x"
            f"{theirs.size[1]}, these are {ours.channels}x{ours.size[0]}x{ours.size[1]}; name "
            "another teacher, or resize with data.resize"
        )


def teacher_config(place: str, source: TeacherConfig, config: RunConfig) -> RunConfig:
    """The run that trains a teacher by its recipe: on the data, seed and device of ``config``.

    Args:
        place: the setting, for messages.
        source: recipe and settings.
        config: the run that learns from the teacher.
    """
    assert source.recipe is not None
    try:
        raw = read_recipe(source.recipe)
        shared = {
            "seed": config.seed,
            "training.device": config.training.device,
            "training.threads": config.training.threads,
            "tracking": list(config.tracking),
        }
        raw = changed(raw, shared | source.settings)
        # The same split: the teacher must not be trained on validation images of the student.
        raw["data"] = config.data.model_dump(mode="json")
        return standardised_as_start(check(raw, f"recipe {source.recipe}"))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


# -- method and attack ---------------------------------------------------------------------------


def check_method(config: RunConfig, prepared: Prepared) -> None:
    """Refuse settings of the method that do not fit the network or the length of the run.

    The method is built and discarded: what it refuses is refused before the natural start is
    trained.

    Raises:
        CureError: in one sentence.
    """
    build_method(config, prepared)


def build_method(config: RunConfig, prepared: Prepared) -> Method:
    """The method of a run, on the network as it is now."""
    settings = config.training
    per_epoch = steps_per_epoch(prepared.training, settings.batch_size)
    engine, every = prepared.engine, settings.record_gradients
    context = Context(
        engine=engine,
        attack=training_attack(config, engine),
        seed=config.seed,
        classes=len(prepared.training.classes),
        steps_per_epoch=per_epoch,
        epochs=settings.schedule_epochs,
        teachers=prepared.teachers,
        learning_rate=lambda step: learning_rate(settings, progress_at(settings, step, per_epoch)),
        weight_decay=settings.optimizer.weight_decay,
        natural_images=lambda: natural_images(prepared, config.evaluation.batch_size),
        attack_share=lambda step: warmup_share(
            config.attack.warmup, step / (per_epoch * settings.schedule_epochs)
        ),
        two_step=two_step_attack(config, engine),
        fold_frozen=settings.batch_norm == "frozen",
        attack_objective=CROSS_ENTROPY if config.attack.objective == "cross_entropy" else None,
        # Two consecutive steps, so that their masks can be compared.
        observed=lambda step: every is not None and engine.rank == 0 and step % every < 2,
    )
    method: Method = METHODS[config.method.name](prepared.network, config.method, context)
    if settings.weight_perturbation is not None:
        method = AWP(method, settings.weight_perturbation)
    return Averaging(method, settings.averaging) if settings.averaging is not None else method


def natural_images(prepared: Prepared, batch_size: int) -> Iterator[Tensor]:
    """The training images as they are, on the run's device."""
    engine = prepared.engine
    for batch in batches(prepared.training.to(engine.device), batch_size):
        yield engine.arrange(batch.image)


def training_attack(config: RunConfig, engine: Engine) -> PGD:
    """The attack that a run trains with."""
    attack = config.attack
    threat = replace(Threat.of(config.threat), epsilon=config.training_epsilon)
    common: dict[str, Any] = {
        "mode": "train" if config.training.batch_norm == "train" else attack.mode,
        "precision": engine.attack_precision,
        "fold": True,
        "compile": config.training.compile,
    }
    if attack.name == "n-fgsm":
        return NFGSM(threat, noise=attack.noise, **common)
    common["clamp_start"] = attack.clamp_start
    return PGD(threat, attack.steps, attack.step_size, attack.start, **common)


def two_step_attack(config: RunConfig, engine: Engine) -> PGD | None:
    """What replaces a single-step attack that the network has overfitted to: PGD with two steps."""
    attack = training_attack(config, engine)
    if not isinstance(attack, NFGSM):
        return None
    size = 0.75 * attack.threat.epsilon
    return PGD(
        attack.threat,
        2,
        size,
        "uniform",
        attack.mode,
        attack.precision,
        attack.fold,
        attack.compile,
    )


def warmup_share(warmup: float, progress: float) -> float:
    """Share of the training attack's radius when a share ``progress`` of the run is done.

    >>> warmup_share(0.5, 0.25), warmup_share(0.5, 0.75), warmup_share(0.0, 0.0)
    (0.5, 1.0, 1.0)
    """
    return min(1.0, progress / warmup) if warmup else 1.0
