"""BatchNorm layers with frozen statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cure.models.batch_norm import FrozenStatistics, freeze_statistics


class OwnNorm(nn.BatchNorm2d):
    """A subclass whose constructor takes other arguments."""

    def __init__(self, note: str) -> None:
        super().__init__(3)
        self.note = note


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Sequential(OwnNorm("mine")), nn.ReLU()
    )


def test_statistics_and_outputs_stay_in_training_mode() -> None:
    model = network()
    expected = copy.deepcopy(model).eval()
    names = freeze_statistics(model)
    assert names == ["1", "2.0"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = torch.rand(4, 3, 6, 6)
    torch.testing.assert_close(model.train()(image), expected(image), rtol=0, atol=0)
    assert before.keys() == expected.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not model[1].training


def test_tensors_are_shared_and_still_learn() -> None:
    model = network()
    weight, mean = model[1].weight, model[1].running_mean
    freeze_statistics(model)
    assert model[1].weight is weight
    assert model[1].running_mean is mean
    model.train()(torch.rand(4, 3, 6, 6)).sum().backward()
    assert weight.grad is not None
    assert isinstance(model[2][0], OwnNorm)
    assert model[2][0].note == "mine"


def test_copies_stay_frozen_and_only_chosen_layers_are_frozen() -> None:
    model = network()
    assert freeze_statistics(model, lambda name, _: name == "1") == ["1"]
    twin = copy.deepcopy(model).train()
    assert isinstance(twin[1], FrozenStatistics)
    assert not twin[1].training
    assert twin[2][0].training
