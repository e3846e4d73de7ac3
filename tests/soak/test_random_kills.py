"""A training killed at a random moment and resumed ends with the weights of one that was not."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tally import COUNTS, SOAK, count, number

import cure
from cure.errors import CheckpointError
from cure.runs.folder import RunFolder

SETTINGS = [
    "data.limit=100",
    "data.validation=30",
    "model.options={width: 2}",
    "natural.epochs=2",
    "training.epochs=2",
    "training.batch_size=32",
    "training.threads=1",
    "training.checkpoint_every=1",
    "training.averaging.decay=0.9",
    "attack.steps=2",
    "method.revision.horizon=0.8",
]
# A forked process has imported everything, so that kills fall into the training.
FORK = multiprocessing.get_context("fork")


def training(run: Path) -> None:
    cure.train("digits", SETTINGS, run=run, quiet=True)


def weights_hash(run: Path) -> str:
    """Of the last weights by name; safetensors writes its header in any order."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "checkpoints" / "last.safetensors").items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def went_on(run: Path) -> str:
    """Resume a killed run, or begin it again where it had not made its folder; which of them."""
    try:
        folder = RunFolder.open(run)
    except CheckpointError:
        training(run)
        return "before the folder"
    where = "in training" if (folder.path / "metrics.jsonl").exists() else "in the natural start"
    cure.resume(run, quiet=True)
    return where


def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seed = request.config.getoption("--hypothesis-seed")
    draws = random.Random(int(seed) if SOAK and seed is not None else 0)
    for name in ("imports everything", "whole"):
        start = time.monotonic()
        training(tmp_path / name)
        seconds = time.monotonic() - start
    whole = weights_hash(tmp_path / "whole")
    assert weights_hash(tmp_path / "imports everything") == whole
    killed = 0
    for attempt in range(4 * number(3, 50)):
        if killed == number(3, 50):
            break
        run = tmp_path / f"run-{attempt}"
        process = FORK.Process(target=training, args=(run,))
        process.start()
        time.sleep(draws.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            count("kills", "finished before the kill")
            continue
        killed += 1
        count("kills", "kills")
        count("kills", went_on(run))
        assert weights_hash(run) == whole
        count("kills", "equal hashes")
    assert killed == number(3, 50)
    assert COUNTS["kills"]["equal hashes"] == killed
