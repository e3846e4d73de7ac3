"""Files for others: RobustBench's record; adversarial images, and claims about them that fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from test_evaluate import linear_case, unit
from torch import nn

import cure
from cure.errors import ConfigError, CureError, DataError, ModelError
from helpers import refused

EPSILON = 0.05


@pytest.fixture
def case(tmp_path):
    model, images, _, _ = linear_case(4, EPSILON)
    file = tmp_path / "adversarial.pt"
    result = cure.evaluate(
        model,
        data=images,
        attacks="fgsm,pgd20,apgd-ce",
        epsilon=EPSILON,
        adversarial=file,
        output=tmp_path / "result.json",
    )
    return model, images, file, result


def test_what_was_found_can_be_checked(case):
    model, images, file, result = case
    content = torch.load(file, weights_only=True)
    assert content["adv_complete"].shape == (len(images), 1, 4, 4)
    assert content["claimed_correct"] == result["worst_case"]["correct"]
    checked = cure.verify(file, model, data=images)
    assert checked["holds"]
    assert checked["correct"] == result["worst_case"]["correct"] < result["natural"]["correct"]
    assert checked["outside"] == 0
    assert checked["largest_change"] == pytest.approx(EPSILON, rel=1e-4)
    # By hand: the images in the file, asked of the network.
    right = model(content["adv_complete"]).argmax(dim=1) == images.label
    assert int(right.sum()) == checked["correct"]
    # Whoever withstood every attack is in the file as it was.
    stood = (content["adv_complete"] == unit(images)).flatten(1).all(dim=1)
    assert bool((right <= stood).all())


def test_images_of_an_unfinished_evaluation_are_no_claim(tmp_path):
    """Its attacks fooled images that its accuracy does not count."""
    model, images, _, _ = linear_case(4, EPSILON)
    file = tmp_path / "adversarial.pt"
    result = cure.evaluate(
        model, data=images, attacks="pgd20", epsilon=EPSILON, adversarial=file, time_limit=1e-9
    )
    assert "pgd20" in result["unfinished"]
    assert not file.exists()


def change(file: Path, **changes: object) -> None:
    torch.save(torch.load(file, weights_only=True) | changes, file)


def test_planted_claims_fail(case):
    model, images, file, _ = case
    content = torch.load(file, weights_only=True)
    adversarial = content["adv_complete"]
    far = adversarial.clone()
    far[3, 0, 0, 0] += 0.001 + EPSILON
    dark = adversarial.clone()
    dark[5] = -0.01
    broken = adversarial.clone()
    broken[7, 0, 0, 0] = float("nan")
    for images_there, count in ((far, 1), (dark, 1), (broken, 1)):
        change(file, adv_complete=images_there)
        checked = cure.verify(file, model, data=images)
        assert checked["outside"] == count
        assert not checked["holds"]
    change(file, adv_complete=adversarial, claimed_correct=content["claimed_correct"] - 2)
    checked = cure.verify(file, model, data=images)
    assert checked["outside"] == 0
    assert not checked["holds"]
    # Another network withstands what was made for this one.
    change(file, claimed_correct=content["claimed_correct"])
    torch.manual_seed(1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    assert not cure.verify(file, other, data=images)["holds"]
    # A smaller ball than the one that was allowed.
    assert cure.verify(file, model, data=images, epsilon=EPSILON / 2)["outside"] > 0


def test_files_of_others(case, tmp_path):
    model, images, file, result = case
    adversarial = torch.load(file, weights_only=True)["adv_complete"]
    for number, content in enumerate(({"adv_complete": adversarial}, adversarial.double())):
        path = tmp_path / f"other{number}.pt"
        torch.save(content, path)
        checked = cure.verify(path, model, data=images, epsilon=EPSILON)
        assert checked["correct"] == result["worst_case"]["correct"]
        assert checked["claimed_correct"] is None
        assert checked["holds"]


class Bomb:
    """What must not be unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_what_is_no_such_file(case, tmp_path):
    model, images, file, _ = case
    mark = tmp_path / "exploded"
    torch.save({"adv_complete": Bomb(mark)}, tmp_path / "bomb.pt")
    (tmp_path / "text.pt").write_text("nothing")
    (tmp_path / "empty.pt").touch()
    torch.save({"adv_complete": torch.zeros(3, 1, 4)}, tmp_path / "shape.pt")
    torch.save({"images": torch.zeros(3, 1, 4, 4)}, tmp_path / "key.pt")
    torch.save(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), tmp_path / "bytes.pt")
    torch.save(torch.zeros(3, 1, 8, 8), tmp_path / "size.pt")
    torch.save(torch.zeros(1000, 1, 4, 4), tmp_path / "many.pt")
    for name, why in {
        "bomb": "cannot be read as tensors",
        "text": "cannot be read as tensors",
        "empty": "cannot be read as tensors",
        "shape": "expected images",
        "key": "expected images",
        "bytes": "expected images",
        "size": "expected adversarial images like",
        "many": "expected adversarial images like",
        "missing": "does not exist",
    }.items():
        with pytest.raises(DataError, match=why):
            cure.verify(tmp_path / f"{name}.pt", model, data=images)
    assert not mark.exists()
    turned = images.subset(torch.arange(len(images)).flip(0))
    with pytest.raises(DataError, match="made from other images"):
        cure.verify(file, model, data=turned)


def test_a_network_that_cannot_be_asked_is_one_sentence(case):
    _, images, file, _ = case
    with pytest.raises(ModelError, match="returns 3 logits but the data has 4 classes"):
        cure.verify(file, nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), data=images)
    with pytest.raises(ModelError, match="the network"):
        cure.verify(file, nn.Sequential(nn.Flatten(), nn.Linear(15, 4)), data=images)


def test_a_whole_number_is_a_radius_as_well(case, tmp_path):
    model, images, file, _ = case
    content = torch.load(file, weights_only=True) | {"norm": "L2", "epsilon": 1}
    torch.save(content, tmp_path / "whole.pt")
    checked = cure.verify(tmp_path / "whole.pt", model, data=images)
    assert checked["threat"] == {"norm": "L2", "epsilon": 1.0}


def test_robustbench_takes_the_record(tmp_path):
    model, images, _, _ = linear_case(4, 0.03, count=9, gap=0.02)
    file = tmp_path / "record.json"
    result = cure.evaluate(
        model, data=images, attacks="autoattack", epsilon="0.03", robustbench=file
    )
    record = json.loads(file.read_text())
    # The fields of its ModelInfo.
    assert set(record) >= {
        *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset"),
        *("venue", "architecture", "eps", "clean_acc", "reported", "autoattack_acc"),
        *("footnote", "unreliable"),
    }
    assert record["clean_acc"] == f"{result['natural']['accuracy']:.2f}"
    assert record["autoattack_acc"] == f"{result['attacks']['autoattack']['accuracy']:.2f}"
    assert record["eps"] == "0.03"
    assert record["dataset"] == "made"


def test_nothing_is_computed_for_a_file_that_cannot_be_written(tmp_path):
    model, images, _, _ = linear_case(4, 0.03)
    with pytest.raises(ConfigError, match="add autoattack"):
        cure.evaluate(model, data=images, attacks="pgd1", robustbench=tmp_path / "r.json")
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is kept"):
        cure.evaluate(model, data=images, attacks="pgd1", adversarial=tmp_path / "there.pt")
    assert (tmp_path / "there.pt").read_text() == "mine"
    for options, why in (
        ({"epsilons": ["1/255"]}, "curve=pgd20"),
        ({"curve": "pgd1", "epsilons": ["-1"]}, "radii above 0"),
        ({"curve": "pgd1", "epsilons": ["x"]}, "expected a number"),
        ({"curve": "fmn"}, "by itself"),
        ({"curve": "nothing"}, "unknown attack"),
        ({"attacks": ["transfer"]}, "--transfer TARGET"),
    ):
        with pytest.raises(CureError, match=why):
            cure.evaluate(model, data=images, **({"attacks": ["pgd1"]} | options))


def test_the_command_checks_a_claim(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)

    made = command(
        *("train", "digits", "method=natural", "start=scratch", "training.epochs=1"),
        *("--run", "run"),
    )
    assert made.status == 0, made.err
    done = command(
        *("evaluate", "run", "--limit", "30", "--attacks", "fgsm,noise"),
        *("--curve", "fgsm", "--epsilons", "0.01,0.02", "--adversarial", "made.pt"),
    )
    assert done.status == 0, done.err
    assert "accuracy over epsilon" in done.out
    good = command("evaluate", "run", "--verify", "made.pt")
    assert good.status == 0, good.err
    assert "of 30 images are right" in good.out
    change(tmp_path / "made.pt", claimed_correct=31)
    beside = ("--require", "natural>=99", "--attacks", "autoattack", "--shards", "2")
    refused(
        command("evaluate", "run", "--verify", "made.pt", *beside),
        "--verify recomputes",
        "leave out --attacks, --require, --shards",
    )
    bad = command("evaluate", "run", "--verify", "made.pt")
    assert bad.status == 1
    assert "the claim fails: it says 31 right" in bad.err
