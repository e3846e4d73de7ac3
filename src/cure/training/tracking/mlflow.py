"""MLflow; its own environment variables say where runs are stored.

``MLFLOW_TRACKING_URI`` (a server, ``file:.``, ``sqlite:///...``; by default MLflow writes in the
working folder), ``MLFLOW_EXPERIMENT_NAME`` (by default "cure") and the others do what MLflow says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cure.config import RunConfig
from cure.training.tracking.base import TRACKERS, EpochTracker, keep_identity, known_identity

# MLflow takes no more parameters at a time, and no longer ones.
PARAMETERS, CHARACTERS = 100, 500


@TRACKERS.register("mlflow")
class MlflowTracker(EpochTracker):
    """A run of MLflow with the settings as parameters, and the numbers with the epoch as step."""

    module = "mlflow"

    def __init__(self, folder: Path, config: RunConfig) -> None:
        from mlflow import MlflowClient

        # A client of our own leaves alone the run that the user's own code may have open.
        self.client = MlflowClient()
        known = known_identity(folder, "mlflow")
        if known is not None:
            self.identity = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cure")
        run = self.client.create_run(self._experiment(name), run_name=config.name)
        self.identity = run.info.run_id
        keep_identity(folder, "mlflow", self.identity)
        self._parameters(config.model_dump(mode="json"))

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except MlflowException:  # Another run has made it meanwhile, or nobody can.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _parameters(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, str(value)[:CHARACTERS]) for key, value in _flat(settings).items()]
        for first in range(0, len(rows), PARAMETERS):
            self.client.log_batch(self.identity, params=rows[first : first + PARAMETERS])

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name, value, now, epoch) for name, value in numbers.items()]
        self.client.log_batch(self.identity, metrics=rows)

    def warn(self, sentence: str) -> None:
        """Keep the last sentence as a tag."""
        self.client.set_tag(self.identity, "warning", sentence)

    def close(self) -> None:
        """Say how the run ended."""
        status = "FINISHED" if self.complete else "KILLED"
        self.client.set_terminated(self.identity, status=status)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
