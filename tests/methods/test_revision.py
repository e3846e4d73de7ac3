"""The revision model: its arithmetic, its chance, its place in the step, its state."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from method_bench import batch, build, context, fixed_attack, tiny_network
from pydantic import ValidationError
from torch import nn

from cure.methods.common.revision import RevisionConfig, RevisionModel


def single(value: float) -> nn.Linear:
    """One weight."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def weight_of(revision: RevisionModel) -> float:
    return revision.network.weight.item()


# -- decay, memory, horizon ----------------------------------------------------------------------


def test_the_paper_s_memory_is_five_thousand_steps_and_six_percent_of_its_run():
    config = RevisionConfig()
    assert config.decay_for(78_200) == 0.999
    assert config.memory(78_200) == pytest.approx(5000)
    assert config.memory(78_200) / 78_200 == pytest.approx(0.0639, abs=5e-5)


def test_decay_from_a_horizon():
    """1 / (r (1 - d)) = horizon * steps: .064 of 78,200 at r = .2 is d = 1 - 1 / 1000.96."""
    config = RevisionConfig(horizon=0.064)
    assert config.decay_for(78_200) == pytest.approx(1 - 1 / (0.2 * 0.064 * 78_200), abs=1e-15)
    assert config.decay_for(78_200) == pytest.approx(0.999, abs=1e-6)
    assert config.memory(78_200) == pytest.approx(5004.8)
    # The measured short run of 700 steps: "about .89".
    assert config.decay_for(700) == pytest.approx(0.8884, abs=5e-5)
    assert RevisionConfig(horizon=0.5, rate=1.0).decay_for(4) == 0.5


def test_memory_of_a_decay_of_one_s_own():
    assert RevisionConfig(decay=0.9).memory(700) == pytest.approx(50)
    assert RevisionConfig(decay=0.9, rate=0.5).memory(700) == pytest.approx(20)
    assert RevisionConfig(decay=0.0, rate=1.0).memory(700) == 1


def test_a_horizon_below_one_update_is_taken_as_one_and_said():
    config = RevisionConfig(horizon=0.01)
    assert config.decay_for(400) == 0.0  # .8 updates
    assert config.memory(400) == 5
    (sentence,) = config.warnings(400)
    assert "method.revision.horizon: 0.01 of 400 steps holds 0.80 updates" in sentence
    assert RevisionConfig(horizon=0.0125).decay_for(400) == pytest.approx(0.0, abs=1e-12)
    assert RevisionConfig(horizon=0.0125).warnings(400) == []
    assert RevisionConfig().warnings(3) == []


def test_a_run_too_short_for_any_horizon_trains():
    """3 steps at rate .2 hold .6 updates even with the whole run as memory."""
    assert RevisionConfig(horizon=1.0).decay_for(3) == 0.0


def test_decay_and_horizon_together_are_an_error():
    with pytest.raises(ValidationError, match="not both"):
        RevisionConfig(decay=0.9, horizon=0.1)


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"rate": 1.1}, {"decay": 1.0}, {"horizon": 0.0}, {"horizon": 1.5}]
)
def test_values_out_of_range_are_errors(wrong):
    with pytest.raises(ValidationError):
        RevisionConfig(**wrong)


# -- moving --------------------------------------------------------------------------------------


def test_an_update_keeps_the_share_d():
    revision = RevisionModel(single(1.0), RevisionConfig(rate=1.0, decay=0.75), context())
    assert revision.maybe_update(single(5.0), 0) is True
    assert weight_of(revision) == 0.75 * 1 + 0.25 * 5
    revision.maybe_update(single(-2.0), 1)
    assert weight_of(revision) == 0.75 * 2 + 0.25 * -2


@pytest.mark.parametrize(
    ("decay", "kept"), [(0.999, [1 / 2, 2 / 3, 3 / 4, 4 / 5]), (0.7, [1 / 2, 2 / 3, 0.7, 0.7])]
)
def test_ramp(decay, kept):
    """min(1 - 1/(t + 1), d) with t = 1 at the first step."""
    for step, share in enumerate(kept):
        config = RevisionConfig(rate=1.0, decay=decay, ramp=True)
        revision = RevisionModel(single(1.0), config, context())
        revision.maybe_update(single(0.0), step)
        assert weight_of(revision) == pytest.approx(share, abs=1e-6)


def test_the_ramp_counts_from_the_end_of_the_warm_up():
    config = RevisionConfig(rate=1.0, decay=0.999, ramp=True)
    for step, share in enumerate([1 / 2, 2 / 3, 3 / 4]):
        revision = RevisionModel(single(1.0), config, context(), first=20)
        revision.maybe_update(single(0.0), 20 + step)
        assert weight_of(revision) == pytest.approx(share, abs=1e-6)
    method = build("cure", warmup=0.5, revision={"ramp": True})
    assert method.revision.first == method.warmup_steps == 20


def test_frequency_of_updates_and_repetition_by_seed():
    """2,000 draws at rate .2: 400 +- 5 standard deviations of sqrt(2000 * .2 * .8) = 17.9."""

    def drawn(seed: int) -> list[bool]:
        revision = RevisionModel(single(0.0), RevisionConfig(), context(seed=seed))
        model = single(1.0)
        return [revision.maybe_update(model, step) for step in range(2000)]

    first = drawn(0)
    assert abs(sum(first) - 400) < 90
    assert drawn(0) == first
    other = drawn(1)
    assert abs(sum(other) - 400) < 90
    # Independent seeds agree on .2 * .2 + .8 * .8 = .68 of the steps.
    agreement = np.mean([a == b for a, b in zip(first, other, strict=True)])
    assert abs(agreement - 0.68) < 0.06
    # And a step does not follow from the one before: .2 of the steps after an update update.
    after = [b for a, b in pairwise(first) if a]
    assert abs(np.mean(after) - 0.2) < 5 * (0.16 / len(after)) ** 0.5


def test_only_an_update_moves_it():
    revision = RevisionModel(single(0.0), RevisionConfig(decay=0.5), context())
    model = single(1.0)
    expected = 0.0
    for step in range(30):
        if revision.maybe_update(model, step):
            expected = (expected + 1) / 2
        assert weight_of(revision) == expected
    assert 0 < expected < 1


def test_the_rate_is_halved_at_every_step_of_the_second_part():
    """Total 40 steps, from step 20 on: rate 1 up to there, then 1/2, 1/4, ..."""
    config = RevisionConfig(rate=1.0, decay=0.5, halve_rate_after=0.5)
    counts = np.zeros(40)
    seeds = 400
    for seed in range(seeds):
        revision = RevisionModel(single(0.0), config, context(seed=seed))
        model = single(1.0)
        counts += [revision.maybe_update(model, step) for step in range(40)]
    assert (counts[:20] == seeds).all()
    first = 20
    for late in range(6):
        rate = 0.5 ** (late + 1)
        bound = 5 * (seeds * rate * (1 - rate)) ** 0.5
        assert abs(counts[first + late] - seeds * rate) < bound
    assert counts[35:].sum() <= 2


def test_only_parameters_are_averaged():
    model = tiny_network(0)
    revision = RevisionModel(model, RevisionConfig(rate=1.0, decay=0.5), context())
    buffers = {name: value.clone() for name, value in revision.network.named_buffers()}
    other = tiny_network(1)
    other(batch().image)  # other running statistics
    weights = {name: p.detach().clone() for name, p in revision.network.named_parameters()}
    kept = copy.deepcopy(other.state_dict())
    revision.maybe_update(other, 0)
    for name, value in revision.network.named_buffers():
        assert torch.equal(value, buffers[name])
    for name, value in revision.network.named_parameters():
        new = 0.5 * weights[name] + 0.5 * dict(other.named_parameters())[name].detach()
        torch.testing.assert_close(value.detach(), new)
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())


# -- its own network -----------------------------------------------------------------------------


def test_it_is_a_copy_that_does_not_learn_and_leaves_the_model_learning():
    model = tiny_network()
    method = build("cure", model)
    network = method.revision.network
    own = {value.data_ptr() for value in network.state_dict().values()}
    assert own.isdisjoint({value.data_ptr() for value in model.state_dict().values()})
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert method.trainable().keys() == dict(model.named_parameters()).keys()
    assert not any("revision" in name for name in method.trainable())


def test_its_logits_carry_no_graph_and_leave_gradients_alone():
    method = build("cure")
    image = batch().image.requires_grad_(True)
    for logits in method.revision.logits(method.model, image, image + 0.1):
        assert not logits.requires_grad
    method.step(batch())
    assert all(parameter.grad is None for parameter in method.revision.parameters())


class WithDropout(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())


@pytest.mark.parametrize(("batch_norm", "expected"), [("batch", True), ("copied", False)])
def test_its_mode_survives_what_its_owner_is_switched_to(batch_norm, expected):
    method = build("cure", WithDropout(), revision={"batch_norm": batch_norm})
    for switch in (method.train, method.eval, method.train, method.model.train, method.model.eval):
        switch()
        network = method.revision.network
        assert network[1].training is expected
        assert not network.training
        assert not network[2].training
    method.eval().train()
    assert all(module.training for module in method.model.modules())


def normalised(features: torch.Tensor, layer: nn.BatchNorm2d, mean, variance) -> torch.Tensor:
    shape = (1, -1, 1, 1)
    scaled = (features - mean.reshape(shape)) / (variance.reshape(shape) + layer.eps).sqrt()
    return scaled * layer.weight.reshape(shape) + layer.bias.reshape(shape)


@pytest.mark.parametrize("batch_norm", ["batch", "copied"])
def test_statistics_of_its_batch_norm(batch_norm):
    """The batch's own mean and variance, or the network's running ones at that moment."""
    torch.manual_seed(0)
    model = WithDropout().double()
    revision = RevisionModel(model, RevisionConfig(batch_norm=batch_norm), context())
    given = batch(dtype=torch.float64).image
    model.train()
    model(given * 3)  # the network's statistics move on after the copy was made
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    (logits,) = revision.logits(model, given)
    features = model[0](given)
    layer = model[1]
    if batch_norm == "batch":
        mean = features.mean(dim=(0, 2, 3))
        variance = features.var(dim=(0, 2, 3), unbiased=False)
    else:
        mean, variance = layer.running_mean, layer.running_var
    expected = normalised(features, layer, mean, variance).flatten(1)
    torch.testing.assert_close(logits, expected.detach())
    for name, value in model.named_buffers():
        assert torch.equal(value, statistics[name]), "the network's own statistics must not move"
    if batch_norm == "copied":
        for name, value in revision.network.named_buffers():
            assert torch.equal(value, statistics[name])


# -- its place in the step -----------------------------------------------------------------------


@pytest.mark.parametrize("update", ["before_losses", "after_step"])
def test_order_of_update_and_losses(update):
    """Which weights the consistency sees: d rev + (1 - d) theta, or rev."""
    image = batch(count=6, dtype=torch.float64)
    method = build(
        "cure",
        nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False)).double(),
        context(attack=fixed_attack(image.image.flip(0))),
        revision={"rate": 1.0, "decay": 0.75, "update": update},
    )
    own = method.revision.network[1].weight
    torch.manual_seed(3)
    with torch.no_grad():
        method.model[1].weight.copy_(torch.randn(3, 36))
        own.copy_(torch.randn(3, 36))
    old, theta = own.numpy().copy(), method.model[1].weight.detach().numpy().copy()
    moved = 0.75 * old + 0.25 * theta

    def chances(weight: np.ndarray, pixels: torch.Tensor) -> np.ndarray:
        powers = np.exp(pixels.flatten(1).numpy() @ weight.T)
        return powers / powers.sum(axis=1, keepdims=True)

    def consistency(weight: np.ndarray) -> float:
        total = 0.0
        for pixels in (image.image, image.image.flip(0)):
            p, q = chances(weight, pixels), chances(theta, pixels)
            total += (p * np.log(p / q)).sum(axis=1).mean()
        return total

    found = method.step(image).metrics["consistency"].item()
    first = update == "before_losses"
    assert found == pytest.approx(consistency(moved if first else old), rel=1e-9)
    assert abs(consistency(moved) - consistency(old)) > 0.1
    np.testing.assert_allclose(own.numpy(), moved if first else old, rtol=1e-12)
    method.after_step(0)
    np.testing.assert_allclose(own.numpy(), moved, rtol=1e-12)


def test_a_step_draws_once():
    """Before the losses or after the step, not both."""
    for update in ("before_losses", "after_step"):
        method = build("cure", revision={"rate": 1.0, "decay": 0.5, "update": update})
        with torch.no_grad():
            method.model.linear.bias += 8
            start = method.revision.network.linear.bias.clone()
        method.step(batch())
        method.after_step(0)
        torch.testing.assert_close(method.revision.network.linear.bias, start + 4)


def test_a_weight_of_zero_leaves_the_revision_model_out():
    method = build("cure", gamma=0.0)
    assert method.revision is None
    assert not any("revision" in name for name in method.state_dict())


def test_it_is_saved_with_the_method():
    method = build("cure")
    with torch.no_grad():
        method.revision.network.linear.bias += 1
    other = build("cure", tiny_network(5))
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.revision.network.linear.bias, method.revision.network.linear.bias)
    assert not torch.equal(other.model.linear.bias, other.revision.network.linear.bias)


def test_decay_follows_the_length_of_the_run():
    """40 steps at rate .5 with half the run as memory: 10 updates, d = .9."""
    within = context()
    config = RevisionConfig(rate=0.5, horizon=0.5)
    assert RevisionModel(single(0.0), config, within).decay == pytest.approx(0.9)
    longer = replace(within, epochs=40)
    assert RevisionModel(single(0.0), config, longer).decay == pytest.approx(0.99)
