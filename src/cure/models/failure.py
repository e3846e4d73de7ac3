"""Errors from inside a network, in one sentence: the layer, the shape it got, the user's line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from cure.errors import CureError, ModelError, OutOfMemory
from cure.models.wrapper import Wrapper
from cure.utils.memory import is_out_of_memory

_TORCH = str(Path(torch.__file__).parent)
_CURE = str(Path(__file__).parents[1])


def reason_of(error: BaseException) -> str:
    """The error in one line; of TorchScript, whose messages are tracebacks, the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    scripted = any("TorchScript" in line for line in lines)
    text = (lines[-1] if scripted else lines[0]) if lines else ""
    text = text.removeprefix("RuntimeError: ")
    return f"{type(error).__name__}: {text[:300].rstrip('.')}" if text else type(error).__name__


def network_error(error: BaseException) -> str | None:
    """Where in a network an error came from; None when it came from elsewhere.

    Returns:
        For example "layer 'fc' (Linear), given [2, 1024], at own.py, line 27: RuntimeError: ...".
    """
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    inside = [number for number, (frame, _) in enumerate(frames) if _module_of(frame) is not None]
    if not inside:
        return None
    frames = frames[inside[0] :]
    root = _module_of(frames[0][0])
    inner = next(filter(None, (_module_of(frame) for frame, _ in reversed(frames))))
    assert root is not None
    name = next((name for name, module in root.named_modules() if module is inner), "")
    layer = f"layer '{name}' ({type(inner).__name__})" if name else type(inner).__name__
    shape = next((_shape(frame) for frame, _ in frames if _module_of(frame) is inner), "")
    lines = [
        f"{Path(frame.f_code.co_filename).name}, line {line}"
        for frame, line in frames
        if not frame.f_code.co_filename.startswith((_TORCH, _CURE, "<"))
    ]
    place = f", at {lines[-1]}" if lines else ""
    return f"{layer}{f', given {shape}' if shape else ''}{place}: {reason_of(error)}"


def failed_in(error: BaseException, title: str, image: Tensor | None, mode: str = "") -> str:
    """The sentence for a network that failed on images [B, C, H, W].

    An error that a user can correct already says what to do.
    """
    if isinstance(error, CureError):
        return str(error)
    images = f" on images of shape {list(image.shape)}" if image is not None else ""
    where = network_error(error) or reason_of(error)
    return (
        f"{title} failed{images}{f' {mode}' if mode else ''}: {where}; correct its forward, or, "
        "where it expects another size or number of channels, set data.resize or data.color"
    )


@contextmanager
def network_errors() -> Iterator[None]:
    """Inside, an error that comes from a network becomes a :class:`ModelError`."""
    try:
        yield
    except CureError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"there is not enough memory for so many images at once ({reason_of(error)[:120]});"
                " lower the batch size (--batch-size N, batch_size=N), first to a half"
            ) from error
        if network_error(error) is None:
            raise
        raise ModelError(failed_in(error, "the network", None)) from error


def _module_of(frame: FrameType) -> nn.Module | None:
    """The network's module whose method runs in a frame; not one of this project's wrappers."""
    module = frame.f_locals.get("self")
    if not isinstance(module, nn.Module) or isinstance(module, Wrapper):
        return None
    place = type(module).__module__
    return None if place.startswith("cure.") and not place.startswith("cure.models.") else module


def _shape(frame: FrameType) -> str:
    """The shape of the first tensor among the arguments."""
    code = frame.f_code
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount + 2]
    values: list[Any] = []
    for name in names:
        value = frame.f_locals.get(name)
        values += value if isinstance(value, tuple) else [value]
    shape = next((list(value.shape) for value in values if isinstance(value, Tensor)), None)
    return "" if shape is None else str(shape)
