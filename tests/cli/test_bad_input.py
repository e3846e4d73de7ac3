"""Whatever is wrong ends with one message and status 2, and loses nothing that existed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from cure.data import ImageSet
from cure.errors import CheckpointError, ConfigError, DataError, ModelError
from cure.evaluation.evaluate import evaluate
from cure.runs.folder import RunFolder
from cure.runs.state import load_state, save_state
from cure.training.run import resume, train
from helpers import Command, refused

RECIPE = """\
name: tiny
data: {source: SOURCE, validation: 20, augment: {crop_padding: 0, flip: false}}
model: {name: small_cnn, options: {width: 2}}
start: scratch
threat: {epsilon: 8/255}
attack: {steps: 1}
method: {name: natural}
training:
  epochs: 3
  batch_size: 16
  validation_steps: 1
  collapse_patience: 100
  optimizer: {learning_rate: 0.05}
evaluation: {attacks: [pgd1]}
"""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test works in a folder of its own and knows no data but its own."""
    monkeypatch.delenv("CURE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def pictures(count: int = 120, classes: int = 2) -> ImageSet:
    """Noise, brighter the higher its label, so that a moment of training reads it."""
    draws = torch.Generator().manual_seed(0)
    label = torch.arange(count) % classes
    noise = torch.randint(0, 80, (count, 1, 8, 8), generator=draws)
    image = (noise + 160 * label[:, None, None, None] // max(1, classes - 1)).to(torch.uint8)
    return ImageSet(image, label, tuple(map(str, range(classes))), "noise", "train")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source ``noise.npz``, the recipe ``tiny.yaml`` for it, and its finished run ``run``."""
    folder = tmp_path_factory.mktemp("workshop")
    images = pictures()
    np.savez(folder / "noise.npz", image=images.image[:, 0], label=images.label)
    (folder / "tiny.yaml").write_text(RECIPE.replace("SOURCE", str(folder / "noise.npz")))
    train(folder / "tiny.yaml", run=folder / "run", quiet=True)
    return folder


@pytest.fixture
def recipe(workshop: Path) -> Path:
    return workshop / "tiny.yaml"


@pytest.fixture
def stopped(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run that ended without its third epoch, and what the whole run ends with."""
    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        no_space_after(patch, "last.safetensors", 2)
        with pytest.raises(CheckpointError):
            train(recipe, run=run, quiet=True)
    return run, recipe.parent / "run"


def no_space_after(patch: pytest.MonkeyPatch, name: str, writings: int) -> None:
    """From the writing of ``name`` after so many on, the disk is full."""
    replace, count = os.replace, iter(range(writings))
    full: list[bool] = []

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name == name and next(count, None) is None:
            full.append(True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    patch.setattr(os, "replace", refuse)


# Recipes and settings.

SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "recipe": (["digit"], ["unknown recipe 'digit'", "did you mean 'digits'"]),
    "recipe file": (["nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
    "section": (["digits", "traning.epochs=1"], ["traning", "did you mean 'training'"]),
    "key": (["digits", "training.epoch=1"], ["training: ", "did you mean 'epochs'"]),
    "inner key": (
        ["digits", "training.schedule.milestone=[0.5]"],
        ["training.schedule", "did you mean 'milestones'"],
    ),
    "method": (["digits", "method=cuer"], ["did you mean 'cure'"]),
    "method key": (["digits", "method.percnt=3"], ["did you mean 'percent'"]),
    "no method": (["digits", "method=3"], ["method: expected a section with a name"]),
    "model": (["digits", "model.name=smal_cnn"], ["did you mean 'small_cnn'"]),
    "model option": (["digits", "model.options={widht: 3}"], ["did you mean 'width'"]),
    "model option value": (["digits", "model.options={width: 0}"], ["'width'", "got 0"]),
    "data": (["digits", "data.source=digts"], ["did you mean 'digits'"]),
    "no equals": (["digits", "training.epochs"], ["key=value", "'training.epochs'"]),
    "no key": (["digits", "=3"], ["key=value"]),
    "value is no YAML": (["digits", "name=[1"], ["not valid YAML"]),
    "inside a value": (["digits", "training.epochs.deeper=1"], ["'epochs' is a value"]),
    "epsilon 0": (["digits", "threat.epsilon=0"], ["threat.epsilon", "above 0"]),
    "epsilon negative": (["digits", "threat.epsilon=-8/255"], ["above 0", "-8/255"]),
    "epsilon 1/0": (["digits", "threat.epsilon=1/0"], ["1/0", "divides by zero"]),
    "epsilon word": (["digits", "threat.epsilon=abc"], ["threat.epsilon", "abc"]),
    "epsilon nan": (["digits", "threat.epsilon=nan"], ["threat.epsilon"]),
    "epsilon .nan": (["digits", "threat.epsilon=.nan"], ["threat.epsilon"]),
    "epsilon .inf": (["digits", "threat.epsilon=.inf"], ["threat.epsilon"]),
    "epsilon true": (["digits", "threat.epsilon=true"], ["threat.epsilon"]),
    "epsilon list": (["digits", "threat.epsilon=[1]"], ["threat.epsilon"]),
    "epsilon huge": (["digits", "threat.epsilon=1e999"], ["threat.epsilon"]),
    "step size": (["digits", "attack.step_size=0"], ["attack.step_size", "above 0"]),
    "norm": (["digits", "threat.norm=L1"], ["threat.norm", "L1"]),
    "milestones": (
        ["digits", "training.schedule.milestones=[0.75, 0.5]"],
        ["training.schedule.milestones", "ascending"],
    ),
    "milestone beyond": (
        ["digits", "training.schedule.milestones=[0.5, 1.5]"],
        ["training.schedule.milestones.1", "1.5"],
    ),
    "mean alone": (["digits", "model.mean=[0.5]"], ["mean and std are given together"]),
    "std alone": (["digits", "model.std=[0.5]"], ["mean and std are given together"]),
    "mean of three": (
        ["digits", "model.mean=[0.5,0.5,0.5]", "model.std=[1,1,1]"],
        ["model.mean", "1 numbers, one for each channel", "got 3"],
    ),
    "epochs": (["digits", "training.epochs=0"], ["training.epochs", "got 0"]),
    "learning rate": (
        ["digits", "training.optimizer.learning_rate=fast"],
        ["training.optimizer.learning_rate", "fast"],
    ),
    "name": (["digits", "name=../up"], ["name", "../up"]),
    "device": (["digits", "training.device=tpu0"], ["training.device", "tpu0"]),
    "batch": (["digits", "training.batch_size=5000"], ["5000", "lower training.batch_size"]),
    "validation": (["digits", "data.validation=5000"], ["data.validation=5000", "1437"]),
    "start": (["digits", "start=nowhere.pt"], ["nowhere.pt", "does not exist"]),
    "start folder": (["digits", "start=."], ["holds no run"]),
    "no data": (["digits", "data=null"], ["data"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting_is_one_message_and_no_folder(
    command: Command, tmp_path: Path, case: str
) -> None:
    words, expected = SETTINGS[case]
    refused(command("train", *words, "--run", "new"), *expected)
    assert not list(tmp_path.iterdir())


def test_all_mistakes_come_in_one_message(command: Command, tmp_path: Path) -> None:
    wrong = ["training.epoch=1", "threat.epsilon=0", "method.percnt=3", "data.validation=-1"]
    ended = command("train", "digits", *wrong)
    refused(ended, "4 mistakes", "'epochs'", "above 0", "'percent'", "data.validation", "got -1")
    assert not list(tmp_path.iterdir())


def test_what_a_method_refuses_is_refused_before_the_natural_training(
    command: Command, tmp_path: Path
) -> None:
    """The network has no layer that the mask names: known before hours of natural training."""
    words = ["training.epochs=2", "natural.epochs=1", "method.mask.layers=conv1"]
    refused(command("train", "digits", *words, "--run", "new", "--quiet"), "mask.layers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: [1\nmodel: 2", ["not valid YAML", "line"]),
        ("- 1\n- 2\n", ["holds no sections"]),
        ("just words", ["holds no sections"]),
        ("", ["holds no sections"]),
        ("data: {source: digits}\n1: 2\nmodel: {name: small_cnn}\nmethod: natural\n", ["1: "]),
        ("extends: broken\n", ["extends itself"]),
        ("extends: nothing-of-this-name\n", ["unknown recipe"]),
        ("extends: 3\n", ["unknown recipe '3'"]),
        ("x: !!python/object/apply:os.mkdir [ran]\n", ["not valid YAML"]),
    ],
)
def test_a_recipe_that_is_none(
    command: Command, tmp_path: Path, text: str, words: list[str]
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    refused(command("train", "broken.yaml"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


def test_a_recipe_of_bytes(command: Command, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(b"\xff\xfe\x00data")
    refused(command("train", "broken.yaml"), "broken.yaml")


def test_recipes_that_extend_each_other(command: Command, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("extends: two\n")
    (tmp_path / "two.yaml").write_text("extends: one\n")
    refused(command("train", "one.yaml"), "extend")


@pytest.mark.parametrize("section", ["[small_cnn]", "3", "null"])
def test_a_model_section_that_is_none_gives_way_to_a_model(
    section: str, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(
        recipe.read_text().replace("{name: small_cnn, options: {width: 2}}", section)
    )
    with pytest.raises(ConfigError, match="model"):
        train(tmp_path / "mine.yaml", run=tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    assert train(tmp_path / "mine.yaml", run=tmp_path / "new", model=net, quiet=True).metrics


@pytest.mark.parametrize(
    "words",
    [
        ["--attacks", "pgd20,autoatack"],
        ["--attacks", "pgd20,"],
        ["--epsilon", "0"],
        ["--epsilon", "-1/255"],
        ["--epsilon", "1/0"],
        ["--epsilon", "abc"],
        ["--epsilon", "nan"],
        ["--epsilon", "1e999"],
        ["--norm", "L7", "got 'L7'"],
        ["--limit", "0"],
        ["--device", "gpu9"],
        ["--data", "digts"],
        ["--data", "nowhere.npz"],
        ["--data-option", "resize"],
        ["--data-option", "resize=-1", "data.resize: ", "got -1"],
        ["--data-option", "reszie=8", "data: unknown key 'reszie'; did you mean 'resize'?"],
    ],
)
def test_wrong_words_for_an_evaluation(
    command: Command, workshop: Path, tmp_path: Path, words: list[str]
) -> None:
    option, said = words[:2], words[2:]
    refused(command("evaluate", workshop / "run", *option, "--output", "result.json"), *said)
    assert not list(tmp_path.iterdir())


def test_an_unknown_attack_shows_the_nearest(command: Command, workshop: Path) -> None:
    ended = command("evaluate", workshop / "run", "--attacks", "autoatack")
    refused(ended, "unknown attack 'autoatack'", "did you mean 'autoattack'")


def test_an_unknown_attack_in_a_recipe_is_refused_before_training(
    command: Command, recipe: Path, tmp_path: Path
) -> None:
    ended = command("train", recipe, "evaluation.attacks=[pdg20]", "--run", "new", "--quiet")
    refused(ended, "pdg20")
    assert not list(tmp_path.iterdir())


def test_weights_with_a_run_are_not_silently_ignored(workshop: Path) -> None:
    """The caller would read the accuracy of other weights than those that were named."""
    other = workshop / "run" / "checkpoints" / "last.safetensors"
    with pytest.raises(ConfigError):
        evaluate(workshop / "run", weights=other, attacks=[])


# Data.


def test_folders_that_hold_no_data(command: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(command("train", recipe, "data.source=./nowhere"), "./nowhere", "does not exist")
    refused(command("train", recipe, "data.source=./empty"), "empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_one_broken_image_is_named(command: Command, recipe: Path, tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(60):
            grey = Image.new("L", (8, 8), 40 + 100 * label + number)
            grey.save(tmp_path / "photos" / name / f"{number:02}.png")
    broken = tmp_path / "photos" / "dog" / "07.png"
    broken.write_bytes(broken.read_bytes()[:40])
    before = contents(tmp_path)
    ended = command("train", recipe, "data.source=./photos", "data.test_fraction=0.001")
    refused(ended)
    ended = command("train", recipe, "data.source=./photos", "data.test_fraction=0.01")
    refused(ended, "07.png")
    assert contents(tmp_path) == before


def test_images_of_one_class(command: Command, recipe: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", image=np.zeros((90, 8, 8), np.uint8), label=np.zeros(90, int))
    refused(command("train", recipe, "data.source=one.npz"), "two classes")
    assert [path.name for path in tmp_path.iterdir()] == ["one.npz"]


def test_fewer_images_than_a_batch_and_than_the_validation(recipe: Path, tmp_path: Path) -> None:
    for count, words in ((30, "one batch of 16"), (20, "data.validation"), (12, "data.validation")):
        with pytest.raises(DataError, match=words):
            train(recipe, data=pictures(count), run=tmp_path / "new", quiet=True)
    assert not list(tmp_path.iterdir())


# Weights and models.


def test_a_start_of_another_architecture_names_its_keys(
    command: Command, recipe: Path, tmp_path: Path
) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "other.pt")
    ended = command("train", recipe, "start=other.pt")
    refused(ended, "other.pt", "does not fit", "conv1.weight", "weight", "bias")
    ended = command("train", recipe, f"start={recipe.parent / 'run'}", "model.options={width: 3}")
    refused(ended, "of another shape", "[2, 1, 3, 3] for [3, 1, 3, 3]")
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


class Bomb:
    """Makes a folder when it is unpickled by a reader that runs code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    command: Command, recipe: Path, tmp_path: Path, write: str
) -> None:
    content = {"state_dict": {"weight": torch.zeros(2)}, "trap": Bomb(tmp_path / "ran")}
    if write == "torch":
        torch.save(content, tmp_path / "trap.pt")
    else:
        (tmp_path / "trap.pt").write_bytes(pickle.dumps(content))
    refused(command("train", recipe, "start=trap.pt"), "would run code")
    words = ("--model", "small_cnn", "--weights", "trap.pt", "--data", recipe.parent / "noise.npz")
    refused(command("evaluate", *words), "would run code")
    assert [path.name for path in tmp_path.iterdir()] == ["trap.pt"]
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir(), "the trap would not have worked"


@pytest.mark.parametrize("kind", ["softmax", "nan", "classes", "maps", "size"])
def test_a_model_that_is_no_classifier_is_refused(recipe: Path, tmp_path: Path, kind: str) -> None:
    linear = nn.Linear(64, 2)
    if kind == "nan":
        linear.bias.data.fill_(torch.nan)
    models: dict[str, tuple[nn.Module, str]] = {
        "softmax": (nn.Sequential(nn.Flatten(), linear, nn.Softmax(dim=1)), "probabilities"),
        "nan": (nn.Sequential(nn.Flatten(), linear), "not finite"),
        "classes": (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "3 logits"),
        "maps": (nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, (2, 1))), "expected logits"),
        "size": (nn.Sequential(nn.Flatten(), nn.Linear(99, 2)), "failed on images of shape"),
    }
    model, words = models[kind]
    with pytest.raises(ModelError, match=words):
        train(recipe, model=model, run=tmp_path / "new", quiet=True)
    with pytest.raises(ModelError, match=words):
        evaluate(model, data=pictures(), attacks=["pgd1"], output=tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


def test_damaged_weights_of_a_run(command: Command, workshop: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(workshop / "run", run)
    best = run / "checkpoints" / "best.safetensors"
    whole = best.read_bytes()
    for damaged in (whole[:-100], whole[:60], whole[:4], b"", whole[:-50] + b"x" + whole[-49:]):
        best.write_bytes(damaged)
        before = contents(run)
        refused(command("evaluate", run, "--attacks", "natural"), "best.safetensors")
        assert contents(run) == before
    best.unlink()
    refused(command("evaluate", run, "--attacks", "natural"), "no 'best' checkpoint")


# Runs.


def test_a_folder_that_holds_no_run(command: Command, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refused(command("resume", "other"), "other holds no run")
    refused(command("resume", "nowhere"), "nowhere does not exist")
    refused(command("resume", "other/notes.txt"), "holds no run")
    refused(command("evaluate", "other"), "other holds no run")
    assert contents(tmp_path) == {"other/notes.txt": b"mine"}


@pytest.mark.parametrize(
    "text", ["", "nonsense", "- 1", "a: [1", "data: 3\nmodel: {}\n", "\x00\x01", "method: cure\n"]
)
def test_a_run_whose_configuration_is_nonsense(
    command: Command, workshop: Path, tmp_path: Path, text: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(workshop / "run", run)
    (run / "config.yaml").write_text(text)
    before = contents(run)
    refused(command("resume", run), "config.yaml")
    refused(command("evaluate", run), "config.yaml")
    assert contents(run) == before


def test_a_full_disk_loses_nothing_and_the_run_goes_on(stopped: tuple[Path, Path]) -> None:
    run, whole = stopped
    old = load_file(run / "checkpoints" / "last.safetensors")
    assert all(bool(value.isfinite().all()) for value in old.values())
    assert load_state(run / "checkpoints" / "state.safetensors")["done"] == 2 * 4
    assert not list(run.rglob("*.tmp"))
    resume(run, quiet=True)
    assert RunFolder.open(run).status().state == "finished"
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("last", "best"):
        ended = load_file(run / "checkpoints" / f"{name}.safetensors")
        expected = load_file(whole / "checkpoints" / f"{name}.safetensors")
        assert ended.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in ended.items())


@pytest.mark.parametrize("step", ["replace", "fsync", "write_bytes"])
@pytest.mark.parametrize("file", ["last.safetensors", "state.safetensors", "best.safetensors"])
def test_a_disk_that_fills_up_at_any_step(
    command: Command,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    file: str,
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    replace, write, writings = os.replace, Path.write_bytes, iter([None])
    fsync = os.fsync

    def due(name: str) -> bool:
        # The first writing of the file succeeds, the second meets a full disk.
        return file in name and next(writings, full) is full

    def refuse_replace(source: Any, target: Any) -> None:
        if due(Path(target).name):
            raise full
        replace(source, target)

    def refuse_write(path: Path, content: bytes) -> int:
        if due(path.name):
            write(path, content[:100])
            raise full
        return write(path, content)

    def refuse_fsync(number: int) -> None:
        if due(os.readlink(f"/proc/self/fd/{number}")):
            raise full
        fsync(number)

    with monkeypatch.context() as patch:
        if step == "replace":
            patch.setattr(os, "replace", refuse_replace)
        elif step == "write_bytes":
            patch.setattr(Path, "write_bytes", refuse_write)
        else:
            patch.setattr(os, "fsync", refuse_fsync)
        ended = command("train", recipe, "--run", "new", "--quiet")
    if ended.status == 0:
        assert file == "best.safetensors", "only the best may have been written just once"
        return
    refused(ended, file, "no space is left")
    checkpoints = tmp_path / "new" / "checkpoints"
    assert load_file(checkpoints / "last.safetensors")
    assert load_file(checkpoints / "best.safetensors")
    assert load_state(checkpoints / "state.safetensors")["done"] == 4
    assert not list(tmp_path.rglob("*.tmp"))
    assert command("resume", "new", "--quiet").status == 0
    assert len(RunFolder(tmp_path / "new").metrics()) == 3


def test_a_truncated_state_is_refused_and_kept(
    command: Command, stopped: tuple[Path, Path]
) -> None:
    run, _ = stopped
    state = run / "checkpoints" / "state.safetensors"
    whole = state.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        state.write_bytes(whole[:length])
        before = contents(run)
        refused(command("resume", run, "--quiet"), "state.safetensors")
        assert contents(run) == before
    state.write_bytes(whole)
    assert command("resume", run, "--quiet").status == 0


def test_an_altered_state_is_refused_and_kept(command: Command, stopped: tuple[Path, Path]) -> None:
    run, _ = stopped
    state = run / "checkpoints" / "state.safetensors"
    whole = state.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for place in (begin, (begin + len(whole)) // 2, len(whole) - 1):
        altered = bytearray(whole)
        altered[place] ^= 1
        state.write_bytes(bytes(altered))
        before = contents(run)
        refused(command("resume", run, "--quiet"), "was altered")
        assert contents(run) == before


def test_a_flipped_byte_anywhere_in_a_state_is_found(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"done": 3, "weights": {"a": torch.arange(4.0)}, "best": None})
    whole = path.read_bytes()
    missed = []
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1
        path.write_bytes(bytes(altered))
        try:
            state = load_state(path)
        except CheckpointError:
            continue
        except Exception as error:
            missed.append((place, whole[place - 4 : place + 4], repr(error)))
            continue
        if state["done"] != 3 or not torch.equal(state["weights"]["a"], torch.arange(4.0)):
            missed.append((place, whole[place - 4 : place + 4], "read as something else"))
    assert not missed


def test_a_state_of_another_network_is_refused_and_kept(
    command: Command, stopped: tuple[Path, Path]
) -> None:
    run, _ = stopped
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("width: 2", "width: 3"))
    before = contents(run)
    refused(command("resume", run, "--quiet"), "does not fit")
    assert contents(run) == before


def test_a_run_in_use_is_left_alone(command: Command, stopped: tuple[Path, Path]) -> None:
    run, _ = stopped
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        before = contents(run)
        refused(command("resume", run, "--quiet"), "another process")
        assert contents(run) == before
    finally:
        other.communicate("", timeout=20)
    assert command("resume", run, "--quiet").status == 0


def test_a_run_with_images_in_memory_says_what_it_needs(
    command: Command, recipe: Path, tmp_path: Path
) -> None:
    run = train(recipe, data=pictures(), run=tmp_path / "run", quiet=True).path
    status = run / "status.json"
    status.write_text(json.dumps({"state": "stopped"}))
    before = contents(run)
    refused(command("resume", run), "given its images")
    refused(command("evaluate", run), "given its images")
    assert contents(run) == before
    result = evaluate(run, data=pictures(), attacks=[])
    assert result["natural"]["n"] == 120
    with pytest.raises(DataError, match="the network knows '0', '1'; '2' is unknown to it"):
        evaluate(run, data=pictures(classes=3), attacks=[])


def test_the_photo_demonstration_asks_for_photographs(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CURE_DATA", str(tmp_path))
    refused(command("demo", "--photos"), "imagenette224", "--data FOLDER")
    refused(command("demo", "--data", "photos"), "--photos")
