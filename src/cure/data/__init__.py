"""Images: sources, splits, augmentation, batches."""

from cure.data.augment import augment
from cure.data.images import Batch, ImageKind, ImageSet
from cure.data.loader import batches, epoch, steps_per_epoch, to_unit
from cure.data.sources import SHORT_NAMES, known_sources, load
from cure.data.splits import carve, stratified

__all__ = [
    "SHORT_NAMES",
    "Batch",
    "ImageKind",
    "ImageSet",
    "augment",
    "batches",
    "carve",
    "epoch",
    "known_sources",
    "load",
    "steps_per_epoch",
    "stratified",
    "to_unit",
]
