"""What an exported network says of itself: the metadata of safetensors, ONNX and hub files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cure.data.images import ImageKind
from cure.errors import CheckpointError

CONTRACT_FORMAT = "cure-artefact-1"
MARK = "cure_format"
"""Key of the metadata whose presence tells that the other keys are a contract."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class Preprocessing(_Part):
    """What must be done to an image file before the network sees it."""

    size: list[int] = Field(min_length=2, max_length=2)
    """Height and width in pixels."""
    channels: Literal[1, 3]
    """1 (grey) or 3 (RGB)."""
    resize: int | None = None
    """Pixels a side to resize to, antialiased; None: images already have ``size``."""
    fit: str = "stretch"
    """``stretch``, or ``crop``: shorter side to ``resize``, then the middle square."""
    background: str = "white"
    """Colour behind transparent images."""
    range: list[float] = [0.0, 1.0]
    """Of the pixels: 8-bit values divided by 255, not standardised."""


class Normalisation(_Part):
    """Constants that the network applies itself: ``(image - mean) / std``."""

    mean: list[float]
    std: list[float]
    inside: bool = True
    """False in files that hold weights alone: whoever loads them must apply the constants."""


class Measured(_Part):
    """Accuracy of the network that was exported, in percent."""

    attack: str
    """"natural" or the name of an attack."""
    accuracy: float
    interval: list[float] = Field(min_length=2, max_length=2)
    n: int
    """Images."""
    split: str
    norm: str | None = None
    epsilon: str | None = None


class Contract(_Part):
    """What a program must know to use an exported network, and what was measured of it."""

    classes: list[str] = Field(min_length=1)
    preprocessing: Preprocessing
    normalisation: Normalisation | None = None
    """None where the network takes images in [0, 1] as they are."""
    threat: dict[str, Any]
    """``norm`` and ``epsilon`` (text such as 8/255) of the training."""
    accuracies: list[Measured] = []
    """Of the float network before export; empty when nothing was measured."""
    warnings: list[str] = []
    """What makes these accuracies less than they seem, a sentence each."""
    data: dict[str, Any] = {}
    """Images on which the file was checked: ``name``, ``split``, ``n``, ``sha256``."""
    network: dict[str, Any] = {}
    """``name`` and ``options`` as in a recipe, ``parameters``."""
    run: dict[str, Any] = {}
    """``name``, ``method``, ``checkpoint``, ``epoch``, ``seed``, ``weights_sha256``; ``shares`` of
    the weights that ``cure tradeoff`` mixed, the start's first."""
    precision: Literal["float32", "int8"] = "float32"
    check: dict[str, Any] = {}
    """How far the file's logits were from those of the run, and the tolerance."""
    temperature: float | None = None
    """Divides logits so that their softmax is calibrated on the validation images."""
    versions: dict[str, str] = {}
    """Of this package, PyTorch, ONNX."""

    @property
    def kind(self) -> ImageKind:
        """The images that the network takes."""
        height, width = self.preprocessing.size
        return ImageKind(tuple(self.classes), self.preprocessing.channels, (height, width))

    def metadata(self) -> dict[str, str]:
        """The contract as text by key, for the headers of safetensors and ONNX files.

        Values are JSON, so that ``json.loads(metadata["classes"])`` gives the list.
        """
        fields = self.model_dump(mode="json")
        texts = {name: json.dumps(value, ensure_ascii=False) for name, value in fields.items()}
        return {MARK: CONTRACT_FORMAT} | texts

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], path: object) -> Self | None:
        """The contract in a file's metadata; None where there is none.

        Args:
            metadata: of the file.
            path: of the file, for messages.

        Raises:
            CheckpointError: when the contract is damaged.
        """
        if MARK not in metadata:
            return None
        try:
            found = {
                name: json.loads(metadata[name]) for name in cls.model_fields if name in metadata
            }
        except ValueError as error:
            raise CheckpointError(
                f"{path}: its metadata is damaged ({error}); export it again"
            ) from None
        return cls.parse(found, path)

    @classmethod
    def parse(cls, content: object, path: object) -> Self:
        """The contract in a dictionary, as ``config.json`` holds it.

        Raises:
            CheckpointError: when a key is missing or has another type.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(
                f"{path}: its metadata is damaged ({where}: {first['msg']}); export it again"
            ) from None
