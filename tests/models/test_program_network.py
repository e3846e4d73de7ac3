"""Exported programs are run as PyTorch runs them, and nothing in a file is executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cure
from cure.config import ModelConfig
from cure.data.images import ImageKind
from cure.errors import CheckpointError, ModelError
from cure.exporters.onnx import captured
from cure.models import Normalised, build_model
from cure.models.program_network import ProgramNetwork

KIND = ImageKind(("a", "b", "c"), 3, (8, 8))


class Odd(nn.Module):
    """Sizes, lists, constants and text among the arguments, and a constant that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([1.0, 2.0, 3.0])
        self.convolution = nn.Conv2d(3, 3, 2, padding="same")
        self.linear = nn.Linear(48, 3)

    def forward(self, image: Tensor) -> Tensor:
        left, right = torch.einsum("bchw,bdhw->bdhw", image, self.convolution(image)).chunk(2, 3)
        both = nn.functional.gelu(torch.cat([left, right.flip(3)], dim=1), approximate="tanh")
        pooled = nn.functional.interpolate(both, size=(4, 2), mode="nearest")
        flat = pooled.reshape(image.shape[0], -1) + torch.zeros(image.shape[0], 48)
        return self.linear(flat) * self.scale.to(image.dtype)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "odd":
        model: nn.Module = Normalised(Odd(), (0.4,) * 3, (0.3,) * 3)
    else:
        config = ModelConfig(name=name, mean=(0.4,) * 3, std=(0.3,) * 3)
        model = build_model(config, classes=3, channels=3, size=(8, 8), seed=0)
    return model.eval().requires_grad_(False)


def saved(model: nn.Module, file: Path) -> Path:
    torch.export.save(captured(model, KIND), file)
    return file


@pytest.mark.parametrize("name", ["small_cnn", "vit", "odd"])
def test_logits_and_gradients_are_those_of_the_network(name: str, tmp_path: Path) -> None:
    model = network(name)
    file = saved(model, tmp_path / "model.pt2")
    found = ProgramNetwork(file)
    results = []
    for tried in (model, found):
        image = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        image.requires_grad_(True)
        logits = tried(image)
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), image)
        results.append((logits, gradient))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)
    assert results[0][1].abs().max() > 0
    theirs = torch.export.load(file).module()  # our own file
    one = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(found(one), theirs(one), rtol=1e-5, atol=1e-6)
    # Another layout of the images, as engines give, changes nothing.
    last = one.to(memory_format=torch.channels_last)
    placed = found.to(memory_format=torch.channels_last)
    torch.testing.assert_close(placed(last), found(one))


def test_it_is_evaluated_under_attacks_with_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    file = saved(model, tmp_path / "theirs.pt2")
    draws = torch.Generator().manual_seed(0)
    image = torch.rand(24, 3, 8, 8, generator=draws)
    with torch.no_grad():
        label = model((255 * image).round() / 255).argmax(dim=1)
    data = cure.ImageSet.of(image, label, ["a", "b", "c"], split="test")
    given: dict[str, Any] = {"data": data, "attacks": "pgd5", "epsilon": 0.02}
    found, expected = (cure.evaluate(target, **given) for target in (file, model))
    assert found["natural"]["accuracy"] == 100
    accuracy = expected["attacks"]["pgd5"]["accuracy"]
    assert found["attacks"]["pgd5"]["accuracy"] == accuracy < 100
    assert found["model"]["artefact"] == "theirs.pt2"
    settings = {"start": "scratch", "data.validation": 4, "training.batch_size": 10}
    with pytest.raises(ModelError, match=r"a torch\.export file cannot be trained"):
        cure.train("digits", settings, model=ProgramNetwork(file), data=data)


class Runs:
    """Unpickling this writes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (open, (str(self.place), "w"))


def changed(file: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of an archive in which one file was changed."""
    new = file.with_name("changed.pt2")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(new, "w") as made:
        for info in old.infolist():
            content = old.read(info)
            made.writestr(info, change(content) if info.filename.endswith(name) else content)
    return new


def in_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        found = json.loads(content)
        change(found)
        return json.dumps(found).encode()

    return apply


def test_what_pytorch_would_unpickle_or_evaluate_is_not(tmp_path: Path) -> None:
    """The planted file runs code in ``torch.export.load``, and none here."""
    place = tmp_path / "ran"
    file = saved(network("small_cnn"), tmp_path / "model.pt2")
    bad = changed(file, "sample_inputs/model.pt", lambda content: pickle.dumps(Runs(place)))
    ProgramNetwork(bad)(torch.rand(2, 3, 8, 8))
    assert not place.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever follows the code that ran
        torch.export.load(bad)
    assert place.exists(), "otherwise torch.export.load became safe, and this file may go"


def _pickled(config: Any) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


def _outside(config: Any) -> None:
    next(iter(config["config"].values()))["tensor_meta"]["sizes"][0] = {"as_int": 10**6}


def _node(target: str) -> Callable[[Any], None]:
    def change(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = target

    return change


def _text(program: Any) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["inputs"][0]["arg"] = {"as_string": "/etc/passwd"}


def _operator_argument(program: Any) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["inputs"][0]["arg"] = {"as_operator": "torch.os.system"}


def _second_input(program: Any) -> None:
    specs = program["graph_module"]["signature"]["input_specs"]
    specs.append({"user_input": {"arg": {"as_tensor": {"name": "more"}}}})


def _second_output(program: Any) -> None:
    specs = program["graph_module"]["signature"]["output_specs"]
    specs.append(specs[0])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("weights_config.json", in_json(_pickled), "pickled, and pickle can run code"),
        ("weights_config.json", in_json(_outside), "out of bounds"),
        ("model.json", in_json(_node("torch.os.system")), "torch.os.system is not run"),
        ("model.json", in_json(_node("torch.ops.aten.__class__.mro")), "is not run"),
        ("model.json", in_json(_node("torch.ops.aten.relu.__call__")), "is not run"),
        ("model.json", in_json(_node("torch.ops.higher_order.cond")), "export it --to onnx"),
        ("model.json", in_json(_text), "takes string '/etc/passwd'"),
        ("model.json", in_json(_operator_argument), "takes operator 'torch.os.system'"),
        ("model.json", in_json(_second_input), "expected one input"),
        ("model.json", in_json(_second_output), "expected one output"),
        ("model.json", lambda content: content[:-9], "cannot be read as a torch.export program"),
    ],
)
def test_what_is_not_run_ends_in_a_sentence(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], words: str
) -> None:
    file = saved(network("small_cnn"), tmp_path / "model.pt2")
    with pytest.raises((ModelError, CheckpointError), match=words):
        ProgramNetwork(changed(file, name, change))


def test_other_files_end_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no torch.export program"):
        ProgramNetwork(tmp_path / "absent.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(CheckpointError, match="export it again"):
        ProgramNetwork(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as made:
        made.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(CheckpointError, match=r"PyTorch 2.8 or newer"):
        ProgramNetwork(tmp_path / "old.pt2")
