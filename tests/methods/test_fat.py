"""FAT: each image stops where it must, tau grows when it must, and tau = K is the plain method."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

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
    table_method,
    tiny_network,
)
from pydantic import ValidationError
from test_mart import bce, weighted
from torch import Tensor, nn

from cure.attacks import PGD, Threat
from cure.attacks.losses import CROSS_ENTROPY, KL
from cure.methods.fat import FatConfig
from cure.recipe import load_recipe

PLAIN = {"ce": "at", "trades": "trades", "mart": "mart"}
every_form = pytest.mark.parametrize("form", PLAIN)

# -- tau -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "epochs", "lengths"),
    [
        # How many epochs tau is 0, 1, 2, ... : the released code's runs,
        ("ce", 120, [50, 40, 30]),
        ("trades", 85, [30, 20, 20, 15]),
        ("mart", 90, [20, 20, 20, 20, 10]),
        # and shorter ones of the same shape.
        ("ce", 12, [5, 4, 3]),
        ("trades", 17, [6, 4, 4, 3]),
        ("mart", 9, [2, 2, 2, 2, 1]),
        ("ce", 14, [6, 5, 3]),
        ("ce", 1, [1]),
    ],
)
def test_tau_over_the_epochs(form, epochs, lengths):
    method = build("fat", within=context(epochs=epochs), form=form)
    found = [method.tau]
    for epoch in range(epochs):
        method.on_epoch(epoch)
        found.append(method.tau)
    expected = [tau for tau, length in enumerate(lengths) for _ in range(length)]
    assert found == [0, *expected]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tau_rises": []}, [0, 0, 0, 0]),
        ({"tau": 3, "tau_rises": []}, [3, 3, 3, 3]),
        ({"tau": 1, "tau_rises": [0.5]}, [1, 1, 2, 2]),
        ({"tau_rises": [0.0, 0.25, 0.25]}, [1, 3, 3, 3]),
    ],
)
def test_tau_of_one_s_own(settings, expected):
    method = build("fat", **settings)
    assert method.tau == expected[0]
    found = []
    for epoch in (0, 1, 2, 3):
        method.on_epoch(epoch)
        found.append(method.tau)
    assert found == expected
    for epoch in (1, 0):  # it hangs on the number alone, as resuming needs
        method.on_epoch(epoch)
        assert method.tau == expected[epoch]


# -- where each image stops ----------------------------------------------------------------------


def cross_entropy_alone(logits: Tensor, natural: Tensor, label: int) -> Tensor:
    return logits.logsumexp(0) - logits[label]


def kl_alone(logits: Tensor, natural: Tensor, label: int) -> Tensor:
    p, q = natural.softmax(0), logits.softmax(0)
    return (p * (p / q).log()).sum()


def friendly(
    network: nn.Module,
    image: Tensor,
    start: Tensor,
    label: int,
    climbed: Any,
    tau: int,
    steps: int,
) -> tuple[Tensor, int]:
    """Algorithm 1 for one image, radius .3 and step .05; also how many steps were taken."""
    natural = network(image[None])[0].detach()
    current, left = start, tau
    for taken in range(steps):
        leaf = current.clone().requires_grad_(True)
        logits = network(leaf[None])[0]
        if int(logits.argmax()) != label:
            if left == 0:
                return current, taken
            left -= 1
        (slope,) = torch.autograd.grad(climbed(logits, natural, label), leaf)
        stepped = current + 0.05 * slope.sign()
        current = torch.minimum(torch.maximum(stepped, image - 0.3), image + 0.3).clamp(0, 1)
    return current, steps


class Watched:
    """An attack that keeps what it was asked and what it answered."""

    def __init__(self, attack: PGD) -> None:
        self.attack = attack

    def __call__(self, *given: Any, **options: Any) -> Tensor:
        self.objective, self.options = given[3], options
        self.answer = self.attack(*given, **options)
        return self.answer


def learnt() -> nn.Module:
    """A network that knows most of the batch, in float64 and in training mode."""
    model = tiny_network(1, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(15):
        given = batch(seed=step, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(given.image), given.label).backward()
        optimizer.step()
    return model


@every_form
@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_each_image_stops_where_it_must_and_keeps_its_place(form, epoch):
    """Against a loop over single images; tau is 0, 1 and 2."""
    attack = PGD(Threat("Linf", 0.3), 8, 0.05, "uniform" if form == "ce" else "gaussian")
    watched = Watched(attack)
    method = build(
        "fat", learnt(), context(attack=watched), form=form, beta=2.0, tau_rises=[0.5, 0.75]
    )
    method.on_epoch(epoch)
    given = batch(count=12, seed=50, dtype=torch.float64)
    given.label[[2, 7]] = (given.label[[2, 7]] + 1) % 3  # these begin misclassified
    network = copy.deepcopy(method.model)
    draws = method.context.generator("attack", given.step)
    starts = replace(attack, steps=0)(network, given.image, given.label, CROSS_ENTROPY, draws)
    out = method.step(given)
    assert watched.options["hooks"].patience == max(0, epoch - 1)
    assert watched.objective is (KL if form == "trades" else CROSS_ENTROPY)

    network.eval()
    climbed = kl_alone if form == "trades" else cross_entropy_alone
    alone, taken = [], []
    for image, start, label in zip(given.image, starts, given.label.tolist(), strict=True):
        changed, count = friendly(network, image, start, label, climbed, max(0, epoch - 1), 8)
        alone.append(changed)
        taken.append(count)
    rest = [count for number, count in enumerate(taken) if number not in (2, 7)]
    assert min(rest) < max(rest), "the images should stop at different steps"
    torch.testing.assert_close(watched.answer, torch.stack(alone), rtol=0, atol=1e-9)

    # The loss is that of these images in this order.
    network.train()
    natural = network(given.image) if form != "ce" else None
    friendly_logits = network(watched.answer).tolist()
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, method.model.get_buffer(name)), "natural images pass first"
    labels = given.label.tolist()
    if natural is None:
        loss = mean_ce(friendly_logits, labels)
    elif form == "trades":
        rows = natural.tolist()
        loss = mean_ce(rows, labels) + 2 * mean_kl(rows, friendly_logits)
    else:
        rows = natural.tolist()
        loss = bce(friendly_logits, labels, False)
        loss += 2 * weighted(rows, friendly_logits, labels, False)
    assert out.loss.item() == pytest.approx(loss, rel=1e-9)


def test_a_batch_that_is_all_wrong_is_left_as_it_is_by_tau_0():
    attack = Watched(PGD(Threat("Linf", 0.3), 8, 0.05, "none"))
    method = build("fat", learnt(), context(attack=attack))
    given = batch(dtype=torch.float64)
    with torch.no_grad():
        wrong = (copy.deepcopy(method.model).eval()(given.image).argmax(dim=1) + 1) % 3
    method.step(replace(given, label=wrong))
    assert torch.equal(attack.answer, given.image)


@every_form
def test_tau_at_the_number_of_steps_is_the_plain_method(form):
    within = context(steps=4, epsilon=0.3)
    given = batch(step=3)
    settings = {} if form == "ce" else {"beta": 6.0}
    plain = build(PLAIN[form], tiny_network(2), within, **settings)
    ours = build("fat", tiny_network(2), within, form=form, tau=4, tau_rises=[])
    early = build("fat", tiny_network(2), within, form=form, tau_rises=[])
    expected, found, other = (
        gradients_of(method, method.step(given)) for method in (plain, ours, early)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(other[name], expected[name]) for name in expected)


# -- losses, cost, settings ----------------------------------------------------------------------


@pytest.mark.parametrize("constants", [False, True])
@every_form
def test_loss_of_two_samples_and_three_classes(form, constants):
    method, given = table_method("fat", form=form, beta=2.0, constants=constants)
    out = method.step(given)
    if form == "ce":
        expected = mean_ce(ADVERSARIAL, LABELS)
    elif form == "trades":
        expected = mean_ce(NATURAL, LABELS) + 2 * mean_kl(NATURAL, ADVERSARIAL)
    else:
        expected = bce(ADVERSARIAL, LABELS, constants)
        expected += 2 * weighted(NATURAL, ADVERSARIAL, LABELS, constants)
    assert out.loss.item() == pytest.approx(expected, abs=1e-12)
    assert out.metrics["loss"].item() == out.loss.item()
    assert out.metrics["robust_accuracy"].item() == 0.0
    assert ("accuracy" in out.metrics) == (form != "ce")


@pytest.mark.parametrize(
    ("form", "expected"), [("ce", (11, 11)), ("trades", (13, 12)), ("mart", (12, 12))]
)
def test_passes_of_a_step(form, expected):
    method = build("fat", within=context(steps=10), form=form)
    assert passes(method) == expected
    assert int(method.model.bn1.num_batches_tracked) == (1 if form == "ce" else 2)


def test_noise_after_the_steps_reaches_the_attack():
    with pytest.raises(ValidationError):
        FatConfig(omega=-0.001)
    silent, noisy = [], []
    for omega, seen in ((0.0, silent), (0.01, noisy)):
        method = build("fat", omega=omega)
        attack = method.context.attack

        def spy(*arguments, seen=seen, attack=attack, **options):
            seen.append(attack(*arguments, **options))
            return seen[-1]

        method.context = replace(method.context, attack=spy)
        method.step(batch())
    assert not torch.equal(silent[0], noisy[0])


@pytest.mark.parametrize(
    "wrong",
    [{"form": "kl"}, {"tau": -1}, {"tau_rises": [1.0]}, {"tau_rises": [-0.1]}, {"beta": -1.0}],
)
def test_values_out_of_range_are_errors(wrong):
    with pytest.raises(ValidationError):
        FatConfig(**wrong)


def test_settings_from_a_recipe():
    words = ["method={name: fat, form: trades, tau_rises: [0.4, 0.75]}"]
    assert load_recipe("cifar10-mini", words).method == FatConfig(
        form="trades", tau_rises=(0.4, 0.75)
    )
