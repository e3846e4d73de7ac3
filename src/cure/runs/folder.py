"""A run on disk: what it is, how far it came, what it produced.

- ``config.yaml``: what the run is, every setting resolved; ``environment.json``: on what.
- ``data.json``: classes and size of its images.
- ``metrics.jsonl``: a line an epoch, the same bits for the same run; ``timing.jsonl``: seconds.
- ``gradients.jsonl``, ``gradients.safetensors``: what ``training.record_gradients`` records.
- ``status.json``: how far it came.
- ``checkpoints/{last,best}.safetensors``: weights for anyone.
- ``checkpoints/epoch-0005.safetensors``: those that ``training.keep_every`` keeps.
- ``checkpoints/state.safetensors``: all that resuming needs.
- ``evaluations/``: results of ``cure evaluate``, and verdicts of those that are not finished.
- ``corruptions/``, ``diagnoses/``: results of ``cure corruptions`` and ``cure diagnose``.
- ``studies/``: results of ``cure analyse`` and their pictures.
- ``natural/``: the run that trained the start.
- ``tracking.json``: what W&B and MLflow call the run; ``tensorboard/``, ``wandb/``: their files.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cure.config import RunConfig
from cure.data.images import ImageKind
from cure.errors import CheckpointError
from cure.recipe import check_kept, dump
from cure.utils.environment import environment
from cure.utils.io import write_json, write_text


def epoch_name(epoch: int) -> str:
    """Name of the checkpoint that keeps the weights after so many epochs."""
    return f"epoch-{epoch:04d}"


class RunFolder:
    """One run's folder.  Nothing here deletes or replaces a run.

    Attributes:
        path: where it is.
        resumed_by: the run to name to ``cure resume``: itself, or the run whose start it trains.
        writes: whether this process writes.  Of several that train together only the first does;
            to the others the folder is there to read, and what they are told to write is left out.
    """

    def __init__(self, path: Path, resumed_by: Path | None = None, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.resumed_by = resumed_by or path
        self.checkpoints = path / "checkpoints"
        self.state = self.checkpoints / "state.safetensors"

    @classmethod
    def create(cls, path: Path | str | None, config: RunConfig, kind: ImageKind) -> RunFolder:
        """A new folder for ``config``; without a path the first free ``runs/NAME[-N]``.

        Args:
            path: where; parents are made.
            config: what the run is.
            kind: the images it is trained on.

        Raises:
            CheckpointError: when the path exists, or cannot be written.
        """
        candidates = [Path(path)] if path is not None else cls._numbered(config.name)
        target = next((place for place in candidates if not place.exists()), None)
        if target is None:
            raise CheckpointError(
                f"{path} exists; a run never overwrites: name another folder with --run, "
                f"or continue that run with `cure resume {path}`"
            )
        # Filled under another name, so that a folder with the run's name is always a whole one.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            (temporary / "checkpoints").mkdir(parents=True)
            write_json(temporary / "environment.json", environment())
            write_json(temporary / "data.json", asdict(kind))
            write_text(temporary / "config.yaml", dump(config))
            temporary.rename(target)
        except OSError as error:
            raise CheckpointError(f"the run folder {target} cannot be made: {error}") from None
        return cls(target)

    @staticmethod
    def _numbered(name: str) -> Iterator[Path]:
        yield Path("runs") / name
        for number in itertools.count(2):
            yield Path("runs") / f"{name}-{number}"

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The run at ``path``.

        Raises:
            CheckpointError: when there is none.
        """
        folder = cls(Path(path))
        if not (folder.path / "config.yaml").is_file():
            what = "holds no run (no config.yaml)" if folder.path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}; name the folder that `cure train` printed")
        return folder

    @property
    def config(self) -> RunConfig:
        """What the run is."""
        path = self.path / "config.yaml"
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} holds no configuration; restore it from a copy")
        return check_kept(raw, str(path))

    @property
    def kind(self) -> ImageKind:
        """The images that the run was trained on."""
        path = self.path / "data.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return ImageKind(tuple(content["classes"]), content["channels"], tuple(content["size"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); restore it from a copy"
            ) from None

    def weights(self, checkpoint: str = "best") -> Path:
        """The weights file called ``checkpoint`` ("best" or "last").

        Raises:
            CheckpointError: when the run has not written it yet.
        """
        path = self.checkpoints / f"{checkpoint}.safetensors"
        if not path.is_file():
            raise CheckpointError(
                f"{self.path} has no '{checkpoint}' checkpoint yet; "
                f"let it finish an epoch with `cure resume {self.resumed_by}`"
            )
        return path

    def kept(self) -> dict[int, Path]:
        """The weights that ``training.keep_every`` kept, by epoch."""
        paths = sorted(self.checkpoints.glob("epoch-*.safetensors"))
        names = {path: path.stem.removeprefix("epoch-") for path in paths}
        return {int(number): path for path, number in names.items() if number.isdecimal()}

    def status(self) -> dict[str, Any]:
        """How far the run came: {"state": "new"|"running"|"stopped"|"failed"|"finished", ...}."""
        try:
            content = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"state": "new"}
        return content if isinstance(content, dict) else {"state": "new"}

    def set_status(self, state: str, **details: object) -> None:
        """Record how far the run came."""
        if not self.writes:
            return
        write_json(self.path / "status.json", {"state": state, **details})

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of ``metrics.jsonl``, an epoch each."""
        return self._lines("metrics.jsonl")

    def timing(self) -> list[dict[str, Any]]:
        """The complete lines of ``timing.jsonl``, an epoch each."""
        return self._lines("timing.jsonl")

    def environment(self) -> dict[str, Any]:
        """On what the run was begun, see :func:`environment`."""
        return self._json(self.path / "environment.json")

    def evaluations(self) -> list[dict[str, Any]]:
        """Results of ``evaluate`` that are filed with the run, the oldest first."""
        paths = sorted(
            (self.path / "evaluations").glob("*.json"), key=lambda p: p.stat().st_mtime_ns
        )
        return [self._json(path) for path in paths]

    def studies(self) -> list[dict[str, Any]]:
        """Results of ``cure analyse`` that are filed with the run, the oldest first."""
        paths = sorted((self.path / "studies").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        return [self._json(path) for path in paths]

    @staticmethod
    def _json(path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} is missing or damaged; restore it from a copy")
        return content

    def keep(self, kind: str, result: dict[str, Any]) -> None:
        """File a result of ``evaluate`` or the like with the run, under the first free number.

        Args:
            kind: folder: "evaluations", "corruptions", "diagnoses".
            result: what says its checkpoint and split.

        Raises:
            CheckpointError: when it cannot be written.
        """
        folder = self.path / kind
        name = f"{result['model']['checkpoint']}-{result['data']['split']}"
        paths = (folder / f"{name}-{number}.json" for number in itertools.count(1))
        try:
            folder.mkdir(exist_ok=True)
            write_json(next(path for path in paths if not path.exists()), result)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be written ({error.strerror}); make {self.path} writable"
            ) from None

    def partial_evaluation(self, name: str) -> Path:
        """The file called ``name`` in which an unfinished evaluation keeps its verdicts.

        Raises:
            CheckpointError: when its folder cannot be made.
        """
        folder = self.path / "evaluations"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be made ({error.strerror}); make {self.path} writable"
            ) from None
        return folder / name

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one line of JSON to the file ``name``."""
        if not self.writes:
            return
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.path / name} cannot be written ({error.strerror}); make room and "
                f"continue with `cure resume {self.resumed_by}`"
            ) from None

    def gradients(self) -> list[dict[str, Any]]:
        """The complete lines of ``gradients.jsonl``, which :mod:`gradient_logger` writes."""
        return self._lines("gradients.jsonl")

    def rewind(self, epochs: int, steps: int) -> None:
        """Drop what was recorded after so many epochs and steps: it will be done again."""
        for name, key, most in (
            ("metrics.jsonl", "epoch", epochs),
            ("timing.jsonl", "epoch", epochs),
            ("gradients.jsonl", "step", steps - 1),
        ):
            lines = [line for line in self._lines(name) if line[key] <= most]
            if self.writes and (self.path / name).exists():
                write_text(self.path / name, "".join(json.dumps(line) + "\n" for line in lines))
        for epoch, path in self.kept().items():
            if self.writes and epoch > epochs:
                path.unlink()

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # The run was killed while it wrote this line.
        return records

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from training in this folder.

        Raises:
            CheckpointError: when another process does.
        """
        if not self.writes:
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(
                    f"{self.path} is being trained by another process; wait for it or stop it"
                ) from None
            yield
