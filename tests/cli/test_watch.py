"""What `cure watch` shows of a folder at a moment: exact text for contents made by hand."""

from __future__ import annotations

import fcntl
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType
from safetensors.torch import save_file

import cure.cli.watch
from cure.cli.watch import overview, read, span, sparkline, view
from cure.data.images import ImageKind
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.runs.records import (
    Accuracies,
    EpochMetrics,
    EpochTiming,
    TradeoffPoint,
    TradeoffRecord,
    line_text,
)
from helpers import Command, refused

BEGAN = 1_000_000.0
HELD = cure.cli.watch._held
KIND = ImageKind(("0", "1"), 1, (8, 8))


def make(path: Path, epochs: int = 4, *settings: str) -> RunFolder:
    """A run that nobody trains."""
    words = [f"training.epochs={epochs}", "data.validation=200", *settings]
    return RunFolder.create(path, load_recipe("digits", words), KIND)


def line(number: int, natural: float, robust: float, loss: float = 2.0) -> EpochMetrics:
    return EpochMetrics(
        epoch=number,
        train={"loss": loss},
        validation=Accuracies(natural=natural, robust=robust),
    )


def fill(folder: RunFolder, accuracies: list[tuple[float, float]], best: int | None = None) -> None:
    """Epochs of 60 seconds, 10 more for validation; the last one ended at BEGAN."""
    for number, (natural, robust) in enumerate(accuracies, start=1):
        folder.append(line(number, natural, robust, loss=3.0 - number))
        timing = {"epoch": number, "seconds": 60.0, "validation_seconds": 10.0}
        folder.append(EpochTiming.model_validate(timing | {"images_per_second": 1234.4}))
    if best is not None:
        path = folder.checkpoints / "best.safetensors"
        save_file({"w": torch.zeros(1)}, path, {"epoch": str(best)})
    for path in folder.path.iterdir():
        os.utime(path, (BEGAN, BEGAN))


def text(drawn: RenderableType, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(drawn)
    return "\n".join(row.rstrip() for row in file.getvalue().splitlines())


def at(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    after: float = 5.0,
    unicode: bool = True,
) -> str:
    """The run "run" in ``path``, as shown some seconds after its last epoch."""
    monkeypatch.chdir(path)
    return text(view(read("run"), BEGAN + after, width, unicode), width)


@pytest.fixture(autouse=True)
def nobody_knows_who_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cure.cli.watch._held", lambda lock: None)


# Exact pictures.


def test_a_running_run_at_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "run")
    folder.set_status("running", step=0, steps=400)
    fill(folder, [(50.0, 10.0), (60.0, 22.0), (70.0, 20.0)], best=2)
    assert (
        at(tmp_path, monkeypatch, 80)
        == """\
run: running
cure, recipe digits, seed 0, digits, small_cnn
epoch 3 of 4 ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━────────── 75 %
best epoch 2: natural 60.0 %, robust 22.0 %
1,234 images/s, 1:10 an epoch, about 1:05 left

epoch   loss  natural %  robust %  images/s  seconds
    1  2.000       50.0      10.0     1,234     60.0
    2  1.000       60.0      22.0     1,234     60.0
    3  0.000       70.0      20.0     1,234     60.0

robust %   ▁█▇  10 to 22
natural %  ▁▅█  50 to 70
loss       █▅▁  0 to 2"""
    )


def test_the_same_at_40_columns_of_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "run", 4, "data.source=zahlwörter.npz")
    folder.set_status("running", step=0, steps=400)
    fill(folder, [(50.0, 10.0), (70.0, 20.0)])
    shown = at(tmp_path, monkeypatch, 40, unicode=False)
    assert shown.isascii()
    assert max(map(len, shown.splitlines())) <= 40
    assert (
        shown
        == """\
run: running
cure, recipe digits, seed 0,
zahlw?rter.npz, small_cnn
epoch 2 of 4 #########--------- 50 %
1,234 images/s, 1:10 an epoch, about
2:15 left

epoch   loss  natural %  robust %
    1  2.000       50.0      10.0
    2  1.000       70.0      20.0

robust %   07  10 to 20
natural %  07  50 to 70
loss       70  1 to 2"""
    )


def test_a_long_run_fills_120_columns_and_shows_its_last_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "run", 300)
    fill(folder, [(50.0, number / 10) for number in range(300)], best=300)
    folder.set_status("finished", step=9, steps=9)
    rows = at(tmp_path, monkeypatch, 120, after=1e6).splitlines()
    assert rows[0] == "run: finished"
    assert rows[4] == "1,234 images/s, 1:10 an epoch, 5:50:00 spent"
    assert [row.split()[0] for row in rows[7:12]] == ["296", "297", "298", "299", "300"]
    name, percent, drawn, *ends = rows[13].split()
    assert (name, percent, ends) == ("robust", "%", ["0", "to", "29.9"])
    assert len(drawn) == 40
    assert "".join(sorted(drawn)) == drawn, "a straight line never falls"
    assert all(4 <= drawn.count(sign) <= 7 for sign in "▂▃▄▅▆▇")


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0.0, 1.0], 4, "▁█"),
        # Seven steps above the least: a half is 3.5, rounded to the even 4.
        ([0.0, 0.5, 1.0], 5, "▁▅█"),
        # Means of neighbours: 0.5 and 2.5.
        ([0.0, 1.0, 2.0, 3.0], 2, "▁█"),
        ([2.0, 2.0], 4, "▁▁"),
    ],
)
def test_a_sparkline_by_hand(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


def test_durations() -> None:
    assert [span(s) for s in (0.34, 59.4, 59.99, 125, 3725)] == [
        *("0.3 s", "59 s", "60 s", "2:05", "1:02:05"),
    ]


# What a folder may look like.


def test_the_natural_start_of_a_teacher_is_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "run").set_status("running", phase="teacher old")
    teacher = make(tmp_path / "run" / "teachers" / "old", 9)
    teacher.set_status("running", phase="natural start")
    fill(make(teacher.path / "natural", 7), [(50.0, 10.0)])
    rows = at(tmp_path, monkeypatch, 80).splitlines()
    assert rows[0] == "run: running (teacher old, natural start)"
    assert rows[2].startswith("epoch 1 of 7 ")
    assert rows[3] == "1,234 images/s, 1:10 an epoch, about 6:55 left of this part"


def test_the_head_of_a_robust_start_is_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "run").set_status("running", phase="head")
    fill(make(tmp_path / "run" / "head", 7), [(50.0, 10.0)])
    rows = at(tmp_path, monkeypatch, 80).splitlines()
    assert rows[0] == "run: running (head)"
    assert rows[2].startswith("epoch 1 of 7 ")


def test_a_run_without_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(make(tmp_path / "run"), [])
    assert at(tmp_path, monkeypatch, 80, after=65).splitlines() == [
        "run: not begun",
        "cure, recipe digits, seed 0, digits, small_cnn",
        "epoch 0 of 4 ──────────────────────────────────────── 0 %",
        "no epoch yet, 1:05 since it began",
    ]


def test_mixed_weights_have_accuracies_and_no_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "run")
    ends: dict[str, list[float]] = {"natural_interval": [70, 90], "robust_interval": [20, 40]}
    point = TradeoffPoint.model_validate(
        {"natural": 80.0, "robust": 30.0, "shares": [0.5, 0.5], "n": 50} | ends
    )
    record = TradeoffRecord(ends=["natural start", "at"], steps=20, points=[point], chosen=point)
    record.write(folder.path / "tradeoff.json")
    folder.set_status("finished", step=0, steps=0)
    assert at(tmp_path, monkeypatch, 80).splitlines() == [
        "run: finished",
        "cure, recipe digits, seed 0, digits, small_cnn",
        "weights mixed by `cure tradeoff`: natural 80.0 %, robust 30.0 %",
    ]
    assert text(overview([read("run")], BEGAN), 80).splitlines()[1].split() == [
        *("run", "finished", "-", "80.0", "30.0"),
    ]


def test_half_a_line_and_a_missing_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "run")
    folder.set_status("running", step=0)
    fill(folder, [(50.0, 10.0)])
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(line_text(line(2, 60.0, 20.0)) + line_text(line(3, 70.0, 30.0))[:30])
    os.utime(folder.path / "metrics.jsonl", (BEGAN, BEGAN))
    rows = at(tmp_path, monkeypatch, 80).splitlines()
    assert rows[2].startswith("epoch 2 of 4 ")
    assert rows[7] == "    2  2.000       60.0      20.0         -        -"


def test_a_run_that_is_overdue_and_one_that_nobody_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "run")
    folder.set_status("running", step=0)
    fill(folder, [(50.0, 10.0)])
    assert "warning" not in at(tmp_path, monkeypatch, 120, after=200)
    assert "warning: no epoch ended for 3:40; one takes 1:10" in at(
        tmp_path, monkeypatch, 120, after=220
    )
    monkeypatch.setattr("cure.cli.watch._held", lambda lock: False)
    assert (
        "warning: no process of this machine trains it; if none of another does, it was killed: "
        "`cure resume run` goes on"
    ) in at(tmp_path, monkeypatch, 200)
    folder.set_status("stopped", step=5)
    assert "warning" not in at(tmp_path, monkeypatch, 120, after=220)


def test_a_run_that_overfits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "run", 20)
    for number in range(1, 13):
        record = line(number, 60.0, 50.0 if number < 7 else 25.0)
        record.train["robust_accuracy"] = number / 20
        folder.append(record)
    folder.set_status("finished")
    assert "warning: robust overfitting: " in at(tmp_path, monkeypatch, 200)
    folder.rewind(8, 8)
    assert "warning" not in at(tmp_path, monkeypatch, 200)


def test_what_a_folder_says_is_text_and_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "run")
    folder.set_status("failed", reason="[red]bad[/] \x1b[2J\x07loss")
    fill(folder, [])
    shown = at(tmp_path, monkeypatch, 80)
    assert "warning: [red]bad[/] ?[2J?loss" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists its locks")
def test_a_held_lock_is_seen(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    assert HELD(lock) is None
    with lock.open("w") as file:
        assert HELD(lock) is False
        fcntl.flock(file, fcntl.LOCK_EX)
        assert HELD(lock) is True
    assert HELD(lock) is False


def test_several_runs_have_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, state in (("a", "running"), ("b", "finished")):
        folder = make(Path(name))
        folder.set_status(state, step=0)
        fill(folder, [(50.0, 10.0), (70.0, 20.0)])
    fill(make(Path("c")), [])
    drawn = overview([read(name) for name in "abc"], BEGAN + 5)
    assert text(drawn, 80).splitlines() == [
        "run  state      epoch  natural %  robust %  left",
        "a    running      2/4       70.0      20.0  2:15",
        "b    finished     2/4       70.0      20.0",
        "c    not begun    0/4          -         -",
    ]


# The command.


def test_not_on_a_terminal_it_is_shown_once_and_nothing_is_touched(
    tmp_path: Path, command: Command
) -> None:
    folder = make(tmp_path / "run")
    folder.set_status("running", step=0)
    fill(folder, [(50.0, 10.0)])
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}
    ended = command("watch", folder.path)
    assert ended.status == 0, ended.err
    assert ended.out.count("running") == 1
    assert "epoch 1 of 4" in ended.out
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}
    assert after == before


def test_no_run_is_one_sentence(tmp_path: Path, command: Command) -> None:
    refused(command("watch", tmp_path / "none"), "none does not exist; name the folder")
    refused(command("watch", tmp_path), "holds no run")


@pytest.mark.parametrize("ends", ["finished", "Ctrl-C"])
def test_on_a_terminal_it_follows_the_run_to_its_end(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    folder = make(tmp_path / "run")
    folder.set_status("running", step=0)
    fill(folder, [(50.0, 10.0)])
    file = io.StringIO()
    monkeypatch.setattr("cure.cli.training.out", Console(file=file, force_terminal=True, width=300))
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            if ends == "Ctrl-C":
                raise KeyboardInterrupt
            folder.set_status("finished", step=9)

    monkeypatch.setattr("cure.cli.training.time.sleep", sleep)
    ended = command("watch", folder.path, "--interval", "0.5")
    assert (ended.status, ended.err) == (0, "")
    assert waited == [0.5, 0.5]
    last = file.getvalue().split("run: ")[-1]
    assert last.startswith("finished" if ends == "finished" else "running")
