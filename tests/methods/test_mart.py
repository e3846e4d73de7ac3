"""MART against arithmetic by hand, with its ties and its extremes, in both forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from method_bench import (
    ADVERSARIAL,
    LABELS,
    NATURAL,
    batch,
    build,
    context,
    gradients_of,
    mean_kl,
    passes,
    softmax,
    table_method,
    tiny_network,
)
from pydantic import ValidationError
from test_trades import random_logits
from torch import Tensor

from cure.attacks.losses import CROSS_ENTROPY
from cure.methods.common.losses import boosted_cross_entropy, mart, weighted_kl
from cure.methods.mart import MartConfig
from cure.recipe import load_recipe

both_forms = pytest.mark.parametrize("constants", [False, True])


def bce(rows: list[list[float]], labels: list[int], constants: bool) -> float:
    """Mean of - log p_y - log(1 - the largest of the others)."""
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        chances = softmax(row)
        rival = max(chance for number, chance in enumerate(chances) if number != label)
        margin = 1.0001 - rival + 1e-12 if constants else 1 - rival
        total += -math.log(chances[label]) - math.log(margin)
    return total / len(rows)


def weighted(
    naturals: list[list[float]], others: list[list[float]], labels: list[int], constants: bool
) -> float:
    total = 0.0
    for natural, other, label in zip(naturals, others, labels, strict=True):
        p, q = softmax(natural), softmax(other)
        if constants:
            kl = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, q, strict=True))
            total += (1.0000001 - p[label]) * kl
        else:
            total += (1 - p[label]) * mean_kl([natural], [other])
    return total / len(naturals)


def logarithms(*chances: float) -> list[float]:
    return [math.log(chance) for chance in chances]


@pytest.mark.parametrize(
    ("chances", "label", "factors"),
    [
        # p_y, and one minus the likeliest wrong class.
        ((0.5, 0.3, 0.2), 0, (0.5, 0.7)),
        ((0.5, 0.3, 0.2), 1, (0.3, 0.5)),
        ((0.5, 0.3, 0.2), 2, (0.2, 0.5)),
        # The label shares the first place: the rival is the other one, not the third.
        ((0.4, 0.4, 0.2), 0, (0.4, 0.6)),
        ((0.4, 0.4, 0.2), 1, (0.4, 0.6)),
        # Two wrong classes share the first place, or the second.
        ((0.4, 0.4, 0.2), 2, (0.2, 0.6)),
        ((0.6, 0.2, 0.2), 0, (0.6, 0.8)),
        ((1 / 3, 1 / 3, 1 / 3), 1, (1 / 3, 2 / 3)),
        ((0.75, 0.25), 0, (0.75, 0.75)),
        ((0.75, 0.25), 1, (0.25, 0.25)),
    ],
)
@both_forms
def test_boosted_cross_entropy_by_hand(chances, label, factors, constants):
    logits = torch.tensor([logarithms(*chances)], dtype=torch.float64)
    expected = -math.log(factors[0]) - math.log(factors[1] + (1e-4 + 1e-12) * constants)
    found = boosted_cross_entropy(logits, torch.tensor([label]), constants=constants)
    assert found.item() == pytest.approx(expected, abs=1e-12)


@both_forms
def test_a_tie_has_a_finite_gradient_that_sums_to_zero(constants):
    logits = torch.tensor([logarithms(0.4, 0.4, 0.2)], dtype=torch.float64, requires_grad=True)
    loss = boosted_cross_entropy(logits, torch.tensor([2]), constants=constants)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_of_the_boosted_cross_entropy(dtype):
    """A rival at 200 above: both terms are 200; the released constants stop the second at 9.21."""
    logits = torch.tensor([[0.0, 200.0, 0.0]], dtype=dtype, requires_grad=True)
    label = torch.tensor([0])
    paper = boosted_cross_entropy(logits, label)
    assert paper.item() == pytest.approx(400 - math.log(2))
    (gradient,) = torch.autograd.grad(paper, logits)
    # CE: p - onehot; margin: p minus the softmax of the others.
    torch.testing.assert_close(gradient, torch.tensor([[-1.5, 2.0, -0.5]], dtype=dtype))
    released = boosted_cross_entropy(logits, label, constants=True)
    assert released.item() == pytest.approx(200 - math.log(1e-4), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sure_and_right_network_has_a_small_weight_that_is_not_rounded(dtype):
    """1 - p_y is 2 e^-40 / (1 + 2 e^-40), not 0; KL(p || thirds) is then log 3."""
    natural = torch.tensor([[40.0, 0.0, 0.0]], dtype=dtype)
    found = weighted_kl(natural, torch.zeros(1, 3, dtype=dtype), torch.tensor([0]))
    assert found.item() == pytest.approx(2 * math.exp(-40) * math.log(3), rel=1e-5, abs=0)
    released = weighted_kl(
        natural, torch.zeros(1, 3, dtype=dtype), torch.tensor([0]), constants=True
    )
    assert released.item() == pytest.approx(1e-7 * math.log(3), rel=0.2)


@both_forms
def test_weighted_kl_by_hand(constants):
    """Weights 1 - .5 and 1 - .1, KLs worked out below."""
    natural = torch.tensor([logarithms(0.5, 0.25, 0.25), logarithms(0.8, 0.1, 0.1)])
    adversarial = torch.tensor([logarithms(0.25, 0.5, 0.25), logarithms(1 / 3, 1 / 3, 1 / 3)])
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    second = 0.8 * math.log(2.4) + 0.2 * math.log(0.3)
    expected = (0.5 * first + 0.9 * second) / 2
    label = torch.tensor([0, 2])
    found = weighted_kl(natural.double(), adversarial.double(), label, constants=constants)
    assert found.item() == pytest.approx(expected, abs=3e-7)


@both_forms
def test_losses_pass_gradcheck_so_nothing_is_detached(constants):
    natural, adversarial, label = random_logits(5)

    def boosted(logits: Tensor) -> Tensor:
        return boosted_cross_entropy(logits, label, constants=constants)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return weighted_kl(a, b, label, constants=constants)

    def total(a: Tensor, b: Tensor) -> Tensor:
        loss = mart(a, b, label, 2.0, constants=constants)
        assert loss is not None
        return loss

    assert torch.autograd.gradcheck(boosted, (adversarial,))
    assert torch.autograd.gradcheck(kl, (natural, adversarial))
    assert torch.autograd.gradcheck(total, (natural, adversarial))


@pytest.mark.parametrize("beta", [0.0, 5.0])
@both_forms
def test_loss_of_two_samples_and_three_classes(beta, constants):
    method, given = table_method("mart", beta=beta, constants=constants)
    out = method.step(given)
    boosted = bce(ADVERSARIAL, LABELS, constants)
    kl = weighted(NATURAL, ADVERSARIAL, LABELS, constants)
    assert out.loss.item() == pytest.approx(boosted + beta * kl, abs=1e-12)
    expected = {
        "loss": boosted + beta * kl,
        "boosted_loss": boosted,
        "weighted_kl": kl,
        "accuracy": 1.0,
        "robust_accuracy": 0.0,
    }
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        expected, abs=1e-12
    )


def test_the_two_forms_differ_by_their_constants():
    values = [step_loss(constants=constants) for constants in (False, True)]
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def step_loss(**settings) -> float:
    method, given = table_method("mart", **settings)
    return method.step(given).loss.item()


@both_forms
def test_gradient_of_a_step_by_central_differences(constants):
    """Of the arithmetic above in every logit, the natural ones and their weight included."""

    def total(table: np.ndarray) -> float:
        rows = table.T.tolist()
        kl = weighted(rows[:2], rows[2:], LABELS, constants)
        return bce(rows[2:], LABELS, constants) + 5 * kl

    method, given = table_method("mart", constants=constants)
    found = gradients_of(method, method.step(given))["weight"].numpy()
    table, slopes = np.array([*NATURAL, *ADVERSARIAL]).T, np.zeros((3, 4))
    for place in np.ndindex(3, 4):
        move = np.zeros((3, 4))
        move[place] = 1e-6
        slopes[place] = (total(table + move) - total(table - move)) / 2e-6
    np.testing.assert_allclose(found, slopes, rtol=1e-6, atol=1e-8)


def test_the_attack_climbs_cross_entropy():
    asked = []

    def attack(model, image, label, objective, generator, **options):
        asked.append((objective, options))
        return image

    build("mart", within=context(attack=attack)).step(batch())
    assert asked == [(CROSS_ENTROPY, {})]


def test_natural_and_adversarial_images_pass_in_this_order():
    """BatchNorm's running statistics remember which came last."""
    image = batch(count=6)
    later = (image.image + 0.5).clamp(0, 1)
    method = build("mart", tiny_network(), context(attack=lambda *given, **options: later))
    network = tiny_network()
    method.step(image)
    with torch.no_grad():
        network(image.image)
        network(later)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, method.model.get_buffer(name)), name


def test_passes_of_a_step():
    method = build("mart", within=context(steps=10))
    assert passes(method) == (12, 12)
    assert int(method.model.bn1.num_batches_tracked) == 2


def test_settings():
    assert (MartConfig().beta, MartConfig().constants) == (5.0, False)
    with pytest.raises(ValidationError):
        MartConfig(beta=-1.0)
    run = load_recipe("cifar10-mini", ["method={name: mart, constants: true}"])
    assert run.method == MartConfig(constants=True)
