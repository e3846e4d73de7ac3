"""Weights on disk: safetensors written whole or not at all, and every common form read safely."""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import re
import shlex
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cure.errors import CheckpointError
from cure.models.wrapper import Normalised, core
from cure.utils.io import first_line, write_atomically

_CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_NORMALISATION = re.compile(r"(mean|std|mu|sigma|normali[sz]e\..*)")
_SHOWN = 5

# What torch.load(weights_only=True) says when a file asks for more than tensors.
_WANTS_CODE = re.compile(
    r"unsupported (global|class|persistent)|not an allowed global|unrecognized function|"
    r"can only (build|create|call)|blocklisted|disallowed|torchscript",
    re.IGNORECASE,
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the processor; nothing in the file is run.

    ``.safetensors`` files are read as such, all others as PyTorch's.  A state dict inside
    ``state_dict``, ``model_state_dict``, ``model`` or ``net`` is taken out, and prefixes that
    wrappers add to all names (``module.``, ``_orig_mod.``, ``model.``) are taken off, except in
    files of :func:`save_weights`, whose names are exact.

    Raises:
        CheckpointError: when the file is missing, damaged, altered since it was written (where it
            carries a checksum: files of this project, and PyTorch's since version 1.6), holds no
            weights, or could be read only by running code.
    """
    weights, exact = _read(Path(path))
    return weights if exact else list(_strippings(weights))[-1]


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the weights of a checkpoint into ``core(model)``, all of them or none.

    A checkpoint that standardises inside (it holds ``mean`` and ``std``) is accepted only by a
    model that is :class:`Normalised` with the same constants.

    Args:
        model: any network; it is left untouched when anything fails.
        path: see :func:`read_weights`.

    Raises:
        CheckpointError: when the file cannot be read (see :func:`read_weights`), when its names
            and shapes are not exactly those of the network, or when a weight is not finite.
    """
    path = Path(path)
    read, exact = _read(path)
    target: dict[str, Tensor] = core(model).state_dict()
    weights = read
    if not exact:
        # A network of its own may have all its names under "model.", so the first that fits wins.
        candidates = list(_strippings(read))
        fitting = [item for item in candidates if item.keys() == target.keys()]
        weights = fitting[0] if fitting else candidates[-1]
    missing = [name for name in target if name not in weights]
    unexpected = [name for name in weights if name not in target]
    if unexpected and not missing and all(map(_NORMALISATION.fullmatch, unexpected)):
        _check_normalisation(model, path, {name: weights[name] for name in unexpected})
        unexpected = []
    differing = [
        f"{name} {list(weights[name].shape)} for {list(value.shape)}"
        for name, value in target.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", differing),
    ]
    if any(problems):
        raise CheckpointError(
            f"{path} does not fit the model ({type(core(model)).__name__}): "
            f"{'; '.join(filter(None, problems))}; check model.name, model.options and the number "
            "of classes"
        )
    ready = {name: weights[name].to(value.dtype) for name, value in target.items()}
    broken = [name for name, value in ready.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(
            f"{path} holds weights that are not finite ({_listed('in all', broken)}); training "
            "had probably diverged before it was written"
        )
    core(model).load_state_dict(ready, strict=True)


def save_weights(model: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the weights of ``core(model)`` as safetensors, whole or not at all.

    Args:
        model: any network; its wrappers are left out.
        path: what to write; an older file is replaced only once the new one is on the disk.
        metadata: text kept in the file's header; ``sha256`` (see :func:`digest`) is added.

    Raises:
        CheckpointError: when the disk is full or refuses.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in core(model).state_dict().items():
        tensor = value.detach().to("cpu").contiguous()
        # Safetensors refuses tensors that share memory: tied weights become equal copies.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    header = {"format": "pt"} | metadata | {"sha256": digest(tensors)}
    # Written by Python from bytes: a full disk is then an ordinary OSError.
    content: bytes = safetensors.torch.save(tensors, metadata=header)
    write_atomically(Path(path), lambda temporary: _write_bytes(temporary, content))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names, types, shapes and bytes, in hexadecimal; order does not matter."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file, and whether their names are exactly the network's."""
    if path.is_dir():
        raise CheckpointError(f"expected a file with weights, got the folder {path}")
    try:
        length = path.stat().st_size
    except OSError:
        raise CheckpointError(f"found no file with weights at {path}") from None
    if length == 0:
        raise CheckpointError(f"{path} is empty: it was never written completely")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {first_line(error)}") from None
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _tensors(_read_torch(path), path), False


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    weights: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                weights[name] = file.get_tensor(name)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file ({first_line(error)}): it was damaged or cut "
            "off; copy it again"
        ) from None
    if not weights:
        raise CheckpointError(f"{path} holds no weights")
    expected = metadata.get("sha256")
    if expected is not None and expected != digest(weights):
        raise CheckpointError(
            f"{path} was altered after it was written: its checksum does not fit its weights; "
            "copy it again"
        )
    return weights, expected is not None


def _read_torch(path: Path) -> object:
    damaged = f"{path} was damaged or cut off, or is no checkpoint"
    with open(path, "rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    if archive:
        # PyTorch writes checksums into its archives and does not check them when it reads.
        try:
            with zipfile.ZipFile(path) as parts:
                bad = parts.testzip()
                # A part marked as a folder it takes for empty, and returns memory never filled.
                marked = [part for part in parts.infolist() if part.external_attr & 16]
                folders = [part.filename for part in marked if not part.is_dir()]
        except Exception as error:
            raise CheckpointError(f"{damaged} ({first_line(error)}); copy it again") from None
        if bad is not None or folders:
            raise CheckpointError(
                f"{path} was altered after it was written: the checksum or mark of its part "
                f"'{bad or folders[0]}' does not fit; copy it again"
            )
    try:
        with warnings.catch_warnings():
            # Of files that are refused below anyway (other pickle versions, TorchScript).
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The safe reader knows only version 2 of plain pickles, so its message does not help.
        plain = isinstance(error, pickle.UnpicklingError) and not archive and _names_code(path)
        if plain or _WANTS_CODE.search(str(error)):
            raise CheckpointError(_refused(path)) from None
        # For bytes that are no pickle, PyTorch's message advises unsafe loading.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
        raise CheckpointError(f"{damaged}{reason}; copy it again") from None


def _refused(path: Path) -> str:
    """The sentence for a pickle that asks for code, with the way out."""
    convert = (
        "import sys, torch, safetensors.torch as s; "
        "w = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
        "s.save_file(w['state_dict'], sys.argv[2])"
    )
    names = shlex.join([str(path), str(path.with_suffix(".safetensors"))])
    return (
        f"{path} was refused because loading it would run code that it names: it holds more than "
        "tensors; if you trust where it came from, convert it to safetensors once with: "
        f"python -c \"{convert}\" {names} (adapt w['state_dict'] to where the weights are)"
    )


def _names_code(path: Path) -> bool:
    """Whether the file is one pickle that names something to import; it is only looked at."""
    try:
        with open(path, "rb") as file:
            found = {operation.name for operation, _, _ in pickletools.genops(file)}
    except Exception:  # whatever the parser says of bytes that are no pickle
        return False
    return bool(found & {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict somewhere inside what a file held."""
    while isinstance(content, Mapping):
        inner = [content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if isinstance(content, Mapping):
        weights = {
            key: value
            for key, value in content.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
        if weights and len(weights) == len(content):
            return weights
        found = f"a dictionary with {_listed('entries', [str(key) for key in content])}"
    else:
        found = f"a {type(content).__name__}"
    raise CheckpointError(
        f"expected a dictionary of tensors in {path} (or one under {', '.join(_CONTAINERS)}), "
        f"got {found}"
    )


def _strippings(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights as named, then again after each prefix that all names share is taken off.

    Constants for standardising images sit outside the wrapped network and need no prefix.
    """
    yield weights
    while True:
        names = [name for name in weights if not _NORMALISATION.fullmatch(name)]
        shared = [
            prefix
            for prefix in _PREFIXES
            if names and all(name.startswith(prefix) for name in names)
        ]
        if not shared:
            return
        stripped = {name.removeprefix(shared[0]): value for name, value in weights.items()}
        if len(stripped) != len(weights):
            return
        weights = stripped
        yield weights


def _check_normalisation(model: nn.Module, path: Path, constants: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that standardises inside unless the model does the same."""
    values: dict[str, list[float]] = {}
    for name, value in constants.items():
        role = {"mu": "mean", "sigma": "std"}.get(name.split(".")[-1], name.split(".")[-1])
        values[role] = [round(number, 7) for number in value.flatten().tolist()]
    if isinstance(model, Normalised) and values.keys() == {"mean", "std"}:
        own = {"mean": model.mean.flatten(), "std": model.std.flatten()}
        if all(
            len(own[role]) == len(values[role])
            and torch.allclose(own[role].cpu(), torch.tensor(values[role]), atol=1e-6)
            for role in own
        ):
            return
    advice = " and ".join(f"model.{role} {numbers}" for role, numbers in sorted(values.items()))
    raise CheckpointError(
        f"{path} standardises images inside ({_listed('unexpected', list(constants))}); give the "
        f"same constants as mean and std in the recipe: {advice}"
    )


def _listed(what: str, names: list[str]) -> str:
    """``3 missing: a, b, c``; at most five names; nothing for none."""
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"
