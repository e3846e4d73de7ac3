"""From a checked configuration to a trained run folder: data, network, teachers, natural start.

:func:`prepare` finds everything that can be refused before a folder is made; :func:`carry_out`
trains in the folder from wherever it is, what the run needs first: its natural start, its teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from cure.attacks import Attack, Threat
from cure.attacks.registry import evaluation_attack
from cure.config import DataConfig, LayersConfig, RunConfig, TeacherConfig
from cure.data import ImageKind, ImageSet, batches, carve, load, steps_per_epoch
from cure.data.sources import check_not_memory
from cure.errors import CheckpointError, ConfigError, CureError, ModelError, TrainingStopped
from cure.methods import METHODS, Context, Method
from cure.methods.wrappers.averaging import Averaged
from cure.methods.wrappers.awp import WeightPerturbed
from cure.models import load_weights
from cure.models.blocks import STEM, blocks, chosen, learn_only, reinitialise
from cure.models.build import network_of
from cure.models.checks import check_outputs
from cure.recipe import check, override, read_recipe
from cure.runs.folder import RunFolder
from cure.training.schedule import learning_rate
from cure.training.tracking import TerminalTracker, Tracker, check_trackers, trackers_of
from cure.training.trainer import Interrupted, Trainer
from cure.utils.engine import Engine
from cure.utils.random import generator

NATURAL = "natural"
"""Value of ``start`` and of a teacher's ``path`` that means the run's own natural training."""


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
    """

    engine: Engine
    training: ImageSet
    validation: ImageSet
    network: nn.Module
    initial: nn.Module
    teachers: dict[str, nn.Module] = field(default_factory=dict)


def prepare(
    config: RunConfig,
    images: ImageSet | None,
    model: nn.Module | None,
    folder: RunFolder | None = None,
) -> Prepared:
    """Data, splits, device and networks of a run: whatever can be refused is refused here.

    Args:
        config: the run.
        images: its images, when they are in memory.
        model: its network, when it is a Python object.
        folder: where it already is; a run with a state takes its weights from there, not from its
            start.
    """
    engine = Engine.of(config.training)
    with engine.agreeing():
        return _prepared(config, images, model, folder, engine)


def _prepared(
    config: RunConfig,
    images: ImageSet | None,
    model: nn.Module | None,
    folder: RunFolder | None,
    engine: Engine,
) -> Prepared:
    _check_start(config)
    if config.threat.norm == "L1":
        raise ConfigError(
            "threat.norm: expected Linf or L2 to train with, got L1, in which only evaluation "
            "attacks; train with L2 and evaluate with --norm L1"
        )
    check_attacks(config.evaluation.attacks)
    check_trackers(config.tracking)
    if images is None:
        check_not_memory(config)
        images = load(config.data, "train")
    else:
        images = _limited(images, config.data)
    training, validation = carve(images, config.data.validation, config.data.split_seed)
    steps_per_epoch(training, config.training.batch_size)
    initial = network_of(config, training.kind, model)
    if not any(parameter.requires_grad for parameter in initial.parameters()):
        raise ModelError(
            "no weight of the model may change: set requires_grad to True for those to train"
        )
    sample = next(batches(training, 2)).image
    modes = [(module, module.training) for module in initial.modules()]
    check_outputs(initial.eval(), sample, len(training.classes))
    for module, mode in modes:
        module.training = mode
    network = copy.deepcopy(initial)
    fresh = folder is None or not folder.state.exists()
    if fresh and config.start not in (NATURAL, "scratch", "model"):
        load_weights(network, _start_weights(config.start))
    _choose_layers(network, config)
    prepared = Prepared(engine, training, validation, network, initial)
    prepared = replace(prepared, teachers=_teachers(config, prepared))
    for role, teacher in prepared.teachers.items():
        try:
            check_outputs(teacher.eval(), sample, len(training.classes))
        except ModelError as error:
            raise ModelError(f"method.{role}: {error}") from None
    # Made once here and thrown away, so that a setting that does not fit the network or the length
    # of the run is refused now and not after the natural start.
    build_method(config, prepared)
    return prepared


def _choose_layers(network: nn.Module, config: RunConfig) -> None:
    """Freeze what does not learn."""
    layers = config.layers
    if layers.update:
        names = chosen(network, layers.update)
        if layers.stem == "updated":
            names += blocks(network).get(STEM, [])
        learn_only(network, names, statistics=layers.statistics == "updated")


def _draw_layers(network: nn.Module, config: RunConfig) -> None:
    """Draw anew what the configuration says, once, before the first step."""
    layers = config.layers
    if layers.reinitialise != "none":
        names = chosen(network, layers.update or blocks(network))
        draws = generator("cpu", config.seed, "reinitialise")
        reinitialise(network, names, draws, norms=layers.reinitialise == "all")


def check_attacks(names: Iterable[str]) -> None:
    """Refuse an unknown attack before anything is read or computed."""
    for name in names:
        if name != "natural":
            evaluation_attack(name)


def _limited(images: ImageSet, config: DataConfig) -> ImageSet:
    """Images in memory under the settings of the data section that apply to them."""
    for key, untouched in (("resize", None), ("color", "keep")):
        if getattr(config, key) != untouched:
            raise ConfigError(
                f"data.{key} applies to images that are read, not to images in memory; convert "
                "them before you pass them"
            )
    images = images.checked()
    return images if config.limit is None else images.subset(slice(0, config.limit))


def _check_start(config: RunConfig) -> None:
    if config.start == "scratch" and config.model.name.startswith("hf:"):
        raise ConfigError(
            f"start: scratch does not fit {config.model.name}, which comes with trained weights: "
            "say start=model, or start=natural to train it naturally first"
        )


def _start_weights(path: str) -> Path:
    """The weights file that ``start`` names: a file, or the folder of a run (its best)."""
    if Path(path).is_dir():
        return RunFolder.open(path).weights("best")
    if not Path(path).exists():
        raise CheckpointError(
            f"start: '{path}' does not exist; say natural, scratch, model, or the path of a "
            "checkpoint or run folder"
        )
    return Path(path)


# -- teachers ------------------------------------------------------------------------------------


def _teachers(config: RunConfig, prepared: Prepared) -> dict[str, nn.Module]:
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
        network = network_of(theirs, kind, None)
        inner = replace(prepared, network=network, initial=network, teachers={})
        _teachers(theirs, inner)  # Its own teachers can be refused now, too.
        return network
    assert source.path is not None
    if source.path == NATURAL:
        return copy.deepcopy(prepared.initial)
    path = Path(source.path)
    if not path.exists():
        raise CheckpointError(
            f"{place}: '{path}' does not exist; name the folder of a run, a weights file of the "
            "run's own network, natural, or train one first with {recipe: NAME}"
        )
    try:
        if path.is_file():
            network = copy.deepcopy(prepared.initial)
            load_weights(network, path)
            return network
        folder = RunFolder.open(path)
        _check_kind(folder.kind, kind)
        network = network_of(folder.config, kind, None)
        load_weights(network, folder.weights("best"))
    except CureError as error:
        raise type(error)(f"{place}: {error}") from None
    return network


def _check_kind(theirs: ImageKind, ours: ImageKind) -> None:
    """Refuse a teacher of other images."""
    if theirs.classes != ours.classes:
        raise ModelError(
            f"the teacher knows the classes {_few(theirs.classes)}, the images have "
            f"{_few(ours.classes)}; name a teacher trained on these classes in this order"
        )
    if (theirs.channels, theirs.size) != (ours.channels, ours.size):
        raise ModelError(
            f"the teacher was trained on images of {theirs.channels}x{theirs.size[0]}x"
            f"{theirs.size[1]}, these are {ours.channels}x{ours.size[0]}x{ours.size[1]}; name "
            "another teacher, or resize with data.resize"
        )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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
        override(raw, "seed", config.seed)
        override(raw, "training.device", config.training.device)
        override(raw, "training.threads", config.training.threads)
        override(raw, "tracking", list(config.tracking))
        for key, value in source.settings.items():
            override(raw, key, value)
        # The same validation images, or the student's would not be new to its teacher.
        raw["data"] = config.data.model_dump(mode="json")
        return check(raw, f"recipe {source.recipe}")
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


# -- training ------------------------------------------------------------------------------------


def carry_out(
    folder: RunFolder,
    config: RunConfig,
    prepared: Prepared,
    model: nn.Module | None = None,
    quiet: bool = False,
) -> None:
    """Train in ``folder`` from wherever it is, first what it starts with or learns from."""
    engine = prepared.engine
    with ExitStack() as held:
        with engine.agreeing():
            held.enter_context(folder.lock())
        if not folder.state.exists():
            _first_things(folder, config, prepared, model, quiet)
            _draw_layers(prepared.network, config)
        for network in (prepared.network, *prepared.teachers.values()):
            engine.place(network)
        method = build_method(config, prepared)
        terminal = TerminalTracker(config.name)
        silent = quiet or not folder.writes
        trackers: list[Tracker] = [] if silent else [terminal]
        if folder.writes:
            # That one of them is lost is also said where the run is quiet.
            trackers += trackers_of(folder.path, config, terminal.warn)
        trainer = Trainer(
            config, method, prepared.training, prepared.validation, engine, folder, trackers
        )
        for sentence in method.warnings():
            for tracker in trackers:
                tracker.warn(sentence)
        trainer.fit()


def _first_things(
    folder: RunFolder,
    config: RunConfig,
    prepared: Prepared,
    model: nn.Module | None,
    quiet: bool,
) -> None:
    """The natural start and the teachers that are not there yet, trained inside ``folder``."""
    teachers = config.method.teachers()
    natural = [prepared.network] if config.start == NATURAL else []
    natural += [prepared.teachers[role] for role, t in teachers.items() if t.path == NATURAL]
    if natural:
        first = replace(prepared, network=copy.deepcopy(prepared.initial), teachers={})
        inner = _inner_run(
            folder, "natural start", NATURAL, natural_config(config), first, model, quiet
        )
        for network in natural:
            load_weights(network, inner.weights("best"))
    for role, source in teachers.items():
        if source.recipe is None:
            continue
        theirs = teacher_config(f"method.{role}", source, config)
        network = network_of(theirs, prepared.training.kind, None)
        first = replace(prepared, network=network, initial=copy.deepcopy(network), teachers={})
        first = replace(first, engine=Engine.of(theirs.training), teachers=_teachers(theirs, first))
        place = str(Path("teachers") / role)
        inner = _inner_run(folder, f"teacher {role}", place, theirs, first, None, quiet)
        load_weights(prepared.teachers[role], inner.weights("best"))
        Engine.of(config.training)  # Threads and determinism are the process's: set them back.


def _inner_run(
    folder: RunFolder,
    phase: str,
    place: str,
    config: RunConfig,
    prepared: Prepared,
    model: nn.Module | None,
    quiet: bool,
) -> RunFolder:
    """The finished run at ``place`` inside ``folder``, trained now where it is missing."""
    path = folder.path / place

    def opened() -> bool:
        if not path.exists():
            RunFolder.create(path, config, prepared.training.kind)
        return bool(RunFolder.open(path).status()["state"] == "finished")

    finished = prepared.engine.first(opened)
    inner = RunFolder(path, folder.resumed_by, folder.writes)
    if not finished:
        folder.set_status("running", phase=phase)
        try:
            carry_out(inner, config, prepared, model, quiet)
        except (Interrupted, TrainingStopped):
            folder.set_status(**(inner.status() | {"phase": phase}))
            raise
    return inner


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
        samples=len(prepared.training),
        steps_per_epoch=per_epoch,
        epochs=settings.epochs,
        teachers=prepared.teachers,
        learning_rate=lambda step: learning_rate(settings, step / (per_epoch * settings.epochs)),
        weight_decay=settings.optimizer.weight_decay,
        natural_images=lambda: natural_images(prepared, config.evaluation.batch_size),
        # Two steps in a row, so that their masks can be compared.
        observed=lambda step: every is not None and engine.rank == 0 and step % every < 2,
    )
    method: Method = METHODS[config.method.name](prepared.network, config.method, context)
    if settings.weight_perturbation is not None:
        method = WeightPerturbed(method, settings.weight_perturbation)
    return Averaged(method, settings.averaging) if settings.averaging is not None else method


def natural_images(prepared: Prepared, batch_size: int) -> Iterator[Tensor]:
    """The training images as they are, on the run's device."""
    engine = prepared.engine
    for batch in batches(prepared.training.to(engine.device), batch_size):
        yield engine.arrange(batch.image)


def training_attack(config: RunConfig, engine: Engine) -> Attack:
    """The attack that a run trains with."""
    return Attack(
        Threat.of(config.threat),
        steps=config.attack.steps,
        step_size=config.attack.step_size,
        start=config.attack.start,
        mode=config.attack.mode,
        precision=engine.attack_precision,
        fold=True,
        compile=config.training.compile,
    )


def natural_config(config: RunConfig) -> RunConfig:
    """The run that trains the start of ``config``: the same but for the method and ``natural``."""
    change = config.natural.model_dump(exclude_none=True)
    training = config.training.model_copy(
        update={
            "epochs": change.get("epochs", config.training.epochs),
            "schedule": config.natural.schedule or config.training.schedule,
            "optimizer": config.training.optimizer.model_copy(
                update={k: change[k] for k in ("learning_rate", "weight_decay") if k in change}
            ),
            "averaging": None,
            "weight_perturbation": None,
            "keep_every": None,
            "record_gradients": None,
        }
    )
    return config.model_copy(
        update={
            "layers": LayersConfig(),
            "name": f"{config.name}-natural",
            "start": "model",
            "method": METHODS["natural"].Config(name="natural"),
            "training": training,
        }
    )
