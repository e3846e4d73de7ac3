"""A run that was trained: its folder and its network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cure.config import RunConfig
from cure.models import load_weights
from cure.models.build import network_of
from cure.runs.folder import RunFolder
from cure.utils.io import user_path
from cure.utils.modes import in_evaluation


@dataclass(frozen=True)
class Run:
    """A training run on disk.

    Attributes:
        path: its folder.
        network: the network that :func:`train` was given as a Python object, which no folder can
            remember.

    >>> import cure
    >>> small = ["method=at", "start=scratch", "training.epochs=1", "data.limit=400"]
    >>> run = cure.train("digits", small, run="runs/kept", quiet=True)
    >>> Run(run.path).config.method.name, len(run.metrics)
    ('at', 1)
    """

    path: Path  # Text is taken too.
    network: nn.Module | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", user_path(self.path))

    @property
    def config(self) -> RunConfig:
        """What the run is."""
        return RunFolder.open(self.path).config

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record an epoch: training means and accuracies on the validation split."""
        return [record.content() for record in RunFolder.open(self.path).metrics()]

    def model(self, checkpoint: Literal["best", "last"] = "best") -> nn.Module:
        """The trained network on the processor, in evaluation mode, with its best or last weights.

        Raises:
            CureError: when there are none yet, or the network was given as a Python object in
                another process: say ``Run(path, network).model()``.
        """
        folder = RunFolder.open(self.path)
        model = network_of(folder.config, folder.kind, self.network)
        load_weights(model, folder.weights(checkpoint))
        return in_evaluation(model)
