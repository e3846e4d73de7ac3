"""Networks: the registered architectures, networks from elsewhere, and their weights.

Every network takes images [B, C, H, W] in [0, 1] and returns logits [B, classes]; one that was
made for standardised images is wrapped in :class:`Normalised`, so that attacks stay in [0, 1].
"""

from cure.models.build import build_model, describe
from cure.models.checkpoint import load_weights, read_weights, save_weights
from cure.models.registry import MODELS, Builder
from cure.models.weight_files import digest
from cure.models.wrapper import Normalised, core

__all__ = [
    "MODELS",
    "Builder",
    "Normalised",
    "build_model",
    "core",
    "describe",
    "digest",
    "load_weights",
    "read_weights",
    "save_weights",
]
