"""An exported file is evaluated: without gradients, against its float network, at the gate."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper
from torch import Tensor, nn

import cure
from cure.attacks import PGD
from cure.data import load_split
from cure.errors import ConfigError, CureNote, ModelError
from cure.exporters.onnx import captured, onnx_model
from cure.models.contract import MARK
from cure.runs.folder import RunFolder
from helpers import Command, refused

WORKFLOW = Path(__file__).parents[2] / "docs" / "guides" / "robustness.yml"


def test_the_file_has_the_accuracy_of_its_run(run: cure.Run, folder: Path) -> None:
    attacks = "noise,square"
    ours = cure.evaluate(run, attacks=attacks, limit=20)
    theirs = cure.evaluate(folder / "model.onnx", data="digits", attacks=attacks, limit=20)
    for name in attacks.split(","):
        assert theirs["attacks"][name]["accuracy"] == ours["attacks"][name]["accuracy"]
    assert theirs["natural"]["correct"] == ours["natural"]["correct"]
    assert theirs["data"]["sha256"] == ours["data"]["sha256"]
    assert not any("int8" in note for note in theirs["notes"])


def test_attacks_with_gradients_are_one_sentence(folder: Path, command: Command) -> None:
    words = ("evaluate", folder / "model.onnx", "--data", "digits", "--limit", 9)
    refused(command(*words, "--attacks", "pgd20"), "needs the gradient", "ONNX file", "square")
    refused(command("evaluate", folder / "model.onnx"), "--data")


def test_a_file_is_not_warned_of_for_having_no_gradients(folder: Path) -> None:
    result = cure.evaluate(folder / "model.onnx", data="digits", attacks="noise", limit=40)
    names = {check["name"] for check in result["diagnosis"]["checks"]}
    assert "normalisation" in names
    assert not names & {"gradients", "gradient_direction"}


def test_a_checkpoint_of_a_run_is_standardised_and_ordered_as_the_run(run: cure.Run) -> None:
    """Its constants are in the settings of the run beside it, not in the file."""
    ours = cure.evaluate(run, attacks="fgsm", limit=60)
    file = run.path / "checkpoints" / "best.safetensors"
    asked: Any = {"weights": file, "data": "digits", "attacks": "fgsm", "epsilon": 0.1, "limit": 60}
    with pytest.warns(CureNote, match=r"mean 0\.3 and std 0\.35, which are taken over"):
        named = cure.evaluate("small_cnn", **asked)
    for found in (named, cure.evaluate("small_cnn", **asked, mean=[0.3], std=[0.35])):
        assert found["natural"]["correct"] == ours["natural"]["correct"]
        assert found["attacks"]["fgsm"]["correct"] == ours["attacks"]["fgsm"]["correct"]
    with pytest.warns(CureNote, match=r"mean 0\.3 and std 0\.35, this evaluation with others"):
        cure.evaluate("small_cnn", **asked, mean=[0.0], std=[1.0])


def test_corruptions_take_a_file(run: cure.Run, folder: Path) -> None:
    given = {"severity": "3", "only": "brightness", "limit": 40}
    ours = cure.corruptions(run, **given)
    theirs = cure.corruptions(folder / "model.onnx", data="digits", **given)
    assert theirs["corruptions"]["brightness"]["accuracy"] == pytest.approx(
        ours["corruptions"]["brightness"]["accuracy"]
    )


def test_images_made_on_the_float_network_are_replayed(run: cure.Run, folder: Path) -> None:
    """Against PGD called by hand on the run, and its images on the int8 file by onnxruntime."""
    result = cure.evaluate(
        folder / "model.int8.onnx", data="digits", attacks="pgd5", limit=60, float_network=run
    )
    images = load_split(RunFolder.open(run.path).config.data, "test", 60)
    own, file = run.model(), cure.from_pretrained(folder / "model.int8.onnx")
    pixels = images.image / 255
    right = file(pixels).argmax(1) == images.label
    assert result["natural"]["correct"] == int(right.sum())
    own_right = own(pixels).argmax(1) == images.label
    assert result["float"]["natural"]["correct"] == int(own_right.sum())
    made = result["attacks"]["pgd5"]
    assert made["settings"]["made_on"] == "float network"
    assert made["passes"]["backward"] > 0
    # A file that agrees with the float network withstands about what that withstands.
    float_pgd = result["float"]["attacks"]["pgd5"]
    assert "made_on" not in float_pgd["settings"]
    assert abs(made["accuracy"] - float_pgd["accuracy"]) < 12
    assert made["accuracy"] < result["natural"]["accuracy"]
    difference = result["float"]["differences"]["pgd5"]
    assert difference["difference"] == pytest.approx(made["accuracy"] - float_pgd["accuracy"])
    assert difference["gained"] - difference["lost"] == made["correct"] - float_pgd["correct"]
    draws = torch.Generator().manual_seed(1)
    threat = cure.Threat("Linf", 0.1)
    by_hand = PGD(threat, 5, 0.025)(own, pixels, images.label, generator=draws)
    withstands = right & (file(by_hand).argmax(1) == images.label)
    assert abs(int(withstands.sum()) - made["correct"]) <= 4


def test_images_of_a_third_network_are_tried_beside_those_replayed(
    run: cure.Run, folder: Path
) -> None:
    result = cure.evaluate(
        folder / "model.int8.onnx",
        data="digits",
        attacks="fgsm,transfer",
        limit=20,
        float_network=run,
        transfer=run,
    )
    assert set(result["float"]["attacks"]) == {"fgsm"}
    assert set(result["attacks"]) == {"fgsm", "transfer"}


def test_int8_is_told_of_as_masking(run: cure.Run, folder: Path, command: Command) -> None:
    words = ("evaluate", folder / "model.int8.onnx", "--data", "digits", "--limit", 30)
    alone = command(*words, "--attacks", "noise")
    assert alone.status == 0
    assert "masks the gradient" in alone.err
    assert "--float RUN" in alone.err
    beside = command(*words, "--attacks", "noise,fgsm", "--float", run.path)
    assert "FGSM made on the float network leave" in beside.err
    assert "replayed on the file" in beside.out
    assert "difference" in beside.out
    with pytest.raises(ConfigError, match="has gradients"):
        cure.evaluate(run, attacks="fgsm", limit=5, float_network=run)


def test_checks_of_attacks_are_left_out_of_a_file_without_gradients(folder: Path) -> None:
    found = cure.diagnose(folder / "model.onnx", data="digits", limit=60)
    assert found["verdict"] == "warn"
    assert "ONNX file" in found["left_out"]["gradients"]
    assert {"gradients", "convergence", "black_box", "total_gap"} <= found["left_out"].keys()
    assert not any(one["status"] == "fail" for one in found["checks"])


class Mean(nn.Module):
    """Reads brightness: no constants, no contract."""

    def forward(self, image: Tensor) -> Tensor:
        level = image.mean((1, 2, 3))
        return torch.stack([0.5 - level, level - 0.5], dim=1) * 10


@pytest.fixture
def theirs(folder: Path, tmp_path: Path) -> Path:
    """An ONNX file of others, which reads brightness."""
    contract = cure.from_pretrained(folder / "model.onnx").contract
    proto = onnx_model(captured(Mean().eval(), contract.kind), contract)
    kept = [prop for prop in proto.metadata_props if prop.key != MARK]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    onnx.save(proto, tmp_path / "theirs.onnx")
    return tmp_path / "theirs.onnx"


def test_a_file_of_others_is_evaluated(theirs: Path) -> None:
    image = torch.full((6, 1, 8, 8), 200, dtype=torch.uint8)
    image[:3] = 30
    data = cure.ImageSet.of(image, torch.tensor([0, 0, 0, 1, 1, 0]), split="test")
    result = cure.evaluate(theirs, data=data, attacks="noise", epsilon="8/255")
    assert result["natural"]["correct"] == 5
    assert result["attacks"]["noise"]["correct"] == 5
    # Standardised, 30/255 is 0.82 and counts as bright.
    shifted = cure.evaluate(theirs, data=data, attacks="noise", mean=[-0.7], std=[1.0])
    assert shifted["natural"]["correct"] == 2


def test_a_file_of_others_takes_constants(theirs: Path, command: Command) -> None:
    """``--mean`` and ``--std`` go with the file, as docs/guides/deploy.md says, and with each
    other."""
    image, label = np.full((6, 8, 8), 200, np.uint8), [0, 0, 0, 1, 1, 0]
    image[:3] = 30
    file, output = theirs.with_name("two.npz"), theirs.with_name("result.json")
    np.savez(file, x_train=255 - image, y_train=label, x_test=image, y_test=label)
    words = ("evaluate", theirs, "--data", file, "--attacks", "natural")
    ended = command(*words, "--mean", "-0.7", "--std", "1", "--output", output)
    assert ended.status == 0, ended.err
    assert json.loads(output.read_text())["natural"]["correct"] == 2
    refused(command(*words, "--mean", "-0.7"), "mean and std are given together")


def test_images_of_another_size_are_one_sentence(folder: Path) -> None:
    image = torch.zeros((4, 1, 9, 9), dtype=torch.uint8)
    data = cure.ImageSet.of(image, torch.arange(4), [str(n) for n in range(10)], split="test")
    with pytest.raises((ConfigError, ModelError, cure.CureError), match="resize=8"):
        cure.evaluate(folder / "model.onnx", data=data, attacks="noise")


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (("B", 3, 16, 16), r"images of 16x16, got 8x8: set data\.resize=16 .*option resize=16\)$"),
        (("B", 3, 16, "W"), "images of 16x8, got 8x8: give images of 16x8 pixels$"),
        (("B", 1, "H", "W"), r"with 1 channels, got 3: set data\.color=grey .* color=grey\)$"),
        (("B", 5, 8, 8), "with 5 channels, got 3: export a network for images of 1 or 3 channels$"),
        (("B", 8, 8, 3), r"the channel first.*got \['B', 8, 8, 3\], .* layer that permutes images"),
        ((None, 3, "H", "W"), "theirs.onnx failed on images of shape .*resize=N\\)$"),
    ],
)
def test_a_file_for_other_images_is_one_sentence(
    declared: tuple[Any, ...], said: str, tmp_path: Path
) -> None:
    flat = onnx.helper.make_tensor("flat", onnx.TensorProto.INT64, [2], [0, -1])
    values = [size if isinstance(size, int) else 7 for size in declared[1:]]
    weight = numpy_helper.from_array(np.ones((math.prod(values), 2), np.float32), "weight")
    nodes = [
        onnx.helper.make_node("Reshape", ["image", "flat"], ["values"]),
        onnx.helper.make_node("MatMul", ["values", "weight"], ["logits"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("image", declared), ("logits", ("B", 2)))
    ]
    graph = onnx.helper.make_graph(nodes, "theirs", ends[:1], ends[1:], [flat, weight])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "theirs.onnx"
    )
    image = torch.zeros((4, 3, 8, 8), dtype=torch.uint8)
    data = cure.ImageSet.of(image, torch.arange(4) % 2, split="test")
    with pytest.raises(ModelError, match=said) as caught:
        cure.evaluate(tmp_path / "theirs.onnx", data=data, attacks="noise")
    assert "correct its forward" not in str(caught.value)


def test_the_workflow_runs_here(
    run: cure.Run, folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cure command, with the run, data and limits of this test in the place of its own."""
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["gate"]["steps"]
    (line,) = [step["run"] for step in steps if step.get("run", "").startswith("cure ")]
    own = {
        "deploy/model.onnx": str(folder / "model.onnx"),
        "photos": "digits",
        "runs/mine": str(run.path),
        "1000": "40",
        "natural>=75": "natural>=99.5",
        "pgd20>=40": "pgd20>=0",
        "pgd20,square": "pgd20",
    }
    words = shlex.split(line)
    assert set(own) <= set(words)
    monkeypatch.chdir(tmp_path)
    ended = command(*[own.get(word, word) for word in words[1:]])
    assert ended.status == 4
    assert ended.err.count("not met: ") == 1
    assert "not met: natural>=99.5" in ended.err
    assert "met: pgd20>=0" in ended.out
    suite = ElementTree.parse("gate.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    (results,) = json.loads(Path("gate.sarif").read_text())["runs"]
    assert [row["level"] for row in results["results"]] == ["error", "none"]
    assert json.loads(Path("evaluation.json").read_text())["requirements"][1]["met"] is True
    uploads = [step["with"] for step in steps if "upload" in step.get("uses", "")]
    assert uploads[0]["sarif_file"] in words
    assert set(uploads[1]["path"].split()) <= set(words)


def test_a_program_is_evaluated_as_its_run(run: cure.Run, tmp_path: Path) -> None:
    file = cure.export(run, "torch-export", tmp_path)
    given = {"attacks": "pgd5", "limit": 40}
    ours = cure.evaluate(run, **given)
    theirs = cure.evaluate(file, data="digits", **given)
    assert theirs["natural"]["correct"] == ours["natural"]["correct"]
    assert theirs["attacks"]["pgd5"]["accuracy"] == ours["attacks"]["pgd5"]["accuracy"]
    assert theirs["threat"] == ours["threat"]
    assert theirs["model"]["method"] == "at"
    assert cure.from_pretrained(file).contract.classes == [str(n) for n in range(10)]
