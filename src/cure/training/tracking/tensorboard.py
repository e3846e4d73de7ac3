"""TensorBoard: files in the run's folder, read by ``tensorboard --logdir RUN``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cure.config import RunConfig
from cure.training.tracking.base import TRACKERS, EpochTracker


@TRACKERS.register("tensorboard")
class TensorBoardTracker(EpochTracker):
    """Scalars by epoch in ``RUN/tensorboard``."""

    module = "torch.utils.tensorboard"

    def __init__(self, folder: Path, config: RunConfig) -> None:  # noqa: ARG002
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Write the epoch's numbers."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)

    def warn(self, sentence: str) -> None:
        """Keep the sentence with the run."""
        self.writer.add_text("warning", sentence)

    def close(self) -> None:
        """Flush."""
        self.writer.close()
