"""Trackers: what they are told, what they remember, and that no run depends on one."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

import cure
from cure.config import RunConfig
from cure.data import ImageSet
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.training.prerequisites import carry_out
from cure.training.setup import prepare
from cure.training.tracking.base import TRACKERS, EpochTracker, scalars
from cure.training.tracking.terminal import TerminalTracker
from helpers import Command, bright_or_dark, refused

SETTINGS = {
    "data.validation": 20,
    "data.augment.crop_padding": 0,
    "model.options.width": 2,
    "training.epochs": 3,
    "training.batch_size": 16,
    "training.collapse_patience": 100,
    "method": {"name": "natural"},
    "start": "scratch",
}
WORDS = ["method=natural", "start=scratch", "training.epochs=1"]
HEARD: list[tuple[Any, ...]] = []


class Listener(EpochTracker):
    """Writes down what it hears, and fails where it is told to."""

    module = "json"
    fails = ""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        HEARD.append(("made", folder, config.name))
        self._fail("made")

    def _fail(self, where: str) -> None:
        if self.fails == where:
            raise OSError("the line is\ndown")

    def start(self, steps: int, done: int) -> None:
        HEARD.append(("start", steps, done))

    def step(self, images: int, metrics: object) -> None:
        HEARD.append(("step", images))

    def log(self, epoch: int, numbers: Any) -> None:
        HEARD.append(("epoch", epoch, numbers))
        self._fail("epoch")

    def say(self, sentence: str) -> None:
        pass

    def warn(self, sentence: str) -> None:
        HEARD.append(("warn", sentence))

    def close(self) -> None:
        HEARD.append(("close",))


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Listener]]:
    """A tracker called "listener"."""
    assert "listener" not in TRACKERS
    HEARD.clear()
    monkeypatch.setitem(TRACKERS._entries, "listener", Listener)
    monkeypatch.setattr(Listener, "fails", "")
    yield Listener
    HEARD.clear()


def trained(folder: Path, data: ImageSet | None = None, **settings: Any) -> cure.Run:
    images = bright_or_dark() if data is None else data
    changes = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    return cure.train("digits", changes, run=folder, data=images, quiet=True)


# What every tracker hears.


def test_a_tracker_hears_the_run_in_order(tmp_path: Path, listener: type[Listener]) -> None:
    run = trained(tmp_path / "run", tracking=["listener", "listener"])
    timing = [line.content() for line in RunFolder.open(run.path).timing()]
    steps = [("step", 16)] * 4
    epochs = [
        ("epoch", number, scalars(record, time))
        for number, (record, time) in enumerate(zip(run.metrics, timing, strict=True), start=1)
    ]
    heard = [*HEARD]
    assert heard == [
        ("made", run.path, "digits"),
        ("start", 12, 0),
        *(*steps, epochs[0]),
        *(*steps, epochs[1]),
        *(*steps, epochs[2]),
        ("close",),
    ]
    record, timed = run.metrics[1], timing[1]
    assert heard[11][2] == {
        "train/loss": record["train"]["loss"],
        "train/accuracy": record["train"]["accuracy"],
        "validation/natural": record["validation"]["natural"],
        "validation/robust": record["validation"]["robust"],
        "train/learning_rate": record["learning_rate"],
        "train/images_per_second": timed["images_per_second"],
    }


def test_the_natural_start_is_a_run_of_its_own(tmp_path: Path, listener: type[Listener]) -> None:
    settings = {"start": "natural", "natural.epochs": 1, "method": "at", "training.epochs": 1}
    images = bright_or_dark()
    changes = SETTINGS | settings | {"tracking": "listener"}
    cure.train("digits", changes, run=tmp_path / "run", data=images, quiet=True)
    made = [(path.name, name) for word, path, *rest in _long() if word == "made" for name in rest]
    assert made == [("natural", "digits-natural"), ("run", "digits")]


def _long() -> list[tuple[Any, ...]]:
    return [heard for heard in HEARD if len(heard) == 3]


@pytest.mark.parametrize(("fails", "heard"), [("made", 1), ("epoch", 1 + 1 + 4 + 1)])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path,
    listener: type[Listener],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
    heard: int,
) -> None:
    monkeypatch.setattr(listener, "fails", fails)
    run = trained(tmp_path / "run", tracking=["listener"])
    assert len(HEARD) == heard
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("listener failed (the line is down); the run goes on without it") == 1
    assert run.metrics == trained(tmp_path / "other").metrics


def test_only_the_first_rank_tracks(tmp_path: Path, listener: type[Listener]) -> None:
    words = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    config = load_recipe("digits", [*words, "tracking=[listener]", "training.epochs=1"])
    prepared = prepare(config, bright_or_dark(), None)
    path = RunFolder.create(tmp_path / "run", config, prepared.training.kind).path
    carry_out(RunFolder(path, writes=False), config, prepared)
    assert HEARD == []


# What is refused, and what is not.


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    tmp_path: Path,
    command: Command,
    listener: type[Listener],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "module", "a_library_that_nobody_has")
    ended = command("train", "digits", *WORDS, "tracking=listener", "--run", tmp_path / "run")
    refused(ended, "tracking: listener is not installed", "pip install 'cure-at[listener]'")
    assert list(tmp_path.iterdir()) == []
    assert HEARD == []


def test_an_unknown_tracker_is_refused(tmp_path: Path, command: Command) -> None:
    ended = command("train", "digits", *WORDS, "tracking=[wandbb]", "--run", tmp_path / "run")
    refused(ended, "unknown tracker 'wandbb'; did you mean 'wandb'?")
    assert list(tmp_path.iterdir()) == []


def test_the_key_of_earlier_versions_is_refused_in_recipes_and_read_in_runs(
    tmp_path: Path, command: Command
) -> None:
    ended = command("train", "digits", "training.tensorboard=true", "--run", tmp_path / "no")
    refused(ended, "training.tensorboard: is no setting any more; say tracking=[tensorboard]")
    run = trained(tmp_path / "run", training__epochs=1)
    kept = yaml.safe_load((run.path / "config.yaml").read_text())
    kept["training"]["tensorboard"] = True
    (run.path / "config.yaml").write_text(yaml.safe_dump(kept))
    assert RunFolder.open(run.path).config.tracking == ()
    assert cure.resume(run.path).metrics == run.metrics


# The trackers themselves.


def test_nothing_is_tracked_unless_it_is_asked_for(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", training__epochs=1)
    names = {path.name for path in run.path.iterdir()}
    assert not names & {"tensorboard", "wandb", "tracking.json", "mlruns"}


def test_tensorboard_reads_every_epoch_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(tmp_path / "run", tracking="tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    told = [(event.step, event.value) for event in events.Scalars("validation/robust")]
    assert told == [
        (record["epoch"], pytest.approx(record["validation"]["robust"])) for record in run.metrics
    ]


def epoch_of(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a tracker takes of an epoch of two."""
    record = {"epoch": number, "epochs": 2, "learning_rate": 0.1, "train": {"loss": 1 / number}}
    return record, {"images_per_second": 9.0}


def test_the_bar_is_where_the_run_is_after_it_went_back() -> None:
    tracker = TerminalTracker("digits", Console(file=io.StringIO()))
    tracker.start(8, 0)
    for _ in range(7):  # Of which the last three were undone.
        tracker.step(16, {})
    record, timing = epoch_of(1)
    tracker.epoch(record | {"step": 4}, timing)
    assert tracker.progress.tasks[0].completed == 4
    tracker.close()


def test_wandb_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**options: Any) -> Any:
        calls.append(options)
        return SimpleNamespace(
            id=options["id"] or "abc123",
            log=lambda numbers, step: calls.append((step, sorted(numbers))),
            finish=lambda exit_code: calls.append(exit_code),
            summary={},
        )

    library = SimpleNamespace(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config = load_recipe("digits", ["training.epochs=2", "name=mine"])
    first = TRACKERS["wandb"](tmp_path, config)
    first.epoch(*epoch_of(1))
    first.close()
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    second = TRACKERS["wandb"](tmp_path, config)
    second.epoch(*epoch_of(2))
    second.close()
    measured = TRACKERS["wandb"](tmp_path, config)
    measured.start(8, 8)
    measured.close()
    made = [call for call in calls if isinstance(call, dict)]
    assert [(call["project"], call["name"], call["id"], call["resume"]) for call in made] == [
        ("cure", "mine", None, "allow"),
        ("theirs", "mine", "abc123", "allow"),
        ("theirs", "mine", "abc123", "allow"),
    ]
    assert made[0]["config"]["threat"]["epsilon"] == "0.15"
    names = sorted(scalars(*epoch_of(1)))
    # Half of a run ends as failed, the whole of it as finished, also where it only measures.
    assert [call for call in calls if not isinstance(call, dict)] == [
        (1, names),
        1,
        (2, names),
        0,
        0,
    ]


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = trained(tmp_path / "run", tracking="wandb")
    identity = json.loads((run.path / "tracking.json").read_text())["wandb"]
    assert len(list((run.path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))) == 1


def test_mlflow_itself_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    pytest.importorskip("sqlalchemy", reason="MLflow's database is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = load_recipe("digits", ["training.epochs=2"])
    kept = tmp_path / "run"
    kept.mkdir()
    client = mlflow.MlflowClient()
    for epoch, status in ((1, "KILLED"), (2, "FINISHED")):
        tracker = TRACKERS["mlflow"](kept, config)
        identity = json.loads((kept / "tracking.json").read_text())["mlflow"]
        assert client.get_run(identity).info.status == "RUNNING"
        tracker.epoch(*epoch_of(epoch))
        tracker.warn("look")
        tracker.close()
        assert client.get_run(identity).info.status == status
    (found,) = client.search_runs([client.get_experiment_by_name("cure").experiment_id])
    assert found.data.params["threat.epsilon"] == "0.15"
    assert found.data.tags["warning"] == "look"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]
