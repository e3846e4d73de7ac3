"""A network of other classes: its last layer is replaced, and everything else stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cure
from cure.config import ModelConfig
from cure.errors import CureNote, ModelError
from cure.models import load_weights
from cure.models.build import adapted_copy
from cure.models.head import find_head, renew_head
from cure.models.wrapper import core
from cure.runs.folder import RunFolder
from helpers import bright_or_dark

SETTINGS = {
    "data.validation": 16,
    "threat.epsilon": "8/255",
    "attack.step_size": "4/255",
    "attack.steps": 2,
    "method": "at",
    "training.batch_size": 16,
    "training.threads": 1,
    "training.validation_steps": 2,
    "training.epochs": 1,
    "training.averaging": None,
    "training.optimizer.learning_rate": 1e-6,
    "natural.epochs": 3,
    "natural.learning_rate": 0.1,
}


class Wide(nn.Module):
    """Ten classes, and a second linear layer of another width behind the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 6, 3, 2, 1)
        self.head = nn.Linear(6, 10)
        self.embedding = nn.Linear(6, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.body(image)).mean((2, 3))
        return self.head(features)


def wide() -> Wide:
    torch.manual_seed(3)
    return Wide()


def train(path: Path, **settings: object) -> RunFolder:
    """A run of two classes whose network has ten."""
    given = {"new_head": True, "start": "natural"} | SETTINGS | settings
    cure.train("digits", given, model=wide(), data=bright_or_dark(), run=path, quiet=True)
    return RunFolder.open(path)


@pytest.mark.parametrize("head", [nn.Linear(6, 10, bias=False), nn.Conv2d(6, 10, 1)])
def test_only_the_head_changes(head: nn.Module) -> None:
    ending = [nn.Flatten()] if isinstance(head, nn.Conv2d) else []
    first = [nn.AdaptiveAvgPool2d(1)] + ([] if ending else [nn.Flatten()])
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), *first, head, *ending)
    before = copy.deepcopy(network.state_dict())
    place = find_head(network)
    model = adapted_copy(network, 3, 1, (8, 8), ModelConfig(name="given"), new_head=True)
    after = core(model).state_dict()
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert after.keys() == before.keys()  # a layer without a bias stays without
    changed = {name for name in after if after[name].shape != before[name].shape}
    assert changed == {name for name in before if name.startswith(f"{place}.")}
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - changed)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_head_is_found_by_the_width_of_the_logits() -> None:
    network = wide()
    renew_head(network, 3, 1, (8, 8), new_head=True, seed=0)
    assert (network.head.out_features, network.embedding.out_features) == (3, 4)
    drawn = network.head.weight.clone()
    again = wide()
    renew_head(again, 3, 1, (8, 8), new_head="head", seed=0)
    assert torch.equal(again.head.weight, drawn)
    renew_head(again, 3, 1, (8, 8), new_head=True, seed=1)
    assert not torch.equal(again.head.weight, drawn)


class Auxiliary(Wide):
    """A second head, made after the main one and used in training alone."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(6, classes)
        self.auxiliary = nn.Linear(6, classes)

    def forward(self, image: torch.Tensor) -> Any:
        features = F.relu(self.body(image)).mean((2, 3))
        logits = self.head(features)
        return (logits, self.auxiliary(features)) if self.training else logits


class WeightOfTheHead(Auxiliary):
    """Takes the weight of its head without calling it."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.body(image)).mean((2, 3))
        return 10 * F.linear(F.normalize(features), self.head.weight, self.head.bias)


class Twice(nn.Module):
    """Its head has a name before those of the layers that are called."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(6, classes)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), self.head)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


class Averaged(Auxiliary):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.body(image)).mean((2, 3))
        return (self.head(features) + self.auxiliary(features)) / 2


class Tied(Auxiliary):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.auxiliary.weight = self.head.weight


class Prototypes(Auxiliary):
    """Its logits are distances to points that are no layer."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.points = nn.Parameter(torch.rand(classes, 6))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(F.relu(self.body(image)).mean((2, 3)), self.points)


@pytest.mark.filterwarnings("ignore::cure.errors.CureNote")
@pytest.mark.parametrize("make", [Auxiliary, WeightOfTheHead, Twice])
@pytest.mark.parametrize("classes", [10, 3])
def test_the_head_is_the_layer_that_makes_the_logits(
    make: Callable[[int], nn.Module], classes: int
) -> None:
    given = make(classes)
    model = adapted_copy(given, 3, 1, (8, 8), ModelConfig(name="given"), new_head=True)
    network = core(model).eval()
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert not torch.equal(network.head.weight[:3], given.head.weight[:3])
    kept = [name for name, _ in given.named_parameters() if not name.startswith("head")]
    assert kept
    for name in kept:
        assert torch.equal(network.get_parameter(name), given.get_parameter(name))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Averaged, "expected one layer that makes the logits, got 'head', 'auxiliary', which"),
        (Tied, "expected one layer that makes the logits, got 'head', 'auxiliary', which"),
        (Prototypes, "found no linear layer or 1x1 convolution with 3 outputs that makes the log"),
    ],
)
@pytest.mark.filterwarnings("ignore::cure.errors.CureNote")
def test_a_head_that_is_not_one_layer_is_refused(
    make: Callable[[int], nn.Module], message: str
) -> None:
    with pytest.raises(ModelError, match=f"{message}.*new_head=NAME"):
        renew_head(make(3), 3, 1, (8, 8), new_head=True, seed=0)


def test_the_single_logit_of_two_classes_becomes_two() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 1))
    renew_head(network, 2, 1, (8, 8), new_head=True, seed=0)
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "normalise",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.parametrize("classes", [10, 3])
def test_a_normalised_head_is_drawn_and_stays_normalised(
    normalise: Callable[[nn.Module], nn.Module], classes: int, tmp_path: Path
) -> None:
    network = wide()
    network.head = normalise(nn.Linear(6, classes))
    image = torch.rand(4, 1, 8, 8)
    before = network.eval()(image)
    names = set(network.state_dict())
    model = adapted_copy(network, 3, 1, (8, 8), ModelConfig(name="given"), new_head=True)
    assert set(core(model).state_dict()) == names
    drawn = model.eval()(image)
    assert drawn.shape == (4, 3)
    assert not torch.allclose(drawn, before[:, :3])
    # Weights of a file, of which all but the head are taken.
    torch.save(network.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt", new_head=True)
    torch.testing.assert_close(model.eval()(image), drawn)


class Own(nn.Linear):
    """A layer of a class of its own."""


@pytest.mark.parametrize(
    ("layer", "lost"),
    [(nn.utils.parametrizations.orthogonal(nn.Linear(6, 10)), "_Orthogonal"), (Own(6, 10), "Own")],
)
def test_what_a_new_head_lacks_of_the_old_one_is_told(layer: nn.Module, lost: str) -> None:
    network = wide()
    network.head = layer
    with pytest.warns(CureNote, match=f"'head' is a plain Linear, without .* had: {lost}$"):
        renew_head(network, 3, 1, (8, 8), new_head=True, seed=0)
    assert type(network.head) is nn.Linear


def test_a_head_of_lazy_size_is_replaced() -> None:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(10))
    model = adapted_copy(network, 3, 1, (8, 8), ModelConfig(name="given"), new_head=True)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_a_network_without_such_a_layer_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ModelError, match="found no linear layer or 1x1 convolution with 10 out"):
        renew_head(network, 3, 1, (8, 8), new_head=True, seed=0)
    with pytest.raises(ModelError, match=r"new_head=true start=natural, or start=natural:FILE"):
        train(Path("unused"), new_head=False)


def test_the_new_head_is_trained_naturally_before_the_method(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    outcome = run.outcome()
    assert outcome is not None
    assert outcome.start.natural > 90  # a random head guesses
    model = cure.Run(run.path, wide()).model()
    assert core(model).head.out_features == 2
    result = cure.evaluate(
        cure.Run(run.path, wide()), data=bright_or_dark(64, split="test"), attacks=["natural"]
    )
    assert result["natural"]["accuracy"] > 90


def test_weights_of_a_file_are_trained_naturally_first(tmp_path: Path) -> None:
    other = wide()
    with torch.no_grad():
        other.body.weight += 1
    file = tmp_path / "weights.pt"
    torch.save(other.state_dict(), file)
    run = train(tmp_path / "run", start=f"natural:{file}", **{"natural.learning_rate": 1e-9})
    inner = RunFolder.open(run.path / "natural")
    assert inner.config.method.name == "natural"
    assert inner.config.start == str(file)
    network = core(cure.Run(inner.path, wide()).model())
    assert torch.allclose(network.body.weight, other.body.weight, atol=1e-4)
    assert not torch.allclose(network.body.weight, wide().body.weight, atol=0.1)


def test_an_untrained_head_is_named_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(cure.CureError, match=r"new last layer is not trained.*\(start=natural\)"):
        train(tmp_path / "a", start="model", start_check="refuse")
    file = tmp_path / "weights.pt"
    torch.save(wide().state_dict(), file)
    with pytest.raises(cure.CureError, match=r"not trained.*\(start=natural:.*weights.pt\)"):
        train(tmp_path / "b", start=str(file), start_check="refuse")


def test_a_run_of_the_same_classes_keeps_its_head(tmp_path: Path) -> None:
    first = train(tmp_path / "first")
    second = train(tmp_path / "second", start=str(first.path))
    ends = [run.outcome() for run in (first, second)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[1].start.natural > 90


def test_an_exported_network_is_built_with_its_head(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    trained = cure.Run(run.path, wide())
    path = cure.export(
        trained, "safetensors", tmp_path / "network.safetensors", data=bright_or_dark(32)
    )
    image = torch.rand(4, 1, 8, 8)
    loaded = cure.from_pretrained(path, network=wide())
    with torch.no_grad():
        assert torch.equal(loaded(image), trained.model()(image))
