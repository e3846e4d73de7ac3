"""Training, resuming and evaluating with images outside memory: the same weights and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import cure
from cure.analysis.minimal_perturbation import minimal_perturbation
from cure.config import DataConfig
from cure.data import cache, load_split, load_training
from cure.data.splits import held_out
from cure.training import trainer

SETTINGS = {
    "model": {"name": "small_cnn", "options": {"width": 4}},
    "start": "scratch",
    "data.validation": 8,
    "data.augment.crop_padding": 2,
    "training.epochs": 2,
    "training.batch_size": 8,
    "training.device": "cpu",
    "training.threads": 1,
    "training.validation_steps": 1,
    "training.checkpoint_every": 2,
    "attack.steps": 1,
    "method": {"name": "at"},
}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small photographs of noise, dark and bright, with a test split."""
    monkeypatch.setattr(cache, "SMALL", 0)
    draws = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for number in range(count):
            low = 128 * (number % 2)
            pixels = draws.integers(low, low + 128, (32, 32, 3), np.uint8)
            place = tmp_path / "photos" / split / ("dark", "bright")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number:02}.png")
    return tmp_path / "photos"


def train(photos: Path, kind: str, place: Path, quiet: bool = True, **more: Any) -> Any:
    settings = SETTINGS | {"data.source": str(photos), "data.cache": kind} | more
    return cure.train("digits", settings, run=place, quiet=quiet)


def weights(run: Any) -> dict[str, bytes]:
    tensors = load_file(run.path / "checkpoints" / "last.safetensors")
    return {name: value.tobytes() for name, value in tensors.items()}


CACHES = ("memory", "disk", "none")


def test_training_and_evaluation_are_those_of_images_in_memory(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {k: train(photos, k, tmp_path / k / "run", quiet=k != "disk") for k in CACHES}
    said = capsys.readouterr().err
    assert "data.cache=disk: 0.00 GB for 40 decoded images" in said
    assert len(list((tmp_path / "disk" / "decoded-images").glob("*.bin"))) == 2, "train and test"
    assert weights(runs["disk"]) == weights(runs["memory"])
    assert weights(runs["none"]) == weights(runs["memory"])
    assert runs["disk"].metrics == runs["none"].metrics == runs["memory"].metrics
    results = {}
    for kind, run in runs.items():
        robust = cure.evaluate(run, attacks="pgd20", batch_size=5, device="cpu")
        corrupted = cure.corruptions(run, severity=1, only="brightness", device="cpu")
        least = minimal_perturbation(run, limit=3, device="cpu")
        results[kind] = (
            robust["natural"]["correct"],
            robust["attacks"]["pgd20"]["correct"],
            robust["attacks"]["pgd20"]["largest_change"],
            [item["status"] for item in robust["diagnosis"]["checks"]],
            corrupted["natural"]["correct"],
            corrupted["corruptions"]["brightness"]["accuracy"],
            next(iter(least["networks"].values()))["distances"],
        )
    assert results["disk"] == results["none"] == results["memory"]


@pytest.mark.parametrize("kind", ["disk", "none"])
def test_a_run_that_was_stopped_inside_an_epoch_ends_with_the_same_bits(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    want = train(photos, "memory", tmp_path / "memory" / "run")
    real, steps = trainer.Trainer.train_step, []

    def stopped(self: Any, batch: Any) -> Any:
        steps.append(batch.step)
        if len(steps) == 4:  # The state of step 2 is on disk; an epoch has four steps.
            raise KeyboardInterrupt
        return real(self, batch)

    path = tmp_path / kind / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(photos, kind, path)
    assert weights(cure.resume(path, quiet=True)) == weights(want)


@pytest.mark.parametrize("validation", [8, 0.2])
def test_damaged_images_that_validate_leave_the_split_as_it_was(
    photos: Path, tmp_path: Path, validation: float
) -> None:
    """A run that is resumed, a natural start and an evaluation read the split that was trained on.

    The split is drawn from all files, so their number has to be kept, not that of the good ones.
    """
    config = DataConfig(source=str(photos), validation=validation, damaged="skip")
    files = [f for pair in zip(*files_by_class(photos / "train"), strict=True) for f in pair]
    held = [files[row] for row in held_out(torch.arange(40) % 2, validation, 0)[1].tolist()]
    for file in held[:3]:
        file.write_bytes(b"no image")
    training, validated = load_training(config)
    assert (len(training), len(validated)) == (32, 5)
    settings = {"data.validation": validation, "data.damaged": "skip"}
    run = train(photos, "memory", tmp_path / "run", **settings)
    assert run.config.data.validation == 8
    again = load_training(run.config.data)
    assert [one.digest() for one in again] == [training.digest(), validated.digest()]
    assert load_split(run.config.data, "validation").digest() == validated.digest()


def files_by_class(folder: Path) -> list[list[Path]]:
    return [sorted((folder / name).iterdir()) for name in ("bright", "dark")]
