"""Learning rates at points where they are known."""

from __future__ import annotations

import math

import pytest
import torch

from cure.config import ScheduleConfig, TrainingConfig
from cure.training.schedule import learning_rate, momentum, rate_factor


@pytest.mark.parametrize(
    ("settings", "progress", "factor"),
    [
        ({"name": "constant"}, 0.9, 1.0),
        ({"name": "piecewise"}, 0.0, 1.0),
        ({"name": "piecewise"}, 99.99 / 200, 1.0),
        ({"name": "piecewise"}, 100 / 200, 0.1),
        ({"name": "piecewise"}, 150 / 200, 0.01),
        ({"name": "piecewise", "milestones": [0.3], "factor": 0.2}, 0.3, 0.2),
        ({"name": "cosine"}, 0.0, 1.0),
        ({"name": "cosine"}, 1 / 3, 0.75),
        ({"name": "cosine"}, 0.5, 0.5),
        ({"name": "cosine", "warmup": 0.2}, 0.1, 0.5),
        ({"name": "cosine", "warmup": 0.2}, 0.6, 0.5),
        ({"name": "one_cycle"}, 0.0, 0.0),
        ({"name": "one_cycle"}, 0.125, 0.5),
        ({"name": "one_cycle"}, 0.25, 1.0),
        ({"name": "one_cycle"}, 0.625, 0.5),
    ],
)
def test_known_points(settings: dict[str, object], progress: float, factor: float) -> None:
    schedule = ScheduleConfig.model_validate(settings)
    assert rate_factor(schedule, progress) == pytest.approx(factor)


def test_one_cycle_by_cosines_is_pytorch_s() -> None:
    """HAT's: peak 0.21 at a quarter, momentum 0.95 to 0.85; equal to a step of 2,000."""
    total = 2000
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.21, momentum=0.9, nesterov=True)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.21, total_steps=total, pct_start=0.25)
    training = TrainingConfig.model_validate(
        {"optimizer": {"learning_rate": 0.21}, "schedule": "one_cycle_cosine"}
    )
    for step in range(total - 1):
        group = optimizer.param_groups[0]
        rate, ours = learning_rate(training, step / total), momentum(training, step / total)
        assert rate == pytest.approx(group["lr"], abs=0.21 * 4 * math.pi / total)
        assert ours == pytest.approx(group["momentum"], abs=0.1 * 4 * math.pi / total)
        optimizer.step()
        theirs.step()
    assert learning_rate(training, 0.0) == pytest.approx(0.21 / 25)
    assert learning_rate(training, 0.25) == 0.21
    assert momentum(training, 0.25) == 0.85
    assert learning_rate(training, 0.125) == pytest.approx(0.21 * (1 + 1 / 25) / 2)


def test_other_schedules_leave_the_momentum() -> None:
    for name in ("constant", "piecewise", "cosine", "one_cycle"):
        training = TrainingConfig.model_validate({"schedule": name})
        assert momentum(training, 0.3) == training.optimizer.momentum
