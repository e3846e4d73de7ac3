"""MAITE's protocols for image classification, both ways.

`MAITE <https://mit-ll-ai-technology.github.io/maite/>`_ is a set of protocols, so nothing needs to
be installed here.  Its data sets are images for every function of this package as they are
(:func:`cure.data.as_images`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cure.attacks import PGD
from cure.data import as_images, to_unit
from cure.errors import ConfigError, DataError, ModelError
from cure.models.checks import checked_logits
from cure.utils.modes import in_evaluation
from cure.utils.random import generator

Batch = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]
"""Images [C, H, W], targets [K] and metadata."""


class ImageClassifier:
    """A network as a MAITE ``Model``: images [C, H, W] to logits [K].

    Args:
        network: images [B, C, H, W] in [0, 1] to logits [B, K]; it is put into evaluation mode.
        classes: name of each class.
        name: of the model.

    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    >>> model = ImageClassifier(network, ["cat", "dog"])
    >>> model([torch.rand(1, 8, 8)])[0].shape, model.metadata["index2label"]
    (torch.Size([2]), {0: 'cat', 1: 'dog'})
    """

    def __init__(self, network: nn.Module, classes: Sequence[str], name: str = "cure") -> None:
        self.network = in_evaluation(network)
        self.metadata: dict[str, Any] = {"id": name, "index2label": dict(enumerate(classes))}

    def __call__(self, batch: Sequence[Any], /) -> Sequence[Tensor]:
        """Logits [K] of each image [C, H, W], uint8 or floats in [0, 1]."""
        classes = len(self.metadata["index2label"])
        image = _pixels(batch).to(_device(self.network))
        logits = checked_logits(self.network, image, str(classes))
        if logits.shape[1] != classes:
            raise ModelError(
                f"ImageClassifier: the network returns {logits.shape[1]} logits for {classes} "
                "classes; name the class of each logit, in their order"
            )
        return list(logits.cpu())


class ImageDataset:
    """Images as a MAITE ``Dataset``: [C, H, W] float32 in [0, 1], one-hot targets [K], metadata.

    Args:
        images: an image set, or what :func:`cure.data.as_images` takes.
        name: of the data set; by default that of the images.

    >>> image, target, about = ImageDataset((np.zeros((2, 8, 8), np.uint8), [0, 1]))[1]
    >>> image.shape, target, about
    (torch.Size([1, 8, 8]), tensor([0., 1.]), {'id': 1})
    """

    def __init__(self, images: Any, name: str | None = None) -> None:
        self.images = as_images(images)
        self.metadata = {
            "id": name or f"{self.images.name} {self.images.split}",
            "index2label": dict(enumerate(self.images.classes)),
        }

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Image, target and metadata."""
        row = range(len(self))[index]
        image = to_unit(self.images.rows(slice(row, row + 1))[0])
        target = torch.zeros(len(self.images.classes))
        target[self.images.label[row]] = 1
        return image, target, {"id": row}


class AttackAugmentation:
    """An attack as a MAITE ``Augmentation``: batches of adversarial images, with their metadata.

    Args:
        network: images [B, C, H, W] in [0, 1] to logits [B, K].
        attack: such as ``cure.attacks.PGD(cure.Threat("Linf", "4/255"), steps=20)``.
        seed: of the random starts, which differ from batch to batch.
        name: of the augmentation.
    """

    def __init__(self, network: nn.Module, attack: PGD, seed: int = 0, name: str = "cure") -> None:
        self.network, self.attack = network, attack
        self.metadata = {"id": name}
        self._draws = generator(_device(network), seed, "augmentation")

    def __call__(self, batch: Batch, /) -> Batch:
        """The batch with adversarial images; the classes are those of the largest targets."""
        images, targets, metadata = batch
        device = _device(self.network)
        target = _stack(targets)
        if target.dim() != 2:
            raise DataError(
                f"expected targets [K], one number a class, got {list(target.shape[1:])}; write "
                "class numbers as one-hot targets"
            )
        label = target.argmax(dim=1).to(device)
        pixels = _pixels(images).to(device)
        adversarial = self.attack(self.network, pixels, label, generator=self._draws)
        return list(adversarial.cpu()), targets, metadata


class MaiteNetwork(nn.Module):
    """A MAITE ``Model`` as a network for this package: ``cure.evaluate(MaiteNetwork(model), ...)``.

    Where the model computes in PyTorch and keeps the graph, attacks use its gradients; else
    ``noise``, ``square`` and ``transfer`` can be run.  To train a network, pass the
    ``torch.nn.Module`` inside the model: the protocol has no weights.

    Args:
        model: images [C, H, W] to one vector [K] each.
        prepare: from images [B, C, H, W] in [0, 1] to what the model takes, for example
            ``lambda image: (255 * image).byte()``.
        probabilities: the model returns probabilities; their logarithms are the logits.
    """

    def __init__(
        self,
        model: Callable[[Sequence[Any]], Sequence[Any]],
        prepare: Callable[[Tensor], Tensor] = lambda image: image,
        *,
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(model, ImageClassifier):
            raise ConfigError(
                "MaiteNetwork: expected a MAITE model of others, got an ImageClassifier; pass its "
                "network, which has gradients"
            )
        self.model, self.prepare, self.probabilities = model, prepare, probabilities
        # The weights are not seen, so an interrupted evaluation must not go on with others.
        self.register_buffer("token", torch.tensor(list(uuid.uuid4().bytes), dtype=torch.uint8))

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [0, 1]."""
        logits = _stack(self.model(list(self.prepare(image)))).to(image)
        if not self.probabilities:
            return logits
        return logits.clamp_min(torch.finfo(logits.dtype).tiny).log()

    def __deepcopy__(self, memo: dict[int, Any]) -> MaiteNetwork:
        """The network itself: the model behind the protocol may not be copied."""
        return self

    def extra_repr(self) -> str:
        """Name of the model."""
        metadata: Mapping[str, Any] = getattr(self.model, "metadata", {})
        return str(metadata.get("id", type(self.model).__name__))


def _device(network: nn.Module) -> torch.device:
    return next((weight.device for weight in network.parameters()), torch.device("cpu"))


def _stack(values: Sequence[Any]) -> Tensor:
    """Arrays of any kind as one tensor."""
    tensors = [v if isinstance(v, Tensor) else torch.from_numpy(np.array(v)) for v in values]
    if len({tensor.shape for tensor in tensors}) != 1:
        shapes = sorted({str(list(tensor.shape)) for tensor in tensors})
        raise DataError(
            f"expected arrays of one shape in a batch, got {' and '.join(shapes) or 'none'}; "
            "resize the images"
        )
    return torch.stack(tensors)


def _pixels(images: Sequence[Any]) -> Tensor:
    """Images [B, C, H, W], float32 in [0, 1], from uint8 or floats."""
    image = _stack(images)
    if image.dim() != 4 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise DataError(
            f"expected images [C, H, W] of uint8 or floats in [0, 1], got {list(image.shape[1:])} "
            f"of {image.dtype}; convert them"
        )
    image = to_unit(image).float()
    if not 0 <= image.min() <= image.max() <= 1:
        raise DataError(
            f"expected images in [0, 1], got values from {float(image.min()):.4g} to "
            f"{float(image.max()):.4g}; undo their standardisation"
        )
    return image
