"""Chance without state: every draw is keyed by what it is for and when it happens.

A generator made from (seed, purpose, step) gives the same numbers whether the run reached that
step in one go or was killed and resumed, so no generator state is ever stored.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *key: str | int) -> int:
    """A 63-bit seed that depends on every part of the key."""
    text = repr((seed, *key)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(device: torch.device | str, seed: int, *key: str | int) -> torch.Generator:
    """A fresh generator on ``device`` for one purpose, for example ``(seed, "attack", step)``."""
    return torch.Generator(device=device).manual_seed(derive(seed, *key))
