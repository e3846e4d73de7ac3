"""Logits after a change in a square, against the whole network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.autoattack import AUTOATTACK
from cure.attacks.early_exit import FastSquare, PlainLayout
from cure.attacks.local_forward import LocalNetwork
from cure.models.registry import MODELS
from cure.models.wrapper import Normalised


def tuned(model: nn.Module) -> nn.Module:
    """BatchNorm with statistics of its own, so that a wrong one shows."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval().requires_grad_(False)


class Odd(nn.Module):
    """Strides, dilation, groups, an even kernel, a module used twice, work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.even = nn.Conv2d(8, 8, (2, 4), stride=(2, 1), padding=(0, 2))
        self.point = nn.Conv2d(8, 8, 1, stride=2)
        self.linear = nn.Linear(8, 7)

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        hidden = F.relu(self.first(image * 2 - 1), inplace=True)
        hidden = F.silu(self.twice(self.twice(hidden)) + hidden)
        hidden = self.even(hidden)
        hidden += 1
        hidden = nn.functional.relu(hidden, inplace=True)
        pooled: Tensor = self.point(hidden).relu_().mean(dim=(2, 3))
        return self.linear(pooled)


NETWORKS = {
    "resnet10": lambda: MODELS["resnet10"](10, width=8),
    "normalised": lambda: Normalised(MODELS["resnet10"](10, width=8), [0.5] * 3, [0.2] * 3),
    "wide_resnet": lambda: MODELS["wide_resnet"](10, depth=10, width=1),
    "odd": Odd,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_changed_squares_give_the_logits_of_the_network(name):
    torch.manual_seed(0)
    network = tuned(NETWORKS[name]())
    image = torch.rand(3, 3, 32, 32)
    local = LocalNetwork(network, image)
    assert local.usable
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for side in (7, 3, 1):
            local.begin(image.clone(), side)
            for _ in range(6):
                top, left = torch.randint(33 - side, (2,), generator=draws).tolist()
                square = (..., slice(top, top + side), slice(left, left + side))
                tried = image.clone()
                tried[square] = torch.rand(image[square].shape, generator=draws)
                with local.changed(top, left, side):
                    came = local(tried)
                torch.testing.assert_close(came, network(tried), atol=2e-5, rtol=1e-5)
                # Image 1 takes its change back.
                local.settle(torch.tensor([True, False, True]))
                image[[0, 2]] = tried[[0, 2]]
        stays = torch.tensor([False, True, True])
        local.select(stays)
        with local.changed(4, 4, 1):
            came = local(image[stays])
        torch.testing.assert_close(came, network(image[stays]), atol=2e-5, rtol=1e-5)
        # Without a square it is the network itself.
        assert torch.equal(local(image), network(image))


def test_less_is_computed():
    network = tuned(MODELS["resnet10"](10, width=8))
    image = torch.rand(2, 3, 32, 32)
    local = LocalNetwork(network, image)
    local.begin(image, 3)
    planned = {str(node) for node in local._passes.local}
    # Squares of 3 grow to 5, 7 and 9 of 32 pixels, to 6 and 8 of 16, and to 5 and 7 of 8.
    assert "layer2_0_conv2" in planned
    assert "layer3_0_conv2" not in planned
    # 5 x 5 pixels of the first map depend on the square inside it, 4 x 4 at a corner.
    with torch.no_grad(), local.changed(10, 20, 3):
        local(image)
    regions = {str(node): region for node, region in local._passes.regions.items()}
    assert regions["conv1"] == (9, 14, 19, 24)
    with torch.no_grad(), local.changed(0, 29, 3):
        local(image)
    regions = {str(node): region for node, region in local._passes.regions.items()}
    assert regions["conv1"] == (0, 4, 28, 32)
    assert regions["layer1_0_conv2"] == (0, 6, 26, 32)


def test_networks_that_cannot_be_traced_or_differ_are_left_alone():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, image: Tensor) -> Tensor:
            found: Tensor = self.layer(image).mean(dim=(2, 3))
            return found if bool(found.sum() > 0) else -found

    class Wraps(Branches):
        def forward(self, image: Tensor) -> Tensor:
            padded = F.pad(image, (1, 1, 1, 1), mode="circular")
            found: Tensor = self.layer(padded).relu().mean(dim=(2, 3))
            return found + torch.rand(())

    image = torch.rand(2, 3, 16, 16)
    for network in (Branches().eval(), Wraps().eval()):
        local = LocalNetwork(network, image)
        assert not local.usable
        with torch.no_grad(), local.changed(0, 0, 1):
            assert local(image).shape == (2, 4)


def test_square_takes_the_same_queries():
    """Square with and without it: the same images on a network with clear margins."""
    torch.manual_seed(0)
    network = tuned(MODELS["resnet10"](4, width=4)).double()
    image = torch.rand(6, 3, 24, 24, dtype=torch.float64)
    label = network(image).argmax(dim=1)
    # One falls before the first query, of a batch that is not the one it was traced with.
    label[0] = (label[0] + 1) % 4
    local = LocalNetwork(copy.deepcopy(network), image[:3])
    assert local.usable
    made = []
    for form in (network, local):
        attack = FastSquare(
            PlainLayout(form), eps=0.02, n_queries=120, n_restarts=1, seed=0, device=image.device
        )
        attack.init_hyperparam(image)
        torch.manual_seed(0)
        with torch.no_grad():
            made.append(attack.attack_single_run(image, label)[1])
    assert torch.equal(*made)
    assert not torch.equal(made[0], image)
    prepared = AUTOATTACK.prepare(network.float(), image.float())
    assert isinstance(prepared, LocalNetwork)
    assert prepared.usable
    assert not any(module.training for module in prepared.modules())
    assert Threat("Linf", 0.02).within((made[1] - image).abs().amax(dim=(1, 2, 3)).float()).all()
