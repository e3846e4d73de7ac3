"""ST-AT: the right pair, from the right points, with each constant where it belongs."""

from __future__ import annotations

import copy
import math
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
    tiny_network,
)
from pydantic import ValidationError
from test_fat import learnt
from torch import Tensor, nn

from cure.attacks import PGD, Threat
from cure.attacks.pgd import starting_point
from cure.data.images import Batch
from cure.errors import ConfigError
from cure.methods.common.losses import symmetric_kl
from cure.methods.st_at import StAtBatch, StAtConfig, extremes, pick, squeeze
from cure.models.batch_norm import untracked
from cure.recipe import load_recipe

COLLABORATIVE = [[0.0, 3.0, -2.0], [0.25, 0.5, 0.0]]

# -- choosing the pair ---------------------------------------------------------------------------


def planted(chances: list[float], label: int) -> list[Tensor]:
    """Logits [1, 3] with these probabilities of the label; the rest is shared unevenly."""
    rows = []
    for number, chance in enumerate(chances):
        row = [(1 - chance) * 0.9, (1 - chance) * 0.1]
        row.insert(label, chance)
        rows.append(torch.tensor([row], dtype=torch.float64).log() + number)
    return rows


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize(
    ("chances", "worst", "best"),
    [
        ([0.5, 0.7, 0.2], 2, 1),
        ([0.5, 0.2, 0.7], 1, 2),
        ([0.2, 0.5, 0.7], 0, 2),
        ([0.7, 0.5, 0.2], 2, 0),
        ([0.2, 0.7, 0.5], 0, 1),
        ([0.7, 0.2, 0.5], 1, 0),
    ],
)
def test_worst_and_best_by_the_probability_of_the_label(chances, worst, best, label):
    logits = planted(chances, label)
    found = extremes(logits, torch.tensor([label]))
    assert [int(choice) for choice in found] == [worst, best]
    picked = pick(found[0], logits), pick(found[1], logits)
    assert torch.equal(picked[0], logits[worst])
    assert torch.equal(picked[1], logits[best])


def test_the_first_wins_a_tie():
    same = torch.zeros(1, 3)
    lower = torch.tensor([[-1.0, 0.0, 0.0]])
    label = torch.tensor([0])
    assert [int(choice) for choice in extremes([same, same, same], label)] == [0, 0]
    assert [int(choice) for choice in extremes([same, lower, lower], label)] == [1, 0]


def test_pick_takes_each_sample_s_own_and_sends_the_gradient_there_alone():
    options = [torch.full((3, 2, 2), float(number), requires_grad=True) for number in (10, 20, 30)]
    picked = pick(torch.tensor([2, 0, 1]), options)
    assert picked[:, 0, 0].tolist() == [30, 10, 20]
    slopes = torch.autograd.grad((picked * 2).sum(), options)
    for number, row in enumerate([1, 2, 0]):
        expected = torch.zeros(3, 2, 2)
        expected[row] = 2
        assert torch.equal(slopes[number], expected)


# -- the divergence ------------------------------------------------------------------------------


def symmetric(first: list[float], second: list[float]) -> float:
    return (mean_kl([first], [second]) + mean_kl([second], [first])) / 2


def test_symmetric_kl_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): both KLs are log(2) / 4."""
    first = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    second = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    assert symmetric_kl(first, second).tolist() == pytest.approx([math.log(2) / 4])
    rows = [torch.tensor(table, dtype=torch.float64) for table in (NATURAL, ADVERSARIAL)]
    found = symmetric_kl(*rows).tolist()
    assert found == pytest.approx([symmetric(NATURAL[n], ADVERSARIAL[n]) for n in range(2)])


def test_each_divergence_has_its_own_constant():
    """Half of p - q and of q - p: what remains of each KL when its first argument is fixed."""
    first, second = (
        torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        for rows in (NATURAL, ADVERSARIAL)
    )
    slopes = torch.autograd.grad(symmetric_kl(first, second).sum(), [first, second])
    p, q = (np.array([softmax(row) for row in rows]) for rows in (NATURAL, ADVERSARIAL))
    np.testing.assert_allclose(slopes[0].numpy(), (p - q) / 2, atol=1e-15)
    np.testing.assert_allclose(slopes[1].numpy(), (q - p) / 2, atol=1e-15)


# -- the loss ------------------------------------------------------------------------------------


def planted_step(beta: float = 6.0):
    """A step on known logits of the natural, collaborative and adversarial images."""
    unit = torch.eye(6, dtype=torch.float64).reshape(6, 1, 2, 3)
    method = build("st-at", Table([*NATURAL, *COLLABORATIVE, *ADVERSARIAL]), beta=beta)
    given = Batch(unit[:2], torch.tensor(LABELS), torch.arange(2), 0)
    attacked = StAtBatch(unit[4:], unit[2:4])
    return method, method.compute_loss(given, attacked)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_loss_of_two_samples_and_three_classes(beta):
    """Sample 0: worst x_adv, best x_col.  Sample 1: worst x_adv, best x."""
    chances = [
        [softmax(table[n])[LABELS[n]] for table in (NATURAL, COLLABORATIVE, ADVERSARIAL)]
        for n in range(2)
    ]
    assert [row.index(min(row)) for row in chances] == [2, 2]
    assert [row.index(max(row)) for row in chances] == [1, 0]
    natural = mean_ce(NATURAL, LABELS)
    gap = symmetric(ADVERSARIAL[0], COLLABORATIVE[0]) + symmetric(ADVERSARIAL[1], NATURAL[1])
    _, out = planted_step(beta)
    assert out.loss.item() == pytest.approx(natural + beta * gap / 2, abs=1e-12)
    expected = {
        "loss": natural + beta * gap / 2,
        "natural_loss": natural,
        "squeeze_loss": gap / 2,
        "accuracy": 1.0,
        "robust_accuracy": 0.0,
        "collaborative_accuracy": 0.5,
    }
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_gradient_in_closed_form(beta):
    """Of the natural CE in x, and half the difference of the pair in the two that were chosen."""
    p, c, a = (
        np.array([softmax(row) for row in rows]) for rows in (NATURAL, COLLABORATIVE, ADVERSARIAL)
    )
    expected = np.zeros((3, 6))
    for sample, label in enumerate(LABELS):
        expected[:, sample] = p[sample]
        expected[label, sample] -= 1
    expected[:, 4] += beta * (a[0] - c[0]) / 2
    expected[:, 2] += beta * (c[0] - a[0]) / 2
    expected[:, 5] += beta * (a[1] - p[1]) / 2
    expected[:, 1] += beta * (p[1] - a[1]) / 2
    method, out = planted_step(beta)
    found = gradients_of(method, out)["weight"]
    np.testing.assert_allclose(found.numpy(), expected / 2, atol=1e-12)


def test_without_the_gap_it_is_natural_training():
    ours, natural = build("st-at", tiny_network(2), beta=0.0), build("natural", tiny_network(2))
    found, expected = (gradients_of(method, method.step(batch())) for method in (ours, natural))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


def test_the_choice_is_made_anew_for_the_loss():
    """Which image is called adversarial does not matter to the gap."""
    tables = [torch.tensor(t, dtype=torch.float64) for t in (NATURAL, COLLABORATIVE, ADVERSARIAL)]
    label = torch.tensor(LABELS)
    one = squeeze(tables[0], tables[1], tables[2], label, 1.0).metrics["squeeze_loss"]
    other = squeeze(tables[0], tables[2], tables[1], label, 1.0).metrics["squeeze_loss"]
    assert one.item() == pytest.approx(other.item(), abs=1e-15)


# -- the attack ----------------------------------------------------------------------------------


def reference(
    network: nn.Module, image: Tensor, label: Tensor, starts: list[Tensor], steps: int
) -> tuple[Tensor, Tensor, set[tuple[int, int]]]:
    """Sample by sample, three passes a step; radius .3, steps of .05.  Also the pairs chosen."""
    adversarial, collaborative = starts
    seen = set()
    for _ in range(steps):
        points = [
            x.detach().clone().requires_grad_(True) for x in (image, collaborative, adversarial)
        ]
        predictions = [network(x).softmax(1) for x in points]
        total, pairs = torch.zeros((), dtype=image.dtype), []
        for sample, own in enumerate(label.tolist()):
            chances = [prediction[sample, own].item() for prediction in predictions]
            worst, best = chances.index(min(chances)), chances.index(max(chances))
            pairs.append((worst, best))
            p, q = predictions[worst][sample], predictions[best][sample]
            fixed_p, fixed_q = p.detach(), q.detach()
            total = total + (fixed_q * (fixed_q / p).log()).sum() / 2
            total = total + (fixed_p * (fixed_p / q).log()).sum() / 2
        slopes = torch.autograd.grad(total, points, allow_unused=True)
        seen |= set(pairs)
        moved = []
        for role in (0, 1):
            rows = [
                points[pair[role]][n].detach() + 0.05 * slopes[pair[role]][n].sign()
                for n, pair in enumerate(pairs)
            ]
            x = torch.minimum(torch.maximum(torch.stack(rows), image - 0.3), image + 0.3)
            moved.append(x.clamp(0, 1))
        adversarial, collaborative = moved
    return adversarial, collaborative, seen


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_attack_against_a_loop_over_samples(mode):
    attack = PGD(Threat("Linf", 0.3), 5, 0.05, "gaussian")
    model = tiny_network(1, torch.float64)
    method = build("st-at", model, context(attack=attack), attack_mode=mode)
    given = batch(step=3, dtype=torch.float64)
    network = copy.deepcopy(model).train(mode == "train")
    draws = method.context.generator("attack", 3)
    starts = [starting_point(given.image, attack.threat, "gaussian", draws) for _ in range(2)]
    assert not torch.equal(*starts)
    found = method.make_adversarial(given)
    adversarial, collaborative, seen = reference(network, given.image, given.label, starts, 5)
    assert {pair[0] for pair in seen} == {pair[1] for pair in seen} == {0, 1, 2}
    torch.testing.assert_close(found.image, adversarial, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.collaborative, collaborative, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_both_images_stay_in_the_ball_and_in_range(norm, start):
    radius = {"Linf": 0.1, "L2": 0.4}[norm]
    attack = PGD(Threat(norm, radius), 6, radius / 2, start)
    given = batch(dtype=torch.float64)
    given.image[0, 0, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.02, 0.98])
    attacked = build(
        "st-at", tiny_network(1, torch.float64), context(attack=attack)
    ).make_adversarial(given)
    for image in (attacked.image, attacked.collaborative):
        assert not image.requires_grad
        assert image.min() >= 0
        assert image.max() <= 1
        distance = attack.threat.distance(image - given.image)
        assert distance.max() <= radius + 1e-12
        assert distance.max() > 0.9 * radius


def test_the_attack_finds_a_worse_and_a_better_point():
    attack = PGD(Threat("Linf", 0.1), 10, 0.02, "gaussian")
    method = build("st-at", learnt(), context(attack=attack), attack_mode="eval")
    given = batch(dtype=torch.float64)
    attacked = method.make_adversarial(given)
    network = copy.deepcopy(method.model).eval()
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(network(image), given.label).item()
            for image in (attacked.collaborative, given.image, attacked.image)
        ]
    assert losses[0] < 0.9 * losses[1]
    assert losses[2] > 1.1 * losses[1]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_method_chooses_the_mode_of_the_attack_whatever_the_run_says(mode):
    seen, images = [], []
    for run in ("train", "eval"):
        attack = replace(context().attack, mode=run)
        method = build("st-at", tiny_network(1), context(attack=attack), attack_mode=mode)
        method.model.bn1.register_forward_hook(
            lambda module, inputs, output: seen.append(module.training)
        )
        images.append(method.make_adversarial(batch()))
        assert set(seen) == {mode == "train"}
        seen.clear()
    assert torch.equal(images[0].image, images[1].image)
    assert method.model.training


def test_a_start_on_the_image_is_refused():
    with pytest.raises(ConfigError, match=r"attack.start: none .* say gaussian"):
        build("st-at", within=context(attack=replace(context().attack, start="none")))


# -- BatchNorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_statistics_remember_the_natural_and_then_the_adversarial_images_alone(mode):
    method = build("st-at", tiny_network(1), attack_mode=mode)
    before = copy.deepcopy(method.model)
    given = batch()
    attacked = method.make_adversarial(given)
    for name, buffer in before.named_buffers():
        assert torch.equal(buffer, method.model.get_buffer(name)), name
    method.compute_loss(given, attacked)
    with torch.no_grad():
        before(given.image)
        before(attacked.image)
    for name, buffer in before.named_buffers():
        assert torch.equal(buffer, method.model.get_buffer(name)), name
    assert int(method.model.bn1.num_batches_tracked) == 2


def test_an_untracked_pass_answers_alike_can_be_differentiated_and_leaves_no_trace():
    model, plain = tiny_network(1), tiny_network(1)
    model.block.bn2.track_running_stats = False
    model.block.bn1.eval()
    plain.block.bn1.eval()
    kept = copy.deepcopy(model.state_dict())
    with untracked(model):
        logits = model(batch().image)
    assert torch.equal(logits, plain(batch().image))
    model(batch(seed=1).image)  # statistics may move before the graph is used
    (gradient,) = torch.autograd.grad(logits.square().sum(), [model.conv1.weight])
    assert gradient.abs().max() > 0
    with pytest.raises(RuntimeError, match="planted"), untracked(model):
        raise RuntimeError("planted")
    flags = [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert flags == [True, True, False]
    with untracked(model):
        model.load_state_dict(kept)
        model(batch().image)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


# -- cost, settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_passes_of_a_step(mode):
    """2 k + 4 and 3 k + 3."""
    for steps, expected in ((10, (24, 33)), (3, (10, 12))):
        method = build("st-at", within=context(steps=steps), attack_mode=mode)
        assert passes(method) == expected


@pytest.mark.parametrize("wrong", [{"beta": -1.0}, {"attack_mode": "run"}, {"loss_mode": "js"}])
def test_wrong_settings_are_errors(wrong):
    with pytest.raises(ValidationError):
        StAtConfig(**wrong)


def test_settings_from_a_recipe():
    assert (StAtConfig().beta, StAtConfig().attack_mode) == (6.0, "train")
    run = load_recipe("cifar10-mini", ["method={name: st-at, beta: 3, attack_mode: eval}"])
    assert run.method == StAtConfig(beta=3.0, attack_mode="eval")
