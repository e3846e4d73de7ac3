"""HAT: TRADES, and helpers beyond the ball that bear the natural teacher's labels of x_adv."""

from __future__ import annotations

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
from torch import Tensor, nn

from cure.attacks.losses import KL
from cure.config import TeacherConfig
from cure.methods.hat import HatConfig, helper_image
from cure.recipe import load_recipe

# What the teacher says to the two natural and the two adversarial images.
TEACHER = [[0.0, -5.0, 1.0], [0.0, 1.0, -5.0], [0.0, 0.0, 1.0], [2.0, 1.5, -5.0]]
HELPER_LABELS = [2, 0]


def helper_rows(scale: float) -> list[list[float]]:
    """Logits of the helpers, as the table is linear in its images."""
    rows = zip(NATURAL, ADVERSARIAL, strict=True)
    return [[x + scale * (a - x) for x, a in zip(*pair, strict=True)] for pair in rows]


def step_on_table(**settings):
    method, given = table_method("hat", {"natural_teacher": Table(TEACHER)}, **settings)
    return method, method.step(given)


def test_the_planted_labels_tell_what_the_teacher_was_asked():
    """On x or on x_h, or for its least likely class, it would give others."""
    natural, adversarial = (np.array(TEACHER[:2]), np.array(TEACHER[2:]))
    assert adversarial.argmax(1).tolist() == HELPER_LABELS
    helpers = natural + 2 * (adversarial - natural)
    for rows in (natural, helpers, -adversarial):
        assert rows.argmax(1).tolist() != HELPER_LABELS
    assert LABELS != HELPER_LABELS


@pytest.mark.parametrize(
    "settings",
    [{}, {"beta": 0.0, "gamma": 1.0}, {"helper_scale": 3.5}, {"gamma": 2.0, "helper_scale": 1.0}],
)
def test_loss_of_two_samples_and_three_classes(settings):
    full = {"beta": 2.5, "gamma": 0.5, "helper_scale": 2.0} | settings
    helper = helper_rows(full["helper_scale"])
    parts = mean_ce(NATURAL, LABELS), mean_kl(NATURAL, ADVERSARIAL), mean_ce(helper, HELPER_LABELS)
    right = [int(np.argmax(row)) == own for row, own in zip(helper, HELPER_LABELS, strict=True)]
    _, out = step_on_table(**settings)
    expected = {
        "loss": parts[0] + full["beta"] * parts[1] + full["gamma"] * parts[2],
        "natural_loss": parts[0],
        "adversarial_loss": parts[1],
        "helper_loss": parts[2],
        "accuracy": 1.0,
        "robust_accuracy": 0.0,
        "helper_accuracy": sum(right) / 2,
    }
    assert out.loss.item() == pytest.approx(expected["loss"], abs=1e-12)
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(expected)


def test_gradient_in_closed_form():
    """That of TRADES, and (r - onehot) of the helper, which reads 2 x_adv - x."""
    expected = np.zeros((3, 4))
    for column, (label, helper_label) in enumerate(zip(LABELS, HELPER_LABELS, strict=True)):
        p, q = np.array(softmax(NATURAL[column])), np.array(softmax(ADVERSARIAL[column]))
        logarithm = np.log(p / q)
        expected[:, column] = p + 2.5 * p * (logarithm - (p * logarithm).sum())
        expected[label, column] -= 1
        expected[:, column + 2] = 2.5 * (q - p)
        slope = np.array(softmax(helper_rows(2.0)[column]))
        slope[helper_label] -= 1
        expected[:, column] -= 0.5 * slope
        expected[:, column + 2] += 2 * 0.5 * slope
    method, out = step_on_table()
    found = gradients_of(method, out)["weight"]
    np.testing.assert_allclose(found.numpy(), expected / 2, atol=1e-12)


def test_gradient_is_that_of_trades_and_of_the_helpers():
    within = context(steps=3, seed=5, teachers={"natural_teacher": teacher_network(7)})
    given = batch(step=4)
    ours = build("hat", tiny_network(2), within, beta=2.5, gamma=0.5)
    plain = build("trades", tiny_network(2), within, beta=2.5)
    attacked = ours.make_adversarial(given)
    adversarial = attacked.image
    assert torch.equal(adversarial, plain.make_adversarial(given).image)
    label = teacher_network(7).eval()(adversarial).argmax(dim=1)
    assert torch.equal(attacked.helper_label, label)
    network = tiny_network(2)
    beyond = network(2 * adversarial - given.image)
    helper_loss = nn.functional.cross_entropy(beyond, label)
    extra = torch.autograd.grad(helper_loss, list(network.parameters()))
    found = gradients_of(ours, ours.compute_loss(given, attacked))
    expected = gradients_of(plain, plain.compute_loss(given, attacked))
    for (name, gradient), more in zip(found.items(), extra, strict=True):
        torch.testing.assert_close(gradient, expected[name] + 0.5 * more, rtol=1e-4, atol=1e-7)


def test_the_helper_leaves_the_ball_and_the_range():
    image = torch.tensor([[[[0.0, 0.5, 1.0]]]])
    adversarial = image + torch.tensor([[[[-0.1, 0.1, 0.1]]]])
    found = helper_image(image, adversarial, 2.0)
    torch.testing.assert_close(found, torch.tensor([[[[-0.2, 0.7, 1.2]]]]))


def test_the_attack_climbs_kl():
    asked = []

    def attack(model, image, label, objective, generator, **options):
        asked.append((objective, options))
        return image

    build("hat", within=context(attack=attack)).step(batch())
    assert asked == [(KL, {})]


def test_natural_adversarial_and_helper_images_pass_in_this_order():
    """BatchNorm's running statistics remember which came last, and three separate batches."""
    image = batch(count=6)
    later = (image.image + 0.5).clamp(0, 1)
    method = build("hat", tiny_network(), context(attack=lambda *given, **options: later))
    network = tiny_network()
    method.step(image)
    with torch.no_grad():
        for passed in (image.image, later, 2 * later - image.image):
            network(passed)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, method.model.get_buffer(name)), name
    assert int(method.model.bn1.num_batches_tracked) == 3


def test_the_teacher_stays_as_it_is():
    given = teacher_network(7)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    method = build("hat", within=context(teachers={"natural_teacher": given}))
    gradients_of(method, method.train().step(batch()))
    assert method.teacher.network is given
    assert not any(module.training for module in given.modules())
    assert not any(parameter.requires_grad for parameter in given.parameters())
    assert method.trainable().keys() == dict(method.model.named_parameters()).keys()
    saved = method.state_dict()
    for key, value in before.items():
        assert torch.equal(given.state_dict()[key], value), key
        assert torch.equal(saved[f"teacher.network.{key}"], value), key


def test_passes_of_a_step():
    method = build("hat", within=context(steps=10))
    asked: list[Tensor] = []
    method.teacher.network.register_forward_hook(
        lambda module, inputs, output: asked.append(output)
    )
    assert passes(method) == (14, 13)
    assert len(asked) == 1
    assert not asked[0].requires_grad


@pytest.mark.parametrize(
    "wrong", [{"beta": -1.0}, {"gamma": 0.0}, {"helper_scale": 0.0}, {"natural_teacher": None}]
)
def test_wrong_settings_are_errors(wrong):
    with pytest.raises(ValidationError):
        HatConfig(**wrong)


def test_settings():
    config = HatConfig()
    assert (config.beta, config.gamma, config.helper_scale) == (2.5, 0.5, 2.0)
    assert config.teachers() == {"natural_teacher": TeacherConfig(path="natural")}
    run = load_recipe("cifar10-mini", ["method={name: hat, natural_teacher: runs/standard}"])
    assert run.method == HatConfig(natural_teacher=TeacherConfig(path="runs/standard"))
