"""Square on images of any size, and equal to pyautoattack's where that runs."""

from __future__ import annotations

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import nn

from cure.attacks.early_exit import AnySizeSquare
from cure.attacks.registry import evaluation_attack
from cure.attacks.threat import Threat
from cure.errors import ConfigError

EPSILON = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}
SIZES = [(8, 8), (9, 9), (14, 14), (24, 24), (8, 13), (23, 9), (9, 24), (64, 8)]


def network(size: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    made(torch.rand(1, 3, *size))
    return made.eval().requires_grad_(False)


def problem(size: tuple[int, int]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = network(size)
    image = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(1))
    return model, image, model(image).argmax(dim=1)


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("size", SIZES)
def test_square_runs_at_any_size(size: tuple[int, int], norm: str) -> None:
    model, image, label = problem(size)
    threat = Threat(norm, EPSILON[norm])
    attack = AnySizeSquare(
        model, norm=norm, eps=threat.epsilon, n_queries=60, device=image.device, seed=0
    )
    found = attack.perturb(image, label)
    assert bool(((found >= -1e-6) & (found <= 1 + 1e-6)).all())
    assert bool(threat.within(threat.distance(found - image)).all())
    _, best = attack.attack_single_run(image, label)
    assert bool((best != image).any())


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("size", [(10, 10), (32, 32)])
def test_square_equals_the_package_where_that_runs(size: tuple[int, int], norm: str) -> None:
    model, image, label = problem(size)
    found = []
    for kind in (SquareAttack, AnySizeSquare):
        attack = kind(
            model, norm=norm, eps=EPSILON[norm], n_queries=120, device=image.device, seed=3
        )
        found.append(attack.perturb(image, label))
    assert torch.equal(*found)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_attack_of_evaluation_runs_on_odd_oblong_images(norm: str) -> None:
    model, image, label = problem((14, 9))
    threat = Threat(norm, EPSILON[norm])
    part = evaluation_attack("square").parts["square"]
    found = part.run(model, image[:1], label[:1], threat, 0, 0)
    assert bool(threat.within(threat.distance(found - image[:1])).all())
    assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_images_of_less_than_five_rows_are_refused(norm: str) -> None:
    model, image, label = problem((4, 9))
    attack = AnySizeSquare(model, norm=norm, eps=0.1, n_queries=5, device=image.device, seed=0)
    with pytest.raises(ConfigError, match="at least 5 pixels high, got 4x9; give larger images"):
        attack.perturb(image, label)
