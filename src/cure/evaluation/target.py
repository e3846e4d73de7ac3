"""What is evaluated: a run, a named network or a module, with its weights and its images."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Unpack

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cure.attacks import Threat
from cure.config import MEMORY, DataConfig, ModelConfig, RunConfig, ThreatConfig
from cure.data import ImageSet, load_split
from cure.data.cache import CachePlace
from cure.data.images import replace_labels
from cure.data.labels import relabelled
from cure.data.loader import to_unit
from cure.data.objects import as_images, is_object
from cure.data.sources import check_not_memory
from cure.errors import CheckpointError, ConfigError, CureNote, DataError, unknown
from cure.evaluation.options import TargetKeywords, TargetOptions
from cure.evaluation.unseen import customary
from cure.models import MODELS, Normalised, build_model, load_weights
from cure.models.artefact import (
    WEIGHTS,
    WHOLE,
    contract_of,
    from_pretrained,
    is_artefact,
)
from cure.models.build import adapted_copy, network_of
from cure.models.checks import check_network
from cure.models.classes import in_order, own_classes
from cure.models.contract import Contract
from cure.models.onnx_network import OnnxNetwork
from cure.models.trial import traits_of, with_traits
from cure.models.wrapper import constants_inside
from cure.recipe import explain
from cure.runs.folder import RunFolder, epoch_of
from cure.runs.run import Run
from cure.training.start import Origin
from cure.utils.modes import in_evaluation

TargetLike = str | Path | Run | nn.Module
"""A run or its folder, the name of a network, or a network."""


@dataclass(frozen=True)
class Target:
    """What is evaluated: where its network and its images come from.

    Attributes:
        name: for tables.
        facts: what a result file says of its weights.
        options: which weights and images were asked for.
        build: makes the network for some images.
        folder: of a run.
        config: of a run.
        contract: of an exported network.
    """

    name: str
    facts: dict[str, Any]
    options: TargetOptions
    build: Callable[[ImageSet], nn.Module]
    folder: RunFolder | None = None
    config: RunConfig | None = None
    contract: Contract | None = None

    @classmethod
    def of(cls, given: TargetLike, **options: Unpack[TargetKeywords]) -> Target:
        """The target that a user names.

        Args:
            given: a run (or its folder), a network, or the name of one (``cure list models``,
                ``package.module:callable``, ``hf:...``, ``timm:...``); or a file or hub folder of
                ``cure export``, or an ONNX or torch.export file of others.
            options: see :class:`~cure.evaluation.options.TargetOptions`.

        Raises:
            CureError: when there is no such target, or its weights are missing.
            TypeError: for an unknown option.
        """
        known = [field.name for field in fields(TargetOptions)]
        for name in options:
            if name not in known:
                raise TypeError(unknown("keyword argument", name, known))
        how = TargetOptions(**options)
        if isinstance(given, nn.Module):
            return cls(type(given).__name__, _weights_fact(how), how, _builder_of(given, how))
        network = None
        if isinstance(given, Run):
            network, given = given.network, given.path
        if not isinstance(given, str | Path):
            check_network(given, "a run, a network (torch.nn.Module) or the name of one")
        path = Path(given).expanduser()
        if (path / "config.yaml").is_file():
            return cls._of_run(RunFolder.open(path), how, network)
        if is_artefact(path):
            return cls._of_artefact(path, how)
        if path.exists():
            raise CheckpointError(
                f"{path} holds no run (no config.yaml); to evaluate a weights file, name its "
                "network too: --model NAME --weights FILE"
            )
        name = str(given)
        if ":" not in name and name not in MODELS:
            raise CheckpointError(
                f"{name} does not exist as a run folder; or as a model: "
                + unknown("model", name, MODELS.names())
            )
        return cls(name, _weights_fact(how), how, _builder_of(name, how))

    @classmethod
    def _of_run(cls, folder: RunFolder, how: TargetOptions, network: nn.Module | None) -> Target:
        given = (how.weights, how.mean, how.std, how.options or None)
        if any(value is not None for value in given):
            raise ConfigError(
                f"{folder.path} is a run, which has its own network and weights; weights, mean, "
                "std and options go with the name of a model"
            )
        config, path = folder.config, folder.weights(how.checkpoint)

        def build(images: ImageSet) -> nn.Module:
            kind = folder.kind
            if images.classes != kind.classes:
                same = sorted(images.classes) == sorted(kind.classes)
                how = "the run's classes in another order" if same else "other classes than the run"
                raise DataError(
                    f"'{images.name}' has {how}, so labels would be misread; expected "
                    f"{', '.join(kind.classes)}"
                )
            model = network_of(config, kind, network)
            load_weights(model, path)
            return model

        facts = {
            "checkpoint": how.checkpoint,
            "epoch": epoch_of(path),
            "method": config.method.name,
            "recipe": config.name,
            "run_seed": config.seed,
        }
        return cls(folder.path.name, facts, how, build, folder, config)

    @classmethod
    def _of_artefact(cls, path: Path, how: TargetOptions) -> Target:
        """A file or hub folder of ``cure export``, or an ONNX or torch.export file of others."""
        network = WHOLE[path.suffix](path) if path.suffix in WHOLE else None
        contract = contract_of(path) if network is None else network.contract
        given: list[Any] = [how.weights, how.options or None]
        if contract is not None:
            given += [how.mean, how.std]
        if any(value is not None for value in given):
            raise ConfigError(
                f"{path} has its own network, weights and normalisation; weights, options, mean "
                "and std go with the name of a model"
            )

        section = _model_config(path.name, how)

        def build(images: ImageSet) -> nn.Module:
            if contract is not None and images.kind != contract.kind:
                wanted, came = contract.kind, images.kind
                raise DataError(
                    f"{path} takes images of {[wanted.channels, *wanted.size]}, '{images.name}' "
                    f"has {[came.channels, *came.size]}; say --data-option resize={wanted.size[0]}"
                )
            if network is None:
                return from_pretrained(path)
            if section.mean is None or section.std is None:
                return network
            traits = traits_of(network)
            return with_traits(Normalised(network, section.mean, section.std), traits)

        facts: dict[str, Any] = {"artefact": path.name, "sha256": _file_digest(path)}
        if contract is not None:
            known = contract.run
            facts |= {
                "parameters": contract.network.get("parameters"),
                "precision": contract.precision,
                "method": known.get("method"),
                "recipe": known.get("name"),
                "run_seed": known.get("seed"),
            }
        elif network is not None:
            quantised = isinstance(network, OnnxNetwork) and network.quantised
            facts["precision"] = "int8" if quantised else "float32"
        return cls(path.name, facts, how, build, contract=contract)

    @property
    def is_onnx(self) -> bool:
        """Whether it is an exported file that computes no gradients."""
        return str(self.facts.get("artefact", "")).endswith(".onnx")

    @property
    def measures_own(self) -> bool | None:
        """Whether the images are those that the run names; None for what is no run."""
        if self.config is None:
            return None
        given, source = self.options.data, self.config.data.source
        own = given is None or (isinstance(given, str | Path) and str(given) == source)
        # Images in memory have to be given again.
        return (own or source.startswith(MEMORY)) and not self.options.data_options

    def images_changed(self, images: ImageSet) -> str | None:
        """As :meth:`RunFolder.images_changed`, of the images that the run names."""
        return self.folder.images_changed(images) if self.folder and self.measures_own else None

    @property
    def batch_size(self) -> int:
        """Images at once: what was asked for, else the run's, else 256."""
        if self.options.batch_size is not None:
            return self.options.batch_size
        return self.config.evaluation.batch_size if self.config else 256

    def images(self) -> ImageSet:
        """The images of the split, up to the limit; those of a run in the order of its classes."""
        given = dict(self.options.data_options or {})
        images = self._read(given)
        if self.folder is not None:
            if self.folder.kind.channels == 1 < images.channels and "color" not in given:
                images = self._read(given | {"color": "grey"})  # as in training
            return relabelled(images, self.folder.kind)
        return images if self.contract is None else relabelled(images, self.contract.kind)

    def _read(self, changed: Mapping[str, Any]) -> ImageSet:
        """The images, read with some settings of ``data``."""
        how = self.options
        if is_object(how.data):
            # Images in memory stand for themselves, not for those that the run names.
            config = self._data_config("memory", changed)
            images = as_images(how.data, how.split, config, how.limit)
        else:
            source: Any = how.data
            config = self._data_config(source, changed)
            place = CachePlace.beside(None if self.folder is None else self.folder.path)
            images = load_split(config, how.split, how.limit, place)
            said = [f"{images.name}: {skipped}" for skipped in images.findings.skipped]
            if moved := self.images_changed(images):
                said.append(
                    f"{moved}: some of these {how.split} images were trained on, and accuracies "
                    "are too high; restore the images, or give new ones (--data)"
                )
            if not self.measures_own:  # the training has told it
                said += [f"{images.name}: {note}" for note in images.findings.notes]
            for sentence in said:
                warnings.warn(sentence, CureNote, stacklevel=2)
        return images

    def load(self) -> tuple[ImageSet, nn.Module]:
        """The images, up to the limit, and the network.

        Labels in memory without names are positions in the network's output; the images may lack
        the last of them.
        """
        images = self.images()
        model = self.build(images)
        given = self.options.data
        named = self.folder is not None or self.contract is not None or isinstance(given, ImageSet)
        if not named and is_object(given) and _unnamed(images):
            count = _logits(model, images)
            if count > len(images.classes):
                images = replace_labels(images, images.label, tuple(map(str, range(count))))
                model = self.build(images)
        return images, model

    def threat(self, epsilon: str | float | None = None, norm: str | None = None) -> Threat:
        """The run's threat, else Linf 8/255, with another radius or norm where they are given.

        Another norm without a radius has the customary one, which a note tells.

        Raises:
            ConfigError: when they are no radius or norm.
        """
        base = self.config.threat if self.config else ThreatConfig()
        if self.contract is not None:
            base = ThreatConfig.model_validate(self.contract.threat)
        wanted = {
            "epsilon": base.epsilon if epsilon is None else epsilon,
            "norm": base.norm if norm is None else norm,
        }
        try:
            found = Threat.of(ThreatConfig.model_validate(wanted))
        except ValidationError as error:
            raise ConfigError(explain(error.errors()[0], ThreatConfig)) from None
        if epsilon is not None or found.norm == base.norm:
            return found
        known = self.folder or self.contract
        kind = None if known is None else known.kind
        values = 3 * 32 * 32 if kind is None else kind.channels * kind.size[0] * kind.size[1]
        usual = customary(found.norm, values)
        warnings.warn(
            f"in {found.norm} the radius is {usual.epsilon:g}, which is usual for images of "
            f"{values:,} values; set another one with epsilon",
            CureNote,
            stacklevel=2,
        )
        return usual

    def validation_accuracy(self) -> float | None:
        """Natural accuracy of a run's weights on its validation images, percent, if recorded.

        None when other images than the run's are evaluated.
        """
        if self.folder is None or self.options.data is not None or self.options.data_options:
            return None
        of_epoch = {record.epoch: record.validation for record in self.folder.metrics()}
        validation = of_epoch.get(self.facts["epoch"])
        return None if validation is None else validation.natural

    def _data_config(self, source: str | Path | None, options: Mapping[str, Any]) -> DataConfig:
        if self.config is None and source is None:
            raise ConfigError("a model needs images: name them with data (--data)")
        known = self.config.data.model_dump(mode="json") if self.config else {}
        if self.contract is not None:
            needs = self.contract.preprocessing
            known |= {"resize": needs.resize, "fit": needs.fit, "background": needs.background}
            known["color"] = "rgb" if needs.channels == 3 else "grey"
        if source is not None:
            known["source"] = str(source)
        elif self.config is not None:
            check_not_memory(self.config)
        try:
            return DataConfig.model_validate(known | dict(options))
        except ValidationError as error:
            raise ConfigError(explain(error.errors()[0], DataConfig, "data")) from None


def _unnamed(images: ImageSet) -> bool:
    return images.classes == tuple(map(str, range(len(images.classes))))


def _logits(model: nn.Module, images: ImageSet) -> int:
    """How many logits a network returns for these images; 0 where it does not return logits."""
    with torch.no_grad():
        try:
            output = in_evaluation(model)(to_unit(images.rows(slice(0, 2))))
        except Exception:
            return 0  # What is wrong with it is said by the evaluation.
    return output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else 0


def describe_images(images: ImageSet) -> dict[str, Any]:
    """What a result file says of its images."""
    return {
        "name": images.name,
        "split": images.split,
        "n": len(images),
        "classes": list(images.classes),
        "classes_present": len(set(images.label.tolist())),
        "images_by_class": images.label.bincount(minlength=len(images.classes)).tolist(),
        "size": [images.channels, *images.size],
        "sha256": images.digest(),
    }


def _file_digest(path: Path) -> str:
    """SHA-256 of a file, or of the weights file of a folder."""
    file = path / WEIGHTS if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _builder_of(given: nn.Module | str, how: TargetOptions) -> Callable[[ImageSet], nn.Module]:
    """Builds a named network, or copies a module, and loads the weights."""
    origin = None if how.weights is None else Origin.of(how.weights)
    inside = constants_inside(given) if isinstance(given, nn.Module) else None
    section = _model_config(given if isinstance(given, str) else "given", how, origin, inside)
    if isinstance(given, str) and given in MODELS and how.weights is None:
        raise ConfigError(f"{given} without weights is random: name its weights file (--weights)")

    def build(images: ImageSet) -> nn.Module:
        if isinstance(given, str):
            model = build_model(
                section,
                classes=len(images.classes),
                channels=images.channels,
                size=images.size,
                seed=0,
                names=images.classes,
            )
        else:
            kind = images.kind
            model = adapted_copy(
                given, len(kind.classes), kind.channels, kind.size, section, names=kind.classes
            )
        if how.weights is not None:
            load_weights(model, how.weights, key=how.weights_key, setting="weights_key")
        if origin is not None and own_classes(model) is None:
            return in_order(model, images.classes, origin.classes)
        return model

    return build


def _model_config(
    name: str,
    how: TargetOptions,
    origin: Origin | None = None,
    inside: tuple[Sequence[float], Sequence[float]] | None = None,
) -> ModelConfig:
    """The model section of a recipe that the options describe.

    Args:
        name: of the model.
        how: the options.
        origin: of its weights, whose constants are taken where none are given.
        inside: constants that a network has inside.
    """
    mean, std = how.mean, how.std
    if origin is not None and origin.mean is not None and origin.std is not None:
        file = Path(str(how.weights)).name
        theirs = " and ".join(
            f"{name} {','.join(f'{number:.6g}' for number in numbers)}"
            for name, numbers in (("mean", origin.mean), ("std", origin.std))
        )
        used = (mean, std) if mean is not None and std is not None else inside
        note = ""
        if used is not None and not origin.standardises_with(*used):
            note = f"{file} standardises images with {theirs}, this evaluation with others"
        elif used is None and mean is None and std is None:
            mean, std = origin.mean, origin.std
            note = (
                f"{file} standardises images with {theirs}, which are taken over; where the "
                "network does so itself, set mean to zeros and std to ones"
            )
        if note:
            warnings.warn(note, CureNote, stacklevel=2)
    try:
        return ModelConfig(
            name=name,
            options=dict(how.options or {}),
            mean=tuple(mean) if mean is not None else None,
            std=tuple(std) if std is not None else None,
        )
    except ValidationError as error:
        raise ConfigError(explain(error.errors()[0], ModelConfig, "model")) from None


def _weights_fact(how: TargetOptions) -> dict[str, Any]:
    """The file's name only: a result file says which weights, not where they were stored."""
    return {"weights": Path(how.weights).name if how.weights is not None else None}
