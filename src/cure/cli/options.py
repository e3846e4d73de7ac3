"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from cure.errors import ConfigError
from cure.evaluation.options import TargetOptions

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
            _flag(field.name): _parameter(
                field, (texts or {}).get(field.name), defaults.get(field.name, field.default)
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
            options = {field.name: _read(field.name, given) for field in chosen}
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


def _flag(field: str) -> str:
    """The name of a field's option: a repeatable one is named in the singular."""
    return field.removesuffix("s") if field.endswith("options") else field


def _parameter(field: Field[Any], text: str | None, default: Any) -> inspect.Parameter:
    """A field as a parameter that Typer makes an option of."""
    kind, usual = get_args(_HINTS[field.name])
    if field.name in ("weights", "data"):
        kind = (Path if field.name == "weights" else str) | None
    elif field.name.endswith("options"):
        kind = list[str] | None
    elif field.name in ("mean", "std"):
        kind = str | None
    elif get_origin(kind) is Literal:
        kind = _enum("Choice", list(get_args(kind)))
        default = kind(default)
    return inspect.Parameter(
        _flag(field.name),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(help=text or usual)],
    )


def _read(field: str, given: dict[str, Any]) -> Any:
    """Take the value of a field out of what a command was given."""
    value = given.pop(_flag(field))
    if field.endswith("options"):
        return pairs(value)
    if field in ("mean", "std"):
        return numbers(field, value)
    return value.value if isinstance(value, StrEnum) else value


def _named(target: str | None, model: str | None, given: Mapping[str, Any]) -> str:
    """What a command works on: a run, or the name of a network."""
    if target is not None and model is None:
        if any(given[name] for name in ("weights", "option", "mean", "std")):
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
