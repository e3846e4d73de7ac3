"""Networks that know their classes by name."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cure.config import ModelConfig
from cure.errors import CureNote, ModelError
from cure.evaluation.evaluate import evaluate
from cure.models.build import adapted_copy, build_model
from cure.models.classes import own_classes, places_of
from helpers import bright_or_dark


def named(names: list[str]) -> nn.Sequential:
    """A network that has names for its logits, as those of transformers have."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, len(names)))
    model.config = SimpleNamespace(id2label=dict(enumerate(names)))
    return model


def logits(model: nn.Module, names: tuple[str, ...], **options: object) -> torch.Tensor:
    given = ModelConfig(name="given")
    made = adapted_copy(model, len(names), 3, (2, 2), given, names=names, **options)
    return made(torch.ones(2, 3, 2, 2))


def test_logits_are_brought_into_the_order_of_the_data() -> None:
    model = named(["owl", "dog", "cat"])
    plain = model(torch.ones(2, 3, 2, 2))
    assert torch.equal(logits(model, ("cat", "dog", "owl")), plain[:, [2, 1, 0]])
    assert torch.equal(logits(model, ("Cat", "Owl")), plain[:, [2, 0]])
    assert torch.equal(logits(model, ("0", "1", "2")), plain)
    with pytest.raises(ModelError, match=r"'emu' is unknown to it.*new_head=true"):
        logits(model, ("cat", "dog", "emu"))


def test_an_order_is_applied_once() -> None:
    """A network of a run, whose logits are in the order of its data already."""
    model, names = named(["owl", "dog", "cat"]), ("cat", "dog", "owl")
    once = adapted_copy(model, 3, 3, (2, 2), ModelConfig(name="given"), names=names)
    assert own_classes(once) == names
    assert torch.equal(logits(once, names), once(torch.ones(2, 3, 2, 2)))
    assert torch.equal(logits(once, ("owl", "cat")), model(torch.ones(2, 3, 2, 2))[:, [0, 2]])


def test_names_of_a_replaced_layer_do_not_count() -> None:
    model = named(["owl", "dog", "cat"])
    model[1] = nn.Linear(12, 2)
    assert torch.equal(logits(model, ("ant", "bee")), model(torch.ones(2, 3, 2, 2)))
    new = adapted_copy(
        model, 2, 3, (2, 2), ModelConfig(name="given"), new_head=True, names=("ant", "bee")
    )
    assert own_classes(new) == ("ant", "bee")
    assert own_classes(model) == ("owl", "dog", "cat")


def test_an_evaluation_reads_the_names() -> None:
    images = bright_or_dark(20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images.image[0].numel(), 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -1.0])[:, None].expand_as(model[1].weight))
        model[1].bias.zero_()
        model[1].bias[1] = model[1].weight[0].numel() / 1.0
    plain = evaluate(model, data=images, attacks=[])["natural"]["accuracy"]
    model.config = SimpleNamespace(id2label=dict(enumerate(images.classes[::-1])))
    turned = evaluate(model, data=images, attacks=[])["natural"]["accuracy"]
    assert sorted([plain, turned]) == [0, 100]


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (torch.compile, r"without its torch\.compile"),
        (nn.DataParallel, r"without its DataParallel; torchrun"),
        (lambda model: nn.DataParallel(torch.compile(model)), r"without its (torch|Data)"),
    ],
)
def test_a_compiled_or_parallel_network_is_taken_as_it_was(
    wrap: Callable[[nn.Module], nn.Module], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.warns(CureNote, match=said):
        made = adapted_copy(wrap(model), 2, 3, (2, 2), ModelConfig(name="given"))
    assert made.state_dict().keys() == model.state_dict().keys()
    given = types.ModuleType("given_networks")
    given.make = lambda: wrap(model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "given_networks", given)
    with pytest.warns(CureNote, match=said):
        built = build_model(
            ModelConfig(name="given_networks:make"), classes=2, channels=3, size=(2, 2), seed=0
        )
    assert built.state_dict().keys() == model.state_dict().keys()


def test_another_number_of_classes_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"^the network has 2 classes but the data has 3: the dat"):
        places_of(("cat", "dog", "owl"), ("dog", "cat"), "the network")
