"""What holds for every registered method, whatever it trains on."""

from __future__ import annotations

import copy

import pytest
import torch
from method_bench import batch, build, context, gradients_of, tiny_network

from cure.methods import METHODS, Method

every_method = pytest.mark.parametrize("name", METHODS.names())


def advance(method: Method, steps: int, first: int = 0, learning_rate: float = 0.05) -> list[float]:
    """Train plainly for some steps; the losses that the method reports."""
    losses = []
    for step in range(first, first + steps):
        if step % method.context.steps_per_epoch == 0:
            method.on_epoch(step // method.context.steps_per_epoch)
            method.train()
        out = method.step(batch(step, seed=step))
        gradients = gradients_of(method, out)
        with torch.no_grad():
            for name, parameter in method.trainable().items():
                change = learning_rate * gradients[name]
                if out.frozen and name in out.frozen:
                    change = change.masked_fill(out.frozen[name], 0)
                parameter -= change
        method.after_step(step)
        losses.append(out.metrics["loss"].item())
    return losses


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_same_step(first: Method, second: Method, step: int) -> None:
    outs = [method.step(batch(step, seed=step)) for method in (first, second)]
    assert_same_tensors(gradients_of(first, outs[0]), gradients_of(second, outs[1]))
    assert_same_tensors(outs[0].metrics, outs[1].metrics)
    assert (outs[0].frozen is None) == (outs[1].frozen is None)
    if outs[0].frozen is not None:
        assert_same_tensors(outs[0].frozen, outs[1].frozen)


@every_method
def test_a_step_gives_finite_gradients_for_every_trainable_parameter(name):
    method = build(name)
    method.on_epoch(0)
    out = method.step(batch())
    assert (out.loss is None) != (out.grads is None)
    gradients = gradients_of(method, out)
    parameters = method.trainable()
    # All of the model's, by their names; besides, weights of the method's own other networks.
    models = dict(method.model.named_parameters())
    assert all(parameters[key] is parameter for key, parameter in models.items())
    distinct = {id(parameter) for parameter in parameters.values()}
    assert len(distinct) == len(parameters)
    assert distinct <= {id(parameter) for parameter in method.parameters()}
    assert gradients.keys() == parameters.keys()
    for key, gradient in gradients.items():
        assert gradient.shape == parameters[key].shape
        assert gradient.isfinite().all()
        assert not gradient.requires_grad
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@every_method
def test_parameters_that_do_not_learn_have_no_gradient(name):
    model = tiny_network()
    model.linear.bias.requires_grad_(False)
    method = build(name, model)
    method.on_epoch(0)
    gradients = gradients_of(method, method.step(batch()))
    assert gradients.keys() == method.trainable().keys()
    assert "linear.bias" not in gradients
    assert not model.linear.bias.requires_grad


@every_method
def test_loss_falls_on_a_separable_problem(name):
    """Both what the method reports and the natural loss, which every method lowers here."""
    method = build(name, within=context(epsilon=0.02))
    held = batch(seed=99)

    def natural_loss() -> float:
        with torch.no_grad():
            logits = copy.deepcopy(method.model)(held.image)
        return torch.nn.functional.cross_entropy(logits, held.label).item()

    before = natural_loss()
    losses = advance(method, 30, learning_rate=0.1)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert natural_loss() < 0.7 * before


@every_method
def test_metrics_are_detached_single_numbers(name):
    method = build(name)
    method.on_epoch(0)
    metrics = method.step(batch()).metrics | method.after_step(0)
    assert "loss" in metrics
    for value in metrics.values():
        assert isinstance(value, torch.Tensor)
        assert value.dim() == 0
        assert not value.requires_grad
        assert value.grad_fn is None
        assert value.isfinite()


@every_method
def test_a_step_restores_modes_and_learning(name):
    method = build(name)
    method.on_epoch(0)
    method.train()
    before = {key: module.training for key, module in method.named_modules()}
    learning = {key: parameter.requires_grad for key, parameter in method.named_parameters()}
    assert all(module.training for module in method.model.modules())
    method.step(batch())
    method.after_step(0)
    assert {key: module.training for key, module in method.named_modules()} == before
    now = {key: parameter.requires_grad for key, parameter in method.named_parameters()}
    assert now == learning


@every_method
def test_a_step_moves_no_weight_and_touches_no_stored_gradient(name):
    """Sentinels stay in .grad, and the weights wait for the optimiser."""
    method = build(name)
    method.on_epoch(0)
    for number, parameter in enumerate(method.model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    stored = [parameter.grad for parameter in method.model.parameters()]
    weights = copy.deepcopy(method.trainable())
    others = {key: p for key, p in method.named_parameters() if not key.startswith("model.")}
    gradients_of(method, method.step(batch()))
    method.after_step(0)
    for number, parameter in enumerate(method.model.parameters()):
        assert parameter.grad is stored[number]
        assert (parameter.grad == number).all()
    assert_same_tensors(method.trainable(), weights)
    assert all(parameter.grad is None for parameter in others.values())


@every_method
def test_a_step_leaves_the_batch_as_it_was(name):
    method = build(name)
    method.on_epoch(0)
    given, kept = batch(), copy.deepcopy(batch())
    method.step(given)
    assert torch.equal(given.image, kept.image)
    assert torch.equal(given.label, kept.label)
    assert torch.equal(given.index, kept.index)
    assert not given.image.requires_grad


@every_method
def test_an_equal_copy_repeats_bit_for_bit(name):
    first, second = build(name, tiny_network(3)), build(name, tiny_network(3))
    torch.manual_seed(1)
    assert_same_tensors(first.state_dict(), second.state_dict())
    losses = advance(first, 3)
    torch.manual_seed(2)  # nothing may hang on the global generator
    assert advance(second, 3) == losses
    assert_same_tensors(first.state_dict(), second.state_dict())
    assert_same_step(first, second, 3)


@every_method
@pytest.mark.parametrize("done", [10, 13])
def test_a_resumed_method_repeats_bit_for_bit(name, done):
    """At the end of an epoch and in the middle of one, as the trainer resumes: load, on_epoch."""
    method, resumed = build(name, tiny_network(3)), build(name, tiny_network(4))
    advance(method, done)
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    if done % 10 == 0:
        method.on_epoch(done // 10)
        method.train()
    resumed.on_epoch(done // 10)
    resumed.train()
    assert_same_tensors(method.state_dict(), resumed.state_dict())
    assert_same_step(method, resumed, done)


@every_method
def test_the_state_is_plain_tensors(name):
    assert all(isinstance(value, torch.Tensor) for value in build(name).state_dict().values())


@every_method
def test_another_seed_draws_another_attack_or_none(name):
    """A method without chance repeats under any seed; one with chance differs."""
    outs = [
        gradients_of(method, method.step(batch()))
        for method in (build(name, tiny_network(3), context(seed=seed)) for seed in (0, 1))
    ]
    same = all(torch.equal(value, outs[1][key]) for key, value in outs[0].items())
    assert same == (name == "natural")


@every_method
def test_what_is_evaluated_is_a_network_for_the_same_images(name):
    method = build(name)
    with torch.no_grad():
        assert method.inference_model().eval()(batch().image).shape == (24, 3)
    assert all(isinstance(sentence, str) for sentence in method.warnings())


@every_method
def test_what_is_crafted_stays_in_the_ball(name):
    """Each image in its own ball and in [0, 1]; LAS-AT draws a radius for each."""
    method = build(name, within=context(steps=5, epsilon=0.07))
    method.on_epoch(0)
    given = batch()
    attacked = method.make_adversarial(given)
    images = [value for value in vars(attacked).values() if isinstance(value, torch.Tensor)]
    images = [value for value in images if value.shape == given.image.shape]
    assert images
    if name == "natural":
        assert torch.equal(attacked.image, given.image)
        return
    radius = getattr(attacked, "epsilon", torch.tensor(0.07)).reshape(-1, 1, 1, 1)
    for image in images:
        assert ((image - given.image).abs() <= radius + 1e-6).all()
        assert image.min() >= 0
        assert image.max() <= 1
        assert not image.requires_grad
        assert not torch.equal(image, given.image)


@every_method
def test_learning_twice_from_what_was_crafted_gives_the_same(name):
    """So that a wrapper may ask at other weights; only BatchNorm's statistics may move."""
    method = build(name, tiny_network(3))
    advance(method, 3)
    attacked = method.make_adversarial(batch(3))
    owned = {k: v.clone() for k, v in method.named_buffers() if "running" not in k}
    twice = (attacked, attacked.without_graph())
    found = [gradients_of(method, method.compute_loss(batch(3), one)) for one in twice]
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], rtol=1e-5, atol=1e-7)
    for key, value in method.named_buffers():
        if key in owned and "num_batches" not in key:
            assert torch.equal(value, owned[key]), key
