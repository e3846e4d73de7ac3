"""Only some blocks learn: as a run, and as the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cure
from cure.analysis import layerwise as study_module
from cure.analysis.layerwise import layerwise, view
from cure.errors import ConfigError
from cure.experiments.executors import Job
from cure.models.blocks import blocks
from cure.runs.folder import RunFolder
from helpers import Command, refused

TINY = (
    "data.limit=400",
    "data.validation=50",
    "model={name: resnet10, options: {width: 2}}",
    "attack.steps=1",
    "natural.epochs=1",
    "training.epochs=2",
    "training.validation_steps=1",
    "training.collapse_patience=100",
    "training.threads=1",
)


class Here:
    """Works at once, in this process."""

    def submit(self, function: Any, /, *arguments: Any) -> Job:
        answer = function(*arguments)

        class Done:
            def result(self) -> str:
                return answer

        return Done()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A natural network, and runs in which only B3 learns."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    natural = cure.train(
        "digits", [*TINY, "method=natural", "start=scratch"], run=folder / "natural", quiet=True
    )
    change = [*TINY, "method=at", f"start={natural.path}", "layers.update=[B3]"]
    runs = {
        "frozen": [],
        "drawn": ["layers.reinitialise=weights"],
        "released": ["layers.stem=updated", "layers.statistics=updated"],
    }
    paths = {
        name: cure.train("digits", [*change, *own], run=folder / name, quiet=True).path
        for name, own in runs.items()
    }
    return {"natural": natural.path, **paths}


def moved(run: Path, start: Path) -> set[str]:
    """First word of the names of what differs from the start's weights."""
    before = load_file(start / "checkpoints" / "best.safetensors")
    after = load_file(run / "checkpoints" / "last.safetensors")
    names = {name for name in before if not torch.equal(before[name], after[name])}
    return {name.split(".")[0] for name in names}


def test_only_the_block_learns(trained):
    assert moved(trained["frozen"], trained["natural"]) == {"layer3"}
    assert moved(trained["drawn"], trained["natural"]) == {"layer3"}
    # As the released code has it: the stem learns too, and all BatchNorm statistics move.
    everything = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert moved(trained["released"], trained["natural"]) == everything
    last = load_file(trained["released"] / "checkpoints" / "last.safetensors")
    start = load_file(trained["natural"] / "checkpoints" / "best.safetensors")
    assert torch.equal(last["layer1.0.conv1.weight"], start["layer1.0.conv1.weight"])
    assert torch.equal(last["layer1.0.bn1.weight"], start["layer1.0.bn1.weight"])
    assert not torch.equal(last["conv1.weight"], start["conv1.weight"])


def test_drawn_anew_is_another_network_than_kept(trained):
    kept, drawn = (
        RunFolder.open(trained[name]).metrics()[0].train["loss"] for name in ("frozen", "drawn")
    )
    assert drawn != kept


def test_a_run_that_was_stopped_is_not_drawn_anew(trained, tmp_path, monkeypatch):
    """Resumed inside the first epoch: the blocks go on from where they were."""
    from cure.errors import Interrupted
    from cure.training.trainer import Trainer

    change = [*TINY, "method=at", f"start={trained['natural']}", "layers.update=[B3]"]
    change += ["layers.reinitialise=weights", "training.checkpoint_every=1"]
    whole = cure.train("digits", change, run=tmp_path / "whole", quiet=True)
    step = Trainer.train_step

    def stopping(self: Trainer, batch: Any) -> Any:
        self._stop_asked = self.done == 1
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(Interrupted):
        cure.train("digits", change, run=tmp_path / "stopped", quiet=True)
    monkeypatch.undo()
    cure.resume(tmp_path / "stopped", quiet=True)
    one, other = (
        load_file(path / "checkpoints" / "last.safetensors")
        for path in (whole.path, tmp_path / "stopped")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_parts_that_do_not_exist_are_refused_before_a_folder_is_made(command: Command, tmp_path):
    run = tmp_path / "run"
    ended = command("train", "digits", *TINY, "layers.update=[B7]", "--run", run)
    refused(ended, "unknown part 'B7'", "B4")
    assert not run.exists()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study")
    result = layerwise(
        "digits",
        TINY,
        output=folder,
        sets=["1", "34", "all"],
        variants=["reinitialised"],
        attack="pgd2",
        limit=40,
        executor=Here(),
    )
    return folder, result


def test_the_study_says_what_its_runs_say(study):
    folder, result = study
    assert [row["set"] for row in result["rows"]] == [None, "1", "34", "all"]
    for row in result["rows"]:
        record = json.loads((folder / "runs" / f"{row['label']}-seed0.json").read_text())
        last = RunFolder.open(folder / "training" / f"{row['label']}-seed0").metrics()[-1]
        final = [e for e in record["evaluations"] if e["model"]["epoch"] == last.epoch]
        assert row["natural"]["accuracy"] == final[0]["natural"]["accuracy"]
        assert row["robust"]["accuracy"] == final[0]["attacks"]["pgd2"]["accuracy"]
        assert row["validation_robust"] == last.validation.robust
        if row["set"] is not None:
            assert row["training_robust"] == 100 * last.train["robust_accuracy"]
    start = folder / "training" / "natural-seed0"
    assert moved(folder / "training" / "U-34-reinitialised-seed0", start) == {"layer3", "layer4"}
    kept = {key: value for key, value in result.items() if key != "file"}
    assert json.loads((folder / "layerwise.json").read_text()) == kept
    assert str(folder) not in (folder / "layerwise.json").read_text(), "no place on a machine"


def test_the_same_call_does_nothing_again_and_another_adds(study, monkeypatch):
    folder, result = study

    class Nobody:
        def submit(self, function: Any, /, *arguments: Any) -> Job:
            raise AssertionError("nothing is left to do")

    again = layerwise(
        "digits",
        TINY,
        output=folder,
        sets=["1", "34", "all"],
        variants=["reinitialised"],
        attack="pgd2",
        limit=40,
        executor=Nobody(),
    )
    assert again["rows"] == result["rows"]


def test_how_it_is_told():
    def row(name: str | None, natural: float, robust: float, gap: float) -> dict[str, Any]:
        cell = {"interval": [0.0, 100.0], "n": 500}
        return {
            "label": f"U-{name}",
            "set": name,
            "variant": name and "kept",
            "best_epoch": 1,
            "natural": cell | {"accuracy": natural},
            "robust": cell | {"accuracy": robust},
            "best_robust": cell | {"accuracy": robust},
            "training_robust": 50.0 + gap,
            "validation_robust": 50.0,
        }

    rows = [row(None, 95, 0, 0), row("1", 45, 20, 1), row("23", 85, 50, 6), row("all", 80, 45, 20)]
    result = {
        "rows": rows,
        "epochs": 3,
        "seed": 0,
        "attack": "pgd20",
        "data": {"name": "some"},
        "threat": {"norm": "Linf", "epsilon_text": "8/255"},
    }
    shown = view(result)
    assert "kept blocks from U-1 20.0 (0.0-100.0) to U-23 50.0 (0.0-100.0)" in shown.finding
    assert "one seed, 500 test images" in shown.finding
    alike = [row("1", 45, 20, 1), row("all", 80, 20, 20)]
    told = view(result | {"rows": alike}).finding
    assert "kept blocks from U-all 20.0 (0.0-100.0) to U-1 20.0 (0.0-100.0);" in told
    told = view(result | {"rows": alike[:1]}).finding
    assert "kept blocks U-1 20.0 (0.0-100.0);" in told
    (table,) = shown.tables
    assert [row[0] for row in table.rows] == ["start", "U-1", "U-23", "U-all"]
    assert [row[-1] for row in table.rows] == ["+0.0", "+1.0", "+6.0", "+20.0"]
    assert table.rows[2][2] == "85.0 (0.0-100.0)"
    natural, robust = shown.figures[0].panels
    assert [list(each.y) for each in natural.series] == [[45, 85, 80], [95, 95]]
    assert [list(each.y) for each in robust.series] == [[20, 50, 45], [0, 0]]
    (drawn,) = shown.pictures()
    assert ">U-23<" in drawn.svg


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sets": ["5"]}, "blocks of this network as digits"),
        ({"sets": ["11"]}, "got '11'"),
        ({"sets": []}, "sets: expected one or more"),
        ({"variants": []}, "variants: expected one or more"),
        ({"variants": ["fresh"]}, "reinitialised or kept"),
        ({"stem": "fresh"}, "stem: expected one of frozen, updated; got 'fresh'"),
        ({"limit": "10"}, "limit: expected a whole number"),
    ],
)
def test_sets_and_variants_that_mean_nothing(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        layerwise("digits", TINY, output=tmp_path / "study", executor=Here(), **change)
    assert not (tmp_path / "study").exists()


def test_the_command(command: Command, study):
    folder, _ = study
    ended = command(
        "analyse",
        "layerwise",
        "digits",
        *TINY,
        "--output",
        folder,
        "--sets",
        "1,34,all",
        "--variants",
        "reinitialised",
        "--attack",
        "pgd2",
        "--limit",
        40,
    )
    assert ended.status == 0, ended.err
    assert "U-34" in ended.out
    assert "Robust accuracy (pgd2" in ended.out
    network = cure.Run(folder / "training" / "U-1-reinitialised-seed0").model("last")
    assert "B4" in blocks(network)


def test_the_start_is_shown_with_the_weights_that_the_others_began_with(study, monkeypatch):
    """Its best ones; planted: others at its end, of 1 % natural accuracy."""
    folder, result = study
    measured = study_module._evaluations

    def forgetful(label: str, record: Any, plan: Any) -> Any:
        best, last = measured(label, record, plan)
        if label == "natural":
            worse = last.natural.model_copy(update={"accuracy": 1.0})
            last = last.model_copy(update={"natural": worse})
        return best, last

    monkeypatch.setattr(study_module, "_evaluations", forgetful)
    asked = {"output": folder, "sets": ["1", "34", "all"], "variants": ["reinitialised"]}
    again = layerwise("digits", TINY, attack="pgd2", limit=40, executor=Here(), **asked)
    assert again["rows"] == result["rows"]


def test_each_call_shows_the_attack_and_images_that_it_asks_for(study):
    """Also where the runs keep evaluations by other attacks, on other images, made later."""
    folder, result = study
    asked = {"output": folder, "sets": ["1", "34", "all"], "variants": ["reinitialised"]}
    other = layerwise("digits", TINY, attack="pgd1", limit=30, executor=Here(), **asked)
    assert [row["robust"]["n"] for row in other["rows"]] == [30] * 4
    again = layerwise("digits", TINY, attack="pgd2", limit=40, executor=Here(), **asked)
    assert again["rows"] == result["rows"]
    assert again["data"] == result["data"]
