"""What Python functions say of an argument of another kind: one sentence, as a command would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cure
from cure.errors import CureError

NETWORK = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
IMAGES = (torch.rand(4, 1, 8, 8), torch.arange(4))
CALLS: dict[str, Callable[[Any], Any]] = {
    "Run": cure.Run,
    "train": cure.train,
    "train, run": lambda given: cure.train("digits", ["method=at"], run=given, quiet=True),
    "resume": cure.resume,
    "load_recipe": cure.load_recipe,
    "compare": cure.compare,
    "compare several": lambda given: cure.compare([given]),
    "recommend": cure.recommend,
    "tradeoff": cure.tradeoff,
    "write_report": cure.write_report,
    "write_evidence": cure.write_evidence,
    "evaluate": cure.evaluate,
    "output": lambda given: cure.evaluate(NETWORK, data=IMAGES, output=given),
    "attacks": lambda given: cure.evaluate(NETWORK, data=IMAGES, attacks=given),
    "one attack": lambda given: cure.evaluate(NETWORK, data=IMAGES, attacks=[given]),
    "methods": lambda given: cure.front(given, "digits"),
    "attacks of a front": lambda given: cure.front("at", "digits", attacks=given),
    "recipe of a front": lambda given: cure.front("at", given),
    "export": lambda given: cure.export(given, "safetensors", "exported"),
    "folder": lambda given: cure.export(NETWORK, "safetensors", given, data=IMAGES),
    "diagnose": cure.diagnose,
    "verify": lambda given: cure.verify(given, NETWORK),
    "from_pretrained": cure.from_pretrained,
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_another_kind_is_refused_in_a_sentence(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CureError, match=r"expected .* got (3|int)\b"):
        CALLS[call](3)
    assert not list(tmp_path.iterdir())


def test_settings_in_the_place_of_a_recipe_are_refused() -> None:
    with pytest.raises(CureError, match=r"expected a path, got \{'method': 'at'\}"):
        cure.train({"method": "at"})  # type: ignore[arg-type]


def test_images_of_one_class_are_not_trained_on() -> None:
    one = (torch.rand(20, 1, 8, 8), torch.ones(20, dtype=torch.long))
    settings = ["start=scratch", "data.validation=4", "training.batch_size=4"]
    with pytest.raises(CureError, match="at least two classes to train on, got only '1'"):
        cure.train("digits", settings, data=one, run="runs/one", quiet=True)


def test_text_is_a_path_of_a_run() -> None:
    assert cure.Run("runs/one") == cure.Run(Path("runs/one"))  # type: ignore[arg-type]
