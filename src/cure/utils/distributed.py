"""Where computing happens: device, precision, ranks, gradients.

A method asks the engine for gradients and never calls ``backward``; what several processes must
agree on is averaged here, before a method scores it.

The model is not wrapped: ``DistributedDataParallel`` averages what ``backward`` accumulates, and
leaves ``torch.autograd.grad`` and a second backward pass alone.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cure.config import TrainingConfig
from cure.errors import ConfigError, CureError, RanksLost
from cure.utils.launcher import Launch, launched
from cure.utils.random import generator

Grads = dict[str, Tensor]
Value = TypeVar("Value")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others.  A process that dies closes its connections, which is
noticed at once; this ends the wait for a machine that vanished, and must exceed the time by which
one rank may rightly be later than another (reading its data, a longer share of the validation)."""

PATIENCE_WITH_ATTACKS = timedelta(days=1)
"""The same for an evaluation: AutoAttack on one batch can take hours on a processor."""


def pick_device(name: str, launch: Launch | None = None) -> torch.device:
    """The device called ``name``; "auto" is CUDA when there is one.

    Args:
        name: "auto", or a device of PyTorch.
        launch: which of several ranks this is: each takes the GPU of its number on its machine.

    Raises:
        ConfigError: when the name means nothing or the device is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if launch is not None and launch.world > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(
                f"training.device: '{name}' would be the device of every rank; say cuda, and each "
                "rank takes one of its own"
            )
        if launch.local >= torch.cuda.device_count():
            raise ConfigError(
                f"expected a GPU for each rank, got {torch.cuda.device_count()} for rank number "
                f"{launch.local} of this machine; lower --nproc-per-node"
            )
        name = f"cuda:{launch.local}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"training.device: '{name}' cannot be used here ({first}); say auto or cpu"
        ) from None
    return device


@dataclass
class Traffic:
    """What this process handed to the others so far.

    Attributes:
        calls: exchanges of tensors.
        bytes: size of these tensors; a ring of N processes sends 2 (N - 1) / N times as much.
    """

    calls: int = 0
    bytes: int = 0


@contextmanager
def _contact(rank: int) -> Iterator[None]:
    """Say in a sentence that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RanksLost(
            f"rank {rank} lost another rank ({str(error).splitlines()[0]}); what that rank said "
            "tells why; then continue with `cure resume RUN`, or repeat `cure evaluate`"
        ) from error


def join(device: torch.device, launch: Launch, patience: timedelta = PATIENCE) -> None:
    """Meet the other ranks: gloo on processors, NCCL on GPUs.

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
    """Part from the other ranks, when there are any, after the last of them has come here."""
    if dist.is_initialized():
        with _contact(dist.get_rank()):
            dist.all_reduce(torch.zeros(1))
            dist.destroy_process_group()


@dataclass(frozen=True)
class Engine:
    """Device, precision and ranks of a run, and the only way to a gradient.

    Attributes:
        device: where tensors live.
        precision: "fp32", "bf16_attack" or "bf16" (see ``training.precision``).
        channels_last: whether images are stored with the channel innermost.
        rank: number of this process among those that train together, 0 the first.
        world: how many these are; each has an equal part of every batch.
        traffic: what this process handed to the others.
    """

    device: torch.device
    precision: Literal["fp32", "bf16_attack", "bf16"] = "fp32"
    channels_last: bool = False
    rank: int = 0
    world: int = 1
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @classmethod
    def of(cls, training: TrainingConfig) -> Engine:
        """The engine that a training section describes; sets threads and determinism.

        Under a launcher such as ``torchrun`` it meets the other ranks.

        Raises:
            ConfigError: when the device is not on this machine, or the ranks cannot share the
                batches evenly.
            RanksLost: when the other ranks do not come.
        """
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        launch = launched()
        device = pick_device(training.device, launch)
        join(device, launch)
        if device.type == "cuda":
            if training.deterministic:
                # Read when cuBLAS is first used; without it, its products need not repeat.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(training.deterministic, warn_only=True)
            torch.backends.cudnn.benchmark = not training.deterministic
        engine = cls(device, training.precision, training.channels_last, launch.rank, launch.world)
        engine.check_batch(training.batch_size)
        return engine

    @classmethod
    def for_evaluation(
        cls, device: str, precision: Literal["fp32", "bf16_attack"] = "fp32"
    ) -> Engine:
        """The engine of an evaluation: in the layout that is fastest, with all ranks.

        Args:
            device: a device of PyTorch, or "auto".
            precision: of the attacks; what they find is judged in float32.

        Raises:
            ConfigError: when the device is not on this machine or the precision is unknown.
            RanksLost: when the other ranks do not come.
        """
        if precision not in ("fp32", "bf16_attack"):
            raise ConfigError(f"precision: expected fp32 or bf16_attack, got '{precision}'")
        launch = launched()
        picked = pick_device(device, launch)
        join(picked, launch, PATIENCE_WITH_ATTACKS)
        return cls(picked, precision, True, launch.rank, launch.world)

    def check_batch(self, size: int) -> None:
        """Refuse a batch of ``size`` images that the ranks cannot share evenly.

        Raises:
            ConfigError: in one sentence.
        """
        if size % self.world:
            nearest = max(1, size // self.world) * self.world
            raise ConfigError(
                f"training.batch_size: expected a multiple of the {self.world} ranks that share "
                f"each batch, got {size}; say {nearest} or {nearest + self.world}"
            )

    def training_precision(self) -> AbstractContextManager[object]:
        """Context of the forward passes whose gradients train the weights."""
        return self._autocast(self.precision == "bf16")

    def attack_precision(self) -> AbstractContextManager[object]:
        """Context of the attack's passes."""
        return self._autocast(self.precision != "fp32")

    def _autocast(self, lower: bool) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if lower else nullcontext()

    def place(self, module: nn.Module) -> nn.Module:
        """``module`` on the device, in the run's memory layout."""
        module = module.to(self.device)
        if self.channels_last:
            # A tensor layout for four dimensions; parameters of other shapes stay as they are.
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def arrange(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] in the run's memory layout."""
        if self.channels_last:
            return image.contiguous(memory_format=torch.channels_last)
        return image

    def logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """Logits [B, K] of ``model`` in training precision, returned in the image's own type."""
        with self.training_precision():
            return model(image).to(image.dtype)  # type: ignore[no-any-return]

    def gradients(
        self, loss: Tensor, parameters: Mapping[str, Tensor], retain: bool = False
    ) -> Grads:
        """Gradient of a 0-dim ``loss`` by parameter name; zero where the loss does not depend.

        With several ranks it is the mean of theirs: the gradient of the mean over the whole batch,
        the same bits on every rank.

        Args:
            loss: mean over the samples at hand.
            parameters: what to differentiate by.
            retain: keep the graph for another call.
        """
        grads = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=retain, allow_unused=True
        )
        found = {
            name: torch.zeros_like(parameter) if grad is None else grad
            for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
        }
        if self.world == 1:
            return found
        return dict(zip(found, self.average(found.values(), parameters.values()), strict=True))

    # -- ranks ---------------------------------------------------------------------------------

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
        """Whether it is so on any rank.  No rank goes on before all have asked."""
        return bool(self.largest(float(here))[0])

    def _together(self, how: dist.ReduceOp.RedOpType, numbers: Sequence[float]) -> list[float]:
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        self._exchange(functools.partial(dist.all_reduce, op=how), values)
        return values.tolist()

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the first one's values of these tensors, in place."""
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
        """When a rank raises a :class:`CureError` inside, every rank raises it at the end.

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
        """The plain value that each rank gives, in their order.

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
        """What ``make`` returns on the first rank, on every rank; only there it is called.

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

    # -- the rest ------------------------------------------------------------------------------

    def generator(self, seed: int, *key: str | int) -> torch.Generator:
        """A generator on this device, keyed by purpose and step."""
        return generator(self.device, seed, *key)

    def peak_memory(self) -> float:
        """The most memory used so far, in MiB: by tensors on a GPU, by the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if sys.platform == "linux":
            # Not getrusage, which a process that was begun by a larger one inherits from it.
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            return next(int(line.split()[1]) / 2**10 for line in lines if "VmHWM" in line)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
