"""On what a number was computed: versions of packages, hardware, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cure.utils.version import VERSION


def environment() -> dict[str, Any]:
    """Versions, hardware and command of this process, so that a number can be reproduced.

    Returns:
        ``cure`` and ``commit`` (version of the package), ``python``, ``packages`` (versions),
        ``platform``, ``processor``, ``cores``, ``threads``, ``gpu`` (name or None), ``command``,
        ``time`` (UTC, ISO 8601).
    """
    import torch

    # Its own version names the build (+cpu, +cu130), which the package's may leave out.
    packages = {"torch": str(torch.__version__)}
    for package in ("numpy", "datasets", "safetensors", "pyautoattack"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "cure": VERSION,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": packages,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": _command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _command() -> str:
    """The command line; of absolute paths only the last part, which names no place on a machine."""
    script = Path(sys.argv[0]).name
    # A script of the user's, or `cure` by whichever of its entries.
    name = script if script.endswith(".py") and script != "__main__.py" else "cure"
    return " ".join([name, *map(_placeless, sys.argv[1:])])


def _placeless(word: str) -> str:
    """A word of the command line; ``data.source=/home/me/photos`` is ``data.source=photos``."""
    if Path(word).is_absolute():
        return Path(word).name
    key, equals, value = word.partition("=")
    return f"{key}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def _commit() -> str | None:
    """The commit of the source tree, when the package runs from a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
