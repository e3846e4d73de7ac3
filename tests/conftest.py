"""Small things that many tests need."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from cure.cli.main import main
from cure.data import ImageSet
from helpers import Command, Ended, bright_or_dark


@pytest.fixture
def brightness() -> ImageSet:
    """96 training images of two classes."""
    return bright_or_dark()


# Here and not first in a test: fixtures of a module are made before those of a test, and what they
# train depends on the number of threads. Processes that tests start take it from the environment.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests share a small machine, and some set the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``cure WORDS`` in this process, which saves importing PyTorch again."""

    def run(*words: object) -> Ended:
        capsys.readouterr()
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["cure", *map(str, words)])
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return Ended(status, *capsys.readouterr())

    return run
