"""Collective operations of the processes that train together (gloo on processors, NCCL on GPUs)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cure.errors import CureError, RanksLost
from cure.utils.io import first_line
from cure.utils.launcher import Launch

Value = TypeVar("Value")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others.  A process that dies closes its connections, which is
noticed at once; this ends the wait for a machine that vanished, and must exceed the time by which
one rank may rightly be later than another (reading its data, a longer share of the validation)."""

PATIENCE_WITH_ATTACKS = timedelta(days=1)
"""The same for an evaluation: AutoAttack on one batch can take hours on a processor."""


@dataclass
class Traffic:
    """Number and size of the exchanges of this process so far.

    Attributes:
        calls: number of exchanges of tensors.
        bytes: size of these tensors; a ring of N processes sends 2 (N - 1) / N times as much.
    """

    calls: int = 0
    bytes: int = 0


@contextmanager
def _contact(rank: int) -> Iterator[None]:
    """Turn an error of a collective operation into one sentence: another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RanksLost(
            f"rank {rank} lost another rank ({first_line(error)}); what that rank said "
            "tells why; then continue with `cure resume RUN`, or repeat `cure evaluate`"
        ) from error


def join(device: torch.device, launch: Launch, patience: timedelta = PATIENCE) -> None:
    """Join the process group: gloo on processors, NCCL on GPUs.

    Args:
        device: of this rank.
        launch: which rank it is.
        patience: how long it waits for the others, then and later.

    Raises:
        RanksLost: when they do not come.
    """
    if launch.world == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Numbers that the host decides by go through gloo also on GPUs, so that it waits for no device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _contact(launch.rank):
        dist.init_process_group(
            backend, timeout=patience, rank=launch.rank, world_size=launch.world
        )


def leave() -> None:
    """Leave the process group, if there is one; blocks until every rank has called it."""
    if dist.is_initialized():
        with _contact(dist.get_rank()):
            dist.all_reduce(torch.zeros(1))
            dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and their collective operations.

    Attributes:
        rank: number of this process, 0 the first.
        world: how many there are; each has an equal part of every batch.
        traffic: number and size of the exchanges of this process so far.
    """

    rank: int = 0
    world: int = 1
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def average(
        self, values: Iterable[Tensor], layouts: Iterable[Tensor] | None = None
    ) -> list[Tensor]:
        """The mean of each tensor over the ranks, in one exchange for each type of number.

        Args:
            values: floating, the same shapes and types in the same order on every rank.
            layouts: tensors of these shapes in whose memory layout the means are returned; by
                default the values themselves.  It must be the same on every rank.

        Raises:
            RanksLost: when a rank is gone.
        """
        values = list(values)
        if self.world == 1:
            return values
        shapes = values if layouts is None else list(layouts)
        means = list(values)
        for kind in dict.fromkeys(value.dtype for value in values):
            places = [place for place, value in enumerate(values) if value.dtype == kind]
            flat, parts = _one_vector([shapes[place] for place in places])
            torch._foreach_copy_(parts, [values[place] for place in places])
            self._exchange(dist.all_reduce, flat)
            flat.div_(self.world)
            for place, part in zip(places, parts, strict=True):
                means[place] = part
        return means

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of each named number over the ranks, whose parts of a batch are equally large.

        Raises:
            RanksLost: when a rank is gone.
        """
        return dict(zip(values, self.average(values.values()), strict=True))

    def sums(self, *numbers: float) -> list[float]:
        """The sum of each number over the ranks; exact for whole numbers below 2^53."""
        return self._together(dist.ReduceOp.SUM, numbers)

    def total(self, counts: Tensor) -> Tensor:
        """The sum of a tensor of whole numbers over the ranks.

        Raises:
            RanksLost: when a rank is gone.
        """
        if self.world > 1:
            counts = counts.clone()
            self._exchange(dist.all_reduce, counts)
        return counts

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over the ranks."""
        return self._together(dist.ReduceOp.MAX, numbers)

    def any(self, here: bool) -> bool:
        """Logical OR across ranks; blocks until every rank has called it."""
        return bool(self.largest(float(here))[0])

    def _together(self, how: dist.ReduceOp.RedOpType, numbers: Sequence[float]) -> list[float]:
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        self._exchange(functools.partial(dist.all_reduce, op=how), values)
        return values.tolist()

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast the tensors of the first rank to all ranks, in place."""
        if self.world == 1:
            return
        tensors = list(tensors)
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            ours = [tensor for tensor in tensors if tensor.dtype == kind]
            flat, parts = _one_vector(ours)
            torch._foreach_copy_(parts, ours)
            self._exchange(functools.partial(dist.broadcast, src=0), flat)
            torch._foreach_copy_(ours, parts)

    def _exchange(self, how: Callable[[Tensor], object], what: Tensor) -> None:
        self.traffic.calls += 1
        self.traffic.bytes += what.nbytes
        with _contact(self.rank):
            how(what)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise a :class:`CureError` that one rank raises inside on every rank at the end.

        Without it, the others would wait for a rank that has ended.  Not for what itself waits for
        other ranks.

        Raises:
            CureError: that of the first rank that has one.
        """
        if self.world == 1:
            yield
            return
        own: CureError | None = None
        try:
            yield
        except RanksLost:
            raise
        except CureError as error:
            own = error
        told = self.gather(None if own is None else (type(own), str(own)))
        if own is not None:
            raise own
        for kind, text in filter(None, told):
            raise kind(text)

    def gather(self, here: Value) -> list[Value]:
        """The values of all ranks, in the order of the ranks.

        Raises:
            RanksLost: when a rank is gone.
        """
        if self.world == 1:
            return [here]
        values = [here] * self.world
        with _contact(self.rank):
            dist.all_gather_object(values, here)
        return values

    def first(self, make: Callable[[], Value]) -> Value:
        """Call ``make`` on the first rank only, and return its result on every rank.

        Raises:
            CureError: on every rank, what ``make`` raised.
        """
        if self.world == 1:
            return make()
        box: list[Value | None] = [None]
        with self.agreeing():
            if self.rank == 0:
                box[0] = make()
        with _contact(self.rank):
            dist.broadcast_object_list(box, 0)
        return box[0]  # type: ignore[return-value]


def _one_vector(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """An empty vector for all the numbers of tensors of one type, and a view for each of them.

    A view has the memory layout of its tensor where that has no gaps, so that an optimiser meets
    weights and gradients in the same order.
    """
    sizes = [tensor.numel() for tensor in tensors]
    flat = tensors[0].new_empty(sum(sizes))
    views = []
    for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
        innermost = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        if innermost and not tensor.is_contiguous():
            views.append(part.as_strided(tensor.shape, tensor.stride()))
        else:
            views.append(part.view(tensor.shape))
    return flat, views
