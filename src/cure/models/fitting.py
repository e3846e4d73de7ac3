"""Finds, in what a checkpoint file holds, the one dictionary of tensors that fits a network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cure.errors import CheckpointError

_OPTIONAL = "num_batches_tracked"
"""Counts of BatchNorm, which no result depends on: may be missing."""

_CONSTANT = re.compile(r"(?!.*running_)(?:.*[._])?(?:(mean|mu)|(std|sigma))", re.IGNORECASE)


@dataclass(frozen=True)
class Fit:
    """A dictionary of tensors of a file, seen as the weights of a network.

    Attributes:
        place: where it is in the file, with the prefix of its names: "model.module"; empty for
            the file itself.
        weights: tensors by the network's names, as far as they are there.
        extra: the other tensors of the dictionary, by their names in the file.
        named: all tensors of the dictionary, by the names that the network would give them.
        missing: the network's names that are not there.
        differing: the network's names whose tensors have another shape in the file.
    """

    place: str
    weights: dict[str, Tensor]
    extra: dict[str, Tensor]
    named: dict[str, Tensor] = field(default_factory=dict, repr=False)
    missing: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Everything of the network is there, in its shape."""
        return not self.missing and not self.differing


def containers(content: object, place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary inside a file that holds tensors, with its place: its tensors by name."""
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            yield place, tensors
        items = list(content.items())
    elif isinstance(content, list | tuple):
        items = list(enumerate(content))
    else:
        return
    for key, value in items:
        if not isinstance(value, Tensor):
            yield from containers(value, f"{place}.{key}" if place else str(key))


def fits(content: object, target: Mapping[str, Tensor]) -> list[Fit]:
    """Every way to see a dictionary of the file as weights of a network, the best first.

    Args:
        content: what the file held.
        target: the network's state dict.
    """
    found: list[Fit] = []
    for place, tensors in containers(content):
        for prefix, dropped in _prefixes(tensors, target):
            fit = _fit(place, tensors, prefix, dropped, target)
            if not any(_same(fit, other) for other in found):
                found.append(fit)
    return sorted(found, key=lambda fit: (len(fit.missing), len(fit.differing), len(fit.extra)))


def _fit(
    place: str, tensors: dict[str, Tensor], prefix: str, dropped: str, target: Mapping[str, Tensor]
) -> Fit:
    names = {name: prefix + name.removeprefix(dropped) for name in target}
    weights = {name: tensors[there] for name, there in names.items() if there in tensors}
    used = set(names.values())
    # safetensors.torch.save_model writes tied weights once.
    held = {storage_of(target[name]): value for name, value in weights.items()}
    weights |= {
        name: held[storage_of(tensor)]
        for name, tensor in target.items()
        if name not in weights and tensor.numel() and storage_of(tensor) in held
    }
    return Fit(
        ".".join(filter(None, [place, prefix.rstrip(".")])),
        weights,
        {name: tensor for name, tensor in tensors.items() if name not in used},
        {
            dropped + name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        },
        [n for n in target if n not in weights and n.rpartition(".")[2] != _OPTIONAL],
        [n for n, tensor in weights.items() if tensor.shape != target[n].shape],
    )


def storage_of(tensor: Tensor) -> tuple[object, ...]:
    """The same for names of one tensor of the network."""
    place = id(tensor) if tensor.is_meta else tensor.data_ptr()
    return place, tensor.shape, tensor.stride()


def _prefixes(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """What the names may begin with in the file, and in the network only."""
    own = [name for name in target if name.rpartition(".")[2] != _OPTIONAL]
    if not own:
        return [("", "")]
    shared, found = "", [("", "")]
    while True:
        for name in dict.fromkeys((own[0], own[-1])):
            end = name.removeprefix(shared)
            found += [
                (there.removesuffix(end), shared)
                for there in tensors
                if there == end or there.endswith("." + end)
            ]
        first = own[0].removeprefix(shared).split(".")[0] + "."
        if not all(name.startswith(shared + first) for name in own):
            return list(dict.fromkeys(found))
        shared += first


def _same(one: Fit, other: Fit) -> bool:
    """Whether two fits give the network the same tensors."""
    if one.missing != other.missing or one.weights.keys() != other.weights.keys():
        return False
    pairs = [(tensor, other.weights[name]) for name, tensor in one.weights.items()]
    return all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in pairs
    )


def constants(extra: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Constants for standardising among tensors that are no part of a network: "mean", "std".

    >>> constants({"0.mean": torch.tensor([0.5]), "total_ops": torch.zeros(1)})
    {'mean': [0.5]}
    """
    found = {}
    for name, tensor in extra.items():
        match = _CONSTANT.fullmatch(name)
        if match is not None and 1 <= tensor.numel() <= 4 and tensor.is_floating_point():
            role = "mean" if match[1] else "std"
            found[role] = [round(number, 7) for number in tensor.flatten().tolist()]
    return found


def choose(found: list[Fit], path: object, key: str | None) -> list[Fit]:
    """The fits that a key names; all of them without a key.

    Raises:
        CheckpointError: when nothing in the file has that name.
    """
    if key is None:
        return found
    named = [fit for fit in found if key == fit.place or key in fit.place.split(".")]
    if not named:
        places = list(dict.fromkeys(fit.place for fit in found if fit.place))
        raise CheckpointError(
            f"{path} holds no weights under the key '{key}'; it has "
            f"{', '.join(places[:5]) or 'one dictionary of tensors and no key'}"
        )
    return named
