"""Unseen threats, interval bounds and randomised smoothing, against closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import binom, norm
from torch import nn

import cure
from cure.attacks import Threat
from cure.cli.printing import print_beyond
from cure.data import ImageSet
from cure.errors import ConfigError, ModelError
from cure.evaluation.bounds import logit_bounds, verified_accuracy
from cure.evaluation.runner import measure
from cure.evaluation.smoothing import (
    certified_radius,
    class_counts,
    lower_bound,
    smoothed_accuracy,
)
from cure.evaluation.unseen import customary
from cure.models.resnet import resnet10
from cure.models.small_cnn import small_cnn
from cure.runs.results import EvaluationRecord
from cure.utils.engine import Engine

ENGINE = Engine.for_evaluation("cpu")


def images(count: int = 12, classes: int = 4, side: int = 8, channels: int = 1) -> ImageSet:
    draws = torch.Generator().manual_seed(3)
    image = torch.rand((count, channels, side, side), generator=draws)
    return ImageSet.of(image, torch.arange(count) % classes)


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(nn.Flatten(), layer).eval()


# Interval bounds.


def test_bounds_of_a_linear_network_are_exact() -> None:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn((3, 4), generator=draws)
    image, epsilon = 0.3 + 0.4 * torch.rand((5, 1, 2, 2), generator=draws), 0.1
    bounds = logit_bounds(linear(weight, torch.ones(3)), image, epsilon)
    middle = image.flatten(1).double() @ weight.double().T + 1
    reach = epsilon * weight.double().abs().sum(1)
    assert torch.allclose(bounds.lower, middle - reach)
    assert torch.allclose(bounds.upper, middle + reach)


def test_the_ball_ends_at_the_end_of_images() -> None:
    image = torch.tensor([0.05, 0.95]).view(1, 1, 1, 2)
    bounds = logit_bounds(linear(torch.eye(2), torch.zeros(2)), image, 0.1)
    assert bounds.lower.tolist()[0] == pytest.approx([0, 0.85])
    assert bounds.upper.tolist()[0] == pytest.approx([0.15, 1])


class Mixed(nn.Module):
    """All that has a rule: convolution, BatchNorm, pooling, residual, concatenation, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first((image - 0.5) / -0.25)))
        hidden = hidden + self.second(hidden)
        hidden = torch.cat([nn.functional.relu(hidden) - hidden, 2 + -3 * hidden], 1)
        return self.last(self.pool(hidden).mean(dim=(2, 3)).view(image.size(0), -1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mixed": Mixed,
    "small_cnn": lambda: small_cnn(4, 1, (8, 8), width=4),
    "resnet10": lambda: resnet10(4, 1, (8, 8), width=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_image_of_the_ball_leaves_the_bounds(name: str) -> None:
    torch.manual_seed(1)
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    image, epsilon = images().image[:2] / 255, 0.05
    bounds = logit_bounds(network, image, epsilon)
    draws = torch.Generator().manual_seed(2)
    exact = network.double()
    for kind in range(60):
        noise = 2 * torch.rand(image.shape, generator=draws) - 1
        noise = noise.sign() if kind % 2 else noise
        logits = exact((image + epsilon * noise).clamp(0, 1).double())
        assert (logits >= bounds.lower - 1e-9).all(), name
        assert (logits <= bounds.upper + 1e-9).all(), name
    point = logit_bounds(network, image, 0.0)
    assert torch.allclose(point.lower, exact(image.double()))
    assert torch.allclose(point.upper, point.lower)


@pytest.mark.parametrize("epsilon", [0.0005, 0.005, 0.05])
def test_attacks_never_go_below_what_is_proved(epsilon: float) -> None:
    torch.manual_seed(4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data, threat = images(40), Threat("Linf", epsilon)
    with torch.no_grad():
        label = network(data.image / 255).argmax(1)
    data = ImageSet.of(data.image, label, data.classes)
    proved = verified_accuracy(network, data, threat, engine=ENGINE)
    attacked = measure(network, data, ["pgd20", "apgd-ce"], threat, engine=ENGINE)
    assert proved["correct"] <= attacked["worst_case"]["correct"] <= 40
    if epsilon == 0.0005:
        assert proved["correct"] > 20


class InPlace(nn.Module):
    """Changes a tensor in place, and goes on with its first name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = image.flatten(1) * 2
        other = found
        if self.way == "+=":
            other += image.flatten(1)
        elif self.way == "-=":
            other -= 3
        elif self.way == "add_":
            found.add_(image.flatten(1))
        else:
            nn.functional.relu(found, inplace=True)
        logits: torch.Tensor = self.head(found)
        return logits


@pytest.mark.parametrize("way", ["add_", "relu", "+=", "-="])
def test_changes_in_place_are_changes_of_all_names(way: str) -> None:
    model = InPlace(way).eval()
    image = torch.rand((6, 1, 2, 2), generator=torch.Generator().manual_seed(1))
    if way in ("+=", "-="):
        # torch.fx loses these: what it traces is another function.
        with pytest.raises(ModelError, match="may change a tensor in place"):
            logit_bounds(model, image, 0.1)
        return
    bounds = logit_bounds(model, image, 0.0)
    logits = model(image).double()
    assert torch.allclose(bounds.lower, logits, atol=1e-6)
    assert torch.allclose(bounds.upper, logits, atol=1e-6)
    wider = logit_bounds(model, image, 0.1)
    moved = model((image + 0.1).clamp(0, 1))
    assert ((wider.lower - 1e-6 <= moved) & (moved <= wider.upper + 1e-6)).all()


def test_what_has_no_rule_is_refused() -> None:
    with pytest.raises(ModelError, match="got GELU; leave the bounds out"):
        logit_bounds(nn.Sequential(nn.Flatten(), nn.GELU()), images().image / 255, 0.1)

    class Branching(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image if image.sum() > 0 else -image

    with pytest.raises(ModelError, match=r"torch\.fx can trace \(TraceError"):
        logit_bounds(Branching(), images().image / 255, 0.1)
    with pytest.raises(ConfigError, match="for threats in Linf, got L2"):
        verified_accuracy(nn.Identity(), images(), Threat("L2", 0.5), engine=ENGINE)


# Randomised smoothing.


def test_the_bound_of_a_probability_is_clopper_and_pearson_s() -> None:
    assert lower_bound(50, 50, 0.001) == pytest.approx(0.001 ** (1 / 50))
    assert lower_bound(0, 50) == 0
    for hits in (1, 30, 49):
        bound = lower_bound(hits, 50, 0.01)
        # The probability of so many hits or more is alpha there.
        assert binom.sf(hits - 1, 50, bound) == pytest.approx(0.01)


def test_the_radius_of_a_linear_network_is_its_margin() -> None:
    """A linear classifier smoothed by noise has the radius margin / |w|, whatever the noise."""
    weight = torch.tensor([[0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    network = linear(weight, torch.tensor([-0.4, 0.0]))
    image = torch.tensor([0.5, 0.5, 0.2, 0.9]).view(1, 2, 2)
    exact = 0.3
    radii = []
    for seed in range(20):
        noise = torch.Generator().manual_seed(seed)
        found = certified_radius(network, image, 0.25, noise, estimation=4000, alpha=0.01)
        assert found is not None
        assert found[0] == 0
        radii.append(found[1])
    assert sum(radius > exact for radius in radii) <= 2
    assert sum(radii) / 20 == pytest.approx(exact, rel=0.08)
    sure = certified_radius(network, image, 0.01, torch.Generator().manual_seed(0))
    assert sure is not None
    assert sure[1] == pytest.approx(0.01 * norm.ppf(0.001 ** (1 / 1000)))


def test_a_coin_toss_abstains_and_is_counted_wrong() -> None:
    network = linear(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]), torch.tensor([-0.5, 0.5]))
    value = torch.tensor([128, 0, 255], dtype=torch.uint8)
    image = value[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    data = ImageSet.of(image, torch.tensor([0, 1, 1]), ("a", "b"))
    found = smoothed_accuracy(network, data, 0.25, engine=ENGINE)
    assert found["abstained"] == pytest.approx(100 / 3)
    assert found["correct"] == 1  # The second; the third is named "a" and abstaining is no answer.
    accuracies = [point["accuracy"] for point in found["points"]]
    assert [point["radius"] for point in found["points"]] == [0, 0.25, 0.5]
    # Its margin is 0.5, which a bound cannot reach.
    assert accuracies == pytest.approx([100 / 3, 100 / 3, 0])
    assert found == smoothed_accuracy(network, data, 0.25, engine=ENGINE) | {
        "seconds": found["seconds"]
    }
    with pytest.raises(ConfigError, match="standard deviation above 0, got -1"):
        smoothed_accuracy(network, data, -1.0, engine=ENGINE)


def test_logits_that_are_no_numbers_are_votes_for_no_class() -> None:
    class Broken(torch.nn.Module):
        """Class 0 on half of all noise, no number on the other half."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            first = torch.where(image.flatten(1)[:, 0] > 0.5, 1.0, torch.nan)
            return torch.stack([first, torch.zeros_like(first)], dim=1)

    noise = torch.Generator().manual_seed(0)
    counts = class_counts(Broken(), torch.full((1, 2, 2), 0.5), 0.25, 1000, 256, noise)
    assert counts[1] == 0
    assert 400 < counts[0] < 600


# Unseen threats.


def test_customary_radii_are_those_of_papers_and_grow_with_images() -> None:
    small, photo, tiny = 3 * 32 * 32, 3 * 224 * 224, 64
    given = {
        (norm, values): float(customary(norm, values).epsilon)
        for norm, values in itertools.product(("Linf", "L2", "L1"), (small, photo, tiny))
    }
    assert given["Linf", small] == 8 / 255
    assert given["Linf", photo] == 4 / 255
    assert (given["L2", small], given["L1", small]) == (0.5, 12)
    assert (given["L2", photo], given["L1", photo]) == (2, 255)
    assert given["L2", tiny] == pytest.approx(0.5 * (64 / 3072) ** 0.5, rel=1e-3)
    assert given["L1", tiny] == 0.25


def test_an_evaluation_has_unseen_threats_and_certificates(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    data = images(16)
    with torch.no_grad():
        label = network(data.image / 255).argmax(1)
    data = ImageSet.of(data.image, label, data.classes)
    result = cure.evaluate(
        network,
        data=data,
        attacks="pgd20",
        epsilon=0.01,
        unseen=True,
        bounds=True,
        smoothing=0.1,
        output=tmp_path / "result.json",
    )
    kept = EvaluationRecord.read(tmp_path / "result.json")
    titles = [title for title, _ in kept.beyond()]
    assert titles[:4] == [
        "L2 0.07217, not asked for: apgd-ce",
        "L2 0.07217, not asked for: apgd-t",
        "L2 0.07217, not asked for: worst case",
        "L1 0.25, not asked for: apgd-ce",
    ]
    assert titles[6:] == [
        "every attack in every norm",
        "proved by interval bounds, Linf 0.01",
        "smoothed by noise 0.1, certified in L2 0",
        "smoothed by noise 0.1, certified in L2 0.1",
        "smoothed by noise 0.1, certified in L2 0.2",
    ]
    print_beyond(result)
    printed = " ".join(capsys.readouterr().out.split())
    proved = f"{result['verified']['accuracy']:.1f} ("
    assert f"proved by interval bounds, Linf 0.01 │ {proved}" in printed
    assert list(result["unseen"]) == ["L2", "L1", "all_threats"]
    assert result["unseen"]["L1"]["threat"] == {
        "norm": "L1",
        "epsilon": 0.25,
        "epsilon_text": "0.25",
    }
    worst = [result["unseen"][norm]["worst_case"]["correct"] for norm in ("L2", "L1")]
    both = min(*worst, result["worst_case"]["correct"])
    assert result["unseen"]["all_threats"]["correct"] <= both
    # Of a linear network interval bounds of single logits prove no more than attacks leave.
    assert result["verified"]["correct"] <= result["attacks"]["pgd20"]["correct"]
    assert result["smoothed"]["n"] == 16
    weight = network[1].weight.detach().double()
    logits = network[1].double()(data.image.flatten(1).double() / 255)
    # Distance to the nearest boundary in L2, without the limits of [0, 1].
    rows = torch.arange(16)
    gap = logits[rows, label][:, None] - logits
    length = (weight[label][:, None] - weight[None]).norm(dim=2)
    radius = torch.where(length > 0, gap / length, torch.inf).amin(1)
    safe = int((radius > float(customary("L2", 64).epsilon)).sum())
    assert result["unseen"]["L2"]["worst_case"]["correct"] >= safe
    with pytest.raises(ConfigError, match="for threats in Linf, got L2"):
        cure.evaluate(
            network.float(), data=data, attacks="pgd20", norm="L2", epsilon=1, bounds=True
        )
