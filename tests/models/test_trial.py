"""Networks as people write them: what one trial pass decides about each."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cure
from cure.errors import ConfigError, CureNote, ModelError
from cure.models import core
from cure.models.build import adapted_copy
from cure.models.failure import network_error, network_errors
from cure.models.trial import Traits, check_trainable, fitted, traits_of
from cure.models.wrapper import Adapted
from cure.recipe import load_recipe
from cure.training.setup import prepare
from cure.utils.device import Device
from helpers import bright_or_dark

SECTION = cure.config.ModelConfig(name="given")


def body() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


class Base(nn.Module):
    """Convolution, BatchNorm and a linear layer on 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(4 * 64, 2)

    def logits(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).flatten(1))

    def forward(self, image: Tensor) -> Any:
        return self.logits(image)


class Views(Base):
    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).view(len(image), -1))


class ReadsMemory(Base):
    """Right in the default layout only, and no error in the other one."""

    def forward(self, image: Tensor) -> Tensor:
        features = self.body(image)
        return self.head(features.as_strided((len(image), 256), (256, 1)))


class Outputs(NamedTuple):
    logits: Tensor
    auxiliary: Tensor


class NamedInTraining(Base):
    def forward(self, image: Tensor) -> Any:
        logits = self.logits(image)
        return Outputs(logits, logits + 1) if self.training else logits


class FeaturesFirst(Base):
    def forward(self, image: Tensor) -> Any:
        features = self.body(image).flatten(1)
        return features, self.head(features)


class Attribute:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class ReturnsObject(Base):
    def forward(self, image: Tensor) -> Any:
        return Attribute(self.logits(image))


class ReturnsDictionary(Base):
    def forward(self, image: Tensor) -> Any:
        return {"scores": self.logits(image), "step": 3}


class OneLogit(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 64, 1)


class OneNamedLogit(OneLogit):
    def forward(self, image: Tensor) -> Any:
        return {"logits": self.logits(image)}


class OneLogitEach(OneLogit):
    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image).squeeze()


class EndsInSigmoid(OneLogit):
    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image).sigmoid().squeeze(1)


class OneValueWithoutGradient(OneLogit):
    def forward(self, image: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(image).detach())


class InPlace(Base):
    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image.mul_(2).sub_(1))


class FirstReluInPlace(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body.insert(0, nn.Hardtanh(0.2, 0.8, inplace=True))


class KeepsInList(Base):
    """Keeps activations in a container, after the first pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {"features": []}

    def forward(self, image: Tensor) -> Tensor:
        features = self.body(image)
        self.kept["features"] = [features]
        return self.head(features.flatten(1))


class CastsInside(Base):
    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image).double()


class Detaches(Base):
    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).flatten(1).detach())


class ThroughNumpy(Base):
    def forward(self, image: Tensor) -> Tensor:
        array = self.body(image.detach()).flatten(1).detach().numpy()
        return self.head(torch.from_numpy(array))


class InferenceMode(Base):
    def forward(self, image: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.logits(image)


class TrainReturnsNothing(Base):
    """``train()`` keeps BatchNorm in evaluation mode and forgets to return the network."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.body[1].eval()


class InBfloat16(Base):
    """Converts images to the precision of its weights by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()
        self.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))

    def forward(self, image: Tensor) -> Tensor:
        return (self.logits(image.bfloat16()) * self.scale).float()


def old_norm() -> nn.Module:
    network = Base()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(network.head)
    network(torch.rand(2, 1, 8, 8))
    return network


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))


def quantised() -> nn.Module:
    made: nn.Module = torch.ao.quantization.quantize_dynamic(Base().eval(), {nn.Linear})
    return made


def taken(network: nn.Module) -> nn.Module:
    return adapted_copy(network, 2, 1, (8, 8), SECTION)


SHORT: dict[str, Any] = {
    "start": "model",
    "data.validation": 8,
    "training.batch_size": 8,
}
IMAGE = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))

WORKING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (Base, {}),
    "views": (Views, {"channels_last": False}),
    "reads memory": (ReadsMemory, {"channels_last": False}),
    "named in training": (NamedInTraining, {"output": "Outputs.logits"}),
    "features first": (FeaturesFirst, {"output": "tuple[1]"}),
    "object": (ReturnsObject, {"output": "Attribute.logits"}),
    "dictionary": (ReturnsDictionary, {"output": "dict['scores']"}),
    "one logit": (OneLogit, {"output": "tensor, one logit"}),
    "one named logit": (OneNamedLogit, {"output": "dict['logits'], one logit"}),
    "one logit each": (OneLogitEach, {"output": "tensor, one logit", "pairs": True}),
    "in place": (InPlace, {"in_place": True}),
    "first layer in place": (FirstReluInPlace, {"in_place": True}),
    "keeps in list": (KeepsInList, {"detaches": True}),
    "old weight norm": (old_norm, {"detaches": True}),
    "casts inside": (CastsInside, {"cast": True}),
    "half": (lambda: Base().half(), {}),
    "bfloat16": (lambda: Base().bfloat16(), {}),
    "double": (lambda: Base().double(), {}),
    "lazy": (lazy, {}),
}


@pytest.mark.filterwarnings("ignore::cure.errors.CureNote")
@pytest.mark.parametrize("name", WORKING)
def test_networks_are_adapted_and_train(name: str, tmp_path: Path) -> None:
    make, expected = WORKING[name]
    torch.manual_seed(0)
    given = make()
    network = taken(given)
    traits = traits_of(network)
    assert {key: getattr(traits, key) for key in expected} == expected
    assert isinstance(network, Adapted) == bool(expected)
    assert traits.gradient
    assert not traits.untrainable
    # Any layout, with a gradient, and the images stay as they are.
    for layout in (torch.contiguous_format, torch.channels_last):
        for mode in (True, False):
            network.train(mode).to(memory_format=layout)
            image = IMAGE.contiguous(memory_format=layout).requires_grad_()
            logits = network(image)
            assert logits.shape == (3, 2)
            assert logits.dtype == torch.float32
            (gradient,) = torch.autograd.grad(logits.sum(), image)
            assert gradient.is_contiguous(memory_format=layout)
            assert torch.equal(image.detach(), IMAGE)
            copy.deepcopy(network)
    data = bright_or_dark(64)
    run = cure.train(
        "digits",
        {
            "method": "at",
            "start": "model",
            "data.validation": 16,
            "training.epochs": 1,
            "training.batch_size": 16,
            "training.threads": 1,
        },
        run=tmp_path / "run",
        model=given,
        data=data,
        quiet=True,
    )
    # Saved weights keep the names of the network.
    network = run.model()
    assert core(network).state_dict().keys() == make_names(make)
    result = cure.evaluate(run, data=bright_or_dark(32, "test"), attacks="pgd2,noise")
    assert result["attacks"]["pgd2"]["passes"]["backward"] > 0


def make_names(make: Callable[[], nn.Module]) -> Any:
    network = make()
    if network.__class__ is nn.Sequential:
        network(torch.rand(2, 1, 8, 8))
    return network.state_dict().keys()


def test_a_network_without_needs_is_used_as_it_is() -> None:
    network = taken(Base())
    assert type(network) is Base
    assert traits_of(network) == Traits(shape=(2, 2))


def test_one_logit_is_trained_and_attacked_by_the_binary_cross_entropy() -> None:
    torch.manual_seed(0)
    given = OneLogit().eval()
    image, label = IMAGE.clone().requires_grad_(), torch.tensor([0, 1, 1])
    logits = taken(given)(image)
    loss = F.cross_entropy(logits, label)
    expected = F.binary_cross_entropy_with_logits(given(image)[:, 0], label.float())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found, gradient = (torch.autograd.grad(value, image)[0] for value in (loss, expected))
    torch.testing.assert_close(found, gradient)
    assert torch.equal(logits.argmax(1) == 1, given(image)[:, 0] > 0)


def test_weights_buffers_modes_and_generators_are_as_before() -> None:
    given = Base()
    given.body[1].eval()
    before, state = copy.deepcopy(given.state_dict()), torch.get_rng_state()
    network = taken(given)
    for one in (given, network):
        assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())
        assert one.training
        assert not one.get_submodule("body.1").training
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_are_those_of_the_network() -> None:
    for make in (Views, ReadsMemory, ReturnsObject, InPlace, FeaturesFirst):
        given = make().eval()
        output = given(IMAGE.clone())
        plain = output[1] if isinstance(output, tuple) else getattr(output, "logits", output)
        made = taken(given).to(memory_format=torch.channels_last)
        came = made(IMAGE.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(came, plain, atol=1e-5)


def test_what_is_decided_is_said() -> None:
    with pytest.warns(CureNote, match="its weights were float16 and are converted to float32"):
        taken(Base().half())
    with pytest.warns(CureNote, match=r"taken from Outputs.logits; .* left out: auxiliary"):
        taken(NamedInTraining())


def test_a_network_that_converts_images_itself_keeps_its_precision(tmp_path: Path) -> None:
    given = InBfloat16().eval()
    with pytest.warns(CureNote, match="weights stay bfloat16, because it fails with float32"):
        network = taken(given)
    assert {tensor.dtype for tensor in network.state_dict().values()} >= {torch.bfloat16}
    assert torch.equal(network(IMAGE), given(IMAGE))
    data = bright_or_dark(32, "test")
    result = cure.evaluate(given, data=data, attacks="pgd2", limit=8)
    assert result["attacks"]["pgd2"]["passes"]["backward"] > 0
    with pytest.raises(ModelError, match=r"float32 weights, which training needs.*BFloat16.*\)"):
        cure.train("digits", SHORT, run=tmp_path / "r", model=given, data=data)
    broken = InBfloat16()
    broken.head = nn.Linear(7, 2, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"^the network failed .* layer 'body.0'"):
        taken(broken)


@pytest.mark.parametrize("make", [Detaches, ThroughNumpy, InferenceMode, quantised])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_a_gradient_training_is_refused_and_square_runs(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    network, data = make(), bright_or_dark(32, "test")
    with pytest.raises(ModelError, match=r"cannot be trained.*gradient"):
        cure.train("digits", SHORT, run=tmp_path / "r", model=network, data=data)
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match=r"pgd2 needs the gradient.* natural,noise,square"):
        cure.evaluate(network, data=data, attacks="pgd2")
    with pytest.warns(CureNote, match="autoattack: only square was possible"):
        result = cure.evaluate(network, data=data, attacks="natural,noise,autoattack", limit=8)
    assert result["attacks"]["autoattack"]["settings"]["parts"] == ["square"]
    assert "apgd-ce" in result["attacks"]["autoattack"]["settings"]["left_out"]


def test_a_network_whose_train_returns_nothing_is_used_everywhere(tmp_path: Path) -> None:
    data, test = bright_or_dark(64), bright_or_dark(32, "test")
    run = cure.train(
        "digits",
        SHORT | {"training.epochs": 1, "training.threads": 1, "start_check": "off"},
        run=tmp_path / "run",
        model=TrainReturnsNothing(),
        data=data,
        quiet=True,
    )
    assert isinstance(core(run.model()), TrainReturnsNothing)
    for options in ({"attacks": "square,transfer", "transfer": run}, {"bounds": True}):
        assert cure.evaluate(run, data=test, limit=8, **options)["natural"]["n"] == 8
    cure.export(run, "safetensors", tmp_path / "deploy", data=data)


def test_torchscript_is_evaluated_and_not_trained(tmp_path: Path) -> None:
    data = bright_or_dark(32, "test")
    for network in (
        torch.jit.trace(Base().eval(), IMAGE),
        torch.jit.freeze(torch.jit.trace(Base().eval(), IMAGE)),
    ):
        result = cure.evaluate(network, data=data, attacks="pgd2,square", limit=8)
        assert result["natural"]["n"] == 8
        with pytest.raises(ModelError, match="a TorchScript network cannot be trained here"):
            cure.train("digits", SHORT, run=tmp_path / "r", model=network, data=data)


class Strange(Base):
    def forward(self, image: Tensor) -> Any:
        return "logits"


class TwoHeads(Base):
    def forward(self, image: Tensor) -> Any:
        logits = self.logits(image)
        return {"student": logits, "teacher": logits + 1}


class Crashes(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(100, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Strange, "to return a tensor of logits, got str"),
        (TwoHeads, r"got dict with student \[2, 2\], teacher \[2, 2\]; .* name them logits"),
        (EndsInSigmoid, "got the values of a sigmoid; return what the sigmoid takes"),
        (OneValueWithoutGradient, "no gradient that tells a logit from a probability; return a"),
        (Crashes, r"layer 'head' \(Linear\), given \[2, 256\], at test_trial.py, line \d+: Runt"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_before_a_folder_is_made(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        cure.train("digits", SHORT, run=tmp_path / "r", model=make(), data=bright_or_dark(64))
    assert not (tmp_path / "r").exists()
    with pytest.raises(ModelError, match=message):
        cure.evaluate(make(), data=bright_or_dark(32, "test"))


def test_what_cannot_be_copied_is_named() -> None:
    network = Base()
    network.body.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"attribute 'lock' of layer 'body' .TypeError"):
        taken(network)


def test_batches_of_one_are_refused_where_batch_norm_trains() -> None:
    network = taken(Base())
    with pytest.raises(ModelError, match=r"batch_size: expected 2 images .*layer 'body.1'"):
        check_trainable(network, 1)
    check_trainable(network, 2)
    check_trainable(network, 1, frozen_statistics=True)


class Squeezes(Base):
    """``squeeze()`` takes the batch dimension of one image away as well."""

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image)[:, :, None, None].squeeze()


class FailsAlone(Base):
    def forward(self, image: Tensor) -> Tensor:
        features = self.body(image).unsqueeze(1).squeeze()
        return self.head(features.flatten(1))


@pytest.mark.parametrize("make", [Squeezes, FailsAlone])
@pytest.mark.filterwarnings("ignore::cure.errors.CureNote")
def test_one_image_alone_gets_the_logits_that_it_has_in_a_batch(make: type[Base]) -> None:
    network = taken(make()).eval()
    assert traits_of(network).pairs
    image = IMAGE[:1].clone().requires_grad_()
    logits = network(image)
    torch.testing.assert_close(logits, network(IMAGE)[:1])
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    (expected,) = torch.autograd.grad(network.network.logits(image).sum(), image)
    torch.testing.assert_close(gradient, expected)
    # Nine images in batches of four leave one alone.
    data = bright_or_dark(9, "test")
    assert cure.evaluate(make(), data=data, attacks="pgd2", batch_size=4)["natural"]["n"] == 9


class FailsLater(Base):
    def forward(self, image: Tensor) -> Tensor:
        if len(image) > 2:
            raise KeyError("three")
        return self.logits(image)


def test_an_error_in_the_middle_is_one_sentence_with_the_line() -> None:
    network = nn.Sequential(nn.Identity(), FailsLater())
    message = r"layer '1' \(FailsLater\), given \[3, 1, 8, 8\], at test_trial.py, line"
    with pytest.raises(ModelError, match=message), network_errors():
        network(IMAGE)
    assert network_error(KeyError("elsewhere")) is None


def strided(inner: int, **more: Any) -> nn.Module:
    """A network whose second layer sees every second pixel of ``inner`` channels."""
    return nn.Sequential(
        nn.Conv2d(1, inner, 3, padding=1),
        nn.Conv2d(inner, 8, **{"kernel_size": 1, "stride": 2} | more),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


@pytest.mark.parametrize(
    ("network", "broken"),
    [
        (strided(4), True),
        (strided(15), True),
        (strided(16), False),
        (strided(4, stride=1), False),
        (strided(4, kernel_size=3), False),
        (nn.Sequential(nn.Conv2d(1, 8, 1, stride=(1, 2)), nn.Flatten(), nn.LazyLinear(2)), True),
    ],
)
def test_layers_whose_gradient_onednn_spoils_are_trained_in_the_default_layout(
    network: nn.Module, broken: bool
) -> None:
    asked = Device(torch.device("cuda"), channels_last=True)
    assert fitted(asked, network) is asked
    images = bright_or_dark(96)
    settings = ["model.name=object:Sequential", "start=model", "data.validation=32"]
    config = load_recipe("digits", settings)
    assert prepare(config, images=images, model=network).engine.channels_last is not broken
