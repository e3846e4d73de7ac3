"""AWP against the released procedure written out, and around every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_bench import batch, build, context, gradients_of, passes, tiny_network
from pydantic import ValidationError
from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY, KL
from cure.config import AveragingConfig, WeightPerturbationConfig
from cure.data.images import Batch
from cure.methods import METHODS, AdversarialBatch, Method, StepOutput
from cure.methods.at import AT
from cure.methods.step import holding
from cure.methods.wrappers.averaging import Averaging
from cure.methods.wrappers.awp import AWP, keeping_buffers, weight_perturbation

every_method = pytest.mark.parametrize("name", METHODS.names())

PERTURBED = ["conv1.weight", "block.conv1.weight", "block.conv2.weight", "linear.weight"]


def around(method: Method, gamma: float = 0.01, start: float = 0.0) -> AWP:
    return AWP(method, WeightPerturbationConfig(gamma=gamma, start=start)).train()


def weights(method: Method) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.trainable().items()}


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def advance(method: Method, optimizer: torch.optim.Optimizer, given: Batch) -> StepOutput:
    """A step as the trainer does it."""
    out = method.step(given)
    found = gradients_of(method, out)
    for name, parameter in method.trainable().items():
        parameter.grad = found[name]
    with holding(optimizer, method.trainable(), out.frozen or {}):
        optimizer.step()
    method.after_step(given.step)
    return out


# -- the perturbation ----------------------------------------------------------------------------


def test_perturbation_by_hand():
    """||w|| is 5 and ||g|| is 2, or 3 and 9: v is gamma times 2.5 g, or g / 3."""
    values = {
        "linear.weight": (torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2], [0, 0]])),
        "conv.weight": (torch.full((9, 1, 1, 1), 1.0), torch.full((9, 1, 1, 1), -3.0)),
        "norm.weight": (torch.ones(3), torch.ones(3)),
        "linear.bias": (torch.ones(3), torch.ones(3)),
        "table.bias": (torch.ones(3, 3), torch.ones(3, 3)),
    }
    found = weight_perturbation(
        {name: weight for name, (weight, _) in values.items()},
        {name: gradient for name, (_, gradient) in values.items()},
        0.1,
    )
    assert found.keys() == {"linear.weight", "conv.weight"}
    torch.testing.assert_close(found["linear.weight"], torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    torch.testing.assert_close(found["conv.weight"], torch.full((9, 1, 1, 1), -0.1))


def test_a_tensor_without_a_gradient_stays():
    found = weight_perturbation(
        {"a.weight": torch.ones(2, 2)}, {"a.weight": torch.zeros(2, 2)}, 0.1
    )
    assert torch.equal(found["a.weight"], torch.zeros(2, 2))


def test_what_moves_how_far_and_uphill():
    """Each perturbed tensor by gamma of its own length along the gradient of the plain loss."""
    method = around(build("at", tiny_network(2, torch.float64)), gamma=0.02)
    before, given = weights(method), batch(dtype=torch.float64)
    plain = build("at", tiny_network(2, torch.float64))
    expected, out = plain.step(given), method.step(given)
    slope = gradients_of(plain, expected)
    assert out.loss is None
    for name, value in weights(method).items():
        change = value - before[name]
        if name in PERTURBED:
            assert (change.norm() / before[name].norm()).item() == pytest.approx(0.02)
            cosine = F.cosine_similarity(change.flatten(), slope[name].flatten(), dim=0)
            assert cosine.item() == pytest.approx(1)
        else:
            assert torch.equal(value, before[name]), name
    assert out.metrics["loss"].item() == expected.loss.item()
    assert out.metrics["perturbed_loss"] > out.metrics["loss"]
    method.after_step(0)


# -- the released procedure ----------------------------------------------------------------------


def released_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module], Tensor],
    gamma: float,
    proxy_rate: float,
) -> None:
    """One step of the optimiser at perturbed weights, by way of a copy of the network."""
    proxy = copy.deepcopy(model).train()
    climber = torch.optim.SGD(proxy.parameters(), proxy_rate)
    climber.zero_grad()
    (-loss(proxy)).backward()
    climber.step()
    changes = {}
    pairs = zip(model.named_parameters(), proxy.parameters(), strict=True)
    for (name, old), new in pairs:
        if old.dim() > 1 and "weight" in name:
            change = (new - old).detach()
            changes[name] = gamma * old.detach().norm() / (change.norm() + 1e-20) * change
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += changes.get(name, 0)
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= changes.get(name, 0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)], ids=["64", "32"]
)
@pytest.mark.parametrize(("name", "gamma"), [("at", 0.01), ("trades", 0.005)])
def test_weights_are_those_of_the_released_procedure(name, gamma, dtype, tolerance):
    """Five steps of SGD with momentum and weight decay; statistics of BatchNorm too.

    In float32 both learn from the same images, as a rounding would turn signs in the attack.
    """
    attack, given_images = context().attack, []
    same = None if dtype == torch.float64 else lambda *others, **options: given_images[-1]
    method = around(build(name, tiny_network(2, dtype), context(attack=same)), gamma)
    model = tiny_network(2, dtype)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    ours = torch.optim.SGD(method.trainable().values(), **settings)
    theirs = torch.optim.SGD(model.parameters(), **settings)
    objective = CROSS_ENTROPY if name == "at" else KL
    for step in range(5):
        given = batch(step, seed=step, dtype=dtype)
        draws = method.context.generator("attack", step)
        changed = attack(model, given.image, given.label, objective, draws)
        given_images.append(changed)

        def loss(network: nn.Module, given: Batch = given, changed: Tensor = changed) -> Tensor:
            if name == "at":
                return F.cross_entropy(network(changed), given.label)
            natural = network(given.image)
            p, q = natural.softmax(1), network(changed).softmax(1)
            kl = (p * (p.log() - q.log())).sum() / len(given.label)
            return F.cross_entropy(natural, given.label) + 6 * kl

        released_step(model, theirs, loss, gamma, proxy_rate=1.0)
        advance(method, ours, given)
        for key, value in model.state_dict().items():
            found = method.model.state_dict()[key]
            torch.testing.assert_close(found, value, rtol=0, atol=tolerance)
    plain = build(name, tiny_network(2, dtype))  # what a perturbation of 0 would come to
    other = torch.optim.SGD(plain.trainable().values(), **settings)
    for step in range(5):
        advance(plain, other, batch(step, seed=step, dtype=dtype))
    far = max((weights(plain)[key] - value).abs().max() for key, value in weights(method).items())
    assert far > 1e-4, "plain training would pass as well"


def test_momentum_and_decay_act_at_the_perturbed_weights():
    """theta <- theta - rate (g + decay (theta + v)): v itself decays once, then is taken back."""
    method = around(build("at", tiny_network(2, torch.float64)), gamma=0.5)
    before = weights(method)
    out = method.step(batch(dtype=torch.float64))
    change = {name: value - before[name] for name, value in weights(method).items()}
    optimizer = torch.optim.SGD(method.trainable().values(), 0.1, weight_decay=0.2)
    for name, parameter in method.trainable().items():
        parameter.grad = out.grads[name]
    optimizer.step()
    method.after_step(0)
    for name, value in weights(method).items():
        slope = out.grads[name] + 0.2 * (before[name] + change[name])
        torch.testing.assert_close(value, before[name] - 0.1 * slope, rtol=0, atol=1e-13)


# -- what comes back -----------------------------------------------------------------------------


@every_method
def test_a_step_of_length_0_leaves_every_weight_to_the_bit(name):
    """With the state it has without the perturbation: nothing else moves a second time."""
    plain = build(name, tiny_network(3))
    method = around(build(name, tiny_network(3)), gamma=0.1)
    for step in range(3):
        before = weights(method)
        optimizer = torch.optim.SGD(method.trainable().values(), 0.0)
        out = advance(method, optimizer, batch(step, seed=step))
        advance(plain, torch.optim.SGD(plain.trainable().values(), 0.0), batch(step, seed=step))
        assert_same_tensors(weights(method), before)
        if name != "natural":
            assert torch.isfinite(out.metrics["perturbed_loss"])
    moving = ("running_mean", "running_var")
    ours, theirs = method.inner.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    kept = [key for key in ours if not key.endswith(moving)]
    assert_same_tensors({key: ours[key] for key in kept}, {key: theirs[key] for key in kept})


class Fragile(AT):
    """Fails at one of its looks at the loss."""

    fails_at = 2
    looks = 0

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        self.looks += 1
        out = super().compute_loss(batch, attacked)
        if self.looks == self.fails_at:
            raise KeyboardInterrupt
        return out


@pytest.mark.parametrize("fails_at", [1, 2])
def test_weights_come_back_when_the_loss_raises(fails_at):
    inner = Fragile(tiny_network(), AT.Config(), context())
    inner.fails_at = fails_at
    method = around(inner, gamma=0.1)
    before, buffers = weights(method), copy.deepcopy(dict(method.named_buffers()))
    with pytest.raises(KeyboardInterrupt):
        method.step(batch())
    assert_same_tensors(weights(method), before)
    if fails_at == 1:
        assert_same_tensors(dict(method.named_buffers()), buffers)
    method.after_step(0)
    assert_same_tensors(weights(method), before)
    assert not method._before


def test_weights_that_do_not_learn_are_not_perturbed():
    model = tiny_network()
    model.block.conv1.weight.requires_grad_(False)
    method = around(build("at", model), gamma=0.5)
    before = copy.deepcopy(model.block.conv1.weight)
    out = method.step(batch())
    assert torch.equal(model.block.conv1.weight, before)
    assert "block.conv1.weight" not in out.grads
    assert not model.block.conv1.weight.requires_grad
    method.after_step(0)


def test_frozen_weights_of_cure_stay_to_the_bit():
    inner = build("cure", tiny_network(2), mask={"strict_freeze": True})
    method = around(inner, gamma=0.05)
    optimizer = torch.optim.SGD(method.trainable().values(), 0.1, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        before = weights(method)
        out = advance(method, optimizer, batch(step, seed=step))
        assert sum(int(mask.sum()) for mask in out.frozen.values()) > 0
        for name, mask in out.frozen.items():
            assert torch.equal(weights(method)[name][mask], before[name][mask])
            assert not torch.equal(weights(method)[name], before[name])


def test_what_is_frozen_goes_with_the_gradients():
    """Both are of the second look: a frozen weight has no gradient."""
    method = around(build("cure", tiny_network(2), mask={"strict_freeze": True}), gamma=0.5)
    out = method.step(batch())
    for name, mask in out.frozen.items():
        assert (out.grads[name][mask] == 0).all(), name
    method.after_step(0)


def test_the_method_s_own_averages_follow_the_perturbation_s_end():
    seen = []

    class Watching(AT):
        def after_step(self, step: int) -> dict[str, Tensor]:
            seen.append(weights(self))
            return {"own": torch.tensor(float(step))}

    method = around(Watching(tiny_network(), AT.Config(), context()), gamma=0.1)
    before = weights(method)
    method.step(batch(7))
    assert method.after_step(7) == {"own": torch.tensor(7.0)}
    assert_same_tensors(seen[0], before)


def test_keeping_buffers():
    network = tiny_network()
    before = copy.deepcopy(dict(network.named_buffers()))

    def look() -> None:
        with keeping_buffers(network):
            network(batch().image)
            assert not torch.equal(network.bn1.running_mean, before["bn1.running_mean"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    assert_same_tensors(dict(network.named_buffers()), before)


# -- statistics, attack, cost --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("at", 1), ("trades", 2)])
def test_batch_norm_statistics_move_once_and_at_the_perturbed_weights(name, count):
    given = batch(dtype=torch.float64)
    later = (given.image + 0.2).clamp(0, 1)
    within = context(attack=lambda *others, **options: later)
    method = around(build(name, tiny_network(2, torch.float64), within), gamma=0.1)
    network = tiny_network(2, torch.float64)
    method.step(given)
    with torch.no_grad():
        for key, value in method.model.named_parameters():
            network.get_parameter(key).copy_(value)
        for image in [given.image, later][-count:]:
            network(image)
    assert int(method.model.bn1.num_batches_tracked) == count
    for key, buffer in network.named_buffers():
        torch.testing.assert_close(method.model.get_buffer(key), buffer, rtol=0, atol=1e-14)


@every_method
def test_images_are_attacked_as_without_it_at_the_unperturbed_weights(name):
    """As often as the method attacks by itself, with the same weights."""

    def watched(wrap: Callable[[Method], Method]) -> list[dict[str, Tensor]]:
        method = wrap(build(name, tiny_network(3)))
        seen, attack = [], method.context.attack

        class Watched:
            def __getattr__(self, key: str) -> Any:
                return getattr(attack, key)

            def __call__(self, model: nn.Module, *others: Any, **options: Any) -> Tensor:
                seen.append({k: p.detach().clone() for k, p in model.named_parameters()})
                return attack(model, *others, **options)

        spied = replace(method.context, attack=Watched())
        inner = method.inner if isinstance(method, AWP) else method
        inner.context = method.context = spied
        method.step(batch())
        method.after_step(0)
        return seen

    plain, ours = watched(lambda method: method), watched(lambda method: around(method, 0.1))
    assert len(ours) == len(plain)
    for found, expected in zip(ours, plain, strict=True):
        assert_same_tensors(found, expected)


@pytest.mark.parametrize(("name", "expected"), [("at", (12, 12)), ("trades", (15, 14))])
def test_passes_of_a_step(name, expected):
    assert passes(around(build(name, within=context(steps=10)))) == expected


# -- when it begins, resuming, around and inside -------------------------------------------------


@pytest.mark.parametrize(("start", "told"), [(0.75, False), (0.9, True)])
def test_a_perturbation_that_never_begins_is_told(start, told):
    """Of 4 epochs of 10 steps: 3.6 epochs are rounded to 4."""
    method = AWP(build("at"), WeightPerturbationConfig(start=start))
    assert ("perturbed_loss" in method.step(batch(39)).metrics) is not told
    assert len(method.warnings()) == told
    assert all("training.weight_perturbation.start: 0.9" in said for said in method.warnings())


def test_before_it_begins_the_step_is_the_method_s_own():
    """Half of four epochs of ten steps: from step 20."""
    plain = build("at", tiny_network(3), context(steps=10))
    method = around(build("at", tiny_network(3), context(steps=10)), start=0.5)
    assert passes(method) == (11, 11)
    passes(plain)
    for step in (0, 19, 20):
        out, expected = method.step(batch(step)), plain.step(batch(step))
        assert ("perturbed_loss" in out.metrics) == (step >= 20)
        if step < 20:
            assert torch.equal(out.loss, expected.loss)
            assert out.grads is None
        method.after_step(step)


@pytest.mark.parametrize("name", ["trades", "cure"])
def test_a_resumed_run_repeats_bit_for_bit(name):
    def optimizer(method: Method) -> torch.optim.Optimizer:
        return torch.optim.SGD(method.trainable().values(), 0.05, momentum=0.9)

    def train(method: Method, moves: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            advance(method, moves, batch(step, seed=step))

    whole, half, resumed = (around(build(name, tiny_network(n))) for n in (3, 3, 4))
    moves, before, after = optimizer(whole), optimizer(half), optimizer(resumed)
    train(whole, moves, 0, 5)
    train(half, before, 0, 3)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(resumed, after, 3, 5)
    assert_same_tensors(whole.state_dict(), resumed.state_dict())


@every_method
def test_every_method_learns_inside_it_and_inside_an_average(name):
    """The average takes the weights after the perturbation is taken back."""
    inner = around(build(name, tiny_network(3)), gamma=0.01)
    method = Averaging(inner, AveragingConfig(kind="equal")).train()
    assert method.trainable().keys() == build(name).trainable().keys()
    optimizer = torch.optim.SGD(method.trainable().values(), 0.02)
    taken = []
    for step in range(3):
        modes = {key: module.training for key, module in method.named_modules()}
        out = advance(method, optimizer, batch(step, seed=step))
        assert {key: module.training for key, module in method.named_modules()} == modes
        for value in out.metrics.values():
            assert value.dim() == 0
            assert not value.requires_grad
        assert {"loss", "perturbed_loss"} <= out.metrics.keys()
        taken.append({k: p.detach().clone() for k, p in method.model.named_parameters()})
    for key, value in method.inference_model().named_parameters():
        expected = torch.stack([moment[key] for moment in taken]).mean(dim=0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert not inner._before
    assert all(isinstance(value, Tensor) for value in method.state_dict().values())


def test_values_out_of_range_are_errors():
    for wrong in ({"gamma": 0.0}, {"gamma": -0.01}, {"start": 1.0}, {"start": -0.1}):
        with pytest.raises(ValidationError):
            WeightPerturbationConfig(**wrong)
