"""The registered architectures: sizes and names as published, shapes, chance."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cure.config import ModelConfig
from cure.errors import ConfigError
from cure.models import MODELS, Normalised, build_model, core, describe, load_weights

SMALL: dict[str, dict[str, Any]] = {
    "densenet121": {"growth": 4},
    "wide_resnet": {"depth": 10, "width": 1},
    "vit": {"patch": 4, "dim": 12, "depth": 1, "heads": 2},
    "resnet10": {"width": 4},
    "small_cnn": {"width": 4},
}

# Parameters with ten classes and RGB images of 32x32; the ResNets, PreActResNet-18 and
# DenseNet-121 as in the widely used 32x32 code (11.17, 21.28, 23.52, 42.51, 11.17, 6.96 M), the
# wide networks as in RobustBench (36.48, 46.16 M).
PUBLISHED = [
    ("resnet18", {}, 11_173_962, 122),
    ("resnet34", {}, 21_282_122, 218),
    ("resnet50", {}, 23_520_842, 320),
    ("resnet101", {}, 42_512_970, 626),
    ("preactresnet18", {}, 11_171_146, 102),
    ("preactresnet18", {"final_norm": True}, 11_172_170, 107),
    ("wide_resnet", {}, 46_160_474, 191),
    ("wide_resnet", {"depth": 28}, 36_479_194, 155),
    ("densenet121", {}, 6_956_298, 722),
    ("resnet10", {"width": 64}, 4_903_242, 74),
]


def make(
    name: str,
    options: dict[str, Any] | None = None,
    *,
    classes: int = 10,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),
    seed: int = 0,
    **rest: Any,
) -> nn.Module:
    config = ModelConfig(name=name, options=options or {}, **rest)
    return build_model(config, classes=classes, channels=channels, size=size, seed=seed)


@pytest.mark.parametrize(("name", "options", "parameters", "keys"), PUBLISHED)
def test_parameters_and_keys_are_as_published(
    name: str, options: dict[str, Any], parameters: int, keys: int
) -> None:
    model = make(name, options)
    assert describe(model) == {"name": name, "parameters": parameters}
    assert len(model.state_dict()) == keys


def test_small_cnn_has_about_25_thousand_parameters_for_digits() -> None:
    model = make("small_cnn", channels=1, size=(8, 8))
    assert describe(model) == {"name": "small_cnn", "parameters": 24_058}


def norm(name: str) -> set[str]:
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{name}.{part}" for part in parts}


def test_resnet_keys_are_robustbenchs() -> None:
    keys = set(make("resnet10").state_dict())
    expected = {"conv1.weight", "linear.weight", "linear.bias"} | norm("bn1")
    for stage in range(1, 5):
        block = f"layer{stage}.0"
        expected |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
        expected |= norm(f"{block}.bn1") | norm(f"{block}.bn2")
        if stage > 1:
            expected |= {f"{block}.shortcut.0.weight"} | norm(f"{block}.shortcut.1")
    assert keys == expected


def test_preactresnet_keys_are_robustbenchs() -> None:
    expected = {"conv1.weight", "linear.weight", "linear.bias"}
    for stage in range(1, 5):
        for index in range(2):
            block = f"layer{stage}.{index}"
            expected |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
            expected |= norm(f"{block}.bn1") | norm(f"{block}.bn2")
        if stage > 1:
            expected |= {f"layer{stage}.0.shortcut.0.weight"}
    assert set(make("preactresnet18").state_dict()) == expected
    assert set(make("preactresnet18", {"final_norm": True}).state_dict()) == expected | norm("bn")


def test_wide_resnet_keys_are_robustbenchs() -> None:
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | norm("bn1")
    for stage in ("block1", "block2", "block3"):
        for index in range(2):
            block = f"{stage}.layer.{index}"
            expected |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
            expected |= norm(f"{block}.bn1") | norm(f"{block}.bn2")
        expected |= {f"{stage}.layer.0.convShortcut.weight"}
    options = {"depth": 16, "width": 2}
    assert set(make("wide_resnet", options).state_dict()) == expected
    more = set(make("wide_resnet", options | {"sub_block1": True}).state_dict()) - expected
    assert more == {f"sub_{key}" for key in expected if key.startswith("block1.")}


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (28, 28), (16, 24)])
@pytest.mark.parametrize("name", ["small_cnn", "resnet10", "wide_resnet", "densenet121", "vit"])
def test_small_models_take_other_sizes_and_channels(name: str, size: tuple[int, int]) -> None:
    for channels in (1, 3):
        model = make(name, SMALL[name], classes=7, channels=channels, size=size)
        assert model(torch.rand(2, channels, *size)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS.names())
def test_every_registered_model_trains_on_every_parameter(name: str) -> None:
    side = 32 if name == "efficientnet_lite0" else 16
    model = make(name, SMALL.get(name), classes=5, size=(side, side))
    logits = model(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    idle = [key for key, value in model.named_parameters() if value.grad is None]
    assert not idle


@pytest.mark.parametrize("side", [64, 33])
def test_efficientnet_is_that_of_its_package(side: int) -> None:
    """Other paddings and layers in place make the same logits and gradients, even of odd sizes."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    ours = core(make("efficientnet_lite0", {"pretrained": False}, size=(side, side))).double()
    theirs = package.EfficientNet.from_name("efficientnet-lite0").double()
    theirs._fc = nn.Linear(theirs._fc.in_features, 10).double()
    theirs._global_params = theirs._global_params._replace(drop_connect_rate=0.0)
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(2, 3, side, side, dtype=torch.double, requires_grad=True)
    found = []
    for network in (ours.eval(), theirs.eval()):
        logits = network(image)
        found.append([logits, *torch.autograd.grad(logits.sum(), [image, *network.parameters()])])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_transformer_pools(pool: str) -> None:
    model = make("vit", SMALL["vit"] | {"pool": pool}, size=(8, 16))
    assert model(torch.rand(3, 3, 8, 16)).shape == (3, 10)
    assert core(model).get_parameter("position").shape[1] == 8 + (pool == "cls")


def test_attention_is_that_of_pytorch() -> None:
    from cure.models.vit import Attention

    mine, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(mine.qkv.weight)
        theirs.in_proj_bias.copy_(mine.qkv.bias)
        theirs.out_proj.weight.copy_(mine.out.weight)
        theirs.out_proj.bias.copy_(mine.out.bias)
    token = torch.randn(2, 5, 12)
    torch.testing.assert_close(mine(token), theirs(token, token, token)[0])


def test_imagenet_stem_shrinks_fourfold() -> None:
    model = make("resnet10", {"width": 4, "stem": "imagenet"}, size=(64, 64))
    seen: list[torch.Size] = []
    core(model).get_submodule("layer1").register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    assert seen == [(2, 4, 16, 16)]
    assert core(model).get_submodule("conv1").kernel_size == (7, 7)


def test_preactresnet_shortcuts_differ_in_the_function_only() -> None:
    activated = make("preactresnet18").eval()
    raw = make("preactresnet18", {"shortcut": "raw"}).eval()
    raw.load_state_dict(activated.state_dict())
    image = torch.rand(1, 3, 8, 8)
    assert not torch.allclose(activated(image), raw(image))


@pytest.mark.parametrize("name", ["small_cnn", "wide_resnet", "vit"])
def test_initialisation_depends_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(name, SMALL[name], seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = make(name, SMALL[name], seed=3).state_dict()
    other = make(name, SMALL[name], seed=4).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_wide_resnet_is_initialised_as_in_its_lineage() -> None:
    model = make("wide_resnet", {"depth": 10, "width": 4}).state_dict()
    weight = model["block3.layer.0.conv1.weight"]
    assert weight.shape == (256, 128, 3, 3)
    assert float(weight.std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert float(model["fc.bias"].abs().max()) == 0
    assert float(model["bn1.weight"].min()) == 1
    assert torch.equal(model["bn1.running_var"], torch.ones(256))
    assert torch.equal(model["bn1.running_mean"], torch.zeros(256))


def test_normalising_inside_equals_normalising_outside() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    plain = make("small_cnn", seed=5).eval()
    inside = make("small_cnn", seed=5, mean=mean, std=std).eval()
    assert isinstance(inside, Normalised)
    assert core(inside) is inside.network
    assert core(plain) is plain
    image = torch.rand(4, 3, 32, 32)
    outside = torch.stack(
        [(image[:, index] - mean[index]) / std[index] for index in range(3)], dim=1
    )
    torch.testing.assert_close(inside(image), plain(outside))
    assert core(inside).state_dict().keys() == plain.state_dict().keys()
    assert not {"mean", "std"} & set(inside.state_dict())
    assert describe(inside) == describe(plain)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet1", {}, "unknown model 'resnet1'; did you mean 'resnet18'\\? Known: "),
        (
            "resnet10",
            {"widht": 3},
            "unknown option of model resnet10 'widht'; did you mean 'width'",
        ),
        ("resnet10", {"classes": 3}, "unknown option of model resnet10 'classes'"),
        ("resnet10", {"width": "wide"}, "option 'width' of model resnet10 does not fit: "),
        ("resnet10", {"width": True}, "valid integer, got True"),
        ("resnet10", {"width": 0}, "should be greater than 0, got 0"),
        ("resnet18", {"stem": "cifra"}, "should be 'cifar' or 'imagenet', got 'cifra'"),
        ("wide_resnet", {"depth": 30}, r"depth of 10, 16, .* for wide_resnet, got 30"),
        ("wide_resnet", {"depth": 4}, r"got 4"),
        ("vit", {"patch": 5}, "got patch 5 for images of 32 x 32 pixels"),
        ("vit", {"heads": 5}, "got heads 5 for dim 192"),
    ],
)
def test_wrong_names_and_options_are_told(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, options)


def test_too_small_images_and_wrong_constants_are_told() -> None:
    with pytest.raises(ConfigError, match="at least 8 x 8 pixels for densenet121, got 4 x 4"):
        make("densenet121", SMALL["densenet121"], size=(4, 4))
    with pytest.raises(ConfigError, match=r"with 1 numbers, one for each channel .* got 3"):
        make("small_cnn", channels=1, mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(ConfigError, match="std above 0"):
        Normalised(nn.Identity(), (0.5,), (0.0,))
    with pytest.raises(ConfigError, match=r"with one number a channel each.*got mean 0\.5"):
        Normalised(nn.Identity(), 0.5, 0.2)  # type: ignore[arg-type]
    for mean, std in ((["grey"], [1.0]), ("0.5", "0.2"), ([math.inf], [1.0]), ([], [])):
        with pytest.raises(ConfigError, match="with one number a channel each"):
            Normalised(nn.Identity(), mean, std)  # type: ignore[arg-type]
    assert Normalised(nn.Identity(), torch.ones(3), np.ones(3)).std.dtype == torch.float32


def _examples() -> Path:
    for file in importlib.metadata.files("pyautoattack") or []:
        if file.match("examples/model_test.pt"):
            return Path(str(file.locate())).parent
    pytest.skip("this build of pyautoattack does not hold examples/model_test.pt")


def test_example_checkpoint_of_autoattack_loads_and_gives_its_logits() -> None:
    folder = _examples()
    mine = make("resnet18").eval()
    load_weights(mine, folder / "model_test.pt")
    if not (folder / "resnet.py").is_file():
        pytest.skip("this build of pyautoattack does not hold examples/resnet.py")
    spec = importlib.util.spec_from_file_location("autoattack_resnet", folder / "resnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.ResNet18().eval()
    theirs.load_state_dict(
        torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True)
    )
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(mine(image), theirs(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_activation_follows_every_norm_but_not_the_weights(name: str) -> None:
    """With SiLU: other values, the same weights; one call for each ReLU, found by hooks on F."""
    calls: list[str] = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function in (nn.functional.relu, nn.functional.silu):
                calls.append(function.__name__)
            return function(*args, **(kwargs or {}))

    plain, smooth = make(name), make(name, {"activation": "silu"})
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), Counted():
        plain(image)
        count = len(calls)
        assert set(calls) == {"relu"}
        smooth(image)
    assert set(calls[count:]) == {"silu"}
    assert len(calls) == 2 * count
    # Stem; two (three) in each block.
    assert count == {"resnet18": 1 + 2 * 8, "resnet50": 1 + 3 * 16}[name]
    assert list(plain.state_dict()) == list(smooth.state_dict())
    with pytest.raises(ConfigError, match="activation"):
        make(name, {"activation": "gelu"})
