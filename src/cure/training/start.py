"""What the start of a run says of itself: its classes, and how it standardises images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cure.config import RunConfig
from cure.data import ImageKind, ImageSet
from cure.data.opening import same_source
from cure.data.sources import carves_test, differing_splits, seen_before
from cure.errors import CureNote, DataError, ModelError, some
from cure.models.artefact import contract_of_weights
from cure.models.classes import own_classes, places_of
from cure.models.head import order_head
from cure.models.wrapper import constants_inside
from cure.runs.folder import RunFolder
from cure.utils.launcher import launched


@dataclass(frozen=True)
class Origin:
    """What a run folder, or a file or folder of ``cure export``, says of its weights.

    Attributes:
        classes: names in the order of its logits.
        mean, std: its ``model.mean`` and ``model.std``.
    """

    classes: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def standardises_with(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        """Whether its constants are these, up to rounding."""
        if self.mean is None or self.std is None or len(mean) != len(self.mean):
            return False
        return np.allclose([mean, std], [self.mean, self.std], rtol=1e-3, atol=1e-4)

    @classmethod
    def of(cls, path: str | Path) -> Origin | None:
        """Of a run folder, a checkpoint in it, or what ``cure export`` wrote; None of others."""
        if (folder := run_of(path)) is not None:
            model = folder.config.model
            return cls(folder.kind.classes, model.mean, model.std)
        contract = contract_of_weights(Path(path).expanduser())
        if contract is None:
            return None
        constants = contract.normalisation
        if constants is None:
            return cls(tuple(contract.classes), None, None)
        return cls(tuple(contract.classes), tuple(constants.mean), tuple(constants.std))


def run_of(path: str | Path) -> RunFolder | None:
    """The run that a path is, or is a checkpoint of; None of others."""
    place = Path(path).expanduser()
    run = place.parents[1] if place.is_file() and place.parent.name == "checkpoints" else place
    return RunFolder.open(run) if (run / "config.yaml").is_file() else None


def check_unseen(config: RunConfig, training: ImageSet) -> None:
    """Refuse a start that was trained on test images of this run, where both have one source.

    Args:
        config: the run; ``start`` may be a run or a checkpoint of one.
        training: its training images.

    Raises:
        DataError: the start was trained on them, or may have been.
    """
    folder = None if config.start_path is None else run_of(config.start_path)
    if folder is None or not same_source(config.data.source, folder.config.data.source):
        return
    other = (
        "name a test split of its own (data.test_split), or start from weights that were not "
        "trained on these images"
    )
    if moved := folder.images_changed(training):
        if carves_test(config.data):
            raise DataError(
                f"start: {moved}: test images of this run may be among those that it was trained "
                f"on; restore them, {other}"
            )
        return
    earlier = folder.config.data
    tested, validated = seen_before(config.data, earlier)
    theirs = differing_splits(earlier, config.data)
    if tested:
        raise DataError(
            f"start: {folder.path} was trained or validated on {tested:,} of the test images of "
            f"this run; set {theirs} as there, {other}"
        )
    if validated:
        _note(
            f"start: {folder.path} was trained on {validated:,} of the images that validate this "
            f"run, so its accuracy on them is too high; set {theirs} as there"
        )


def standardised_as_start(config: RunConfig, model: nn.Module | None = None) -> RunConfig:
    """The run with the ``model.mean`` and ``model.std`` of its start, where it sets none.

    A note says so, and where the run sets others.

    Args:
        config: the run.
        model: its network as a Python object, which may be :class:`~cure.models.Normalised`.
    """
    origin = None if config.start_path is None else Origin.of(config.start_path)
    mean, std = config.model.mean, config.model.std
    inside = None if model is None else constants_inside(model)
    if mean is None and inside is not None:
        mean, std = inside
    if origin is None or (origin.mean is None and mean is None):
        return config
    if origin.mean is None or origin.std is None:
        _note(
            f"start: {config.start_path} has no model.mean and model.std, this run sets some; "
            "leave them out unless the network of the start standardises images itself"
        )
        return config
    theirs = " ".join(
        f"model.{name}={','.join(f'{number:.6g}' for number in numbers)}"
        for name, numbers in (("mean", origin.mean), ("std", origin.std))
    )
    if mean is None or std is None:
        _note(
            f"start: {config.start_path} standardises images with {theirs}, which this run takes "
            "over; where its network does so itself, set model.mean to zeros and model.std to ones"
        )
        changes = {"mean": origin.mean, "std": origin.std}
        return config.model_copy(update={"model": config.model.model_copy(update=changes)})
    if not origin.standardises_with(mean, std):
        _note(
            f"start: {config.start_path} standardises images with {theirs}, this run with others; "
            "leave out model.mean and model.std to take those of the start"
        )
    return config


def keeps_head(network: nn.Module, config: RunConfig, kind: ImageKind) -> tuple[int, ...] | None:
    """Positions in the start's last layer of the classes of the data, where that layer is kept.

    None where it is drawn anew, or nothing is known of its classes.

    Args:
        network: before the weights are loaded.
        config: the run.
        kind: its images.

    Raises:
        ModelError: the names do not match.
    """
    path = config.start_path
    origin = None if path is None else Origin.of(path)
    if origin is None or len(origin.classes) != len(kind.classes):
        return None
    if config.draws_head:
        # The last layer of a run of the same classes is what `new_head` asks for, trained already.
        trained = config.start == path and (Path(str(path)).expanduser() / "config.yaml").is_file()
        if not trained or sorted(origin.classes) != sorted(kind.classes):
            return None
    elif own_classes(network) is not None:
        return None  # its logits have the order of its own names, and are brought into the data's
    return places_of(kind.classes, origin.classes, f"start: {path}")


def order_start(
    network: nn.Module, config: RunConfig, kind: ImageKind, places: tuple[int, ...]
) -> None:
    """Bring the last layer of a loaded start into the order of the data's classes.

    Raises:
        ModelError: when it cannot be.
    """
    if places == tuple(range(len(places))):
        return
    image = torch.rand((2, kind.channels, *kind.size), generator=torch.Generator().manual_seed(0))
    try:
        order_head(network, places, image)
    except ModelError as error:
        raise ModelError(
            f"start: {config.start_path} has its classes in another order than the data "
            f"({some(kind.classes)}), and its last layer cannot be put in order ({error}); train a "
            f"new one: new_head=true start=natural:{config.start_path}"
        ) from None
    _note(f"start: the last layer of {config.start_path} is put in the order of the data's classes")


def _note(text: str) -> None:
    if launched().rank == 0:
        warnings.warn(text, CureNote, stacklevel=3)
