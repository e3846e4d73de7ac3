"""The best AutoAttack accuracy that 30 minutes on two cores buy, from random weights.

    python benchmarks/speedrun.py --validation [KEY=VALUE ...]   choose settings; adds to the log
    python benchmarks/speedrun.py                                the result, on test images, once

The clock runs from the moment the images are read: building the network, choosing the precision,
training and checkpoints are inside ``--minutes``; the evaluation comes after.  Learning rate,
epsilon and image size follow the share of the minutes that is spent.  A run that was killed goes
on where it was saved, and the time that was lost stays spent.

Settings, and why (``KEY=VALUE`` changes one):

- N-FGSM (one attack step, de Jorge et al. 2022) costs two passes a batch where PGD-10 costs
  eleven; ``warmup``: epsilon rises from 0, since random weights attacked at once learn slowly.
- ``precision=auto``: two steps in float32 and in bfloat16 are timed at the start.  Processors with
  matrix units for bfloat16 (AMX) take 0.4 of the time; others are faster in float32.
- ``resnet10`` of width 64: on few epochs a wide network gains more from each than a narrow one
  from many, and its convolutions are wide enough to be fast.
- ``small``: the first ``small_until`` of the time on images of 24 pixels, 0.56 of the work.
- One cycle of the learning rate (Smith 2018; Wong et al. 2020), Nesterov momentum, an exponential
  average of the weights, which is evaluated.
- Crops and mirror images only: so few epochs underfit, and CutMix or MixUp slow them further.

``--validation`` measures PGD-20 and C&W on 1,000 training images that are not trained on; the final
result is AutoAttack (standard) on the first 1,000 test images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import cure
from cure.attacks.nfgsm import NFGSM
from cure.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    Section,
)
from cure.data import Batch, ImageSet, epoch, load_training, steps_per_epoch
from cure.errors import ConfigError
from cure.models.build import build_model, describe
from cure.models.trial import fitted
from cure.recipe import parse_override
from cure.training.optimizer import build_optimizer
from cure.training.schedule import rate_factor
from cure.utils.device import pick_device
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import write_atomically, write_json

BEAT = 2.0
"""Seconds between two notes of the time that is spent; a run that goes on loses so many more."""
SAVE = 60.0
"""Seconds between two checkpoints."""


class Settings(Section):
    """What a run may choose."""

    network: str = "resnet10"
    options: dict[str, Any] = Field(default={"width": 64})
    batch_size: int = 128
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    peak: float = 0.3
    epsilon: float = 8 / 255
    noise: float = 1.0
    warmup: float = 0.2
    average: float = 0.998
    small: float = 0.75
    small_until: float = 0.5
    label_smoothing: float = 0.0
    cutmix: float = 0.0
    precision: str = "auto"


class Clock:
    """Time spent, also by earlier processes; kept in a file.

    Args:
        path: the file.
        minutes: the budget.
        threads: count the processor's time of so many threads instead of the clock's.
    """

    def __init__(self, path: Path, minutes: float, threads: int | None = None) -> None:
        self.path, self.budget, self.threads = path, 60 * minutes, threads
        before = json.loads(path.read_text())["seconds"] + BEAT if path.exists() else 0.0
        self.began = self.now - before
        self.noted = -math.inf
        self.note()

    @property
    def now(self) -> float:
        """Seconds since an unknown moment."""
        if self.threads is None:
            return time.perf_counter()
        return time.process_time() / self.threads

    @property
    def spent(self) -> float:
        """Seconds."""
        return self.now - self.began

    @property
    def share(self) -> float:
        """Share of the budget, at most 1."""
        return min(1.0, self.spent / self.budget)

    def note(self) -> None:
        """Write the time down, at most once a beat."""
        if self.spent - self.noted >= BEAT:
            self.noted = self.spent
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps({"seconds": self.spent}))
            os.replace(beside, self.path)


class Run:
    """One training, which ends when the minutes are spent.

    Args:
        folder: state of the run.
        settings: see :class:`Settings`.
        images: training images.
        clock: the time.
        device: where it runs.
        seed: of everything random.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        images: ImageSet,
        clock: Clock,
        device: torch.device,
        seed: int,
    ) -> None:
        self.state = folder / "state.safetensors"
        self.settings, self.clock, self.seed = settings, clock, seed
        self.images = images.to(device)
        self.network = build_model(
            ModelConfig(name=settings.network, options=settings.options),
            classes=len(images.classes),
            channels=images.kind.channels,
            size=images.kind.size,
            seed=seed,
        )
        self.precision = self.choose_precision(device)
        self.engine, self.method = self.prepared(self.network, self.precision, device)
        config = OptimizerConfig(nesterov=True, weight_decay=settings.weight_decay)
        self.optimizer = build_optimizer(config, self.network, self.method.trainable())
        self.step = 0
        self.steps_per_epoch = steps_per_epoch(images, settings.batch_size)
        self.restore()

    def prepared(
        self, network: nn.Module, precision: Any, device: torch.device
    ) -> tuple[Engine, cure.methods.Averaging]:
        """AT with N-FGSM and an average around it, whose epsilon follows the clock."""
        engine = fitted(Engine(device, precision, channels_last=True), network)
        attack = NFGSM(
            cure.Threat("Linf", self.settings.epsilon),
            noise=self.settings.noise,
            precision=engine.attack_precision,
            fold=True,
        )
        method = cure.methods.AT(engine.place(network), attack=attack, seed=self.seed)
        method.context.engine = engine
        method.context.attack_share = lambda step: self.epsilon_share()  # noqa: ARG005
        method = cure.methods.Averaging(method, decay=self.settings.average, warmup=True)
        return engine, method.train()

    def epsilon_share(self) -> float:
        """Share of epsilon at this time; not 0, which would give no gradient step."""
        return max(0.01, min(1.0, self.clock.share / max(self.settings.warmup, 1e-9)))

    def choose_precision(self, device: torch.device) -> str:
        """The precision that was asked for, else the faster one: the second of two steps each."""
        if self.settings.precision != "auto":
            return self.settings.precision
        seconds = {}
        for precision in ("fp32", "bf16"):
            engine, method = self.prepared(copy.deepcopy(self.network), precision, device)
            batch = next(self.batches_of_epoch(0, 0))
            for _ in range(2):
                began = self.clock.now
                step = method.take_step(self.arranged(batch, engine))
                float(next(iter(step.gradients().values())).sum())  # Waits for the device.
                seconds[precision] = self.clock.now - began
        return min(seconds, key=lambda name: seconds[name])

    def batches_of_epoch(self, number: int, start: int) -> Iterator[Batch]:
        """Batches of one pass over the images, from batch ``start``."""
        augment = AugmentConfig(
            label_smoothing=self.settings.label_smoothing, cutmix=self.settings.cutmix
        )
        return epoch(
            self.images,
            batch_size=self.settings.batch_size,
            epoch=number,
            seed=self.seed,
            augment=augment,
            start=start,
        )

    def arranged(self, batch: Batch, engine: Engine) -> Batch:
        """The batch in the layout of the engine and the size of this time."""
        image = batch.image
        if self.clock.share < self.settings.small_until and self.settings.small < 1:
            side = [round(self.settings.small * length) for length in image.shape[-2:]]
            image = F.interpolate(image, side, mode="bilinear", antialias=True).clamp(0, 1)
        return Batch(engine.arrange(image), batch.label, batch.index, batch.step, batch.soft_label)

    def train(self) -> nn.Module:
        """Train until the minutes are spent; the averaged network."""
        saved, longest, reported = self.clock.spent, 0.0, -1
        while True:
            number, start = divmod(self.step, self.steps_per_epoch)
            for batch in self.batches_of_epoch(number, start):
                began = self.clock.spent
                # The last checkpoint takes about as long as two steps.
                if began + 3 * longest > self.clock.budget:
                    self.save()
                    return self.method.inference_model().eval()
                metrics = self.one_step(batch)
                self.clock.note()
                longest = max(0.9 * longest, self.clock.spent - began)
                if self.clock.spent - saved > SAVE:
                    self.save()
                    saved = self.clock.spent
                if int(20 * self.clock.share) > reported:
                    reported = int(20 * self.clock.share)
                    print(
                        f"{self.clock.spent / 60:.1f} min, epoch "
                        f"{self.step / self.steps_per_epoch:.2f}, loss {metrics['loss']:.3f}, "
                        f"robust accuracy of the batch {metrics['robust_accuracy']:.3f}",
                        flush=True,
                    )

    def one_step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser."""
        settings = self.settings
        schedule = ScheduleConfig(name="one_cycle", peak=settings.peak)
        rate = settings.learning_rate * rate_factor(schedule, self.clock.share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        taken = self.method.take_step(self.arranged(batch, self.engine))
        parameters = self.method.trainable()
        for name, gradient in taken.gradients().items():
            parameters[name].grad = gradient
        self.optimizer.step()
        self.method.after_step(self.step)
        self.step += 1
        return {name: float(value) for name, value in taken.metrics.items()}

    def save(self) -> None:
        """Write weights, their average, momentum and the number of steps."""
        names = {id(p): name for name, p in self.method.trainable().items()}
        tensors = {
            f"momentum/{names[id(p)]}": state["momentum_buffer"]
            for p, state in self.optimizer.state.items()
        }
        for kind, network in self.networks().items():
            tensors |= {f"{kind}/{name}": t for name, t in network.state_dict().items()}
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        facts = {"step": str(self.step), "count": str(self.method.count)}
        write_atomically(self.state, lambda path: save_file(kept, path, facts))

    def restore(self) -> None:
        """Go on where an earlier process saved, if one did."""
        if not self.state.exists():
            return
        with safe_open(self.state, "pt") as file:
            facts = file.metadata()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step, self.method.count = int(facts["step"]), int(facts["count"])
        for kind, network in self.networks().items():
            network.load_state_dict(
                {name: tensors[f"{kind}/{name}"] for name in network.state_dict()}
            )
        for name, parameter in self.method.trainable().items():
            momentum = tensors.get(f"momentum/{name}")
            if momentum is not None:
                self.optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter)

    def networks(self) -> dict[str, nn.Module]:
        """What is trained and what is evaluated."""
        return {"network": self.network, "average": self.method.average}


def settings_of(words: list[str]) -> Settings:
    """The settings with these changes."""
    return Settings(**dict(parse_override(word) for word in words))


def folder_of(options: argparse.Namespace, settings: Settings) -> Path:
    """The folder of the run; refused when other settings were begun there."""
    identity = {"settings": settings.model_dump(), "seed": options.seed} | {
        name: getattr(options, name)
        for name in ("minutes", "clock", "threads", "device", "validation")
    }
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "settings.json"
    if said.exists() and json.loads(said.read_text()) != identity:
        raise ConfigError(
            f"{folder} holds a run with other settings; say --folder with another, or delete it"
        )
    write_json(said, identity)
    return folder


def main(words: list[str] | None = None) -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--validation", action="store_true", help="choose settings")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: its time over the threads, to choose settings beside other work",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="cifar10", help="a source of `cure list data`")
    parser.add_argument("--held-out", type=int, default=1000, help="training images that validate")
    parser.add_argument("--limit", type=int, default=1000, help="images of the evaluation")
    parser.add_argument("--attacks", help="by default pgd20,cw in validation, else autoattack")
    parser.add_argument("--folder", default="runs/speedrun")
    parser.add_argument("--output", default="results/speedrun/cpu.json")
    parser.add_argument("--log", default="results/speedrun/log.jsonl")
    options = parser.parse_args(words)
    if options.clock == "processor" and not options.validation:
        raise ConfigError("the result is by the clock on the wall; leave out --clock processor")
    torch.set_num_threads(options.threads)
    settings = settings_of(options.settings)
    folder = folder_of(options, settings)
    data = DataConfig(source=options.data, validation=options.held_out)
    training, _ = load_training(data)
    threads = options.threads if options.clock == "processor" else None
    clock = Clock(folder / "clock.json", options.minutes, threads)
    run = Run(folder, settings, training, clock, pick_device(options.device), options.seed)
    network = run.train()
    seconds = clock.spent
    result = cure.evaluate(
        network,
        attacks=options.attacks or ("pgd20,cw" if options.validation else "autoattack"),
        epsilon="8/255",
        data=options.data,
        data_options={"validation": options.held_out},
        split="validation" if options.validation else "test",
        limit=options.limit,
        device=options.device,
        output=folder / "evaluation.json",
        progress=_told,
    )
    made = {
        "natural": result["natural"]["accuracy"],
        **{name: part["accuracy"] for name, part in result["attacks"].items()},
        "worst_case": result["worst_case"]["accuracy"],
        "interval": result["worst_case"]["interval"],
        "n": result["natural"]["n"],
        "settings": settings.model_dump(),
        "precision": run.precision,
        "model": describe(network),
        "seeds": [options.seed],
        "minutes": options.minutes,
        "seconds": round(seconds, 1),
        "epochs": round(run.step / run.steps_per_epoch, 2),
        "threads": options.threads,
        "clock": options.clock,
        "data": options.data if not Path(options.data).exists() else Path(options.data).name,
        "split": "validation" if options.validation else "test",
        "environment": environment(),
    }
    target = Path(options.log if options.validation else options.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    if options.validation:
        with target.open("a") as file:
            file.write(json.dumps(made) + "\n")
    else:
        write_json(target, made)
    print(json.dumps({k: v for k, v in made.items() if k != "environment"}))
    print(f"written: {target}")


def _told(name: str, done: int, count: int) -> None:
    if done == count:
        print(f"{name}: {count} images", flush=True)


if __name__ == "__main__":
    main()
