"""Where bfloat16 is slower than float32, a user is told."""

from pathlib import Path

import pytest
import torch

import cure
from cure.utils import device
from cure.utils.device import Device, Precision, convolution_time

CPU = torch.device("cpu")


def taking(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """Time of bfloat16 over that of float32."""
    times = {torch.bfloat16: ratio, torch.float32: 1.0}
    monkeypatch.setattr(device, "convolution_time", times.__getitem__)


@pytest.mark.parametrize(
    ("precision", "ratio", "said"),
    [("bf16_attack", 16.0, True), ("bf16", 2.0, True), ("bf16", 0.6, False), ("fp32", 16.0, False)],
)
def test_bfloat16_without_instructions(
    precision: Precision, ratio: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking(monkeypatch, ratio)
    sentence = Device(CPU, precision).slow_precision()
    assert (sentence is not None) == said
    assert sentence is None or f"{ratio:.0f} times as long in bfloat16" in sentence


def test_a_convolution_is_timed() -> None:
    assert 0 < convolution_time(torch.float32) < 1


def test_training_and_evaluation_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taking(monkeypatch, 16.0)
    settings = {
        "start": "scratch",
        "data.limit": 64,
        "data.validation": 16,
        "training.batch_size": 16,
        "training.epochs": 1,
        "training.precision": "bf16_attack",
        "attack.steps": 1,
    }
    run = cure.train("digits", settings, run=tmp_path / "run")
    sentence = "16 times as long in bfloat16"
    assert f"training.precision: a convolution takes {sentence}" in capsys.readouterr().err
    asked = {"attacks": ["fgsm"], "limit": 8}
    result = cure.evaluate(run, precision="bf16_attack", **asked)
    assert any(sentence in note for note in result["notes"])
    assert not any(sentence in note for note in cure.evaluate(run, **asked)["notes"])
