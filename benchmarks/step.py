"""What a training step costs: sides that do the same, timed in turn in one process."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cure.attacks import PGD, Threat
from cure.config import ModelConfig
from cure.data import Batch
from cure.methods import METHODS, AdversarialBatch, Context, Method
from cure.methods.cure import rgp_mask
from cure.models import build_model
from cure.models.trial import fitted
from cure.utils.engine import Engine
from cure.utils.memory import keep_freed_memory
from yardstick import PlainResNet, Yardstick

YARDSTICK = "yardstick"
SIDES = {
    "exact": ("cure", "fp32"),
    "bf16_attack": ("cure", "bf16_attack"),
    "bf16": ("cure", "bf16"),
    "trades": ("trades", "fp32"),
}
"""Ours by name: a method, and the precision of its passes."""

COMPILED = "_compiled"
"""After a name of ours: with the attack compiled."""


@dataclass(frozen=True)
class Net:
    """A network, and how many images it is given at once.

    Attributes:
        model: name in ``cure list models``.
        options: of the model.
        batch: images a step.
        device: where.
    """

    model: str
    options: dict[str, int]
    batch: int
    device: str = "cpu"

    @property
    def text(self) -> str:
        """For people."""
        inside = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.model}{f' ({inside})' if inside else ''}, batch {self.batch}"

    def ours(self) -> nn.Module:
        """Our network, seed 0."""
        config = ModelConfig(name=self.model, options=self.options)
        return build_model(config, classes=10, channels=3, size=(32, 32), seed=0)

    def plain(self) -> nn.Module:
        """The same weights in code without anything done for speed, where that is written."""
        ours = self.ours()
        blocks = {"resnet10": 1, "resnet18": 2}.get(self.model)
        if blocks is None:
            return ours
        plain = PlainResNet(blocks, self.options.get("width", 64))
        plain.load_state_dict(ours.state_dict())
        return plain

    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, and the noise that the attack starts from."""
        draws = torch.Generator().manual_seed(0)
        # Away from 0 and 1, where our attack's start is clipped and the yardstick's is not.
        image = 0.05 + 0.9 * torch.rand(self.batch, 3, 32, 32, generator=draws)
        label = torch.randint(0, 10, (self.batch,), generator=draws)
        noise = torch.randn(self.batch, 3, 32, 32, generator=draws)
        return image.to(self.device), label.to(self.device), noise.to(self.device)


class Ours:
    """A side of ours: one method on one network.

    Attributes:
        method: what trains.
        batch: the images of every step.
        watched: measure the parts of a step, for which a GPU must be waited for after each.
        seconds: of each part of the watched steps so far.
    """

    def __init__(self, net: Net, method: str, precision: Any, compiled: bool = False) -> None:
        device = torch.device(net.device)
        self.watched = device.type == "cpu"
        network = net.ours()
        engine = fitted(Engine(device, precision, channels_last=True), network)
        attack = PGD(
            Threat("Linf", 8 / 255),
            10,
            2 / 255,
            precision=engine.attack_precision,
            fold=True,
            compile=compiled,
        )
        model = engine.place(network)
        context = Context(engine, attack, 0, 10, 50_000, 391, 200)
        made = METHODS[method]
        self.method: Method = made(model, made.Config(), context).to(device)
        self.method.train()
        image, label, _ = net.images()
        index = torch.arange(net.batch, device=device)
        self.batch = Batch(engine.arrange(image), label, index, 0)
        self.parameters = self.method.trainable()
        self.optimizer = torch.optim.SGD(
            self.parameters.values(), lr=0.1, momentum=0.9, weight_decay=5e-4
        )
        self.seconds: dict[str, list[float]] = {"attack": [], "gradients": [], "optimiser": []}

    def step(self) -> None:
        """One step as the trainer makes it."""
        engine = self.method.context.engine
        marks: list[float] = []
        self._mark(marks)
        attacked = self.method.make_adversarial(self.batch)
        self._mark(marks)
        output = self.method.compute_loss(self.batch, attacked)
        grads = output.grads
        if grads is None:
            assert output.loss is not None
            grads = engine.gradients(output.loss, self.parameters)
        self._mark(marks)
        for name, parameter in self.parameters.items():
            parameter.grad = grads[name]
        self.optimizer.step()
        self.method.after_step(self.batch.step)
        self._mark(marks)
        self.batch = replace(self.batch, step=self.batch.step + 1)
        for part, begin, end in zip(self.seconds, marks, marks[1:], strict=False):
            self.seconds[part].append(end - begin)

    def _mark(self, marks: list[float]) -> None:
        if self.watched:
            marks.append(_now(self.method.context.engine.device))


class Plain:
    """The yardstick's side."""

    def __init__(self, net: Net) -> None:
        self.image, self.label, self.noise = net.images()
        self.yardstick = Yardstick(net.plain().to(net.device))

    def step(self) -> None:
        """One step."""
        self.yardstick.step(self.image, self.label, self.noise)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def side(name: str, net: Net) -> Plain | Ours:
    """The side called ``name``."""
    if name == YARDSTICK:
        return Plain(net)
    plain = name.removesuffix(COMPILED)
    return Ours(net, *SIDES[plain], compiled=plain != name)


# -- time -------------------------------------------------------------------------------------


@contextmanager
def allocator_of(name: str) -> Iterator[None]:
    """Ours has what the command sets, the yardstick what a process has that sets nothing."""
    if name == YARDSTICK:
        _as_by_default()
    else:
        keep_freed_memory()
    yield


def _as_by_default() -> None:
    """What glibc sets by itself once large tensors were freed, at its most generous.

    Its thresholds grow with what is freed, to 32 MiB and twice that; once anything was set by hand
    they no longer do, so they are set to where they would end.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 65536)  # M_MMAP_MAX
    libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 64 * 2**20)  # M_TRIM_THRESHOLD
    gc.collect()
    # What ours kept is not the yardstick's to use.
    libc.malloc_trim(0)


def in_turn(net: Net, names: Sequence[str], repetitions: int, steps: int = 1) -> dict[str, Any]:
    """Seconds a step of each side: ``repetitions`` rounds in which each makes ``steps`` steps.

    Every side makes one step first that is not counted.  A round's ratios are of its own times, so
    that a machine that slows down in between does not change them.
    """
    device = torch.device(net.device)
    sides = {name: side(name, net) for name in names}
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repetitions + 1):
        for name, which in sides.items():
            with allocator_of(name):
                if not number or rounds[name][-1:] < [3.0]:
                    # Warm again: memory that was given back is fetched in this step.  In a long
                    # step it makes no difference.
                    which.step()
                began = _now(device)
                for _ in range(steps if number else 0):
                    which.step()
                if number:
                    rounds[name].append((_now(device) - began) / steps)
    result = {}
    for name, seconds in rounds.items():
        ratios = [a / b for a, b in zip(rounds[names[0]], seconds, strict=True)]
        result[name] = {
            "seconds_per_step": statistics.median(seconds),
            "seconds_range": [min(seconds), max(seconds)],
            "images_per_second": net.batch / statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
        which = sides[name]
        if isinstance(which, Ours):
            if not which.watched:
                which.watched = True
                for _ in range(4):
                    which.step()
            parts = {part: statistics.median(times[1:]) for part, times in which.seconds.items()}
            result[name]["parts"] = parts
    return result


# -- memory -----------------------------------------------------------------------------------


def peak_memory(name: str, net: Net, threads: int) -> float:
    """MiB that the steps of a side need at most, beyond what the process had before them.

    On a GPU: tensors, as PyTorch counts them.
    """
    if net.device != "cpu":
        gc.collect()
        which = side(name, net)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            which.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        peak: float = pool.apply(_peak_memory, (name, net, threads))
    return peak


def _peak_memory(name: str, net: Net, threads: int) -> float:
    torch.set_num_threads(threads)
    if name != YARDSTICK:
        keep_freed_memory()
    which = side(name, net)
    before = _resident()
    for _ in range(2):
        which.step()
    return _resident("VmHWM") - before


def _resident(what: str = "VmRSS") -> float:
    """MiB that this process holds now, or held at most (getrusage counts its parent's, too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(what)]
    return int(line.split()[1]) / 2**10


# -- what a step does -------------------------------------------------------------------------


def count_passes(name: str, net: Net) -> dict[str, int]:
    """Passes of one step, counted by hooks on the network and on the revision model."""
    which = side(name.removesuffix(COMPILED), replace(net, batch=2))
    counts = {"forward": 0, "backward": 0, "revision": 0}

    def arrived(_: Tensor) -> None:
        counts["backward"] += 1

    def passed(_: nn.Module, __: object, output: Tensor) -> None:
        counts["forward"] += 1
        if output.requires_grad:
            output.register_hook(arrived)

    def revised(*_: object) -> None:
        counts["revision"] += 1

    model = which.yardstick.model if isinstance(which, Plain) else which.method.model
    revision = which.yardstick.revision if isinstance(which, Plain) else None
    if isinstance(which, Ours) and getattr(which.method, "revision", None) is not None:
        revision = which.method.revision.network
    model.register_forward_hook(passed)
    if revision is not None:
        revision.register_forward_hook(revised)
    which.step()
    return counts


def operations(name: str, net: Net) -> dict[str, float]:
    """GFLOP of one step of a side, in the attack and outside it (convolutions and products)."""
    which = side(name.removesuffix(COMPILED), replace(net, batch=2))
    counts = {}
    steps: dict[str, Callable[[], object]]
    if isinstance(which, Plain):
        steps = {"all": which.step}
    else:
        attacked: list[AdversarialBatch] = []
        ours = which

        def attack() -> None:
            attacked.append(ours.method.make_adversarial(ours.batch))

        def gradients() -> None:
            output = ours.method.compute_loss(ours.batch, attacked[-1])
            if output.loss is not None:
                ours.method.context.engine.gradients(output.loss, ours.parameters)

        steps = {"attack": attack, "gradients": gradients}
    for part, run in steps.items():
        with _Operations() as counter:
            run()
        counts[part] = counter.count / 1e9 * net.batch / 2
    return counts


def _learnt(net: Net, image: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Weights after ten natural steps on one batch: enough that gradients are no noise."""
    model = net.ours().to(net.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(image), label).backward()
        optimizer.step()
    return model.state_dict()


class _Operations(TorchDispatchMode):
    """Counts what convolutions and products compute (FlopCounterMode refuses autograd.grad)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


def errors(name: str, net: Net) -> dict[str, float]:
    """How far a side's gradients are from the yardstick's, before the mask.

    Both have the same network, trained for some steps, and a revision model with the weights it had
    before them.  ``gradient``: relative L2 error, both given the yardstick's adversarial images;
    ``largest``: the same of the tensor where it is largest; ``mask``: share of the weights on whose
    mask they agree; ``pixels``: share of values in which the adversarial images differ at all;
    ``climb``: the divergence that ours reached, divided by what the yardstick reached.  On a GPU
    the yardstick's are computed here in whole float32, without TF32.
    """
    plain, ours = side(YARDSTICK, net), side(name, net)
    assert isinstance(plain, Plain)
    assert isinstance(ours, Ours)
    yardstick, method = plain.yardstick, ours.method
    weights = _learnt(net, plain.image, plain.label)
    yardstick.model.load_state_dict(weights)
    method.model.load_state_dict(weights)
    # The same start: what our attack will draw.
    draws = method.context.generator("attack", ours.batch.step)
    noise = torch.randn(plain.image.shape, generator=draws, device=plain.image.device)
    own = method.make_adversarial(ours.batch).image
    rounded = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    theirs = yardstick.attack(plain.image, noise)
    expected, expected_masks = yardstick.gradients(plain.image, plain.label, theirs)
    torch.backends.cudnn.allow_tf32 = rounded
    seen: dict[str, dict[str, Tensor]] = {}
    whole = method._scores  # type: ignore[attr-defined]

    def watched(terms: Any, *arguments: Any) -> Any:
        seen["gradient"], seen["scores"] = dict(terms["total"]), whole(terms, *arguments)
        return seen["scores"]

    method._scores = watched  # type: ignore[attr-defined]
    engine = method.context.engine
    method.compute_loss(ours.batch, AdversarialBatch(engine.arrange(theirs)))
    masks = rgp_mask(seen["scores"], method.config.percent)
    largest, agree, count = 0.0, 0, 0
    off, size = torch.zeros((), device=net.device), torch.zeros((), device=net.device)
    for (key, gradient), reference, mask in zip(
        seen["gradient"].items(), expected, expected_masks, strict=True
    ):
        change, length = (gradient - reference).norm(), reference.norm()
        off, size = off + change**2, size + length**2
        largest = max(largest, float(change / length.clamp_min(1e-12)))
        agree += int((masks[key] == (mask == 0)).sum())
        count += mask.numel()
    yardstick.model.eval()
    with torch.no_grad():
        natural = yardstick.model(plain.image)
        reached = [
            float(
                F.kl_div(yardstick.model(image).log_softmax(1), natural.softmax(1), reduction="sum")
            )
            for image in (own, theirs)
        ]
    return {
        "gradient": float((off / size).sqrt()),
        "largest": largest,
        "mask": agree / count,
        "pixels": float((own != theirs).float().mean()),
        "climb": reached[0] / reached[1],
    }


# -- the machine ------------------------------------------------------------------------------


def ceilings(device: str, size: int | None = None) -> dict[str, float]:
    """GFLOP/s of a large matrix product in float32 and in bfloat16, the best of five.

    On a GPU also in TF32, in which PyTorch computes convolutions of float32 by default.
    """
    size = size or (2048 if device == "cpu" else 8192)
    found = {}
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device != "cpu":
        kinds["tf32"] = torch.float32
    for name, kind in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        one = torch.rand(size, size, device=device).to(kind)
        best = float("inf")
        for _ in range(6):
            began = _now(one.device)
            one @ one
            best = min(best, _now(one.device) - began)
        found[name] = 2 * size**3 / best / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def share_of_ceiling(name: str, net: Net, seconds: float, machine: dict[str, float]) -> float:
    """The time that the convolutions and products of a step need at the ceiling, over its time."""
    precision = SIDES[name.removesuffix(COMPILED)][1] if name != YARDSTICK else "fp32"
    fast, slow = machine["bf16"], machine.get("tf32", machine["fp32"])
    speed = {
        "all": slow,
        "attack": slow if precision == "fp32" else fast,
        "gradients": fast if precision == "bf16" else slow,
    }
    needed = sum(count / speed[part] for part, count in operations(name, net).items())
    return needed / seconds


def groups(name: str, net: Net) -> dict[str, float]:
    """Share of a step's time on a processor by kind of operation, by PyTorch's profiler."""
    which = side(name, net)
    kinds = {
        "convolution": ("convolution",),
        "batch norm": ("batch_norm",),
        "rectifier": ("threshold_backward", "clamp_min", "relu"),
        "sums and products": ("add", "mul", "sub", "div", "lerp", "_foreach"),
    }
    with allocator_of(name):
        which.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            which.step()
    found, whole = dict.fromkeys((*kinds, "rest"), 0.0), 0.0
    for event in profile.key_averages():
        spent = event.self_cpu_time_total
        kind = next((k for k, words in kinds.items() if any(w in event.key for w in words)), "rest")
        found[kind] += spent
        whole += spent
    return {kind: spent / whole for kind, spent in found.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    facts = {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cudnn_allow_tf32"] = torch.backends.cudnn.allow_tf32
    commit = _said("git", "rev-parse", "HEAD")
    if commit:
        facts["commit"] = commit
    return facts


def _said(*words: str) -> str | None:
    """What a program printed; nothing where it fails or does not exist."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result for people and programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def describe(net: Net) -> dict[str, Any]:
    """A network for a result file."""
    return asdict(net)


if __name__ == "__main__":
    sys.exit("run benchmarks/cpu.py or benchmarks/gpu.py")
