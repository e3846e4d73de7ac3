"""MAITE: its own evaluation with our network, data and attack; its models and data sets here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cure
from cure.data import as_images
from cure.errors import ConfigError, DataError, ModelError
from cure.integrations.maite import (
    AttackAugmentation,
    ImageClassifier,
    ImageDataset,
    MaiteNetwork,
)
from cure.methods import Natural
from helpers import bright_or_dark

THREAT = cure.Threat("Linf", 0.2)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    images = bright_or_dark(classes=3)
    method = Natural(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(20):
        method(images.image / 255, images.label).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.update()
    return model.eval()


@pytest.fixture(scope="module")
def images() -> cure.ImageSet:
    return bright_or_dark(60, "test", classes=3)


class Accuracy:
    """A MAITE metric."""

    def __init__(self) -> None:
        self.metadata = {"id": "accuracy"}
        self.reset()

    def reset(self) -> None:
        self.right: list[bool] = []

    def update(self, predicted: Any, targets: Any, metadata: Any, /) -> None:
        for one, target in zip(predicted, targets, strict=True):
            self.right.append(np.argmax(one) == np.argmax(target))

    def compute(self) -> dict[str, float]:
        return {"accuracy": 100 * float(np.mean(self.right))}


def accuracy(network: nn.Module, image: Tensor, label: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((network(image).argmax(dim=1) == label).double().mean())


def test_maite_evaluates_our_network_data_and_attack(network, images) -> None:
    tasks = pytest.importorskip("maite.tasks", reason="MAITE is not installed")
    attack = cure.attacks.PGD(THREAT, steps=5, start="none")
    model = ImageClassifier(network, images.classes)
    data = ImageDataset(images)
    augmentation = AttackAugmentation(network, attack)
    pixels = images.image / 255
    adversarial = attack(network, pixels, images.label)
    expected = {
        None: accuracy(network, pixels, images.label),
        augmentation: accuracy(network, adversarial, images.label),
    }
    assert expected[augmentation] + 10 < expected[None] > 60
    for given, wanted in expected.items():
        found, _, _ = tasks.evaluate(
            model=model, dataset=data, metric=Accuracy(), augmentation=given, batch_size=7
        )
        assert found["accuracy"] == pytest.approx(wanted)


def test_our_classes_meet_the_protocols(network, images) -> None:
    generic = pytest.importorskip("maite.protocols.generic", reason="MAITE is not installed")
    parts = {
        generic.Model: ImageClassifier(network, images.classes),
        generic.Dataset: ImageDataset(images),
        generic.Augmentation: AttackAugmentation(network, cure.attacks.PGD(THREAT)),
    }
    for protocol, part in parts.items():
        assert isinstance(part, protocol)
        assert isinstance(part.metadata["id"], str)
    assert not isinstance(parts[generic.Model], generic.Dataset)


def test_items_of_a_data_set_are_the_images(images) -> None:
    data = ImageDataset(images)
    assert len(list(zip(range(99), data, strict=False))) == len(data) == 60
    image, target, about = data[-1]
    assert torch.equal(image, images.image[59] / 255)
    assert target.tolist() == [0, 0, 1]
    assert about == {"id": 59}
    assert data.metadata == {
        "id": "brightness test",
        "index2label": {0: "level 0", 1: "level 1", 2: "level 2"},
    }


class Foreign:
    """A MAITE data set of others: NumPy images and one-hot targets."""

    def __init__(self, images: cure.ImageSet, torch_targets: bool = False) -> None:
        self.images, self.torch_targets = images, torch_targets
        self.metadata = {"id": "foreign", "index2label": {0: "a", 2: "c"}}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any]]:
        if index >= len(self):
            raise IndexError
        target = np.eye(3)[self.images.label[index]]
        given = torch.tensor(target) if self.torch_targets else target
        return self.images.image[index].numpy(), given, {"id": index}


@pytest.mark.parametrize("torch_targets", [False, True])
def test_a_data_set_of_maite_is_images_here(images, torch_targets) -> None:
    found = as_images(Foreign(images, torch_targets), "test")
    assert torch.equal(found.image, images.image)
    assert torch.equal(found.label, images.label)
    assert found.classes == ("a", "1", "c")
    again = as_images(ImageDataset(images), "test")
    assert torch.equal(again.image, images.image)
    assert again.classes == images.classes


def test_evaluate_takes_a_model_and_a_data_set_of_maite(network, images) -> None:
    """NumPy in, probabilities out: as natural accuracy as the network's, and no gradient."""

    class Model:
        metadata = {"id": "theirs"}  # noqa: RUF012

        def __call__(self, batch: Any) -> list[np.ndarray]:
            pixels = torch.from_numpy(np.stack([np.asarray(one) for one in batch]))
            assert pixels.dtype == torch.uint8
            with torch.no_grad():
                return list(network(pixels / 255).softmax(dim=1).numpy())

    def prepare(image: Tensor) -> Tensor:
        return (255 * image).round().byte()

    wrapped = MaiteNetwork(Model(), prepare, probabilities=True)
    result = cure.evaluate(wrapped, data=Foreign(images), attacks="noise", epsilon=0.2)
    expected = accuracy(network, images.image / 255, images.label)
    assert result["natural"]["accuracy"] == pytest.approx(expected)
    with pytest.raises(ModelError, match="returns probabilities"):
        cure.evaluate(MaiteNetwork(Model(), prepare), data=Foreign(images), attacks="noise")
    with pytest.raises(cure.CureError, match="--attacks natural,noise,square"):
        cure.evaluate(wrapped, data=Foreign(images), attacks="pgd20")


def test_a_maite_model_in_pytorch_keeps_its_gradients(network, images) -> None:
    class Model:
        metadata = {"id": "theirs"}  # noqa: RUF012

        def __call__(self, batch: Any) -> list[Tensor]:
            return list(network(torch.stack(list(batch))))

    results = [
        cure.evaluate(given, data=(images.image, images.label), attacks="pgd5", epsilon=0.2)
        for given in (MaiteNetwork(Model()), network)
    ]
    found = [result["attacks"]["pgd5"]["accuracy"] for result in results]
    assert found[0] == found[1] < results[1]["natural"]["accuracy"]


def test_our_own_model_is_not_wrapped_twice(network) -> None:
    with pytest.raises(ConfigError, match="pass its network"):
        MaiteNetwork(ImageClassifier(network, ["a", "b", "c"]))


def test_what_breaks_the_protocol_is_one_sentence(network, images) -> None:
    """Names for other logits had named answers wrongly; the others ended in raw errors."""
    image = images.image[0].numpy()
    with pytest.raises(ModelError, match="returns 3 logits for 2 classes"):
        ImageClassifier(network, ["a", "b"])([image])

    class Several(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return network(image), image

    with pytest.raises(ModelError, match=r"expected logits of shape \[1, 3\], got tuple"):
        ImageClassifier(Several(), images.classes)([image])
    augmentation = AttackAugmentation(network, cure.attacks.PGD(THREAT, steps=1))
    for targets in ([2], [torch.tensor(2)]):
        with pytest.raises(DataError, match=r"expected targets \[K\], one number a class"):
            augmentation(([image], targets, [{}]))


def test_random_starts_differ_between_batches(network, images) -> None:
    attack = cure.attacks.PGD(THREAT, steps=1, step_size=0.0)
    augmentation = AttackAugmentation(network, attack)
    batch = ([images.image[0].numpy()] * 2, [np.eye(3)[0]] * 2, [{"id": 0}, {"id": 1}])
    first, again = augmentation(batch), augmentation(batch)
    assert first[1:] == again[1:] == batch[1:]
    assert not torch.equal(first[0][0], again[0][0])
    other = AttackAugmentation(network, attack)(batch)
    assert torch.equal(torch.stack(other[0]), torch.stack(first[0]))
    assert float((first[0][0] - images.image[0] / 255).abs().max()) <= 0.2 + 1e-6


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([np.full((1, 8, 8), 1.5)], "values from 1.5 to 1.5; undo their standardisation"),
        ([np.zeros((8, 8))], r"got \[8, 8\]"),
        ([np.zeros((1, 8, 8), int)], "int64; convert"),
        ([np.zeros((1, 8, 8)), np.zeros((1, 9, 8))], "resize the images"),
        ([], "got none"),
    ],
)
def test_images_that_do_not_fit_are_refused(network, batch, words) -> None:
    with pytest.raises(DataError, match=words):
        ImageClassifier(network, ["a", "b", "c"])(batch)
