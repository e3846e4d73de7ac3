"""Arguments that several commands share, and how their words are read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cure.errors import ConfigError


class Checkpoint(StrEnum):
    """Which weights of a run."""

    best = "best"
    last = "last"


class Split(StrEnum):
    """Which images."""

    train = "train"
    validation = "validation"
    test = "test"


class Precision(StrEnum):
    """What attacks compute in."""

    fp32 = "fp32"
    bf16_attack = "bf16_attack"


# What `evaluate`, `diagnose` and `corruptions` say of a target and its images.
TargetArgument = Annotated[
    str | None, typer.Argument(help="A run folder; or name a network with --model.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="A network: `cure list models`, package.module:callable, hf:..., timm:..."),
]
WeightsOption = Annotated[Path | None, typer.Option(help="Weights file for --model.")]
OptionsOption = Annotated[
    list[str] | None, typer.Option(help="Option of --model, for example width=16; repeatable.")
]
MeanOption = Annotated[
    str | None, typer.Option(help="What --model subtracts from its input: 0.49,0.48,0.45")
]
StdOption = Annotated[str | None, typer.Option(help="What --model divides its input by.")]
CheckpointOption = Annotated[Checkpoint, typer.Option(help="Weights of a run.")]
DataOption = Annotated[
    str | None, typer.Option(help="Images (default: those of the run); see `cure list data`.")
]
DataOptionsOption = Annotated[
    list[str] | None, typer.Option(help="Key of the data section: resize=32; repeatable.")
]
SplitOption = Annotated[Split, typer.Option(help="Which images.")]
LimitOption = Annotated[int | None, typer.Option(help="Only the first so many images.")]
EpsilonOption = Annotated[str | None, typer.Option(help="Radius, 8/255 (default: the run's).")]
NormOption = Annotated[str | None, typer.Option(help="Linf, L2 or L1 (default: the run's).")]
BatchSizeOption = Annotated[int | None, typer.Option(help="Images attacked at once.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
OutputOption = Annotated[Path | None, typer.Option(help="JSON file to write.")]


def named(target: str | None, model: str | None, *of_model: object) -> str:
    """What a command is to look at: a run, or the name of a network with what goes with it."""
    if target is not None and model is None:
        if any(of_model):
            raise ConfigError("--weights, --option, --mean and --std go with --model")
        return target
    if model is not None and target is None:
        return model
    raise ConfigError("expected a run folder, or --model NAME, and not both")


def numbers(name: str, text: str | None) -> list[float] | None:
    """The numbers in ``text``, the value of the option ``name``."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.strip("[]() ").replace(",", " ").split()]
    except ValueError:
        raise ConfigError(
            f"--{name}: expected numbers such as 0.49,0.48,0.45, got '{text}'"
        ) from None


def words(text: str | None) -> list[str] | None:
    """The words between the commas of ``text``."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def whole_numbers(name: str, text: str | None) -> list[int] | None:
    """The whole numbers in ``text``, the value of the option ``name``."""
    try:
        return None if text is None else [int(word) for word in words(text) or ()]
    except ValueError:
        raise ConfigError(f"--{name}: expected whole numbers such as 0,1, got '{text}'") from None


def pairs(settings: list[str] | None) -> dict[str, object]:
    """The settings KEY=VALUE of a repeatable option."""
    from cure.recipe import parse_override

    return dict(parse_override(word) for word in settings or [])
