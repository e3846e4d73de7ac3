"""Files of weights: what each form holds, as tensors; no file is trusted and nothing in it is run.

Read are safetensors, PyTorch's archives and older pickles, programs of ``torch.export``, NumPy's
``.npz``, the index of weights that were cut into several files, and folders with one of these.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import pathlib
import pickle
import pickletools
import re
import shlex
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from cure.errors import CheckpointError
from cure.models.program_network import program_weights
from cure.utils.io import first_line

# What torch.load(weights_only=True) says when a file asks for more than tensors.
_WANTS_CODE = re.compile(
    r"unsupported (global|class|persistent)|not an allowed global|unrecognized function|"
    r"can only (build|create|call)|blocklisted|disallowed",
    re.IGNORECASE,
)

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Usual ends of the names of files with weights."""

_OTHER_FORMS = (
    (b"\x1f\x8b", "a gzip file", "unpack it"),
    (b"BZh", "a bzip2 file", "unpack it"),
    (b"\xfd7zXZ", "an xz file", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them", "give weights of PyTorch"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file with git lfs pull"),
    (b"<", "a web page", "download the file itself"),
    (
        b"\x93NUMPY",
        "a single NumPy array without a name",
        "give all arrays by name, in an .npz file",
    ),
    (b"GGUF", "a GGUF file, as llama.cpp reads them", "give the weights as safetensors"),
    *(
        (
            bytes([8, version, 18]),
            "an ONNX file, whose weights do not have the network's names",
            "give the run that it was exported from, or export that --to safetensors",
        )
        for version in range(3, 32)
    ),
)
"""First bytes of files that are taken for weights, what they are, and what to do."""


def read_file(path: Path) -> tuple[object, bool]:
    """What a file of weights holds, with tensors on the processor.

    Args:
        path: of the file.

    Returns:
        Containers of tensors and plain values, and whether the names of the tensors are exactly
        the network's, as in files of :func:`cure.models.save_weights`.

    Raises:
        CheckpointError: when the file is missing, damaged, altered since it was written, of
            another form, or could be read only by running code.
    """
    if path.is_dir():
        path = _inside(path)
    try:
        length = path.stat().st_size
    except OSError:
        raise CheckpointError(f"found no file with weights at {path}") from None
    if length == 0:
        raise CheckpointError(f"{path} is empty: it was never written completely")
    try:
        with open(path, "rb") as file:
            first = file.read(24)
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {first_line(error)}") from None
    # By content: files are renamed.  A safetensors file begins with the length of its JSON.
    torchs = first.startswith((b"PK\x03\x04", b"\x80"))
    if first[8:9] == b"{" or (path.suffix == ".safetensors" and not torchs):
        return _read_safetensors(path)
    if path.name.endswith(".index.json"):
        return _read_parts(path), False
    if first.startswith(b"PK\x03\x04"):
        return _read_archive(path), False
    return _read_torch(path, first), False


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names, types, shapes and bytes, in hexadecimal; order does not matter."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _inside(folder: Path) -> Path:
    """The file of a folder that holds its weights: an index, ``model.safetensors``, or the only
    one."""
    files = sorted(one for one in folder.iterdir() if _is_weights(one))
    indices = [one for one in files if one.name.endswith(".index.json")]
    # Of two forms of the same weights, safetensors goes first.
    indices.sort(key=lambda one: ".safetensors." not in one.name)
    whole = [one for one in files if one.name == "model.safetensors"]
    for one in (*whole, *indices, *(files if len(files) == 1 else [])):
        return one
    names = ", ".join(one.name for one in files[:3])
    advice = f"; give a file of it: {names}" if files else ""
    raise CheckpointError(f"expected a file with weights, got the folder {folder}{advice}")


def holds_weights(folder: Path) -> bool:
    """Whether there are files of weights in a folder."""
    return any(_is_weights(one) for one in folder.iterdir())


def _is_weights(path: Path) -> bool:
    return path.suffix in _WEIGHTS or path.name.endswith(".index.json")


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


def _read_parts(path: Path) -> dict[str, Tensor]:
    """Weights in several files beside an index, as transformers writes them."""
    try:
        places: dict[str, str] = json.loads(path.read_text("utf-8"))["weight_map"]
        names = {name: path.parent / Path(file).name for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} was damaged or cut off, or is no index of weights ({first_line(error)}); copy "
            "it again"
        ) from None
    held: dict[str, Tensor] = {}
    for part in sorted(set(names.values())):
        content, _ = read_file(part)
        if isinstance(content, Mapping):
            held |= {name: content[name] for name in names if name in content}
    missing = [name for name in names if name not in held]
    if missing:
        raise CheckpointError(
            f"{path} names {len(missing)} weights that its files do not hold, such as "
            f"{missing[0]}; copy them again"
        )
    return held


def _read_archive(path: Path) -> object:
    """A zip archive: PyTorch's, NumPy's, or another one that is refused by what it is."""
    # PyTorch writes checksums into its archives and does not check them when it reads.
    try:
        with zipfile.ZipFile(path) as parts:
            bad = parts.testzip()
            # A part marked as a folder it takes for empty, and returns memory never filled.
            marked = [part for part in parts.infolist() if part.external_attr & 16]
            folders = [part.filename for part in marked if not part.is_dir()]
            names = parts.namelist()
    except Exception as error:
        raise CheckpointError(f"{_damaged(path)} ({first_line(error)}); copy it again") from None
    if bad is not None or folders:
        raise CheckpointError(
            f"{path} was altered after it was written: the checksum or mark of its part "
            f"'{bad or folders[0]}' does not fit; copy it again"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript program, not weights: in Python pass torch.jit.load('{path}')"
            " as the network, or load_state_dict(torch.jit.load(...).state_dict()) into yours"
        )
    if any(name.endswith("/models/model.json") for name in names):
        return program_weights(path)
    if all(name.endswith(".npy") for name in names):
        return _read_npz(path)
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(
            f"{_damaged(path)} (a zip archive of {', '.join(names[:3]) or 'nothing'}); unpack it "
            "and give the file with weights"
        )
    return _read_torch(path, b"PK")


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{_damaged(path)} ({first_line(error)}); copy it again") from None


def _read_torch(path: Path, first: bytes) -> object:
    try:
        with (
            # Of a path, PyTorch goes by the suffix.
            path.open("rb") as file,
            warnings.catch_warnings(),
            torch.serialization.safe_globals(_data_classes()),
        ):
            # Of files that are refused below anyway (other pickle versions).
            warnings.simplefilter("ignore", UserWarning)
            return _with_tensors(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        # The safe reader knows only version 2 of plain pickles, so its message does not help.
        unread = isinstance(error, pickle.UnpicklingError)
        plain = unread and first[:2] != b"PK" and _names_code(path)
        if plain or _WANTS_CODE.search(str(error)):
            raise CheckpointError(_refused(path, plain)) from None
        for start, what, advice in _OTHER_FORMS:
            if first.lstrip().startswith(start):
                raise CheckpointError(f"{path} is no checkpoint but {what}; {advice}") from None
        # For bytes that are no pickle, PyTorch's message advises unsafe loading.
        reason = "" if unread else f" ({first_line(error)})"
        raise CheckpointError(f"{_damaged(path)}{reason}; copy it again") from None


def _damaged(path: Path) -> str:
    return f"{path} was damaged or cut off, or is no checkpoint"


@functools.cache
def _data_classes() -> list[Any]:
    """What else may be beside tensors: classes of plain values, which run nothing when made.

    Training scripts keep their options (``argparse.Namespace``), paths, times and NumPy's numbers.
    """
    # Paths of either system, as they were written: by Python up to 3.12, and from 3.13.
    paths = [
        _named(pure, module, name)
        for pure, names in (
            (pathlib.PurePosixPath, ("PosixPath", "PurePosixPath")),
            (pathlib.PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
        )
        for name in names
        for module in ("pathlib", "pathlib._local")
    ]
    # The module of NumPy's readers has another name since version 2.
    readers: dict[str, Any] = {
        "_reconstruct": np.zeros(1).__reduce__()[0],
        "scalar": np.float64(0).__reduce__()[0],
    }
    numpy = [
        _named(reader, f"numpy.{core}.multiarray", name)
        for name, reader in readers.items()
        for core in ("core", "_core")
    ]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdFDSU"}
    times = [datetime.date, datetime.datetime, datetime.timedelta]
    own = [argparse.Namespace, types.SimpleNamespace, np.ndarray, np.dtype]
    return [*paths, *numpy, *kinds, *times, *own]


def _named(made: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    """A class or function under the name that files know it by.

    PyTorch takes the name from the object; not all its versions since 2.6 take pairs with a name.
    """
    if isinstance(made, type):
        return type(name, (made,), {"__module__": module})

    def call(*arguments: Any) -> Any:
        return made(*arguments)

    call.__module__, call.__name__, call.__qualname__ = module, name, name
    return call


def _with_tensors(content: Any) -> Any:
    """The same containers, with tensors in the place of NumPy's arrays of numbers."""
    if isinstance(content, np.ndarray) and content.dtype.kind in "biufc":
        return _tensor(content)
    if isinstance(content, dict):
        return {key: _with_tensors(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map(_with_tensors, content))
    return content


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def _refused(path: Path, plain: bool) -> str:
    """The sentence for a pickle that asks for code, with the way out.

    Args:
        path: of the file.
        plain: whether Python's pickle wrote it, not PyTorch.
    """
    load = (
        "pickle.load(open(sys.argv[1], 'rb'), encoding='latin1')"
        if plain
        else "torch.load(sys.argv[1], map_location='cpu', weights_only=False)"
    )
    # Every tensor or array, by its place in the file; load_weights finds what fits.
    convert = (
        "import sys, pickle, torch, safetensors.torch as s; "
        "f = lambda o, p='': {p[:-1]: torch.as_tensor(o).detach().clone().contiguous()} "
        "if isinstance(o, torch.Tensor) or getattr(getattr(o, 'dtype', 0), 'kind', 0) in "
        "list('biuf') else {k: t for n, v in dict("
        "o.state_dict() if isinstance(o, torch.nn.Module) else o if isinstance(o, dict) else "
        "enumerate(o) if isinstance(o, (list, tuple)) else getattr(o, '__dict__', {})"
        ").items() for k, t in f(v, p + str(n) + '.').items()}; "
        f"s.save_file(f({load}), sys.argv[2])"
    )
    names = shlex.join([str(path), str(path.with_suffix(".safetensors"))])
    return (
        f"{path} was refused because loading it would run code that it names: it holds more than "
        "tensors; if you trust where it came from, convert it to safetensors, where the code of "
        f'its network can be imported, once with: python -c "{convert}" {names}'
    )


def _names_code(path: Path) -> bool:
    """Whether the file is one pickle that names something to import; it is only looked at."""
    try:
        with open(path, "rb") as file:
            found = {operation.name for operation, _, _ in pickletools.genops(file)}
    except Exception:  # whatever the parser says of bytes that are no pickle
        return False
    return bool(found & {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
