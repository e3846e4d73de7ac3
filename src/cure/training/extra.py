"""The extra images of a run: read, labelled, and looked through for copies of held-out images.

What was chosen is kept in the run, so that a resumed run has the same images and labels whatever
became of the network that labelled them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cure.config import RunConfig
from cure.data import ImageSet, batches
from cure.data.cache import CachePlace
from cure.data.extra import (
    ExtraAccount,
    Leaks,
    check_leaks,
    find_leaks,
    held_out_splits,
    load_extra,
    with_labels,
)
from cure.data.leaks import Describe
from cure.data.loader import extra_images
from cure.data.readers import UNLABELLED
from cure.errors import CheckpointError, ConfigError, DataError, ModelError
from cure.models.checks import predicted
from cure.models.features import Features
from cure.runs.folder import RunFolder
from cure.runs.state import load_state, save_state
from cure.utils.engine import Engine
from cure.utils.modes import evaluating
from cure.utils.sheet import SheetRow, write_sheet

COPIES = "copies.png"
"""Picture in a run: extra images beside the held-out images that they copy."""

_PAIRS = 20


@dataclass(frozen=True)
class Extra:
    """Extra images that a run is trained on.

    Attributes:
        images: with their labels.
        kept: [number of images] int64, their positions in the source.
        found: how many the source has.
        account: what is told of them; None in a run that goes on.
        copies: the copies of held-out images that are most like what they copy, for a picture.
    """

    images: ImageSet
    kept: Tensor
    found: int
    account: ExtraAccount | None
    copies: tuple[SheetRow, ...] = ()

    def save(self, folder: RunFolder) -> None:
        """Keep the choice of images and their labels in a run, and a picture of copies."""
        content = {"kept": self.kept, "label": self.images.label.cpu(), "found": self.found}
        save_state(_file(folder), content)
        if self.copies:
            write_sheet(folder.path / COPIES, ["extra", "held-out"], self.copies)


def _file(folder: RunFolder) -> Path:
    return folder.path / "extra.safetensors"


def is_chosen(folder: RunFolder | None) -> bool:
    """Whether a run knows its extra images and their labels already."""
    return folder is not None and _file(folder).exists()


def choose_extra(
    config: RunConfig,
    training: ImageSet,
    validation: ImageSet,
    labeller: nn.Module | None,
    engine: Engine,
    folder: RunFolder | None = None,
    place: CachePlace | None = None,
    trained: nn.Module | None = None,
) -> Extra:
    """The extra images of a run.

    Args:
        config: the run; it has ``data.extra``.
        training: its images.
        validation: those that validate.
        labeller: the network of ``data.extra_labels``, if there is one.
        engine: where it predicts; of several ranks the first chooses for all.
        folder: of a run that goes on.
        place: where ``data.cache`` keeps decoded images.
        trained: a network whose features tell images apart, by default the labeller.

    Raises:
        CureError: the images cannot be used.
    """
    with engine.agreeing():
        extra_images(config.training.batch_size, config.data.extra_share)
        raw = load_extra(config.data, training, place)
    copies: tuple[SheetRow, ...] = ()
    if folder is not None and is_chosen(folder):
        state = load_state(_file(folder))
        if state["found"] != len(raw):
            raise CheckpointError(
                f"expected the {state['found']} extra images that the run began with in "
                f"'{config.data.extra}', got {len(raw)}; restore them"
            )
        kept, label, account = state["kept"], state["label"], None
    else:
        kept, label, account, copies = engine.first(
            lambda: _choose(
                config, raw, training, validation, labeller, engine, place, labeller or trained
            )
        )
    extra = Extra(replace(raw.subset(kept), label=label), kept, len(raw), account, copies)
    if folder is not None and account is not None and folder.writes:
        extra.save(folder)
    return extra


def _choose(
    config: RunConfig,
    raw: ImageSet,
    training: ImageSet,
    validation: ImageSet,
    labeller: nn.Module | None,
    engine: Engine,
    place: CachePlace | None,
    trained: nn.Module | None,
) -> tuple[Tensor, Tensor, ExtraAccount, tuple[SheetRow, ...]]:
    """Positions of the images that are trained on, their labels, what is told, and copies."""
    settings = config.data
    without = raw.label == UNLABELLED
    if settings.extra_labels is not None and not without.any():
        raise ConfigError(
            f"data.extra_labels: expected extra images without labels, got a label for each of the "
            f"{len(raw)} of '{raw.name}'; leave data.extra_labels out, or the labels"
        )
    if labeller is None:
        with_labels(raw, None)  # Says what is missing before time is spent.
    held = held_out_splits(settings, validation, place)
    with features_of(trained, len(raw.classes), engine) as describe:
        leaks = tuple(
            find_leaks(raw, training, split, engine.device, describe)
            for split in held.values()
            if isinstance(split, ImageSet)
        )
    if settings.extra_leaks == "refuse":
        check_leaks(leaks)
    copies = torch.zeros(len(raw), dtype=torch.bool)
    if settings.extra_leaks == "remove":
        copies[[row for one in leaks for row in (*one.rows, *(one.suspects or ()))]] = True
    kept = (~copies).nonzero().squeeze(1)
    if not len(kept):
        raise DataError(
            f"expected extra images that copy no held-out image in '{raw.name}', got none; take "
            "others"
        )
    chosen = raw.subset(kept)
    unlabelled = chosen.subset((chosen.label == UNLABELLED).nonzero().squeeze(1))
    if labeller is not None and len(unlabelled):
        named = predict(labeller, unlabelled, config.evaluation.batch_size, engine)
        chosen = with_labels(chosen, named)
    counts = torch.bincount(chosen.label, minlength=len(raw.classes)).tolist()
    account = ExtraAccount(
        name=raw.name,
        images=tuple(counts),
        share=settings.extra_share,
        predicted=len(unlabelled),
        labelled_by=settings.extra_labels,
        leaks=leaks,
        action=settings.extra_leaks,
        removed=int(copies.sum()),
        skipped=raw.findings.skipped,
        unmeasured={split: why for split, why in held.items() if isinstance(why, str)},
    )
    return kept, chosen.label, account, _copies(raw, held, leaks)


def _copies(
    raw: ImageSet, held: Mapping[str, ImageSet | str], leaks: tuple[Leaks, ...]
) -> tuple[SheetRow, ...]:
    """Pairs of images, the most similar first; then those that a network suspects."""
    pairs = sorted(
        (
            (similarity, one.split, row, copied)
            for one in leaks
            for row, copied, similarity in zip(one.rows, one.copied, one.similarity, strict=True)
        ),
        reverse=True,
    )
    suspected = [
        (None, one.split, row, copied)
        for one in leaks
        for row, copied in zip(one.suspects or (), one.suspected, strict=True)
    ]
    rows: list[SheetRow] = []
    for similarity, split, row, copied in [*pairs, *suspected][:_PAIRS]:
        other = held[split]
        assert isinstance(other, ImageSet)
        cells = [
            images.rows(slice(at, at + 1))[0].permute(1, 2, 0).contiguous().numpy()
            for images, at in ((raw, row), (other, copied))
        ]
        mark = "by features" if similarity is None else f"{similarity:.2f}"
        rows.append((f"{row}, {split} {copied}: {mark}", cells))
    return tuple(rows)


@contextmanager
def features_of(
    network: nn.Module | None, classes: int, engine: Engine
) -> Iterator[Describe | None]:
    """The features of a network; None without one, or where its last layer cannot be found."""
    if network is None:
        yield None
        return
    with evaluating(engine.place(network)) as placed:
        try:
            features = Features(placed, classes)
        except ModelError:
            yield None
            return
        yield lambda image: features(engine.arrange(image.to(engine.device)))


@torch.no_grad()
def predict(network: nn.Module, images: ImageSet, batch_size: int, engine: Engine) -> Tensor:
    """The class that a network names for each image, [N] int64 on the CPU.

    Args:
        network: its modes are restored afterwards.
        images: anywhere.
        batch_size: images at once.
        engine: where it is computed.

    Raises:
        ModelError: when it names none, as its logits are no numbers.
    """
    with evaluating(engine.place(network)) as placed:
        found = torch.cat(
            [
                predicted(placed(engine.arrange(batch.image.to(engine.device)))).cpu()
                for batch in batches(images, batch_size)
            ]
        )
    if failed := int((found < 0).sum()):
        raise ModelError(
            f"data.extra_labels: expected a class for each extra image, got none for {failed:,} of "
            f"{len(found):,}; name a network whose logits are numbers"
        )
    return found
