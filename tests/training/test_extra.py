"""Trainings with extra images: resumed bit for bit, labelled by a teacher, without leaks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import cure
from cure.data import ImageSet, extra, load, load_split
from cure.data.extra import ExtraAccount, Leaks, load_extra
from cure.data.leaks import Resembling
from cure.errors import CureError, ModelError
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.runs.state import load_state
from cure.training import trainer
from cure.training.extra import predict
from cure.training.setup import prepare
from cure.utils.engine import Engine
from helpers import Command, refused

QUICK: dict[str, Any] = {
    "model": {"name": "small_cnn", "options": {"width": 2}},
    "start": "scratch",
    "method": "at",
    "data.limit": 240,
    "data.validation": 40,
    "attack.steps": 1,
    "training.epochs": 2,
    "training.batch_size": 20,
    "training.validation_steps": 1,
    "training.collapse_patience": 100,
    "training.threads": 1,
}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def blots(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise 16x16 of two classes, of which no two images are alike."""
    draws = np.random.default_rng(seed)
    image = draws.integers(0, 200, (count, 16, 16, 1)).astype(np.uint8)
    label = np.arange(count) % 2
    return image + (55 * label[:, None, None, None]).astype(np.uint8), label


def source() -> tuple[np.ndarray, np.ndarray]:
    """Writes the source of the runs, and gives its test images."""
    (image, label), (test, test_label) = blots(240, 0), blots(30, 1)
    np.savez("own.npz", x_train=image, y_train=label, x_test=test, y_test=test_label)
    return test, test_label


def quick(run: str, **settings: Any) -> cure.Run:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return cure.train("digits", {**QUICK, "data.source": "own.npz", **given}, run=run, quiet=True)


def outcome(run: str | Path) -> tuple[bytes, list[bytes]]:
    """Metrics, and the bits of the last weights."""
    weights = load_file(Path(run) / "checkpoints" / "last.safetensors")
    bits = [weights[name].numpy().tobytes() for name in sorted(weights)]
    return (Path(run) / "metrics.jsonl").read_bytes(), bits


def account(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(run, "data.json").read_text())["account"]["extra"]
    return found


def test_a_stopped_run_ends_with_the_same_bits_without_its_teacher(monkeypatch) -> None:
    source()
    image, _ = blots(70, 2)
    np.savez("extra.npz", image=image)
    teacher = quick("teacher")
    settings = {
        "data__extra": "extra.npz",
        "data__extra_labels": "teacher",
        "data__extra_share": 0.4,
    }
    quick("whole", **settings)
    assert outcome("whole") != outcome(teacher.path)
    # The labels are those that the teacher names.
    network = teacher.model()
    with torch.no_grad():
        expected = network(torch.from_numpy(image).permute(0, 3, 1, 2) / 255).argmax(1)
    state = load_state(Path("whole/extra.safetensors"))
    assert state["label"].tolist() == expected.tolist()
    assert state["kept"].tolist() == list(range(70))
    assert account("whole")["predicted"] == 70
    assert account("whole")["labelled_by"] == "teacher"

    step = trainer.Trainer.train_step
    done = []

    def stopped(self: trainer.Trainer, batch: Any) -> Any:
        done.append(batch.step)
        if len(done) == 13:
            self._stop_asked = True
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", stopped)
        with pytest.raises(trainer.Interrupted):
            quick("stopped", **settings)
    assert 0 < RunFolder.open("stopped").status().step < 20
    shutil.rmtree("teacher")
    cure.resume("stopped", quiet=True)
    assert outcome("stopped") == outcome("whole")


def test_extra_images_are_trained_on_and_never_measured() -> None:
    source()
    image, label = blots(50, 3)
    np.savez("extra.npz", image=image, label=1 - label)
    plain, other = quick("plain"), quick("extra", data__extra="extra.npz")
    assert outcome(plain.path)[1] != outcome(other.path)[1]
    config = RunFolder.open("extra").config
    raw = load_extra(config.data, load_split(config.data, "train"))
    codes = {one.numpy().tobytes() for one in raw.image}
    for split in ("validation", "test"):
        seen = load_split(config.data, split)
        assert not codes & {one.numpy().tobytes() for one in seen.image}
    assert len(load(config.data, "test")) == 30
    Path("extra.npz").unlink()
    result = cure.evaluate("extra", attacks="pgd20")
    assert result["natural"]["n"] == 30


def planted() -> None:
    """Extra images of which numbers 50 and 51 copy test images and 52 a validation image."""
    test, label = source()
    image, own = blots(50, 4)
    config = load_recipe("digits", ["data.source=own.npz", "data.limit=240", "data.validation=40"])
    held = load_split(config.data, "validation")
    copies = [test[3:4], test[9:10, :, ::-1], held.image[5:6].permute(0, 2, 3, 1).numpy()]
    labels = [own, [label[3], label[9], int(held.label[5])]]
    np.savez("extra.npz", image=np.concatenate([image, *copies]), label=np.concatenate(labels))


def assert_shown(file: Path, by_split: dict[str, dict[str, Any]]) -> None:
    """The picture has both images of each pair, enlarged sixfold, the most similar first."""
    sheet = np.asarray(Image.open(file).convert("L")).astype(int)
    extra = np.load("extra.npz")["image"]
    config = RunFolder.open("run").config
    pairs = sorted(
        (
            (similarity, split, row, copied)
            for split, one in by_split.items()
            for row, copied, similarity in zip(
                one["rows"], one["copied"], one["similarity"], strict=True
            )
        ),
        reverse=True,
    )
    assert sheet.shape == (24 + 3 * 100, 150 + 2 * 100)
    for place, (_, split, row, copied) in enumerate(pairs):
        shown = sheet[24 + 100 * place :, 150:][:96].reshape(96, -1)
        held = load_split(config.data, split).image[copied, 0].numpy()
        for column, image in enumerate((extra[row].reshape(16, 16), held)):
            cell = shown[:, 100 * column :][:, :96]
            assert np.array_equal(cell, np.kron(image, np.ones((6, 6), dtype=int)))


def test_copies_of_held_out_images_are_told_and_kept_in_the_account(command: Command) -> None:
    planted()
    words = [f"{k}={json.dumps(v)}" for k, v in QUICK.items()]
    words += ["data.source=own.npz", "data.extra=extra.npz", "training.epochs=1"]
    ended = command("train", "digits", *words, "--run", "run")
    assert ended.status == 0, ended
    said = " ".join((ended.out + ended.err).split())
    assert re.search(r"extra images .extra.: 53, 2\d to 2\d a class, 70 % of each batch", said)
    assert "extra images that copy a test image: 2 (2 found by perceptual hash, 2 by" in said
    assert "2 extra images copy a test image (number 50, 51)" in said
    assert "1 extra image copies a validation image (number 52)" in said
    found = account("run")
    by_split = {one["split"]: one for one in found["leaks"]}
    assert by_split["test"]["rows"] == [50, 51]
    assert by_split["test"]["copied"] == [3, 9]
    assert by_split["validation"]["copied"] == [5]
    assert (found["action"], found["removed"], sum(found["images"])) == ("report", 0, 53)
    assert_shown(Path("run/copies.png"), by_split)
    ended = command("train", "digits", *words, "data.extra_leaks=refuse", "--run", "refused")
    refused(ended, "expected no extra image that copies a held-out one", "number 50, 51", "remove")
    assert not Path("refused").exists()


def test_copies_are_left_out() -> None:
    planted()
    quick("run", data__extra="extra.npz", data__extra_leaks="remove")
    assert account("run")["removed"] == 3
    assert load_state(Path("run/extra.safetensors"))["kept"].tolist() == list(range(50))
    config = RunFolder.open("run").config
    again = prepare(config, None, None, RunFolder.open("run"))
    assert again.extra is not None
    assert len(again.extra.images) == 50
    clean = np.load("extra.npz")
    np.savez("clean.npz", image=clean["image"][:50], label=clean["label"][:50])
    quick("clean", data__extra="clean.npz")
    assert outcome("run") == outcome("clean")
    assert all(not one["rows"] for one in account("clean")["leaks"])
    assert Path("run/copies.png").exists()
    assert not Path("clean/copies.png").exists()


def test_a_trained_start_is_asked_for_further_copies(monkeypatch) -> None:
    planted()
    quick("start")
    seen: list[ImageSet] = []
    real = extra.resembling

    def spy(images: ImageSet, held: ImageSet, *rest: Any) -> Any:
        seen.append(held)
        usual = real(images, held, *rest).usual
        rows = torch.tensor([7, 8, 50])  # 50 copies a test image by its pixels, too.
        return Resembling(rows, rows % 3, torch.ones(3), usual)

    monkeypatch.setattr("cure.data.extra.resembling", spy)
    quick("run", start="start", data__extra="extra.npz")
    assert [held.split for held in seen] == ["validation", "test"]
    validation, test = account("run")["leaks"]
    assert (test["rows"], test["suspects"], test["suspected"]) == ([50, 51], [7, 8], [1, 2])
    assert validation["suspects"] == [7, 8, 50]
    assert 0 <= test["usual"] <= 0.02
    quick("removed", start="start", data__extra="extra.npz", data__extra_leaks="remove")
    kept = load_state(Path("removed/extra.safetensors"))["kept"].tolist()
    assert kept == [n for n in range(50) if n not in (7, 8)]
    quick("scratch", data__extra="extra.npz")
    assert account("scratch")["leaks"][0]["suspects"] is None


def leaks(suspects: int, usual: float, images: int) -> list[str]:
    rows = tuple(range(suspects))
    one = Leaks("test", (), (), (), 0.92, 0, 0, rows, rows, usual, images)
    told = ExtraAccount("e", (images,), 0.7, 0, None, (one,), "report", 0, (), {})
    assert f"takes for copies of a test image: {suspects}" in told.lines()[-1]
    return told.warnings()


def test_suspects_are_warned_of_where_they_are_more_than_chance_gives() -> None:
    # Ten of 1,000 are usual at 1 %; at 0 %, less than what is looked for, five are.
    assert leaks(18, 0.01, 1000) == []
    assert leaks(8, 0.0, 1000) == []
    assert len(leaks(18, 0.0, 1000)) == 1
    (sentence,) = leaks(40, 0.01, 1000)
    assert sentence.startswith("40 extra images resemble a test image more than training images do")


def test_images_in_memory_are_looked_through_as_far_as_they_are_known(brightness) -> None:
    image = brightness.image.permute(0, 2, 3, 1).numpy()[:40]
    np.savez("extra.npz", image=image, label=np.arange(40) % 2)
    settings = {**QUICK, "data.extra": "extra.npz"}
    cure.train("digits", settings, run="run", data=brightness, quiet=True)
    assert [one["split"] for one in account("run")["leaks"]] == ["validation"]
    assert "given in Python" in account("run")["unmeasured"]["test"]


def extra_file(**arrays: Any) -> None:
    image, label = blots(30, 5)
    np.savez("extra.npz", **{"image": image, "label": label, **arrays})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__extra_labels": "none"}, r"data\.extra_labels: 'none' does not exist"),
        ({"data__extra_labels": "teacher"}, "expected extra images without labels, got a label"),
        ({"data__extra_share": 0.01}, r"got 0 with data\.extra_share=0\.01"),
    ],
)
def test_what_is_refused_makes_no_run(settings: dict[str, Any], message: str) -> None:
    source()
    extra_file()
    if settings.get("data__extra_labels") == "teacher":
        quick("teacher", training__epochs=1)
    with pytest.raises(CureError, match=message):
        quick("run", data__extra="extra.npz", **settings)
    assert not Path("run").exists()


def test_a_run_that_goes_on_needs_its_extra_images() -> None:
    source()
    extra_file()
    quick("run", data__extra="extra.npz", training__epochs=1)
    image, label = blots(29, 5)
    np.savez("extra.npz", image=image, label=label)
    with pytest.raises(CureError, match=r"expected the 30 extra images .* got 29; restore them"):
        cure.resume("run", {"training.epochs": 2}, quiet=True)


def test_a_natural_start_is_trained_on_them_too() -> None:
    source()
    extra_file()
    first = quick("run", data__extra="extra.npz", start="natural", training__epochs=1)
    natural = quick("plain", start="natural", training__epochs=1)
    assert outcome(first.path / "natural")[1] != outcome(natural.path / "natural")[1]
    assert isinstance(RunFolder.open("run").kind.classes, tuple)


def test_an_unlabelled_image_needs_a_teacher(brightness: ImageSet) -> None:
    image = brightness.image.permute(0, 2, 3, 1).numpy()
    np.savez("extra.npz", image=image)
    with pytest.raises(CureError, match=r"got none for 96; name a trained run"):
        cure.train("digits", {**QUICK, "data.extra": "extra.npz"}, data=brightness, quiet=True)


class Fails(nn.Module):
    """Names the second class; dark images give what is not a number."""

    def forward(self, image: Tensor) -> Tensor:
        logits = torch.tensor([0.0, 1.0]).repeat(len(image), 1)
        return logits.masked_fill(image.mean(dim=(1, 2, 3))[:, None] < 0.5, torch.nan)


def test_a_labeller_without_an_answer_names_no_class(brightness: ImageSet) -> None:
    images, engine = brightness.subset(slice(0, 20)), Engine(torch.device("cpu"))
    dark = int((images.image.float().mean(dim=(1, 2, 3)) < 127.5).sum())
    assert 0 < dark < 20
    with pytest.raises(ModelError, match=rf"^data.extra_labels: .* got none for {dark} of 20;"):
        predict(Fails(), images, 8, engine)
