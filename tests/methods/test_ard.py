"""ARD against arithmetic by hand: the teacher sees x, the student x_adv, both softened."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_bench import (
    ADVERSARIAL,
    LABELS,
    NATURAL,
    Table,
    batch,
    build,
    context,
    gradients_of,
    mean_ce,
    mean_kl,
    passes,
    softmax,
    table_method,
    teacher_network,
    tiny_network,
)
from pydantic import ValidationError
from test_trades import random_logits
from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import TeacherConfig
from cure.methods import Method
from cure.methods.ard import ArdConfig
from cure.methods.common.losses import distillation
from cure.methods.common.teacher import Teacher
from cure.recipe import load_recipe

# What the teachers say of the two natural and of the two adversarial images.
TEACHER_NATURAL = [[0.0, 3.0, 1.0], [2.0, -1.0, 0.5]]
TEACHER_ADVERSARIAL = [[1.5, 1.0, -0.5], [0.25, 0.5, 0.0]]
NATURAL_TEACHER_ADVERSARIAL = [[-1.0, 0.75, 2.0], [1.0, 3.0, -2.0]]


def tables() -> dict[str, nn.Module]:
    """The teachers of :func:`table_method`; the natural one has no business with natural images."""
    nonsense = [[math.nan] * 3] * 2
    return {
        "teacher": Table([*TEACHER_NATURAL, *TEACHER_ADVERSARIAL]),
        "natural_teacher": Picky([*nonsense, *NATURAL_TEACHER_ADVERSARIAL]),
    }


class Picky(Table):
    """A table that reads one column, where a product would spread a NaN over all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.T[x.flatten(1).argmax(dim=1)]


def softened(rows: list[list[float]], temperature: float) -> list[list[float]]:
    return [[value / temperature for value in row] for row in rows]


def mean_distillation(
    targets: list[list[float]], rows: list[list[float]], temperature: float
) -> float:
    return temperature**2 * mean_kl(softened(targets, temperature), softened(rows, temperature))


def teachers_of(method: Method) -> dict[str, Teacher]:
    return {name: part for name, part in method.named_modules() if isinstance(part, Teacher)}


def seen_by_teachers(method: Method, act: Callable[[], object]) -> dict[str, list[Tensor]]:
    """The images that reach each teacher while ``act`` runs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in teachers_of(method)}
    handles = [
        teacher.network.register_forward_hook(
            lambda module, given, output, name=name: seen[name].append(given[0].clone())
        )
        for name, teacher in teachers_of(method).items()
    ]
    act()
    for handle in handles:
        handle.remove()
    return seen


def cost(name: str, **settings: object) -> tuple[tuple[int, int], dict[str, int]]:
    """Passes of the network (forward, backward) and of each teacher, with 10 attack steps."""
    method = build(name, within=context(steps=10), **settings)
    found: list[tuple[int, int]] = []
    seen = seen_by_teachers(method, lambda: found.append(passes(method)))
    return found[0], {role: len(images) for role, images in seen.items()}


def assert_teachers_stay(name: str, **settings: object) -> None:
    """Weights, buffers, modes and learning of the teachers, over steps and changes of mode."""
    given = {role: teacher_network(n) for n, role in enumerate(("teacher", "natural_teacher"))}
    before = copy.deepcopy(given)
    method = build(name, within=context(teachers=given), **settings)
    optimizer = torch.optim.SGD(method.trainable().values(), 0.1)
    assert not any("teacher" in key for key in method.trainable())
    for step in range(3):
        method.train()
        found = gradients_of(method, method.step(batch(step)))
        for key, parameter in method.trainable().items():
            parameter.grad = found[key]
        optimizer.step()
        method.after_step(step)
        for role, teacher in teachers_of(method).items():
            assert teacher.network is given[role]
            assert not any(module.training for module in teacher.modules())
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
            assert all(parameter.grad is None for parameter in teacher.parameters())
            for key, value in teacher.network.state_dict().items():
                assert torch.equal(value, before[role].state_dict()[key]), key
        assert all(module.training for module in method.model.modules())


# -- the loss ------------------------------------------------------------------------------------


def test_distillation_as_a_number():
    """(1/2, 1/2) against softmax(log 3, 0) at T = 2, then with the temperature hidden in T^2."""
    target = torch.zeros(1, 2, dtype=torch.float64)
    logits = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert distillation(target, logits, 2.0).tolist() == pytest.approx([4 * kl])
    assert distillation(target, logits / 2, 1.0).tolist() == pytest.approx([kl])


def test_distillation_of_each_sample_and_its_gradient():
    target, logits = (torch.tensor(r, dtype=torch.float64) for r in (TEACHER_NATURAL, ADVERSARIAL))
    alone = [
        mean_distillation([t], [r], 3.0) for t, r in zip(TEACHER_NATURAL, ADVERSARIAL, strict=True)
    ]
    assert distillation(target, logits, 3.0).tolist() == pytest.approx(alone)
    first, second, _ = random_logits()
    assert torch.autograd.gradcheck(lambda a, b: distillation(a, b, 3.0), (first, second))


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 30.0), (1.0, 1.0), (0.25, 4.0)])
def test_loss_of_two_samples_and_three_classes(alpha, temperature, divided):
    method, given = table_method(
        "ard", tables(), alpha=alpha, temperature=temperature, divide_by_classes=divided
    )
    out = method.step(given)
    distilled = mean_distillation(TEACHER_NATURAL, ADVERSARIAL, temperature)
    distilled /= 3 if divided else 1
    natural = mean_ce(NATURAL, LABELS)
    expected = {
        "loss": alpha * distilled + (1 - alpha) * natural,
        "distillation": distilled,
        "robust_accuracy": 0.0,
    }
    if alpha < 1:
        expected |= {"natural_loss": natural, "accuracy": 1.0}
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(expected, rel=1e-9)


def test_divided_by_classes_is_the_released_reduction():
    """``nn.KLDivLoss()`` as that code calls it, on batch and classes."""
    method, given = table_method("ard", tables(), temperature=5.0, divide_by_classes=True)
    student, teacher = (torch.tensor(r).double() for r in (ADVERSARIAL, TEACHER_NATURAL))
    with pytest.warns(UserWarning, match="batchmean"):
        mean = nn.KLDivLoss()((student / 5).log_softmax(1), (teacher / 5).softmax(1))
    assert method.step(given).loss.item() == pytest.approx(25 * mean.item(), rel=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_gradient_in_closed_form(alpha):
    """t (q^t - p_T^t) in the adversarial logits, p - onehot in the natural ones; over B."""
    expected = np.zeros((3, 4))
    rows = zip(NATURAL, ADVERSARIAL, TEACHER_NATURAL, LABELS, strict=True)
    for column, (natural, adversarial, teacher, label) in enumerate(rows):
        if alpha < 1:
            expected[:, column] = (1 - alpha) * np.array(softmax(natural))
            expected[label, column] -= 1 - alpha
        target = np.array(softmax([value / 4 for value in teacher]))
        own = np.array(softmax([value / 4 for value in adversarial]))
        expected[:, column + 2] = alpha * 4 * (own - target)
    method, given = table_method("ard", tables(), alpha=alpha, temperature=4.0)
    found = gradients_of(method, method.step(given))["weight"]
    np.testing.assert_allclose(found.numpy(), expected / 2, atol=1e-12)


def test_a_student_that_already_says_the_same_has_nothing_to_learn():
    within = context(attack=lambda model, image, *others, **options: image)
    model = teacher_network(3, torch.float64)
    model.eval()
    method = build("ard", model, replace(within, teachers={"teacher": copy.deepcopy(model)}))
    method.model.eval()
    out = method.step(batch(dtype=torch.float64))
    assert out.loss.item() == pytest.approx(0, abs=1e-12)
    for gradient in gradients_of(method, out).values():
        assert gradient.abs().max() < 1e-9


# -- teacher, attack, cost -----------------------------------------------------------------------


def test_the_teacher_sees_the_natural_images_once():
    method, given = build("ard"), batch()
    seen = seen_by_teachers(method, lambda: method.step(given))
    assert [len(images) for images in seen.values()] == [1]
    assert torch.equal(seen["teacher"][0], given.image)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_teacher_never_changes(alpha):
    assert_teachers_stay("ard", alpha=alpha)


def test_the_attack_climbs_cross_entropy_in_the_run_s_settings():
    asked = []

    def attack(model, image, label, objective, generator, **options):
        asked.append((objective, options))
        return image

    build("ard", within=context(attack=attack)).step(batch())
    assert asked == [(CROSS_ENTROPY, {})]


@pytest.mark.parametrize(("alpha", "count"), [(1.0, 11), (0.9, 12)])
def test_passes_of_a_step(alpha, count):
    assert cost("ard", alpha=alpha) == ((count, count), {"teacher": 1})


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_adversarial_images_pass_first_and_natural_ones_only_if_they_count(alpha):
    """BatchNorm's running statistics remember which came last."""
    given = batch(count=6)
    later = (given.image + 0.5).clamp(0, 1)
    within = context(attack=lambda *others, **options: later)
    method = build("ard", tiny_network(), within, alpha=alpha)
    network = tiny_network()
    method.step(given)
    with torch.no_grad():
        network(later)
        if alpha < 1:
            network(given.image)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, method.model.get_buffer(name)), name


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"alpha": 0.0}, {"alpha": 1.1}, {"temperature": 0.0}, {"teacher": {}}]
)
def test_values_out_of_range_are_errors(wrong):
    with pytest.raises(ValidationError):
        ArdConfig(**({"teacher": "runs/at"} | wrong))


def test_a_teacher_is_required():
    with pytest.raises(ValidationError, match="teacher"):
        ArdConfig()


def test_settings_from_a_recipe():
    run = load_recipe("cifar10-mini", ["method={name: ard, teacher: runs/at, temperature: 1}"])
    assert run.method == ArdConfig(teacher=TeacherConfig(path="runs/at"), temperature=1.0)
    assert run.method.teachers() == {"teacher": TeacherConfig(path="runs/at")}
    defaults = ArdConfig(teacher="runs/at")
    assert (defaults.alpha, defaults.temperature) == (1.0, 30.0)
    assert not defaults.divide_by_classes
