"""Our methods in the real Lightning: the same weights as in a loop of one's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cure
from cure.errors import ConfigError, ModelError
from cure.methods import Method
from helpers import bright_or_dark

EPOCHS, STEPS = 2, 3
THREAT = cure.Threat("Linf", 0.1)

METHODS = {
    "trades": lambda model: cure.methods.TRADES(model, threat=THREAT, beta=3.0),
    "cure, frozen": lambda model: cure.methods.CURE(
        model,
        threat=THREAT,
        steps=EPOCHS * STEPS,
        mask={"strict_freeze": True},
        revision={"rate": 1.0, "decay": 0.5},
    ),
    "averaged awp": lambda model: cure.methods.Averaging(
        cure.methods.AWP(cure.methods.AT(model, threat=THREAT), gamma=0.01), decay=0.5
    ),
    "fat": lambda model: cure.methods.FAT(
        model, threat=THREAT, steps=EPOCHS * STEPS, epochs=EPOCHS, tau_rises=[0.5]
    ),
}


@pytest.fixture(scope="module")
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))


def loader() -> DataLoader[Any]:
    images = bright_or_dark(STEPS * 12, classes=3)
    return DataLoader(TensorDataset(images.image / 255, images.label), batch_size=12)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01)


def module(method: Method, **more: Any) -> Any:
    from cure.integrations.lightning import RobustModule

    return RobustModule(method, sgd, **more)


def trainer(lightning: Any, folder: Path, epochs: int = EPOCHS, **more: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **({"enable_checkpointing": False} | more),
    )


def by_hand(method: Method, batches: int = 1, clip: float = 0.0) -> None:
    optimizer = sgd(list(method.trainable().values()))
    for _ in range(EPOCHS):
        parts = list(loader())
        for first in range(0, len(parts), batches):
            optimizer.zero_grad()
            for image, label in parts[first : first + batches]:
                (method(image, label).loss / batches).backward()
            if clip:
                nn.utils.clip_grad_norm_(list(method.trainable().values()), clip)
            with method.freeze(optimizer):
                optimizer.step()
            method.update()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_lightning_ends_with_the_weights_of_an_own_loop(
    lightning: Any, tmp_path: Path, name: str
) -> None:
    ours, theirs = (METHODS[name](small()) for _ in range(2))
    by_hand(ours)
    fitted = module(theirs, attack=cure.attacks.PGD(THREAT, steps=2))
    # Validation first and between epochs leaves the training as it is.
    trainer(lightning, tmp_path).fit(fitted, loader(), loader())
    assert theirs.progress.done == EPOCHS * STEPS
    assert_same(theirs.inference_model(), ours.inference_model())
    assert_same(theirs.model, ours.model)


def test_accumulation_and_clipping_are_those_of_the_trainer(lightning: Any, tmp_path: Path) -> None:
    ours, theirs = (METHODS["trades"](small()) for _ in range(2))
    by_hand(ours, batches=3, clip=0.1)
    trainer(lightning, tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.1).fit(
        module(theirs), loader()
    )
    assert theirs.progress.done == EPOCHS
    assert_same(theirs.model, ours.model)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_lightning_goes_on_to_the_same_weights(
    lightning: Any, tmp_path: Path, name: str
) -> None:
    whole, first, second = (METHODS[name](small(seed)) for seed in (0, 0, 1))
    by_hand(whole)
    stopped = trainer(lightning, tmp_path, epochs=1, enable_checkpointing=True)
    stopped.fit(module(first), loader())
    stopped.save_checkpoint(tmp_path / "one.ckpt")
    trainer(lightning, tmp_path).fit(module(second), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert second.progress.done == EPOCHS * STEPS
    assert_same(second.inference_model(), whole.inference_model())


def test_validation_logs_accuracy_with_and_without_the_attack(
    lightning: Any, tmp_path: Path
) -> None:
    attack = cure.attacks.PGD(THREAT, steps=5)
    method = METHODS["averaged awp"](small())
    fitted = module(method, attack=attack)
    running = trainer(lightning, tmp_path)
    running.fit(fitted, loader(), loader())
    network = method.inference_model().eval()

    def accuracy(change: Any) -> float:
        right = [(network(change(x, y)).argmax(1) == y).float() for x, y in loader()]
        return 100 * float(torch.cat(right).mean())

    def attacked(image: Tensor, label: Tensor) -> Tensor:
        return attack(network, image, label)

    found = {name: float(value) for name, value in running.callback_metrics.items()}
    assert found["val_natural"] == pytest.approx(accuracy(lambda image, label: image))
    assert found["val_robust"] == pytest.approx(accuracy(attacked))
    assert found["val_robust"] < found["val_natural"]
    assert found["train_loss"] > 0
    predicted = running.predict(fitted, loader())
    with torch.no_grad():
        assert torch.equal(torch.cat(predicted), torch.cat([network(x) for x, _ in loader()]))


def test_a_schedule_moves_the_learning_rate(lightning: Any, tmp_path: Path) -> None:
    fitted = module(
        METHODS["trades"](small()),
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    running = trainer(lightning, tmp_path)
    running.fit(fitted, loader())
    assert running.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.25)


def test_several_processes_are_refused(lightning: Any) -> None:
    fitted = module(METHODS["trades"](small()))
    fitted._trainer = type("Trainer", (), {"world_size": 2})()
    with pytest.raises(ConfigError, match="expected one process, got 2"):
        fitted.on_fit_start()


def test_a_missing_lightning_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cure.integrations.lightning", raising=False)
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"needs lightning .* pip install 'cure-at\[lightning\]'"):
        importlib.import_module("cure.integrations.lightning")
