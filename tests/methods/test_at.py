"""Adversarial training against arithmetic by hand and a plain loop of its own."""

from __future__ import annotations

import copy
from dataclasses import replace

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
    passes,
    softmax,
    table_method,
    tiny_network,
)
from pydantic import ValidationError
from torch import nn

from cure.attacks import PGD, Threat
from cure.attacks.losses import CROSS_ENTROPY
from cure.methods.common.losses import accuracy


def test_accuracy_by_hand():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]], requires_grad=True)
    share = accuracy(logits, torch.tensor([1, 0, 0]))
    assert share.item() == pytest.approx(2 / 3)
    assert not share.requires_grad


def test_loss_of_two_samples_and_three_classes():
    method, given = table_method("at")
    out = method.step(given)
    assert out.loss.item() == pytest.approx(mean_ce(ADVERSARIAL, LABELS), abs=1e-12)
    # log(e^1.5 + 1 + e^-.5) and log(1 + e^2 + e): as seen from the labels' logits, .5 and -1.
    assert out.loss.item() == pytest.approx((1.806355712 + 2.407605964) / 2, abs=1e-9)
    assert out.metrics["loss"].item() == out.loss.item()
    assert out.metrics["robust_accuracy"].item() == 0.0
    assert out.metrics.keys() == {"loss", "robust_accuracy"}


def test_gradient_in_closed_form():
    """(p - onehot) / B in the columns of the adversarial images, nothing in the natural ones."""
    method, given = table_method("at")
    expected = np.zeros((3, 4))
    for column, (row, label) in enumerate(zip(ADVERSARIAL, LABELS, strict=True), start=2):
        expected[:, column] = softmax(row)
        expected[label, column] -= 1
    found = gradients_of(method, method.step(given))["weight"]
    np.testing.assert_allclose(found.numpy(), expected / 2, atol=1e-12)


@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_gradient_equals_a_plain_loop(start):
    """PGD written out, from the start that the run's generator draws."""
    attack = PGD(Threat("Linf", 0.1), 4, 0.03, start)
    method = build("at", tiny_network(1, torch.float64), context(attack=attack))
    given = batch(step=7, count=9, dtype=torch.float64)
    network = copy.deepcopy(method.model)

    only_start = replace(attack, steps=0)
    draws = method.context.generator("attack", 7)
    x = only_start(network, given.image, given.label, CROSS_ENTROPY, draws)
    network.eval()
    for _ in range(4):
        x.requires_grad_(True)
        loss = nn.functional.cross_entropy(network(x), given.label)
        (slope,) = torch.autograd.grad(loss, x)
        x = x.detach() + 0.03 * slope.sign()
        x = torch.minimum(torch.maximum(x, given.image - 0.1), given.image + 0.1).clamp(0, 1)
    network.train()
    nn.functional.cross_entropy(network(x), given.label).backward()

    found = gradients_of(method, method.step(given))
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    for name, buffer in method.model.named_buffers():
        assert torch.equal(buffer, network.get_buffer(name)), "only the loss moves BatchNorm"


def test_passes_of_a_step():
    assert passes(build("at", within=context(steps=10))) == (11, 11)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_counts_the_adversarial_images_only(mode):
    """Also when the network is attacked in training mode, as Rice et al. do."""
    attack = PGD(Threat("Linf", 0.1), 3, 0.05, "uniform", mode)
    method = build("at", within=context(attack=attack))
    method.step(batch())
    assert int(method.model.bn1.num_batches_tracked) == 1


def test_there_are_no_settings():
    with pytest.raises(ValidationError, match="beta"):
        build("at", beta=1.0)
