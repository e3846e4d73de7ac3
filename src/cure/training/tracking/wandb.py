"""Weights & Biases; its own environment variables say whether and where data is sent.

``WANDB_MODE=offline`` sends nothing and keeps files in ``RUN/wandb`` for ``wandb sync``;
``WANDB_PROJECT`` (by default "cure"), ``WANDB_ENTITY``, ``WANDB_API_KEY`` and the others do what
W&B says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cure.config import RunConfig
from cure.training.tracking.base import TRACKERS, EpochTracker, keep_identity, known_identity


@TRACKERS.register("wandb")
class WandbTracker(EpochTracker):
    """A run of W&B with the settings, and the numbers with the epoch as step."""

    module = "wandb"

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cure"),
            name=os.environ.get("WANDB_NAME", config.name),
            dir=folder,
            id=known_identity(folder, "wandb"),
            resume="allow",
            config=config.model_dump(mode="json"),
            # Not the run that the user's own code may have open, and stdout stays as it is.
            reinit="create_new",
            settings=wandb.Settings(console="off"),
        )
        keep_identity(folder, "wandb", self.run.id)

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers; W&B leaves out an epoch that it has, and it has the same numbers."""
        self.run.log(dict(numbers), step=epoch)

    def warn(self, sentence: str) -> None:
        """Keep the last sentence in the run's summary."""
        self.run.summary["warning"] = sentence

    def close(self) -> None:
        """Send what is left; W&B shows a run that was stopped or failed as failed."""
        self.run.finish(exit_code=0 if self.complete else 1)
