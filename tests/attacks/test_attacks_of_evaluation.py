"""The attacks that evaluation names, against closed forms on linear models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.registry import (
    evaluation_attack,
    known_attacks,
)
from cure.config import Ratio
from cure.data import ImageSet
from cure.errors import ConfigError
from cure.evaluation.metrics import smallest
from cure.evaluation.runner import Curve, measure
from linear_models import ENGINE, image_set, linear, linear_case, margins, unit

DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}


def distances(model: nn.Sequential, images: ImageSet, norm: str) -> Tensor:
    """How far each image is from the nearest boundary [N], 0 where it is wrong; boxes aside."""
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    lead, slope = margins(weight, bias, images, DUAL[norm])
    return (lead / slope).amin(dim=1).clamp_min(0)


def wide_case(count: int = 60) -> tuple[nn.Sequential, ImageSet]:
    """A linear model of three classes on mid-range images of 3 x 16 x 16, all classified right."""
    draws = torch.Generator().manual_seed(5)
    pixels = 3 * 16 * 16
    weight = 3 * torch.randn(3, pixels, generator=draws) / pixels**0.5
    image = torch.randint(64, 192, (count, 3, 16, 16), generator=draws).to(torch.uint8)
    bias = -(image / 255).flatten(1).mean(dim=0) @ weight.T
    model = linear(weight, bias).requires_grad_(False)
    label = model(image / 255).argmax(dim=1)
    return model, image_set(image, label, 3)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_one_step_is_exact_on_two_classes(norm):
    epsilon = 0.05 if norm == "Linf" else 0.2
    model, images, _, robust = linear_case(2, epsilon, dual=DUAL[norm])
    result = measure(model, images, ["fgsm"], Threat(norm, epsilon), engine=ENGINE)
    assert result["attacks"]["fgsm"]["correct"] == int(robust.sum())
    assert result["attacks"]["fgsm"]["largest_change"] == pytest.approx(epsilon, rel=1e-4)


def test_passes_are_counted_in_images():
    model, images, right, robust = linear_case(2, 0.05)
    attacks = ["fgsm", "pgd7", "pgd3:restarts=2", "noise"]
    result = measure(model, images, attacks, Threat("Linf", 0.05), engine=ENGINE, batch_size=7)
    asked, stand = int(right.sum()), int(robust.sum())
    passes = {name: part["passes"] for name, part in result["attacks"].items()}
    assert passes["fgsm"] == {"forward": asked, "backward": asked}
    assert passes["pgd7"] == {"forward": 7 * asked, "backward": 7 * asked}
    # The second restart is for those that stand after the first.
    fell = result["attacks"]["pgd3:restarts=2"]["fooled_by"]["restart 1"]
    again = 3 * (asked + asked - fell)
    assert passes["pgd3:restarts=2"] == {"forward": again, "backward": again}
    assert passes["noise"] == {"forward": 0, "backward": 0}
    assert stand < asked


def test_restarts_add_up_and_start_elsewhere():
    model, images, _, _ = linear_case(4, 0.05, count=90)
    threat = Threat("Linf", 0.05)
    one = evaluation_attack("pgd1:step=0.001:restarts=3")
    image, label = unit(images), images.label
    starts = [part.run(model, image, label, threat, 0, 0) for part in one.parts.values()]
    assert len(starts) == 3
    assert not torch.allclose(starts[0], starts[1], atol=0.01)
    result = measure(model, images, [one.name, "pgd1:step=0.001"], threat, engine=ENGINE)
    several, single = (result["attacks"][n] for n in (one.name, "pgd1:step=0.001"))
    # The first restart is the attack without restarts.
    fell = result["natural"]["correct"] - single["correct"]
    assert several["fooled_by"]["restart 1"] == fell
    assert several["correct"] <= single["correct"]
    assert several["settings"]["restarts"] == 3


def test_noise_is_as_long_as_allowed_and_weaker_than_a_step():
    model, images, _, robust = linear_case(2, 0.05)
    for norm, epsilon in (("Linf", 0.05), ("L2", 0.4)):
        result = measure(model, images, ["noise", "pgd20"], Threat(norm, epsilon), engine=ENGINE)
        noise, attack = result["attacks"]["noise"], result["attacks"]["pgd20"]
        assert noise["largest_change"] == pytest.approx(epsilon, rel=1e-4)
        assert attack["correct"] < noise["correct"] <= result["natural"]["correct"]
    del robust


@pytest.mark.parametrize(
    ("name", "norm", "excess"),
    [
        ("fmn", "Linf", 1.01),
        ("fmn", "L1", 1.05),
        ("ddn", "L2", 1.2),
        # It overshoots by 2 %; in Linf it also moves pixels that the margin does not ask for.
        ("deepfool", "L2", 1.03),
        ("deepfool", "Linf", 1.1),
        ("cw-l2", "L2", 1.6),
    ],
)
def test_smallest_changes_are_the_distances_to_the_boundary(name, norm, excess):
    pytest.importorskip("foolbox")
    model, images = wide_case(12 if name == "cw-l2" else 60)
    exact = distances(model, images, norm)
    radius = float(exact.median()) * 1.5
    threat = Threat(norm, radius)
    found = evaluation_attack(name).parts[name].run(model, unit(images), images.label, threat, 0, 0)
    ratio = threat.distance(found - unit(images)) / exact
    fools = model(found).argmax(dim=1) != images.label
    # FMN finds nothing for a few images that lie close to the boundary.
    assert int(fools.sum()) >= 0.9 * len(images)
    # None can be nearer than the boundary.
    assert float(ratio[fools].min()) > 0.999
    assert float(ratio[fools].median()) < excess, ratio
    result = measure(model, images, [name], threat, engine=ENGINE)["attacks"][name]
    middle = float(exact.median())
    assert 0.9 * middle < result["median_distance"] < 2 * middle
    low, high = result["median_interval"]
    assert low <= result["median_distance"] <= high
    assert int((exact > radius).sum()) <= result["correct"] < len(images)


def test_an_attack_is_refused_in_a_norm_that_it_is_not_made_for():
    model, images = wide_case(4)
    for name, norm, known in (("cw-l2", "Linf", "L2"), ("fmn", "L2", "Linf or L1")):
        with pytest.raises(ConfigError, match=f"{name} is an attack in {known}, the threat is in"):
            measure(model, images, [name], Threat(norm, 0.2), engine=ENGINE)


def test_median_and_interval_by_hand():
    made = smallest(torch.tensor([0.0, 0.1, 0.2, 0.3, math.inf], dtype=torch.float64))
    assert made["median_distance"] == pytest.approx(0.2)
    # 5 images: 2.5 -+ 1.96 sqrt(5) / 2 = 0.3 and 4.7, so the smallest and the largest.
    assert made["median_interval"] == [0.0, None]
    assert made["distance_curve"][0] == [0.0, pytest.approx(80.0)]
    assert made["distance_curve"][-1] == [None, 0.0]


def test_the_curve_is_the_closed_form_and_falls_to_nothing():
    model, images, _, _ = linear_case(2, 0.05)
    exact = distances(model, images, "Linf")
    radii = tuple(Ratio(text) for text in ("0.01", "0.05", "0.1", "0.9", "1"))
    result = measure(
        model, images, [], Threat("Linf", 0.05), engine=ENGINE, curve=Curve("fgsm", radii)
    )
    points = result["curve"]["points"]
    assert [point["epsilon_text"] for point in points] == ["0.01", "0.05", "0.1", "0.9"]
    for point, radius in zip(points[:3], radii, strict=False):
        assert point["correct"] == int((exact > radius).sum())
    assert points[-1]["correct"] == 0
    assert result["attacks"] == {}


def test_a_transfer_from_the_network_itself_is_the_attack_and_from_another_is_weaker():
    model, images, _, robust = linear_case(2, 0.05)
    torch.manual_seed(3)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    threat = Threat("Linf", 0.05)
    own = measure(model, images, ["transfer"], threat, engine=ENGINE, source=model)
    assert own["attacks"]["transfer"]["correct"] == int(robust.sum())
    foreign = measure(model, images, ["transfer"], threat, engine=ENGINE, source=other)
    assert foreign["attacks"]["transfer"]["correct"] > int(robust.sum())
    # Crafted on the other network, and not again on this one.
    assert foreign["attacks"]["transfer"]["passes"]["backward"] > 0
    with pytest.raises(ConfigError, match=r"--transfer TARGET"):
        measure(model, images, ["transfer"], threat, engine=ENGINE)


@pytest.mark.parametrize("name", ["autoattack-plus", "autoattack-rand", "apgd-ce", "square"])
def test_versions_and_single_parts_of_autoattack(name):
    model, images, _, robust = linear_case(4, 0.03, count=9, gap=0.02)
    part = measure(model, images, [name], Threat("Linf", 0.03), engine=ENGINE)["attacks"][name]
    assert part["correct"] == int(robust.sum())
    parts = {
        "autoattack-plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
        "autoattack-rand": ["apgd-ce", "apgd-dlr"],
    }.get(name, [name])
    assert part["settings"]["parts"] == parts


def test_autoattack_in_l1():
    model, images = wide_case(9)
    exact = distances(model, images, "L1")
    radius = float(exact.sort().values[4]) * 1.2
    result = measure(model, images, ["autoattack"], Threat("L1", radius), engine=ENGINE)
    part = result["attacks"]["autoattack"]
    # A pixel can move by 0.25 at least, so the ball in the box is a little smaller than the ball.
    assert int((exact > radius).sum()) <= part["correct"] <= int((exact > radius / 1.4).sum())
    assert part["correct"] < len(images)
    assert part["largest_change"] <= radius * 1.0001
    with pytest.raises(ConfigError, match=r"pgd20 is an attack in Linf or L2, the threat is in L1"):
        measure(model, images, ["pgd20"], Threat("L1", 0.6), engine=ENGINE)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pgd", "unknown attack"),
        ("pgd0", "unknown attack"),
        ("fgsm:step=1", "only pgdK and cw take options"),
        ("pgd20:steps=3", "unknown option 'steps'"),
        ("pgd20:restarts=0", "whole number above 0"),
        ("pgd20:restarts=two", "whole number above 0"),
        ("pgd20:step=-1/255", "step such as 2/255"),
        ("pgd20:step=__import__('os')", "step such as 2/255"),
        ("pgd20:start=black", "uniform, gaussian or none"),
        ("pgd20:", "unknown option ''"),
    ],
)
def test_what_is_no_attack(name, why):
    with pytest.raises(ConfigError, match=why):
        evaluation_attack(name)


def test_names_say_what_differs_from_the_usual():
    assert evaluation_attack("pgd20:restarts=1:start=uniform").name == "pgd20"
    assert evaluation_attack("pgd-20").name == "pgd20"
    made = evaluation_attack("cw:steps=50:start=none:step=1/255")
    assert made.name == "cw:steps=50:step=1/255:start=none"
    assert made.settings["steps"] == 50
    assert set(known_attacks()) >= {
        "natural",
        "fgsm",
        "pgd20",
        "autoattack-rand",
        "fmn",
        "cw-l2",
        "transfer",
    }
