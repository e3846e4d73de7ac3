"""From a recipe and ``key=value`` words to a checked :class:`~cure.config.RunConfig`."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cure.config import MethodConfig, RunConfig, Section
from cure.errors import ConfigError, CureNote, unknown
from cure.registry import METHODS
from cure.utils.io import user_path

Raw = dict[str, Any]

_MOVED = {"training.tensorboard": "say tracking=[tensorboard], or nothing: it is off by default"}
"""Keys of earlier versions, and what is said now."""


LENGTHS = ("epochs", "minutes")
"""Settings of how long a training takes, before which the ``min_steps`` of a recipe gives way."""


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("cure") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a recipe and its overrides describe.

    Args:
        recipe: a name from :func:`recipe_names` or the path of a YAML file.
        overrides: words ``section.key=value``, values in YAML ("8/255", 0.1, [0.5, 0.75], null).

    Raises:
        ConfigError: for anything unknown, of the wrong type or out of range; all at once.

    >>> load_recipe("digits", ["method=trades"]).method.beta
    6.0
    """
    raw = read_recipe(recipe)
    override_all(raw, map(parse_override, overrides))
    return check(raw, f"recipe {recipe}")


TO_BE_GIVEN = "(to be given)"
"""What :func:`show_recipe` prints for a setting that a recipe leaves to its user."""


def show_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> str:
    """A recipe with its overrides as YAML: every setting as it would run.

    Data and network that the recipe leaves to its user may be missing.

    Raises:
        ConfigError: as :func:`load_recipe`.
    """
    raw = read_recipe(recipe)
    override_all(raw, map(parse_override, overrides))
    for section, key in (("data", "source"), ("model", "name")):
        given = raw.setdefault(section, {})
        if isinstance(given, dict):
            given.setdefault(key, TO_BE_GIVEN)
    return dump(check(raw, f"recipe {recipe}"))


def read_recipe(recipe: str | Path) -> Raw:
    """The recipe as plain data, with what it ``extends`` filled in."""
    return _read(recipe, ())


def _read(recipe: str | Path, children: tuple[str, ...]) -> Raw:
    text, folder = _find(recipe)
    own = str(Path(recipe).resolve()) if folder else str(recipe)
    if own in children:
        raise ConfigError(f"recipe {recipe} extends itself; name another recipe")
    raw = _parse(text, str(recipe))
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    beside = folder / f"{parent}.yaml" if folder else None
    found = beside if beside is not None and beside.exists() else str(parent)
    return _merge(_read(found, (*children, own)), raw)


def _find(recipe: str | Path) -> tuple[str, Path | None]:
    """Text of a recipe, and its folder when it is a file of the user's."""
    path = user_path(recipe)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.parent
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {recipe} cannot be read as text: {error}") from None
    if str(recipe) not in recipe_names():
        raise ConfigError(unknown("recipe", str(recipe), recipe_names()))
    return (resources.files("cure") / "recipes" / f"{recipe}.yaml").read_text("utf-8"), None


class _Loader(yaml.SafeLoader):
    """Reads ``on``, ``off``, ``yes`` and ``no`` as text, as YAML 1.2 does: settings have values of
    such names."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(text: str) -> Any:
    """What a recipe, a plan or a value holds.

    >>> read_yaml("[off, true, true_mass, 8/255]")
    ['off', True, 'true_mass', '8/255']
    """
    return yaml.load(text, _Loader)


def _parse(text: str, name: str) -> Raw:
    try:
        raw = read_yaml(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise ConfigError(
            f"recipe {name} is not valid YAML{line}: {getattr(error, 'problem', error)}"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {name} holds no sections; `cure list recipes` shows examples")
    return raw


def _merge(base: Raw, change: Raw) -> Raw:
    merged = dict(base)
    if any(name in change for name in LENGTHS):
        merged.pop("min_steps", None)
    if "epochs" in change:
        merged.pop("minutes", None)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value)
        merged[key] = value
    return merged


def parse_override(word: str) -> tuple[str, object]:
    """The place and the value in a word ``key=value``, the value in YAML.

    Raises:
        ConfigError: when the word is none.
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"expected key=value, for example training.epochs=10, got '{word}'")
    try:
        return key, read_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value in '{word}' is not valid YAML; quote it?") from None


def override(raw: Raw, key: str, value: object) -> None:
    """Set one value in a recipe, in place: ``override(raw, "training.epochs", 10)``.

    ``training.batch_size=auto`` keeps the number and sets ``training.accumulation_steps=auto``.
    Another ``method.name`` drops the settings of the method before, as ``method=NAME`` does, and
    notes which: settings of the same name mean other things in other methods.  A section as a whole
    (``training={epochs: 5}``) replaces that of the recipe, and notes what it drops.  A length in
    ``epochs`` or ``minutes`` drops the recipe's ``min_steps`` beside it, and ``epochs`` also its
    ``minutes``.

    Raises:
        ConfigError: when the place lies inside a plain value.
    """
    if key == "training.batch_size" and value == "auto":
        key = "training.accumulation_steps"
    *sections, last = key.split(".")
    for section in sections:
        inner = raw.setdefault(section, {})
        if inner is None:
            inner = raw[section] = {}
        if isinstance(inner, str):
            # `method=trades method.beta=3`: a name stands for a section with that name.
            inner = raw[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: '{section}' is a value, not a section with keys")
        raw = inner
    if key == "method.name" and raw.get("name") not in (None, value):
        dropped = [name for name in raw if name != "name"]
        if dropped:
            warnings.warn(
                f"method.name={value} drops the settings of {raw['name']}: {', '.join(dropped)}",
                CureNote,
                stacklevel=2,
            )
        raw.clear()
    old = raw.get(last)
    if isinstance(value, dict) and isinstance(old, dict):
        dropped = [name for name in old if name not in value]
        if dropped and old.get("name") == value.get("name"):
            one = next((name for name in value if name != "name"), dropped[0])
            warnings.warn(
                f"{key}={{...}} replaces the whole section and drops {', '.join(dropped)}; "
                f"to change one setting, say {key}.{one}=VALUE",
                CureNote,
                stacklevel=2,
            )
    if last in LENGTHS:
        raw.pop("min_steps", None)
    if key == "training.epochs":
        raw.pop("minutes", None)
    raw[last] = copy.deepcopy(value)  # A later override inside it must not reach the giver's.


def override_all(raw: Raw, pairs: Iterable[tuple[str, object]]) -> None:
    """Set several values, in place, in whatever order they are given.

    What drops others comes first: the method before its settings, a section before what is in it,
    a length before ``min_steps``.  :func:`layered` puts settings above others first.

    >>> recipe = {"training": {"epochs": 40, "min_steps": 1500}}
    >>> override_all(recipe, [("training.min_steps", 200), ("training.epochs", 12)])
    >>> recipe
    {'training': {'epochs': 12, 'min_steps': 200}}
    """

    def place(pair: tuple[str, object]) -> tuple[bool, int, bool]:
        key, _ = pair
        is_method = key in ("method", "method.name")
        return not is_method, key.count("."), key.rpartition(".")[2] not in LENGTHS

    for key, value in sorted(pairs, key=place):
        override(raw, key, value)


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of several layers in one, without those that a later layer replaces.

    A plan's row goes above the plan, a trial above its sweep.

    >>> layered({"training.min_steps": 9, "training.epochs": 4, "seed": 1}, {"training.epochs": 2})
    {'training.epochs': 2, 'seed': 1}
    >>> layered({"method.beta": 3, "seed": 1}, {"method": "at"})
    {'seed': 1, 'method': 'at'}
    """

    def replaced(old: str, layer: Mapping[str, Any]) -> bool:
        section, _, last = old.rpartition(".")
        lengths = {"min_steps": LENGTHS, "minutes": ("epochs",)}.get(last, ())
        within = any(old.startswith(f"{key}.") for key in layer)
        return within or any(f"{section}.{name}" in layer for name in lengths)

    found: dict[str, Any] = {}
    for layer in layers:
        found = {key: value for key, value in found.items() if not replaced(key, layer)}
        found |= layer
    return found


def changed(raw: Mapping[str, Any], settings: Mapping[str, object]) -> Raw:
    """A copy of a recipe with several values set."""
    new = copy.deepcopy(dict(raw))
    override_all(new, settings.items())
    return new


def check(raw: Mapping[str, Any], where: str, *, kept: bool = False) -> RunConfig:
    """Plain data as a checked configuration; every mistake is named in one message.

    Args:
        raw: the sections.
        where: what they are, for the message.
        kept: whether they are those of an existing run, whose units are not questioned.
    """
    mistakes: list[str] = []
    method, method_type = _check_method(raw.get("method"), mistakes)
    try:
        config = RunConfig.model_validate({**raw, "method": method}, context={"kept": kept})
    except ValidationError as error:
        mistakes += [
            explain(item, RunConfig) + _of_method(method_type, item) for item in error.errors()
        ]
    if mistakes:
        count = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError(f"{where} has {count}:\n" + "\n".join(f"  - {m}" for m in mistakes))
    assert isinstance(config.method, method_type)
    return config


def check_kept(raw: Mapping[str, Any], where: str) -> RunConfig:
    """As :func:`check`, for what a run keeps, which an earlier version may have written.

    ``training.tensorboard`` was on by default and wrote only where TensorBoard was installed, so it
    is dropped.
    """
    training = raw.get("training")
    if isinstance(training, dict):
        raw = {**raw, "training": {k: v for k, v in training.items() if k != "tensorboard"}}
    return check(raw, where, kept=True)


def _check_method(raw: object, mistakes: list[str]) -> tuple[MethodConfig, type[MethodConfig]]:
    """The method's section, checked by the method's own class."""
    placeholder = MethodConfig(name="unknown"), MethodConfig
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        mistakes.append(
            "method: expected a section with a name, for example {name: cure}; "
            f"known: {', '.join(METHODS.names())}"
        )
        return placeholder
    if raw["name"] not in METHODS:
        mistakes.append("method.name: " + METHODS.unknown(raw["name"]))
        return placeholder
    kind = METHODS[raw["name"]].Config
    try:
        return kind.model_validate(raw), kind
    except ValidationError as error:
        mistakes += [
            explain(item, kind, "method") + _owners(raw["name"], item) for item in error.errors()
        ]
        return placeholder


def _owners(method: str, item: Any) -> str:
    """Where an unknown key of a method's section belongs, when other methods have it."""
    key = item["loc"][0] if item["loc"] else None
    if item["type"] != "extra_forbidden" or len(item["loc"]) > 1:
        return ""
    owners = [name for name in METHODS.names() if key in METHODS[name].Config.model_fields]
    if not owners:
        return ""
    return f". '{key}' is a setting of {', '.join(owners)}, and the method is {method}"


def _of_method(method: type[MethodConfig], item: Any) -> str:
    """Where an unknown key of the recipe belongs, when the method has it."""
    key = item["loc"][-1] if item["loc"] else None
    if item["type"] != "extra_forbidden" or key not in method.model_fields:
        return ""
    return f"; the method has it: method.{key}"


def explain(item: Any, root: type[BaseModel], *prefix: str) -> str:
    """One mistake in words: where, what was expected, what came.

    Args:
        item: one of ``ValidationError.errors()``.
        root: the class whose content was checked.
        prefix: where that content lies.

    >>> from cure.config import DataConfig
    >>> try:
    ...     DataConfig(source="digits", resiz=32)
    ... except ValidationError as error:
    ...     print(explain(error.errors()[0], DataConfig, "data")[:51])
    data: unknown key 'resiz'; did you mean 'resize'? K
    """
    location = tuple(str(part) for part in item["loc"])
    name = ".".join((*prefix, *location))
    if name in _MOVED:
        return f"{name}: is no setting any more; {_MOVED[name]}"
    if item["type"] == "extra_forbidden":
        fields = _section_at(root, location[:-1]).model_fields
        return f"{'.'.join((*prefix, *location[:-1])) or 'recipe'}: " + unknown(
            "key", location[-1], fields
        )
    if item["type"] == "missing":
        return f"{name}: is missing"
    message = item["msg"][0].lower() + item["msg"][1:]
    came = item["input"]
    shown = "" if "got" in message or isinstance(came, dict) else f", got {came!r}"
    # A mistake in how several settings fit together names them itself.
    return f"{name}: {message}{shown}" if name else f"{message}{shown}"


def _section_at(root: type[BaseModel], location: tuple[str, ...]) -> type[BaseModel]:
    """The class of a section; in a list or a mapping of sections, of each of them."""
    section, parts = root, iter(location)
    for part in parts:
        field = section.model_fields[part].annotation
        if get_origin(field) in (tuple, dict):
            next(parts)
        options = [field, *getattr(field, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, Section))
    return section


def dump(config: RunConfig) -> str:
    """The configuration as YAML that :func:`check` reads back to the same run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
