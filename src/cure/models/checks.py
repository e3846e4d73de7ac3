"""Whether a network behaves as a classifier of these images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cure.errors import ConfigError, ModelError
from cure.models.failure import failed_in

NEW_HEAD_ADVICE = (
    "to train a new last layer, say new_head=true start=natural, or start=natural:FILE"
)
"""What to do with a network of other classes."""


def predicted(logits: Tensor) -> Tensor:
    """The class with the largest logit [B]; -1, which is no class, where a logit is not a number.

    >>> predicted(torch.tensor([[0.0, 2.0], [float("nan"), 2.0]])).tolist()
    [1, -1]
    """
    return logits.argmax(dim=1).masked_fill(logits.isnan().any(dim=1), -1)


def check_network(given: object, wanted: str = "a network as a torch.nn.Module") -> None:
    """Refuse what is no network; ``wanted`` says what it should be.

    Raises:
        ConfigError: in one sentence.
    """
    if isinstance(given, nn.Module):
        return
    came, advice = type(given).__name__, "put a function or several networks into a module"
    if isinstance(given, type):
        came, advice = f"the class {given.__name__}", f"pass a network of it, {given.__name__}()"
    elif isinstance(given, str):
        came, advice = f"'{given}'", f"a name goes into the settings: model.name={given}"
    raise ConfigError(f"expected {wanted}, got {came}; {advice}")


def check_labels(label: Tensor, images: int, classes: int | None = None) -> None:
    """Refuse labels of another form than classes [B], int64, or probabilities [B, K].

    Args:
        label: of one batch.
        images: in the batch.
        classes: K, where it is known.

    Raises:
        ConfigError: in one sentence.
    """
    if len(label) != images:
        raise ConfigError(f"expected a label for each of {images} images, got {len(label)}")
    if label.dim() != 1:
        shape = tuple(label.shape[1:])
        if len(shape) != 1 or shape[0] < 2 or (classes is not None and shape != (classes,)):
            raise ConfigError(
                f"expected labels as classes [B] or probabilities [B, {classes or 'classes'}], got "
                f"{list(label.shape)}"
            )
    elif label.dtype != torch.int64:
        raise ConfigError(f"expected labels in int64, got {label.dtype}; say labels.long()")
    elif classes is not None and (label.min() < 0 or label.max() >= classes):
        raise ConfigError(
            f"expected labels 0 to {classes - 1} for {classes} logits, got {int(label.min())} to "
            f"{int(label.max())}; labels count from 0"
        )


def check_range(image: Tensor) -> None:
    """Refuse images [B, C, H, W] that are not in [0, 1], beyond rounding.

    Raises:
        ConfigError: in one sentence.
    """
    if image.numel() and not -1e-4 <= image.min() <= image.max() <= 1 + 1e-4:
        raise ConfigError(
            f"expected images in [0, 1], got values from {image.min():.3g} to {image.max():.3g}; "
            "divide 8-bit values by 255, and standardise inside the model: "
            "cure.models.Normalised(model, mean, std)"
        )


@torch.no_grad()
def checked_logits(model: nn.Module, image: Tensor, classes: str = "classes") -> Tensor:
    """The logits [B, K] of images [B, C, H, W].

    Args:
        model: in evaluation mode.
        image: some images.
        classes: what messages call K.

    Raises:
        ModelError: when the network fails, or returns anything else.
    """
    try:
        logits = model(image)
    except Exception as error:
        raise ModelError(failed_in(error, "the model", image)) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(image):
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"expected logits of shape [{len(image)}, {classes}], got {came}; return one score "
            "a class for each image"
        )
    return logits


def check_outputs(model: nn.Module, image: Tensor, classes: int) -> None:
    """Refuse outputs that attacks would misinterpret without an error.

    Args:
        model: in evaluation mode.
        image: [B, C, H, W] in [0, 1], some of the images to be evaluated.
        classes: number of classes of the data.

    Raises:
        ModelError: when the output is no finite logits [B, classes].
    """
    logits = checked_logits(model, image, str(classes))
    if logits.shape[1] != classes:
        from_1 = logits.shape[1] == classes - 1
        raise ModelError(
            f"the model returns {logits.shape[1]} logits but the data has {classes} classes; "
            f"use a model with {classes} outputs, or images of its own classes; {NEW_HEAD_ADVICE}"
            f"{' (labels count from 0, not from 1)' if from_1 else ''}"
        )
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "the model returns values that are not finite; its weights are damaged or its input "
            "is expected in another range than [0, 1]"
        )
    sums = logits.sum(dim=1)
    if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ModelError(
            "the model returns probabilities, not logits; remove its softmax: through it, "
            "gradients vanish and attacks look weaker than they are"
        )
