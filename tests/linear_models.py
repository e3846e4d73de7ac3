"""Linear classifiers and images whose robust accuracy is known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cure.data import ImageSet
from cure.utils.engine import Engine

ENGINE = Engine(torch.device("cpu"))


def unit(images: ImageSet) -> Tensor:
    return images.image.to(torch.float32) / 255


def image_set(image: Tensor, label: Tensor, classes: int) -> ImageSet:
    return ImageSet(image, label, tuple(map(str, range(classes))), "made", "test")


def linear(weight: Tensor, bias: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return nn.Sequential(nn.Flatten(), layer)


def margins(weight: Tensor, bias: Tensor, images: ImageSet, dual: float) -> tuple[Tensor, Tensor]:
    """For each image the lead over every other class [N, K] and its loss per unit epsilon."""
    flat = unit(images).flatten(1).double()
    logits = flat @ weight.double().T + bias.double()
    own = images.label
    lead = logits.gather(1, own[:, None]) - logits
    slope = (weight[own][:, None] - weight[None]).double().norm(p=dual, dim=2)
    lead[torch.arange(len(own)), own] = math.inf
    return lead, slope


def linear_case(
    classes: int, epsilon: float, count: int = 60, dual: float = 1, gap: float = 1e-3
) -> tuple[nn.Sequential, ImageSet, Tensor, Tensor]:
    """A linear model and mid-range images: which are right, and which are so in the whole ball.

    Images stay 0.25 from black and white, so that clipping never binds for epsilon up to 0.25.
    """
    draws = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, 16, generator=draws)
    bias = -0.5 * weight.sum(dim=1)
    image = torch.randint(64, 192, (400, 1, 4, 4), generator=draws).to(torch.uint8)
    label = linear(weight, bias)(image / 255).argmax(dim=1)
    wrong = torch.rand(400, generator=draws) < 0.15
    label = torch.where(wrong, (label + 1) % classes, label)
    images = image_set(image, label, classes)
    lead, slope = margins(weight, bias, images, dual)
    rest = (lead - epsilon * slope).amin(dim=1)
    clear = (rest.abs() > gap) & (lead.amin(dim=1).abs() > gap)
    # Some that are wrong, some that fall, some that stand: each third of what is asked.
    right, robust = lead.amin(dim=1) > 0, rest > 0
    kinds = [~right, right & ~robust, right & robust]
    picks = [(kind & clear).nonzero().flatten()[: count // 3] for kind in kinds]
    assert all(len(pick) for pick in picks)
    chosen = torch.cat(picks).sort().values
    return linear(weight, bias), images.subset(chosen), right[chosen], robust[chosen]
