"""Teachers: where they come from, what is refused, and that a restart keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cure
from cure.config import TeacherConfig
from cure.data import ImageSet
from cure.errors import CheckpointError, CureError, Interrupted
from cure.models.checkpoint import save_weights
from cure.recipe import changed, check, load_recipe, read_recipe
from cure.runs.folder import RunFolder
from cure.runs.state import load_state
from cure.training.prerequisites import prerequisites
from cure.training.setup import prepare, teacher_config
from cure.training.trainer import Trainer
from helpers import Command, bright_or_dark, refused

QUICK: dict[str, Any] = {
    "model": {"name": "small_cnn", "options": {"width": 2}},
    "data.validation": 20,
    "data.augment": {"crop_padding": 0, "flip": False},
    "attack.steps": 1,
    "training.epochs": 2,
    "training.batch_size": 16,
    "training.validation_steps": 1,
    "training.collapse_patience": 100,
    "natural.epochs": 1,
}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def quick(run: str, data: ImageSet, **settings: Any) -> cure.Run:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return cure.train("digits", {**QUICK, **given}, run=run, data=data, quiet=True)


def teacher_weights(run: Path) -> dict[str, torch.Tensor]:
    """The teacher's weights as the run's state has them."""
    state = load_state(run / "checkpoints" / "state.safetensors")["method"]
    start = "teacher.network."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_folder_of_a_run_teaches_with_its_best_weights(brightness):
    teacher = quick("robust", brightness, method="at", start="scratch", training__epochs=3)
    best = load_file(teacher.path / "checkpoints" / "best.safetensors")
    student = quick("student", brightness, method={"name": "ard", "teacher": "robust"})
    assert same(teacher_weights(student.path), best)
    assert not same(load_file(student.path / "checkpoints" / "last.safetensors"), best)


def test_a_teacher_may_have_another_network(brightness):
    wide = {"name": "small_cnn", "options": {"width": 3}}
    quick("robust", brightness, method="at", start="scratch", model=wide)
    student = quick("student", brightness, method={"name": "ard", "teacher": "robust"})
    assert same(teacher_weights(student.path), load_file("robust/checkpoints/best.safetensors"))


def test_a_weights_file_is_of_the_run_s_own_network(brightness):
    quick("robust", brightness, method="at", start="scratch")
    file = "robust/checkpoints/last.safetensors"
    student = quick("student", brightness, method={"name": "ard", "teacher": file})
    assert same(teacher_weights(student.path), load_file(file))


def test_a_weights_file_of_a_network_that_standardises_otherwise_is_refused(brightness):
    own = {"model.mean": [0.3], "model.std": [0.2], "start": "scratch"}
    cure.train("digits", {**QUICK, **own, "method": "at"}, run="robust", data=brightness)
    file = "robust/checkpoints/best.safetensors"
    student = {"name": "ard", "teacher": file}
    sentence = r"standardises images \(mean 0.3; std 0.2\).*set model.mean"
    with pytest.raises(CureError, match=sentence):
        quick("student", brightness, method=student)
    settings = {**QUICK, **own, "method": student}
    run = cure.train("digits", settings, run="same", data=brightness)
    taught = {k.removeprefix("network."): v for k, v in teacher_weights(run.path).items()}
    assert same(load_file(file), taught)


def test_natural_is_the_natural_start_trained_once(brightness):
    student = quick("student", brightness, method="hat")
    natural = load_file(student.path / "natural" / "checkpoints" / "best.safetensors")
    assert same(teacher_weights(student.path), natural)
    assert len(list(student.path.rglob("config.yaml"))) == 2


def test_natural_is_trained_where_the_run_starts_elsewhere(brightness):
    """From the network as it was built, not from the run's own start."""
    quick("robust", brightness, method="at", start="scratch")
    student = quick("student", brightness, method="hat", start="robust")
    natural = load_file(student.path / "natural" / "checkpoints" / "best.safetensors")
    assert same(teacher_weights(student.path), natural)
    plain = quick("plain", brightness, method="natural", start="scratch", training__epochs=1)
    assert same(natural, load_file(plain.path / "checkpoints" / "best.safetensors"))


def recipe_teacher(**settings: Any) -> dict[str, Any]:
    wanted = {**QUICK, "method": "at", "start": "scratch"} | settings
    return {"recipe": "digits", "settings": wanted}


def test_a_recipe_trains_the_teacher_first(brightness):
    method = {"name": "ard", "teacher": recipe_teacher()}
    student = quick("student", brightness, method=method)
    inner = student.path / "teachers" / "teacher"
    assert RunFolder.open(inner).status().state == "finished"
    trained = load_file(inner / "checkpoints" / "best.safetensors")
    assert same(teacher_weights(student.path), trained)
    alone = quick("alone", brightness, method="at", start="scratch")
    assert same(trained, load_file(alone.path / "checkpoints" / "best.safetensors"))


def test_a_teacher_whose_gradient_onednn_spoils_keeps_the_default_layout(brightness):
    narrow = {"model": {"name": "resnet10", "options": {"width": 4}}}
    teacher = recipe_teacher(**narrow, **{"training.channels_last": True})
    settings = {**QUICK, "method": {"name": "ard", "teacher": teacher}, "start": "scratch"}
    config = check(changed(read_recipe("digits"), settings), "settings")
    folder = RunFolder(Path("student"))
    (needed,) = prerequisites(folder, config, prepare(config, images=brightness, model=None))
    assert needed.config.training.channels_last
    assert not needed.prepared.engine.channels_last


def test_a_teacher_s_recipe_shares_data_seed_and_device_with_its_student():
    config = load_recipe("cifar10-mini", ["seed=7", "training.threads=1", "data.validation=55"])
    source = TeacherConfig(recipe="digits", settings={"training.epochs": 3})
    theirs = teacher_config("method.teacher", source, config)
    assert theirs.data == config.data
    assert (theirs.seed, theirs.training.threads, theirs.training.epochs) == (7, 1, 3)
    order = {"method.beta": 3, "method": "trades"}
    told = teacher_config("method.teacher", TeacherConfig(recipe="digits", settings=order), config)
    assert told.method.beta == 3  # type: ignore[attr-defined]
    other = TeacherConfig(recipe="digits", settings={"seed": 1, "training.threads": 2})
    theirs = teacher_config("method.teacher", other, config)
    assert (theirs.seed, theirs.training.threads) == (1, 2)


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_a_stopped_run_goes_on_to_the_same_bits(brightness, monkeypatch, phase):
    """Stopped while the teacher trains, or while the student does; the teacher's folder may go."""
    settings = {"name": "ard", "teacher": recipe_teacher()}
    whole = quick("whole", brightness, method=settings)

    original = Trainer._finish_epoch

    def interrupting(self: Trainer, number: int, *arguments: Any) -> None:
        original(self, number, *arguments)
        place = self.folder.path.name
        if number == 1 and place == {"teacher": "teacher", "student": "cut"}[phase]:
            self._interrupt()

    monkeypatch.setattr(Trainer, "_finish_epoch", interrupting)
    with pytest.raises(Interrupted, match=r"cure\.resume\('cut', data=data\)"):
        quick("cut", brightness, method=settings)
    monkeypatch.setattr(Trainer, "_finish_epoch", original)
    if phase == "teacher":
        assert RunFolder.open("cut").status().phase == "teacher teacher"
    else:
        for file in Path("cut/teachers/teacher/checkpoints").iterdir():
            file.unlink()
    cure.resume("cut", data=brightness, quiet=True)
    for name in ("best", "last"):
        ends = [load_file(f"{run}/checkpoints/{name}.safetensors") for run in (whole.path, "cut")]
        assert same(*ends)


def test_teachers_of_teachers(brightness):
    middle = recipe_teacher(method={"name": "ard", "teacher": recipe_teacher()})
    student = quick("student", brightness, method={"name": "ard", "teacher": middle})
    assert (student.path / "teachers" / "teacher" / "teachers" / "teacher").is_dir()


# -- what is refused, before anything is made ----------------------------------------------------


def refuse(data: ImageSet, teacher: Any, *words: str) -> None:
    with pytest.raises(CureError) as caught:
        quick("student", data, method={"name": "ard", "teacher": teacher})
    for word in ("method.teacher", *words):
        assert word in str(caught.value)
    assert not Path("student").exists()


def test_a_teacher_that_is_not_there(brightness):
    refuse(brightness, "nowhere", "'nowhere' does not exist", "{recipe: NAME}")


def test_a_teacher_without_weights(brightness):
    quick("robust", brightness, method="at", start="scratch")
    Path("robust/checkpoints/best.safetensors").unlink()
    refuse(brightness, "robust", "no 'best' checkpoint")


def test_a_teacher_of_other_classes(brightness):
    quick("robust", bright_or_dark(classes=3), method="at", start="scratch")
    refuse(brightness, "robust", "level 2", "trained on these classes")


def test_a_teacher_of_images_of_another_size(brightness):
    small = ImageSet(
        brightness.image[..., :6, :6], brightness.label, brightness.classes, "small", "train"
    )
    quick("robust", small, method="at", start="scratch")
    refuse(brightness, "robust", "1x6x6", "1x8x8")


def test_weights_of_another_network(brightness):
    wide = {"name": "small_cnn", "options": {"width": 3}}
    quick("robust", brightness, method="at", start="scratch", model=wide)
    refuse(brightness, "robust/checkpoints/best.safetensors", "shape")


def test_a_teacher_that_one_image_a_step_cannot_train(brightness):
    refuse(brightness, recipe_teacher(**{"training.batch_size": 1}), "2 images or more", "got 1")


def test_a_file_that_is_no_weights(brightness):
    Path("weights.pt").write_text("hello")
    refuse(brightness, "weights.pt")


def test_an_unknown_recipe_of_a_teacher(brightness):
    refuse(brightness, {"recipe": "digit"}, "unknown recipe 'digit'", "did you mean 'digits'")


def test_a_wrong_setting_of_a_teacher_s_recipe(brightness):
    refuse(brightness, recipe_teacher(**{"training.epochs": 0}), "training.epochs")


def test_a_teacher_of_a_teacher_that_is_not_there(brightness):
    middle = recipe_teacher(method={"name": "ard", "teacher": "nowhere"})
    refuse(brightness, middle, "'nowhere' does not exist")


@pytest.mark.parametrize(
    "teacher",
    [{}, {"path": "a", "recipe": "digits"}, {"path": "a", "settings": {"seed": 1}}, 3, ["a"]],
)
def test_what_is_no_teacher(brightness, teacher):
    refuse(brightness, teacher)


def test_no_teacher_at_all(command: Command):
    refused(command("show", "digits", "method=ard"), "method.teacher", "is missing")


def test_a_setting_that_another_method_owns(command: Command):
    ended = command("show", "digits", "method=trades", "method.teacher=natural")
    refused(ended, "method", "'teacher' is a setting of ard, iad, kd, and the method is trades")


def test_a_teacher_whose_outputs_are_not_finite(brightness):
    quick("robust", brightness, method="at", start="scratch")
    model = cure.Run(Path("robust")).model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    save_weights(model, Path("broken.safetensors"), {})
    refuse(brightness, "broken.safetensors", "not finite")


def test_the_state_names_the_folder_when_the_teacher_s_run_is_gone(brightness, monkeypatch):
    """A restart needs the teacher's network, which only its run can name; its weights it has."""
    quick("robust", brightness, method="at", start="scratch")
    original = Trainer._finish_epoch

    def interrupting(self: Trainer, number: int, *arguments: Any) -> None:
        original(self, number, *arguments)
        self._interrupt()

    monkeypatch.setattr(Trainer, "_finish_epoch", interrupting)
    with pytest.raises(Interrupted):
        quick("student", brightness, method={"name": "ard", "teacher": "robust"})
    monkeypatch.setattr(Trainer, "_finish_epoch", original)
    Path("robust").rename("elsewhere")
    with pytest.raises(CheckpointError, match=r"method\.teacher: 'robust' does not exist"):
        cure.resume("student", data=brightness, quiet=True)
    Path("elsewhere").rename("robust")
    cure.resume("student", data=brightness, quiet=True)


def test_the_settings_of_a_teacher_are_those_of_a_run(brightness):
    """Its start, its frozen statistics and its layers, as in a run of its own."""
    first = quick("first", brightness, method="at", start="scratch")
    settings = recipe_teacher(
        start=str(first.path),
        **{"training.batch_norm": "frozen", "training.optimizer.learning_rate": 1e-9},
    )
    student = quick("student", brightness, method={"name": "ard", "teacher": settings})
    trained, began = teacher_weights(student.path), first.model().state_dict()
    for name, value in trained.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, began[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": "nowhere"}, "method.teacher: start: 'nowhere' does not exist"),
        ({"layers.update": ["nonsense"]}, "method.teacher: .*nonsense"),
        ({"training.minutes": 1}, "method.teacher: expected training.epochs, got training.minutes"),
        ({"method": "mart", "training.class_weights": "balanced"}, "a method whose loss takes wei"),
    ],
)
def test_the_settings_of_a_teacher_are_checked_as_those_of_a_run(brightness, changes, words):
    settings = recipe_teacher(**changes)
    with pytest.raises(CureError, match=words):
        quick("student", brightness, method={"name": "ard", "teacher": settings})
    assert not Path("student").exists()
