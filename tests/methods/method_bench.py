"""A small bench for methods: networks, batches and a context, all seeded and on the processor."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks import PGD, Threat
from cure.config import ModelConfig, Section, TeacherConfig
from cure.data.images import Batch
from cure.methods import METHODS, Context, Method
from cure.utils.engine import Engine

CLASSES = 3
SAMPLES = 24


class Block(nn.Module):
    """Two convolutions, named as in a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        change = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x + change)


class TinyNetwork(nn.Module):
    """[B, 1, 6, 6] to [B, 3]; the first tensor and one of the block have "conv1" in their name."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.block = Block(width)
        self.linear = nn.Linear(width * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.bn1(self.conv1(x))))
        return self.linear(nn.functional.avg_pool2d(x, 2).flatten(1))


def tiny_network(seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyNetwork:
    """A tiny network in training mode; its BatchNorm weights are not all one."""
    torch.manual_seed(seed)
    model = TinyNetwork().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.train()


def batch(
    step: int = 0, count: int = SAMPLES, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Batch:
    """Separable images: class k is bright in its own two rows."""
    draws = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % CLASSES
    image = 0.4 * torch.rand(count, 1, 6, 6, generator=draws, dtype=torch.float64)
    for position, own in enumerate(label.tolist()):
        image[position, :, 2 * own : 2 * own + 2] += 0.5
    return Batch(image.to(dtype), label, torch.arange(count), step)


@functools.cache
def _learnt(seed: int, dtype: torch.dtype) -> TinyNetwork:
    model = tiny_network(seed, dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(30):
        given = batch(seed=1000 + step, dtype=dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(given.image), given.label).backward()
        optimizer.step()
    return model


def teacher_network(seed: int = 50, dtype: torch.dtype = torch.float32) -> TinyNetwork:
    """A tiny network that knows the batches, in training mode."""
    model = copy.deepcopy(_learnt(seed, dtype))
    model.zero_grad()
    return model


def context(
    *, steps: int = 2, epsilon: float = 0.1, seed: int = 0, attack: Any = None, **changes: Any
) -> Context:
    """A run of 4 epochs of 10 steps, with a short attack."""
    plain = PGD(Threat("Linf", epsilon), steps, epsilon / 2, "gaussian")
    whole = Context(
        engine=Engine(torch.device("cpu")),
        attack=plain if attack is None else attack,
        seed=seed,
        classes=CLASSES,
        steps_per_epoch=10,
        epochs=4,
        natural_images=lambda: iter([batch().image]),
    )
    return replace(whole, **changes)


def small_networks(section: type[Section], given: dict[str, Any]) -> dict[str, Any]:
    """The settings ``given``, with a small network wherever a method would build one of its own."""
    settings = dict(given)
    for key, field in section.model_fields.items():
        kind = field.annotation
        if kind is ModelConfig:
            settings.setdefault(key, {"name": "small_cnn", "options": {"width": 4}})
        elif isinstance(kind, type) and issubclass(kind, Section):
            before = settings.get(key, {})
            if isinstance(before, dict) and (inner := small_networks(kind, before)) != before:
                settings[key] = inner
    return settings


def build(
    name: str, model: nn.Module | None = None, within: Context | None = None, **settings: Any
) -> Method:
    """The method called ``name`` with these settings, in training mode.

    Teachers that its settings ask for and the context does not hold are tiny networks that know
    the batches.  A network that it builds for itself is a small one unless the settings name it.
    """
    kind = METHODS[name]
    model = tiny_network() if model is None else model
    within = within or context()
    for key, field in kind.Config.model_fields.items():
        if field.annotation is TeacherConfig and field.is_required():
            settings.setdefault(key, "a/run")
    config = kind.Config(name=name, **small_networks(kind.Config, settings))
    dtype = next(model.parameters()).dtype
    made = {role: teacher_network(50 + n, dtype) for n, role in enumerate(config.teachers())}
    within = replace(within, teachers={**made, **within.teachers})
    return kind(model, config, within).train()


def gradients_of(method: Method, out: Any) -> dict[str, Tensor]:
    """What a trainer would put into ``.grad``."""
    if out.grads is not None:
        return out.grads
    return method.context.engine.gradients(out.loss, method.trainable())


def fixed_attack(adversarial_image: Tensor) -> Callable[..., Tensor]:
    """An attack that answers with images made beforehand."""
    return lambda *arguments, **options: adversarial_image


# -- two samples, three classes, by hand ---------------------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    """Probabilities of one sample."""
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def mean_kl(targets: list[list[float]], others: list[list[float]]) -> float:
    """Mean over the samples of sum p log(p / q)."""
    total = 0.0
    for target, other in zip(targets, others, strict=True):
        pairs = zip(softmax(target), softmax(other), strict=True)
        total += sum(p * math.log(p / q) for p, q in pairs)
    return total / len(targets)


def mean_ce(logits: list[list[float]], labels: list[int]) -> float:
    """Mean over the samples of - log p_y."""
    rows = zip(logits, labels, strict=True)
    return sum(-math.log(softmax(row)[label]) for row, label in rows) / len(labels)


class Table(nn.Module):
    """Logits of pixel vectors: z = W x; one-hot images read the columns of W."""

    def __init__(self, columns: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(columns, dtype=torch.float64).T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


NATURAL = [[1.0, 2.0, -1.0], [0.5, 0.0, 0.25]]
ADVERSARIAL = [[2.0, 0.5, 0.0], [-1.0, 1.0, 0.0]]
LABELS = [1, 0]


def table_method(
    name: str, teachers: Mapping[str, nn.Module] | None = None, **settings
) -> tuple[Method, Batch]:
    """A method whose natural and adversarial logits are the constants above."""
    unit = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    within = context(attack=fixed_attack(unit[2:]), teachers=teachers or {})
    method = build(name, Table([*NATURAL, *ADVERSARIAL]), within, **settings)
    return method, Batch(unit[:2], torch.tensor(LABELS), torch.arange(2), 0)


def passes(method: Method) -> tuple[int, int]:
    """Forward passes of a step, and the gradients that reach the network's logits."""
    counts = {"forward": 0, "backward": 0}

    def arrived(gradient: Tensor) -> None:
        counts["backward"] += 1

    def passed(module: nn.Module, inputs: object, output: Tensor) -> None:
        counts["forward"] += 1
        if output.requires_grad:
            output.register_hook(arrived)

    handle = method.model.register_forward_hook(passed)
    gradients_of(method, method.step(batch()))
    handle.remove()
    return counts["forward"], counts["backward"]
