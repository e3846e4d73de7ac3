"""A run that was killed anywhere ends with the bits of one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kill_at import SETTINGS
from safetensors import safe_open

import cure
from cure.config import RunConfig
from cure.errors import CheckpointError
from cure.runs.folder import RunFolder
from cure.runs.state import load_state

DRIVER = Path(__file__).with_name("kill_at.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    return cure.train("digits", SETTINGS, run=path, quiet=True).path


def files_that_count(run: Path) -> dict[str, object]:
    """Metrics, weights and states of a run and of its natural start, bit for bit.

    Headers are compared as dictionaries: safetensors writes their entries in any order.
    """
    found: dict[str, object] = {}
    for part in (run, run / "natural"):
        found[f"{part.name} metrics"] = (part / "metrics.jsonl").read_bytes()
        for name in ("best", "last", "state"):
            with safe_open(part / "checkpoints" / f"{name}.safetensors", framework="np") as file:
                tensors = {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
                found[f"{part.name} {name}"] = (file.metadata(), tensors)
    return found


def disturb(moment: str, run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DRIVER), moment, str(run)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "moment",
    [
        "natural",
        "between-steps",
        "inside-a-step",
        "writing-weights",
        "renaming",
        "after-metrics",
        "making-the-natural-folder",
    ],
)
def test_a_killed_run_ends_with_the_same_bits(
    moment: str, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = disturb(moment, run)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert RunFolder.open(run).status().state != "finished"
    cure.resume(run, quiet=True)
    assert files_that_count(run) == files_that_count(undisturbed)
    leftovers = [path.name for path in run.rglob("*.tmp")]
    assert len(leftovers) <= 1, "at most the file that was being written"


def test_ctrl_c_keeps_the_step_and_says_how_to_go_on(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = disturb("ctrl-c", run)
    assert ended.returncode == 1
    assert f"cure resume {run}" in ended.stderr
    assert RunFolder.open(run).status().state == "stopped"
    # The signal came in the sixth step, which was finished and saved.
    assert load_state(run / "checkpoints" / "state.safetensors")["done"] == 6
    command = [sys.executable, "-m", "cure", "resume", str(run), "--quiet"]
    subprocess.run(command, check=True, timeout=120)
    assert files_that_count(run) == files_that_count(undisturbed)


def test_a_stopped_natural_start_names_the_run_to_resume(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = disturb("ctrl-c-in-natural", run)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith(f"`cure resume {run}`")
    status = RunFolder.open(run).status()
    assert (status.state, status.phase) == ("stopped", "natural start")
    cure.resume(run, quiet=True)
    assert files_that_count(run) == files_that_count(undisturbed)


def test_a_finished_run_is_left_alone(undisturbed: Path) -> None:
    before = files_that_count(undisturbed)
    cure.resume(undisturbed, quiet=True)
    assert files_that_count(undisturbed) == before


def test_the_run_folder_says_what_it_is(undisturbed: Path) -> None:
    assert isinstance(RunFolder.open(undisturbed).config, RunConfig)
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["threads"] >= 1
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert set(lines[-1]["validation"]) == {"natural", "robust"}
    assert not any("seconds" in line for line in lines), "times differ from run to run"


def test_an_existing_folder_is_refused(undisturbed: Path) -> None:
    before = files_that_count(undisturbed)
    with pytest.raises(CheckpointError, match="never overwrites"):
        cure.train("digits", SETTINGS, run=undisturbed, quiet=True)
    assert files_that_count(undisturbed) == before


def test_two_processes_cannot_train_one_run(undisturbed: Path) -> None:
    folder = RunFolder.open(undisturbed)
    with folder.lock(), pytest.raises(CheckpointError, match="another process"), folder.lock():
        pass
