"""Memory, crashes, full disks: a run says what happened and can go on."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cure
from cure.config import TrainingConfig
from cure.data import ImageSet
from cure.errors import CheckpointError, ConfigError, CureError, OutOfMemory
from cure.recipe import dump
from cure.runs.folder import RunFolder
from cure.training import resources
from cure.training.extend import changed
from cure.training.trainer import Trainer
from cure.utils import io, memory

QUICK: dict[str, Any] = {
    "start": "model",
    "method": "trades",
    "data.validation": 24,
    "attack.steps": 1,
    "training.epochs": 2,
    "training.batch_size": 12,
    "training.validation_steps": 1,
    "training.collapse_patience": 99,
    "training.optimizer.learning_rate": 0.01,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2))


def train(path: Path, images: ImageSet, **changes: Any) -> Any:
    settings = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    return cure.train("digits", settings, run=path, data=images, model=network(), quiet=True)


def resume(path: Path, images: ImageSet, settings: Any = ()) -> Any:
    return cure.resume(path, settings, data=images, model=network(), quiet=True)


def break_step(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """Let step number ``at`` raise an error, once."""
    plain = Trainer.train_step

    def step(self: Trainer, batch: Any) -> Any:
        if batch.step == at:
            monkeypatch.setattr(Trainer, "train_step", plain)
            raise error
        return plain(self, batch)

    monkeypatch.setattr(Trainer, "train_step", step)


# -- memory --------------------------------------------------------------------------------------


def test_saved_activations_are_counted_by_the_trial_pass() -> None:
    """Linear keeps its input, tanh its output: 64 + 8 + 8 numbers, tanh's shared by both."""
    from cure.models.trial import adapt, traits_of

    found = traits_of(adapt(network(), 2, 1, (8, 8))).activation_bytes
    assert found == 4 * (64 + 8)


@pytest.mark.parametrize(("method", "graphs"), [("at", 1), ("trades", 2), ("hat", 3), ("st-at", 3)])
def test_the_estimate_is_near_what_the_allocator_gave(method: str, graphs: int) -> None:
    """Peak of PyTorch's own records of allocations, for the step of a convolutional network."""
    from torch.profiler import ProfilerActivity, profile

    from cure.attacks import PGD, Threat
    from cure.data.images import Batch
    from cure.methods import METHODS
    from cure.models.trial import adapt, traits_of

    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    model = adapt(nn.Sequential(*layers, nn.Linear(8 * 144, 3)), 3, 1, (16, 16))
    settings = {"natural_teacher": model} if method == "hat" else {}
    attack = PGD(Threat("Linf", 0.1), 1, 0.1)
    made = METHODS[method](model, attack=attack, **settings)
    assert made.graphs == graphs
    count = 64
    given = Batch(torch.rand(count, 1, 16, 16), torch.arange(count) % 3, torch.arange(count), 0)
    made.take_step(given).gradients()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        made.take_step(given).gradients()
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    expected = (graphs + resources.PASSING) * traits_of(model).activation_bytes * count
    assert 0.5 * expected < peak < 1.2 * expected, peak / expected


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(resources, "available", lambda device: int(size))


def need(path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> resources.MemoryNeed:
    """What the quick run needs."""
    seen: list[resources.MemoryNeed] = []
    plain = resources.memory_need

    def look(*given: Any) -> resources.MemoryNeed:
        seen.append(plain(*given))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(resources, "memory_need", look)
        train(path, images, training__epochs=1, evaluation__batch_size=4)
    return seen[0]


def test_what_cannot_fit_is_refused_and_auto_takes_the_fewest_parts(
    tmp_path: Path, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = need(tmp_path / "known", brightness, monkeypatch)
    small = {"training__epochs": 1, "evaluation__batch_size": 4}
    free(monkeypatch, (known.fixed + 6 * known.per_image) / 0.8)
    with pytest.raises(ConfigError, match=r"6 at once fit; training\.batch_size=auto"):
        train(tmp_path / "no", brightness, **small, training__batch_size=24)
    assert not (tmp_path / "no").exists()
    run = train(tmp_path / "auto", brightness, **small, training__batch_size="auto")
    # The recipe's 64 images in parts of 4, the largest divisor up to 6.
    assert (run.config.training.batch_size, run.config.training.parts) == (64, 16)
    assert RunFolder.open(run.path).status().step == 1
    free(monkeypatch, known.fixed)
    with pytest.raises(ConfigError, match="not even one image fits"):
        train(tmp_path / "none", brightness, training__batch_size="auto")


def test_what_may_not_fit_is_warned_of_once(
    tmp_path: Path,
    brightness: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = need(tmp_path / "known", brightness, monkeypatch)
    free(monkeypatch, 0.9 * known.peak)
    settings = QUICK | {"training.epochs": 1, "evaluation.batch_size": 4}
    cure.train("digits", settings, run=tmp_path / "w", data=brightness, model=network())
    assert capsys.readouterr().err.count("training needs about") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_names_what_fits_and_the_run_goes_on(
    error: BaseException, tmp_path: Path, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_step(monkeypatch, 7, error)
    with pytest.raises(OutOfMemory, match="does not hold 12 images at once; 6 should fit") as told:
        train(tmp_path / "run", brightness)
    assert "'training.accumulation_steps': 2}, model=model, data=data)" in str(told.value)
    status = RunFolder.open(tmp_path / "run").status()
    assert (status.state, status.step) == ("failed", 7)
    assert "6 should fit" in str(status.reason)
    run = resume(tmp_path / "run", brightness, {"training.accumulation_steps": 2})
    assert RunFolder.open(run.path).status().state == "finished"
    assert run.config.training.parts == 2


def test_limits_of_the_process_and_the_container_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    for name, text in (("max", "1000"), ("now", "700"), ("stat", "anon 1\ninactive_file 50\n")):
        (tmp_path / name).write_text(text)
    paths = tuple(str(tmp_path / name) for name in ("max", "now", "stat"))
    monkeypatch.setattr(memory, "_GROUPS", (paths,))
    assert memory.available(device) == 350
    (tmp_path / "max").write_text("max")
    found = memory.available(device)
    assert found is not None
    assert found > 2**20


# -- crashes -------------------------------------------------------------------------------------


def test_any_crash_is_in_the_run_and_the_run_goes_on(
    tmp_path: Path, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cure.cli.watch import shown

    whole = train(tmp_path / "whole", brightness)
    break_step(monkeypatch, 8, ZeroDivisionError("a fault of ours"))
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", brightness)
    status = RunFolder.open(tmp_path / "run").status()
    assert (status.state, status.reason) == ("failed", "ZeroDivisionError: a fault of ours")
    from rich.console import Console

    console = Console(width=100, record=True)
    console.print(shown([tmp_path / "run"], 0.0, 100, True)[0])
    assert "a fault of ours" in console.export_text()
    again = resume(tmp_path / "run", brightness)
    torch.testing.assert_close(
        again.model("last").state_dict(), whole.model("last").state_dict(), rtol=0, atol=0
    )


def test_the_advice_after_ctrl_c_fits_python(
    tmp_path: Path, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    break_step(monkeypatch, 8, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(run, brightness)
    assert RunFolder.open(run).status().state == "stopped"
    assert RunFolder(run).resume_command() == f"cure.resume('{run}', model=model, data=data)"
    (run / "config.yaml").write_text("model: {name: small_cnn}\ndata: {source: digits}\n")
    assert RunFolder(run).resume_command() == f"cure resume {run}"


def test_a_second_process_is_refused_and_leaves_the_status(
    tmp_path: Path, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    break_step(monkeypatch, 8, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(run, brightness)
    before = (run / "status.json").read_bytes()
    with RunFolder.open(run).lock(), pytest.raises(CheckpointError, match="by another process"):
        resume(run, brightness)
    assert (run / "status.json").read_bytes() == before


# -- a full disk ---------------------------------------------------------------------------------


def test_a_full_disk_at_any_write_loses_nothing(
    tmp_path: Path, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write of a run fails once; the error is a sentence, and the run ends with its bits."""
    plain_sync, writes = os.fsync, [0]

    def fail_at(number: int) -> None:
        writes[0] = 0

        def sync(descriptor: int) -> None:
            writes[0] += 1
            if writes[0] == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            plain_sync(descriptor)

        monkeypatch.setattr(io.os, "fsync", sync)

    fail_at(-1)
    whole = train(tmp_path / "whole", brightness, training__epochs=1)
    count = writes[0]
    assert count > 10
    failed = 0
    for number in range(1, count + 1):
        run = tmp_path / str(number)
        fail_at(number)
        said = ""
        try:
            train(run, brightness, training__epochs=1)
        except CureError as error:
            said = str(error)
        if said:
            failed += 1
            assert "space" in said
            fail_at(-1)
            if run.exists():
                resume(run, brightness)
            else:
                train(run, brightness, training__epochs=1)
        assert not list(tmp_path.rglob("*.tmp")), number
        torch.testing.assert_close(
            cure.Run(run, network()).model("last").state_dict(),
            whole.model("last").state_dict(),
            rtol=0,
            atol=0,
        )
    # The others flush a folder after its file was renamed, which not every system can.
    assert failed > count / 3


# -- going on ------------------------------------------------------------------------------------


def test_a_finished_run_is_extended_with_its_schedule_from_the_end(
    tmp_path: Path, brightness: ImageSet, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"training.schedule": {"name": "cosine"}, "training.checkpoint_every": 1}
    settings = QUICK | rates
    path = tmp_path / "run"
    cure.train("digits", settings, run=path, data=brightness, model=network(), quiet=True)
    capsys.readouterr()
    cure.resume(path, {"training.epochs": 5}, data=brightness, model=network())
    said = capsys.readouterr().err
    assert "goes on from epoch 2 to 5: the schedule of the learning rate (cosine from 0.01)" in said
    folder = RunFolder.open(path)
    assert folder.status().state == "finished"
    lines = folder.metrics()
    assert [line.epoch for line in lines] == [1, 2, 3, 4, 5]
    # Six steps an epoch; the rate of an epoch's last step, over 12 steps and then over 18.
    import math

    for line, (step, total) in zip(lines[1:], [(11, 12), (5, 18), (11, 18), (17, 18)], strict=True):
        expected = 0.01 * 0.5 * (1 + math.cos(math.pi * step / total))
        assert line.learning_rate == pytest.approx(expected)
    # Once more, and nothing for the same number.
    resume(path, brightness, ["training.epochs=6"])
    resume(path, brightness, ["training.epochs=6"])
    assert len(folder.metrics()) == 6
    for words, sentence in (
        (["training.epochs=3"], "has 6 epochs behind it, got 3"),
        (["attack.steps=2"], f"start={path} attack.steps=2"),
        (["training.minutes=0.00001"], "give at least"),
    ):
        with pytest.raises(ConfigError, match="(?s)" + sentence):
            resume(path, brightness, words)
    times = [line.total_seconds for line in folder.timing()]
    minutes = (sum(times) + 3 * sum(times) / len(times)) / 60
    resume(path, brightness, {"training.minutes": minutes})
    assert len(folder.metrics()) == 6 + 2


def test_minutes_in_all_count_epochs_that_were_added_to_a_budget(
    tmp_path: Path, brightness: ImageSet
) -> None:
    """Six epochs of 10 s, the last four of them beyond the budget that the run began with."""
    path = train(tmp_path / "run", brightness).path
    resume(path, brightness, ["training.epochs=6"])
    folder = RunFolder.open(path)
    text = dump(folder.config.model_copy(update={"training": with_minutes(folder, 0.3)}))
    (path / "config.yaml").write_text(text)
    lines = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
    ten = [json.dumps(line | {"seconds": 8.0, "validation_seconds": 2.0}) for line in lines]
    (path / "timing.jsonl").write_text("".join(f"{line}\n" for line in ten))
    # 60 of 120 s are left, of which 57 are planned: five epochs.
    longer, _ = changed(RunFolder.open(path), [("training.minutes", 2)])
    assert longer.training.epochs == 6 + 5


def with_minutes(folder: RunFolder, minutes: float) -> TrainingConfig:
    return folder.config.training.model_copy(update={"minutes": minutes})


def test_a_run_that_is_not_finished_is_not_extended(
    tmp_path: Path, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_step(monkeypatch, 8, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", brightness)
    with pytest.raises(ConfigError, match="finish it first"):
        resume(tmp_path / "run", brightness, {"training.epochs": 9})


def test_next_is_said_once(command: Any, tmp_path: Path) -> None:
    words = ["training.epochs=1", "training.validation_steps=1", "natural.epochs=1"]
    words += ["data.limit=400", "data.validation=100", "attack.steps=1"]
    words += ["model.options.width=2"]
    ended = command("train", "digits", *words, "--run", tmp_path / "run")
    assert ended.status == 0, ended.err
    assert (ended.out + ended.err).count("cure evaluate") == 1
