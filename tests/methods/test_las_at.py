"""LAS-AT: what a strategy is, that each image gets its own attack, and what a strategy learns."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
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
    softmax,
    teacher_network,
    tiny_network,
)
from pydantic import ValidationError
from test_every_method import advance, assert_same_step, assert_same_tensors
from torch import Tensor, nn

from cure.attacks import PGD, Hooks, PerSample, Threat
from cure.attacks.losses import CROSS_ENTROPY, KL
from cure.config import ModelConfig, WeightPerturbationConfig
from cure.data.images import Batch
from cure.methods import METHODS, Context, Method
from cure.methods.common.losses import smoothed_cross_entropy
from cure.methods.las_at import (
    LasAtBatch,
    LasAtConfig,
    OwnStrategy,
    RewardConfig,
    StrategyConfig,
    StrategyNetwork,
)
from cure.methods.wrappers.awp import AWP
from cure.models import describe
from cure.recipe import check, dump, load_recipe

FORMS = ["at", "trades"]
every_form = pytest.mark.parametrize("form", FORMS)
either_way = pytest.mark.parametrize("reuse", [False, True])

# -- the strategy network ------------------------------------------------------------------------


class Fixed(nn.Module):
    """A trunk that answers with the same logits for every image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, image: Tensor) -> Tensor:
        return self.logits.expand(len(image), -1)


RANGES = {"epsilon": (3, 5), "steps": (7, 8)}
HEADS = [[1.0, 0.0, -1.0], [0.5, -0.25]]


def test_a_head_is_a_softmax_and_the_likelihood_a_sum_over_heads():
    network = StrategyNetwork(Fixed([*HEADS[0], *HEADS[1]]), RANGES)
    logits = network(torch.zeros(2, 1, 2, 2))
    heads = network.heads(logits)
    assert list(heads) == ["epsilon", "steps"]
    for name, numbers in zip(RANGES, HEADS, strict=True):
        assert heads[name][1].exp().tolist() == pytest.approx(softmax(numbers))
    actions = {"epsilon": torch.tensor([3, 5]), "steps": torch.tensor([8, 8])}
    epsilon, steps = (softmax(numbers) for numbers in HEADS)
    expected = (math.log(epsilon[0]) + math.log(epsilon[2])) / 2 + math.log(steps[1])
    found = network.log_likelihood(logits, actions)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_actions_are_drawn_as_often_as_they_are_likely_and_heads_are_independent():
    count = 40_000
    network = StrategyNetwork(Fixed([*HEADS[0], *HEADS[1]]), RANGES)
    logits = network(torch.zeros(count, 1, 2, 2))
    actions = network.draw(logits, torch.Generator().manual_seed(5))
    assert all(values.dtype == torch.int64 for values in actions.values())
    pairs = Counter(zip(actions["epsilon"].tolist(), actions["steps"].tolist(), strict=True))
    assert set(pairs) == set(itertools.product((3, 4, 5), (7, 8)))
    epsilon, steps = (softmax(numbers) for numbers in HEADS)
    for (size, number), seen in pairs.items():
        share = epsilon[size - 3] * steps[number - 7]
        assert abs(seen / count - share) < 4 * math.sqrt(share * (1 - share) / count)
    again = network.draw(logits, torch.Generator().manual_seed(5))
    assert_same_tensors(actions, again)


def test_each_image_has_probabilities_of_its_own():
    network = StrategyNetwork(nn.Flatten(), {"steps": (1, 4)})
    sure = 60 * torch.eye(4).reshape(4, 1, 2, 2)
    drawn = network.draw(network(sure), torch.Generator().manual_seed(0))
    assert drawn["steps"].tolist() == [1, 2, 3, 4]


def test_the_update_follows_the_gradient_of_the_expected_reward():
    """Exactly: every joint action of two images is enumerated, with a reward of its own.

    The policy loss has a mean over images where the likelihood of all actions has a sum, so its
    expected gradient is that of ``- E[R] / 2``.
    """
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    network = StrategyNetwork(trunk, RANGES)
    image = torch.rand(2, 1, 2, 2, dtype=torch.float64)
    single = list(itertools.product((3, 4, 5), (7, 8)))
    joint = list(itertools.product(single, single))
    rewards = [3 * math.sin(7 * number) + 1 for number in range(len(joint))]

    def chances() -> list[float]:
        rows = []
        with torch.no_grad():
            for numbers in trunk(image).tolist():
                epsilon, steps = softmax(numbers[:3]), softmax(numbers[3:])
                rows.append([epsilon[size - 3] * steps[number - 7] for size, number in single])
        return [first * second for first, second in itertools.product(*rows)]

    def expected_reward() -> float:
        return sum(chance * reward for chance, reward in zip(chances(), rewards, strict=True))

    parameters = list(network.parameters())
    expectation = [torch.zeros_like(parameter) for parameter in parameters]
    assert sum(chances()) == pytest.approx(1)
    for chance, reward, pair in zip(chances(), rewards, joint, strict=True):
        actions = {
            "epsilon": torch.tensor([size for size, _ in pair]),
            "steps": torch.tensor([number for _, number in pair]),
        }
        loss = -reward * network.log_likelihood(network(image), actions)
        for total, slope in zip(expectation, torch.autograd.grad(loss, parameters), strict=True):
            total += chance * slope
    moved = 0.0
    for parameter, total in zip(parameters, expectation, strict=True):
        flat = parameter.data.view(-1)
        for place in range(flat.numel()):
            kept = flat[place].item()
            flat[place] = kept + 1e-5
            above = expected_reward()
            flat[place] = kept - 1e-5
            below = expected_reward()
            flat[place] = kept
            slope = (above - below) / 2e-5
            assert total.view(-1)[place].item() == pytest.approx(-slope / 2, abs=1e-9)
            moved = max(moved, abs(slope))
    assert moved > 0.1


# -- each image's own attack ----------------------------------------------------------------------


class Watched:
    """An attack that keeps what it was asked and what it answered, call by call."""

    def __init__(self, attack: PGD) -> None:
        self.attack = attack
        self.threat = attack.threat
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: nn.Module, *given: Any, **options: Any) -> Tensor:
        answer = self.attack(model, *given, **options)
        self.calls.append({"model": model, "objective": given[2], "answer": answer, **options})
        return answer


def within_of(start: str = "uniform", epsilon: float = 0.1, **changes: Any) -> Context:
    threat = Threat("Linf", epsilon)
    return context(attack=Watched(PGD(threat, 99, 99.0, start)), **changes)


def las(form: str, within: Context | None = None, model: Any = None, **settings: Any) -> Method:
    """In float64, on a network that knows the batch."""
    model = teacher_network(60, torch.float64) if model is None else model
    method = build("las-at", model, within or within_of(), form=form, **settings)
    return method.double()


def forward_alone(network: nn.Module, image: Tensor) -> Tensor:
    return network(image[None])[0]


def watch_draws(method: Method) -> list[dict[str, Tensor]]:
    """A list that will hold the actions of every draw."""
    drawn: list[dict[str, Tensor]] = []
    draw = method.strategy.draw

    def watched(*given: Any) -> dict[str, Tensor]:
        drawn.append(draw(*given))
        return drawn[-1]

    method.strategy.draw = watched
    return drawn


SHORT = {"steps": (1, 2)}
QUICK = {"steps": 2, "restarts": 1}


@every_form
def test_each_image_is_attacked_as_its_own_strategy_says(form):
    """Against a loop over single images, the start drawn in the threat's ball for all of them."""
    start = "uniform" if form == "at" else "gaussian"
    within = within_of(start, 0.16)
    ranges = {"epsilon": (1, 15), "steps": (1, 6), "step_size": (1, 5), "interval": 20}
    method = las(form, within, strategy=ranges)
    given = batch(step=4, count=12, seed=50, dtype=torch.float64)
    network = copy.deepcopy(method.model).eval()
    attacked = method.make_adversarial(given)
    (call,) = within.attack.calls
    assert call["model"] is method.model
    assert call["objective"] is (KL if form == "trades" else CROSS_ENTROPY)

    unit = 0.16 / 8
    units = {name: (getattr(attacked, name) / unit).tolist() for name in ("epsilon", "step_size")}
    assert all(1 <= round(n) <= 15 and abs(n - round(n)) < 1e-9 for n in units["epsilon"])
    assert all(1 <= round(n) <= 5 and abs(n - round(n)) < 1e-9 for n in units["step_size"])
    assert set(attacked.steps.tolist()) <= set(range(1, 7))
    assert all(
        len(set(getattr(attacked, name).tolist())) > 2 for name in ("epsilon", "steps", "step_size")
    )

    draws = method.context.generator("attack", given.step)
    if start == "uniform":
        noise = 0.16 * (2 * torch.rand(given.image.shape, generator=draws, dtype=torch.float64) - 1)
    else:
        noise = 0.001 * torch.randn(given.image.shape, generator=draws, dtype=torch.float64)
    alone = []
    for number, image in enumerate(given.image):
        radius, size = attacked.epsilon[number].item(), attacked.step_size[number].item()
        current = (image + noise[number].clamp(-radius, radius)).clamp(0, 1)
        label = int(given.label[number])
        natural = forward_alone(network, image).softmax(0).detach()
        for _ in range(int(attacked.steps[number])):
            leaf = current.clone().requires_grad_(True)
            logits = forward_alone(network, leaf)
            if form == "at":
                climbed = logits.logsumexp(0) - logits[label]
            else:
                climbed = (natural * (natural / logits.softmax(0)).log()).sum()
            (slope,) = torch.autograd.grad(climbed, leaf)
            stepped = current + size * slope.sign()
            stepped = torch.minimum(torch.maximum(stepped, image - radius), image + radius)
            current = stepped.clamp(0, 1)
        alone.append(current)
    torch.testing.assert_close(attacked.image, torch.stack(alone), rtol=0, atol=1e-9)
    change = (attacked.image - given.image).abs().flatten(1).amax(dim=1)
    assert (change <= attacked.epsilon + 1e-12).all()
    assert (change > 0.99 * 0.16).any(), "some image should be allowed more than the threat"


@pytest.mark.parametrize("epsilon", [8 / 255, 0.15])
def test_sizes_are_eighths_of_the_threat(epsilon):
    method = build("las-at", within=context(epsilon=epsilon))
    attacked = method.make_adversarial(batch())
    for name, low, high in (("epsilon", 3, 15), ("step_size", 1, 5)):
        assert getattr(attacked, name).min() >= low * epsilon / 8 * (1 - 1e-6)
        assert getattr(attacked, name).max() <= high * epsilon / 8 * (1 + 1e-6)
        assert getattr(attacked, name).max() > getattr(attacked, name).min()
    assert attacked.steps.min() >= 3
    assert attacked.steps.max() <= 14
    assert attacked.beta is None


def test_the_form_trades_draws_a_beta_for_each_image():
    attacked = build("las-at", form="trades").make_adversarial(batch(count=24))
    assert set(attacked.beta.tolist()) == {5.0, 6.0, 7.0, 8.0, 9.0}


def test_a_uniform_start_from_another_ball():
    image = torch.full((2, 1, 30, 30), 0.5, dtype=torch.float64)
    threat, radius = Threat("Linf", 0.2), torch.tensor([0.05, 0.4], dtype=torch.float64)

    def changes(hooks: Hooks) -> Tensor:
        draws = torch.Generator().manual_seed(1)
        return hooks.start(image, threat, "uniform", draws, True) - 0.5

    plain = changes(Hooks())
    assert torch.equal(
        changes(PerSample(torch.full((2,), 0.2, dtype=torch.float64), radius)), plain
    )
    found = changes(OwnStrategy(radius, torch.tensor([1, 1]), radius))
    torch.testing.assert_close(found[0], plain[0].clamp(-0.05, 0.05))
    torch.testing.assert_close(found[1], plain[1])
    assert changes(PerSample(radius, radius))[1].abs().max() > 0.35, "the ball of epsilon"


# -- the loss ------------------------------------------------------------------------------------


def smoothed(rows: list[list[float]], labels: list[int], mass: float) -> float:
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        for place, chance in enumerate(softmax(row)):
            share = mass if place == label else (1 - mass) / (len(row) - 1)
            total -= share * math.log(chance)
    return total / len(labels)


def table(form: str, **settings: Any) -> tuple[Method, Batch, LasAtBatch]:
    unit = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    method = las(form, model=Table([*NATURAL, *ADVERSARIAL]), **settings)
    given = Batch(unit[:2], torch.tensor(LABELS), torch.arange(2), 0)
    attacked = LasAtBatch(
        unit[2:],
        epsilon=torch.tensor([0.1, 0.2], dtype=torch.float64),
        steps=torch.tensor([3, 4]),
        step_size=torch.tensor([0.01, 0.03], dtype=torch.float64),
        beta=torch.tensor([2.0, 5.0], dtype=torch.float64),
    )
    return method, given, attacked


@pytest.mark.parametrize("mass", [0.7, 0.6, 1.0])
def test_smoothed_loss_of_two_samples_and_three_classes(mass):
    method, given, attacked = table("at", true_mass=mass)
    out = method.compute_loss(given, attacked)
    assert out.loss.item() == pytest.approx(smoothed(ADVERSARIAL, LABELS, mass), abs=1e-12)
    if mass == 1:
        assert out.loss.item() == pytest.approx(mean_ce(ADVERSARIAL, LABELS), abs=1e-12)
    assert out.metrics["loss"].item() == out.loss.item()
    assert out.metrics["robust_accuracy"].item() == 0
    assert out.metrics["epsilon"].item() == pytest.approx(0.15)
    assert out.metrics["steps"].item() == 3.5
    assert out.metrics["step_size"].item() == pytest.approx(0.02)


def test_gradient_of_the_smoothed_loss_in_closed_form():
    """``(p - target) / B``."""
    logits = torch.tensor(ADVERSARIAL, dtype=torch.float64, requires_grad=True)
    loss = smoothed_cross_entropy(logits, torch.tensor(LABELS), 0.7)
    (found,) = torch.autograd.grad(loss, logits)
    for row, label, slopes in zip(ADVERSARIAL, LABELS, found.tolist(), strict=True):
        target = [0.7 if place == label else 0.15 for place in range(3)]
        expected = [(p - t) / 2 for p, t in zip(softmax(row), target, strict=True)]
        assert slopes == pytest.approx(expected, abs=1e-12)


def test_each_image_has_its_own_weight_in_the_form_trades():
    method, given, attacked = table("trades")
    out = method.compute_loss(given, attacked)
    kl = [mean_kl([NATURAL[n]], [ADVERSARIAL[n]]) for n in (0, 1)]
    expected = mean_ce(NATURAL, LABELS) + (2 * kl[0] + 5 * kl[1]) / 2
    assert out.loss.item() == pytest.approx(expected, abs=1e-12)
    assert out.metrics["natural_loss"].item() == pytest.approx(mean_ce(NATURAL, LABELS))
    assert out.metrics["adversarial_loss"].item() == pytest.approx((kl[0] + kl[1]) / 2)
    assert out.metrics["beta"].item() == 3.5


def test_equal_weights_are_trades_with_gradients_through_both_predictions():
    method, given, attacked = table("trades")
    attacked = replace(attacked, beta=torch.full((2,), 6.0, dtype=torch.float64))
    images = attacked.image
    within = context(attack=lambda *arguments, **options: images)
    plain = build("trades", Table([*NATURAL, *ADVERSARIAL]), within, beta=6.0)
    expected = gradients_of(plain, plain.step(given))["weight"]
    found = gradients_of(method, method.compute_loss(given, attacked))["weight"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@every_form
def test_learning_is_pure_also_at_an_update(form):
    method = las(form, strategy={"interval": 1})
    attacked = method.make_adversarial(batch(dtype=torch.float64))
    before = copy.deepcopy(method.strategy.state_dict())
    outs = [method.compute_loss(batch(dtype=torch.float64), attacked) for _ in range(2)]
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert_same_tensors(method.strategy.state_dict(), before)


# -- the reward ----------------------------------------------------------------------------------


def by_hand(
    network: nn.Module, given: Batch, made: LasAtBatch, form: str, epsilon: float, draws: Any
) -> tuple[float, float, float]:
    """R1, R2 and R3 of images already made: rate 0.2, decay 0.02, 4 steps, 3 starts."""

    def trained(model: nn.Module) -> Tensor:
        if form == "at":
            logarithms = model(made.image).log_softmax(1)
            target = torch.full_like(logarithms, 0.15)
            target[torch.arange(len(target)), given.label] = 0.7
            return -(target * logarithms).sum(1).mean()
        p, q = model(given.image).softmax(1), model(made.image).softmax(1)
        picked = p[torch.arange(len(p)), given.label].log()
        return (-picked + made.beta * (p * (p / q).log()).sum(1)).mean()

    with torch.no_grad():
        if form == "at":
            logits = copy.deepcopy(network).eval()(made.image)
            first = nn.functional.cross_entropy(logits, given.label).item()
        else:
            first = trained(copy.deepcopy(network)).item()
    after = copy.deepcopy(network)
    optimizer = torch.optim.SGD(after.parameters(), lr=0.2, momentum=0.9, weight_decay=0.02)
    trained(after).backward()
    optimizer.step()
    attacked = copy.deepcopy(after)  # in training mode, its own statistics spoilt
    after.eval()
    standing = torch.ones(len(given.label), dtype=torch.bool)
    for _ in range(3):
        noise = torch.rand(given.image.shape, generator=draws, dtype=torch.float64)
        current = (given.image + epsilon * (2 * noise - 1)).clamp(0, 1)
        moving = torch.ones_like(standing)
        for _ in range(4):
            leaf = current.clone().requires_grad_(True)
            logits = attacked(leaf)
            loss = nn.functional.cross_entropy(logits, given.label, reduction="sum")
            (slope,) = torch.autograd.grad(loss, leaf)
            moving &= logits.argmax(1) == given.label
            stepped = current + epsilon / 4 * slope.sign()
            stepped = given.image + (stepped - given.image).clamp(-epsilon, epsilon)
            current = torch.where(moving[:, None, None, None], stepped.clamp(0, 1), current)
        standing &= after(current).argmax(1) == given.label
    natural = after(given.image).argmax(1) == given.label
    return first, standing.double().mean().item(), natural.double().mean().item()


REWARD = {"loss": 0.5, "robust": 3.0, "natural": 7.0, "steps": 4, "restarts": 3}


@either_way
@every_form
def test_parts_of_the_reward(form, reuse):
    within = within_of(epsilon=0.25, learning_rate=lambda step: 0.2 * step / 3, weight_decay=0.02)
    model = teacher_network(61, torch.float64)
    method = las(form, within, model, reward=REWARD, strategy={"interval": 4, "reuse": reuse})
    given = batch(step=3, seed=50, dtype=torch.float64)
    given.label[[2, 7]] = (given.label[[2, 7]] + 1) % 3
    network = copy.deepcopy(model)
    drawn = watch_draws(method)
    attacked = method.make_adversarial(given)
    made = attacked
    if not reuse:
        first = within.attack.calls[0]
        made = replace(made, image=first["answer"])
        assert not torch.equal(made.image, attacked.image)
        if form == "trades":
            made = replace(made, beta=drawn[0]["beta"].double())
            assert not torch.equal(made.beta, attacked.beta)
    draws = method.context.generator("reward", 3)
    expected = by_hand(network, given, made, form, 0.25, draws)
    with torch.no_grad():
        now = network.eval()(given.image).argmax(1) == given.label
    assert 0 < expected[1] < expected[2] < now.double().mean(), "the parts should differ"
    found = [attacked.reward[f"reward_{name}"].item() for name in ("loss", "robust", "natural")]
    assert found == pytest.approx(expected, rel=1e-9)
    total = 0.5 * expected[0] + 3 * expected[1] + 7 * expected[2]
    assert attacked.reward["reward"].item() == pytest.approx(total, rel=1e-9)
    metrics = method.compute_loss(given, attacked).metrics
    assert metrics["reward"].item() == attacked.reward["reward"].item()


def test_the_first_part_is_limited():
    method = las("at", strategy={"interval": 1}, reward={"limit": 0.1, "robust": 0, "natural": 0})
    attacked = method.make_adversarial(batch(dtype=torch.float64))
    assert attacked.reward["reward_loss"] > 0.1
    assert attacked.reward["reward"].item() == 0.1


@either_way
@every_form
def test_crafting_leaves_the_network_as_it_was(form, reuse):
    """Statistics, too: neither the reward nor the copy's step moves them."""
    method = las(form, strategy={"interval": 1, "reuse": reuse})
    before = copy.deepcopy(method.model.state_dict())
    attacked = method.make_adversarial(batch(dtype=torch.float64))
    assert attacked.reward
    assert_same_tensors(method.model.state_dict(), before)
    assert all(module.training for module in method.modules())
    assert all(parameter.requires_grad for parameter in method.parameters())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert not any(
        value.requires_grad for value in vars(attacked).values() if isinstance(value, Tensor)
    )


@every_form
def test_the_copy_takes_one_plain_step_with_the_weights_that_learn(form):
    model = teacher_network(60, torch.float64)
    model.linear.requires_grad_(False)
    within = within_of(learning_rate=lambda step: 0.1 * step, weight_decay=0.1)
    method = las(form, within, model, strategy=SHORT, reward=QUICK)
    given = batch(step=5, dtype=torch.float64)
    attacked = method.make_adversarial(given)
    after, _ = method._after_one_step(given, attacked)
    assert torch.equal(after.linear.weight, model.linear.weight)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    theirs = torch.optim.SGD(learning, lr=0.5, momentum=0.9, weight_decay=0.1)
    method.compute_loss(given, attacked).loss.backward()
    theirs.step()
    for name, value in after.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-12, msg=name)


# -- the strategy network learns -----------------------------------------------------------------


@either_way
@every_form
def test_an_update_is_a_step_against_the_policy_loss(form, reuse):
    """Gradient, clipping, decay and momentum against PyTorch's own, over three updates."""
    optimiser = {"learning_rate": 0.3, "momentum": 0.8, "weight_decay": 0.05, "clip_norm": 0.4}
    ours = {"interval": 1, "reuse": reuse, **optimiser, **SHORT}
    method = las(form, strategy=ours, reward=QUICK)
    other = copy.deepcopy(method.strategy)
    theirs = torch.optim.SGD(other.parameters(), lr=0.3, momentum=0.8, weight_decay=0.05)
    drawn = watch_draws(method)
    clipped = 0
    for step in range(3):
        given = batch(step, seed=step, dtype=torch.float64)
        drawn.clear()
        attacked = method.make_adversarial(given)
        assert len(drawn) == (1 if reuse else 2)
        if not reuse:
            same = drawn[0]["epsilon"] == drawn[1]["epsilon"]
            assert same.double().mean() < 0.6, "two draws of one step have chance of their own"
        total = 0
        sizes = [high - low + 1 for low, high in other.ranges.values()]
        for (name, (low, _)), part in zip(
            other.ranges.items(), other.train()(given.image).split(sizes, 1), strict=True
        ):
            chosen = part.softmax(1)[torch.arange(24), drawn[0][name] - low]
            total = total + chosen.log().mean()
        theirs.zero_grad()
        (-attacked.reward["reward"] * total).backward()
        clipped += bool(nn.utils.clip_grad_norm_(other.parameters(), 0.4) > 0.4)
        theirs.step()
        for name, value in method.strategy.state_dict().items():
            expected = other.state_dict()[name]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9, msg=name)
    assert clipped > 0
    assert method.velocity.abs().max() > 0


def test_a_short_gradient_is_not_stretched():
    method = las("at", strategy={"learning_rate": 1.0, "clip_norm": 5.0})
    weight = method.strategy.trunk.linear.bias
    before = weight.detach().clone()
    method._descend((torch.linspace(0, 0.01, len(weight)).double() * weight).sum(), 0)
    change = before - weight.detach()
    torch.testing.assert_close(change, torch.linspace(0, 0.01, len(weight)).double())
    method._descend((torch.full((len(weight),), 100.0).double() * weight).sum(), 0)
    longer = before - change - weight.detach()
    assert longer.norm().item() == pytest.approx(5, rel=1e-6)


@every_form
def test_strategies_that_pay_become_likelier(form):
    """Only small radii are rewarded: their probability rises."""
    quickly = {"steps": (1, 1), "interval": 1, "learning_rate": 0.5, "momentum": 0.0}
    method = las(form, strategy=quickly)
    low = method.strategy.ranges["epsilon"][0]

    def parts(given: Batch, made: LasAtBatch) -> dict[str, Tensor]:
        share = (made.epsilon < (low + 1.5) * 0.1 / 8).double().mean()
        zero = share.new_zeros(())
        # With about its mean taken off, so that few updates show the direction.
        return {"reward_loss": zero, "reward_robust": share - usual, "reward_natural": zero}

    method._reward_parts = parts
    image = batch(dtype=torch.float64).image

    def probability() -> float:
        with torch.no_grad():
            heads = method.strategy.heads(method.strategy(image))
        return heads["epsilon"][:, :2].exp().sum(1).mean().item()

    before = usual = probability()
    for step in range(40):
        method.make_adversarial(batch(step, seed=step, dtype=torch.float64))
    assert probability() > before + 0.05


@either_way
def test_the_strategy_network_draws_in_evaluation_mode_and_learns_in_training_mode(reuse):
    method = las("at", strategy={"interval": 2, "reuse": reuse})
    modes = []
    method.strategy.trunk.bn1.register_forward_hook(
        lambda module, *rest: modes.append(module.training)
    )
    method.step(batch(0, dtype=torch.float64))
    assert modes == [False]
    assert int(method.strategy.trunk.bn1.num_batches_tracked) == 0
    method.step(batch(1, dtype=torch.float64))
    assert modes[1:] == ([False, True] if reuse else [True, False])
    assert int(method.strategy.trunk.bn1.num_batches_tracked) == 1


@pytest.mark.parametrize(("form", "due"), [("at", [19, 39]), ("trades", list(range(40)))])
def test_it_learns_every_twentieth_or_every_step(form, due):
    method = build("las-at", within=within_of(), form=form)
    method._attacked = lambda given, actions, purpose: LasAtBatch(
        given.image, *given.image.new_ones(3, len(given.image))
    )
    method._reward_parts = lambda given, made: {
        f"reward_{name}": torch.tensor(1.0) for name in ("loss", "robust", "natural")
    }
    moved = []
    for step in range(40):
        before = copy.deepcopy(method.strategy.state_dict())
        attacked = method.make_adversarial(batch(step))
        now = method.strategy.state_dict()
        changed = not all(torch.equal(now[name], value) for name, value in before.items())
        assert changed == bool(attacked.reward)
        moved += [step] * changed
    assert moved == due


@every_form
@either_way
@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_run_resumed_around_an_update_repeats_bit_for_bit(form, reuse, done):
    learning = {"interval": 2, "reuse": reuse, "learning_rate": 0.1, **SHORT}
    settings = {"form": form, "strategy": learning, "reward": QUICK}
    method = build("las-at", tiny_network(3), **settings)
    other = context(seed=1)  # another initial strategy; the seed itself is the run's
    resumed = build("las-at", tiny_network(4), other, **settings)
    assert not torch.equal(method.strategy.trunk.conv1.weight, resumed.strategy.trunk.conv1.weight)
    advance(method, done)
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    resumed.context = method.context
    torch.manual_seed(7)
    assert ("velocity" in method.state_dict()) == (form == "trades")
    assert_same_step(method, resumed, done)
    assert_same_step(method, resumed, done + 1)
    assert_same_tensors(method.state_dict(), resumed.state_dict())


# -- cost ----------------------------------------------------------------------------------------


def passes_by_network(method: Method, step: int) -> dict[str, tuple[int, int]]:
    """Forward passes, and gradients that reach the output, of each network in one step."""
    counts: dict[str, list[int]] = {name: [0, 0] for name in ("model", "copy", "strategy")}
    known = {id(method.model): "model", id(method.strategy): "strategy"}

    def passed(module: nn.Module, inputs: object, output: Tensor) -> None:
        count = counts[known.get(id(module), "copy")]  # a deep copy keeps the hook
        count[0] += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: count.__setitem__(1, count[1] + 1))

    handles = [net.register_forward_hook(passed) for net in (method.model, method.strategy)]
    gradients_of(method, method.step(batch(step)))
    for handle in handles:
        handle.remove()
    return {name: (forward, backward) for name, (forward, backward) in counts.items()}


@pytest.mark.parametrize(
    ("form", "reuse", "step", "model", "copied", "strategy"),
    [
        ("at", False, 0, (15, 15), (0, 0), (1, 0)),
        ("at", False, 1, (30, 29), (24, 21), (2, 1)),
        ("at", True, 1, (16, 15), (24, 21), (2, 1)),
        ("trades", False, 0, (17, 16), (0, 0), (1, 0)),
        ("trades", False, 1, (32, 30), (25, 22), (2, 1)),
        ("trades", True, 1, (17, 16), (25, 22), (2, 1)),
    ],
)
def test_passes_of_a_step(form, reuse, step, model, copied, strategy):
    """With 14 steps; the largest number in the batch is what counts."""
    settings = {"steps": (14, 14), "interval": 2, "reuse": reuse}
    method = build("las-at", form=form, strategy=settings)
    found = passes_by_network(method, step)
    assert found == {"model": model, "copy": copied, "strategy": strategy}
    tracked = int(method.model.bn1.num_batches_tracked)
    assert tracked == (1 if form == "at" else 2)


def test_the_batch_takes_as_many_steps_as_its_most_patient_image():
    within = within_of()
    method = las("at", within, strategy={"steps": (1, 6)})
    found = passes_by_network(method.float(), 0)
    (call,) = within.attack.calls
    most = call["hooks"].steps
    assert int(call["hooks"].own_steps.min()) < most
    assert found["model"] == (most + 1, most + 1)


# -- settings ------------------------------------------------------------------------------------


def test_defaults_of_the_forms():
    at, trades = LasAtConfig(), LasAtConfig(form="trades")
    plain = at.strategy
    assert (plain.epsilon, plain.steps, plain.step_size) == ((3, 15), (3, 14), (1, 5))
    assert (plain.interval, plain.learning_rate, plain.clip_norm) == (20, 1e-4, 1.0)
    assert (plain.momentum, plain.weight_decay, at.true_mass) == (0.0, 0.0, 0.7)
    assert at.reward == RewardConfig(loss=1, robust=4, natural=2, limit=10, steps=10, restarts=2)
    other = trades.strategy
    assert (other.epsilon, other.steps, other.step_size) == ((5, 9), (7, 14), (2, 4))
    assert (other.beta, other.interval) == ((5, 9), 1)
    assert (other.learning_rate, other.momentum, other.weight_decay) == (1e-4, 0.9, 5e-4)
    assert trades.reward == RewardConfig(robust=8, natural=4, limit=20)
    for config in (at, trades):
        assert config.strategy.model == ModelConfig(name="resnet18")
        assert not config.strategy.reuse


def test_what_is_given_wins_over_the_defaults_of_the_form():
    words = LasAtConfig(form="trades", strategy={"interval": 5, "model": "small_cnn"})
    objects = LasAtConfig(
        form="trades", strategy=StrategyConfig(interval=5, model={"name": "small_cnn"})
    )
    assert words == objects
    assert words.strategy.interval == 5
    assert words.strategy.model.name == "small_cnn"
    assert words.strategy.epsilon == (5, 9)


def test_settings_from_a_recipe_and_back():
    words = ["method=las-at", "method.form=trades", "method.strategy.model=resnet10"]
    config = load_recipe("digits", [*words, "method.reward.robust=6"])
    assert config.method == LasAtConfig(
        form="trades", strategy={"model": {"name": "resnet10"}}, reward={"robust": 6}
    )
    assert check(yaml.safe_load(dump(config)), "again") == config


def test_the_default_trunk_is_a_resnet18_with_a_head_for_each_parameter():
    kind = METHODS["las-at"]
    trunk = kind(tiny_network(), LasAtConfig(), context()).strategy.trunk
    assert describe(trunk)["name"] == "resnet18"
    assert trunk.linear.out_features == 13 + 12 + 5
    assert trunk.conv1.in_channels == 1
    with_beta = build("las-at", form="trades").strategy
    assert with_beta(batch().image).shape == (24, 5 + 8 + 3 + 5)


def test_its_first_weights_hang_on_the_seed_alone():
    torch.manual_seed(1)
    first = build("las-at").strategy
    torch.manual_seed(2)
    assert_same_tensors(first.state_dict(), build("las-at").strategy.state_dict())
    other = build("las-at", within=context(seed=1)).strategy
    assert not torch.equal(first.trunk.conv1.weight, other.trunk.conv1.weight)


def test_it_lies_in_the_layout_of_the_run_and_learns_the_same_there():
    within = within_of()
    settings = {"form": "trades", "strategy": {"learning_rate": 0.3, **SHORT}, "reward": QUICK}
    plain = las(within=within, model=tiny_network(3), **settings)
    engine = replace(within.engine, channels_last=True)
    innermost = las(within=replace(within, engine=engine), model=tiny_network(3), **settings)
    for method in (plain, innermost):
        for step in range(2):
            method.make_adversarial(batch(step, dtype=torch.float64))
    weight = innermost.strategy.trunk.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not plain.strategy.trunk.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in innermost.strategy.state_dict().items():
        torch.testing.assert_close(value, plain.strategy.state_dict()[name])


def test_a_narrow_one_whose_gradient_onednn_spoils_keeps_the_default_layout():
    within = within_of()
    within = replace(within, engine=replace(within.engine, channels_last=True))
    narrow = {"model": {"name": "resnet10", "options": {"width": 4}}, **SHORT}
    strategy = {"strategy": narrow, "reward": QUICK}
    method = las("at", within=within, model=tiny_network(3), **strategy)
    asked = []
    method.strategy.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    image = within.engine.arrange(batch(0, dtype=torch.float64).image)
    method.make_adversarial(replace(batch(0, dtype=torch.float64), image=image))
    assert all(weight.is_contiguous() for weight in method.strategy.parameters())
    assert asked
    assert all(image.is_contiguous() for image in asked)


def test_without_images_there_is_nothing_to_build_it_for():
    with pytest.raises(ValueError, match="needs images"):
        build("las-at", within=context(natural_images=lambda: iter(())))


def test_las_awp_is_weight_perturbation_around_it():
    settings = {"epsilon": (7, 15), "steps": (8, 16), "step_size": (2, 5), "interval": 1}
    method = build("las-at", true_mass=1, strategy=settings, reward={"robust": 1, "natural": 1})
    wrapped = AWP(method, WeightPerturbationConfig())
    before = copy.deepcopy(method.trainable())
    out = wrapped.step(batch())
    assert out.metrics["perturbed_loss"] != out.metrics["loss"]
    assert "reward" in out.metrics
    wrapped.after_step(0)
    assert_same_tensors(method.trainable(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "mart"},
        {"true_mass": 0.0},
        {"true_mass": 1.1},
        {"strategy": {"epsilon": (5, 4)}},
        {"strategy": {"steps": (0, 4)}},
        {"strategy": {"step_size": (1, 2, 3)}},
        {"strategy": {"interval": 0}},
        {"strategy": {"momentum": 1.0}},
        {"strategy": {"clip_norm": 0.0}},
        {"strategy": {"width": 3}},
        {"strategy": 3},
        {"strategy": None},
        {"form": "trades", "strategy": 3},
        {"form": "trades", "strategy": {"beta": (0, 4)}},
        {"reward": {"robust": -1.0}},
        {"reward": {"restarts": 0}},
    ],
)
def test_values_out_of_range_are_errors(wrong):
    with pytest.raises(ValidationError):
        LasAtConfig(**wrong)


def test_the_strategy_s_rate_drops_at_three_quarters_and_nine_tenths_of_the_run():
    """Released code for LAS-TRADES: 1e-4, 1e-5 and 1e-6; 40 steps here."""
    config = LasAtConfig(form="trades").strategy
    found = [config.learning_rate_at(step / 40) for step in (0, 29, 30, 35, 36, 39)]
    assert found == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])
    assert LasAtConfig().strategy.learning_rate_at(0.99) == 1e-4
    quick = {"learning_rate": 1.0, "clip_norm": 1.0, "drops": [0.5], "momentum": 0.0}
    changes = []
    for step in (19, 20):
        method = las("at", strategy=quick)
        weight = method.strategy.trunk.linear.bias
        before = weight.detach().clone()
        method._descend((100.0 * weight).sum(), step)
        changes.append((before - weight.detach()).norm().item())
    assert changes[1] == pytest.approx(0.1 * changes[0], rel=1e-9)
