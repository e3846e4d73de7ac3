"""TRADES against arithmetic by hand, closed forms, and CURE with everything else switched off."""

from __future__ import annotations

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
    mean_ce,
    mean_kl,
    passes,
    softmax,
    table_method,
    tiny_network,
)
from pydantic import ValidationError
from torch import Tensor

from cure.attacks.losses import KL
from cure.methods.common.losses import kl_divergence, kl_divergence_per_sample, trades
from cure.methods.trades import TradesConfig
from cure.recipe import load_recipe


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_loss_of_two_samples_and_three_classes(beta):
    method, given = table_method("trades", beta=beta)
    out = method.step(given)
    natural, kl = mean_ce(NATURAL, LABELS), mean_kl(NATURAL, ADVERSARIAL)
    assert out.loss.item() == pytest.approx(natural + beta * kl, abs=1e-12)
    expected = {
        "loss": natural + beta * kl,
        "natural_loss": natural,
        "adversarial_loss": kl,
        # Largest logits: 1 and 0 on x, 0 and 1 on x_adv, where the labels are 1 and 0.
        "accuracy": 1.0,
        "robust_accuracy": 0.0,
    }
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(expected)


def test_loss_as_a_number():
    """The parts as in CURE's tests: CE 0.6092, KL 0.6076."""
    method, given = table_method("trades")
    assert method.step(given).loss.item() == pytest.approx(0.6092 + 6 * 0.6076, abs=4e-4)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_gradient_in_closed_form(beta):
    """KL(p || q): q - p in the logits of q, p (log p/q - KL) in those of p; over B."""
    expected = np.zeros((3, 4))
    for column, label in enumerate(LABELS):
        p, q = np.array(softmax(NATURAL[column])), np.array(softmax(ADVERSARIAL[column]))
        logarithm = np.log(p / q)
        expected[:, column] = p + beta * p * (logarithm - (p * logarithm).sum())
        expected[label, column] -= 1
        expected[:, column + 2] = beta * (q - p)
    method, given = table_method("trades", beta=beta)
    found = gradients_of(method, method.step(given))["weight"]
    np.testing.assert_allclose(found.numpy(), expected / 2, atol=1e-12)


def random_logits(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    natural, adversarial = (
        torch.randn(count, 3, generator=draws, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    return natural, adversarial, torch.arange(count) % 3


def test_loss_passes_gradcheck_in_both_logits():
    natural, adversarial, label = random_logits()
    assert torch.autograd.gradcheck(lambda a, b: trades(a, b, label, 3.0), (natural, adversarial))


def test_kl_per_sample_by_hand_with_the_mean_of_the_batch():
    natural, adversarial = (
        torch.tensor(rows, dtype=torch.float64) for rows in (NATURAL, ADVERSARIAL)
    )
    found = kl_divergence_per_sample(natural, adversarial)
    for number in range(2):
        alone = mean_kl([NATURAL[number]], [ADVERSARIAL[number]])
        assert found[number].item() == pytest.approx(alone, abs=1e-12)
    assert found.mean().item() == pytest.approx(kl_divergence(natural, adversarial).item())
    natural, adversarial, _ = random_logits()
    assert torch.autograd.gradcheck(kl_divergence_per_sample, (natural, adversarial))


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_gradient_is_that_of_cure_without_mask_and_revision(beta):
    within = context(steps=3, seed=5)
    given = batch(step=4)
    ours = build("trades", tiny_network(2), within, beta=beta)
    cure = build("cure", tiny_network(2), within, beta=beta, gamma=0.0, mask={"kind": "none"})
    out = ours.step(given)
    found, expected = gradients_of(ours, out), cure.step(given)
    assert found.keys() == expected.grads.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected.grads[name], rtol=1e-5, atol=1e-8)
    for name in ("loss", "natural_loss", "adversarial_loss", "accuracy", "robust_accuracy"):
        torch.testing.assert_close(out.metrics[name], expected.metrics[name])
    for name, buffer in ours.model.named_buffers():
        assert torch.equal(buffer, cure.model.get_buffer(name)), name


def test_without_the_kl_term_it_is_natural_training():
    ours, natural = build("trades", tiny_network(2), beta=0.0), build("natural", tiny_network(2))
    found, expected = (gradients_of(method, method.step(batch())) for method in (ours, natural))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


def test_the_attack_climbs_kl():
    asked = []

    def attack(model, image, label, objective, generator, **options):
        asked.append((objective, options))
        return image

    build("trades", within=context(attack=attack)).step(batch())
    assert asked == [(KL, {})]


def test_passes_of_a_step():
    method = build("trades", within=context(steps=10))
    assert passes(method) == (13, 12)
    assert int(method.model.bn1.num_batches_tracked) == 2


def test_settings():
    assert TradesConfig().beta == 6.0
    with pytest.raises(ValidationError):
        TradesConfig(beta=-1.0)
    run = load_recipe("cifar10-mini", ["method={name: trades, beta: 3}"])
    assert run.method == TradesConfig(beta=3.0)
