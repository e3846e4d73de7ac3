"""What one of several processes does for a test: ``python ranks_worker.py TASK FOLDER``.

Each writes what it found to ``FOLDER/RANK``; the same functions run in the test's own process,
which is then the only one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic_core import PydanticUndefined
from safetensors.torch import save_file
from torch import Tensor, nn

import cure.methods.cure
from cure import data
from cure.attacks import Threat
from cure.attacks.registry import EvaluationAttack
from cure.cli.main import main
from cure.config import ModelConfig, Section, TeacherConfig
from cure.data import Batch
from cure.errors import CureError, DataError
from cure.evaluation.journal import Journal
from cure.evaluation.runner import measure
from cure.methods import METHODS
from cure.recipe import check, override, read_recipe
from cure.runs.folder import RunFolder
from cure.training import trainer
from cure.training.setup import build_method, prepare
from cure.training.trainer import Trainer
from cure.utils.distributed import leave
from cure.utils.engine import Engine

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import bright_or_dark

STEPS = 4
PLAIN = {"name": "ranks_worker:plain", "options": {"width": 3}}


class Plain(nn.Module):
    """A convolution and a linear layer, without statistics of the batch."""

    def __init__(self, classes: int, channels: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.linear = nn.Linear(2 * width * (size[0] // 2) * (size[1] // 2), classes)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.softplus(self.conv2(F.softplus(self.conv1(image - 0.5))))
        return self.linear(hidden.flatten(1))


def plain(
    classes: int, channels: int = 1, size: tuple[int, int] = (8, 8), width: int = 3
) -> nn.Module:
    """For recipes: ``model.name=ranks_worker:plain``."""
    return Plain(classes, channels, size, width)


def complete(section: type[Section], given: dict[str, Any]) -> dict[str, Any]:
    """A natural teacher and a plain network wherever the settings of a method ask for some."""
    settings = dict(given)
    for key, field in section.model_fields.items():
        kind = field.annotation
        if kind is TeacherConfig and field.default is PydanticUndefined:
            settings.setdefault(key, "natural")
        elif kind is ModelConfig:
            settings.setdefault(key, PLAIN)
        elif isinstance(kind, type) and issubclass(kind, Section):
            inner = complete(kind, settings.get(key, {}))
            if inner:
                settings[key] = inner
    return settings


AWP = {"training.weight_perturbation": {"gamma": 0.01}}
CASES: dict[str, dict[str, Any]] = {
    name: {"method": {"name": name}} for name in METHODS.names()
} | {
    "cure-own-gradient": {"method": {"name": "cure", "mask": {"source": "own_gradient"}}},
    "cure-kl-score": {"method": {"name": "cure", "mask": {"adversarial_loss": "kl"}}},
    "cure-random": {"method": {"name": "cure", "mask": {"kind": "random"}}},
    "cure-global": {"method": {"name": "cure", "mask": {"scope": "global", "strict_freeze": True}}},
    "cure-awp": {"method": {"name": "cure"}, **AWP},
    "trades-awp": {
        "method": {"name": "trades"},
        **AWP,
        "training.averaging": {"decay": 0.5},
        "training.clip_norm": 0.1,
    },
    "at-l2": {
        "method": {"name": "at"},
        "threat": {"norm": "L2", "epsilon": 0.5},
        "attack.start": "uniform",
    },
    "fat-noise": {"method": {"name": "fat", "omega": 0.01}},
    "iad-both": {"method": {"name": "iad", "begin": 0.0, "form": "II"}},
    "las-at-every-step": {"method": {"name": "las-at", "strategy": {"interval": 1}}},
    "las-at-trades": {"method": {"name": "las-at", "form": "trades"}},
    "las-at-reuse": {
        "method": {"name": "las-at", "strategy": {"interval": 2, "reuse": True, "momentum": 0.9}}
    },
}
WITH_BATCH_NORM = {"cure": "cure", "act": "act", "las-at": "las-at", "trades": "trades"}


def double(batch: Batch) -> Batch:
    return replace(batch, image=batch.image.double())


def trained(
    case: dict[str, Any], model: dict[str, Any], folder: Path
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What a method owns after some steps in float64, its metrics, and the masks that it drew."""
    method = case["method"]
    settings = {
        "model": model,
        "start": "model",
        "data.validation": 32,
        "data.augment": {"crop_padding": 1},
        "attack": {"steps": 3, "step_size": 0.05},
        "threat.epsilon": 0.1,
        "training.epochs": 1,
        "training.batch_size": 16,
        "training.device": "cpu",
        **case,
        "method": complete(METHODS[method["name"]].Config, method),
    }
    raw = read_recipe("digits")
    for key, value in settings.items():
        override(raw, key, value)
    config = check(raw, "the test")
    prepared = prepare(config, bright_or_dark(96, classes=3), None)
    made = build_method(config, prepared).double()
    masks: list[Tensor] = []
    rgp_mask = cure.methods.cure.rgp_mask

    def remembered(*arguments: Any) -> dict[str, Tensor]:
        found = rgp_mask(*arguments)
        masks.extend(mask.flatten() for mask in found.values())
        return found

    cure.methods.cure.rgp_mask = remembered
    try:
        loop = Trainer(
            config,
            made,
            prepared.training,
            prepared.validation,
            prepared.engine,
            RunFolder(folder, writes=False),
        )
        made.on_epoch(0)
        made.train()
        metrics: dict[str, Tensor] = {}
        for batch in data.epoch(
            loop.training,
            batch_size=16,
            epoch=0,
            seed=0,
            augment=config.data.augment,
            rank=prepared.engine.rank,
            world=prepared.engine.world,
        ):
            found = loop.train_step(double(batch))
            metrics |= {f"metric/{batch.step}/{k}": v.reshape(1) for k, v in found.items()}
    finally:
        cure.methods.cure.rgp_mask = rgp_mask
    owned = {k: v.detach().clone().contiguous() for k, v in made.state_dict().items()}
    return owned | metrics, masks


def methods(folder: Path) -> None:
    """Every method in float64 on a network without, and some on one with, batch statistics."""
    for name, case in CASES.items():
        owned, masks = trained(case, PLAIN, folder)
        save(folder, name, owned, masks)
    for name, method in WITH_BATCH_NORM.items():
        own = complete(METHODS[method].Config, {"name": method})
        if "strategy" in own:
            own["strategy"] = {"model": {"name": "small_cnn", "options": {"width": 2}}}
        model = {"name": "small_cnn", "options": {"width": 4}}
        owned, masks = trained({"method": own}, model, folder)
        save(folder, f"{name} with BatchNorm", owned, masks)


def save(folder: Path, name: str, owned: dict[str, Tensor], masks: list[Tensor]) -> None:
    kept = {key: value.clone() for key, value in owned.items()}
    if masks:
        kept["masks"] = torch.cat(masks).clone()
    save_file(kept, folder / f"{name}.safetensors")


def words(folder: Path) -> None:
    """What ranks tell each other."""
    rank = int(os.environ["RANK"])
    engine = Engine.for_evaluation("cpu")
    called = []
    found: dict[str, Any] = {
        "rank": engine.rank,
        "world": engine.world,
        "first": engine.first(lambda: called.append(1) or f"made on {rank}"),
        "called": len(called),
        "sums": engine.sums(rank + 1, 2**50 + rank),
        "largest": engine.largest(-rank, rank),
        "any": [engine.any(rank == 1), engine.any(False)],
        "gather": engine.gather({"rank": rank}),
        "total": engine.total(torch.tensor([rank, 5])).tolist(),
    }
    try:
        with engine.agreeing():
            if rank == 1:
                raise DataError("only here")
    except CureError as error:
        found["agreed"] = [type(error).__name__, str(error)]
    try:
        engine.first(refuse)
    except CureError as error:
        found["refused"] = str(error)
    shared = nn.Linear(2, 2)
    torch.manual_seed(rank)
    nn.init.normal_(shared.weight)
    engine.spread(shared.state_dict().values())
    found["spread"] = shared.weight.tolist()
    before = engine.traffic.bytes
    weight = torch.full((2, 3, 4, 4), float(rank)).contiguous(memory_format=torch.channels_last)
    weight.requires_grad_(True)
    unused = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    grads = engine.gradients((weight**2).sum() * (rank + 1), {"weight": weight, "unused": unused})
    found["bytes"] = engine.traffic.bytes - before
    found["gradient"] = [grads["weight"].unique().tolist(), grads["unused"].tolist()]
    found["layout"] = grads["weight"].is_contiguous(memory_format=torch.channels_last)
    found["evaluated"] = evaluated(engine)
    found["stopped"] = stopped(engine, folder.parent / "verdicts")
    (folder / "words.json").write_text(json.dumps(found))


def evaluated(engine: Engine, **options: Any) -> dict[str, Any]:
    """The result of an evaluation with an attack of two parts, and one of one part."""
    module = sys.modules[measure.__module__]
    real = module.evaluation_attack  # type: ignore[attr-defined]

    def planted(name: str, source: object = None) -> EvaluationAttack:
        if name == "cw":
            return real(name)  # type: ignore[no-any-return]
        parts = {"a": real("pgd1").parts["pgd1"], "b": real("pgd7").parts["pgd7"]}
        return EvaluationAttack(name, "", {}, parts)

    torch.manual_seed(4)
    model = plain(3)
    images = bright_or_dark(50, classes=3)
    # Right on about half of the images, so that those attacked are not simply the first ones.
    with torch.no_grad():
        model.linear.bias.sub_(model(images.image / 255).mean(dim=0))
        guess = model(images.image / 255).argmax(dim=1)
    half = torch.arange(50) % 2 == 0
    images = replace(images, label=torch.where(half, guess, images.label))
    module.evaluation_attack = planted  # type: ignore[attr-defined]
    try:
        names, threat = ["planted", "cw"], Threat("Linf", 0.02)
        result = measure(model, images, names, threat, engine=engine, batch_size=7, **options)
    finally:
        module.evaluation_attack = real  # type: ignore[attr-defined]
    return without_seconds(result)


class Clock:
    """The time as an evaluation asks for it: up after so many forward passes of attacks."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, passes: float) -> None:
        self.left = passes

    def monotonic(self) -> float:
        self.left -= 1
        return 0.0 if self.left >= 0 else 1e9


def stopped(engine: Engine, path: Path) -> dict[str, Any]:
    """An evaluation whose time is up on rank 1 only, then gone on with.

    The first rank keeps the verdicts in ``path``.
    """
    module = sys.modules[measure.__module__]
    module.time = Clock(13 if engine.rank else math.inf)  # type: ignore[attr-defined]
    kept = path if engine.rank == 0 else None
    try:
        with Journal(kept, {}) as journal:
            first = evaluated(engine, ends=1, journal=journal)
    finally:
        module.time = time  # type: ignore[attr-defined]
    lines = engine.first(lambda: path.read_text().splitlines())
    with Journal(kept, {}) as journal:
        again = evaluated(engine, journal=journal)
    return {"first": first, "lines": lines, "again": again}


def without_seconds(result: Any) -> Any:
    """What does not change from run to run."""
    if isinstance(result, dict):
        return {k: without_seconds(v) for k, v in result.items() if k != "seconds"}
    return list(result) if isinstance(result, list | tuple) else result


def refuse() -> None:
    raise CureError("the first refused")


def plant(moment: str) -> None:
    """Arrange that something happens to rank 1 alone, in its step number 5."""
    original = Trainer.train_step

    def planted(self: Trainer, batch: Batch) -> Any:
        if self.engine.rank == 1 and batch.step == 5:
            if moment == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            elif moment == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            elif moment == "refuses":
                raise DataError("rank 1 cannot read an image")
        return original(self, batch)

    trainer.Trainer.train_step = planted  # type: ignore[method-assign]


if __name__ == "__main__":
    task, place = sys.argv[1], Path(sys.argv[2])
    if task in ("methods", "words"):
        torch.set_num_threads(1)
        own = place / os.environ["RANK"]
        own.mkdir()
        globals()[task](own)
        leave()
    else:
        plant(task)
        sys.argv = ["cure", *sys.argv[2:]]
        main()
