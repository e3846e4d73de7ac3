"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from cure.config import Ratio
from cure.errors import ConfigError
from cure.evaluation.options import TargetOptions
from cure.utils.io import user_path

EpsilonOption = Annotated[str | None, typer.Option(help="Radius, 8/255 (default: the run's).")]
NormOption = Annotated[str | None, typer.Option(help="Linf, L2 or L1 (default: the run's).")]
OutputOption = Annotated[Path | None, typer.Option(help="JSON file to write.")]
RecipeArgument = Annotated[
    str, typer.Argument(help="A name from `cure list recipes`, or a YAML file.")
]

SettingsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change: training.epochs=10"),
]
TargetArgument = Annotated[
    str | None, typer.Argument(help="A run folder; or name a network with --model.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="A network: `cure list models`, package.module:callable, hf:..., timm:..."),
]

JobsOption = Annotated[int, typer.Option(help="Jobs at a time on this machine.")]
ClusterOption = Annotated[
    str | None,
    typer.Option(help="Run on a cluster: slurm, local (submitit without a cluster) or ray."),
]
ClusterParameter = Annotated[
    list[str] | None,
    typer.Option(
        help="Parameter of the cluster: slurm_partition=gpu, timeout_min=600, num_gpus=1."
    ),
]

Command = Callable[..., None]

# The type of images is not imported here: it needs PyTorch, and no option is of that type.
_HINTS = get_type_hints(TargetOptions, localns={"ImageSet": object}, include_extras=True)
# Under another name, because mypy wants the members of an enumeration as literals.
_enum: Any = StrEnum


def with_options(
    *names: str, texts: Mapping[str, str] | None = None, **defaults: Any
) -> Callable[[Command], Command]:
    """Decorator that adds the fields of :class:`TargetOptions` to a command as its options.

    The command receives what was given in its argument ``options``: keyword arguments for
    functions that take :class:`~cure.evaluation.options.TargetKeywords`.  A command with an
    argument ``target`` also gets TARGET and --model, and receives the one that was given.

    Args:
        names: the fields; all when none is named.
        texts: help texts that differ, by field.
        defaults: defaults that differ, by field.
    """

    def decorate(command: Command) -> Command:
        own = dict(inspect.signature(command, eval_str=True).parameters)
        chosen = [field for field in fields(TargetOptions) if not names or field.name in names]
        added = {
            option_name(field.name): option_parameter(
                field.name,
                _HINTS[field.name],
                defaults.get(field.name, field.default),
                (texts or {}).get(field.name),
            )
            for field in chosen
        }
        del own["options"]
        target = {}
        if own.pop("target", None) is not None:
            for name, kind in (("target", TargetArgument), ("model", ModelOption)):
                target[name] = inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind
                )

        @functools.wraps(command)
        def run(**given: Any) -> None:
            if target:
                given["target"] = _named(given["target"], given.pop("model"), given)
            options = {
                field.name: read_option(
                    field.name, _HINTS[field.name], given.pop(option_name(field.name))
                )
                for field in chosen
            }
            command(**given, options=options)

        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (target | added | own).values()
        ]
        # Typer reads both.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def option_name(field: str) -> str:
    """The name of a field's option: a repeatable one is named in the singular."""
    return field.removesuffix("s") if field.endswith("options") else field


def option_parameter(
    field: str, hint: Any, default: Any, text: str | None = None
) -> inspect.Parameter:
    """A field of a dataclass of options as a parameter that Typer makes an option of.

    Args:
        field: its name.
        hint: its type, annotated with its help text.
        default: its default; ``inspect.Parameter.empty`` makes the option required.
        text: a help text instead of that of the hint.
    """
    kind, usual = get_args(hint)
    members = _members(kind)
    single = get_origin(members[0]) or members[0]
    if single is Literal:
        read: Any = _enum("Choice", list(get_args(members[0])))
        default = read(default)
    elif single in (Mapping, list):
        read = list[str] | None
        default = None
    elif single is Sequence:
        read = str | None
        default = ",".join(default) if default else None
    elif members == (str, Path):
        read = Path | None if default is None else Path
    elif len(members) > 1:
        read = str | None
    else:
        read = kind
    return inspect.Parameter(
        option_name(field),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[read, typer.Option(help=text or usual)],
    )


def read_option(field: str, hint: Any, value: Any) -> Any:
    """The value of a field, from what Typer read for its option."""
    first = _members(get_args(hint)[0])[0]
    if get_origin(first) is Mapping:
        return pairs(value)
    if first == list[str]:
        return value or []
    if first == Sequence[float]:
        return numbers(field, value)
    if first == Sequence[str]:
        return words(value)
    return value.value if isinstance(value, StrEnum) else value


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union without None."""
    members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return tuple(member for member in members if member is not type(None))


def _named(target: str | None, model: str | None, given: dict[str, Any]) -> str:
    """What a command works on: a run, or the name of a network.

    A file beside ``--model`` is the file of its weights.
    """
    if target is not None and model is not None and not given["weights"]:
        file = user_path(target)
        if file.is_file():
            given["weights"], target = file, None
    if target is not None and model is None:
        named = ":" in target or user_path(target).is_file()  # a network, or a file of one
        if not named and any(given[name] for name in ("weights", "option", "mean", "std")):
            raise ConfigError("--weights, --option, --mean and --std go with --model")
        return target
    if model is not None and target is None:
        return model
    raise ConfigError(
        "expected a run folder, or --model NAME with its weights in --weights FILE, and not both"
    )


def numbers(name: str, text: str | None) -> list[float] | None:
    """The numbers in ``text``, the value of the option ``name``."""
    if text is None:
        return None
    try:
        return [float(Ratio(part)) for part in text.strip("[]() ").replace(",", " ").split()]
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
