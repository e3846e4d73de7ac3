"""ACT: two networks, each a constant in the loss of the other, under one optimiser."""

from __future__ import annotations

import copy

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
    softmax,
    table_method,
    tiny_network,
)
from pydantic import ValidationError
from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import WeightPerturbationConfig
from cure.methods import Method
from cure.methods.act import ActConfig, concurrent_loss, concurrent_objective
from cure.methods.wrappers.awp import AWP, weight_perturbation
from cure.recipe import load_recipe


def softened(rows: list[list[float]], temperature: float) -> list[list[float]]:
    return [[value / temperature for value in row] for row in rows]


def by_hand(
    rows: list[list[float]], others: list[list[float]], alpha: float, temperature: float
) -> float:
    """(1 - a) CE + a T^2 KL(others || rows)."""
    divergence = mean_kl(softened(others, temperature), softened(rows, temperature))
    return (1 - alpha) * mean_ce(rows, LABELS) + alpha * temperature**2 * divergence


def apart(seed: int = 8, **settings) -> Method:
    """A method whose two networks differ."""
    method = build("act", tiny_network(2), **settings)
    method.natural.load_state_dict(tiny_network(seed).state_dict())
    return method


# -- the losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("robust_alpha", "natural_alpha", "temperature"),
    [(0.9, 0.9, 4.0), (0.3, 0.8, 1.0), (0.0, 1.0, 2.0), (1.0, 0.0, 2.0)],
)
def test_losses_of_two_samples_and_three_classes(robust_alpha, natural_alpha, temperature):
    """F sees the adversarial images alone, G the natural ones."""
    method, given = table_method(
        "act", robust_alpha=robust_alpha, natural_alpha=natural_alpha, temperature=temperature
    )
    robust = by_hand(ADVERSARIAL, NATURAL, robust_alpha, temperature)
    natural = by_hand(NATURAL, ADVERSARIAL, natural_alpha, temperature)
    out = method.step(given)
    assert out.loss.item() == pytest.approx(robust + natural, abs=1e-12)
    expected = {
        "loss": robust + natural,
        "robust_network_loss": robust,
        "natural_network_loss": natural,
        "natural_network_accuracy": 1.0,
        "robust_accuracy": 0.0,
    }
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        expected, abs=1e-12
    )


def slope(rows: np.ndarray, others: np.ndarray, alpha: float, temperature: float) -> np.ndarray:
    """(1 - a)(p - onehot) + a T (p^T - q^T), the other network a constant; over B."""
    onehot = np.eye(3)[LABELS]
    hard = np.array([softmax(row) for row in rows]) - onehot
    soft = np.array([softmax(row) for row in rows / temperature])
    target = np.array([softmax(row) for row in others / temperature])
    return ((1 - alpha) * hard + alpha * temperature * (soft - target)).T / 2


def test_gradients_in_closed_form_so_each_target_is_a_constant():
    method, given = table_method("act", robust_alpha=0.7, natural_alpha=0.4, temperature=3.0)
    found = gradients_of(method, method.step(given))
    assert found.keys() == {"weight", "natural/weight"}
    natural, adversarial = np.array(NATURAL), np.array(ADVERSARIAL)
    nothing = np.zeros((3, 2))
    robust = np.hstack([nothing, slope(adversarial, natural, 0.7, 3.0)])
    other = np.hstack([slope(natural, adversarial, 0.4, 3.0), nothing])
    np.testing.assert_allclose(found["weight"].numpy(), robust, atol=1e-12)
    np.testing.assert_allclose(found["natural/weight"].numpy(), other, atol=1e-12)


def test_a_loss_gives_no_gradient_to_what_it_imitates():
    logits, other = (
        torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        for rows in (NATURAL, ADVERSARIAL)
    )
    loss = concurrent_loss(logits, other, torch.tensor(LABELS), 0.9, 4.0)
    slopes = torch.autograd.grad(loss, [logits, other], allow_unused=True)
    assert slopes[0] is not None
    assert slopes[1] is None


def test_one_gradient_of_the_sum_is_that_of_each_loss_alone():
    """What two optimisers would be handed."""
    method, given = apart(robust_alpha=0.6), batch()
    robust, natural = (copy.deepcopy(network) for network in (method.model, method.natural))
    out = method.step(given)
    found = gradients_of(method, out)
    adversarial_image = apart(robust_alpha=0.6).make_adversarial(given).image
    answers = natural(given.image), robust(adversarial_image)
    for network, one, other, alpha, prefix in (
        (natural, answers[0], answers[1], 0.9, "natural/"),
        (robust, answers[1], answers[0], 0.6, ""),
    ):
        targets = (other.detach() / 4).softmax(1)
        kl = (targets * (targets.log() - (one / 4).log_softmax(1))).sum(1).mean()
        loss = (1 - alpha) * nn.functional.cross_entropy(one, given.label) + alpha * 16 * kl
        slopes = torch.autograd.grad(loss, list(network.parameters()))
        for (name, _), expected in zip(network.named_parameters(), slopes, strict=True):
            torch.testing.assert_close(found[prefix + name], expected, rtol=1e-4, atol=1e-6)


# -- the attack ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("reduction", "weight"), [("released", 0.5), ("even", 1.0)])
def test_objective_of_each_sample_by_hand(reduction, weight):
    """The released code's mean over two samples halves the cross-entropy."""
    natural, adversarial = (torch.tensor(r, dtype=torch.float64) for r in (NATURAL, ADVERSARIAL))
    objective = concurrent_objective(natural, 0.7, reduction)
    assert not objective.needs_natural
    found = objective(adversarial, torch.tensor(LABELS), None).tolist()
    expected = [
        0.3 * weight * mean_ce([ADVERSARIAL[n]], [LABELS[n]])
        + 0.7 * mean_kl([NATURAL[n]], [ADVERSARIAL[n]])
        for n in range(2)
    ]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_sum_of_the_released_objective_is_a_mean_and_a_sum():
    natural, adversarial = (torch.tensor(r, dtype=torch.float64) for r in (NATURAL, ADVERSARIAL))
    label = torch.tensor(LABELS)
    found = concurrent_objective(natural, 0.9, "released")(adversarial, label, None).sum().item()
    expected = 0.1 * mean_ce(ADVERSARIAL, LABELS) + 0.9 * 2 * mean_kl(NATURAL, ADVERSARIAL)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reduction", ["released", "even"])
def test_the_attack_is_on_the_robust_network_against_the_natural_one_in_training(reduction):
    asked = []

    def attack(model, image, label, objective, generator, **options):
        asked.append((model, objective, options))
        return image

    method = apart(
        within=context(attack=attack),
        robust_alpha=0.7,
        natural_alpha=0.2,
        attack_reduction=reduction,
    )
    given = batch()
    natural = tiny_network(8)(given.image).detach()
    method.step(given)
    ((model, objective, options),) = asked
    assert model is method.model
    assert options == {}
    logits = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    expected = concurrent_objective(natural, 0.7, reduction)(logits, given.label, None)
    torch.testing.assert_close(objective(logits, given.label, None), expected)
    assert not objective(logits, given.label, None).requires_grad


def test_the_attack_moves_against_the_natural_network():
    """G decides where to, unless the cross-entropy alone is climbed, as in adversarial training."""
    given = batch()
    images = [apart(seed, robust_alpha=1.0).make_adversarial(given).image for seed in (8, 9)]
    assert not torch.equal(*images)
    alone = [apart(seed, robust_alpha=0.0).make_adversarial(given).image for seed in (8, 9)]
    assert torch.equal(*alone)
    plain = build("at", tiny_network(2))
    assert torch.equal(alone[0], plain.attack(given, CROSS_ENTROPY))


# -- two networks --------------------------------------------------------------------------------


def test_the_natural_network_begins_as_a_copy_that_goes_its_own_way():
    model = tiny_network(2)
    model.linear.bias.requires_grad_(False)
    method = build("act", model)
    assert method.model is model
    assert method.inference_model() is model
    own = dict(model.named_parameters())
    for name, parameter in method.natural.named_parameters():
        assert torch.equal(parameter, own[name])
        assert parameter is not own[name]
    names = {name for name in own if name != "linear.bias"}
    assert method.trainable().keys() == names | {f"natural/{name}" for name in names}
    assert {f"natural.{name}" for name in model.state_dict()} < method.state_dict().keys()


def test_each_network_s_statistics_remember_its_own_images_once():
    method, given = apart(), batch()
    robust, natural = (copy.deepcopy(network) for network in (method.model, method.natural))
    attacked = method.make_adversarial(given)
    adversarial = attacked.image
    method.compute_loss(given, attacked)
    with torch.no_grad():
        robust(adversarial)
        natural(given.image)
    for network, ours in ((robust, method.model), (natural, method.natural)):
        for name, buffer in network.named_buffers():
            assert torch.equal(buffer, ours.get_buffer(name)), name


def test_asked_a_second_time_it_computes_the_natural_logits_again():
    """As adversarial weight perturbation asks: at other weights, without remembering twice."""
    method, given = apart(), batch()
    attacked = method.make_adversarial(given)
    first = method.compute_loss(given, attacked)
    buffers = {name: buffer.clone() for name, buffer in method.natural.named_buffers()}
    again = method.compute_loss(given, attacked.without_graph())
    assert again.loss.item() == first.loss.item()
    found, expected = gradients_of(method, again), gradients_of(method, first)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    with torch.no_grad():
        method.natural.linear.weight.mul_(2)
    moved = method.compute_loss(given, attacked.without_graph()).metrics
    assert moved["natural_network_loss"] != first.metrics["natural_network_loss"]
    for name, buffer in method.natural.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_perturbed_weights_are_those_of_both_networks():
    """AWP around ACT against the same done by hand on copies."""
    method, given = apart(), batch()
    adversarial = apart().make_adversarial(given).image
    networks = {"": copy.deepcopy(method.model), "natural/": copy.deepcopy(method.natural)}

    def gradients() -> dict[str, Tensor]:
        natural, robust = networks["natural/"](given.image), networks[""](adversarial)
        loss = concurrent_loss(robust, natural, given.label, 0.9, 4.0)
        loss = loss + concurrent_loss(natural, robust, given.label, 0.9, 4.0)
        return method.context.engine.gradients(loss, weights)

    weights = {
        prefix + name: parameter
        for prefix, network in networks.items()
        for name, parameter in network.named_parameters()
    }
    changes = weight_perturbation(weights, gradients(), 0.1)
    assert {name.startswith("natural/") for name in changes} == {True, False}
    with torch.no_grad():
        for name, change in changes.items():
            weights[name] += change
    expected = gradients()
    wrapped = AWP(method, WeightPerturbationConfig(gamma=0.1)).train()
    found = wrapped.step(given).grads
    wrapped.after_step(0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
    for network in (method.model, method.natural):
        assert int(network.bn1.num_batches_tracked) == 1


# -- cost, settings ------------------------------------------------------------------------------


def test_passes_of_a_step():
    method = build("act", within=context(steps=10))
    counts = {"F": [0, 0], "G": [0, 0]}
    for name, network in (("F", method.model), ("G", method.natural)):

        def passed(module, inputs, output, name=name):
            def arrived(gradient):
                counts[name][1] += 1

            counts[name][0] += 1
            if output.requires_grad:
                output.register_hook(arrived)

        network.register_forward_hook(passed)
    gradients_of(method, method.step(batch()))
    assert counts == {"F": [11, 11], "G": [1, 1]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"robust_alpha": 1.1},
        {"natural_alpha": -0.1},
        {"temperature": 0.0},
        {"attack_reduction": "mean"},
    ],
)
def test_wrong_settings_are_errors(wrong):
    with pytest.raises(ValidationError):
        ActConfig(**wrong)


def test_settings():
    config = ActConfig()
    assert (config.robust_alpha, config.natural_alpha, config.temperature) == (0.9, 0.9, 4.0)
    assert config.attack_reduction == "released"
    run = load_recipe("cifar10-mini", ["method={name: act, attack_reduction: even}"])
    assert run.method == ActConfig(attack_reduction="even")
