"""Random numbers without stored state: each draw has a key of seed, purpose and step.

A generator made from (seed, purpose, step) gives the same numbers whether the run reached that
step in one go or was killed and resumed, so no generator state is ever stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def derive(seed: int, *key: str | int) -> int:
    """A 63-bit seed that depends on every part of the key."""
    text = repr((seed, *key)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(device: torch.device | str, seed: int, *key: str | int) -> torch.Generator:
    """A fresh generator on ``device`` for one purpose, for example ``(seed, "attack", step)``."""
    return torch.Generator(device=device).manual_seed(derive(seed, *key))


class SharedGenerator(torch.Generator):
    """A generator that the ranks of a run have in the same state, for batches of which each rank
    has one of ``world`` equal parts; see :func:`draw_for_batch`.
    """

    rank = 0
    world = 1


def shared_generator(
    device: torch.device | str, rank: int, world: int, seed: int, *key: str | int
) -> torch.Generator:
    """What :func:`generator` gives, for rank number ``rank`` of ``world``."""
    if world == 1:
        return generator(device, seed, *key)
    shared = SharedGenerator(device=device)
    shared.manual_seed(derive(seed, *key))
    shared.rank, shared.world = rank, world
    return shared


def draw_for_batch(
    draw: Callable[[list[int]], Tensor],
    shape: Sequence[int],
    generator: torch.Generator,
    dim: int = 0,
) -> Tensor:
    """``draw(shape)`` for the samples at hand: the numbers do not depend on how many ranks there
    are.

    With a :class:`SharedGenerator` the numbers of the whole batch are drawn and those of this
    rank's part returned, so that the ranks together use what one process would use.

    Args:
        draw: makes a tensor of the shape it is given, from ``generator``.
        shape: of the samples at hand.
        generator: what ``draw`` draws from.
        dim: which dimension of ``shape`` counts the samples.
    """
    whole = list(shape)
    if not isinstance(generator, SharedGenerator):
        return draw(whole)
    whole[dim] *= generator.world
    return draw(whole).narrow(dim, generator.rank * shape[dim], shape[dim])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's global generators inside, and put them back afterwards."""
    # Where CUDA was not touched yet, only the processor's generator is seeded: seeding CUDA's
    # would outlive the block, and saving its state would start CUDA.
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if started else []
    with torch.random.fork_rng(devices=devices):
        if devices:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield
