"""Writes what ``make soak`` found."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from tally import COUNTS, SOAK

STARTED = time.monotonic()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep the counts where CURE_SOAK_OUTPUT says."""
    output = os.environ.get("CURE_SOAK_OUTPUT")
    if not SOAK or not output or not COUNTS:
        return
    from cure.utils.environment import environment
    from cure.utils.io import write_json

    seed = session.config.getoption("--hypothesis-seed")
    found: dict[str, Any] = {kind: dict(sorted(counts.items())) for kind, counts in COUNTS.items()}
    found |= {
        "share": SOAK,
        "seed": seed,
        "failed_tests": session.testsfailed,
        "seconds": round(time.monotonic() - STARTED, 1),
        "environment": environment() | {"command": f"make soak SHARE={SOAK:g} SEED={seed}"},
    }
    write_json(Path(output), found)
