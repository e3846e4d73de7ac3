"""The parts of networks, and what it means that only some of them learn."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from cure.config import ModelConfig
from cure.errors import ConfigError
from cure.methods.wrappers.averaging import recompute_statistics
from cure.models import MODELS, build_model
from cure.models.blocks import blocks, chosen, learn_only, reinitialise
from cure.models.wrapper import Normalised, core

SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet10": {"width": 4},
    "wide_resnet": {"depth": 10, "width": 1},
    "densenet121": {"growth": 4},
    "vit": {"dim": 12, "depth": 6},
    "small_cnn": {"width": 2},
}


def network(name: str, **options: Any) -> nn.Module:
    options = SMALL.get(name, {}) | options
    config = ModelConfig(name=name, options=options)
    return build_model(config, classes=10, channels=3, size=(32, 32), seed=0)


def heads(model: nn.Module) -> dict[str, set[str]]:
    """First word of each parameter's name, by part."""
    return {part: {name.split(".")[0] for name in names} for part, names in blocks(model).items()}


def test_the_parts_of_a_resnet_are_those_of_the_paper():
    assert heads(network("resnet18")) == {
        "stem": {"conv1", "bn1"},
        "B1": {"layer1"},
        "B2": {"layer2"},
        "B3": {"layer3"},
        "B4": {"layer4"},
        "classifier": {"linear"},
    }


def test_other_networks_have_their_parts_in_the_order_of_their_layers():
    wide = heads(network("wide_resnet"))
    assert list(wide) == ["stem", "B1", "B2", "B3", "classifier"]
    assert wide["B3"] == {"block3", "bn1"}, "the last norm goes with the block before it"
    dense = heads(network("densenet121"))
    assert dense["B2"] == {"dense2", "trans2"}
    assert heads(network("small_cnn"))["B2"] == {"conv2", "bn2"}
    transformer = blocks(network("vit"))
    layers = [
        sorted({name.split(".")[1] for name in transformer[f"B{b}"] if "layers" in name})
        for b in (1, 2, 3, 4)
    ]
    assert layers == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    assert {"position", "patch.weight"} <= set(transformer["stem"])
    assert "norm.weight" in transformer["B4"]


class Foreign(nn.Module):
    """As networks of other libraries are: an embedder, an encoder with stages, a head in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Module()
        self.embedder.projection = nn.Conv2d(3, 4, 3)
        self.encoder = nn.Module()
        self.encoder.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3)) for _ in range(9)])
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))


def test_a_single_list_is_cut_into_four_and_the_head_is_no_block():
    found = blocks(Foreign())
    stages = [len(found[f"B{number}"]) // 2 for number in (1, 2, 3, 4)]
    assert stages == [3, 2, 2, 2]
    assert found["classifier"] == ["classifier.1.weight", "classifier.1.bias"]
    assert found["stem"] == ["embedder.projection.weight", "embedder.projection.bias"]


@pytest.mark.parametrize("name", MODELS.names())
def test_every_parameter_belongs_to_one_part(name):
    model = network(name)
    names = [parameter for part in blocks(model).values() for parameter in part]
    assert sorted(names) == sorted(key for key, _ in core(model).named_parameters())
    assert len(blocks(model)["B1"]) > 0


def test_a_wrapped_network_has_the_same_parts():
    model = network("resnet10")
    wrapped = Normalised(model, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert blocks(wrapped) == blocks(model)


class Tied(nn.Module):
    """The weight of the first layer is that of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = (nn.Linear(4, 4) for _ in range(3))
        self.head.weight = self.first.weight

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.first(image.flatten(1))))


@pytest.mark.parametrize("name", ["head", "classifier"])
def test_shared_weights_of_a_chosen_layer_learn(name: str):
    network = Tied()
    names = chosen(network, [name])
    assert names == ["first.weight", "head.bias"]
    learn_only(network, names, statistics=True)
    assert network.head.weight.requires_grad
    assert not network.middle.weight.requires_grad


def test_parts_are_chosen_by_block_or_by_module():
    model = network("resnet10")
    assert chosen(model, ["classifier"]) == ["linear.weight", "linear.bias"]
    assert chosen(model, ["layer2.0.conv1", "B1"]) == [
        *blocks(model)["B1"],
        "layer2.0.conv1.weight",
    ]
    with pytest.raises(ConfigError, match=r"unknown part 'B5'.*B4"):
        chosen(model, ["B5"])
    with pytest.raises(ConfigError, match="no weights"):
        chosen(model, ["layer1.0.shortcut"])


def test_what_is_drawn_anew_and_what_is_not():
    model = network("resnet10", width=16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(3.0)
            module.running_mean.fill_(5.0)
    before = copy.deepcopy(model.state_dict())
    names = chosen(model, ["B3", "classifier"])
    reinitialise(model, names, torch.Generator().manual_seed(1))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Norms are left as they were; their statistics always are.
    assert changed == {name for name in names if "bn" not in name and "shortcut.1" not in name}
    weight = after["layer3.0.conv1.weight"]
    fan_out = weight.shape[0] * weight[0, 0].numel()
    bound = math.sqrt(2) * math.sqrt(3 / fan_out)
    assert 0.99 * bound < float(weight.abs().max()) <= bound
    assert float(after["linear.weight"].std()) == pytest.approx(0.01, rel=0.1)
    assert float(after["linear.bias"].abs().max()) == 0
    reinitialise(model, names, torch.Generator().manual_seed(1), norms=True)
    again = model.state_dict()
    assert torch.equal(again["layer3.0.conv1.weight"], weight), "the same generator, the same draw"
    assert float(again["layer3.0.bn1.weight"].mean()) == 1
    assert float(again["layer2.0.bn1.weight"].mean()) == 3
    assert float(again["layer3.0.bn1.running_mean"].mean()) == 5


@pytest.mark.parametrize("statistics", [False, True])
def test_frozen_statistics_stay_in_every_mode_and_copy(statistics):
    model = network("resnet10")
    learn_only(model, chosen(model, ["B4"]), statistics=statistics)
    twin = copy.deepcopy(model).train()
    before = copy.deepcopy(twin.state_dict())
    twin(torch.rand(8, 3, 32, 32)).sum().backward()
    moved = {
        name
        for name, value in twin.state_dict().items()
        if "running" in name and not torch.equal(value, before[name])
    }
    assert any(name.startswith("layer4") for name in moved)
    assert any(not name.startswith("layer4") for name in moved) is statistics
    learning = {name for name, parameter in twin.named_parameters() if parameter.grad is not None}
    assert learning == set(blocks(twin)["B4"])
    assert model.layer4[0].bn1.running_mean.abs().max() == 0, "the copy is on its own"


def test_statistics_computed_anew_leave_the_frozen_ones():
    model = network("resnet10")
    learn_only(model, chosen(model, ["B4"]), statistics=False)
    before = copy.deepcopy(model.state_dict())
    recompute_statistics(model, [torch.rand(8, 3, 32, 32)])
    moved = {
        name.split(".")[0]
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == {"layer4"}
