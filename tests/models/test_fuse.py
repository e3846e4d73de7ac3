"""A network lent with its BatchNorm folded: the same function, and nothing of it stays."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from cure.attacks import OBJECTIVES, PGD, Threat
from cure.config import ModelConfig
from cure.models import build_model
from cure.models.batch_norm import freeze_statistics
from cure.models.fuse import Folded, _known, folded, folded_copy, folded_frozen

SIZES = {
    "resnet10": {"width": 4},
    "small_cnn": {},
    "wide_resnet": {"depth": 10, "width": 1},
    "preactresnet18": {},
    "densenet121": {},
    "resnet50": {},
}


def settled(model: nn.Module) -> nn.Module:
    """In evaluation mode, fixed, float64, each BatchNorm with statistics and weights of its own."""
    draws = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=draws))
            module.running_var.mul_(1 + torch.rand(module.running_var.shape, generator=draws))
    return model.eval().requires_grad_(False).double()


def network(name: str) -> nn.Module:
    config = ModelConfig(name=name, options=SIZES[name])
    return settled(build_model(config, classes=3, channels=3, size=(32, 32), seed=0))


def image(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, dtype=torch.float64)


def answers(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their weighted sum with respect to the image."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad((logits * torch.arange(1.0, 4.0)).sum(), x)
    return logits.detach(), gradient


def count_folded(model: nn.Module) -> int:
    """How many BatchNorms do nothing at the moment."""
    return sum(isinstance(module, Folded) for module in model.modules())


class TwoReaders(nn.Module):
    """The first convolution is read by BatchNorm and by the sum after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden + F.relu(self.norm1(hidden))
        return F.relu(self.norm2(self.second(hidden))).mean(dim=(2, 3))


class Twice(nn.Module):
    """One convolution called twice, with a BatchNorm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.layer(self.norm1(self.layer(x)))).mean(dim=(2, 3))


class LooksAtWeights(nn.Module):
    """Its code uses the weights of a convolution, which the graph of its modules does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).mean(dim=(2, 3)) + self.layer.weight.sum()


class Branches(nn.Module):
    """Code that depends on values cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.layer(x)).mean(dim=(2, 3))
        return hidden if hidden.sum() > 0 else 2 * hidden


@pytest.mark.parametrize("name", sorted(SIZES))
def test_same_logits_and_input_gradients(name):
    model, x = network(name), image()
    expected = answers(model, x)
    with folded(model, x):
        assert count_folded(model) >= 3
        came = answers(model, x)
    for one, other in zip(came, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert count_folded(model) == 0


def test_resnets_fold_every_batchnorm_and_weights_that_change_are_folded_anew():
    model, x = network("resnet10"), image()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with folded(model, x):
        assert count_folded(model) == norms > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    expected = answers(model, x)[0]
    with folded(model, x):
        torch.testing.assert_close(answers(model, x)[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_comes_back_as_it_was(fails):
    model, x = network("resnet10"), image()
    before = {name: (id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    known = {name: set(vars(module)) for name, module in model.named_modules()}
    try:
        with folded(model, x, lambda: torch.autocast("cpu", torch.bfloat16)):
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    for name, parameter in model.named_parameters():
        identity, place, value = before[name]
        assert (id(parameter), parameter.data_ptr()) == (identity, place)
        assert torch.equal(parameter, value)
    assert known == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("model", "count"), [(TwoReaders(), 1), (Twice(), 0), (LooksAtWeights(), 0), (Branches(), 0)]
)
def test_only_what_alone_reads_a_convolution_is_folded(model, count):
    model, x = settled(model), image()
    expected = answers(model, x)
    with folded(model, x):
        assert count_folded(model) == count
        came = answers(model, x)
    for one, other in zip(came, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_computed_weight_and_a_norm_without_statistics_are_left_alone():
    layer = parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    without = nn.BatchNorm2d(3, track_running_stats=False)
    model = nn.Sequential(layer, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), without, nn.Flatten())
    model, x = model.eval().requires_grad_(False).double(), image()
    expected = model(x)
    with folded(model, x):
        assert count_folded(model) == 0
        assert torch.equal(model(x), expected)


def test_whoever_watches_a_network_sees_it_as_it_is():
    model, x, seen = network("resnet10"), image(), []
    expected = model.bn1(model.conv1(x))
    handle = model.bn1.register_forward_hook(lambda *passed: seen.append(passed[2].clone()))
    with folded(model, x):
        model(x)
    handle.remove()
    assert len(seen) == 1, "the network was asked more often than it was called"
    assert torch.equal(seen[0], expected)


def test_a_network_is_traced_once_and_forgotten_with_it():
    model, x = network("resnet10"), image()
    with folded(model, x):
        pairs = _known[model]
    with folded(model, x):
        assert _known[model] is pairs
    before = len(_known)
    del model
    assert len(_known) == before - 1


def test_in_bfloat16_weights_are_rounded_once_and_logits_are_those_of_autocast():
    model, x = network("resnet10").float(), image(8).float()

    def precision() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    exact = model(x)
    with precision():
        expected = model(x).float()
    with folded(model, x, precision), precision():
        assert model.conv1.weight.dtype == model.linear.weight.dtype == torch.bfloat16
        came = model(x).float()
    error = (came - exact).norm() / exact.norm()
    assert 0 < error < 2 * (expected - exact).norm() / exact.norm() + 1e-3


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_attack_is_the_same(name):
    model, x = network("resnet10"), image(5)
    label = model(x).argmax(dim=1)
    came = [
        PGD(Threat("L2", 1.0), 5, 0.3, "uniform", fold=fold)(
            model.requires_grad_(True), x, label, OBJECTIVES[name], torch.Generator().manual_seed(0)
        )
        for fold in (False, True)
    ]
    assert not torch.equal(came[0], x)
    torch.testing.assert_close(came[0], came[1], rtol=0, atol=1e-8)


def test_in_training_mode_nothing_is_folded():
    model, x = network("resnet10").train(), image(5)
    label = torch.zeros(5, dtype=torch.long)
    draws = torch.Generator().manual_seed(0)
    attack = PGD(Threat("Linf", 0.1), 1, 0.1, mode="train", fold=True)
    _known.clear()
    attack(model, x, label, OBJECTIVES["cross_entropy"], draws)
    assert model not in _known


def test_a_folded_copy_shares_nothing_with_the_network():
    model, x = network("resnet10").train(), image()
    twin = folded_copy(model, x)
    assert count_folded(twin) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert count_folded(model) == 0
    assert model.training
    expected = answers(model.eval(), x)
    for one, other in zip(answers(twin, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert torch.equal(answers(model, x)[0], expected[0])


def test_a_gpu_s_rounding_does_not_decide_whether_to_fold():
    seen = []

    class Watching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    model = settled(Watching(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())).float()
    before = torch.backends.cudnn.allow_tf32
    with folded(model, image().float()):
        model(image().float())
    assert not any(seen[-3:-1])
    assert seen[-1] == torch.backends.cudnn.allow_tf32 == before
    assert before, "PyTorch's default; without it this test sees nothing"


class PaddedConv(nn.Conv2d):
    """A convolution of a user's own class, which pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (1, 1, 1, 1))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


def own_classes() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        PaddedConv(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        PaddedConv(6, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1, 1)
    return model


def test_subclasses_of_convolutions_are_folded() -> None:
    model, x = own_classes().eval(), torch.rand(4, 3, 8, 8).double()
    expected = model(x)
    with folded(model.requires_grad_(False), x):
        assert count_folded(model) == 2
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_frozen_statistics_fold_in_training_and_every_gradient_stays() -> None:
    model, x = own_classes(), torch.rand(4, 3, 8, 8).double()
    freeze_statistics(model, lambda name, _: name == "4")
    model.train()
    label = torch.tensor([0, 1, 2, 0])

    def gradients() -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(model(x), label)
        names, parameters = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    expected = gradients()
    with folded_frozen(model, x):
        # The other BatchNorm normalises by the batch and cannot be folded.
        assert count_folded(model) == 1
        found = nn.functional.cross_entropy(model(x), label)
    assert count_folded(model) == 0
    assert model[1].training
    names, parameters = zip(*model.named_parameters(), strict=True)
    came = dict(zip(names, torch.autograd.grad(found, parameters), strict=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(came[name], gradient, rtol=1e-10, atol=1e-12)


class Checkpointed(nn.Module):
    """Keeps no activations of its layers in training: the backward pass calls them again."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = own_classes(), form

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.net(x)
        if self.form == "sequential":
            return checkpoint_sequential(self.net, 2, x, use_reentrant=False)
        return checkpoint(self.net, x, use_reentrant=self.form == "reentrant")


@pytest.mark.parametrize("form", ["reentrant", "non-reentrant", "sequential"])
def test_networks_with_gradient_checkpointing_are_not_folded_in_training(form: str) -> None:
    model, x = Checkpointed(form), torch.rand(4, 3, 8, 8).double().requires_grad_()
    freeze_statistics(model)
    expected = copy.deepcopy(model)
    model.train()
    state = torch.get_rng_state()
    with folded_frozen(model, x):
        assert count_folded(model) == 0
        logits = model(x)
    logits.square().sum().backward()  # outside, as a training step does
    assert torch.equal(torch.get_rng_state(), state)
    expected.net(x).square().sum().backward()
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad)
