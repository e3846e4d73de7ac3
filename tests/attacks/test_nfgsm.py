"""N-FGSM on a linear network, whose gradient is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cure.attacks import Hooks, Threat
from cure.attacks.losses import CROSS_ENTROPY
from cure.attacks.nfgsm import NFGSM
from cure.errors import ConfigError

EPSILON = 0.1


def linear() -> nn.Module:
    """Logits (0, w x): the gradient of the loss of class 0 has the sign of w."""
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1.0, -2, 3, -4]]))
    return nn.Sequential(nn.Flatten(), layer)


def attacked(noise: float, seed: int = 0) -> torch.Tensor:
    image = torch.full((8, 1, 2, 2), 0.5)
    attack = NFGSM(Threat("Linf", EPSILON), noise=noise)
    draws = torch.Generator().manual_seed(seed)
    return attack(linear(), image, torch.zeros(8, dtype=torch.int64), CROSS_ENTROPY, draws)


def test_without_noise_it_is_the_signed_gradient_step() -> None:
    expected = 0.5 + EPSILON * torch.tensor([1.0, -1, 1, -1]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(attacked(0.0), expected.expand(8, 1, 2, 2))


def test_noise_moves_the_step_and_is_not_projected_away() -> None:
    shift = attacked(2.0) - attacked(0.0)
    assert shift.abs().max() <= 2 * EPSILON + 1e-6
    # Uniform in two epsilons: most of 32 values lie beyond one half of epsilon.
    assert (shift.abs() > EPSILON / 2).float().mean() > 0.5
    assert not torch.equal(attacked(2.0, seed=1), attacked(2.0))
    assert torch.equal(attacked(2.0), attacked(2.0))


def test_hooks_of_an_ascent_are_refused() -> None:
    attack = NFGSM(Threat("Linf", EPSILON))
    image, label = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"n-fgsm takes one step"):
        attack(linear(), image, label, CROSS_ENTROPY, torch.Generator(), hooks=Hooks())
