"""Learning rates at points where they are known."""

from __future__ import annotations

import pytest

from cure.config import ScheduleConfig
from cure.training.schedule import rate_factor


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
