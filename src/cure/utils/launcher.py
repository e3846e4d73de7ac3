"""Rank and world size, as a launcher such as ``torchrun`` sets them in the environment.

Read from the environment alone, so that a command can know it without importing PyTorch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cure.errors import ConfigError

WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """A process among those that train together.

    Attributes:
        rank: its number, 0 the first; only that one writes and prints.
        world: how many there are.
        local: its number on its machine, which is that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0


def launched() -> Launch:
    """Rank and world size of this process; rank 0 of 1 without a launcher.

    Raises:
        ConfigError: when the description is incomplete or makes no sense.
    """
    given = {word: os.environ[word] for word in WORDS if os.environ.get(word)}
    # Schedulers set some of these words for a single process, too.
    if given.get("WORLD_SIZE", "1") == "1":
        return Launch()
    missing = [word for word in WORDS if word not in given]
    try:
        launch = Launch(*(int(given.get(word, "0")) for word in WORDS[:3]))
    except ValueError:
        launch = Launch(rank=-1)
    if missing or not 0 <= launch.rank < launch.world:
        came = ", ".join(f"{word}={value}" for word, value in given.items())
        raise ConfigError(
            f"expected the environment of a launcher ({', '.join(WORDS)}), got {came}; start with "
            "`torchrun --nproc-per-node N -m cure train ...`, or unset WORLD_SIZE"
        )
    return launch
