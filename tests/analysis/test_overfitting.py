"""Kept checkpoints, the alarm, and the study that looks back over the epochs of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cure
from cure.analysis import overfitting as study_module
from cure.analysis.overfitting import overfitting
from cure.analysis.study import STUDIES
from cure.errors import CheckpointError, ConfigError
from cure.models import read_weights
from cure.runs.folder import RunFolder
from cure.runs.records import Accuracies, EpochMetrics
from cure.training.overfitting_detector import LAST, robust_overfitting
from cure.training.trainer import Trainer
from cure.utils.stats import independent_difference
from helpers import Command, bright_or_dark, refused

SETTINGS = [
    *("data.limit=400", "data.validation=100", "start=scratch", "method=at", "attack.steps=2"),
    *("training.epochs=5", "training.validation_steps=3"),
    *("training.optimizer.learning_rate=0.05", "training.checkpoint_every=2"),
]


def trained(path: Path, *settings: str) -> Path:
    return cure.train("digits", [*SETTINGS, *settings], run=path, quiet=True).path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five epochs, of which the second, the fourth and the last are kept."""
    return trained(tmp_path_factory.mktemp("overfitting") / "run", "training.keep_every=2")


def same(one: Path, other: Path) -> bool:
    first, second = read_weights(one), read_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# Kept checkpoints.


def test_every_second_epoch_and_the_last_are_kept(run: Path, tmp_path: Path) -> None:
    folder = RunFolder.open(run)
    assert list(folder.kept()) == [2, 4, 5]
    assert same(folder.kept()[5], folder.weights("last"))
    assert not same(folder.kept()[4], folder.kept()[5])
    other = RunFolder.open(trained(tmp_path / "off"))
    assert other.kept() == {}
    assert same(other.weights("last"), folder.weights("last")), "keeping changes nothing"
    network = cure.Run(run).config.model
    result = cure.evaluate(
        network.name,
        weights=folder.kept()[4],
        options=network.options,
        data="digits",
        data_options={"limit": 400, "validation": 100},
        split="validation",
        attacks="natural",
        device="cpu",
    )
    recorded = folder.metrics()[3].validation.natural
    assert result["natural"]["accuracy"] == pytest.approx(recorded)


def test_a_killed_run_keeps_the_same_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def dies(self: Trainer, batch: Any) -> Any:
        if batch.step == 3 * self.steps_per_epoch:
            raise RuntimeError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            trained(tmp_path / "killed", "training.keep_every=2")
    folder = RunFolder.open(tmp_path / "killed")
    assert list(folder.kept()) == [2]
    # Weights of an epoch whose state was lost: it is done again.
    shutil.copy(folder.kept()[2], folder.checkpoints / "epoch-0009.safetensors")
    (folder.checkpoints / "epoch-mine.safetensors").write_bytes(b"not of this project")
    cure.resume(tmp_path / "killed", quiet=True)
    assert list(folder.kept()) == [2, 4, 5]
    assert (folder.checkpoints / "epoch-mine.safetensors").exists()
    for epoch, path in RunFolder.open(run).kept().items():
        assert same(path, folder.kept()[epoch])


# The alarm.


def records(
    validation: Sequence[float], training: Sequence[float], name: str = "robust_accuracy"
) -> list[EpochMetrics]:
    return [
        EpochMetrics(
            epoch=number,
            train={"loss": 1.0, name: t},
            validation=Accuracies(natural=v, robust=v),
        )
        for number, (v, t) in enumerate(zip(validation, training, strict=True), 1)
    ]


RISES = [20 + 2 * min(n, 12) for n in range(40)]
FALLS = [value - max(0, n - 14) for n, value in enumerate(RISES)]
LEARNS = [0.2 + 0.02 * n for n in range(40)]


def test_a_curve_that_rises_and_falls_while_training_improves_is_alarming() -> None:
    told = robust_overfitting(records(FALLS, LEARNS), 1000)
    assert told is not None
    # The last five of 40: 44 - 25 + (4, 3, 2, 1, 0); the highest five: 44 throughout, the first
    # of them at epochs 13 (the thirteenth value is the first of 44) to 15 and a little lower after.
    assert "21.0 % over the last 5" in told
    best = max(sum(FALLS[n : n + 5]) / 5 for n in range(35))
    assert f"{best - 21:.1f} points below" in told


def test_it_comes_when_the_fall_passes_two_standard_errors() -> None:
    high, images = 50.0, 1000
    for fall, expected in ((4.4, False), (4.5, True)):
        # Two standard errors of 0.5 against about 0.455: 2 sqrt((.25 + .248) / 1000) = 4.46 points.
        curve = [high] * 8 + [high - fall] * 5
        told = robust_overfitting(records(curve, LEARNS[:13]), images)
        assert (told is not None) is expected


def test_a_rising_curve_a_plateau_and_a_run_that_forgets_are_not_alarming() -> None:
    assert robust_overfitting(records(RISES, LEARNS), 1000) is None
    assert robust_overfitting(records(FALLS, LEARNS[::-1]), 1000) is None, "training forgets too"
    assert robust_overfitting(records(FALLS, LEARNS, "accuracy"), 1000) is None, "not known"


def test_noise_alone_is_not_alarming() -> None:
    """Two hundred epochs of independent noise of 1,000 images: more than a real run has."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        right = torch.binomial(torch.full((200,), 1000.0), torch.tensor(0.45), generator=draws)
        curve = (right / 10).tolist()
        learns = [0.2 + 0.002 * n for n in range(200)]
        for count in range(2 * LAST, 201, 5):
            assert robust_overfitting(records(curve, learns)[:count], 1000) is None


def test_an_adversarial_loss_that_falls_stands_for_learning() -> None:
    assert robust_overfitting(records(FALLS, LEARNS[::-1], "adversarial_loss"), 1000)
    assert robust_overfitting(records(FALLS, LEARNS, "adversarial_loss"), 1000) is None


def test_too_few_validations_tell_nothing() -> None:
    steep = [90.0] * 5 + [10.0] * 4
    assert robust_overfitting([], 1000) is None
    assert robust_overfitting(records(steep, LEARNS[:9]), 1000) is None
    assert robust_overfitting(records([*steep, 10.0], LEARNS[:10]), 1000) is not None
    without = [
        EpochMetrics(epoch=record.epoch, train=record.train)
        for record in records([50.0] * 20, LEARNS[:20])
    ]
    assert robust_overfitting([*without, *records(steep, LEARNS[:9])], 1000) is None


def test_training_tells_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Listener:
        def __init__(self, title: str) -> None: ...
        def start(self, steps: int, done: int) -> None: ...
        def step(self, images: int, metrics: object) -> None: ...
        def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None: ...
        def close(self) -> None: ...
        def say(self, sentence: str) -> None:
            pass

        def warn(self, sentence: str) -> None:
            told.append(sentence)

    def alarm(records: Sequence[Any], images: int) -> str | None:
        assert images == 100
        return f"epoch {len(records)}" if len(records) >= 2 else None

    monkeypatch.setattr("cure.training.prerequisites.TerminalTracker", Listener)
    monkeypatch.setattr("cure.training.trainer.robust_overfitting", alarm)
    cure.train("digits", [*SETTINGS, "training.epochs=4"], run=tmp_path / "run")
    assert told == ["epoch 2"]


# The study.


@pytest.fixture(scope="module")
def studied(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("studied") / "found.json"
    overfitting(run, limit=None, device="cpu", output=output)
    found: dict[str, Any] = json.loads(output.read_text())
    found["at"] = output
    return found


def test_what_is_measured_on_validation_images_is_what_training_recorded(
    run: Path, studied: dict[str, Any]
) -> None:
    (this,) = studied["runs"]
    recorded = {r.epoch: r.validation.content() for r in RunFolder.open(run).metrics()}
    assert {2, 4, 5} <= {point["epoch"] for point in this["measured"]}
    for point in this["measured"]:
        for kind in ("natural", "robust"):
            measured = point["validation"][kind]["accuracy"]
            assert measured == pytest.approx(recorded[point["epoch"]][kind])
    assert this["n"] == {"train": 300, "validation": 100, "test": 359}
    assert this["kept"] == [2, 4, 5]
    assert this["last"] == 5
    assert this["best"] == max(recorded, key=lambda epoch: recorded[epoch]["robust"])


def test_it_is_told_in_words_tables_and_pictures(studied: dict[str, Any]) -> None:
    view = STUDIES["overfitting"].view(studied)
    (this,) = studied["runs"]
    assert "Robust accuracy (pgd3, 359 test images): run " in view.finding
    assert f"at its best epoch, {this['best']}, and" in view.finding
    assert [table.title for table in view.tables] == [
        "Best against last checkpoint, test images",
        "Accuracy over epochs, %, run",
    ]
    (picture,) = view.pictures()
    assert "epoch" in picture.svg


def test_runs_measured_on_other_numbers_of_images_are_told_so(studied: dict[str, Any]) -> None:
    (this,) = studied["runs"]
    other = this | {"n": this["n"] | {"test": 1000}}
    other["attack"] = this["attack"] | {"name": "pgd10"}
    finding = STUDIES["overfitting"].view({"runs": [this, other]}).finding
    assert "Robust accuracy (pgd10 or pgd3, 359 or 1,000 test images): run " in finding


def test_all_files_of_a_study_are_in_the_home_directory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    overfitting(run, limit=5, device="cpu", output="~/found.json")
    assert (tmp_path / "found.json").is_file()
    assert (tmp_path / "found-verdicts.jsonl").is_file()
    assert not (tmp_path / "~").exists()


def test_a_checkpoint_is_not_attacked_twice(
    run: Path, studied: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = studied["at"].with_name("found-verdicts.jsonl")
    again = tmp_path / "again.json"
    copied = shutil.copy(journal, tmp_path / "again-verdicts.jsonl")
    calls: list[int] = []
    measure = study_module.verdicts

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return measure(*arguments)

    monkeypatch.setattr(study_module, "verdicts", counted)
    result = overfitting(run, limit=None, device="cpu", output=again)
    assert (calls, result["runs"]) == ([], studied["runs"])
    # The last line cut short by a kill: that one is measured again.
    Path(copied).write_text(Path(copied).read_text()[:-20])
    again.unlink()
    result = overfitting(run, limit=None, device="cpu", output=again)
    assert (len(calls), result["runs"]) == (1, studied["runs"])
    again.unlink()
    result = overfitting(run, limit=None, device="cpu", output=again)
    assert (len(calls), result["runs"]) == (1, studied["runs"]), "kept behind the line that was cut"
    # Verdicts on fewer images, or on natural images alone, are no verdicts; nor is another file.
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[0]["robust"] = lines[0]["robust"][1:]
    del lines[1]["robust"]
    damaged = "".join(f"{json.dumps(line)}\n" for line in lines).encode() + b"\xff\n"
    Path(copied).write_bytes(damaged)
    again.unlink()
    result = overfitting(run, limit=None, device="cpu", output=again)
    assert (len(calls), result["runs"]) == (3, studied["runs"])
    del calls[1:]
    # Other images are other verdicts.
    overfitting(run, limit=50, device="cpu", output=tmp_path / "few.json")
    assert len(calls) == 1 + 3 * len(studied["runs"][0]["measured"])


def test_gaps_are_differences_on_the_same_and_on_other_images() -> None:
    best, last = torch.tensor([1, 1, 1, 0, 1]).bool(), torch.tensor([0, 0, 1, 1, 1]).bool()
    assert study_module._gap(best, last)["difference"] == pytest.approx(20)
    # Newcombe 1998, Table II, method 10: 56/70 less 48/80 is 0.0524 to 0.3339.
    difference, low, high = independent_difference((56, 70), (48, 80))
    assert (difference, low, high) == pytest.approx((20, 5.24, 33.39), abs=0.005)


def test_the_command_says_what_a_run_did_not_keep(
    run: Path, tmp_path: Path, command: Command
) -> None:
    bare = trained(tmp_path / "bare$1$")
    more = shutil.copytree(run, tmp_path / "more" / "run")
    ended = command("analyse", "overfitting", run, bare, more, "--limit", 40, "--device", "cpu")
    assert ended.status == 0, ended
    assert "bare$1$ kept no weights but the best and the last" in ended.out
    assert "training.keep_every=N" in ended.out
    result = json.loads((run / "studies" / "overfitting-1.json").read_text())
    assert [this["missing"] is None for this in result["runs"]] == [True, False, True]
    assert [this["name"] for this in result["runs"]] == ["run", "bare$1$", "run-2"]
    assert result["runs"][0]["n"] == {"train": 40, "validation": 40, "test": 40}
    names = {f"overfitting-1-{what}.svg" for what in ("1", "2", "3", "runs")}
    assert {path.name for path in (run / "studies").glob("*.svg")} == names
    together = (run / "studies" / "overfitting-1-runs.svg").read_text()
    assert ">bare$1$<" in together


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path, command: Command) -> None:
    refused(command("analyse", "overfitting", tmp_path), "no run")
    refused(command("analyse", "overfitting", run, "--limit", 0), "limit")
    (tmp_path / "there.json").write_text("mine")
    refused(command("analyse", "overfitting", run, "--output", tmp_path / "there.json"), "exists")
    refused(command("train", "digits", "training.keep_every=0"), "training.keep_every")
    assert list(tmp_path.iterdir()) == [tmp_path / "there.json"]
    with pytest.raises(ConfigError, match="one or more runs"):
        overfitting([])


def test_a_run_without_an_epoch_or_with_images_in_memory_is_refused(
    run: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    shutil.copytree(run, empty)
    (empty / "checkpoints" / "last.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no 'last' checkpoint yet; let it go on with"):
        overfitting(empty)
    RunFolder.open(empty).set_status("failed", reason="the loss stopped being finite")
    with pytest.raises(CheckpointError, match="no 'last' checkpoint, it failed: the loss stopped"):
        overfitting(empty)
    given = cure.train(
        "digits",
        [*SETTINGS, "training.epochs=1", "data.limit=96", "data.validation=32"],
        data=bright_or_dark(),
        run=tmp_path / "given",
        quiet=True,
    )
    with pytest.raises(ConfigError, match="in Python"):
        overfitting(given)
