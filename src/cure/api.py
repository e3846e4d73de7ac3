"""The two verbs of the project, train and evaluate, and what they put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from cure.attacks import Attack, Threat
from cure.config import DataConfig, ModelConfig, RunConfig, ThreatConfig
from cure.data import ImageSet, batches, carve, load, steps_per_epoch
from cure.engine import Engine
from cure.errors import CheckpointError, ConfigError
from cure.evaluate import Progress, Result, check_outputs, measure, silent
from cure.methods import METHODS, Context, Method
from cure.methods.averaging import Averaged
from cure.models import MODELS, build_model, describe, load_weights
from cure.recipe import check, override, parse_override, read_recipe
from cure.run_folder import RunFolder, environment, write_json
from cure.tracking import TerminalTracker, Tracker, tensorboard_tracker
from cure.trainer import Trainer

OBJECT = "object:"
"""Prefix of ``model.name`` when the network was passed as a Python object."""

Split = Literal["train", "validation", "test"]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A training run on disk."""

    path: Path

    @property
    def config(self) -> RunConfig:
        """What the run is."""
        return RunFolder.open(self.path).config

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record an epoch: training means and accuracies on the validation split."""
        return RunFolder.open(self.path).metrics()

    def model(
        self, checkpoint: Literal["best", "last"] = "best", network: nn.Module | None = None
    ) -> nn.Module:
        """The trained network on the processor, in evaluation mode.

        Args:
            checkpoint: which weights.
            network: the architecture, when the run was given one as a Python object.
        """
        folder = RunFolder.open(self.path)
        weights = folder.weights(checkpoint)
        config = folder.config
        images = load_split(config.data, "test")
        model = _network(config, images, network)
        load_weights(model, weights)
        return model.eval()


def train(
    recipe: str | Path,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    run: str | Path | None = None,
    model: nn.Module | None = None,
    data: str | Path | ImageSet | None = None,
    quiet: bool = False,
) -> Run:
    """Train by a recipe into a new run folder.

    Args:
        recipe: a name (``cure list recipes``) or the path of a YAML file.
        overrides: ``["training.epochs=10"]`` or ``{"training.epochs": 10}``.
        run: the folder to make; by default the first free ``runs/NAME[-N]``.
        model: your network: images [B, C, H, W] in [0, 1] to logits.  It is copied, not changed;
            training starts from its weights unless the recipe says otherwise.
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
        for word in overrides:
            override(raw, *parse_override(word))
    if model is not None:
        given = {"name": OBJECT + f"{type(model).__module__}.{type(model).__qualname__}"}
        raw["model"] = {k: v for k, v in raw.get("model", {}).items() if k in ("mean", "std")}
        raw["model"] |= given
        if raw.get("start", "natural") in ("natural", "scratch"):
            raw["start"] = "model"
    if isinstance(data, ImageSet):
        override(raw, "data.source", f"memory:{data.name}")
    elif data is not None:
        override(raw, "data.source", str(data))
    config = check(raw, f"recipe {recipe}")
    images = data if isinstance(data, ImageSet) else None
    # Everything that can be wrong is found before the folder is made.
    prepared = _prepare(config, images, model, fresh=True)
    folder = RunFolder.create(run, config)
    _carry_out(folder, config, prepared, model, quiet)
    return Run(folder.path)


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
        return Run(folder.path)
    prepared = _prepare(config, data, model, fresh=not folder.state.exists())
    _carry_out(folder, config, prepared, model, quiet)
    return Run(folder.path)


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
    if images is None:
        _check_not_memory(config)
        images = load(config.data, "train")
    training, validation = carve(images, config.data.validation, config.data.split_seed)
    steps_per_epoch(training, config.training.batch_size)
    network = _network(config, training, model)
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


def _check_start(config: RunConfig) -> None:
    ours = config.model.name in MODELS
    if config.start == "scratch" and not ours:
        raise ConfigError(
            f"start: scratch needs an architecture of `cure list models`; {config.model.name} "
            "brings its own weights: say start=model"
        )


def _check_not_memory(config: RunConfig) -> None:
    if config.data.source.startswith("memory:"):
        raise ConfigError(
            f"the run was given its images ('{config.data.source}') in Python; continue it with "
            "cure.resume(run, data=...) or name other images"
        )


def load_split(config: DataConfig, split: Split) -> ImageSet:
    """The images of one split: "train" without those that validate, "validation", or "test"."""
    if split == "test":
        return load(config, "test")
    training, validation = carve(load(config, "train"), config.validation, config.split_seed)
    return training if split == "train" else validation


def _network(config: RunConfig, images: ImageSet, model: nn.Module | None) -> nn.Module:
    if config.model.name.startswith(OBJECT):
        if model is None:
            raise ConfigError(
                f"the run was given its network ({config.model.name}) in Python; pass it again: "
                "cure.resume(run, model=...) or cure.evaluate(model, weights=..., data=...)"
            )
        network = copy.deepcopy(model)
        if config.model.mean is not None and config.model.std is not None:
            from cure.models import Normalised

            network = Normalised(network, config.model.mean, config.model.std)
        return network
    return build_model(
        config.model,
        classes=len(images.classes),
        channels=images.channels,
        size=images.size,
        seed=config.seed,
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
    title: str = "",
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
        trackers: list[Tracker] = [] if quiet else [TerminalTracker(title or config.name)]
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
    context = Context(
        engine=prepared.engine,
        attack=training_attack(config, prepared.engine),
        seed=config.seed,
        classes=len(prepared.training.classes),
        samples=len(prepared.training),
        steps_per_epoch=steps_per_epoch(prepared.training, settings.batch_size),
        epochs=settings.epochs,
    )
    method = METHODS[config.method.name](prepared.network, config.method, context)
    return Averaged(method, settings.averaging) if settings.averaging is not None else method


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
            "start": "scratch" if config.model.name in MODELS else "model",
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
    inner = RunFolder.open(path) if path.exists() else RunFolder.create(path, first)
    if inner.status()["state"] != "finished":
        start = replace(prepared, network=copy.deepcopy(prepared.network))
        _carry_out(inner, first, start, model, quiet)
    return inner


def evaluate(
    target: str | Path | Run | nn.Module,
    *,
    data: str | Path | ImageSet | None = None,
    split: Split = "test",
    limit: int | None = None,
    attacks: Sequence[str] | None = None,
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
        attacks: names from ``cure list attacks``; "natural" is implied.
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
    if output is not None and Path(output).exists():
        raise ConfigError(f"{output} exists and is kept; name another output file")
    subject = _subject(target, checkpoint, weights, ModelOptions(mean, std, dict(options or {})))
    config = subject.config
    images, model = subject.load(data, split, data_options or {})
    if limit is not None:
        if limit < 1:
            raise ConfigError(f"limit: expected 1 or more images, got {limit}")
        images = images.subset(slice(0, limit))
    threat = _threat(config.threat if config else ThreatConfig(), epsilon, norm)
    default = config.evaluation.attacks if config else ("natural", "pgd20", "cw")
    # The evaluation attacks in float32 with the layout that is fastest; nothing else varies.
    engine = Engine(_device(device), channels_last=True)
    result = measure(
        engine.place(model),
        images,
        tuple(attacks) if attacks is not None else default,
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
            "split": split,
            "n": len(images),
            "classes": list(images.classes),
            "size": [images.channels, *images.size],
        },
        "model": describe(model) | subject.facts,
        "seed": seed,
        "environment": environment(),
    }
    if output is not None:
        write_json(Path(output), result)
    return result


@dataclass(frozen=True)
class ModelOptions:
    """How a named network is built and what input it expects."""

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Subject:
    """What is evaluated: where its network and its default images come from."""

    name: str
    facts: dict[str, Any]
    config: RunConfig | None
    build: Callable[[ImageSet], nn.Module]

    def load(
        self, data: str | Path | ImageSet | None, split: Split, options: Mapping[str, Any]
    ) -> tuple[ImageSet, nn.Module]:
        """The images and the network."""
        if isinstance(data, ImageSet):
            images = data
        else:
            images = load_split(self._data_config(data, options), split)
        return images, self.build(images)

    def _data_config(self, source: str | Path | None, options: Mapping[str, Any]) -> DataConfig:
        if self.config is None and source is None:
            raise ConfigError("a model needs images: name them with data (--data)")
        known = self.config.data.model_dump(mode="json") if self.config else {}
        if source is not None:
            known["source"] = str(source)
        elif self.config is not None:
            _check_not_memory(self.config)
        try:
            return DataConfig.model_validate(known | dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"data.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _subject(
    target: str | Path | Run | nn.Module,
    checkpoint: Literal["best", "last"],
    weights: str | Path | None,
    how: ModelOptions,
) -> Subject:
    if isinstance(target, nn.Module):
        return _given_model(target, weights, how)
    path = target.path if isinstance(target, Run) else Path(target)
    if (path / "config.yaml").is_file() or isinstance(target, Run):
        return _given_run(RunFolder.open(path), checkpoint)
    if path.exists():
        raise CheckpointError(
            f"{path} holds no run (no config.yaml); to evaluate a weights file, name its network "
            "too: --model NAME --weights FILE"
        )
    name = str(target)
    if "/" in name and ":" not in name:
        raise CheckpointError(
            f"{name} does not exist; expected a run folder or the name of a model"
        )
    return _named_model(name, weights, how)


def _given_run(folder: RunFolder, checkpoint: Literal["best", "last"]) -> Subject:
    config, path = folder.config, folder.weights(checkpoint)

    def build(images: ImageSet) -> nn.Module:
        model = _network(config, images, None)
        load_weights(model, path)
        return model

    facts = {
        "checkpoint": checkpoint,
        "epoch": _epoch(path),
        "method": config.method.name,
        "recipe": config.name,
        "run_seed": config.seed,
    }
    return Subject(folder.path.name, facts, config, build)


def _epoch(path: Path) -> int | None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        epoch = (file.metadata() or {}).get("epoch")
    return int(epoch) if epoch else None


def _given_model(model: nn.Module, weights: str | Path | None, how: ModelOptions) -> Subject:
    def build(images: ImageSet) -> nn.Module:
        from cure.models import Normalised

        network = copy.deepcopy(model)
        if how.mean is not None or how.std is not None:
            section = model_config("given", how)
            assert section.mean is not None
            assert section.std is not None
            if len(section.mean) != images.channels:
                raise ConfigError(
                    f"expected mean and std with {images.channels} numbers, one a channel, "
                    f"got {len(section.mean)}"
                )
            network = Normalised(network, section.mean, section.std)
        if weights is not None:
            load_weights(network, weights)
        return network

    return Subject(type(model).__name__, {"weights": _file_name(weights)}, None, build)


def _named_model(name: str, weights: str | Path | None, how: ModelOptions) -> Subject:
    section = model_config(name, how)
    if name in MODELS and weights is None:
        raise ConfigError(f"{name} without weights is random: name its weights file (--weights)")

    def build(images: ImageSet) -> nn.Module:
        model = build_model(
            section,
            classes=len(images.classes),
            channels=images.channels,
            size=images.size,
            seed=0,
        )
        if weights is not None:
            load_weights(model, weights)
        return model

    return Subject(name, {"weights": _file_name(weights)}, None, build)


def model_config(name: str, how: ModelOptions) -> ModelConfig:
    """The model section that command-line options describe."""
    try:
        return ModelConfig(
            name=name,
            options=dict(how.options or {}),
            mean=tuple(how.mean) if how.mean is not None else None,
            std=tuple(how.std) if how.std is not None else None,
        )
    except ValidationError as error:
        raise ConfigError(f"model: {error.errors()[0]['msg']}") from None


def _file_name(path: str | Path | None) -> str | None:
    """The name only: a result file says which weights, not where they lay."""
    return Path(path).name if path is not None else None


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


def _device(name: str) -> torch.device:
    from cure.engine import pick_device

    return pick_device(name)
