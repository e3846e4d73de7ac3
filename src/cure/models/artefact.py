"""Exported networks read back: ONNX, safetensors and torch.export files, and hub folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from cure.config import ModelConfig
from cure.errors import CheckpointError, CureError, ModelError
from cure.models.build import adapted_copy, build_model
from cure.models.checkpoint import load_weights
from cure.models.contract import Contract
from cure.models.onnx_network import OnnxNetwork
from cure.models.program_network import ProgramNetwork
from cure.models.registry import MODELS
from cure.utils.io import first_line, read_json, user_path
from cure.utils.modes import in_evaluation

CONFIG, WEIGHTS, SECTION = "config.json", "model.safetensors", "cure"
"""Files of a hub folder, and the key of the contract in the first."""

TIMM_WEIGHTS = ("pretrained", "checkpoint_path")
"""Options of timm that name the weights of a start, which an exported network has replaced."""

WHOLE: dict[str, type[OnnxNetwork] | type[ProgramNetwork]] = {
    ".onnx": OnnxNetwork,
    ".pt2": ProgramNetwork,
}
"""Files that hold the computation too, by suffix."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def contract_of(path: str | Path) -> Contract | None:
    """The contract of an exported file or hub folder; None where it has none.

    Args:
        path: an ``.onnx``, ``.pt2`` or ``.safetensors`` file, or a folder with ``config.json``.

    Raises:
        CheckpointError: when the file or its contract is damaged.
    """
    path = Path(path)
    if path.is_dir():
        file = path / CONFIG
        content = read_json(file) if file.is_file() else None
        found = content.get(SECTION) if isinstance(content, dict) else None
        return None if found is None else Contract.parse(found, file)
    if path.suffix in WHOLE:
        return WHOLE[path.suffix](path).contract
    try:
        with safe_open(str(path), framework="pt") as opened:
            return Contract.of_metadata(opened.metadata() or {}, path)
    except (SafetensorError, OSError) as error:
        if path.suffix != ".safetensors" and path.is_file():
            return None  # a file of another form
        raise CheckpointError(
            f"{path} is no whole safetensors file ({first_line(error)}); copy it again"
        ) from None


def contract_of_weights(path: str | Path) -> Contract | None:
    """What a file or folder of weights says of them, if ``cure export`` wrote it; None of others.

    Args:
        path: anything that may hold weights, also what does not exist.
    """
    place = user_path(path)
    if not (place / CONFIG).is_file() and place.suffix not in (".safetensors", ".pt2"):
        return None
    try:
        return contract_of(place)
    except CureError:
        return None  # What is wrong with the file is said when its weights are read.


def is_artefact(path: Path) -> bool:
    """Whether a file or folder is an exported network."""
    if path.suffix in WHOLE:
        return True
    if path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
        return contract_of(path) is not None
    return False


def from_pretrained(name: str | Path, *, network: nn.Module | None = None) -> nn.Module:
    """A network that ``cure export`` wrote: a hub folder, its name on the hub, or one file.

    A folder or file is read without a connection and without pickle: of ONNX and torch.export
    files nothing but operators on tensors is run, and code that a file names is not imported.

    Args:
        name: a folder, an ``.onnx``, ``.pt2`` or ``.safetensors`` file, or ``owner/name`` on the
            hub.
        network: a new instance of your own network, where it is none of ``cure list models``; the
            weights are put into a copy.

    Returns:
        Images [B, C, H, W] in [0, 1] to logits [B, classes], in evaluation mode, on the processor;
        ``.contract`` has its classes, sizes and accuracies
        (:class:`~cure.models.contract.Contract`).

    Raises:
        CureError: when it cannot be had, or ``network`` is needed.

    >>> import torch
    >>> import cure
    >>> small = ["method=at", "start=scratch", "training.epochs=1", "data.limit=400"]
    >>> run = cure.train("digits", small, run="runs/shared", quiet=True)
    >>> network = from_pretrained(cure.export(run, "hub", "shared"))
    >>> network(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    path = user_path(name)
    if not path.exists():
        path = _downloaded(str(name))
    contract = contract_of(path)
    if contract is None:
        raise CheckpointError(
            f"{path} was not written by cure export (it has no contract); for weights alone, "
            "build the network and say cure.evaluate(..., weights=FILE)"
        )
    model = _built(path, contract, network)
    model.contract = contract  # type: ignore[assignment]
    return in_evaluation(model)


def _built(path: Path, contract: Contract, network: nn.Module | None) -> nn.Module:
    if path.suffix in WHOLE:
        return WHOLE[path.suffix](path)
    name, kind = str(contract.network.get("name", "")), contract.kind
    options: dict[str, Any] = dict(contract.network.get("options", {}))
    new_head: Any = contract.network.get("new_head", False)
    constants: dict[str, Any] = {}
    if contract.normalisation is not None:
        constants = {"mean": contract.normalisation.mean, "std": contract.normalisation.std}
    weights = path / WEIGHTS if path.is_dir() else path
    if network is not None:
        model = adapted_copy(
            network,
            len(kind.classes),
            kind.channels,
            kind.size,
            ModelConfig(name="given", **constants),
            new_head=new_head,
            names=kind.classes,
        )
    else:
        if name.startswith("hf:") and path.is_dir():
            # Its architecture is in config.json; a pickled file is never taken.
            name, options = f"hf:{path}", {"use_safetensors": True}
        elif name.startswith("timm:"):
            options = {key: value for key, value in options.items() if key not in TIMM_WEIGHTS}
        elif name not in MODELS:
            raise ModelError(
                f"{path} holds weights of '{name}', which is code of its own and is not imported "
                "because a file names it; pass a new instance: "
                f"cure.from_pretrained('{path}', network=...)"
            )
        model = build_model(
            ModelConfig(name=name, options=options, **constants),
            classes=len(kind.classes),
            channels=kind.channels,
            size=kind.size,
            seed=0,
            names=kind.classes,
            new_head=new_head,
        )
    load_weights(model, weights)
    return model


def _downloaded(name: str) -> Path:
    """The folder of a network on the hub, or where an earlier call put it."""
    if not _HUB_NAME.fullmatch(name) or Path(name).suffix in (*WHOLE, ".safetensors"):
        raise CheckpointError(f"{name} does not exist; name a folder, a file, or owner/name")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except Exception as error:
        raise ModelError(
            f"{name} is no folder here, and the hub did not give it ({first_line(error)}); name "
            "the folder that cure export wrote"
        ) from error
