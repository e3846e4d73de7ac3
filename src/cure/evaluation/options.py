"""Which weights and images a command or function works on: declared once for all of them.

Imports no PyTorch, so that ``cure --help`` can read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

from cure.config import Split, checked
from cure.errors import ConfigError

if TYPE_CHECKING:
    from cure.data import ImageSet

Checkpoint = Literal["best", "last"]


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Weights, images and device for a target; annotated with the help texts of the commands.

    Attributes:
        weights: weights file for a named network or a module.
        weights_key: which set of weights to take where the file holds several ("ema").
        options: arguments of a named network's builder ({"width": 16}).
        mean: with ``std``: what the network expects its input to be standardised with, one number
            a channel, for images in [0, 1].
        std: see ``mean``.
        checkpoint: which weights of a run.
        data: images: what ``data.source`` may be, or an object that :func:`cure.data.as_images`
            takes; needed unless the target is a run, which knows its own.
        data_options: further keys of the ``data`` section ({"resize": 224}).
        split: which split; test images are for final figures.
        limit: only the first so many images; all when None.
        batch_size: images at once; by default the run's ``evaluation.batch_size``, else 256.
        device: "auto", "cpu", "cuda".
        seed: of everything random.

    Raises:
        ConfigError: when a value has another type, ``limit`` or ``batch_size`` is below 1, or
            ``weights_key`` is given without ``weights``.
    """

    weights: Annotated[str | Path | None, "Weights file of a named network."] = None
    weights_key: Annotated[str | None, "Which weights, where the file holds several: ema."] = None
    options: Annotated[
        Mapping[str, Any] | None, "Option of a named network, for example width=16; repeatable."
    ] = None
    mean: Annotated[
        Sequence[float] | None, "What a named network subtracts from its input: 0.49,0.48,0.45"
    ] = None
    std: Annotated[Sequence[float] | None, "What a named network divides its input by."] = None
    checkpoint: Annotated[Checkpoint, "Weights of a run."] = "best"
    data: Annotated[
        str | Path | ImageSet | object, "Images (default: those of the run); see `cure list data`."
    ] = None
    data_options: Annotated[
        Mapping[str, Any] | None, "Key of the data section: resize=32; repeatable."
    ] = None
    split: Annotated[Split, "Which images."] = "test"
    limit: Annotated[int | None, "Only the first so many images."] = None
    batch_size: Annotated[int | None, "Images at once."] = None
    device: Annotated[str, "auto, cpu, cuda."] = "auto"
    seed: Annotated[int, "Seed of all draws."] = 0

    def __post_init__(self) -> None:
        check_options(self)
        check_counts(limit=self.limit, batch_size=self.batch_size)
        if self.weights_key is not None and self.weights is None:
            raise ConfigError(
                f"weights_key: '{self.weights_key}' is a set of weights in a file; name the file "
                "in weights, too"
            )


class TargetKeywords(TypedDict, total=False):
    """The fields of :class:`TargetOptions` as keyword arguments of functions, for type checkers."""

    weights: str | Path | None
    weights_key: str | None
    options: Mapping[str, Any] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    checkpoint: Checkpoint
    data: str | Path | ImageSet | object
    data_options: Mapping[str, Any] | None
    split: Split
    limit: int | None
    batch_size: int | None
    device: str
    seed: int


def check_options(options: Any) -> None:
    """Refuse values that a dataclass of options does not declare (:func:`cure.config.checked`).

    Raises:
        ConfigError: in one sentence.
    """
    hints = get_type_hints(type(options), localns={"ImageSet": object})
    for each in fields(options):
        value = checked(each.name, getattr(options, each.name), hints[each.name])
        object.__setattr__(options, each.name, value)


def check_counts(**counts: int | None) -> None:
    """Refuse numbers of images, by the name of their option, that are given and below 1.

    Raises:
        ConfigError: in one sentence.
    """
    for name, count in counts.items():
        if checked(name, count, int | None) is not None and count < 1:  # type: ignore[operator]
            raise ConfigError(f"{name}: expected 1 or more images, got {count}")
