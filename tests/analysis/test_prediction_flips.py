"""What was kept of a natural network: counts by hand, tests from other libraries, planted cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import cure
from cure.analysis.prediction_flips import flips, moved, prediction_flips, start_of
from cure.analysis.study import STUDIES
from cure.data import ImageSet
from cure.errors import ConfigError, DataError
from cure.evaluation.target import Target
from cure.models import Normalised
from cure.runs.folder import RunFolder
from cure.utils.stats import holm, mcnemar, paired_difference
from helpers import Command, bright_or_dark, refused

CLASSES = ("plain", "$10$ bill", "<b>bold</b>")

#         both  lost  gained neither (wrong alike), neither (wrong otherwise)
TRUE = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
FIRST = [0, 0, 0, 1, 1, 1, 0, 2, 0, 0]
SECOND = [0, 1, 2, 1, 0, 1, 1, 2, 0, 1]


class Reads(nn.Module):
    """Predicts the number that is written in one pixel."""

    def __init__(self, pixel: int) -> None:
        super().__init__()
        self.pixel = pixel
        self.numbers = nn.Parameter(torch.arange(3.0))

    def forward(self, image: Tensor) -> Tensor:
        return -(255 * image[:, 0, 0, self.pixel, None] - self.numbers).abs()


@pytest.fixture
def written() -> ImageSet:
    """Ten images that say what the two networks are to predict."""
    image = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
    image[:, 0, 0, 0], image[:, 0, 0, 1] = torch.tensor(FIRST), torch.tensor(SECOND)
    return ImageSet(image, torch.tensor(TRUE), CLASSES, "written", "test")


def check_by_hand(found: dict[str, Any]) -> None:
    assert [found[key] for key in ("n", "both", "lost", "gained", "neither")] == [10, 4, 3, 1, 2]
    assert found["difference"] == pytest.approx(-20)
    assert found["agreement"]["correct"] == 5
    rows = [[row[key] for key in ("name", "n", "lost", "gained")] for row in found["classes"]]
    assert rows == [["plain", 3, 2, 0], ["$10$ bill", 4, 1, 1], ["<b>bold</b>", 3, 0, 0]]


def test_images_are_counted_as_by_hand() -> None:
    check_by_hand(flips(torch.tensor(FIRST), torch.tensor(SECOND), torch.tensor(TRUE), CLASSES))


def test_a_class_without_images_is_left_out() -> None:
    label = torch.tensor([0, 0, 2])
    assert [row["name"] for row in flips(label, label, label, CLASSES)["classes"]] == [
        "plain",
        "<b>bold</b>",
    ]


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (9, 1), (1, 9), (40, 40), (300, 240)])
def test_mcnemars_test_is_the_binomial_test(lost: int, gained: int) -> None:
    theirs = scipy.stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(theirs, rel=1e-9)


def test_the_interval_of_a_paired_difference_covers_95_percent() -> None:
    draws = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.20, 0.08, 0.72])  # Lost, gained, neither: a difference of -12 points.
    inside = 0
    for _ in range(2000):
        drawn = torch.multinomial(shares, 150, replacement=True, generator=draws)
        lost, gained = int((drawn == 0).sum()), int((drawn == 1).sum())
        _, low, high = paired_difference(lost, gained, 150)
        inside += low <= -12 <= high
    # Three standard errors of 2,000 tries at 95 %: 1.5 points.
    assert 0.935 <= inside / 2000 <= 0.965


def test_holm_stops_at_the_first_that_stands() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.001}) == ["d", "b"]
    assert holm({}) == []


def test_weights_move_by_the_formula() -> None:
    start, end = nn.Linear(2, 2, bias=True), nn.Linear(2, 2, bias=True)
    with torch.no_grad():
        start.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        end.weight.copy_(torch.tensor([[1.15, 1.05], [1.5, -1.0]]))
        start.bias.zero_()
        end.bias.copy_(torch.tensor([0.0, 2.0]))
    found = moved(start, Normalised(end, [0.5], [0.5]), tolerance=0.1)
    weight, bias = found["tensors"]
    assert (weight["name"], weight["shape"], bias["size"]) == ("weight", [2, 2], 2)
    assert weight["distance"] == pytest.approx((0.15**2 + 0.05**2 + 0.5**2) ** 0.5 / 2, rel=1e-6)
    assert weight["share"] == 50, "0.05 is within a tenth of the rms, the others are beyond"
    assert bias["distance"] is None
    assert bias["share"] == 50
    assert found["distance"] == pytest.approx((0.15**2 + 0.05**2 + 0.5**2 + 4) ** 0.5 / 2, rel=1e-6)


def test_other_parameters_are_no_distance() -> None:
    with pytest.raises(ValueError, match="bias"):
        moved(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))


def test_the_study_of_two_networks(written: ImageSet, tmp_path: Path) -> None:
    output = tmp_path / "kept.json"
    result = prediction_flips(Reads(1), natural=Reads(0), data=written, output=output, batch_size=4)
    (this,) = result["comparisons"]
    check_by_hand(this)
    assert result["accuracy"][this["natural"]]["correct"] == 7
    assert this["weights"]["distance"] == 0
    loaded = json.loads(output.read_text())
    assert loaded == {key: value for key, value in result.items() if key != "file"}
    view = STUDIES["prediction-flips"].view(loaded)
    assert "loses 3 images that Reads-2 classifies correctly and gains 1 of 10" in view.finding
    assert "which chance can explain" in view.finding
    assert view.tables[0].rows[0][2:7] == ["10", "4", "3", "1", "2"]
    assert [row[1:4] for row in view.tables[1].rows] == [
        *(["3", "2", "0"], ["4", "1", "1"], ["3", "0", "0"]),
    ]
    drawn = (tmp_path / "kept-classes-1.svg").read_text()
    assert ">$10$ bill<" in drawn, "a name is no formula"
    assert "&lt;b&gt;bold" in drawn


class Fails(Reads):
    """Returns what is not a number for images of one number."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).masked_fill(image[:, :1, 0, 7] > 0, torch.nan)


def test_what_is_not_a_number_is_no_prediction(written: ImageSet, tmp_path: Path) -> None:
    """As in `cure evaluate`: image 2 is of the first class, which argmax of NaN names."""
    written.image[2, 0, 0, 7] = 1
    network, output = Fails(0), tmp_path / "kept.json"
    result = prediction_flips(network, natural=network, data=written, output=output, batch_size=2)
    assert [each["correct"] for each in result["accuracy"].values()] == [6, 6]
    (this,) = result["comparisons"]
    assert (this["both"], this["neither"], this["agreement"]["correct"]) == (6, 4, 9)


class Otherwise(Reads):
    """The same network with a weight more."""

    def __init__(self, pixel: int) -> None:
        super().__init__(pixel)
        self.more = nn.Parameter(torch.ones(1))


def test_the_picture_names_the_class_that_changes_most(written: ImageSet, tmp_path: Path) -> None:
    # The other way round no class loses: two images of the first are gained.
    result = prediction_flips(Reads(1), natural=Reads(0), data=written)
    (this,) = result["comparisons"]
    for row in (this, *this["classes"]):
        row["lost"], row["gained"] = row["gained"], row["lost"]
        row["difference"] = -row["difference"]
    (picture, *_) = STUDIES["prediction-flips"].view(result).pictures()
    assert "class plain changes most (+66.7 points)" in picture.description


def test_of_another_architecture_the_predictions_are_compared(
    written: ImageSet, tmp_path: Path
) -> None:
    result = prediction_flips(
        [Otherwise(1)], natural=Reads(0), data=written, output=tmp_path / "kept.json"
    )
    (this,) = result["comparisons"]
    check_by_hand(this)
    assert "weights" not in this
    assert "'more'" in this["no_weights"]
    view = STUDIES["prediction-flips"].view(result)
    assert "'more'" in view.finding
    assert [picture.name for picture in view.pictures()] == ["prediction-flips-classes-1"]
    assert view.tables[0].rows[0][-1] == "-"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ["data.limit=300", "data.validation=60", "natural.epochs=2", "training.epochs=1"]
    settings += ["attack.steps=1", "method=at"]
    path = tmp_path_factory.mktemp("flips") / "run"
    return cure.train("digits", settings, run=path, quiet=True).path


def test_the_command_finds_the_natural_start(run: Path, command: Command) -> None:
    ended = command("analyse", "prediction-flips", run, "--limit", 100, "--device", "cpu")
    assert ended.status == 0, ended
    assert "run loses" in ended.out
    kept_in = run / "studies" / "prediction-flips-1.json"
    result = json.loads(kept_in.read_text())
    (this,) = result["comparisons"]
    assert (this["natural"], this["robust"]) == ("natural", "run")
    # The same counts from the two networks themselves.
    first, second = cure.Run(run / "natural").model(), cure.Run(run).model()
    images = cure.data.load(cure.Run(run).config.data, "test").subset(slice(0, 100))
    right = [
        net(images.image.float() / 255).argmax(dim=1) == images.label for net in (first, second)
    ]
    assert this["lost"] == int((right[0] & ~right[1]).sum())
    assert this["gained"] == int((right[1] & ~right[0]).sum())
    assert len(this["weights"]["tensors"]) == len(list(first.parameters()))
    assert this["weights"]["distance"] > 0


def test_starts_of_one_name_are_told_apart_by_their_runs(run: Path, tmp_path: Path) -> None:
    other, natural = tmp_path / "other", tmp_path / "more" / "natural"
    shutil.copytree(run, other)
    shutil.copytree(run, natural)
    result = prediction_flips([run, other], limit=20, device="cpu")
    pairs = [(this["natural"], this["robust"]) for this in result["comparisons"]]
    assert pairs == [("run/natural", "run"), ("other/natural", "other")]
    result = prediction_flips(natural, limit=20, device="cpu")
    (this,) = result["comparisons"]
    assert (this["natural"], this["robust"]) == ("natural/natural", "natural")


def test_a_run_that_started_from_another_run(run: Path, tmp_path: Path) -> None:
    settings = [f"start={run / 'natural'}", "data.limit=300", "data.validation=60", "method=at"]
    settings += ["training.epochs=1", "attack.steps=1"]
    second = cure.train("digits", settings, run=tmp_path / "second", quiet=True).path
    result = prediction_flips([run, second], limit=50, device="cpu", output=tmp_path / "kept.json")
    pairs = [(this["natural"], this["robust"]) for this in result["comparisons"]]
    assert pairs == [("natural", "run"), ("natural", "second")]
    assert list(result["models"]) == ["run", "second", "natural"], "loaded once"


def test_classes_that_are_no_classes_of_the_run(run: Path, written: ImageSet) -> None:
    build = Target.of(run).build
    with pytest.raises(DataError, match="'written' has other classes than the run"):
        build(written)
    turned = ImageSet(written.image, written.label, tuple("9876543210"), "turned", "test")
    with pytest.raises(DataError, match="'turned' has the run's classes in another order"):
        build(turned)


def test_mixed_weights_need_to_be_told_their_start(run: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    shutil.rmtree(mixed / "natural")
    with pytest.raises(ConfigError, match=r"no natural start of its own.*--natural"):
        prediction_flips(mixed)


def test_bad_input_is_one_sentence(run: Path, command: Command, tmp_path: Path) -> None:
    before = sorted(run.rglob("*"))
    refused(
        command("analyse", "prediction-flips", run / "natural"), "no natural start", "--natural"
    )
    refused(command("analyse", "prediction-flips", "small_cnn"), "small_cnn", "--natural")
    refused(command("analyse", "prediction-flips", run, "--tolerance", -1), "tolerance", "-1")
    refused(command("analyse", "prediction-flips", run, "--limit", 0), "limit")
    (tmp_path / "there.json").write_text("mine")
    refused(
        command("analyse", "prediction-flips", run, "--output", tmp_path / "there.json"), "exists"
    )
    assert (tmp_path / "there.json").read_text() == "mine"
    assert sorted(run.rglob("*")) == before


def test_a_network_in_python_needs_to_be_told_its_start(written: ImageSet) -> None:
    with pytest.raises(ConfigError, match="Reads is no run"):
        prediction_flips(Reads(0), data=written)


def trained(path: Path, images: ImageSet | None = None, **more: Any) -> cure.Run:
    """A run of one epoch."""
    settings = {
        "model": {"name": "small_cnn", "options": {"width": 2}},
        "data.validation": 16,
        "attack.steps": 1,
        "training.epochs": 1,
        "training.batch_size": 16,
        "training.threads": 1,
        "training.validation_steps": 1,
    }
    data = bright_or_dark() if images is None else images
    return cure.train("digits", settings | more, data=data, run=path, quiet=True)


def test_weights_in_a_file_are_a_start_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    first = trained(tmp_path / "natural", method="natural", start="scratch")
    with pytest.raises(ConfigError, match="no natural start"):
        start_of(first)
    trained(tmp_path / "at", method="at", start="~/natural")
    assert start_of("~/at") == first.path
    file = tmp_path / "weights.safetensors"
    shutil.copy(RunFolder.open(first.path).weights("best"), file)
    second = trained(tmp_path / "second", method="at", start=str(file))
    hat = {"natural.epochs": 1, "method": "hat"}
    assert start_of(trained(tmp_path / "taught", **hat, start=str(first.path))) == first.path
    robust = trained(tmp_path / "robust", method="at", start="robust:at")
    assert start_of(robust) == robust.path / "head"
    (this,) = prediction_flips(second, data=bright_or_dark(), device="cpu")["comparisons"]
    assert (this["natural"], this["robust"]) == ("second/start", "second")
    network = start_of(second)
    assert isinstance(network, torch.nn.Module)
    expected = first.model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_a_start_of_other_classes_is_taken_with_the_head_of_the_run(tmp_path: Path) -> None:
    first = trained(tmp_path / "first", method="natural", start="scratch")
    three, more = bright_or_dark(classes=3), {"start": str(first.path), "new_head": True}
    second = trained(tmp_path / "second", three, method="at", **more)
    result = prediction_flips(second, data=three, device="cpu", output=tmp_path / "kept.json")
    assert result["comparisons"][0]["n"] == len(three)


def test_runs_of_images_in_memory_have_splits_of_their_own(tmp_path: Path) -> None:
    images, more = bright_or_dark(), {"method": "natural", "start": "scratch"}
    runs = [
        trained(tmp_path / f"run{seed}", images, **more | {"data.split_seed": seed})
        for seed in (0, 1)
    ]
    result = prediction_flips(runs, natural=runs[0], data=images, device="cpu")
    assert [this["n"] for this in result["comparisons"]] == [len(images)] * 2
