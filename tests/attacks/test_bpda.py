"""The straight-through attack breaks masking layers and is PGD-20 on a plain network."""

from __future__ import annotations

import pytest
import torch
from attack_networks import images, trained
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.bpda import smoothed, straight_through
from cure.attacks.registry import evaluation_attack
from cure.errors import ConfigError, CureNote

THREAT = Threat("Linf", 0.2)


class KWinners(nn.Module):
    """Keeps the largest fifth of the activations."""

    def forward(self, value: Tensor) -> Tensor:
        flat = value.flatten(1)
        least = flat.topk(flat.shape[1] // 5, dim=1).values[:, -1]
        return value * (value >= least.reshape(-1, *[1] * (value.dim() - 1))).to(value)


class Sign(nn.Module):
    """The sign of what comes in, by a comparison."""

    def forward(self, value: Tensor) -> Tensor:
        return 2 * (value > 0).to(value) - 1


class Quantised(nn.Module):
    """Four levels, by a function."""

    def forward(self, value: Tensor) -> Tensor:
        return (3 * value).round() / 3


class Hidden(nn.Module):
    """Loses the gradient in a way that only the user can mend."""

    def forward(self, value: Tensor) -> Tensor:
        return torch.from_numpy(value.detach().numpy().copy()).mul(1.0).sum(dim=1, keepdim=True)


class StandIn(Hidden):
    """The same with a differentiable stand-in."""

    def bpda(self, value: Tensor) -> Tensor:
        return value.sum(dim=1, keepdim=True)


def plain() -> nn.Module:
    return trained().eval()


def accuracy(name: str, model: nn.Module) -> tuple[float, float]:
    """Accuracy on natural images and under an attack, as evaluation runs it."""
    image, label = images(96, seed=3)
    attack = evaluation_attack(name)
    prepared = attack.prepare(model, image[:8])
    changed = attack.parts[name].run(prepared, image, label, THREAT, 0, 0)
    assert float((changed - image).abs().max()) <= THREAT.epsilon + 1e-6
    with torch.no_grad():
        right, robust = (model(x).argmax(dim=1) == label for x in (image, changed))
    return float(right.float().mean()), float((right & robust).float().mean())


@pytest.mark.parametrize("layer", [Quantised, Sign])
def test_it_breaks_what_pgd_does_not(layer: type[nn.Module]) -> None:
    network = plain()
    if layer is Sign:
        torch.manual_seed(0)
        image, label = images(400, seed=5)
        network = nn.Sequential(nn.Flatten(), nn.Linear(128, 256), Sign(), nn.Linear(256, 4))
        with torch.no_grad():  # the last layer by least squares on the signs
            signs = network[:3](image)
            hot = torch.nn.functional.one_hot(label, 4).float()
            network[3].weight.copy_(torch.linalg.lstsq(signs, hot).solution.T)
            network[3].bias.zero_()
        network[0:3].requires_grad_(True)
    model = nn.Sequential(layer(), network).eval() if layer is Quantised else network.eval()
    image, _ = images(8)
    if layer is Sign:
        leaf = image.requires_grad_(True)
        assert (
            not model(leaf).requires_grad
            or not torch.autograd.grad(model(leaf).sum(), leaf, allow_unused=True)[0]
        )
        natural, broken = accuracy("bpda-pgd20", model)
        assert natural > 0.7
    else:
        natural, withstands = accuracy("pgd20", model)
        _, broken = accuracy("bpda-pgd20", model)
        assert withstands > natural - 0.1
    # Sign: 87.5 % natural, 40.6 % under bpda-pgd20.
    assert broken < natural - 0.3


def test_forward_values_are_those_of_the_network_to_the_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Quantised(), nn.Flatten(), nn.Linear(128, 32), KWinners()).eval()
    image, _ = images(16)
    with pytest.warns(CureNote, match=r"layer '0' \(Quantised\), layer '3' \(KWinners\)"):
        found = smoothed(model, image[:8])
    assert torch.equal(found(image), model(image))
    assert isinstance(model[3], KWinners), "the network itself is unchanged"


def test_it_is_pgd_on_a_plain_network() -> None:
    model = plain()
    image, label = images(32)
    with pytest.warns(CureNote, match="nothing in the network masks its gradient"):
        assert smoothed(model, image) is model
    run = {name: evaluation_attack(name).parts[name].run for name in ("pgd20", "bpda-pgd20")}
    one, other = (attack(model, image, label, THREAT, 0, 0) for attack in run.values())
    assert torch.equal(one, other)


def test_rounding_in_a_function_is_found() -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(128, 4)

        def forward(self, image: Tensor) -> Tensor:
            return self.last(torch.round(7 * image).flatten(1))

    image, _ = images(4)
    with pytest.warns(CureNote, match=r"torch\.round"):
        found = smoothed(Rounds(), image)
    leaf = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(found(leaf).sum(), leaf)
    assert bool((gradient != 0).all())


def test_a_user_names_a_stand_in() -> None:
    image, _ = images(4)
    torch.manual_seed(0)
    model = nn.Sequential(StandIn(), nn.Flatten(), nn.Linear(64, 4))
    found = smoothed(model, image)
    assert torch.equal(found(image), model(image))
    leaf = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(found(leaf).sum(), leaf)
    # By hand: the columns of the last layer, the same for both channels.
    expected = model[2].weight.sum(dim=0).reshape(1, 1, 8, 8).expand_as(image)
    assert torch.allclose(gradient, expected)
    with pytest.raises(ConfigError, match="bpda = True, or has a method bpda"):
        smoothed(nn.Sequential(Hidden(), nn.Flatten(), nn.Linear(64, 4)), image)


def test_the_gradient_is_that_of_the_stand_in() -> None:
    x = torch.tensor([0.4, 1.7], requires_grad=True)
    value = straight_through(x.round(), x**2)
    assert value.tolist() == [0.0, 2.0]
    assert torch.autograd.grad(value.sum(), x)[0].tolist() == pytest.approx([0.8, 3.4])
