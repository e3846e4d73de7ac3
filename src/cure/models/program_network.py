"""A ``torch.export`` program as a network, read without pickle and run operator by operator.

``torch.export.load`` unpickles parts of an archive (sample inputs, constants, weights that say so)
with ``weights_only=False``, evaluates size expressions and imports modules that the file names, so
a file of others can run code in it.  Here nothing but JSON and raw weights is read, and nothing but
operators of ``torch.ops.aten`` and arithmetic on sizes is called, with numbers and tensors.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cure.errors import CheckpointError, ModelError
from cure.models.contract import Contract
from cure.models.trial import Traits, with_traits
from cure.utils.io import first_line

_ATEN = re.compile(r"torch\.ops\.aten\.(?!\w*(?:sparse|unsafe_index))(_?[a-zA-Z]\w*)\.(\w+)")
"""Without those that do not check indices."""
_ON_SIZES = {
    f"_operator.{name}": getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "floordiv", "truediv", "mod", "neg"),
        *("eq", "ne", "ge", "gt", "le", "lt", "getitem"),
    )
}
_WORDS = (
    *("none", "tanh", "trunc", "floor", "constant", "reflect", "replicate", "circular", "mean"),
    *("same", "valid", "ortho", "forward", "backward"),
)
"""Texts that operators may be given, beside the equation of ``einsum``; a file's name is none."""
_TYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_LAYOUTS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}


class ProgramNetwork(nn.Module):
    """A classifier in a ``.pt2`` archive of ``torch.export.save``, PyTorch 2.8 or newer.

    Gradients reach the image.  The weights are buffers, by their names in the program.

    Args:
        path: the file; takes one image tensor [B, C, H, W] in [0, 1] and returns logits [B, K].

    Attributes:
        contract: what the file says of itself; None where it was exported by others.

    Raises:
        CheckpointError: when the file is missing, damaged, or of an older PyTorch.
        ModelError: when it is no such classifier, or holds what is not run here.
    """

    _cure_untrainable = (
        "a torch.export file cannot be trained, because its weights are fixed; train the network "
        "that it was exported from, with start=FILE"
    )

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"found no torch.export program at {path}")
        try:
            with zipfile.ZipFile(path) as archive:
                files = _Files(archive)
                program = files.json("models/model.json")["graph_module"]
                tensors = {**files.tensors("weights"), **files.tensors("constants")}
                extra = {
                    name.removeprefix("extra/"): files.read(name).decode()
                    for name in files.names
                    if name.startswith("extra/")
                }
            graph, signature = program["graph"], program["signature"]
            self.input = self._bind(signature["input_specs"], tensors)
            self.output = _only_output(signature["output_specs"], path)
            self.steps = [_Step(node, path) for node in graph["nodes"]]
        except (zipfile.BadZipFile, LookupError, ValueError, TypeError, RuntimeError) as error:
            raise _unreadable(path, error) from None
        self.contract = Contract.of_metadata(extra, path)
        last = {name: number for number, step in enumerate(self.steps) for name in step.used}
        last.pop(self.output, None)
        for name, number in last.items():
            self.steps[number].done.append(name)
        # Two files are two networks for the journal of an evaluation.
        found = np.frombuffer(hashlib.sha256(path.read_bytes()).digest(), np.uint8)
        self.register_buffer("digest", torch.from_numpy(found.copy()))
        with_traits(self, Traits(channels_last=False))
        self.eval()

    def _bind(self, specs: list[Any], tensors: Mapping[str, Tensor]) -> str:
        """Register weights and constants by their names in the graph; the name of the image."""
        images = []
        for spec in specs:
            ((kind, part),) = spec.items()
            if kind == "user_input":
                images.append(part["arg"]["as_tensor"]["name"])
                continue
            key = {"parameter": "parameter_name", "buffer": "buffer_name"}.get(kind)
            key = key or {"tensor_constant": "tensor_constant_name"}[kind]
            self.register_buffer(part["arg"]["name"], tensors[part[key]])
        if len(images) != 1:
            raise ModelError(
                f"{self.path}: expected one input, the images [B, C, H, W], got {len(images)}; "
                "export a network that takes images alone"
            )
        return str(images[0])

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [0, 1]."""
        # The program was recorded for PyTorch's default layout.
        values: dict[str, Any] = dict(self.named_buffers())
        values |= {self.input: image.contiguous(), _DEVICE: image.device}
        for step in self.steps:
            step.run(values)
        logits: Tensor = values[self.output]
        return logits

    def to(self, *args: Any, **kwargs: Any) -> ProgramNetwork:
        """As any module; the memory layout stays."""
        if kwargs.pop("memory_format", None) and not args and not kwargs:
            return self
        super().to(*args, **kwargs)
        return self

    def extra_repr(self) -> str:
        """Name of the file."""
        return self.path.name


def program_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a ``.pt2`` archive, by the names of the network that was exported.

    Raises:
        CheckpointError: when they cannot be read without pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Files(archive).tensors("weights")
    except (zipfile.BadZipFile, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as a torch.export program of PyTorch 2.8 or newer "
        f"({first_line(error)}); export it again"
    )


class _Files:
    """The files in an archive, by their names below its one folder."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its files are compressed")

    def read(self, name: str) -> bytes:
        return self.archive.read(self.names[name])

    def json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def tensors(self, folder: str) -> dict[str, Tensor]:
        """Raw tensors of ``data/weights`` or ``data/constants``."""
        found: dict[str, Tensor] = {}
        flat: dict[str, Tensor] = {}
        for name, entry in self.json(f"data/{folder}/model_{folder}_config.json")["config"].items():
            path, about = entry["path_name"], entry["tensor_meta"]
            if entry["use_pickle"] or about is None:
                raise ValueError(f"'{name}' is pickled, and pickle can run code")
            sizes, strides = ([n["as_int"] for n in about[k]] for k in ("sizes", "strides"))
            if path not in flat:
                content = bytearray(self.read(f"data/{folder}/{path}"))
                kind = _TYPES[about["dtype"]]
                empty = torch.empty(0, dtype=kind)
                flat[path] = torch.frombuffer(content, dtype=kind) if content else empty
            offset = about["storage_offset"]["as_int"]
            # PyTorch refuses sizes that leave the storage.
            found[name] = flat[path].as_strided(sizes, strides, offset).clone()
        return found


def _only_output(specs: list[Any], path: Path) -> str:
    found = [spec["user_output"]["arg"] for spec in specs if "user_output" in spec]
    if len(found) != 1 or len(specs) != 1 or "as_tensor" not in found[0]:
        raise ModelError(
            f"{path}: expected one output, the logits [B, classes], got {len(specs)}; export a "
            "network that returns them alone, in evaluation mode"
        )
    return str(found[0]["as_tensor"]["name"])


class _Step:
    """A node of the graph: an operator, where its arguments come from, and names of its results.

    Attributes:
        used: names of values that it takes.
        done: names of values that nothing takes after it.
    """

    def __init__(self, node: Mapping[str, Any], path: Path) -> None:
        self.call = _operator(node["target"], path)
        self.used: set[str] = set()
        self.done: list[str] = []
        parts = [(part.get("kind"), part["name"], part["arg"]) for part in node["inputs"]]
        self.positional = [self._argument(arg, path) for kind, _, arg in parts if kind != 2]
        self.named = {name: self._argument(arg, path) for kind, name, arg in parts if kind == 2}
        self.results = [_result(output) for output in node["outputs"]]

    def run(self, values: dict[str, Any]) -> None:
        """Call the operator on what is in ``values``, and put its results there."""
        named = {name: _read(part, values) for name, part in self.named.items()}
        made = self.call(*_read(self.positional, values), **named)
        names = self.results
        if len(names) == 1 and isinstance(names[0], list):
            names = names[0]
        elif len(names) == 1:
            made = [made]
        if names:  # else a check, such as of a type
            values.update(zip(names, made, strict=True))
        for name in self.done:
            del values[name]

    def _argument(self, arg: Mapping[str, Any], path: Path) -> Any:
        """An argument: a constant, the name of a value, or a list of these."""
        ((kind, value),) = arg.items()
        if kind in ("as_tensor", "as_name"):
            name = _Name(value if kind == "as_name" else value["name"])
            self.used.add(name)
            return name
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"):
            return self._argument(value, path)
        if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors"):
            return [self._argument({"as_tensor": v} if "name" in v else v, path) for v in value]
        if kind in ("as_int", "as_float", "as_bool", "as_ints", "as_floats", "as_bools"):
            return value
        if kind == "as_string" and (value in _WORDS or self.call is torch.ops.aten.einsum.default):
            return value
        if kind == "as_none":
            return None
        if kind == "as_device":
            return _DEVICE
        if kind == "as_layout":
            return torch.strided
        if kind == "as_scalar_type":
            return _TYPES[value]
        if kind == "as_memory_format":
            return _LAYOUTS[value]
        raise ModelError(
            f"{path}: an operator takes {kind.removeprefix('as_')} {str(value)[:40]!r}, which is "
            "not run from a file; export it --to onnx"
        )


class _Name(str):
    """Name of a value that the graph computes."""


_DEVICE = _Name("<device>")
"""Where the images are: an operator that makes a tensor makes it there."""


def _read(part: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(part, _Name):
        return values[part]
    return [_read(one, values) for one in part] if isinstance(part, list) else part


def _operator(target: str, path: Path) -> Callable[..., Any]:
    """The operator of that name, if it is one that computes."""
    if target in _ON_SIZES:
        function: Callable[..., Any] = _ON_SIZES[target]
        return function
    found = _ATEN.fullmatch(target)
    packet = getattr(torch.ops.aten, found[1], None) if found else None
    overload = getattr(packet, found[2], None) if found else None
    if not isinstance(overload, torch._ops.OpOverload):
        raise ModelError(
            f"{path}: the operator {target[:80]} is not run from a file; export it --to onnx"
        )
    return overload


def _result(output: Mapping[str, Any]) -> Any:
    """Name of a result, or names where the operator returns a list."""
    ((kind, value),) = output.items()
    if kind == "as_tensors":
        return [part["name"] for part in value]
    return value["name"] if kind == "as_tensor" else value.get("as_name")
