"""A training step never waits for the device.

Without a GPU the step runs on PyTorch's ``meta`` device, whose tensors have no values: whatever
asks for one fails there.  With a GPU PyTorch itself watches.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cure import data
from cure.data import Batch, ImageSet
from cure.methods import METHODS
from cure.methods.cure import threshold
from cure.models import build_model
from cure.models import fuse as folding
from cure.recipe import check, override, read_recipe
from cure.runs.folder import RunFolder
from cure.training.setup import Prepared, build_method
from cure.training.trainer import Trainer
from cure.utils.engine import Engine

sys.path.insert(0, str(Path(__file__).parent / "training"))

from test_every_method_trains import QUICK, WRAPPED, small

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


def training(
    device: str, images: ImageSet, name: str, around: dict[str, Any] | None = None
) -> tuple[Trainer, Iterator[Batch]]:
    """A run of a method on a device, and its batches."""
    raw = read_recipe("digits")
    settings: dict[str, Any] = {
        "model": QUICK["model"],
        "method": {"name": name, **small(METHODS[name].Config)},
        "start": "scratch",
        "attack.steps": 2,
        "training.batch_size": 16,
        **(around or {}),
    }
    for key, value in settings.items():
        override(raw, key, value)
    config = check(raw, "a test")
    engine = Engine(torch.device(device), config.training.precision, channels_last=True)
    images = images.to(device)
    network = build_model(config.model, classes=2, channels=1, size=(8, 8), seed=0)
    network = engine.place(network)
    teachers = {role: copy.deepcopy(network) for role in config.method.teachers()}
    prepared = Prepared(engine, images, images, network, copy.deepcopy(network), teachers)
    method = build_method(config, prepared)
    method.on_epoch(0)
    method.train()
    loop = Trainer(config, method, images, images, engine, RunFolder(Path("."), writes=False))
    batches = data.epoch(loop.training, batch_size=16, epoch=0, seed=0, augment=config.data.augment)
    return loop, batches


class Copies(TorchDispatchMode):
    """Fails where a tensor is copied from one device to another."""

    def __torch_dispatch__(
        self, function: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        places = {tensor.device.type for tensor in tensors}
        assert len(places) < 2 or "copy" not in str(function), f"{function} between {places}"
        return result


@contextmanager
def without_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the meta device lacks, and a watch over what it would let pass."""
    kinds = torch.Generator

    class Anywhere(kinds):  # type: ignore[misc, valid-type]
        def __new__(cls, device: object = "cpu") -> Any:
            return kinds.__new__(cls, "cpu")

    def refusing(make: Any) -> Any:
        def made(*args: Any, device: Any = "cpu", **options: Any) -> Any:
            assert torch.device(device or "cpu").type == "cpu", "a number is copied to the device"
            return make(*args, **options)

        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", Anywhere)
        patch.setattr(torch, "is_autocast_enabled", lambda kind: False)
        patch.setattr(torch, "tensor", refusing(torch.tensor))
        patch.setattr(torch, "as_tensor", refusing(torch.as_tensor))
        # Found once in a run, by comparing values.
        patch.setattr(folding, "_checked", lambda model, pairs, example: pairs)
        yield


# LAS-AT reads the largest number of steps that it drew: its docstring says so.
WATCHED = [name for name in METHODS.names() if name != "las-at"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "wrapped"])
@pytest.mark.parametrize("name", WATCHED)
def test_a_step_asks_for_no_value(
    name: str, wrapped: bool, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = {f"training.{key}": value for key, value in WRAPPED.items()} if wrapped else {}
    with without_values(monkeypatch):
        loop, batches = training("meta", brightness, name, around)
        next(batches)  # Brings the order of the images, once an epoch.
        with Copies():
            batch = next(batches)
            loop.totals.add(loop.train_step(batch), batch.step)
    assert loop.totals.counts["loss"] == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda image: image.sum().item(),
        lambda image: bool(image.sum() > 0),
        lambda image: image[image > 0],
        lambda image: image.sum(dim=(1, 2, 3)).tolist(),
        lambda image: image + torch.ones(1).to(image.device),
        lambda image: image * torch.tensor(2.0, device=image.device),
    ],
    ids=["item", "bool", "mask", "tolist", "copy", "number"],
)
def test_what_asks_is_noticed(
    ask: Any, brightness: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_values(monkeypatch), Copies(), pytest.raises(Exception):  # noqa: B017, PT011
        ask(brightness.to("meta").image.float())


@on_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["cure", "trades", "at"])
def test_a_step_does_not_wait_for_the_gpu(
    name: str, precision: str, compiled: bool, brightness: ImageSet
) -> None:
    around = {"training.precision": precision, "training.compile": compiled}
    loop, batches = training("cuda", brightness, name, around)
    for _ in range(3):  # Kernels are chosen, code is compiled and graphs are recorded.
        loop.train_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            loop.totals.add(loop.train_step(batch), batch.step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loop.totals.first_bad() is None
    assert loop.totals.counts["loss"] == 3


@on_gpu
@pytest.mark.parametrize("count", [10, 5_000, 300_000])
def test_the_threshold_on_a_gpu_is_that_on_a_processor(count: int) -> None:
    scores = torch.rand(count, generator=torch.Generator().manual_seed(0))
    for percent in (0.0, 30.0, 99.9):
        assert threshold(scores.cuda(), percent).cpu() == threshold(scores, percent)
    assert math.isnan(threshold(scores.cuda() * math.nan, 30.0))


@on_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_step_on_a_gpu_learns_what_a_step_on_a_processor_learns(
    compiled: bool, brightness: ImageSet
) -> None:
    # Without augmentation and noise, whose random numbers differ from device to device.
    around = {
        "data.augment": {"crop_padding": 0, "flip": False},
        "attack.start": "none",
        "training.compile": compiled,
    }
    losses = []
    for device in ("cpu", "cuda"):
        loop, batches = training(device, brightness, "cure", around)
        losses.append([loop.train_step(batch)["loss"].item() for batch in batches])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
