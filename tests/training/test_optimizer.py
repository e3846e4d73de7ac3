"""Parameter groups of the optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cure.config import ModelConfig, OptimizerConfig
from cure.models import build_model
from cure.models.trial import adapt
from cure.training.optimizer import build_optimizer, rate_factors


def network() -> nn.Module:
    return build_model(
        ModelConfig(name="resnet10", options={"width": 4}, mean=(0.5,) * 3, std=(0.2,) * 3),
        classes=3,
        channels=3,
        size=(16, 16),
        seed=0,
    )


def groups(**settings: object) -> dict[str, tuple[float, float]]:
    """(rate factor, weight decay) by parameter name."""
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        OptimizerConfig.model_validate(settings), model, dict(model.named_parameters())
    )
    found = {
        names[id(parameter)]: (group["rate_factor"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == {name for name, _ in model.named_parameters()}
    return found


def test_by_default_there_is_one_group() -> None:
    assert set(groups().values()) == {(1.0, 5e-4)}


def test_norms_and_biases_are_left_out_of_weight_decay() -> None:
    found = groups(decay_norms=False)
    assert found["network.conv1.weight"] == (1.0, 5e-4)
    assert found["network.linear.weight"] == (1.0, 5e-4)
    assert found["network.linear.bias"] == (1.0, 0.0)
    assert found["network.bn1.weight"] == (1.0, 0.0)


def test_rates_fall_from_the_classifier_to_the_input() -> None:
    found = groups(head_rate=5.0, layer_decay=0.5)
    assert found["network.linear.weight"][0] == 5.0
    assert found["network.layer4.0.conv1.weight"][0] == 0.5
    assert found["network.layer1.0.conv1.weight"][0] == 0.5**4
    assert found["network.conv1.weight"][0] == 0.5**5
    assert rate_factors(OptimizerConfig(), network()) == {}


def test_adamw_decouples_weight_decay() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    config = OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(config, nn.Identity(), {"weight": weight})
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert weight.detach().flatten().tolist() == pytest.approx([1 - 0.1 * 0.5] * 4)


def test_a_head_that_is_a_convolution_has_its_own_rate() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    model = nn.Sequential(body, nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = adapt(model, 3, 3, (16, 16))
    factors = rate_factors(OptimizerConfig(head_rate=10), model)
    assert {name for name, factor in factors.items() if factor == 10} == {"1.weight", "1.bias"}


class Tied(nn.Module):
    """The first layer's weights make the logits, too."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 256, 3, bias=False)
        self.stages = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3 * 256))
        self.head = nn.Linear(3 * 256, 3, bias=bias)
        self.head.weight = self.first.weight

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.first(image.flatten(1))))
        return logits


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_that_the_classifier_shares_learns_at_its_rate(bias: bool) -> None:
    model = adapt(Tied(bias), 3, 3, (16, 16))
    config = OptimizerConfig(head_rate=3.0, layer_decay=0.5)
    optimizer = build_optimizer(config, model, dict(model.named_parameters()))
    rates = {
        id(parameter): group["rate_factor"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    (tied,) = (m for m in model.modules() if isinstance(m, Tied))
    assert rates[id(tied.head.weight)] == 3.0
    assert not bias or rates[id(tied.head.bias)] == 3.0
    assert rates[id(tied.stages[1].weight)] == 0.5
    assert rates[id(tied.stages[0].weight)] == 0.25
