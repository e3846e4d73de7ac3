from __future__ import annotations

from pathlib import Path

import pytest

import cure

SETTINGS = {
    "method": "at",
    "start": "scratch",
    "model": "small_cnn",
    "model.mean": [0.3],
    "model.std": [0.35],
    "threat.epsilon": "0.1",
    "attack.steps": 1,
    "attack.step_size": 0.1,
    "data.limit": 600,
    "data.validation": 100,
    "training.epochs": 6,
    "training.validation_steps": 2,
    "training.batch_size": 50,
    "training.threads": 1,
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> cure.Run:
    """A small network with constants inside that reads digits, evaluated on 100 test images."""
    made = cure.train(
        "digits", SETTINGS, run=tmp_path_factory.mktemp("exported") / "run", quiet=True
    )
    cure.evaluate(made, attacks="fgsm", limit=100)
    return made


@pytest.fixture(scope="session")
def folder(run: cure.Run) -> Path:
    """Its ONNX files, float32 and int8."""
    made = run.path.parent / "deploy"
    cure.export(run, "onnx", made)
    cure.export(run, "onnx", made, int8=True)
    return made
