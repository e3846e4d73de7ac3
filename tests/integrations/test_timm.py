"""A task of the real timm around our methods: the same weights as in a loop of one's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cure
from cure.errors import ConfigError, ModelError
from cure.methods import Method
from cure.models import Normalised
from helpers import bright_or_dark

MEAN, STD, STEPS = (0.4,), (0.25,), 4
THREAT = cure.Threat("Linf", 0.1)


@pytest.fixture(scope="module")
def robust_task(timm: Any) -> Any:
    from cure.integrations.timm import RobustTask

    return RobustTask


def small(timm: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=3, in_chans=1)


def batches() -> list[tuple[Tensor, Tensor]]:
    images = bright_or_dark(STEPS * 12, classes=3)
    pixels = images.image / 255
    return list(zip(pixels.split(12), images.label.split(12), strict=True))


def standardised(image: Tensor) -> Tensor:
    return (image - MEAN[0]) / STD[0]


METHODS = {
    "trades": lambda model: cure.methods.TRADES(model, threat=THREAT, beta=3.0),
    "cure, frozen": lambda model: cure.methods.CURE(
        model,
        threat=THREAT,
        steps=STEPS,
        mask={"strict_freeze": True},
        revision={"rate": 1.0, "decay": 0.5},
    ),
    "averaged awp": lambda model: cure.methods.Averaging(
        cure.methods.AWP(cure.methods.AT(model, threat=THREAT), gamma=0.01), decay=0.5
    ),
}


def script(task: Any, optimizer: torch.optim.Optimizer, parts: Any) -> None:
    """The loop of timm's training script."""
    task.train()
    for image, label in parts:
        optimizer.zero_grad()
        result = task(standardised(image), label)
        result["loss"].backward()
        optimizer.step()


def by_hand(method: Method, optimizer: torch.optim.Optimizer) -> None:
    for image, label in batches():
        optimizer.zero_grad()
        image = (standardised(image) * method.model.std + method.model.mean).clamp(0, 1)
        method(image, label).loss.backward()
        with method.freeze(optimizer):
            optimizer.step()
        method.update()


def of_timm(timm: Any, network: nn.Module) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(network, opt="momentum", lr=0.05, weight_decay=0.01)


@pytest.mark.parametrize("name", METHODS)
def test_a_training_script_of_timm_ends_with_the_weights_of_an_own_loop(
    timm: Any, robust_task: Any, name: str
) -> None:
    networks = [small(timm) for _ in range(2)]
    assert all(map(torch.equal, *(n.state_dict().values() for n in networks)))
    methods = [METHODS[name](Normalised(network, MEAN, STD)) for network in networks]
    optimizers = [of_timm(timm, network) for network in networks]
    task = robust_task(methods[0], optimizers[0], verbose=False)
    script(task, optimizers[0], batches())
    by_hand(methods[1], optimizers[1])
    assert methods[0].progress.done == STEPS
    found = task.get_eval_model()
    expected = methods[1].inference_model().network
    assert not isinstance(found, Normalised)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key]), key
    if name == "averaged awp":
        assert found is not networks[0]
    else:
        assert found is task.get_trainable_module() is networks[0]
    image = batches()[0][0]
    with torch.no_grad():
        logits = methods[0].inference_model().eval()(image)
        torch.testing.assert_close(found.eval()(standardised(image)), logits)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_timm_resumes_to_the_same_weights(
    timm: Any, robust_task: Any, tmp_path: Path, name: str
) -> None:
    from timm.task import resume_task_checkpoint

    ended = []
    for cut in (STEPS, 2):
        network = small(timm)
        optimizer = of_timm(timm, network)
        task = robust_task(METHODS[name](Normalised(network, MEAN, STD)), optimizer, verbose=False)
        script(task, optimizer, batches()[:cut])
        if cut < STEPS:
            file = tmp_path / "last.pth.tar"
            state = {"epoch": 0, "version": 2, "optimizer": optimizer.state_dict()}
            torch.save(state | task.get_checkpoint_state(), file)
            network = small(timm, seed=1)
            optimizer = of_timm(timm, network)
            method = METHODS[name](Normalised(network, MEAN, STD))
            task = robust_task(method, optimizer, verbose=False)
            assert resume_task_checkpoint(task, str(file), optimizer, log_info=False) == 1
            assert method.progress.done == 2
            script(task, optimizer, batches()[cut:])
        ended.append(task.get_eval_model().state_dict())
    for key, tensor in ended[0].items():
        assert torch.equal(tensor, ended[1][key]), key


def test_images_that_are_not_standardised_and_several_processes_are_refused(
    timm: Any, robust_task: Any
) -> None:
    network = small(timm)
    optimizer = of_timm(timm, network)
    task = robust_task(METHODS["trades"](Normalised(network, MEAN, STD)), optimizer)
    image, label = batches()[0]
    with pytest.raises(ConfigError, match="standardise them in the loader"):
        task(image, label)
    with pytest.raises(ConfigError, match="one process"):
        task.prepare_distributed(device_ids=[0])
    plain = robust_task(METHODS["trades"](network), optimizer)
    with pytest.raises(ConfigError, match=r"expected images in \[0, 1\]"):
        plain(standardised(image), label)


def test_timms_own_average_takes_the_weights_after_the_step(timm: Any, robust_task: Any) -> None:
    """AWP perturbs weights during a step; an average of those would be wrong."""
    network = small(timm)
    optimizer = of_timm(timm, network)
    task = robust_task(
        cure.methods.AWP(cure.methods.AT(Normalised(network, MEAN, STD)), gamma=0.1), optimizer
    )
    task.setup_ema(decay=0.0)
    script(task, optimizer, batches()[:1])
    task.update_ema(step=1)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, task.get_eval_model(ema=True).module.state_dict()[key]), key


def test_a_missing_timm_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cure.integrations.timm", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.task", None)
    with pytest.raises(ModelError, match=r"needs timm 1.0.27 or newer .* pip install 'cure-at"):
        importlib.import_module("cure.integrations.timm")


def test_a_hub_folder_of_a_timm_network_loads_in_timm(
    timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``cure export --to hub`` of a network of timm: timm builds the same network from it."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    data = (pixels, ["bright" if number else "dark" for number in (torch.arange(40) % 2).tolist()])
    start = tmp_path / "start.pth"
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), start)
    settings = {
        "method": "natural",
        "start": "model",
        "model": "timm:test_resnet",
        "model.options": {"checkpoint_path": str(start)},
        "model.mean": [0.4] * 3,
        "model.std": [0.2] * 3,
        "data.validation": 10,
        "training.epochs": 1,
        "training.batch_size": 10,
        "training.threads": 1,
        "training.validation_steps": 1,
    }
    run = cure.train("digits", settings, run=tmp_path / "run", data=data, quiet=True)
    made = cure.export(run, "hub", tmp_path / "hub", data=data)
    expected = run.model()(pixels[:4] / 255).detach()
    start.unlink()  # as on another machine
    theirs = timm.create_model(f"local-dir:{made}", pretrained=True).eval()
    about = theirs.pretrained_cfg
    assert about["label_names"] == ["bright", "dark"]
    assert about["mean"] == pytest.approx([0.4] * 3)
    assert about["std"] == pytest.approx([0.2] * 3)
    assert tuple(about["input_size"]) == (3, 32, 32)
    with torch.no_grad():
        logits = theirs((pixels[:4] / 255 - 0.4) / 0.2)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cure.from_pretrained(made)(pixels[:4] / 255), logits)
