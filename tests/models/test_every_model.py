"""Every registered network goes through an attack and a step of CURE."""

from __future__ import annotations

import pytest
import torch

from cure.attacks import PGD, Threat
from cure.config import ModelConfig
from cure.data import Batch
from cure.methods import METHODS, Context
from cure.methods.cure import CureConfig
from cure.models import MODELS, build_model
from cure.models.trial import fitted
from cure.utils.engine import Engine

SMALLEST: dict[str, dict[str, object]] = {
    "resnet10": {"width": 4},
    "wide_resnet": {"depth": 10, "width": 1},
    "vit": {"dim": 24, "depth": 2, "heads": 2},
    "densenet121": {"growth": 8},
}

# At 32 pixels its last layers have one pixel: outer weights of kernels then have no gradient.
SIZES = {"efficientnet_lite0": 96}


@pytest.mark.parametrize("name", MODELS.names())
def test_a_cure_step_reaches_every_weight_and_stays_in_the_ball(name: str) -> None:
    config = ModelConfig(name=name, options=SMALLEST.get(name, {}))
    side = SIZES.get(name, 32)
    model = build_model(config, classes=5, channels=3, size=(side, side), seed=0)
    attack = PGD(Threat("Linf", 8 / 255), steps=1, step_size=2 / 255)
    engine = fitted(Engine(torch.device("cpu"), channels_last=True), model)
    context = Context(engine, attack, 0, 5, 10, 10, 10)
    method = METHODS["cure"](engine.place(model), CureConfig(), context)
    draws = torch.Generator().manual_seed(0)
    image = engine.arrange(torch.rand(3, 3, side, side, generator=draws))
    batch = Batch(image, torch.tensor([0, 3, 4]), torch.arange(3), 0)

    out = method.step(batch)

    assert out.grads is not None
    assert out.grads.keys() == dict(model.named_parameters()).keys()
    assert all(bool(gradient.isfinite().all()) for gradient in out.grads.values())
    silent = [name for name, gradient in out.grads.items() if not gradient.any()]
    assert not silent, "a tensor without any gradient would never learn"
    share = out.metrics["conserved"].item()
    # Thirty per cent of each tensor, a little less where ties are updated.
    assert 0.15 < share < 0.31
    assert all(module.training for module in model.modules())
