"""The straightforward CURE step, with nothing done for speed: what ours is measured against.

Written plainly, as the paper's authors released it: the usual network code, float32, contiguous
images, BatchNorm as it is in the attack, four calls of autograd with retained graphs, percentiles
by NumPy on the host, a revision model whose graph is built and never used.  The meaning is the
paper's, as in ours, so that gradients can be compared; the released code takes one backward pass
more (its score takes the KL term, which reaches both images): that is not held against it here.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, with the keys of ours."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Features of features."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + self.shortcut(x)
        return F.relu(out)


class PlainResNet(nn.Module):
    """The 32x32 residual network of this line of work, with the keys of ours."""

    def __init__(self, blocks: int, width: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage in range(4):
            wide = width * 2**stage
            first = Block(channels, wide, 1 if stage == 0 else 2)
            stages.append(nn.Sequential(first, *(Block(wide, wide, 1) for _ in range(blocks - 1))))
            channels = wide
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """Batch mean of KL(softmax(target) || softmax(logits))."""
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(target, 1), reduction="batchmean")


class Yardstick:
    """One network in training by CURE, a step at a time.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits; trained in place.
        epsilon: radius of the Linf ball.
        step_size: of the attack.
        attack_steps: of the attack.
        percent: share of weights that a step conserves.
        alpha: weight of the natural gradient in the score.
        gamma: weight of the consistency.
        rate: probability that the revision model moves.
        decay: share of the revision model that a move keeps.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float = 8 / 255,
        step_size: float = 2 / 255,
        attack_steps: int = 10,
        percent: float = 30.0,
        alpha: float = 0.1,
        gamma: float = 1.0,
        rate: float = 0.2,
        decay: float = 0.999,
    ) -> None:
        self.model = model
        self.revision = copy.deepcopy(model)
        self.epsilon, self.step_size, self.attack_steps = epsilon, step_size, attack_steps
        self.percent, self.alpha, self.gamma = percent, alpha, gamma
        self.rate, self.decay = rate, decay
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False
        )

    def attack(self, image: Tensor, noise: Tensor) -> Tensor:
        """Images that climb the KL divergence, from ``image`` and a little ``noise``."""
        self.model.eval()
        with torch.no_grad():
            natural = self.model(image)
        adversarial = (image + 0.001 * noise).detach()
        for _ in range(self.attack_steps):
            adversarial.requires_grad_()
            divergence = kl(natural, self.model(adversarial)) * len(image)
            (gradient,) = torch.autograd.grad(divergence, [adversarial])
            adversarial = adversarial.detach() + self.step_size * gradient.sign()
            change = (adversarial - image).clamp(-self.epsilon, self.epsilon)
            adversarial = (image + change).clamp(0, 1).detach()
        self.model.train()
        return adversarial

    def gradients(
        self, image: Tensor, label: Tensor, adversarial: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the total loss, and masks that are 1 where a weight is updated."""
        parameters = list(self.model.parameters())
        self.revision.train()
        natural_logits, adversarial_logits = self.model(image), self.model(adversarial)
        natural_loss = F.cross_entropy(natural_logits, label)
        adversarial_loss = F.cross_entropy(adversarial_logits, label)
        revision_natural, revision_adversarial = self.revision(image), self.revision(adversarial)
        consistency = kl(revision_natural.detach(), natural_logits) + kl(
            revision_adversarial.detach(), adversarial_logits
        )
        loss = natural_loss + kl(natural_logits, adversarial_logits) + self.gamma * consistency
        by_natural = torch.autograd.grad(natural_loss, parameters, retain_graph=True)
        by_adversarial = torch.autograd.grad(adversarial_loss, parameters, retain_graph=True)
        total = torch.autograd.grad(loss, parameters, retain_graph=True)
        torch.autograd.grad(consistency, parameters)
        masks = []
        for natural, robust in zip(by_natural, by_adversarial, strict=True):
            score = (self.alpha * natural.abs() + (1 - self.alpha) * robust.abs()).cpu().numpy()
            limit = np.percentile(score, self.percent)
            mask = np.ones_like(score)
            mask[score < limit] = 0
            masks.append(torch.from_numpy(mask).to(image.device))
        return list(total), masks

    def step(self, image: Tensor, label: Tensor, noise: Tensor) -> None:
        """Train on one batch."""
        adversarial = self.attack(image, noise)
        total, masks = self.gradients(image, label, adversarial)
        for parameter, gradient, mask in zip(self.model.parameters(), total, masks, strict=True):
            parameter.grad = gradient * mask
        self.optimizer.step()
        if torch.rand(1).item() < self.rate:
            for own, other in zip(self.revision.parameters(), self.model.parameters(), strict=True):
                own.data = self.decay * own.data + (1 - self.decay) * other.data
