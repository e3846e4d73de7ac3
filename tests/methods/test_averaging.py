"""Averages of weights over time: what enters, when, and the BatchNorm statistics of the average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from method_bench import TinyNetwork, batch, build, context, gradients_of, tiny_network
from pydantic import ValidationError
from torch import Tensor, nn

import cure
from cure.config import AveragingConfig
from cure.methods import METHODS, Context, Method, Metrics
from cure.methods.at import AT
from cure.methods.wrappers.averaging import Averaging, recompute_statistics

every_method = pytest.mark.parametrize("name", METHODS.names())

SWA = AveragingConfig(kind="equal", every="epoch", start=0.5, batch_norm="recomputed")


def short(**changes: Any) -> Context:
    """A run of 4 epochs of 3 steps."""
    return context(steps=1, steps_per_epoch=3, **changes)


def averaged(
    name: str = "at", seed: int = 3, within: Context | None = None, config: AveragingConfig = SWA
) -> Averaging:
    within = within or short(natural_images=images)
    return Averaging(build(name, tiny_network(seed), within), config).train()


def images() -> Iterator[Tensor]:
    """Sixty images, the last batch incomplete."""
    everything = torch.cat([batch(seed=seed).image for seed in (7, 8, 9)])[:60]
    yield from everything.split(24)


def train(method: Method, first: int, last: int, learning_rate: float = 0.05) -> None:
    """Steps from ``first`` up to ``last`` as the trainer does them."""
    length = method.context.steps_per_epoch
    for step in range(first, last):
        if step % length == 0 or step == first:
            method.on_epoch(step // length)
            method.train()
        found = gradients_of(method, method.step(batch(step, seed=step)))
        with torch.no_grad():
            for name, parameter in method.trainable().items():
                parameter -= learning_rate * found[name]
        method.after_step(step)
        if (step + 1) % length == 0:
            method.after_epoch(step // length)


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# -- what enters, and when -----------------------------------------------------------------------


def history(config: AveragingConfig) -> tuple[list[list[float]], Averaging]:
    """Weight, bias, running mean, running variance of what is evaluated, after each of 8 steps.

    In step s they are s, 10 s, 20 s and 30 s; two steps an epoch, four epochs.
    """
    within = context(steps_per_epoch=2, natural_images=images)
    method = Averaging(build("at", tiny_network(), within), config)
    model, found = method.model, []
    for step in range(8):
        with torch.no_grad():
            model.block.conv1.weight.fill_(step)
            model.linear.bias.fill_(10 * step)
            model.bn1.running_mean.fill_(20 * step)
            model.bn1.running_var.fill_(30 * step)
            model.bn1.num_batches_tracked.fill_(step)
        assert method.after_step(step) == {}
        if step % 2 == 1:
            method.after_epoch(step // 2)
        seen = method.inference_model()
        tensors = (
            seen.block.conv1.weight,
            seen.linear.bias,
            seen.bn1.running_mean,
            seen.bn1.running_var,
        )
        found.append([tensor.flatten()[0].item() for tensor in tensors])
        assert all((tensor == tensor.flatten()[0]).all() for tensor in tensors)
    return found, method


@pytest.mark.parametrize(
    ("kind", "every", "start", "expected"),
    [
        # A quarter of 8 steps is 2; a quarter of 4 epochs is 1, which ends with step 3.
        ("equal", "step", 0.0, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        ("equal", "step", 0.25, [0, 1, 2, 2.5, 3, 3.5, 4, 4.5]),
        ("equal", "epoch", 0.0, [0, 1, 1, 2, 2, 3, 3, 4]),
        ("equal", "epoch", 0.25, [0, 1, 2, 3, 3, 4, 4, 5]),
        ("exponential", "step", 0.5, [0, 1, 2, 3, 4, 4.25, 4.6875, 5.265625]),
        ("exponential", "epoch", 0.25, [0, 1, 2, 3, 3, 3.5, 3.5, 4.375]),
    ],
)
def test_averages_by_hand(kind, every, start, expected):
    """Before it begins the network itself is evaluated."""
    settings = {"kind": kind, "every": every, "start": start, "decay": 0.75}
    found, method = history(AveragingConfig(**settings))
    for number, value in enumerate(expected):
        assert found[number] == pytest.approx([value, 10 * value, 20 * value, 30 * value])
    assert int(method.inference_model().bn1.num_batches_tracked) == 7  # counters are copied
    assert method.inference_model() is not method.model


class Complex(nn.Module):
    """A network whose first parameter is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.full((64, 3), 1 + 1j))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image.flatten(1).to(self.spectrum.dtype) @ self.spectrum).abs()


def test_complex_weights_are_averaged():
    model = Complex()
    method = cure.methods.Averaging(cure.methods.AT(model), kind="equal")
    for value in (1 + 1j, 2 + 3j, 6 + 2j):
        method(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
        with torch.no_grad():
            model.spectrum.fill_(value)
        method.update()
    average = method.inference_model().spectrum
    assert torch.allclose(average, torch.full_like(average, 3 + 2j))


def test_the_average_learns_nothing_and_shares_nothing():
    method = averaged(config=AveragingConfig())
    train(method, 0, 2)
    average = method.inference_model()
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in method.model.parameters())
    ours = {tensor.data_ptr() for tensor in average.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in method.model.state_dict().values()}
    assert method.trainable().keys() == method.inner.trainable().keys()


def test_what_the_method_evaluates_is_what_is_averaged():
    class Other(AT):
        """Evaluates a network of its own."""

        def __init__(self) -> None:
            super().__init__(tiny_network(), AT.Config(), short())
            self.other = nn.Linear(1, 1, bias=False)

        def inference_model(self) -> nn.Module:
            return self.other

    inner = Other()
    method = Averaging(inner, AveragingConfig(kind="equal", start=1 / 12))
    for step in range(3):
        assert (method.inference_model() is inner.other) == (step < 2)
        inner.other.weight.data.fill_(step)
        method.after_step(step)
    assert method.inference_model().weight.item() == 1.5


def test_the_method_s_own_averages_and_schedules_come_first():
    class Moving(AT):
        """Sets its weights after each step and each epoch."""

        def set(self, value: float) -> None:
            self.model.linear.weight.data.fill_(value)

        def after_step(self, step: int) -> Metrics:
            self.set(step)
            return {"own": torch.tensor(float(step))}

        def on_epoch(self, epoch: int) -> None:
            self.set(-epoch)

        def after_epoch(self, epoch: int) -> None:
            self.set(100 + epoch)

    for every, seen in (("step", 7.0), ("epoch", 105.0)):
        inner = Moving(tiny_network(), AT.Config(), short())
        method = Averaging(inner, AveragingConfig(kind="equal", every=every))
        assert method.after_step(7) == {"own": torch.tensor(7.0)}
        method.after_epoch(5)
        assert (method.inference_model().linear.weight == seen).all()
        method.on_epoch(6)
        assert (method.model.linear.weight == -6).all()


# -- BatchNorm statistics ------------------------------------------------------------------------


def by_hand(model: TinyNetwork, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance at each BatchNorm over the whole set; a batch is normalised by itself."""
    means: dict[str, list[Tensor]] = {"bn1": [], "block.bn1": [], "block.bn2": []}
    variances: dict[str, list[Tensor]] = {name: [] for name in means}

    def normalised(name: str, x: Tensor) -> Tensor:
        norm = model.get_submodule(name)
        rows = x.transpose(0, 1).flatten(1)
        means[name].append(len(x) * rows.mean(dim=1))
        variances[name].append(len(x) * rows.var(dim=1, unbiased=True))
        shape = (1, -1, 1, 1)
        centre, spread = rows.mean(dim=1), (rows.var(dim=1, unbiased=False) + norm.eps).sqrt()
        x = (x - centre.reshape(shape)) / spread.reshape(shape)
        return x * norm.weight.reshape(shape) + norm.bias.reshape(shape)

    with torch.no_grad():
        for image in batches:
            x = torch.relu(normalised("bn1", model.conv1(image)))
            change = torch.relu(normalised("block.bn1", model.block.conv1(x)))
            normalised("block.bn2", model.block.conv2(change))
    total = sum(len(image) for image in batches)
    return {name: (sum(means[name]) / total, sum(variances[name]) / total) for name in means}


def assert_statistics(model: TinyNetwork, batches: list[Tensor]) -> None:
    for name, (mean, variance) in by_hand(model, batches).items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[60], [24, 24, 12], [30, 30], [57, 3]])
def test_recomputed_statistics_are_those_of_the_whole_set(sizes):
    batches = list(torch.cat(list(images())).split(sizes))
    model = tiny_network()
    recompute_statistics(model, batches)
    assert_statistics(model, batches)


def test_what_the_statistics_were_has_no_say():
    model = tiny_network()
    model.bn1.running_mean.fill_(torch.nan)
    model.bn1.running_var.fill_(torch.inf)
    recompute_statistics(model, images())
    assert_statistics(model, list(images()))
    assert int(model.bn1.num_batches_tracked) == 3


def test_a_last_batch_of_one_image_is_left_out():
    """A layer with one value a channel could not normalise it."""
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(1))
    *most, last = list(torch.cat(list(images())).split([30, 29, 1]))
    recompute_statistics(pooled, [*most, last])
    values = torch.cat([image.mean(dim=(1, 2, 3)) for image in most])
    assert pooled[2].running_mean.item() == pytest.approx(values.mean().item(), rel=1e-5)
    model = tiny_network()
    alone = list(torch.cat(most)[:4].split(1))  # where all batches are like that they count
    recompute_statistics(model, alone)
    assert_statistics(model, alone)


def test_recomputing_changes_statistics_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.9), nn.BatchNorm2d(4, momentum=0.3))
    model.train()
    model[1].eval()
    weights = copy.deepcopy(dict(model.named_parameters()))
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    recompute_statistics(model, images())
    assert [module.training for module in model.modules()] == modes
    assert model[2].momentum == 0.3
    assert_same_tensors(dict(model.named_parameters()), weights)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state), "dropout took part"
    with torch.no_grad():
        expected = model[0](torch.cat(list(images()))).mean(dim=(0, 2, 3))
    torch.testing.assert_close(model[2].running_mean, expected)
    model.eval()
    recompute_statistics(model, images())
    assert not any(module.training for module in model.modules())


def test_modes_and_momentum_come_back_when_a_batch_is_bad():
    model = tiny_network()
    with pytest.raises(RuntimeError):
        recompute_statistics(model, [torch.zeros(2, 3, 6, 6)])
    assert all(module.training for module in model.modules())
    assert model.bn1.momentum == 0.1


def test_no_images_are_an_error_and_no_batch_norm_asks_for_none():
    with pytest.raises(ValueError, match="no images"):
        recompute_statistics(tiny_network(), iter(()))

    def asked() -> Iterator[Tensor]:
        raise AssertionError("images were read")
        yield

    recompute_statistics(nn.Conv2d(1, 1, 1), asked())
    recompute_statistics(nn.BatchNorm2d(1, track_running_stats=False), asked())


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_statistics_are_recomputed_after_each_epoch_once_there_is_an_average(every):
    """Begins with the third of four epochs; the trained network's own statistics stay."""
    reads = []

    def spy() -> Iterator[Tensor]:
        reads.append(None)
        yield from images()

    config = SWA.model_copy(update={"every": every})
    method = averaged(within=short(natural_images=spy), config=config)
    train(method, 0, 6)
    assert not reads
    assert method.inference_model() is method.model
    train(method, 6, 9)
    assert len(reads) == 1
    assert_statistics(method.average, list(images()))
    train(method, 9, 12)
    assert len(reads) == 2
    assert_statistics(method.average, list(images()))
    plain = build("at", tiny_network(3), short())
    train(plain, 0, 12)
    assert_same_tensors(method.model.state_dict(), plain.model.state_dict())


def test_averaged_statistics_read_no_images():
    def asked() -> Iterator[Tensor]:
        raise AssertionError("images were read")
        yield

    config = SWA.model_copy(update={"batch_norm": "averaged"})
    train(averaged(within=short(natural_images=asked), config=config), 0, 12)


# -- resuming, and every method ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["at", "cure"])
@pytest.mark.parametrize("kind", ["exponential", "equal"])
@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.parametrize("done", [2, 6, 7])
def test_a_resumed_run_ends_with_the_same_bits(name, kind, every, done):
    """Before averaging begins (step 3), between epochs and inside them."""
    config = AveragingConfig(kind=kind, every=every, start=0.25, decay=0.9, batch_norm="recomputed")
    whole, half, resumed = (averaged(name, seed, config=config) for seed in (3, 3, 4))
    train(whole, 0, 11)
    train(half, 0, done)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    train(resumed, done, 11)
    assert resumed.count == whole.count > 0
    assert_same_tensors(whole.state_dict(), resumed.state_dict())
    average = whole.inference_model().state_dict()
    assert_same_tensors(average, resumed.inference_model().state_dict())


@pytest.mark.parametrize(
    ("every", "start", "told"),
    # Of 4 epochs of 3 steps: 3.6 epochs are rounded to 4, 11.4 steps to 11 and 11.6 to 12.
    [("epoch", 0.9, True), ("epoch", 0.8, False), ("step", 0.95, False), ("step", 0.97, True)],
)
def test_an_average_that_never_begins_is_told(every, start, told):
    method = averaged(config=AveragingConfig(every=every, start=start))
    train(method, 0, 12)
    assert (method.count == 0) is told
    assert [sentence for sentence in method.warnings() if "averaging.start" in sentence] == (
        [
            f"training.averaging.start: {start} of the run is after its last {every}, so no "
            "weights are averaged; set a smaller one, or more training.epochs"
        ]
        if told
        else []
    )


@every_method
def test_averaging_changes_nothing_of_the_method(name):
    """Its gradients, its state; and the average is that of the network it evaluates."""
    config = AveragingConfig(kind="equal", every="step")
    plain = build(name, tiny_network(3), short(natural_images=images))
    method = averaged(name, config=config)
    assert method.selection == plain.selection
    assert method.warnings() == plain.warnings()
    taken = []
    for step in range(3):
        train(plain, step, step + 1)
        train(method, step, step + 1)
        taken.append(copy.deepcopy(plain.inference_model().state_dict()))
    assert_same_tensors(method.inner.state_dict(), plain.state_dict())
    assert method.model is method.inner.model
    for key, value in method.inference_model().state_dict().items():
        if value.is_floating_point():
            expected = torch.stack([state[key] for state in taken]).double().mean(dim=0)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, taken[-1][key])
    assert all(isinstance(value, Tensor) for value in method.state_dict().values())
    method.eval()
    with torch.no_grad():
        assert method.inference_model()(batch().image).shape == (24, 3)


def test_values_out_of_range_are_errors():
    for wrong in ({"decay": 1.0}, {"decay": -0.1}, {"start": 1.0}, {"kind": "mean"}):
        with pytest.raises(ValidationError):
            AveragingConfig(**wrong)
