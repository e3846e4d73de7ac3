"""KD against arithmetic by hand: both teachers and the student see the adversarial images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from method_bench import (
    ADVERSARIAL,
    LABELS,
    batch,
    build,
    context,
    gradients_of,
    mean_ce,
    softmax,
    table_method,
    tiny_network,
)
from pydantic import ValidationError
from test_ard import (
    NATURAL_TEACHER_ADVERSARIAL,
    TEACHER_ADVERSARIAL,
    assert_teachers_stay,
    cost,
    seen_by_teachers,
    softened,
    tables,
)
from test_trades import random_logits

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import TeacherConfig
from cure.methods.common.losses import soft_cross_entropy
from cure.methods.kd import KdConfig
from cure.recipe import load_recipe

WEIGHTS = {"cross_entropy_weight": 0.5, "teacher_weight": 0.7, "natural_teacher_weight": 0.2}


def mean_soft_ce(targets: list[list[float]], rows: list[list[float]], t: float) -> float:
    pairs = zip(softened(targets, t), softened(rows, t), strict=True)
    total = 0.0
    for target, row in pairs:
        total -= sum(p * math.log(q) for p, q in zip(softmax(target), softmax(row), strict=True))
    return t**2 * total / len(rows)


def test_soft_cross_entropy_as_a_number():
    """Halves against (3/4, 1/4) at T = 2."""
    target = torch.zeros(1, 2, dtype=torch.float64)
    logits = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    expected = -4 * (0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    assert soft_cross_entropy(target, logits, 2.0).item() == pytest.approx(expected)


def test_soft_cross_entropy_passes_gradcheck_in_the_student():
    logits, target, _ = random_logits()
    assert torch.autograd.gradcheck(
        lambda z: soft_cross_entropy(target.detach(), z, 2.0), (logits,)
    )


@pytest.mark.parametrize(("settings", "t"), [({}, 2.0), ({"temperature": 1.0, **WEIGHTS}, 1.0)])
def test_loss_of_two_samples_and_three_classes(settings, t):
    method, given = table_method("kd", tables(), **settings)
    out = method.step(given)
    labelled = mean_ce(ADVERSARIAL, LABELS)
    robust = mean_soft_ce(TEACHER_ADVERSARIAL, ADVERSARIAL, t)
    natural = mean_soft_ce(NATURAL_TEACHER_ADVERSARIAL, ADVERSARIAL, t)
    c, a, b = (0.5, 0.7, 0.2) if settings else (0.3, 0.6, 0.1)
    expected = {
        "loss": c * labelled + a * robust + b * natural,
        "adversarial_loss": labelled,
        "distillation": robust,
        "natural_distillation": natural,
        "robust_accuracy": 0.0,
    }
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(expected, rel=1e-12)


def test_gradient_in_closed_form():
    """c (p - onehot) + T a (p^T - p_T^T) + T b (p^T - p_S^T) in the adversarial logits, over B."""
    expected = np.zeros((3, 4))
    rows = zip(ADVERSARIAL, TEACHER_ADVERSARIAL, NATURAL_TEACHER_ADVERSARIAL, LABELS, strict=True)
    for column, (row, robust, natural, label) in enumerate(rows, start=2):
        p = np.array(softmax([value / 2 for value in row]))
        expected[:, column] = 0.3 * np.array(softmax(row))
        expected[label, column] -= 0.3
        expected[:, column] += 2 * 0.6 * (p - softmax([value / 2 for value in robust]))
        expected[:, column] += 2 * 0.1 * (p - softmax([value / 2 for value in natural]))
    method, given = table_method("kd", tables())
    found = gradients_of(method, method.step(given))["weight"]
    np.testing.assert_allclose(found.numpy(), expected / 2, atol=1e-12)


def test_with_next_to_no_teachers_it_is_adversarial_training():
    within, given = context(steps=3), batch(step=4)
    settings = {"teacher_weight": 1e-12, "natural_teacher_weight": 1e-12}
    ours = build("kd", tiny_network(2), within, cross_entropy_weight=1.0, **settings)
    at = build("at", tiny_network(2), within)
    found, expected = (gradients_of(method, method.step(given)) for method in (ours, at))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


# -- teachers, attack, cost ----------------------------------------------------------------------


def test_both_teachers_see_the_adversarial_images_once():
    given = batch(count=6)
    later = (given.image + 0.5).clamp(0, 1)
    within = context(attack=lambda *others, **options: later)
    method = build("kd", tiny_network(), within)
    seen = seen_by_teachers(method, lambda: method.step(given))
    assert {role: len(images) for role, images in seen.items()} == {
        "teacher": 1,
        "natural_teacher": 1,
    }
    assert all(torch.equal(images[0], later) for images in seen.values())
    network = tiny_network()
    with torch.no_grad():
        network(later)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, method.model.get_buffer(name)), name


def test_the_teachers_never_change():
    assert_teachers_stay("kd")


def test_the_attack_climbs_cross_entropy_in_the_run_s_settings():
    asked = []

    def attack(model, image, label, objective, generator, **options):
        asked.append((objective, options))
        return image

    build("kd", within=context(attack=attack)).step(batch())
    assert asked == [(CROSS_ENTROPY, {})]


def test_passes_of_a_step():
    assert cost("kd") == ((11, 11), {"teacher": 1, "natural_teacher": 1})


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"cross_entropy_weight": -0.1},
        {"teacher_weight": 0.0},
        {"natural_teacher_weight": 0.0},
        {"temperature": 0.0},
        {"teacher": {}},
    ],
)
def test_values_out_of_range_are_errors(wrong):
    with pytest.raises(ValidationError):
        KdConfig(**({"teacher": "runs/at"} | wrong))


def test_a_robust_teacher_is_required():
    with pytest.raises(ValidationError, match="teacher"):
        KdConfig()


def test_settings_from_a_recipe():
    words = [
        "method={name: kd, teacher: {recipe: cifar10-mini, settings: {method: at}}}",
        "training.averaging={kind: equal, every: epoch, start: 0.275, batch_norm: recomputed}",
    ]
    run = load_recipe("cifar10-mini", words)
    assert run.method.teachers() == {
        "teacher": TeacherConfig(recipe="cifar10-mini", settings={"method": "at"}),
        "natural_teacher": TeacherConfig(path="natural"),
    }
    assert run.training.averaging.kind == "equal"
    assert run.training.averaging.start == 0.275
