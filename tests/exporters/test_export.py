"""Files that a run is exported to: read by other libraries, equal to the run, or refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import safetensors
import torch
import yaml
from torch import Tensor, nn

import cure
from cure.cli.demo import deploy
from cure.data.images import ImageKind
from cure.errors import CheckpointError, CureError, CureNote, ModelError
from cure.exporters import export as module
from cure.exporters.onnx import captured, onnx_model
from cure.models.checkpoint import save_weights
from cure.models.contract import Contract, Preprocessing
from cure.runs.folder import RunFolder
from helpers import Command, bright_or_dark, refused


def images(count: int) -> Tensor:
    return torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(count))


def onnx_metadata(path: Path) -> dict[str, Any]:
    found = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    return {key: json.loads(value) for key, value in found.items() if key != "cure_format"}


def test_onnx_computes_what_the_run_does_in_another_library(run: cure.Run, folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [item.version for item in proto.opset_import if item.domain == ""] == [18]
    (size, *rest) = proto.graph.input[0].type.tensor_type.shape.dim
    assert size.dim_param == "batch"
    assert [dim.dim_value for dim in rest] == [1, 8, 8]
    # The reference implementation shares no code with onnxruntime, which checked the file.
    reference = onnx.reference.ReferenceEvaluator(proto)
    with torch.no_grad():
        for count in (1, 3):
            (logits,) = reference.run(None, {"image": images(count).numpy()})
            np.testing.assert_allclose(logits, run.model()(images(count)).numpy(), atol=1e-4)


def test_onnx_carries_its_contract(run: cure.Run, folder: Path) -> None:
    found = onnx_metadata(folder / "model.onnx")
    assert found["classes"] == [str(digit) for digit in range(10)]
    assert found["preprocessing"]["size"] == [8, 8]
    assert found["normalisation"]["mean"] == pytest.approx([0.3])
    assert found["normalisation"]["inside"] is True
    assert found["threat"] == {"norm": "Linf", "epsilon": "0.1"}
    assert found["versions"]["cure"] == cure.__version__
    by_attack = {part["attack"]: part for part in found["accuracies"]}
    assert set(by_attack) == {"natural", "fgsm"}
    evaluated = cure.evaluate(run, attacks="fgsm", limit=100)
    assert by_attack["fgsm"]["accuracy"] == evaluated["attacks"]["fgsm"]["accuracy"]
    assert by_attack["fgsm"]["interval"] == evaluated["attacks"]["fgsm"]["interval"]
    assert by_attack["fgsm"]["n"] == 100
    assert found["check"]["largest_difference"] <= found["check"]["tolerance"] < 0.01
    assert found["data"]["n"] == 100
    assert len(found["data"]["sha256"]) == 64


def test_accuracies_are_those_on_the_run_s_own_images(run: cure.Run, tmp_path: Path) -> None:
    before = module._evaluation(RunFolder.open(run.path), "best")
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(tmp_path / "noise.npz", image=noise, label=np.arange(40) % 10)
    other = cure.evaluate(
        run.path, data=tmp_path / "noise.npz", data_options={"test_fraction": 0.5}, attacks="fgsm"
    )
    assert other["data"]["own"] is False
    assert module._evaluation(RunFolder.open(run.path), "best") == before


def test_int8_is_quantised_smaller_and_says_how_often_it_agrees(folder: Path) -> None:
    small, whole = folder / "model.int8.onnx", folder / "model.onnx"
    assert small.stat().st_size < whole.stat().st_size
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    assert "QuantizeLinear" in kinds
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(whole).graph.node}
    found = onnx_metadata(small)
    assert found["precision"] == "int8"
    assert found["check"]["n"] == found["check"]["calibration_images"] == 50
    pixels = images(200).numpy()
    logits = [
        onnxruntime.InferenceSession(str(path)).run(None, {"image": pixels})[0]
        for path in (small, whole)
    ]
    assert np.abs(logits[0] - logits[1]).max() > 0
    assert (logits[0].argmax(1) == logits[1].argmax(1)).mean() > 0.9


def test_safetensors_hold_the_weights_and_the_contract(run: cure.Run, tmp_path: Path) -> None:
    made = cure.export(run, "safetensors", tmp_path / "own.safetensors")
    with safetensors.safe_open(str(made), framework="np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["normalisation"])["inside"] is False
    read = cure.from_pretrained(made)
    with torch.no_grad():
        assert torch.equal(read(images(4)), run.model()(images(4)))
    assert read.contract.classes == [str(digit) for digit in range(10)]


def test_torch_export_needs_only_pytorch(run: cure.Run, tmp_path: Path) -> None:
    made = cure.export(run, "torch-export", tmp_path)
    extra = {"classes": ""}
    program = torch.export.load(made, extra_files=extra).module()
    with torch.no_grad():
        for count in (1, 5):
            difference = program(images(count)) - run.model()(images(count))
            assert float(difference.abs().max()) < 1e-4
    assert json.loads(extra["classes"])[9] == "9"


def test_a_hub_folder_has_its_four_files_and_no_pickle(run: cure.Run, tmp_path: Path) -> None:
    made = cure.export(run, "hub", tmp_path / "hub")
    assert {file.name for file in made.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    _, head, text = (made / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    (results,) = card["model-index"][0]["results"]
    names = {metric["name"]: metric["value"] for metric in results["metrics"]}
    measured = cure.evaluate(run, attacks="fgsm", limit=100)
    assert names["FGSM, Linf 0.1"] == round(measured["attacks"]["fgsm"]["accuracy"], 2)
    assert card["pipeline_tag"] == results["task"]["type"] == "image-classification"
    assert "95 % interval" in text
    with torch.no_grad():
        assert torch.equal(cure.from_pretrained(made)(images(3)), run.model()(images(3)))


def test_the_card_is_one_that_the_hub_reads(run: cure.Run, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    made = cure.export(run, "hub", tmp_path / "hub")
    data = hub.ModelCard.load(made / "README.md").data
    assert {result.metric_type for result in data.eval_results} == {"accuracy"}


def test_the_card_of_mixed_weights_says_so(run: cure.Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "mixed")
    weights = tmp_path / "mixed" / "checkpoints" / "best.safetensors"
    facts = {"run": "mixed", "epoch": "1", "shares": "0.25 0.75"}
    save_weights(run.model(), weights, facts)
    (tmp_path / "mixed" / "tradeoff.json").write_text("{}")
    made = cure.export(tmp_path / "mixed", "hub", tmp_path / "hub")
    assert (
        "mixed with those of its start afterwards (shares 0.25/0.75"
        in (made / "README.md").read_text()
    )
    plain = cure.export(run, "hub", tmp_path / "plain")
    assert "mixed" not in (plain / "README.md").read_text()


def test_the_card_of_a_natural_network_does_not_call_it_robust(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    settings = {"method": "natural", "start": "model", "training.epochs": 1}
    settings |= {"training.batch_size": 8, "data.validation": 8}
    data = bright_or_dark(40)
    run = cure.train("digits", settings, run=tmp_path / "run", model=network, data=data, quiet=True)
    card = (cure.export(run, "hub", tmp_path / "hub", data=data) / "README.md").read_text()
    assert "on unchanged images, not to withstand adversarial changes" in card
    assert "adversarial-robustness" not in card


def test_what_the_run_knows_against_its_accuracies_goes_with_them(
    run: cure.Run, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    outcome = json.loads((copy / "outcome.json").read_text())
    outcome["gained"], outcome["start"]["robust"], outcome["end"]["robust"] = False, 3.0, 2.0
    (copy / "outcome.json").write_text(json.dumps(outcome))
    for file in (copy / "evaluations").iterdir():
        file.unlink()
    cure.evaluate(copy, attacks="fgsm", limit=100)
    (file,) = (copy / "evaluations").glob("*.json")
    record = json.loads(file.read_text())
    check = {"name": "planted", "status": "fail", "meaning": "its gradient is masked."}
    record["diagnosis"] = {"verdict": "fail", "checks": [check | {"measured": {}}]}
    record["attacks"]["fgsm"]["not_attacked"] = {"cw": 7}
    file.write_text(json.dumps(record))
    made = cure.export(copy, "hub", tmp_path / "hub")
    said = cure.from_pretrained(made).contract.warnings
    assert len(said) == 3
    assert "gained no robust accuracy: 3.0 % before, 2.0 % after" in said[0]
    assert said[1] == "check planted of the diagnosis failed: its gradient is masked"
    assert said[2].startswith("fgsm: an estimate from above")
    text = (made / "README.md").read_text()
    assert all(f"\nWarning: {sentence}.\n" in text for sentence in said)
    assert "Warning:" not in (cure.export(run, "hub", tmp_path / "plain") / "README.md").read_text()


def test_a_network_of_transformers_loads_there(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic",
        num_labels=2, id2label={0: "dark", 1: "bright"}, label2id={"dark": 0, "bright": 1},
    )  # fmt: skip
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "start")
    constants = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "rescale_factor": 1 / 255}
    (tmp_path / "start" / "preprocessor_config.json").write_text(json.dumps(constants))
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    label = torch.arange(40) % 2
    pixels = (pixels * (0.3 + 0.7 * label[:, None, None, None])).to(torch.uint8)
    # The data's classes are in alphabetical order, not in that of the network's own labels.
    data = (pixels, ["bright" if number else "dark" for number in label.tolist()])
    settings = {
        "method": "natural", "start": "model", "model": f"hf:{tmp_path / 'start'}",
        "data.validation": 10, "training.epochs": 1, "training.batch_size": 10,
        "training.threads": 1, "training.validation_steps": 1,
    }  # fmt: skip
    trained = cure.train("digits", settings, run=tmp_path / "run", data=data, quiet=True)
    made = cure.export(trained, "hub", tmp_path / "hub", data=data)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(
        made, use_safetensors=True
    ).eval()
    # The network keeps the order of its own labels, and the run takes that of the data.
    assert theirs.config.id2label == {0: "dark", 1: "bright"}
    written = json.loads((made / "preprocessor_config.json").read_text())
    standard = (pixels[:4] / 255 - torch.tensor(written["image_mean"])[:, None, None]) / (
        torch.tensor(written["image_std"])[:, None, None]
    )
    with torch.no_grad():
        ours = trained.model()(pixels[:4] / 255)
        logits = theirs(standard).logits.flip(1)
        torch.testing.assert_close(logits, ours, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cure.from_pretrained(made)(pixels[:4] / 255), ours)


KIND = ImageKind(("a", "b", "c"), 3, (8, 8))
CONTRACT = Contract(
    classes=["a", "b", "c"], preprocessing=Preprocessing(size=[8, 8], channels=3), threat={}
)


class Bessel(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.special.bessel_j0(image.mean((2, 3)))


class Decides(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) if image.mean() > 0.5 else image.amax((2, 3))


class FixesBatch(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.reshape(2, 3, -1).mean(2)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Bessel(), ["the operator prims.bessel_j0"]),
        (Decides(), ["the values of a tensor", "test_export.py, line"]),
        (FixesBatch(), ["the number of images of a batch"]),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(network: nn.Module, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        onnx_model(captured(network, KIND), CONTRACT)
    for word in [*words, "--to safetensors"]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failure_of_an_old_pytorch_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    with pytest.raises(ModelError, match=r"PyTorch 2\.11 or later to write ONNX, got 2\.6\.0"):
        onnx_model(captured(Bessel(), KIND), CONTRACT)


class Autocasts(nn.Sequential):
    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(image)


def test_a_network_with_autocast_or_in_data_parallel(tmp_path: Path) -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    data, settings = bright_or_dark(40), {"start": "model", "start_check": "off", "method": "at"}
    settings |= {"training.epochs": 1, "training.batch_size": 8, "data.validation": 8}

    def trained(network: nn.Module, name: str) -> cure.Run:
        return cure.train(
            "digits", settings, run=tmp_path / name, model=network, data=data, quiet=True
        )

    run = trained(Autocasts(*layers), "autocast")
    with pytest.raises(ModelError, match=r"computes in bfloat16, as with torch\.autocast; remove"):
        cure.export(run, "onnx", tmp_path / "a", data=data)
    assert cure.export(run, "safetensors", tmp_path / "a", data=data).exists()
    with pytest.warns(CureNote, match="do not run this file as PyTorch does: .*autocast is not"):
        made = cure.export(run, "torch-export", tmp_path / "a", data=data)
    with pytest.raises(ModelError, match="autocast is not run from a file"):
        cure.from_pretrained(made)
    with torch.no_grad():
        logits = torch.export.load(made).module()(images(3))
        torch.testing.assert_close(logits, run.model()(images(3)), atol=1e-4, rtol=1e-4)
    run = trained(nn.DataParallel(nn.Sequential(*layers)), "parallel")
    assert cure.export(run, "onnx", tmp_path / "b", data=data).exists()


def test_a_file_that_computes_something_else_is_not_kept(
    run: cure.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: Tensor) -> Tensor:
            return self.network(image) + 0.01

    monkeypatch.setattr(module, "captured", lambda model, kind: captured(Wrong(model).eval(), kind))
    with pytest.raises(ModelError, match=r"differ from those of the run by 0\.0"):
        cure.export(run, "torch-export", tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


def test_an_export_leaves_pytorch_s_draws_as_they_were(run: cure.Run, tmp_path: Path) -> None:
    for number, kind in enumerate(("onnx", "torch-export", "safetensors", "hub")):
        before = torch.get_rng_state()
        cure.export(run, kind, tmp_path / str(number))
        assert torch.equal(torch.get_rng_state(), before), kind


def test_a_place_that_takes_no_file_is_one_sentence(run: cure.Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    # Nothing can be made in /proc, whoever asks.
    for place in ("/proc/model.onnx", "/proc/new/model.onnx", tmp_path / "file" / "model.onnx"):
        with pytest.raises(CheckpointError, match=rf"{place} cannot be written"):
            cure.export(run, "onnx", place)
    with pytest.raises(CheckpointError, match="cannot be written"):
        cure.export(run, "hub", tmp_path / "file" / "hub")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_nothing_is_overwritten_and_options_must_fit(
    run: cure.Run, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    refused(command("export", run.path, tmp_path, "--to", "safetensors"), "exists")
    assert (tmp_path / "model.safetensors").read_text() == "precious"
    refused(command("export", run.path, tmp_path, "--to", "hub", "--int8"), "int8", "onnx")
    refused(command("export", run.path, tmp_path, "--push", "a/b"), "push", "hub")
    refused(
        command("export", run.path, tmp_path / "h", "--to", "hub", "--push", "ab"), "owner/name"
    )
    refused(command("export", tmp_path / "none", tmp_path), "does not exist")


def test_a_repository_that_cannot_be_is_refused_before_the_export(
    run: cure.Run, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    words = ["export", run.path, tmp_path / "h", "--to", "hub", "--push"]
    refused(command(*words, "me/bad name"), "push: Repo id must", "me/bad name")
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    refused(command(*words, "me/robust"), "push needs huggingface_hub: pip install")
    assert not (tmp_path / "h").exists()


def test_a_hub_that_does_not_answer_is_told_with_the_command_for_later(
    run: cure.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            raise OSError("no route")

    monkeypatch.setattr(hub, "HfApi", Api)
    place = tmp_path / "later"
    with pytest.raises(ModelError, match=r"\(no route\).*`hf upload me/robust .*later`"):
        cure.export(run, "hub", place, push="me/robust")
    assert (place / "README.md").is_file()


def test_pushing_uploads_privately_only_when_asked(
    run: cure.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options["private"]))

        def upload_folder(self, **options: Any) -> None:
            calls.append((options["repo_id"], options["folder_path"]))

    monkeypatch.setattr(hub, "HfApi", Api)
    cure.export(run, "hub", tmp_path / "first")
    assert calls == []
    cure.export(run, "hub", tmp_path / "second", push="me/robust")
    assert calls == [("me/robust", True), ("me/robust", str(tmp_path / "second"))]


def test_code_that_a_file_names_is_not_run(run: cure.Run, tmp_path: Path) -> None:
    made = cure.export(run, "hub", tmp_path / "hub")
    config = json.loads((made / "config.json").read_text())
    config["cure"]["network"] = {"name": "os:mkdir", "options": {"path": str(tmp_path / "owned")}}
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not imported"):
        cure.from_pretrained(made)
    assert not (tmp_path / "owned").exists()
    network = torch.nn.Module()
    with pytest.raises(CureError):
        cure.from_pretrained(made, network=network)


def test_damage_is_said(run: cure.Run, tmp_path: Path) -> None:
    made = cure.export(run, "safetensors", tmp_path)
    content = bytearray(made.read_bytes())
    content[-1] ^= 1
    made.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        cure.from_pretrained(made)
    (tmp_path / "broken.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(CheckpointError, match="ONNX"):
        cure.from_pretrained(tmp_path / "broken.onnx")
    with pytest.raises(CheckpointError, match="does not exist"):
        cure.from_pretrained(tmp_path / "nothing" / "at" / "all")


def test_what_is_no_export_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(2, 2).state_dict(), "weights.pth")
    with pytest.raises(CheckpointError, match="was not written by cure export"):
        cure.from_pretrained("weights.pth")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # the name of a file is not sent
    for name in ("deploy/model.onnx", "deploy/model.pt2", "deploy/model.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name} does not exist"):
            cure.from_pretrained(name)


def test_the_weights_digest_is_that_of_the_run(run: cure.Run, folder: Path) -> None:
    name = run.path / "checkpoints" / "best.safetensors"
    with safetensors.safe_open(str(name), framework="pt") as file:
        assert (
            onnx_metadata(folder / "model.onnx")["run"]["weights_sha256"]
            == (file.metadata()["sha256"])
        )


def test_an_evaluation_names_the_bytes_that_it_evaluated(folder: Path) -> None:
    result = cure.evaluate(folder / "model.onnx", data="digits", attacks="noise", limit=20)
    content = (folder / "model.onnx").read_bytes()
    assert result["model"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert result["threat"]["epsilon"] == 0.1
    assert result["batch_size"] == 256


def test_a_missing_package_is_one_sentence(
    run: cure.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelError, match=r"cure-at\[export\]"):
        cure.export(run, "onnx", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_demonstration_ends_with_a_file_and_its_evaluation(run: cure.Run) -> None:
    made, result = deploy(run)
    assert onnx_metadata(made)["precision"] == "float32"
    differences = result["float"]["differences"]
    assert set(differences) == {"natural", "pgd20"}
    assert all(abs(part["difference"]) <= 1 for part in differences.values())
    assert (made.parent / "evaluation.json").is_file()
