"""The two verbs of the project, train and evaluate, and what they put together."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor, nn

from cure.attacks import Attack, Threat
from cure.attacks.suite import evaluation_attack
from cure.config import DataConfig, RunConfig, ThreatConfig
from cure.data import ImageSet, batches, carve, load, steps_per_epoch
from cure.engine import Engine, pick_device
from cure.errors import CheckpointError, ConfigError, ModelError, TrainingStopped
from cure.evaluation import Progress, Result, check_outputs, measure, silent
from cure.methods import METHODS, Context, Method
from cure.methods.averaging import Averaged
from cure.methods.weight_perturbation import WeightPerturbed
from cure.models import describe, load_weights
from cure.recipe import check, override, parse_override, read_recipe
from cure.run_folder import RunFolder, environment, write_json
from cure.schedule import learning_rate
from cure.subject import (
    MEMORY,
    OBJECT,
    ModelOptions,
    Split,
    check_not_memory,
    network_of,
    subject_of,
)
from cure.tracking import TerminalTracker, Tracker, tensorboard_tracker
from cure.trainer import Interrupted, Trainer


@dataclass(frozen=True)
class Run:
    """A training run on disk.

    Attributes:
        path: its folder.
        network: the network that :func:`train` was given as a Python object, which no folder can
            remember.
    """

    path: Path
    network: nn.Module | None = field(default=None, compare=False, repr=False)

    @property
    def config(self) -> RunConfig:
        """What the run is."""
        return RunFolder.open(self.path).config

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record an epoch: training means and accuracies on the validation split."""
        return RunFolder.open(self.path).metrics()

    def model(self, checkpoint: Literal["best", "last"] = "best") -> nn.Module:
        """The trained network on the processor, in evaluation mode, with its best or last weights.

        Raises:
            CureError: when there are none yet, or the network was given as a Python object in
                another process: say ``Run(path, network).model()``.
        """
        folder = RunFolder.open(self.path)
        model = network_of(folder.config, folder.kind, self.network)
        load_weights(model, folder.weights(checkpoint))
        return model.eval()


def train(
    recipe: str | Path,
    overrides: str | Iterable[str] | Mapping[str, Any] = (),
    *,
    run: str | Path | None = None,
    model: nn.Module | None = None,
    data: str | Path | ImageSet | None = None,
    quiet: bool = False,
) -> Run:
    """Train by a recipe into a new run folder.

    Args:
        recipe: a name (``cure list recipes``) or the path of a YAML file.
        overrides: ``{"training.epochs": 10}``, ``["training.epochs=10"]``, or one such word.
        run: the folder to make; by default the first free ``runs/NAME[-N]``.
        model: your network: images [B, C, H, W] in [0, 1] to logits.  It is copied, not changed.
            Its weights are what ``start: model`` begins with and ``start: natural`` trains first.
        data: what ``data.source`` would say, or images in memory (its training split).
        quiet: print nothing.

    Returns:
        The finished run.

    Raises:
        CureError: for every mistake a user can mend, before or while training.
    """
    raw = read_recipe(recipe)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            override(raw, key, value)
    else:
        for word in [overrides] if isinstance(overrides, str) else overrides:
            override(raw, *parse_override(word))
    if model is not None:
        given = {"name": OBJECT + f"{type(model).__module__}.{type(model).__qualname__}"}
        old = raw.get("model")
        kept = {k: old[k] for k in ("mean", "std") if k in old} if isinstance(old, dict) else {}
        raw["model"] = kept | given
    if isinstance(data, ImageSet):
        override(raw, "data.source", MEMORY + data.name)
    elif data is not None:
        override(raw, "data.source", str(data))
    config = check(raw, f"recipe {recipe}")
    images = data if isinstance(data, ImageSet) else None
    # Everything that can be wrong is found before the folder is made.
    prepared = _prepare(config, images, model, fresh=True)
    folder = RunFolder.create(run, config, prepared.training.kind)
    _carry_out(folder, config, prepared, model, quiet)
    return Run(folder.path, model)


def resume(
    run: str | Path,
    *,
    model: nn.Module | None = None,
    data: ImageSet | None = None,
    quiet: bool = False,
) -> Run:
    """Continue a run that was stopped or killed; it ends with the bits it would have had.

    Args:
        run: its folder, which knows its recipe.
        model: the network, when the run was given one as a Python object.
        data: the images, when the run was given images in memory.
        quiet: print nothing.
    """
    folder = RunFolder.open(run)
    config = folder.config
    if folder.status()["state"] == "finished":
        return Run(folder.path, model)
    prepared = _prepare(config, data, model, fresh=not folder.state.exists())
    _carry_out(folder, config, prepared, model, quiet)
    return Run(folder.path, model)


@dataclass(frozen=True)
class Prepared:
    """What a run needs besides its folder."""

    engine: Engine
    training: ImageSet
    validation: ImageSet
    network: nn.Module


def _prepare(
    config: RunConfig, images: ImageSet | None, model: nn.Module | None, *, fresh: bool
) -> Prepared:
    """Data, splits, device and network of a run: whatever can be refused is refused here.

    A run that is not ``fresh`` takes its weights from its own state, not from its start.
    """
    engine = Engine.of(config.training)
    _check_start(config)
    _check_attacks(config.evaluation.attacks)
    if images is None:
        check_not_memory(config)
        images = load(config.data, "train")
    else:
        images = _limited(images, config.data)
    training, validation = carve(images, config.data.validation, config.data.split_seed)
    steps_per_epoch(training, config.training.batch_size)
    network = network_of(config, training.kind, model)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ModelError(
            "no weight of the model may change: set requires_grad to True for those to train"
        )
    sample = next(batches(training, 2)).image
    modes = [(module, module.training) for module in network.modules()]
    check_outputs(network.eval(), sample, len(training.classes))
    for module, mode in modes:
        module.training = mode
    if fresh and config.start not in ("natural", "scratch", "model"):
        load_weights(network, _checkpoint(config.start))
    prepared = Prepared(engine, training, validation, network)
    # Made once here and thrown away, so that a setting that does not fit the network or the length
    # of the run is refused now and not after the natural start.
    _method(config, prepared)
    return prepared


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


def _checkpoint(path: str | Path) -> Path:
    """A checkpoint file, given as such or as the folder of a run (its best)."""
    path = Path(path)
    if path.is_dir():
        return RunFolder.open(path).weights("best")
    if not path.exists():
        raise CheckpointError(
            f"start: '{path}' does not exist; say natural, scratch, model, or the path of a "
            "checkpoint or run folder"
        )
    return path


def _carry_out(
    folder: RunFolder,
    config: RunConfig,
    prepared: Prepared,
    model: nn.Module | None,
    quiet: bool,
) -> None:
    """Train in ``folder`` from wherever it is, its natural start first."""
    with folder.lock():
        network = prepared.network
        if config.start == "natural" and not folder.state.exists():
            natural = _natural_start(folder, config, prepared, model, quiet)
            load_weights(network, natural.weights("best"))
        engine, settings = prepared.engine, config.training
        engine.place(network)
        method = _method(config, prepared)
        trackers: list[Tracker] = [] if quiet else [TerminalTracker(config.name)]
        if settings.tensorboard:
            trackers += tensorboard_tracker(folder.path / "tensorboard")
        trainer = Trainer(
            config, method, prepared.training, prepared.validation, engine, folder, trackers
        )
        for sentence in method.warnings():
            for tracker in trackers:
                tracker.warn(sentence)
        trainer.fit()


def _method(config: RunConfig, prepared: Prepared) -> Method:
    """The method of a run, on the network as it is now."""
    settings = config.training
    per_epoch = steps_per_epoch(prepared.training, settings.batch_size)
    context = Context(
        engine=prepared.engine,
        attack=training_attack(config, prepared.engine),
        seed=config.seed,
        classes=len(prepared.training.classes),
        samples=len(prepared.training),
        steps_per_epoch=per_epoch,
        epochs=settings.epochs,
        teachers={},
        learning_rate=lambda step: learning_rate(settings, step / (per_epoch * settings.epochs)),
        weight_decay=settings.optimizer.weight_decay,
        natural_images=lambda: natural_images(prepared, config.evaluation.batch_size),
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
        Threat(config.threat.norm, config.threat.epsilon),
        steps=config.attack.steps,
        step_size=config.attack.step_size,
        start=config.attack.start,
        mode=config.attack.mode,
        precision=engine.attack_precision,
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
        }
    )
    return config.model_copy(
        update={
            "name": f"{config.name}-natural",
            "start": "model",
            "method": METHODS["natural"].Config(name="natural"),
            "training": training,
        }
    )


def _natural_start(
    folder: RunFolder,
    config: RunConfig,
    prepared: Prepared,
    model: nn.Module | None,
    quiet: bool,
) -> RunFolder:
    """The finished natural run inside ``folder``, trained now where it is missing."""
    path = folder.path / "natural"
    first = natural_config(config)
    if path.exists():
        inner = RunFolder.open(path)
    else:
        inner = RunFolder.create(path, first, prepared.training.kind)
    inner.resumed_by = folder.path
    if inner.status()["state"] != "finished":
        folder.set_status("running", phase="natural start")
        start = replace(prepared, network=copy.deepcopy(prepared.network))
        try:
            _carry_out(inner, first, start, model, quiet)
        except (Interrupted, TrainingStopped):
            folder.set_status(**(inner.status() | {"phase": "natural start"}))
            raise
    return inner


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
    output: str | Path | None = None,
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
        output: JSON file to write; must not exist.
        progress: told (attack, images done, images in all).

    Returns:
        The result, as documented in docs/results.md.

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.
    """
    _check_output(output)
    for name, count in (("limit", limit), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise ConfigError(f"{name}: expected 1 or more images, got {count}")
    how = ModelOptions(mean, std, dict(options or {}))
    if isinstance(target, Run):
        subject = subject_of(target.path, checkpoint, weights, how, target.network)
    else:
        subject = subject_of(target, checkpoint, weights, how)
    config = subject.config
    if isinstance(attacks, str):
        attacks = [name.strip() for name in attacks.split(",")]
    if attacks is None:
        attacks = config.evaluation.attacks if config else ("natural", "pgd20", "cw")
    _check_attacks(attacks)
    images, model = subject.load(data, split, data_options or {})
    if limit is not None:
        images = images.subset(slice(0, limit))
    threat = _threat(config.threat if config else ThreatConfig(), epsilon, norm)
    # The evaluation attacks in float32 with the layout that is fastest; nothing else varies.
    engine = Engine(pick_device(device), channels_last=True)
    result = measure(
        engine.place(model),
        images,
        attacks,
        Threat(threat.norm, threat.epsilon),
        engine=engine,
        batch_size=batch_size or (config.evaluation.batch_size if config else 256),
        seed=seed,
        progress=progress,
    )
    result = {
        "format": "cure-evaluation-1",
        "target": subject.name,
        **result,
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
        "environment": environment(),
    }
    if output is not None:
        write_json(Path(output), result)
    if subject.folder is not None:
        subject.folder.keep_evaluation(result)
    return result


def _check_attacks(names: Iterable[str]) -> None:
    """Refuse an unknown attack before anything is read or computed."""
    for name in names:
        if name != "natural":
            evaluation_attack(name)


def _check_output(output: str | Path | None) -> None:
    """Refuse a file that exists or cannot be made before anything is computed."""
    if output is None:
        return
    if Path(output).exists():
        raise ConfigError(f"{output} exists and is kept; name another output file")
    if not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"the folder of {output} does not exist; make it, or name another file")


def _threat(base: ThreatConfig, epsilon: str | float | None, norm: str | None) -> ThreatConfig:
    wanted = {
        "epsilon": base.epsilon if epsilon is None else epsilon,
        "norm": base.norm if norm is None else norm,
    }
    try:
        return ThreatConfig.model_validate(wanted)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from None
