"""Networks from outside the package: user functions, transformers, timm.

:func:`cure.models.build_model` tries each once, so that one that does not behave as a classifier of
the right size is refused before training starts.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cure.config import ModelConfig
from cure.errors import ConfigError, ModelError, unknown
from cure.models.checks import NEW_HEAD_ADVICE
from cure.models.classes import places_of
from cure.models.trial import traits_of
from cure.models.wrapper import Normalised, Selected, Wrapper
from cure.registry import working_directory_importable

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, one number a channel each."""


class Logits(Wrapper):
    """A network of transformers that returns its logits alone."""

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        logits: Tensor = self.network(pixel_values=image).logits
        return logits


def is_external(name: str) -> bool:
    """Whether ``name`` is ``package.module:callable``, ``hf:...`` or ``timm:...``."""
    return ":" in name


def build_external(
    config: ModelConfig,
    *,
    classes: int,
    channels: int,
    size: tuple[int, int],
    names: Sequence[str] | None = None,
    new_head: bool = False,
) -> nn.Module:
    """The network that ``config.name`` points to.

    The constants that transformers or timm keep with pretrained weights are applied inside the
    network, unless ``config.mean`` is given (the caller applies those).

    Args:
        config: name (``package.module:callable``, ``hf:NAME_OR_FOLDER``, ``timm:NAME``), options.
        classes: number of logits.
        channels: channels of the images.
        size: height and width of the images in pixels.
        names: of the classes, to be matched with those that come with the network.
        new_head: its last layer is drawn anew, so its own classes do not matter.

    Raises:
        ConfigError: when an option does not exist or is missing.
        ModelError: when the network cannot be had.
    """
    source, _, rest = config.name.partition(":")
    given = config.mean is not None
    if source == "hf":
        if new_head:
            anew = {"num_labels": classes, "ignore_mismatched_sizes": True} | config.options
            config, names = config.model_copy(update={"options": anew}), None
        model = _from_transformers(rest, config.options, classes, channels, not given, names)
    elif source == "timm":
        model = _from_timm(rest, config.options, classes, channels, not given)
    else:
        model = _from_callable(source, rest, config.options, classes, channels, size)
    return model


def _from_callable(
    module_name: str,
    attribute: str,
    options: dict[str, Any],
    classes: int,
    channels: int,
    size: tuple[int, int],
) -> nn.Module:
    name = f"{module_name}:{attribute}"
    with working_directory_importable():
        builder = _find(module_name, attribute, name)
        arguments = {
            "classes": classes,
            "num_classes": classes,
            "channels": channels,
            "in_channels": channels,
            "size": size,
        }
        try:
            signature = inspect.signature(builder)
        except (TypeError, ValueError):  # some compiled callables have none
            arguments = dict(options)
        else:
            by_name = [
                item.name
                for item in signature.parameters.values()
                if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
            ]
            takes_any = any(item.kind is item.VAR_KEYWORD for item in signature.parameters.values())
            for option in options:
                if option not in by_name and not takes_any:
                    raise ConfigError(unknown(f"option of model {name}", option, by_name))
            arguments = {key: value for key, value in arguments.items() if key in by_name}
            arguments |= options
            try:
                signature.bind(**arguments)
            except TypeError as error:
                raise ConfigError(
                    f"model {name} needs more than the recipe gives ({error}); add it to "
                    "model.options"
                ) from None
        try:
            model = builder(**arguments)
        except Exception as error:
            raise ModelError(f"building model {name} failed: {_reason_and_place(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected {name} to return a torch.nn.Module, got {type(model).__name__}")
    return model


def _find(module_name: str, attribute: str, name: str) -> Any:
    """The callable called ``attribute`` of the module, which is imported."""
    if not module_name or not attribute:
        raise ConfigError(f"expected package.module:callable as the model's name, got '{name}'")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(
                f"found no module '{error.name}' for model {name}; looked in {os.getcwd()} and in "
                "the installed packages"
            ) from None
        raise ModelError(f"importing {module_name} failed: {_reason_and_place(error)}") from error
    except Exception as error:
        raise ModelError(f"importing {module_name} failed: {_reason_and_place(error)}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key, item in vars(module).items() if _offered(key, item)]
            raise ConfigError(unknown(f"callable in {module_name}", attribute, known))
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        raise ModelError(
            f"expected {name} to be a function or class that builds a network, got a network; "
            "write a function that returns it"
        )
    if not callable(found):
        raise ModelError(
            f"expected {name} to be a function or class that builds a network, got "
            f"{type(found).__name__}"
        )
    return found


def _offered(key: str, item: Any) -> bool:
    return (inspect.isroutine(item) or inspect.isclass(item)) and not key.startswith("_")


def _from_transformers(
    name: str,
    options: dict[str, Any],
    classes: int,
    channels: int,
    normalise: bool,
    names: Sequence[str] | None,
) -> nn.Module:
    try:
        from transformers import AutoModelForImageClassification
    except Exception as error:
        raise ModelError(
            f"model hf:{name} needs transformers, which could not be imported "
            f"({_reason(error)}); install it with: pip install 'cure-at[hub]'"
        ) from error
    folder = Path(name).expanduser()
    if not name:
        raise ConfigError("expected hf:NAME_OR_FOLDER as the model's name, got 'hf:'")
    if not folder.is_dir() and name[0] in "./~":
        raise ModelError(f"found no folder {folder} for model hf:{name}")
    where = str(folder) if folder.is_dir() else name
    try:
        loaded = AutoModelForImageClassification.from_pretrained(where, **options)
    except Exception as error:
        hint = "; pass the option ignore_mismatched_sizes: true for a new last layer"
        raise ModelError(
            f"transformers could not load '{where}' with options {options}: {_reason(error)}"
            f"{hint if 'mismatch' in str(error) else ''}"
        ) from error
    labels = int(loaded.config.num_labels)
    if names is not None:
        theirs = [str(loaded.config.id2label.get(i, f"LABEL_{i}")) for i in range(labels)]
        places = places_of(names, theirs, f"model hf:{name}")
    elif labels == classes:
        places = tuple(range(classes))
    else:
        raise ModelError(
            f"model hf:{name} has {labels} classes but the data has {classes}; {NEW_HEAD_ADVICE}"
        )
    # Newer versions keep the precision of the file; training needs float32.
    model: nn.Module = Logits(loaded.float())
    if normalise:
        found = _preprocessor(where, options, channels)
        if found is not None:
            model = Normalised(model, *found)
    return model if places == tuple(range(labels)) else Selected(model, places)


def _preprocessor(where: str, options: dict[str, Any], channels: int) -> Normalisation | None:
    """The constants of the folder's ``preprocessor_config.json``; None when it has none.

    The processor turns a pixel p in 0..255 into (p x factor - mean) / std; here the same is
    written for images in [0, 1], as (image - mean') / std'.
    """
    file_name = "preprocessor_config.json"
    if Path(where).is_dir():
        path = Path(where) / options.get("subfolder", "") / file_name
        if not path.is_file():
            return None
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        shared = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
        passed = {key: options[key] for key in shared if key in options}
        try:
            path = Path(hf_hub_download(where, file_name, **passed))
        except Exception as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                return None
            raise ModelError(
                f"could not find out how hf:{where} standardises images ({_reason(error)}); give "
                "model.mean and model.std"
            ) from error
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rescale = float(found.get("rescale_factor") or 1 / 255)
        factor = 255 * rescale if found.get("do_rescale", True) else 255.0
        offset = 1.0 if found.get("rescale_offset") else 0.0
        normalises = found.get("do_normalize", True) and found.get("image_mean") is not None
        mean = _per_channel(found["image_mean"] if normalises else 0.0, channels)
        std = _per_channel(found["image_std"] if normalises else 1.0, channels)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"could not read the constants for standardising images from {path} "
            f"({_reason(error)}); give model.mean and model.std"
        ) from error
    if len(mean) != channels or len(std) != channels:
        raise ModelError(
            f"{path} standardises images of {len(mean)} channels but the data has {channels}; "
            "set data.color, or give model.mean and model.std"
        )
    return (
        tuple((value + offset) / factor for value in mean),
        tuple(value / factor for value in std),
    )


def _per_channel(value: Any, channels: int) -> tuple[float, ...]:
    if isinstance(value, int | float):
        return (float(value),) * channels
    return tuple(float(item) for item in value)


def _from_timm(
    name: str, options: dict[str, Any], classes: int, channels: int, normalise: bool
) -> nn.Module:
    try:
        import timm
    except Exception as error:  # beside some builds of PyTorch its torchvision does not import
        raise ModelError(
            f"model timm:{name} needs timm, which could not be imported ({_reason(error)}); "
            "install timm together with the torchvision that fits this PyTorch"
        ) from error
    arguments = {"num_classes": classes, "in_chans": channels} | options
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except Exception as error:
        raise ModelError(
            f"timm could not build '{name}' with {arguments}: {_reason(error)}"
        ) from error
    settings = getattr(model, "pretrained_cfg", None)
    # Without pretrained weights nothing was trained on standardised images.
    if normalise and options.get("pretrained") and settings and settings.get("mean"):
        mean, std = tuple(settings["mean"]), tuple(settings["std"])
        if len(mean) != channels:
            raise ModelError(
                f"timm:{name} standardises images of {len(mean)} channels but the data has "
                f"{channels}; set data.color, or give model.mean and model.std"
            )
        model = Normalised(model, mean, std)
    return model


def check_shape(model: nn.Module, name: str, classes: int) -> None:
    """Refuse a network that did not return logits [2, classes] in its trial pass.

    Raises:
        ModelError: in one sentence.
    """
    came = traits_of(model).shape
    if came != (2, classes):
        raise ModelError(
            f"expected model {name} to return logits of shape {[2, classes]} for two images and "
            f"{classes} classes, got {list(came)}"
            f"{f'; {NEW_HEAD_ADVICE}' if len(came) == 2 else ''}"
        )


def _reason(error: BaseException) -> str:
    """The error in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:300].rstrip('.')}"


def _reason_and_place(error: BaseException) -> str:
    """The error in one line, with the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return _reason(error) + place
