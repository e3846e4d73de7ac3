"""Networks of digits, and failures of evaluation, each a small wrapper around such a network.

Each returns logits of images [B, C, H, W] in [0, 1], in evaluation mode unless it says otherwise.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cure.attacks import PGD, Threat
from cure.attacks.losses import CROSS_ENTROPY
from cure.data import ImageSet

THREAT = Threat("Linf", 0.15)
MEAN, STD = 0.3, 0.38


def digits(start: int, stop: int) -> ImageSet:
    """Some of scikit-learn's digits."""
    bunch = load_digits()
    image = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    label = torch.from_numpy(bunch.target.astype(np.int64))
    names = tuple(map(str, range(10)))
    return ImageSet(image[start:stop], label[start:stop], names, "digits", "test")


def train(model: nn.Module, epochs: int, attack: PGD | None) -> nn.Module:
    """Train on digits, or on adversarial images of them."""
    images = digits(0, 1500)
    image, label = images.image / 255, images.label
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for part in torch.randperm(len(images), generator=draws).split(64):
            x: Tensor = image[part]
            if attack is not None:
                x = attack(model, x, label[part], CROSS_ENTROPY, draws)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x), label[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


class Around(nn.Module):
    """A network behind a change of its images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def change(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        return self.network(self.change(image))


class Quantised(Around):
    """Eight levels: the derivative of rounding is zero."""

    def change(self, image: Tensor) -> Tensor:
        return (7 * image).round() / 7


class Scaled(nn.Module):
    """Logits so large that the softmax rounds to 1 (distillation)."""

    def __init__(self, network: nn.Module, factor: float = 1e4) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, image: Tensor) -> Tensor:
        return self.factor * self.network(image)


class Softmax(nn.Module):
    """Probabilities."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).softmax(dim=1)


class Dropout(Around):
    """Dropout of pixels that nobody turned off."""

    def change(self, image: Tensor) -> Tensor:
        return F.dropout(image, 0.1, training=True)


class RandomResizing(Around):
    """Each call shrinks the images to another size, and back."""

    def change(self, image: Tensor) -> Tensor:
        size = int(torch.randint(5, 8, ()))
        small = F.interpolate(image, size=(size, size), mode="bilinear")
        return F.interpolate(small, size=image.shape[2:], mode="bilinear")


class Stopped(Around):
    """A gradient that ends at the image."""

    def change(self, image: Tensor) -> Tensor:
        return image.detach()


class Shattered(Around):
    """A ripple a tenth of the ball high and far narrower than a step, with its true gradient."""

    def change(self, image: Tensor) -> Tensor:
        return image + 0.015 * torch.sin(5000 * image)


class _Lies(torch.autograd.Function):
    @staticmethod
    def forward(context: object, image: Tensor) -> Tensor:
        return image.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        draws = torch.Generator().manual_seed(0)
        return torch.randn(gradient.shape, generator=draws)


class WrongGradient(Around):
    """The right logits with a gradient that has nothing to do with them."""

    def change(self, image: Tensor) -> Tensor:
        return _Lies.apply(image)


class Rippled(Around):
    """A ripple of one grey level: its derivative is right at the 256 levels and nowhere else."""

    def change(self, image: Tensor) -> Tensor:
        turn = 2 * torch.pi * 255
        return image + 0.01 * torch.sin(turn * image)


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(context: object, image: Tensor) -> Tensor:
        return image.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient + 8 * gradient.std() * torch.randn_like(gradient)


class NoisyGradient(Around):
    """The right gradient under noise, which many steps and starts average out."""

    def change(self, image: Tensor) -> Tensor:
        return _Noise.apply(image)


class Jpeg(Around):
    """Images go through JPEG in another library, which autograd does not follow."""

    def change(self, image: Tensor) -> Tensor:
        clean = [self._compressed(one) for one in image.detach().cpu().numpy()]
        return torch.from_numpy(np.stack(clean))[:, None].to(image)

    @staticmethod
    def _compressed(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        pixels = np.rint(255 * image[0].clip(0, 1)).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=60)
        return np.asarray(Image.open(file), np.float32) / 255


class Numpy(Jpeg):
    """The same without ``detach``: autograd raises."""

    def change(self, image: Tensor) -> Tensor:
        return super().change(torch.from_numpy(image.numpy()))


class StuckInTraining(Around):
    """``eval()`` does not reach the network, whose BatchNorm uses the batch's statistics."""

    def train(self, mode: bool = True) -> StuckInTraining:
        super().train(mode)
        self.network.train()
        return self

    def change(self, image: Tensor) -> Tensor:
        return image


class TrainingOnly(Around):
    """A defence that acts in training mode, and is not there when it is evaluated."""

    def change(self, image: Tensor) -> Tensor:
        return (image > 0.5).to(image) if self.training else image


class InPlace(nn.Module):
    """Standardises the caller's own images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        image *= 0.9
        return self.network(image)


class SquareRoot(Around):
    """The derivative of the root is infinite at black."""

    def change(self, image: Tensor) -> Tensor:
        return image.sqrt() ** 2


class Decisions(nn.Module):
    """One for the class and zero for the others."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return F.one_hot(self.network(image).argmax(dim=1), 10).to(image)


class Sigmoid(nn.Module):
    """A number in [0, 1] for each class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).sigmoid()


class Brittle(nn.Module):
    """Divides by what is zero in a black image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image) / image.amax(dim=(1, 2, 3))[:, None]


class Half(nn.Module):
    """Weights of half precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.bfloat16()

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image.bfloat16()).float()


# Failures of defences from the literature on adaptive attacks.


class KWinners(nn.Module):
    """Keeps the largest tenth of the activations.  Source: Xiao, Zhong and Zheng, ICLR 2020."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share

    def forward(self, value: Tensor) -> Tensor:
        flat = value.flatten(1)
        kept = max(1, int(self.share * flat.shape[1]))
        least = flat.topk(kept, dim=1).values[:, -1]
        return value * (value >= least.reshape(-1, *[1] * (value.dim() - 1))).to(value)


class Thresholded(nn.Module):
    """One where an activation is above a threshold, else zero; trained straight through."""

    def forward(self, value: Tensor) -> Tensor:
        hard = (value > 0.5).to(value)
        return hard + (value.clamp(0, 1) - value.clamp(0, 1).detach()) if self.training else hard


class SparseMean(nn.Module):
    """Features near their mean become the mean.  Source: MeanSparse (Amini et al., 2024)."""

    mean: Tensor
    spread: Tensor

    def __init__(self, value: Tensor, width: float) -> None:
        super().__init__()
        self.register_buffer("mean", value.mean(dim=(0, 2, 3), keepdim=True))
        self.register_buffer("spread", width * value.std(dim=(0, 2, 3), keepdim=True))

    def forward(self, value: Tensor) -> Tensor:
        near = (value - self.mean).abs() <= self.spread
        return torch.where(near, self.mean.expand_as(value), value)


class StableODE(nn.Module):
    """Features follow ``dz/dt = A z + b(z)`` towards a stable point of each class.

    Stands for the block of Kang et al., NeurIPS 2021, after its regulariser has made every
    eigenvalue of the Jacobian negative: the flow contracts around the class that the features are
    nearest to, and with it the gradient.
    """

    def __init__(self, classes: int, steps: int = 60, size: float = 0.2) -> None:
        super().__init__()
        self.classes, self.steps, self.size = classes, steps, size

    def forward(self, value: Tensor) -> Tensor:
        for _ in range(self.steps):
            points = (8 * value).softmax(dim=1)
            value = value + self.size * (points - value)
        return value


def convolutional(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """A small network with its activations in modules."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        activation(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
