"""Every method, alone and wrapped, through the trainer: stopped anywhere, it ends with its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined
from safetensors.torch import load_file

import cure
from cure.config import ModelConfig, Section, TeacherConfig
from cure.data import ImageSet
from cure.errors import Interrupted
from cure.methods import METHODS
from cure.training.trainer import Trainer

QUICK: dict[str, Any] = {
    "model": {"name": "small_cnn", "options": {"width": 2}},
    "data.validation": 20,
    "data.augment": {"crop_padding": 1},
    "attack.steps": 2,
    "training.epochs": 2,
    "training.batch_size": 16,
    "training.validation_steps": 1,
    "training.checkpoint_every": 1,
    "training.collapse_patience": 100,
    "natural.epochs": 1,
}
WRAPPED = {
    "weight_perturbation": {"gamma": 0.01},
    "averaging": {"kind": "equal", "every": "epoch", "batch_norm": "recomputed"},
}


def small(section: type[Section]) -> dict[str, Any]:
    """A natural teacher and small networks wherever the settings of a method ask for some."""
    found: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        kind = field.annotation
        if kind is TeacherConfig and field.default is PydanticUndefined:
            found[key] = "natural"
        elif kind is ModelConfig:
            found[key] = QUICK["model"]
        elif isinstance(kind, type) and issubclass(kind, Section) and (inner := small(kind)):
            found[key] = inner
    return found


CASES = [(name, None) for name in METHODS.names()] + [
    (name, WRAPPED) for name in METHODS.names() if name != "natural"
]


@pytest.mark.parametrize(
    ("name", "wrapped"), CASES, ids=[f"{n}{'-wrapped' if w else ''}" for n, w in CASES]
)
def test_a_stopped_run_ends_with_its_bits(
    name: str,
    wrapped: dict[str, Any] | None,
    brightness: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = {"name": name, **small(METHODS[name].Config)}
    around = {f"training.{key}": value for key, value in (wrapped or {}).items()}
    settings = {**QUICK, **around, "method": method}
    # Starts from the natural network, and learns.
    whole = cure.train("digits", settings, run=tmp_path / "whole", data=brightness, quiet=True)
    first = load_file(whole.path / "natural" / "checkpoints" / "best.safetensors")
    assert "perturbed_loss" not in (whole.path / "natural" / "metrics.jsonl").read_text()
    ends = load_file(whole.path / "checkpoints" / "last.safetensors")
    assert any((ends[key] != value).any() for key, value in first.items())

    original = Trainer.train_step

    def stopping(self: Trainer, given: Any) -> Any:
        # Step 6 is the third of epoch 2.
        self._stop_asked = given.step == 6 and self.folder.path.name == "cut"
        return original(self, given)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(Interrupted):
        cure.train("digits", settings, run=tmp_path / "cut", data=brightness, quiet=True)
    monkeypatch.setattr(Trainer, "train_step", original)
    cure.resume(tmp_path / "cut", data=brightness, quiet=True)
    for file in ("best", "last"):
        one, other = (
            load_file(path / "checkpoints" / f"{file}.safetensors")
            for path in (whole.path, tmp_path / "cut")
        )
        assert one.keys() == other.keys()
        assert all((value == other[key]).all() for key, value in one.items())
    metrics = [(path / "metrics.jsonl").read_text() for path in (whole.path, tmp_path / "cut")]
    assert metrics[0] == metrics[1]
