"""The class names that a network comes with, and logits in the order of the data's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from cure.data.labels import match_classes
from cure.errors import DataError, ModelError
from cure.models.checks import NEW_HEAD_ADVICE
from cure.models.contract import Contract
from cure.models.trial import traits_of, with_traits
from cure.models.wrapper import Selected, Wrapper


def own_classes(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the logits, of a network that :func:`cure.from_pretrained` read, or from
    transformers (``config.id2label``); None where it has none.

    >>> own_classes(nn.Linear(2, 2)) is None
    True
    """
    contract = getattr(model, "contract", None)
    if isinstance(contract, Contract):
        return contract.kind.classes
    if isinstance(model, Selected):
        inner = own_classes(model.network)
        return None if inner is None else tuple(inner[place] for place in model.places.tolist())
    if isinstance(model, Wrapper):
        return own_classes(model.network)
    table = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(table, Mapping) or not table:
        return None
    numbered = {str(place): str(name) for place, name in table.items()}
    return tuple(numbered.get(str(place), f"LABEL_{place}") for place in range(len(table)))


def places_of(names: Sequence[str], theirs: Sequence[str], title: str) -> tuple[int, ...]:
    """Position among ``theirs`` of the logit of each class in ``names``.

    Raises:
        ModelError: names do not match.
    """
    try:
        return match_classes(names, theirs)
    except DataError as error:
        counts = ""
        if len(names) != len(theirs):
            counts = f" has {len(theirs)} classes but the data has {len(names)}"
        raise ModelError(f"{title}{counts}: {error}; {NEW_HEAD_ADVICE}") from None


def in_order(model: nn.Module, names: Sequence[str], theirs: Sequence[str] | None) -> nn.Module:
    """The network with its logits in the order of ``names``.

    Args:
        model: after its trial (:func:`~cure.models.trial.adapt`).
        names: classes of the data.
        theirs: names of its logits, where it has any.

    Raises:
        ModelError: names do not match.
    """
    traits = traits_of(model)
    # Another number of logits than of names: its last layer was replaced since it was named.
    if theirs is None or traits.shape[1:] != (len(theirs),):
        return model
    places = places_of(names, theirs, "the network")
    if places == tuple(range(len(theirs))):
        return model
    return with_traits(Selected(model, places), replace(traits, shape=(2, len(names))))


def rename_classes(model: nn.Module, names: Sequence[str] | None) -> None:
    """Forget the names of a last layer that was replaced; take ``names`` where they are known."""
    network = model
    while True:
        if isinstance(getattr(network, "contract", None), Contract):
            del network.contract
        if not isinstance(network, Wrapper):
            break
        network = network.network
    config: Any = getattr(network, "config", None)
    if isinstance(getattr(config, "id2label", None), Mapping) and names is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: place for place, name in enumerate(names)}
