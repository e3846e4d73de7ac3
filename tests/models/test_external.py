"""Networks from elsewhere: own functions, transformers, timm."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cure.config import ModelConfig
from cure.errors import ConfigError, ModelError
from cure.models import Normalised, build_model, core, describe

MODULE = """
import torch
from torch import nn

class Flat(nn.Module):
    def __init__(self, num_classes, in_channels, size, scale=1.0):
        super().__init__()
        self.linear = nn.Linear(in_channels * size[0] * size[1], num_classes)
        self.dropout = nn.Dropout(0.5)
        self.dropout.eval()
        self.scale = scale

    def forward(self, image):
        return self.scale * self.linear(image.flatten(1))

def flat(classes, channels, size, *, scale=1.0):
    return Flat(classes, channels, size, scale)

def anything(**options):
    return Flat(10, 1, (4, 4), **options)

def needs(classes, secret):
    return None

def text(classes):
    return "a network"

def wrong(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes + 1))

def broken(classes):
    raise ValueError("no such luck")

class Output(nn.Module):
    def forward(self, image):
        return {"logits": image.flatten(1)}

class Crash(nn.Module):
    def forward(self, image):
        raise RuntimeError("boom")

ready = nn.Identity()
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    (tmp_path / "own_networks.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import no_such_module_at_all\n")
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith(("own_", "timm")):
            del sys.modules[name]


def make(
    name: str,
    options: dict[str, Any] | None = None,
    *,
    classes: int = 10,
    channels: int = 1,
    size: tuple[int, int] = (4, 4),
    seed: int = 0,
    **rest: Any,
) -> nn.Module:
    config = ModelConfig(name=name, options=options or {}, **rest)
    return build_model(config, classes=classes, channels=channels, size=size, seed=seed)


@pytest.mark.parametrize("attribute", ["flat", "Flat", "anything"])
def test_own_callable_gets_what_it_names(folder: Path, attribute: str) -> None:
    path = list(sys.path)
    state = torch.get_rng_state()
    model = make(f"own_networks:{attribute}", {"scale": 2.0})
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), state)
    assert model(torch.rand(2, 1, 4, 4)).shape == (2, 10)
    assert core(model).scale == 2.0
    assert describe(model)["name"] == f"own_networks:{attribute}"
    # The trial before training leaves each module's mode as the author set it.
    assert model.training
    assert not model.get_submodule("dropout").training
    again = make(f"own_networks:{attribute}", {"scale": 2.0})
    assert torch.equal(core(again).linear.weight, core(model).linear.weight)


@pytest.mark.filterwarnings("ignore::cure.errors.CureNote")
@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("no_such_module:f", {}, ModelError, "found no module 'no_such_module'"),
        ("own_broken:f", {}, ModelError, "importing own_broken failed: ModuleNotFoundError"),
        ("own_networks:", {}, ConfigError, "expected package.module:callable"),
        ("own_networks:flatt", {}, ConfigError, "'flatt'; did you mean 'flat'"),
        ("own_networks:number", {}, ModelError, "builds a network, got int"),
        ("own_networks:ready", {}, ModelError, "builds a network, got a network"),
        ("own_networks:text", {}, ModelError, "to return a torch.nn.Module, got str"),
        ("own_networks:flat", {"scales": 1}, ConfigError, "'scales'; did you mean 'scale'"),
        ("own_networks:needs", {}, ConfigError, "needs more .*'secret'"),
        ("own_networks:broken", {}, ModelError, r"ValueError: no such luck \(own_net.* line \d+\)"),
        ("own_networks:wrong", {}, ModelError, r"shape \[2, 10\] .* got \[2, 11\]"),
        ("own_networks:Output", {}, ModelError, "shape .2, 10. for two .* got .2, 16."),
        ("own_networks:Crash", {}, ModelError, r"failed on images of shape \[2, 1, 4, 4\].*boom"),
    ],
)
def test_own_callable_that_does_not_fit_is_told(
    folder: Path, name: str, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(name, options)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    path = tmp_path_factory.mktemp("hub")
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=10,
    )
    transformers.ViTForImageClassification(config).save_pretrained(path)
    return path


def original(hub: Path) -> Any:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(hub).eval()


def test_transformers_model_returns_logits(hub: Path) -> None:
    model = make(f"hf:{hub}", size=(8, 8)).eval()
    image = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(image), original(hub)(image).logits)
    # Saved weights keep the names that transformers reads.
    assert core(model).state_dict().keys() == original(hub).state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"image_mean": [0.5], "image_std": [0.25]}, 0.5, 0.25),
        ({"image_mean": 0.5, "image_std": 0.25, "do_rescale": True}, 0.5, 0.25),
        ({"image_mean": [0.5], "image_std": [0.25], "rescale_factor": 1 / 127.5}, 0.25, 0.125),
        (
            {
                "image_mean": [0.0],
                "image_std": [1.0],
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
            },
            0.5,
            0.5,
        ),
        ({"image_mean": [0.5], "image_std": [0.25], "do_normalize": False}, 0.0, 1.0),
    ],
)
def test_transformers_standardisation_is_read(
    hub: Path, settings: dict[str, Any], mean: float, std: float
) -> None:
    path = hub / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    try:
        model = make(f"hf:{hub}", size=(8, 8)).eval()
        given = make(f"hf:{hub}", size=(8, 8), mean=(0.1,), std=(0.7,)).eval()
    finally:
        path.unlink()
    image = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model(image), original(hub)((image - mean) / std).logits)
    torch.testing.assert_close(given(image), original(hub)((image - 0.1) / 0.7).logits)


@pytest.mark.parametrize("text", ['{"image_mean": [0.5]}', "[]", "{"])
def test_transformers_standardisation_that_is_broken_is_told(hub: Path, text: str) -> None:
    path = hub / "preprocessor_config.json"
    path.write_text(text)
    try:
        with pytest.raises(ModelError, match=r"could not read the constants .* give model.mean"):
            make(f"hf:{hub}", size=(8, 8))
        path.write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
        with pytest.raises(ModelError, match="images of 3 channels but the data has 1"):
            make(f"hf:{hub}", size=(8, 8))
    finally:
        path.unlink()


def test_transformers_classes_are_matched_by_name(hub: Path, tmp_path: Path) -> None:
    names = [
        "tench, Tinca tinca",
        "owl",
        "cat",
        "dog",
        "ant",
        "bee",
        "cow",
        "elk",
        "fox",
        "Great_White",
    ]
    network = original(hub)
    network.config.id2label = dict(enumerate(names))
    network.save_pretrained(tmp_path / "named")
    image = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        plain = network(pixel_values=image).logits

    def logits(wanted: list[str]) -> torch.Tensor:
        config = ModelConfig(name=f"hf:{tmp_path / 'named'}")
        model = build_model(
            config, classes=len(wanted), channels=1, size=(8, 8), seed=0, names=wanted
        )
        with torch.no_grad():
            return model.eval()(image)

    assert torch.equal(logits(names), plain)
    assert torch.equal(logits(names[::-1]), plain.flip(1))
    some = logits(["great white", "cat", "Tinca tinca"])
    assert torch.equal(some, plain[:, [9, 2, 0]])
    with pytest.raises(ModelError, match="10 classes but the data has 2"):
        logits(["cat", "emu"])
    with pytest.raises(ModelError, match="'emu' is unknown to it"):
        logits([*names[:9], "emu"])
    assert torch.equal(logits([str(i) for i in range(10)]), plain)


def test_transformers_other_number_of_classes(hub: Path) -> None:
    with pytest.raises(ModelError, match=r"10 classes but the data has 3; .*new_head=true"):
        make(f"hf:{hub}", classes=3, size=(8, 8))
    with pytest.raises(ModelError, match="ignore_mismatched_sizes: true"):
        make(f"hf:{hub}", {"num_labels": 3}, classes=3, size=(8, 8))
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    first = make(f"hf:{hub}", options, classes=3, size=(8, 8)).state_dict()
    torch.manual_seed(9)
    second = make(f"hf:{hub}", options, classes=3, size=(8, 8)).state_dict()
    other = make(f"hf:{hub}", options, classes=3, size=(8, 8), seed=1).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["network.classifier.weight"], other["network.classifier.weight"])


def test_transformers_network_of_other_classes_gets_a_new_head(hub: Path) -> None:
    model = build_model(
        ModelConfig(name=f"hf:{hub}"),
        classes=3,
        channels=1,
        size=(8, 8),
        seed=0,
        names=("ant", "bee", "cow"),
        new_head=True,
    )
    theirs, ours = original(hub).state_dict(), core(model).state_dict()
    new = {name for name in ours if ours[name].shape != theirs[name].shape}
    assert new == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - new)


def test_transformers_half_precision_files_are_trained_in_float32(
    hub: Path, tmp_path: Path
) -> None:
    original(hub).half().save_pretrained(tmp_path)
    model = make(f"hf:{tmp_path}", size=(8, 8))
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("hf:", {}, ConfigError, "expected hf:NAME_OR_FOLDER"),
        ("hf:./nowhere", {}, ModelError, "found no folder nowhere"),
        ("HUB", {"no_such_option": 1}, ModelError, "could not load .*no_such_option"),
    ],
)
def test_transformers_mistakes_are_told(
    hub: Path, name: str, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(name.replace("HUB", f"hf:{hub}"), options, size=(8, 8))


def test_transformers_wrong_image_size_is_told(hub: Path) -> None:
    with pytest.raises(ModelError, match=r"failed on images of shape \[2, 1, 16, 16\]"):
        make(f"hf:{hub}", size=(16, 16))


TIMM = """
from torch import nn

def create_model(name, num_classes, in_chans, pretrained=False, width=1):
    if name == "missing":
        raise RuntimeError("Unknown model (missing)")
    model = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 16, num_classes))
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}
    return model
"""


def test_timm_that_does_not_import_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="needs timm, which could not be imported"):
        make("timm:resnet18")
    monkeypatch.delitem(sys.modules, "timm")
    (folder / "timm.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ModelError, match="RuntimeError: operator torchvision::nms is missing"):
        make("timm:resnet18")


def test_timm_gets_classes_channels_and_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    (folder / "timm.py").write_text(TIMM)
    monkeypatch.syspath_prepend(str(folder))
    plain = make("timm:net", {"width": 2})
    assert isinstance(plain, nn.Sequential)
    trained = make("timm:net", {"pretrained": True})
    assert isinstance(trained, Normalised)
    assert float(trained.mean) == 0.5
    given = make("timm:net", {"pretrained": True}, mean=(0.1,), std=(0.2,))
    assert isinstance(given, Normalised)
    assert float(given.mean) == pytest.approx(0.1)
    assert isinstance(given.network, nn.Sequential)
    with pytest.raises(ModelError, match=r"could not build 'missing'.*Unknown model"):
        make("timm:missing")
