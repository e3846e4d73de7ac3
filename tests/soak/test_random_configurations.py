"""Random settings of a small training: it trains, or one sentence says why not."""

from __future__ import annotations

import tempfile
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticUndefined
from safetensors.torch import load_file
from tally import done_or_refused, examples, mostly_done

import cure
from cure.config import DataConfig, ModelConfig, Ratio, RunConfig, Section, TeacherConfig
from cure.methods import METHODS
from cure.runs.folder import RunFolder
from helpers import bright_or_dark

SMALL = {"name": "small_cnn", "options": {"width": 2}}
NUMBERS = {
    int: (0, 1, 2, 3, 5, 16),
    float: (0.0, 0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0, 2.0, 30.0),
}
RATIOS = ("1/255", "2/255", "8/255", 0.05, "0.3", 1)
LEFT_OUT = frozenset(
    (
        # What the machine, a folder or another package decides; and what is drawn below.
        *(
            "name",
            "description",
            "seed",
            "data",
            "data.source",
            "model",
            "method",
            "tracking",
            "evaluation",
        ),
        *("start", "start_key", "new_head"),
        *("training.device", "training.threads", "training.compile", "training.minutes"),
        *(
            "data.limit",
            "data.background",
            "training.epochs",
            "training.batch_size",
            "natural.epochs",
        ),
        *("attack.steps", "training.validation_steps"),
    )
)
LISTS = {
    "training.schedule.milestones": ((), (0.5,), (0.3, 0.6), (0.6, 0.3)),
    "natural.schedule.milestones": ((), (0.5,)),
    "layers.update": ((), ("B1",), ("classifier",), ("linear",), ("conv2", "bn2"), ("stem",)),
}


def allowed(value: Any, bounds: list[Any]) -> bool:
    """Whether a number is within the bounds of an annotation."""
    tests = {
        Ge: lambda bound: value >= bound.ge,
        Gt: lambda bound: value > bound.gt,
        Le: lambda bound: value <= bound.le,
        Lt: lambda bound: value < bound.lt,
    }
    return all(tests[type(bound)](bound) for bound in bounds if type(bound) in tests)


def values(kind: Any, bounds: list[Any] | tuple[Any, ...] = ()) -> list[Any]:
    """Some values of a type as a setting declares it; of a type that is not known, none."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *more = get_args(kind)
        return values(inner, [*bounds, *more])
    if origin in (Union, types.UnionType):
        return [value for one in get_args(kind) for value in values(one, bounds)]
    if origin is Literal:
        return list(get_args(kind))
    if kind is bool:
        return [False, True]
    if kind is Ratio:
        return list(RATIOS)
    if kind in NUMBERS:
        return [value for value in NUMBERS[kind] if allowed(value, list(bounds))]
    return [None] if kind is type(None) else []


def sections_of(kind: Any) -> list[type[Section]]:
    """The sections among the parts of a type."""
    found = [kind] if isinstance(kind, type) and issubclass(kind, Section) else []
    return found + [one for part in get_args(kind) for one in sections_of(part)]


def leaves(section: type[Section], prefix: str = "") -> dict[str, list[Any]]:
    """Some values of each setting in a section and those inside it."""
    found: dict[str, list[Any]] = {}
    for key, field in section.model_fields.items():
        name = prefix + key
        inner = [s for s in sections_of(field.annotation) if s not in (ModelConfig, TeacherConfig)]
        if name in LEFT_OUT or name == "method.name":
            continue
        if name in LISTS:
            found[name] = list(LISTS[name])
        elif inner:
            for one in inner:
                found |= leaves(one, f"{name}.")
        elif some := values(field.annotation, field.metadata):
            found[name] = some
    return found


def needed(section: type[Section], prefix: str = "method.") -> dict[str, Any]:
    """A natural teacher and small networks wherever a method asks for some."""
    found: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        if TeacherConfig in inner and field.default is PydanticUndefined:
            found[prefix + key] = "natural"
        elif ModelConfig in inner:
            found[prefix + key] = SMALL
        else:
            for one in inner:
                if one is not TeacherConfig:
                    found |= needed(one, f"{prefix}{key}.")
    return found


COMMON = leaves(RunConfig) | leaves(DataConfig, "data.")
OWN = {name: leaves(METHODS[name].Config, "method.") for name in METHODS.names()}
NEEDED = {name: needed(METHODS[name].Config) for name in METHODS.names()}


@st.composite
def changes(draw: Any, possible: dict[str, list[Any]], most: int) -> dict[str, Any]:
    """A few settings with a value each."""
    if not possible:
        return {}
    names = draw(st.lists(st.sampled_from(sorted(possible)), max_size=most, unique=True))
    return {name: draw(st.sampled_from(possible[name])) for name in names}


@st.composite
def configurations(draw: Any) -> dict[str, Any]:
    """Settings of a training of few steps."""
    name = draw(st.sampled_from(METHODS.names()))
    return {
        "method": {"name": name},
        **NEEDED[name],
        "model": SMALL,
        "start": draw(st.sampled_from(["natural", "scratch", "model"])),
        "seed": draw(st.integers(0, 3)),
        "data.validation": draw(st.sampled_from([4, 0.2])),
        "natural.epochs": 1,
        "training.epochs": draw(st.integers(1, 2)),
        "training.batch_size": draw(st.sampled_from([8, 12, 16])),
        "training.validation_steps": 1,
        "training.threads": 1,
        "attack.steps": draw(st.integers(1, 3)),
        "attack.step_size": "1/255",
        **draw(changes(COMMON, 6)),
        **draw(changes(OWN[name], 3)),
    }


@examples(40, 1000)
@given(configurations(), st.sampled_from([16, 20, 28]), st.integers(2, 3))
def try_configuration(settings: dict[str, Any], count: int, classes: int) -> None:
    with tempfile.TemporaryDirectory() as place, done_or_refused("configurations"):
        images = bright_or_dark(count, classes=classes)
        run = cure.train("digits", settings, run=Path(place) / "run", data=images, quiet=True)
        assert RunFolder.open(run.path).status().finished
        weights = load_file(run.path / "checkpoints" / "last.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_random_configuration_trains_or_is_refused_in_a_sentence() -> None:
    try_configuration()
    mostly_done("configurations", 0.3)


def test_every_section_of_a_recipe_is_drawn_from() -> None:
    """The walk over the settings finds those that a person would name."""
    assert COMMON["attack.name"] == ["pgd", "n-fgsm"]
    assert COMMON["training.averaging.kind"] == ["exponential", "equal"]
    assert 0.0 in COMMON["training.averaging.decay"]
    assert 1.0 not in COMMON["training.averaging.decay"]
    assert {"data.augment.mixup", "training.accumulation_steps"} <= COMMON.keys()
    assert "method.mask.kind" in OWN["cure"]
    assert NEEDED["kd"] == {"method.teacher": "natural"}
    assert not LEFT_OUT & COMMON.keys()
