"""The verb ``corruptions``: by hand, from files, against baselines, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import cure
from cure.data import ImageSet
from cure.errors import ConfigError, CureError, DataError, ModelError
from cure.evaluation.corruptions import measure
from cure.evaluation.corruptions.constants import constants
from cure.evaluation.corruptions.operations import CORRUPTIONS, corrupt
from cure.utils.stats import wilson
from helpers import Command, refused

Result = dict[str, Any]


class Bright(nn.Module):
    """Class 1 where the mean of an image is above one half."""

    def __init__(self, slope: float = 50.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        score = self.slope * (image.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-score, score], dim=1)


def levels(side: int = 8, channels: int = 1) -> ImageSet:
    """52 even images, 0, 5, ... 255; those above 127.5 are of class 1."""
    level = torch.arange(0, 256, 5, dtype=torch.uint8)
    image = level[:, None, None, None].expand(-1, channels, side, side).contiguous()
    return ImageSet(image, (level > 127).long(), ("dark", "bright"), "levels", "test")


def noisy(count: int = 30) -> ImageSet:
    draws = np.random.default_rng(0)
    image = np.clip(draws.normal(127, 40, (count, 3, 12, 12)), 0, 255).astype(np.uint8)
    label = torch.from_numpy((image.mean(axis=(1, 2, 3)) > 127).astype(np.int64))
    return ImageSet(torch.from_numpy(image), label, ("dark", "bright"), "noisy", "test")


@pytest.fixture(autouse=True)
def no_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on machines that have the photographs of frost and on those that have not."""
    monkeypatch.setattr(measure, "frost_photographs", lambda: None)


def without(result: Any, *keys: str) -> Any:
    if isinstance(result, dict):
        return {k: without(v, *keys) for k, v in result.items() if k not in keys}
    return result


# By hand.


def test_brightness_and_contrast_by_hand() -> None:
    result = cure.corruptions(Bright(), data=levels(), only="contrast,brightness", severity="2-4")
    assert result["format"] == "cure-corruptions-1"
    assert result["natural"]["accuracy"] == 100
    assert list(result["corruptions"]) == ["brightness", "contrast"]
    for severity in (2, 3, 4):
        (added,) = constants("brightness", severity, 8)
        # Dark images that brightness lifts over one half are lost, no other.
        lost = sum(127 - int(255 * added) < level <= 127 for level in range(0, 256, 5))
        cell = result["corruptions"]["brightness"]["severities"][str(severity)]
        assert (cell["correct"], cell["n"]) == (52 - lost, 52)
        assert cell["accuracy"] == pytest.approx(100 * (52 - lost) / 52)
        assert cell["interval"] == list(wilson(52 - lost, 52))
        # An even image has no contrast to lose.
        assert result["corruptions"]["contrast"]["severities"][str(severity)]["accuracy"] == 100


def test_means_groups_and_intervals_by_hand() -> None:
    names = ["brightness", "contrast", "fog"]
    result = cure.corruptions(Bright(), data=levels(), only=names, severity=[1, 5])
    cells = result["corruptions"]
    table = {n: [cells[n]["severities"][s]["accuracy"] for s in ("1", "5")] for n in names}
    for name in names:
        assert cells[name]["accuracy"] == pytest.approx(np.mean(table[name]))
        assert cells[name]["group"] == CORRUPTIONS[name].group
    weather = [*table["brightness"], *table["fog"]]
    assert result["groups"]["weather"]["accuracy"] == pytest.approx(np.mean(weather))
    assert result["groups"]["weather"]["over"] == ["fog", "brightness"]
    assert list(result["groups"]) == ["weather", "digital"]
    for number, severity in enumerate(("1", "5")):
        expected = np.mean([table[name][number] for name in names])
        assert result["severities"][severity]["accuracy"] == pytest.approx(expected)
    assert result["means"] == {"benchmark": None, "all": None, "cure": None}
    # The interval of brightness: its two severities see the same 52 images.
    shares = []
    for level in range(0, 256, 5):
        right = [
            (level + int(255 * constants("brightness", s, 8)[0]) > 127) == (level > 127)
            for s in (1, 5)
        ]
        shares.append(np.mean(right))
    half = 196 * np.std(shares, ddof=1) / math.sqrt(52)
    mean = 100 * np.mean(shares)
    interval = [mean - half, min(100, mean + half)]
    assert cells["brightness"]["interval"] == pytest.approx(interval)


def test_all_nineteen_with_their_means() -> None:
    result = cure.corruptions(Bright(), data=noisy(), severity="3,5", batch_size=30)
    names = list(result["corruptions"])
    assert len(names) == 19
    assert "frost" not in names
    assert list(result["settings"]["left_out"]) == ["frost"]
    extras = {"speckle_noise", "gaussian_blur", "spatter", "saturate"}

    def mean(over: set[str], severities: str) -> float:
        cells = result["corruptions"]
        found = [cells[n]["severities"][s]["accuracy"] for n in over for s in severities]
        return float(np.mean(found))

    means = result["means"]
    assert len(means["benchmark"]["over"]) == 15
    assert means["benchmark"]["accuracy"] == pytest.approx(mean(set(names) - extras, "35"))
    assert means["all"]["accuracy"] == pytest.approx(mean(set(names), "35"))
    cure_names = set(names) - {"spatter", "saturate"}
    assert set(means["cure"]["over"]) == cure_names
    assert len(cure_names) == 17
    assert means["cure"]["accuracy"] == pytest.approx(mean(cure_names, "3"))
    assert means["cure"]["severities"] == [3]
    assert [len(group["over"]) for group in result["groups"].values()] == [4, 5, 5, 5]


def test_photographs_of_frost_are_taken_where_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "frost_photographs", lambda: tmp_path)
    names, left_out = measure._names(None, noisy(), None)
    assert len(names) == 19
    assert "frost" in names
    assert not left_out


def test_grey_images_have_no_saturation() -> None:
    result = cure.corruptions(Bright(), data=levels(), severity=1)
    assert len(result["corruptions"]) == 18
    assert "grey" in result["settings"]["left_out"]["saturate"]
    assert result["means"]["all"] is None
    assert result["means"]["benchmark"] is not None


def test_a_result_depends_on_the_seed_and_not_on_the_batch() -> None:
    names = "gaussian_noise,snow,glass_blur,elastic_transform"
    images, model = noisy(), Bright()
    # Near the boundary, so that the noise decides.
    changed = {"only": names, "data": images, "severity": 5}
    seen = {size: cure.corruptions(model, batch_size=size, **changed) for size in (1, 7, 30)}
    plain = [without(r, "seconds", "environment") for r in seen.values()]
    assert plain[0] == plain[1] == plain[2]
    give = measure._corrupted(images, 3)
    for name in names.split(","):
        together, alone = give(name, 2, 0, 30), give(name, 2, 17, 18)
        assert np.array_equal(together[17], alone[0])
        own = images.image[17].permute(1, 2, 0).contiguous().numpy()
        assert np.array_equal(alone[0], corrupt(own, name, 2, 3, 17))
        assert not np.array_equal(alone, measure._corrupted(images, 4)(name, 2, 17, 18))


def test_only_the_first_images() -> None:
    model = Bright()
    result = cure.corruptions(model.train(), data=levels(), only="fog", severity=1, limit=5)
    assert result["data"]["n"] == result["natural"]["n"] == 5
    assert result["data"]["classes_present"] == 1


def test_the_network_is_given_back_as_it_was() -> None:
    model = nn.Sequential(Bright())
    model.train()
    model[0].eval()
    cure.corruptions(model, data=levels(), only="fog", severity=1)
    assert (model.training, model[0].training) == (True, False)


def test_settings_tell_what_is_needed_to_do_it_again(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = cure.corruptions(
        Bright(), data=levels(40), only="fog", severity=1, seed=7, output=file
    )
    assert json.loads(file.read_text()) == result
    settings = result["settings"]
    assert result["seed"] == 7
    assert (settings["source"], settings["constants"]) == ("generated", "between")
    assert set(settings["versions"]) == {"numpy", "scipy", "pillow"}
    assert result["environment"]["packages"]["torch"]
    assert result["model"]["parameters"] == 1
    assert result["data"]["size"] == [1, 40, 40]


# The mean corruption error.


def baseline_of(result: Result, path: Path, **errors: float) -> Path:
    """The result with other accuracies: errors in percent by corruption, at every severity."""
    made = json.loads(json.dumps(result))
    for name, cell in made["corruptions"].items():
        for accuracy in cell["severities"].values():
            accuracy["accuracy"] = 100 - errors.get(name, 50.0)
    path.write_text(json.dumps(made))
    return path


def test_corruption_error_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cure.corruptions(Bright(), data=noisy(), severity="2,5")
    assert first["mce"] is None
    baseline_of(first, tmp_path / "b.json", fog=20.0, saturate=12.5)
    monkeypatch.setenv("HOME", str(tmp_path))
    result = cure.corruptions(Bright(), data=noisy(), severity="2,5", baseline="~/b.json")
    expected = {}
    for name, cell in first["corruptions"].items():
        errors = [100 - cell["severities"][s]["accuracy"] for s in ("2", "5")]
        reference = {"fog": 20.0, "saturate": 12.5}.get(name, 50.0)
        expected[name] = 100 * sum(errors) / (2 * reference)
    assert sum(expected.values()) > 0
    assert result["mce"]["corruptions"] == pytest.approx(expected)
    fifteen = first["means"]["benchmark"]["over"]
    mean = np.mean([expected[name] for name in fifteen])
    assert result["mce"]["benchmark"] == pytest.approx(mean)
    assert result["mce"]["all"] == pytest.approx(np.mean(list(expected.values())))
    assert result["mce"]["baseline"]["target"] == "Bright"


def test_a_model_is_100_percent_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"data": levels(), "only": "brightness", "severity": "1-5"}
    cure.corruptions(Bright(), **options, output=tmp_path / "bright.json")
    monkeypatch.setattr(measure, "BASELINES", tmp_path)
    result = cure.corruptions(Bright(), **options, baseline="bright")
    assert result["mce"]["corruptions"] == {"brightness": 100}
    assert result["mce"]["benchmark"] is None


def test_shipped_baselines_are_whole_results() -> None:
    names = [path.stem for path in measure.BASELINES.glob("*.json")]
    assert "cifar10-mini-natural" in names
    for name in names:
        shipped = measure._read_baseline(name)
        assert set(shipped["corruptions"]) == set(CORRUPTIONS)
        for cell in shipped["corruptions"].values():
            assert list(cell["severities"]) == ["1", "2", "3", "4", "5"]
        measure._check_baseline(
            shipped, list(CORRUPTIONS), [1, 2, 3, 4, 5], shipped["data"], "generated"
        )


def test_baselines_must_be_alike(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": levels(), "only": "brightness", "severity": "1,2"}
    result = cure.corruptions(Bright(), **options)
    good = baseline_of(result, tmp_path / "good.json")

    def complains(match: str, baseline: str | Path = good, **changed: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            cure.corruptions(Bright(), **(options | changed), baseline=baseline)

    complains("not measured under fog at severity 1", only="fog")
    complains("not measured under brightness at severity 3", severity="1-5")
    complains(r"same size \(\[1, 12, 12\]\), got \[1, 8, 8\]", data=levels(12))
    complains("no error under brightness", baseline_of(result, tmp_path / "0.json", brightness=0))
    complains("is no file", "none-such")
    complains("is no file", tmp_path / "none.json")
    other = tmp_path / "other.json"
    for text in ("{}", "[]"):
        other.write_text(text)
        complains("no whole result", other)
    other.write_text("nonsense")
    complains("cannot be read as JSON", other)
    other.write_text(json.dumps({"format": "cure-corruptions-1", "data": 3}))
    complains("no whole result", other)


# The benchmark's files.


def write_files(folder: Path, images: ImageSet, names: list[str]) -> dict[str, np.ndarray]:
    """A folder like CIFAR-10-C's, of our own corruptions; returns them."""
    folder.mkdir(exist_ok=True)
    give = measure._corrupted(images, 11)
    made = {}
    for name in names:
        made[name] = np.concatenate([give(name, s, 0, len(images)) for s in range(1, 6)])
        np.save(folder / f"{name}.npy", made[name])
    np.save(folder / "labels.npy", np.tile(images.label.numpy().astype(np.uint8), 5))
    return made


def test_files_are_read_severity_by_severity(tmp_path: Path) -> None:
    images, folder = noisy(20), tmp_path / "CIFAR-10-C"
    made = write_files(folder, images, ["fog", "snow"])
    result = cure.corruptions(Bright(), files=folder, data=images, severity="2,5")
    assert list(result["corruptions"]) == ["snow", "fog"]
    for name, array in made.items():
        for severity in (2, 5):
            part = array[(severity - 1) * 20 : severity * 20]
            right = (part.mean(axis=(1, 2, 3)) > 127.5) == images.label.numpy().astype(bool)
            cell = result["corruptions"][name]["severities"][str(severity)]
            assert cell["correct"] == right.sum()
    assert result["natural"]["n"] == 20
    assert result["seed"] is None
    assert result["settings"]["source"] == "files"
    assert result["settings"]["files"] == "CIFAR-10-C"
    assert result["settings"]["left_out"]["frost"] == "no file"
    first = cure.corruptions(Bright(), files=folder, data=images, severity=5, limit=3)
    right = made["fog"][80:83].mean(axis=(1, 2, 3)) > 127.5
    right = right == images.label[:3].numpy().astype(bool)
    assert first["corruptions"]["fog"]["severities"]["5"]["correct"] == right.sum()


def test_files_alone_have_no_natural_images(tmp_path: Path) -> None:
    images, sheet = noisy(20), tmp_path / "sheet.png"
    write_files(tmp_path / "c", images, ["fog"])
    np.save(tmp_path / "c" / "labels.npy", images.label.numpy())  # Once instead of five times.
    result = cure.corruptions(Bright(), files=tmp_path / "c", severity=1, sheet=sheet)
    assert result["natural"] is None
    assert result["data"]["classes"] == ["0", "1"]
    assert result["data"]["name"] == "c"
    assert sheet.is_file()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    images = noisy(10)
    folder = tmp_path / "c"

    def complains(match: str, **options: Any) -> None:
        with pytest.raises(DataError, match=match):
            cure.corruptions(Bright(), files=folder, **options)

    complains("which is no folder")
    folder.mkdir()
    complains(r"expected labels\.npy")
    np.save(folder / "labels.npy", images.label.numpy())
    complains(r"such as gaussian_noise\.npy")
    fog = write_files(folder, images, ["fog"])["fog"]
    complains(r"snow\.npy among the files", only="snow")
    complains("the 9 labels of 'noisy' test", data=images.subset(slice(0, 9)))
    smaller = ImageSet(images.image[:, :, :8, :8], images.label, images.classes, "cut", "test")
    complains("files' size, 3x12x12, got 3x8x8", data=smaller)
    for wrong, match in (
        (fog / 255, "of float64"),
        (fog[..., :1], r"\[50, 12, 12, 1\] of uint8"),
        (fog[:49], "same number of images for each of five severities"),
        (fog[:45], "expected 9 labels"),
        (np.array([{"a": 1}], dtype=object), "cannot be read as one.*Python objects"),
    ):
        np.save(folder / "fog.npy", wrong, allow_pickle=True)
        complains(match)
    (folder / "fog.npy").write_bytes(b"not an array")
    complains("cannot be read as one")
    np.save(folder / "fog.npy", fog)
    np.save(folder / "snow.npy", fog[:25])
    complains(r"\[50, 12, 12, 3\] in fog\.npy and \[25, 12, 12, 3\] in snow\.npy")
    np.save(folder / "snow.npy", fog)
    np.save(folder / "labels.npy", np.arange(50))
    complains("10 labels, or the same 10 five times")


def test_a_copy_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noisy(10)
    write_files(tmp_path / "data", images, ["fog"])
    asked = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        if name.startswith("no"):
            raise ConnectionError("no network")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    result = cure.corruptions(Bright(), files="some/cifar10-c", severity=1)
    assert asked == [("some/cifar10-c", {"repo_type": "dataset", "allow_patterns": ["*.npy"]})]
    assert result["settings"]["files"] == "some/cifar10-c"
    with pytest.raises(DataError, match=r"ConnectionError: no network.*folder of the \.npy files"):
        cure.corruptions(Bright(), files="no/such-thing", severity=1)


# The sheet of pictures.


@pytest.mark.parametrize("channels", [1, 3])
def test_the_sheet_shows_the_first_image(channels: int, tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, channels, 16, 24), generator=draws).to(torch.uint8)
    images = ImageSet(image, torch.tensor([0, 1, 0, 1]), ("a", "b"), "made", "test")
    sheet = tmp_path / "sheet.png"
    names = ["fog", "contrast"]
    cure.corruptions(Bright(), data=images, only=names, severity="1,4", sheet=sheet)
    picture = np.asarray(Image.open(sheet))
    height, width = 6 * 16 + 4, 6 * 24 + 4
    assert picture.shape == (24 + 2 * height, 150 + 3 * width, 3)
    first = image[0].permute(1, 2, 0).contiguous().numpy()
    for row, name in enumerate(names):
        cells = [first, corrupt(first, name, 1, 0, 0), corrupt(first, name, 4, 0, 0)]
        for column, cell in enumerate(cells):
            top, left = 24 + row * height, 150 + column * width
            shown = picture[top : top + 96 : 6, left : left + 144 : 6]
            assert np.array_equal(shown, np.broadcast_to(cell, (16, 24, 3))), (name, column)


# The command, and what is refused.


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``photos.npz`` and the network ``bright:build``."""
    images = levels(12, 3)
    pixels = images.image.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "photos.npz", images=pixels, labels=images.label.numpy())
    (tmp_path / "bright.py").write_text(
        "from torch import nn\n\n"
        "def build():\n"
        "    layer = nn.Linear(12 * 12 * 3, 2)\n"
        "    nn.init.constant_(layer.weight, 1.0)\n"
        "    layer.weight.data[0] *= -1\n"
        "    layer.bias.data[:] = 216 * (1 - 2 * (layer.bias * 0 + 1).cumsum(0).sub(1)).detach()\n"
        "    return nn.Sequential(nn.Flatten(), layer)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bright", raising=False)
    return tmp_path


OPTIONS = ("--model", "bright:build", "--data", "photos.npz", "--data-option", "test_fraction=0.5")


def test_the_command(place: Path, command: Command) -> None:
    asked = ("corruptions", *OPTIONS, "--only", "brightness,fog", "--severity", "1-3")
    ended = command(*asked, "--output", "a.json", "--sheet", "a.png")
    assert ended.status == 0, ended.err
    result = json.loads((place / "a.json").read_text())
    for name, cell in result["corruptions"].items():
        (line,) = [line for line in ended.out.splitlines() if f" {name} " in line]
        for severity in "123":
            assert f" {cell['severities'][severity]['accuracy']:.1f} " in line
        assert f"{cell['accuracy']:.1f} (" in line
    assert "natural" in ended.out
    assert (place / "a.png").is_file()
    ended = command(*asked, "--baseline", "a.json")
    assert ended.status == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if " brightness " in line]
    assert " 100.0 " in line.split("(")[1]


def test_the_command_refuses(place: Path, command: Command) -> None:
    asked = ("corruptions", *OPTIONS)
    refused(command(*asked, "--only", "fogg"), "did you mean 'fog'")
    refused(command(*asked, "--only", ","), "got none")
    refused(command(*asked, "--only", "frost"), "imagecorruptions", "frost_procedural")
    for severity in ("0", "6", "a", "1-9", "3-1", "2,3-1", ""):
        refused(command(*asked, "--severity", severity), "1 to 5", f"'{severity}'")
    refused(command(*asked, "--sheet", "a.jpg"), ".png")
    (place / "there.json").write_text("kept")
    refused(command(*asked, "--output", "there.json"), "exists")
    refused(command(*asked, "--files", "nowhere"), "nowhere", "no folder")
    refused(command(*asked, "--limit", "0"), "limit")
    refused(command("corruptions"), "--model")
    refused(command("corruptions", "some-run", "--mean", "0.5"), "--model")
    assert (place / "there.json").read_text() == "kept"


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for word, value in launch.items():
        monkeypatch.setenv(word, str(value))
    with pytest.raises(ConfigError, match="one process, got 2 ranks"):
        cure.corruptions(Bright(), data=levels())


def test_what_no_corruption_can_be_measured_on(tmp_path: Path) -> None:
    class Certain(Bright):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image).softmax(dim=1)

    output = tmp_path / "a.json"
    for model, images, kind, match in (
        (Certain(), levels(), ModelError, "probabilities"),
        (Bright(), levels(6), DataError, "8x8 pixels or more, got 6x6"),
    ):
        with pytest.raises(CureError, match=match) as caught:
            cure.corruptions(model, data=images, severity=1, output=output)
        assert isinstance(caught.value, kind)
    with pytest.raises(ConfigError, match=r"saturate cannot be measured.*grey"):
        cure.corruptions(Bright(), data=levels(), only="saturate")
    assert not output.exists()


def test_every_corruption_is_listed(command: Command) -> None:
    ended = command("list", "corruptions")
    assert [line.split()[0] for line in ended.out.splitlines()] == list(CORRUPTIONS)
    assert "noise: " in ended.out
