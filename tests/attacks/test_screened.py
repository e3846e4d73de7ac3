"""Screened AutoAttack: its verdicts beside AutoAttack's, image by image, and its two screens."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from attack_networks import linear_network
from torch import nn

from cure.attacks import PGD, Threat, early_exit
from cure.attacks.autoattack import AUTOATTACK
from cure.attacks.registry import EvaluationAttack, Part, evaluation_attack
from cure.attacks.screened import (
    ENOUGH,
    SCREENS,
    margin_after_pgd,
    nearest_classes,
    probability_margin,
)
from cure.data import ImageSet
from cure.errors import ConfigError
from cure.evaluation.journal import Journal
from cure.evaluation.metrics import unpack
from cure.evaluation.runner import WORST, AttackRunner, measure
from cure.evaluation.shards import Shard
from cure.registry import ATTACKS
from cure.runs.results import AttackAccuracy
from linear_models import ENGINE, linear_case, unit

BOTH = ["autoattack", "screened"]


@pytest.fixture
def short(monkeypatch):
    """AutoAttack with fewer steps, for networks that are small as well."""
    monkeypatch.setattr(early_exit, "STEPS", 12)
    monkeypatch.setattr(early_exit, "QUERIES", 50)


def pictures(count: int, seed: int = 99) -> ImageSet:
    """Noisy copies of one fixed picture a class, [count, 3, 8, 8], of five classes."""
    classes = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1234))
    draws = torch.Generator().manual_seed(seed)
    label = torch.randint(5, (count,), generator=draws)
    image = classes[label] + 0.5 * torch.randn(count, 3, 8, 8, generator=draws)
    return ImageSet((image.clamp(0, 1) * 255).to(torch.uint8), label, tuple("abcde"), "x", "test")


@functools.cache
def network(epsilon: float) -> nn.Module:
    """A small network after fifty steps, adversarial ones where epsilon is above 0."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 5),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(50):
        data = pictures(64, seed=step)
        image = unit(data)
        if epsilon:
            image = PGD(Threat("Linf", epsilon), 2)(model, image, data.label)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image), data.label).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("trained_with", [0, 0.06])
def test_no_image_stands_that_falls_to_autoattack(trained_with, norm):
    model, data = network(trained_with), pictures(40)
    threat = Threat(norm, 0.06 if norm == "Linf" else 1.0)
    kept: dict[str, torch.Tensor] = {}
    found = measure(
        model, data, BOTH, threat, engine=ENGINE, batch_size=25, per_image=True, keep=kept
    )
    right = torch.tensor(unpack(found["natural"]["right"], len(data)))
    stand = {
        name: torch.tensor(unpack(found["attacks"][name]["right"], len(data))) for name in BOTH
    }
    assert 0 < int(stand["screened"].sum()) < int(right.sum())
    assert not bool((stand["screened"] & ~stand["autoattack"]).any())
    # What only a screen fools is listed, and rare.
    only = (stand["autoattack"] & ~stand["screened"]).nonzero().flatten().tolist()
    assert len(only) <= 1, only
    assert found["worst_case"]["correct"] == int(stand["screened"].sum())
    # Each broken image, with the network in float64: inside the ball and [0, 1], and wrong.
    broken = right & ~stand["screened"]
    adversarial, natural = kept["screened"][broken], unit(data)[broken]
    assert bool((adversarial >= 0).all() & (adversarial <= 1).all())
    change = (adversarial - natural).flatten(1).double()
    length = change.norm(p=math.inf if norm == "Linf" else 2, dim=1)
    assert float(length.max() if len(length) else 0) <= threat.epsilon * (1 + 1e-5)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(adversarial.double())
    lead = logits.gather(1, data.label[broken][:, None]).squeeze(1) - logits.amax(dim=1)
    # Rounding may decide an exact tie.
    assert bool(((logits.argmax(dim=1) != data.label[broken]) | (lead > -1e-5)).all())
    assert float((lead < -1e-5).float().mean()) > 0.95
    assert torch.equal(kept[WORST][broken], adversarial)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("classes", [2, 4])
def test_linear_networks_by_closed_form(classes):
    model, data, right, robust = linear_case(classes, 0.03, count=30, gap=0.02)
    found = measure(model, data, ["screened"], Threat("Linf", 0.03), engine=ENGINE)
    made = found["attacks"]["screened"]
    assert made["correct"] == int(robust.sum())
    # The screens alone find all that can be found here; AutoAttack's parts run on the rest.
    assert made["fooled_by"]["pma"] + made["fooled_by"]["malt"] == int((right & ~robust).sum())
    assert list(made["fooled_by"]) == [*SCREENS, *AUTOATTACK.defined(classes, Threat()).parts]


@pytest.mark.usefixtures("short")
def test_what_stands_takes_every_step_of_autoattack():
    model, data, _, robust = linear_case(4, 0.03, count=30, gap=0.02)
    data = data.subset(robust.nonzero().flatten())
    found = measure(model, data, BOTH, Threat("Linf", 0.03), engine=ENGINE)["attacks"]
    assert found["screened"]["correct"] == found["autoattack"]["correct"] == len(data) > 3
    passes = {name: found[name]["passes"]["forward"] for name in BOTH}
    # 21 of the first screen; one for the order, and 21 for each of the three other classes.
    assert passes["screened"] - passes["autoattack"] == len(data) * (21 + 1 + 63)


def test_targets_by_hand():
    # The second class has the larger logit, but the third is nearer: its slope is steeper.
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 9.0]])
    model = linear_network(weight, torch.tensor([3.0, 1.0, -7.0]))
    image = torch.full((1, 2, 1, 1), 0.5)
    # Leads 3 - 1.5 and 3 + 2.5; distances 1.5 / 1 and 5.5 / 9.
    assert nearest_classes(model, image, torch.tensor([0]), "Linf").tolist() == [[2, 1]]
    # The slope (3, 4) has the length 5 and the sum 7, which turns the order.
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 6.0]])
    model = linear_network(weight, torch.tensor([4.65, 0.0, 0.55]))
    leads = [4.65 - 3.5, 4.65 - 3.55]
    assert leads[0] / 5 > leads[1] / 6 > leads[0] / 7
    assert nearest_classes(model, image, torch.tensor([0]), "L2").tolist() == [[2, 1]]
    assert nearest_classes(model, image, torch.tensor([0]), "Linf").tolist() == [[1, 2]]


def test_probability_margin_by_hand():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]]).log()
    logits[1] = torch.tensor([2.0, 1.0, 1.0]).log()
    made = probability_margin(logits, torch.tensor([0, 0]))
    assert made.tolist() == pytest.approx([3 / 6 - 1 / 6, 1 / 4 - 2 / 4])


def test_it_is_deterministic_and_leaves_the_global_generator():
    model, data = network(0), pictures(20)
    threat, attack = Threat("Linf", 0.04), evaluation_attack("screened")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for part in SCREENS.values():
        made = [
            part.run(attack.prepare(model, unit(data)), unit(data), data.label, threat, 3, 0)
            for _ in range(2)
        ]
        assert torch.equal(*made)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("short")
def test_the_ordered_form_ends_early_with_the_same_verdicts():
    model, data, _, robust = linear_case(4, 0.03, count=300, gap=0.02)
    threat = Threat("Linf", 0.03)
    found = measure(
        model, data, ["screened-ordered"], threat, engine=ENGINE, batch_size=50, per_image=True
    )["attacks"]["screened-ordered"]
    # A linear network is fooled exactly where the closed form says.
    assert unpack(found["right"], len(data)).tolist() == robust.tolist()
    assert found["not_attacked"]["pma"] == found["not_attacked"]["malt"] == 0
    standing = int(robust.sum())
    assert standing > 1.5 * ENOUGH, "the case has something to leave out"
    for part in AUTOATTACK.parts:
        assert found["not_attacked"][part] == standing - ENOUGH


def test_margins_by_closed_form():
    weight = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    model = linear_network(weight, torch.tensor([2.0, 0.0]))
    image = torch.full((1, 2, 1, 1), 0.5)
    # Lead 2 - (1.5 - 0.5), less 0.1 * (3 + 1) at the corner of the ball.
    left = margin_after_pgd(model, image, torch.tensor([0]), Threat("Linf", 0.1))
    assert left.tolist() == pytest.approx([0.6])


def _planted(fools: torch.Tensor, order: torch.Tensor) -> EvaluationAttack:
    """A part that turns the images of these positions black, in an order of our own.

    Each image carries its position in its first pixel.
    """

    def positions(image):
        return (image[:, 0, 0, 0] * 255).round().long()

    def run(model, image, label, threat, seed, number):
        return torch.where(fools[positions(image)][:, None, None, None], 0.0, image)

    return EvaluationAttack(
        "planted",
        "",
        {},
        {"planted": Part(run, enough=4)},
        order=lambda model, image, label, threat: order[positions(image)].float(),
    )


class _White(nn.Module):
    def forward(self, image):
        light = image[:, 0, 1, 1]
        return 4 * torch.stack([light, 1 - light], dim=1)


@pytest.mark.parametrize(
    ("fools", "attacked", "fooled"),
    [
        ([], 4, 0),
        ([0], 8, 1),  # By fours: the first batch has a fall and three in a row, the next four more.
        ([3, 6], 12, 2),
        ([9], 4, 0),  # What an order that means nothing may cost.
        (list(range(0, 20, 3)), 20, 7),
    ],
)
def test_a_part_ends_after_so_many_in_a_row(monkeypatch, fools, attacked, fooled):
    image = torch.full((20, 1, 2, 2), 255, dtype=torch.uint8)
    image[:, 0, 0, 0] = torch.arange(20)
    data = ImageSet(image, torch.zeros(20, dtype=torch.int64), ("a", "b"), "x", "test")
    place = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    falls = torch.isin(place, torch.tensor(fools, dtype=torch.int64))
    monkeypatch.setitem(ATTACKS._entries, "planted", _planted(falls, place))
    found = measure(_White(), data, ["planted"], Threat("Linf", 1.0), engine=ENGINE, batch_size=7)
    part = found["attacks"]["planted"]
    assert part["not_attacked"] == {"planted": 20 - attacked}
    assert part["correct"] == 20 - fooled


def test_ranks_stop_where_one_process_does(monkeypatch):
    image = torch.full((20, 1, 2, 2), 255, dtype=torch.uint8)
    image[:, 0, 0, 0] = torch.arange(20)
    data = ImageSet(image, torch.zeros(20, dtype=torch.int64), ("a", "b"), "x", "test")
    falls = torch.isin(torch.arange(20), torch.tensor([0, 9]))  # the second is not reached
    monkeypatch.setitem(ATTACKS._entries, "planted", _planted(falls, torch.arange(20)))

    def found():
        return measure(
            _White(), data, ["planted"], Threat("Linf", 1.0), engine=ENGINE, per_image=True
        )["attacks"]["planted"]

    alone = found()
    rounds = AttackRunner._rounds

    def of_three(self, *arguments):
        """The batches of three ranks arrive together."""
        single = [result for one in rounds(self, *arguments) for result in one]
        yield from (single[first : first + 3] for first in range(0, len(single), 3))

    monkeypatch.setattr(AttackRunner, "_rounds", of_three)
    together = found()
    assert (alone["correct"], alone["not_attacked"]) == (19, {"planted": 12})
    for key in ("correct", "right", "not_attacked"):
        assert together[key] == alone[key]


def test_the_ordered_form_takes_no_shards():
    with pytest.raises(ConfigError, match="among shards; use screened"):
        measure(
            network(0),
            pictures(20),
            ["screened-ordered"],
            Threat("Linf", 0.04),
            engine=ENGINE,
            shard=Shard(1, 2),
        )


@pytest.mark.usefixtures("short")
def test_a_stopped_ordered_attack_goes_on(tmp_path):
    model, data, *_ = linear_case(4, 0.03, count=120, gap=0.02)
    threat, name = Threat("Linf", 0.03), "screened-ordered"
    whole = measure(model, data, [name], threat, engine=ENGINE, per_image=True)
    path, identity = tmp_path / "r.partial", {"a": 1}
    with Journal(path, identity) as journal:
        measure(model, data, [name], threat, engine=ENGINE, journal=journal)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + "\n")
    with Journal(path, identity) as journal:
        again = measure(model, data, [name], threat, engine=ENGINE, journal=journal, per_image=True)
    for key in ("right", "fooled_by", "not_attacked"):
        assert again["attacks"][name][key] == whole["attacks"][name][key]
    assert path.read_text().count("\n") == len(lines)


def test_an_estimate_says_that_it_is_one():
    facts = {"accuracy": 50.0, "interval": [40, 60], "correct": 50, "n": 100, "settings": {}}
    part = AttackAccuracy.model_validate(facts | {"not_attacked": {"pma": 0, "square": 2}})
    assert str(part.estimate()).startswith("an estimate from above: its parts ended before all")
    assert "square 2 (50 stand" in str(part.estimate())
    assert "pma" not in str(part.estimate())
    for nothing in ({}, {"not_attacked": {"pma": 0}}):
        assert AttackAccuracy.model_validate(facts | nothing).estimate() is None
