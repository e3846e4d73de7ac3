"""Weights on disk: safetensors written whole or not at all, and every common form read safely."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from cure.errors import CheckpointError, CureNote, ModelError
from cure.models.fitting import Fit, choose, constants, fits, storage_of
from cure.models.head import draw_head, head_name
from cure.models.trial import copy_network
from cure.models.weight_files import digest, read_file
from cure.models.wrapper import Normalised, core, tensors_of
from cure.utils.io import write_atomically

_CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "state_dict.", "model_state_dict.")
_NORMALISATION = re.compile(r"(mean|std|mu|sigma|normali[sz]e\..*)")
_PART = re.compile(r"-\d+-of-\d+\.\w+$")
_SHOWN = 5


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the processor; nothing in the file is run.

    Read are safetensors, PyTorch's files, programs of ``torch.export``, ``.npz`` arrays, the index
    of weights in several files, and folders with one of these; beside tensors they may hold NumPy's
    numbers, ``argparse.Namespace``, paths and times.
    A state dict inside
    ``state_dict``, ``model_state_dict``, ``model`` or ``net`` is taken out, and prefixes that
    wrappers add to all names (``module.``, ``_orig_mod.``, ``model.``, ``net.``) are taken off,
    except in files of :func:`save_weights`, whose names are exact.

    Raises:
        CheckpointError: when the file is missing, damaged, altered since it was written (where it
            carries a checksum: files of this project, and PyTorch's since version 1.6), holds no
            weights, or could be read only by running code.
    """
    path = Path(path).expanduser()
    content, exact = read_file(path)
    weights = _tensors(content, path)
    return weights if exact else list(_strippings(weights))[-1]


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    new_head: bool | str = False,
    seed: int = 0,
    setting: str = "start_key",
) -> None:
    """Put the weights of a checkpoint into ``core(model)``, all of them or none.

    The file may hold one dictionary of tensors that fits, anywhere in it, with any prefix before
    all names.  Entries that are no part of the network are ignored and named in a
    :class:`~cure.errors.CureNote`.  A checkpoint that standardises inside (it holds ``mean`` and
    ``std``) is accepted only by a model that is :class:`Normalised` with the same constants.

    Args:
        model: any network; it is left untouched when anything fails.
        path: see :func:`read_weights`.
        key: which dictionary to take where several fit, for example "ema".
        new_head: draw the layer of the logits anew and load the rest: the last linear layer or
            1x1 convolution whose output is the number of classes, or the layer of this name.
        seed: of the run, for the new head.
        setting: what messages call ``key``.

    Raises:
        CheckpointError: when the file cannot be read (see :func:`read_weights`), when nothing or
            more than one thing in it fits the network, or when a weight is not finite.
        ModelError: when there is no head to draw.
    """
    path = Path(path).expanduser()
    content, exact = read_file(path)
    network = core(model)
    target = tensors_of(network)
    found = choose(fits(content, target), path, key)
    if exact:
        # Written here, so that its names are those of the network.
        found = [fit for fit in found if not fit.place]
    if not found:
        _tensors(content, path)  # Says what the file holds instead.
        raise CheckpointError(f"{path} holds no weights of {type(network).__name__}")
    head = head_name(model, new_head) if new_head else None
    drawn = [] if head is None else [n for n in target if n.startswith(f"{head}.") or n == head]
    fitting = [fit for fit in found if not fit.missing and set(fit.differing) <= set(drawn)]
    if len(fitting) > 1:
        named = " and ".join(f"'{fit.place or 'the file itself'}'" for fit in fitting[:3])
        raise CheckpointError(
            f"{path} holds {len(fitting)} sets of weights that fit the model, {named}; choose one "
            f"with {setting}={fitting[-1].place or 'NAME'}"
        )
    if not fitting and (read := _read_by(network, found[0])) is not None:
        fitting = [read]
    if not fitting or (exact and fitting[0].extra):
        raise CheckpointError(_unfitting(model, path, (fitting or found)[0], target, exact))
    fit = fitting[0]
    _check_normalisation(model, path, fit.extra)
    _tell_of_averages(network, path, fit, found)
    ready = {
        name: _as(target[name], value, name, path)
        for name, value in fit.weights.items()
        if name not in drawn
    }
    broken = [name for name, value in ready.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(
            f"{path} holds weights that are not finite ({_listed('in all', broken)}); training "
            "had probably diverged before it was written"
        )
    held: dict[tuple[object, ...], str] = {}
    for name, value in ready.items():
        first = held.setdefault(storage_of(target[name]), name)
        if value.numel() and not torch.equal(value, ready[first]):
            raise CheckpointError(
                f"{path} holds different weights for '{first}' and '{name}', which are one tensor "
                "of the network; build the network without sharing it"
            )
    others = [name for name in fit.extra if not constants({name: fit.extra[name]})]
    if others:
        warnings.warn(
            f"{path.name}: ignored {_listed('entries that are no part of the network', others)}",
            CureNote,
            stacklevel=2,
        )
    network.load_state_dict({**network.state_dict(), **ready}, strict=True)
    if head is not None:
        draw_head(network, head, seed)


def _read_by(network: nn.Module, fit: Fit) -> Fit | None:
    """The fit, where layers of the network take other names than they give, such as the weights of
    ``torch.nn.utils.weight_norm`` in ``parametrizations.weight_norm``; None where they do not."""
    if not all(value.is_floating_point() and not value.is_meta for value in fit.extra.values()):
        return None
    twin = copy_network(network)
    try:
        twin.load_state_dict(fit.named, strict=True)
    except Exception:  # whatever its layers do with names that they do not know
        return None
    return Fit(fit.place, tensors_of(twin), {})


def _tell_of_averages(network: nn.Module, path: Path, fit: Fit, found: list[Fit]) -> None:
    """Say that a file holds other values of all parameters, but no statistics of BatchNorm."""
    buffers = {name for name, _ in network.named_buffers()}
    for other in found:
        if other is not fit and other.missing and buffers.issuperset(other.missing):
            warnings.warn(
                f"{path.name}: '{fit.place or 'the file itself'}' is taken; '{other.place}' holds "
                "other values of the parameters alone, such as an average, without the statistics "
                "of BatchNorm, and is left out",
                CureNote,
                stacklevel=3,
            )


def _as(target: Tensor, value: Tensor, name: str, path: Path) -> Tensor:
    """A tensor of a file as one of the network's.

    Raises:
        CheckpointError: when its numbers are no weights without more of the file.
    """
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.is_meta or (target.is_floating_point() and not value.is_floating_point()):
        kind = "no numbers" if value.is_meta else str(value.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path}: expected floating-point weights, got {kind} in '{name}'; give the file from "
            "before its weights were quantised"
        )
    return value.to(target.dtype)


def _unfitting(
    model: nn.Module, path: Path, fit: Fit, target: Mapping[str, Tensor], exact: bool
) -> str:
    """The sentence for a file in which nothing fits the network."""
    differing = [
        f"{name} {list(fit.weights[name].shape)} for {list(target[name].shape)}"
        for name in fit.differing
    ]
    problems = [
        _listed("missing", fit.missing),
        _listed("unexpected", list(fit.extra)) if exact or fit.missing else "",
        _listed("of another shape", differing),
    ]
    advice = "check model.name, model.options and the number of classes"
    if _PART.search(path.name):
        advice = "it is one part of several: give their index (a name in .index.json) or the folder"
    elif differing and not fit.missing:
        try:
            head = head_name(model, True)
        except ModelError:
            head = None
        if head is not None and all(name.startswith(f"{head}.") for name in fit.differing):
            advice = (
                f"only its last layer '{head}' is for another number of classes: new_head=true "
                "draws a new one and loads the rest, and start=natural:FILE trains it first"
            )
    return (
        f"{path} does not fit the model ({type(core(model)).__name__}): "
        f"{'; '.join(filter(None, problems))}; {advice}"
    )


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
    for name, value in tensors_of(core(model)).items():
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


def _check_normalisation(model: nn.Module, path: Path, extra: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that standardises inside unless the model does the same."""
    values = constants(extra)
    if not values:
        return
    inside = next((m for m in model.modules() if isinstance(m, Normalised)), None)
    if inside is not None and values.keys() == {"mean", "std"}:
        own = {"mean": inside.mean.flatten(), "std": inside.std.flatten()}
        if all(
            len(own[role]) == len(values[role])
            and torch.allclose(own[role].cpu(), torch.tensor(values[role]), atol=1e-6)
            for role in own
        ):
            return
    names = [name for name in extra if constants({name: extra[name]})]
    levels = max(map(max, values.values())) > 2  # for images of 0 to 255
    if levels:
        values = {role: [round(one / 255, 7) for one in part] for role, part in values.items()}
    channels = len(next(iter(values.values())))
    values = {"mean": [0.0] * channels, "std": [1.0] * channels} | values
    advice = " and ".join(f"model.{role} {numbers}" for role, numbers in sorted(values.items()))
    given = " ".join(
        f"--{role} {','.join(map(str, numbers))}" for role, numbers in sorted(values.items())
    )
    raise CheckpointError(
        f"{path} standardises images inside ({_listed('unexpected', names)}); give the same "
        f"constants{', divided by 255 for images in [0, 1],' if levels else ''} as mean and std in "
        f"the recipe: {advice} (cure evaluate: {given})"
    )


def _listed(what: str, names: list[str]) -> str:
    """``3 missing: a, b, c``; at most five names; nothing for none."""
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"
