"""The study ``landscape``: planes of linear networks by hand, and networks that come back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cure
from cure.analysis.landscape import (
    directions_of_images,
    filter_normalised,
    landscape,
    movable,
)
from cure.analysis.study import STUDIES
from cure.attacks import Threat
from cure.data import ImageSet
from cure.errors import ConfigError, ModelError
from cure.utils.random import generator
from helpers import Command, refused

SLOPE = 3.0


class Linear(nn.Module):
    """Two logits, -s and s, with s linear in an image of 3 x 3 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(9, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 9)[None] * SLOPE + 0.1)
            self.linear.bias.copy_(-0.5 * self.linear.weight.sum()[None])

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        score = self.linear(image.flatten(1))
        return torch.cat([-score, score], dim=1)


def greys(count: int = 20) -> ImageSet:
    """So near to grey that no change of the tests is clipped."""
    draws = torch.Generator().manual_seed(3)
    image = torch.randint(100, 155, (count, 1, 3, 3), generator=draws, dtype=torch.uint8)
    label = (Linear().eval()(image.float() / 255)[:, 1] > 0).long()
    label[:4] = 1 - label[:4]
    return ImageSet(image, label, ("zero", "one"), "greys", "test")


def by_hand(score: Any, label: Any) -> tuple[float, float]:
    """Mean cross-entropy of the logits (-s, s), which is log(1 + exp(-2 y s)); and accuracy."""
    lead = np.where(label == 1, score, -score)
    return float(np.log1p(np.exp(-2 * lead)).mean()), 100 * float((lead > 0).mean())


def test_each_filter_of_a_direction_is_as_long_as_the_networks() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        network[0].weight[1] = 0
    direction = filter_normalised(network, generator("cpu", 0, "any"))
    assert list(direction) == ["0.weight", "3.weight"]
    for name, drawn in direction.items():
        weight = dict(network.named_parameters())[name].detach()
        for ours, theirs in zip(drawn, weight, strict=True):
            assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-5)
    again = filter_normalised(network, generator("cpu", 0, "any"))
    other = filter_normalised(network, generator("cpu", 1, "any"))
    assert torch.equal(direction["3.weight"], again["3.weight"])
    assert not torch.equal(direction["3.weight"], other["3.weight"])
    # Within a filter it is what was drawn.
    drawn = torch.randn(network[0].weight.shape, generator=generator("cpu", 0, "any"))
    ratio = direction["0.weight"][0] / drawn[0]
    torch.testing.assert_close(ratio, ratio.flatten()[:1].expand(2, 3, 3).reshape(2, 3, 3))


def test_weights_come_back_to_the_bit_also_on_errors() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    direction = {"0.weight": torch.full((4, 5), 1e6 / 3)}
    with pytest.raises(ZeroDivisionError), movable(network) as move:  # noqa: PT012
        move([direction, direction], (0.1, 0.2))
        expected = before["0.weight"] + 0.1 * direction["0.weight"] + 0.2 * direction["0.weight"]
        torch.testing.assert_close(network[0].weight.detach(), expected)
        assert torch.equal(network[1].weight, before["1.weight"])
        move([direction], (-1e9,))
        raise ZeroDivisionError
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_two_directions_of_images(norm: Any) -> None:
    images, network = greys(), Linear().eval()
    threat = Threat(norm, 0.25)
    image = images.image.float() / 255
    steepest, random = directions_of_images(
        network, image, images.label, threat, generator("cpu", 0, "d")
    )
    torch.testing.assert_close(threat.distance(steepest), torch.full((20,), 0.25))
    torch.testing.assert_close(threat.distance(random), torch.full((20,), 0.25))
    weight = network.linear.weight.detach().view(1, 3, 3)
    away = torch.where(images.label == 1, -1.0, 1.0)[:, None, None, None]
    towards = weight.sign() if norm == "Linf" else weight / weight.norm()
    torch.testing.assert_close(steepest, 0.25 * away * towards)
    if norm == "Linf":
        assert bool((random.abs() == 0.25).all())
        assert 0.3 < float((random > 0).float().mean()) < 0.7
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_planes_of_a_linear_network_by_hand() -> None:
    images, told = greys(), []
    result = landscape(
        Linear(),
        data=images,
        points=5,
        epsilon="16/255",
        batch_size=8,
        seed=7,
        progress=lambda *words: told.append(words),
    )
    of = result["networks"]["Linear"]
    network = Linear()
    image = (images.image.float() / 255).flatten(1).double().numpy()
    label = images.label.numpy()
    weight = network.linear.weight.detach().double().numpy()[0]
    bias = float(network.linear.bias.detach())
    # Around images: along the gradient each score falls by epsilon |w|_1, at random by w.r.
    epsilon, away = 16 / 255, np.where(label == 1, -1.0, 1.0)
    draws = generator("cpu", 7, "landscape", "images")
    parts = [torch.randn((size, 1, 3, 3), generator=draws) for size in (8, 8, 4)]
    signs = np.sign(torch.cat(parts).flatten(1).double().numpy())
    assert of["input"]["steps"] == [-2, -1, 0, 1, 2]
    for row, second in enumerate(of["input"]["steps"]):
        for column, first in enumerate(of["input"]["steps"]):
            score = image @ weight + bias + first * epsilon * np.abs(weight).sum() * away
            score += second * epsilon * signs @ weight
            loss, accuracy = by_hand(score, label)
            assert of["input"]["natural"]["loss"][row][column] == pytest.approx(loss, rel=1e-4)
            assert of["input"]["natural"]["accuracy"][row][column] == pytest.approx(accuracy)
    # Around weights: the bias stays.  PGD reaches the corner of the ball on a linear network.
    adversarial = image + epsilon * away[:, None] * np.sign(weight)
    plane = [
        filter_normalised(network, generator("cpu", 7, "landscape", number))["linear.weight"]
        for number in (0, 1)
    ]
    one, other = (direction[0].double().numpy() for direction in plane)
    assert of["weights"]["steps"] == [-1, -0.5, 0, 0.5, 1]
    for row, second in enumerate(of["weights"]["steps"]):
        for column, first in enumerate(of["weights"]["steps"]):
            moved = weight + first * one + second * other
            for kind, inputs in (("natural", image), ("adversarial", adversarial)):
                loss, accuracy = by_hand(inputs @ moved + bias, label)
                assert of["weights"][kind]["loss"][row][column] == pytest.approx(loss, rel=1e-4)
                assert of["weights"][kind]["accuracy"][row][column] == pytest.approx(accuracy)
    # The curve is that of an evaluation.
    score = np.where(label == 1, 1, -1) * (image @ weight + bias)
    for point in of["curve"]["points"]:
        left = int((score > float(point["epsilon"]) * np.abs(weight).sum()).sum())
        assert point["correct"] == left
    assert {name for name, _, _ in told} >= {"Linear weights", "Linear images", "Linear natural"}
    assert ("Linear weights", 25, 25) in told
    json.dumps(result, allow_nan=False)


def test_recomputed_adversarial_images_are_never_weaker() -> None:
    fixed, anew = (
        landscape(Linear(), data=greys(), points=5, epsilon="16/255", recompute=recompute)
        for recompute in (False, True)
    )
    pairs = [of["networks"]["Linear"]["weights"]["adversarial"]["loss"] for of in (fixed, anew)]
    difference = np.array(pairs[1]) - np.array(pairs[0])
    assert difference.min() > -1e-4
    assert abs(difference[2, 2]) < 1e-4
    assert difference.max() > 0.05
    view = STUDIES["landscape"].view
    assert "lower bound" in view(fixed).figures[1].description
    assert "made anew" in view(anew).figures[1].description


def test_a_network_given_in_python_is_not_touched() -> None:
    network = Linear().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    landscape(network, data=greys(), points=5)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_masked_gradients_and_what_is_not_finite_are_said() -> None:
    result = landscape(Linear(), data=greys(), points=5)
    view = STUDIES["landscape"].view
    assert "masked" not in view(result).finding
    of = result["networks"]["Linear"]
    of["input"]["natural"]["loss"] = [[1.0] * 5 for _ in range(5)]
    of["input"]["natural"]["loss"][3][2] = 1.5
    assert "sign of masked gradients" in view(result).finding
    of["input"]["natural"]["loss"][2][3] = 2.0
    assert "masked" not in view(result).finding
    assert view(result).tables[0].rows[0][-1] == next(
        p["epsilon_text"]
        for p in of["curve"]["points"]
        if 2 * p["accuracy"] < of["natural"]["accuracy"]
    )
    # Half right at a radius that can make any image grey: an attack that fails, in Linf only.
    point = {"epsilon": 128 / 255, "epsilon_text": "128/255", "interval": [40.0, 60.0]}
    of["curve"]["points"] = [point | {"accuracy": 50.0, "correct": 10, "n": 20}]
    assert view(result).tables[0].rows[0][-1] == "-"
    assert "sign of masked gradients" in view(result).finding
    result["threat"]["norm"] = "L2"
    assert "masked" not in view(result).finding
    of["weights"]["natural"]["loss"][0][0] = None
    of["weights"]["adversarial"]["loss"] = [[None] * 5 for _ in range(5)]
    shown = view(result)
    assert shown.tables[0].rows[0][5] == "-"
    assert len(shown.pictures()) == 3


def test_pictures_and_hostile_names() -> None:
    result = landscape(Linear(), Linear(), data=greys(), points=5)
    hostile = json.loads(json.dumps(result).replace('"Linear"', '"$x$<script>alert(1)</script>"'))
    view = STUDIES["landscape"].view(hostile)
    drawn = view.pictures()
    assert [one.name for one in drawn] == [
        "landscape-curve",
        "landscape-weights-1",
        "landscape-images-1",
        "landscape-weights-2",
        "landscape-images-2",
    ]
    for one in drawn:
        assert "<script" not in one.svg
        assert len(one.svg) < 150_000
    assert "$x$&lt;script" in drawn[0].svg
    losses, curve = view.tables
    assert len(losses.rows) == 2
    assert len({len(cells) for cells in (curve.header, *curve.rows)}) == 1
    assert math.isclose(float(losses.rows[1][1]), by_hand_centre(), abs_tol=0.01)


def by_hand_centre() -> float:
    images, network = greys(), Linear()
    score = network.linear((images.image.float() / 255).flatten(1)).detach().flatten().numpy()
    return by_hand(score, images.label.numpy())[0]


def test_what_cannot_be_studied_is_said() -> None:
    for points in (3, 6, 11):
        with pytest.raises(ConfigError, match=f"5, 9, 13 .* got {points}"):
            landscape(Linear(), data=greys(), points=points)
    with pytest.raises(ConfigError, match="Linf or L2"):
        landscape(Linear(), data=greys(), norm="L1")
    with pytest.raises(ModelError, match="expected logits"):
        landscape(nn.Identity(), data=greys())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("landscape") / "tiny"
    settings = ["method={name: natural}", "start=scratch", "training.epochs=1"]
    cure.train("digits", settings, run=path, quiet=True)
    return path


def test_the_command(run: Path, command: Command, tmp_path: Path) -> None:
    ended = command("analyse", "landscape", run, "--limit", 12, "--points", 5)
    assert ended.status == 0, ended.err
    assert "Loss at the images and one epsilon" in ended.out
    kept = json.loads((run / "studies" / "landscape-1.json").read_text())
    assert kept["n"] == 12
    assert sorted(path.name for path in (run / "studies").iterdir()) == [
        "landscape-1-curve.svg",
        "landscape-1-images-1.svg",
        "landscape-1-weights-1.svg",
        "landscape-1.json",
    ]
    out = tmp_path / "out.json"
    refused(command("analyse", "landscape", run, "--points", 4, "--output", out), "got 4")
    refused(command("analyse", "landscape", run, "--norm", "L1", "--output", out), "L1")
    assert not out.exists()
