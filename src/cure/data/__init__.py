"""Images: sources, splits, augmentation, batches."""

from cure.data.accounting import DataAccount, account
from cure.data.augment import augment
from cure.data.images import Batch, Findings, ImageKind, ImageSet, Skipped
from cure.data.labels import match_classes, relabelled
from cure.data.loader import batches, epoch, steps_per_epoch, to_unit
from cure.data.objects import as_images
from cure.data.opening import SHORT_NAMES, known_sources
from cure.data.sources import load, load_split, load_training
from cure.data.splits import carve, stratified

__all__ = [
    "SHORT_NAMES",
    "Batch",
    "DataAccount",
    "Findings",
    "ImageKind",
    "ImageSet",
    "Skipped",
    "account",
    "as_images",
    "augment",
    "batches",
    "carve",
    "epoch",
    "known_sources",
    "load",
    "load_split",
    "load_training",
    "match_classes",
    "relabelled",
    "steps_per_epoch",
    "stratified",
    "to_unit",
]
