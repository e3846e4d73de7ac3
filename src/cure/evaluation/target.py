"""What is evaluated: where its network and its images come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from cure.config import DataConfig, ModelConfig, RunConfig, ThreatConfig
from cure.data import ImageSet, carve, load
from cure.data.sources import check_not_memory
from cure.errors import CheckpointError, ConfigError, DataError, unknown
from cure.models import MODELS, Normalised, build_model, load_weights
from cure.models.build import network_of
from cure.runs.folder import RunFolder
from cure.runs.run import Run

Split = Literal["train", "validation", "test"]


def load_split(config: DataConfig, split: Split) -> ImageSet:
    """The images of one split: "train" without those that validate, "validation", or "test"."""
    if split == "test":
        return load(config, "test")
    training, validation = carve(load(config, "train"), config.validation, config.split_seed)
    return training if split == "train" else validation


@dataclass(frozen=True)
class ModelOptions:
    """How a named network is built and what input it expects."""

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is evaluated: where its network and its default images come from."""

    name: str
    facts: dict[str, Any]
    folder: RunFolder | None
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

    def validation_accuracy(self) -> float | None:
        """Natural accuracy of a run's weights on its validation images, percent, if recorded."""
        if self.folder is None:
            return None
        of_epoch = {record["epoch"]: record for record in self.folder.metrics()}
        record = of_epoch.get(self.facts["epoch"], {})
        accuracy: float | None = (record.get("validation") or {}).get("natural")
        return accuracy

    def _data_config(self, source: str | Path | None, options: Mapping[str, Any]) -> DataConfig:
        if self.config is None and source is None:
            raise ConfigError("a model needs images: name them with data (--data)")
        known = self.config.data.model_dump(mode="json") if self.config else {}
        if source is not None:
            known["source"] = str(source)
        elif self.config is not None:
            check_not_memory(self.config)
        try:
            return DataConfig.model_validate(known | dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"data.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def subject_of(
    target: str | Path | Run | nn.Module,
    checkpoint: Literal["best", "last"],
    weights: str | Path | None,
    how: ModelOptions,
) -> Subject:
    """What ``target`` means: a network, a run, or a name.

    Raises:
        CureError: when it means nothing, or weights are missing.
    """
    if isinstance(target, nn.Module):
        return _given_model(target, weights, how)
    network = None
    if isinstance(target, Run):
        network = target.network
        target = target.path
    path = Path(target)
    if (path / "config.yaml").is_file():
        if weights is not None or how != ModelOptions():
            raise ConfigError(
                f"{path} is a run, which has its own network and weights; weights, mean, std and "
                "options go with the name of a model"
            )
        return _given_run(RunFolder.open(path), checkpoint, network)
    if path.exists():
        raise CheckpointError(
            f"{path} holds no run (no config.yaml); to evaluate a weights file, name its network "
            "too: --model NAME --weights FILE"
        )
    name = str(target)
    if ":" not in name and name not in MODELS:
        raise CheckpointError(
            f"{name} does not exist as a run folder; or as a model: "
            + unknown("model", name, MODELS.names())
        )
    return _named_model(name, weights, how)


def _given_run(
    folder: RunFolder, checkpoint: Literal["best", "last"], network: nn.Module | None
) -> Subject:
    config, path = folder.config, folder.weights(checkpoint)

    def build(images: ImageSet) -> nn.Module:
        kind = folder.kind
        if images.classes != kind.classes and sorted(images.classes) == sorted(kind.classes):
            raise DataError(
                f"'{images.name}' has the run's classes in another order, so labels would be "
                f"misread; expected {', '.join(kind.classes)}"
            )
        model = network_of(config, kind, network)
        load_weights(model, path)
        return model

    facts = {
        "checkpoint": checkpoint,
        "epoch": epoch_of(path),
        "method": config.method.name,
        "recipe": config.name,
        "run_seed": config.seed,
    }
    return Subject(folder.path.name, facts, folder, config, build)


def epoch_of(path: Path) -> int | None:
    """The epoch whose weights a file of a run holds, if it says so."""
    try:
        with safe_open(str(path), framework="pt") as file:
            epoch = (file.metadata() or {}).get("epoch")
    except (SafetensorError, OSError):
        return None  # What is wrong with the file is said when its weights are read.
    return int(epoch) if epoch else None


def _given_model(model: nn.Module, weights: str | Path | None, how: ModelOptions) -> Subject:
    def build(images: ImageSet) -> nn.Module:
        network = copy.deepcopy(model)
        if how.mean is not None or how.std is not None:
            section = _model_config("given", how)
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

    return Subject(type(model).__name__, {"weights": _file_name(weights)}, None, None, build)


def _named_model(name: str, weights: str | Path | None, how: ModelOptions) -> Subject:
    section = _model_config(name, how)
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

    return Subject(name, {"weights": _file_name(weights)}, None, None, build)


def _model_config(name: str, how: ModelOptions) -> ModelConfig:
    """The model section that command-line options describe."""
    try:
        return ModelConfig(
            name=name,
            options=dict(how.options),
            mean=tuple(how.mean) if how.mean is not None else None,
            std=tuple(how.std) if how.std is not None else None,
        )
    except ValidationError as error:
        raise ConfigError(f"model: {error.errors()[0]['msg']}") from None


def _file_name(path: str | Path | None) -> str | None:
    """The name only: a result file says which weights, not where they lay."""
    return Path(path).name if path is not None else None


def threat_of(base: ThreatConfig, epsilon: str | float | None, norm: str | None) -> ThreatConfig:
    """``base`` with another radius or norm, where they are given.

    Raises:
        ConfigError: when they mean nothing.
    """
    wanted = {
        "epsilon": base.epsilon if epsilon is None else epsilon,
        "norm": base.norm if norm is None else norm,
    }
    try:
        return ThreatConfig.model_validate(wanted)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from None


def check_counts(**counts: int | None) -> None:
    """Refuse numbers of images, by the name of their option, that are given and below 1.

    Raises:
        ConfigError: in one sentence.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name}: expected 1 or more images, got {count}")
