"""Lines between trained weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cure
from cure.data import carve
from cure.errors import ConfigError, CureError, CureNote
from cure.experiments.tradeoff import _images, barriers, choose, combinations
from cure.runs.folder import RunFolder
from cure.runs.records import TradeoffPoint
from helpers import Command, bright_or_dark, refused

SETTINGS = {
    "natural.epochs": 3,
    "method": "at",
    "threat.epsilon": 0.32,
    "attack.step_size": 0.1,
    "attack.steps": 3,
    "data.validation": 64,
    "training.epochs": 4,
    "training.batch_size": 32,
    "training.threads": 1,
}


def point(natural: float, robust: float, *shares: float) -> TradeoffPoint:
    return TradeoffPoint(
        natural=natural,
        robust=robust,
        shares=list(shares),
        natural_interval=[0.0, 100.0],
        robust_interval=[0.0, 100.0],
        n=100,
    )


LINE = [point(90.0, 0.0, 1.0, 0.0), point(86.0, 30.0, 0.5, 0.5), point(70.0, 45.0, 0.0, 1.0)]


def test_points_on_lines_and_triangles() -> None:
    assert combinations(2, 5)[1] == (0.75, 0.25)
    triangle = combinations(3, 5)
    # (n + 2 choose 2) points of a triangular grid with n steps.
    assert len(set(triangle)) == len(triangle) == 15
    assert all(sum(shares) == pytest.approx(1) for shares in triangle)
    pairs = combinations(4, 3)
    # Four ends and the middles of six pairs.
    assert len(pairs) == 10
    assert all(sum(share > 0 for share in shares) <= 2 for shares in pairs)


def test_the_choice_meets_the_requirement_or_comes_nearest() -> None:
    assert choose(LINE, 80.0, None) is LINE[1]
    assert choose(LINE, 60.0, None) is LINE[2]
    assert choose(LINE, None, 20.0) is LINE[1]
    assert choose(LINE, 95.0, None) is LINE[0]
    assert choose(LINE, None, 99.0) is LINE[2]


def test_a_barrier_is_a_point_below_both_ends() -> None:
    assert barriers(LINE) == []
    (sentence,) = barriers([LINE[0], point(60.0, 20.0, 0.5, 0.5), LINE[2]])
    assert "60.0 % at shares 0.50, 0.50, below 70.0 %" in sentence


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("tradeoff")
    source = place / "images.npz"
    images = bright_or_dark(256)
    import numpy as np

    test = bright_or_dark(64, "test")
    np.savez(
        source,
        x_train=images.image.permute(0, 2, 3, 1).numpy(),
        y_train=images.label.numpy(),
        x_test=test.image.permute(0, 2, 3, 1).numpy(),
        y_test=test.label.numpy(),
    )
    settings = SETTINGS | {"data.source": str(source)}
    cure.train("digits", settings, run=place / "at", quiet=True)
    cure.train(
        "digits", settings | {"seed": 1, "training.epochs": 2}, run=place / "other", quiet=True
    )
    return place


def test_the_ends_are_the_start_and_the_run_and_the_choice_is_a_run(
    runs: Path, tmp_path: Path
) -> None:
    found = cure.tradeoff(runs / "at", natural_at_least=0, points=3, output=tmp_path / "chosen")
    assert found.ends == ["natural start", "at"]
    outcome = RunFolder.open(runs / "at").outcome()
    assert outcome is not None
    assert outcome.end is not None
    assert found.points[0].natural == outcome.start.natural
    assert (found.points[-1].natural, found.points[-1].robust) == (
        outcome.end.natural,
        outcome.end.robust,
    )
    assert found.met
    assert found.chosen == max(found.points, key=lambda p: p.robust)
    assert found.run == str(tmp_path / "chosen")
    assert found.strong is not None
    assert found.strong.attacks == ["apgd-ce"], "the targeted attack needs four classes"
    strong = cure.evaluate(found.run, split="validation", attacks=["apgd-ce"])
    assert strong["attacks"]["apgd-ce"]["accuracy"] == found.strong.robust <= found.chosen.robust
    assert (tmp_path / "chosen" / "tradeoff.png").read_bytes()[1:4] == b"PNG"
    assert "chosen" in (tmp_path / "chosen" / "tradeoff.svg").read_text()
    evaluated = cure.evaluate(found.run, split="validation", attacks=["natural"])
    assert evaluated["natural"]["accuracy"] == pytest.approx(found.chosen.natural)


def test_a_choice_that_names_one_class_has_gained_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rule of a training: of two classes, half of the images withstand every attack then."""

    def planted(network: object, shares: tuple[float, ...], *_: object) -> TradeoffPoint:
        robust = 50.0 * shares[1]
        return point(100.0 - robust, robust, *shares)

    monkeypatch.setattr("cure.experiments.tradeoff._measured", planted)
    place = tmp_path / "one-class"
    found = cure.tradeoff(runs / "at", robust_at_least=50, points=2, strong=(), output=place)
    assert found.met
    outcome = RunFolder.open(place).outcome()
    assert outcome is not None
    assert outcome.gained is False


def test_a_full_disk_leaves_no_half_of_a_run(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cure.experiments.tradeoff.save_weights", full)
    with pytest.raises(CureError, match=r"cannot be made: .*No space left"):
        cure.tradeoff(
            runs / "at", natural_at_least=0, points=2, strong=(), output=tmp_path / "chosen"
        )
    assert not list(tmp_path.iterdir())


def test_the_middle_is_the_mean_of_the_weights(runs: Path, tmp_path: Path) -> None:
    found = cure.tradeoff(runs / "at", robust_at_least=0, points=3, output=tmp_path / "any")
    start = cure.Run(runs / "at" / "natural").model().state_dict()
    end = cure.Run(runs / "at").model().state_dict()
    came = cure.Run(tmp_path / "any").model().state_dict()
    assert found.chosen is not None
    share = found.chosen.shares[1]
    for name, value in came.items():
        if "running" in name or not value.is_floating_point():
            continue
        torch.testing.assert_close(value, (1 - share) * start[name] + share * end[name])


def test_a_requirement_that_no_point_meets(runs: Path, command: Command) -> None:
    ended = command("tradeoff", runs / "at", "--robust-at-least", 100, "--points", 2)
    assert ended.status == 3, ended
    assert "no point has a robust accuracy of 100 %; the nearest has" in ended.err


def test_what_does_not_fit_together_is_one_sentence(runs: Path, tmp_path: Path) -> None:
    for options, word in (
        ({"natural_at_least": 120}, "percentage"),
        ({"natural_at_least": 50, "robust_at_least": 50}, "give one of the two"),
        ({"points": 1}, "2 or more"),
        ({"points": 2.5}, "points: expected a whole number, got 2.5"),
        ({"output": tmp_path / "unwritten"}, "output: nothing is written"),
    ):
        with pytest.raises(CureError, match=word):
            cure.tradeoff(runs / "at", **options)
    with pytest.raises(CureError, match="expected one or more runs"):
        cure.tradeoff([])
    source = f"{runs}/images.npz"
    settings = SETTINGS | {"data.source": source, "training.epochs": 1, "threat.epsilon": 0.1}
    cure.train("digits", settings, run=tmp_path / "near", quiet=True)
    with pytest.raises(CureError, match="differ in their threat"):
        cure.tradeoff([runs / "at", tmp_path / "near"])


def test_runs_of_other_networks_and_class_orders_are_refused(runs: Path, tmp_path: Path) -> None:
    for name, file, old, new, word in (
        ("classes", "data.json", None, None, "differ in their classes"),
        (
            "split",
            "config.yaml",
            "split_seed: 0",
            "split_seed: 7",
            "differ in their data.split_seed",
        ),
        ("network", "config.yaml", "name: small_cnn", "name: resnet10", "differ in their network"),
    ):
        shutil.copytree(runs / "other", tmp_path / name)
        path = tmp_path / name / file
        if old is None:
            content = json.loads(path.read_text())
            content["classes"].reverse()
            path.write_text(json.dumps(content))
        else:
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new))
        with pytest.raises(CureError, match=word):
            cure.tradeoff([runs / "at", tmp_path / name])


def test_a_run_counts_once_and_is_a_trained_one(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CureError, match="at is named twice"):
        cure.tradeoff([runs / "at", cure.Run(runs / "other" / ".." / "at")])
    place = tmp_path / "chosen"
    cure.tradeoff(runs / "at", natural_at_least=0, points=2, strong=(), output=place)
    with pytest.raises(CureError, match=r"chosen was made by cure tradeoff.*made of \(at\)"):
        cure.tradeoff(place, natural_at_least=0)


def test_images_for_the_statistics_that_are_gone(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "at", tmp_path / "moved")
    path = tmp_path / "moved" / "config.yaml"
    path.write_text(path.read_text().replace(f"{runs}/images.npz", f"{tmp_path}/gone.npz"))
    with pytest.raises(CureError, match=r"gone\.npz"):
        cure.tradeoff(tmp_path / "moved", points=2)


def test_an_unknown_strong_attack_is_refused_before_anything_is_measured(
    runs: Path, command: Command
) -> None:
    ended = command("tradeoff", runs / "at", "--natural-at-least", 1, "--strong", "pdg20")
    refused(ended, "pdg20")


def test_a_strong_attack_for_more_classes_is_refused_before_anything_is_measured(
    runs: Path,
) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match="apgd-t"):
        cure.tradeoff(runs / "at", natural_at_least=0, points=2, strong=["apgd-t"], say=said.append)
    assert not said


def test_natural_accuracy_is_no_strong_attack(runs: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    found = cure.tradeoff(
        runs / "at", natural_at_least=0, points=2, strong=["natural"], output=chosen
    )
    assert found.run == str(chosen)
    assert found.strong is None


def test_three_ends_make_a_triangle(runs: Path) -> None:
    found = cure.tradeoff([runs / "at", runs / "other"], points=3)
    assert found.ends == ["natural start", "at", "other"]
    assert len(found.points) == 6
    assert found.chosen is None


def test_images_in_memory_are_split_as_in_training(tmp_path: Path) -> None:
    images = bright_or_dark(400)
    given = (images.image.numpy().transpose(0, 2, 3, 1), images.label.numpy())
    settings = SETTINGS | {
        "data.limit": 100,
        "data.validation": 40,
        "training.epochs": 1,
        "natural.epochs": 1,
    }
    cure.train("digits", settings, data=given, run=tmp_path / "run", quiet=True)
    held = _images(RunFolder.open(tmp_path / "run"), given, "validation")
    whole = images.subset(slice(0, 100))
    _, expected = carve(whole, 40, cure.Run(tmp_path / "run").config.data.split_seed)
    assert torch.equal(held.image, expected.image)
    assert torch.equal(held.label, expected.label)
    assert len(cure.tradeoff(tmp_path / "run", points=3, data=given).points) == 3


def test_a_run_brings_the_network_that_it_was_given(runs: Path, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    settings = SETTINGS | {"training.epochs": 1, "start": "model"}
    file = runs / "images.npz"
    run = cure.train("digits", settings, model=network, data=file, run=tmp_path / "run", quiet=True)
    assert len(cure.tradeoff(run, points=3).points) == 3


def test_images_that_changed_since_training_choose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draws = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (60, 8, 8), generator=draws, dtype=torch.uint8).numpy()
    label = np.arange(60) % 3
    np.savez("images.npz", image=image, label=label)
    settings = {"data.source": "images.npz", "training.epochs": 1, "training.batch_size": 8}
    more = {"data.validation": 9, "start": "natural", "natural.epochs": 1}
    cure.train("digits", settings | more, run="run", quiet=True)
    cure.tradeoff("run", natural_at_least=0, points=2, strong=[], output="chosen")
    np.savez("images.npz", image=image[1:], label=label[1:])
    with pytest.raises(CureError, match="removed or given another class since run was trained"):
        cure.tradeoff("run", points=2)
    with pytest.warns(CureNote, match="since chosen was trained"):
        cure.evaluate("chosen", attacks=[])
