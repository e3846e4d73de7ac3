"""State of a run on disk: tensors and plain values in one file, without pickle.

A state is a tree of dictionaries and lists whose leaves are tensors, numbers, texts, booleans or
None. The tensors go into a safetensors file, the tree into its header as JSON, so loading cannot
run code. A digest over both detects a file that is cut short or altered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cure.errors import CheckpointError
from cure.models.weight_files import digest
from cure.utils.io import write_atomically

STATE_FORMAT = "cure-state-1"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``; the old file stays until the new one is complete.

    Raises:
        CheckpointError: when the disk is full or not writable; nothing that existed is lost.
        TypeError: for a leaf that is neither a tensor nor a plain value.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, "", tensors))
    header = {
        "format": STATE_FORMAT,
        "tree": tree,
        "sha256": digest(tensors),
        "tree_sha256": _sum(tree),
    }
    content: bytes = safetensors.torch.save(tensors, metadata=header)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_state(path: Path) -> dict[str, Any]:
    """The state that :func:`save_state` wrote, on the CPU.

    Raises:
        CheckpointError: when the file is missing, no state of this project, cut short or altered.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; nothing can be resumed from it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is cut short or is no checkpoint ({error}); restore it from a copy"
        ) from None
    if header.get("format") != STATE_FORMAT:
        raise CheckpointError(f"{path} is no run state of this project; expected {STATE_FORMAT}")
    tree = header.get("tree", "")
    if header.get("sha256") != digest(tensors) or header.get("tree_sha256") != _sum(tree):
        raise CheckpointError(f"{path} was altered after it was written; restore it from a copy")
    state = _decode(json.loads(tree), tensors)
    assert isinstance(state, dict)
    return state


def _sum(text: str) -> str:
    return digest({text: torch.zeros(0)})


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``; each tensor is filed under its place in the tree."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_encode(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state holds tensors and plain values, not {type(value).__name__} ({name})")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "list":
        return [_decode(item, tensors) for item in content]
    return {key: _decode(item, tensors) for key, item in content}
