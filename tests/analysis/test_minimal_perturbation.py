"""The study ``minimal-perturbation``: closed forms, foolbox, medians by hand, and what is drawn."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import cure
from cure.analysis import minimal_perturbation as study
from cure.analysis.minimal_perturbation import least_change, median, minimal_perturbation
from cure.analysis.study import STUDIES
from cure.attacks import Threat
from cure.data import ImageSet
from cure.errors import ConfigError, ModelError
from helpers import Command, refused

SHAPE = (1, 4, 4)


class Linear(nn.Module):
    """Logits that are linear in the image."""

    def __init__(self, classes: int = 3, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(16, classes)
        with torch.no_grad():
            self.linear.weight.mul_(scale)
            self.linear.bias.mul_(scale)

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        logits: Tensor = self.linear(image.flatten(1))
        return logits


class Ball(nn.Module):
    """Class 0 inside a ball of radius 0.3 around grey."""

    def forward(self, image: Tensor) -> Tensor:
        inside = 0.09 - (image - 0.5).square().flatten(1).sum(dim=1)
        return torch.stack([inside, torch.zeros_like(inside)], dim=1)


def middling(count: int = 12, spread: float = 0.1) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return 0.5 + spread * (2 * torch.rand((count, *SHAPE), generator=draws) - 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_of_a_linear_network_it_is_the_distance_to_the_nearest_plane(norm: str) -> None:
    model, image = Linear(), middling()
    logits = model.eval()(image).detach()
    label = logits.argmax(dim=1)
    label[3] = logits[3].argmin()
    found, distance = least_change(model, image, label, norm, classes=3)  # type: ignore[arg-type]
    weight = model.linear.weight.detach()
    for place in range(12):
        if place == 3:
            assert distance[3] == 0
            assert torch.equal(found[3], image[3])
            continue
        own, gaps = int(label[place]), []
        for other in {0, 1, 2} - {own}:
            normal = weight[own] - weight[other]
            length = normal.abs().sum() if norm == "Linf" else normal.norm()
            gaps.append(float((logits[place, own] - logits[place, other]) / length))
        # Up to what rounding in float32 asks for.
        assert 0.999 * min(gaps) <= float(distance[place]) <= 1.01 * min(gaps)
    change = Threat(norm, 0.0).distance(found - image).double()  # type: ignore[arg-type]
    torch.testing.assert_close(change, distance)
    assert bool((model(found).argmax(dim=1) != label).all())
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize("way", [{"rounds": 0}, {"targets": 0, "rounds": 8}])
def test_each_of_its_two_attacks_finds_the_boundary_of_a_ball(way: dict[str, int]) -> None:
    image = middling(6, 0.04)
    label = torch.zeros(6, dtype=torch.int64)
    _, distance = least_change(Ball().eval(), image, label, "L2", classes=2, **way)
    expected = 0.3 - (image - 0.5).flatten(1).norm(dim=1).double()
    assert bool((distance >= 0.999 * expected).all())
    assert bool((distance <= 1.1 * expected).all())


def test_nothing_is_found_where_nothing_fools_and_the_network_comes_back() -> None:
    model = Linear(2)
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.copy_(torch.tensor([1.0, 0.0]))
    image = middling(3)
    before = torch.get_rng_state()
    found, distance = least_change(
        model.eval(), image, torch.zeros(3, dtype=torch.int64), "Linf", classes=2, rounds=2
    )
    assert distance.tolist() == [math.inf] * 3
    assert torch.equal(found, image)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_is_no_worse_than_foolbox() -> None:
    from cure.attacks.foolbox_attacks import smallest_change

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 4)).eval()
    image = middling(20, 0.4)
    label = model(image).argmax(dim=1)
    theirs = smallest_change("fmn", model, image, label, Threat("Linf", 1.0)) - image
    _, ours = least_change(model, image, label, "Linf", classes=4)
    ratio = ours / Threat("Linf", 1.0).distance(theirs).double()
    assert float(ratio.median()) < 1.02
    assert float(ratio.max()) < 1.2


def test_medians_by_hand() -> None:
    # n = 10: P(X < 2) = 11/1024 = 0.0107, P(X < 3) = 56/1024 = 0.055: second and ninth.
    found = median([float(value) for value in (5, 3, 9, 1, 7, 2, 8, 4, 10, 6)])
    assert found == {"median": 5.5, "low": 2.0, "high": 9.0}
    # n = 8: P(X < 1) = 0.004, P(X < 2) = 0.035: the ends.
    found = median([float(value) for value in range(8)])
    assert found == {"median": 3.5, "low": 0.0, "high": 7.0}
    assert median([0.0, 1.0, math.inf]) == {"median": 1.0, "low": None, "high": None}
    assert median([math.inf] * 8)["median"] is None
    assert median([]) == {"median": None, "low": None, "high": None}
    # Six are just enough: 2 (1/2)^6 = 0.031.
    assert median([1.0, 2.0, 3.0, 4.0, 5.0, math.inf]) == {"median": 3.5, "low": 1.0, "high": None}


def test_the_interval_covers_the_median() -> None:
    draws = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        of = median(draws.exponential(size=25).tolist())
        assert of["low"] is not None
        assert of["high"] is not None
        hits += of["low"] <= math.log(2) <= of["high"]
    assert 375 <= hits < 400  # 0.957 for 25 values.


# The verb.


def two_classes(count: int = 24, side: int = 4) -> ImageSet:
    draws = torch.Generator().manual_seed(5)
    image = torch.randint(90, 165, (count, 1, side, side), generator=draws, dtype=torch.uint8)
    model = Linear(3).eval()
    size = (image.float() / 255)[:, :, :4, :4]
    label = model(size).argmax(dim=1)
    label[0] = (label[0] + 1) % 3
    return ImageSet(image, label, ("zero", "one", "<script>$x$</script>"), "planted", "test")


def test_who_alone_needs_the_largest_change() -> None:
    found = {"a": [1.0, 2.0, 3.0, 9.0], "b": [2.0, 2.0, math.inf, 0.0]}
    assert study._farthest(found, [0, 1, 2]) == {"a": 0, "b": 2}


def test_two_networks_that_decide_alike() -> None:
    images = two_classes()
    told: list[tuple[str, int, int]] = []
    result = minimal_perturbation(
        Linear(3),
        Linear(3, scale=5.0),
        data=images,
        shown=3,
        batch_size=10,
        progress=lambda *words: told.append(words),
    )
    one, two = result["networks"]["Linear"], result["networks"]["Linear-2"]
    assert one["distances"][0] == 0
    assert one["wrong"] == 1
    assert result["common"] == 23
    # Larger logits decide as the others do, so the distances are the same.
    np.testing.assert_allclose(one["distances"], two["distances"], rtol=0.01)
    values = torch.tensor(one["distances"], dtype=torch.float64)
    assert one["all"]["median"] == pytest.approx(float(values.quantile(0.5)), rel=1e-4)
    assert one["common"]["median"] == pytest.approx(float(values[1:].quantile(0.5)), rel=1e-4)
    assert told[-1] == ("Linear-2", 24, 24)
    assert all(0 <= done <= count for _, done, count in told)
    assert all(a[1] <= b[1] for a, b in pairwise(told) if a[0] == b[0])
    rows = result["shown"]["rows"]
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    assert len({row["label"] for row in rows}) == min(3, len(images.label[1:].unique()))
    json.dumps(result, allow_nan=False)


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_the_grid_holds_images_and_changes_on_one_scale() -> None:
    images = two_classes()
    result = minimal_perturbation(Linear(3), data=images, shown=2, norm="Linf")
    scale = result["shown"]["scale"]
    largest = 0.0
    for row in result["shown"]["rows"]:
        of = row["networks"]["Linear"]
        np.testing.assert_array_equal(decoded(row["image"]), images.image[row["index"], 0].numpy())
        assert of["after"] != row["label"]
        change = (decoded(of["change"]).astype(float) / 255 - 0.5) * 2 * scale
        assert np.abs(change).max() == pytest.approx(of["distance"], abs=scale / 100)
        added = decoded(of["adversarial"]).astype(float) - decoded(row["image"])
        np.testing.assert_allclose(added / 255, change, atol=scale / 100 + 1 / 255)
        largest = max(largest, of["distance"])
    assert scale == pytest.approx(largest, rel=1e-5)
    grid, curve = STUDIES["minimal-perturbation"].view(result).pictures()
    assert grid.svg.count("<image ") == 6
    assert grid.svg.count("image-rendering:pixelated") == 6
    assert "$x$" in json.dumps(result)
    for drawn in (grid, curve):
        assert "<script>" not in drawn.svg


def test_large_images_are_made_small_and_other_text_is_no_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Corner(Linear):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image[:, :, :4, :4])

    monkeypatch.setattr(study, "BUDGET", 540)
    images = two_classes(6, 32)
    result = minimal_perturbation(Corner(3), data=images, shown=2, batch_size=6)
    assert result["shown"]["smaller"]
    # Six files of one channel: 540 / (6 * 1.4) is 8 pixels a side.
    row = result["shown"]["rows"][0]
    np.testing.assert_array_equal(
        decoded(row["image"]), images.image[row["index"], 0, ::4, ::4].numpy()
    )
    view = STUDIES["minimal-perturbation"].view
    assert "Of larger images" in view(result).figures[0].description
    result["shown"]["rows"][0]["image"] = '"/><script>alert(1)</script>'
    with pytest.raises(ValueError, match="is no PNG"):
        view(result).pictures()


def test_findings_say_what_was_not_found_and_no_grid_without_images() -> None:
    class Deaf(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.tensor([[1.0, 0.0, -1.0]]).expand(len(image), -1) + 0 * image.sum()

    images, right = replace(two_classes(8), label=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])), 3
    result = minimal_perturbation(Deaf(), data=images, shown=2)
    of = result["networks"]["Deaf"]
    assert (of["wrong"], of["not_found"]) == (8 - right, right)
    view = STUDIES["minimal-perturbation"].view
    said = view(result).finding
    assert f"{right} images of Deaf" in said
    assert "cure diagnose" in said
    result["shown"]["rows"] = []
    assert len(view(result).pictures()) == 1


def test_what_cannot_be_studied_is_said() -> None:
    with pytest.raises(ConfigError, match="Linf or L2, the threat is in L1"):
        minimal_perturbation(Linear(3), data=two_classes(), norm="L1")
    with pytest.raises(ConfigError, match="0 to 8 images to show, got 9"):
        minimal_perturbation(Linear(3), data=two_classes(), shown=9)
    with pytest.raises(ModelError, match="2 logits but the data has 3 classes"):
        minimal_perturbation(Linear(2), data=two_classes())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perturbation") / "tiny"
    settings = ["method={name: natural}", "start=scratch", "training.epochs=1"]
    cure.train("digits", settings, run=path, quiet=True)
    return path


def test_the_command(run: Path, command: Command, tmp_path: Path) -> None:
    ended = command("analyse", "minimal-perturbation", run, "--limit", 12, "--shown", 2)
    assert ended.status == 0, ended.err
    assert (
        "Half of the 12 images are misclassified after a Linf change (1/255) of at most: tiny"
        in ended.out
    )
    kept = json.loads((run / "studies" / "minimal-perturbation-1.json").read_text())
    assert kept["networks"]["tiny"]["n"] == 12
    assert sorted(path.name for path in (run / "studies").iterdir()) == [
        "minimal-perturbation-1-curve.svg",
        "minimal-perturbation-1-images.svg",
        "minimal-perturbation-1.json",
    ]
    out = tmp_path / "out.json"
    refused(command("analyse", "minimal-perturbation", run, "--norm", "L1", "--output", out), "L1")
    refused(
        command("analyse", "minimal-perturbation", run, "--shown", 9, "--output", out), "0 to 8"
    )
    refused(command("analyse", "minimal-perturbation", run, "--limit", 0, "--output", out), "limit")
    assert not out.exists()
